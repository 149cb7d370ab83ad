"""Accuracy against a budget: the frontier of a set of points, what lies on it, under it, and between two of them.

A frontier is read linearly between its points, on the scale of the budget that `axis` names, and nowhere beyond its ends:
what was not measured is NaN, never extrapolated.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

AXES = ("linear", "log2")


def frontier(budget: Sequence[float], accuracy: Sequence[float]) -> np.ndarray:
    """Positions of the points that no other point beats at the same or a smaller budget, by rising budget.

    Raises `ValueError` if there is no point, or one that is not finite (a task without accuracy, say).
    """
    budget, accuracy = np.asarray(budget, float), np.asarray(accuracy, float)
    if not len(budget) or not (np.isfinite(budget).all() and np.isfinite(accuracy).all()):
        raise ValueError("a frontier needs at least one point, and finite budgets and accuracies; drop rows without them")
    order = np.lexsort((-accuracy, budget))
    best = np.maximum.accumulate(accuracy[order])
    return order[np.concatenate([[True], best[1:] > best[:-1]])]


def common_interval(
    budget_a: Sequence[float], accuracy_a: Sequence[float], budget_b: Sequence[float], accuracy_b: Sequence[float]
) -> tuple[float, float]:
    """The largest interval of budgets that the frontiers of A and B both cover; NaN where they do not meet."""
    a, b = _curve(budget_a, accuracy_a, "linear")[0], _curve(budget_b, accuracy_b, "linear")[0]
    low, high = max(a[0], b[0]), min(a[-1], b[-1])
    return (float(low), float(high)) if low <= high else (math.nan, math.nan)


def accuracy_at(budget: Sequence[float], accuracy: Sequence[float], at: ArrayLike, axis: str = "log2") -> np.ndarray:
    """The frontier's accuracy at a budget, or at each of several; NaN below its first point and above its last.

    Raises `ValueError` as `margin` does.
    """
    x, y = _curve(budget, accuracy, axis)
    return _read(_scaled(at, axis), x, y)


def budget_at(budget: Sequence[float], accuracy: Sequence[float], at: ArrayLike, axis: str = "log2") -> np.ndarray:
    """The budget at which the frontier reaches an accuracy, or each of several: the inverse of `accuracy_at`.

    NaN for one that is never reached, and for one below that of the cheapest point: what that costs was not measured.
    """
    x, y = _curve(budget, accuracy, axis)
    found = _read(at, y, x)
    if axis == "linear":
        return found
    ends = np.asarray(budget, float)[frontier(budget, accuracy)[[0, -1]]]
    return np.clip(2**found, *ends)  # 2 ** log2(x) may be a rounding beside it


def area(budget: Sequence[float], accuracy: Sequence[float], low: float, high: float, axis: str = "log2") -> float:
    """The area under the frontier from budget `low` to `high`: accuracy times doublings ("log2") or tokens ("linear").

    It adds up over intervals that touch. NaN if the frontier does not cover all of it. Raises `ValueError` for an
    interval that ends before it begins, and as `margin` does.
    """
    if low > high:
        raise ValueError(f"an area from budget {low:g} to {high:g} has its ends in the wrong order; give the smaller first")
    x, y = _curve(budget, accuracy, axis)
    return _area(x, y, _scaled(low, axis), _scaled(high, axis))


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
    a, b = _curve(budget_a, accuracy_a, axis), _curve(budget_b, accuracy_b, axis)
    low, high = max(a[0][0], b[0][0]), min(a[0][-1], b[0][-1])
    if low > high:
        return math.nan
    if low == high:
        return float(_read(low, *a) - _read(low, *b))
    return (_area(*a, low, high) - _area(*b, low, high)) / float(high - low)


def _curve(budget: Sequence[float], accuracy: Sequence[float], axis: str) -> tuple[np.ndarray, np.ndarray]:
    """The frontier's budgets on the axis, and its accuracies: both rise strictly."""
    index = frontier(budget, accuracy)
    return _scaled(np.asarray(budget, float)[index], axis), np.asarray(accuracy, float)[index]


def _scaled(budget: ArrayLike, axis: str) -> np.ndarray:
    if axis not in AXES:
        raise ValueError(f"axis={axis!r} is not known; choose one of {', '.join(AXES)}")
    if axis == "linear":
        return np.asarray(budget, float)
    if np.min(budget) <= 0:
        raise ValueError(f"a budget of {np.min(budget):g} has no place on a log2 axis; drop the point or use axis='linear'")
    return np.log2(budget)


def _read(at: ArrayLike, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.interp(at, x, y, left=math.nan, right=math.nan)


def _area(x: np.ndarray, y: np.ndarray, low: float, high: float) -> float:
    if not x[0] <= low <= high <= x[-1]:
        return math.nan
    knots = np.concatenate([[low], x[(x > low) & (x < high)], [high]])
    return float(np.trapezoid(np.interp(knots, x, y), knots))
