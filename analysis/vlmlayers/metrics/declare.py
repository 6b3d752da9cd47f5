"""What a metric declares of itself, as data that protocols, captions and tests read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import getdoc
from types import MappingProxyType
from typing import Any

INF = float("inf")
MODEL = "the model"
NEEDS = {
    "datasets": "features of several datasets, fitting, validation and held-out part",
    "dataset confusion": "confusion counts between datasets",
    "styles": "features of datasets that share class names",
    "style classes": "features of datasets that share class names, source and target",
    "class parts": "features and labels, fitting, validation and held-out part",
    "novel classes": "features and labels of base and of novel classes",
    "other datasets": "features and labels of one dataset and of all others",
    "labels": "features and labels",
    "prompts": "image features, one prompt per class, labels",
    "pairs": "two sets of features, rows paired",
    "pair matrix": "agreement of every pair of positions",
    "modalities": "image and text features in joint space, matching rows",
    "queries": "image and text features in joint space, matching rows, both ways",
    "features": "features",
    MODEL: "the model itself, run with blocks changed or backwards",
    "heads": "what the attention of each head does, recorded for each item",
}
NULLS = {  # what chance gives, in words
    "shuffle": "shuffled pairs",
    "gaussian": "white noise of the same shape",
    "columns": "each column shuffled by itself",
    "none": "",
    "classes": "1 / number of classes",
}
SORTS = {"datasets": "datasets", "dataset confusion": "datasets", "styles": "styles"}
NATIVE = ("native", "normed", "joint")
JOINT = ("joint",)
BOTH = ("vision", "text")
SIMILARITY = ("rotation", "scale", "translation", "row order")


@dataclass(frozen=True)
class Metric:
    """What a metric declares.

    Attributes:
        function: The plain function: arrays in, number (or counts, or predictions) out.
        level: `dataset`, `class`, `agreement`, `gap`, `geometry`, `model`, `attention`, or `own`
            of a user's function.
        needs: What it takes: a key of `NEEDS`, which names the protocol.
        axis_label: Label of an axis or colour bar.
        bounds: Smallest and largest value it can take.
        direction: What a larger value means: `more discriminable`, `more alike`, … .
        null: What chance gives: a number, a function, or `shuffle` (labels or pairs shuffled),
            `gaussian` (the same on white noise of the same shape), `columns` (each column shuffled
            by itself), `none` (the column is NaN).
        invariances: What leaves the value unchanged; each is tested.
        sensitive: An invariance it does not have; tested as the negative control.
        smallest_n: Fewest items (pairs, classes) for which the value means anything.
        largest_n: More items than this are subsampled, because the cost grows with n².
        distinct: Function of the features that returns the rows that count, where some do not; n,
            the smallest n and the groups of a jackknife are of these.
        spaces: Spaces in which it is defined; the first is the default. Of heads the one that
            extraction records it in.
        towers: Towers it is computed for.
        per_item: Function of the same arguments whose mean over items is the metric.
        weighted: Function that also takes item weights, (draw, item), and returns (draw,).
        left_out: Function of the same arguments that returns the metric without each of the groups
            that it makes of the items itself, (group,).
        matrix: Two functions: what the first makes of features at several positions, a list of
            (item, width), is an array (position, item, …) whose items may be permuted; the second
            takes two of these and returns every cell, (a, b), with `half=True` where both are of
            one tower and cells mirror each other.
        relabelled: Function of features and several labellings, (draw, item), that returns (draw,);
            shuffled nulls take it where it exists, because it shares what labels do not change.
        of_parts: Function of several (fitting features, their classes, validation features, their
            classes, features) that returns the predictions for each: many fits cost less at once.
        parts: Two functions whose chain is the metric: what the first makes of the features is
            shared, between the positions of a matrix or with other metrics of one layer. Of a
            metric with labels it is (item, item), and shared between subsets of the items.
        most: Function of labels and of what the metric takes that returns the best value there can
            be of them, where that may be below the upper bound.
        takes: Options of the protocol that the function accepts.
        settings: Fixed arguments.
        base: For derived metrics, the name of the metric they derive from.
        reference: Publication.
    """

    function: Callable[..., Any]
    level: str
    needs: str
    axis_label: str
    reference: str
    bounds: tuple[float, float] = (0.0, 1.0)
    direction: str = "more discriminable"
    null: float | str | Callable[..., float] = "none"
    invariances: tuple[str, ...] = ()
    sensitive: str = ""
    smallest_n: int = 2
    largest_n: int = 0
    distinct: Callable[..., Any] | None = None
    spaces: tuple[str, ...] = NATIVE
    towers: tuple[str, ...] = BOTH
    per_item: Callable[..., Any] | None = None
    weighted: Callable[..., Any] | None = None
    left_out: Callable[..., Any] | None = None
    matrix: tuple[Callable[..., Any], Callable[..., Any]] | None = None
    relabelled: Callable[..., Any] | None = None
    of_parts: Callable[..., Any] | None = None
    parts: tuple[Callable[..., Any], ...] = ()
    most: Callable[..., float] | None = None
    takes: tuple[str, ...] = ()
    # Read-only, and made by a factory: a dataclass refuses defaults that have no hash.
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    base: str = ""

    @property
    def summary(self) -> str:
        """First sentence of the function's documentation."""
        return (getdoc(self.function) or "").split("\n\n")[0].replace("\n", " ")

    @property
    def is_share(self) -> bool:
        """Whether the value is a share of items, between 0 and 1."""
        return self.bounds == (0.0, 1.0)

    @property
    def null_text(self) -> str:
        """What chance gives, in words."""
        if isinstance(self.null, (int, float)):
            return f"{self.null:g}"
        if self.null == "shuffle" and self.needs in ("labels", MODEL):
            return "shuffled labels"
        if isinstance(self.null, str):
            return NULLS[self.null].replace("classes", SORTS.get(self.needs, "classes"))
        return (getdoc(self.null) or "").split("\n\n")[0].removeprefix("Return ").rstrip(".")
