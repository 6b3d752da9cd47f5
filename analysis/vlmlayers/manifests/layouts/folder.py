"""Image folders: one folder per class, under one folder per split or under none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from vlmlayers.data.names import IMAGE_SUFFIXES, UNREAD_SUFFIXES, is_foreign, suffix_of
from vlmlayers.errors import UserError
from vlmlayers.manifests.items import SPLIT_WORDS, SPLITS, Item, is_text, stratified_split
from vlmlayers.manifests.layouts.base import Layout, class_keys
from vlmlayers.manifests.layouts.classes import class_word
from vlmlayers.manifests.layouts.table import READERS
from vlmlayers.manifests.place import MissingData, Place
from vlmlayers.runs import is_run
from vlmlayers.words import counted

SUFFIXES = IMAGE_SUFFIXES | {"pgm", "pbm", "pnm", "mpo"}


class FolderLayout(Layout):
    """Class folders sorted by name give the labels; files sorted by path give the order.

    Links are followed. What systems and programs leave behind, runs of this package, and class
    folders without an image in any split, are left out.
    """

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.split_folders = place.spec.split_folders
        if not self.split_folders and "fractions" not in place.spec.model_fields_set:
            # A manifest that is silent gets what its folder gets when it is named by its path.
            self.split_folders = split_folders(place.images)
        self._left_out: dict[str, list[str]] = {}  # paths by what they are

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

    @cached_property
    def _bases(self) -> list[str]:
        """Return the folders that hold class folders, with a slash, as seen from the images'."""
        self._expect_folder()
        folders = [self.split_folders[s] for s in self.splits()] if self.split_folders else ["."]
        return ["" if folder == "." else f"{folder}/" for folder in folders]

    @cached_property
    def _class_folders(self) -> list[str]:
        """Return the names of the class folders of all splits, sorted."""
        found: set[str] = set()
        for base in self._bases:
            for entry in _entries(self.place.images / base):
                if not is_text(entry.name):
                    raise UserError(
                        f"{self.place.name}: a folder name is not UTF-8: {entry.name!r}"
                    )
                if entry.is_dir() and not self._is_left_out(entry, base + entry.name):
                    found.add(entry.name)
        names = self.place.spec.class_names
        if len({class_word(folder) for folder in found}) == len(names):
            return sorted(found)  # the declared names say that a class without images is one
        empty = {folder for folder in found if not self._has_images(folder)}
        if self.place.spec.label_order == "folders":
            self._left_out.setdefault("class folders without an image", []).extend(sorted(empty))
            found -= empty
        return sorted(found)

    @cached_property
    def _no_splits(self) -> list[str]:
        """Return the folders beside those of the splits that hold folders of images, sorted."""
        splits = {base.rstrip("/") for base in self._bases}
        # Splits that lie deeper have other things beside them, and none is all there is.
        if any(not split or "/" in split for split in splits):
            return []
        return sorted(
            entry.name
            for entry in _entries(self.place.images)
            if entry.name not in splits
            and is_text(entry.name)
            and entry.is_dir()
            and not is_foreign(entry.name)
            and not is_run(Path(entry))
            and _holds_classes(Path(entry))
        )

    def _is_left_out(self, entry: os.DirEntry[str], path: str) -> bool:
        kind = "hidden or left by a system" if is_foreign(entry.name) else ""
        # Figures of a run are no images of a class, wherever the run was written.
        if not kind and entry.is_dir() and is_run(Path(entry)):
            kind = "folders of runs"
        if kind:
            self._left_out.setdefault(kind, []).append(path)
        return bool(kind)

    def _has_images(self, folder: str) -> bool:
        """Return whether a class folder has an image; the first one settles it."""
        paths = [base + folder for base in self._bases]
        paths = [path for path in paths if (self.place.images / path).is_dir()]
        names = (entry.name for path in paths for entry in _entries(self.place.images / path))
        return any(map(_is_image, names)) or any(True for path in paths for _ in self._files(path))

    @cached_property
    def _labels(self) -> tuple[dict[str, int], tuple[str, ...]]:
        """Return folder name → label, and the class names by label."""
        spec, folders = self.place.spec, self._class_folders
        keys = class_keys(self.place) if spec.class_name_file else {}
        if spec.label_order == "rows":
            names = tuple(keys.values()) or spec.class_names
            return {folder: self._row(folder, len(names)) for folder in folders}, names
        words = sorted({class_word(folder) for folder in folders})
        if spec.class_names and len(words) != len(spec.class_names):
            raise UserError(
                f"{self.place.name}: {len(words)} class folders under {self.place.images}, but "
                f"the manifest names {len(spec.class_names)} classes"
            )
        unknown = [word for word in words if keys and word not in keys]
        if unknown:
            file = self.place.find(spec.class_name_file, "the file of class names")
            raise UserError(
                f"{self.place.name}: {file} has no name for {len(unknown)} of {len(words)} class "
                f"folders in {self.place.images}, first {unknown[0][:80]!r}; move what is no class "
                "out of there, or add its line"
            )
        names = spec.class_names or tuple(keys.get(word, word) for word in words)
        label_of = {word: label for label, word in enumerate(words)}
        return {folder: label_of[class_word(folder)] for folder in folders}, names

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
        return self._labels[1]

    def items(self, split: str) -> list[Item]:
        """Return the items of a split, sorted by class folder and file name.

        Raises:
            UserError: Images lie there, but none in a class folder.
        """
        folder = self.split_folders.get(split, ".")
        base = "" if folder == "." else f"{folder}/"
        items = list(self._scan(base))
        names = [entry.name for entry in _entries(self.place.images / base)]
        loose = list(filter(_is_image, names))
        shards = sum(name.endswith(".tar") for name in names)
        if shards and not loose and not items:
            holds = f"holds {counted(shards, '.tar file')} and no images"
            raise UserError(
                f"{self.place.name}: {self.place.images / base} {holds}; write a manifest with "
                'layout = "shards", or unpack them'
            )
        if loose and not items:
            raise UserError(
                f"{self.place.name}: {self.place.images / base} holds {len(loose):,} images but no "
                "class folders; sort them into one folder for each class, or put a metadata.csv "
                "with the columns file_name and class_name beside them"
            )
        if loose:
            self._left_out["images in no class folder"] = sorted(base + name for name in loose)
        if self.split_folders:
            return items
        return stratified_split(items, self.place.spec.fractions)[split]

    def _scan(self, base: str) -> Iterator[Item]:
        labels, names = self._labels
        for folder, label in labels.items():
            for path in self._files(base + folder):
                yield Item(path, label, names[label])

    def _files(self, folder: str, above: tuple[Path, ...] = ()) -> Iterator[str]:
        """Yield the images under a class folder, sorted, folders inside it included.

        Args:
            folder: Seen from the folder of the images.
            above: Where the folders that it lies in really are.
        """
        base = self.place.images / folder
        if not base.is_dir():
            return
        # Links are followed, since data sets are often made of them; one that leads above itself
        # would be followed for ever.
        real = Path(os.path.realpath(base))
        if any(one.is_relative_to(real) for one in above):
            raise UserError(f"{self.place.name}: the link {base} leads back to where it lies")
        for entry in sorted(_entries(base), key=lambda entry: entry.name):
            path, suffix = f"{folder}/{entry.name}", suffix_of(entry.name)
            if entry.is_dir():
                if not self._is_left_out(entry, path):
                    yield from self._files(path, (*above, real))
            elif suffix in UNREAD_SUFFIXES:
                self._left_out.setdefault("images in a format that is not read", []).append(path)
            elif suffix in SUFFIXES and not self._is_left_out(entry, path):
                if not is_text(entry.name):
                    raise UserError(
                        f"{self.place.name}: a file name in {folder!r} is not UTF-8: {path!r}"
                    )
                yield path

    def remarks(self) -> tuple[str, ...]:
        """Return what was left out, by what it is, and a table that may say the classes."""
        left_out = {**self._left_out, "folders of classes that are no split": self._no_splits}
        found = [
            f"left out: {kind} ({len(set(paths)):,}), first {paths[0]!r}"
            for kind, paths in left_out.items()
            if paths
        ]
        if len(self._class_folders) == 1:
            folder = self.place.images
            for table in sorted(e.name for e in _entries(folder) if Path(e.name).suffix in READERS):
                found.append(
                    f"one class, {self._class_folders[0]!r}; if {table} says the classes, give it "
                    f"in place of its folder: {folder / table}"
                )
        base = self._bases[0] if self._bases else ""
        places = [self.place.images / (base + folder) for folder in self._class_folders]
        # Of usual folders the first is looked at alone.
        if len(places) > 1 and all(map(_holds_classes_alone, places)):
            found.append(
                f"each of its {len(places)} classes is a folder of folders; where those inside are "
                f"the classes, give such as {places[0]}"
            )
        return tuple(found)


def split_folders(images: Path) -> dict[str, str]:
    """Return the folder of each split among those in a folder; none where they are classes.

    A class may have the name of a split, as `train` beside `car` and `bus`: such a folder holds
    images alone, and so does another beside it.
    """
    inside = [entry.name for entry in _entries(images) if entry.is_dir()] if images.is_dir() else []
    words = {name.casefold(): name for name in inside}
    named: dict[str, str] = {}
    for word, split in SPLIT_WORDS.items():
        if word in words:
            named.setdefault(split, words[word])
    others = [name for name in inside if name.casefold() not in SPLIT_WORDS]
    if named and all(_holds_images_alone(images / name) for name in named.values()):
        named = {} if any(_holds_images_alone(images / name) for name in others) else named
    return {split: named[split] for split in SPLITS if split in named}


def _holds_images_alone(folder: Path) -> bool:
    names = [entry.name for entry in _entries(folder) if not is_foreign(entry.name)]
    return bool(names) and all(map(_is_image, names))


def _holds_classes(folder: Path) -> bool:
    """Return whether a folder holds folders of images; one that cannot be read does not."""
    with suppress(UserError):
        inside = (Path(entry) for entry in _entries(folder) if entry.is_dir())
        return any(_is_image(entry.name) for inner in inside for entry in _entries(inner))
    return False


def _holds_classes_alone(folder: Path) -> bool:
    """Return whether a folder holds folders of images, and none beside them."""
    if not folder.is_dir() or any(_is_image(entry.name) for entry in _entries(folder)):
        return False
    return _holds_classes(folder)


def _is_image(name: str) -> bool:
    return suffix_of(name) in SUFFIXES and not is_foreign(name)


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from None
