"""Intervals by resampling: draw weights once, then every statistic is a matrix product."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import t as student_t

from vlmlayers.errors import UserError
from vlmlayers.metrics.checks import Array, Labels

LEVEL = 0.95


def bootstrap_weights(strata: Labels, draws: int, rng: np.random.Generator) -> Array:
    """Return how often each draw takes each item, (draw, item), resampling inside each stratum.

    Reference: Efron and Tibshirani 1993, section 8.
    """
    weights = np.zeros((draws, len(strata)))
    for stratum in np.unique(strata):
        rows = np.flatnonzero(strata == stratum)
        weights[:, rows] = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), draws)
    return weights


def percentile(draws: Array) -> tuple[float, float]:
    """Return the 95 % percentile interval of bootstrap draws.

    Draws without a value (NaN: one item drawn n times has no pairs) are left out.

    Raises:
        UserError: More than half of the draws have no value.
    """
    known = draws[~np.isnan(draws)]
    if 2 * len(known) <= len(draws):
        raise UserError("too few items for a bootstrap interval: most draws have no pair")
    tail = 50.0 * (1.0 - LEVEL)
    low, high = np.percentile(known, [tail, 100.0 - tail])
    return float(low), float(high)


def mean_interval(values: Array, weights: Array) -> tuple[float, float]:
    """Return the interval of a mean over items from per-item values and bootstrap weights."""
    return percentile(weights @ values / weights.sum(axis=1))


def jackknife_groups(strata: Labels, groups: int, rng: np.random.Generator) -> list[Labels]:
    """Return the rows that stay when each of the random groups is left out, ascending.

    Used where drawing an item twice would itself change the statistic (ranks, neighbours,
    unbiased estimators). Each stratum is dealt evenly over the groups.
    """
    order = np.concatenate(
        [rng.permutation(np.flatnonzero(strata == stratum)) for stratum in np.unique(strata)]
    )
    groups = min(groups, len(order))
    member = np.empty(len(order), dtype=np.int64)
    member[order] = np.arange(len(order)) % groups
    return [np.flatnonzero(member != group) for group in range(groups)]


def jackknife_interval(value: float | Array, left_out: Array) -> tuple[Array, Array]:
    """Return value ± t × standard error of the delete-a-group jackknife, t at groups − 1.

    Args:
        value: The statistic on all items, any shape.
        left_out: The statistic without each group, (group, …).

    Reference: Kott 2001, The delete-a-group jackknife.
    """
    groups = len(left_out)
    spread = np.square(left_out - left_out.mean(axis=0)).sum(axis=0)
    error = student_t.ppf(0.5 + LEVEL / 2, max(groups - 1, 1)) * np.sqrt(
        spread * (groups - 1) / groups
    )
    return np.asarray(value - error), np.asarray(value + error)


def jackknife(
    statistic: Callable[[Labels], float], value: float, groups: Sequence[Labels]
) -> tuple[float, float]:
    """Return the jackknife interval of a statistic of row numbers."""
    low, high = jackknife_interval(value, np.array([statistic(rows) for rows in groups]))
    return float(low), float(high)
