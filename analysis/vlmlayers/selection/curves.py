"""From a tidy score table to arrays over blocks: what the rules and placement scores compute on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

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
Array = NDArray[np.float64]


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


def block_curve(
    scores: pd.DataFrame,
    metric: str,
    tower: str,
    blocks: int,
    reading: Reading | None = None,
    column: str = "value",
) -> Array:
    """Return a metric at every block of a tower, (block,), averaged over seeds and datasets.

    Raises:
        UserError: The metric is unknown, absent from this tower, or has no value at some block.
    """
    check_one_of("metric", metric, metric_names(scores), where="the score table")
    rows = (reading or Reading()).rows(scores, metric, tower)
    rows = partnered(rows, tower, blocks)
    return _fill(
        rows["position"].astype(str).to_numpy(),
        rows[column].to_numpy(float),
        blocks,
        f"{metric} of the {tower} tower",
    )


def partnered(rows: pd.DataFrame, tower: str, blocks: int) -> pd.DataFrame:
    """Drop rows that relate a block to any but its partner at equal relative depth.

    Where every position is related to one and the same, such as zero-shot accuracy to the other
    tower's `proj`, that one is the partner and all rows stay.
    """
    theirs = rows["other_tower"].astype(str)
    there = rows["other_position"].astype(str)
    if (theirs == "").all() or there.nunique() == 1:
        return rows
    other = max((int(p) for p in there[theirs == _other(tower)] if p.isdecimal()), default=blocks)
    here = rows["position"].astype(str)
    partner = [str(partner_block(int(p), blocks, other)) if p.isdecimal() else p for p in here]
    return rows[
        (theirs == "")
        | (
            (theirs == _other(tower))
            & (there == pd.Series(partner, index=rows.index, dtype=object))
        )
    ]


def _fill(positions: NDArray[np.object_], values: Array, blocks: int, what: str) -> Array:
    total, count = np.zeros(blocks), np.zeros(blocks)
    for position, value in zip(positions, values):
        if position.isdecimal() and int(position) <= blocks:
            total[int(position) - 1] += value
            count[int(position) - 1] += 1
    missing = [str(block + 1) for block in np.flatnonzero(count == 0)]
    if missing:
        raise UserError(
            f"{what} has no value at block {', '.join(missing[:6])}"
            f"{', …' if len(missing) > 6 else ''}; score every block first"
        )
    curve: Array = total / count
    if not np.isfinite(curve).all():
        raise UserError(
            f"{what} is not finite at block "
            f"{int(np.flatnonzero(~np.isfinite(curve))[0]) + 1}; drop or repair it"
        )
    return curve


def agreement_matrix(
    scores: pd.DataFrame, metric: str, blocks: dict[str, int], reading: Reading | None = None
) -> Array:
    """Return agreement between every vision and every text block, (vision block, text block).

    Cells that were not measured are NaN.

    Raises:
        UserError: The table holds no value of this metric between the towers.
    """
    check_one_of("metric", metric, metric_names(scores), where="the score table")
    shape = (blocks.get("vision", 0), blocks.get("text", 0))
    total, count = np.zeros(shape), np.zeros(shape)
    for tower in TOWERS:
        rows = (reading or Reading()).rows(scores, metric, tower)
        rows = rows[rows["other_tower"].astype(str) == _other(tower)]
        pairs = zip(rows["position"].astype(str), rows["other_position"].astype(str), rows["value"])
        for here, there, value in pairs:
            if here.isdecimal() and there.isdecimal():
                cell = (int(here) - 1, int(there) - 1)
                cell = cell if tower == "vision" else cell[::-1]
                total[cell] += value
                count[cell] += 1
    if not count.any():
        raise UserError(
            f"the score table has no {metric} between vision and text blocks; score it "
            "with both towers, or choose with agreement=none"
        )
    with np.errstate(invalid="ignore"):
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def partner_block(block: int, own: int, other: int) -> int:
    """Return the block of the other tower at the nearest relative depth.

    Args:
        block: Block of this tower, from 1.
        own: Number of blocks of this tower.
        other: Number of blocks of the other tower.
    """
    return min(max(int(np.floor(block * other / own + 0.5)), 1), other)


def agreement_curve(matrix: Array, tower: str, partner: str = "depth") -> Array:
    """Return the agreement of each block of a tower with the other tower, (block,).

    Args:
        matrix: (vision block, text block), as from `agreement_matrix`.
        tower: The tower whose blocks are asked about.
        partner: `depth` reads the block of equal relative depth, where MMA couples the towers;
            `max` takes the best block of the other tower, which is biased upwards.
    """
    check_one_of("partner", partner, ("depth", "max"))
    cells = matrix if tower == "vision" else matrix.T
    own, other = cells.shape
    if partner == "max":
        best: Array = np.nanmax(cells, axis=1)
        return best
    picked: Array = np.array(
        [cells[b - 1, partner_block(b, own, other) - 1] for b in range(1, own + 1)]
    )
    if np.isnan(picked).any():
        block = int(np.flatnonzero(np.isnan(picked))[0]) + 1
        raise UserError(
            f"agreement of {tower} block {block} with its partner at equal depth was "
            "not measured; score every block pair or choose with partner=max"
        )
    return picked


def normalise(curve: Array) -> Array:
    """Return (value − lowest) / (highest − lowest); all zero where the curve is flat."""
    span = float(curve.max() - curve.min())
    flat: Array = np.zeros_like(curve)
    return (curve - curve.min()) / span if span > 0 else flat


def _other(tower: str) -> str:
    return TOWERS[1 - TOWERS.index(tower)]
