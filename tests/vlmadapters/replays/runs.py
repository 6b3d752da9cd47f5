"""Replay a recorded run with the product's own code and compare all that is recorded of it.

Records name their arrays in several ways: `KEY`, `NAME/KEY` or `variant/NAME/KEY`, and some keys
differ. A run is replayed without savings, whose rounding differs from the public code's and grows
from step to step; the first step is replayed with all of them too, as users run it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import chain
from typing import Any
from unittest.mock import patch

import torch
from golden import TOLERANCES, Check, Recording, largest, relative, worst
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from vlmadapters.clip.frozen import Backbone
from vlmadapters.clip.savings import Savings
from vlmadapters.data.task import Task
from vlmadapters.methods import METHODS
from vlmadapters.methods.base import Step
from vlmadapters.methods.config import MethodConfig
from vlmadapters.training.optimization import learning_rate, new_optimizer, set_rate
from vlmadapters.training.recipes import TrainConfig

MAIN = "main run"
ALLOWED = TOLERANCES | {
    "training logits": 1e-5,
    "last parameters": 1e-4,
    "novel logits": 1e-4,
    "logits, savings": 1e-4,
    "gradients, savings": 1e-4,
    "rates": 1e-9,  # relative
}
Differences = Iterator[tuple[str, float]]


def runs_of(recording: Recording) -> Iterator[tuple[str, str, dict[str, Any], dict[str, Tensor]]]:
    """Yield name, prefix of keys, settings and start of a main run, if recorded, and variants."""
    info = recording.info
    if "losses" in recording:
        yield MAIN, "", info["hyper"], recording.group("init/")
    for name, variant in info.get("variants", {}).items():
        own = f"variant_init/{name}/" if variant.get("own_init") else "init/"
        hyper = info["hyper"] | variant["hyper"]
        yield name, f"variant/{name}/", hyper, recording.group(own)


def sgd(values: Mapping[str, Any], **others: Any) -> TrainConfig:
    """Return a recorded optimizer as a recipe."""
    return TrainConfig(**{key: values[key] for key in ("lr", "momentum", "weight_decay")}, **others)


@dataclass(eq=False)
class Run:
    """One recorded run.

    Attributes:
        recording: The file.
        name: The run, for messages.
        prefix: What its keys start with.
        config: Its settings.
        task: The classes trained on.
        train: Optimizer and schedule.
        start: Parameters before the first step, by the authors' names; the run may use some only.
        novel: Classes tested after training, where they are recorded.
        parts: Our names of loss parts to the recorded ones, in the order of recorded columns.
        draws: Step, from 0, to the recorded draws.
        tolerances: Those that differ from `ALLOWED`.
        keys: Our names of arrays to the file's, where they differ.
        steps_per_epoch: Steps after which an epoch of it ends.
        batch: Images of a step; None for all that are recorded of it.
        seed: Seed of the initialisation.
        precision: What it is replayed in: rounding grows from step to step, and some records' own
            uses up a part of what is tolerated.
    """

    recording: Recording
    name: str
    prefix: str
    config: MethodConfig
    task: Task
    train: TrainConfig
    start: Mapping[str, Tensor]
    novel: Task | None = None
    parts: Mapping[str, str] = field(default_factory=dict)
    draws: Callable[[int], Mapping[str, Tensor] | None] = lambda number: None
    tolerances: Mapping[str, float] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    steps_per_epoch: int = 1
    batch: int | None = None
    seed: int = 0
    precision: torch.dtype = torch.float32

    def checks(self) -> Iterator[Check]:
        """Yield the largest difference of each quantity that is recorded."""
        found: dict[str, list[float]] = {}
        for quantity, difference in chain(self._saved(), self._plain()):
            found.setdefault(quantity, []).append(difference)
        allowed = ALLOWED | dict(self.tolerances)
        for quantity, differences in found.items():
            yield Check(self.name, quantity, worst(differences), allowed[quantity])

    def before(self, steps: Steps) -> Differences:
        """Yield what else is recorded before the start is loaded."""
        yield from ()

    def beside(self, steps: Steps) -> Differences:
        """Yield what else is recorded of the start."""
        yield from ()

    def __contains__(self, key: str) -> bool:
        return self.prefix + self.keys.get(key, key) in self.recording

    def recorded(self, key: str) -> Tensor:
        """Return an array of the run."""
        return self.recording.tensor(self.prefix + self.keys.get(key, key))

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Return the arrays of the run whose key starts with a prefix, by the rest of it."""
        return self.recording.group(self.prefix + prefix)

    def _saved(self) -> Differences:
        steps = Steps(self, Savings(), torch.float32)
        steps.load()
        if "eval_logits" in self:
            yield "logits, savings", largest(steps.logits(self.task), self.recorded("eval_logits"))
        steps.backward(0)
        yield "gradients, savings", self._gradients(steps)

    def _plain(self) -> Differences:
        steps = Steps(self, Savings.none(), self.precision)
        yield from self.before(steps)
        steps.load()
        yield from self.beside(steps)
        if "eval_logits" in self:
            yield "logits", largest(steps.logits(self.task), self.recorded("eval_logits"))
        yield from self._training(steps)
        if self.group("final/"):
            yield "final parameters", self._parameters(steps, "final/")
        if "final_eval_logits" in self:
            found = steps.logits(self.task)
            yield "final logits", largest(found, self.recorded("final_eval_logits"))
        if self.novel is not None and "final_novel_logits" in self:
            found = steps.logits(self.novel)
            yield "novel logits", largest(found, self.recorded("final_novel_logits"))

    def _training(self, steps: Steps) -> Differences:
        losses, rates = [], []
        for number in range(len(self.recorded("losses"))):
            rates.append(steps.set_rate(number))
            losses.append(steps.backward(number))
            yield from self._parts(steps, number)
            if not number:
                yield "gradients", self._gradients(steps)
                if "train_logits" in self:
                    found = largest(steps.seen, self.recorded("train_logits"))
                    yield "training logits", found
            steps.update()
            epoch, left = divmod(number + 1, self.steps_per_epoch)
            if epoch == self.train.epochs and self.group("last/"):
                yield "last parameters", self._parameters(steps, "last/")
            if not left:
                steps.method.end_epoch(epoch, self.train.epochs)
        yield "losses", largest(torch.stack(losses), self.recorded("losses"))
        if "lrs" in self:
            found = torch.tensor(rates, dtype=torch.float64)
            yield "rates", relative(found, self.recorded("lrs"))

    def _parts(self, steps: Steps, number: int) -> Differences:
        """Compare the parts of a step's loss, recorded of each step or of the first alone."""
        if "cross_entropies" in self:
            recorded = self.recorded("cross_entropies")[number]
            yield "losses", largest(steps.parts["cross_entropy"].double(), recorded.double())
        assert steps.parts.keys() == self.parts.keys() or not self.parts
        for column, (name, key) in enumerate(self.parts.items()):
            part = steps.parts[name].double()
            if "loss_parts" in self:
                recorded = self.recorded("loss_parts")[number, column]
                yield "loss parts", largest(part * steps.method.loss_weights[name], recorded)
            elif not number:
                yield "loss parts", largest(part, self.recorded(key))

    def _parameters(self, steps: Steps, key: str) -> float:
        recorded, own = self.group(key), steps.method.official_state_dict()
        return worst(largest(value, recorded[name]) for name, value in own.items())

    def _gradients(self, steps: Steps) -> float:
        own = dict(steps.method.named_official_parameters())
        recorded = self.group("grad/")
        assert own.keys() == recorded.keys()
        return worst(relative(own[name].grad, value) for name, value in recorded.items())


class Steps:
    """The method of a run on the recorded backbone, from the recorded start on."""

    def __init__(self, run: Run, savings: Savings, precision: torch.dtype) -> None:
        self.run, self.precision = run, precision
        clip = deepcopy(run.recording.clip).to(precision)
        self.backbone = Backbone(clip, savings, SimpleTokenizer())
        kind = METHODS[run.config.name]
        self.method = kind.build(run.config, self.backbone, run.task, run.seed).to(precision)
        self.classes = self.method.prepare(self.backbone, run.task)
        self.optimizer = new_optimizer(self.method.parameter_groups(), run.train)
        self.seen = torch.empty(0)
        self.parts: dict[str, Tensor] = {}

    def load(self) -> None:
        """Load the recorded start."""
        trained = self.run.group("grad/")
        self.method.load_official_state_dict({key: self.run.start[key] for key in trained})

    @torch.no_grad()
    def logits(self, task: Task) -> Tensor:
        """Return logits of the test images, (image, class)."""
        method, backbone, recording = self.method.eval(), self.backbone, self.run.recording
        texts = method.class_features(backbone, method.prepare(backbone, task))
        # Files with names of their own for logits test on the images of the first step.
        place = ("images", 0) if "eval_logits" in self.run.keys else ("eval_images",)
        images = recording.images(backbone, method, *place)
        return method.logits(backbone, method.image_features(backbone, images), texts)

    def step(self, number: int) -> Step:
        """Return what a step sees, from 0."""
        recording, index = self.run.recording, (number, slice(self.run.batch))
        return Step(
            self.backbone,
            recording.images(self.backbone, self.method, "images", *index),
            recording.tensor("labels")[index],
            self.classes,
            torch.Generator().manual_seed(number),
            number=number,
            draws=self.run.draws(number),
        )

    def set_rate(self, number: int) -> float:
        """Set and return the learning rate of a step."""
        train, per_epoch = self.run.train, self.run.steps_per_epoch
        rate = learning_rate(train, number, train.epochs * per_epoch, per_epoch)
        set_rate(self.optimizer, rate, number // per_epoch < train.warmup_epochs)
        return rate

    def backward(self, number: int) -> Tensor:
        """Compute the gradients of a step; return its loss, and keep its parts and logits."""
        self.optimizer.zero_grad()
        with patch.object(F, "cross_entropy", wraps=F.cross_entropy) as entropy:
            parts = self.method.train().loss_parts(self.step(number))
        self.seen = entropy.call_args_list[0].args[0].detach()
        weights = self.method.loss_weights
        loss = torch.stack([weights[key] * value for key, value in parts.items()]).sum()
        loss.backward()
        self.parts = {key: value.detach() for key, value in parts.items()}
        return loss.detach().double()

    def update(self) -> None:
        """Make the step."""
        if self.run.train.max_norm:
            nn.utils.clip_grad_norm_(self.method.parameters(), self.run.train.max_norm)
        self.optimizer.step()
        self.method.touch()
