"""Protocol of read-outs: datasets and classes recognised on held-out items."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vlmlayers.errors import UserError
from vlmlayers.features import LayerFeatures, TowerFeatures
from vlmlayers.metrics.checks import Array, Labels
from vlmlayers.metrics.dataset_level import confusion
from vlmlayers.metrics.intervals import mean_share_draws, percentile, wilson
from vlmlayers.metrics.table import METRICS, Metric
from vlmlayers.positions import TOWERS
from vlmlayers.scores.parts import balanced_rows, deal, evaluated_folds
from vlmlayers.scores.protocol import (
    Collector,
    Group,
    Place,
    Protocol,
    chosen_positions,
    rows_of,
)

Source = tuple[LayerFeatures, TowerFeatures]


@dataclass(frozen=True, eq=False)
class Split:
    """Items of one seed: their classes, their folds, and which folds are held out in turn."""

    seed: int
    rows: tuple[Labels, ...]
    labels: Labels
    fold: Labels
    folds: int
    held: range
    classes: int
    options: Mapping[str, Any]


def run_datasets(
    group: Group,
    metrics: Mapping[str, Metric],
    protocol: Protocol,
    out: Collector,
    towers: tuple[str, ...] = TOWERS,
) -> None:
    """Score how well read-outs tell from which dataset an item comes."""
    readouts = {name: m for name, m in metrics.items() if not m.base}
    derived = {name: m for name, m in metrics.items() if m.base}
    for base in {m.base for m in derived.values()} - set(readouts):
        readouts[base] = METRICS[base]
    for tower in towers:
        sources = group.sources(tower)
        if len(sources) < 2:
            for name in metrics:
                out.refuse(name, "*", tower, "", f"{len(sources)} datasets; at least 2 are needed")
            continue
        try:
            splits = [dataset_split(sources, protocol, seed) for seed in protocol.seeds]
        except UserError as error:
            for name in metrics:
                out.refuse(name, "*", tower, "", str(error))
            continue
        names = [member.dataset for member, _ in sources]
        for name, metric in readouts.items():
            follow = {n: m for n, m in derived.items() if m.base == name}
            for space, position in grid(sources, name, metric, protocol, out):
                place = group.place("*", sources[0][1], position, space)
                for split in splits:
                    with out.attempt(name, "*", tower, position):
                        protocol.require(len(split.labels), metric)
                        counts = held_out_counts(
                            metric, stacked(sources, split, position, space), split, protocol
                        )
                        if name in metrics:
                            _add_accuracy(name, metric, place, counts, split, protocol, out)
                        for other, entry in follow.items():
                            _add_derived(other, entry, place, names, counts, split, protocol, out)


def run_classes(
    group: Group, metrics: Mapping[str, Metric], protocol: Protocol, out: Collector
) -> None:
    """Score how well read-outs tell the class inside each dataset."""
    for tower in ("vision", "text"):
        for member, features in group.sources(tower):
            try:
                splits = [class_split(features, protocol, seed) for seed in protocol.seeds]
            except UserError as error:
                for name in metrics:
                    out.refuse(name, member.dataset, tower, "", str(error))
                continue
            sources = [(member, features)]
            for name, metric in metrics.items():
                for space, position in grid(sources, name, metric, protocol, out):
                    place = group.place(member.dataset, features, position, space)
                    for split in splits:
                        with out.attempt(name, member.dataset, tower, position):
                            protocol.require(len(split.labels), metric)
                            x = stacked(sources, split, position, space)
                            counts = held_out_counts(metric, x, split, protocol)
                            _add_accuracy(name, metric, place, counts, split, protocol, out)


def dataset_split(sources: list[Source], protocol: Protocol, seed: int) -> Split:
    """Draw the items of dataset accuracy and deal them to folds.

    Images: equally many of each dataset (the size of the smallest) or all of them, dealt by item
    and spread over classes. Class prompts: all of them, dealt by class name, so that a name that
    two datasets share stays in one part. Captions are dealt by image. Where datasets differ in
    size they weigh the same in the fit and in the accuracy.

    Raises:
        UserError: A dataset has too few items to be in every part.
    """
    rng = protocol.rng(seed, 1)
    by_class = sources[0][1].kind == "prompts" or protocol.vision_split == "class"
    equal = sources[0][1].tower == "vision" and protocol.balance == "equal"
    most = min(len(features) for _, features in sources)
    rows = tuple(
        balanced_rows(f.labels, most, rng) if equal else np.arange(len(f)) for _, f in sources
    )
    strata, groups, order = [], [], []
    for number, ((member, features), chosen) in enumerate(zip(sources, rows)):
        for row in chosen:
            name = member.class_names[features.labels[row]].casefold().strip()
            together: Any = (number, int(row))
            if by_class:
                together = name
            elif features.pairs is not None:
                together = (number, int(features.pairs[row]))
            strata.append(number)
            groups.append(together)
            order.append(name)
    fewest = min(len({g for s, g in zip(strata, groups) if s == i}) for i in range(len(sources)))
    folds = min(protocol.folds, fewest)
    if folds < 3:
        small = min(sources, key=lambda source: len(source[1]))[0].dataset
        raise UserError(f"{small} has {fewest} independent items; at least 3 are needed to split")
    fold = deal(strata, groups, order, folds, rng)
    labels = np.asarray(strata, dtype=np.int64)
    options: dict[str, Any] = {
        "split_by": "class" if by_class else "item",
        "balance": "equal" if equal else "weights",
        "folds": folds,
    }
    if by_class:
        options["ceiling"] = round(_ceiling(strata, groups), 4)
    held = evaluated_folds(fold, folds, protocol.held_out)
    return Split(seed, rows, labels, fold, folds, held, len(sources), options)


def class_split(features: TowerFeatures, protocol: Protocol, seed: int) -> Split:
    """Deal the items of each class to folds; classes with fewer than three items are left out.

    Raises:
        UserError: Fewer than two classes have three items.
    """
    groups = np.arange(len(features)) if features.pairs is None else features.pairs
    sizes = {c: len(set(groups[features.labels == c])) for c in np.unique(features.labels)}
    usable = [c for c, size in sizes.items() if size >= 3]
    if len(usable) < 2:
        raise UserError(f"{len(usable)} classes have 3 items or more; at least 2 are needed")
    rows = np.flatnonzero(np.isin(features.labels, usable))
    labels = np.searchsorted(np.array(usable), features.labels[rows])
    folds = min(protocol.folds, min(sizes[c] for c in usable))
    fold = deal(
        labels.tolist(), groups[rows].tolist(), labels.tolist(), folds, protocol.rng(seed, 2)
    )
    held = evaluated_folds(fold, folds, protocol.held_out)
    options = {"classes": len(usable), "folds": folds}
    if len(usable) < len(sizes):
        options["classes_left_out"] = len(sizes) - len(usable)
    return Split(seed, (rows,), labels, fold, folds, held, len(usable), options)


def held_out_counts(metric: Metric, x: Array, split: Split, protocol: Protocol) -> Array:
    """Return the confusion counts of a read-out over the held-out folds, (class, class)."""
    counts = np.zeros((split.classes, split.classes))
    arguments = protocol.arguments(metric)
    for held in split.held:
        out = split.fold == held
        val = split.fold == (held + 1) % split.folds
        fit = ~out & ~val
        predicted = metric.function(
            x[fit],
            split.labels[fit],
            x[val],
            split.labels[val],
            x[out],
            classes=split.classes,
            **arguments,
        )
        counts += confusion(split.labels[out], predicted, split.classes)
    return counts


def resampled_counts(counts: Array, draws: int, rng: np.random.Generator) -> Array:
    """Return bootstrap draws of confusion counts, resampled inside each true class.

    Resampling the held-out items of a class is a multinomial draw of its row.
    """
    total = counts.sum(axis=1)
    rows = [
        rng.multinomial(int(n), row / n if n else np.full(len(row), 1 / len(row)), size=draws)
        for n, row in zip(total, counts)
    ]
    return np.stack(rows, axis=1).astype(np.float64)


def accuracy_and_interval(
    counts: Array, protocol: Protocol, seed: int
) -> tuple[float, tuple[float, float]]:
    """Return balanced accuracy over the classes that were held out, and its interval."""
    sizes = counts.sum(axis=1).astype(np.int64)
    hits, sizes = np.diagonal(counts)[sizes > 0], sizes[sizes > 0]
    value = float((hits / sizes).mean())
    if value in (0.0, 1.0):  # resampling cannot vary what is all wrong or all right
        low, high = wilson(value, sizes.sum())
        return value, (float(low), float(high))
    return value, percentile(
        mean_share_draws(hits, sizes, protocol.bootstrap, protocol.rng(seed, 3))
    )


def _add_accuracy(
    name: str,
    metric: Metric,
    place: Place,
    counts: Array,
    split: Split,
    protocol: Protocol,
    out: Collector,
) -> None:
    value, interval = accuracy_and_interval(counts, protocol, split.seed)
    out.add(
        name,
        place,
        value,
        interval,
        1.0 / split.classes,
        int(counts.sum()),
        split.seed,
        interval="bootstrap",
        **split.options,
        **protocol.arguments(metric),
    )


def _add_derived(
    name: str,
    metric: Metric,
    place: Place,
    datasets: list[str],
    counts: Array,
    split: Split,
    protocol: Protocol,
    out: Collector,
) -> None:
    """Add what follows from the confusion counts: one value, one per dataset, or one per pair."""
    value = np.asarray(metric.function(counts))
    draws = metric.function(
        resampled_counts(counts, protocol.bootstrap, protocol.rng(split.seed, 4))
    )
    null = float(metric.null) if isinstance(metric.null, (int, float)) else 1.0 / len(counts)
    common = {"readout": metric.base, **split.options}
    common |= protocol.arguments(METRICS[metric.base])
    for index in np.ndindex(value.shape):
        if len(index) == 2 and index[0] == index[1]:
            continue
        dataset = datasets[index[0]] if index else "*"
        own = {"predicted": datasets[index[1]]} if len(index) == 2 else {}
        n = int(counts[index[0]].sum()) if index else int(counts.sum())
        share = bool(index) and metric.is_share
        low, high = wilson(value[index], n) if share else percentile(draws[(..., *index)])
        out.add(
            name,
            _at(place, dataset),
            float(value[index]),
            (float(low), float(high)),
            null,
            n,
            split.seed,
            interval="wilson" if share else "bootstrap",
            **own,
            **common,
        )


def _at(place: Place, dataset: str) -> Place:
    return replace(place, dataset=dataset)


def stacked(sources: list[Source], split: Split, position: str, space: str) -> Array:
    """Return the rows of a split from all sources, one after the other."""
    return np.concatenate(
        [
            rows_of(features, position, space, rows)
            for (_, features), rows in zip(sources, split.rows)
        ]
    )


def grid(
    sources: list[Source], name: str, metric: Metric, protocol: Protocol, out: Collector
) -> Iterable[tuple[str, str]]:
    """Yield the spaces and positions at which a metric is to be scored."""
    member, features = sources[0]
    dataset = member.dataset if len(sources) == 1 else "*"
    if features.tower not in metric.towers:
        return
    for space in protocol.spaces_of(metric):
        positions = chosen_positions([f for _, f in sources], space, protocol)
        if not positions:
            out.refuse(name, dataset, features.tower, "", f"no {space} features were extracted")
        for position in positions:
            yield space, position


def _ceiling(strata: list[int], groups: list[Any]) -> float:
    """Return the best accuracy possible where datasets share class names: mean 1/sharers."""
    owners: dict[Any, set[int]] = {}
    for stratum, group in zip(strata, groups):
        owners.setdefault(group, set()).add(stratum)
    shares: dict[int, list[float]] = {}
    for stratum, group in zip(strata, groups):
        shares.setdefault(stratum, []).append(1.0 / len(owners[group]))
    return float(np.mean([np.mean(values) for values in shares.values()]))


Runner = Callable[[Group, Mapping[str, Metric], Protocol, Collector], None]
