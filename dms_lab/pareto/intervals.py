"""95 % intervals of one accuracy: of a share, of a mean of shares, of a mean over problems and seeds."""

import math
from collections.abc import Sequence

import numpy as np

Z = 1.959964  # of 95 %


def wilson_interval(successes: float, trials: float, z: float = Z) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927). Raises `ValueError` without trials."""
    if not trials > 0:
        raise ValueError("an interval needs at least one problem")
    share = successes / trials
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    low = 0.0 if successes == 0 else max(0.0, middle - half)
    high = 1.0 if successes == trials else min(1.0, middle + half)
    return low, high


def mean_interval(shares: Sequence[float], trials: Sequence[float], variance: float | None = None) -> tuple[float, float]:
    """95 % interval of the mean of independent shares, each of as many trials: Wilson's, of an effective number of trials.

    That is the number at which one share would have the variance of the mean: a trial is the less worth, the more of the
    variance something else brings in, as seeds. `variance`: what it was found to be, by resampling say; without, the
    binomial one of the shares. Both are taken a little larger (a quarter of z squared over the squared number), so that
    shares of 0 or 1 alone, whose variance shows as none, have Wilson's own interval. Source: Franco et al. 2019,
    Comparative study of confidence intervals for proportions in complex sample surveys. Raises `ValueError` without shares
    or trials, for a share that is none, and for a negative variance.
    """
    points, numbers = np.asarray(shares, float), np.asarray(trials, float)
    if not points.size or points.shape != numbers.shape or not (numbers > 0).all():
        raise ValueError("an interval needs at least one share, and at least one problem of each")
    if not ((points >= 0) & (points <= 1)).all():
        raise ValueError(f"shares must lie between 0 and 1; {points.tolist()} has one that does not")
    if variance is not None and not variance >= 0:
        raise ValueError(f"variance={variance} must not be negative; leave it out for that of the shares")
    mean, number = float(points.mean()), len(points) ** 2 / float((1 / numbers).sum())
    found = float((points * (1 - points) / numbers).sum()) / len(points) ** 2 if variance is None else variance
    more = (Z / (2 * number)) ** 2
    effective = number * (mean * (1 - mean) / number + more) / (found + more)
    return wilson_interval(mean * effective, effective)


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
