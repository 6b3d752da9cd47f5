"""Protocol of generalizability: novel classes, left-out datasets, and other styles."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np

from vlmlayers.errors import UserError
from vlmlayers.metrics.checks import Array, Labels
from vlmlayers.metrics.dataset_level import confusion
from vlmlayers.metrics.transfer import WithinScatter
from vlmlayers.prompts import spelled
from vlmlayers.scores.options import Draw, ScoreOptions, generator
from vlmlayers.scores.parts import balanced_rows, deal, evaluated_folds, shots_and_queries
from vlmlayers.scores.reading import POOLED
from vlmlayers.scores.readouts import Split, add_accuracies, add_accuracy, dealt_together
from vlmlayers.scores.scoring import Point, Scoring, Source


def run_novel(scoring: Scoring) -> None:
    """Score novel classes from a few shots in the geometry of the base classes (first half)."""
    for name, metric in scoring.metrics.items():
        for tower in metric.towers:
            for source in scoring.group.sources(tower):
                labels = source[1].labels
                base, novel = base_and_novel(labels)
                for point in scoring.points(name, metric, [source]):
                    with point.attempt():
                        x = point.rows()
                        geometry = metric.parts[0](x[base], labels[base])
                        _add_few_shot(point, geometry, x[novel], labels[novel], "base_classes")


def run_left_out(scoring: Scoring) -> None:
    """Score each dataset's classes from a few shots in the geometry of all other datasets."""
    for name, metric in scoring.metrics.items():
        for tower in metric.towers:
            sources = scoring.group.sources(tower)
            if len(sources) < 2:
                if sources:
                    reason = scoring.group.too_few(len(sources))
                    scoring.out.refuse(name, POOLED, tower, "", reason)
                continue
            for pooled in scoring.points(name, metric, sources):
                points = [pooled.at(source) for source in sources]
                parts: dict[str, WithinScatter] = {}
                for point in points:
                    with point.attempt():
                        geometry = metric.parts[0](point.rows(), point.features.labels)
                        parts[point.dataset] = geometry
                for point in points:
                    with point.attempt():
                        others = [s for other, s in parts.items() if other != point.dataset]
                        if not others:
                            raise UserError("no other dataset has a geometry at this position")
                        # Scatters add up: leaving a dataset out reads no features again.
                        geometry, labels = sum(others[1:], others[0]), point.features.labels
                        _add_few_shot(point, geometry, point.rows(), labels, "other_datasets")


def base_and_novel(labels: Labels) -> tuple[Labels, Labels]:
    """Return rows of the first half of the classes (rounded up) and rows of the rest."""
    ids = np.unique(labels)
    # The same halves as in training: by class id, without a draw.
    base = np.isin(labels, ids[: (len(ids) + 1) // 2])
    return np.flatnonzero(base), np.flatnonzero(~base)


def _add_few_shot(
    point: Point, geometry: WithinScatter, x: Array, labels: Labels, where: str
) -> None:
    """Add one row per seed: shots drawn, other items of the same classes recognised."""
    ids, y, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    point.require(len(labels))
    if len(ids) < 2:
        raise UserError(f"{len(ids)} class to recognise; at least 2 are needed")
    # One item of the smallest class is left as a query.
    shots = min(point.options.shots, int(sizes.min()) - 1)
    if shots < 1:
        raise UserError("a class has one item; shots and queries need 2")
    factor, recognise = geometry.factor(), point.metric.parts[1]
    for seed in point.options.seeds:
        support, query = shots_and_queries(y, shots, generator(Draw.SHOTS, seed))
        predicted = recognise(factor, x[support], y[support], x[query], classes=len(ids))
        counts = confusion(y[query], predicted, len(ids))
        noted = {"shots": shots, "classes": len(ids), "geometry_from": where}
        add_accuracy(point, counts, seed, **noted)


def families(sources: list[Source]) -> list[tuple[list[Source], list[str]]]:
    """Return groups of datasets that share at least half of their class names, and the names.

    A dataset joins the first family whose shared names, with it, stay at least four and at least
    half of the smaller set.
    """
    found: list[tuple[list[Source], set[str]]] = []
    for source in sources:
        names = {spelled(name) for name in source[0].class_names}
        for number, (members, shared) in enumerate(found):
            common = shared & names
            if len(common) >= max(4, (min(len(shared), len(names)) + 1) // 2):
                found[number] = ([*members, source], common)
                break
        else:
            found.append(([source], names))
    return [(members, sorted(shared)) for members, shared in found if len(members) > 1]


def run_styles(scoring: Scoring) -> None:
    """Score which style (dataset of a family) an item has; split by class, so content is unseen."""
    options = scoring.options
    for name, metric in scoring.metrics.items():
        for tower in metric.towers:
            for sources, shared in _families_or_refuse(scoring, name, tower):
                splits = [_style_split(sources, shared, options, seed) for seed in options.seeds]
                add_accuracies(scoring.points(name, metric, sources), sources, splits)


def run_style_classes(scoring: Scoring) -> None:
    """Score classes of one style by a read-out fitted on another style of the family."""
    for name, metric in scoring.metrics.items():
        for tower in metric.towers:
            for sources, shared in _families_or_refuse(scoring, name, tower):
                points = scoring.points(name, metric, sources)
                for point, (source, target) in product(points, permutations(sources, 2)):
                    with point.at(target).attempt():
                        _add_cross_style(point, source, target, shared)


def _add_cross_style(point: Point, source: Source, target: Source, shared: list[str]) -> None:
    fit_rows, fit_labels = _shared_rows(source, shared)
    rows, labels = _shared_rows(target, shared)
    point.require(min(len(fit_rows), len(rows)))
    if len(np.unique(fit_labels)) < len(shared) or len(np.unique(labels)) < len(shared):
        raise UserError("a shared class has no item in one of the styles")
    fit, x = point.at(source).rows(fit_rows), point.at(target).rows(rows)
    # The fit stands in for the validation part, from which a nearest mean chooses nothing.
    predicted = point.metric.function(
        fit, fit_labels, fit, fit_labels, x, classes=len(shared), **point.arguments()
    )
    counts = confusion(labels, predicted, len(shared))
    noted = {"source": source[0].dataset, "classes": len(shared), **point.arguments()}
    add_accuracy(point.at(target), counts, **noted)


def _style_split(
    sources: list[Source], shared: list[str], options: ScoreOptions, seed: int
) -> Split:
    rng = generator(Draw.STYLE_SPLIT, seed)
    usable = [_shared_rows(source, shared) for source in sources]
    most = min(len(rows) for rows, _ in usable)
    rows, strata, groups = [], [], []
    for number, (candidates, labels) in enumerate(usable):
        chosen = balanced_rows(labels, most, rng)
        rows.append(candidates[chosen])
        strata += [number] * len(chosen)
        groups += labels[chosen].tolist()
    folds = min(options.folds, len(shared))
    fold = deal(strata, groups, groups, folds, rng)
    held = evaluated_folds(fold, folds, options.held_out)
    # Classes are what is new in a part, and items of one err together: classes are resampled.
    family = "+".join(member.dataset for member, _ in sources)
    noted = {"family": family, "split_by": "class", "shared_classes": len(shared)}
    drawn, styles, together = tuple(rows), np.asarray(strata), dealt_together(groups)
    return Split(seed, drawn, styles, fold, folds, held, len(sources), noted, together)


def _shared_rows(source: Source, shared: list[str]) -> tuple[Labels, Labels]:
    """Return rows of shared classes and their number in the family's own numbering."""
    number = {name: i for i, name in enumerate(shared)}
    by_label = np.array([number.get(spelled(name), -1) for name in source[0].class_names])
    labels = by_label[source[1].labels]
    rows = np.flatnonzero(labels >= 0)
    return rows, labels[rows]


def _families_or_refuse(
    scoring: Scoring, name: str, tower: str
) -> list[tuple[list[Source], list[str]]]:
    found = families(scoring.group.in_order.sources(tower))
    if not found:
        reason = "no two datasets share four or more class names"
        scoring.out.refuse(name, POOLED, tower, "", reason)
    return found
