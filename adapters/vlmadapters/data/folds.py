"""Folds of the few-shot draw: base-to-novel protocols inside the shots of the base classes.

A fold is a small dataset of its own. It trains on most shots of some base classes, the inner base
classes, and is tested on their other shots and on the inner novel classes, which its training never
sees. It holds training items of base classes and their names, and nothing else of the dataset: what
is tuned on folds has seen neither the test split nor a novel class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import ceil

import numpy as np

from vlmadapters.data.task import TaskData
from vlmlayers.errors import UserError
from vlmlayers.identity import DataIdentity
from vlmlayers.manifests import Item

FOLDS = 0xF0  # key of the draw of inner classes and held-out shots
PARTS = 4  # so many folds hold out every shot once; more of them draw anew
LEAST_APART = 4  # base classes: two to tell apart in each half


class Fold(TaskData):
    """One fold; `train` are the shots trained on, `test` those held out.

    Args:
        data: The dataset.
        name: Name of the fold in tables and cells.
        class_names: Names of the base classes, the inner base ones first.
        train: Items trained on, labelled by these names.
        test: Items held out.
        apart: Whether the second half of the classes is held out whole.
        held_out: Share of each inner base class's shots that is held out, in the mean of the folds
            that hold out every shot once: of 4 shots three folds hold out 2, 1 and 1.
        drawn_by: What tells the draw from others whose folds have the same names.
    """

    def __init__(
        self,
        data: TaskData,
        name: str,
        class_names: Sequence[str],
        train: Sequence[Item],
        test: Sequence[Item],
        apart: bool,
        held_out: float,
        drawn_by: str,
    ) -> None:
        super().__init__(replace(data.manifest, name=name), data.model, data.root)
        self.origin, self.apart, self.held_out = data.origin, apart, held_out
        self.drawn_by = drawn_by
        self.class_names = tuple(class_names)
        # The dataset's own, so that an image is decoded once for all folds.
        self.images = data.images
        self._held = {"train": list(train), "test": list(test)}

    @property
    def drawn(self) -> int:
        """Number of items of the whole draw, trained on and held out."""
        return sum(map(len, self._held.values()))

    @property
    def share(self) -> float:
        """Share of the draw's items that is trained on."""
        return self.trained / self.drawn

    @property
    def trained(self) -> int:
        """Number of items trained on."""
        return len(self._held["train"])

    def splits(self) -> tuple[str, ...]:
        """Return the splits of a fold; there is none for validation."""
        return tuple(self._held)

    def identity(self, split: str) -> DataIdentity:
        """Return what the items of a split are."""
        return replace(self.images.identity(self._items(split)), classes=self.class_names)

    def _items(self, split: str) -> list[Item]:
        return self._held[split]

    def _tell_of_few(self, drawn: list[Item], shots: int) -> None:
        return  # a fold holds some of the shots out, as it is meant to


def folds(
    data: TaskData, shots: int, seed: int, count: int = 4, *, apart: bool = True
) -> list[Fold]:
    """Return folds of a dataset's few-shot draw.

    Of every four folds (as many as there are shots, where these are fewer) each holds out another
    share of the shots; further ones start over with the shots in another order. Of two neighbouring
    folds the second trains on the classes that the first held out whole, and every pair draws these
    anew. The first of many folds are those of few: work on them is not done twice. A class of fewer
    images holds one out in each fold, in turn, or a fold of such classes would test none.

    Args:
        data: The dataset.
        shots: Items per class, as training draws them.
        seed: Seed of that draw.
        count: Number of folds.
        apart: Whether half of the base classes are held out whole. Fewer than four are not: there
            would be nothing to tell apart in one half.

    Raises:
        UserError: There is one base class, one shot or one fold, or no training image.
    """
    name, names = data.manifest.name, data.names("base")
    if len(data.class_names) == 2:
        raise UserError(
            f"{name} has one base class of two, and folds need two base classes to tell apart; "
            "name data of three classes or more"
        )
    data.check("base", "train")
    drawn = data.shots(shots, seed, "base")
    by_class = [[item for item in drawn if item.label == label] for label in range(len(names))]
    parts = min(count, PARTS, max(map(len, by_class)))
    if shots < 2:
        raise UserError(
            "shots is 1, and a fold trains on some shots of a class and holds out others; give 2 "
            "shots or more (validate also goes without folds, with the amount given)"
        )
    if parts < 2:
        raise UserError(
            f"folds hold out some shots of each class in turn; {name} needs two training images of "
            "a class and two folds at least"
        )
    read = data.options
    # What was asked for alone: what it gives changes with the data.
    asked = (shots, min(count, PARTS), apart, read.present_only, read.skip_unreadable)
    drawn_by = "-".join(map(str, asked))
    generator = np.random.default_rng([seed, FOLDS])
    apart = apart and len(names) >= LEAST_APART
    half = ceil(len(names) / 2)
    made: list[Fold] = []
    for number in range(count):
        # Every `parts` folds hold out each shot once; then the shots are shuffled anew.
        if number % parts == 0:
            by_class = [[one[i] for i in generator.permutation(len(one))] for one in by_class]
        # Neighbours are the two halves of one split of the classes, so that over a pair every class
        # is novel once: what one half makes easier the other makes harder.
        if number % 2 == 0:
            drawn_order = generator.permutation(len(names))
        order = np.roll(drawn_order, -half * (number % 2))
        ordered = [names[original] for original in order]
        base = half if apart else len(names)
        shots_of = [by_class[original] for original in order]
        train, test = _held_out(shots_of, base, number % parts, parts)
        title = f"{name}-s{seed}-f{number + 1}"
        made.append(Fold(data, title, ordered, train, test, apart, 1 / parts, drawn_by))
    return made


def _held_out(
    by_class: Sequence[Sequence[Item]], base: int, part: int, parts: int
) -> tuple[list[Item], list[Item]]:
    """Return what a fold trains on and what it holds out.

    Args:
        by_class: The shots of each class, in the order of the fold.
        base: Number of classes trained on; those behind are held out whole.
        part: Which part of the shots of the others is held out.
        parts: Number of their parts.
    """
    train: list[Item] = []
    test: list[Item] = []
    for label, shots in enumerate(by_class):
        for place, item in enumerate(shots):
            turns = min(parts, len(shots))
            # A single item is trained on: held out, it would test a class that was not trained.
            held = place % turns == part % turns and len(shots) > 1
            (test if held or label >= base else train).append(replace(item, label=label))
    return train, test
