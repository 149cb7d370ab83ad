"""The points of a sweep, expanded from its parts the way Hydra's multirun would.

    sweep.yaml -> product of overrides -> composed (Hydra) -> resolved and validated -> Point (config, folder, hash)

Nothing is stored of them: the same file gives the same points. Every error of every point is raised here, before anything
is submitted.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from dms_lab.config import TrainConfig, config_hash, resolve, run_folder, valid_keys
from dms_lab.evaluation_config import EvaluateConfig, evaluate_keys, with_lists
from dms_lab.sweep_config import Part, SweepConfig
from dms_lab.sweeping.composition import Composer
from dms_lab.sweeping.evaluations import OF_ALL, Evaluation, check_words, evaluation_of
from dms_lab.typed_config import check_overrides

# Overrides that a variant is not named by: the first have a column of their own in the results, the rest decide nothing.
_NOT_A_VARIANT = {"model", "method", "cr", "seed", "eval", "out", "tracking", "threads", "log_every", "resume", "sweep"}
_NOT_A_VARIANT |= {"eval_after", "devices", "num_nodes", "strategy", "policy", "budget", "tasks", "limit", "store"}


@dataclass(frozen=True)
class Point:
    """One configuration of a sweep: trained and evaluated in `folder`, then asked `then`; or one evaluation.

    `composed` is the configuration before it was resolved, plain; `overrides` what it differs in from the defaults.
    """

    command: str
    composed: dict[str, Any] = field(repr=False)
    config: TrainConfig | EvaluateConfig = field(repr=False)
    folder: str
    hash: str
    overrides: tuple[str, ...]
    then: tuple[Evaluation, ...] = ()
    variant: str = ""

    @property
    def name(self) -> str:
        """What the point is called in tables: the last part of its folder."""
        return self.folder.rstrip("/").rpartition("/")[2]


def expand(sweep: SweepConfig) -> list[Point]:
    """Every point of a sweep once, in the order of the file; `ValueError` names the first part and point that is wrong."""
    found: dict[str, Point] = {}
    with Composer() as composer:
        for index, part in enumerate(sweep.parts):
            for point in _points(composer, part, part.name or f"parts[{index}]", sweep.name):
                known = found.get(point.hash)
                found[point.hash] = point if known is None else _joined(known, point)
    points = list(found.values())
    _check_folders(points)
    return _with_variants(points)


def _points(composer: Composer, part: Part, where: str, sweep: str) -> Iterator[Point]:
    with _told(where):
        check_words(part.overrides)
        check_overrides(part.overrides, valid_keys() if part.command == "train" else evaluate_keys())
        combinations = composer.product(part.overrides)
    for words in combinations:
        with _told(f"{where}, {' '.join(words)}"):
            if part.command == "train":
                yield _trained(composer, words, part.then, sweep)
            else:
                yield _evaluated(composer, words, sweep)


@contextmanager
def _told(where: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _trained(composer: Composer, words: Sequence[str], then: Sequence[Sequence[str]], sweep: str) -> Point:
    composed = composer.compose("train", words)
    composed = {key: value for key, value in composed.items() if key not in OF_ALL} | {"sweep": sweep}
    config = resolve(composed)
    folder = run_folder(config)
    after = []
    for asked in then:
        with _told(f"then [{', '.join(asked)}]"):
            after.append(evaluation_of(composer, with_lists(list(asked)), sweep, folder))
    return Point("train", composed, config, folder, config_hash(config), tuple(words), tuple(after))


def _evaluated(composer: Composer, words: Sequence[str], sweep: str) -> Point:
    made = evaluation_of(composer, words, sweep)
    config = made.config
    subject = f"{config.model.name}-{config.policy}" if config.checkpoint is None else "checkpoint"
    subject += f"-{config.budget}" if config.budget else ""
    folder = config.out or f"runs/evaluate-{subject}-{made.hash}"
    return Point("evaluate", made.composed | {"out": folder}, replace(config, out=folder), folder, made.hash, tuple(words))


def _joined(known: Point, point: Point) -> Point:
    """One point of two that share a hash, with the evaluations of both; `ValueError` if one setting would be dropped."""
    if known.command == "train" and known.config.eval != point.config.eval:
        raise ValueError(
            f"{' '.join(known.overrides)} and {' '.join(point.overrides)} are one run, since eval.* does not decide what "
            "is trained; ask for other evaluations with then:"
        )
    one, other = asdict(known.config), asdict(point.config)
    if differing := [key for key in one if one[key] != other[key]]:
        raise ValueError(
            f"{' '.join(known.overrides)} and {' '.join(point.overrides)} are one run, since {', '.join(differing)} does "
            "not decide what comes out of it; say the same of it in both"
        )
    asked = {evaluation.hash: evaluation for evaluation in (*known.then, *point.then)}
    return replace(known, then=tuple(asked.values()))


def _check_folders(points: Sequence[Point]) -> None:
    """Two points must not share a folder, which `out=` can make them do."""
    by_folder: dict[str, Point] = {}
    for point in points:
        other = by_folder.setdefault(point.folder, point)
        if other is not point:
            raise ValueError(
                f"{' '.join(other.overrides)} and {' '.join(point.overrides)} would share the folder {point.folder}; leave "
                "out= to the configuration"
            )


def _with_variants(points: Sequence[Point]) -> list[Point]:
    """The points with their `variant`: the overrides that differ within the sweep, sorted, without seed, cr and eval.

    With `cr` where families that differ in nothing else share a ratio: what was trained to 4 is not the 4 that a training
    to 8 passed.
    """
    given = [_variant_words(point) for point in points]
    for one, other in itertools.combinations(range(len(points)), 2):
        if _share_a_ratio(points[one], points[other]) and _without_cr(given[one]) == _without_cr(given[other]):
            for index in (one, other):
                given[index]["cr"] = f"{points[index].config.cr:g}"
    differing = {key for words in given for key in words if len({other.get(key) for other in given}) > 1}
    return [
        replace(point, variant=" ".join(f"{key}={words[key]}" for key in sorted(differing & set(words))))
        for point, words in zip(points, given, strict=True)
    ]


def _without_cr(words: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in words.items() if key != "cr"}


def _share_a_ratio(one: Point, other: Point) -> bool:
    """Whether two trainings leave checkpoints that a result could not tell apart by what has a column of its own."""
    if not one.command == other.command == "train" or one.config.cr == other.config.cr:
        return False
    same = all(getattr(one.config, name) == getattr(other.config, name) for name in ("seed", "method", "model"))
    return same and bool(set(one.config.cr_family) & set(other.config.cr_family))


def _variant_words(point: Point) -> dict[str, str]:
    pairs = (word.lstrip("+").partition("=")[::2] for word in point.overrides)
    return {
        key: value
        for key, value in pairs
        if key not in _NOT_A_VARIANT and not key.startswith(("eval.", "hydra")) and point.command == "train"
    }
