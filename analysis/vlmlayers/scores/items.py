"""Protocol of metrics of one layer: features alone, with labels, or with class prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from vlmlayers.errors import UserError
from vlmlayers.features import LayerFeatures, TowerFeatures
from vlmlayers.metrics.checks import Array, Labels
from vlmlayers.metrics.class_level import reduce_rows
from vlmlayers.metrics.intervals import (
    bootstrap_weights,
    jackknife_groups,
    jackknife_interval,
    mean_interval,
    percentile,
)
from vlmlayers.metrics.table import METRICS, Metric
from vlmlayers.positions import sort_key
from vlmlayers.scores.parts import balanced_rows
from vlmlayers.scores.protocol import Collector, Group, Protocol, chosen_positions, rows_of
from vlmlayers.scores.readouts import grid


def run_labels(
    group: Group, metrics: Mapping[str, Metric], protocol: Protocol, out: Collector
) -> None:
    """Score metrics of features and labels inside each dataset."""
    for tower in ("vision", "text"):
        for member, features in group.sources(tower):
            if len(np.unique(features.labels)) == len(features):
                for name in metrics:
                    out.refuse(name, member.dataset, tower, "", "one item per class")
                continue
            _run_single(group, member, features, metrics, protocol, out, features.labels)


def run_features(
    group: Group, metrics: Mapping[str, Metric], protocol: Protocol, out: Collector
) -> None:
    """Score metrics of features alone inside each dataset."""
    for tower in ("vision", "text"):
        for member, features in group.sources(tower):
            _run_single(group, member, features, metrics, protocol, out, None)


def run_prompts(
    group: Group, metrics: Mapping[str, Metric], protocol: Protocol, out: Collector
) -> None:
    """Score images against class prompts: each position of a tower against `proj` of the other."""
    for member in group.members:
        if member.vision is None or member.text is None or member.text.kind != "prompts":
            for name in metrics:
                out.refuse(name, member.dataset, "", "", "needs images and class prompts")
            continue
        known = np.flatnonzero(np.isin(member.vision.labels, member.text.labels))
        for name, metric in metrics.items():
            for space in protocol.spaces_of(metric):
                _run_zero_shot(group, member, known, name, metric, space, protocol, out)


def prompt_matrix(text: TowerFeatures, position: str, space: str) -> tuple[Array, Labels]:
    """Return one prompt feature per class (the mean of its prompts) and the class ids."""
    ids, member = np.unique(text.labels, return_inverse=True)
    sums = np.eye(len(ids))[member].T @ rows_of(text, position, space)
    return sums / np.bincount(member)[:, None], ids


def _run_zero_shot(
    group: Group,
    member: LayerFeatures,
    known: Labels,
    name: str,
    metric: Metric,
    space: str,
    protocol: Protocol,
    out: Collector,
) -> None:
    vision, text = member.vision, member.text
    assert vision is not None and text is not None and metric.per_item is not None
    both = (set(vision.arrays.get(space, ())), set(text.arrays.get(space, ())))
    if not all("proj" in positions for positions in both):
        out.refuse(name, member.dataset, "", "", f"no {space} features were extracted")
        return
    labels = vision.labels[known]
    weights = bootstrap_weights(labels, protocol.bootstrap, protocol.rng(0, 5))
    for moving, fixed in ((vision, text), (text, vision)):
        for position in chosen_positions([moving], space, protocol):
            here = (position, "proj") if moving is vision else ("proj", position)
            with out.attempt(name, member.dataset, moving.tower, position):
                protocol.require(len(known), metric)
                x = rows_of(vision, here[0], space, known)
                prompts, ids = prompt_matrix(text, here[1], space)
                values = metric.per_item(x, prompts, np.searchsorted(ids, labels))
                place = group.place(member.dataset, moving, position, space, fixed.tower, "proj")
                out.add(
                    name,
                    place,
                    values.mean(),
                    mean_interval(values, weights, metric.is_share),
                    1.0 / len(ids),
                    len(values),
                    interval="bootstrap",
                    classes=len(ids),
                )


def _run_single(
    group: Group,
    member: LayerFeatures,
    features: TowerFeatures,
    metrics: Mapping[str, Metric],
    protocol: Protocol,
    out: Collector,
    labels: Labels | None,
) -> None:
    """Score metrics of one tower and dataset at every position; work on the items is shared."""
    shared = _Shared(features, labels, protocol)
    tasks = [
        (space, sort_key(position), position, name)
        for name, metric in metrics.items()
        for space, position in grid([(member, features)], name, metric, protocol, out)
    ]
    for space, _, position, name in sorted(tasks, key=lambda task: task[:2]):
        metric = metrics[name]
        with out.attempt(name, member.dataset, features.tower, position):
            rows = shared.rows(metric)
            protocol.require(len(rows), metric)
            x, width = shared.array(metric, position, space)
            given = () if labels is None else (labels[rows],)
            value, interval, how = value_and_interval(
                metric, (x, *given), protocol.arguments(metric, width=width), shared
            )
            null = _null(name, metric, x, given, width, protocol)
            place = group.place(member.dataset, features, position, space)
            noted = {k: v for k, v in protocol.arguments(metric).items() if k != "width"}
            out.add(name, place, value, interval, null, len(x), interval=how, **noted)


def value_and_interval(
    metric: Metric, arrays: tuple[Any, ...], arguments: Mapping[str, Any], shared: _Shared
) -> tuple[float, tuple[float, float], str]:
    """Return a metric's value, its 95 % interval, and how that interval was made."""
    if metric.weighted is not None:
        weights = shared.weights(metric)
        every = np.vstack([np.ones((1, weights.shape[1])), weights])
        draws = metric.weighted(*arrays, every, **arguments)
        return float(draws[0]), percentile(draws[1:]), "bootstrap"
    if metric.per_item is not None:
        values = metric.per_item(*arrays, **arguments)
        interval = mean_interval(values, shared.weights(metric), metric.is_share)
        return float(values.mean()), interval, "bootstrap"

    def statistic(rows: Labels | None, group: int) -> float:
        kept = arrays if rows is None else tuple(a[rows] for a in arrays)
        if metric.parts:
            first, second = metric.parts
            key = (first, metric.largest_n, group)
            return float(second(shared.once_here(key, lambda: first(*kept))))
        return float(metric.function(*kept, **arguments))

    value = statistic(None, -1)
    left_out = [statistic(rows, group) for group, rows in enumerate(shared.groups(metric))]
    low, high = jackknife_interval(value, np.array(left_out))
    return value, (float(low), float(high)), "jackknife"


def _null(
    name: str, metric: Metric, x: Array, given: tuple[Labels, ...], width: int, protocol: Protocol
) -> float:
    """Return what chance gives for a metric of features, with or without labels."""
    if isinstance(metric.null, (int, float)):
        return float(metric.null)
    if callable(metric.null):
        return float(metric.null(len(x), given[0] if given else width))
    if metric.null == "none":
        return float("nan")
    if metric.null == "gaussian":
        return _gaussian_null(name, len(x), width)
    if not given:
        raise UserError(f"the null {metric.null!r} of {name} needs labels; declare another one")
    rng = protocol.rng(0, 6)
    arguments = protocol.arguments(metric, width=width)
    labels = np.stack([rng.permutation(given[0]) for _ in range(protocol.shuffles)])
    if metric.relabelled is not None:
        return float(metric.relabelled(x, labels, **arguments).mean())
    return float(np.mean([metric.function(x, y, **arguments) for y in labels]))


@lru_cache(maxsize=256)
def _gaussian_null(name: str, n: int, width: int) -> float:
    noise = np.random.default_rng(0).standard_normal((n, width))
    return float(METRICS[name].function(noise))


class _Shared:
    """Rows, weights, groups and reduced features of one tower, made once for all metrics."""

    def __init__(self, features: TowerFeatures, labels: Labels | None, protocol: Protocol) -> None:
        self.features, self.labels, self.protocol = features, labels, protocol
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
        """Return the rows to use: all, or a balanced subset where the metric caps n."""
        n = len(self.features)
        most = metric.largest_n or n
        return self._once(
            ("rows", most),
            lambda: balanced_rows(self.features.labels, most, self.protocol.rng(0, 7)),
        )

    def weights(self, metric: Metric) -> Array:
        """Return bootstrap weights, the same at every position so that curves are comparable."""
        return self._once(
            ("weights", metric.largest_n),
            lambda: bootstrap_weights(
                self._strata(metric), self.protocol.bootstrap, self.protocol.rng(0, 8)
            ),
        )

    def groups(self, metric: Metric) -> list[Labels]:
        """Return the rows that each jackknife group leaves, the same at every position."""
        return self._once(
            ("groups", metric.largest_n),
            lambda: jackknife_groups(
                self._strata(metric), self.protocol.jackknife, self.protocol.rng(0, 9)
            ),
        )

    def array(self, metric: Metric, position: str, space: str) -> tuple[Array, int]:
        """Return features and width; rotated into their span where the metric does not see it."""
        width = self.features.arrays[space][position].shape[1]
        exact = {"rotation", "translation"} <= set(metric.invariances)

        def make() -> Array:
            x = rows_of(self.features, position, space, self.rows(metric))
            return reduce_rows(x) if exact else x

        if self.at != (space, position):
            self.at, self.here = (space, position), {}
        return self.once_here((metric.largest_n, exact), make), width

    def once_here(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return what was made under a key at this position, or make it."""
        if key not in self.here:
            self.here[key] = make()
        return self.here[key]
