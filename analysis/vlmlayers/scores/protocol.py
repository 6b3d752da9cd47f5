"""The protocol of scoring: every choice that the definitions of the metrics leave open."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from vlmlayers.errors import UserError, check_one_of
from vlmlayers.features import LayerFeatures, TowerFeatures
from vlmlayers.metrics.checks import Array
from vlmlayers.metrics.readouts import NORMALISE
from vlmlayers.metrics.table import METRICS, Metric
from vlmlayers.positions import SPACES, relative_depth, sort_key
from vlmlayers.scores.parts import balanced_rows


@dataclass(frozen=True)
class Protocol:
    """Options of `score`; recorded in the table's attributes and per row where they matter.

    Attributes:
        positions: Positions to score; None for all that were recorded.
        spaces: Spaces to score in; None for the default of each metric.
        seeds: Seeds of splits; one row each for metrics that split or draw.
        bootstrap: Draws of each bootstrap interval.
        jackknife: Groups of each delete-a-group jackknife.
        shuffles: Shuffles of labels, and of pairs where each is dear, behind each shuffled null.
        permutations: Permutations of pairs behind each agreement's null.
        k: Neighbours.
        shots: Shots per class of the transfer metrics.
        folds: Parts the items are split into: one held out, one for validation, the rest fits.
        held_out: Folds are held out in turn until this many items were, at most all of them.
        items_per_dataset: At most this many items of each dataset, balanced by class.
        vision_split: Parts for dataset accuracy of images are dealt by `item` or by `class`.
        balance: Images for dataset accuracy: `equal` numbers of each dataset, or `weights`: all
            of them, each dataset weighing the same in the fit and in the accuracy.
        normalise: What read-outs do to features first: `columns`, `rows` or `none`.
    """

    positions: tuple[str, ...] | None = None
    spaces: tuple[str, ...] | None = None
    seeds: tuple[int, ...] = (1, 2, 3)
    bootstrap: int = 200
    jackknife: int = 10
    shuffles: int = 20
    permutations: int = 100
    k: int = 10
    shots: int = 4
    folds: int = 5
    held_out: int = 100
    items_per_dataset: int | None = None
    vision_split: str = "item"
    balance: str = "equal"
    normalise: str = "columns"

    def __post_init__(self) -> None:
        for space in self.spaces or ():
            check_one_of("space", space, SPACES)
        check_one_of("vision_split", self.vision_split, ("item", "class"))
        check_one_of("balance", self.balance, ("equal", "weights"))
        check_one_of("normalise", self.normalise, NORMALISE)
        for position in self.positions or ():
            if not position.isdecimal():
                check_one_of("position", position, ("embed", "final", "proj"))
        least = {
            "bootstrap": 2,
            "jackknife": 2,
            "shuffles": 1,
            "permutations": 1,
            "k": 1,
            "shots": 1,
            "folds": 3,
            "held_out": 1,
        }
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise UserError(f"{name} is {getattr(self, name)}; at least {smallest} is needed")
        if not self.seeds:
            raise UserError("seeds is empty; give at least one")

    def spaces_of(self, metric: Metric) -> tuple[str, ...]:
        """Return the spaces in which a metric is asked for."""
        if self.spaces is None:
            return metric.spaces[:1]
        return tuple(space for space in self.spaces if space in metric.spaces)

    def arguments(self, metric: Metric, **given: Any) -> dict[str, Any]:
        """Return the keyword arguments of a metric's function: its settings and our options."""
        known = {"k": self.k, "shots": self.shots, "normalise": self.normalise, **given}
        return {**metric.settings, **{name: known[name] for name in metric.takes if name in known}}

    def require(self, n: int, metric: Metric, what: str = "items") -> None:
        """Refuse what is too little for a metric to mean anything.

        Raises:
            UserError: Fewer than the metric's smallest n.
        """
        if n < metric.smallest_n:
            raise UserError(f"{n} {what}; at least {metric.smallest_n} are needed")

    def rng(self, *key: int) -> np.random.Generator:
        """Return a private generator for one purpose."""
        return np.random.default_rng([int(part) for part in key])

    def record(self) -> dict[str, Any]:
        """Return all options, ready for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class Place:
    """Where a value belongs: the columns of the score table that name it."""

    model: str
    weights: str
    split: str
    dataset: str
    tower: str
    position: str
    depth: float
    space: str
    pooling: str
    other_tower: str = ""
    other_position: str = ""


@dataclass(frozen=True, eq=False)
class Group:
    """Features of several datasets by one model, split and pooling: what may be pooled."""

    model: str
    weights: str
    split: str
    members: tuple[LayerFeatures, ...]

    def sources(self, tower: str) -> list[tuple[LayerFeatures, TowerFeatures]]:
        """Return the datasets that have features of a tower."""
        found = [(m, m.vision if tower == "vision" else m.text) for m in self.members]
        return [(member, features) for member, features in found if features is not None]

    def place(
        self,
        dataset: str,
        features: TowerFeatures,
        position: str,
        space: str,
        other: str = "",
        other_position: str = "",
    ) -> Place:
        """Return the place of a value of one tower."""
        return Place(
            self.model,
            self.weights,
            self.split,
            dataset,
            features.tower,
            position,
            relative_depth(position, features.blocks),
            space,
            features.pooling,
            other,
            other_position,
        )


@dataclass
class Collector:
    """Rows, refusals and seconds, as they come."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    refused: list[dict[str, str]] = field(default_factory=list)
    cost: dict[str, float] = field(default_factory=dict)

    def add(
        self,
        metric: str,
        place: Place,
        value: float,
        interval: tuple[float, float],
        null: float,
        n: int,
        seed: int = -1,
        /,
        **options: Any,
    ) -> None:
        """Add one value.

        Raises:
            UserError: The value is not a number; nothing silent enters the table.
        """
        if not np.isfinite(value):
            raise UserError(f"{metric} is {value}")
        low, high = np.clip(interval, *METRICS[metric].bounds)
        text = ";".join(f"{key}={value}" for key, value in options.items())
        self.rows.append(
            {
                **place.__dict__,
                "metric": metric,
                "value": float(value),
                "low": float(low),
                "high": float(high),
                "null": float(null),
                "n": int(n),
                "seed": int(seed),
                "options": text,
            }
        )

    def refuse(self, metric: str, dataset: str, tower: str, position: str, reason: str) -> None:
        """Note that a value was not computed, and why; each reason once."""
        note = {
            "metric": metric,
            "dataset": dataset,
            "tower": tower,
            "position": position,
            "reason": reason,
        }
        if note not in self.refused:
            self.refused.append(note)

    def take(self, other: Collector) -> None:
        """Add all that another one holds."""
        self.rows += other.rows
        self.refused += [note for note in other.refused if note not in self.refused]
        for metric, seconds in other.cost.items():
            self.cost[metric] = self.cost.get(metric, 0.0) + seconds

    @contextmanager
    def timed(self, metric: str) -> Iterator[None]:
        """Count the seconds inside under a metric's name."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.cost[metric] = self.cost.get(metric, 0.0) + time.perf_counter() - start

    @contextmanager
    def attempt(self, metric: str, dataset: str, tower: str, position: str) -> Iterator[None]:
        """Count seconds, and turn a metric's complaint about its input into a refusal."""
        with self.timed(metric):
            try:
                yield
            except UserError as error:
                self.refuse(metric, dataset, tower, position, str(error))


def make_groups(features: Iterable[LayerFeatures], protocol: Protocol) -> list[Group]:
    """Sort features by model, weights, split and pooling, and check every value once.

    Raises:
        UserError: No features, a dataset twice in one group, or NaN and Inf, named by place.
    """
    groups: dict[tuple[str, ...], list[LayerFeatures]] = {}
    for member in features:
        pooling = tuple(t.pooling if t else "" for t in (member.vision, member.text))
        key = (member.model, member.weights, member.split, *pooling)
        group = groups.setdefault(key, [])
        if any(other.dataset == member.dataset for other in group):
            raise UserError(f"dataset {member.dataset!r} appears twice among the features")
        group.append(_capped(member, protocol.items_per_dataset))
        check_finite(group[-1])
    if not groups:
        raise UserError("no features to score; extract some first")
    return [Group(key[0], key[1], key[2], tuple(members)) for key, members in groups.items()]


def check_finite(features: LayerFeatures) -> None:
    """Raise a UserError that names dataset, tower and position of the first NaN or Inf."""
    for tower in features.towers:
        if not len(tower):
            raise UserError(f"{features.dataset}: {tower.tower} features have no items")
        for space, by_position in tower.arrays.items():
            for position, array in by_position.items():
                if not np.isfinite(array).all():
                    row = int(np.argwhere(~np.isfinite(array))[0, 0])
                    raise UserError(
                        f"{features.dataset}, {tower.tower} at {position} ({space}) has NaN or Inf "
                        f"in item {row} ({tower.ids[row]}); extract again, in fp32"
                    )


def chosen_positions(
    towers: Sequence[TowerFeatures], space: str, protocol: Protocol
) -> tuple[str, ...]:
    """Return the positions that all towers have in a space and that were asked for."""
    common = set.intersection(*(set(t.arrays.get(space, {})) for t in towers))
    wanted = common if protocol.positions is None else common & set(protocol.positions)
    return tuple(sorted(wanted, key=sort_key))


def rows_of(features: TowerFeatures, position: str, space: str, rows: Any = None) -> Array:
    """Return features of some rows in float64."""
    array = features.arrays[space][position]
    return np.asarray(array if rows is None else array[rows], dtype=np.float64)


def _capped(member: LayerFeatures, most: int | None) -> LayerFeatures:
    vision, text = member.vision, member.text
    if most is None or vision is None or len(vision) <= most:
        return member
    rows = balanced_rows(vision.labels, most, np.random.default_rng(0))
    if text is not None and text.pairs is not None:
        back = np.full(len(vision), -1)
        back[rows] = np.arange(len(rows))
        kept = np.flatnonzero(back[text.pairs] >= 0)
        text = text.take(kept)
        text = replace(text, pairs=back[text.pairs])
    return replace(member, vision=vision.take(rows), text=text)
