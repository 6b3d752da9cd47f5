"""What training says about a choice: differences, regret, rank correlation, and one sentence.

Everything here reads the validation table (one row per dataset, seed and placement) and draws from
private generators. The unit that is resampled is the dataset, then the seed within it: two seeds of
one dataset are not two datasets.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from vlmlayers.errors import UserError, check_one_of

Array = NDArray[np.float64]
VALIDATION_COLUMNS = (
    "model",
    "weights",
    "dataset",
    "shots",
    "seed",
    "placement",
    "kind",
    "vision",
    "text",
    "parameters",
    "base",
    "novel",
    "hm",
    "zero_shot_base",
    "zero_shot_novel",
    "n_base",
    "n_novel",
    "changed",
    "seconds",
)
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
    datasets: NDArray[np.str_]
    placements: tuple[str, ...]

    @property
    def means(self) -> Array:
        """Mean over datasets of the mean over seeds, (placement,)."""
        return np.mean([self.values[self.datasets == d].mean(0) for d in self._names], axis=0)

    @property
    def _names(self) -> list[str]:
        return sorted(set(self.datasets.tolist()))

    def resampled_means(self, draws: int, seed: int) -> Array:
        """Return the means under resampled datasets and seeds, (draw, placement).

        With one dataset only the seeds are resampled; the interval then says nothing about other
        datasets.
        """
        generator = np.random.default_rng(seed)
        cells = [np.flatnonzero(self.datasets == name) for name in self._names]
        result = np.empty((draws, len(self.placements)))
        for draw in range(draws):
            picked = generator.integers(len(cells), size=len(cells))
            rows = [generator.choice(cells[i], size=len(cells[i])) for i in picked]
            result[draw] = np.mean([self.values[r].mean(0) for r in rows], axis=0)
        return result

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
    wide = table.pivot_table(index=["dataset", "seed"], columns="placement", values=outcome)
    wide = wide[list(dict.fromkeys(table["placement"]))] if len(table) else wide
    complete = wide.dropna()
    if complete.empty:
        raise UserError(
            "no dataset and seed of the validation table holds every placement; finish the sweep "
            "(start `vlmlayers validate` again, it resumes)"
        )
    return Outcomes(
        complete.to_numpy(np.float64),
        complete.index.get_level_values("dataset").to_numpy(dtype=str),
        tuple(map(str, complete.columns)),
    )


def _by_placement(table: pd.DataFrame) -> dict[str, dict[Hashable, Any]]:
    """Return the rows of a table with one row per placement, by label."""
    return {str(row["placement"]): row for row in table.to_dict("records")}


def _interval(draws: Array) -> tuple[float, float]:
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def compare(table: pd.DataFrame, chosen: str, *, draws: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Return every placement's outcomes and its paired difference to the chosen one.

    Args:
        table: Validation table.
        chosen: Label of the chosen placement.
        draws: Bootstrap draws over datasets and seeds.
        seed: Seed of the private generator.

    Returns:
        One row per placement, best harmonic mean first: placement, kind, parameters; base, novel
        and hm with `_low`, `_high`; `difference` (hm minus the chosen one's, in the same dataset
        and seed) with `difference_low`, `difference_high`; n (datasets × seeds).
    """
    first = _by_placement(table.drop_duplicates("placement"))
    rows: dict[str, dict[str, object]] = {}
    for outcome in ("base", "novel", "hm"):
        found = outcomes(table, outcome)
        resampled = found.resampled_means(draws, seed)
        anchor = found.column(chosen)
        for i, name in enumerate(found.placements):
            low, high = _interval(resampled[:, i])
            row = rows.setdefault(
                name,
                {
                    "placement": name,
                    "kind": first[name]["kind"],
                    "parameters": int(first[name]["parameters"]),
                },
            )
            row |= {outcome: found.means[i], f"{outcome}_low": low, f"{outcome}_high": high}
            if outcome == "hm":
                low, high = _interval(resampled[:, i] - resampled[:, anchor])
                row |= {
                    "difference": found.means[i] - found.means[anchor],
                    "difference_low": low,
                    "difference_high": high,
                    "n": len(found.values),
                }
    return pd.DataFrame(rows.values()).sort_values("hm", ascending=False, ignore_index=True)


def rank_correlation(
    table: pd.DataFrame,
    predicted: pd.DataFrame,
    *,
    outcome: str = "hm",
    draws: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Return Kendall's τ-b between predicted placement scores and trained outcomes.

    Args:
        table: Validation table.
        predicted: Columns placement, score, predicted (from `selection.predict`).
        outcome: `hm`, `base` or `novel`.
        draws: Bootstrap draws (datasets, then seeds) and permutations of the placements.
        seed: Seed of the private generator.

    Returns:
        One row per score, best first: score, outcome, tau, low, high, p (two-sided, by
        permutation; the null is 0), n (placements). A score that is the same for every placement
        has no ranks and is left out.
    """
    found = outcomes(table, outcome)
    resampled = found.resampled_means(draws, seed)
    generator = np.random.default_rng(seed)
    order = np.array([generator.permutation(len(found.placements)) for _ in range(draws)])
    rows = []
    for name, group in predicted.groupby("score", sort=False):
        values = group.drop_duplicates("placement").set_index("placement")["predicted"]
        guess = values.reindex(list(found.placements)).to_numpy(np.float64)
        if not np.isfinite(guess).all() or np.ptp(guess) == 0 or np.ptp(found.means) == 0:
            continue
        tau = _tau(guess, found.means[None])[0]
        low, high = _interval(_tau(guess, resampled))
        null = _tau(guess, found.means[order])
        p = (1 + np.sum(np.abs(null) >= abs(tau) - 1e-12)) / (draws + 1)
        rows.append(
            {
                "score": name,
                "outcome": outcome,
                "tau": tau,
                "low": low,
                "high": high,
                "p": float(p),
                "n": len(guess),
            }
        )
    columns = ["score", "outcome", "tau", "low", "high", "p", "n"]
    return pd.DataFrame(rows, columns=columns).sort_values(
        "tau", ascending=False, ignore_index=True
    )


def _tau(guess: Array, trained: Array) -> Array:
    """Return Kendall's τ-b of one ranking with many, (draw,), by the signs of all pairs."""
    upper = np.triu_indices(len(guess), 1)
    a = np.sign(guess[upper[0]] - guess[upper[1]])  # (pair,)
    b = np.sign(trained[:, upper[0]] - trained[:, upper[1]])  # (draw, pair)
    scale = np.sqrt((a != 0).sum() * (b != 0).sum(1))
    return np.divide(b @ a, scale, out=np.zeros(len(b)), where=scale > 0)


@dataclass(frozen=True)
class Regret:
    """How much harmonic mean the choice leaves on the table, in points.

    Attributes:
        value: Best mean minus the chosen one's mean. The best is picked with hindsight, so this
            flatters the best placement.
        low, high: Bootstrap interval of that difference for the placement that is best overall.
        honest: The same with the best picked on the other datasets and seeds (leave one cell out).
        best: Label of the best placement.
    """

    value: float
    low: float
    high: float
    honest: float
    best: str


def regret(table: pd.DataFrame, chosen: str, *, draws: int = 2000, seed: int = 0) -> Regret:
    """Return the regret of the chosen placement."""
    found = outcomes(table, "hm")
    anchor, best = found.column(chosen), int(np.argmax(found.means))
    resampled = found.resampled_means(draws, seed)
    low, high = _interval(resampled[:, best] - resampled[:, anchor])
    left_out = []
    for cell in range(len(found.values)):
        rest = np.delete(found.values, cell, axis=0)
        pick = best if not len(rest) else int(np.argmax(rest.mean(0)))
        left_out.append(found.values[cell, pick] - found.values[cell, anchor])
    return Regret(
        float(found.means[best] - found.means[anchor]),
        low,
        high,
        float(np.mean(left_out)),
        found.placements[best],
    )


def verdict(table: pd.DataFrame, chosen: str, reference: str, *, seed: int = 0) -> str:
    """Return one sentence that follows from the numbers.

    Args:
        table: Validation table.
        chosen: Label of the chosen placement.
        reference: Label of the default to compare with, usually the paper's.
        seed: Seed of the bootstrap.
    """
    if not table["changed"].any():
        return (
            "Training changed no prediction at any placement, so this run says nothing about the "
            "choice: raise the learning rate or α."
        )
    compared = _by_placement(compare(table, chosen, seed=seed))
    left = regret(table, chosen, seed=seed)
    ours = compared[chosen]["hm"]
    tail = (
        f"the best placement ({left.best}) is {left.value:.1f} points above it "
        f"[{left.low:.1f}, {left.high:.1f}]"
        if left.best != chosen
        else "no placement did better"
    )
    if reference == chosen:
        return f"The rule chose the default ({chosen}, harmonic mean {ours:.1f}); {tail}."
    gain = -compared[reference]["difference"]
    low, high = (
        -compared[reference]["difference_high"],
        -compared[reference]["difference_low"],
    )
    if low > 0:
        did = "did better than"
    elif high < 0:
        did = "did worse than"
    else:
        did = "cannot be told from"
    return (
        f"The chosen placement ({chosen}, harmonic mean {ours:.1f}) {did} the default "
        f"({reference}) by {gain:+.1f} points [{low:.1f}, {high:.1f}] over "
        f"{compared[chosen]['n']} runs; {tail}."
    )


def predicted_outcomes(
    predicted: pd.DataFrame, table: pd.DataFrame, outcome: str = "hm"
) -> pd.DataFrame:
    """Return predicted scores with the trained outcome beside them, for the scatter plot."""
    found = outcomes(table, outcome)
    trained: Mapping[str, float] = dict(zip(found.placements, found.means.tolist()))
    merged = predicted[predicted["placement"].isin(list(trained))].copy()
    merged["trained"] = [trained[name] for name in merged["placement"]]
    return merged.reset_index(drop=True)
