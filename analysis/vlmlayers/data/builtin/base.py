"""What every built-in dataset has: classes, splits, labels, captions, and seeds per item."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
from PIL import Image

from vlmlayers.errors import UserError, check_one_of

Plan = dict[str, Any]
SPLITS = ("train", "val", "test")
PER_CLASS = {"train": 200, "val": 20, "test": 50}


def generator(*parts: object) -> np.random.Generator:
    """Return a private generator that depends on `parts` alone."""
    # Of text, not of numbers: every item has a stream of its own, on any platform and in any order.
    digest = blake2b("\x1f".join(map(str, parts)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))


def pick(rng: np.random.Generator, items: Sequence[Any]) -> Any:
    """Return one of `items`, each equally likely."""
    return items[int(rng.integers(len(items)))]


def checkerboard(first: Sequence[Any], second: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Return all pairs, those of the white fields before those of the black ones.

    Both halves then use every element of `first` and of `second`: novel classes are new
    combinations of parts that base classes have shown.
    """
    pairs = [(i, j) for i in range(len(first)) for j in range(len(second))]
    pairs.sort(key=lambda pair: sum(pair) % 2)
    return [(first[i], second[j]) for i, j in pairs]


@dataclass(frozen=True)
class BuiltinDataset:
    """A dataset drawn by code.

    Attributes:
        name: Short name, as in `builtin.get`.
        title: Words for tables and figures.
        domain: Kind of picture; styles of one family share it.
        class_names: Names by label. The first half (rounded up) are base classes, the rest
            novel ones that recombine the parts of base classes.
        plan: (label, generator) → attributes of one item; `draw` and the captions read them.
        draw: (plan, generator, size in pixels) → RGB image.
        grammar: Caption patterns over the plan's words and `{name}`.
        sizes: Items per split. Drawn datasets accept any index beyond these, too.
        endless: Whether indices beyond `sizes` are accepted.
        unseen: Whether it stays out of the pretraining of the miniature CLIP.
    """

    name: str
    title: str
    domain: str
    class_names: tuple[str, ...]
    plan: Callable[[int, np.random.Generator], Plan] = field(repr=False)
    draw: Callable[[Plan, np.random.Generator, int], Image.Image] = field(repr=False)
    grammar: tuple[str, ...] = field(repr=False)
    sizes: Mapping[str, int] = field(default_factory=dict)
    endless: bool = True
    unseen: bool = False

    def __post_init__(self) -> None:
        if not self.sizes:
            count = len(self.class_names)
            sizes = {split: count * each for split, each in PER_CLASS.items()}
            object.__setattr__(self, "sizes", sizes)

    def label(self, split: str, index: int) -> int:
        """Return the label of an item. Labels cycle, so every prefix is class-balanced."""
        self._check(split, index)
        return index % len(self.class_names)

    def caption(self, split: str, index: int) -> str:
        """Return a sentence about an item that its drawing bears out."""
        plan = self._plan(split, index)[0]
        # A stream of its own, so that captions do not change the picture.
        pattern = pick(generator(self.name, split, index, "caption"), self.grammar)
        text = pattern.format(name=self.class_names[index % len(self.class_names)], **plan)
        return with_article(text)

    def image(self, split: str, index: int, size: int = 64) -> Image.Image:
        """Return an item's RGB image of `size` × `size` pixels.

        Raises:
            UserError: Unknown split, or no such index or size.
        """
        if size < 8:
            raise UserError(f"{self.name}: images need at least 8 pixels a side, got {size}")
        plan, rng = self._plan(split, index)
        return self.draw(plan, rng, size)

    def _plan(self, split: str, index: int) -> tuple[Plan, np.random.Generator]:
        label = self.label(split, index)
        rng = generator(self.name, split, index)
        return self.plan(label, rng), rng

    def _check(self, split: str, index: int) -> None:
        check_one_of("split", split, SPLITS, where=f"built-in dataset {self.name}")
        if index < 0 or (not self.endless and index >= self.sizes[split]):
            raise UserError(
                f"{self.name} {split} has items 0 to {self.sizes[split] - 1}, not {index}"
            )


def with_article(text: str) -> str:
    """Turn every `a` before a vowel into `an`."""
    words = text.split(" ")
    for place, word in enumerate(words[:-1]):
        if word == "a" and words[place + 1][:1] in "aeio":
            words[place] = "an"
    return " ".join(words)
