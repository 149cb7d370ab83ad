"""From the samples of a task to one point (W chains, at most L tokens each): accuracy with intervals, and what it cost.

    chains of a problem, cut at L -> subsets of W of them -> vote, best, peak of each -> mean over subsets -> over problems

n: chains drawn for a problem. W: width, chains that a point uses. Every accuracy is a mean over subsets of W of the n
chains, or the closed form of that mean. The unit of evidence is the problem: intervals draw problems again, not chains.
"""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dms_lab import accounting, pareto
from dms_lab.accounting import Request
from dms_lab.evaluation.sample import Sample
from dms_lab.evaluation.verdict import Verdict

ACCURACIES = ("avg", "maj", "pass_at_k", "pass_all")
_BLOCK = 256  # steps whose peak is bounded at once


@dataclass(frozen=True)
class Cut:
    """A chain within its first `max_tokens` tokens: `truncated` unless it ended by itself among them."""

    ids: tuple[int, ...]
    truncated: bool


@dataclass(frozen=True)
class Chain:
    """One chain of a problem, ended at the point's limit: its verdict, its cost, and its live slots [steps].

    `live` may be left out (None) where peaks are computed apart, problem by problem: it is by far the largest part.
    """

    score: float
    answer: str | None
    truncated: bool
    request: Request
    live: np.ndarray | None


@dataclass(frozen=True)
class Estimate:
    """A share in [0, 1] with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Point:
    """One task at one budget: `width` chains a problem, at most `max_tokens` generated tokens each.

    `avg` is the mean of single chains, `maj` majority vote, `pass_at_k` whether any of the chains is right in full (k =
    width), `pass_all` the best score of the chains: the same where scores are 0 or 1. `accuracy` is the one that `headline`
    names. `truncated`: share of chains cut at the limit.

    `kv_reads`: of all chains of a problem together. `peak_tokens`: maximum over steps of the live slots of all, which start
    together and free their memory as they end. `kv_bytes_peak`: sum of the chains' own peaks, an upper bound, since they
    need not meet. These are means over problems. `tokens_generated`: mean of a chain. `measured_cr`: as in `accounting`.
    `problem_scores`: each problem's accuracy by the headline, mean over draws, in the problems' order.
    """

    width: int
    max_tokens: int
    headline: str
    num_problems: int
    num_chains: int
    avg: Estimate
    maj: Estimate
    pass_at_k: Estimate
    pass_all: Estimate
    truncated: float
    kv_reads: float
    peak_tokens: float
    kv_bytes_peak: float
    tokens_generated: float
    measured_cr: float
    problem_scores: tuple[float, ...]

    @property
    def accuracy(self) -> Estimate:
        """The accuracy that `headline` names."""
        return getattr(self, self.headline)


def cut(sample: Sample, max_tokens: int) -> Cut:
    """The chain ended after `max_tokens` tokens. Raises `ValueError` if it was not drawn for that long."""
    if not sample.serves(max_tokens):
        raise ValueError(
            f"chain {sample.chain} of problem {sample.problem!r} was cut at {sample.num_tokens} tokens; what it does "
            f"within {max_tokens} is not known: draw it again with max_tokens={max_tokens}"
        )
    truncated = sample.num_tokens > max_tokens or (sample.finish_reason == "length" and sample.num_tokens >= max_tokens)
    return Cut(sample.ids[:max_tokens], truncated)


def judged(sample: Sample, verdict: Verdict, max_tokens: int) -> Chain:
    """A sample cut at `max_tokens`, with the verdict on what is left of it."""
    request = sample.trace.request(sample.num_prompt, max_tokens)
    truncated = cut(sample, max_tokens).truncated
    return Chain(verdict.score, verdict.answer, truncated, request, sample.trace.live[:max_tokens])


# -- accuracy of W chains ----------------------------------------------------------------------------------------------


def vote(answers: Sequence[str | None]) -> str | None:
    """The most frequent answer, the first seen of equals; None does not vote, and wins if nobody does."""
    counts: dict[str, int] = {}
    for answer in answers:
        if answer is not None:
            counts[answer] = counts.get(answer, 0) + 1
    return max(counts, key=counts.__getitem__, default=None)


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n samples, c of them right, have a right one. Source: Chen et al. 2021, equation 1."""
    if not (1 <= k <= n and 0 <= c <= n):
        raise ValueError(f"pass@{k} of {n} samples, {c} of them right, does not exist; k must be in 1..n, c in 0..n")
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)


@functools.lru_cache(maxsize=16)
def subsets(n: int, width: int, most: int = 1000, seed: int = 0) -> tuple[tuple[int, ...], ...]:
    """All subsets of `width` of n chains if they are at most `most`, else `most` different ones drawn by `seed`.

    Chains ascend in a subset, and subsets ascend. Raises `ValueError` for a width that n chains do not have.
    """
    if not (1 <= width <= n and most >= 1):
        raise ValueError(
            f"{n} chains have no subsets of width {width}; width must be in 1..{n}, and most={most} at least 1"
        )
    if math.comb(n, width) <= most:
        return tuple(itertools.combinations(range(n), width))
    rng, found = np.random.default_rng(seed), set()
    while len(found) < most:
        drawn = np.sort(rng.random((most, n)).argsort(1)[:, :width], 1)
        for subset in map(tuple, drawn.tolist()):
            if len(found) < most:
                found.add(subset)
    return tuple(sorted(found))


def majority_accuracy(
    scores: Sequence[float], answers: Sequence[str | None], width: int, most: int = 1000, seed: int = 0
) -> float:
    """Mean score of the voted answer over `subsets` of the chains: that of the first chain in a subset that gives it.

    A subset in which nobody answers scores 0.
    """
    names: dict[str, int] = {}
    codes = np.array([-1 if a is None else names.setdefault(a, len(names)) for a in answers])
    chosen = np.array(subsets(len(answers), width, most, seed))
    if not names:
        return 0.0
    gives = codes[chosen]  # [subsets, W]
    best, first = np.zeros(len(chosen), int), np.full(len(chosen), width)
    for code in range(len(names)):
        is_it = gives == code
        count, place = is_it.sum(1), is_it.argmax(1)
        wins = (count > best) | ((count == best) & (place < first))
        best, first = np.where(wins, count, best), np.where(wins, place, first)
    voted = np.asarray(scores, float)[chosen[np.arange(len(chosen)), first % width]]
    return float(np.where(best > 0, voted, 0.0).mean())


def best_of(scores: Sequence[float], width: int) -> float:
    """Mean of the best score over all subsets of `width` chains, in closed form; with scores of 0 and 1, pass@width."""
    n = len(scores)
    if not 1 <= width <= n:
        raise ValueError(f"{n} chains have no subsets of width {width}; width must be in 1..{n}")
    mean, below = 0.0, 0
    for score, equals in itertools.groupby(sorted(scores)):
        upto = below + len(list(equals))  # subsets of the worst `upto` chains that are not of the worst `below` alone
        mean += score * ((math.comb(upto, width) - math.comb(below, width)) / math.comb(n, width))
        below = upto
    return mean


# -- memory of W chains ------------------------------------------------------------------------------------------------


def peak_of(lives: Sequence[np.ndarray], chosen: Sequence[Sequence[int]]) -> float:
    """The most live slots that the chains of a subset hold together at a step, mean over the subsets `chosen`.

    `lives`: live slots [steps] of each chain. They start at the same step, and an ended one holds nothing. Exact: the sum
    of the chains' maxima over a block of steps bounds the block, and blocks are looked into from the highest bound down
    until none can hold more than what was found.
    """
    steps = max(1, *(len(live) for live in lives))
    rows = np.zeros((len(lives), -(-steps // _BLOCK), _BLOCK))  # [n, blocks, steps of each]
    for row, live in zip(rows.reshape(len(lives), -1), lives, strict=True):
        row[: len(live)] = live
    tops = rows.max(2)
    return float(np.mean([_peak(rows, tops, subset) for subset in chosen]))


def _peak(rows: np.ndarray, tops: np.ndarray, subset: Sequence[int]) -> float:
    bounds, peak = _added(tops, subset, slice(None)), 0.0
    for block in np.argsort(-bounds, kind="stable"):
        if bounds[block] <= peak:
            break
        peak = max(peak, float(_added(rows, subset, block).max()))
    return peak


def _added(rows: np.ndarray, subset: Sequence[int], index: int | slice) -> np.ndarray:
    """Sum of chains, one after the other: rounding keeps the order of a bound and what it bounds, if both add alike."""
    total = rows[subset[0], index].copy()
    for chain in subset[1:]:
        total += rows[chain, index]
    return total


# -- a point -----------------------------------------------------------------------------------------------------------


def problem_accuracies(
    problems: Mapping[str, Sequence[Chain]], width: int, most: int = 1000, seed: int = 0
) -> dict[str, np.ndarray]:
    """Each of `ACCURACIES` of each problem, float64 [problems] in the order of `problems`."""
    _check(problems)
    found: dict[str, list[float]] = {name: [] for name in ACCURACIES}
    for chains in problems.values():
        scores = [chain.score for chain in chains]
        found["avg"].append(math.fsum(scores) / len(scores))
        found["maj"].append(majority_accuracy(scores, [chain.answer for chain in chains], width, most, seed))
        found["pass_at_k"].append(pass_at_k(len(scores), sum(s == 1 for s in scores), width))
        found["pass_all"].append(best_of(scores, width))
    return {name: np.array(values) for name, values in found.items()}


def interval(scores: Sequence[float] | Sequence[Sequence[float]], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of `scores`, one a problem, or [seeds, problems].

    The bootstrap over seeds and problems, except where all scores are 0 or all are 1: there it has no width, though
    another set of problems might show otherwise, and Wilson's interval stands for it, with one trial a problem however
    many chains and seeds there were.
    """
    rows = np.atleast_2d(np.asarray(scores, float))
    if rows.size and (rows == rows.flat[0]).all() and rows.flat[0] in (0, 1):
        return pareto.wilson_interval(round(rows.flat[0] * rows.shape[1]), rows.shape[1])
    return pareto.seeds_interval(rows, seed=seed)


def point(
    draws: Sequence[Mapping[str, Sequence[Chain]]],
    width: int,
    max_tokens: int,
    headline: str,
    mean_peak: float | None = None,
    most: int = 1000,
    seed: int = 0,
) -> Point:
    """One task's point from its problems' chains, ended at `max_tokens` by the caller (see `judged`); a draw is one seed's.

    `mean_peak`: mean of `peak_of` over problems and draws, computed here from `live` if None. At most `most` subsets of a
    problem's chains are looked at, drawn by `seed`. Raises `ValueError` if there is no problem, draws have not the same,
    problems have different numbers of chains, fewer than `width`, or a chain is longer than `max_tokens`.
    """
    if headline not in ACCURACIES:
        raise ValueError(f"headline={headline!r} is not known; choose one of {', '.join(ACCURACIES)}")
    num_chains = _check_draws(draws, max_tokens)
    chosen = subsets(num_chains, width, most, seed)
    if mean_peak is None:
        peaks = [peak_of([chain.live for chain in chains], chosen) for draw in draws for chains in draw.values()]
        mean_peak = sum(peaks) / len(peaks)
    every = [chain for draw in draws for chains in draw.values() for chain in chains]
    cost = accounting.usage(chain.request for chain in every)
    by_draw = [problem_accuracies(draw, width, most, seed) for draw in draws]
    means = {name: np.array([found[name] for found in by_draw]) for name in ACCURACIES}  # [seeds, problems]
    estimates = {name: Estimate(float(values.mean()), *interval(values, seed)) for name, values in means.items()}
    return Point(
        width=width,
        max_tokens=max_tokens,
        headline=headline,
        num_problems=len(draws[0]),
        num_chains=num_chains,
        **estimates,
        truncated=sum(chain.truncated for chain in every) / len(every),
        kv_reads=width * cost.kv_reads,
        peak_tokens=mean_peak,
        kv_bytes_peak=width * cost.kv_bytes_peak,
        tokens_generated=cost.tokens_generated / cost.num_requests,
        measured_cr=cost.measured_cr,
        problem_scores=tuple(means[headline].mean(0).tolist()),
    )


def _check_draws(draws: Sequence[Mapping[str, Sequence[Chain]]], max_tokens: int) -> int:
    """How many chains each problem has, in every draw."""
    if not draws:
        raise ValueError("a point needs at least one problem")
    counts = [_check(draw, max_tokens) for draw in draws]
    if any(list(draw) != list(draws[0]) for draw in draws) or len(set(counts)) > 1:
        raise ValueError(
            f"seeds have {[len(draw) for draw in draws]} problems with {counts} chains; all need the same problems, in the "
            "same order, and as many chains"
        )
    return counts[0]


def _check(problems: Mapping[str, Sequence[Chain]], max_tokens: int | None = None) -> int:
    """How many chains each problem has."""
    if not problems:
        raise ValueError("a point needs at least one problem")
    counts = {name: len(chains) for name, chains in problems.items()}
    usual = max(counts.values())
    odd = [f"{name} ({count})" for name, count in counts.items() if count != usual]
    if odd:
        raise ValueError(
            f"problems have different numbers of chains, {usual} and fewer: {', '.join(odd[:10])}; finish drawing them, or "
            "leave out what the others lack"
        )
    for name, chains in problems.items():
        longest = max(chain.request.num_generated for chain in chains)
        if max_tokens is not None and longest > max_tokens:
            raise ValueError(f"problem {name} has a chain of {longest} tokens; end its chains at max_tokens={max_tokens}")
    return usual
