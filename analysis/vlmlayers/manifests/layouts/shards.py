"""Webdataset shards: tar files whose members are image, class and caption of numbered samples."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from vlmlayers.data.shards import Sample, index_shard, other_members
from vlmlayers.errors import UserError
from vlmlayers.manifests.items import SPLITS, Item, checked_path
from vlmlayers.manifests.layouts.base import Layout, checked_name, declared_names
from vlmlayers.manifests.layouts.classes import Classes, class_word, read_classes
from vlmlayers.manifests.place import MissingData


class ShardsLayout(Layout):
    """An item's path is the tar file, a slash, and the image's name in it."""

    def splits(self) -> tuple[str, ...]:
        """Return the splits that the manifest gives shards to."""
        return tuple(split for split in SPLITS if split in self.place.spec.shards)

    def files(self, split: str) -> list[Path]:
        """Return the tar files of a split, sorted within each pattern.

        Raises:
            UserError: A pattern matches no file, or one by whose name an item's path is not told
                from the image's name in it.
        """
        folder, found = self.place.folder, []
        for pattern in self.place.spec.shards[split]:
            matches = sorted(folder.glob(pattern)) if folder.is_dir() else []
            if not matches:
                raise MissingData(
                    f"{self.place.name}: no shard {folder / pattern}; {self.place.hint}"
                )
            found += matches
        for file in found:
            name = file.relative_to(folder).as_posix()
            if f"{name}/".partition(".tar/")[1:] != (".tar/", ""):
                raise UserError(
                    f"{self.place.name}: the shard {folder / name} is to end in .tar, and no "
                    "folder on the way to it; rename it"
                )
        return found

    @cached_property
    def _classes(self) -> Classes:
        declared = declared_names(self.place)
        targets = (class_word(s.target) for split in self.splits() for _, s in self._samples(split))
        return read_classes(((word, "") for word in targets), declared, self.place.name)

    def class_names(self) -> tuple[str, ...]:
        """Return the declared names, else the sorted classes of all samples."""
        return self._classes.names

    def _samples(self, split: str) -> list[tuple[str, Sample]]:
        folder, members = self.place.folder, self.place.spec.members
        named = [(file.relative_to(folder).as_posix(), file) for file in self.files(split)]
        return [(f"{n}/{s.image}", s) for n, file in named for s in index_shard(file, members)]

    def items(self, split: str) -> list[Item]:
        """Return the samples of a split in the order of the shards."""
        name, classes = self.place.name, self._classes
        items = []
        for path, sample in self._samples(split):
            word = class_word(sample.target)
            label = classes.label(word, f"{name}: {path}") if word else -1
            captions = tuple(checked_name(text, path) for text in sample.captions)
            class_name = classes.names[label] if word else ""
            items.append(Item(checked_path(path, name), label, class_name, captions))
        return items

    def remarks(self) -> tuple[str, ...]:
        """Return how labels were counted, and which members belong to no sample."""
        files = [file for split in self.splits() for file in self.files(split)]
        members = self.place.spec.members
        others = [f"{f.name}/{name}" for f in files for name in other_members(f, members)]
        found = [self._classes.remark] if self._classes.remark else []
        if others:
            found.append(f"left out: members of no sample ({len(others):,}), first {others[0]!r}")
        return tuple(found)
