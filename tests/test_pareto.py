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


# Budgets far enough apart to be told apart on the log2 axis.
RISING = st.lists(st.integers(1, 500), min_size=2, max_size=7, unique=True).map(sorted)


@settings(deadline=None)
@given(RISING, RISING, st.sampled_from(pareto.AXES), st.floats(0, 1))
def test_on_a_rising_frontier_accuracy_and_budget_lead_to_each_other(budgets, accuracies, axis, where):
    x, y = (values[: min(len(budgets), len(accuracies))] for values in (budgets, accuracies))
    budget = x[0] + where * (x[-1] - x[0])
    accuracy = pareto.accuracy_at(x, y, budget, axis)
    assert pareto.budget_at(x, y, accuracy, axis) == pytest.approx(budget)
    assert pareto.accuracy_at(x, y, x, axis) == pytest.approx(y)
    assert pareto.budget_at(x, y, y, axis) == pytest.approx(x)


@settings(deadline=None)
@given(POINTS, st.lists(st.floats(0, 1), min_size=3, max_size=3).map(sorted), st.sampled_from(pareto.AXES))
def test_areas_add_up_over_intervals_that_touch(points, places, axis):
    x, y = zip(*points, strict=True)
    ends = np.asarray(x)[pareto.frontier(x, y)[[0, -1]]]
    a, b, c = (float(np.clip(ends[0] + place * (ends[1] - ends[0]), *ends)) for place in places)
    whole = pareto.area(x, y, a, c, axis)
    assert whole == pytest.approx(pareto.area(x, y, a, b, axis) + pareto.area(x, y, b, c, axis), abs=1e-9)
    assert pareto.area(x, y, b, b, axis) == 0


@settings(deadline=None)
@given(POINTS, POINTS, st.sampled_from(pareto.AXES))
def test_a_margin_is_the_area_between_the_curves_over_what_both_cover(a, b, axis):
    a, b = tuple(zip(*a, strict=True)), tuple(zip(*b, strict=True))
    low, high = pareto.common_interval(*a, *b)
    found = pareto.margin(*a, *b, axis)
    assert math.isnan(found) == math.isnan(low) == math.isnan(high)
    length = high - low if axis == "linear" else np.log2(high) - np.log2(low)
    if length > 1e-6:
        between = pareto.area(*a, low, high, axis) - pareto.area(*b, low, high, axis)
        assert found == pytest.approx(between / length, abs=1e-6)


@settings(deadline=None)
@given(POINTS, st.randoms(), st.sampled_from(pareto.AXES))
def test_the_order_of_points_does_not_matter(points, random, axis):
    mixed = random.sample(points, len(points))
    (x, y), (u, v) = zip(*points, strict=True), zip(*mixed, strict=True)
    assert pareto.margin(x, y, [1, 5000], [0.2, 0.3], axis) == pytest.approx(
        pareto.margin(u, v, [1, 5000], [0.2, 0.3], axis), nan_ok=True
    )
    at = sorted(x)[len(x) // 2]
    assert pareto.accuracy_at(x, y, at, axis) == pytest.approx(pareto.accuracy_at(u, v, at, axis), nan_ok=True)


def test_areas_and_readings_by_hand():
    x, y = [1, 4, 2, 16], [0.0, 0.5, 0.0, 0.75]  # 2 is on no frontier: as accurate as 1 and dearer
    assert pareto.area(x, y, 1, 16) == pytest.approx(2 * 0.25 + 2 * 0.625)
    assert pareto.area(x, y, 1, 16, "linear") == pytest.approx(3 * 0.25 + 12 * 0.625)
    assert pareto.accuracy_at(x, y, [2, 8]).tolist() == pytest.approx([0.25, 0.625])
    assert pareto.accuracy_at(x, y, 2, "linear") == pytest.approx(0.5 / 3)
    assert pareto.budget_at(x, y, 0.25) == pytest.approx(2)
    assert pareto.common_interval(x, y, [0.5, 8, 9], [0.1, 0.2, 0.2]) == (1, 9)


def test_nothing_is_read_beyond_what_was_measured():
    x, y = [2, 8, 16, 32], [0.3, 0.6, 0.4, 0.5]  # more budget than 8 was worse: the best is held to 32
    assert np.isnan(pareto.accuracy_at(x, y, [1.99, 32.01])).all()
    assert np.isnan(pareto.budget_at(x, y, [0.29, 0.61])).all()
    assert pareto.accuracy_at(x, y, [2, 8, 8.01, 20, 32]).tolist() == pytest.approx([0.3, 0.6, 0.6, 0.6, 0.6])
    assert pareto.budget_at(x, y, [0.3, 0.6]).tolist() == pytest.approx([2, 8])
    assert pareto.area(x, y, 8, 32) == pytest.approx(2 * 0.6)
    assert math.isnan(pareto.area(x, y, 1.9, 4))
    assert math.isnan(pareto.area(x, y, 4, 33))
    assert pareto.common_interval(x, y, [4, 64], [0.1, 0.2]) == (4, 32)
    assert pareto.margin(x, y, [8, 32], [0.1, 0.1]) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="ends in the wrong order"):
        pareto.area(x, y, 4, 3)
    with pytest.raises(ValueError, match="no place on a log2 axis"):
        pareto.accuracy_at(x, y, 0)


def test_a_margin_without_holding_ends_at_the_last_point_of_each_frontier_and_the_held_share_says_how_far_that_is():
    x, y = [2, 8, 16, 32], [0.3, 0.6, 0.4, 0.5]  # its frontier ends at 8, and is held to 32
    other = ([2, 32], [0.1, 0.1 + 4e-9])
    assert pareto.margin(x, y, *other) == pytest.approx((0.35 + 0.5) / 2)
    assert pareto.margin(x, y, *other, hold=False) == pytest.approx(0.35)
    assert pareto.held_share(x, y, *other) == pareto.held_share(*other, x, y) == pytest.approx(0.5)
    assert pareto.held_share(x, y, *other, "linear") == pytest.approx(24 / 30)
    assert pareto.held_share([2, 8], [0.3, 0.6], [4, 8], [0.3, 0.6]) == 0
    beyond = ([16, 64], [0.1, 0.2])
    assert pareto.held_share(x, y, *beyond) == 1
    assert math.isnan(pareto.margin(x, y, *beyond, hold=False))
    assert pareto.margin(x, y, *beyond) > 0.4
    assert (
        pareto.held_share(x, y, [32, 64], [0.1, 0.2]),
        pareto.held_share([1, 2], [0.1, 0.2], *([2, 3], [0.1, 0.2])),
    ) == (1, 0)
    assert math.isnan(pareto.held_share(x, y, [64], [0.1]))


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


@pytest.mark.parametrize(
    ("true", "number"),
    [
        ((0.97, 0.9, 0.8), 40),
        ((0.99, 0.99, 0.99), 64),
        ((0.995, 0.995, 0.99), 64),
        ((0.02, 0.0, 0.05), 64),
        ((0.03, 0.01, 0.07, 0.05), 16),
        ((0.95, 0.3), 30),
        ((0.5,), 30),
        ((0.995,) * 9, 64),
    ],
)
def test_the_interval_of_a_mean_covers_it_as_often_as_it_says(true, number):
    """Tasks of `number` problems drawn 4,000 times, near none and all right as in practice: 95 %, give or take 2."""
    drawn = np.random.default_rng(0).binomial(number, true, (4000, len(true)))
    found, times = np.unique(drawn, axis=0, return_counts=True)
    ends = np.array([pareto.mean_interval(right / number, [number] * len(true)) for right in found])
    inside = (ends[:, 0] <= np.mean(true) + 1e-12) & (np.mean(true) - 1e-12 <= ends[:, 1])
    assert 0.93 < (inside * times).sum() / 4000 < 0.98


def test_the_interval_of_a_mean_is_wilson_s_of_all_trials_where_shares_are_alike():
    for right in (0, 3, 20, 40):
        assert pareto.mean_interval([right / 40] * 3, [40] * 3) == pytest.approx(pareto.wilson_interval(3 * right, 120))
    apart = pareto.mean_interval([0.95, 0.05], [60, 60])
    assert apart[1] - apart[0] < 0.6 * np.diff(pareto.wilson_interval(60, 120))[0], "what tasks differ by is no doubt"


def test_a_larger_variance_is_as_good_as_fewer_trials():
    plain, wide = (pareto.mean_interval([0.8], [4000], 0.8 * 0.2 / 4000 * times) for times in (1, 4))
    assert plain == pytest.approx(pareto.wilson_interval(3200, 4000))
    assert wide == pytest.approx(pareto.wilson_interval(800, 1000), abs=1e-4)
    assert pareto.mean_interval([1.0], [64], 0.0) == pytest.approx(pareto.wilson_interval(64, 64))


def test_what_is_no_mean_of_shares_is_refused():
    for shares, trials in (([], []), ([0.5], [0]), ([0.5, 0.5], [10])):
        with pytest.raises(ValueError, match="at least one share, and at least one problem of each"):
            pareto.mean_interval(shares, trials)
    with pytest.raises(ValueError, match="between 0 and 1"):
        pareto.mean_interval([1.5], [10])
    with pytest.raises(ValueError, match="variance=-1"):
        pareto.mean_interval([0.5], [10], -1)
