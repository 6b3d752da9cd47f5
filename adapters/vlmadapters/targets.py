"""Datasets as the protocols use them, and the test of adapters that are trained already."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vlmadapters.evaluate import Case, Evaluator, Labels
from vlmadapters.fewshot import base_or_novel, few_shot, kind_labels
from vlmadapters.images import Images
from vlmadapters.mma import Adapter
from vlmadapters.results import COLUMNS, METHOD, ZERO_SHOT, ZERO_SHOT_OWN, accuracy_fields
from vlmlayers.manifests import Item, Manifest


@dataclass(eq=False)
class Dataset:
    """A dataset as the protocols use it: class names, items and images of one model.

    Args:
        name: Name or path of a manifest, or the manifest.
        model: The model.
        root: The data root.
        workers: Threads that decode images.
        limit: Use at most so many test items, balanced over classes; 0 uses all.
    """

    name: str | Manifest
    model: Any
    root: Any = None
    workers: int = 0
    limit: int = 0
    manifest: Manifest = field(init=False)

    def __post_init__(self) -> None:
        given = self.name
        self.manifest = given if isinstance(given, Manifest) else Manifest.load(given)

    @cached_property
    def images(self) -> Images:
        """The images, decoded once."""
        return Images(self.model, self.manifest, self.root, workers=self.workers)

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """All class names by label."""
        return self.manifest.class_names(self.root)

    def names(self, kind: str) -> list[str]:
        """Return class names of `all`, `base` or `novel` classes."""
        return [self.class_names[label] for label in self._labels(kind)]

    def _labels(self, kind: str) -> tuple[int, ...]:
        return kind_labels(kind, range(len(self.class_names)))

    def shots(self, shots: int, seed: int, kind: str) -> list[Item]:
        """Return the few-shot items of one half, relabelled from 0."""
        drawn = few_shot(self.manifest.items("train", root=self.root), shots, seed)
        return base_or_novel(drawn, kind, range(len(self.class_names)))

    def test(self, kind: str, split: str = "test") -> list[Item]:
        """Return the test items of one half, relabelled from 0."""
        if self.limit:
            items = self.manifest.sample(split, self.limit, 0, self.root)
        else:
            items = self.manifest.items(split, root=self.root)
        return base_or_novel(items, kind, range(len(self.class_names)))


@dataclass(frozen=True, eq=False)
class Target:
    """Test items of one kind of classes of one dataset."""

    dataset: Dataset
    kind: str
    split: str = "test"


def result_row(
    protocol: str,
    model: Any,
    target: Target,
    truth: Labels,
    labels: Labels,
    method: str,
    template: str,
    **values: Any,
) -> dict[str, Any]:
    """Return one row of the results table; `values` go over the defaults of an untrained model."""
    return {
        "protocol": protocol,
        "method": method,
        "model": model.name,
        "weights": model.weights,
        "dataset": target.dataset.manifest.name,
        "split_kind": target.kind,
        "source": "",
        "placement": "",
        "shots": 0,
        "seed": -1,
        "parameters": 0,
        "seconds": 0.0,
        "template": template,
        "changed": 0.0,
        "note": "",
        "random_weights": model.random_weights,
        **accuracy_fields(int((labels == truth).sum()), len(truth)),
        **values,
    }


def evaluate_adapters(
    model: Any,
    datasets: Iterable[str],
    adapters: Mapping[Path, Adapter],
    *,
    kinds: Sequence[str] = ("all",),
    template: str = "a photo of a {}.",
    root: Any = None,
    precision: str = "auto",
    limit: int = 0,
    workers: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Test zero-shot CLIP and trained adapters on datasets, without training anything.

    Args:
        model: The model.
        datasets: Names or paths of manifests.
        adapters: Adapters by the file they came from.
        kinds: `all`, `base` or `novel` classes.
        template: Prompt template of the adapters and of the first zero-shot row.
        root: The data root.
        precision: As in `TrainConfig`.
        limit: Use at most so many test items of each dataset; 0 uses all.
        workers: Threads that decode images.
        progress: Show bars.

    Returns:
        A results table; `source` is the adapter's file.
    """
    evaluator = Evaluator(model, precision=precision, progress=progress)
    rows = []
    for name in datasets:
        data = Dataset(name, model, root, workers, limit)
        own = data.manifest.zero_shot_template
        named: list[tuple[str, Adapter | None, str, str]] = [
            (ZERO_SHOT, None, template, ""),
            (ZERO_SHOT_OWN, None, own, ""),
        ]
        named += [(METHOD, adapter, template, str(path)) for path, adapter in adapters.items()]
        for kind in kinds:
            target = Target(data, kind)
            items = data.test(kind)
            truth = np.array([item.label for item in items], dtype=np.int64)
            cases = [Case(adapter, text) for _, adapter, text, _ in named]
            found = evaluator.predict(data.images, items, data.names(kind), cases)
            for labels, (method, adapter, text, source) in zip(found, named):
                config = adapter.config if adapter else None
                row = result_row("evaluate", model, target, truth, labels, method, text)
                rows.append(
                    row
                    | {
                        "source": source,
                        "placement": config.placement if config else "",
                        "parameters": adapter.parameter_count() if adapter else 0,
                        "changed": float((labels != found[0]).mean()) if adapter else 0.0,
                    }
                )
    return pd.DataFrame(rows, columns=list(COLUMNS))
