"""Read the tidy tables that figures and paper tables are drawn from."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vlmlayers.errors import UserError
from vlmlayers.files import read_csv, read_json

Folders = Path | Sequence[Path]
TEXT_COLUMNS = (
    "model", "weights", "dataset", "split", "tower", "position", "space", "pooling", "metric",
    "other_tower", "other_position", "options", "protocol", "method", "source", "split_kind",
    "placement", "settings", "recipe", "template", "flag", "note", "benchmark",
)  # fmt: skip
# What a validation computes from its cells and writes beside them.
DERIVED = (
    "_placements", "_correlations", "_predicted", "_predictors", "_untuned", "_amounts",
)  # fmt: skip
SPELLINGS = {
    "describabletextures": "dtd", "oxfordflowers": "flowers102", "oxfordflowers102": "flowers102",
}  # fmt: skip
Seen = dict[tuple[Any, ...], tuple[Path, Any]]  # whose and what → where it was first, and how


class MissingTable(UserError):
    """A table that a figure reads is not there; the figure is skipped with this message."""


def as_folders(folders: Folders) -> tuple[Path, ...]:
    """Return the folders as a tuple, also where one path was given."""
    return (folders,) if isinstance(folders, Path) else tuple(Path(path) for path in folders)


def read(stem: str, folders: Folders, needs: Sequence[str] = ()) -> pd.DataFrame:
    """Read every CSV and Parquet file of the folders whose name begins with `stem` as one table.

    Where a table is stored both ways the Parquet file is read; what `validate` computes from its
    cells and writes beside them is not. Names stay text: position "5"
    is not the number 5, and an empty name is "".

    Raises:
        MissingTable: No folder has such a table.
        UserError: A table lacks one of the columns `needs`.
    """
    return pd.concat(read_each(stem, folders, needs).values(), ignore_index=True)


def read_each(stem: str, folders: Folders, needs: Sequence[str] = ()) -> dict[Path, pd.DataFrame]:
    """Return the tables that `read` joins, by path without suffix."""
    places = as_folders(folders)
    found: dict[Path, Path] = {}
    for folder in places:
        for suffix in (".csv", ".parquet"):
            for path in sorted(folder.glob(f"{stem}*{suffix}")):
                if not path.stem.endswith(DERIVED):
                    found[path.with_suffix("")] = path
    if not found:
        shown = ", ".join(map(short, places))
        raise MissingTable(f"no {stem}*.csv in {shown}; record one from a run")
    return {name: read_file(path, needs) for name, path in found.items()}


def provenance_beside(file: Path, name: str) -> dict[str, Any]:
    """Return what is recorded of the run that a file is of; empty for one of another name."""
    record = file.with_name("provenance.json")
    return read_json(record) if file.name == name and record.exists() else {}


def refuse_unlike(
    seen: Seen,
    path: Path,
    did: str,
    of: tuple[Any, ...],
    how: Mapping[str, Any],
    do: str = "draw each by itself",
) -> None:
    """Refuse a table whose rows would be averaged with those of one that was made differently.

    Args:
        seen: What the tables before it said; this one is added.
        path: The table.
        did: What it did, as `trained net`.
        of: What rows have in common that are averaged.
        how: How they were made. What only one table tells is not compared.
        do: What to do about it.

    Raises:
        UserError: Names both and what differs.
    """
    for key, value in how.items():
        first, then = seen.setdefault((*of, key), (path, value))
        if then != value:
            raise UserError(
                f"{short(path)} {did} with {key}={value}, {short(first)} with {key}={then}; {do}"
            )


def read_file(path: Path, needs: Sequence[str] = ()) -> pd.DataFrame:
    """Read one table; see `read`. Of a validation, the comparison at tuned amounts, if any."""
    table = pd.read_parquet(path) if path.suffix == ".parquet" else read_csv(path, TEXT_COLUMNS)
    absent = [column for column in needs if column not in table.columns]
    if absent:
        raise UserError(f"{path} has no column {absent[0]!r}; it was not written by this toolkit")
    if "comparison" in table.columns and (tuned := table["comparison"] == "tuned").any():
        table = table[tuned].reset_index(drop=True)
    for column in TEXT_COLUMNS:
        if column in table.columns:
            table[column] = table[column].fillna("").astype(str)
    return table


def short(path: Path) -> str:
    """Return a path as it stands or from the current folder, whichever is shorter."""
    return min(str(path), os.path.relpath(path), key=len)


def select(table: pd.DataFrame, what: str, **values: str | Sequence[str]) -> pd.DataFrame:
    """Return the rows whose columns hold the given values.

    Raises:
        MissingTable: No row is left. `what` names the wanted rows in the message.
    """
    mask = np.ones(len(table), dtype=bool)
    for column, value in values.items():
        wanted = [value] if isinstance(value, str) else list(value)
        mask &= table[column].isin(wanted).to_numpy()
    if not mask.any():
        raise MissingTable(f"the tables hold no {what}; record a run that measures it")
    return table[mask].reset_index(drop=True)


def dataset_key(name: str) -> str:
    """Return a dataset's name without case and punctuation, one spelling for all sources."""
    plain = "".join(character for character in name.casefold() if character.isalnum())
    return SPELLINGS.get(plain, plain)
