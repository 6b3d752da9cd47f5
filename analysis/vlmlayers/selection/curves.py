"""From a tidy score table to arrays over blocks: what the rules and placement scores compute on."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from vlmlayers.errors import UserError, check_one_of
from vlmlayers.positions import TOWERS
from vlmlayers.scores.reading import Reading, metric_names, other_tower, partner_block, partnered

Array = NDArray[np.float64]


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
        rows = rows[rows["other_tower"].astype(str) == other_tower(tower)]
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
