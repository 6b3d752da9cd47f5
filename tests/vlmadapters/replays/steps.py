"""Replay a variant of a recorded run step by step: the quantities that most files share.

The run is replayed without savings and in double precision: rounding grows from step to step, and
the record's own uses up a part of what is tolerated. The first step is replayed as users run it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from golden import TOLERANCES, Check, Recording, largest, relative
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn

from vlmadapters.clip.frozen import Backbone
from vlmadapters.clip.savings import Savings
from vlmadapters.clip.walk import State
from vlmadapters.data.task import Task
from vlmadapters.methods import METHODS
from vlmadapters.methods.base import Step
from vlmadapters.methods.config import MethodConfig
from vlmadapters.training.optimization import new_optimizer, set_rate
from vlmadapters.training.recipes import TrainConfig

SAVED = 1e-4


def tasks(variant: Mapping[str, Any], **known: Any) -> tuple[Task, Task]:
    """Return the task of a variant's base and of its novel classes."""
    base, novel = tuple(variant["classes"]), tuple(variant["novel_classes"])
    return Task(base, other_names=novel, **known), Task(novel, other_names=base, **known)


@dataclass(eq=False)
class Variant:
    """One variant of a recorded run.

    Attributes:
        recording: The file.
        name: The variant.
        config: Its settings.
        base: The task trained on.
        novel: The task of the other classes.
        parts: Our names of loss parts to the recorded ones.
        draws: Step, from 0, to the recorded draws.
        max_norm: Norm to which gradients are clipped; 0 clips nothing.
    """

    recording: Recording
    name: str
    config: MethodConfig
    base: Task
    novel: Task
    parts: Mapping[str, str] | None = None
    draws: Callable[[int], Mapping[str, Tensor]] | None = None
    max_norm: float = 0.0

    def checks(self) -> Iterator[Check]:
        """Yield the checks of the variant."""
        saved = _Run(self, Savings(), torch.float32)
        logits = largest(saved.logits(self.base), self.recorded("eval_logits"))
        yield Check(self.name, "logits, savings", logits, SAVED)
        saved.loss(0).backward()
        yield Check(self.name, "gradients, savings", self._gradients(saved), SAVED)
        run = _Run(self, Savings.none(), torch.float64)
        yield self._logits("logits", run, "eval_logits", self.base)
        yield self._check("loss parts", self._parts(run))
        losses = []
        for number in range(len(self.recording.tensor("labels"))):
            losses.append(run.backward(number))
            if not number:
                yield self._check("gradients", self._gradients(run))
            run.update()
        yield self._check("losses", largest(torch.stack(losses), self.recorded("losses")))
        final, own = self.recording.group(f"{self.name}/final/"), run.method.official_state_dict()
        yield self._check("final parameters", max(largest(own[k], v) for k, v in final.items()))
        yield self._logits("final logits", run, "final_eval_logits", self.base)
        novel = largest(run.logits(self.novel), self.recorded("final_novel_logits"))
        yield Check(self.name, "novel logits", novel, TOLERANCES["final logits"])

    def recorded(self, key: str) -> Tensor:
        """Return a recorded array of the variant."""
        return self.recording.tensor(f"{self.name}/{key}")

    def _check(self, quantity: str, difference: float) -> Check:
        return Check(self.name, quantity, difference, TOLERANCES[quantity])

    def _logits(self, quantity: str, run: _Run, key: str, task: Task) -> Check:
        return self._check(quantity, largest(run.logits(task), self.recorded(key)))

    def _parts(self, run: _Run) -> float:
        names = self.parts or {"cross_entropy": "ce"}
        found = {names[key]: value for key, value in run.method.loss_parts(run.step(0)).items()}
        recorded = self.recording.group(f"{self.name}/loss_parts/")
        assert found.keys() == recorded.keys()
        return max(largest(found[key], value) for key, value in recorded.items())

    def _gradients(self, run: _Run) -> float:
        recorded = self.recording.group(f"{self.name}/grad/")
        own = {key: value.grad for key, value in run.method.named_official_parameters()}
        assert own.keys() == recorded.keys()
        return max(relative(own[key], value) for key, value in recorded.items())


class _Run:
    """The method of a variant on the recorded backbone, from the recorded start on."""

    def __init__(self, variant: Variant, savings: Savings, kind: torch.dtype) -> None:
        self.variant, self.kind = variant, kind
        clip = deepcopy(variant.recording.clip).to(kind)
        self.backbone = Backbone(clip, savings, SimpleTokenizer())
        info = variant.recording.info["variants"][variant.name]
        made = METHODS[variant.config.name].build(variant.config, self.backbone, variant.base)
        self.method = made.to(kind)
        self.method.load_official_state_dict(variant.recording.group(f"{variant.name}/init/"))
        self.classes = self.method.prepare(self.backbone, variant.base)
        self.optimizer = self._optimizer(info["optimizer"])

    def _optimizer(self, values: Mapping[str, Any]) -> torch.optim.Optimizer:
        assert values["name"] == "sgd"
        named = {key: values[key] for key in ("lr", "momentum", "weight_decay")}
        optimizer = new_optimizer(self.method.parameter_groups(), TrainConfig(**named))
        for group in optimizer.param_groups:
            group |= {key: values[key] for key in ("dampening", "nesterov")}
        set_rate(optimizer, values["lr"], False)
        return optimizer

    @torch.no_grad()
    def logits(self, task: Task) -> Tensor:
        """Return logits of the test images, (image, class)."""
        method, backbone = self.method.eval(), self.backbone
        texts = method.class_features(backbone, method.prepare(backbone, task))
        features = method.image_features(backbone, self._images("eval_images"))
        return method.logits(backbone, features, texts)

    def step(self, number: int) -> Step:
        """Return what a step sees, from 0."""
        draws = self.variant.draws
        return Step(
            self.backbone,
            self._images("images", number),
            self.variant.recording.tensor("labels")[number],
            self.classes,
            torch.Generator().manual_seed(number),
            draws=draws(number) if draws else None,
        )

    def loss(self, number: int) -> Tensor:
        """Return the loss of a step."""
        return self.method.train().loss(self.step(number))

    def backward(self, number: int) -> Tensor:
        """Compute the gradients of a step and return its loss."""
        self.optimizer.zero_grad()
        loss = self.loss(number)
        loss.backward()
        return loss.detach().double()

    def update(self) -> None:
        """Make the step."""
        if self.variant.max_norm:
            nn.utils.clip_grad_norm_(self.method.parameters(), self.variant.max_norm)
        self.optimizer.step()
        self.method.touch()

    def _images(self, key: str, *index: int) -> State:
        return self.variant.recording.images(self.backbone, self.method, key, *index)
