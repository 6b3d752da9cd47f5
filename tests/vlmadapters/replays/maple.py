"""Replay of recorded runs of MaPLe."""

from __future__ import annotations

from collections.abc import Iterator

from golden import Check, Recording
from replays.steps import Variant, tasks

from vlmadapters.methods.configs import MaPLeConfig


def replay(recording: Recording) -> Iterator[Check]:
    """Yield the checks of a file."""
    for name, variant in recording.info["variants"].items():
        hyper = variant["hyper"]
        blocks = tuple(range(1, hyper["PROMPT_DEPTH"] + 1))
        words = hyper["CTX_INIT"] if hyper["N_CTX"] <= 4 else ""
        config = MaPLeConfig(blocks, blocks, length=hyper["N_CTX"], words=words)
        yield from Variant(recording, name, config, *tasks(variant)).checks()
