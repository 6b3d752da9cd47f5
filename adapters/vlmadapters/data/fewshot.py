"""The few-shot draw and the base/novel split of CoOp, as pure functions of items and seed.

Reference: Zhou et al., "Learning to Prompt for Vision-Language Models", IJCV 2022; the base/novel
split is that of Zhou et al., "Conditional Prompt Learning for Vision-Language Models", CVPR 2022.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import ceil

from vlmlayers.arguments import checked
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.manifests import Item

SPLIT_KINDS = ("all", "base", "novel")
MOST_VALIDATING = 4  # items of a class: a large validation set would be no few-shot setting


@checked
def few_shot(items: Iterable[Item], shots: int, seed: int) -> list[Item]:
    """Draw `shots` items per class, in the published order.

    Items are grouped by label in order of first appearance and each group is sampled in turn from
    one private generator; a class with fewer items gives all of them. Draw over all classes first,
    and take `base_or_novel` afterwards: the published protocol does it in this order.

    Args:
        items: Training items in the order of the split file.
        shots: Items per class, at least 1.
        seed: Any integer, 0 included.

    Raises:
        UserError: `shots` is below 1 or there are no items.
    """
    return _drawn(items, shots, _generator(shots, seed))


@checked
def few_shot_validation(
    items: Iterable[Item], train: Iterable[Item], shots: int, seed: int
) -> list[Item]:
    """Draw validation items, at most `MOST_VALIDATING` per class, in the published order.

    The published code goes on with the generator that has drawn the training items, so that these
    decide which validation items come.

    Args:
        items: Validation items in the order of the split file.
        train: Training items, likewise.
        shots: Training items per class, at least 1.
        seed: As of `few_shot`.

    Raises:
        UserError: `shots` is below 1 or there are no items.
    """
    generator = _generator(shots, seed)
    _drawn(train, shots, generator)
    return _drawn(items, min(shots, MOST_VALIDATING), generator)


def _generator(shots: int, seed: int) -> random.Random:
    if shots < 1:
        raise UserError(f"shots is {shots}; a few-shot draw needs at least 1 per class")
    # Python's own generator, as in the published code: another would draw other items.
    return random.Random(seed)


def _drawn(items: Iterable[Item], shots: int, generator: random.Random) -> list[Item]:
    # By first appearance, not by label: the generator is shared, so the order of classes decides
    # which items a class gets.
    groups: dict[int, list[Item]] = {}
    for item in items:
        groups.setdefault(item.label, []).append(item)
    if not groups:
        raise UserError("there are no items to draw from; check the split file")
    return [
        item
        for group in groups.values()
        for item in (generator.sample(group, shots) if len(group) >= shots else group)
    ]


def kind_labels(kind: str, labels: Iterable[int]) -> tuple[int, ...]:
    """Return the labels of `all`, `base` (the first ⌈n/2⌉) or `novel` classes, sorted."""
    check_one_of("kind of classes", kind, SPLIT_KINDS)
    ordered = tuple(sorted(set(labels)))
    half = ceil(len(ordered) / 2)
    return {"all": ordered, "base": ordered[:half], "novel": ordered[half:]}[kind]


def relabelled(items: Iterable[Item], labels: Sequence[int]) -> list[Item]:
    """Return the items of the given classes, with labels counted from 0 in the order given."""
    new = {label: index for index, label in enumerate(labels)}
    return [replace(item, label=new[item.label]) for item in items if item.label in new]


def base_or_novel(items: Sequence[Item], kind: str, labels: Iterable[int]) -> list[Item]:
    """Return the items of one half, relabelled from 0.

    Args:
        items: Items of any split.
        kind: `base`, `novel` or `all`.
        labels: All labels of the dataset, so that every split is cut at the same class.
    """
    return relabelled(items, kind_labels(kind, labels))
