"""Replay a file that holds one main run and variants of it: `KEY`, and `variant/NAME/KEY`.

The run is replayed without savings, whose rounding differs from the public code's and grows from
step to step; the first step is replayed with all of them too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from golden import TOLERANCES, Check, Recording, largest, relative
from torch import Tensor

from vlmadapters.clip.savings import Savings
from vlmadapters.clip.walk import State
from vlmadapters.data.task import Task
from vlmadapters.methods import METHODS
from vlmadapters.methods.base import Step
from vlmadapters.methods.config import MethodConfig
from vlmadapters.training.optimization import learning_rate, new_optimizer, set_rate
from vlmadapters.training.recipes import TrainConfig

MAIN = "main run"
SAVED = 1e-4
RATES = 1e-9  # relative


def runs_of(recording: Recording) -> Iterator[tuple[str, dict[str, Any], dict[str, Tensor]]]:
    """Yield name, settings and start of the main run, where it is recorded, and each variant."""
    info = recording.info
    if "losses" in recording:
        yield MAIN, info["hyper"], recording.group("init/")
    for name, told in info["variants"].items():
        own = f"variant_init/{name}/" if told.get("own_init") else "init/"
        yield name, info["hyper"] | told["hyper"], recording.group(own)


@dataclass(eq=False)
class Run:
    """One recorded run, the main one or a variant.

    Attributes:
        recording: The file.
        name: `MAIN`, or the name of the variant.
        config: Its settings.
        task: The classes.
        train: Optimizer and schedule.
        start: Parameters before the first step, by the authors' names; the run may use some only.
        steps_per_epoch: Steps after which an epoch of it ends.
        parts: Our names of the columns of `loss_parts`, where they are recorded.
        draws: Step, from 0, to the recorded draws.
        tolerances: Those that differ from `TOLERANCES`.
    """

    recording: Recording
    name: str
    config: MethodConfig
    task: Task
    train: TrainConfig
    start: Mapping[str, Tensor]
    steps_per_epoch: int = 1
    parts: Sequence[str] = ()
    draws: Callable[[int], Mapping[str, Tensor]] | None = None
    tolerances: Mapping[str, float] = field(default_factory=dict)

    def checks(self) -> Iterator[Check]:
        """Yield the checks of the run, of what is recorded of it."""
        saved = Steps(self, Savings())
        if self.has("eval_logits"):
            yield self._saved("logits", largest(saved.logits(), self.recorded("eval_logits")))
        saved.loss(0).backward()
        yield self._saved("gradients", self._gradients(saved))
        steps = Steps(self, Savings.none())
        if self.has("eval_logits"):
            yield self.check("logits", largest(steps.logits(), self.recorded("eval_logits")))
        yield from self._steps(steps)
        if self.recorded_group("final/"):
            yield self._parameters(steps, "final")
        if self.has("final_eval_logits"):
            found = largest(steps.logits(), self.recorded("final_eval_logits"))
            yield self.check("final logits", found)

    def _steps(self, steps: Steps) -> Iterator[Check]:
        losses, rates, parts = [], [], []
        for number in range(len(self.recorded("losses"))):
            rates.append(steps.set_rate(number))
            losses.append(steps.update(number))
            parts.append(steps.parts)
            if not number:
                assert steps.seen is not None
                found = largest(steps.seen, self.recorded("train_logits"))
                yield self.check("training logits", found)
                yield self.check("gradients", self._gradients(steps))
            epoch, left = divmod(number + 1, self.steps_per_epoch)
            if epoch == self.train.epochs and self.recorded_group("last/"):
                yield self._parameters(steps, "last")
            if not left:
                steps.method.end_epoch(epoch, self.train.epochs)
        if self.parts:
            weighed = [
                [p[key] * steps.method.loss_weights[key] for key in self.parts] for p in parts
            ]
            found = largest(torch.tensor(weighed, dtype=torch.float64), self.recorded("loss_parts"))
            yield self.check("loss parts", found)
        yield self.check("losses", largest(torch.stack(losses), self.recorded("losses")))
        rate = relative(torch.tensor(rates, dtype=torch.float64), self.recorded("lrs"))
        yield Check(self.name, "rates", rate, RATES)

    def has(self, key: str) -> bool:
        """Return whether an array of the run is recorded."""
        return self.prefix + key in self.recording

    def recorded(self, key: str) -> Tensor:
        """Return an array of the run."""
        return self.recording.tensor(self.prefix + key)

    def recorded_group(self, prefix: str) -> dict[str, Tensor]:
        """Return the arrays of the run whose key starts with a prefix, by the rest of it."""
        return self.recording.group(self.prefix + prefix)

    @property
    def prefix(self) -> str:
        """What the keys of the run start with."""
        return "" if self.name == MAIN else f"variant/{self.name}/"

    def check(self, quantity: str, difference: float) -> Check:
        """Return the check of a quantity at its tolerance."""
        known = quantity.removeprefix("training ")
        tolerance = self.tolerances.get(known, TOLERANCES[known])
        return Check(self.name, quantity, difference, tolerance)

    def _parameters(self, steps: Steps, key: str) -> Check:
        recorded, own = self.recorded_group(f"{key}/"), steps.method.official_state_dict()
        assert own.keys() == recorded.keys()
        found = max(largest(own[name], value) for name, value in recorded.items())
        return Check(self.name, f"{key} parameters", found, TOLERANCES["final parameters"])

    def _saved(self, quantity: str, difference: float) -> Check:
        tolerance = max(SAVED, self.tolerances.get(quantity, 0.0))
        return Check(self.name, f"{quantity}, savings", difference, tolerance)

    def _gradients(self, steps: Steps) -> float:
        recorded = self.recorded_group("grad/")
        own = {key: value.grad for key, value in steps.method.named_official_parameters()}
        assert own.keys() == recorded.keys()
        return max(relative(own[key], value) for key, value in recorded.items())


class Steps:
    """The method of a run on the recorded backbone, from the recorded start on."""

    def __init__(self, run: Run, savings: Savings) -> None:
        self.run, self.backbone = run, run.recording.backbone(savings)
        self.method = METHODS[run.config.name].build(run.config, self.backbone, run.task)
        self.method.load_official_state_dict({k: run.start[k] for k in run.recorded_group("grad/")})
        self.classes = self.method.prepare(self.backbone, run.task)
        self.optimizer = new_optimizer(self.method.parameter_groups(), run.train)
        self.seen: Tensor | None = None
        self.parts: dict[str, float] = {}
        self._logits = self.method.logits
        self.method.logits = self._see  # type: ignore[method-assign]

    def _see(self, *arguments: Any) -> Tensor:
        found = self._logits(*arguments)
        self.seen = found.detach()
        return found

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Return logits of the test images, (image, class)."""
        method, backbone = self.method.eval(), self.backbone
        texts = method.class_features(backbone, self.classes)
        images = self._images("eval_images")
        return method.logits(backbone, method.image_features(backbone, images), texts)

    def step(self, number: int) -> Step:
        """Return what a step sees, from 0."""
        recording, draws = self.run.recording, self.run.draws
        return Step(
            self.backbone,
            self._images("images", number),
            recording.tensor("labels")[number],
            self.classes,
            torch.Generator().manual_seed(number),
            draws=draws(number) if draws else None,
        )

    def loss(self, number: int) -> Tensor:
        """Return the loss of a step."""
        return self.method.train().loss(self.step(number))

    def set_rate(self, number: int) -> float:
        """Set and return the learning rate of a step."""
        train, per_epoch = self.run.train, self.run.steps_per_epoch
        epoch = number // per_epoch
        rate = learning_rate(train, epoch, train.epochs, number, train.epochs * per_epoch)
        set_rate(self.optimizer, rate, epoch < train.warmup_epochs)
        return rate

    def update(self, number: int) -> Tensor:
        """Make a step and return its loss."""
        self.optimizer.zero_grad()
        step = self.step(number)
        parts = self.method.train().loss_parts(step)
        self.parts = {key: float(value.detach()) for key, value in parts.items()}
        weights = self.method.loss_weights
        loss = torch.stack([weights[key] * value for key, value in parts.items()]).sum()
        loss.backward()
        self.optimizer.step()
        self.method.touch()
        return loss.detach().double()

    def _images(self, key: str, *index: int) -> State:
        return self.run.recording.images(self.backbone, self.method, key, *index)
