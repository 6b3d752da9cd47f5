"""Webdataset shards: tar files whose members are image, class and caption of numbered samples."""

from __future__ import annotations

from pathlib import Path

from vlmlayers.data.shards import Sample, index_shard
from vlmlayers.errors import UserError
from vlmlayers.manifests.items import SPLITS, Item, checked_path
from vlmlayers.manifests.layouts.base import checked_name, declared_names, is_number
from vlmlayers.manifests.place import MissingData, Place


class Shards:
    """An item's path is the tar file, a slash, and the image's name in it."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def splits(self) -> tuple[str, ...]:
        """Return the splits that the manifest gives shards to."""
        return tuple(split for split in SPLITS if split in self.place.spec.shards)

    def files(self, split: str) -> list[Path]:
        """Return the tar files of a split, sorted within each pattern.

        Raises:
            UserError: A pattern matches no file.
        """
        folder, found = self.place.folder, []
        for pattern in self.place.spec.shards[split]:
            matches = sorted(folder.glob(pattern)) if folder.is_dir() else []
            if not matches:
                raise MissingData(
                    f"{self.place.name}: no shard {folder / pattern}; {self.place.hint}"
                )
            found += matches
        return found

    def class_names(self) -> tuple[str, ...]:
        """Return the declared names, else the sorted classes of all samples."""
        declared = declared_names(self.place)
        if declared:
            return declared
        words = {
            sample.target
            for split in self.splits()
            for _, sample in self._samples(split)
            if sample.target is not None
        }
        if all(is_number(word) for word in words):
            size = max((int(word) for word in words), default=-1) + 1
            if size > 10 * len(words):
                raise UserError(f"{self.place.name}: {len(words)} classes, but labels to {size}")
            return tuple(str(label) for label in range(size))
        return tuple(sorted(words))

    def _samples(self, split: str) -> list[tuple[str, Sample]]:
        folder = self.place.folder
        return [
            (f"{file.relative_to(folder).as_posix()}/{sample.image}", sample)
            for file in self.files(split)
            for sample in index_shard(file)
        ]

    def items(self, split: str) -> list[Item]:
        """Return the samples of a split in the order of the shards."""
        names = self.class_names()
        by_name = {name: label for label, name in enumerate(names)}
        items = []
        for path, sample in self._samples(split):
            label = _label(sample, names, by_name, f"{self.place.name}: {path}")
            name = names[label] if label >= 0 else ""
            captions = tuple(checked_name(text, path) for text in sample.captions)
            items.append(Item(checked_path(path, self.place.name), label, name, captions))
        return items


def _label(sample: Sample, names: tuple[str, ...], by_name: dict[str, int], where: str) -> int:
    target = sample.target
    if target is None:
        return -1
    if is_number(target) and int(target) < len(names):
        return int(target)
    if target not in by_name:
        raise UserError(f"{where} has the class {target[:80]!a}, not one of {len(names)} classes")
    return by_name[target]
