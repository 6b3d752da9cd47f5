"""Scores: the protocol that turns features and metrics into one tidy table."""

from __future__ import annotations

from vlmlayers.scores.options import ScoreOptions
from vlmlayers.scores.run import score
from vlmlayers.scores.schema import (
    CONTRACT_COLUMNS,
    EXTRA_COLUMNS,
    SCORE_COLUMNS,
    read_scores,
    refusals,
    score_cost,
    score_frame,
    score_matrix,
    write_scores,
)
from vlmlayers.scores.streamed import score_streaming
from vlmlayers.scores.summaries import overview, stated_options

__all__ = [
    "CONTRACT_COLUMNS",
    "EXTRA_COLUMNS",
    "SCORE_COLUMNS",
    "ScoreOptions",
    "overview",
    "read_scores",
    "refusals",
    "score",
    "score_cost",
    "score_frame",
    "score_matrix",
    "score_streaming",
    "stated_options",
    "write_scores",
]
