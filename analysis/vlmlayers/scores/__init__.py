"""Scores: the protocol that turns features and metrics into one tidy table."""

from __future__ import annotations

from typing import Any

from vlmlayers.scores.protocol import Protocol
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
    stated_options,
    write_scores,
)

__all__ = [
    "CONTRACT_COLUMNS",
    "EXTRA_COLUMNS",
    "SCORE_COLUMNS",
    "Protocol",
    "read_scores",
    "refusals",
    "score",
    "score_cost",
    "score_frame",
    "score_matrix",
    "stated_options",
    "write_scores",
]


def __getattr__(name: str) -> Any:
    """Return `score_streaming`: it builds on the modules here, so it cannot come first."""
    if name == "score_streaming":
        from vlmlayers.streaming import score_streaming

        return score_streaming
    raise AttributeError(f"module 'vlmlayers.scores' has no attribute {name!r}")
