"""Intervals of what is computed from whole curves: seeds and problems are drawn again, the same ones for all curves.

    curve = points, point = cells, cell = what one seed scored on one task, problem by problem
    resample: seeds drawn -> problems drawn -> accuracy and budget of every point -> the statistic, over and over

A point's accuracy is the mean over tasks of the mean over seeds of the mean over problems: tasks weigh the same. What two
methods share (a hard problem, a lucky seed) moves both of their curves at once and so cancels in what lies between them.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from dms_lab.pareto.frontiers import accuracy_at, budget_at, frontier, margin

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


Point = Sequence[Cell]
Curve = Sequence[Point]
Statistic = Callable[..., float | np.ndarray]  # of (budgets, accuracies) of each curve in turn


def resample(
    curves: Sequence[Curve], statistic: Statistic, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> np.ndarray:
    """`statistic` of the curves in each resample, float64 [resamples] or [resamples, as many as it returns].

    Drawn with replacement: the seeds of all curves together, then the problems of each set, alike for every cell that has
    them. Budgets follow the seeds; within a seed they are as measured. A point that has none of the seeds drawn keeps all
    of its own. It is called as `statistic(budgets, accuracies, budgets, accuracies, ...)`, a pair a curve. The order of
    points' cells does not matter. Raises `ValueError` for curves without points, or a set with two numbers of problems.
    """
    cells = [cell for curve in curves for point in curve for cell in point]
    if not all(len(curve) and all(map(len, curve)) for curve in curves):
        raise ValueError("a curve needs at least one point, and every point at least one seed on one task")
    rng = np.random.default_rng(seed)
    seeds = {name: place for place, name in enumerate(sorted({cell.seed for cell in cells}, key=repr))}
    times = rng.multinomial(len(seeds), np.full(len(seeds), 1 / len(seeds)), num_resamples).astype(float)  # [R, seeds]
    shares = _drawn_problems(cells, rng, num_resamples)
    flat: list[tuple[np.ndarray, np.ndarray]] = []
    for curve in curves:
        drawn = [_drawn(point, times, seeds, shares) for point in curve]
        flat += [tuple(np.stack(part, 1) for part in zip(*drawn, strict=True))]  # budgets, accuracies [R, points]
    return np.array([statistic(*(part[row] for pair in flat for part in pair)) for row in range(num_resamples)])


def _drawn_problems(
    cells: Sequence[Cell], rng: np.random.Generator, num_resamples: int
) -> dict[tuple[str, Hashable], np.ndarray]:
    """How often each problem of each set is drawn, as shares, [resamples, problems]."""
    lengths: dict[tuple[str, Hashable], int] = {}
    for cell in cells:
        if lengths.setdefault((cell.task, cell.problems), len(cell.scores)) != len(cell.scores) or not cell.scores:
            raise ValueError(
                f"{cell.task}: a set of problems has {len(cell.scores)} scores here and others there; the same problems "
                "need as many scores, at least one"
            )
    return {
        name: rng.multinomial(lengths[name], np.full(lengths[name], 1 / lengths[name]), num_resamples) / lengths[name]
        for name in sorted(lengths, key=repr)
    }


def _drawn(
    point: Point, times: np.ndarray, seeds: dict[Hashable, int], shares: dict[tuple[str, Hashable], np.ndarray]
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
    return interval_of(resample((a, b), lambda *curves: margin(*curves, axis), num_resamples, seed))


def ratio_intervals(
    a: Curve, b: Curve, within: float = 0.0, axis: str = "log2", num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> list[tuple[float, float]]:
    """For each point of B the 95 % interval of its budget over what A needs for its accuracy less `within`.

    Above 1, A needs less. What seeds and problems do as in `margin_interval`. An accuracy that A does not reach in a
    resample counts as ratio 0; one below that of its cheapest point as that point's budget: no more than was measured.
    """

    def ratios(budget: np.ndarray, accuracy: np.ndarray, budget_b: np.ndarray, accuracy_b: np.ndarray) -> np.ndarray:
        ends = frontier(budget, accuracy)[[0, -1]]
        wanted = np.maximum(accuracy_b - within, accuracy[ends[0]])
        needed = budget_at(budget, accuracy, wanted, axis)
        return np.where(wanted > accuracy[ends[1]], 0.0, budget_b / needed)

    drawn = resample((a, b), ratios, num_resamples, seed)
    return [interval_of(column) for column in drawn.T]


def difference_intervals(
    a: Curve, b: Curve, axis: str = "log2", num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> list[tuple[float, float]]:
    """For each point of B the 95 % interval of A's accuracy at the same budget, less its own; as `margin_interval`."""

    def differences(budget: np.ndarray, accuracy: np.ndarray, budget_b: np.ndarray, accuracy_b: np.ndarray) -> np.ndarray:
        return accuracy_at(budget, accuracy, budget_b, axis) - accuracy_b

    drawn = resample((a, b), differences, num_resamples, seed)
    return [interval_of(column) for column in drawn.T]
