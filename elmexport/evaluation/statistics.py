"""Intervals and tests for paired comparisons. Shares and differences are between -1 and 1 here; points are the business of reports.

Answers that are right or wrong get Tango's score interval: it inverts the test that McNemar's statistic comes from, so it excludes zero
just where that test rejects; it keeps its level with few items, and with no flips at all it says how much could still be hidden
(±3.7 points for 100 items) where a bootstrap would claim certainty. Real-valued figures get a bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
POWER = 0.8
RESAMPLES = 10_000

_NORMAL = NormalDist()

Interval = tuple[float, float]


def _quantile(confidence: float) -> float:
    """How many standard deviations an interval reaches to either side."""
    return _NORMAL.inv_cdf(0.5 + confidence / 2)


_Z = _quantile(CONFIDENCE)


def mcnemar_p(right_to_wrong: int, wrong_to_right: int) -> float:
    """Two-sided exact p of McNemar's test: that a fair coin falls at least so unevenly on the flipped items."""
    flips = right_to_wrong + wrong_to_right
    tail = sum(math.comb(flips, k) for k in range(min(right_to_wrong, wrong_to_right) + 1))
    return min(1.0, 2 * tail / 2**flips)


def paired_interval(right_to_wrong: int, wrong_to_right: int, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Score interval of the drop in accuracy, (right_to_wrong - wrong_to_right) / n, over `n` items.

    T. Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample design", Statistics in
    Medicine 17 (1998).
    """
    z = _quantile(confidence)

    def statistic(drop: float) -> float:
        b = -right_to_wrong - wrong_to_right + (2 * n - right_to_wrong + wrong_to_right) * drop
        c = -wrong_to_right * drop * (1 - drop)
        gained = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)  # the likeliest share of wrong_to_right, were `drop` the truth
        variance = n * (2 * gained + drop * (1 - drop))
        surplus = right_to_wrong - wrong_to_right - n * drop
        return surplus / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, surplus) if surplus else 0.0

    estimate = (right_to_wrong - wrong_to_right) / n
    low = -1.0 if estimate == -1 else _root(lambda drop: statistic(drop) - z, -1.0, estimate)
    high = 1.0 if estimate == 1 else _root(lambda drop: statistic(drop) + z, estimate, 1.0)
    return low, high


def wilson_interval(successes: int, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Wilson's score interval of a share."""
    z = _quantile(confidence)
    share, z2 = successes / n, z * z
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return middle - half, middle + half


def unpaired_interval(before: NDArray[np.float64], after: NDArray[np.float64], confidence: float = CONFIDENCE) -> Interval:
    """Interval of mean(before) - mean(after), independent samples.

    Of shares: R. G. Newcombe, "Interval estimation for the difference between independent proportions", Statistics in Medicine 17 (1998),
    method 10. Of other values: from the two standard errors.
    """
    drop = float(before.mean() - after.mean())
    if np.isin(np.concatenate([before, after]), (0.0, 1.0)).all():
        (low1, high1), (low2, high2) = (wilson_interval(int(values.sum()), len(values), confidence) for values in (before, after))
        p1, p2 = float(before.mean()), float(after.mean())
        return drop - math.hypot(p1 - low1, high2 - p2), drop + math.hypot(high1 - p1, p2 - low2)
    half = _quantile(confidence) * math.sqrt(sum(float(values.var(ddof=1)) / len(values) for values in (before, after)))
    return drop - half, drop + half


def detectable_drop(right_to_wrong: int, wrong_to_right: int, n: int) -> float:
    """The smallest true drop that a two-sided test at 5 % finds in `n` such items with a probability of 80 %.

    The usual normal approximation for McNemar's test (R. J. Connor, Biometrics 43, 1987). The share of items that flip is estimated from
    those that did, drawn a little towards one half as in Wilson's interval so that none is not taken for never, and it is at least the
    drop itself. 1 where no drop would be found.
    """
    z2 = _Z * _Z
    flipping = (right_to_wrong + wrong_to_right + z2 / 2) / (n + z2)

    def excess(drop: float) -> float:
        share = max(flipping, drop)
        return drop * math.sqrt(n) - _Z * math.sqrt(share) - _NORMAL.inv_cdf(POWER) * math.sqrt(share - drop * drop)

    return _root(excess, 0.0, 1.0) if excess(1.0) > 0 else 1.0


def detectable_mean_drop(differences: NDArray[np.float64]) -> float:
    """As `detectable_drop`, for a real-valued metric whose items differ by `differences`."""
    spread = float(differences.std(ddof=1)) if len(differences) > 1 else math.inf
    return min(1.0, (_Z + _NORMAL.inv_cdf(POWER)) * spread / math.sqrt(len(differences)))


def bootstrap_interval(
    values: NDArray[np.float64], weights: NDArray[np.float64] | None = None, *, confidence: float = CONFIDENCE, seed: int = 0
) -> Interval:
    """Bootstrap interval of sum(values) / sum(weights) (of the mean where `weights` is None); the pairs are resampled together.

    Percentiles, set a little further out than 2.5 % so that the interval is as wide as Student's where the values are normal: plain
    percentiles are too narrow for few values. T. Hesterberg, "What Teachers Should Know About the Bootstrap", The American Statistician
    69 (2015), "expanded percentile interval".
    """
    n = len(values)
    weights = np.ones(n) if weights is None else weights
    if n == 1:
        return float(values[0] / weights[0]), float(values[0] / weights[0])
    generator = np.random.Generator(np.random.PCG64(seed))
    ratios = []
    for start in range(0, RESAMPLES, 500):  # in parts, for memory
        chosen = generator.integers(0, n, (min(500, RESAMPLES - start), n))
        ratios.append(values[chosen].sum(axis=1) / weights[chosen].sum(axis=1))
    tail = _NORMAL.cdf(-math.sqrt(n / (n - 1)) * student_quantile(0.5 + confidence / 2, n - 1))
    low, high = np.quantile(np.concatenate(ratios), [tail, 1 - tail])
    return float(low), float(high)


def student_quantile(p: float, freedom: int) -> float:
    """Quantile of Student's t, p > 1/2; to three digits from 3 degrees of freedom up (exact for 1 and 2). Abramowitz and Stegun 26.7.5."""
    if freedom == 1:
        return math.tan(math.pi * (p - 0.5))
    if freedom == 2:
        return (2 * p - 1) / math.sqrt(2 * p * (1 - p))
    z = _NORMAL.inv_cdf(p)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where `function`, monotonic, crosses zero between `low` and `high`."""
    rising = function(high) > function(low)
    for _ in range(60):
        middle = (low + high) / 2
        if (function(middle) > 0) == rising:
            high = middle
        else:
            low = middle
    return (low + high) / 2
