"""Evaluations that a sweep asks for by words of `dms_lab.evaluate`: benchmarks, or a run's own at other ratios."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dms_lab.evaluation_config import EvaluateConfig, evaluate_keys, ratios, resolve_evaluate
from dms_lab.sweeping.composition import Composer
from dms_lab.typed_config import check_overrides, config_digest, deciding

OF_ALL = ("sweep", "cluster", "search")  # keys that are said of all points together
# These change where results go, how they are computed or watched, not what comes out.
_NOT_HASHED = {"out", "store", "threads", "regrade", "sandbox", "i_trust_the_code", "tracking", "sweep"}
_NOT_HASHED_OF_EVAL = {"places", "num_pages", "graders"}
_HASHED_UNLESS = {"step": "auto"}  # what is as it was before there was a choice
_OF_BENCHMARKS = {"sandbox": "bubblewrap", "i_trust_the_code": False, "regrade": False}
_OF_BENCHMARKS |= dict.fromkeys(("tasks", "policy", "budget", "limit", "shard", "out", "store", "model"))


@dataclass(frozen=True)
class DialConfig:
    """A run's own evaluation at other ratios than it was trained to; nulls are as in the run."""

    checkpoint: str
    cr: tuple[float, ...]
    calibrate: str | None
    num_problems: int | None
    threads: int | None


@dataclass(frozen=True)
class Evaluation:
    """An evaluation: its configuration composed and resolved, and the words that it was asked by."""

    composed: dict[str, Any] = field(repr=False)
    config: EvaluateConfig | DialConfig = field(repr=False)
    words: tuple[str, ...]

    @property
    def hash(self) -> str:
        """12 hex digits over everything that decides its results."""
        return evaluation_hash(self.config)


def evaluation_hash(config: EvaluateConfig | DialConfig) -> str:
    """12 hex digits over everything that decides the results of an evaluation."""
    kept = deciding(asdict(config), _NOT_HASHED, {})
    if isinstance(config, EvaluateConfig):
        kept["eval"] = deciding(kept["eval"], _NOT_HASHED_OF_EVAL, _HASHED_UNLESS)
    return config_digest(kept)


def resolve_evaluation(composed: dict[str, Any]) -> EvaluateConfig | DialConfig:
    """A complete configuration from a composed one; `ValueError` for the first thing that is wrong."""
    if composed.get("eval") is not None:
        config = resolve_evaluate(composed)
        if config.shard != (1, 1):
            raise ValueError("shard= leaves results to another run; a sweep has jobs of its own, so leave it out")
        return config
    if composed.get("cr") is None:
        raise ValueError(
            "an evaluation of a sweep is eval=reasoning with its tasks, or cr=<ratios> for a run's own at other ratios; "
            "its own as it is belongs to the point of its training"
        )
    for key, default in _OF_BENCHMARKS.items():
        if composed.get(key) != default:
            raise ValueError(f"{key}={composed.get(key)} is for benchmarks; add eval=reasoning")
    names = ("checkpoint", "calibrate", "num_problems", "threads")
    return DialConfig(cr=ratios(composed["cr"]), **{name: composed.get(name) for name in names})


def evaluation_of(composer: Composer, words: Sequence[str], sweep: str, checkpoint: str | None = None) -> Evaluation:
    """An evaluation by its words, as part of a sweep; of the run in `checkpoint` if that is given."""
    check_words(words)
    check_overrides(words, evaluate_keys())
    composed = composer.compose("evaluate", words)
    composed = {key: value for key, value in composed.items() if key not in OF_ALL} | {"sweep": sweep}
    if checkpoint is not None:
        for key in ("checkpoint", "policy", "out"):
            if composed.get(key) is not None:
                raise ValueError(f"{key}={composed[key]}: the run and its folder are given already; leave it out")
        composed["checkpoint"] = checkpoint
    elif composed.get("eval") is None:
        raise ValueError(
            "needs eval=reasoning; a run's own evaluation, at other ratios too, belongs to its training's point"
        )
    return Evaluation(composed, resolve_evaluation(composed), tuple(words))


def check_words(words: Sequence[str]) -> None:
    """Raises `ValueError` for what is said of all points together, and for what would undo a point that goes on."""
    for word in words:
        key, _, value = word.lstrip("+~").partition("=")
        if key.split(".")[0] in OF_ALL:
            raise ValueError(f"{word} is said of a whole sweep; it stands in the sweep's file, as cluster: and resources:")
        if key == "resume" and value.lower() != "true":
            raise ValueError(f"{word} starts anew each time that a job is queued again; remove the run's folder instead")
