"""Test items, the rows they give, and the test of methods that are trained already."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vlmadapters.data.options import DataOptions
from vlmadapters.data.task import TaskData
from vlmadapters.device import own_modes
from vlmadapters.methods.base import Method
from vlmadapters.protocols.evaluate import Answers, Case, Evaluator, Labels
from vlmadapters.protocols.results import (
    COLUMNS,
    UNMOVED_TEST,
    ZERO_SHOT_CLIP,
    ZERO_SHOT_OWN,
    accuracy_fields,
    half_fields,
    method_fields,
)
from vlmlayers.manifests import Item, Manifest, distinct
from vlmlayers.options import takes, validated
from vlmlayers.prompts import TEMPLATE


@dataclass(frozen=True, eq=False)
class Target:
    """Test items of one kind of classes of one dataset."""

    dataset: TaskData
    kind: str
    split: str = "test"

    def items(self, *, readable: bool = True) -> list[Item]:
        """Return the items; `readable` is as for `TaskData.shots`."""
        return self.dataset.test(self.kind, self.split, readable=readable)

    def truth(self) -> Labels:
        """Return their labels, (item,)."""
        return np.array([item.label for item in self.items()], dtype=np.int64)


def result_row(
    protocol: str,
    evaluator: Evaluator,
    target: Target,
    truth: Labels,
    answers: Answers,
    method: str,
    template: str,
    **values: Any,
) -> dict[str, Any]:
    """Return one row of the results table; `values` go over the defaults of an untrained model."""
    model = evaluator.model
    return {
        "protocol": protocol,
        "method": method,
        "model": model.name,
        "weights": model.weights,
        "dataset": target.dataset.manifest.name,
        "split_kind": target.kind,
        "source": "",
        "placement": "",
        "settings": "",
        "recipe": "",
        "shots": 0,
        "seed": -1,  # none was drawn; NaN would make fractions of the column
        "parameters": 0,
        "seconds": 0.0,
        "template": template,
        "changed": 0.0,
        "note": "",
        "device": model.device.type,
        "precision": evaluator.precision,
        "random_weights": model.random_weights,
        **half_fields(truth, answers.labels == truth),
        **accuracy_fields(int((answers.labels == truth).sum()), len(truth)),
        "log_likelihood": float(answers.log_likelihoods.mean()),
        **values,
    }


@takes(DataOptions)
@own_modes()
def evaluate_methods(
    model: Any,
    datasets: Iterable[Any],
    methods: Mapping[Path, Method],
    *,
    kinds: Sequence[str] = ("all",),
    template: str = TEMPLATE,
    root: Any = None,
    precision: str = "auto",
    progress: bool = True,
    **options: Any,
) -> pd.DataFrame:
    """Test zero-shot CLIP and trained methods on datasets, without training anything.

    Args:
        model: The model.
        datasets: Names or paths of manifests.
        methods: Trained methods by the file they came from.
        kinds: `all`, `base` or `novel` classes.
        template: Prompt template of the methods and of the first zero-shot row.
        root: The data root.
        precision: As in `TrainConfig`.
        progress: Show bars.
        **options: Those of `DataOptions`.

    Returns:
        A results table; `source` is the method's file.

    Raises:
        UserError: Two datasets have one name; or one has no classes, one, or no test images of a
            kind; or an image cannot be read.
    """
    asked = validated(DataOptions, options, "evaluate_methods")
    evaluator = Evaluator(model, precision=precision, progress=progress)
    plain = Method()
    rows = []
    manifests = (one if isinstance(one, Manifest) else Manifest.load(one) for one in datasets)
    known = [TaskData(one, model, root, asked, asked.items) for one in distinct(manifests, root)]
    # All of them before the first test, which may take minutes.
    for data, kind in product(known, kinds):
        data.check(kind, "test")
    for data in known:
        named: list[tuple[str, Method, str, str]] = [
            (ZERO_SHOT_CLIP, plain, template, ""),
            (ZERO_SHOT_OWN, plain, data.manifest.zero_shot_template, ""),
        ]
        named += [(one.config.title, one, template, str(path)) for path, one in methods.items()]
        # What a file in its authors' layout was trained on is not known; it may be these images.
        shared = data.tell_of_shared() if methods else ""
        for kind in kinds:
            target = Target(data, kind)
            truth = target.truth()
            cases = [Case(method, data.task(kind, text)) for _, method, text, _ in named]
            found = evaluator.answers(data.images, target.items(), cases)
            for answers, (title, method, text, source) in zip(found, named):
                row = result_row("evaluate", evaluator, target, truth, answers, title, text)
                if source:
                    changed = float((answers.labels != found[0].labels).mean())
                    row |= {**method_fields(method), "source": source, "changed": changed}
                    # In either template: a method may fall back on the dataset's own.
                    same = any((answers.labels == one.labels).all() for one in found[:2])
                    row["note"] = UNMOVED_TEST if same else shared
                rows.append(row)
    return pd.DataFrame(rows, columns=list(COLUMNS))
