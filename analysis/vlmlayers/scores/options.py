"""The options of `score`: every choice that the definitions of the metrics leave open."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, Field

from vlmlayers.errors import UserError, check_one_of
from vlmlayers.options import Options, Seeds, Several, Word
from vlmlayers.positions import EMBED, FINAL, PROJ, check_space

if TYPE_CHECKING:
    from vlmlayers.metrics.table import Metric


class Draw(IntEnum):
    """What a random generator is for: each purpose draws from a stream of its own."""

    # Recorded intervals depend on these numbers: none may change, a new purpose takes the next.
    DATASET_SPLIT = 1
    CLASS_SPLIT = 2
    ACCURACY = 3
    ZERO_SHOT = 5
    SHUFFLED_LABELS = 6
    ITEMS = 7
    ITEM_WEIGHTS = 8
    ITEM_GROUPS = 9
    MATCHING = 10
    PAIR_WEIGHTS = 11
    PAIR_GROUPS = 12
    SHUFFLED_PAIRS = 13
    PROMPT_QUERIES = 14
    SHOTS = 15
    STYLE_SPLIT = 16
    ALIGNED_ITEMS = 17
    ALIGNED_ACROSS = 18
    PERMUTATIONS = 19
    ALIGNED_GROUPS = 20
    STREAMED_GROUPS = 21
    STREAMED_NOISE = 22
    SHUFFLED_COLUMNS = 23


# What a metric needs (`Metric.needs`) that options of splits are read for. Those of intervals and
# nulls are not here: they change how sure a value is, not what it says.
_OF_DATASETS = ("datasets", "dataset confusion")
READ_FOR = {
    "vision_split": _OF_DATASETS,
    "balance": _OF_DATASETS,
    "folds": (*_OF_DATASETS, "styles", "class parts"),
    "held_out": (*_OF_DATASETS, "styles", "class parts"),
}

UNKEYED = 0  # seed of draws made before purposes had numbers; recorded values depend on it


def generator(purpose: Draw, seed: int = 0) -> np.random.Generator:
    """Return a private generator for one purpose."""
    # Two words of entropy: with seed + purpose, seed 2 of one purpose would be seed 1 of the next.
    return np.random.default_rng([int(seed), int(purpose)])


def _reads(metric: Metric, option: str) -> bool:
    return option in metric.takes or metric.needs in READ_FOR.get(option, ())


def _position(name: str) -> str:
    return name if name.isdecimal() else check_one_of("position", name, (EMBED, FINAL, PROJ))


class ScoreOptions(Options):
    """Options of `score`; recorded in the table's attributes and per row where they matter."""

    positions: Several[Annotated[Word, AfterValidator(_position)]] | None = Field(
        default=None,
        min_length=1,
        description="Positions to score; None for all that were recorded.",
    )
    spaces: Several[Annotated[str, AfterValidator(check_space)]] | None = Field(
        default=None,
        min_length=1,
        description="Spaces to score in; None for the default of each metric.",
    )
    seeds: Seeds = Field(
        default=(1, 2, 3),
        min_length=1,
        description=(
            "Seeds of splits and shots; one row per seed, whose interval is of its own split. What "
            "is joined over seeds adds how they differ: have three."
        ),
    )
    bootstrap: int = Field(default=200, ge=2, description="Draws of each bootstrap interval.")
    jackknife: int = Field(
        default=10,
        ge=2,
        description="Groups of each jackknife interval, where drawing an item twice would mislead.",
    )
    shuffles: int = Field(
        default=20,
        ge=1,
        description="Shuffles of labels, and of pairs where each is expensive, behind each "
        "shuffled null; where p is noted it is at least 1 / (1 + shuffles), 0.048 of 20.",
    )
    permutations: int = Field(
        default=100, ge=1, description="Permutations of pairs behind each agreement's null and p."
    )
    k: int = Field(default=10, ge=1, description="Neighbours.")
    shots: int = Field(default=4, ge=1, description="Shots per class of the transfer metrics.")
    folds: int = Field(
        default=5,
        ge=3,
        description="Parts the items are split into: one held out, one for validation, the rest "
        "fits.",
    )
    held_out: int = Field(
        default=100,
        ge=1,
        description="Folds are held out in turn until this many items were, at most all of them.",
    )
    items_per_dataset: int | None = Field(
        default=None,
        ge=1,
        description="At most this many images of each dataset, balanced by class.",
    )
    vision_split: Literal["item", "class"] = Field(
        default="item",
        description="Deal images to parts by `item` or by `class` for dataset accuracy.",
    )
    balance: Literal["equal", "weights"] = Field(
        default="equal",
        description="Images for dataset accuracy: `equal` numbers of each dataset, or `weights`: "
        "all of them, each dataset weighing the same in the fit and in the accuracy.",
    )
    normalise: Literal["columns", "rows", "none"] = Field(
        default="columns",
        description="What read-outs do to features first: `columns` (standardise on the fitting "
        "part), `rows` (length 1) or `none`.",
    )

    def refuse_unread(self, metrics: Iterable[Metric], where: str = "score") -> None:
        """Refuse an option that nothing reads of some metrics.

        Args:
            metrics: Those that are scored.
            where: What messages begin with.

        Raises:
            UserError: Names the option and the metrics that take it.
        """
        from vlmlayers.metrics import METRICS

        scored = list(metrics)
        for name in ("k", "shots", "normalise", *READ_FOR):
            if getattr(self, name) == type(self).model_fields[name].default:
                continue
            if not any(_reads(metric, name) for metric in scored):
                takers = ", ".join(key for key, metric in METRICS.items() if _reads(metric, name))
                raise UserError(
                    f"{where}: {name} is an option of {takers}, none of which is scored; leave it "
                    "out"
                )

    def spaces_of(self, metric: Metric) -> tuple[str, ...]:
        """Return the spaces in which a metric is asked for."""
        if self.spaces is None:
            return metric.spaces[:1]
        # One named twice would give every row twice, which reads as two scorings.
        return tuple(space for space in dict.fromkeys(self.spaces) if space in metric.spaces)

    def arguments(self, metric: Metric, **given: Any) -> dict[str, Any]:
        """Return the keyword arguments of a metric's function: its settings and our options."""
        known = {"k": self.k, "shots": self.shots, "normalise": self.normalise, **given}
        return {**metric.settings, **{name: known[name] for name in metric.takes if name in known}}
