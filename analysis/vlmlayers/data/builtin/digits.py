"""scikit-learn's handwritten digits: 1,740 of its 1,797 real scans of 8 × 8 pixels."""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image

from vlmlayers.data.builtin.base import BuiltinDataset, Plan

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FIRST = {"train": 0, "val": 100, "test": 120}
PER_CLASS = {"train": 100, "val": 20, "test": 54}
GRAMMAR = ("a {name}", "a scan of a {name}", "a small picture of a {name}", "a {name} in white ink")


@cache
def _scans() -> tuple[np.ndarray, ...]:
    """Return the scans by digit, each (174, 8, 8) uint8, in the order of the data set."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.minimum(data.images * 16, 255).astype(np.uint8)
    fewest = sum((PER_CLASS["train"], PER_CLASS["val"], PER_CLASS["test"]))
    return tuple(images[data.target == digit][:fewest] for digit in range(10))


class _Digits(BuiltinDataset):
    """Digits are looked up where other datasets are drawn."""

    def _plan(self, split: str, index: int) -> tuple[Plan, np.random.Generator]:
        plan, rng = super()._plan(split, index)
        scan = _scans()[index % 10][FIRST[split] + index // 10]
        return {**plan, "scan": scan}, rng


def plan(label: int, rng: np.random.Generator) -> Plan:
    """Return nothing to choose: the scans are what they are."""
    return {}


def draw(plan: Plan, rng: np.random.Generator, size: int) -> Image.Image:
    """Enlarge one scan."""
    image = Image.fromarray(plan["scan"]).resize((size, size), Image.Resampling.BICUBIC)
    return image.convert("RGB")


def datasets() -> list[BuiltinDataset]:
    """Return the digits."""
    sizes = {split: 10 * count for split, count in PER_CLASS.items()}
    names = tuple(f"handwritten {word}" for word in WORDS)
    return [
        _Digits("digits", "Handwritten digits", "digits", names, plan, draw, GRAMMAR, sizes, False)
    ]
