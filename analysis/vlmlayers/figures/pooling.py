"""Read score tables, refusing those whose seeds must not be averaged."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import pandas as pd

from vlmlayers.figures.inputs import Folders, Seen, provenance_beside, read_each, refuse_unlike
from vlmlayers.scores.reading import POOLED
from vlmlayers.scores.summaries import ROW_OPTIONS

# Rows that differ in nothing else are seeds of one curve.
CURVE = ("model", "weights", "metric", "dataset", "tower", "space", "pooling")


def read_scores(
    folders: Folders, metrics: Collection[str] | None = None, seen: Seen | None = None
) -> pd.DataFrame:
    """Read every score table of the folders as one.

    Args:
        folders: Where they lie.
        metrics: Those that are drawn; all where None.
        seen: Filled with how each was made, to compare other tables with.

    Raises:
        MissingTable: There is none.
        UserError: Two tables are of other weights of one name, or values of one curve lie in
            several that were made differently, by their rows and by what stands beside them.
    """
    found = read_each("scores", folders, (*CURVE, "seed", "n"))
    seen = Seen() if seen is None else seen
    for path, table in found.items():
        made = provenance_beside(path, "scores")
        if weights := made.get("model", {}).get("weights_hash"):
            for model in set(zip(table.model, table.weights)):
                how = {"weights_hash": weights[:12]}
                refuse_unlike(seen, path, f"scored {model[0]}", model, how)
        kept = table if metrics is None else table[table.metric.isin(metrics)]
        for curve, rows in kept.groupby(list(CURVE), sort=False):
            how = _items(made, table, rows.dataset.iloc[0]) | _scored(rows)
            refuse_unlike(seen, path, f"scored {curve[0]}", curve, how)
    joined = pd.concat(found.values(), ignore_index=True)
    # What takes no seed stands alike in each of several tables of other seeds.
    again = joined.duplicated() & (joined.seed == -1)
    return joined[~again].reset_index(drop=True)


def _items(made: Mapping[str, Any], table: pd.DataFrame, name: str) -> dict[str, Any]:
    """Return of which items the rows of a dataset are, or the pooled ones, as far as recorded."""
    datasets = {
        f"{one.get('name', key)} ({one.get('split', '')})": one
        for key, one in made.get("datasets", {}).items()
        if name in (POOLED, one.get("name", key))
    }
    how = {
        f"{key} of {one}": told[key]
        for one, told in datasets.items()
        for key in ("items", "items_hash", "text", "template", "present_only")
        if told.get(key) is not None
    }
    if name == POOLED:
        each = table[table.dataset != POOLED]
        # What is recorded is of the last extraction alone; features of those before are scored too.
        names = {*datasets, *(f"{one} ({of})" for one, of in zip(each.dataset, each.split))}
        how = ({"datasets": ", ".join(sorted(names))} if names else {}) | how
    return how


def _scored(rows: pd.DataFrame) -> dict[str, Any]:
    """Return the options that rows of a curve record, and of pooled ones the number of items."""
    options: dict[str, set[str]] = {}
    for text in set(rows.options) if "options" in rows else ():
        for key, _, value in (word.partition("=") for word in text.split(";") if word):
            options.setdefault(key, set()).add(value)
    how = {k: ", ".join(sorted(v)) for k, v in options.items() if k not in ROW_OPTIONS}
    # Parts made by class have other numbers of items by seed.
    whole = (rows.dataset == POOLED).all() and how.get("split_by") != "class"
    return how | ({"n": str(rows.n.iloc[0])} if whole and rows.n.nunique() == 1 else {})
