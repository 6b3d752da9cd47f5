"""Methods compared with each other, by the results table of a base-to-novel training."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import pandas as pd

from vlmadapters.protocols.results import (
    CELL,
    OFTEN_ALIKE,
    ZERO_SHOT_CLIP,
    ZERO_SHOT_METHODS,
    harmonic_means,
    names,
    refuse_conflicts,
    worded,
)
from vlmadapters.validation.tuning import size_warning
from vlmadapters.validation.verdict import (
    SIGNIFICANCE,
    bracketed,
    compare,
    outcomes,
    runs,
    with_zero_shot,
)
from vlmlayers.arguments import checked
from vlmlayers.errors import UserError
from vlmlayers.placement import ZERO_SHOT

KEYS = ["placement", "dataset", "seed"]
BY_ITSELF = "did worse by its own interval alone"


@checked
def compare_methods(results: pd.DataFrame) -> pd.DataFrame:
    """Return each method's outcomes and its paired difference to the best one.

    Every method at a placement, with its settings and recipe, counts as one; without placements
    named these are the published ones. Pairs are of one dataset and seed, so of one draw.

    Args:
        results: A results table with base and novel accuracies of one model.

    Returns:
        As `vlmadapters.validation.verdict.compare`, one row per method such as `MaPLe v1-9,t1-9`
        and one for zero-shot CLIP; differences are those to the first row, the best.

    Raises:
        UserError: The table has no training with base and novel accuracies, or none of zero-shot
            CLIP on one of its datasets; is of several models; or has two accuracies for one cell.
    """
    cells = _cells(results)
    if cells.empty:
        raise UserError(
            "the results hold no training tested on base and novel classes; train one with the "
            "protocol base-to-novel"
        )
    if len(bare := cells[cells["zero_shot_base"].isna()]):
        raise UserError(
            f"the results lack base and novel accuracies of {ZERO_SHOT_CLIP} on "
            f"{', '.join(bare['dataset'].unique())}; keep those rows, which `train` writes"
        )
    # The first time for the order alone.
    best = compare(cells, str(cells["placement"].iloc[0]))["placement"].iloc[0]
    found = compare(cells, str(best))
    named = found["placement"].replace({ZERO_SHOT: ZERO_SHOT_CLIP})
    found.insert(0, "method", named)
    return found.drop(columns=["placement", "kind"])


def methods_verdict(results: pd.DataFrame) -> str:
    """Return in words how methods compare; empty where there are not two to compare.

    A method did worse where that holds for all differences to the best at once, by Bonferroni's
    inequality: the best is picked by the same runs, and of many methods some are far behind it by
    chance. What the table notes of a method, such as names of untrained classes that it saw, is
    said too, and a warning where placements of different size are compared at one amount.

    Reference: Hsu, Simultaneous confidence intervals for all distances from the "best", 1981.

    Args:
        results: A results table.

    Raises:
        UserError: As `compare_methods`, where there are two.
    """
    cells = _cells(results)
    if cells["placement"].nunique() < 2:
        return ""
    compared = compare_methods(results)
    rows = compared.to_dict("records")
    worse = _worse(cells, str(rows[0]["method"]))
    over = f"harmonic mean {rows[0]['hm']:.1f} over {runs(compared)}"
    best = [row["method"] for row in rows if row["hm"] == rows[0]["hm"]]
    others = rows[len(best) :]
    if len(best) > 1:  # which of them stands first is chance
        it = best[0]
        said = [f"{', '.join(best[:-1])} and {best[-1]} share the best mean ({over})"]
    else:
        it, clear = "it", all(row["method"] in worse for row in others)
        said = [f"{best[0]} {'did best' if clear else 'is ahead'} ({over})"]
    did = [_did(row, it, row["method"] in worse) for row in others]
    said += [f"{row['method']} {one} {_by(row)}" for row, one in zip(others, did)]
    sentence = "; ".join(said) + "."
    if BY_ITSELF in did:
        sentence += (
            f" What holds by its own interval alone does not for all {len(rows) - 1} at once."
        )
    return " ".join([*_warned(results), sentence, *_noted(results)])


def _worse(cells: pd.DataFrame, best: str) -> set[str]:
    """Return the methods that differ from the best where all differences to it are tested."""
    found = outcomes(with_zero_shot(cells), "hm")
    named = [ZERO_SHOT_CLIP if one == ZERO_SHOT else one for one in found.placements]
    anchor = named.index(best)
    p = {name: found.mean_difference(i, anchor).p for i, name in enumerate(named)}
    return {name for name, one in p.items() if one * (len(named) - 1) < SIGNIFICANCE}


def _warned(results: pd.DataFrame) -> list[str]:
    """Return a warning of each method whose placements differ in size at one amount."""
    trained = results[~results["method"].isin(ZERO_SHOT_METHODS)].fillna({"placement": ""})
    found = {
        str(method): size_warning([one for one in part["placement"].unique() if one])
        for method, part in trained.groupby("method", sort=False)
    }
    return [f"WARNING: {method}: {warning}." for method, warning in found.items() if warning]


def _noted(results: pd.DataFrame) -> list[str]:
    """Return a sentence for each note of each method, with datasets and runs where not all."""
    if "note" not in results:
        return []
    said = []
    for method, part in results.fillna({"note": ""}).groupby("method", sort=False):
        for note, of in part[part["note"] != ""].groupby("note", sort=False):
            some = of["dataset"].nunique() < part["dataset"].nunique()
            where = f" on {', '.join(of['dataset'].unique())}" if some else ""
            there = part[part["dataset"].isin(of["dataset"])]
            noted, trained = _runs(of), _runs(there)
            share = f" in {noted} of {trained} runs" if noted < trained else ""
            said.append(f"{method}{where}{share}: {note}.")
    return said


def _runs(rows: pd.DataFrame) -> int:
    """Return how many trainings some rows are of."""
    return len(rows.reindex(columns=[*KEYS, *OFTEN_ALIKE]).drop_duplicates())


def _did(row: dict[Hashable, Any], it: str, worse: bool) -> str:
    if not row["difference_high"] < 0:
        return f"cannot be told from {it}"
    return "did worse" if worse else BY_ITSELF


def _by(row: dict[Hashable, Any]) -> str:
    between = bracketed(row["difference_low"], row["difference_high"])
    return f"({row['difference']:+z.1f}{between})"


def _cells(results: pd.DataFrame) -> pd.DataFrame:
    """Return base, novel and harmonic mean in percent, a row per method, dataset and seed."""
    # A file of the table holds empty fields where it has empty words.
    halves = results[results["split_kind"].isin(["base", "novel"])].fillna({"placement": ""})
    _refuse_several_models(halves)
    refuse_conflicts(halves, ["method", "placement", *OFTEN_ALIKE, *CELL])
    trained = halves[~halves["method"].isin(ZERO_SHOT_METHODS)]
    found = _wide(trained.assign(placement=names(trained)), [*KEYS, "parameters"]).reset_index()
    plain = _wide(halves[halves["method"] == ZERO_SHOT_CLIP], ["dataset"]).add_prefix("zero_shot_")
    found["hm"] = harmonic_means(found["base"], found["novel"])
    return found.assign(kind="").join(plain, on="dataset")


def _refuse_several_models(rows: pd.DataFrame) -> None:
    known = worded(rows, ["model", "weights"]).drop_duplicates().to_numpy()
    if len(known) > 1:
        named = " and ".join(f"{model} ({weights})" if weights else model
                             for model, weights in known)  # fmt: skip
        raise UserError(f"the results are of {named}; compare the methods of each by itself")


def _wide(rows: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    found = rows.groupby([*keys, "split_kind"], sort=False)["accuracy"].first().unstack()
    return 100 * found.reindex(columns=["base", "novel"]).dropna()
