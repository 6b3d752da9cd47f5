"""Protocol of generalizability: novel classes, left-out datasets, and other styles."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations

import numpy as np

from vlmlayers.errors import UserError
from vlmlayers.features import LayerFeatures, TowerFeatures
from vlmlayers.metrics.checks import Array, Labels
from vlmlayers.metrics.dataset_level import confusion
from vlmlayers.metrics.table import Metric
from vlmlayers.metrics.transfer import WithinScatter
from vlmlayers.scores.parts import balanced_rows, deal, evaluated_folds, shots_and_queries
from vlmlayers.scores.protocol import Collector, Group, Protocol, rows_of
from vlmlayers.scores.readouts import (
    Source,
    Split,
    accuracy_and_interval,
    grid,
    held_out_counts,
    stacked,
)


def run_novel(
    group: Group, metrics: Mapping[str, Metric], protocol: Protocol, out: Collector
) -> None:
    """Score novel classes from a few shots in the geometry of the base classes (first half)."""
    for name, metric in metrics.items():
        for tower in metric.towers:
            for member, features in group.sources(tower):
                base, novel = base_and_novel(features.labels)
                for space, position in grid([(member, features)], name, metric, protocol, out):
                    with out.attempt(name, member.dataset, tower, position):
                        x = rows_of(features, position, space)
                        geometry = metric.parts[0](x[base], features.labels[base])
                        _add_few_shot(
                            group,
                            member,
                            features,
                            name,
                            metric,
                            position,
                            space,
                            geometry,
                            x[novel],
                            features.labels[novel],
                            protocol,
                            out,
                            geometry_from="base_classes",
                        )


def run_left_out(
    group: Group, metrics: Mapping[str, Metric], protocol: Protocol, out: Collector
) -> None:
    """Score each dataset's classes from a few shots in the geometry of all other datasets."""
    for name, metric in metrics.items():
        for tower in metric.towers:
            sources = group.sources(tower)
            if len(sources) < 2:
                out.refuse(name, "*", tower, "", f"{len(sources)} datasets; at least 2 are needed")
                continue
            for space, position in grid(sources, name, metric, protocol, out):
                parts: dict[str, WithinScatter] = {}
                for member, features in sources:
                    with out.attempt(name, member.dataset, tower, position):
                        x = rows_of(features, position, space)
                        parts[member.dataset] = metric.parts[0](x, features.labels)
                for member, features in sources:
                    with out.attempt(name, member.dataset, tower, position):
                        others = [s for other, s in parts.items() if other != member.dataset]
                        if not others:
                            raise UserError("no other dataset has a geometry at this position")
                        geometry = others[0]
                        for other in others[1:]:
                            geometry = geometry + other
                        x = rows_of(features, position, space)
                        _add_few_shot(
                            group,
                            member,
                            features,
                            name,
                            metric,
                            position,
                            space,
                            geometry,
                            x,
                            features.labels,
                            protocol,
                            out,
                            geometry_from="other_datasets",
                        )


def base_and_novel(labels: Labels) -> tuple[Labels, Labels]:
    """Return rows of the first half of the classes (rounded up) and rows of the rest."""
    ids = np.unique(labels)
    base = np.isin(labels, ids[: (len(ids) + 1) // 2])
    return np.flatnonzero(base), np.flatnonzero(~base)


def _add_few_shot(
    group: Group,
    member: LayerFeatures,
    features: TowerFeatures,
    name: str,
    metric: Metric,
    position: str,
    space: str,
    geometry: WithinScatter,
    x: Array,
    labels: Labels,
    protocol: Protocol,
    out: Collector,
    **noted: str,
) -> None:
    """Add one row per seed: shots drawn, other items of the same classes recognised."""
    ids, y, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    protocol.require(len(labels), metric)
    if len(ids) < 2:
        raise UserError(f"{len(ids)} class to recognise; at least 2 are needed")
    shots = min(protocol.shots, int(sizes.min()) - 1)
    if shots < 1:
        raise UserError("a class has one item; shots and queries need 2")
    factor = geometry.factor()
    place = group.place(member.dataset, features, position, space)
    for seed in protocol.seeds:
        support, query = shots_and_queries(y, shots, protocol.rng(seed, 15))
        predicted = metric.parts[1](factor, x[support], y[support], x[query], classes=len(ids))
        counts = confusion(y[query], predicted, len(ids))
        value, interval = accuracy_and_interval(counts, protocol, seed)
        out.add(
            name,
            place,
            value,
            interval,
            1.0 / len(ids),
            len(query),
            seed,
            interval="bootstrap",
            shots=shots,
            classes=len(ids),
            **noted,
        )


def families(sources: list[Source]) -> list[tuple[list[Source], list[str]]]:
    """Return groups of datasets that share at least half of their class names, and the names.

    A dataset joins the first family whose shared names, with it, stay at least four and at least
    half of the smaller set.
    """
    found: list[tuple[list[Source], set[str]]] = []
    for source in sources:
        names = {_fold_name(name) for name in source[0].class_names}
        for number, (members, shared) in enumerate(found):
            common = shared & names
            if len(common) >= max(4, (min(len(shared), len(names)) + 1) // 2):
                found[number] = ([*members, source], common)
                break
        else:
            found.append(([source], names))
    return [(members, sorted(shared)) for members, shared in found if len(members) > 1]


def run_styles(
    group: Group, metrics: Mapping[str, Metric], protocol: Protocol, out: Collector
) -> None:
    """Score which style (dataset of a family) an item has; split by class, so content is unseen."""
    for name, metric in metrics.items():
        for tower in metric.towers:
            for sources, shared in _families_or_refuse(group, name, tower, out):
                text = "+".join(member.dataset for member, _ in sources)
                splits = [_style_split(sources, shared, protocol, seed) for seed in protocol.seeds]
                for space, position in grid(sources, name, metric, protocol, out):
                    place = group.place("*", sources[0][1], position, space)
                    for split in splits:
                        with out.attempt(name, "*", tower, position):
                            protocol.require(len(split.labels), metric)
                            x = stacked(sources, split, position, space)
                            counts = held_out_counts(metric, x, split, protocol)
                            value, interval = accuracy_and_interval(counts, protocol, split.seed)
                            noted = {
                                "family": text,
                                "split_by": "class",
                                "shared_classes": len(shared),
                                **protocol.arguments(metric),
                            }
                            n, chance = int(counts.sum()), 1 / len(sources)
                            out.add(
                                name, place, value, interval, chance, n, split.seed,
                                interval="bootstrap", **noted,
                            )  # fmt: skip


def run_style_classes(
    group: Group, metrics: Mapping[str, Metric], protocol: Protocol, out: Collector
) -> None:
    """Score classes of one style by a read-out fitted on another style of the family."""
    for name, metric in metrics.items():
        for tower in metric.towers:
            for sources, shared in _families_or_refuse(group, name, tower, out):
                for space, position in grid(sources, name, metric, protocol, out):
                    for source, target in permutations(sources, 2):
                        with out.attempt(name, target[0].dataset, tower, position):
                            _add_cross_style(
                                group, source, target, shared, name, metric, position, space,
                                protocol, out,
                            )  # fmt: skip


def _add_cross_style(
    group: Group,
    source: Source,
    target: Source,
    shared: list[str],
    name: str,
    metric: Metric,
    position: str,
    space: str,
    protocol: Protocol,
    out: Collector,
) -> None:
    (fit_rows, fit_labels), (rows, labels) = (
        _shared_rows(source, shared),
        _shared_rows(target, shared),
    )
    protocol.require(min(len(fit_rows), len(rows)), metric)
    fit = rows_of(source[1], position, space, fit_rows)
    x = rows_of(target[1], position, space, rows)
    if len(np.unique(fit_labels)) < len(shared) or len(np.unique(labels)) < len(shared):
        raise UserError("a shared class has no item in one of the styles")
    arguments = protocol.arguments(metric)
    predicted = metric.function(
        fit, fit_labels, fit, fit_labels, x, classes=len(shared), **arguments
    )
    counts = confusion(labels, predicted, len(shared))
    value, interval = accuracy_and_interval(counts, protocol, 0)
    place = group.place(target[0].dataset, target[1], position, space)
    out.add(
        name,
        place,
        value,
        interval,
        1 / len(shared),
        len(rows),
        interval="bootstrap",
        source=source[0].dataset,
        classes=len(shared),
        **arguments,
    )


def _style_split(sources: list[Source], shared: list[str], protocol: Protocol, seed: int) -> Split:
    rng = protocol.rng(seed, 16)
    usable = [_shared_rows(source, shared) for source in sources]
    most = min(len(rows) for rows, _ in usable)
    rows, strata, groups = [], [], []
    for number, (candidates, labels) in enumerate(usable):
        chosen = balanced_rows(labels, most, rng)
        rows.append(candidates[chosen])
        strata += [number] * len(chosen)
        groups += labels[chosen].tolist()
    folds = min(protocol.folds, len(shared))
    fold = deal(strata, groups, groups, folds, rng)
    held = evaluated_folds(fold, folds, protocol.held_out)
    return Split(seed, tuple(rows), np.asarray(strata), fold, folds, held, len(sources), {})


def _shared_rows(source: Source, shared: list[str]) -> tuple[Labels, Labels]:
    """Return rows of shared classes and their number in the family's own numbering."""
    number = {name: i for i, name in enumerate(shared)}
    by_label = np.array([number.get(_fold_name(name), -1) for name in source[0].class_names])
    labels = by_label[source[1].labels]
    rows = np.flatnonzero(labels >= 0)
    return rows, labels[rows]


def _families_or_refuse(
    group: Group, name: str, tower: str, out: Collector
) -> list[tuple[list[Source], list[str]]]:
    found = families(group.sources(tower))
    if not found:
        out.refuse(name, "*", tower, "", "no two datasets share four or more class names")
    return found


def _fold_name(name: str) -> str:
    return name.casefold().strip()
