"""Protocol of agreement: position × position matrices, with a permutation null for every cell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmlayers.features import LayerFeatures, TowerFeatures
from vlmlayers.metrics.agreement import calibrated
from vlmlayers.metrics.checks import Array, Labels
from vlmlayers.metrics.class_level import reduce_rows
from vlmlayers.metrics.intervals import jackknife_groups, jackknife_interval
from vlmlayers.metrics.table import METRICS, Metric
from vlmlayers.scores.parts import balanced_rows
from vlmlayers.scores.protocol import Collector, Group, Protocol, chosen_positions, rows_of


@dataclass(frozen=True, eq=False)
class Side:
    """One tower's features at several positions, rows in the order of the pairing."""

    features: TowerFeatures
    arrays: dict[str, Array]


@dataclass(frozen=True, eq=False)
class Pairing:
    """Two sides whose rows belong together.

    Attributes:
        dataset: Name, or `*` where several are pooled.
        kind: `items`, `class_means` or `captions`.
        sides: Two sides; the same object twice for agreement within a tower.
    """

    dataset: str
    kind: str
    sides: tuple[Side, Side]

    @property
    def within(self) -> bool:
        """Whether both sides are one tower."""
        return self.sides[0] is self.sides[1]

    @property
    def n(self) -> int:
        """Number of paired rows."""
        return len(next(iter(self.sides[0].arrays.values()), ()))


def run_pairs(
    group: Group, metrics: Mapping[str, Metric], protocol: Protocol, out: Collector
) -> None:
    """Score agreement of every position with every other, within and across towers."""
    wanted: dict[str, set[str]] = {}
    for name, metric in metrics.items():
        wanted.setdefault(metric.base or name, set()).add(name)
    for base, names in wanted.items():
        metric = METRICS[base]
        for space in protocol.spaces_of(metric):
            with out.timed(base):
                for pairing in pairings(group, metric.largest_n, space, protocol, base, out):
                    _run_matrix(group, pairing, base, metric, names, space, protocol, out)


def pairings(
    group: Group, most: int, space: str, protocol: Protocol, name: str, out: Collector
) -> list[Pairing]:
    """Return the pairings of a group: within each tower and across, per dataset and pooled.

    Within a tower rows are items. Across towers rows are classes (mean of the images, mean of the
    prompts) or images with their first caption. Pooled pairings take equally many of each dataset.
    """
    found: list[Pairing] = []
    for dataset, members in _scopes(group):
        share = max(most // len(members), 1)
        sides: dict[str, Side] = {}
        for tower in ("vision", "text"):
            having = [(m, f) for m, f in group.sources(tower) if m in members]
            if len(having) != len(members):
                continue
            rows = [balanced_rows(f.labels, share, protocol.rng(0, 17)) for _, f in having]
            sides[tower] = _side([f for _, f in having], rows, space, protocol)
            if not sides[tower].arrays:
                out.refuse(name, dataset, tower, "", f"no {space} features were extracted")
                continue
            found.append(Pairing(dataset, "items", (sides[tower], sides[tower])))
        if len(sides) == 2:
            found += _across(dataset, members, share, space, protocol)
    return found


def _scopes(group: Group) -> list[tuple[str, list[LayerFeatures]]]:
    single = [(member.dataset, [member]) for member in group.members]
    return [*single, ("*", list(group.members))] if len(single) > 1 else single


def _side(towers: list[TowerFeatures], rows: list[Labels], space: str, protocol: Protocol) -> Side:
    arrays = {
        position: np.concatenate([rows_of(f, position, space, r) for f, r in zip(towers, rows)])
        for position in chosen_positions(towers, space, protocol)
    }
    return Side(towers[0], arrays)


def _across(
    dataset: str, members: list[LayerFeatures], share: int, space: str, protocol: Protocol
) -> list[Pairing]:
    """Return the pairing of vision with text: by captions where all have them, else by class."""
    captions = all(m.text is not None and m.text.pairs is not None for m in members)
    if not captions and any(m.text is not None and m.text.pairs is not None for m in members):
        members = [m for m in members if m.text is not None and m.text.pairs is None]
    visions, texts = [m.tower("vision") for m in members], [m.tower("text") for m in members]
    both = []
    for towers, others in ((visions, texts), (texts, visions)):
        arrays = {
            position: np.concatenate(
                [
                    _paired_rows(f, o, position, space, captions, share, protocol)
                    for f, o in zip(towers, others)
                ]
            )
            for position in chosen_positions(towers, space, protocol)
        }
        both.append(Side(towers[0], arrays))
    if not (both[0].arrays and both[1].arrays):
        return []
    return [Pairing(dataset, "captions" if captions else "class_means", (both[0], both[1]))]


def _paired_rows(
    features: TowerFeatures,
    other: TowerFeatures,
    position: str,
    space: str,
    captions: bool,
    share: int,
    protocol: Protocol,
) -> Array:
    """Return one row per class that both towers have, or one per captioned image."""
    if captions:
        text = features if features.pairs is not None else other
        assert text.pairs is not None
        images, first = np.unique(text.pairs, return_index=True)
        chosen = balanced_rows(np.zeros(len(images), np.int64), share, protocol.rng(0, 18))
        rows = first[chosen] if features is text else images[chosen]
        return rows_of(features, position, space, rows)
    common = np.intersect1d(features.labels, other.labels)
    common = common[balanced_rows(np.zeros(len(common), np.int64), share, protocol.rng(0, 18))]
    kept = np.flatnonzero(np.isin(features.labels, common))
    member = np.searchsorted(common, features.labels[kept])
    sums = np.eye(len(common))[member].T @ rows_of(features, position, space, kept)
    return sums / np.bincount(member)[:, None]


def _run_matrix(
    group: Group,
    pairing: Pairing,
    base: str,
    metric: Metric,
    names: set[str],
    space: str,
    protocol: Protocol,
    out: Collector,
) -> None:
    dataset, tower = pairing.dataset, pairing.sides[0].features.tower
    if pairing.n < metric.smallest_n:
        out.refuse(
            base,
            dataset,
            tower,
            "",
            f"{pairing.n} {pairing.kind}; at least {metric.smallest_n} are needed",
        )
        return
    labels = [_usable(side, base, metric, dataset, protocol, out) for side in pairing.sides]
    if not all(labels):
        return
    engine = (_Signatures if metric.parts else _Cells)(metric, pairing, labels, protocol)
    rng = protocol.rng(0, 19)
    value = engine.values(None)
    shuffled = np.stack(
        [engine.permuted(rng.permutation(pairing.n)) for _ in range(engine.permutations)]
    )
    kept = jackknife_groups(np.zeros(pairing.n, np.int64), protocol.jackknife, protocol.rng(0, 20))
    kept = [rows for rows in kept if len(rows) >= metric.smallest_n]
    left_out = np.stack([engine.values(rows) for rows in kept]) if kept else value[None]
    matrix = _Matrix(value, left_out, shuffled, 0.0 if not metric.parts else 1.0)
    options = {"pairs": pairing.kind, "interval": "jackknife", **engine.options}
    for name in sorted(names):
        if name.endswith("_max"):
            if not pairing.within:
                _add_largest(group, pairing, labels, name, space, matrix, options, out)
        else:
            _add_cells(group, pairing, labels, name, name != base, space, matrix, options, out)


@dataclass(frozen=True, eq=False)
class _Matrix:
    """All cells: value (a, b), jackknife (g, a, b), shuffled (p, a, b), and the best there is."""

    value: Array
    left_out: Array
    shuffled: Array
    best: float

    def beaten_by(self, shuffled: Array, value: Array) -> Array:
        """Return the share of permutations at least as good (with the identity itself)."""
        sign = 1.0 if self.best > 0 else -1.0
        better = (sign * shuffled >= sign * value - 1e-12).sum(axis=0)
        return (1.0 + better) / (1.0 + len(shuffled))


def _usable(
    side: Side, base: str, metric: Metric, dataset: str, protocol: Protocol, out: Collector
) -> list[str]:
    """Return the positions whose features have a kernel; the others are refused by name."""
    good = []
    for position, x in side.arrays.items():
        with out.attempt(base, dataset, side.features.tower, position):
            if metric.parts:
                _signature(metric, x, protocol)
            else:
                metric.function(x, x)
            good.append(position)
    return good


def _signature(metric: Metric, x: Array, protocol: Protocol) -> Array:
    kernel, signature = metric.parts
    return signature(kernel(x), **protocol.arguments(metric) if metric.takes else {})


class _Signatures:
    """Agreement as inner products of n × n signatures: one product for a whole matrix."""

    def __init__(
        self, metric: Metric, pairing: Pairing, labels: list[list[str]], protocol: Protocol
    ) -> None:
        self.metric, self.protocol = metric, protocol
        self.permutations = protocol.permutations
        self.kernels = [
            [metric.parts[0](side.arrays[p]) for p in chosen]
            for side, chosen in zip(pairing.sides[: 1 if pairing.within else 2], labels)
        ]
        self.whole = [self._stack(kernels, None) for kernels in self.kernels]
        n = pairing.n
        # The null needs no double precision: float32 halves what a permutation has to move.
        self.first = _padded(self.whole[0])  # (a, n · n)
        self.last = np.ascontiguousarray(_padded(self.whole[-1]).T)  # (n · n, b)
        self.shape = (len(self.whole[0]), len(self.whole[-1]))
        self.options = {"k": min(protocol.k, max(1, (n - 1) // 2))} if metric.takes else {}

    def _stack(self, kernels: list[Array], rows: Labels | None) -> Array:
        arguments = self.protocol.arguments(self.metric) if self.metric.takes else {}
        parts = kernels if rows is None else [k[np.ix_(rows, rows)] for k in kernels]
        return np.stack([self.metric.parts[1](k, **arguments).ravel() for k in parts])

    def values(self, rows: Labels | None) -> Array:
        """Return the matrix on all rows or on some, (a, b)."""
        stacks = self.whole if rows is None else [self._stack(k, rows) for k in self.kernels]
        return stacks[0] @ stacks[-1].T

    def permuted(self, order: Labels) -> Array:
        """Return the matrix with the second side's rows permuted, (a, b)."""
        n = len(order)
        moved = self.last.take((order[:, None] * n + order[None, :]).ravel(), axis=0)
        rows, columns = self.shape
        return (self.first @ moved)[:rows, :columns].astype(np.float64)


def _padded(stack: Array) -> NDArray[np.float32]:
    """Return a stack in float32 with rows of zeros up to a multiple of 16: products go faster."""
    rows, columns = stack.shape
    result = np.zeros((-(-rows // 16) * 16, columns), dtype=np.float32)
    result[:rows] = stack
    return result


class _Cells:
    """Agreement cell by cell, for metrics that are no inner product of signatures."""

    def __init__(
        self, metric: Metric, pairing: Pairing, labels: list[list[str]], protocol: Protocol
    ) -> None:
        self.metric, self.within = metric, pairing.within
        exact = {"rotation", "translation"} <= set(metric.invariances)
        self.arrays = [
            [reduce_rows(side.arrays[p]) if exact else side.arrays[p] for p in chosen]
            for side, chosen in zip(pairing.sides, labels)
        ]
        self.permutations = protocol.shuffles
        self.options: dict[str, Any] = {}

    def _matrix(self, first: list[Array], second: list[Array]) -> Array:
        if self.metric.matrix is not None:
            return np.asarray(self.metric.matrix(first, second, half=self.within))
        result = np.zeros((len(first), len(second)))
        for i, x in enumerate(first):
            for j, y in enumerate(second):
                mirrored = self.within and j < i
                result[i, j] = result[j, i] if mirrored else self.metric.function(x, y)
        return result

    def values(self, rows: Labels | None) -> Array:
        """Return the matrix on all rows or on some, (a, b)."""
        sides = self.arrays if rows is None else [[x[rows] for x in side] for side in self.arrays]
        return self._matrix(sides[0], sides[1])

    def permuted(self, order: Labels) -> Array:
        """Return the matrix with the second side's rows permuted, (a, b).

        Within a tower a cell and its mirror image have one distribution, so half of them will do.
        """
        return self._matrix(self.arrays[0], [x[order] for x in self.arrays[1]])


def _add_cells(
    group: Group,
    pairing: Pairing,
    labels: list[list[str]],
    name: str,
    calibrate: bool,
    space: str,
    matrix: _Matrix,
    options: dict[str, Any],
    out: Collector,
) -> None:
    """Add a row per cell; within a tower each pair of positions once."""
    chance = matrix.shuffled.mean(axis=0)
    p = matrix.beaten_by(matrix.shuffled, matrix.value)
    value, left_out = matrix.value, matrix.left_out
    if calibrate:
        value = calibrated(value, matrix.shuffled, matrix.best)
        left_out = calibrated(left_out, matrix.shuffled, matrix.best)
        chance = np.zeros_like(chance)
    low, high = jackknife_interval(value, left_out)
    first, second = pairing.sides
    for i, position in enumerate(labels[0]):
        for j, other in enumerate(labels[1]):
            if pairing.within and j < i:
                continue
            place = group.place(
                pairing.dataset, first.features, position, space, second.features.tower, other
            )
            out.add(
                name,
                place,
                value[i, j],
                (low[i, j], high[i, j]),
                chance[i, j],
                pairing.n,
                **options,
                permutations=len(matrix.shuffled),
                p=round(float(p[i, j]), 4),
            )


def _add_largest(
    group: Group,
    pairing: Pairing,
    labels: list[list[str]],
    name: str,
    space: str,
    matrix: _Matrix,
    options: dict[str, Any],
    out: Collector,
) -> None:
    """Add the closest pair of positions, calibrated by the closest pair of each permutation."""
    extreme = np.max if matrix.best > 0 else np.min
    value = np.asarray(extreme(matrix.value))
    shuffled = extreme(matrix.shuffled, axis=(1, 2))
    left_out = extreme(matrix.left_out, axis=(1, 2))
    i, j = np.argwhere(matrix.value == value)[0]
    low, high = jackknife_interval(
        calibrated(value, shuffled, matrix.best), calibrated(left_out, shuffled, matrix.best)
    )
    p = float(matrix.beaten_by(shuffled, value))
    first, second = pairing.sides
    place = group.place(
        pairing.dataset, first.features, labels[0][i], space, second.features.tower, labels[1][j]
    )
    out.add(
        name,
        place,
        float(calibrated(value, shuffled, matrix.best)),
        (float(low), float(high)),
        0.0,
        pairing.n,
        **options,
        permutations=len(matrix.shuffled),
        p=round(p, 4),
        raw=round(float(value), 6),
    )
