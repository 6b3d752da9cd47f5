"""Recorded runs of methods that learn context: CoOp, CoCoOp, KgCoOp, ProDA.

They run without savings: against double precision some records are off by 6e-6 after two steps
themselves, and arithmetic that rounds in another order would use up what is left of the tolerance.
The first step is replayed with all savings too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from golden import TOLERANCES, Check, Recording, largest, relative
from torch import Tensor
from torch.nn import functional as F

from vlmadapters.clip.frozen import Backbone
from vlmadapters.clip.savings import Savings
from vlmadapters.clip.walk import State
from vlmadapters.data.task import Task
from vlmadapters.methods import METHODS
from vlmadapters.methods.base import Method, Step
from vlmadapters.methods.proda import ProDA
from vlmadapters.training.optimization import learning_rate, new_optimizer, set_rate
from vlmadapters.training.recipes import TrainConfig

# Our names of the parts of a loss to those of the files.
PARTS = {"cross_entropy": "cross_entropy", "distance": "score", "overlap": "loss_m"}
# Features of class prompts, as `class_features` gives them, under the names of the files.
FEATURES = ("eval/text_features", "eval/text_features_mean")
ALLOWED = TOLERANCES | {
    "logits, savings": 1e-4,
    "gradients, savings": 1e-4,
    "initial words": 1e-7,
    "features": 1e-5,
    "hand-made": 1e-5,
    "rates": 1e-9,
    "novel logits": 1e-4,
}


def replay(recording: Recording) -> Iterator[Check]:
    """Yield the checks of a file."""
    for variant, told in recording.info["variants"].items():
        found: dict[str, list[float]] = {}
        saved = Replay(recording, variant, told, Savings()).first_step()
        plain = Replay(recording, variant, told, Savings.none()).differences()
        for quantity, difference in (*saved, *plain):
            found.setdefault(quantity, []).append(difference)
        for quantity, differences in found.items():
            yield Check(variant, quantity, float(np.max(differences)), ALLOWED[quantity])


class Replay:
    """One variant of a file, run by the product's own code."""

    def __init__(
        self, recording: Recording, variant: str, told: Mapping[str, Any], savings: Savings
    ) -> None:
        self.recording, self.variant, self.told = recording, variant, told
        self.backbone: Backbone = recording.backbone(savings)
        kind = METHODS[recording.info["method"]]
        self.task = task_of(told, told["classes"])
        config = kind.Config.from_dict(SETTINGS[kind.Config.name](told))
        self.method: Method = kind.build(config, self.backbone, self.task, seed=told["seed"])

    def __contains__(self, key: str) -> bool:
        return f"{self.variant}/{key}" in self.recording

    def tensor(self, key: str) -> Tensor:
        return self.recording.tensor(f"{self.variant}/{key}")

    def state(self, key: str) -> dict[str, Tensor]:
        """Return recorded parameters or gradients."""
        found = self.recording.group(f"{self.variant}/{key}/")
        return {name: found[name] for name in self.told["learnable"]}

    def first_step(self) -> Iterator[tuple[str, float]]:
        """Yield quantities of the first step alone, and how far they are from the record."""
        self.method.load_official_state_dict(self.state("init"))
        logits = largest(self.logits(self.task), self.tensor("eval/logits"))
        yield "logits, savings", logits
        with torch.no_grad():
            classes = self.method.prepare(self.backbone, self.task)
        self.method.train().loss(self.step(0, classes)).backward()
        yield "gradients, savings", self.gradients()

    def differences(self) -> Iterator[tuple[str, float]]:
        """Yield quantities and how far they are from the record."""
        if self.told.get("ctx_init"):
            drawn, init = self.method.official_state_dict()["ctx"], self.state("init")["ctx"]
            yield "initial words", largest(drawn, init)
        self.method.load_official_state_dict(self.state("init"))
        yield "logits", largest(self.logits(self.task), self.tensor("eval/logits"))
        with torch.no_grad():
            yield from self.features()
        yield from self.training()
        for key, value in self.state("final").items():
            yield "final parameters", relative(self.method.official_state_dict()[key], value)
        yield "final logits", largest(self.logits(self.task), self.tensor("final/eval_logits"))
        if self.told.get("novel_classes"):
            novel = task_of(self.told, self.told["novel_classes"])
            yield "novel logits", largest(self.logits(novel), self.tensor("novel/eval_logits"))

    @torch.no_grad()
    def logits(self, task: Task) -> Tensor:
        """Return logits of the first images among the classes of a task."""
        method, backbone = self.method.eval(), self.backbone
        classes = method.class_features(backbone, method.prepare(backbone, task))
        images = method.image_features(backbone, self.images(0))
        return method.logits(backbone, images, classes)

    def features(self) -> Iterator[tuple[str, float]]:
        """Compare features of class prompts."""
        texts = self.method.prepare(self.backbone, self.task)
        for key in FEATURES:
            if key in self:
                found = self.method.class_features(self.backbone, texts)
                yield "features", largest(found, self.tensor(key))
        if "anchor_text_features" in self:
            found = F.normalize(texts.hand_made, dim=-1)
            yield "hand-made", largest(found, self.tensor("anchor_text_features"))
        if "nc_text_features" in self:
            found = self.method.bare_features(self.backbone, texts)
            expected = F.normalize(self.tensor("nc_text_features"), dim=-1)
            yield "features", largest(found, expected)

    def images(self, number: int, size: int | None = None) -> State:
        """Return the state of the images of a step."""
        index = number, slice(size)
        return self.recording.images(self.backbone, self.method, "images", *index)

    def training(self) -> Iterator[tuple[str, float]]:
        """Train for the recorded steps."""
        train, steps = train_config(self.told), self.told["steps"]
        optimizer = new_optimizer(self.method.train().parameter_groups(), train)
        classes = self.method.prepare(self.backbone, self.task)
        for number in range(steps):
            rate = learning_rate(train, number, train.epochs, number, steps)
            set_rate(optimizer, rate, number < train.warmup_epochs)
            yield "rates", abs(rate / float(self.tensor("lrs")[number]) - 1)
            step = self.step(number, classes)
            parts = self.method.loss_parts(step)
            loss = self.method.loss(step)
            yield "losses", abs(loss.item() - float(self.tensor("losses")[number]))
            entropy = float(self.tensor("cross_entropies")[number])
            yield "losses", abs(parts["cross_entropy"].item() - entropy)
            optimizer.zero_grad()
            loss.backward()
            if not number:
                yield "logits", largest(self.train_logits(step), self.tensor("train/logits"))
                for name, part in parts.items():
                    recorded = float(self.tensor(f"parts/{PARTS[name]}"))
                    yield "loss parts", abs(part.item() - recorded)
                yield "gradients", self.gradients()
            optimizer.step()
            self.method.touch()

    def step(self, number: int, classes: Any) -> Step:
        """Return what a step sees, counted from 0."""
        size = self.told["batch_size"]
        return Step(
            self.backbone,
            self.images(number, size),
            self.recording.tensor("labels")[number, :size],
            classes,
            torch.Generator().manual_seed(number),
            number=number,
            draws=self.draws(number),
        )

    def draws(self, number: int) -> dict[str, Tensor] | None:
        """Return what the record drew in a step."""
        return {"prompts": self.tensor("prompt_idx")[number]} if "prompt_idx" in self else None

    @torch.no_grad()
    def train_logits(self, step: Step) -> Tensor:
        """Return what enters the cross-entropy of a step."""
        images, method = self.method.image_features(self.backbone, step.images), self.method
        if isinstance(method, ProDA):
            count = torch.arange(method.config.prompts)
            numbers = step.draws["prompts"] if step.draws is not None else count
            prompts = method.prompt_features(self.backbone, step.classes, numbers)
            return method.bounded_logits(self.backbone, images, prompts, step.labels)
        classes = method.class_features(self.backbone, step.classes)
        return method.logits(self.backbone, images, classes)

    def gradients(self) -> float:
        """Compare the gradients of the first step."""
        found = dict(self.method.named_official_parameters())
        return max(relative(found[k].grad, value) for k, value in self.state("grad").items())


def task_of(told: Mapping[str, Any], names: list[str]) -> Task:
    """Return the task of telling classes apart, with the template of the hand-made prompts."""
    if "anchor_prompts" not in told:
        return Task(tuple(names))
    name, prompt = told["classes"][0].replace("_", " "), told["anchor_prompts"][0]
    return Task(tuple(names), own_template=prompt.replace(name, "{}"))


def train_config(told: Mapping[str, Any]) -> TrainConfig:
    """Return the recorded optimizer as a recipe; with a schedule every step is an epoch."""
    optim, scheduled = told["optim"], told.get("epoch_per_step", False)
    return TrainConfig(
        optimizer=optim["name"],
        lr=optim["lr"],
        momentum=optim["momentum"],
        weight_decay=optim["weight_decay"],
        schedule="epoch" if scheduled else "constant",
        epochs=optim.get("max_epoch", told["steps"]),
        warmup_epochs=optim.get("warmup_epoch", 0),
        warmup_lr=optim.get("warmup_cons_lr", 1e-5),
    )


def words_of(told: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of words; KgCoOp's flag stands for the common ones."""
    words = told.get("ctx_init") or ""
    if words is True:
        words = "a photo of a"
    return {"words": words, "length": 0 if words else told["n_ctx"]}


def coop(told: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **words_of(told),
        "class_specific": told.get("csc", False),
        "class_at": told.get("class_token_position", "end"),
        "as_published": True,
    }


def kgcoop(told: Mapping[str, Any]) -> dict[str, Any]:
    return {**coop(told), "weight": told["w"]}


def proda(told: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "prompts": told["n_prompt"],
        "group": told["prompt_bs"],
        "length": told["n_ctx"],
        "weight": told["alpha"],
        "as_published": True,
    }


SETTINGS = {"coop": coop, "cocoop": words_of, "kgcoop": kgcoop, "proda": proda}
