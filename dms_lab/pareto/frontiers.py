"""Accuracy against a budget: the frontier of a set of points, what lies on it, under it, and between two of them.

A frontier is read linearly between its points, on the scale of the budget that `axis` names. From its last point it is held
to the largest budget that was measured: where more was spent for less, one would spend less. Beyond what was measured
there is NaN, never an extrapolation.

    N points -> rising: N points again, beaten ones replaced by the one before them -> held: to the last budget -> read

That keeps the curve and its shape [..., N], so that many resamples are computed at once (`resampling`).
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

AXES = ("linear", "log2")
Curves = tuple[np.ndarray, np.ndarray]  # positions on the axis and accuracies, [..., N] each, neither ever falling


def frontier(budget: Sequence[float], accuracy: Sequence[float]) -> np.ndarray:
    """Positions of the points that no other point beats at the same or a smaller budget, by rising budget.

    Raises `ValueError` if there is no point, or one that is not finite (a task without accuracy, say).
    """
    order, kept = _order(np.asarray(budget, float), np.asarray(accuracy, float))
    return order[kept]


def common_interval(
    budget_a: Sequence[float], accuracy_a: Sequence[float], budget_b: Sequence[float], accuracy_b: Sequence[float]
) -> tuple[float, float]:
    """The largest interval of budgets that the frontiers of A and B both cover; NaN where they do not meet."""
    low, high = _common(held(budget_a, accuracy_a, "linear"), held(budget_b, accuracy_b, "linear"))
    return (float(low), float(high)) if low <= high else (math.nan, math.nan)


def accuracy_at(budget: Sequence[float], accuracy: Sequence[float], at: ArrayLike, axis: str = "log2") -> np.ndarray:
    """The frontier's accuracy at a budget, or at each of several; NaN below its first point and above the largest budget.

    Raises `ValueError` as `margin` does.
    """
    return _read_each(scaled(at, axis), *held(budget, accuracy, axis))


def budget_at(budget: Sequence[float], accuracy: Sequence[float], at: ArrayLike, axis: str = "log2") -> np.ndarray:
    """The budget at which the frontier reaches an accuracy, or each of several: the inverse of `accuracy_at`.

    NaN for one that is never reached, and for one below that of the cheapest point: what that costs was not measured.
    """
    x, y = rising(budget, accuracy, axis)
    found = _read_each(np.asarray(at, float), y, x)
    return 2**found if axis == "log2" else found


def _read_each(at: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return read(at.reshape(-1), x, y).reshape(at.shape)


def area(budget: Sequence[float], accuracy: Sequence[float], low: float, high: float, axis: str = "log2") -> float:
    """The area under the frontier from budget `low` to `high`: accuracy times doublings ("log2") or tokens ("linear").

    It adds up over intervals that touch. NaN if the frontier does not cover all of it. Raises `ValueError` for an
    interval that ends before it begins, and as `margin` does.
    """
    if low > high:
        raise ValueError(f"an area from budget {low:g} to {high:g} has its ends in the wrong order; give the smaller first")
    curve, (start, end) = held(budget, accuracy, axis), scaled([low, high], axis)
    knots = np.sort(np.clip(np.concatenate([curve[0], [start, end]]), start, end))
    return float(np.trapezoid(read(knots, *curve), knots))


def margin(
    budget_a: Sequence[float],
    accuracy_a: Sequence[float],
    budget_b: Sequence[float],
    accuracy_b: Sequence[float],
    axis: str = "log2",
    hold: bool = True,
) -> float:
    """Mean of A(x) - B(x) over the largest common interval of budgets, A and B linear between their frontier points.

    `axis` says on which scale of the budget the interpolation and the mean are taken. Without `hold` each frontier ends at
    its last point, as in Lancucki et al. 2025, section 5 (their plots use log2); with it, at the largest budget that was
    measured. NaN if the intervals do not meet. Raises `ValueError` for an unknown axis, points that are not finite, or a
    budget that has no logarithm.
    """
    ends = held if hold else rising
    return float(margins(ends(budget_a, accuracy_a, axis), ends(budget_b, accuracy_b, axis)))


def held_share(
    budget_a: Sequence[float],
    accuracy_a: Sequence[float],
    budget_b: Sequence[float],
    accuracy_b: Sequence[float],
    axis: str = "log2",
) -> float:
    """How much of `margin`'s interval lies beyond the last frontier point of A or of B, as a share: there one is held.

    An interval of one budget is held or not, 1 or 0. NaN if the intervals do not meet. Raises `ValueError` as `margin`
    does.
    """
    low, high = _common(held(budget_a, accuracy_a, axis), held(budget_b, accuracy_b, axis))
    _, last = _common(rising(budget_a, accuracy_a, axis), rising(budget_b, accuracy_b, axis))
    if low > high:
        return math.nan
    return float((high - max(low, last)) / (high - low) if high > low else last < low)


# -- of many sets of points at once ---------------------------------------------------------------------------------------
def rising(budget: ArrayLike, accuracy: ArrayLike, axis: str) -> Curves:
    """The frontiers of points [..., N] on the axis, with the point before it in the place of each that is beaten."""
    budget, accuracy = np.asarray(budget, float), np.asarray(accuracy, float)
    order, kept = _order(budget, accuracy)
    place = np.maximum.accumulate(np.where(kept, np.arange(order.shape[-1]), 0), -1)
    order = np.take_along_axis(order, place, -1)
    return np.take_along_axis(scaled(budget, axis), order, -1), np.take_along_axis(accuracy, order, -1)


def held(budget: ArrayLike, accuracy: ArrayLike, axis: str) -> Curves:
    """As `rising`, but where the largest budget is beaten, the last position is that budget: the best goes on to there."""
    x, y = rising(budget, accuracy, axis)
    x[..., -1] = scaled(np.max(budget, -1), axis)
    return x, y


def margins(a: Curves, b: Curves) -> np.ndarray:
    """`margin` of each pair of curves, [...]."""
    low, high = (end[..., None] for end in _common(a, b))
    knots = np.sort(np.clip(np.concatenate([a[0], b[0], low, high], -1), low, high), -1)
    difference, length = read(knots, *a) - read(knots, *b), (high - low)[..., 0]
    mean = np.trapezoid(difference, knots, axis=-1) / np.where(length > 0, length, 1)
    return np.where(length > 0, mean, np.where(length == 0, difference[..., 0], math.nan))


def read(at: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """y at the positions `at` [..., M] of x [..., N] that never falls; NaN beyond its ends."""
    passed = (x[..., None, :] <= at[..., :, None]).sum(-1)  # [..., M], points at or before
    left, right = np.clip(passed - 1, 0, None), np.clip(passed, 0, x.shape[-1] - 1)
    (x0, x1), (y0, y1) = ([np.take_along_axis(v, index, -1) for index in (left, right)] for v in (x, y))
    share = (at - x0) / np.where(x1 > x0, x1 - x0, 1)
    return np.where((passed == 0) | (at > x[..., -1:]), math.nan, y0 + share * (y1 - y0))


def _common(a: Curves, b: Curves) -> tuple[np.ndarray, np.ndarray]:
    return np.maximum(a[0][..., 0], b[0][..., 0]), np.minimum(a[0][..., -1], b[0][..., -1])


def _order(budget: np.ndarray, accuracy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order of points [..., N] by rising budget, the most accurate of equals first; and which of them stay."""
    if not budget.shape[-1] or not (np.isfinite(budget).all() and np.isfinite(accuracy).all()):
        raise ValueError("a frontier needs at least one point, and finite budgets and accuracies; drop rows without them")
    order = np.lexsort((-accuracy, budget), -1)
    best = np.maximum.accumulate(np.take_along_axis(accuracy, order, -1), -1)
    return order, np.diff(best, axis=-1, prepend=-math.inf) > 0


def scaled(budget: ArrayLike, axis: str) -> np.ndarray:
    """Budgets on the axis. Raises `ValueError` for an unknown axis, and for a budget that has no logarithm."""
    if axis not in AXES:
        raise ValueError(f"axis={axis!r} is not known; choose one of {', '.join(AXES)}")
    if axis == "linear":
        return np.asarray(budget, float)
    if np.min(budget) <= 0:
        raise ValueError(f"a budget of {np.min(budget):g} has no place on a log2 axis; drop the point or use axis='linear'")
    return np.log2(budget)
