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


def frontier(budget: Sequence[float], accuracy: Sequence[float]) -> np.ndarray:
    """Indices of the points that no other point beats at the same or a smaller budget, by rising budget."""
    order = np.lexsort((-np.asarray(accuracy, float), np.asarray(budget, float)))
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
    Source: Lancucki et al. 2025, section 5 (their plots use log2).
    """
    if axis not in AXES:
        raise ValueError(f"axis={axis!r} is not known; choose one of {', '.join(AXES)}")
    curves = []
    for budget, accuracy in ((budget_a, accuracy_a), (budget_b, accuracy_b)):
        index = frontier(budget, accuracy)
        x = np.asarray(budget, float)[index]
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
