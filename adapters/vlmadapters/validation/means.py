"""The mean of trained accuracies, or of their paired differences, and how far it can be trusted."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from vlmlayers.metrics.checks import Array
from vlmlayers.metrics.intervals import LEVEL, jackknife_interval
from vlmlayers.placement import SAMPLE

DIGITS = 9  # of percentages: the same ones in another order differ later, and a tie has to be one


@dataclass(frozen=True)
class Mean:
    """Mean over datasets of the mean over seeds, with a t-interval.

    From three datasets on, the units are datasets, as two seeds of one are not two datasets, and
    the interval speaks of others like them. Of one or two it speaks of these alone, as they were
    tested: the units are runs, with one variance for both; with one of each, by Welch's formula,
    where one dataset has more runs than the other and neither a single one. Percentiles of
    resamples are no choice for so few: of two units they leave out a true 0 every second time, of
    three every fourth.

    Reference: Hesterberg, What teachers should know about the bootstrap, 2015 (narrowness bias);
    Welch, The generalization of Student's problem, 1947.

    Attributes:
        value: The mean.
        low, high: 95 % interval; NaN where nothing is known of the spread: of one run, of one seed
            of each of two datasets, and where all datasets, or all runs of one or two, are equal.
        p: Two-sided, of the t-test against 0; NaN without an interval.
    """

    value: float
    low: float
    high: float
    p: float

    @classmethod
    def of(cls, values: Array, datasets: NDArray[Any], *, stretch: float = 1.0) -> Mean:
        """Return the mean of one value per cell.

        Args:
            values: (cell,) percent, or points.
            datasets: (cell,) dataset of each cell.
            stretch: How many times as large as of independent cells the error is.
        """
        values = values.round(DIGITS)
        own = [values[datasets == name] for name in np.unique(datasets)]
        means = np.array([one.mean() for one in own])
        value = float(means.mean().round(DIGITS))
        runs = {len(one) for one in own}
        freedom: float
        if len(own) >= SAMPLE:
            freedom = len(own) - 1
            error = math.sqrt(means.var(ddof=1) / len(own))
        elif len(runs) > 1 and min(runs) > 1:
            # One variance would be mostly that of the longer: of five runs of sd 2 and two of sd 5
            # 95 % intervals held the truth 70 times in 100, these 90.
            squares = np.array([one.var(ddof=1) / len(one) for one in own])
            shares = squares / max(squares.sum(), 10.0**-DIGITS)
            freedom = 1 / max(sum(shares**2 / [len(one) - 1 for one in own]), 10.0**-DIGITS)
            error = math.sqrt(squares.sum()) / len(own)
        else:
            freedom = len(values) - len(own)
            within = sum(float(np.square(one - one.mean()).sum()) for one in own) / max(freedom, 1)
            error = math.sqrt(within * sum(1 / len(one) for one in own)) / len(own)
        error *= stretch
        # What ends alike everywhere was not moved by seeds or data: that is no sign of certainty.
        if error < 10**-DIGITS:
            return cls(value, math.nan, math.nan, math.nan)
        half = float(stats.t.ppf(0.5 + LEVEL / 2, freedom)) * error
        p = 2 * float(stats.t.sf(abs(value) / error, freedom))
        return cls(value, value - half, value + half, p)

    def within(self, least: float, most: float) -> Mean:
        """Return the same with an interval that stays inside the bounds of what is averaged."""
        # NaN stays NaN: `max` and `min` of Python would depend on the order of their arguments.
        low, high = np.clip([self.low, self.high], least, most).tolist()
        return replace(self, low=low, high=high)


def leave_one_out(datasets: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which cells stay when each unit is left out, (unit, cell).

    Units are datasets from three on, else the runs of these alone, as for a `Mean`.

    Args:
        datasets: (cell,) dataset of each cell.
    """
    names = np.unique(datasets)
    units = datasets if len(names) >= SAMPLE else np.arange(len(datasets))
    return np.asarray(np.unique(units)[:, None] != units)


def mean_correlation(correlations: Array, datasets: NDArray[Any], *, stretch: float = 1.0) -> Mean:
    """Return the mean of one rank correlation per cell; no interval of fewer than three cells.

    Args:
        correlations: (cell,) rank correlations.
        datasets: (cell,) dataset of each cell.
        stretch: As for `Mean.of`.
    """
    found = Mean.of(correlations, datasets, stretch=stretch)
    if len(correlations) < SAMPLE:
        return replace(found, low=math.nan, high=math.nan)
    return found.within(-1.0, 1.0)


def correlation_interval(value: float, left_out: Array) -> tuple[float, float]:
    """Return the jackknife interval of a rank correlation, or NaN (`no_interval`).

    Ranks are coarse: of a few units of pure noise every second table has the same correlation
    whichever is left out. The jackknife of those has no width, and knows nothing of the spread.

    Args:
        value: Of all cells.
        left_out: Without each unit (`leave_one_out`), (unit,).
    """
    # A NaN among them is a unit without which there is no correlation.
    if len(left_out) < SAMPLE or not np.ptp(left_out) > 10**-DIGITS:
        return math.nan, math.nan
    low, high = np.clip(jackknife_interval(value, left_out), -1.0, 1.0).tolist()
    return low, high


def no_interval(cells: int) -> str:
    """Return in words why a rank correlation over so many cells has no interval."""
    if cells < SAMPLE:
        return "there are fewer than three runs"
    return "leaving out one dataset or run shows no spread"
