"""Protocol of metrics of one layer: features alone, with labels, or with class prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from vlmlayers.errors import UserError
from vlmlayers.features import LayerFeatures, TowerFeatures
from vlmlayers.metrics.checks import Array, Labels, class_means, unit_rows
from vlmlayers.metrics.class_level import reduce_rows
from vlmlayers.metrics.intervals import (
    bootstrap_weights,
    jackknife_groups,
    jackknife_interval,
    mean_interval,
    percentile_about,
)
from vlmlayers.metrics.own import OWN
from vlmlayers.metrics.table import Metric
from vlmlayers.positions import TOWERS, sort_key, unextracted
from vlmlayers.scores.options import UNKEYED, Draw, ScoreOptions, generator
from vlmlayers.scores.parts import balanced_rows, independent_rows
from vlmlayers.scores.scoring import Point, Scoring, Source, chosen_positions, rows_of, stated_null


def run_labels(scoring: Scoring) -> None:
    """Score metrics of features and labels inside each dataset."""
    for tower in TOWERS:
        for member, features in scoring.group.sources(tower):
            labels = features.labels[independent_rows(features)]
            if (labels < 0).any():
                scoring.refuse(member.dataset, tower, "its items have no classes")
            elif len(np.unique(labels)) == len(labels):
                scoring.refuse(member.dataset, tower, "one item per class")
            else:
                _run_single(scoring, (member, features), features.labels)


def run_features(scoring: Scoring) -> None:
    """Score metrics of features alone inside each dataset."""
    for tower in TOWERS:
        for source in scoring.group.sources(tower):
            _run_single(scoring, source, None)


def run_heads(scoring: Scoring) -> None:
    """Score what each head of each block does on the items of each dataset: a row per head."""
    for tower in TOWERS:
        for member, features in scoring.group.sources(tower):
            rows = independent_rows(features)
            weights = bootstrap_weights(
                np.zeros(len(rows), np.int64),
                scoring.options.bootstrap,
                generator(Draw.ITEM_WEIGHTS),
            )
            for name, metric in scoring.metrics.items():
                for point in scoring.points(name, metric, [(member, features)]):
                    with point.attempt():
                        point.require(len(rows))
                        x = point.rows(rows)
                        # Nothing is shuffled here: chance is a number that the metric states.
                        null = metric.null if isinstance(metric.null, float) else np.nan
                        for head, value in enumerate(metric.function(x)):
                            noted = {"interval": "bootstrap", "head": head + 1}
                            noted |= _of_captions(features)
                            interval = mean_interval(x[:, head], weights)
                            point.add(value, interval, null, len(x), **noted)


def run_prompts(scoring: Scoring) -> None:
    """Score images against class prompts: each position of a tower against `proj` of the other."""
    for member in scoring.group.members:
        if member.vision is None or member.text is None or member.text.kind != "prompts":
            scoring.refuse(member.dataset, "", "needs images and class prompts")
            continue
        # An image whose class has no prompt could not be right.
        known = np.flatnonzero(np.isin(member.vision.labels, member.text.labels))
        weights = bootstrap_weights(
            member.vision.labels[known], scoring.options.bootstrap, generator(Draw.ZERO_SHOT)
        )
        for name, metric in scoring.metrics.items():
            for space in scoring.options.spaces_of(metric):
                arrays = [tower.arrays.get(space, {}) for tower in (member.vision, member.text)]
                if not all("proj" in by_position for by_position in arrays):
                    reason = unextracted(space)
                    scoring.out.refuse(name, member.dataset, "", "", reason)
                    continue
                for moving, fixed in (("vision", "text"), ("text", "vision")):
                    features = member.tower(moving)
                    for position in chosen_positions([features], space, scoring.options):
                        other = fixed, "proj"
                        point = Point(
                            name, metric, member.dataset, features, space, position, scoring, other
                        )
                        with point.attempt():
                            _add_zero_shot(point, member, known, weights)


def prompt_matrix(text: TowerFeatures, position: str, space: str) -> tuple[Array, Labels]:
    """Return one prompt feature per class (the mean of its unit prompts) and the class ids."""
    ids, member = np.unique(text.labels, return_inverse=True)
    # At length 1, as CLIP averages prompts: the longest of several would decide for all.
    return class_means(unit_rows(rows_of(text, position, space)), member, len(ids)), ids


def _add_zero_shot(point: Point, member: LayerFeatures, known: Labels, weights: Array) -> None:
    vision, text, metric = member.tower("vision"), member.tower("text"), point.metric
    assert metric.per_item is not None
    point.require(len(known))
    here = {point.features.tower: point.position, point.other[0]: point.other[1]}
    prompts, ids = prompt_matrix(text, here["text"], point.space)
    x = rows_of(vision, here["vision"], point.space, known)
    values = metric.per_item(x, prompts, np.searchsorted(ids, vision.labels[known]))
    point.add(
        values.mean(),
        mean_interval(values, weights, metric.is_share),
        1.0 / len(ids),
        len(values),
        interval="bootstrap",
        classes=len(ids),
    )


def _run_single(scoring: Scoring, source: Source, labels: Labels | None) -> None:
    """Score metrics of one tower and dataset at every position; work on the items is shared."""
    shared = _Shared(source[1], labels, scoring.options)
    points = [
        point
        for name, metric in scoring.metrics.items()
        for point in scoring.points(name, metric, [source])
    ]
    # Place by place, not metric by metric: what is made of the features of a place is kept for
    # all metrics there, and for one place at a time.
    for point in sorted(points, key=lambda point: (point.space, sort_key(point.position))):
        metric = point.metric
        with point.attempt():
            rows = shared.rows(metric)
            point.require(len(rows))
            x, width = shared.array(point)
            if metric.distinct:
                kept = metric.distinct(x)
                rows, x = rows[kept], x[kept]
                point.require(len(rows), "distinct items")
            given = () if labels is None else (labels[rows],)
            arguments = point.arguments(width=width)
            value, interval, how = value_and_interval(metric, (x, *given), arguments, shared)
            null = _null(point, x, given, width, shared)
            # There are no more neighbours than other items.
            noted = point.arguments(k=min(point.options.k, len(x) - 1)) | _of_captions(source[1])
            if metric.most is not None and (most := metric.most(*given, **arguments)) < 1:
                interval = interval[0], min(interval[1], max(most, value))
                noted["ceiling"] = round(most, 4)
            point.add(value, interval, null, len(x), interval=how, **noted)


def _of_captions(features: TowerFeatures) -> dict[str, Any]:
    """Return what is noted of captions: that one of each image counts."""
    return {} if features.pairs is None else {"captions": "first"}


def value_and_interval(
    metric: Metric, arrays: tuple[Any, ...], arguments: Mapping[str, Any], shared: _Shared
) -> tuple[float, tuple[float, float], str]:
    """Return a metric's value, its 95 % interval, and how that interval was made."""
    if metric.weighted is not None:
        weights = shared.weights(metric)
        # The value is the draw in which every item counts once: one call for it and for all draws.
        every = np.vstack([np.ones((1, weights.shape[1])), weights])
        draws = metric.weighted(*arrays, every, **arguments)
        return float(draws[0]), percentile_about(draws[0], draws[1:]), "bootstrap"

    def statistic(rows: Labels | None, group: int) -> float:
        kept = arrays if rows is None else tuple(a[rows] for a in arrays)
        if metric.parts and len(kept) == 2:
            kernel = shared.kernel(metric, arrays[0])
            part = kernel if rows is None else kernel[np.ix_(rows, rows)]
            return float(metric.parts[1](part, kept[1], **arguments))
        if metric.parts:
            first, second = metric.parts
            # Metrics that share a first part, such as a spectrum, share it in each group too.
            key = (first, metric.largest_n, group)
            return float(second(shared.once_here(key, lambda: first(*kept))))
        return float(metric.function(*kept, **arguments))

    value = statistic(None, -1)
    if not np.isfinite(value):  # refused for that
        return value, (np.nan, np.nan), "jackknife"
    try:
        groups = shared.groups(metric, len(arrays[0]))
        left_out = [statistic(rows, group) for group, rows in enumerate(groups)]
    except UserError:
        if metric.level != OWN:
            raise
        return value, (np.nan, np.nan), "jackknife"  # it knows these items only, all of them
    low, high = jackknife_interval(value, np.array(left_out))
    return value, (float(low), float(high)), "jackknife"


def _null(point: Point, x: Array, given: tuple[Labels, ...], width: int, shared: _Shared) -> float:
    """Return what chance gives for a metric of features, with or without labels."""
    metric = point.metric
    if (stated := stated_null(metric, len(x), given[0] if given else width)) is not None:
        return stated
    if (metric.null == "shuffle") != bool(given):
        lacking = "features alone" if given else "labels"
        raise UserError(
            f"the null {metric.null!r} of {point.name} needs {lacking}; declare another one"
        )
    arguments = point.arguments(width=width)
    if metric.null == "gaussian":
        return _gaussian_null(metric.function, len(x), width, tuple(arguments.items()))
    if metric.null == "columns":
        rng = generator(Draw.SHUFFLED_COLUMNS)
        draws = (rng.permuted(x, axis=0) for _ in range(point.options.shuffles))
        return float(np.mean([metric.function(draw, **arguments) for draw in draws]))
    rng = generator(Draw.SHUFFLED_LABELS)
    labels = np.stack([rng.permutation(given[0]) for _ in range(point.options.shuffles)])
    if metric.relabelled is not None:
        return float(metric.relabelled(x, labels, **arguments).mean())
    if metric.parts:
        kernel = shared.kernel(metric, x)
        return float(np.mean([metric.parts[1](kernel, y, **arguments) for y in labels]))
    return float(np.mean([metric.function(x, y, **arguments) for y in labels]))


# The same at every position of one width.
@lru_cache(maxsize=256)
def _gaussian_null(
    function: Callable[..., float], n: int, width: int, arguments: tuple[tuple[str, Any], ...]
) -> float:
    noise = np.random.default_rng(UNKEYED).standard_normal((n, width))
    return float(function(noise, **dict(arguments)))


class _Shared:
    """Rows, weights, groups and reduced features of one tower, made once for all metrics."""

    def __init__(
        self, features: TowerFeatures, labels: Labels | None, options: ScoreOptions
    ) -> None:
        self.features, self.labels, self.options = features, labels, options
        self.made: dict[Any, Any] = {}
        self.at = ("", "")
        self.here: dict[Any, Any] = {}

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def _strata(self, metric: Metric) -> Labels:
        rows = self.rows(metric)
        return np.zeros(len(rows), np.int64) if self.labels is None else self.labels[rows]

    def rows(self, metric: Metric) -> Labels:
        """Return the rows to use: all independent ones, balanced where the metric caps n."""
        every = independent_rows(self.features)
        most, labels = metric.largest_n or len(every), self.features.labels[every]
        return self._once(
            ("rows", most), lambda: every[balanced_rows(labels, most, generator(Draw.ITEMS))]
        )

    def weights(self, metric: Metric) -> Array:
        """Return bootstrap weights, the same at every position so that curves are comparable."""
        return self._once(
            ("weights", metric.largest_n),
            lambda: bootstrap_weights(
                self._strata(metric), self.options.bootstrap, generator(Draw.ITEM_WEIGHTS)
            ),
        )

    def groups(self, metric: Metric, n: int) -> list[Labels]:
        """Return the rows that each jackknife group leaves, the same wherever as many count."""
        strata = self._strata(metric)
        # Where not all rows count those that do belong to no class: they are one stratum.
        strata = strata if n == len(strata) else np.zeros(n, np.int64)
        return self._once(
            ("groups", metric.largest_n, n),
            lambda: jackknife_groups(strata, self.options.jackknife, generator(Draw.ITEM_GROUPS)),
        )

    def array(self, point: Point) -> tuple[Array, int]:
        """Return features and width; rotated into their span where the metric does not see it."""
        metric, position, space = point.metric, point.position, point.space
        width = self.features.arrays[space][position].shape[1]
        # For such a metric n items in n − 1 directions are as good as in all columns, and cheaper.
        exact = {"rotation", "translation"} <= set(metric.invariances)

        def make() -> Array:
            x = point.rows(self.rows(metric))
            return reduce_rows(x) if exact else x

        if self.at != (space, position):
            self.at, self.here = (space, position), {}
        return self.once_here((metric.largest_n, exact), make), width

    def kernel(self, metric: Metric, x: Array) -> Array:
        """Return the first part of a metric with labels, (item, item), at this position."""
        first = metric.parts[0]
        kernel: Array = self.once_here((first, metric.largest_n), lambda: first(x))
        return kernel

    def once_here(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return what was made under a key at this position, or make it."""
        if key not in self.here:
            self.here[key] = make()
        return self.here[key]
