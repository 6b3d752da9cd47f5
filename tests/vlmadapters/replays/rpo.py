"""Replay of recorded runs of RPO."""

from __future__ import annotations

from collections.abc import Iterator

from golden import Check, Recording
from replays.steps import Variant, tasks

from vlmadapters.methods.configs import RPOConfig


def replay(recording: Recording) -> Iterator[Check]:
    """Yield the checks of a file."""
    towers = recording.info["model_cfg"]
    depths = {name: towers[f"{name}_cfg"]["layers"] for name in ("vision", "text")}
    for name, variant in recording.info["variants"].items():
        hyper = variant["hyper"]
        config = RPOConfig.published(depths, pairs=hyper["K"], as_published=True)
        template = hyper["PROMPT"].replace("_", "{}")
        yield from Variant(recording, name, config, *tasks(variant, template=template)).checks()
