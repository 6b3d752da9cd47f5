"""Protocol of read-outs: datasets and classes recognised on held-out items."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vlmlayers.errors import UserError
from vlmlayers.features import LayerFeatures, TowerFeatures
from vlmlayers.metrics.checks import AT_ONCE, SAME, Array, Labels, ratio
from vlmlayers.metrics.dataset_level import confusion
from vlmlayers.metrics.intervals import (
    bootstrap_weights,
    mean_share_draws,
    percentile,
    wilson,
)
from vlmlayers.metrics.table import METRICS
from vlmlayers.positions import TOWERS
from vlmlayers.prompts import spelled
from vlmlayers.scores.options import Draw, ScoreOptions, generator
from vlmlayers.scores.parts import balanced_rows, deal, evaluated_folds
from vlmlayers.scores.reading import POOLED
from vlmlayers.scores.scoring import Group, Point, Scoring, Source
from vlmlayers.words import counted

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Split:
    """Items of one seed: their classes, their folds, and which folds are held out in turn.

    `groups` says which items are resampled together, where some are: those that are dealt to folds
    together, as captions of an image and, in a split by class, all items of a class. `best` is the
    largest accuracy that copies of an item in several classes leave possible.
    """

    seed: int
    rows: tuple[Labels, ...]
    labels: Labels
    fold: Labels
    folds: int
    held: range
    classes: int
    options: Mapping[str, Any]
    groups: Labels | None = None
    best: float = 1.0

    def parts(self) -> Iterator[tuple[Any, Any, Any]]:
        """Yield which items fit, which choose and which are held out, in each turn."""
        for held in self.held:
            out = self.fold == held
            # The next fold chooses the strength of the ridge: held-out items choose nothing.
            val = self.fold == (held + 1) % self.folds
            yield ~out & ~val, val, out

    def counts(self, predicted: Labels) -> Array:
        """Return the confusion counts of the held-out items, (class, class)."""
        held = predicted >= 0
        return confusion(self.labels[held], predicted[held], self.classes)

    def interval(self, predicted: Labels, draws: int) -> tuple[float, float]:
        """Return the interval of the balanced accuracy; it stays below what is possible."""
        if self.groups is None:
            return accuracy_interval(self.counts(predicted), draws, self.seed)
        held = predicted >= 0
        groups = np.unique(self.groups[held], return_inverse=True)[1]
        truth = self.labels[held]
        sizes = np.zeros((groups.max() + 1, self.classes))
        hits = np.zeros_like(sizes)
        np.add.at(sizes, (groups, truth), 1.0)
        np.add.at(hits, (groups, truth), predicted[held] == truth)
        return _grouped_interval(hits, sizes, self.best, draws, self.seed)

    def independent(self) -> Labels:
        """Return how many items of each class are held out, those dealt together as one."""
        tested = np.isin(self.fold, self.held)
        labels = self.labels[tested]
        if self.groups is not None:
            labels = np.unique(np.stack([labels, self.groups[tested]]), axis=1)[0]
        return np.bincount(labels, minlength=self.classes)

    def noted(self, point: Point) -> dict[str, Any]:
        """Return what is noted beside a value: neighbours as many as every turn had."""
        fewest = min(int(np.bincount(self.labels[fit]).min()) for fit, _, _ in self.parts())
        return {**self.options, **point.arguments(k=min(point.options.k, fewest))}


def run_datasets(scoring: Scoring, towers: tuple[str, ...] = TOWERS) -> None:
    """Score how well read-outs tell from which dataset an item comes."""
    metrics, options = scoring.metrics, scoring.options
    readouts = {name: m for name, m in metrics.items() if not m.base}
    derived = {name: m for name, m in metrics.items() if m.base}
    # Some derived metrics were asked for without the read-out whose confusions they are made of.
    for base in {m.base for m in derived.values()} - set(readouts):
        readouts[base] = METRICS[base]
    for tower in towers:
        sources = scoring.group.in_order.sources(tower)
        if not sources:
            continue
        try:
            if len(sources) < 2:
                raise UserError(scoring.group.too_few(len(sources)))
            splits = [dataset_split(sources, options, seed) for seed in options.seeds]
        except UserError as error:
            scoring.refuse(POOLED, tower, str(error))
            continue
        names = [member.dataset for member, _ in sources]
        for name, metric in readouts.items():
            follow = {n: m for n, m in derived.items() if m.base == name}
            places = scoring.points(name, metric, sources)
            for point, found in held_out_predictions(places, sources, splits):
                with point.attempt():
                    for split, predicted in zip(splits, found):
                        counts = split.counts(predicted)
                        interval = split.interval(predicted, options.bootstrap)
                        if name in metrics:
                            add_accuracy(point, counts, split.seed, interval, **split.noted(point))
                        # From the same counts, so that they add up to the accuracy.
                        for other, entry in follow.items():
                            derived_point = replace(point, name=other, metric=entry)
                            _add_derived(derived_point, names, counts, interval, split)


def run_classes(scoring: Scoring) -> None:
    """Score how well read-outs tell the class inside each dataset."""
    options = scoring.options
    for tower in TOWERS:
        for source in scoring.group.sources(tower):
            try:
                splits = [class_split(source[1], options, seed) for seed in options.seeds]
            except UserError as error:
                scoring.refuse(source[0].dataset, tower, str(error))
                continue
            for name, metric in scoring.metrics.items():
                add_accuracies(scoring.points(name, metric, [source]), [source], splits)


def dataset_split(sources: list[Source], options: ScoreOptions, seed: int) -> Split:
    """Draw the items of dataset accuracy and deal them to folds.

    Images: equally many of each dataset (the size of the smallest) or all of them, dealt by item
    and spread over classes. Class prompts: all of them, dealt by class name, so that a name that
    two datasets share stays in one part. Captions are dealt by image. Where datasets differ in
    size they weigh the same in the fit and in the accuracy.

    Raises:
        UserError: A dataset has too few items to be in every part.
    """
    rng = generator(Draw.DATASET_SPLIT, seed)
    prompts = any(features.kind == "prompts" for _, features in sources)
    by_class = prompts or options.vision_split == "class"
    equal = sources[0][1].tower == "vision" and options.balance == "equal"
    most = min(len(features) for _, features in sources)
    rows = tuple(
        balanced_rows(f.labels, most, rng) if equal else np.arange(len(f)) for _, f in sources
    )
    strata, groups, order, texts = [], [], [], []
    for number, ((member, features), chosen) in enumerate(zip(sources, rows)):
        for row in chosen:
            # Captions of no class are dealt by their image.
            names = member.class_names
            name = spelled(names[features.labels[row]]) if names else ""
            together: Any = (number, int(row))
            if by_class and (names or features.pairs is None):
                # A prompt of a class must not lie on both sides of the split.
                together = name
            elif features.pairs is not None:
                together = (number, int(features.pairs[row]))
            strata.append(number)
            groups.append(together)
            texts.append((name, spelled(features.ids[row])))
            order.append(name)
    counts = [len({g for s, g in zip(strata, groups) if s == i}) for i in range(len(sources))]
    fewest = min(counts)
    folds = min(options.folds, fewest)
    if folds < 3:
        small = sources[counts.index(fewest)][0].dataset
        raise UserError(f"{small} has {fewest} independent items; at least 3 are needed to split")
    fold = deal(strata, groups, order, folds, rng)
    labels = np.asarray(strata, dtype=np.int64)
    noted: dict[str, Any] = {
        "split_by": "class" if by_class else "item",
        "balance": "equal" if equal else "weights",
        "folds": folds,
    }
    held = evaluated_folds(fold, folds, options.held_out)
    split = Split(
        seed, rows, labels, fold, folds, held, len(sources), noted, dealt_together(groups)
    )
    if not prompts:
        return split
    tested = np.isin(fold, held)
    best = _ceiling(labels[tested], _numbered(texts)[tested])
    noted["ceiling"] = round(best, 4)
    return replace(split, best=best)


def tell_classes_left_out(scoring: Scoring) -> None:
    """Warn of datasets some of whose classes have too few items to be in every part."""
    for tower in TOWERS:
        for member, features in scoring.group.sources(tower):
            sizes = _class_sizes(features)
            few = sum(size < 3 for size in sizes.values())
            # Of none or one class there is no value at all, which is said as what was not computed.
            if few and len(sizes) - few >= 2:
                LOG.warning(
                    "%s: %d of %s %s fewer than 3 items in the %s tower and %s left out of %s; "
                    "take more items",
                    member.dataset,
                    few,
                    counted(len(sizes), "class"),
                    "has" if few == 1 else "have",
                    tower,
                    "is" if few == 1 else "are",
                    ", ".join(scoring.metrics),
                )


def tell_unlike_texts(group: Group, metrics: Iterable[str]) -> None:
    """Warn of datasets whose texts are made unlike: what pools them sees that, not the datasets.

    Args:
        group: The datasets that are pooled.
        metrics: Names of the metrics that pool their texts.
    """
    unlike = _unlike((_made(*source), source[0].dataset) for source in group.sources("text"))
    if unlike and (names := ", ".join(metrics)):
        LOG.warning(
            "datasets differ in how their texts are made: %s. Of the text tower, %s of all "
            "datasets together may tell that, not the datasets; extract with one template",
            unlike,
            names,
        )


def tell_unlike_passes(group: Group, metrics: Iterable[str]) -> None:
    """Warn of datasets whose features were computed unlike, which what pools them sees as well.

    At `embed` a class token is the same for every image but for its rounding: one of two precisions
    tells its dataset without fail.

    Args:
        group: The datasets that are pooled.
        metrics: Names of the metrics that pool their features.
    """
    names = ", ".join(metrics)
    for key, unsaid in (("precision", ""), ("device", ""), ("decoding", "full")):
        # Features that were recorded elsewhere say nothing of it.
        unlike = _unlike(
            (one.identity.get(key, unsaid if one.identity else ""), one.dataset)
            for one in group.members
        )
        if unlike and names:
            LOG.warning(
                "datasets differ in %s: %s. %s of all datasets together may tell that, not the "
                "datasets; extract them alike",
                key,
                unlike,
                names,
            )


def _unlike(made: Iterable[tuple[str, str]]) -> str:
    """Return how datasets are made, and which; empty where it is one way, as far as known."""
    found: dict[str, list[str]] = {}
    for how, dataset in made:
        if how:
            found.setdefault(how, []).append(dataset)
    said = "; ".join(f"{how} in {', '.join(those)}" for how, those in found.items())
    return said if len(found) > 1 else ""


def _made(member: LayerFeatures, features: TowerFeatures) -> str:
    """Return how the texts of a dataset are made, in words; empty where it is not known."""
    if features.kind == "captions":
        return "captions"
    template = member.identity.get("template")
    return "" if template is None else repr(template) if template else "texts of their own"


def _independent(features: TowerFeatures) -> Labels:
    """Return which items belong together: captions by their image, (item,)."""
    return np.arange(len(features)) if features.pairs is None else features.pairs


def _class_sizes(features: TowerFeatures) -> dict[int, int]:
    """Return how many independent items each class has."""
    groups = _independent(features)
    return {int(c): len(set(groups[features.labels == c])) for c in np.unique(features.labels)}


def class_split(features: TowerFeatures, options: ScoreOptions, seed: int) -> Split:
    """Deal the items of each class to folds; classes with fewer than three items are left out.

    Raises:
        UserError: Fewer than two classes have three items.
    """
    if (features.labels < 0).any():
        raise UserError("its items have no classes")
    groups = _independent(features)
    sizes = _class_sizes(features)
    usable = [c for c, size in sizes.items() if size >= 3]
    if len(usable) < 2:
        raise UserError(
            f"{counted(len(usable), 'class')} with 3 items or more; at least 2 are needed"
        )
    # Three items of a class are one each to fit, to choose and to test.
    rows = np.flatnonzero(np.isin(features.labels, usable))
    labels = np.searchsorted(np.array(usable), features.labels[rows])
    folds = min(options.folds, min(sizes[c] for c in usable))
    rng = generator(Draw.CLASS_SPLIT, seed)
    fold = deal(labels.tolist(), groups[rows].tolist(), labels.tolist(), folds, rng)
    held = evaluated_folds(fold, folds, options.held_out)
    noted = {"classes": len(usable), "folds": folds}
    if len(usable) < len(sizes):
        noted["classes_left_out"] = len(sizes) - len(usable)
    shared = dealt_together(groups[rows].tolist())
    return Split(seed, (rows,), labels, fold, folds, held, len(usable), noted, shared)


def add_accuracies(points: Iterable[Point], sources: list[Source], splits: Sequence[Split]) -> None:
    """Add what a read-out comes to at each place on each split; see `held_out_predictions`."""
    for point, found in held_out_predictions(points, sources, splits):
        with point.attempt():
            for split, predicted in zip(splits, found):
                counts = split.counts(predicted)
                interval = split.interval(predicted, point.options.bootstrap)
                add_accuracy(point, counts, split.seed, interval, **split.noted(point))


def held_out_predictions(
    points: Iterable[Point], sources: list[Source], splits: Sequence[Split]
) -> Iterator[tuple[Point, list[Labels]]]:
    """Yield each place with what a read-out predicts for the held-out items of each split.

    Where the metric can take many fits at once, it is handed those of several places; a complaint
    makes them go one by one, so that only the place it is about is refused.

    Args:
        points: Places of one metric.
        sources: The datasets whose items are in the splits.
        splits: What is held out.

    Yields:
        A place, and (item,) for each split: the predicted class, -1 of items that no turn held out.
    """
    points = list(points)
    # At least 1: without items each place is refused below.
    fits = max(1, sum(len(split.labels) * len(split.held) for split in splits))
    while points:
        together = (
            # As many places as keep the products of all their regressions small.
            max(1, AT_ONCE // (fits * points[0].width)) if points[0].metric.of_parts else 1
        )
        batch, points = points[:together], points[together:]
        try:
            with batch[0].scoring.out.timed(batch[0].name):
                found = _predicted(batch, sources, splits)
        except UserError as error:
            if len(batch) == 1:
                batch[0].refuse(str(error))
            else:
                for point in batch:
                    yield from held_out_predictions([point], sources, splits)
        else:
            yield from zip(batch, found)


def _predicted(
    batch: list[Point], sources: list[Source], splits: Sequence[Split]
) -> list[list[Labels]]:
    """Return the predictions for each place and split, [place][split] (item,)."""
    parts: list[tuple[Any, ...]] = []
    for point in batch:
        for split in splits:
            point.require(len(split.labels))
            x = np.concatenate([point.at(one).rows(rows) for one, rows in zip(sources, split.rows)])
            labels = split.labels
            for fit, val, out in split.parts():
                parts.append((x[fit], labels[fit], x[val], labels[val], x[out]))
    found = iter(_predictions(batch[0], parts, splits[0].classes))
    result = []
    for _ in batch:
        result.append([np.full(len(split.labels), -1) for split in splits])
        for split, predicted in zip(splits, result[-1]):
            for held in split.held:
                predicted[split.fold == held] = next(found)
    return result


def _predictions(point: Point, parts: list[tuple[Any, ...]], classes: int) -> list[Labels]:
    metric, arguments = point.metric, point.arguments()
    if metric.of_parts is not None:
        predicted: list[Labels] = metric.of_parts(parts, classes=classes, **arguments)
        return predicted
    return [metric.function(*part, classes=classes, **arguments) for part in parts]


def accuracy_interval(counts: Array, draws: int, seed: int = -1) -> tuple[float, float]:
    """Return the interval of the mean share of each class that is right, items resampled."""
    sizes = counts.sum(axis=1).astype(np.int64)
    hits, sizes = np.diagonal(counts)[sizes > 0], sizes[sizes > 0]
    value = float((hits / sizes).mean())
    if value in (0.0, 1.0):  # resampling cannot vary what is all wrong or all right
        low, high = wilson(value, sizes.sum())
        return float(low), float(high)
    rng = generator(Draw.ACCURACY, max(seed, 0))
    return percentile(mean_share_draws(hits, sizes, draws, rng))


def _grouped_interval(
    hits: Array, sizes: Array, best: float, draws: int, seed: int
) -> tuple[float, float]:
    """Return the interval of the mean share of each class that is right, groups resampled.

    Args:
        hits: Items of a group that are right, (group, class).
        sizes: All its items, (group, class).
        best: The largest mean share there can be.
        draws: Number of resamples.
        seed: Seed of the split.
    """
    hits, sizes = hits[:, sizes.any(axis=0)], sizes[:, sizes.any(axis=0)]
    value = float((hits.sum(axis=0) / sizes.sum(axis=0)).mean())
    best = max(best, value)  # copies that differ by rounding may come out on two sides
    if value == 0.0 or value >= best - SAME:  # what cannot vary, as without groups
        low, high = wilson(float(value > 0.0), len(sizes))
        return best * float(low), best * float(high)
    # Groups in the same classes replace each other: each draw shares as many as the items do.
    strata = np.unique(sizes > 0, axis=0, return_inverse=True)[1].ravel()
    weights = bootstrap_weights(strata, draws, generator(Draw.ACCURACY, seed))
    draws_of_mean = ratio(weights @ hits, weights @ sizes).mean(axis=1)
    # Where such groups are too few to be drawn by themselves, some draws share less.
    return percentile(np.minimum(draws_of_mean, best), len(sizes) - len(np.unique(strata)))


def add_accuracy(
    point: Point,
    counts: Array,
    seed: int = -1,
    interval: tuple[float, float] | None = None,
    /,
    **noted: Any,
) -> None:
    """Add balanced accuracy over the classes that were held out, with its interval.

    Args:
        point: Where it belongs.
        counts: Confusion counts, (class, class).
        seed: Seed of the split; -1 where nothing was drawn.
        interval: Its interval; None for that of items resampled inside each class.
        **noted: What to note beside it.
    """
    sizes = counts.sum(axis=1)
    value = float((np.diagonal(counts)[sizes > 0] / sizes[sizes > 0]).mean())
    interval = interval or accuracy_interval(counts, point.options.bootstrap, seed)
    n = int(counts.sum())
    point.add(value, interval, 1.0 / len(counts), n, seed, interval="bootstrap", **noted)


def _add_derived(
    point: Point,
    datasets: list[str],
    counts: Array,
    interval: tuple[float, float],
    split: Split,
) -> None:
    """Add what follows from the confusion counts: one value, one per dataset, or one per pair.

    One value is a function of the accuracy, whose interval it takes.
    """
    metric = point.metric
    value = np.asarray(metric.function(counts))
    null = float(metric.null) if isinstance(metric.null, (int, float)) else 1.0 / len(counts)
    # A ceiling of the accuracy is none of a recall or a confusion.
    noted = {key: value for key, value in split.options.items() if key != "ceiling"}
    if not value.ndim and split.best < 1.0:
        noted["floor"] = round(float(metric.function(_with_accuracy(split.best, len(counts)))), 4)
    common = {"readout": metric.base, **noted}
    common |= point.options.arguments(METRICS[metric.base])
    units = split.independent()
    # Rows come in the order in which the datasets were named.
    named = [member.dataset for member in point.scoring.group.members]
    order = [named.index(dataset) for dataset in datasets]
    for index in sorted(np.ndindex(value.shape), key=lambda index: [order[i] for i in index]):
        if len(index) == 2 and index[0] == index[1]:
            continue
        own = {"predicted": datasets[index[1]]} if len(index) == 2 else {}
        n = int(counts[index[0]].sum()) if index else int(counts.sum())
        if index:  # a single share is binomial
            low, high = map(float, wilson(value[index], float(units[index[0]])))
        else:
            ends = (_with_accuracy(end, len(counts)) for end in interval)
            low, high = sorted(float(metric.function(end)) for end in ends)
        place = replace(point, dataset=datasets[index[0]]) if index else point
        place.add(
            float(value[index]),
            (low, high),
            null,
            n,
            split.seed,
            interval="wilson" if index else "bootstrap",
            **own,
            **common,
        )


def _with_accuracy(accuracy: float, classes: int) -> Array:
    """Return shares of a confusion with this accuracy, its errors spread evenly."""
    wrong = (1.0 - accuracy) / (classes - 1)
    return np.full((classes, classes), wrong) + np.eye(classes) * (accuracy - wrong)


def _numbered(keys: Sequence[Hashable]) -> Labels:
    """Return each key as a number, the same for equal ones, (item,)."""
    number: dict[Hashable, int] = {}
    return np.array([number.setdefault(key, len(number)) for key in keys], dtype=np.int64)


def dealt_together(groups: Sequence[Hashable]) -> Labels | None:
    """Return the group of each item by number, (item,); None where each is one of its own."""
    return _numbered(groups) if len(set(groups)) < len(groups) else None


def _ceiling(labels: Labels, texts: Labels) -> float:
    """Return the best balanced accuracy where datasets share prompts.

    A shared prompt is right in one dataset, at best in the one of which it is the largest share.
    """
    owned = np.zeros((texts.max() + 1, labels.max() + 1))
    np.add.at(owned, (texts, labels), 1.0)
    owned = owned[:, owned.any(axis=0)]
    return float((owned / owned.sum(axis=0)).max(axis=1).sum() / owned.shape[1])
