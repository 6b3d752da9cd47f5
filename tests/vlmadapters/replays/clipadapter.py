"""Replay of recorded runs of CLIP-Adapter."""

from __future__ import annotations

from collections.abc import Iterator

from golden import Check, Recording
from replays.runs import MAIN, Run

from vlmadapters.data.task import Task
from vlmadapters.methods.configs import CLIPAdapterConfig
from vlmadapters.training.recipes import TrainConfig


def replay(recording: Recording) -> Iterator[Check]:
    """Yield the checks of a file."""
    hyper = recording.info["hyper"]
    task = Task(tuple(recording.info["classes"]), own_template=recording.info["template"])
    train = TrainConfig(
        lr=hyper["lr"],
        momentum=hyper["momentum"],
        weight_decay=hyper["weight_decay"],
        epochs=hyper["max_epoch"],
    )
    config = CLIPAdapterConfig(ratio=hyper["ratio"], reduction=hyper["reduction"])
    yield from Run(recording, MAIN, config, task, train, recording.group("init/")).checks()
