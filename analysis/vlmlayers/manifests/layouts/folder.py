"""Image folders: one folder per class, under one folder per split or under none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from vlmlayers.data.shards import IMAGE_SUFFIXES
from vlmlayers.errors import UserError
from vlmlayers.manifests.items import SPLITS, Item, is_text, stratified_split
from vlmlayers.manifests.layouts.base import class_keys
from vlmlayers.manifests.place import MissingData, Place

SUFFIXES = IMAGE_SUFFIXES | {"pgm", "pbm", "mpo"}


class Folder:
    """Class folders sorted by name give the labels; files sorted by path give the order."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.split_folders = place.spec.split_folders

    def splits(self) -> tuple[str, ...]:
        """Return the declared splits whose folder exists, or those of `fractions`."""
        self._expect_folder()
        if not self.split_folders:
            return tuple(split for split in SPLITS if split in self.place.spec.fractions)
        return tuple(
            split
            for split in SPLITS
            if split in self.split_folders
            and (self.place.images / self.split_folders[split]).is_dir()
        )

    def _expect_folder(self) -> None:
        if not self.place.images.is_dir():
            place = self.place
            raise MissingData(f"{place.name}: no folder {place.images}; {place.hint}")

    def _class_folders(self) -> list[str]:
        """Return the names of the class folders of all splits, sorted."""
        self._expect_folder()
        bases = (
            [self.place.images / self.split_folders[split] for split in self.splits()]
            if self.split_folders
            else [self.place.images]
        )
        found = {entry.name for base in bases for entry in _entries(base) if entry.is_dir()}
        for name in found:
            if not is_text(name):
                raise UserError(f"{self.place.name}: a folder name is not UTF-8: {name!a}")
        return sorted(name for name in found if not name.startswith("."))

    def _labels(self) -> tuple[dict[str, int], tuple[str, ...]]:
        """Return folder name → label, and the class names by label."""
        spec, folders = self.place.spec, self._class_folders()
        keys = class_keys(self.place) if spec.class_name_file else {}
        if spec.label_order == "rows":
            names = tuple(keys.values()) or spec.class_names
            return {folder: self._row(folder, len(names)) for folder in folders}, names
        if spec.class_names and len(folders) != len(spec.class_names):
            raise UserError(
                f"{self.place.name}: {len(folders)} class folders under {self.place.images}, but "
                f"the manifest names {len(spec.class_names)} classes"
            )
        unknown = [folder for folder in folders if keys and folder not in keys]
        if unknown:
            raise UserError(
                f"{self.place.name}: no class name for the folder {unknown[0][:80]!r} "
                f"({len(unknown)} such) in the file of class names"
            )
        names = spec.class_names or tuple(keys.get(folder, folder) for folder in folders)
        return {folder: label for label, folder in enumerate(folders)}, names

    def _row(self, folder: str, rows: int) -> int:
        number = folder.isascii() and folder.isdecimal() and len(folder) <= 9
        if not number or int(folder) >= rows:
            raise UserError(
                f"{self.place.name}: the folder {folder[:80]!r} is not the number of one of the "
                f"{rows} rows of class names"
            )
        return int(folder)

    def class_names(self) -> tuple[str, ...]:
        """Return the class names by label."""
        return self._labels()[1]

    def items(self, split: str) -> list[Item]:
        """Return the items of a split, sorted by class folder and file name."""
        if self.split_folders:
            folder = self.split_folders[split]
            return list(self._scan("" if folder == "." else f"{folder}/"))
        return stratified_split(list(self._scan("")), self.place.spec.fractions)[split]

    def _scan(self, prefix: str) -> Iterator[Item]:
        labels, names = self._labels()
        for folder, label in labels.items():
            for path in self._files(prefix + folder):
                yield Item(path, label, names[label])

    def _files(self, folder: str) -> Iterator[str]:
        """Yield the images under a class folder, sorted, folders inside it included."""
        base = self.place.images / folder
        if not base.is_dir():
            return
        if base.is_symlink():
            self.place.inside(folder)
        for entry in sorted(_entries(base), key=lambda entry: entry.name):
            path = f"{folder}/{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                yield from self._files(path)
            elif entry.name.rpartition(".")[2].lower() in SUFFIXES:
                if not is_text(entry.name):
                    raise UserError(
                        f"{self.place.name}: a file name in {folder!r} is not UTF-8: {path!a}"
                    )
                if entry.is_symlink():
                    self.place.inside(path)
                yield path


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from None
