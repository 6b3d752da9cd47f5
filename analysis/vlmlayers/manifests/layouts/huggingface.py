"""Local datasets as Hugging Face `datasets` reads them: image folders, and tables of images."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from vlmlayers.data.names import IMAGE_SUFFIXES
from vlmlayers.errors import UserError, one_line
from vlmlayers.files import file_stamp
from vlmlayers.manifests.items import SPLIT_WORDS, SPLITS, Item, checked_path
from vlmlayers.manifests.layouts.base import (
    Layout,
    caption_texts,
    checked_name,
    declared_names,
    refuse_lost_columns,
)
from vlmlayers.manifests.layouts.classes import Classes, class_word, read_classes
from vlmlayers.manifests.place import MissingData, Place
from vlmlayers.manifests.schema import Columns
from vlmlayers.runs import is_run

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # beside images, not of them
_SAVED = ("dataset_dict.json", "state.json")  # of a DatasetDict, of one Dataset
_TEXT = "text"  # the library's usual name for captions
_IMAGE = ("image", "img")  # and for images


class HuggingFaceLayout(Layout):
    """An item's path is that of its file, or `<split>/<row>` where a table holds its image.

    Tables are the Arrow files of a saved dataset, or the Parquet files of a downloaded repository,
    which the library turns into Arrow files in its own cache. Nothing is fetched and no dataset
    script is run.
    """

    @cached_property
    def _parts(self) -> dict[str, tuple[str, Any]]:
        """Return the library's name and dataset of each split, by its name here."""
        place, wanted = self.place, self.place.spec.split_folders
        if not place.images.is_dir():
            raise MissingData(f"{place.name}: no folder {place.images}; {place.hint}")
        found = _stored(place) if is_stored(place) else _image_folder(place)
        # Named splits have to be there; without names every split that the library finds has to be
        # one that is known, or items would be left out without a word.
        names = {own: split for split, own in wanted.items()} or SPLIT_WORDS
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
        features, asked = self._features, self.place.spec.columns
        image = _image_column(features, asked)
        where = f"{self.place.name}: the dataset in {self.place.images}"
        if image is None:
            several = ", ".join(_columns_of("Image", features))
            said = f'the images {several}; name one, as in columns = {{ path = "…" }}'
            raise UserError(f"{where} has {said if several else 'no column of images'}")
        refuse_lost_columns(asked, features, where)
        classes = _columns_of("ClassLabel", features)
        label = next((c for c in (asked.label, asked.class_name) if c in features), None)
        label = label or (classes[0] if len(classes) == 1 else None)
        return image, label, next((c for c in (asked.caption, _TEXT) if c in features), None)

    @cached_property
    def _rows(self) -> dict[str, list[tuple[str, Any, Any]]]:
        """Return (path, label or None, caption or captions or None) of each row of each split."""
        image, label, caption = self._columns
        read = _stored_rows if is_stored(self.place) else _file_rows
        rows = {}
        for split, (own, data) in self._parts.items():
            number = self._numbers(data)
            rows[split] = [
                (
                    path,
                    number(row.get(label)) if label else None,
                    row.get(caption) if caption else None,
                )
                for path, row in read(self.place, own, data, (image, label, caption))
            ]
        if not any(rows.values()):
            raise MissingData(
                f"{self.place.name}: no image in {self.place.images}; {self.place.hint}"
            )
        return rows if label else _labelled_by_folder(rows)

    @cached_property
    def _named(self) -> tuple[str, ...]:
        """Return the names of the ClassLabel of all splits, each once; () where there is none."""
        parts = (_named(data, self._columns[1]) for _, data in self._parts.values())
        return tuple(dict.fromkeys(name for names in parts for name in names))

    def _numbers(self, data: Any) -> Callable[[Any], Any]:
        """Return what makes of a label of one split the label among the names of all splits."""
        # Splits that were encoded one by one number one class in different ways.
        numbers = {number: self._named.index(name)
                   for number, name in enumerate(_named(data, self._columns[1]))}  # fmt: skip
        return lambda value: numbers.get(value, value) if isinstance(value, int) else value

    @cached_property
    def _classes(self) -> Classes:
        declared = declared_names(self.place) or tuple(
            checked_name(name, self.place.name) for name in self._named
        )
        words = (_word(value) for part in self._rows.values() for _, value, _ in part)
        return read_classes(((word, "") for word in words), declared, self.place.name)

    def class_names(self) -> tuple[str, ...]:
        """Return the declared names, those of the ClassLabel, or the sorted words of the rows."""
        return self._classes.names

    def items(self, split: str) -> list[Item]:
        """Return the items of a split in the library's order; rows of one file share an item."""
        classes = self._classes
        labels: dict[str, int] = {}
        captions: dict[str, list[str]] = {}
        for path, value, text in self._rows[split]:
            where = f"{self.place.name}: {path[:200]}"
            word = _word(value)
            label = classes.label(word, where) if word else -1
            if labels.setdefault(path, label) != label:
                raise UserError(f"{where} has a second label")
            captions.setdefault(path, []).extend(caption_texts(text, where))
        names = (*classes.names, "")  # that of -1
        return [
            Item(path, label, checked_name(names[label], path), tuple(captions.get(path, ())))
            for path, label in labels.items()
        ]

    def remarks(self) -> tuple[str, ...]:
        """Return how labels were counted, and the columns of a dataset that has no classes."""
        found = [self._classes.remark] if self._classes.remark else []
        if not self.class_names():
            asked, columns = self.place.spec.columns, ", ".join(map(str, self._features))
            named = "".join(
                f'; to take one, write columns = {{ label = "{column}" }}'
                for column in _columns_of("ClassLabel", self._features)[:1]
            )
            found.append(
                f"no column {asked.label!r} or {asked.class_name!r} says a class; there are "
                f"{columns[:200]}{named}"
            )
        return tuple(found)


def is_stored(place: Place) -> bool:
    """Return whether the images lie in the files of a saved dataset or in Parquet files.

    By the layout first: beside images of another one, Parquet files are tables of something else,
    such as scores of a run.
    """
    return place.spec.layout == "huggingface" and holds_tables(place.images)


def stored_files(place: Place) -> list[Path]:
    """Return the files that hold the rows and images of a stored dataset."""
    files = _table_files(place.images)
    saved = any(file.name in _SAVED for file in files)
    return sorted(place.images.rglob("*.arrow")) if saved else list(files)


def holds_tables(folder: Path) -> bool:
    """Return whether a folder is a saved dataset or a downloaded repository of Parquet files."""
    return bool(_table_files(folder))


def _table_files(folder: Path) -> tuple[Path, ...]:
    """Return the record of a saved dataset, else the Parquet files of a downloaded repository."""
    try:
        changed = folder.stat().st_mtime_ns
        known = _found_tables(str(folder), changed)
        # A folder's own time says nothing of a file that was added further down.
        inside = sorted({file.parent for file in known})
        return _found_tables(str(folder), changed, *(one.stat().st_mtime_ns for one in inside))
    except OSError:
        return ()


@lru_cache(maxsize=64)
def _found_tables(folder: str, *changed: int) -> tuple[Path, ...]:
    saved = tuple(path for name in _SAVED if (path := Path(folder) / name).is_file())
    if saved:
        return saved[:1]
    # Splits lie beside README.md, in data/, or in a folder of their own below a configuration's.
    patterns = ("*.parquet", "*/*.parquet", "*/*/*.parquet")
    found = (path for pattern in patterns for path in sorted(Path(folder).glob(pattern)))
    return tuple(p for p in found if p.name not in METADATA and not is_run(p.parent))


def stored_image(place: Place, path: str) -> bytes:
    """Return the bytes of an item's image in a table.

    Raises:
        UserError: There is no such row, or it holds no bytes.
    """
    own, _, name = path.partition("/")
    data, row = _stored(place).get(own), PurePosixPath(name).stem
    if data is None or not row.isdecimal() or int(row) >= len(data):
        raise UserError(f"{place.name}: {place.images} has no item {path[:200]!r}")
    column = _image_column(_features(data), place.spec.columns) or ""
    content = (data[int(row)].get(column) or {}).get("bytes")
    if not content:
        raise UserError(f"{place.name}: the row of {path[:200]!r} holds no image")
    return bytes(content)


def _word(value: Any) -> str:
    """Return what stands for a class; the library's mark of a hidden label is -1."""
    word = class_word(value)
    return "" if word == "-1" else word


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


def _named(data: Any, label: str | None) -> list[str]:
    """Return the class names of a split by its labels; [] where its labels are plain values."""
    kind = _features(data).get(label) if label else None
    return list(getattr(kind, "names", None) or ())


def _columns_of(kind: str, features: Mapping[str, Any]) -> list[str]:
    """Return the columns of a kind of the library's: `ClassLabel` or `Image`."""
    return [key for key, own in features.items() if type(own).__name__ == kind]


def _image_column(features: Mapping[str, Any], columns: Columns) -> str | None:
    """Return the column of images: of several, as of masks, the one named or called an image."""
    found = _columns_of("Image", features)
    named = "path" in columns.model_fields_set
    usual = (columns.path,) if named else (*_IMAGE, *(found if len(found) == 1 else ()))
    return next((column for column in usual if column in found), None)


def _undecoded(data: Any) -> Any:
    """Return a dataset whose images stay paths and bytes.

    Parquet files that another program wrote hold images without saying so.
    """
    import datasets

    features = _features(data)
    plain = [key for key, kind in features.items() if isinstance(kind, dict) and "bytes" in kind]
    for column in _columns_of("Image", features) or plain[:1]:
        data = data.cast_column(column, datasets.Image(decode=False))
    return data


def _refusal(place: Place, error: Exception) -> UserError:
    return UserError(
        f"{place.name}: the package datasets cannot read {place.images}: {one_line(error)}"
    )


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


def _stored(place: Place) -> dict[str, Any]:
    _library(place)
    stamps = tuple(file_stamp(file) for file in _table_files(place.images))
    try:
        return _open_stored(str(place.images), stamps)
    except Exception as error:  # noqa: BLE001  the library raises what its readers raise
        raise _refusal(place, error) from None


@lru_cache(maxsize=8)
def _open_stored(folder: str, stamps: tuple[tuple[str, int, int], ...]) -> dict[str, Any]:
    import datasets

    saved = Path(stamps[0][0]).name in _SAVED
    found = datasets.load_from_disk(folder) if saved else datasets.load_dataset(folder)
    parts = found if isinstance(found, dict) else {found.split or "train": found}
    # A format that the dataset was saved with would turn values into tensors.
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
    # Flattened, paths are a column of their own and the bytes beside them stay on the disk.
    listed = data.flatten().select_columns(names)
    rows = []
    for number, row in enumerate(listed):
        suffix = str(row[names[0]]).rpartition(".")[2].lower()
        tail = f".{suffix}" if suffix in IMAGE_SUFFIXES else ""
        rows.append((checked_path(f"{own}/{number:08d}{tail}", place.name), row))
    return rows


def _labelled_by_folder(
    rows: dict[str, list[tuple[str, Any, Any]]],
) -> dict[str, list[tuple[str, Any, Any]]]:
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
