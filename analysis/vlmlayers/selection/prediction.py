"""Placement scores: a number predicted for any placement from the score table.

Each is compared with what training reaches there (`vlmlayers validate`). Two of them look at no
measurement at all (`blocks_adapted`, `relative_depth`): a metric that predicts no better than they
do has explained nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pandas as pd

from vlmlayers.arguments import Count, Takes, checked
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.placement import DEEPEST, Placement, parse_blocks
from vlmlayers.positions import TOWERS
from vlmlayers.scores.reading import check_scores, depths
from vlmlayers.scores.schema import Scores
from vlmlayers.selection.curves import Array, BlockTable
from vlmlayers.selection.per_block import is_scored, metrics_of, score_blocks

DIGITS = 12  # of predictions, which lie between −1 and 1
Values = Mapping[str, Array]
Blocks = Mapping[str, Sequence[int]]
Depths = Mapping[str, int]
Adapted = Annotated[Sequence[int], Takes("blocks such as '5-12' or [5, 6]", convert=parse_blocks)]


@checked
def block_scores(
    scores: Scores,
    name: str,
    blocks: Mapping[str, Count] | None = None,
) -> dict[str, Array]:
    """Return a block score per tower, (block,), by its name or as `metric:NAME`.

    Args:
        scores: Score table of one model.
        name: Name of a block score.
        blocks: Depth by tower; read off the table where None.

    Raises:
        UserError: The name is unknown, the table lacks a metric that it needs, or it holds more
            than one model.
    """
    scores = check_scores(scores)
    blocks = dict(blocks) if blocks is not None else depths(scores)
    return score_blocks(BlockTable.of(scores, blocks), name)


def _share(placement: Blocks, blocks: Depths) -> float:
    return sum(len(placement.get(t, ())) for t in blocks) / max(1, sum(blocks.values()))


@dataclass(frozen=True)
class PlacementScore:
    """A predicted quality of a placement; higher predicts better training outcome.

    Attributes:
        meaning: The definition in one line.
        block_score: Block score that it rests on, or empty.
        compute: (block score by tower, (block, …); placement; depth by tower) → (…).
    """

    meaning: str
    block_score: str
    compute: Callable[[Values, Blocks, Depths], Array]


def _contrast(values: Values, placement: Blocks, blocks: Depths) -> Array:
    frozen = {
        tower: [b for b in range(1, depth + 1) if b not in placement.get(tower, ())]
        for tower, depth in blocks.items()
    }
    return _mean(values, placement, blocks) - _mean(values, frozen, blocks)


def _captured(values: Values, placement: Blocks, blocks: Depths) -> Array:
    # All blocks together capture everything; half the share of blocks is what that costs.
    total = sum(values[t].sum(0) for t in values)
    picked = sum(values[t][np.asarray(placement.get(t, ()), dtype=int) - 1].sum(0) for t in values)
    share = np.divide(picked, total, out=np.zeros_like(total), where=total > 0)
    return np.where(total > 0, share - 0.5 * _share(placement, blocks), 0.0)


def _mean(values: Values, placement: Blocks, blocks: Depths) -> Array:
    picked = [
        by_block[np.asarray(placement[tower], dtype=int) - 1]
        for tower, by_block in values.items()
        if len(placement.get(tower, ()))
    ]
    return np.asarray(np.concatenate(picked).mean(0) if picked else 0.0)


def _depth(values: Values, placement: Blocks, blocks: Depths) -> Array:
    return _mean({t: np.arange(1, n + 1) / n for t, n in blocks.items()}, placement, blocks)


def _count(values: Values, placement: Blocks, blocks: Depths) -> Array:
    return np.asarray(_share(placement, blocks))


PLACEMENT_SCORES: dict[str, PlacementScore] = {
    "mean_accuracy": PlacementScore(
        "mean scaled dataset accuracy of the adapted blocks", "accuracy", _mean
    ),
    "mean_agreement": PlacementScore(
        "mean scaled cross-tower agreement of the adapted blocks", "agreement", _mean
    ),
    "mean_accuracy_x_agreement": PlacementScore(
        "mean over adapted blocks of scaled accuracy times agreement", "accuracy_x_agreement", _mean
    ),
    "mean_accuracy_x_novel": PlacementScore(
        "mean over adapted vision blocks of scaled accuracy times accuracy on novel classes",
        "accuracy_x_novel",
        _mean,
    ),
    "contrast_accuracy": PlacementScore(
        "mean scaled accuracy of adapted blocks minus that of frozen blocks", "accuracy", _contrast
    ),
    "contrast_accuracy_x_agreement": PlacementScore(
        "mean scaled accuracy × agreement of adapted minus that of frozen blocks",
        "accuracy_x_agreement",
        _contrast,
    ),
    "captured_minus_cost": PlacementScore(
        "share of all scaled accuracy × agreement that is adapted, minus half the share of blocks",
        "accuracy_x_agreement",
        _captured,
    ),
    "relative_depth": PlacementScore(
        "mean relative depth of the adapted blocks; reads no measurement", "", _depth
    ),
    "blocks_adapted": PlacementScore(
        "share of all blocks that is adapted; reads no measurement", "", _count
    ),
}


@checked
def placement_score(
    scores: Scores,
    vision: Adapted,
    text: Adapted,
    name: str = "contrast_accuracy_x_agreement",
) -> float:
    """Return the predicted quality of one placement.

    Args:
        scores: Score table of one model.
        vision: Adapted vision blocks, from 1.
        text: Adapted text blocks, from 1.
        name: A name of `PLACEMENT_SCORES`, or `metric:NAME` for the mean over adapted blocks of
            any metric of the table, scaled to its range in each tower. What is between the towers,
            such as an agreement or a gap, is of both blocks of a pair at equal depth.

    Returns:
        The number; NaN where the score says nothing of the towers that are adapted.

    Raises:
        UserError: The name is unknown, a metric is missing, or a block does not exist.
    """
    return scorer(scores, name)(vision, text)


def scorer(scores: pd.DataFrame, name: str) -> Callable[[Iterable[int], Iterable[int]], float]:
    """Return a function from (vision blocks, text blocks) to a placement score.

    The table is read once; see `placement_score` for names and errors.
    """
    scores = check_scores(scores)
    blocks = depths(scores)
    table = BlockTable.of(scores, blocks)
    if name.startswith("metric:"):
        score = PlacementScore("", name, _mean)
    else:
        check_one_of("placement score", name, [*PLACEMENT_SCORES, "metric:NAME"])
        score = PLACEMENT_SCORES[name]
    values = score_blocks(table, score.block_score, partial=True) if score.block_score else {}

    def of(vision: Iterable[int], text: Iterable[int]) -> float:
        placed = Placement(tuple(vision), tuple(text))
        # A table of one tower alone does not say how deep the other one is.
        placed.check(dict.fromkeys(TOWERS, DEEPEST) | blocks)
        if placed and not any(placed.blocks(tower) for tower in values or blocks):
            return math.nan  # of a tower on which the score says nothing
        # Means of equal values differ by rounding, which must not rank one placement above another.
        return round(float(score.compute(values, dict(zip(TOWERS, placed)), blocks)), DIGITS)

    return of


@checked
def available_scores(scores: Scores) -> list[str]:
    """Return the placement scores whose metrics are in a table, then `metric:NAME` for each metric.

    A metric that lacks a block is left out as `metric:NAME`; of a score made of it `predict` says
    so: it is to be known before anything is trained.
    """
    table = BlockTable.of(scores, depths(scores))
    present = set(table.metric_names())
    named = [
        name
        for name, score in PLACEMENT_SCORES.items()
        if not score.block_score or set(metrics_of(score.block_score)) <= present
    ]
    single = (f"metric:{name}" for name in table.metric_names())
    return named + [name for name in single if is_scored(table, name, partial=True)]


Placements = Annotated[Mapping[str, Any], Takes("a mapping from names to placements")]


def _pair(label: str, given: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the blocks of both towers of a placement, however it is given."""
    placed = Placement.parse(given) if isinstance(given, str) else given
    if hasattr(placed, "vision") and hasattr(placed, "text"):
        placed = placed.vision, placed.text
    # Of [5, 6] nothing tells whether two blocks are meant or one of each tower.
    if not isinstance(placed, Sequence) or len(placed) != 2 or set(map(type, placed)) == {int}:
        raise UserError(
            f"placement {label!r} takes text such as 'v5-12,t5-12' or a pair ([5, 6], [7]), not "
            f"{given!r}"
        )
    return parse_blocks(placed[0]), parse_blocks(placed[1])


@checked
def predict(
    scores: Scores, placements: Placements, names: Sequence[str] | None = None
) -> pd.DataFrame:
    """Return every placement score of every placement.

    Args:
        scores: Score table of one model.
        placements: Name → `Placement` or its text, anything else with `.vision` and `.text`, or
            such a pair.
        names: Placement scores; all that the table supports where None.

    Returns:
        Columns placement, vision, text, score, predicted; NaN where a score says nothing of the
        towers that are adapted.
    """
    rows = []
    for name in names if names is not None else available_scores(scores):
        score = scorer(scores, name)
        for label, given in placements.items():
            vision, text = _pair(label, given)
            rows.append(
                {
                    "placement": label,
                    "vision": " ".join(map(str, vision)),
                    "text": " ".join(map(str, text)),
                    "score": name,
                    "predicted": score(vision, text),
                }
            )
    return pd.DataFrame(rows, columns=["placement", "vision", "text", "score", "predicted"])
