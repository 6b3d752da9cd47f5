"""Sums and a small sample instead of features: one pass, and memory does not grow with n.

A row goes to the sample if the hash of its id is among the smallest seen, else into the sums. So
the result does not depend on how the rows were cut into chunks or shared among processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmlayers.arguments import checked
from vlmlayers.errors import UserError
from vlmlayers.features import LayerFeatures, TowerFeatures
from vlmlayers.metrics.checks import Array, Labels, unit_rows
from vlmlayers.metrics.moments import ClassMoments, CrossMoments, Moments
from vlmlayers.positions import TOWERS, sort_key
from vlmlayers.scores.gaps import partner_positions
from vlmlayers.scores.options import ScoreOptions
from vlmlayers.scores.scoring import check_finite, expect_one_model, poolings
from vlmlayers.words import counted

Key = tuple[str, str, str]  # tower, space, position


@dataclass
class DatasetSums:
    """What is kept of one dataset.

    Attributes:
        head: Features without items: names, class names, model.
        sample_size: Items kept, those with the smallest hashes.
        hashes: (sample,) ascending.
        labels: (sample,).
        sample: Features of the sample, (sample, width) by key: images, and captions where texts
            are captions.
        moments: Moments of all other items by the same keys.
        classes: Class sizes and means of all other items, by key of the vision tower; empty where
            the images have no classes.
        cross: Joint moments of images and captions of all other items, by position pair.
        prompts: The text tower, where texts are class prompts.
        others: Identities of chunks that are of another extraction than the head.
    """

    head: LayerFeatures
    sample_size: int
    hashes: NDArray[np.uint64]
    labels: Labels
    sample: dict[Key, Array] = field(default_factory=dict)
    moments: dict[Key, Moments] = field(default_factory=dict)
    classes: dict[Key, ClassMoments] = field(default_factory=dict)
    cross: dict[tuple[str, str, str], CrossMoments] = field(default_factory=dict)
    prompts: TowerFeatures | None = None
    others: list[Mapping[str, Any]] = field(default_factory=list)

    def update(self, hashes: NDArray[np.uint64], labels: Labels, rows: dict[Key, Array]) -> None:
        """Take in rows; what the sample has no room for goes into the sums."""
        hashes = np.concatenate([self.hashes, hashes])
        labels = np.concatenate([self.labels, labels])
        # The smallest hashes are a random sample that no order of arrival or split changes.
        order = np.argsort(hashes, kind="stable")
        # In order of the hashes, not of arrival: groups of the jackknife are drawn by place.
        keep, rest = order[: self.sample_size], np.sort(order[self.sample_size :])
        if len(np.unique(hashes[order[: self.sample_size + 1]])) < min(
            len(hashes), self.sample_size + 1
        ):
            raise UserError(f"{self.head.dataset}: an item came twice; each must come once")
        together = {
            key: np.concatenate([self.sample[key], x]) if key in self.sample else x
            for key, x in rows.items()
        }
        self.hashes, self.labels = hashes[keep], labels[keep]
        self.sample = {key: x[keep] for key, x in together.items()}
        if len(rest):
            self.absorb({key: x[rest] for key, x in together.items()}, labels[rest])

    def absorb(self, rows: dict[Key, Array], labels: Labels) -> None:
        """Count rows in the sums alone."""
        for key, x in rows.items():
            _merge_into(self.moments, key, Moments.of(x))
            if key[0] == "vision" and self.class_count:
                _merge_into(self.classes, key, ClassMoments.of(x, labels, self.class_count))
        for space, position, other in self.crossed():
            x, y = rows["vision", space, position], rows["text", space, other]
            _merge_into(self.cross, (space, position, other), CrossMoments.of(x, y))

    def pairs(self) -> list[tuple[str, str, str]]:
        """Return space, vision position and text position of each pair at equal depth."""
        vision, text = self.head.vision, self.head.text
        if vision is None or text is None:
            return []
        found = []
        for space in sorted({key[1] for key in self.sample}):
            found += [
                (space, *pair) for pair in partner_positions(vision, text, space, ScoreOptions())
            ]
        return found

    def crossed(self) -> list[tuple[str, str, str]]:
        """Return the pairs of which joint moments are kept: those of images with captions.

        A class's prompt is no text of each of its images; their mean is compared with it.
        """
        return self.pairs() if self.prompts is None else []

    def expect_alike(self, head: LayerFeatures, prompts: TowerFeatures | None) -> None:
        """Refuse a part of the dataset that lacks what this one has, or has something else.

        Raises:
            UserError: Says in what they differ.
        """
        then, now = _facts(self.head, self.prompts), _facts(head, prompts)
        if other := [name for name in {**then, **now} if then.get(name) != now.get(name)]:
            raise UserError(
                f"{head.dataset}: parts of it differ in {' and in '.join(other)}, and are no "
                "chunks of one dataset; give them names of their own"
            )

    def know(self, identities: Iterable[Mapping[str, Any]]) -> None:
        """Keep of which extractions the items are."""
        for one in identities:
            if one not in (self.head.identity, *self.others):
                self.others.append(one)

    def sources(self) -> list[LayerFeatures]:
        """Return a head for each extraction that the items are of."""
        return [self.head, *(replace(self.head, identity=one) for one in self.others)]

    def copy(self) -> DatasetSums:
        """Return the same, which takes in rows of its own."""
        return replace(
            self, sample=dict(self.sample), moments=dict(self.moments),
            classes=dict(self.classes), cross=dict(self.cross), others=list(self.others),
        )  # fmt: skip

    def merge(self, other: DatasetSums) -> DatasetSums:
        """Return what one pass over both would have kept."""
        merged = self.copy()
        merged.know(one.identity for one in other.sources())
        for mine, theirs in (
            (merged.moments, other.moments), (merged.classes, other.classes),
            (merged.cross, other.cross),
        ):  # fmt: skip
            for key, value in theirs.items():
                _merge_into(mine, key, value)
        merged.update(other.hashes, other.labels, other.sample)
        return merged

    def whole(self) -> DatasetSums:
        """Return the same with the sample counted in the sums as well."""
        full = replace(
            self, moments=dict(self.moments), classes=dict(self.classes), cross=dict(self.cross)
        )
        full.absorb(self.sample, self.labels)
        return full

    def held_out(self, key: Key) -> tuple[Moments, Array]:
        """Return moments to fit on and the rows held out: the sample, at most half of all items.

        Raises:
            UserError: Fewer than two items.
        """
        # A small dataset is all sample, and would leave nothing to fit on.
        most = min(len(self.hashes), self.n // 2)
        if most < 1:
            raise UserError(
                f"{self.head.dataset}: {counted(self.n, 'item')}; at least 2 are needed"
            )
        held, rest = self.sample[key][:most], self.sample[key][most:]
        parts = [self.moments[key]] if key in self.moments else []
        parts += [Moments.of(rest)] if len(rest) else []
        return sum(parts[1:], parts[0]), held

    @property
    def class_count(self) -> int:
        """Number of classes; 0 of captioned images without any, whose labels mean nothing."""
        if self.prompts is None or self.head.class_names:
            return len(self.head.class_names)
        return int(self.prompts.labels.max()) + 1

    @property
    def n(self) -> int:
        """Number of items seen."""
        seen = next(iter(self.moments.values())).n if self.moments else 0
        return seen + len(self.hashes)


class StreamingScores:
    """Sums over any number of chunks of features; two of them merge exactly.

    Args:
        sample: Items of each dataset kept as they are: they are held out from the read-out, and
            intervals come from them.
    """

    @checked
    def __init__(self, sample: int = 200) -> None:
        if sample < 20:
            raise UserError(f"sample is {sample}; at least 20 items per dataset are needed")
        self.sample = sample
        self.datasets: dict[str, DatasetSums] = {}

    @checked
    def update(self, chunk: LayerFeatures) -> None:
        """Take in some items of a dataset.

        Raises:
            UserError: NaN or Inf, no images, or a chunk of another model, split or pooling, of
                other widths, or unlike the chunks of its dataset.
        """
        check_finite(chunk)
        if chunk.vision is None:
            raise UserError(f"{chunk.dataset}: streaming counts images; no vision features came")
        rows = _rows(chunk)
        self._expect_alike(chunk, _prompts(chunk))
        sums = self.datasets.get(chunk.dataset) or self._empty(chunk)
        sums.update(_hashes(chunk.dataset, chunk.vision.ids), chunk.vision.labels, rows)
        # Only now: of a chunk that was refused nothing stays.
        sums.know([chunk.identity])
        self.datasets[chunk.dataset] = sums

    def open(self, chunk: LayerFeatures) -> DatasetSums:
        """Return the sums of a dataset, empty where nothing of it was taken in."""
        return self.datasets.setdefault(chunk.dataset, self._empty(chunk))

    def merge(self, other: StreamingScores) -> StreamingScores:
        """Return the sums of both, as one pass over both would have made them.

        Raises:
            UserError: They keep samples of other sizes, or as `update`.
        """
        if self.sample != other.sample:
            raise UserError(f"samples of {self.sample} and {other.sample} items cannot be merged")
        merged = StreamingScores(self.sample)
        # Copies: what the merged sums take in later must not be counted in these two.
        merged.datasets = {name: sums.copy() for name, sums in self.datasets.items()}
        for name, sums in other.datasets.items():
            merged._expect_alike(sums.head, sums.prompts)
            mine = merged.datasets.get(name)
            merged.datasets[name] = sums.copy() if mine is None else mine.merge(sums)
        return merged

    def _empty(self, chunk: LayerFeatures) -> DatasetSums:
        # The first chunk says what there is; its items must not stay in memory.
        head = replace(chunk, vision=_without_items(chunk.vision), text=_without_items(chunk.text))
        return DatasetSums(
            head,
            self.sample,
            np.empty(0, np.uint64),
            np.empty(0, np.int64),
            prompts=_prompts(chunk),
        )

    def _expect_alike(self, head: LayerFeatures, prompts: TowerFeatures | None) -> None:
        """Refuse what `make_groups` keeps apart, and what is not of its own dataset."""
        heads = [sums.head for sums in self.datasets.values()]
        if not heads:
            return
        ours, theirs = _group(heads[0]), _group(head)
        if ours != theirs:
            raise UserError(
                f"{head.dataset}: features of {theirs} cannot join those of {ours} in "
                f"{heads[0].dataset}; score them apart"
            )
        expect_one_model([*heads, head])
        if head.dataset in self.datasets:
            self.datasets[head.dataset].expect_alike(head, prompts)


def _group(one: LayerFeatures) -> str:
    """Return model, weights, split and pooling, which must be one, in words."""
    pooled = [f"{name} ({tower})" for tower, name in zip(TOWERS, poolings(one)) if name]
    return f"{one.model} {one.weights} {one.split} pooled by {' and '.join(pooled)}"


def _prompts(chunk: LayerFeatures) -> TowerFeatures | None:
    return chunk.text if chunk.text is not None and chunk.text.pairs is None else None


def _facts(head: LayerFeatures, prompts: TowerFeatures | None) -> dict[str, Any]:
    """Return what all items of a dataset have in common, by its name in messages."""
    found: dict[str, Any] = {"class names": head.class_names}
    for one in head.towers:
        places = {(space, position) for space, by in one.arrays.items() for position in by}
        found |= {
            f"the positions of the {one.tower} tower": places,
            f"the blocks of the {one.tower} tower": one.blocks,
        }
    texts = None if prompts is None else (prompts.ids, prompts.labels.tolist())
    return {**found, "class prompts": texts}


def _rows(chunk: LayerFeatures) -> dict[Key, Array]:
    """Return the rows of a chunk in float64: images, and the first caption of each image.

    In `joint` space rows have length 1, as the modality gap wants them. Class prompts are kept as
    they are and need no sums.
    """
    vision, text = chunk.vision, chunk.text
    assert vision is not None
    given: dict[Key, Any] = {
        ("vision", space, p): array
        for space, by in vision.arrays.items()
        for p, array in by.items()
    }
    if text is not None and text.pairs is not None:
        images, first = np.unique(text.pairs, return_index=True)
        if not np.array_equal(images, np.arange(len(vision))):
            raise UserError(f"{chunk.dataset}: an image of a chunk has no caption")
        given |= {
            ("text", space, p): array[first] for space, by in text.arrays.items()
            for p, array in by.items()
        }  # fmt: skip
    elif text is not None:
        missing = np.setdiff1d(vision.labels, text.labels)
        if len(missing):
            raise UserError(f"{chunk.dataset}: class {missing[0]} has images but no prompt")
    rows = {key: np.asarray(x, dtype=np.float64) for key, x in given.items()}
    return {key: unit_rows(x) if key[1] == "joint" else x for key, x in rows.items()}


def _hashes(dataset: str, ids: Sequence[str]) -> NDArray[np.uint64]:
    # With the name of the dataset, so that datasets of the same images are sampled apart.
    digests = (blake2b(f"{dataset}\0{name}".encode(), digest_size=8).digest() for name in ids)
    # In one order of bytes, so that machines agree on the sample.
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def _without_items(tower: TowerFeatures | None) -> TowerFeatures | None:
    """Return a tower without items: its positions, widths and names."""
    return None if tower is None else tower.take([])


def _merge_into(target: dict[Any, Any], key: Any, value: Any) -> None:
    target[key] = target[key] + value if key in target else value


def ordered(keys: Iterable[Key]) -> list[Key]:
    """Return keys along the tower."""
    return sorted(keys, key=lambda key: (key[0] != "vision", key[1], sort_key(key[2])))
