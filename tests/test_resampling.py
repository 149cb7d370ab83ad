"""Intervals of what lies between curves: paired over problems and seeds, and as wide as they should be."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dms_lab import pareto
from dms_lab.pareto import Cell

RNG = np.random.default_rng


def cells(scores, budget, task="t", shared=True):
    """A point from scores [seeds][problems]; seeds with problems of their own unless they are shared."""
    return [Cell(task, seed, "all" if shared else seed, tuple(map(float, row)), budget) for seed, row in enumerate(scores)]


def accuracy(_, values):
    return values[:, 0]


def ability(rng, num_seeds, num_problems, level, hardness=1.0, noise=0.0):
    """Scores of 0 and 1: of a level, on problems of a hardness that all seeds share, with some noise."""
    problems = rng.normal(0, hardness, num_problems)
    seeds = rng.normal(0, 0.1, (num_seeds, 1))
    return lambda shift: (level + shift + seeds + problems + rng.normal(0, noise, (num_seeds, num_problems)) > 0) * 1.0


def curves(rng, shift, num_seeds=3, num_problems=40, shared=True):
    """A curve that is `shift` better than another, on the same problems and seeds, at budgets 1, 2, 4 and 2, 4, 8."""
    draw = ability(rng, num_seeds, num_problems, 0.0, noise=0.5)
    a = [cells(draw(shift + 0.4 * power), 2.0**power, shared=shared) for power in range(3)]
    b = [cells(draw(0.4 * (power - 1)), 2.0**power, shared=shared) for power in range(1, 4)]
    return a, b


def margin_of(a, b):
    def means(curve):
        accuracies = [np.mean([np.mean(cell.scores) for cell in point]) for point in curve]
        return [point[0].budget for point in curve], accuracies

    return pareto.margin(*means(a), *means(b))


def test_with_one_seed_and_one_task_it_is_the_bootstrap_of_its_problems():
    scores = RNG(0).random(50)
    found = pareto.resample([[cells([scores], 1.0)]], accuracy, 4000)
    assert found.mean() == pytest.approx(scores.mean(), abs=0.003)
    assert pareto.interval_of(found) == pytest.approx(pareto.bootstrap_interval(scores), abs=0.01)


def test_with_seeds_on_the_same_problems_it_is_the_interval_of_seeds():
    scores = RNG(1).random((4, 30)) + RNG(2).normal(0, 0.2, (4, 1))
    found = pareto.interval_of(pareto.resample([[cells(scores, 1.0)]], accuracy, 4000))
    assert found == pytest.approx(pareto.seeds_interval(scores), abs=0.015)


def test_problems_that_each_seed_drew_for_itself_average_out():
    """A shared hard problem is hard for all seeds. Of 4 seeds drawn again some come twice: sum of squared shares 7/16."""
    scores = np.tile(RNG(3).integers(0, 2, 40), (4, 1))
    shared, own = (np.std(pareto.resample([[cells(scores, 1.0, shared=kind)]], accuracy)) for kind in (True, False))
    assert own == pytest.approx(shared * math.sqrt(7 / 16), rel=0.1)


def test_tasks_weigh_the_same_whatever_their_sizes():
    small, large = cells([[1.0] * 5], 1.0, "small"), cells([[0.0] * 500], 1.0, "large")
    assert set(pareto.resample([[small + large]], accuracy, 20)) == {0.5}


def test_what_both_curves_share_cancels():
    """Two methods with the same answers have no difference to doubt, however few the problems."""
    scores = RNG(4).integers(0, 2, (2, 10)) * 1.0
    a, b = ([cells(scores, budget), cells(np.maximum(scores, np.eye(2, 10)), 2 * budget)] for budget in (1.0, 1.0))
    assert pareto.margin_interval(a, b) == (0.0, 0.0)
    other = [[replace(cell, problems="others") for cell in point] for point in b]
    low, high = pareto.margin_interval(a, other)
    assert low < -0.1 < 0.1 < high


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10_000), st.floats(-0.5, 0.5), st.booleans())
def test_the_interval_is_around_the_margin_and_turns_with_it(seed, shift, shared):
    a, b = curves(RNG(seed), shift, shared=shared)
    low, high = pareto.margin_interval(a, b, num_resamples=200)
    if math.isnan(low):  # curves that hardly meet
        assert math.isnan(high)
        return
    assert low - 0.05 <= margin_of(a, b) <= high + 0.05
    back = pareto.margin_interval(b, a, num_resamples=200)
    assert back == pytest.approx((-high, -low), abs=1e-9)


def test_the_margin_lies_within_its_interval_nearly_always():
    inside = meets = 0
    for seed in range(40):
        a, b = curves(RNG(seed), 0.3)
        low, high = pareto.margin_interval(a, b, num_resamples=200)
        meets += not math.isnan(low)
        inside += low <= margin_of(a, b) <= high
    assert meets > 35
    assert inside >= 0.95 * meets


def test_the_true_margin_lies_within_its_interval_as_often_as_it_says_or_more():
    """Single points, whose margin is the difference of two accuracies: 0.25 on average over all problems and seeds."""
    covered = 0
    for seed in range(150):
        rng = RNG(seed)
        base = rng.random(40) * 0.5
        a, b = ([cells(rng.random((3, 40)) < base + better, 1.0)] for better in (0.5, 0.25))
        low, high = pareto.margin_interval(a, b, num_resamples=300)
        covered += low <= 0.25 <= high
    assert covered / 150 > 0.92


@settings(deadline=None, max_examples=15)
@given(st.randoms())
def test_the_order_of_points_and_cells_does_not_matter(random):
    a, b = curves(RNG(7), 0.2, num_seeds=4, num_problems=12)
    mixed = [random.sample(point, len(point)) for point in random.sample(a, len(a))]
    assert pareto.margin_interval(a, b, num_resamples=50) == pytest.approx(
        pareto.margin_interval(mixed, b, num_resamples=50)
    )


def test_a_seed_that_was_measured_twice_counts_once():
    one, two = cells([[1.0, 1.0], [0.0, 0.0]], 1.0)
    once = pareto.resample([[[one, two]]], accuracy, 200)
    assert set(once) == {0.0, 0.5, 1.0}
    assert pareto.resample([[[one, one, two]]], accuracy, 200) == pytest.approx(once)


def test_a_point_without_the_seeds_that_were_drawn_keeps_its_own():
    a, b = cells([[1.0, 1.0], [0.0, 0.0]], 1.0), cells([[1.0, 1.0]], 1.0)
    found = pareto.resample([[a], [b]], lambda _, mine, __, other: np.concatenate([mine, other], 1), 200)
    assert set(found[:, 0]) == {0.0, 0.5, 1.0}
    assert set(found[:, 1]) == {1.0}


def test_budgets_follow_the_seeds():
    points = [[Cell("t", seed, "all", (0.5, 0.5), budget) for seed, budget in enumerate((10.0, 20.0))]]
    found = pareto.resample([points], lambda budget, _: budget[:, 0], 200)
    assert set(found) == {10.0, 15.0, 20.0}


def test_ratios_and_differences_to_each_point_of_a_baseline():
    a = [cells([[0.0] * 10], 1.0), cells([[1.0] * 10], 4.0)]
    b = [cells([[0.5] * 10], 8.0), cells([[1.0] * 10], 32.0), cells([[0.0] * 10], 2.0)]
    assert pareto.ratio_intervals(a, b) == [(pytest.approx(4.0), pytest.approx(4.0)), (8.0, 8.0), (2.0, 2.0)]
    assert pareto.ratio_intervals(a, b, within=0.25)[0] == (pytest.approx(8 / 2**0.5), pytest.approx(8 / 2**0.5))
    unreached, beyond, inside = pareto.difference_intervals(a, b)
    assert np.isnan([unreached, beyond]).all()
    assert inside == pytest.approx((0.5, 0.5))


def test_an_accuracy_that_is_sometimes_not_reached_may_cost_anything():
    a = [cells([[0.0] * 8], 1.0), cells([[1.0] * 4 + [0.0] * 4], 2.0)]
    b = [cells([[0.6] * 8], 8.0)]
    ((low, high),) = pareto.ratio_intervals(a, b)
    assert low == 0.0
    assert high > 4
    cheap = [cells([[1.0] * 8], 2.0)]
    assert pareto.ratio_intervals(cheap, b) == [(4.0, 4.0)]  # at least: the cheapest point is better already


def test_curves_that_do_not_meet_have_no_interval():
    a, b = [cells([[1.0, 0.0]], 1.0)], [cells([[1.0, 0.0]], 2.0)]
    assert np.isnan(pareto.margin_interval(a, b)).all()
    assert np.isnan(pareto.interval_of(np.array([1.0] * 94 + [math.nan] * 6))).all()
    assert pareto.interval_of(np.array([1.0] * 95 + [math.nan] * 5)) == (1.0, 1.0)


def test_what_cannot_be_resampled_is_told():
    with pytest.raises(ValueError, match="at least one point"):
        pareto.resample([[]], accuracy)
    with pytest.raises(ValueError, match="at least one seed"):
        pareto.resample([[[]]], accuracy)
    with pytest.raises(ValueError, match="t: a set of problems has 3 scores here"):
        pareto.resample([[[Cell("t", 0, "all", (1.0, 0.0)), Cell("t", 1, "all", (1.0, 0.0, 1.0))]]], accuracy)
