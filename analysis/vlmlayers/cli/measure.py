"""The verbs from a model to a choice: `models`, `extract`, `score` and `select`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from pydantic import Field

from vlmlayers.cli.options import (
    DataRoot,
    Model,
    key_values,
    named,
    several,
    with_options,
)
from vlmlayers.errors import UserError
from vlmlayers.extraction import WeightsOptions
from vlmlayers.runs import Run, is_first_process, writing_alone
from vlmlayers.selection.resampling import RESAMPLES
from vlmlayers.study.schema import ExtractPart
from vlmlayers.words import counted

LOG = logging.getLogger(__name__)


def models(
    check: Annotated[
        bool,
        typer.Option("--check", help="Build each, and find its towers and how they pool."),
    ] = False,
    names: Annotated[list[str] | None, named("Architectures; all where absent.")] = None,
) -> None:
    """The open_clip models: blocks and widths per tower."""
    from vlmlayers.study.catalogue import models_text

    typer.echo(models_text(names or None, check=check))


class ExtractEverything(ExtractPart):
    """How the verb extracts: as a study does, but all items where no number is given."""

    items: int = Field(default=0, ge=0, description="Items per dataset, 0 for all.")


@with_options
def extract(
    *,
    model: Model,
    datasets: Annotated[list[str], named("Names, image folders, tables or TOML files.")],
    out: Annotated[Path, typer.Option(help="Run folder.")],
    weights: WeightsOptions,
    adapter: Annotated[
        Path | None,
        typer.Option(help="Trained adapter; the features are those of the adapted model."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Method of the adapter where it does not say: my_method.py:Mine, or of the "
            "authors' file of another method than mma."
        ),
    ] = None,
    options: ExtractEverything,
    seed: Annotated[int, typer.Option(help="Seed of the draw of items.")] = 0,
    estimate: Annotated[
        bool,
        typer.Option("--estimate", help="Measure one batch, say what it will cost, and stop."),
    ] = False,
    streaming: Annotated[
        bool,
        typer.Option(
            "--streaming", help="Store no features: sum them as they are made, and score the sums."
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace features of another extraction.")
    ] = False,
    data_root: DataRoot = None,
) -> None:
    """Record every position of both towers into RUN/features.

    Several processes share the work, one per GPU:
    `torchrun --nproc-per-node N -m vlmlayers extract …`.
    """
    if estimate and streaming:
        raise UserError("--estimate is of features that are stored; --streaming stores none")
    if method is not None and adapter is None:
        raise UserError("--method is of an adapter; name that by --adapter, or leave --method out")
    from vlmlayers.study import run_study
    from vlmlayers.study.context import silent
    from vlmlayers.study.estimating import estimate_study
    from vlmlayers.study.streams import stream_study
    from vlmlayers.study.verbs import study_of

    made = study_of(
        model,
        datasets,
        weights.arguments(),
        adapter=adapter,
        method=method,
        seed=seed,
        extraction=options,
    )
    if estimate:
        typer.echo(estimate_study(made, out, data_root=data_root))
        return
    first = is_first_process()
    echo = typer.echo if first else silent
    if streaming:
        with writing_alone(out):
            done = stream_study(made, out, data_root=data_root, force=force, echo=echo)
        if first:
            typer.echo(done)
    else:
        run_study(made, out, data_root=data_root, only=["extract"], force=force, echo=echo)
    tell_left_out([Run(out)])


def tell_left_out(runs: Sequence[Run]) -> None:
    """Say last what runs lack: a line among those of an hour is missed, and the code is 0."""
    for run in runs if is_first_process() else ():
        if left_out := list(run.left_out):
            LOG.warning(
                "%s lacks %s, which could not be extracted: %s; mend the files and start the same "
                "command again",
                run.folder,
                counted(len(left_out), "dataset"),
                ", ".join(left_out),
            )


def score(
    run: Annotated[Path | None, typer.Argument(help="Run folder with features.")] = None,
    metrics: Annotated[
        list[str] | None,
        several(
            "A metric, an installed one, or path.py:function; those that --list marks * where "
            "absent.",
            "--metric",
            "-m",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        key_values("An option of scoring, as in bootstrap=50; --list says which."),
    ] = None,
    show: Annotated[
        bool, typer.Option("--list", help="Say what metrics and options are, and stop.")
    ] = False,
    streaming: Annotated[
        bool,
        typer.Option("--streaming", help="Flat in memory: only scores that are sums over items."),
    ] = False,
    jobs: Annotated[
        int | None,
        typer.Option(
            help="Processes; one per core, at most 8, where absent and worth it.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Score every position: features in, score table out.

    A table that is there is replaced: name all metrics that it should hold.
    """
    if run is not None and not show:
        Run(run).stores()  # before what takes seconds to import
    from vlmlayers.options import parse_settings
    from vlmlayers.study import verbs

    if show:
        if settings or streaming or jobs is not None:
            raise UserError("--list says what metrics are and scores nothing; name metrics alone")
        typer.echo(verbs.metrics_text(metrics))
        return
    if run is None:
        raise UserError("vlmlayers score needs a run folder; make one with `vlmlayers extract`")
    with writing_alone(run):
        done = verbs.score_run(
            run,
            metrics,
            parse_settings(settings or []),
            streaming=streaming,
            jobs=jobs,
        )
    typer.echo(done)


def select(
    run: Annotated[Path, typer.Argument(help="Run folder, or a score table.")],
    rule: Annotated[
        str,
        typer.Option(
            help="threshold, knee, budget, search, paper, all, explicit, an "
            "installed rule, or path.py:function."
        ),
    ] = "threshold",
    settings: Annotated[
        list[str] | None,
        key_values("An option of the rule, as in accuracy=0.6."),
    ] = None,
    resamples: Annotated[
        int, typer.Option(help="Resampled tables behind the stability, 0 for none.")
    ] = RESAMPLES,
    seed: Annotated[int, typer.Option(help="Seed of the resampling.")] = 0,
    out: Annotated[Path | None, typer.Option(help="The choice.json to write.")] = None,
) -> None:
    """Choose the layers to adapt: scores in, choice.json out."""
    from vlmlayers.options import parse_settings
    from vlmlayers.study import verbs

    typer.echo(verbs.select_run(run, rule, parse_settings(settings or []), resamples, seed, out))
