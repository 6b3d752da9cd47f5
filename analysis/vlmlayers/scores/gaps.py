"""Protocol of the modality gap: images and texts of one dataset, position by position, `joint`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from vlmlayers.errors import UserError
from vlmlayers.features import LayerFeatures, TowerFeatures
from vlmlayers.metrics.checks import Array, Labels
from vlmlayers.metrics.intervals import (
    bootstrap_weights,
    jackknife,
    jackknife_groups,
    jackknife_interval,
    mean_interval,
    percentile_about,
    wilson,
)
from vlmlayers.metrics.table import Metric
from vlmlayers.scores.options import Draw, ScoreOptions, generator
from vlmlayers.scores.parts import balanced_rows
from vlmlayers.scores.reading import partner_block
from vlmlayers.scores.scoring import Point, Scoring, chosen_positions, rows_of, stated_null


@dataclass(frozen=True, eq=False)
class Matching:
    """Which image rows and text rows are used, and which of them belong together.

    Attributes:
        kind: `class_prompts` or `captions`.
        images: (image,) rows of the vision features.
        texts: (text,) rows of the text features.
        pairs: (pair, 2) positions in `images` and in `texts`.
        weights: (draw, image) bootstrap weights, balanced over classes where texts are prompts.
        kept: Positions in `images` that each jackknife group leaves.
    """

    kind: str
    images: Labels
    texts: Labels
    pairs: Labels
    weights: Array
    kept: list[Labels]

    def text_weights(self, image_weights: Array) -> Array:
        """Return weights of the texts: captions go with their image, class prompts stay."""
        if self.kind == "class_prompts":
            # The prompts are all classes of the dataset, not a sample of them.
            return np.ones((len(image_weights), len(self.texts)))
        # A caption is drawn as often as its image: the image is what was sampled.
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


def match(member: LayerFeatures, most: int, options: ScoreOptions) -> Matching:
    """Pair images with their captions, or with the prompt of their class.

    Raises:
        UserError: A tower is missing, or no image has a text.
    """
    vision, text = member.tower("vision"), member.tower("text")
    chosen = balanced_rows(vision.labels, most or len(vision), generator(Draw.MATCHING))
    if text.pairs is not None:
        back = np.full(len(vision), -1)
        back[chosen] = np.arange(len(chosen))
        texts = np.flatnonzero(back[text.pairs] >= 0)
        pairs = np.stack([back[text.pairs[texts]], np.arange(len(texts))], axis=1)
        # Captioned images have no classes to be balanced over.
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
    weights = bootstrap_weights(strata, options.bootstrap, generator(Draw.PAIR_WEIGHTS))
    kept = jackknife_groups(strata, options.jackknife, generator(Draw.PAIR_GROUPS))
    return Matching(kind, chosen, texts, pairs, weights, kept)


def partner_positions(
    vision: TowerFeatures, text: TowerFeatures, space: str, options: ScoreOptions
) -> list[tuple[str, str]]:
    """Return position pairs at equal relative depth; where depths differ, the nearest one."""
    # The ends of a tower are at no depth of its own, and so no partner of a block.
    others = [p for p in text.arrays.get(space, {}) if p not in ("proj", "embed", "final")]
    pairs = []
    for position in chosen_positions([vision], space, options):
        if position in text.arrays.get(space, {}) and (
            vision.blocks == text.blocks or not position.isdecimal()
        ):
            pairs.append((position, position))
        elif position.isdecimal() and others:
            # By the rule of whatever reads the rows: at a tie the other block would be left out.
            partner = partner_block(int(position), vision.blocks, text.blocks)
            pairs.append((position, min(others, key=lambda p: abs(int(p) - partner))))
    return pairs


def run_modalities(scoring: Scoring) -> None:
    """Score distances between the modalities at each position of both towers."""
    for member, (name, metric) in product(scoring.group.members, scoring.metrics.items()):
        with scoring.out.attempt(name, member.dataset, "", ""):
            matching = match(member, metric.largest_n, scoring.options)
            for point in _points(scoring, name, metric, member):
                point.require(min(len(matching.images), len(matching.pairs)), "pairs")
                with point.guarded():
                    _add_gap(point, member.tower("text"), matching)


def run_queries(scoring: Scoring) -> None:
    """Score retrieval both ways: the row's tower asks, the other one answers."""
    for member, (name, metric) in product(scoring.group.members, scoring.metrics.items()):
        with scoring.out.attempt(name, member.dataset, "", ""):
            matching = match(member, metric.largest_n, scoring.options)
            for point in _points(scoring, name, metric, member):
                with point.guarded():
                    _add_retrieval(point, member.tower("text"), matching)


def _points(scoring: Scoring, name: str, metric: Metric, member: LayerFeatures) -> Iterator[Point]:
    """Yield the places of the vision tower, each with its partner on the text tower.

    Raises:
        UserError: The towers have no features in a space of the metric.
    """
    vision, text = member.tower("vision"), member.tower("text")
    for space in scoring.options.spaces_of(metric):
        places = partner_positions(vision, text, space, scoring.options)
        if not places:
            raise UserError(f"no {space} features were extracted for both towers")
        for position, other in places:
            yield Point(
                name, metric, member.dataset, vision, space, position, scoring, ("text", other)
            )


def _add_gap(point: Point, text: TowerFeatures, matching: Matching) -> None:
    x = point.rows(matching.images)
    y = rows_of(text, point.other[1], point.space, matching.texts)
    value, interval, how = _gap_value(point, x, y, matching)
    point.add(
        value,
        interval,
        _gap_null(point, x, y, matching.pairs),
        len(matching.pairs),
        interval=how,
        pairs=matching.kind,
        texts=len(matching.texts),
        **point.metric.settings,
    )


def _gap_value(
    point: Point, x: Array, y: Array, matching: Matching
) -> tuple[float, tuple[float, float], str]:
    metric, arguments = point.metric, point.arguments()
    pairs, weights = matching.pairs, matching.weights
    if metric.weighted is not None:
        # The value is the draw in which every item counts once: one call for it and for all draws.
        every = np.vstack([np.ones((1, len(x))), weights])
        draws = metric.weighted(x, y, pairs, every, matching.text_weights(every), **arguments)
        return float(draws[0]), percentile_about(draws[0], draws[1:]), "bootstrap"
    if metric.per_item is not None:
        values = metric.per_item(x, y, pairs, **arguments)
        # A pair weighs as its image does: captions of one image are not independent draws.
        interval = mean_interval(values, weights[:, pairs[:, 0]], metric.is_share)
        return float(values.mean()), interval, "bootstrap"
    value = float(metric.function(x, y, pairs, **arguments))
    if metric.left_out is not None:
        left_out = metric.left_out(x, y, pairs, **arguments)
        if (left_out == value).all() and value in (0.0, 1.0):  # nothing varies, yet it could have
            low, high = wilson(value, min(len(x), len(y)))
            return value, (float(low), float(high)), "wilson"
        low, high = jackknife_interval(value, left_out)
        return value, (float(low), float(high)), "jackknife"

    def statistic(rows: Labels) -> float:
        images, texts, left = matching.without(rows)
        return float(metric.function(x[images], y[texts], left, **arguments))

    return value, jackknife(statistic, value, matching.kept), "jackknife"


def _gap_null(point: Point, x: Array, y: Array, pairs: Labels) -> float:
    metric = point.metric
    if (stated := stated_null(metric, x, y, pairs)) is not None:
        return stated
    rng = generator(Draw.SHUFFLED_PAIRS)
    values = []
    for _ in range(point.options.shuffles):
        # Shuffled partners leave both clouds as they are and break only who belongs to whom.
        shuffled = np.stack([pairs[:, 0], rng.permutation(pairs[:, 1])], axis=1)
        values.append(metric.function(x, y, shuffled, **point.arguments()))
    return float(np.mean(values))


def _add_retrieval(point: Point, text: TowerFeatures, matching: Matching) -> None:
    """Add retrieval of texts by images, and of images by texts, at one pair of positions."""
    metric, weights = point.metric, matching.weights
    images = point.rows(matching.images)
    texts = rows_of(text, point.other[1], point.space, matching.texts)
    asked_by_text = replace(
        point, features=text, position=point.other[1], other=("vision", point.position)
    )
    ways = (
        (point, images, texts, matching.pairs, weights),
        (asked_by_text, texts, images, matching.pairs[:, ::-1], matching.text_weights(weights)),
    )
    assert metric.per_item is not None and callable(metric.null)
    for asking, x, y, pairs, w in ways:
        if len(y) < metric.smallest_n:
            reason = f"{len(y)} candidates; at least {metric.smallest_n} are needed"
            # Without a position: all of them have the same candidates, and one refusal says so.
            replace(asking, position="").refuse(reason)
            continue
        arguments = asking.arguments()
        values = metric.per_item(x, y, pairs, **arguments)
        asked, matches = np.unique(pairs[:, 0], return_counts=True)
        if matching.kind == "class_prompts" and asking is asked_by_text:
            # The prompts are the whole set of classes; only queries can be resampled.
            alike = np.zeros(len(x), np.int64)
            w = bootstrap_weights(alike, len(w), generator(Draw.PROMPT_QUERIES))
        asking.add(
            values.mean(),
            mean_interval(values, w[:, asked], metric.is_share),
            metric.null(len(y), matches, **arguments),
            len(values),
            interval="bootstrap",
            pairs=matching.kind,
            candidates=len(y),
        )
