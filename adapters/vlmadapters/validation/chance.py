"""Chance of a score: how well curves over depth that measure nothing rank the same placements.

Placements share blocks: blocks 5–12 and 9–12 do alike in training, and a mean over each of any
curve is alike too, so that fewer things are ranked than there are placements. A permutation of the
placements does not know this.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

import numpy as np

from vlmadapters.validation.repeatability import ROUNDING, signs
from vlmadapters.validation.verdict import SIGNIFICANCE, Array
from vlmlayers.placement import Placement
from vlmlayers.positions import TOWERS
from vlmlayers.scores.reading import partner_block
from vlmlayers.selection.prediction import DIGITS, PLACEMENT_SCORES


def by_chance(
    taus: Mapping[str, float], placements: Sequence[str], ranked: Array, *, draws: int, seed: int
) -> list[float]:
    """Return the two-sided p of each score's τ against random curves, averaged as the score is.

    It is the largest over six kinds of curve: in no order, wandering or trending with depth, each
    tower by its own or both by one. So it holds for a score of any of these, and one that rises
    with depth is told from chance only where training ranks otherwise than most such curves do.

    Args:
        taus: Score to τ.
        placements: Labels of what is ranked.
        ranked: (pair,) what is ranked by, as `signs`, or the mean of several.
        draws: Curves of each kind; more where there are so many scores that correction needs them.
        seed: Seed of the private generator.

    Returns:
        p of each score; NaN where no ranking could be told from chance after correction for their
        number, as of few placements, or of an order that most curves have.
    """
    placed = [Placement.parse(name) for name in placements]
    draws = max(draws, round(2 / SIGNIFICANCE) * len(taus))
    null: dict[object, Array] = {}  # scores that average alike share one
    found = []
    for name, tau in taus.items():
        score = PLACEMENT_SCORES.get(name)
        # Depth, a metric, and what a caller adds are means of a curve.
        if score is None or not score.block_score:
            score = PLACEMENT_SCORES["mean_accuracy"]
        if score.compute not in null:
            kinds = [
                np.transpose([score.compute(curves, blocks, depths) for blocks in map(_of, placed)])
                for depths, curves in _curves(placed, draws, seed)
            ]
            null[score.compute] = np.abs(signs(np.round(kinds, DIGITS)) @ ranked)  # (kind, draw)
        by_curves = null[score.compute]
        # What was found counts as a draw, so that p is never 0.
        p, least = (
            float((1 + np.sum(by_curves >= size - ROUNDING, axis=1)).max() / (draws + 1))
            for size in (abs(tau), max(abs(tau), by_curves.max()))
        )
        found.append(p if len(taus) * least < SIGNIFICANCE else np.nan)
    return found


def deepest(placed: Sequence[Placement]) -> dict[str, int]:
    """Return the depth of each tower as a validation table tells it, 0 where nothing is trained.

    The table names none: a tower ends at its deepest block trained, which the kind `last` has.
    """
    return {tower: max(max(one.blocks(tower), default=0) for one in placed) for tower in TOWERS}


def _of(placed: Placement) -> dict[str, tuple[int, ...]]:
    return dict(zip(TOWERS, placed))


def _curves(
    placed: Sequence[Placement], draws: int, seed: int
) -> Iterator[tuple[dict[str, int], dict[str, Array]]]:
    """Yield the depth of each tower and its curves, (block, draw), scaled as scores are."""
    depths = {tower: depth for tower, depth in deepest(placed).items() if depth}
    most = max(depths.values())
    generator = np.random.default_rng(seed)
    for shape, common in product(("unordered", "wandering", "trending"), (False, True)):
        drawn = generator.standard_normal((len(depths), most, draws))
        if common:  # as of an agreement, which is of both blocks of a pair
            drawn[:] = drawn[0]
        if shape != "unordered":
            drawn = drawn.cumsum(1)
        if shape == "trending":
            drawn += np.arange(most)[:, None] * generator.standard_normal(draws)
        curves = {}
        for (tower, depth), curve in zip(depths.items(), drawn):
            curve = curve[[partner_block(b, depth, most) - 1 for b in range(1, depth + 1)]]
            curve = curve - curve.min(0)
            curves[tower] = curve / np.maximum(curve.max(0), ROUNDING)
        yield depths, curves
