"""Accuracies, costs and intervals of W chains equal brute force over all subsets of the chains that were drawn."""

import itertools
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dms_lab import pareto
from dms_lab.accounting import Request, Trace
from dms_lab.evaluation import scores
from dms_lab.evaluation.sample import Sample
from dms_lab.evaluation.scores import Chain, best_of, majority_accuracy, pass_at_k, peak_of, point, subsets
from dms_lab.evaluation.verdict import Verdict

ANSWERS = st.lists(st.sampled_from(["7", "8", "9", None]), min_size=1, max_size=8)


def make_sample(num_tokens, finish_reason, max_tokens):
    live = np.arange(num_tokens) + 3.0
    trace = Trace(live, np.where(np.arange(num_tokens) > 0, live, 0.0), live * 8)
    ids = tuple(range(num_tokens))
    return Sample("t", "p", 0, 0, "r", "h", max_tokens, 3, "", ids, finish_reason, trace, 4, 1.0, "2025-01-01T00:00:00Z")


def make_chain(score, answer=None, live=(1.0,), truncated=False):
    live = np.asarray(live, float)
    request = Request(live[1:].sum(), live.max(), live[-1], 10 + len(live) - 1, len(live), 64 * live.max())
    return Chain(score, answer, truncated, request, live)


def naive_vote(answers):
    given = [a for a in answers if a is not None]
    most = max(Counter(given).values(), default=0)
    return next((a for a in given if given.count(a) == most), None)


# -- cutting -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_tokens", "finish_reason", "drawn_with", "max_tokens", "truncated"),
    [
        (5, "eos", 9, 9, False),
        (5, "stop", 9, 5, False),
        (5, "eos", 9, 4, True),
        (9, "length", 9, 9, True),
        (9, "length", 9, 4, True),
        (5, "eos", 9, 100, False),
    ],
)
def test_a_chain_is_cut_where_it_did_not_end_by_itself(num_tokens, finish_reason, drawn_with, max_tokens, truncated):
    sample = make_sample(num_tokens, finish_reason, drawn_with)
    cut = scores.cut(sample, max_tokens)
    assert cut == scores.Cut(tuple(range(min(num_tokens, max_tokens))), truncated)
    chain = scores.judged(sample, Verdict(0.5, "7"), max_tokens)
    assert (chain.score, chain.answer, chain.truncated) == (0.5, "7", truncated)
    assert chain.request == sample.trace.request(3, max_tokens)
    assert chain.live.tolist() == sample.trace.live[:max_tokens].tolist()


def test_what_a_chain_would_have_done_later_is_not_made_up():
    with pytest.raises(ValueError, match="max_tokens=10"):
        scores.cut(make_sample(9, "length", 9), 10)


# -- accuracy ----------------------------------------------------------------------------------------------------------


@given(ANSWERS)
def test_a_vote_is_the_most_frequent_answer_and_the_first_seen_of_equals(answers):
    assert scores.vote(answers) == naive_vote(answers)


def test_votes_by_hand():
    assert scores.vote(["a", "b", "b", "a"]) == "a"
    assert scores.vote([None, None, "b"]) == "b"
    assert scores.vote([None]) is None


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_mean_over_all_subsets(right, data):
    k = data.draw(st.integers(1, len(right)))
    brute = np.mean([any(chosen) for chosen in itertools.combinations(right, k)])
    assert pass_at_k(len(right), sum(right), k) == pytest.approx(brute, abs=1e-15)
    assert best_of([float(r) for r in right], k) == pass_at_k(len(right), sum(right), k)


@settings(deadline=None)
@given(st.lists(st.sampled_from([0, 0.25, 0.3, 1]), min_size=1, max_size=8), st.data())
def test_the_best_of_w_is_the_mean_over_all_subsets(found, data):
    width = data.draw(st.integers(1, len(found)))
    brute = np.mean([max(chosen) for chosen in itertools.combinations(found, width)])
    assert best_of(found, width) == pytest.approx(brute, abs=1e-14)


def test_pass_at_k_of_many_samples_is_exact():
    assert pass_at_k(64, 0, 8) == 0
    assert pass_at_k(64, 57, 8) == 1
    assert pass_at_k(200, 3, 1) == 3 / 200
    assert pass_at_k(10_000, 1, 5_000) == 0.5
    assert best_of([1.0] * 64, 13) == 1


def test_counts_that_do_not_exist_are_refused():
    for n, c, k in ((4, 1, 5), (4, 5, 2), (4, -1, 2), (4, 1, 0)):
        with pytest.raises(ValueError, match="does not exist"):
            pass_at_k(n, c, k)
    for refused in (lambda: subsets(4, 5), lambda: subsets(4, 0), lambda: best_of([1, 0], 3)):
        with pytest.raises(ValueError, match="no subsets of width"):
            refused()


@settings(deadline=None, max_examples=300)
@given(ANSWERS, st.data())
def test_majority_accuracy_is_the_mean_over_all_subsets(answers, data):
    found = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=len(answers), max_size=len(answers)))
    width = data.draw(st.integers(1, len(answers)))
    brute = []
    for chosen in itertools.combinations(range(len(answers)), width):
        voted = naive_vote([answers[i] for i in chosen])
        brute.append(0.0 if voted is None else next(found[i] for i in chosen if answers[i] == voted))
    assert majority_accuracy(found, answers, width) == pytest.approx(np.mean(brute), abs=1e-14)


def test_subsets_are_all_of_them_or_as_many_different_ones():
    assert subsets(5, 3) == tuple(itertools.combinations(range(5), 3))
    assert len(subsets(13, 4, most=714)) == 714
    some = subsets(40, 7, most=300, seed=3)
    assert len(set(some)) == len(some) == 300
    assert all(list(s) == sorted(set(s)) and len(s) == 7 and s[-1] < 40 for s in some)
    subsets.cache_clear()
    assert subsets(40, 7, most=300, seed=3) == some != subsets(40, 7, most=300, seed=4)


def test_drawn_subsets_are_uniform():
    counts = np.bincount(np.array(subsets(20, 5, most=4000)).ravel(), minlength=20)
    assert abs(counts / 4000 - 0.25).max() < 0.03


# -- memory ------------------------------------------------------------------------------------------------------------


def naive_peak(lives, chosen):
    steps = max(len(lives[i]) for i in chosen)
    return max(sum(float(lives[i][t]) for i in chosen if t < len(lives[i])) for t in range(steps))


LENGTHS = st.lists(st.integers(1, 700), min_size=1, max_size=6)


@settings(deadline=None, max_examples=150)
@given(LENGTHS, st.sampled_from(["noise", "growing", "flat"]), st.integers(0, 1000), st.data())
def test_a_peak_is_that_of_a_simulation_to_the_bit(lengths, kind, seed, data):
    rng = np.random.default_rng(seed)
    make = {
        "noise": lambda n: rng.integers(0, 10**6, n) / 288,
        "growing": lambda n: np.cumsum(rng.integers(0, 3, n)) / 7,
        "flat": lambda n: np.full(n, 1 / 3),
    }[kind]
    lives = [make(n) for n in lengths]
    chosen = data.draw(st.sets(st.integers(0, len(lives) - 1), min_size=1).map(sorted))
    assert peak_of(lives, [chosen]) == naive_peak(lives, chosen)


def test_a_peak_is_a_mean_over_subsets_and_an_ended_chain_holds_nothing():
    lives = [np.array([5.0, 1.0]), np.array([1.0, 1.0, 4.0]), np.array([2.0])]
    assert peak_of(lives, [(0, 1)]) == 6
    assert peak_of(lives, [(1, 2)]) == 4
    assert peak_of(lives, subsets(3, 2)) == pytest.approx((6 + 4 + 7) / 3)


def test_peaks_of_long_chains_are_quick():
    rng = np.random.default_rng(0)
    lives = [np.cumsum(rng.random(int(n)) < 0.2) + rng.random(int(n)) for n in rng.integers(8_000, 32_768, 64)]
    began = time.monotonic()
    found = peak_of(lives, subsets(64, 8, most=200))
    assert time.monotonic() - began < 2
    assert found == pytest.approx(np.mean([naive_sum(lives, chosen) for chosen in subsets(64, 8, most=200)]), rel=1e-12)


def naive_sum(lives, chosen):
    total = np.zeros(32_768)
    for i in chosen:
        total[: len(lives[i])] += lives[i]
    return total.max()


# -- intervals ---------------------------------------------------------------------------------------------------------


def test_with_one_seed_the_interval_is_the_plain_one():
    rng = np.random.default_rng(0)
    for n in (1, 2, 30, 201):
        found = rng.random(n)
        assert pareto.seeds_interval([found], 2000, seed=5) == pareto.bootstrap_interval(found, 2000, seed=5)


def test_equal_seeds_are_no_more_evidence_than_one():
    found = np.random.default_rng(0).random(40)
    one, three = pareto.seeds_interval([found]), pareto.seeds_interval([found] * 3)
    assert three == pytest.approx(one, abs=1e-12)


def test_seeds_and_problems_both_count():
    """Against the plain definition, drawn in a loop; then each source alone."""
    rng = np.random.default_rng(1)
    rows = rng.random((4, 25)) * 0.4 + rng.random((4, 1)) * 0.3
    drawn = []
    for _ in range(4000):
        picked = rng.integers(0, 25, 25)
        drawn.append(rows[rng.integers(0, 4, 4)][:, picked].mean())
    assert pareto.seeds_interval(rows) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.01)
    low, high = pareto.seeds_interval(np.tile([[0.2], [0.4]], (1, 30)))
    assert (low, high) == (pytest.approx(0.2), pytest.approx(0.4))
    assert pareto.seeds_interval(rows) == pareto.seeds_interval(rows)
    assert pareto.seeds_interval(rows) != pareto.seeds_interval(rows, seed=1)


def test_seeds_with_other_problems_are_refused():
    for empty in ([], [[]], [[], []]):
        with pytest.raises(ValueError, match="at least one seed"):
            pareto.seeds_interval(empty)
    with pytest.raises(ValueError, match=r"\[2, 3\] problems"):
        pareto.seeds_interval([[1, 0], [1, 0, 1]])


def test_the_interval_over_seeds_covers_the_truth_and_is_little_wider_than_it_must_be():
    """5 seeds that differ, 60 problems of different difficulty, right or wrong, 300 experiments."""
    rng = np.random.default_rng(0)
    means, halves, covered = [], [], 0
    for number in range(300):
        difficulty, luck = rng.normal(0, 1.5, 60), rng.normal(0, 0.1, (5, 1))
        found = rng.random((5, 60)) < 1 / (1 + np.exp(difficulty + luck))
        low, high = pareto.seeds_interval(found, 500, seed=number)
        means.append(found.mean())
        halves.append((high - low) / 2)
        covered += low <= 0.5 <= high
    assert covered / 300 > 0.93
    assert 1 < np.mean(halves) / (1.96 * np.std(means)) < 1.35


def test_ten_thousand_resamples_of_two_hundred_problems_are_quick():
    rows = np.random.default_rng(0).random((3, 200))
    began = time.monotonic()
    pareto.seeds_interval(rows)
    assert time.monotonic() - began < 1


def test_where_all_is_right_or_all_is_wrong_the_interval_still_has_a_width():
    assert scores.interval([1.0] * 30) == pareto.wilson_interval(30, 30)
    assert scores.interval([[0.0] * 30] * 3) == pareto.wilson_interval(0, 30)
    assert scores.interval([1.0, 0.0] * 15) == pareto.bootstrap_interval([1.0, 0.0] * 15)
    assert scores.interval([0.5] * 4) == (0.5, 0.5)


# -- points ------------------------------------------------------------------------------------------------------------


def make_problems(num_problems=4, n=5, seed=0):
    rng = np.random.default_rng(seed)
    problems = {}
    for number in range(num_problems):
        answers = [str(a) for a in rng.integers(0, 3, n)]
        lives = [rng.integers(1, 100, rng.integers(1, 9)) for _ in range(n)]
        cut = rng.random(n) < 0.3
        problems[f"p{number}"] = [
            make_chain(float(a == "0"), a, live, bool(c)) for a, live, c in zip(answers, lives, cut, strict=True)
        ]
    return problems


@pytest.mark.parametrize("width", [1, 2, 5])
def test_a_point_is_brute_force_over_problems_and_subsets(width):
    problems = make_problems()
    found = point([problems], width, 8, "maj")
    by_subset = {"maj": [], "any": [], "reads": [], "peak": [], "bytes": []}
    for chains in problems.values():
        all_chosen = list(itertools.combinations(chains, width))

        def mean(value, chosen=all_chosen):
            return np.mean([value(c) for c in chosen])

        by_subset["maj"].append(mean(lambda c: float(naive_vote([x.answer for x in c]) == "0")))
        by_subset["any"].append(mean(lambda c: max(x.score for x in c)))
        by_subset["reads"].append(mean(lambda c: sum(x.request.kv_reads for x in c)))
        by_subset["peak"].append(mean(lambda c: naive_peak([x.live for x in c], range(width))))
        by_subset["bytes"].append(mean(lambda c: sum(x.request.kv_bytes_peak for x in c)))
    every = [chain for chains in problems.values() for chain in chains]
    expected = {name: np.mean(values) for name, values in by_subset.items()}
    assert found.maj.value == pytest.approx(expected["maj"])
    assert found.pass_at_k.value == found.pass_all.value == pytest.approx(expected["any"])
    assert found.avg.value == pytest.approx(np.mean([chain.score for chain in every]))
    assert (found.kv_reads, found.peak_tokens) == (pytest.approx(expected["reads"]), pytest.approx(expected["peak"]))
    assert found.kv_bytes_peak == pytest.approx(expected["bytes"])
    assert found.truncated == np.mean([chain.truncated for chain in every])
    assert found.tokens_generated == np.mean([len(chain.live) for chain in every])
    logical, live = (sum(getattr(c.request, name) for c in every) for name in ("num_tokens", "live_tokens"))
    assert found.measured_cr == pytest.approx(logical / live)
    assert (found.width, found.max_tokens, found.num_problems, found.num_chains) == (width, 8, 4, 5)


def test_intervals_of_a_point_are_over_its_problems():
    problems = make_problems(30)
    found = point([problems], 2, 8, "pass_all")
    assert found.accuracy == found.pass_all
    accuracies = scores.problem_accuracies(problems, 2)
    for name, values in accuracies.items():
        estimate = getattr(found, name)
        assert (estimate.low, estimate.high) == pareto.bootstrap_interval(values)
        assert estimate.low < estimate.value == values.mean() < estimate.high
    assert point([problems], 2, 8, "pass_all") == found


def test_seeds_are_means_of_their_own_points_and_a_second_level_of_the_interval():
    draws = [make_problems(12, seed=seed) for seed in range(3)]
    found, alone = point(draws, 2, 8, "maj"), [point([draw], 2, 8, "maj") for draw in draws]
    for name in ("kv_reads", "peak_tokens", "kv_bytes_peak", "tokens_generated", "truncated"):
        assert getattr(found, name) == pytest.approx(np.mean([getattr(one, name) for one in alone]))
    assert found.maj.value == pytest.approx(np.mean([one.maj.value for one in alone]))
    rows = [scores.problem_accuracies(draw, 2)["maj"] for draw in draws]
    assert (found.maj.low, found.maj.high) == pareto.seeds_interval(rows)
    assert found.problem_scores == tuple(np.mean(rows, 0))
    best = [scores.problem_accuracies(draw, 2)["pass_all"] for draw in draws]
    assert point(draws, 2, 8, "pass_all").problem_scores == tuple(np.mean(best, 0)) != found.problem_scores
    with pytest.raises(ValueError, match="all need the same problems"):
        point([draws[0], make_problems(11)], 2, 8, "maj")


def test_peaks_may_be_computed_apart():
    problems = make_problems()
    light = {name: [replace(chain, live=None) for chain in chains] for name, chains in problems.items()}
    whole = point([problems], 2, 8, "maj")
    assert point([light], 2, 8, "maj", whole.peak_tokens) == whole


def test_partly_right_answers_pass_nothing_but_count_in_full():
    problems = {"p": [make_chain(0.5, "a"), make_chain(0.0, "b"), make_chain(0.25)]}
    found = point([problems], 2, 1, "avg")
    assert (found.pass_at_k.value, found.avg.value) == (0, 0.25)
    assert found.pass_all.value == pytest.approx((0.5 + 0.5 + 0.25) / 3)
    assert found.maj.value == pytest.approx((0.5 + 0.5 + 0.0) / 3)


def test_problems_that_do_not_fit_a_point_are_named():
    problems = make_problems()
    short = problems | {"p2": problems["p2"][:3]}
    with pytest.raises(ValueError, match=r"5 and fewer: p2 \(3\)"):
        point([short], 2, 8, "maj")
    with pytest.raises(ValueError, match="at least one problem"):
        point([{}], 1, 8, "maj")
    with pytest.raises(ValueError, match="choose one of avg, maj, pass_at_k, pass_all"):
        point([problems], 2, 8, "best")
    with pytest.raises(ValueError, match=r"width must be in 1\.\.5"):
        point([problems], 6, 8, "maj")
    long = problems | {"p1": [make_chain(1.0, "0", np.ones(9)), *problems["p1"][1:]]}
    with pytest.raises(ValueError, match="problem p1 has a chain of 9 tokens"):
        point([long], 2, 8, "maj")


def test_scores_need_no_torch():
    script = "import sys, dms_lab.evaluation.scores; sys.exit('torch' in sys.modules or 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
