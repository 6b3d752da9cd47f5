"""Accuracy of adapters and of the plain backbone on test images, several at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmadapters import parallel
from vlmadapters.config import MMAConfig
from vlmadapters.fewshot import class_prompts
from vlmadapters.frozen import Backbone
from vlmadapters.images import Images
from vlmadapters.mma import Adapter, scaled_cosines
from vlmadapters.train import precision_of
from vlmlayers.errors import UserError
from vlmlayers.manifests import Item
from vlmlayers.progress import track

Labels = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Case:
    """Something to evaluate: an adapter, or None for the backbone, and a prompt template."""

    adapter: Adapter | None
    template: str

    @property
    def config(self) -> MMAConfig | None:
        """Placement of the adapter, None for the backbone."""
        return None if self.adapter is None else self.adapter.config


class Evaluator:
    """Predicts classes of images; class features are kept until their adapter changes.

    Args:
        model: The model.
        backbone: Walks to share with a trainer; built here where absent.
        batch_size: Images at a time.
        precision: As in `TrainConfig`.
        progress: Show a bar.
    """

    def __init__(
        self,
        model: Any,
        backbone: Backbone | None = None,
        *,
        batch_size: int = 100,
        precision: str = "auto",
        progress: bool = True,
    ) -> None:
        self.model, self.backbone = model, backbone or Backbone(model.clip)
        self.batch_size, self.progress = batch_size, progress
        self.autocast, _ = precision_of(precision, model.device)
        self._plain: dict[tuple[str, ...], tuple[int, Tensor]] = {}
        # Weak: a sweep's adapters and what they made of its prompts go when their cells are done.
        self._adapted: WeakKeyDictionary[Adapter, dict[tuple[str, ...], tuple[int, Tensor]]]
        self._adapted = WeakKeyDictionary()

    @torch.no_grad()
    def text_features(self, adapter: Adapter | None, prompts: Sequence[str]) -> Tensor:
        """Return joint features of class prompts, (class, joint).

        They are kept under the adapter's version; an update of the adapter makes them stale.
        """
        texts = self._plain if adapter is None else self._adapted.setdefault(adapter, {})
        version = 0 if adapter is None else adapter.version
        kept = texts.get(tuple(prompts))
        if kept is not None and kept[0] == version:
            return kept[1]
        tokens = self.model.tokenizer(list(prompts)).to(self.model.device)
        config = None if adapter is None else adapter.config
        start = self.backbone.start(config, "text")
        with self.autocast():
            state = self.backbone.prompts(tokens, [start])[start]
            features = self.backbone.features("text", state, adapter)
        if self.backbone.savings.text_features:
            texts[tuple(prompts)] = (version, features)
        return features

    def predict(
        self,
        images: Images,
        items: Sequence[Item],
        class_names: Sequence[str],
        cases: Sequence[Case],
    ) -> list[Labels]:
        """Return the predicted label of every item, one array (item,) per case.

        What is frozen below the first adapted block is computed once for all cases. Under
        `torchrun` every process predicts its share and gets the labels of all.

        Raises:
            UserError: A model gives features that are not numbers.
        """
        found: list[list[Labels]] = [[] for _ in cases]
        mine = parallel.share(items)
        total = math.ceil(len(mine) / self.batch_size)
        batches = track(
            images.batches(mine, self.batch_size),
            f"test {images.manifest.name}",
            total=total,
            unit="batch",
            show=self.progress,
        )
        texts = self._case_texts(class_names, cases)
        for batch in batches:
            for index, labels in enumerate(self._batch(batch, cases, texts)):
                found[index].append(labels)
        joined = [np.concatenate(parts) if parts else np.zeros(0, np.int64) for parts in found]
        return [parallel.gathered(labels, len(items), self.model.device) for labels in joined]

    def _case_texts(self, class_names: Sequence[str], cases: Sequence[Case]) -> list[Tensor]:
        return [
            self.text_features(case.adapter, class_prompts(class_names, case.template))
            for case in cases
        ]

    @torch.no_grad()
    def _batch(
        self, batch: Tensor, cases: Sequence[Case], texts: Sequence[Tensor]
    ) -> Iterator[Labels]:
        starts = [self.backbone.start(case.config, "vision") for case in cases]
        with self.autocast():
            states = self.backbone.images(batch, starts)
        plain: Tensor | None = None
        for case, start, text in zip(cases, starts, texts):
            with self.autocast():
                if case.adapter is not None:
                    features = self.backbone.features("vision", states[start], case.adapter)
                else:
                    if plain is None:
                        plain = self.backbone.features("vision", states[start], None)
                    features = plain
                logits = scaled_cosines(self.model.clip, features, text).float()
            if not bool(torch.isfinite(logits).all()):
                raise UserError(
                    "the model gives logits that are not finite; try precision fp32, or train "
                    "with a lower lr or scale"
                )
            yield logits.argmax(1).cpu().numpy()
