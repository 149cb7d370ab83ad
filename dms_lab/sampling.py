"""The pure part of generation: which token a chain takes next, and when it is done.

    logits [R, V] -> penalty, temperature, top-k, top-p, min-p -> inverse CDF at a chain's own uniform -> tokens [R]
    tokens        -> the text that each completes               -> end token, stop id, stop string?

Nothing here knows of batches, caches or clocks: a chain's token is a function of its logits, its tokens so far and its
uniform, and a uniform is a function of (seed, problem, chain, step). Shapes: R rows (running chains), V vocabulary.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

_UNFINISHED = "\ufffd"  # what decoding puts for the bytes of a character that is not there in full


def _is_number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _is_int(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _is_text(x: object) -> bool:
    return isinstance(x, str) and x != "" and _UNFINISHED not in x


_FIELDS = {
    "temperature": (lambda x: _is_number(x) and (x == 0 or x >= 1e-4), "0 (greedy) or a number of at least 1e-4"),
    "top_p": (lambda x: _is_number(x) and 0 < x <= 1, "a number above 0 and at most 1; 1 turns it off"),
    "top_k": (lambda x: _is_int(x) and x >= 0, "a whole number of at least 0; 0 turns it off"),
    "min_p": (lambda x: _is_number(x) and 0 <= x <= 1, "a number from 0 to 1; 0 turns it off"),
    "repetition_penalty": (lambda x: _is_number(x) and x > 0, "a number above 0; 1 turns it off, 1.1 discourages"),
    "stop": (
        lambda x: isinstance(x, tuple) and all(map(_is_text, x)),
        "a tuple of texts, none empty and none with the replacement character U+FFFD, e.g. ('\\n\\n',)",
    ),
    "stop_ids": (
        lambda x: isinstance(x, tuple) and all(_is_int(i) and i >= 0 for i in x),
        "a tuple of token ids, whole numbers of at least 0, e.g. (3,)",
    ),
    "stop_after": (
        lambda x: x is None or _is_text(x),
        "None or a text, not empty and without the replacement character U+FFFD, e.g. '</think>'",
    ),
    "seed": (_is_int, "a whole number"),
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


@dataclass(frozen=True)
class ChainGenerator:
    """The random numbers of one chain: SHA-256 in counter mode, so that no draw depends on another having been made."""

    key: bytes

    def uniform(self, step: int) -> float:
        """The uniform number of token `step` (0 is the first generated one), a multiple of 2^-53 in [0, 1)."""
        digest = hashlib.sha256(self.key + step.to_bytes(8, "big")).digest()
        return (int.from_bytes(digest[:8], "big") >> 11) * 2.0**-53


def chain_generator(seed: int, problem: int | str, chain: int) -> ChainGenerator:
    """The numbers of chain `chain` of a problem: equal in every process, and other for any other of the three.

    The problems 1 and "1" are two problems.
    """
    if not (_is_int(seed) and (_is_int(problem) or isinstance(problem, str)) and _is_int(chain)):
        raise ValueError(
            f"seed={seed!r}, problem={problem!r}, chain={chain!r} do not name a chain: seed and chain must be of type int, "
            "problem of type int or str; convert other integers with int()"
        )
    return ChainGenerator(hashlib.sha256(json.dumps([seed, problem, chain]).encode()).digest())


class Sampler:
    """Chooses the next token of every running chain, and makes the rules that end them.

    Raises `ValueError` if `config` asks for texts to stop at and there is no tokenizer.
    """

    def __init__(
        self, config: SamplingConfig, eos_ids: Iterable[int], tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        self.config = config
        self.eos_ids = _id_set(eos_ids)
        self.tokenizer = tokenizer
        self.stop_rule()  # what no rule can follow fails here, before anything is generated
        # The order of transformers' `generate`. The first list treats rows alike wherever they stand in a batch: it works
        # by element or takes maxima. The second adds up, and the order of a sum may follow the batch: it gets single rows.
        self._batched, self._single = [], []
        if config.repetition_penalty != 1:
            self._batched.append(RepetitionPenaltyLogitsProcessor(float(config.repetition_penalty)))
        if config.temperature not in (0, 1):
            self._batched.append(TemperatureLogitsWarper(float(config.temperature)))
        if config.temperature and config.top_k:
            self._batched.append(TopKLogitsWarper(config.top_k))
        if config.temperature and config.top_p < 1:
            self._single.append(TopPLogitsWarper(float(config.top_p)))
        if config.temperature and config.min_p:
            self._single.append(MinPLogitsWarper(float(config.min_p)))

    def stop_rule(self) -> "StopRule":
        """A fresh rule for one chain."""
        return StopRule(self.config, self.eos_ids, self.tokenizer)

    @torch.no_grad()
    def choose(
        self, logits: Tensor, histories: Sequence[Sequence[int]], uniforms: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """The next token of every row and whether the row is sound: tokens [R] long, valid [R] bool, on the logits' device.

        `logits` [R, V] of any floating dtype, computed on in float32, not changed. `histories`: R lists of the tokens so
        far, prompt included, of any lengths. `uniforms`: R numbers in [0, 1), not read if greedy. A row depends, bit for
        bit, on its own logits, history and uniform alone. A row with NaN or +inf, or with nothing but -inf, is not valid;
        its token is 0 and means nothing. A token of probability 0 is never chosen.
        """
        _check_rows(logits, histories, uniforms)
        return self._chosen(logits, self._context(histories, logits), uniforms)

    def check_draws(self) -> None:
        """Raises `ValueError` unless `draw` can choose as this configuration says."""
        if self.config.repetition_penalty != 1:
            raise ValueError(
                f"step=graph chooses tokens on the device, where a chain's past is not known: repetition_penalty="
                f"{self.config.repetition_penalty} needs step=eager"
            )

    @torch.no_grad()
    def draw(self, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """As `choose`, to the bit, for `uniforms` [R] in float64 on the logits' device; checks and waits for nothing."""
        return self._chosen(logits, None, uniforms)

    def _chosen(self, logits: Tensor, context: Tensor | None, uniforms: Sequence[float] | Tensor) -> tuple[Tensor, Tensor]:
        scores = logits.float()
        for process in self._batched:
            scores = process(context, scores)
        top = scores.amax(-1)  # NaN where a row has one
        valid = top.isfinite()
        if not self.config.temperature:
            return scores.argmax(-1).masked_fill(~valid, 0), valid
        scores = scores.masked_fill(~valid[:, None], 0.0)
        tokens = torch.zeros(len(scores), dtype=torch.long, device=scores.device)
        for row in range(len(scores)):
            tokens[row] = self._draw(scores[row : row + 1].clone(), uniforms[row])  # a copy: aligned like any other row
        return tokens.masked_fill(~valid, 0), valid

    def _context(self, histories: Sequence[Sequence[int]], logits: Tensor) -> Tensor:
        """Token ids [R, longest], padded with V, which the penalty drops; [R, 0] where nothing reads them."""
        num_rows, size = logits.shape
        if self.config.repetition_penalty == 1:
            histories = [()] * num_rows
        context = torch.full((num_rows, max(map(len, histories), default=0)), size, dtype=torch.long)
        for row, history in enumerate(histories):
            context[row, : len(history)] = torch.as_tensor(history, dtype=torch.long)
        return context.to(logits.device)

    def _draw(self, scores: Tensor, uniform: float | Tensor) -> Tensor:
        """The first allowed token whose cumulative probability exceeds `uniform`; `scores` [1, V]. No synchronisation."""
        for process in self._single:
            scores = process(None, scores)
        probabilities = scores[0].double().softmax(-1)
        cumulative = probabilities.cumsum(-1)
        allowed = probabilities > 0
        reached = allowed & (cumulative > uniform * cumulative[-1])
        position = torch.arange(len(allowed), device=allowed.device)
        last = position.where(allowed, -1).amax()  # where rounding leaves nothing above a uniform close to 1
        return position.where(reached, len(allowed)).amin().minimum(last)


def _check_rows(logits: Tensor, histories: Sequence[Sequence[int]], uniforms: Sequence[float]) -> None:
    if logits.dim() != 2 or not logits.is_floating_point() or not logits.shape[1]:
        raise ValueError(
            f"logits have shape {list(logits.shape)} and dtype {logits.dtype}; expected floating point [rows, vocabulary], "
            "e.g. output.logits[:, -1]"
        )
    if not len(histories) == len(uniforms) == len(logits):
        raise ValueError(
            f"logits have {len(logits)} rows, but there are {len(histories)} histories and {len(uniforms)} uniforms; "
            "give one of each per row"
        )
    for row, uniform in enumerate(uniforms):
        if not 0 <= uniform < 1:
            raise ValueError(f"uniform {row} is {float(uniform)}; uniforms are at least 0 and below 1")


def _id_set(eos_ids: Iterable[int]) -> frozenset[int]:
    ids = tuple(eos_ids) if isinstance(eos_ids, Iterable) else (None,)
    if not all(map(_is_int, ids)):
        raise ValueError(f"eos_ids={eos_ids!r} is not a collection of token ids; give whole numbers, e.g. (3,)")
    return frozenset(ids)


class _Decoder:
    """Hands out the text of a growing list of ids, token by token, by decoding only a window of the last few.

    Decoding a token alone is wrong where decoders drop a leading space, join word pieces or need more bytes: the window
    begins at least `CONTEXT` tokens back (or at the first token), at the end of a character where the bytes make sense
    at all. Handed out is what the window has grown by, less a character that is not there in full.
    """

    CONTEXT = 8

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._start = self._boundary = self._num_given = 0  # the window begins at `start`, the next one at `boundary`

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` as it is: special tokens included, spaces not tidied."""
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def push(self, ids: Sequence[int], n: int) -> str:
        """The characters that `ids[n - 1]` completes. To be called for n = 1, 2, ..."""
        window = self.decode(ids[self._start : n])
        whole = window.rstrip(_UNFINISHED)
        new, self._num_given = whole[self._num_given :], max(self._num_given, len(whole))
        age = n - self._boundary
        if age >= 2 * self.CONTEXT or (age >= self.CONTEXT and whole == window):
            self._start, self._boundary = self._boundary, n
            self._num_given = len(self.decode(ids[self._start : n]).rstrip(_UNFINISHED))
        return new


class StopRule:
    """When one chain ends: at an end token, a stop id or a stop string, the latter two only after `stop_after`.

    A function of the generated ids alone: a fresh rule given all of them at once is in the state of one that saw them come
    one at a time. Decoding costs a bounded number of tokens a step. A stop string counts if it begins after the end of
    the first `stop_after`, a stop id if it comes after the token that completes it. Raises `ValueError` if there are
    texts to look for and no tokenizer.

    Limit: the text is that of the generated ids without the prompt, so with a tokenizer that drops the leading space of a
    text (Llama 2) a stop string does not match a space at the very beginning.
    """

    def __init__(
        self, config: SamplingConfig, eos_ids: Iterable[int], tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        self._reads_text = bool(config.stop) or (config.stop_after is not None and bool(config.stop_ids))
        if self._reads_text and tokenizer is None:
            raise ValueError(
                f"stop={config.stop!r} with stop_after={config.stop_after!r} needs the text of the tokens, but no "
                "tokenizer was given; give the model's tokenizer, or stop at stop_ids without stop_after"
            )
        self._config = config
        self._eos_ids = _id_set(eos_ids)
        self._decoder = _Decoder(tokenizer) if tokenizer is not None else None
        self._longest = max(map(len, config.stop), default=0)
        self._holds = config.stop_after is None
        self._tail = ""  # the end of the text read so far in which what is looked for may have begun
        self._num_seen = 0
        self._verdict: tuple[str, int] | None = None
        self._at_string = False

    def check(self, generated_ids: Sequence[int]) -> tuple[str, int] | None:
        """Why and with how many generated ids the chain ends, `("eos" | "stop", n)`, or None while it goes on.

        To be called with all ids generated so far; ids that were not there at the last call are taken in one by one. The
        ids end with the token that ends the chain: the end token, the stop id, or the one that completes a stop string
        (`text` cuts that). An end token comes first where several hold. The answer does not change once given.
        """
        if len(generated_ids) < self._num_seen:
            raise ValueError(
                f"the rule has seen {self._num_seen} ids and is given {len(generated_ids)}; ids are only ever added: make "
                "a fresh rule for another chain"
            )
        while self._verdict is None and self._num_seen < len(generated_ids):
            self._num_seen += 1
            reason = self._reason(generated_ids, self._num_seen)
            self._verdict = (reason, self._num_seen) if reason else None
        return self._verdict

    def text(self, generated_ids: Sequence[int]) -> str:
        """The text of the ids, special and end tokens included, cut before the stop string if one ended the chain.

        Of several stop strings completed by the same token, the one that begins first. Takes `generated_ids` in as `check`.
        """
        if self._decoder is None:
            raise ValueError("the rule has no tokenizer and cannot decode; give one when making the rule")
        self.check(generated_ids)
        text = self._decoder.decode(generated_ids)
        if not self._at_string:
            return text
        after = self._config.stop_after or ""
        begin = text.find(after) + len(after)
        found = [text.find(stop, begin) for stop in self._config.stop]
        return text[: min((at for at in found if at >= 0), default=len(text))]

    def _reason(self, ids: Sequence[int], n: int) -> str | None:
        """Why the chain ends with `ids[:n]`, given that it did not end before."""
        if ids[n - 1] in self._eos_ids:
            return "eos"
        if self._holds and ids[n - 1] in self._config.stop_ids:
            return "stop"
        if self._reads_text:
            self._at_string = self._read(self._decoder.push(ids, n))
        return "stop" if self._at_string else None

    def _read(self, new: str) -> bool:
        """Takes in new text; returns whether a stop string is complete."""
        self._tail += new
        if not self._holds:
            _, marker, after = self._tail.partition(self._config.stop_after)
            if not marker:
                self._tail = _last(self._tail, len(self._config.stop_after) - 1)
                return False
            self._holds, self._tail = True, after
        if any(stop in self._tail for stop in self._config.stop):
            return True
        self._tail = _last(self._tail, self._longest - 1)
        return False


def _last(text: str, n: int) -> str:
    return text[max(0, len(text) - n) :]
