"""Predictions of trained methods and of the plain backbone on test images, several at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmadapters.clip.frozen import Backbone
from vlmadapters.clip.walk import State
from vlmadapters.data.images import Images
from vlmadapters.data.task import Task
from vlmadapters.device import precision_of
from vlmadapters.methods.base import Method
from vlmadapters.training import processes
from vlmadapters.training.trainer import Diverged
from vlmlayers.manifests import Item
from vlmlayers.metrics.checks import Labels
from vlmlayers.models.devices import memory_errors, placed, resolve_precision
from vlmlayers.models.modes import at_rest
from vlmlayers.progress import track

LABEL, LOG_LIKELIHOOD, FINITE = range(3)  # rows of what a batch is copied back as


@dataclass(frozen=True, eq=False)
class Answers:
    """A method's predictions of some items.

    Attributes:
        labels: (item,) predicted label.
        log_likelihoods: (item,) logarithm of the probability of the right label.
    """

    labels: Labels
    log_likelihoods: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Case:
    """Something to evaluate: a method, and the classes to tell apart; `Method()` is zero-shot."""

    method: Method
    task: Task


class Evaluator:
    """Predicts classes of images; class features are kept until their method changes.

    Args:
        model: The model.
        backbone: Walks to share with a trainer; built here where absent.
        batch_size: Images at a time; None takes 100, or 500 on a GPU.
        precision: As in `TrainConfig`.
        progress: Show a bar.
    """

    def __init__(
        self,
        model: Any,
        backbone: Backbone | None = None,
        *,
        batch_size: int | None = None,
        precision: str = "auto",
        progress: bool = True,
    ) -> None:
        self.model = model
        self.backbone = backbone or Backbone(model.clip, tokenizer=model.tokenize)
        # 100 is the test batch of most public code; the size changes nothing but rounding.
        self.batch_size = batch_size or (500 if model.device.type == "cuda" else 100)
        self.progress = progress
        self.precision = resolve_precision(precision, model.device)
        self.autocast, _ = precision_of(self.precision, model.device)
        # Weak: a sweep's methods and what they made of its classes go when their cells are done.
        self._kept: WeakKeyDictionary[Method, dict[Task, tuple[int, Any]]] = WeakKeyDictionary()

    @torch.no_grad()
    def class_features(self, method: Method, task: Task) -> Any:
        """Return what the method's `logits` needs of the classes, such as (class, joint) features.

        It is kept under the method's version; an update of the method makes it stale.
        """
        kept = self._kept.setdefault(method, {})
        found = kept.get(task)
        if found is not None and found[0] == method.version:
            return found[1]
        with self.autocast():
            features = method.class_features(self.backbone, method.prepare(self.backbone, task))
        if self.backbone.savings.text_features:
            kept[task] = (method.version, features)
        return features

    def answers(
        self, images: Images, items: Sequence[Item], cases: Sequence[Case]
    ) -> list[Answers]:
        """Return what every case predicts of every item, labelled as the case's task has them.

        What is frozen below the first block that a method changes is computed once for all cases,
        and where that is the whole vision tower, for all later calls with the same items as well.
        Under `torchrun` every process predicts its share and gets the labels of all.

        Raises:
            Diverged: Answers are not finite.
            UserError: The device runs out of memory.
        """
        mine = processes.share(items)
        for case in cases:
            case.method.eval()

        def gathered(values: NDArray[Any]) -> NDArray[Any]:
            return processes.gathered(values, len(items), self.model.device)

        advice = f"lower the batch size of the test ({self.batch_size}) or use fewer classes"
        with memory_errors(self.model.device, advice), at_rest(self.backbone.clip):
            return [
                Answers(gathered(one[LABEL].astype(np.int64)), gathered(one[LOG_LIKELIHOOD]))
                for one in self._answers(images, mine, cases)
            ]

    @torch.no_grad()
    def _states(
        self, images: Images, items: Sequence[Item], starts: Sequence[int]
    ) -> Iterator[dict[int, State]]:
        """Yield the frozen states of each batch of images at the blocks asked for."""

        def batches() -> Iterable[Tensor]:
            return track(
                images.batches(items, self.batch_size),
                f"test {images.manifest.name}",
                total=math.ceil(len(items) / self.batch_size),
                unit="batch",
                show=self.progress,
            )

        if self.backbone.is_plain(starts):
            # With the batch size: products of another shape round differently, and a resumed run
            # has to give the same table.
            key = images, tuple(item.path for item in items), self.precision, self.batch_size
            with self.autocast():
                features = self.backbone.plain_features(key, batches)
            for part in features.split(self.batch_size) if len(items) else ():
                yield dict.fromkeys(starts, self.backbone.plain_state(part))
            return
        for batch in batches():
            with self.autocast():
                states = self.backbone.images(batch, starts)
            yield states

    @torch.no_grad()
    def _answers(
        self, images: Images, items: Sequence[Item], cases: Sequence[Case]
    ) -> NDArray[np.float64]:
        """Return what `_predicted` gives of all items, (case, 3, item)."""
        made: list[NDArray[np.float64]] = []
        texts = [self.class_features(case.method, case.task) for case in cases]
        truth = placed(torch.tensor([item.label for item in items]), self.model.device)
        starts = [case.method.first(self.backbone, "vision") for case in cases]
        states = self._states(images, items, starts)
        for batch, right in zip(states, truth.split(self.batch_size)):
            predicted = []
            for case, start, text in zip(cases, starts, texts):
                with self.autocast():
                    features = case.method.image_features(self.backbone, batch[start])
                    logits = case.method.logits(self.backbone, features, text).float()
                predicted.append(_predicted(logits, right))
            found = torch.stack(predicted).cpu().numpy()  # one copy, for which alone the host waits
            if not (finite := found[:, FINITE].all(axis=-1)).all():
                raise Diverged(
                    "the model gives logits that are not finite; try precision fp32, or train "
                    "with a lower lr or scale",
                    np.flatnonzero(~finite).tolist(),
                )
            made.append(found)
        # A process without a share still has to take part in the exchange of the answers.
        return np.concatenate(made, axis=-1) if made else np.zeros((len(cases), 3, 0))


def _predicted(logits: Tensor, right: Tensor) -> Tensor:
    """Return label, log-likelihood of the right one, and whether all logits are finite.

    Args:
        logits: (item, class).
        right: (item,) right labels.

    Returns:
        (3, item), in double precision, which holds labels exactly.
    """
    likelihood = logits.log_softmax(1).gather(1, right[:, None])[:, 0]
    return torch.stack([logits.argmax(1), likelihood.double(), logits.isfinite().all(1)])
