"""Intervals: published formulas, coverage of a known truth, and strata too small to resample."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, norm, ttest_1samp

from vlmlayers.errors import UserError
from vlmlayers.metrics.intervals import (
    SMALL,
    bootstrap_weights,
    jackknife,
    jackknife_groups,
    jackknife_interval,
    mean_interval,
    mean_share_draws,
    percentile,
    percentile_about,
    small_strata,
    wilson,
)


@pytest.mark.parametrize(("hits", "n"), [(0, 8), (8, 8), (3, 10), (40, 90)])
def test_wilson_is_that_of_scipy(hits: int, n: int) -> None:
    expected = binomtest(hits, n).proportion_ci(method="wilson")
    assert wilson(hits / n, n) == pytest.approx((expected.low, expected.high))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(0, 999))
def test_weights_resample_inside_strata_and_small_ones_together(sizes: list, seed: int) -> None:
    strata = np.repeat(np.arange(len(sizes)), sizes)
    weights = bootstrap_weights(strata, 30, np.random.default_rng(seed))
    small = small_strata(np.array(sizes))
    assert weights.sum(axis=1) == pytest.approx(len(strata))
    for stratum, size in enumerate(sizes):
        if stratum not in small:
            assert size >= SMALL
            assert weights[:, strata == stratum].sum(axis=1) == pytest.approx(size)
    together = np.isin(strata, small).sum()
    assert together == 0 or together >= SMALL or together == len(strata)


@pytest.mark.parametrize("size", [1, 2, 4, 20])
def test_accuracy_over_classes_of_any_size_is_covered(size: int) -> None:
    rng = np.random.default_rng(size)
    truth = rng.uniform(0.1, 0.9, 40)  # each class has its own accuracy
    covered, repeats = 0, 150
    for _ in range(repeats):
        hits = rng.binomial(size, truth)
        low, high = percentile(mean_share_draws(hits, np.full(40, size), 200, rng))
        covered += low <= truth.mean() <= high
    assert covered / repeats >= 0.88


@pytest.mark.parametrize("size", [5, 12])
def test_resampled_means_vary_as_stratified_samples_do(size: int) -> None:
    rng = np.random.default_rng(size)
    strata = np.repeat(np.arange(8), size)
    x = rng.normal(size=len(strata)) + strata
    within = np.array([x[strata == c].var(ddof=1) for c in range(8)])
    means = bootstrap_weights(strata, 20_000, rng) @ x / len(x)
    # The textbook variance of a stratified mean; m draws of m items give (m − 1)/m of it.
    assert means.var() == pytest.approx((within / size).mean() / 8, rel=0.05)
    hits = rng.integers(1, size, 8)
    shares = hits / size
    draws = mean_share_draws(hits, np.full(8, size), 20_000, rng)
    assert draws.mean() == pytest.approx(shares.mean(), abs=0.005)
    assert draws.var() == pytest.approx((shares * (1 - shares)).mean() / (size - 1) / 8, rel=0.05)


def test_draws_that_all_lie_above_the_value_are_moved_onto_it() -> None:
    draws = np.random.default_rng(2).exponential(size=4000) + 5.0
    low, high = percentile_about(3.0, draws)
    assert (low, high) == pytest.approx(np.percentile(draws, [2.5, 97.5]) - draws.mean() + 3.0)


def test_percentiles_of_few_units_lie_as_far_out_as_those_of_student() -> None:
    """Of six units, 5 of them free: t = 2.5706, as tables have it, where a normal one has 1.96."""
    draws = norm.ppf(np.linspace(0, 1, 100_001)[1:-1])
    assert percentile(draws, 5) == pytest.approx((-2.5706, 2.5706), abs=1e-3)
    assert percentile(draws, 10**6) == pytest.approx(percentile(draws), abs=1e-3)


def test_unequal_classes_weigh_the_same() -> None:
    rng = np.random.default_rng(0)
    hits, sizes = np.array([2, 1, 30]), np.array([2, 3, 60])
    draws = mean_share_draws(hits, sizes, 4000, rng)
    assert draws.mean() == pytest.approx((hits / sizes).mean(), abs=0.02)
    assert draws.std() > 0.05


def test_shares_that_resampling_cannot_vary_get_a_width() -> None:
    weights = bootstrap_weights(np.zeros(12, int), 50, np.random.default_rng(0))
    none, all_ = np.zeros(12), np.ones(12)
    assert mean_interval(none, weights) == (0.0, 0.0)
    assert mean_interval(none, weights, share=True) == pytest.approx((0.0, 0.2425), abs=1e-3)
    assert mean_interval(all_, weights, share=True)[0] == pytest.approx(0.7575, abs=1e-3)


@pytest.mark.parametrize("size", [8, 60])
@pytest.mark.parametrize("same", [-1.0, 0.0, 1.0])
def test_differences_that_no_item_shows_get_tangos_interval(size: int, same: float) -> None:
    """Its ends are the differences that the score test of McNemar's table just does not refuse."""
    weights = bootstrap_weights(np.zeros(size, int), 50, np.random.default_rng(0))
    low, high = mean_interval(np.full(size, same), weights, difference=True)
    assert low < high and (low, high) == pytest.approx(_tango(same, size), abs=1e-6)
    values = np.r_[np.zeros(size - 2), -1.0, 1.0]
    assert mean_interval(values, weights, difference=True) == mean_interval(values, weights)


def test_a_difference_reaches_in_the_direction_that_no_item_shows() -> None:
    """Of 40 items few gain or lose: where all that changed lose, some would gain in others."""
    rng, truth, held = np.random.default_rng(3), 0.01, []
    for _ in range(400):
        values = rng.choice([1.0, -1.0, 0.0], 40, p=[0.03, 0.02, 0.95])
        weights = bootstrap_weights(np.zeros(40, int), 100, rng)
        low, high = mean_interval(values, weights, difference=True)
        held.append(low <= truth <= high)
        assert low <= values.mean() <= high
        if values.min() == 0.0 < values.max():
            least, same = low, mean_interval(-values, weights, difference=True)
            reach = mean_interval(np.zeros(40), weights, difference=True)[1]
            assert least <= values.mean() - reach and -least == same[1]
    assert np.mean(held) > 0.93  # 0.80 where one end was at 0 then


def _tango(same: float, n: int) -> tuple[float, float]:
    """Return where Tango's score statistic passes 1.96, with its variance maximised on a grid."""
    lost, won = (n if same == 1.0 else 0), (n if same == -1.0 else 0)

    def refused(delta: float) -> bool:
        # p(won) = q and p(lost) = q + delta; the likelihood of the table is largest at one q.
        q = np.linspace(max(0.0, -delta), (1.0 - delta) / 2, 20_001)
        with np.errstate(divide="ignore", invalid="ignore"):
            stay = n - lost - won
            parts = ((lost, q + delta), (won, q), (stay, 1.0 - 2.0 * q - delta))
            fits = sum(count * np.log(np.maximum(p, 0.0)) for count, p in parts if count)
        at = q[int(np.argmax(fits))]
        variance = n * (2.0 * at + delta * (1.0 - delta))
        return (lost - won - n * delta) ** 2 > 1.959963984540054**2 * max(variance, 0.0)

    return _edge(refused, same, -1.0), _edge(refused, same, 1.0)


def _edge(refused: Callable[[float], bool], inside: float, outside: float) -> float:
    for _ in range(60):
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if refused(middle) else (middle, outside)
    return inside


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=200)
    groups = jackknife_groups(np.zeros(200, int), 200, rng)
    low, high = jackknife(lambda rows: float(x[rows].mean()), float(x.mean()), groups)
    assert (high - low) / 2 == pytest.approx(1.972 * x.std(ddof=1) / np.sqrt(200), rel=1e-3)


def test_the_jackknife_of_five_items_is_students_interval() -> None:
    x = np.array([0.3, 1.9, -0.4, 2.2, 0.8])
    groups = jackknife_groups(np.zeros(5, int), 10, np.random.default_rng(0))
    found = jackknife(lambda rows: float(x[rows].mean()), float(x.mean()), groups)
    assert found == pytest.approx(ttest_1samp(x, 0).confidence_interval(0.95))
    # What all groups miss alike is a bias of fewer items, and no spread.
    assert jackknife_interval(0.9, np.ones(10)) == (0.9, 0.9)


def test_draws_without_a_value_are_refused_where_they_are_most() -> None:
    with pytest.raises(UserError, match="too few items for a bootstrap interval"):
        percentile(np.array([np.nan, np.nan, 1.0]))
