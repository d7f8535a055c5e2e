"""Intervals and tests against scipy and statsmodels, against the definition by brute force, and by simulated coverage (fixed seeds)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.signal
import scipy.special
import scipy.stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.power import normal_power_het
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint
from statsmodels.stats.weightstats import CompareMeans

from elmexport.evaluation.statistics import (
    bootstrap_interval,
    detectable_drop,
    detectable_mean_drop,
    mcnemar_p,
    paired_interval,
    student_quantile,
    unpaired_interval,
    wilson_interval,
)

Z = scipy.stats.norm.ppf(0.975)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (0, 5), (7, 2), (10, 10), (40, 20), (900, 1013)])
def test_mcnemar(lost: int, won: int) -> None:
    expected = mcnemar([[10, lost], [won, 10]], exact=True).pvalue
    assert mcnemar_p(lost, won) == pytest.approx(min(1.0, expected), rel=1e-9)


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (10, 10), (3, 10), (512, 1000)])
@pytest.mark.parametrize("confidence", [0.95, 0.99])
def test_wilson(successes: int, n: int, confidence: float) -> None:
    assert wilson_interval(successes, n, confidence) == pytest.approx(
        proportion_confint(successes, n, alpha=1 - confidence, method="wilson"), abs=1e-12
    )


@pytest.mark.parametrize(
    ("before", "n_before", "after", "n_after"), [(56, 70, 48, 80), (10, 10, 0, 20), (0, 10, 0, 10), (400, 900, 380, 1000)]
)
def test_unpaired_shares(before: int, n_before: int, after: int, n_after: int) -> None:
    ours = unpaired_interval(*(np.repeat([1.0, 0.0], [k, n - k]) for k, n in ((before, n_before), (after, n_after))))
    assert ours == pytest.approx(confint_proportions_2indep(before, n_before, after, n_after, method="newcomb", compare="diff"), abs=1e-12)


def test_unpaired_values() -> None:
    a, b = rng().normal(0.5, 0.2, 50), rng(1).normal(0.4, 0.1, 80)
    assert unpaired_interval(a, b) == pytest.approx(CompareMeans.from_data(a, b).zconfint_diff(usevar="unequal"), abs=1e-12)


def score_statistic(lost: int, won: int, n: int, drop: float) -> float:
    """Tango's statistic by its definition: the nuisance share maximizes the likelihood numerically."""

    def loss(share_won: float) -> float:
        share_lost, same = share_won + drop, 1 - 2 * share_won - drop
        return -(scipy.special.xlogy(lost, share_lost) + scipy.special.xlogy(won, share_won) + scipy.special.xlogy(n - lost - won, same))

    low, high = max(0.0, -drop), (1 - drop) / 2
    share = scipy.optimize.minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    return (lost - won - n * drop) / math.sqrt(n * (2 * share + drop - drop * drop))


@pytest.mark.parametrize(("lost", "won", "n"), [(3, 1, 40), (12, 2, 50), (0, 4, 30), (5, 5, 100), (200, 150, 2000), (2, 0, 9)])
def test_paired_interval_inverts_the_score_test(lost: int, won: int, n: int) -> None:
    low, high = paired_interval(lost, won, n)
    assert low < (lost - won) / n < high
    assert score_statistic(lost, won, n, low) == pytest.approx(Z, rel=1e-3)
    assert score_statistic(lost, won, n, high) == pytest.approx(-Z, rel=1e-3)


def test_paired_interval_of_a_published_example() -> None:
    # 21 pairs, 1 and 7 discordant: Fagerland, Lydersen, Laake, "Statistical Analysis of Contingency Tables" (2017), chapter 8.
    assert paired_interval(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)


@pytest.mark.parametrize("n", [1, 5, 100, 10_000])
def test_paired_interval_without_flips(n: int) -> None:
    assert paired_interval(0, 0, n) == pytest.approx((-Z * Z / (n + Z * Z), Z * Z / (n + Z * Z)), abs=1e-9)


def test_paired_interval_at_the_ends() -> None:
    assert paired_interval(8, 0, 8)[1] == 1
    assert paired_interval(0, 8, 8)[0] == -1
    low, high = paired_interval(7, 3, 60)
    assert paired_interval(3, 7, 60) == pytest.approx((-high, -low), abs=1e-9)


def test_paired_interval_excludes_zero_where_mcnemars_statistic_rejects() -> None:
    for lost in range(30):
        for won in range(30):
            if lost + won:
                rejects = (lost - won) ** 2 / (lost + won) > Z * Z
                low, high = paired_interval(lost, won, 200)
                assert (low > 0 or high < 0) == rejects


@pytest.mark.parametrize(("lost", "won", "n"), [(0.03, 0.02, 100), (0.10, 0.02, 50), (0.005, 0.005, 200), (0.3, 0.1, 30)])
def test_paired_interval_covers(lost: float, won: float, n: int) -> None:
    draws = rng().multinomial(n, [lost, won, 1 - lost - won], 2000)
    counts, times = np.unique(draws[:, :2], axis=0, return_counts=True)
    intervals = [paired_interval(int(a), int(b), n) for a, b in counts]
    covered = sum(times[i] for i, (low, high) in enumerate(intervals) if low <= lost - won <= high) / 2000
    assert 0.93 < covered <= 1


@pytest.mark.parametrize(("flips", "n"), [((5, 5), 100), ((0, 0), 100), ((30, 20), 1000), ((0, 0), 10_000)])
def test_detectable_drop_has_the_power_it_promises(flips: tuple[int, int], n: int) -> None:
    drop = detectable_drop(*flips, n)
    share = max((sum(flips) + Z * Z / 2) / (n + Z * Z), drop)
    assert drop >= Z * math.sqrt(share / n)  # else it would not even be significant when it is seen
    power = normal_power_het(drop, n, 0.05, std_null=math.sqrt(share), std_alternative=math.sqrt(share - drop**2), alternative="larger")
    two_sided = normal_power_het(
        drop, n, 0.05, std_null=math.sqrt(share), std_alternative=math.sqrt(share - drop**2), alternative="two-sided"
    )
    assert two_sided == pytest.approx(0.8, abs=2e-3)
    assert power > two_sided


def test_detectable_drop_is_found_by_the_test() -> None:
    n, share = 500, 0.08
    drop = detectable_drop(20, 20, n)
    draws = rng().multinomial(n, [(share + drop) / 2, (share - drop) / 2, 1 - share], 4000)
    lost, won = draws[:, 0], draws[:, 1]
    assert ((lost - won) / np.sqrt(lost + won) > Z).mean() == pytest.approx(0.8, abs=0.04)


def test_detectable_drop_falls_with_items_and_grows_with_flips() -> None:
    assert detectable_drop(0, 0, 3) == 1
    assert detectable_drop(0, 0, 10) > detectable_drop(0, 0, 100) > detectable_drop(0, 0, 1000)
    assert detectable_drop(20, 20, 100) > detectable_drop(1, 1, 100)


def test_detectable_mean_drop() -> None:
    differences = rng().normal(0, 0.1, 400)
    power = normal_power_het(detectable_mean_drop(differences), 400, 0.05, std_null=differences.std(ddof=1), alternative="two-sided")
    assert power == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize("freedom", [1, 2, 3, 5, 10, 30, 1000])
@pytest.mark.parametrize("p", [0.9, 0.975, 0.995])
def test_student_quantile(freedom: int, p: float) -> None:
    assert student_quantile(p, freedom) == pytest.approx(scipy.stats.t.ppf(p, freedom), rel=0.02 if freedom == 3 else 3e-3)


@pytest.mark.slow
def test_bootstrap_is_scipys_where_values_are_many() -> None:
    values = rng().exponential(1.0, 3000)
    theirs = scipy.stats.bootstrap((values,), np.mean, method="percentile", n_resamples=9999, rng=rng(1)).confidence_interval
    assert bootstrap_interval(values) == pytest.approx((theirs.low, theirs.high), abs=0.003)


def test_bootstrap_of_normal_values_is_as_wide_as_students() -> None:
    values = rng().normal(0, 1, 12)
    low, high = bootstrap_interval(values)
    t_low, t_high = scipy.stats.t.interval(0.95, 11, values.mean(), scipy.stats.sem(values))
    assert high - low == pytest.approx(t_high - t_low, rel=0.08)


def test_bootstrap_resamples_values_with_their_weights() -> None:
    weights = np.array([1.0, 2.0, 3.0, 4.0] * 10)
    assert bootstrap_interval(0.25 * weights, weights) == pytest.approx((0.25, 0.25))


def test_bootstrap_is_reproducible_and_exact_for_equal_values() -> None:
    values = rng().normal(0, 1, 30)
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values) != bootstrap_interval(values, seed=1)
    assert bootstrap_interval(np.zeros(20)) == (0.0, 0.0)
    assert bootstrap_interval(np.array([3.0]), np.array([2.0])) == (1.5, 1.5)
    narrow, wide = bootstrap_interval(values), bootstrap_interval(values, confidence=0.99)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


@pytest.mark.slow
def test_block_bootstrap_covers_a_mean_over_dependent_tokens() -> None:
    """Skewed, dependent tokens as KL divergences are: 20 blocks of 32 tokens, the neighbours' logarithms correlated by 0.5."""
    generator, covered, trials = rng(), 0, 300
    truth = math.exp(0.5)
    for _ in range(trials):
        noise = generator.normal(0, math.sqrt(1 - 0.5**2), 20 * 32 + 200)
        latent = np.array(scipy.signal.lfilter([1], [1, -0.5], noise))[200:]
        low, high = bootstrap_interval(np.exp(latent).reshape(20, 32).sum(axis=1), np.full(20, 32.0))
        covered += low <= truth <= high
    assert covered / trials > 0.91  # a bootstrap of single tokens covers 80 %
