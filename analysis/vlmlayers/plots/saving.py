"""Save a figure as SVG, PNG and PDF, with the table that it was drawn from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vlmlayers.arguments import checked
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.files import atomically, write_csv
from vlmlayers.plots.style import style

FORMATS = ("svg", "png", "pdf")
NO_LAYOUT: Any = {"figure.constrained_layout.use": False, "figure.autolayout": False}


@checked
def save_figure(
    figure: Figure | Axes | np.ndarray,
    stem: str | Path,
    data: pd.DataFrame | None = None,
    formats: Sequence[str] = FORMATS,
) -> list[Path]:
    """Write `stem.svg`, `.png`, `.pdf` and, of the data drawn, `stem.csv`.

    Files carry no date, so that the same data give the same bytes.

    Args:
        figure: Figure, or axes of one: what a plot returns.
        stem: Path without suffix; one of a format is taken off.
        data: Table that was drawn.
        formats: Any of `svg`, `png`, `pdf`.

    Returns:
        The files written.

    Raises:
        UserError: A format is unknown, or none is named; an array holds no axes.
    """
    if not formats:
        raise UserError(f"no format is named; leave formats out for all of {', '.join(FORMATS)}")
    for kind in formats:
        check_one_of("figure format", kind, FORMATS)
    first: Any = next(figure.flat, None) if isinstance(figure, np.ndarray) else figure
    if not isinstance(first, Figure | Axes):
        raise UserError(
            "save_figure: figure takes a figure, or axes of one, not an array of others"
        )
    whole: Any = first.figure
    drawn = whole.figure  # of a subfigure the one that it is in
    path = Path(stem)
    # Matplotlib's own way of saving takes the suffix; other dots are part of a name.
    folder, name = path.parent, path.stem if path.suffix[1:] in FORMATS else path.name
    written = []
    # Each format stamps files in a field of its own.
    dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {"Software": None}}
    with style(), mpl.rc_context(NO_LAYOUT):
        for kind in formats:
            written.append(folder / f"{name}.{kind}")
            atomically(written[-1], partial(drawn.savefig, format=kind, metadata=dates[kind]))
            # Laid out once, all formats alike; with any layout engine each would be drawn twice.
            drawn.set_layout_engine(None)
    if data is not None:
        written.append(write_csv(folder / f"{name}.csv", data))
    return written


def with_source(data: pd.DataFrame, model: str, weights: str) -> pd.DataFrame:
    """Return a table that says in its first two columns which model and weights it is of.

    A file beside a figure travels alone; `random` weights have to be announced in it too.
    """
    rest = data.drop(columns=["model", "weights"], errors="ignore")
    head = pd.DataFrame({"model": model, "weights": weights}, index=rest.index)
    return pd.concat([head, rest], axis=1)


def slug(text: str) -> str:
    """Return text as a file name: letters, digits, dashes."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower() or "figure"
