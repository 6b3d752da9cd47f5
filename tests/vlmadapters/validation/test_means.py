"""The interval of a mean: by hand, by scipy, and by how often it holds a planted truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from vlmadapters.validation.means import Mean


def names(datasets: int, seeds: int) -> np.ndarray:
    return np.repeat([f"d{i}" for i in range(datasets)], seeds)


def test_of_one_dataset_and_of_many_it_is_scipys_t_test_over_runs_or_datasets() -> None:
    values = np.random.default_rng(0).normal(1, 2, (5, 3))
    for found, units in (
        (Mean.of(values[0], names(1, 3)), values[0]),
        (Mean.of(values.ravel(), names(5, 3)), values.mean(1)),
    ):
        expected = stats.ttest_1samp(units, 0)
        assert found.value == pytest.approx(units.mean())
        assert found.p == pytest.approx(expected.pvalue)
        ends = expected.confidence_interval()
        assert (found.low, found.high) == pytest.approx((ends.low, ends.high))


def test_two_datasets_stand_for_themselves_by_hand() -> None:
    """Runs 1, 3 and 10, 14: squares 2 + 8 over 2 degrees; variance 5 · (1/2 + 1/2) / 4."""
    found = Mean.of(np.array([1.0, 3, 10, 14]), names(2, 2))
    half = stats.t.ppf(0.975, 2) * math.sqrt(5 / 4)
    assert (found.value, found.low, found.high) == pytest.approx((7, 7 - half, 7 + half))
    # a dataset with a single run takes the variance of the other
    uneven = Mean.of(np.array([1.0, 3, 12]), np.array(["a", "a", "b"]))
    half = stats.t.ppf(0.975, 1) * math.sqrt(2 * (1 / 2 + 1) / 4)
    assert (uneven.value, uneven.high) == pytest.approx((7, 7 + half))


def test_two_datasets_of_unequal_runs_each_have_their_variance() -> None:
    """As scipy's test of Welch has it, of the runs of one against the negative of the others'."""
    rng = np.random.default_rng(1)
    one, other = rng.normal(1, 2, 5), rng.normal(1, 5, 2)
    found = Mean.of(np.concatenate([one, other]), np.array(["a"] * 5 + ["b"] * 2))
    expected = stats.ttest_ind(one, -other, equal_var=False)
    assert found.p == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low / 2, interval.high / 2))
    still = Mean.of(np.array([3.0, 3, 3, 4, 4]), np.array(["a"] * 3 + ["b"] * 2))
    assert np.isnan([still.low, still.high, still.p]).all()


def test_the_interval_of_two_unequal_datasets_holds_the_truth() -> None:
    """Five runs that vary little, two that vary much; one variance for both held it 70 in 100."""
    rng, inside = np.random.default_rng(2), []
    for _ in range(1000):
        values = np.concatenate([rng.normal(0, 2, 5), rng.normal(0, 5, 2)])
        found = Mean.of(values, np.array(["a"] * 5 + ["b"] * 2))
        inside.append(found.low <= 0 <= found.high)
    assert 0.87 <= np.mean(inside) <= 0.97


@pytest.mark.parametrize(("datasets", "seeds"), [(1, 2), (1, 3), (2, 2), (2, 3), (3, 3), (5, 1)])
def test_the_interval_holds_the_truth_in_95_of_100_however_few_the_runs(
    datasets: int, seeds: int
) -> None:
    """Of one and two datasets the truth is theirs; of more it is that of where they come from."""
    rng = np.random.default_rng(datasets * 10 + seeds)
    held = 0
    for _ in range(2000):
        own = 2 + rng.normal(0, 3, (datasets, 1))
        truth = own.mean() if datasets < 3 else 2
        found = Mean.of((own + rng.normal(0, 1, (datasets, seeds))).ravel(), names(datasets, seeds))
        held += found.low <= truth <= found.high
    assert 0.94 <= held / 2000 <= 0.96


@pytest.mark.parametrize(
    ("values", "datasets"),
    [
        ([5.0], 1),
        ([5, 7], 2),
        ([-14.5] * 3, 1),
        ([2, 2, 4, 4], 2),
        ([0, 0], 1),
        ([2.0] * 3, 3),
        ([0.0] * 6, 3),
    ],
)
def test_where_runs_do_not_differ_or_are_too_few_nothing_is_decided(
    values: list[float], datasets: int
) -> None:
    found = Mean.of(np.array(values, float), names(datasets, len(values) // datasets))
    assert found.value == np.mean(values)
    assert np.isnan([found.low, found.high, found.p]).all()
    assert math.isnan(found.within(0, 100).low)


def test_bounds_are_kept() -> None:
    wide = Mean.of(np.array([99.0, 90, 100]), names(3, 1)).within(0, 100)
    assert wide.high == 100 and 0 < wide.low < wide.value
