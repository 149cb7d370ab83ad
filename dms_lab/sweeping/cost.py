"""What a sweep will cost, by arithmetic alone: jobs, tokens, hours, disk. No weights are looked at.

    tokens   steps * batch_size * accumulate * context, a run
    hours    tokens / tokens a second: as measured in this sweep where a run of the model has begun, else as published,
             scaled by parameters; beside it, what arithmetic at a share of a GPU's peak would take
    disk     trained parameters in float32 for each member of cr_family; while a run trains, three times more of them

Evaluations are counted and not timed: how long chains are is what they find out.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dms_lab.config import TrainConfig
from dms_lab.sweeping.points import Point
from dms_lab.sweeping.shapes import Shape, num_trained, shape_of
from dms_lab.sweeping.state import PointState, tail

PUBLISHED_TOKENS_PER_SECOND = 1240.0  # of an H100: Qwen3-8B to CR 8 by the reference recipe, 142.6 M tokens in 4 h on 8
PUBLISHED_PARAMETERS = 8.19e9
PEAK_FLOPS, SHARE_OF_PEAK = 989e12, 0.4  # an H100 in bfloat16
CPU_TOKENS_PER_SECOND, CPU_PARAMETERS = 2500.0, 1.05e6  # the embedded model, all weights, on one thread
SMALL = 1e8  # parameters below which a model is taken to run on a CPU
RESULTS_BYTES = 6e6  # figures, metrics and results of a run
MEASURED, PUBLISHED, SCALED, ASSUMED = (
    "measured in this sweep",
    "published for it",
    "published, scaled",
    "assumed for a CPU",
)
_LOGGED_LAST = 20


@dataclass(frozen=True)
class Cost:
    """The cost of the points of one kind that are left. None where nothing at hand tells."""

    model: str
    trained: str
    num_done: int
    num_left: int
    tokens: int
    hours: float | None
    least_hours: float | None
    basis: str
    disk_bytes: float | None
    num_evaluations: int


def costs(states: Sequence[PointState]) -> list[Cost]:
    """The costs by model and what is trained; evaluations without training are a kind of their own."""
    kinds: dict[tuple[str, str], list[PointState]] = {}
    for state in states:
        config = state.point.config
        name = config.model.name if config.model is not None else "checkpoint"
        kinds.setdefault((name, config.trained if isinstance(config, TrainConfig) else "-"), []).append(state)
    return [_cost(model, trained, members) for (model, trained), members in kinds.items()]


def tokens_of(config: TrainConfig) -> int:
    """Tokens that a run trains on, padding of generated texts included."""
    return config.steps * config.batch_size * config.accumulate * config.context


def _tokens_left(state: PointState) -> float:
    """Tokens from the step that the run has logged last; none of a run that is trained and not evaluated yet."""
    return tokens_of(state.point.config) * (1 - (state.step or 0) / state.point.config.steps)


def _cost(model: str, trained: str, states: Sequence[PointState]) -> Cost:
    left = [state.point for state in states if state.state != "done"]
    evaluations = sum(len(point.then) + (1 if trained == "-" else int(point.config.eval_after)) for point in left)
    num_done = len(states) - len(left)
    if trained == "-":
        return Cost(model, trained, num_done, len(left), 0, 0.0, None, "", len(left) * RESULTS_BYTES, evaluations)
    shape = shape_of(states[0].point.config.model)
    tokens = round(sum(_tokens_left(state) for state in states if state.state != "done"))
    rate, basis = _rate([state.point for state in states], trained, shape)
    return Cost(
        model=model,
        trained=trained,
        num_done=num_done,
        num_left=len(left),
        tokens=tokens,
        hours=tokens / rate / 3600 if rate else None,
        least_hours=_least_seconds(tokens, trained, shape) / 3600 if shape and shape.num_parameters >= SMALL else None,
        basis=basis,
        disk_bytes=sum(disk_bytes(point.config, shape) for point in left) if shape else None,
        num_evaluations=evaluations,
    )


def _rate(points: Sequence[Point], trained: str, shape: Shape | None) -> tuple[float | None, str]:
    """Tokens a second of one device, and where that is from."""
    measured = [rate for point in points if (rate := _measured_rate(point)) is not None]
    if measured:
        return statistics.median(measured), MEASURED
    if trained == "all" and (rate := _published_rate(points[0].config.model.name)) is not None:
        return rate, PUBLISHED
    if shape is None:
        return None, "a model of unknown size"
    if shape.num_parameters >= SMALL:
        return PUBLISHED_TOKENS_PER_SECOND * PUBLISHED_PARAMETERS / shape.num_parameters, SCALED
    return CPU_TOKENS_PER_SECOND * CPU_PARAMETERS / shape.num_parameters, ASSUMED


def _published_rate(model: str) -> float | None:
    """Tokens a second of an H100 in the paper's retrofit of all weights of this model; None if it has none."""
    from dms_lab import published

    for row in published.retrofit_costs(model).to_dict("records"):
        return row["steps"] * row["batch_size_sequences"] * row["context_tokens"] / row["h100_hours"] / 3600
    return None


def _measured_rate(point: Point) -> float | None:
    """The median of the tokens a second of a device that a run has logged last; None before there are any."""
    rates = []
    for line in tail(Path(point.folder) / "metrics.jsonl", _LOGGED_LAST):
        try:
            rates.append(json.loads(line)["tokens_per_second"])
        except json.JSONDecodeError:  # it is being written
            continue
    return statistics.median(rates) / (point.config.devices * point.config.num_nodes) if rates else None


def _least_seconds(tokens: int, trained: str, shape: Shape) -> float:
    """2 operations a parameter and token forward, for teacher, student and recomputation; 2 backward, 4 for all weights."""
    return tokens * shape.num_parameters * (3 * 2 + (4 if trained == "all" else 2)) / (PEAK_FLOPS * SHARE_OF_PEAK)


def disk_bytes(config: TrainConfig, shape: Shape) -> float:
    """Bytes that a finished run leaves: its checkpoints, and what is drawn and written about them."""
    return 4 * num_trained(config, shape) * len(config.cr_family) + RESULTS_BYTES
