"""Protocol of agreement: position × position matrices, with a permutation null for every cell."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmlayers.errors import UserError
from vlmlayers.features import LayerFeatures, TowerFeatures
from vlmlayers.metrics.agreement import calibrated, neighbours
from vlmlayers.metrics.checks import Array, Labels, class_means
from vlmlayers.metrics.class_level import reduce_rows
from vlmlayers.metrics.intervals import jackknife_groups, jackknife_interval
from vlmlayers.metrics.table import METRICS, Metric
from vlmlayers.positions import TOWERS, unextracted
from vlmlayers.prompts import numbered, spelled
from vlmlayers.scores.options import Draw, ScoreOptions, generator
from vlmlayers.scores.parts import balanced_rows, independent_rows
from vlmlayers.scores.reading import POOLED
from vlmlayers.scores.scoring import Point, Scoring, chosen_positions

FEWEST = 4  # rows whose agreement can vary


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
        kind: `items`, `class_means` or `first_captions`.
        space: Space of the features.
        sides: Two sides; the same object twice for agreement within a tower.
    """

    dataset: str
    kind: str
    space: str
    sides: tuple[Side, Side]

    @property
    def within(self) -> bool:
        """Whether both sides are one tower."""
        return self.sides[0] is self.sides[1]

    @property
    def n(self) -> int:
        """Number of paired rows."""
        return len(next(iter(self.sides[0].arrays.values()), ()))


def run_pairs(scoring: Scoring, *, within: bool = True) -> None:
    """Score agreement of every position with every other, across towers and, if asked, within."""
    wanted: dict[str, set[str]] = {}
    for name, metric in scoring.metrics.items():
        wanted.setdefault(metric.base or name, set()).add(name)
    for base, names in wanted.items():
        metric = _entry(scoring, base)
        for space in scoring.options.spaces_of(metric):
            with scoring.out.timed(base):
                for pairing in pairings(scoring, base, space):
                    first = pairing.sides[0].features
                    point = Point(base, metric, pairing.dataset, first, space, "", scoring)
                    with point.guarded():
                        if within or not pairing.within:
                            _run_matrix(point, pairing, names)


def _entry(scoring: Scoring, name: str) -> Metric:
    """Return a metric that is scored, which a package may offer, or one that its values need."""
    return scoring.metrics.get(name) or METRICS[name]


def pairings(scoring: Scoring, name: str, space: str) -> list[Pairing]:
    """Return the pairings of a group: within each tower and across, per dataset and pooled.

    Within a tower rows are items, of captions the first of each image. Across towers rows are
    classes (mean of the images, mean of the prompts) or images with their first caption. Pooled
    pairings take equally many of each dataset; a class name that several have is one row, their
    mean: two rows of one text would agree with two of alike images, however unrelated the towers
    are, and no permutation of rows would show it.
    """
    found: list[Pairing] = []
    single = [[member] for member in scoring.group.members]
    pooled = list(scoring.group.in_order.members)
    for members in [*single, pooled] if len(single) > 1 else single:
        dataset = members[0].dataset if len(members) == 1 else POOLED
        # Kernels are n × n, so that it is the number of rows of all datasets that is bounded.
        most = _entry(scoring, name).largest_n or sys.maxsize
        share = max(most // len(members), 1)
        sides: dict[str, Side] = {}
        for tower in TOWERS:
            sources = replace(scoring.group, members=tuple(members)).sources(tower)
            if len(sources) != len(members):
                continue
            rows = [_items(*source, share) for source in sources]
            towers = [features for _, features in sources]
            sides[tower] = _side(towers, rows, space, scoring.options)
            if not sides[tower].arrays:
                reason = unextracted(space)
                scoring.out.refuse(name, dataset, tower, "", reason)
                continue
            captions = all(features.pairs is not None for features in towers)
            kind = "first_captions" if captions else "items"
            found.append(Pairing(dataset, kind, space, (sides[tower], sides[tower])))
        if len(sides) == 2:
            try:
                found += _across(dataset, members, share, space, scoring.options)
            except UserError as error:
                scoring.out.refuse(name, dataset, "", "", str(error))
    return found


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows of one dataset and tower that are compared.

    Attributes:
        of: What each row is of; rows of several datasets that are of one thing become one.
        make: Features → the rows.
    """

    of: list[Hashable]
    make: Callable[[Any], Array]


def _some(x: Array, rows: Labels) -> Array:
    return np.asarray(x[rows], dtype=np.float64)


def _items(member: LayerFeatures, features: TowerFeatures, share: int) -> _Rows:
    """Return the rows of a tower's own items: images, first captions or prompts."""
    own = independent_rows(features)
    rows = own[balanced_rows(features.labels[own], share, generator(Draw.ALIGNED_ITEMS))]
    of: list[Hashable] = [(id(member), int(row)) for row in rows]
    if features.kind == "prompts":
        every = _class_keys(member, features.labels)
        of = [every[row] for row in rows]
    return _Rows(of, partial(_some, rows=rows))


def _class_keys(member: LayerFeatures, labels: Labels) -> list[Hashable]:
    """Return for each label its class name, numbered where a dataset has it several times."""
    names = member.class_names
    return list(numbered(
        spelled(names[label]) if names and label >= 0 else (id(member), label)
        for label in labels.tolist()
    ))  # fmt: skip


def _side(
    towers: list[TowerFeatures], rows: Sequence[_Rows], space: str, options: ScoreOptions
) -> Side:
    """Return one side: the rows of each dataset, one after the other, one for each thing."""
    of = [key for some in rows for key in some.of]
    number = {key: i for i, key in enumerate(dict.fromkeys(of))}
    place = np.asarray([number[key] for key in of], np.int64)

    def together(x: Array) -> Array:
        if len(number) == len(of):
            return x
        return class_means(x, place, len(number))

    arrays = {
        position: together(
            np.concatenate(
                [some.make(tower.arrays[space][position]) for some, tower in zip(rows, towers)]
            )
        )
        for position in chosen_positions(towers, space, options)
    }
    return Side(towers[0], arrays)


def _across(
    dataset: str, members: list[LayerFeatures], share: int, space: str, options: ScoreOptions
) -> list[Pairing]:
    """Return the pairing of vision with text: by captions where all have them, else by class.

    Raises:
        UserError: Of several datasets one has prompts, which alone is not all of them.
    """
    captions = all(m.text is not None and m.text.pairs is not None for m in members)
    # Rows of the two kinds cannot be pooled: where some have captions only prompts are kept.
    if not captions and any(m.text is not None and m.text.pairs is not None for m in members):
        members = [m for m in members if m.text is not None and m.text.pairs is None]
        if len(members) < 2:
            raise UserError("one dataset has prompts and the others captions, which do not pool")
    both = []
    for tower, other in (TOWERS, TOWERS[::-1]):
        rows = [_aligned(m, m.tower(tower), m.tower(other), share) for m in members]
        both.append(_side([m.tower(tower) for m in members], rows, space, options))
    if not (both[0].arrays and both[1].arrays):
        return []
    kind = "first_captions" if captions else "class_means"
    return [Pairing(dataset, kind, space, (both[0], both[1]))]


def _aligned(
    member: LayerFeatures, features: TowerFeatures, other: TowerFeatures, share: int
) -> _Rows:
    """Return a row for each captioned image, or for each class that both towers have."""

    def some(n: int) -> Labels:
        return balanced_rows(np.zeros(n, np.int64), share, generator(Draw.ALIGNED_ACROSS))

    text = features if features.tower == "text" else other
    if text.pairs is not None:
        # The first caption alone: several of one image would be no independent rows.
        images, first = np.unique(text.pairs, return_index=True)
        chosen = some(len(images))
        of: list[Hashable] = [(id(member), int(image)) for image in images[chosen]]
        return _Rows(of, partial(_some, rows=(first if features is text else images)[chosen]))
    common = np.intersect1d(features.labels, other.labels)
    common = common[some(len(common))]
    kept = np.flatnonzero(np.isin(features.labels, common))
    number = np.searchsorted(common, features.labels[kept])

    def mean_of_classes(x: Array) -> Array:
        """Return means of classes: a class prompt has no image of its own to be paired with."""
        return class_means(_some(x, kept), number, len(common))

    return _Rows(_class_keys(member, common), mean_of_classes)


def _run_matrix(point: Point, pairing: Pairing, names: set[str]) -> None:
    metric, options = point.metric, point.options
    point.require(pairing.n, pairing.kind)
    labels = [_usable(side, point) for side in pairing.sides]
    if not all(labels):
        return
    engine = (_Signatures if metric.parts else _Cells)(metric, pairing, labels, options)
    rng = generator(Draw.PERMUTATIONS)
    value = engine.values(None)
    # One order of the rows for all cells: the largest cell of a permutation is then a fair null.
    shuffled = np.stack(
        [engine.permuted(rng.permutation(pairing.n)) for _ in range(engine.permutations)]
    )
    alike = np.zeros(pairing.n, np.int64)
    kept = jackknife_groups(alike, options.jackknife, generator(Draw.ALIGNED_GROUPS))
    # Three rows agree by construction: too few to leave any out have no interval.
    enough = min(map(len, kept)) >= FEWEST
    left_out = np.stack([engine.values(rows) if enough else value * np.nan for rows in kept])
    noted: dict[str, Any] = {"pairs": pairing.kind, "interval": "jackknife"}
    noted |= engine.options | {"permutations": len(shuffled)}
    # Distances fall to 0 with agreement, all else grows to 1.
    best = 0.0 if metric.direction == "less alike" else 1.0
    matrix = _Matrix(
        point, pairing, labels, value, left_out, shuffled, best, engine.rounding, noted
    )
    for name in sorted(names):
        # By its base: a metric of the user's own may end alike.
        if name != f"{point.name}_max":
            matrix.add_cells(name, calibrate=name != point.name)
        elif not pairing.within:
            matrix.add_largest(name)


def _usable(side: Side, point: Point) -> list[str]:
    """Return the positions whose features have a kernel; the others are refused by name."""
    good, metric = [], point.metric
    for position, x in side.arrays.items():
        with replace(point, features=side.features, position=position).attempt():
            if metric.parts:
                # One by one: in the stack a single constant position would fail all.
                kernel, signature = metric.parts
                signature(kernel(x), **point.arguments() if metric.takes else {})
            else:
                metric.function(x, x, **point.arguments())
            good.append(position)
    return good


@dataclass(frozen=True, eq=False)
class _Matrix:
    """All cells of a pairing, and how they are noted.

    Attributes:
        point: The metric on the first side; its position is that of a cell.
        pairing: Which rows belong together.
        labels: Positions of the rows and of the columns.
        value: (a, b).
        left_out: (group, a, b), without the rows of each jackknife group; NaN where it is
            undefined.
        shuffled: (permutation, a, b).
        best: The best value there is.
        rounding: What a permutation that changes nothing may differ by.
        noted: What is noted beside each value.
    """

    point: Point
    pairing: Pairing
    labels: list[list[str]]
    value: Array
    left_out: Array
    shuffled: Array
    best: float
    rounding: float
    noted: dict[str, Any]

    def beaten_by(self, shuffled: Array, value: Array) -> Array:
        """Return the share of permutations at least as good (with the identity itself)."""
        sign = 1.0 if self.best > 0 else -1.0
        # Equal up to rounding counts as at least as good: the cautious side.
        better = (sign * shuffled >= sign * value - self.rounding).sum(axis=0)
        # The identity is a permutation as well; without it p could be 0.
        return (1.0 + better) / (1.0 + len(shuffled))

    def add(
        self, name: str, i: int, j: int, value: Array, ends: Any, chance: Any, p: Array, **more: Any
    ) -> None:
        """Add the value of a cell; one that the metric cannot take leaves the other cells."""
        other = self.pairing.sides[1].features.tower, self.labels[1][j]
        # Of its own bounds: what is calibrated falls below chance, where the metric cannot be.
        metric = _entry(self.point.scoring, name)
        cell = replace(
            self.point, name=name, metric=metric, position=self.labels[0][i], other=other
        )
        noted = self.noted | {"p": round(float(p), 4)} | more
        with cell.guarded():
            cell.add(float(value), ends, chance, self.pairing.n, **noted)

    def add_cells(self, name: str, calibrate: bool) -> None:
        """Add a row per cell; within a tower each pair of positions once."""
        chance = self.shuffled.mean(axis=0)
        p = self.beaten_by(self.shuffled, self.value)
        value, left_out = self.value, self.left_out
        if calibrate:
            value = calibrated(value, self.shuffled, self.best)
            left_out = calibrated(left_out, self.shuffled, self.best)
            chance = np.zeros_like(chance)
        low, high = jackknife_interval(value, left_out)
        for i, j in np.ndindex(value.shape):
            if not (self.pairing.within and j < i):
                at = i, j
                self.add(name, i, j, value[at], (low[at], high[at]), chance[at], p[at])

    def add_largest(self, name: str) -> None:
        """Add the closest pair of positions, calibrated by the closest pair of each permutation."""
        # The best of many cells is high by chance too: each permutation is searched as well.
        # By fmax, which passes over cells that are undefined without some rows.
        extreme = (np.fmax if self.best > 0 else np.fmin).reduce
        value = np.asarray(extreme(self.value, axis=None))
        shuffled = extreme(self.shuffled, axis=(1, 2))
        left_out = calibrated(extreme(self.left_out, axis=(1, 2)), shuffled, self.best)
        moved = calibrated(value, shuffled, self.best)
        ends, p = jackknife_interval(moved, left_out), self.beaten_by(shuffled, value)
        i, j = np.argwhere(self.value == value)[0]
        self.add(name, i, j, moved, ends, 0.0, p, raw=round(float(value), 6))


class _Signatures:
    """Agreement as inner products of n × n signatures: one product for a whole matrix."""

    # Of products of unit vectors in float32, and far below the steps of shared neighbours.
    rounding = 3e-6

    def __init__(
        self, metric: Metric, pairing: Pairing, labels: list[list[str]], options: ScoreOptions
    ) -> None:
        self.metric, self.given = metric, options
        self.permutations = options.permutations
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
        self.options = {"k": neighbours(n, options.k)} if metric.takes else {}

    def _stack(self, kernels: list[Array], rows: Labels | None) -> Array:
        arguments = self.given.arguments(self.metric) if self.metric.takes else {}
        signature = partial(self.metric.parts[1], **arguments)
        if rows is None:
            return np.stack([signature(k).ravel() for k in kernels])
        return np.stack([_or_nan(signature, k[np.ix_(rows, rows)]).ravel() for k in kernels])

    def values(self, rows: Labels | None) -> Array:
        """Return the matrix on all rows or on some, (a, b); NaN where some have no signature."""
        stacks = self.whole if rows is None else [self._stack(k, rows) for k in self.kernels]
        return stacks[0] @ stacks[-1].T

    def permuted(self, order: Labels) -> Array:
        """Return the matrix with the second side's rows permuted, (a, b)."""
        n = len(order)
        # Rows and columns of a signature move together: one gather of its n² entries.
        moved = self.last.take((order[:, None] * n + order[None, :]).ravel(), axis=0)
        rows, columns = self.shape
        return (self.first @ moved)[:rows, :columns].astype(np.float64)


def _or_nan(signature: Callable[[Array], Array], kernel: Array) -> Array:
    """Return the signature of a kernel; NaN where its rows are all alike, as few of many may be."""
    try:
        return signature(kernel)
    except UserError:
        return np.full(kernel.shape, np.nan)


def _padded(stack: Array) -> NDArray[np.float32]:
    """Return a stack in float32 with rows of zeros up to a multiple of 16: products go faster."""
    rows, columns = stack.shape
    result = np.zeros((-(-rows // 16) * 16, columns), dtype=np.float32)
    result[:rows] = stack
    return result


class _Cells:
    """Agreement cell by cell, for metrics that are no inner product of signatures."""

    rounding = 1e-9

    def __init__(
        self, metric: Metric, pairing: Pairing, labels: list[list[str]], options: ScoreOptions
    ) -> None:
        self.metric, self.within = metric, pairing.within
        self.function = partial(metric.function, **options.arguments(metric))
        exact = {"rotation", "translation"} <= set(metric.invariances)
        self.arrays = [
            [reduce_rows(side.arrays[p]) if exact else side.arrays[p] for p in chosen]
            for side, chosen in zip(pairing.sides, labels)
        ]
        self.permutations = options.shuffles
        self.options: dict[str, Any] = {}
        self.whole = self._prepared(self.arrays)

    def _prepared(self, sides: list[list[Array]]) -> list[Any]:
        """Return what is made of each side once."""
        if self.metric.matrix is None:
            return sides
        prepare = self.metric.matrix[0]
        first = prepare(sides[0])
        return [first, first if self.within else prepare(sides[1])]

    def _matrix(self, first: Any, second: Any) -> Array:
        if self.metric.matrix is not None:
            return np.asarray(self.metric.matrix[1](first, second, half=self.within))
        result = np.zeros((len(first), len(second)))
        for i, x in enumerate(first):
            for j, y in enumerate(second):
                mirrored = self.within and j < i
                result[i, j] = result[j, i] if mirrored else self.function(x, y)
        return result

    def values(self, rows: Labels | None) -> Array:
        """Return the matrix on all rows or on some, (a, b); NaN where it is undefined on some."""
        if rows is None:
            return self._matrix(*self.whole)
        sides = [[x[rows] for x in side] for side in self.arrays]
        try:
            return self._matrix(*self._prepared(sides))
        except UserError:  # of some position; the others keep their values
            return self._where_defined(sides)

    def _where_defined(self, sides: list[list[Array]]) -> Array:
        good = [[i for i, x in enumerate(side) if self._is_defined(x)] for side in sides]
        found = np.full([len(side) for side in sides], np.nan)
        if all(good):
            kept = [[side[i] for i in places] for side, places in zip(sides, good)]
            found[np.ix_(*good)] = self._matrix(*self._prepared(kept))
        return found

    def _is_defined(self, x: Array) -> bool:
        """Return whether there is agreement with features, as there is not where all are alike."""
        try:
            self.function(x, x)
        except UserError:
            return False
        return True

    def permuted(self, order: Labels) -> Array:
        """Return the matrix with the second side's rows permuted, (a, b).

        Within a tower a cell and its mirror image have one distribution, so half of them will do.
        """
        first, second = self.whole
        stacked = isinstance(second, np.ndarray)
        return self._matrix(first, second[:, order] if stacked else [x[order] for x in second])
