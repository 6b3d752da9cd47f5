"""Local datasets as Hugging Face `datasets` reads them: image folders and saved datasets."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from vlmlayers.data.shards import IMAGE_SUFFIXES
from vlmlayers.errors import UserError
from vlmlayers.manifests.items import SPLITS, Item, checked_path
from vlmlayers.manifests.layouts.base import checked_name, declared_names
from vlmlayers.manifests.place import MissingData, Place, file_stamp

_SPLIT_OF = {"train": "train", "validation": "val", "val": "val", "test": "test"}
_SAVED = ("dataset_dict.json", "state.json")  # of a DatasetDict, of one Dataset
_TEXT = "text"  # the library's usual name for captions


class HuggingFace:
    """An item's path is that of its file, or `<split>/<row>` where a saved dataset holds it.

    Nothing is fetched and no dataset script is run: the builder is the library's own
    `imagefolder`, and a saved dataset consists of Arrow files.
    """

    def __init__(self, place: Place) -> None:
        self.place = place

    @cached_property
    def _parts(self) -> dict[str, tuple[str, Any]]:
        """Return the library's name and dataset of each split, by its name here."""
        place, wanted = self.place, self.place.spec.split_folders
        if not place.images.is_dir():
            raise MissingData(f"{place.name}: no folder {place.images}; {place.hint}")
        found = _saved(place) if is_saved(place) else _image_folder(place)
        names = {own: split for split, own in wanted.items()} or _SPLIT_OF
        unknown = sorted(set(found) - set(names)) if not wanted else sorted(set(names) - set(found))
        if unknown:
            raise UserError(
                f"{place.name}: the library finds the splits {', '.join(sorted(found))[:120]} in "
                f"{place.images}; split_folders must say which are train, val and test"
            )
        return {names[own]: (own, data) for own, data in found.items() if own in names}

    def splits(self) -> tuple[str, ...]:
        """Return the splits that the library finds; its `validation` is `val` here."""
        return tuple(split for split in SPLITS if split in self._parts)

    @cached_property
    def _features(self) -> Mapping[str, Any]:
        return next((_features(data) for _, data in self._parts.values()), {})

    @cached_property
    def _columns(self) -> tuple[str, str | None, str | None]:
        """Return the columns of image, label and caption; None for one that is not there."""
        features = self._features
        image = _image_column(features)
        if image is None:
            where = f"{self.place.name}: the dataset in {self.place.images}"
            raise UserError(f"{where} has no column of images")
        asked = self.place.spec.columns
        classes = [key for key, kind in features.items() if type(kind).__name__ == "ClassLabel"]
        label = next((c for c in (asked.label, asked.class_name) if c in features), None)
        label = label or (classes[0] if len(classes) == 1 else None)
        return image, label, next((c for c in (asked.caption, _TEXT) if c in features), None)

    @cached_property
    def _rows(self) -> dict[str, list[tuple[str, Any, str | None]]]:
        """Return (path, label or None, caption or None) of each row of each split."""
        image, label, caption = self._columns
        read = _stored_rows if is_saved(self.place) else _file_rows
        rows = {
            split: [
                (path, row.get(label) if label else None, row.get(caption) if caption else None)
                for path, row in read(self.place, own, data, (image, label, caption))
            ]
            for split, (own, data) in self._parts.items()
        }
        if not any(rows.values()):
            raise MissingData(
                f"{self.place.name}: no image in {self.place.images}; {self.place.hint}"
            )
        return rows if label else _labelled_by_folder(rows)

    def class_names(self) -> tuple[str, ...]:
        """Return the declared names, those of the ClassLabel, or the sorted words of the rows."""
        declared = declared_names(self.place)
        if declared:
            return declared
        label = self._columns[1]
        kind = self._features.get(label) if label else None
        if kind is not None and getattr(kind, "names", None):
            return tuple(checked_name(name, self.place.name) for name in kind.names)
        values = {value for part in self._rows.values() for _, value, _ in part}
        values -= {None, "", -1}
        if values and all(type(value) is int for value in values):
            if min(values) < 0 or max(values) >= 10 * len(values):
                raise UserError(f"{self.place.name}: labels from {min(values)} to {max(values)}")
            return tuple(str(number) for number in range(max(values) + 1))
        return tuple(sorted(checked_name(value, self.place.name) for value in values))

    def items(self, split: str) -> list[Item]:
        """Return the items of a split in the library's order; rows of one file share an item."""
        names = self.class_names()
        by_name = {name: label for label, name in enumerate(names)}
        labels: dict[str, int] = {}
        captions: dict[str, list[str]] = {}
        for path, value, text in self._rows[split]:
            where = f"{self.place.name}: {path[:200]}"
            label = _label(value, by_name, where)
            if labels.setdefault(path, label) != label:
                raise UserError(f"{where} has a second label")
            if text not in (None, ""):
                captions.setdefault(path, []).append(checked_name(text, where))
        return [
            Item(path, label, names[label] if label >= 0 else "", tuple(captions.get(path, ())))
            for path, label in labels.items()
        ]


def is_saved(place: Place) -> bool:
    """Return whether the folder was written by the library's `save_to_disk`."""
    return any((place.images / name).is_file() for name in _SAVED)


def stored_image(place: Place, path: str) -> bytes:
    """Return the bytes of an item's image in a saved dataset.

    Raises:
        UserError: There is no such row, or it holds no bytes.
    """
    own, _, name = path.partition("/")
    data, row = _saved(place).get(own), PurePosixPath(name).stem
    if data is None or not row.isdecimal() or int(row) >= len(data):
        raise UserError(f"{place.name}: {place.images} has no item {path[:200]!r}")
    column = _image_column(_features(data)) or ""
    content = (data[int(row)].get(column) or {}).get("bytes")
    if not content:
        raise UserError(f"{place.name}: the row of {path[:200]!r} holds no image")
    return bytes(content)


def _label(value: Any, by_name: Mapping[str, int], where: str) -> int:
    if value in (None, "", -1):  # the library's mark of a hidden label is -1
        return -1
    if type(value) is int and 0 <= value < len(by_name):
        return value
    if value not in by_name:
        raise UserError(
            f"{where} has the class {str(value)[:80]!a}, not one of {len(by_name)} classes"
        )
    return by_name[value]


def _library(place: Place) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{place.name}: the layout 'huggingface' needs the package datasets; install it with "
            "`pip install 'vlm-layers[datasets]'`"
        ) from None
    # The library reports each load to its hub, and draws bars of its own, unless told not to.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    datasets.disable_progress_bars()
    return datasets


def _features(data: Any) -> Mapping[str, Any]:
    return data.features or {}


def _image_column(features: Mapping[str, Any]) -> str | None:
    return next((key for key, kind in features.items() if type(kind).__name__ == "Image"), None)


def _undecoded(data: Any) -> Any:
    """Return a dataset whose images stay paths and bytes."""
    import datasets

    column = _image_column(_features(data))
    return data if column is None else data.cast_column(column, datasets.Image(decode=False))


def _refusal(place: Place, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return UserError(f"{place.name}: the package datasets cannot read {place.images}: {reason}")


def _image_folder(place: Place) -> dict[str, Any]:
    library = _library(place)
    with tempfile.TemporaryDirectory() as cache:  # streaming leaves nothing in it but a lock
        try:
            found = library.load_dataset(
                "imagefolder", data_dir=str(place.images), streaming=True, cache_dir=cache
            )
        except Exception as error:  # noqa: BLE001  the library raises what its readers raise
            raise _refusal(place, error) from None
    return {str(name): _undecoded(data) for name, data in found.items()}


def _saved(place: Place) -> dict[str, Any]:
    _library(place)
    files = (place.images / name for name in _SAVED)
    stamp = next(file_stamp(file) for file in files if file.is_file())
    try:
        return _open_saved(stamp)
    except Exception as error:  # noqa: BLE001  the library raises what its readers raise
        raise _refusal(place, error) from None


@lru_cache(maxsize=8)
def _open_saved(stamp: tuple[str, int, int]) -> dict[str, Any]:
    import datasets

    found = datasets.load_from_disk(str(Path(stamp[0]).parent))
    parts = found if isinstance(found, dict) else {found.split or "train": found}
    return {str(name): _undecoded(data.with_format(None)) for name, data in parts.items()}


def _file_rows(
    place: Place, own: str, data: Any, columns: Sequence[str | None]
) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the relative path and the columns of every file that the builder lists."""
    base = place.images.resolve()
    rows = []
    try:
        listed = list(data)
    except Exception as error:  # noqa: BLE001  the library raises what its readers raise
        raise _refusal(place, error) from None
    for row in listed:
        path = str((row[columns[0]] or {}).get("path"))
        if "::" in path:
            raise UserError(f"{place.name}: {path[:200]!r} is in an archive; unpack it")
        if Path(path).is_relative_to(base):
            path = Path(path).relative_to(base).as_posix()
        rows.append((checked_path(path, place.name), row))
    return rows


def _stored_rows(
    place: Place, own: str, data: Any, columns: Sequence[str | None]
) -> list[tuple[str, Mapping[str, Any]]]:
    """Return a path and the columns of every row, without reading the images."""
    names = [f"{columns[0]}.path", *(column for column in columns[1:] if column)]
    listed = data.flatten().select_columns(names)
    rows = []
    for number, row in enumerate(listed):
        suffix = str(row[names[0]]).rpartition(".")[2].lower()
        tail = f".{suffix}" if suffix in IMAGE_SUFFIXES else ""
        rows.append((checked_path(f"{own}/{number:08d}{tail}", place.name), row))
    return rows


def _labelled_by_folder(
    rows: dict[str, list[tuple[str, Any, str | None]]],
) -> dict[str, list[tuple[str, Any, str | None]]]:
    """Label files by their folder where every split has several, all at one depth.

    The library does so itself unless there is a file of metadata.
    """
    folders = {
        split: {PurePosixPath(path).parent for path, _, _ in part} for split, part in rows.items()
    }
    depths = {len(folder.parts) for part in folders.values() for folder in part}
    if len(depths) != 1 or any(len(part) < 2 for part in folders.values()):
        return rows
    return {
        split: [(path, PurePosixPath(path).parent.name, text) for path, _, text in part]
        for split, part in rows.items()
    }
