"""The feature store on disk: one memory-mapped array per tower, space and position.

    <store>/store.json                      identity, shapes, checksums; its presence means "whole"
    <store>/data.gz                         the items it was made of, to say what changed since
    <store>/<tower>/items.json              ids, labels, pairs
    <store>/<tower>/<space>/<position>.npy  (item, width) float32

Work in progress lies beside it in `<store>.partial` and becomes the store by one rename.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmlayers.arguments import checked
from vlmlayers.errors import OtherExtraction, UserError
from vlmlayers.features.arrays import LayerFeatures, TowerFeatures
from vlmlayers.files import checksum, file_checksum, write_text
from vlmlayers.identity import DATA, DataIdentity
from vlmlayers.progress import timed
from vlmlayers.runs import PARTIAL

SIDECAR = "store.json"
ITEMS = "items.json"
FORMAT = 1
LOG = logging.getLogger(__name__)


class DamagedStore(UserError):
    """A file of the store is missing, cut short or altered."""


class FeatureStore:
    """Reads stores; `vlmlayers.models.extract(…, out=folder)` writes them."""

    @staticmethod
    @checked
    def open(path: str | Path, verify: bool = True) -> LayerFeatures:
        """Return the features of a store, memory-mapped.

        Args:
            path: Folder of the store.
            verify: Compare every file with its checksum; sizes are compared in each case.

        Raises:
            UserError: There is no store, or its extraction is not finished.
            DamagedStore: A file is missing, cut short or altered; names it.
        """
        folder = Path(path)
        record = read_sidecar(folder)
        with timed(LOG, f"opening {folder}{', checksums compared,' if verify else ''}"):
            towers = {
                name: _tower(folder, name, part, verify) for name, part in record["towers"].items()
            }
        return LayerFeatures(
            **{
                key: record[key]
                for key in ("model", "weights", "dataset", "split", "random_weights", "identity")
            },
            class_names=tuple(record["class_names"]),
            vision=towers.get("vision"),
            text=towers.get("text"),
        )

    @staticmethod
    def exists(path: str | Path) -> bool:
        """Whether a whole store lies at the path."""
        return (Path(path) / SIDECAR).is_file()


@checked
def open_features(path: str | Path, verify: bool = True) -> LayerFeatures:
    """Return the features of a store; see `FeatureStore.open`."""
    return FeatureStore.open(path, verify)


def partial_folder(path: Path) -> Path:
    """Return the folder that holds unfinished work for a store."""
    return path.with_name(path.name + PARTIAL)


def read_sidecar(folder: Path) -> dict[str, Any]:
    """Return the checked content of a store's sidecar.

    Raises:
        UserError: There is no store at this place.
        DamagedStore: The sidecar is altered.
    """
    file = folder / SIDECAR
    if not file.is_file():
        state = (
            "is not finished; run the extraction again to resume"
            if partial_folder(folder).exists()
            else "is not there; run `vlmlayers extract` first"
        )
        raise UserError(f"feature store {folder} {state}")
    return read_record(file)


def read_record(file: Path) -> dict[str, Any]:
    """Return a JSON record that carries its own checksum.

    Raises:
        DamagedStore: It is not JSON, of another format, or altered.
    """
    advice = f"delete {file.parent} and extract again"
    # The checksum comes before the format: of an altered record nothing else is worth saying.
    try:
        record = json.loads(file.read_bytes())
        expected = record.pop("checksum")
    except OSError as error:
        raise DamagedStore(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise DamagedStore(
            f"{file} is damaged: it is not the JSON that was written; {advice}"
        ) from error
    if record_checksum(record) != expected:
        raise DamagedStore(f"{file} is altered: its checksum differs; {advice}")
    if record.get("format") != FORMAT:
        raise DamagedStore(f"{file} has format {record.get('format')}, expected {FORMAT}; {advice}")
    return dict(record)


def record_checksum(record: Mapping[str, Any]) -> str:
    """Return SHA-256 of a record's canonical JSON."""
    return checksum(json.dumps(record, sort_keys=True))


def write_record(file: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON record with its checksum: whole or not at all."""
    body = {"format": FORMAT, **record}
    body["checksum"] = record_checksum(body)
    write_text(file, json.dumps(body, indent=1, sort_keys=True) + "\n")


def array_file(folder: Path, tower: str, space: str, position: str) -> Path:
    """Return where an array lies in a store."""
    return folder / tower / space / f"{position}.npy"


def differing_field(there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """Return the first field in which two identities differ, with both values; None if equal."""
    old, new = dict(_flat(there)), dict(_flat(here))
    for key in dict.fromkeys([*new, *old]):
        if old.get(key) != new.get(key):
            return f"{key} is {_short(old.get(key))} there, {_short(new.get(key))} here"
    return None


def refuse_other_identity(
    folder: Path, there: Mapping[str, Any], here: Mapping[str, Any], data: DataIdentity
) -> None:
    """Refuse a folder that belongs to something else.

    Args:
        folder: What was made, finished or not.
        there: Its identity.
        here: The identity that is wanted.
        data: The items of that one.

    Raises:
        UserError: Says what changed in the items, or names the first field that differs, with both
            values.
    """
    if there.get("data") == here["data"]:
        # Through JSON as the other one went, where tuples become lists.
        difference = differing_field(there, json.loads(json.dumps(here)))
    else:
        difference = f"of other data: {changed_data(folder, there, data)}"
    if difference is not None:
        raise OtherExtraction(
            f"feature store {folder} belongs to another extraction: {difference}; choose another "
            "folder, or delete this one"
        )


def changed_data(folder: Path, there: Mapping[str, Any], data: DataIdentity) -> str:
    """Return in words what changed in the items since a folder was made of them."""
    then, counts = DataIdentity.read(folder / DATA), there.get("data")
    if then is not None:
        return data.changes(then)
    if counts is None:
        return "an earlier version made it, which kept no sizes and times of the images"
    return f"{counts['images']:,} images then, {len(data.items):,} now"


def _tower(folder: Path, name: str, part: Mapping[str, Any], verify: bool) -> TowerFeatures:
    items_file = folder / name / ITEMS
    _check_file(items_file, part["items"], verify, folder)
    items = json.loads(items_file.read_bytes())
    arrays: dict[str, _StoredArrays] = {}
    for space, positions in part["order"]:
        files = {position: array_file(folder, name, space, position) for position in positions}
        for position, file in files.items():
            _check_file(file, part["arrays"][space][position], verify, folder)
        arrays[space] = _StoredArrays(files)
    pairs = items["pairs"]
    return TowerFeatures(
        name,
        part["blocks"],
        part["pooling"],
        part["kind"],
        tuple(items["ids"]),
        np.asarray(items["labels"], dtype=np.int64),
        arrays,
        None if pairs is None else np.asarray(pairs, dtype=np.int64),
        part["joint_pooling"],
        tuple(part.get("tokens", ())),  # stores of earlier versions have none
    )


class _StoredArrays(Mapping[str, NDArray[np.floating]]):
    """The arrays of one space by position, each mapped into memory when it is asked for.

    Were they all kept open, some dozens of datasets would take every file that a process may open.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files

    def __getitem__(self, position: str) -> NDArray[np.floating]:
        file = self._files[position]
        try:
            status = file.stat()
            return _mapped(str(file), status.st_mtime_ns, status.st_size, status.st_ino)
        except (OSError, ValueError) as error:
            raise DamagedStore(
                f"{file} cannot be read any more: {error}; was the store replaced?"
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


# The last three are only keys: a store that was replaced is mapped anew.
@lru_cache(maxsize=64)
def _mapped(file: str, changed: int, size: int, inode: int) -> NDArray[np.floating]:
    return np.load(file, mmap_mode="r")


def _check_file(file: Path, entry: Mapping[str, Any], verify: bool, folder: Path) -> None:
    advice = f"delete {folder} and extract again"
    try:
        size = file.stat().st_size
    except OSError as error:
        raise DamagedStore(f"{file} is missing from the store; {advice}") from error
    # First the size, which costs nothing and catches what was cut short.
    if size != entry["bytes"]:
        raise DamagedStore(f"{file} has {size} bytes, expected {entry['bytes']}; {advice}")
    if verify and file_checksum(file) != entry["sha256"]:
        raise DamagedStore(f"{file} is altered: its checksum differs; {advice}")


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def _short(value: Any) -> str:
    text = "absent" if value is None else repr(value)
    return text if len(text) <= 40 else text[:19] + "…" + text[-16:]
