"""Replay of recorded runs of PromptSRC."""

from __future__ import annotations

from collections.abc import Iterator

from golden import Check, Recording
from replays.runs import Run, runs_of

from vlmadapters.data.task import Task
from vlmadapters.methods.configs import PromptSRCConfig, blocks_to
from vlmadapters.training.recipes import TrainConfig

COLUMNS = ("cross_entropy", "text", "image", "logits")


def replay(recording: Recording) -> Iterator[Check]:
    """Yield the checks of a file."""
    info = recording.info
    for name, hyper, start in runs_of(recording):
        train = TrainConfig(
            lr=hyper["lr"],
            momentum=hyper["momentum"],
            weight_decay=hyper["weight_decay"],
            epochs=hyper["max_epoch"],
            warmup_epochs=hyper["warmup_epoch"],
            warmup_lr=hyper["warmup_lr"],
        )
        length = hyper["n_ctx_text"]
        config = PromptSRCConfig(
            blocks_to(hyper["depth_vision"]),
            blocks_to(hyper["depth_text"]),
            vision_length=hyper["n_ctx_vision"] or 1,
            text_length=length,
            words=hyper["ctx_init"] if length <= 4 else "",
            text_weight=hyper["text_loss_weight"],
            image_weight=hyper["image_loss_weight"],
            templates=tuple(info["templates"]),
            centre=hyper["gpa_mean"],
            spread=hyper["gpa_std"],
        )
        task = Task(tuple(info["classes"]))
        steps = info["steps_per_epoch"]
        run = Run(recording, name, config, task, train, start, steps, COLUMNS)
        yield from run.checks()
