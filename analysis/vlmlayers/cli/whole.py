"""The verbs that go the whole way: `demo` and `study`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmlayers.cli.measure import tell_left_out
from vlmlayers.cli.options import DataRoot, several
from vlmlayers.errors import UserError


def demo(
    out: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/demo"),
    random_weights: Annotated[
        bool,
        typer.Option("--random-weights", help="Run on an untrained model; every output says so."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Run every stage again.")] = False,
) -> None:
    """The whole way on the miniature CLIP and built-in datasets."""
    from vlmlayers.study.demo import run_demo

    for line in run_demo(out, random_weights=random_weights, force=force, echo=typer.echo):
        typer.echo(line)


def init(
    file: Annotated[Path, typer.Argument(help="The file to write.")] = Path("study.toml"),
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a study file with comments, which runs as it is."""
    from vlmlayers.files import write_text
    from vlmlayers.study.schema import STUDY_TEMPLATE

    if file.exists() and not force:
        raise UserError(f"{file} is there already; name another, or replace it with --force")
    write_text(file, STUDY_TEMPLATE.read_text(encoding="utf-8").replace("{file}", str(file)))
    typer.echo(f"{file}\nvlmlayers study {file}")


def study(
    file: Annotated[
        Path,
        typer.Argument(metavar="STUDY.toml", help="The study file, or the name of a shipped one."),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Run folder; runs/<name of the study file> where absent.")
    ] = None,
    data_root: DataRoot = None,
    only: Annotated[
        list[str] | None,
        several("Run this stage only.", "--only"),
    ] = None,
    start: Annotated[str | None, typer.Option("--from", help="Run from this stage on.")] = None,
    skip: Annotated[
        list[str] | None,
        several("Leave this stage out.", "--skip"),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Run stages again even where nothing changed.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …; else the study's.")] = None,
) -> None:
    """The whole way on your model and data; resumes stage by stage.

    Stages: extract, score, search, select, train, validate, report.
    """
    from vlmlayers.study import read_study, run_study, study_file
    from vlmlayers.study.runner import stages_of

    file = study_file(file)
    made = read_study(file)
    runs = run_study(
        made,
        out or Path("runs") / file.stem,
        base=file.parent,
        source=file.read_text(encoding="utf-8"),
        data_root=data_root,
        only=only or (),
        start=start,
        skip=skip or (),
        force=force,
        device=device,
        echo=typer.echo,
    )
    from vlmlayers.report.validation import void_verdict

    tell_left_out(runs)
    # One that an earlier command left says nothing of this one.
    validated = made.validate_ is not None and "validate" in stages_of(
        made, only or (), start, skip or ()
    )
    if validated and any(void_verdict(run) for run in runs):
        raise typer.Exit(2)  # the verdict stands in the terminal and in the report
