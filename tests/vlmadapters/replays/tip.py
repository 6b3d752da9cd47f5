"""Replay of recorded runs of Tip-Adapter and Tip-Adapter-F.

Logits are 100 times a cosine. The recorded features lie 3e-7 from those in double precision, and so
logits lie 2e-5 apart before the method has done anything. What the method computes is therefore
compared from the recorded features on, and what it computes of images beside it.

The record chooses the epoch of Tip-Adapter-F by test accuracy, which the product does not; here
the choice is made outside of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from golden import TOLERANCES, Check, Recording, largest, relative
from torch import Tensor
from torch.nn import functional as F

from vlmadapters.clip.savings import Savings
from vlmadapters.data.task import Task
from vlmadapters.methods.base import FitData, Step
from vlmadapters.methods.head_configs import TipConfig, TipFConfig
from vlmadapters.methods.tip import Tip, TipF
from vlmadapters.training.optimization import learning_rate, new_optimizer, set_rate
from vlmadapters.training.recipes import load_recipe

FEATURES = 1e-6
LOGITS = 2e-5  # as the files say of their scale
EXACT = 1e-12


def replay(recording: Recording) -> Iterator[Check]:
    """Yield the checks of a file."""
    yield from _Untrained(recording).checks()
    yield from _Trained(recording).checks()


class _Run:
    """One of the two methods on the recorded backbone, with its cache filled."""

    name: str
    kind: type[Tip]
    config: type[TipConfig]

    def __init__(self, recording: Recording) -> None:
        self.recording, self.backbone = recording, recording.backbone(Savings.none())
        hyper, info = recording.info["hyper"], recording.info
        (beta_end, alpha_end), (beta_steps, alpha_steps) = (
            hyper["search_scale"],
            hyper["search_step"],
        )
        config = self.config(
            alpha=hyper["init_alpha"],
            beta=hyper["init_beta"],
            views=info["augment_epoch"],
            templates=tuple(info["templates"]),
            alpha_end=alpha_end,
            beta_end=beta_end,
            alpha_steps=alpha_steps,
            beta_steps=beta_steps,
        )
        task = Task(tuple(info["classes"]))
        self.method = self.kind.build(config, self.backbone, task)
        self.classes = self.method.prepare(self.backbone, task)
        self.data = FitData(
            self.backbone,
            self.classes,
            recording.tensor("cache_labels"),
            lambda view: self.features("cache_images", view),
        )
        self.method.fit(self.data)

    def features(self, key: str, *index: Any) -> Tensor:
        """Return features of recorded images."""
        state = self.recording.images(self.backbone, self.method, key, *index)
        return self.method.image_features(self.backbone, state)

    @torch.no_grad()
    def logits(self, split: str) -> Tensor:
        """Return logits of the recorded features."""
        features = self.recording.tensor(f"{split}_features")
        return self.method.logits(self.backbone, features, self.classes)

    def frozen(self) -> Iterator[Check]:
        """Compare what is computed of images and texts, and go on from what is recorded of them."""
        recording, weights = self.recording, self.recording.tensor("clip_weights").T
        yield self.compare("keys", "cache_keys", self.method.keys.T, FEATURES)
        for split in ("val", "test"):
            found = F.normalize(self.features(f"{split}_images"), dim=-1)
            yield self.compare(f"{split} features", f"{split}_features", found, FEATURES)
        if recording.has_texts:
            yield self.compare("class features", "clip_weights", self.classes.weights.T, FEATURES)
        self.classes = replace(self.classes, weights=weights)
        self.method.fill(recording.tensor("cache_keys").T, recording.tensor("cache_labels"))

    def compare(self, quantity: str, key: str, found: Tensor, within: float | None = None) -> Check:
        within = TOLERANCES[quantity] if within is None else within
        difference = largest(found, self.recording.tensor(key))
        return Check(self.name, quantity, difference, within)

    def searched(self, prefix: str) -> Check:
        """Search on the validation images and compare the accuracies of all pairs."""
        labels = self.recording.tensor("val_labels")
        features = self.recording.tensor("val_features")
        hits = self.method.search(features, labels, self.classes)
        accuracy = torch.from_numpy(100 * hits / len(labels))
        difference = largest(accuracy, self.recording.tensor(f"{prefix}/search_accuracy"))
        return Check(self.name, "search", difference, EXACT)


class _Untrained(_Run):
    name, kind, config = "tip", Tip, TipConfig

    def checks(self) -> Iterator[Check]:
        """Yield the checks of Tip-Adapter."""
        yield from self.frozen()
        yield self.compare("logits", "tip/val_logits", self.logits("val"), LOGITS)
        yield self.searched("tip")
        chosen = torch.stack([self.method.beta, self.method.alpha])
        best = relative(chosen, self.recording.tensor("tip/best_beta_alpha"))
        yield Check(self.name, "alpha and beta", best, 1e-6)
        yield self.compare("final logits", "tip/test_logits", self.logits("test"))
        self.method = self.kind.build(self.method.config, self.backbone, Task())
        for split in ("val", "test"):
            key = f"tip/{split}_zero_shot_logits"
            yield self.compare("zero-shot logits", key, self.logits(split), LOGITS)


class _Trained(_Run):
    name, kind, config = "tip-f", TipF, TipFConfig

    def checks(self) -> Iterator[Check]:
        """Yield the checks of Tip-Adapter-F."""
        yield from self.frozen()
        recording, index = self.recording, self.recording.tensor("train_index")
        epochs, batches = index.shape[:2]
        train = load_recipe("published", "tip-f").train
        train = replace(train, lr=recording.info["hyper"]["lr"], epochs=epochs)
        optimizer = new_optimizer(self.method.parameter_groups(), train)
        losses, rates, tested, keys = [], [], [], []
        for number in range(epochs * batches):
            epoch, batch = divmod(number, batches)
            rates.append(learning_rate(train, number, epochs * batches, batches))
            set_rate(optimizer, rates[-1], False)
            step = self._step(index[epoch, batch])
            if not number:
                with torch.no_grad():
                    images = self.method.image_features(self.backbone, step.images)
                    logits = self.method.logits(self.backbone, images, self.classes)
                key, within = "tipf/train_logits", TipConfig.own_scale * FEATURES
                yield self.compare("training logits", key, logits, within)
            optimizer.zero_grad()
            loss = self.method.loss(step)
            loss.backward()
            if not number:
                found = relative(self._gradient(), recording.tensor("tipf/grad"))
                yield Check(self.name, "gradients", found, TOLERANCES["gradients"])
            optimizer.step()
            losses.append(loss.detach().double())
            if not number:
                yield self._weight("tipf/weight_after_step_0")
            if batch == batches - 1:
                tested.append(self.logits("test"))
                keys.append(self.method.keys.detach().clone())
        yield self.compare("losses", "tipf/losses", torch.stack(losses))
        found = relative(torch.tensor(rates, dtype=torch.float64), recording.tensor("tipf/lrs"))
        yield Check(self.name, "rates", found, 1e-9)
        yield self._weight("tipf/final_weight")
        yield self.compare("final logits", "tipf/test_logits_per_epoch", torch.stack(tested))
        labels = recording.tensor("test_labels")
        right = [int((one.argmax(1) == labels).sum()) for one in tested]
        self.method.fill(keys[right.index(max(right))], self.method.labels)
        yield self.searched("tipf")
        key = "tipf/test_logits_after_search"
        within = TOLERANCES["final logits"]
        yield self.compare("searched logits", key, self.logits("test"), within)

    def _step(self, pairs: Tensor) -> Step:
        index = pairs[:, 0], pairs[:, 1]
        images = self.recording.images(self.backbone, self.method, "cache_images", *index)
        labels = self.recording.tensor("cache_labels")[pairs[:, 1]]
        return Step(self.backbone, images, labels, self.classes, torch.Generator())

    def _gradient(self) -> Tensor:
        gradient: Any = self.method.keys.grad
        assert isinstance(gradient, Tensor)
        return gradient

    def _weight(self, key: str) -> Check:
        return self.compare("parameters", key, self.method.keys, FEATURES)
