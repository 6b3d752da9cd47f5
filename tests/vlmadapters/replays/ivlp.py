"""Replay of recorded runs of IVLP and of its vision-only and text-only controls."""

from __future__ import annotations

from collections.abc import Iterator

from golden import Check, Recording
from replays.steps import Variant, tasks

from vlmadapters.methods.configs import IVLPConfig


def replay(recording: Recording) -> Iterator[Check]:
    """Yield the checks of a file."""
    for name, variant in recording.info["variants"].items():
        hyper = variant["hyper"]
        length = hyper.get("N_CTX_TEXT", 0)
        config = IVLPConfig(
            tuple(range(1, hyper["PROMPT_DEPTH_VISION"] + 1)),
            tuple(range(1, hyper.get("PROMPT_DEPTH_TEXT", 0) + 1)),
            vision_length=hyper["N_CTX_VISION"] or 1,
            text_length=length or 1,
            words=hyper["CTX_INIT"] if length <= 4 else "",
        )
        yield from Variant(recording, name, config, *tasks(variant)).checks()
