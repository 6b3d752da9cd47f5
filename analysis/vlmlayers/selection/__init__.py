"""From the score table to the layers to adapt, and to a predicted quality of any placement."""

from __future__ import annotations

from vlmlayers.placement import describe_blocks, parse_blocks
from vlmlayers.selection.choice import LayerChoice
from vlmlayers.selection.chooser import make_rule, select
from vlmlayers.selection.predict import (
    BLOCK_SCORES,
    PLACEMENT_SCORES,
    available_scores,
    block_scores,
    placement_score,
    predict,
)
from vlmlayers.selection.rules import RULES, Pick, fit_knee, paper_blocks

__all__ = [
    "BLOCK_SCORES",
    "PLACEMENT_SCORES",
    "RULES",
    "LayerChoice",
    "Pick",
    "available_scores",
    "block_scores",
    "describe_blocks",
    "fit_knee",
    "make_rule",
    "paper_blocks",
    "parse_blocks",
    "placement_score",
    "predict",
    "select",
]
