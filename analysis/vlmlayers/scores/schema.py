"""The score table: its columns, and reading and writing it without losing anything."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import pandas as pd

from vlmlayers.arguments import Takes, checked
from vlmlayers.errors import UserError, one_line
from vlmlayers.files import atomically, file_checksum, read_json, write_csv, write_json
from vlmlayers.positions import sort_key
from vlmlayers.runs import score_table
from vlmlayers.scores.reading import REQUIRED, Reading, check_columns, check_scores, in_words


def _with_columns(table: Any) -> Any:
    if isinstance(table, pd.DataFrame):
        check_columns(table)
        table = in_words(table)
    return table


Scores = Annotated[
    pd.DataFrame,
    Takes(
        "a score table, as `score` makes and `read_scores` reads it",
        "score tables",
        convert=_with_columns,
    ),
]
CONTRACT_COLUMNS = (*REQUIRED[:3], "split", *REQUIRED[3:])  # tables of others may lack the split
EXTRA_COLUMNS = ("other_tower", "other_position", "options")
SCORE_COLUMNS = CONTRACT_COLUMNS + EXTRA_COLUMNS
NUMBERS = ("depth", "value", "low", "high", "null")
COUNTS = ("n", "seed")
ATTRIBUTES = ("cost", "refused", "protocol", "features", "weights_hash")
SIDECAR = "scores.json"
LOG = logging.getLogger(__name__)


def score_frame(rows: Sequence[dict[str, Any]], **attributes: Any) -> pd.DataFrame:
    """Return rows as a score table with the right columns, types and attributes."""
    frame = _typed(pd.DataFrame(list(rows), columns=list(SCORE_COLUMNS)))
    frame.attrs.update(attributes)
    return frame


@checked
def write_scores(scores: Scores, folder: str | Path) -> tuple[Path, Path]:
    """Write `scores.parquet`, `scores.csv` and a sidecar with checksums, cost and refusals.

    Each file appears whole or not at all.

    Returns:
        The paths of the Parquet and the CSV file.

    Raises:
        UserError: The table lacks columns, or the folder is named like a file or cannot be written.
    """
    check_columns(scores, SCORE_COLUMNS, "the table")
    folder = Path(folder)
    if folder.suffix in (".csv", ".parquet"):
        raise UserError(f"write_scores takes a run folder; {folder} is named like a file in one")
    paths = folder / "scores.parquet", folder / "scores.csv"
    bare = scores.copy()
    # pandas writes attributes into Parquet and fails on some; here they go to the sidecar.
    bare.attrs = {}
    atomically(paths[0], lambda part: bare.to_parquet(part, index=False))
    write_csv(paths[1], bare)
    # Last: if writing stops before it, the old checksums do not match and reading says so.
    sidecar = {
        "sha256": {path.name: file_checksum(path) for path in paths},
        **{name: scores.attrs[name] for name in ATTRIBUTES if name in scores.attrs},
    }
    write_json(folder / SIDECAR, sidecar)
    return paths


@checked
def read_scores(path: str | Path) -> pd.DataFrame:
    """Read a score table from a run folder, a Parquet or a CSV file.

    Raises:
        UserError: Missing, damaged or altered file, missing columns, or text where numbers belong.
    """
    path = score_table(path)
    notes = _sidecar(path)
    try:
        if path.suffix == ".csv":
            # As text: a class or dataset may be called "NA" or "007".
            frame = pd.read_csv(path, keep_default_na=False, dtype=str)
        else:
            frame = pd.read_parquet(path)
            for name in frame.columns:  # Arrow decodes text when it is looked at, not before
                frame[name].tolist()
    # Arrow and pandas raise errors of many kinds on damaged files.
    except Exception as error:
        raise UserError(
            f"{path} cannot be read as a score table ({type(error).__name__}); "
            "run `vlmlayers score` again"
        ) from error
    check_columns(frame, SCORE_COLUMNS, str(path))
    try:
        frame = _typed(frame)
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{path} has text where a number belongs ({one_line(error)})") from error
    LOG.debug("read %s (%d rows)", path, len(frame))
    frame.attrs.update({name: notes[name] for name in ATTRIBUTES if name in notes})
    return frame


@checked
def score_cost(scores: Scores) -> pd.DataFrame:
    """Return what each metric cost, the most expensive first: metric, seconds, rows."""
    cost = scores.attrs.get("cost", {})
    rows = scores["metric"].value_counts()
    frame = pd.DataFrame(
        [{"metric": m, "seconds": s, "rows": int(rows.get(m, 0))} for m, s in cost.items()],
        columns=["metric", "seconds", "rows"],
    )
    return frame.sort_values("seconds", ascending=False, ignore_index=True)


@checked
def refusals(scores: Scores) -> pd.DataFrame:
    """Return what was not computed and why: metric, dataset, tower, position, reason."""
    columns = ["metric", "dataset", "tower", "position", "reason"]
    return pd.DataFrame(scores.attrs.get("refused", []), columns=columns)


@checked
def score_matrix(
    scores: Scores,
    metric: str,
    *,
    dataset: str = "*",
    tower: str = "vision",
    other_tower: str = "text",
    space: str = "native",
) -> pd.DataFrame:
    """Return an agreement as a full position × position matrix, rows along `tower`.

    Within a tower the table keeps each pair once; the matrix is filled symmetrically. Of several
    splits or poolings it is that of the first one, as in figures.

    Raises:
        UserError: The table has no such rows, or those of several models.
    """
    chosen = scores[
        (scores["metric"] == metric)
        & (scores["dataset"] == dataset)
        & (scores["space"] == space)
        & (scores["tower"] == tower)
        & (scores["other_tower"] == other_tower)
    ]
    if chosen.empty:
        raise UserError(f"no {metric} between {tower} and {other_tower} for dataset {dataset!r}")
    # Checked first, and read at one split and pooling: pivot_table averages what shares a cell.
    read = Reading(space=space).of_all_datasets(check_scores(chosen), metric, tower)
    return grid_of(read, tower == other_tower)


def grid_of(rows: pd.DataFrame, within: bool) -> pd.DataFrame:
    """Return rows of one agreement as a matrix along both towers, filled `within` one tower."""
    grid = rows.pivot_table(index="position", columns="other_position", values="value")
    grid = grid.combine_first(grid.T) if within else grid
    return grid.loc[sorted(grid.index, key=sort_key), sorted(grid.columns, key=sort_key)]


def _typed(frame: pd.DataFrame) -> pd.DataFrame:
    extra = [column for column in frame.columns if column not in SCORE_COLUMNS]
    frame = frame[[*SCORE_COLUMNS, *extra]].copy()
    for column in SCORE_COLUMNS:
        if column in NUMBERS:
            given = frame[column]
            # CSV leaves a missing number empty, which text cannot be turned into a number from.
            blank = given.replace("", "nan") if given.dtype.kind not in "fiu" else given
            frame[column] = blank.astype("float64")
        elif column in COUNTS:
            frame[column] = frame[column].astype("int64")
        else:
            frame[column] = frame[column].fillna("").astype(str)
    return frame


def _sidecar(path: Path) -> dict[str, Any]:
    sidecar = path.parent / SIDECAR
    if not sidecar.exists():
        return {}
    notes = read_json(sidecar, advice="run `vlmlayers score` again or delete it")
    marks = notes.get("sha256")
    if not isinstance(marks, dict):
        raise UserError(f"{sidecar} is damaged; run `vlmlayers score` again or delete it")
    if path.name in marks and marks[path.name] != file_checksum(path):
        raise UserError(
            f"{path} does not match its checksum in {SIDECAR}: half-written or edited; "
            f"run `vlmlayers score` again, or delete {SIDECAR} to accept it"
        )
    return notes
