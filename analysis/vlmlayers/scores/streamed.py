"""Scores in one pass: which metrics streamed sums suffice for, their values and intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmlayers.arguments import checked
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.features import LayerFeatures, open_features
from vlmlayers.metrics import gap
from vlmlayers.metrics.agreement import cka
from vlmlayers.metrics.checks import SAME, Array, Labels, unit_rows
from vlmlayers.metrics.dataset_level import confusion
from vlmlayers.metrics.intervals import jackknife, jackknife_groups
from vlmlayers.metrics.moments import (
    Moments,
    biased_cka_null,
    cka_from,
    directions_from,
    fisher_from,
    frechet_from,
    frechet_null_by_rows,
    frechet_null_from,
    spectral_influence,
    white_noise_root,
)
from vlmlayers.metrics.table import METRICS, metric
from vlmlayers.metrics.transfer import WithinScatter, discriminant_predict
from vlmlayers.scores.missing import say_missing
from vlmlayers.scores.options import Draw, ScoreOptions, generator
from vlmlayers.scores.pairs import run_pairs
from vlmlayers.scores.reading import POOLED
from vlmlayers.scores.readouts import (
    add_accuracy,
    run_datasets,
    tell_unlike_passes,
    tell_unlike_texts,
)
from vlmlayers.scores.scoring import Collector, Group, Point, Scoring, rows_of
from vlmlayers.scores.sources import source_marks
from vlmlayers.scores.sums import DatasetSums, Key, StreamingScores, ordered

if TYPE_CHECKING:
    import pandas as pd

SPECTRAL: Mapping[str, Callable[[Array], float]] = {
    name: METRICS[name].parts[1]
    for name in ("effective_rank", "participation_ratio", "spectral_entropy")
}
LDA = "dataset_accuracy_lda"
GAPS = ("centroid_gap", "frechet_gap")
AGREEMENTS = {"cka_debiased": True, "cka_biased": False}
STREAMED = (LDA, "fisher_ratio", *AGREEMENTS, *GAPS, *SPECTRAL)


def check_streamed(metrics: Sequence[str] | None) -> list[str]:
    """Return the names of the metrics to stream.

    Raises:
        UserError: A name is unknown, or the metric needs the features themselves.
    """
    for name in metrics or ():
        metric(name)
        check_one_of("streaming metric", name, STREAMED)
    return list(STREAMED if metrics is None else metrics)


@checked
def score_streaming(
    chunks: Iterable[LayerFeatures | str | Path],
    metrics: Sequence[str] | None = None,
    *,
    sample: int = 200,
) -> pd.DataFrame:
    """Score features that arrive in chunks, in one pass and with flat memory.

    Args:
        chunks: Features of some or all items of a dataset each, in any order, or folders of
            stored features; they are read a few thousand rows at a time.
        metrics: Names from `vlmlayers.scores.streamed.STREAMED`; None for all of them.
        sample: Items of each dataset kept for held-out accuracy and intervals.

    Returns:
        A score table as `score` makes it, `options` saying `estimate=streaming`.

    Raises:
        UserError: As `StreamingScores.update`, or an unknown metric.
    """
    check_streamed(metrics)
    sums = StreamingScores(sample)
    for given in chunks:
        whole = given if isinstance(given, LayerFeatures) else open_features(given)
        for chunk in in_chunks(whole):
            sums.update(chunk)
    return streamed_scores(sums, metrics)


def in_chunks(features: LayerFeatures, rows: int = 4096) -> Iterator[LayerFeatures]:
    """Yield features some images at a time, each with its captions or with all class prompts."""
    total = len(features.tower("vision"))
    for start in range(0, total, rows):
        yield features.take_images(np.arange(start, min(start + rows, total)))


@checked
def streamed_scores(sums: StreamingScores, metrics: Sequence[str] | None = None) -> pd.DataFrame:
    """Return the score table of what was streamed so far.

    Raises:
        UserError: Nothing was streamed, an unknown metric, or one that needs the features.
    """
    names, datasets = check_streamed(metrics), sums.datasets
    if not datasets:
        raise UserError("no features came; nothing to score")
    heads = tuple(one.head for one in datasets.values())
    group = Group(heads[0].model, heads[0].weights, heads[0].split, heads)
    options = ScoreOptions()
    scoring = Scoring(group, {name: METRICS[name] for name in names}, options, Collector())
    # Captions are pooled with captions alone here.
    prompts = tuple(one.head for one in datasets.values() if one.prompts is not None)
    pooling = [name for name in names if name == LDA or name in AGREEMENTS]
    tell_unlike_texts(replace(group, members=prompts), pooling)
    tell_unlike_passes(group, pooling)
    if LDA in names:
        _add_dataset_accuracy(scoring, list(datasets.values()))
    _add_agreement_with_prompts(scoring, list(datasets.values()))
    for of_dataset in datasets.values():
        scorer = _Scorer(scoring, of_dataset)
        for name in names:
            if name == "fisher_ratio":
                scorer.fisher()
            elif name in SPECTRAL:
                scorer.spectral(name)
            elif name in GAPS:
                scorer.gaps(name)
            elif name in AGREEMENTS and of_dataset.prompts is None:
                scorer.agreement(name)
    chosen = {name: METRICS[name] for name in names}
    say_missing(scoring.out, chosen, options, asked=metrics is not None)
    table = scoring.out.table(options)
    table.attrs.update(
        source_marks(source for of_dataset in datasets.values() for source in of_dataset.sources())
    )
    return table


def _add_dataset_accuracy(scoring: Scoring, all_sums: list[DatasetSums]) -> None:
    """Add dataset accuracy by LDA: fitted on the sums, held out on the samples.

    Class prompts are few and kept: they are scored as without streaming, split by class.
    """
    only = replace(scoring, metrics={LDA: METRICS[LDA]})
    all_sums = sorted(all_sums, key=lambda one: one.head.dataset)  # as in `Group.in_order`
    if len(all_sums) < 2:
        only.refuse(POOLED, "", scoring.group.too_few(len(all_sums)))
        return
    prompts = [sums.prompts is not None for sums in all_sums]
    if all(prompts):
        heads = (replace(sums.head, vision=None, text=sums.prompts) for sums in all_sums)
        texts = replace(scoring.group, members=tuple(heads))
        run_datasets(replace(only, group=texts), towers=("text",))
    elif any(prompts):
        only.refuse(POOLED, "text", "some datasets have prompts and some have captions")
    for key in ordered(set.intersection(*(set(s.sample) for s in all_sums))):
        tower, space, position = key
        if space != "native" or (tower == "text" and any(prompts)):
            continue
        features = all_sums[0].head.tower(tower)
        point = Point(LDA, METRICS[LDA], POOLED, features, space, position, scoring)
        with point.attempt():
            _add_streamed_accuracy(point, [sums.held_out(key) for sums in all_sums])


def _add_agreement_with_prompts(scoring: Scoring, all_sums: list[DatasetSums]) -> None:
    """Add CKA of the classes' mean images with their prompts, as without streaming.

    A prompt is no text of an image: repeated for each image of its class it would agree with them
    as any vector does that is one for a class, beside a chance of 0.
    """
    members = tuple(_mean_images(one) for one in all_sums if one.prompts is not None)
    wanted = {name: metric for name, metric in scoring.metrics.items() if name in AGREEMENTS}
    if members and wanted:
        group = replace(scoring.group, members=members)
        run_pairs(replace(scoring, metrics=wanted, group=group), within=False)


def _mean_images(sums: DatasetSums) -> LayerFeatures:
    """Return the mean image of each class that has any as features, beside the prompts."""
    classes, head = sums.whole().classes, sums.head.tower("vision")
    native = {key[2]: found for key, found in classes.items() if key[1] == "native"}
    there = np.flatnonzero(next(iter(native.values())).counts) if native else np.empty(0, int)
    arrays = {"native": {position: found.means[there] for position, found in native.items()}}
    ids = tuple(map(str, there))
    vision = replace(head, ids=ids, labels=there, arrays=arrays if native else {})
    return replace(sums.head, vision=vision, text=sums.prompts)


def _add_streamed_accuracy(point: Point, parts: list[tuple[Moments, Array]]) -> None:
    moments, held = [fit for fit, _ in parts], [rows for _, rows in parts]
    fitted = sum(m.n for m in moments)
    point.require(fitted + sum(map(len, held)))
    truth = np.repeat(np.arange(len(held)), [len(x) for x in held])
    predicted = _discriminant(moments, np.concatenate(held))
    counts = confusion(truth, predicted, len(held))
    add_accuracy(point, counts, estimate="streaming", fitted_on=fitted)


def _discriminant(moments: list[Moments], x: Array) -> Labels:
    """Predict the dataset by LDA from its moments; one and the same where items do not differ."""
    whole = sum(moments[1:], moments[0])
    # Features such as `embed` under `cls` are equal for all items; any answer is then chance.
    if np.trace(whole.scatter) <= SAME**2 * whole.n * float(whole.mean @ whole.mean):
        return np.zeros(len(x), dtype=np.int64)
    scatters = [WithinScatter(m.scatter, m.n, m.fourth) for m in moments]
    centre = np.mean([m.mean for m in moments], axis=0)
    means = np.stack([m.mean - centre for m in moments])
    factor = sum(scatters[1:], scatters[0]).factor()
    return discriminant_predict(factor, means, x - centre)


def _frechet_null(x: Moments, y: Moments, images: Array, texts: Array) -> float:
    """Return the Fréchet gap of mixed clouds: of rows where enough are kept, else of normal ones.

    Never of as few rows as are kept: the distance by chance grows as rows become fewer.
    """
    rng = generator(Draw.STREAMED_NOISE)
    if min(x.n, y.n) <= min(len(images), len(texts)):
        return frechet_null_by_rows(x, y, (images, texts), rng)
    return frechet_null_from(x, y, rng)


def _on_rows(function: Callable[..., float], *arrays: Any) -> float:
    """Return a function of some rows of its arrays; the last argument names the rows."""
    *data, rows = arrays
    return float(function(*(array[rows] for array in data)))


def _between_by_within(total: Array, within: Array) -> float:
    """Return the Fisher ratio from squared distances to the mean and to the own class mean."""
    if not within.any():
        raise UserError("the items kept for intervals do not scatter within classes")
    return float(total.sum() / within.sum() - 1.0)


class _Scorer:
    """Scores of one dataset from its sums; intervals from its sample, narrowed to the full n."""

    def __init__(self, scoring: Scoring, sums: DatasetSums) -> None:
        self.scoring, self.sums, self.full = scoring, sums, sums.whole()
        alike, groups = np.zeros(len(sums.labels), np.int64), scoring.options.jackknife
        self.kept = jackknife_groups(alike, groups, generator(Draw.STREAMED_GROUPS))
        # Standard errors go with 1/√n: that of the sample is scaled to all items.
        self.narrower = float(np.sqrt(len(sums.labels) / sums.n))

    def _point(self, name: str, key: Key, other: str = "") -> Point:
        tower, space, position = key
        head = self.sums.head
        related = ("text", other) if other else ("", "")
        return Point(
            name, METRICS[name], head.dataset, head.tower(tower), space, position, self.scoring,
            related,
        )  # fmt: skip

    def _add(
        self,
        point: Point,
        value: float,
        null: float,
        on_sample: Callable[[Labels], float],
        **noted: Any,
    ) -> None:
        # About 0: the interval of the sample is moved to the value of all items.
        low, high = jackknife(on_sample, 0.0, self.kept)
        point.add(
            value,
            (value + low * self.narrower, value + high * self.narrower),
            null,
            self.sums.n,
            estimate="streaming",
            interval="jackknife_of_sample",
            sample=len(self.sums.labels),
            **noted,
        )

    def _keys(self, space: str, towers: tuple[str, ...]) -> list[Key]:
        prompts = self.sums.prompts is not None
        return [
            key
            for key in ordered(self.full.moments)
            if key[1] == space and key[0] in towers and not (key[0] == "text" and prompts)
        ]

    def fisher(self) -> None:
        """Add the Fisher ratio of images."""
        for key in self._keys("native", ("vision",)):
            point = self._point("fisher_ratio", key)
            with point.attempt():
                point.require(self.sums.n)
                if key not in self.full.classes:
                    raise UserError("its items have no classes")
                classes = self.full.classes[key]
                value = fisher_from(self.full.moments[key], classes)
                count = np.count_nonzero(classes.counts)
                # About the means of all items: of many classes the sample has one item or none.
                centres = self.full.moments[key].mean, classes.means[self.sums.labels]
                total, within = (
                    np.square(self.sums.sample[key] - centre).sum(axis=1) for centre in centres
                )
                self._add(
                    point,
                    value,
                    (count - 1) / (self.sums.n - count),
                    partial(_on_rows, _between_by_within, total, within),
                )

    def spectral(self, name: str) -> None:
        """Add a function of the spectrum of images, and of captions."""
        function, plain = SPECTRAL[name], METRICS[name].function
        for key in self._keys("native", ("vision", "text")):
            point = self._point(name, key)
            with point.attempt():
                moments = self.full.moments[key]
                point.require(moments.n)
                values, directions = directions_from(moments)
                root = white_noise_root(
                    moments.n, len(moments.mean), generator(Draw.STREAMED_NOISE)
                )
                # Rank-like measures grow with n and width: noise of the same shape says how much.
                null = function(np.linalg.eigvalsh(root @ root.T)[::-1].clip(min=0.0))
                sample = self.sums.sample[key]
                on_sample = partial(_on_rows, plain, sample)
                if len(sample) < moments.n:
                    # The spectrum of fewer items than columns is another one, and moves otherwise.
                    rows = (sample - moments.mean) @ directions
                    influence = spectral_influence(function, values, rows, moments.n)
                    on_sample = partial(_on_rows, np.mean, influence)
                self._add(point, function(values), null, on_sample)

    def gaps(self, name: str) -> None:
        """Add a distance between the clouds of images and texts, unit rows in `joint` space."""
        for space, position, other in self.sums.pairs():
            if space != "joint":
                continue
            keys = ("vision", space, position), ("text", space, other)
            point = self._point(name, keys[0], other)
            with point.attempt():
                point.require(self.sums.n, "pairs")
                x = self.full.moments[keys[0]]
                texts = self._text_rows(keys[1], keys[0])
                y = self.full.moments[keys[1]] if texts is None else Moments.of(texts)
                image_rows = self.sums.sample[keys[0]]
                text_rows = self.sums.sample[keys[1]] if texts is None else texts
                if name == "centroid_gap":
                    function = gap.centroid_gap
                    value = float(np.linalg.norm(x.mean - y.mean))
                    null = float(np.sqrt(1.0 / x.n + 1.0 / y.n))
                else:
                    function = gap.frechet_gap
                    value = frechet_from(x, y)
                    null = _frechet_null(x, y, image_rows, text_rows)
                on_sample = partial(_on_rows, function, image_rows, text_rows)
                if texts is not None:  # prompts are of classes: all of them stay
                    on_sample = partial(_on_rows, partial(function, y=texts), image_rows)
                kind = "first_captions" if texts is None else "class_prompts"
                self._add(point, value, null, on_sample, pairs=kind, texts=y.n)

    def _text_rows(self, key: Key, images: Key) -> Array | None:
        """Return the prompts of the classes that have images, where texts are prompts."""
        prompts = self.sums.prompts
        if prompts is None:
            return None
        counts = self.full.classes[images].counts
        # The first of each class, as without streaming.
        ids, first = np.unique(prompts.labels, return_index=True)
        return unit_rows(rows_of(prompts, key[2], key[1], first[counts[ids] > 0]))

    def agreement(self, name: str) -> None:
        """Add CKA of images with their captions, position by position at equal depth."""
        debiased = AGREEMENTS[name]
        for space, position, other in self.sums.pairs():
            if space != "native":
                continue
            keys = ("vision", space, position), ("text", space, other)
            point = self._point(name, keys[0], other)
            with point.attempt():
                point.require(self.sums.n, "pairs")
                x, y = (self.full.moments[key] for key in keys)
                cross = self.full.cross[space, position, other]
                value = cka_from(x, y, cross, debiased=debiased)
                # Shuffled pairs have mean 0 if unbiased, else a known mean above it.
                null = 0.0 if debiased else biased_cka_null(x, y)
                samples = (self.sums.sample[key] for key in keys)
                on_sample = partial(_on_rows, partial(cka, debiased=debiased), *samples)
                self._add(point, value, null, on_sample, pairs="first_captions")
