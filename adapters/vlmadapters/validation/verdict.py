"""What training says about a choice: differences, regret, and one sentence.

Everything here reads the validation table (one row per dataset, seed and placement). Resamples are
of datasets, then of seeds within them: two seeds of one dataset are not two datasets.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from vlmadapters.protocols.results import harmonic_means
from vlmadapters.validation.means import DIGITS, Mean, leave_one_out
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.metrics.checks import Array
from vlmlayers.placement import SAMPLE, ZERO_SHOT

VALIDATION_COLUMNS = (
    "model", "weights", "dataset", "shots", "seed",
    "placement", "kind", "comparison", "amount", "vision", "text", "parameters",
    "base", "novel", "hm", "zero_shot_base", "zero_shot_novel", "n_base", "n_novel",
    "hm_first_half", "hm_second_half", "changed", "seconds", "warning",
)  # fmt: skip
SIGNIFICANCE = 0.05  # of tests
OUTCOMES = ("hm", "base", "novel")


@dataclass(frozen=True, eq=False)
class Outcomes:
    """Trained accuracy of every placement in every cell, complete and aligned.

    Attributes:
        values: (cell, placement), percent.
        datasets: (cell,) dataset of each cell.
        placements: (placement,) labels.
    """

    values: Array
    datasets: np.ndarray
    placements: tuple[str, ...]

    @property
    def means(self) -> Array:
        """Mean over datasets of the mean over seeds, (placement,)."""
        return self._mean_of([np.flatnonzero(self.datasets == name) for name in self._names])

    @property
    def _names(self) -> list[str]:
        return sorted(set(self.datasets.tolist()))

    def mean_difference(self, column: int, anchor: int) -> Mean:
        """Return how far one placement is above another in the same cells, in points."""
        return Mean.of(self.values[:, column] - self.values[:, anchor], self.datasets)

    def resampled_means(self, draws: int, seed: int) -> Array:
        """Return the means under resampled datasets and seeds, (draw, placement).

        With one dataset only the seeds are resampled; the interval then says nothing about other
        datasets.
        """
        drawn = self.resampled_cells(draws, seed)
        return np.array([self._mean_of(rows) for rows in drawn])

    def means_left_out(self) -> Array:
        """Return the means without each unit (`leave_one_out`), (unit, placement)."""
        found = [
            self._mean_of([np.flatnonzero(kept & (self.datasets == name)) for name in names])
            for kept in leave_one_out(self.datasets)
            if (names := np.unique(self.datasets[kept])).size
        ]
        return np.reshape(found, (-1, len(self.placements)))

    def resampled_cells(self, draws: int, seed: int) -> Iterator[list[NDArray[np.int64]]]:
        """Yield draws of datasets with replacement and of cells within each, one array each."""
        generator = np.random.default_rng(seed)
        cells = [np.flatnonzero(self.datasets == name) for name in self._names]
        for _ in range(draws):
            picked = generator.integers(len(cells), size=len(cells))
            yield [generator.choice(cells[i], size=len(cells[i])) for i in picked]

    def _mean_of(self, rows: list[NDArray[np.int64]]) -> Array:
        return np.mean([self.values[r].mean(0) for r in rows], axis=0).round(DIGITS)

    def leads_left_out(self, anchor: int, draws: int, seed: int) -> Array:
        """Return how far the best of resampled cells leads a placement, in the cells left out.

        Returns:
            (draw, cell): points; NaN in the cells that the draw holds, which may be all.
        """
        leads = self.values - self.values[:, [anchor]]
        found = np.full((draws, len(leads)), np.nan)
        for left, rows in zip(found, self.resampled_cells(draws, seed)):
            left[:] = leads[:, np.argmax(self._mean_of(rows))]
            left[np.concatenate(rows)] = np.nan
        return found

    def column(self, placement: str) -> int:
        """Return the column of a placement."""
        check_one_of("placement", placement, self.placements, where="the validation table")
        return self.placements.index(placement)


def outcomes(table: pd.DataFrame, outcome: str = "hm") -> Outcomes:
    """Return the aligned outcomes of a validation table.

    Args:
        table: Columns of `VALIDATION_COLUMNS`.
        outcome: `hm`, `base` or `novel`.

    Raises:
        UserError: The table is empty, or no (dataset, seed) holds every placement.
    """
    check_one_of("outcome", outcome, OUTCOMES)
    if (twice := table.duplicated(["dataset", "seed", "placement"])).any():
        first = table[twice].iloc[0]
        raise UserError(
            f"the validation table has {first['placement']} twice on {first['dataset']}, seed "
            f"{first['seed']}; keep the rows of one comparison, as tuned or given, or of one run"
        )
    wide = table.pivot(index=["dataset", "seed"], columns="placement", values=outcome)
    # A pivot sorts its columns; the table has the competitors in their order.
    wide = wide.reindex(columns=list(dict.fromkeys(table["placement"])))
    # Placements are compared in pairs: a cell that lacks one would favour the others.
    complete = wide.dropna()
    if complete.empty:
        raise UserError(
            "no dataset and seed of the validation table holds every placement; finish the sweep "
            "(start `vlmlayers validate` again, it resumes)"
        )
    return Outcomes(
        complete.to_numpy(np.float64).round(DIGITS),
        complete.index.get_level_values("dataset").to_numpy(dtype=str),
        tuple(map(str, complete.columns)),
    )


def _by_placement(table: pd.DataFrame) -> dict[str, dict[Hashable, Any]]:
    """Return the rows of a table with one row per placement, by label."""
    return {str(row["placement"]): row for row in table.to_dict("records")}


def interval(draws: Array) -> tuple[float, float]:
    """Return the 95 % interval of bootstrap draws; NaN where they are."""
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def bracketed(low: float | None, high: float | None, digits: int = 1) -> str:
    """Return an interval in words after a blank; nothing where there is none, or without width."""
    if low is None or high is None or not low < high:
        return ""
    return f" [{low:z.{digits}f}, {high:z.{digits}f}]"


def runs(compared: pd.DataFrame) -> str:
    """Return in words how many trainings are behind a table of `compare`, and what they speak of.

    Args:
        compared: Its columns `n`, `datasets` and `difference_low`.
    """
    n, datasets = int(compared["n"].iloc[0]), int(compared["datasets"].iloc[0])
    if n == 1:
        return "one run, which has no interval"
    known = compared["difference_low"].notna().any()
    none = "" if known else ", which give no interval"
    if datasets >= SAMPLE:
        return f"{n} runs of {datasets} datasets{none}"
    of = "one dataset" if datasets == 1 else "two datasets"
    return f"{n} runs of {of}{none or ', which speak of their test images alone'}"


def with_zero_shot(table: pd.DataFrame) -> pd.DataFrame:
    """Add CLIP without an adapter as one more placement, of no block, to be compared in pairs."""
    if "zero_shot_base" not in table.columns:
        return table
    plain = table.drop_duplicates(["dataset", "seed"])
    base, novel = plain["zero_shot_base"], plain["zero_shot_novel"]
    plain = plain.assign(placement=ZERO_SHOT, kind=ZERO_SHOT, parameters=0)
    plain = plain.assign(base=base, novel=novel, hm=harmonic_means(base, novel))
    return pd.concat([table, plain])


def compare(table: pd.DataFrame, chosen: str) -> pd.DataFrame:
    """Return every placement's outcomes and its paired difference to the chosen one.

    Args:
        table: Validation table.
        chosen: Label of the chosen placement.

    Returns:
        One row per placement and one for zero-shot CLIP, best harmonic mean first: placement,
        kind, parameters; base, novel and hm with `_low`, `_high`; `difference` (hm minus the
        chosen one's, in the same dataset and seed), `base_difference` and `novel_difference`, each
        with `_low`, `_high`; n (datasets × seeds); datasets. Intervals are those of `means.Mean`,
        NaN where it has none.
    """
    table = with_zero_shot(table)
    first = _by_placement(table.drop_duplicates("placement"))
    rows: dict[str, dict[str, object]] = {}
    for outcome in ("base", "novel", "hm"):
        found = outcomes(table, outcome)
        anchor = found.column(chosen)
        for i, label in enumerate(found.placements):
            row = rows.setdefault(
                label,
                {
                    "placement": label,
                    "kind": first[label]["kind"],
                    "parameters": int(first[label]["parameters"]),
                },
            )
            own = Mean.of(found.values[:, i], found.datasets).within(0.0, 100.0)
            # Pairs of the same cells: how hard a dataset and a draw are cancels out.
            apart = found.mean_difference(i, anchor)
            name = "difference" if outcome == "hm" else f"{outcome}_difference"
            row |= {outcome: own.value, f"{outcome}_low": own.low, f"{outcome}_high": own.high}
            row |= {name: apart.value, f"{name}_low": apart.low, f"{name}_high": apart.high}
            row |= {"n": len(found.values), "datasets": len(set(found.datasets))}
    return pd.DataFrame(rows.values()).sort_values("hm", ascending=False, ignore_index=True)


@dataclass(frozen=True)
class Regret:
    """How far the choice's harmonic mean is below the best placement's, in points.

    Attributes:
        value: Best mean minus the chosen one's mean. The best is picked with hindsight, so this
            flatters the best placement (the winner's curse).
        low, high: Interval of that difference for the placement that is best overall; None where
            `means.Mean` has none.
        best: Label of the best placement.
        honest: The same with the best picked on resampled cells and compared in the cells that the
            resample left out (Efron and Tibshirani's leave-one-out bootstrap): of each cell the
            mean over the resamples without it, then over seeds, then over datasets, as in `value`.
            None of a single cell.
        honest_low, honest_high: 95 % of the resamples, each cell weighing as much.

    Reference: Efron and Tibshirani, Improvements on cross-validation, 1997.
    """

    value: float
    low: float | None
    high: float | None
    best: str
    honest: float | None = None
    honest_low: float | None = None
    honest_high: float | None = None

    @property
    def words(self) -> str:
        """How far the best placement leads, and how far one that was picked on other runs does."""
        lead = f"the best placement ({self.best}) is {self.value:.1f} points above it"
        if self.honest is None:
            return f"{lead}, which flatters it: it was picked on this one run"
        # Of few runs they span less than an interval, whose brackets these are not.
        first, last = f"{self.honest_low:z.1f}", f"{self.honest_high:z.1f}"
        span = f" ({first} to {last} in 95 % of resamples)" if first != last else ""
        return (
            f"{lead}{bracketed(self.low, self.high)}, which flatters it: "
            f"picked on other runs, the best leads by {self.honest:z.1f}{span}"
        )


def regret(table: pd.DataFrame, chosen: str, *, draws: int = 2000, seed: int = 0) -> Regret:
    """Return the regret of the chosen placement, which may be `zero-shot`."""
    found = outcomes(with_zero_shot(table) if chosen == ZERO_SHOT else table, "hm")
    anchor, best = found.column(chosen), int(np.argmax(found.means))
    lead = found.mean_difference(best, anchor)
    low, high = (None if math.isnan(end) else end for end in (lead.low, lead.high))
    in_sample = Regret(lead.value, low, high, found.placements[best])
    # A single cell leaves no other one to judge its best in.
    if len(found.values) == 1:
        return in_sample
    left = found.leads_left_out(anchor, draws, seed)
    # Not the mean over resamples: they leave out cells of datasets with many seeds more often.
    honest = Mean.of(np.nanmean(left, axis=0), found.datasets).value
    weights = 1 / (found.datasets[:, None] == found.datasets).sum(1)
    some = left[~np.isnan(left).all(axis=1)]
    first, last = interval(np.nansum(some * weights, axis=1) / (~np.isnan(some) @ weights))
    return replace(in_sample, honest=honest, honest_low=first, honest_high=last)


def verdict(table: pd.DataFrame, chosen: str, reference: str, *, seed: int = 0) -> str:
    """Return one sentence that follows from the numbers.

    Args:
        table: Validation table.
        chosen: Label of the chosen placement.
        reference: Label of the default to compare with, usually the paper's.
        seed: Seed of the resamples behind the regret.

    Raises:
        UserError: The choice or the reference is not in the table, or no dataset and seed holds
            every placement.
    """
    if len(table) and not table["changed"].any():
        return "VOID: training changed no prediction, so nothing is shown about the choice"
    rows = compare(table, chosen)
    compared = _by_placement(rows)
    check_one_of("placement", reference, compared, where="the validation table")
    left = regret(table, chosen, seed=seed)
    ours = compared[chosen]["hm"]
    others = (row for label, row in compared.items() if label not in (chosen, ZERO_SHOT))
    equal = sum(row["hm"] == ours for row in others)
    if left.value > 0:
        tail = left.words
    elif equal:
        tail = f"no placement did better, and {equal} came out equal"
    else:
        tail = "no placement did better"
    if chosen != ZERO_SHOT:
        tail += _against_zero_shot(compared.get(ZERO_SHOT))
    if reference == chosen:
        return f"The rule chose the default ({chosen}, harmonic mean {ours:.1f}); {tail}."
    gain = -compared[reference]["difference"]
    low, high = (-compared[reference]["difference_high"], -compared[reference]["difference_low"])
    if low > 0:
        did = "did better than"
    elif high < 0:
        did = "did worse than"
    else:
        did = "cannot be told from"
    return (
        f"The chosen placement ({chosen}, harmonic mean {ours:.1f}) {did} the default "
        f"({reference}) by {gain:+z.1f} points{bracketed(low, high)} over "
        f"{runs(rows[rows['placement'] == reference])}; {tail}."
    )


def _against_zero_shot(plain: dict[Hashable, Any] | None) -> str:
    if plain is None:
        return ""
    low, high = plain["difference_low"], plain["difference_high"]
    side = "above" if plain["difference"] > 0 else "below"
    where = f"{abs(plain['difference']):.1f} points {side}"
    if low > 0 or high < 0:
        return f"; zero-shot CLIP is {where} it{bracketed(low, high)}"
    return f"; zero-shot CLIP cannot be told from it ({where}){bracketed(low, high)}"
