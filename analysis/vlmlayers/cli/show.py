"""The verbs that show a run: `report` and `figures`."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from vlmlayers.cli.options import several
from vlmlayers.errors import UserError, check_one_of, looked_for
from vlmlayers.runs import Run

FORMATS = ("svg", "png", "pdf")
Drawn = Annotated[
    list[str] | None, several("Metric to draw along depth besides the usual ones.", "--metric")
]
FEW = 100_000  # objects made between two looks for cycles


@contextmanager
def _few_collections() -> Iterator[None]:
    """Look for cycles less often: drawing makes many objects and few cycles.

    As often as Python does by itself, that takes a sixth of a small report's time.
    """
    own = gc.get_threshold()
    gc.set_threshold(FEW, *own[1:])
    try:
        yield
    finally:
        gc.set_threshold(*own)


@_few_collections()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; several make a comparison.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the comparison; the current one where absent.")
    ] = None,
    title: Annotated[str, typer.Option(help="Heading.")] = "",
    metric: Drawn = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", hidden=True, help="Accepted for symmetry; a report is always written."
        ),
    ] = False,
) -> None:
    """Write the report of a run, or a comparison of several."""
    if out is not None and len(runs) == 1:
        raise UserError(
            f"--out is for a comparison of several runs; the report of {runs[0]} goes into it"
        )
    if metric and len(runs) > 1:
        raise UserError("--metric is for the report of one run, not for a comparison of several")
    for run in runs:
        Run.open(run).require_choice()  # before what takes seconds to import
    from vlmlayers.report import write_comparison, write_report

    if len(runs) == 1:
        typer.echo(f"report {write_report(runs[0], title=title, metrics=metric or ())}")
        return
    typer.echo(f"report {write_comparison(runs, out or Path(), title or 'Comparison')}")


@_few_collections()
def figures(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    formats: Annotated[
        list[str] | None,
        several("svg, png, pdf; all where absent.", "--format"),
    ] = None,
    metric: Drawn = None,
    paper: Annotated[
        Path | None,
        typer.Option(help="Draw the paper's figures and tables of all runs together, in here."),
    ] = None,
) -> None:
    """Draw the figures of runs again, each with its table."""
    for one in formats or ():
        check_one_of("format", one, FORMATS, where="--format")
    if formats and paper is not None:
        raise UserError("--format is for the figures of a run; --paper draws in formats of its own")
    if metric and paper is not None:
        raise UserError("--metric is for the figures of a run; --paper draws those of a paper")
    for run in runs:
        if paper is None:
            Run.open(run).require_choice()
        elif not run.is_dir():
            raise UserError(f"{run} is not a folder{looked_for(run)}; name folders of tables")
    if paper is not None:
        from vlmlayers.figures import draw_all

        for outcome in draw_all(runs, paper):
            typer.echo(outcome.line)
        return
    from vlmlayers.report import write_figures

    for run in runs:
        for path in write_figures(run, tuple(formats or FORMATS), metric or ()):
            typer.echo(str(path))
