"""Which items: balanced subsets, and parts that keep together what belongs together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmlayers.errors import UserError
from vlmlayers.features import LayerFeatures, TowerFeatures
from vlmlayers.metrics.checks import Labels


def independent_rows(features: TowerFeatures) -> Labels:
    """Return the rows that are draws of their own: all, but of captions the first of each image.

    Several captions of one image are near each other and of one class, whatever its class is.
    """
    if features.pairs is None:
        return np.arange(len(features))
    return np.unique(features.pairs, return_index=True)[1]


def balanced_rows(labels: Labels, n: int, rng: np.random.Generator) -> Labels:
    """Return n row numbers, ascending, as evenly spread over the labels as possible."""
    labels = np.asarray(labels)
    if n >= len(labels):
        return np.arange(len(labels))
    order = rng.permutation(len(labels))
    seen: Counter[Any] = Counter()
    turn = np.empty(len(labels), dtype=np.int64)
    for row in order:
        turn[row] = seen[labels[row]]
        seen[labels[row]] += 1
    # First the first item of every class, then the second, …: any number of them is balanced.
    ranked = order[np.argsort(turn[order], kind="stable")]
    return np.sort(ranked[:n])


def refuse_not_finite(
    array: NDArray[Any], features: LayerFeatures, tower: TowerFeatures, position: str, space: str
) -> None:
    """Raise a UserError that names dataset, tower, position and item of the first NaN or Inf."""
    if not np.isfinite(array).all():
        row = int(np.argwhere(~np.isfinite(array))[0, 0])
        raise UserError(
            f"{features.dataset}, {tower.tower} at {position} ({space}) has NaN or Inf "
            f"in item {row} ({tower.ids[row]}); extract again, in fp32"
        )


def deal(
    strata: Sequence[Hashable],
    groups: Sequence[Hashable],
    order: Sequence[Hashable],
    folds: int,
    rng: np.random.Generator,
) -> Labels:
    """Deal items to folds so that each stratum is spread evenly and no group is split.

    Args:
        strata: What to spread evenly: the dataset or the class of each item.
        groups: What to keep together: an item's own number, its class name, its image.
        order: What to spread as second: items of equal `order` are dealt one after the other.
        folds: Number of folds.
        rng: Private generator.

    Returns:
        Fold of each item, (item,).
    """
    fold_of: dict[Hashable, int] = {}
    members: dict[Hashable, dict[Hashable, list[int]]] = {}
    for row, (stratum, group) in enumerate(zip(strata, groups)):
        members.setdefault(stratum, {}).setdefault(group, []).append(row)
    # Strata that share most groups with others go first: their groups are least free later.
    owners = Counter(group for by_group in members.values() for group in by_group)
    shared = {s: sum(owners[g] > 1 for g in by_group) for s, by_group in members.items()}
    for stratum in sorted(members, key=lambda s: -shared[s]):
        by_group = members[stratum]
        load = np.zeros(folds)
        free = []
        for group, rows in by_group.items():
            if group in fold_of:
                load[fold_of[group]] += len(rows)
            else:
                free.append(group)
        rank = {
            key: i for i, key in enumerate(_shuffled({order[by_group[g][0]] for g in free}, rng))
        }
        free = sorted(_shuffled(free, rng), key=lambda g: rank[order[by_group[g][0]]])
        for group in free:
            # The emptiest fold next: sizes then differ by one group at most.
            fold = int(load.argmin())
            fold_of[group] = fold
            load[fold] += len(by_group[group])
    return np.array([fold_of[group] for group in groups], dtype=np.int64)


def evaluated_folds(fold: Labels, folds: int, held_out: int) -> range:
    """Return the folds to hold out in turn: as few as give `held_out` items, at most all."""
    # Small datasets are held out whole for the sake of n; of large ones one fold is enough.
    sizes = np.cumsum(np.bincount(fold, minlength=folds))
    return range(min(folds, int(np.searchsorted(sizes, held_out)) + 1))


def shots_and_queries(
    labels: Labels, shots: int, rng: np.random.Generator
) -> tuple[Labels, Labels]:
    """Return rows of `shots` random items per class and the rows of all others."""
    support = np.concatenate(
        [rng.permutation(np.flatnonzero(labels == label))[:shots] for label in np.unique(labels)]
    )
    return support, np.setdiff1d(np.arange(len(labels)), support)


def _shuffled(items: Any, rng: np.random.Generator) -> list[Any]:
    # Sets have no order that repeats between processes.
    items = sorted(items, key=str)
    return [items[i] for i in rng.permutation(len(items))]
