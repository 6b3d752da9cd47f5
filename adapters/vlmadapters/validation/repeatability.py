"""How far the ranking of placements repeats, and how much of the differences placement explains.

No rule and no score can predict a ranking better than the ranking repeats, so this is measured
before any ranking is shown. The unit is the cell: one dataset and seed, in which every placement is
trained on the same draw.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from vlmadapters.validation.means import (
    DIGITS,
    correlation_interval,
    leave_one_out,
    mean_correlation,
    no_interval,
)
from vlmadapters.validation.verdict import SIGNIFICANCE, Array, bracketed, outcomes

HALVES = ("hm_first_half", "hm_second_half")
POINT, POWER = 1.0, 0.8  # difference to be detected, in points, and with what power
MOST_CELLS = 100_000
ROUNDING = 10.0**-DIGITS  # what is no further apart is a tie


@dataclass(frozen=True)
class Repeats:
    """Mean Kendall's τ-b of two rankings of the same placements; the null is 0.

    Attributes:
        tau: The mean over pairs of rankings, datasets weighing the same.
        low, high: 95 % interval over datasets, of one or two over runs; None of fewer than three
            cells, where no pair is left without one, and where τ is the same without any one.
        p: One-sided, by reversing rankings at random (`Cells.reversals`): of datasets between
            datasets, else of cells. Of fewer than six it is never below 0.05, between halves of
            fewer than five.
        n: Pairs of rankings.
    """

    tau: float
    low: float | None
    high: float | None
    p: float
    n: int


@dataclass(frozen=True)
class Variance:
    """What the differences between placements within a cell come from.

    Attributes:
        placement: Share that placement explains, the same in every cell; the null is 0.
        low, high: Its 95 % interval; both 0 where means are closer than by chance.
        placement_by_dataset: Share of what a placement gains on one dataset more than on others;
            None of one dataset and of one seed of each, where it cannot be told from the rest.
        rest: Share of everything else: draws, initialisation, order, test items.
        sd_of_difference: Standard deviation of the difference of two placements over cells of
            datasets of their own, points.
        freedom: Its degrees of freedom.
        n: Cells.
    """

    placement: float
    low: float
    high: float
    placement_by_dataset: float | None
    rest: float
    sd_of_difference: float
    freedom: float
    n: int


@dataclass(frozen=True)
class CellsNeeded:
    """How many independent cells detect a difference of one point between two placements.

    Attributes:
        cells: With a paired t-test at a level of 5 % and a power of 80 %.
        low, high: The same at both ends of the interval of the standard deviation.
        n: Cells that it was estimated from.
    """

    cells: int
    low: int
    high: int
    n: int


def signs(values: Array) -> Array:
    """Return rankings as unit vectors over pairs of placements: their products are τ-b.

    Args:
        values: (…, placement) outcomes, or predictions of them.

    Returns:
        (…, pair): the sign of each difference, over the root of the number of pairs that differ.
    """
    first, second = np.triu_indices(values.shape[-1], 1)
    found = np.sign(values[..., first] - values[..., second])
    length = np.sqrt(np.square(found).sum(-1, keepdims=True))
    return np.divide(found, length, out=np.zeros_like(found), where=length > 0)


def repeatability(table: pd.DataFrame, *, draws: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Return how far a ranking by harmonic mean repeats, as JSON values; absent is None.

    Args:
        table: Validation table of one comparison.
        draws: Draws of chance.
        seed: Seed of the private generator.

    Returns:
        `between_seeds`, `between_halves` (of the test items) and `between_datasets` (`Repeats`),
        `variance` (`Variance`), `cells_for_one_point` (`CellsNeeded`), `cells`, `datasets`,
        `placements`, and a `statement`.
    """
    found = outcomes(table, "hm")
    values, datasets = found.values, found.datasets
    cells = Cells(datasets, draws, seed)
    measured: dict[str, Any] = {
        "cells": len(values),
        "datasets": len(set(datasets.tolist())),
        "placements": values.shape[1],
        "between_seeds": cells.repeats(values, cells.seeds),
        "between_halves": _halves(table, cells, list(found.placements)),
        "between_datasets": cells.repeats(values, cells.others),
        "variance": variance_within_cells(values, datasets),
    }
    measured["cells_for_one_point"] = _needed(measured["variance"])
    measured["statement"] = _statement(measured)
    return {key: asdict(one) if hasattr(one, "__dataclass_fields__") else one
            for key, one in measured.items()}  # fmt: skip


class Cells:
    """Which dataset each cell is of, and which pairs of cells there are.

    Args:
        datasets: (cell,) dataset of each cell.
        draws: Draws of chance.
        seed: Seed of the private generator.
    """

    def __init__(self, datasets: NDArray[Any], draws: int, seed: int) -> None:
        names, self.of = np.unique(datasets, return_inverse=True)
        self.count, self.size = len(names), np.bincount(self.of)[self.of]
        self.draws, self.seed = draws, seed

    @property
    def seeds(self) -> Array:
        """Pairs of cells of one dataset, (cell, cell), each dataset's pairs weighing 1."""
        size = self.size
        pairs = (self.of[:, None] == self.of) & ~np.eye(len(self.of), dtype=bool)
        return pairs / np.maximum(size * (size - 1), 1)

    @property
    def others(self) -> Array:
        """Pairs of cells of two datasets, (cell, cell)."""
        # Every pair of datasets weighs the same, however many seeds they have.
        return (self.of[:, None] != self.of) / (self.size[:, None] * self.size)

    def mean(self, values: Array) -> Array:
        """Return the mean of values of cells, (…, cell), datasets weighing the same."""
        weights = 1 / self.size
        return values @ weights / weights.sum()

    def reversals(self, whole: bool) -> Array:
        """Return draws of which rankings stay, 1, and which are reversed, −1, (draw, cell).

        Where rankings do not repeat, either is as likely. Placements that share blocks go together
        in both, which a permutation of placements would not keep.

        Args:
            whole: Whether the cells of a dataset are reversed together.
        """
        units = self.of if whole else np.arange(len(self.of))
        generator = np.random.default_rng(self.seed)
        return generator.choice((-1.0, 1.0), (self.draws, units.max() + 1))[:, units]

    def repeats(self, values: Array, pairs: Array) -> Repeats | None:
        """Return how far rankings of pairs of cells agree; None where there is no pair.

        Args:
            values: (cell, placement).
            pairs: (cell, cell), how much each pair weighs.
        """
        ranked = signs(values)
        if not (pairs.any() and ranked.any()):  # of one placement, or all equal, there is no rank
            return None

        def total(weights: Array, of: Array) -> Array:
            return np.asarray(np.einsum("di,ij,dj->d", weights, of, weights))

        agreement = pairs * (ranked @ ranked.T)
        tau = float(agreement.sum() / pairs.sum())
        # Seeds of a dataset may well go together where datasets do not.
        turned = self.reversals(whole=not np.any(pairs * self.seeds))
        null = total(turned, agreement) / pairs.sum()
        kept = leave_one_out(self.of).astype(np.float64)
        weight = total(kept, pairs)
        left_out = np.divide(
            total(kept, agreement), weight, out=np.full_like(weight, np.nan), where=weight > 0
        )
        interval = correlation_interval(tau, left_out)
        return _repeats(tau, interval, null, int((pairs > 0).sum()) // 2)


def _repeats(tau: float, interval: tuple[float, float], null: Array, n: int) -> Repeats:
    low, high = (None if math.isnan(end) else end for end in interval)
    # One-sided: rankings that agree less than by chance do not repeat either.
    p = (1 + np.sum(null >= tau - ROUNDING)) / (len(null) + 1)
    return Repeats(tau, low, high, float(p), n)


def _halves(table: pd.DataFrame, cells: Cells, placements: list[str]) -> Repeats | None:
    """Return how far rankings on two halves of the test items agree; None of a single cell."""
    if not set(HALVES) <= set(table.columns) or table[list(HALVES)].isna().any(axis=None):
        return None
    first, second = (_aligned(table, half, placements) for half in HALVES)
    ranked = signs(first)
    if len(first) != len(cells.of) or len(first) < 2 or not (ranked.any() and signs(second).any()):
        return None

    taus = (ranked * signs(second)).sum(-1)
    tau = mean_correlation(taus, cells.of)
    null = cells.mean(taus * cells.reversals(whole=False))
    return _repeats(tau.value, (tau.low, tau.high), null, len(first))


def _aligned(table: pd.DataFrame, column: str, placements: list[str]) -> Array:
    wide = table.pivot(index=["dataset", "seed"], columns="placement", values=column)
    return wide[placements].dropna().to_numpy(np.float64).round(DIGITS)


def variance_within_cells(values: Array, datasets: Iterable[str]) -> Variance | None:
    """Return the variance components of placements within cells.

    None of one cell or placement, and where placements are equally far apart in every cell: the
    accuracies of few test images, or runs that are copies, show nothing of how far others vary.

    Every cell's mean is taken out. What is left is analysed as placement + placement × dataset +
    rest, all random, by mean squares, of unweighted means where datasets have unequal seeds; the
    interval of the placement's share follows from the F distribution of the ratio of mean squares,
    the other components taken as estimated. Placements that share blocks go together, which leaves
    fewer degrees of freedom (`_freedom_left`).

    Reference: McGraw and Wong, Forming inferences about some intraclass correlation coefficients,
    1996; Searle, Casella and McCulloch, Variance Components, 1992.

    Args:
        values: (cell, placement) harmonic means in percent.
        datasets: (cell,) dataset of each cell.
    """
    cells, placements = values.shape
    if cells < 2 or placements < 2:
        return None
    names, of = np.unique(np.asarray(list(datasets)), return_inverse=True)
    size = np.bincount(of)
    # How hard a draw is shifts all placements of a cell alike: it is no part of the question.
    centred = values - values.mean(1, keepdims=True)
    by_dataset = np.stack([centred[of == d].mean(0) for d in range(len(names))])
    # Datasets weigh the same: else what one with many seeds shows alone passes for what all do.
    own = by_dataset.mean(0)
    free = placements - 1
    per_dataset = len(names) / (1 / size).sum()  # seeds, their harmonic mean
    units = len(names) * per_dataset  # the cells, where all datasets have as many
    between = units * np.square(own).sum() / free
    effects = by_dataset - own
    interaction = per_dataset * np.square(effects).sum()
    rest = np.square(centred - by_dataset[of]).sum()
    apart = centred - centred.mean(0)
    residual = np.square(apart).sum() / (free * (cells - 1))
    if residual < ROUNDING:
        return None
    # With one seed per dataset the interaction cannot be told from the rest.
    nested = len(names) > 1 and cells > len(names)
    freedom, against, error, mixed = free * (cells - 1), residual, residual, 0.0
    left_free = _freedom_left(apart, cells - 1)
    known = freedom * left_free
    # An interaction of exactly 0 is one of values in few steps: the rest stands for it.
    if nested and interaction > ROUNDING:
        freedom = free * (len(names) - 1)
        rest_freedom = free * (cells - len(names))
        error = rest / rest_freedom
        left_free = _freedom_left(effects, len(names) - 1)
        against = interaction / freedom
        mixed = max(0.0, float((against - error) / per_dataset))
    left = mixed + error
    # Of a cell elsewhere, in a dataset of its own. The pooled residual weighs the interaction by
    # the few datasets there are; where none shows it is the better estimate.
    varies = residual
    if mixed > 0:
        within = rest_freedom * _freedom_left(centred - by_dataset[of], cells - len(names))
        parts = (
            (against / per_dataset, freedom * left_free),
            (error * (1 - 1 / per_dataset), within),
        )
        # Satterthwaite's degrees of freedom of a sum of mean squares.
        varies, known = left, left**2 / sum(part**2 / of for part, of in parts)

    def share(ratio: float) -> float:
        own_variance = max(0.0, ratio - 1) * against / units
        return float(own_variance / (own_variance + left))

    ratio = between / against
    free_of, freedom_of = free * left_free, freedom * left_free
    low, high = (share(ratio / float(stats.f.ppf(q, free_of, freedom_of))) for q in (0.975, 0.025))
    placed = share(ratio)
    total = left / (1 - placed)
    return Variance(
        placed,
        low,
        high,
        float(mixed / total) if nested else None,
        float(error / total),
        float(np.sqrt(2 * varies)),
        known,
        cells,
    )


def _freedom_left(apart: Array, units: int) -> float:
    """Return the share of the degrees of freedom that placements which go together leave, ≤ 1.

    The mean of two estimates, one too low of few units, the other too high. Without it 11 to 22 of
    100 simulated sweeps over 17 placements without an effect showed one, where 2.5 should; with it
    2 to 4 from four units on, and 4 to 6 of three.

    Args:
        apart: (row, placement) residuals, without the means of rows and columns.
        units: Degrees of freedom of a column.

    Reference: Greenhouse and Geisser, On methods in the analysis of profile data, 1959; Huynh and
    Feldt, Estimation of the Box correction for degrees of freedom, 1976; of the mean: Stevens,
    Applied Multivariate Statistics for the Social Sciences, 1992.
    """
    free, products = apart.shape[1] - 1, apart @ apart.T
    if not products.any():
        return 1.0
    ways = float(np.trace(products) ** 2 / np.square(products).sum())  # in which rows differ
    if units == 1:  # of one row nothing tells how many there are
        return 1 / free
    even = units - ways < ROUNDING
    more = free if even else min(free, ((units + 1) * ways - 2) / (units - ways))
    return (ways + more) / 2 / free


def cells_needed(sd: float) -> int:
    """Return how many pairs a two-sided paired t-test needs to detect a difference of `POINT`.

    It detects one with probability `POWER`, and where there is none with `SIGNIFICANCE`.

    Args:
        sd: Standard deviation of the paired differences, above 0.
    """

    def shown(n: int) -> bool:
        # The other tail is left out: with a power of 80 % it adds next to nothing.
        limit = stats.t.ppf(1 - SIGNIFICANCE / 2, n - 1)
        found = stats.nct.sf(limit, n - 1, math.sqrt(n) * POINT / sd)
        return bool(found >= POWER)

    # The normal approximation is slightly too low: counting up from it takes few steps.
    quantiles = stats.norm.ppf(1 - SIGNIFICANCE / 2) + stats.norm.ppf(POWER)
    rough = quantiles**2 * (sd / POINT) ** 2
    n = max(2, math.floor(rough))
    if n > MOST_CELLS:  # where t and normal are one
        return math.ceil(rough)
    while not shown(n):
        n += 1
    return n


def _needed(found: Variance | None) -> CellsNeeded | None:
    if found is None:
        return None
    sds = [
        found.sd_of_difference * math.sqrt(found.freedom / float(stats.chi2.ppf(q, found.freedom)))
        # The upper quantile gives the lower end.
        for q in (0.975, 0.025)
    ]
    low, high = (cells_needed(sd) for sd in sds)
    return CellsNeeded(cells_needed(found.sd_of_difference), low, high, found.n)


def _statement(measured: dict[str, Any]) -> str:
    """Return in words how far the ranking repeats; numbers with interval and n."""
    pairs = {
        "between_seeds": "between seeds",
        "between_halves": "between halves of the test items",
        "between_datasets": "between datasets",
    }
    known: list[tuple[str, Repeats]] = [
        (words, measured[key]) for key, words in pairs.items() if measured[key] is not None
    ]
    variance: Variance | None = measured["variance"]
    unknown = "How far the ranking repeats cannot be told"
    if measured["placements"] < 2:
        return "There is no ranking of one placement: train at others as well."
    if measured["cells"] < 2:
        return f"{unknown} from one cell: train more seeds."
    if variance is None:
        return (
            f"{unknown}: placements are equally far apart in all {measured['cells']} cells, as few "
            "test images or runs that are copies make them. Test on more images."
        )
    taus = ", ".join(
        f"{one.tau:z.2f}{bracketed(one.low, one.high, 2)} {words} (n = {one.n})"
        for words, one in known
    )
    if any(one.low is None for _, one in known):
        taus += f" (where no interval stands, {no_interval(measured['cells'])})"
    needed: CellsNeeded = measured["cells_for_one_point"]
    # First what decides it: intervals of τ may all be above 0 where that of the share is not.
    share, low, high = (100 * one for one in (variance.placement, variance.low, variance.high))
    explains = (
        f"placement explains {share:.0f} %{bracketed(low, high, 0)} of the variance within a cell "
        f"(n = {variance.n})"
    )
    repeats_or_not = (
        f"The ranking repeats in part: {explains}"
        if variance.low > 0
        else "That the ranking repeats is not shown, so no placement is shown to be best: "
        f"{explains}" + (", which may be none" if high > 0 else "")
    )
    return (
        f"{repeats_or_not}. Kendall's τ is {taus}; chance is 0. To see 1 point takes "
        f"{needed.cells} independent cells{bracketed(needed.low, needed.high, 0)}; here are "
        f"{measured['cells']}.{_untold(measured)}"
    )


def _untold(measured: dict[str, Any]) -> str:
    """Return in words that datasets cannot be told apart from chance, where they cannot."""
    if measured["variance"].placement_by_dataset is not None:
        return ""
    if measured["datasets"] == 1:
        return " What placements gain on other datasets cannot be told from one: train on more."
    return (
        " What placements gain on single datasets cannot be told from chance: each has one seed, "
        "train more."
    )
