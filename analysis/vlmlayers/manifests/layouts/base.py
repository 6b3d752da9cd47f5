"""What every layout answers, and what several of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

from vlmlayers.errors import UserError, check_one_of, shortened
from vlmlayers.manifests.items import Item, is_text
from vlmlayers.manifests.place import AlteredData, Place, known_checksum, read_text
from vlmlayers.manifests.schema import Columns


class Layout(ABC):
    """Reads the lists of one dataset; nothing is read until it is asked for.

    Args:
        place: Where the dataset lies.
    """

    def __init__(self, place: Place) -> None:
        self.place = place

    @abstractmethod
    def splits(self) -> tuple[str, ...]:
        """Return the splits that the files have."""

    @abstractmethod
    def class_names(self) -> tuple[str, ...]:
        """Return the class names by label."""

    @abstractmethod
    def items(self, split: str) -> list[Item]:
        """Return the items of a split, in the order of the files."""

    def remarks(self) -> tuple[str, ...]:
        """Return what the lists read so far left out, or took otherwise than it is written."""
        return ()


def expect_hash(place: Place, path: Path) -> None:
    """Compare the split file with the hashes that the manifest knows.

    Raises:
        AlteredData: The file differs from all of them.
    """
    # Labels follow from this file: another split under its name would train and test unnoticed.
    known = place.spec.split_sha256
    if known and (found := known_checksum(path)) not in known:
        raise AlteredData(
            f"{place.name}: {path} is altered: its sha256 is {found[:12]}…, the manifest expects "
            f"{known[0][:12]}…; {place.hint}; for a split of your own, copy the manifest and "
            "change split_sha256"
        )


def class_keys(place: Place) -> dict[str, str]:
    """Return key → class name from the manifest's file of names, in the order of its lines.

    Raises:
        UserError: The file is missing, a line lacks its name, or a key is there twice.
    """
    path = place.find(place.spec.class_name_file, "the file of class names")
    names: dict[str, str] = {}
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        text = line.strip()
        if not text:
            continue
        key, _, name = text.partition(" ") if place.spec.class_keys else (str(len(names)), "", text)
        if not name.strip():
            raise UserError(f"{place.name}: line {number} of {path} has a key but no class name")
        if key in names:
            raise UserError(f"{place.name}: line {number} of {path} repeats the key {key[:80]!r}")
        names[key] = name.strip()
    return names


def declared_names(place: Place) -> tuple[str, ...]:
    """Return the class names that the manifest or its file of names gives, or ()."""
    if place.spec.class_names:
        return place.spec.class_names
    return tuple(class_keys(place).values()) if place.spec.class_name_file else ()


def names_by_label(items: Iterable[tuple[int, str]], where: str) -> tuple[str, ...]:
    """Return class names by label from (label, name) pairs.

    Raises:
        UserError: A label has two names, or the labels are not 0, 1, 2, … without a gap.
    """
    names: dict[int, str] = {}
    for label, name in items:
        if names.setdefault(label, name) != name:
            raise UserError(
                f"{where}: label {label} has two class names, {names[label][:80]!r} and "
                f"{name[:80]!r}"
            )
    missing = next((label for label in range(len(names)) if label not in names), None)
    if missing is not None:
        raise UserError(
            f"{where}: labels must be 0, 1, 2, …; {missing} is missing, {max(names)} is there"
        )
    return tuple(names[label] for label in range(len(names)))


def refuse_lost_columns(columns: Columns, found: Iterable[str], where: str) -> None:
    """Refuse a manifest that names a column which is not there: it would be left out unnoticed.

    Raises:
        UserError: Names the column, and the nearest or all that are there.
    """
    known = list(map(str, found))
    for field in sorted(columns.model_fields_set):
        check_one_of(f"column of {field}", getattr(columns, field), known, where)


def caption_texts(value: object, where: str) -> list[str]:
    """Return the captions of a row, which gives a text or a list of texts; empty ones are left out.

    Raises:
        UserError: One is not text that UTF-8 can hold, or a list that was written as text.
    """
    if isinstance(value, str) and value[:2] in ("['", '["') and value.endswith("]"):
        # As pandas writes it; read as a caption it would be one of brackets and quotes.
        raise UserError(
            f"{where} has the list {shortened(value, 60)} as one text; write a row for each "
            "caption, or lists to .jsonl or .parquet"
        )
    texts = value if isinstance(value, list) else [value]
    return [checked_name(text, where) for text in texts if text not in (None, "")]


def checked_name(name: object, where: str) -> str:
    """Return a class name or caption.

    Raises:
        UserError: It is not text that UTF-8 can hold.
    """
    if not is_text(name):
        raise UserError(f"{where} has {str(name)[:80]!r} where text is expected")
    return str(name)
