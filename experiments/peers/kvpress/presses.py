"""Presses of kvpress by name. Here, and nowhere else, a compression ratio turns into kvpress's removed fraction.

    --press SnapKVPress                        SnapKVPress(compression_ratio)           once, at the end of the prefill
    --press AdaKVPress --inner SnapKVPress     AdaKVPress(SnapKVPress(...))             the same, head by head
    --press KnormPress --decoding              DecodingPress(KnormPress, target_size)   every few steps of decoding
    --press KnormPress --decoding --prefill    PrefillDecodingPress(both)               at both times

A press removes `1 - 1 / CR` of the prompt, or keeps `budget` tokens of it. A press for decoding keeps `budget` tokens, or
(prompt + the most that may be generated) / CR, the budget that DMS's paper gives TOVA and H2O.
"""

import inspect
from dataclasses import dataclass

import kvpress
from kvpress import BasePress, ComposedPress, CompressionRatioDecodingPress, DecodingPress, PrefillDecodingPress

NONE = "none"
_INNER = ("press", "base_press", "presses")
_OURS = (*_INNER, "compression_ratio", "target_compression_ratio", "target_size", "compression_interval")  # not by --set
_ABSTRACT = ("BasePress", "ScorerPress", "PrefillDecodingPress")


@dataclass(frozen=True)
class Spec:
    """Which press, how strong. `settings` are further arguments of the press or of what it wraps."""

    press: str
    inner: tuple[str, ...] = ()
    cr: float | None = None
    budget: int | None = None
    decoding: bool = False
    prefill: bool = False
    interval: int = 16
    settings: tuple[tuple[str, object], ...] = ()

    @property
    def method(self) -> str:
        """The name in results: kvpress/DecodingPress(AdaKVPress(SnapKVPress))."""
        name = self.press + (f"({','.join(self.inner)})" if self.inner else "")
        outer = ("PrefillDecodingPress" if self.prefill else "DecodingPress") if self.decoding else None
        return f"kvpress/{outer}({name})" if outer else f"kvpress/{name}"


def names() -> list[str]:
    """Every press that can be built, by name."""
    found = {name: getattr(kvpress, name) for name in kvpress.__all__}
    return sorted(n for n, c in found.items() if issubclass(c, BasePress) and n not in _ABSTRACT)


def build(spec: Spec, num_prompt: int, max_new_tokens: int) -> BasePress | None:
    """A fresh press for one prompt, `None` for the press `none`. Raises `ValueError` for what does not fit together."""
    if spec.press == NONE:
        if spec.inner or spec.decoding or spec.settings or spec.budget or spec.cr not in (None, 1.0):
            raise ValueError("--press none removes nothing; it goes with no --inner, --decoding, --set, --budget or --cr")
        return None
    if spec.prefill and not spec.decoding:
        raise ValueError("--prefill says that a --decoding press shrinks the prompt too; without --decoding all presses do")
    settings = dict(spec.settings)
    target = spec.budget or (spec.cr and max(1, int((num_prompt + max_new_tokens) / spec.cr)))
    ratio = _removed(spec, num_prompt, target)
    press = _decoding(spec, settings, target) if spec.decoding else _build(spec, settings, ratio, target)
    if spec.prefill:
        press = PrefillDecodingPress(_build(spec, dict(spec.settings), ratio, target), press)
    if settings:
        valid = [n for name in (spec.press, *spec.inner) for n in _arguments(name) if n not in _OURS]
        raise ValueError(
            f"--set {next(iter(settings))} is no argument that {spec.press} takes; choose from {', '.join(valid) or 'none'}"
        )
    return press


def decodes(press: BasePress | None) -> bool:
    """Whether the press works while tokens are generated, as kvpress's own pipeline decides it."""
    return isinstance(press, (DecodingPress, PrefillDecodingPress)) or bool(getattr(press, "decoding", False))


def moves_positions(press: BasePress | None) -> bool:
    """Whether the press gives the kept tokens new positions, so that generation goes on right behind them."""
    rerotates = isinstance(press, kvpress.FinchPress) and press.rerotate_keys
    return rerotates or isinstance(press, (kvpress.KeyRerotationPress, kvpress.RestoreKVPress))


def _removed(spec: Spec, num_prompt: int, target: int | None) -> float | None:
    """The fraction of the prompt to remove; a budget lands on its token in spite of kvpress's rounding down."""
    if spec.budget or spec.prefill:
        if target is None:
            raise ValueError("--prefill needs a --budget or a --cr")
        return max(0.0, 1 - (target + 0.5) / num_prompt)
    return None if spec.cr is None else 1 - 1 / spec.cr


def _decoding(spec: Spec, settings: dict, target: int | None) -> DecodingPress:
    if target is None:
        raise ValueError("--decoding needs a --budget or a --cr")
    base = _build(spec, settings, 0.0, None)
    more = {k: settings.pop(k) for k in ("hidden_states_buffer_size",) if k in settings}
    return DecodingPress(base_press=base, target_size=target, compression_interval=spec.interval, **more)


def _build(spec: Spec, settings: dict, ratio: float | None, target: int | None) -> BasePress:
    arguments = _arguments(spec.press)
    values = _taken(spec.press, settings)
    decoding = issubclass(_class(spec.press), DecodingPress)
    if decoding:
        values |= _decoding_values(spec, target)
    values |= _wrapped(spec, settings)
    missing = [n for n, p in arguments.items() if p.default is inspect.Parameter.empty and n not in values]
    if missing:
        raise ValueError(f"{spec.press} needs {missing[0]}; give it by --set {missing[0]}=VALUE")
    press = _class(spec.press)(**values)
    if not decoding and _set_ratio(press, ratio or 0.0) is not (ratio is not None):
        if ratio is None:
            raise ValueError(f"{spec.press} needs a --cr or a --budget; --press {NONE} keeps everything")
        raise ValueError(f"{spec.press} takes no ratio; leave out --cr and --budget, and give its own arguments by --set")
    return press


def _wrapped(spec: Spec, settings: dict) -> dict:
    """The argument of a wrapping press that holds what it wraps, with those presses built; empty for other presses."""
    arguments = _arguments(spec.press)
    holder = next((name for name in _INNER if name in arguments), None)
    if holder and not spec.inner and arguments[holder].default in (None, inspect.Parameter.empty):
        raise ValueError(f"{spec.press} wraps another press; name it by --inner")
    if spec.inner and (not holder or (len(spec.inner) > 1 and holder != "presses")):
        raise ValueError(f"{spec.press} wraps {'one press' if holder else 'no press'}; --inner names {len(spec.inner)}")
    inner = [_class(name)(**_taken(name, settings)) for name in spec.inner]
    return {holder: inner if holder == "presses" else inner[0]} if inner else {}


def _decoding_values(spec: Spec, target: int | None) -> dict:
    """Arguments of a press that is named by --press and works while decoding."""
    if target is None:
        raise ValueError(f"{spec.press} works while decoding; it needs a --budget or a --cr")
    if not issubclass(_class(spec.press), CompressionRatioDecodingPress):
        return {"compression_interval": spec.interval, "target_size": target}
    if spec.budget:
        raise ValueError(f"{spec.press} keeps a share of all tokens; give it a --cr instead of a --budget")
    return {"compression_interval": spec.interval, "target_compression_ratio": 1 - 1 / spec.cr}


def _set_ratio(press: BasePress, ratio: float) -> bool:
    """Whether the press takes a removed fraction, which it then has; of composed presses, the first that takes one."""
    if isinstance(press, ComposedPress):
        return any(_set_ratio(inner, ratio) for inner in press.presses)
    if not hasattr(type(press), "compression_ratio"):
        return False
    try:
        press.compression_ratio = ratio
    except AttributeError:  # some have it to be read only: their ratio follows from other arguments
        return False
    return True


def _taken(press: str, settings: dict) -> dict:
    return {name: settings.pop(name) for name in list(settings) if name in _arguments(press) and name not in _OURS}


def _arguments(name: str):
    return inspect.signature(_class(name)).parameters


def _class(name: str) -> type[BasePress]:
    if name not in names():
        raise ValueError(f"there is no press {name!r}; choose none or one of {', '.join(names())}")
    return getattr(kvpress, name)
