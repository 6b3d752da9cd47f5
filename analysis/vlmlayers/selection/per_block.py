"""Block scores: a number per block of each tower, computed from a prepared score table."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vlmlayers.errors import UserError, check_one_of
from vlmlayers.selection.curves import Array, BlockTable, NoValues, curve_of, normalise

_ACCURACY, _AGREEMENT, _NOVEL = "dataset_accuracy", "cka_debiased", "novel_class_accuracy"


def metric_by_tower(table: BlockTable, name: str) -> dict[str, Array]:
    """Return a metric scaled to its range in each tower; a flat curve scales to zero."""
    table.check(name)
    towers = [tower for tower in table.blocks if table.has_curve(name, tower)]
    # What has a curve in no tower is agreement between them.
    return {tower: normalise(curve_of(table, name, tower)) for tower in towers or table.blocks}


@dataclass(frozen=True)
class BlockScore:
    """A value per block, from which placement scores average.

    Attributes:
        meaning: What it says, in one line.
        metrics: Metrics that the table must hold, whose product it is.
    """

    meaning: str
    metrics: tuple[str, ...]

    def compute(self, table: BlockTable) -> dict[str, Array]:
        """Return tower → (block,), each in [0, 1], of the towers that have all the metrics."""
        parts = [metric_by_tower(table, name) for name in self.metrics]
        return {
            tower: np.prod([part[tower] for part in parts], axis=0)
            for tower in table.blocks
            if all(tower in part for part in parts)
        }


BLOCK_SCORES: dict[str, BlockScore] = {
    "accuracy": BlockScore(
        "dataset accuracy, scaled to its range over the tower's blocks",
        (_ACCURACY,),
    ),
    "agreement": BlockScore(
        "debiased CKA with the other tower's block of equal depth, scaled to its range",
        (_AGREEMENT,),
    ),
    "accuracy_x_agreement": BlockScore(
        "scaled dataset accuracy times scaled agreement",
        (_ACCURACY, _AGREEMENT),
    ),
    "accuracy_x_novel": BlockScore(
        "scaled dataset accuracy times scaled accuracy on novel classes, vision only",
        (_ACCURACY, _NOVEL),
    ),
}


def metrics_of(name: str) -> tuple[str, ...]:
    """Return the metrics that a block score needs.

    Raises:
        UserError: There is no such block score.
    """
    if name.startswith("metric:"):
        return (name.removeprefix("metric:"),)
    return BLOCK_SCORES[check_one_of("block score", name, [*BLOCK_SCORES, "metric:NAME"])].metrics


def score_blocks(table: BlockTable, name: str, *, partial: bool = False) -> dict[str, Array]:
    """Return what `block_scores` does, of a table that has been prepared."""
    needed = metrics_of(name)
    if name not in BLOCK_SCORES:
        by_tower = metric_by_tower(table, needed[0])
    else:
        for metric in needed:
            if metric not in table.metric_names() and not table.reason(metric):
                raise NoValues(
                    f"block score {name!r} needs the metric {metric!r}, which the score table "
                    "lacks; score it"
                )
        by_tower = BLOCK_SCORES[name].compute(table)
    lacking = [tower for tower in table.blocks if tower not in by_tower]
    if lacking and not (partial and by_tower):
        raise NoValues(f"block score {name!r} has no value on the {lacking[0]} tower")
    return by_tower


def is_scored(table: BlockTable, name: str, *, partial: bool = False) -> bool:
    """Return whether a block score has a value at every block of the towers; see `score_blocks`."""
    try:
        # By trying: which blocks lack a value shows only where the values are read.
        score_blocks(table, name, partial=partial)
    except UserError:
        return False
    return True
