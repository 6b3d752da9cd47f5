"""Scoring: what a protocol is handed, and where its values and refusals go."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmlayers.errors import UserError
from vlmlayers.features import LayerFeatures, TowerFeatures
from vlmlayers.metrics.checks import Array
from vlmlayers.metrics.table import Metric
from vlmlayers.positions import relative_depth, sort_key, unextracted
from vlmlayers.scores.options import UNKEYED, ScoreOptions
from vlmlayers.scores.parts import balanced_rows, refuse_not_finite
from vlmlayers.scores.reading import POOLED, ROUNDING
from vlmlayers.scores.schema import score_frame
from vlmlayers.words import counted

if TYPE_CHECKING:
    import pandas as pd

Source = tuple[LayerFeatures, TowerFeatures]


@dataclass(frozen=True, eq=False)
class Group:
    """Features of several datasets by one model, split and pooling: what may be pooled.

    Attributes:
        model: Architecture.
        weights: Its weights.
        split: Split.
        members: The features, one of each dataset.
        apart: How many more features there are, in groups of their own.
    """

    model: str
    weights: str
    split: str
    members: tuple[LayerFeatures, ...]
    apart: int = 0

    def too_few(self, count: int) -> str:
        """Return why so many datasets cannot be told apart, and where the others are."""
        more = "; those of another split, weights, pooling or without the other tower are apart"
        return f"{counted(count, 'dataset')}; at least 2 are needed{more if self.apart else ''}"

    def sources(self, tower: str) -> list[Source]:
        """Return the datasets that have features of a tower."""
        found = [(m, m.vision if tower == "vision" else m.text) for m in self.members]
        return [(member, features) for member, features in found if features is not None]

    @property
    def in_order(self) -> Group:
        """The same with its datasets in the order of their names.

        What is drawn of several datasets together must not depend on which was named first.
        """
        return replace(self, members=tuple(sorted(self.members, key=lambda one: one.dataset)))


@dataclass(frozen=True, eq=False)
class Point:
    """A metric at one place: what it is computed from, and where its values go.

    Attributes:
        name: Name of the metric.
        metric: Its entry in the METRICS table.
        dataset: Name of the dataset, or `*` where several are pooled.
        features: The tower; its first dataset where several are pooled.
        space: Space of the features.
        position: Position on the tower.
        scoring: What it is part of.
        other: Tower and position that it is related to, where it relates two.
    """

    name: str
    metric: Metric
    dataset: str
    features: TowerFeatures
    space: str
    position: str
    scoring: Scoring
    other: tuple[str, str] = ("", "")

    @property
    def options(self) -> ScoreOptions:
        """The options of the scoring."""
        return self.scoring.options

    @property
    def width(self) -> int:
        """Width of the features."""
        return int(self.features.arrays[self.space][self.position].shape[1])

    def at(self, source: Source) -> Point:
        """Return the same place in one of several datasets."""
        return replace(self, dataset=source[0].dataset, features=source[1])

    def rows(self, rows: Any = None) -> Array:
        """Return the features of some rows in float64."""
        return rows_of(self.features, self.position, self.space, rows)

    def arguments(self, **given: Any) -> dict[str, Any]:
        """Return the keyword arguments of the metric's function."""
        return self.options.arguments(self.metric, **given)

    def require(self, n: int, what: str = "items") -> None:
        """Refuse what is too little for the metric to mean anything.

        Raises:
            UserError: Fewer than the metric's smallest n.
        """
        if n < self.metric.smallest_n:
            raise UserError(f"{n} {what}; at least {self.metric.smallest_n} are needed")

    def attempt(self) -> Any:
        """Count seconds, and turn the metric's complaint about its input into a refusal."""
        return self.scoring.out.attempt(self.name, self.dataset, self.features.tower, self.position)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Turn the metric's complaint into a refusal, where seconds are counted around it."""
        try:
            yield
        except UserError as error:
            self.refuse(str(error))

    def refuse(self, reason: str) -> None:
        """Note that there is no value here, and why."""
        self.scoring.out.refuse(self.name, self.dataset, self.features.tower, self.position, reason)

    def add(
        self,
        value: float,
        interval: tuple[float, float],
        null: float,
        n: int,
        seed: int = -1,
        # Positional only: the options that follow may be called `n` or `seed` themselves.
        /,
        **options: Any,
    ) -> None:
        """Add one value; the options are noted beside it.

        Raises:
            UserError: The value is not a number, or none that the metric says it can be; nothing
                silent enters the table.
        """
        if not np.isfinite(value):
            raise UserError(f"{self.name} is {value}")
        least, most = self.metric.bounds
        if not least - ROUNDING <= value <= most + ROUNDING:  # its interval would be cut off it
            raise UserError(
                f"{self.name} is {value:.4g}, and declares bounds of {least:g} and {most:g}"
            )
        # Jackknife and normal intervals are symmetric and may reach where no value can be.
        low, high = np.clip(interval, *self.metric.bounds)
        if np.isnan(low):  # wherever it was lost
            options["interval"] = "none"
        group, features = self.scoring.group, self.features
        self.scoring.out.rows.append(
            {
                "model": group.model,
                "weights": group.weights,
                "dataset": self.dataset,
                "split": group.split,
                "tower": features.tower,
                "position": self.position,
                "depth": relative_depth(self.position, features.blocks),
                "space": self.space,
                "pooling": features.pooling,
                "metric": self.name,
                "value": float(value),
                "low": float(low),
                "high": float(high),
                "null": float(null),
                "n": int(n),
                "seed": int(seed),
                "other_tower": self.other[0],
                "other_position": self.other[1],
                "options": ";".join(f"{key}={value}" for key, value in options.items()),
            }
        )


@dataclass(frozen=True, eq=False)
class Scoring:
    """What a protocol is handed: features, the metrics to compute, and where values go."""

    group: Group
    metrics: Mapping[str, Metric]
    options: ScoreOptions
    out: Collector

    def points(self, name: str, metric: Metric, sources: Sequence[Source]) -> Iterator[Point]:
        """Yield the places at which a metric is to be scored on one dataset or on several."""
        member, features = sources[0]
        if features.tower not in metric.towers:
            return
        dataset = member.dataset if len(sources) == 1 else POOLED
        for space in self.options.spaces_of(metric):
            positions = chosen_positions([f for _, f in sources], space, self.options)
            for position in positions:
                yield Point(name, metric, dataset, features, space, position, self)
            if not positions:
                reason = unextracted(space)
                self.out.refuse(name, dataset, features.tower, "", reason)

    def refuse(self, dataset: str, tower: str, reason: str) -> None:
        """Note that no metric has a value on a dataset, and why."""
        for name in self.metrics:
            self.out.refuse(name, dataset, tower, "", reason)


Runner = Callable[[Scoring], None]


@dataclass
class Collector:
    """Rows, refusals and seconds, as they come."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    refused: list[dict[str, str]] = field(default_factory=list)
    cost: dict[str, float] = field(default_factory=dict)

    def refuse(self, metric: str, dataset: str, tower: str, position: str, reason: str) -> None:
        """Note that a value was not computed, and why; each reason once."""
        note = {
            "metric": metric,
            "dataset": dataset,
            "tower": tower,
            "position": position,
            "reason": reason,
        }
        # Several positions and seeds meet the same obstacle.
        if note not in self.refused:
            self.refused.append(note)

    def take(self, other: Collector) -> None:
        """Add all that another one holds."""
        self.rows += other.rows
        # Tasks of one group may meet the same obstacle in different processes.
        self.refused += [note for note in other.refused if note not in self.refused]
        for metric, seconds in other.cost.items():
            self.cost[metric] = self.cost.get(metric, 0.0) + seconds

    def table(self, options: ScoreOptions) -> pd.DataFrame:
        """Return the score table of all that was added."""
        cost = {name: round(seconds, 4) for name, seconds in self.cost.items()}
        protocol = options.model_dump(mode="json")
        made = score_frame(self.rows, cost=cost, refused=self.refused, protocol=protocol)
        # Features with two poolings of one tower hold the other tower twice, and so do its rows.
        return made.drop_duplicates(ignore_index=True)

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


def make_groups(features: Iterable[LayerFeatures], options: ScoreOptions) -> list[Group]:
    """Sort features by model, weights, split and pooling, and check every value once.

    Raises:
        UserError: No features, a dataset twice in one group, features of one place of one model
            that differ in width, or NaN and Inf, named by place.
    """
    groups: dict[tuple[str, ...], list[LayerFeatures]] = {}
    for member in features:
        # Values of other weights, splits or poolings mean other things and must not be averaged.
        key = (member.model, member.weights, member.split, *poolings(member))
        group = groups.setdefault(key, [])
        if any(other.dataset == member.dataset for other in group):
            raise UserError(f"dataset {member.dataset!r} appears twice among the features")
        group.append(_capped(member, options.items_per_dataset))
        # Once here, so that no metric has to, and the message can name the item.
        check_finite(group[-1])
    if not groups:
        raise UserError("no features to score; extract some first")
    for members in groups.values():
        expect_one_model(members)
    count = sum(map(len, groups.values()))
    return [
        Group(key[0], key[1], key[2], tuple(members), apart=count - len(members))
        for key, members in groups.items()
    ]


def poolings(member: LayerFeatures) -> tuple[str, str]:
    """Return the pooling of vision and of text, empty for a tower that is not there."""
    towers = member.vision, member.text
    vision, text = ("" if tower is None else tower.pooling for tower in towers)
    return vision, text


def expect_one_model(members: Sequence[LayerFeatures]) -> None:
    """Refuse features of one name that are of several models, as their widths or identities show.

    Raises:
        UserError: Names place and widths, or what differs, and the datasets.
    """
    for one, other in combinations(members, 2):
        if part := _other_model(one.identity, other.identity):
            raise UserError(
                f"features of {one.dataset} and {other.dataset} differ in their model's {part}, "
                f"and both are said to be of {one.model} {one.weights}; extract them of one model, "
                "or name their models apart"
            )
    seen: dict[tuple[str, str, str], tuple[int, str]] = {}
    for member in members:
        for tower in member.towers:
            for space, by_position in tower.arrays.items():
                for position, array in by_position.items():
                    width, first = seen.setdefault(
                        (tower.tower, space, position), (array.shape[-1], member.dataset)
                    )
                    if array.shape[-1] != width:
                        raise UserError(
                            f"{tower.tower} features at {position} are {width} wide in {first} and "
                            f"{array.shape[-1]} in {member.dataset}, and both are said to be of "
                            f"{member.model} {member.weights}; name their models apart"
                        )


def _other_model(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Return in which part of a model two identities differ, empty where none shows it."""
    hashes = {each.get("weights_hash") for each in (one, other)} - {None}
    if len(hashes) > 1:
        return "weights"
    # As far as both name a setting: features that were recorded elsewhere name none.
    first, second = (each.get("preprocessing") or {} for each in (one, other))
    return next((f"preprocessing ({key})" for key in first
                 if key in second and first[key] != second[key]), "")  # fmt: skip


def check_finite(features: LayerFeatures) -> None:
    """Raise a UserError that names dataset, tower and position of the first NaN or Inf."""
    for tower in features.towers:
        if not len(tower):
            raise UserError(f"{features.dataset}: {tower.tower} features have no items")
        tower.require_vectors()
        for space, by_position in tower.arrays.items():
            for position, array in by_position.items():
                refuse_not_finite(array, features, tower, position, space)


def chosen_positions(
    towers: Sequence[TowerFeatures], space: str, options: ScoreOptions
) -> tuple[str, ...]:
    """Return the positions that all towers have in a space and that were asked for."""
    common = set.intersection(*(set(t.arrays.get(space, {})) for t in towers))
    wanted = common if options.positions is None else common & set(options.positions)
    return tuple(sorted(wanted, key=sort_key))


def stated_null(metric: Metric, *arguments: Any) -> float | None:
    """Return what chance gives where nothing has to be drawn: NaN for no null, None if it has."""
    null = metric.null(*arguments) if callable(metric.null) else metric.null
    return float("nan") if null == "none" else None if isinstance(null, str) else float(null)


def rows_of(features: TowerFeatures, position: str, space: str, rows: Any = None) -> Array:
    """Return features of some rows in float64."""
    array = features.arrays[space][position]
    return np.asarray(array if rows is None else array[rows], dtype=np.float64)


def _capped(member: LayerFeatures, most: int | None) -> LayerFeatures:
    vision = member.vision
    if most is None or vision is None or len(vision) <= most:
        return member
    return member.take_images(balanced_rows(vision.labels, most, np.random.default_rng(UNKEYED)))
