"""Tables: CSV, TSV, JSON lines or Parquet with a path, and label, split, captions if any."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from vlmlayers.data.names import IMAGE_SUFFIXES, suffix_of
from vlmlayers.errors import UserError, nearest, shortened
from vlmlayers.files import file_stamp
from vlmlayers.manifests.items import SPLIT_WORDS, SPLITS, Item, listed_path, stratified_split
from vlmlayers.manifests.layouts.base import (
    Layout,
    caption_texts,
    checked_name,
    declared_names,
    expect_hash,
    refuse_lost_columns,
)
from vlmlayers.manifests.layouts.classes import Classes, class_word, read_classes
from vlmlayers.manifests.place import MissingData, Place, read_text
from vlmlayers.manifests.schema import Columns
from vlmlayers.words import counted

Row = Mapping[str, Any]
DELIMITERS = {".csv": ",;\t|", ".tsv": "\t,;|"}  # the first one that finds the column of paths


@dataclass(frozen=True)
class _Listed:
    """One row of a table that is not empty."""

    row: Row
    where: str
    split: str
    path: str


class TableLayout(Layout):
    """Rows of one file, or of one file per split as Hugging Face image folders have them.

    `label` says which class an item has, `class_name` what it is called; one of the two is enough.
    Rows that repeat a path add captions to one item. Where there is no split column, the items are
    divided by `fractions`, class by class. With one file per split, paths are relative to that
    file.
    """

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.columns = place.spec.columns

    @cached_property
    def _rows(self) -> list[_Listed]:
        place, columns = self.place, self.columns
        listed: list[_Listed] = []
        if place.spec.split_files:
            for split, file in place.spec.split_files.items():
                path = place.folder / file
                if not path.is_file():
                    raise MissingData(f"{place.name}: no table {path}; {place.hint}")
                inner = PurePosixPath(file).parent.as_posix()
                listed += _listed(path, columns, place.images / inner, inner, split)
        else:
            path = place.find(place.spec.split_file, "the table")
            expect_hash(place, path)
            listed += _listed(path, columns, place.images, ".")
        if not listed:
            raise UserError(f"{place.name}: no row of {path} lists an image")
        found = dict.fromkeys(key for one in listed for key in one.row)
        refuse_lost_columns(columns, found, str(path))
        return listed

    @cached_property
    def _class_column(self) -> str | None:
        """Return the column that says which class an item has, None where there is none."""
        for column in (self.columns.label, self.columns.class_name):
            if any(class_word(listed.row.get(column)) for listed in self._rows):
                return column
        return None

    @cached_property
    def _classes(self) -> Classes:
        column, names = self._class_column, self.columns.class_name
        written = (
            (class_word(listed.row.get(column)), class_word(listed.row.get(names)))
            for listed in self._rows
            if column is not None
        )
        return read_classes(written, declared_names(self.place), self.place.name)

    @cached_property
    def _splits(self) -> dict[str, list[Item]]:
        splits: dict[str, list[Item]] = {}
        for (split, _), item in self._items().items():
            splits.setdefault(split, []).append(item)
        if list(splits) == [""]:
            return stratified_split(splits[""], self.place.spec.fractions)
        if unnamed := splits.get("", ()):
            raise UserError(
                f"{self.place.name}: {counted(len(unnamed), 'image')} without a split, such as "
                f"{unnamed[0].path[:200]!r}, where others have one; name one in every row, or in "
                "none"
            )
        return splits

    def _items(self) -> dict[tuple[str, str], Item]:
        """Return (split, path) → item; rows that repeat a path add their captions to it."""
        labels: dict[tuple[str, str], tuple[int, str]] = {}
        captions: dict[tuple[str, str], list[str]] = {}
        for listed in self._rows:
            key, label = (listed.split, listed.path), self._label(listed)
            if labels.setdefault(key, label) != label:
                raise UserError(f"{listed.where} gives {listed.path[:200]!r} a second label")
            texts = caption_texts(listed.row.get(self.columns.caption), listed.where)
            captions.setdefault(key, []).extend(texts)
        return {
            key: Item(key[1], label, name, tuple(captions.get(key, ())))
            for key, (label, name) in labels.items()
        }

    def _label(self, listed: _Listed) -> tuple[int, str]:
        column = self._class_column
        if column is None:
            return -1, ""
        word = class_word(listed.row.get(column))
        if not word:
            raise UserError(f"{listed.where} has no {column}")
        label = self._classes.label(word, listed.where)
        return label, checked_name(self._classes.names[label], listed.where)

    def splits(self) -> tuple[str, ...]:
        """Return the splits that have items."""
        return tuple(split for split in SPLITS if self._splits.get(split))

    def class_names(self) -> tuple[str, ...]:
        """Return the declared names, or those of the rows."""
        return self._classes.names

    def items(self, split: str) -> list[Item]:
        """Return the items of a split in the order of the rows."""
        return self._splits[split]

    def remarks(self) -> tuple[str, ...]:
        """Return how labels were counted, and the columns of a table that has no classes."""
        found = [self._classes.remark] if self._classes.remark else []
        if self._rows and self._class_column is None and not self.class_names():
            columns, wanted = self.columns, [str(key) for key in self._rows[0].row]
            close = nearest(columns.class_name, set(wanted) - {columns.path})
            named = f'; if one says the class, write columns = {{ class_name = "{close}" }}'
            found.append(
                f"no column {columns.label!r} or {columns.class_name!r} says a class; there are "
                f"{', '.join(wanted)[:200]}{named if close else ''}"
            )
        return tuple(found)


def _listed(
    path: Path, columns: Columns, images: Path, inner: str, split: str | None = None
) -> Iterator[_Listed]:
    """Yield the rows of a file that are not empty.

    Args:
        path: The file.
        columns: Names of its columns.
        images: Folder to which its paths are relative.
        inner: That folder as seen from the folder of the dataset's images.
        split: Split of all rows; that of their column where None.
    """
    for number, row in enumerate(_rows(file_stamp(path), columns), start=1):
        if all(value is None or str(value).strip() == "" for value in row.values()):
            continue
        where = f"row {number} of {path}"
        if row.get(columns.path) in (None, ""):
            raise UserError(f"{where} has no {columns.path}")
        text = checked_name(row[columns.path], where)
        own = (PurePosixPath(inner) / listed_path(text, where, images, path.parent)).as_posix()
        yield _Listed(row, where, _split(row, columns, where) if split is None else split, own)


def _split(row: Row, columns: Columns, where: str) -> str:
    word = class_word(row.get(columns.split))
    if word and word.casefold() not in SPLIT_WORDS:
        raise UserError(f"{where} has the split {word[:80]!r}; splits are train, val, test")
    return SPLIT_WORDS.get(word.casefold(), "")


@lru_cache(maxsize=8)
def _rows(stamp: tuple[str, int, int], columns: Columns) -> tuple[Row, ...]:
    path = Path(stamp[0])
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise UserError(f"{path} is not a table; its suffix must be one of {', '.join(READERS)}")
    try:
        rows = tuple(_renamed(list(READERS[suffix](path, columns)), columns))
    # A RuntimeError is what is nested too deeply, or in a form that is not implemented.
    except (ValueError, OSError, LookupError, RuntimeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a table: {str(error)[:200]}") from None
    found = list(dict.fromkeys(key for row in rows for key in row))
    if rows and columns.path not in found:
        close = nearest(columns.path, found)
        hint = f"; did you mean {close!r}?" if close else ""
        if any(suffix_of(str(name)) in IMAGE_SUFFIXES for name in found):
            names = f"{columns.path}, {columns.label} or {columns.caption}"
            hint = (
                f"; its first line names an image: write one of column names above it, as {names}"
            )
        # Names of columns may be of any length; the advice stays whole.
        raise UserError(
            f"{path} has no column {columns.path!r} (it has: {shortened(str(found), 300)}){hint}"
        )
    return rows


def _renamed(rows: Sequence[Row], columns: Columns) -> Iterator[Row]:
    """Yield rows whose columns have the manifest's names, blanks and case aside.

    Raises:
        ValueError: Two columns have one name.
    """
    keys = {key: str(key).strip() for row in rows for key in row}
    wanted = set(columns.model_dump().values())
    small = {name.casefold(): name for name in wanted - set(keys.values())}
    names = {key: small.get(plain.casefold(), plain) for key, plain in keys.items()}
    _refuse_twice(list(names.values()), columns)
    for row in rows:
        yield {names[key]: value for key, value in row.items()}


def _refuse_twice(names: Sequence[str], columns: Columns) -> None:
    for name in columns.model_dump().values():
        if names.count(name) > 1:
            raise ValueError(f"two columns are called {name!r}")


def _csv(path: Path, columns: Columns) -> Iterator[Row]:
    text = read_text(path).lstrip("\n")
    # By the column of paths, not by csv.Sniffer, which guesses from the data and errs on paths.
    head, marks = text.partition("\n")[0], DELIMITERS[path.suffix.lower()]
    mark = next((m for m in marks if columns.path.casefold() in _cells(head, m)), marks[0])
    # Line ends inside quoted cells are for the csv module to see.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, skipinitialspace=True)
    header = next(reader, [])
    _refuse_twice([name.strip() for name in header], columns)
    for number, cells in enumerate(reader, start=1):
        if any(cell.strip() for cell in cells[len(header) :]):
            raise ValueError(
                f"row {number} has {len(cells)} cells under {len(header)} columns; put quotes "
                f"around a value that holds {mark!r}"
            )
        yield dict(zip(header, cells))


def _cells(line: str, delimiter: str) -> set[str]:
    cells = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
    return {cell.strip().casefold() for cell in cells}


def _json_lines(path: Path, columns: Columns) -> Iterable[Row]:
    rows = [json.loads(line) for line in read_text(path).split("\n") if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line is not a JSON object")
    return rows


def _parquet(path: Path, columns: Columns) -> Iterable[Row]:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pylist()


READERS = {".csv": _csv, ".tsv": _csv, ".jsonl": _json_lines, ".parquet": _parquet}
