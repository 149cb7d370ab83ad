"""95 % intervals of one accuracy: of a share, of a mean of shares, of a mean over problems and seeds."""

import math
from collections.abc import Sequence

import numpy as np


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
    ends, and it keeps the skew of shares near 0 or 1. NaN if an end is. Raises `ValueError` without shares.
    """
    if not len(shares):
        raise ValueError("an interval needs at least one share")
    points, low, high = (np.asarray(x, float) for x in (shares, lows, highs))
    below, above = (math.sqrt(float((d**2).sum())) / len(points) for d in (points - low, high - points))
    return float(np.maximum(0.0, points.mean() - below)), float(np.minimum(1.0, points.mean() + above))


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
