"""Intervals of what is computed from whole curves: seeds and problems are drawn again, the same ones for all curves.

    curve = points, point = cells, cell = what one seed scored on one task, problem by problem
    resample: seeds drawn -> problems drawn -> accuracy and budget of every point -> the statistic, over and over

A point's accuracy is the mean over tasks of the mean over seeds of the mean over problems: tasks weigh the same. What two
methods share (a hard problem, a lucky seed) moves both of their curves at once and so cancels in what lies between them.
"""

import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dms_lab.pareto.frontiers import held, margins, read, rising, scaled

NUM_RESAMPLES = 1000
_ENOUGH = 0.95  # of the resamples must have a value, else the interval has none


@dataclass(frozen=True)
class Cell:
    """What one seed measured of a point on one task: a score for each problem, and the budget of the point.

    `problems` names the set that was asked: cells with the same task and name had the same problems in the same order.
    Seeds that drew their own problems have names of their own.
    """

    task: str
    seed: Hashable
    problems: Hashable
    scores: tuple[float, ...]
    budget: float = 0.0


Problems = tuple[str, Hashable]  # a task, and the name of a set of its problems
Point = Sequence[Cell]
Curve = Sequence[Point]
Statistic = Callable[..., np.ndarray]  # of budgets and accuracies [resamples, points] of each curve in turn


def resample(
    curves: Sequence[Curve], statistic: Statistic, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> np.ndarray:
    """What `statistic` makes of the curves, resampled: it gets all resamples at once and returns one value or row for each.

    Drawn with replacement: the seeds of all curves together, then the problems of each set, alike for every cell that has
    them. Budgets follow the seeds; within a seed they are as measured. A point that has none of the seeds drawn keeps all
    of its own. It is called as `statistic(budgets, accuracies, budgets, accuracies, ...)`, two arrays [resamples, points] a
    curve. The order of points' cells does not matter. Raises `ValueError` for curves without points, or a set with two
    numbers of problems.
    """
    cells = [cell for curve in curves for point in curve for cell in point]
    if not all(len(curve) and all(map(len, curve)) for curve in curves):
        raise ValueError("a curve needs at least one point, and every point at least one seed on one task")
    seeds = {name: place for place, name in enumerate(sorted({cell.seed for cell in cells}, key=repr))}
    times = np.random.default_rng(seed).multinomial(len(seeds), np.full(len(seeds), 1 / len(seeds)), num_resamples)
    shares = _drawn_problems(_lengths(cells), num_resamples, seed)
    drawn = [[_drawn(point, times, seeds, shares) for point in curve] for curve in curves]
    return statistic(*(np.stack(part, 1) for curve in drawn for part in zip(*curve, strict=True)))


def _lengths(cells: Sequence[Cell]) -> tuple[tuple[Problems, int], ...]:
    """How many problems each set has, in the sets' order."""
    lengths: dict[Problems, int] = {}
    for cell in cells:
        known = lengths.setdefault((cell.task, cell.problems), len(cell.scores))
        if known != len(cell.scores) or not known:
            raise ValueError(
                f"{cell.task}: a set of problems has {len(cell.scores)} scores here and {known} there; the same problems "
                "need as many scores, at least one"
            )
    return tuple(sorted(lengths.items(), key=repr))


@functools.lru_cache(maxsize=4)  # many curves are compared on the same problems, and drawing is what takes time
def _drawn_problems(
    lengths: tuple[tuple[Problems, int], ...], num_resamples: int, seed: int
) -> Mapping[Problems, np.ndarray]:
    """How often each problem of each set is drawn, as shares, [resamples, problems]."""
    rng = np.random.default_rng([seed, 1])
    return {name: rng.multinomial(size, np.full(size, 1 / size), num_resamples) / size for name, size in lengths}


def _drawn(
    point: Point, times: np.ndarray, seeds: Mapping[Hashable, int], shares: Mapping[Problems, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Budget and accuracy of a point in each resample, [resamples] each."""
    by_task: dict[str, list[Cell]] = {}
    for cell in sorted(point, key=lambda cell: (cell.task, repr(cell.seed), repr(cell.problems), cell.scores, cell.budget)):
        by_task.setdefault(cell.task, []).append(cell)
    budgets, accuracies = [], []
    for task, cells in by_task.items():
        per_seed = [sum(other.seed == cell.seed for other in cells) for cell in cells]  # a seed measured twice counts once
        weights = times[:, [seeds[cell.seed] for cell in cells]] / per_seed
        weights[weights.sum(1) == 0] = 1 / np.array(per_seed)
        weights /= weights.sum(1, keepdims=True)
        scores = np.stack([shares[task, cell.problems] @ np.asarray(cell.scores, float) for cell in cells], 1)
        accuracies.append((weights * scores).sum(1))
        budgets.append(weights @ np.array([cell.budget for cell in cells], float))
    return np.mean(budgets, 0), np.mean(accuracies, 0)


def interval_of(values: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of resampled values; NaN at both ends if more than 5 % of them are NaN."""
    known = values[~np.isnan(values)]
    if len(known) < _ENOUGH * len(values) or not len(known):
        return math.nan, math.nan
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)


def margin_interval(
    a: Curve, b: Curve, axis: str = "log2", num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of `margin` of A over B: what it might have been with other seeds and other problems of this kind.

    In each resample the frontiers, their common interval and the margin are found anew. NaN where the curves do not meet
    in more than 5 % of them. Known limits: few seeds show too little of their spread (short by sqrt(1 - 1/seeds)), while
    the noise of problems counts up to twice; scores that are all 0 or all 1 are drawn as just that; with many points a
    frontier is picked among lucky ones, in the measurement as in the resamples. Source: Owen 2007, The pigeonhole
    bootstrap.
    """

    def of(budget: np.ndarray, accuracy: np.ndarray, budget_b: np.ndarray, accuracy_b: np.ndarray) -> np.ndarray:
        return margins(held(budget, accuracy, axis), held(budget_b, accuracy_b, axis))

    return interval_of(resample((a, b), of, num_resamples, seed))


def ratio_intervals(
    a: Curve, b: Curve, within: float = 0.0, axis: str = "log2", num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> list[tuple[float, float]]:
    """For each point of B the 95 % interval of its budget over what A needs for its accuracy less `within`.

    Above 1, A needs less. What seeds and problems do as in `margin_interval`. An accuracy that A does not reach in a
    resample counts as ratio 0; one below that of its cheapest point as that point's budget: no more than was measured.
    """

    def of(budget: np.ndarray, accuracy: np.ndarray, budget_b: np.ndarray, accuracy_b: np.ndarray) -> np.ndarray:
        x, y = rising(budget, accuracy, axis)
        wanted = np.maximum(accuracy_b - within, y[:, :1])
        needed = read(wanted, y, x)
        return np.where(wanted > y[:, -1:], 0.0, budget_b / (2**needed if axis == "log2" else needed))

    return [interval_of(column) for column in resample((a, b), of, num_resamples, seed).T]


def difference_intervals(
    a: Curve, b: Curve, axis: str = "log2", num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> list[tuple[float, float]]:
    """For each point of B the 95 % interval of A's accuracy at the same budget, less its own; as `margin_interval`."""

    def of(budget: np.ndarray, accuracy: np.ndarray, budget_b: np.ndarray, accuracy_b: np.ndarray) -> np.ndarray:
        return read(scaled(budget_b, axis), *held(budget, accuracy, axis)) - accuracy_b

    return [interval_of(column) for column in resample((a, b), of, num_resamples, seed).T]
