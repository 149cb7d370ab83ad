"""Intervals, frontiers and margins are what their definitions say."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dms_lab import pareto

POINTS = st.lists(st.tuples(st.floats(1, 1e4), st.floats(0, 1)), min_size=1, max_size=8, unique_by=lambda p: p[0])


@settings(deadline=None)
@given(POINTS)
def test_a_frontier_rises_and_nothing_beats_it(points):
    x, y = zip(*points, strict=True)
    kept = pareto.frontier(x, y)
    assert all(x[i] < x[j] and y[i] < y[j] for i, j in itertools.pairwise(kept))
    assert all(any(x[i] <= a and y[i] >= b for i in kept) for a, b in points)


@settings(deadline=None)
@given(POINTS, POINTS, st.sampled_from(pareto.AXES))
def test_margins_are_antisymmetric_and_zero_against_oneself(a, b, axis):
    a, b = zip(*a, strict=True), zip(*b, strict=True)
    (xa, ya), (xb, yb) = a, b
    assert pareto.margin(xa, ya, xa, ya, axis) == 0
    there, back = pareto.margin(xa, ya, xb, yb, axis), pareto.margin(xb, yb, xa, ya, axis)
    assert (math.isnan(there) and math.isnan(back)) or there == pytest.approx(-back, abs=1e-9)


def test_a_frontier_by_hand_is_the_same_from_a_table():
    import pandas as pd

    budget, accuracy = [4, 1, 2, 2, 8], [0.9, 0.1, 0.5, 0.6, 0.8]
    assert pareto.frontier(budget, accuracy).tolist() == [1, 3, 0]
    frame = pd.DataFrame({"x": budget, "y": accuracy}, index=[10, 11, 12, 13, 14])
    assert pareto.frontier(frame["x"], frame["y"]).tolist() == [1, 3, 0]


def test_a_margin_by_hand():
    assert pareto.margin([1, 4], [0.0, 1.0], [1, 4], [0.0, 0.5], "linear") == pytest.approx(0.25)
    assert pareto.margin([1, 4], [0.5, 0.9], [2, 8], [0.1, 0.3], "log2") == pytest.approx((0.6 + 0.7) / 2, abs=1e-9)
    # A bends at 2: above B = 0 by 1/2 at 1, 1 at 2 and 4; the bend lies at 1/3 of the linear axis, at half of log2.
    bent = ([1, 2, 5], [0.5, 1.0, 1.0 + 1e-12], [1, 4], [0.0, 1e-12])
    assert pareto.margin(*bent, "linear") == pytest.approx((0.75 + 2) / 3)
    assert pareto.margin(*bent, "log2") == pytest.approx((0.75 + 1) / 2)


def test_methods_without_a_common_budget_have_no_margin():
    assert math.isnan(pareto.margin([1, 2], [0.1, 0.2], [4, 8], [0.1, 0.2]))


def test_points_that_cannot_stand_on_the_axis_are_refused():
    for budget, accuracy in (([], []), ([1, 2], [math.nan, 0.2]), ([math.inf], [0.2])):
        with pytest.raises(ValueError, match="finite"):
            pareto.frontier(budget, accuracy)
    with pytest.raises(ValueError, match="log2 axis"):
        pareto.margin([0, 4], [0.1, 0.5], [1, 4], [0.1, 0.2], "log2")
    with pytest.raises(ValueError, match="choose one of linear, log2"):
        pareto.margin([1], [0.1], [1], [0.1], "log10")


def test_wilson_interval_matches_published_values():
    assert pareto.wilson_interval(0, 10) == (0.0, pytest.approx(0.2775, abs=1e-4))
    assert pareto.wilson_interval(5, 10) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
    assert pareto.wilson_interval(10, 10)[1] == 1.0


def test_a_bootstrap_interval_is_near_the_normal_one_and_repeats():
    scores = [1.0] * 60 + [0.0] * 40
    low, high = pareto.bootstrap_interval(scores, 4000)
    half = 1.96 * math.sqrt(0.6 * 0.4 / 100)
    assert (low, high) == (pytest.approx(0.6 - half, abs=0.015), pytest.approx(0.6 + half, abs=0.015))
    assert pareto.bootstrap_interval(scores, 4000) == (low, high)
    with pytest.raises(ValueError, match="at least one problem"):
        pareto.bootstrap_interval([])


def test_repeated_answers_to_a_problem_are_no_evidence():
    once, often = [[1.0], [0.0]] * 20, [[1.0] * 8, [0.0] * 8] * 20
    assert pareto.bootstrap_interval(often, 500) == pareto.bootstrap_interval(once, 500)


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says():
    """Three tasks of 40 problems, near the ceiling as in practice, drawn 2,000 times."""
    rng = np.random.default_rng(0)
    true = np.array([0.97, 0.9, 0.8])
    covered, widths, ends = 0, [], []
    for _ in range(2000):
        found = rng.binomial(40, true)
        low, high = zip(*(pareto.wilson_interval(int(n), 40) for n in found), strict=True)
        a, b = pareto.mean_interval(found / 40, low, high)
        covered += a <= true.mean() <= b
        widths.append(b - a)
        ends.append(np.mean(high) - np.mean(low))
    assert 0.93 < covered / 2000 < 0.98
    assert np.mean(widths) < 0.7 * np.mean(ends)
    with pytest.raises(ValueError, match="at least one share"):
        pareto.mean_interval([], [], [])
