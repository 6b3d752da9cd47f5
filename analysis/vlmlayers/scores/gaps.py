"""Protocol of the modality gap: images and texts of one dataset, position by position, `joint`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vlmlayers.errors import UserError
from vlmlayers.features import LayerFeatures, TowerFeatures
from vlmlayers.metrics.checks import Array, Labels
from vlmlayers.metrics.intervals import (
    bootstrap_weights,
    jackknife,
    jackknife_groups,
    mean_interval,
    percentile,
)
from vlmlayers.metrics.table import Metric
from vlmlayers.positions import relative_depth
from vlmlayers.scores.parts import balanced_rows
from vlmlayers.scores.protocol import Collector, Group, Protocol, chosen_positions, rows_of


@dataclass(frozen=True, eq=False)
class Matching:
    """Which image rows and text rows are used, and which of them belong together.

    Attributes:
        kind: `class_prompts` or `captions`.
        images: (image,) rows of the vision features.
        texts: (text,) rows of the text features.
        pairs: (pair, 2) positions in `images` and in `texts`.
        strata: (image,) what the bootstrap keeps balanced.
    """

    kind: str
    images: Labels
    texts: Labels
    pairs: Labels
    strata: Labels

    def text_weights(self, image_weights: Array) -> Array:
        """Return weights of the texts: captions go with their image, class prompts stay."""
        if self.kind == "class_prompts":
            return np.ones((len(image_weights), len(self.texts)))
        owner = np.zeros(len(self.texts), dtype=np.int64)
        owner[self.pairs[:, 1]] = self.pairs[:, 0]
        return image_weights[:, owner]

    def without(self, kept: Labels) -> tuple[Labels, Labels, Labels]:
        """Return image and text positions and pairs when only some images are kept."""
        back = np.full(len(self.images), -1)
        back[kept] = np.arange(len(kept))
        pairs = self.pairs[back[self.pairs[:, 0]] >= 0]
        texts = np.unique(pairs[:, 1])
        return (
            kept,
            texts,
            np.stack([back[pairs[:, 0]], np.searchsorted(texts, pairs[:, 1])], axis=1),
        )


def match(member: LayerFeatures, most: int, rng: np.random.Generator) -> Matching:
    """Pair images with their captions, or with the prompt of their class.

    Raises:
        UserError: A tower is missing, or no image has a text.
    """
    vision, text = member.tower("vision"), member.tower("text")
    chosen = balanced_rows(vision.labels, most or len(vision), rng)
    if text.pairs is not None:
        back = np.full(len(vision), -1)
        back[chosen] = np.arange(len(chosen))
        texts = np.flatnonzero(back[text.pairs] >= 0)
        pairs = np.stack([back[text.pairs[texts]], np.arange(len(texts))], axis=1)
        strata = np.zeros(len(chosen), dtype=np.int64)
        kind = "captions"
    else:
        # Several prompts of one class: the first stands for it.
        ids, first = np.unique(text.labels, return_index=True)
        chosen = chosen[np.isin(vision.labels[chosen], ids)]
        seen = np.isin(ids, vision.labels[chosen])
        ids, texts = ids[seen], first[seen]
        strata = vision.labels[chosen]
        pairs = np.stack([np.arange(len(chosen)), np.searchsorted(ids, strata)], axis=1)
        kind = "class_prompts"
    if not len(pairs):
        raise UserError(f"{member.dataset}: no image has a text of its own class")
    return Matching(kind, chosen, texts, pairs, strata)


def partner_positions(
    vision: TowerFeatures, text: TowerFeatures, space: str, protocol: Protocol
) -> list[tuple[str, str]]:
    """Return position pairs at equal relative depth; where depths differ, the nearest one."""
    others = [p for p in text.arrays.get(space, {}) if p not in ("proj", "embed", "final")]
    pairs = []
    for position in chosen_positions([vision], space, protocol):
        if position in text.arrays.get(space, {}) and (
            vision.blocks == text.blocks or not position.isdecimal()
        ):
            pairs.append((position, position))
        elif position.isdecimal() and others:
            depth = relative_depth(position, vision.blocks)
            near = min(others, key=lambda p: abs(relative_depth(p, text.blocks) - depth))
            pairs.append((position, near))
    return pairs


def run_modalities(
    group: Group, metrics: Mapping[str, Metric], protocol: Protocol, out: Collector
) -> None:
    """Score distances between the modalities at each position of both towers."""
    for member in group.members:
        for name, metric in metrics.items():
            with out.attempt(name, member.dataset, "", ""):
                matching = match(member, metric.largest_n, protocol.rng(0, 10))
                weights = bootstrap_weights(
                    matching.strata, protocol.bootstrap, protocol.rng(0, 11)
                )
                kept = jackknife_groups(matching.strata, protocol.jackknife, protocol.rng(0, 12))
                for space in protocol.spaces_of(metric):
                    _run_gap(
                        group, member, name, metric, space, matching, weights, kept, protocol, out
                    )


def _run_gap(
    group: Group,
    member: LayerFeatures,
    name: str,
    metric: Metric,
    space: str,
    matching: Matching,
    weights: Array,
    kept: list[Labels],
    protocol: Protocol,
    out: Collector,
) -> None:
    vision, text = member.tower("vision"), member.tower("text")
    places = partner_positions(vision, text, space, protocol)
    if not places:
        raise UserError(f"no {space} features were extracted for both towers")
    protocol.require(min(len(matching.images), len(matching.pairs)), metric, "pairs")
    for position, other in places:
        try:
            x = rows_of(vision, position, space, matching.images)
            y = rows_of(text, other, space, matching.texts)
            value, interval, how = _gap_value(metric, x, y, matching, weights, kept, protocol)
            null = _gap_null(metric, x, y, matching.pairs, protocol)
            place = group.place(member.dataset, vision, position, space, "text", other)
            out.add(
                name,
                place,
                value,
                interval,
                null,
                len(matching.pairs),
                interval=how,
                pairs=matching.kind,
                texts=len(matching.texts),
                **metric.settings,
            )
        except UserError as error:
            out.refuse(name, member.dataset, "vision", position, str(error))


def _gap_value(
    metric: Metric,
    x: Array,
    y: Array,
    matching: Matching,
    weights: Array,
    kept: list[Labels],
    protocol: Protocol,
) -> tuple[float, tuple[float, float], str]:
    arguments = protocol.arguments(metric)
    pairs = matching.pairs
    if metric.weighted is not None:
        every = np.vstack([np.ones((1, len(x))), weights])
        draws = metric.weighted(x, y, pairs, every, matching.text_weights(every), **arguments)
        return float(draws[0]), percentile(draws[1:]), "bootstrap"
    if metric.per_item is not None:
        values = metric.per_item(x, y, pairs, **arguments)
        interval = mean_interval(values, weights[:, pairs[:, 0]], metric.is_share)
        return float(values.mean()), interval, "bootstrap"
    value = float(metric.function(x, y, pairs, **arguments))

    def statistic(rows: Labels) -> float:
        images, texts, left = matching.without(rows)
        return float(metric.function(x[images], y[texts], left, **arguments))

    return value, jackknife(statistic, value, kept), "jackknife"


def _gap_null(metric: Metric, x: Array, y: Array, pairs: Labels, protocol: Protocol) -> float:
    if isinstance(metric.null, (int, float)):
        return float(metric.null)
    if callable(metric.null):
        return float(metric.null(x, y, pairs))
    if metric.null == "none":
        return float("nan")
    rng = protocol.rng(0, 13)
    values = []
    for _ in range(protocol.shuffles):
        shuffled = np.stack([pairs[:, 0], rng.permutation(pairs[:, 1])], axis=1)
        values.append(metric.function(x, y, shuffled, **protocol.arguments(metric)))
    return float(np.mean(values))


def run_queries(
    group: Group, metrics: Mapping[str, Metric], protocol: Protocol, out: Collector
) -> None:
    """Score retrieval both ways: the row's tower asks, the other one answers."""
    for member in group.members:
        for name, metric in metrics.items():
            with out.attempt(name, member.dataset, "", ""):
                matching = match(member, metric.largest_n, protocol.rng(0, 10))
                weights = bootstrap_weights(
                    matching.strata, protocol.bootstrap, protocol.rng(0, 11)
                )
                for space in protocol.spaces_of(metric):
                    _run_retrieval(
                        group, member, name, metric, space, matching, weights, protocol, out
                    )


def _run_retrieval(
    group: Group,
    member: LayerFeatures,
    name: str,
    metric: Metric,
    space: str,
    matching: Matching,
    weights: Array,
    protocol: Protocol,
    out: Collector,
) -> None:
    vision, text = member.tower("vision"), member.tower("text")
    places = partner_positions(vision, text, space, protocol)
    if not places:
        raise UserError(f"no {space} features were extracted for both towers")
    assert metric.per_item is not None and callable(metric.null)
    for position, other in places:
        images = rows_of(vision, position, space, matching.images)
        texts = rows_of(text, other, space, matching.texts)
        ways = (
            (vision, position, "text", other, images, texts, matching.pairs, weights),
            (
                text,
                other,
                "vision",
                position,
                texts,
                images,
                matching.pairs[:, ::-1],
                matching.text_weights(weights),
            ),
        )
        for asking, at, answering, there, x, y, pairs, w in ways:
            if len(y) < metric.smallest_n:
                out.refuse(
                    name,
                    member.dataset,
                    asking.tower,
                    "",
                    f"{len(y)} candidates; at least {metric.smallest_n} are needed",
                )
                continue
            arguments = protocol.arguments(metric)
            values = metric.per_item(x, y, pairs, **arguments)
            asked, matches = np.unique(pairs[:, 0], return_counts=True)
            if matching.kind == "class_prompts" and asking is text:
                # The prompts are the whole set of classes; only queries can be resampled.
                w = bootstrap_weights(np.zeros(len(x), np.int64), len(w), protocol.rng(0, 14))
            place = group.place(member.dataset, asking, at, space, answering, there)
            out.add(
                name,
                place,
                values.mean(),
                mean_interval(values, w[:, asked], metric.is_share),
                metric.null(len(y), matches, arguments["k"]),
                len(values),
                interval="bootstrap",
                pairs=matching.kind,
                candidates=len(y),
            )
