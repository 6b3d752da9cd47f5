"""Tables: CSV, TSV, JSON lines or Parquet with a path, and label, split, captions if any."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from vlmlayers.errors import UserError, nearest
from vlmlayers.manifests.items import SPLITS, Item, checked_path, stratified_split
from vlmlayers.manifests.layouts.base import (
    checked_name,
    declared_names,
    expect_hash,
    is_number,
    names_by_label,
)
from vlmlayers.manifests.place import MissingData, Place, file_stamp, read_text
from vlmlayers.manifests.schema import Columns

Row = Mapping[str, Any]


class Table:
    """Rows of one file, or of one file per split as Hugging Face image folders have them.

    Labels are whole numbers, or words whose sorted order numbers them. Rows that repeat a path
    add captions to one item. Where there is no split column, the items are divided by
    `fractions`, class by class. With one file per split, paths are relative to that file.
    """

    def __init__(self, place: Place) -> None:
        self.place = place

    def _read(self) -> dict[str, list[Item]]:
        place, columns = self.place, self.place.spec.columns
        names = declared_names(place)
        rows: list[tuple[str, Row, str]] = []
        if place.spec.split_files:
            for split, file in place.spec.split_files.items():
                path = place.folder / file
                if not path.is_file():
                    raise MissingData(f"{place.name}: no table {path}; {place.hint}")
                parent = str(PurePosixPath(file).parent)
                prefix = "" if parent == "." else parent + "/"
                rows += [(split, row, prefix) for row in _rows(file_stamp(path), columns)]
            where = str(place.folder)
        else:
            path = place.find(place.spec.split_file, "the table")
            expect_hash(place, path)
            table = _rows(file_stamp(path), columns)
            rows = [(str(row.get(columns.split, "")), row, "") for row in table]
            where = str(path)
        return self._divide(_items(rows, columns, names, where), where)

    def _divide(self, listed: dict[tuple[str, str], Item], where: str) -> dict[str, list[Item]]:
        splits: dict[str, list[Item]] = {}
        for (split, _), item in listed.items():
            splits.setdefault(split, []).append(item)
        if list(splits) == [""]:
            return stratified_split(splits[""], self.place.spec.fractions)
        for split in splits:
            if split not in SPLITS:
                raise UserError(
                    f"{where} has the split {split[:80]!r}; splits are train, val, test"
                )
        return splits

    def splits(self) -> tuple[str, ...]:
        """Return the splits that have items."""
        content = self._read()
        return tuple(split for split in SPLITS if content.get(split))

    def class_names(self) -> tuple[str, ...]:
        """Return the declared names, or those of the rows."""
        declared = declared_names(self.place)
        if declared:
            return declared
        items = [item for part in self._read().values() for item in part]
        pairs = ((item.label, item.class_name) for item in items if item.label >= 0)
        return names_by_label(pairs, self.place.name)

    def items(self, split: str) -> list[Item]:
        """Return the items of a split in the order of the rows."""
        return self._read()[split]


def _items(
    rows: Sequence[tuple[str, Row, str]], columns: Columns, names: tuple[str, ...], where: str
) -> dict[tuple[str, str], Item]:
    """Return (split, path) → item; rows that repeat a path add their captions to it."""
    label_of = _label_reader([row for _, row, _ in rows], columns, names, where)
    labels: dict[tuple[str, str], tuple[int, str]] = {}
    captions: dict[tuple[str, str], list[str]] = {}
    for number, (split, row, prefix) in enumerate(rows, start=1):
        place = f"row {number} of {where}"
        path = prefix + checked_path(checked_name(row.get(columns.path), place), place)
        label = label_of(row, place)
        if labels.setdefault((split, path), label) != label:
            raise UserError(f"{place} gives {path[:200]!r} a second label")
        text = row.get(columns.caption)
        if text not in (None, ""):
            captions.setdefault((split, path), []).append(checked_name(text, place))
    return {
        key: Item(key[1], label, name, tuple(captions.get(key, ())))
        for key, (label, name) in labels.items()
    }


def _label_reader(
    rows: Sequence[Row], columns: Columns, names: tuple[str, ...], where: str
) -> Callable[[Row, str], tuple[int, str]]:
    """Return a function that gives (label, class name) of a row."""
    first = rows[0] if rows else {}
    column = next((c for c in (columns.label, columns.class_name) if c in first), None)
    if column is None:
        return lambda row, place: (-1, "")
    values = {str(row.get(column)) for row in rows if row.get(column) not in (None, "")}
    numeric = all(is_number(value.removeprefix("-")) for value in values)
    words = names or tuple(sorted(values))
    by_word = {word: label for label, word in enumerate(words)}

    def read(row: Row, place: str) -> tuple[int, str]:
        value = row.get(column)
        word = checked_name(str(value), place)
        if value in (None, ""):
            raise UserError(f"{place} has no {column}")
        if not numeric:
            if word not in by_word:
                raise UserError(f"{place} has the class {word[:80]!r}, which is not declared")
            return by_word[word], word
        label = int(word)
        if label < 0 or (names and label >= len(names)):
            last = f"0 to {len(names) - 1}" if names else "0, 1, 2, …"
            raise UserError(f"{place} has label {label}; labels are {last}")
        own = row.get(columns.class_name)
        return label, names[label] if names else checked_name(str(own or label), place)

    return read


@lru_cache(maxsize=8)
def _rows(stamp: tuple[str, int, int], columns: Columns) -> tuple[Row, ...]:
    path = Path(stamp[0])
    suffix = path.suffix.lower()
    readers = {".csv": _csv, ".tsv": _csv, ".jsonl": _json_lines, ".parquet": _parquet}
    if suffix not in readers:
        raise UserError(f"{path} is no table; its suffix must be one of {', '.join(readers)}")
    try:
        rows = tuple(readers[suffix](path))
    except (
        ValueError,
        OSError,
        LookupError,
        NotImplementedError,
        csv.Error,
        RecursionError,
    ) as error:
        raise UserError(f"{path} cannot be read as a table: {str(error)[:200]}") from None
    if rows and columns.path not in rows[0]:
        found = [str(key) for key in rows[0]]
        close = nearest(columns.path, found)
        hint = f"; did you mean {close!r}?" if close else ""
        raise UserError(f"{path} has no column {columns.path!r} (it has: {found}){hint}"[:500])
    return rows


def _csv(path: Path) -> Iterable[Row]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    return list(csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter=delimiter))


def _json_lines(path: Path) -> Iterable[Row]:
    rows = [json.loads(line) for line in read_text(path).split("\n") if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line is not a JSON object")
    return rows


def _parquet(path: Path) -> Iterable[Row]:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pylist()
