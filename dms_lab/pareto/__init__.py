"""Accuracy against a budget: intervals, frontiers, and the margin between two methods. Pure numpy."""

import math
from collections.abc import Sequence

import numpy as np

AXES = ("linear", "log2")


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927). Raises `ValueError` without trials."""
    if trials < 1:
        raise ValueError("an interval needs at least one problem")
    share = successes / trials
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    low = 0.0 if successes == 0 else max(0.0, middle - half)
    high = 1.0 if successes == trials else min(1.0, middle + half)
    return low, high


def mean_interval(shares: Sequence[float], lows: Sequence[float], highs: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of independent shares, from the 95 % interval of each (Zou & Donner 2008, MOVER).

    The distances from the shares to their ends add up as squares, below and above apart: narrower than the mean of the
    ends, and it keeps the skew of shares near 0 or 1. Raises `ValueError` without shares.
    """
    if not len(shares):
        raise ValueError("an interval needs at least one share")
    points, low, high = (np.asarray(x, float) for x in (shares, lows, highs))
    below, above = (math.sqrt(float((d**2).sum())) / len(points) for d in (points - low, high - points))
    return max(0.0, float(points.mean()) - below), min(1.0, float(points.mean()) + above)


def bootstrap_interval(
    scores: Sequence[float] | Sequence[Sequence[float]], num_resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of the mean of `scores`, one per problem or [problems, samples of each].

    Problems are drawn again, not samples: repeated answers to one problem are no independent evidence. With scores that
    are all alike it has no width; use `wilson_interval` for plain right and wrong. Raises `ValueError` without scores.
    """
    rows = np.asarray(scores, float)
    if rows.size == 0:
        raise ValueError("an interval needs at least one problem")
    means = rows if rows.ndim == 1 else rows.mean(1)
    rng = np.random.default_rng(seed)
    drawn = [means[rng.integers(0, len(means), len(means))].mean() for _ in range(num_resamples)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def seeds_interval(scores: Sequence[Sequence[float]], num_resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean of `scores` [seeds, problems], every seed's on the same problems.

    Seeds are drawn again, then problems, the same ones for all seeds drawn: a hard problem is hard for each of them. With
    one seed it is `bootstrap_interval`. Noise of single answers counts up to three times, so it tends to be wide; what few
    seeds add is short by a factor of sqrt(1 - 1/seeds). Source: Owen 2007, The pigeonhole bootstrap. Raises `ValueError`
    without scores, or for seeds with different numbers of problems.
    """
    lengths = {len(row) for row in scores}
    if lengths in (set(), {0}):
        raise ValueError("an interval needs at least one seed and one problem")
    if len(lengths) > 1:
        raise ValueError(f"seeds have {sorted(lengths)} problems; an interval needs the scores of all on the same problems")
    rows = np.asarray(scores, float)
    num_seeds, num_problems = rows.shape
    rng = np.random.default_rng(seed)
    problems = rng.integers(0, num_problems, (num_resamples, num_problems))  # first: as in `bootstrap_interval`
    times = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), num_resamples)  # each seed is drawn
    means = times @ rows / num_seeds  # [resamples, problems]
    drawn = np.take_along_axis(means, problems, 1).mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def frontier(budget: Sequence[float], accuracy: Sequence[float]) -> np.ndarray:
    """Positions of the points that no other point beats at the same or a smaller budget, by rising budget.

    Raises `ValueError` if there is no point, or one that is not finite (a task without accuracy, say).
    """
    budget, accuracy = np.asarray(budget, float), np.asarray(accuracy, float)
    if not len(budget) or not (np.isfinite(budget).all() and np.isfinite(accuracy).all()):
        raise ValueError("a frontier needs at least one point, and finite budgets and accuracies; drop rows without them")
    order = np.lexsort((-accuracy, budget))
    kept, best = [], -math.inf
    for index in order:
        if accuracy[index] > best:
            kept.append(index)
            best = accuracy[index]
    return np.asarray(kept, dtype=int)


def margin(
    budget_a: Sequence[float],
    accuracy_a: Sequence[float],
    budget_b: Sequence[float],
    accuracy_b: Sequence[float],
    axis: str = "log2",
) -> float:
    """Mean of A(x) - B(x) over the largest common interval of budgets, A and B linear between their frontier points.

    `axis` says on which scale of the budget the interpolation and the mean are taken. NaN if the intervals do not meet.
    Source: Lancucki et al. 2025, section 5 (their plots use log2). Raises `ValueError` for an unknown axis, points
    that are not finite, or a budget that has no logarithm.
    """
    if axis not in AXES:
        raise ValueError(f"axis={axis!r} is not known; choose one of {', '.join(AXES)}")
    curves = []
    for budget, accuracy in ((budget_a, accuracy_a), (budget_b, accuracy_b)):
        index = frontier(budget, accuracy)
        x = np.asarray(budget, float)[index]
        if axis == "log2" and x[0] <= 0:
            raise ValueError(f"a budget of {x[0]:g} has no place on a log2 axis; drop the point or use axis='linear'")
        curves.append((np.log2(x) if axis == "log2" else x, np.asarray(accuracy, float)[index]))
    low = max(curves[0][0][0], curves[1][0][0])
    high = min(curves[0][0][-1], curves[1][0][-1])
    if low > high:
        return math.nan
    if low == high:
        return float(np.interp(low, *curves[0]) - np.interp(low, *curves[1]))
    knots = np.unique(np.concatenate([[low, high], *(x[(x > low) & (x < high)] for x, _ in curves)]))
    difference = np.interp(knots, *curves[0]) - np.interp(knots, *curves[1])
    return float(np.trapezoid(difference, knots) / (high - low))
