"""Replay of recorded runs of LwEIB."""

from __future__ import annotations

from collections.abc import Iterator

from golden import Check, Recording
from replays.runs import MAIN, Run, runs_of

from vlmadapters.data.task import Task
from vlmadapters.methods.configs import LwEIBConfig
from vlmadapters.training.recipes import TrainConfig


def replay(recording: Recording) -> Iterator[Check]:
    """Yield the checks of a file."""
    info = recording.info
    described = tuple((name, tuple(texts)) for name, texts in info["descriptions"].items())
    for name, hyper, start in runs_of(recording):
        prefix = "" if name == MAIN else f"variant/{name}/"
        blocks = tuple(range(hyper["adapter_start"], hyper["adapter_end"] + 1))
        config = LwEIBConfig(
            blocks,
            blocks,
            alpha=hyper["adapter_scale"],
            factor=hyper["adapter_scale_factor"],
            negatives=max(hyper["neg_sampling_ratio"], -1),
        )
        train = TrainConfig(
            lr=hyper["lr"],
            momentum=hyper["momentum"],
            weight_decay=hyper["weight_decay"],
            epochs=hyper["max_epoch"],
        )
        task = Task(
            tuple(info["classes"]),
            template=f"{hyper['text_ctx_init']} {{}}.",
            descriptions=described,
        )
        run = Run(
            recording,
            name,
            config,
            task,
            train,
            start,
            draws=lambda step, prefix=prefix: recording.group(f"{prefix}draws/{step}/"),
        )
        yield from run.checks()
