"""How tokens are drawn and what ends a chain: the words, and which values they may take."""

import math
from dataclasses import dataclass

UNFINISHED = "\ufffd"  # what decoding puts for the bytes of a character that is not there in full


def _is_number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def is_int(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _is_text(x: object) -> bool:
    return isinstance(x, str) and x != "" and UNFINISHED not in x


_FIELDS = {
    "temperature": (lambda x: _is_number(x) and (x == 0 or x >= 1e-4), "0 (greedy) or a number of at least 1e-4"),
    "top_p": (lambda x: _is_number(x) and 0 < x <= 1, "a number above 0 and at most 1; 1 turns it off"),
    "top_k": (lambda x: is_int(x) and x >= 0, "a whole number of at least 0; 0 turns it off"),
    "min_p": (lambda x: _is_number(x) and 0 <= x <= 1, "a number from 0 to 1; 0 turns it off"),
    "repetition_penalty": (lambda x: _is_number(x) and x > 0, "a number above 0; 1 turns it off, 1.1 discourages"),
    "stop": (
        lambda x: isinstance(x, tuple) and all(map(_is_text, x)),
        "a tuple of texts, none empty and none with the replacement character U+FFFD, e.g. ('\\n\\n',)",
    ),
    "stop_ids": (
        lambda x: isinstance(x, tuple) and all(is_int(i) and i >= 0 for i in x),
        "a tuple of token ids, whole numbers of at least 0, e.g. (3,)",
    ),
    "stop_after": (
        lambda x: x is None or _is_text(x),
        "None or a text, not empty and without the replacement character U+FFFD, e.g. '</think>'",
    ),
    "seed": (is_int, "a whole number"),
}


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn and what ends a chain; a value out of range raises `ValueError`.

    `temperature` 0 is greedy: `top_p`, `top_k` and `min_p` then have no effect, `repetition_penalty` has. Until the text
    `stop_after` was generated, neither `stop` nor `stop_ids` ends a chain; only generated text counts, so give None where
    the prompt has it already. End-of-sequence ids are the model's, not set here, and always hold.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    stop_after: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (accepts, valid) in _FIELDS.items():
            value = getattr(self, name)
            if not accepts(value):
                raise ValueError(f"{name}={value!r} is not valid; {name} must be {valid}")
