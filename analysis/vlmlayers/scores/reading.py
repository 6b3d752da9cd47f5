"""Reading a score table: which rows a metric has, in which space, pooling and split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from vlmlayers.errors import UserError, check_one_of
from vlmlayers.positions import SPACES, TOWERS

POOLED = "*"
POOLING_ORDER = ("model", "cls", "eot", "mean")
REQUIRED = (
    "model",
    "weights",
    "dataset",
    "tower",
    "position",
    "space",
    "pooling",
    "metric",
    "value",
    "low",
    "high",
    "seed",
)


def check_scores(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the table with the optional columns filled in.

    Raises:
        UserError: Columns are missing, the table is empty, or it holds more than one model.
    """
    scores = bare(scores)
    missing = [name for name in REQUIRED if name not in scores.columns]
    if missing:
        raise UserError(
            f"the score table lacks the columns {', '.join(missing)}; "
            "write it with `vlmlayers score`"
        )
    if scores.empty:
        raise UserError("the score table is empty; nothing can be chosen from it")
    models = sorted({f"{m} ({w})" for m, w in zip(scores["model"], scores["weights"])})
    if len(models) > 1:
        raise UserError(
            f"the score table holds {len(models)} models ({', '.join(models[:4])}); "
            "keep the rows of one before choosing layers"
        )
    for name in ("other_tower", "other_position", "options"):
        if name not in scores.columns:
            scores = scores.assign(**{name: ""})
    return scores


def bare(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the table without its attributes, which pandas copies at every step."""
    if not scores.attrs:
        return scores
    table = scores.copy(deep=False)
    table.attrs = {}
    return table


def depths(scores: pd.DataFrame) -> dict[str, int]:
    """Return the number of blocks of each tower in the table, `vision` first."""
    found = {}
    for tower in TOWERS:
        names = scores.loc[scores["tower"] == tower, "position"].astype(str)
        partner = scores.loc[scores["other_tower"] == tower, "other_position"].astype(str)
        blocks = [p for p in {*names, *partner} if p.isdecimal()]
        absurd = [p for p in blocks if len(p) > 4]
        if absurd:
            raise UserError(
                f"the score table has a {tower} position {absurd[0][:40]}; no tower is that deep"
            )
        if blocks:
            found[tower] = max(map(int, blocks))
    if not found:
        raise UserError("the score table has no value at any block; score positions 1..L first")
    return found


@dataclass(frozen=True)
class Reading:
    """One way to read a metric's rows, where a table holds several.

    Attributes:
        space: `native`, `normed` or `joint`; None takes the first that is present.
        pooling: `model`, `cls`, `eot` or `mean`; None takes the first that is present.
        split: `train`, `val` or `test`; None takes the first that is present.
        dataset: Name of a dataset; None takes the pooled rows, or else the mean over datasets.
    """

    space: str | None = None
    pooling: str | None = None
    split: str | None = None
    dataset: str | None = None

    def rows(self, scores: pd.DataFrame, metric: str, tower: str) -> pd.DataFrame:
        """Return the rows of one metric on one tower that this reading selects."""
        rows = scores[(scores["metric"] == metric) & (scores["tower"] == tower)]
        if rows.empty:
            return rows
        rows = _keep(rows, "space", self.space, SPACES)
        rows = _keep(rows, "pooling", self.pooling, POOLING_ORDER)
        if "split" in rows.columns:
            rows = _keep(rows, "split", self.split, ("train", "val", "test"))
        if self.dataset is not None:
            check_one_of("dataset", self.dataset, sorted(set(rows["dataset"])), f"{metric} scores")
            return rows[rows["dataset"] == self.dataset]
        pooled = rows["dataset"] == POOLED
        return rows[pooled] if pooled.any() else rows


def _keep(
    rows: pd.DataFrame,
    column: str,
    wanted: str | None,
    order: Sequence[str],
) -> pd.DataFrame:
    present = rows[column].astype(str)
    names = set(present)
    if wanted is not None:
        check_one_of(column, wanted, sorted(names), where="the score table")
        return rows[present == wanted]
    if len(names) == 1:
        return rows
    first = next((name for name in order if name in names), min(names))
    return rows[present == first]


def metric_names(scores: pd.DataFrame) -> list[str]:
    """Return the metrics of the table, in order of appearance."""
    return list(dict.fromkeys(scores["metric"]))


def has_curve(scores: pd.DataFrame, metric: str, tower: str) -> bool:
    """Return whether the metric has values of its own at the blocks of this tower.

    Values that relate every block to one and the same position count as its own.
    """
    rows = scores[(scores["metric"] == metric) & (scores["tower"] == tower)]
    if rows["other_position"].astype(str).nunique() > 1:
        rows = rows[rows["other_tower"].astype(str) == ""]
    return bool(rows["position"].astype(str).str.isdecimal().any())


def partnered(rows: pd.DataFrame, tower: str, blocks: int) -> pd.DataFrame:
    """Drop rows that relate a block to any but its partner at equal relative depth.

    Where every position is related to one and the same, such as zero-shot accuracy to the other
    tower's `proj`, that one is the partner and all rows stay.
    """
    theirs = rows["other_tower"].astype(str)
    there = rows["other_position"].astype(str)
    if (theirs == "").all() or there.nunique() == 1:
        return rows
    other = max(
        (int(p) for p in there[theirs == other_tower(tower)] if p.isdecimal()), default=blocks
    )
    here = rows["position"].astype(str)
    partner = [str(partner_block(int(p), blocks, other)) if p.isdecimal() else p for p in here]
    return rows[
        (theirs == "")
        | (
            (theirs == other_tower(tower))
            & (there == pd.Series(partner, index=rows.index, dtype=object))
        )
    ]


def partner_block(block: int, own: int, other: int) -> int:
    """Return the block of the other tower at the nearest relative depth.

    Args:
        block: Block of this tower, from 1.
        own: Number of blocks of this tower.
        other: Number of blocks of the other tower.
    """
    return min(max(int(np.floor(block * other / own + 0.5)), 1), other)


def other_tower(tower: str) -> str:
    """Return the name of the other tower."""
    return TOWERS[1 - TOWERS.index(tower)]
