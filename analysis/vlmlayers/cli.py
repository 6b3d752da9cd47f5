"""The command line: each verb is one call of the library.

Heavy imports stand inside the verbs, so that `--help` and the table verbs start at once and
never import torch.
"""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from vlmlayers.errors import DISK, UserError, disk_trouble, printable
from vlmlayers.run import is_first_process

VERBS = "vlmlayers.verbs"
RESUME = "Stopped. Start the same command again to continue where it was."
ORDER = (
    "demo",
    "study",
    "data",
    "models",
    "extract",
    "score",
    "select",
    "train",
    "evaluate",
    "validate",
    "report",
    "figures",
)


class Verbs(TyperGroup):
    """The verbs of this package and, loaded when asked for, those of installed extensions."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the verbs in the order in which they are used."""
        names = {*super().list_commands(ctx), *_extensions()}
        return sorted(names, key=lambda n: (ORDER.index(n) if n in ORDER else len(ORDER), n))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a verb."""
        own = super().get_command(ctx, cmd_name)
        return own if own is not None else _extension(cmd_name)

    def invoke(self, ctx: Any) -> Any:
        """Run a verb; Ctrl-C ends it in one line."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo(f"\n{RESUME}", err=True)
            raise typer.Exit(130) from None


def _extensions() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=VERBS)}


def _extension(name: str) -> Any:
    point = _extensions().get(name)
    if point is None:
        return None
    made = typer.Typer(add_completion=False, rich_markup_mode=None)
    try:
        function = point.load()
    except (ImportError, AttributeError) as error:
        reason = str(error)

        def function() -> None:
            raise UserError(
                f"the verb {name!r} cannot be loaded: {reason}; "
                "install the package that offers it again"
            )

        function.__doc__ = "Not available in this installation."
    if isinstance(function, typer.Typer):
        command = typer.main.get_command(function)
    else:
        made.command(name)(function)
        command = typer.main.get_command(made)
    command.name = name
    return command


app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Which layers of a vision-language model should be adapted? Measure every layer of both "
    "towers, choose, and prove the choice by training.",
)
data_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Datasets: what is known, what is on disk."
)
app.add_typer(data_app, name="data")

DataRoot = Annotated[
    Path | None,
    typer.Option(
        "--data-root", help="Folder that the datasets lie in; else VLMLAYERS_DATA, else ./data."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", "-s", metavar="KEY=VALUE", help="An option of the rule or of scoring; repeatable."
    ),
]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/demo"),
    random_weights: Annotated[
        bool,
        typer.Option("--random-weights", help="Run on an untrained model; every output says so."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Run every stage again.")] = False,
    quiet: Quiet = False,
) -> None:
    """The whole way on the miniature CLIP and built-in datasets."""
    from vlmlayers.study.demo import run_demo

    for line in run_demo(
        out, random_weights=random_weights, force=force, progress=not quiet, echo=typer.echo
    ):
        typer.echo(line)


@app.command()
def study(
    file: Annotated[Path, typer.Argument(metavar="STUDY.toml", help="The study file.")],
    out: Annotated[
        Path | None, typer.Option(help="Run folder; runs/<name of the study file> where absent.")
    ] = None,
    data_root: DataRoot = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="Run this stage only; repeatable.")
    ] = None,
    start: Annotated[str | None, typer.Option("--from", help="Run from this stage on.")] = None,
    skip: Annotated[
        list[str] | None, typer.Option("--skip", help="Leave this stage out; repeatable.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Run stages again even where nothing changed.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …; else the study's.")] = None,
    quiet: Quiet = False,
) -> None:
    """The whole way on your model and data; resumes stage by stage.

    Stages: extract, score, select, validate, report.
    """
    from vlmlayers.study import read_study, run_study

    made = read_study(file)
    run_study(
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
        progress=not quiet,
        echo=typer.echo,
    )


@data_app.command("list")
def data_list(data_root: DataRoot = None) -> None:
    """What is known: every dataset with its classes, items and licence."""
    from vlmlayers.manifests import list_table
    from vlmlayers.text_tables import text_table

    table = list_table(data_root).drop(columns=["kind", "layout"])
    table["here"] = table["here"].map({True: "yes", False: ""})
    table = table.rename(columns={"classes": "class"})
    typer.echo(text_table(table, widths={"title": 15, "licence": 8}))


@data_app.command("check")
def data_check(
    names: Annotated[list[str] | None, typer.Argument(help="Datasets; all where absent.")] = None,
    data_root: DataRoot = None,
    full: Annotated[bool, typer.Option("--full", help="Decode every image.")] = False,
) -> None:
    """What is on disk, missing or altered, and where to get it."""
    from vlmlayers.manifests import check_table, exit_code

    table = check_table(names or (), data_root, full)
    for line in table["line"]:
        typer.echo(line)
    raise typer.Exit(exit_code(table, names or ()))


@data_app.command("shards")
def data_shards(
    name: Annotated[str, typer.Argument(help="Dataset: a name, TOML file or image folder.")],
    out: Annotated[Path, typer.Option(help="Folder of the shards and their manifest.toml.")],
    splits: Annotated[
        list[str] | None, typer.Option("--split", help="A split; repeatable; all where absent.")
    ] = None,
    per_shard: Annotated[int, typer.Option(help="Items in one tar file.")] = 1000,
    data_root: DataRoot = None,
    quiet: Quiet = False,
) -> None:
    """Convert a dataset to webdataset shards, with a manifest of their own."""
    from vlmlayers.manifests import Manifest, write_shards

    manifest = Manifest.load(name)
    chosen = splits or manifest.splits(data_root)
    written = write_shards(manifest, chosen, out, per_shard, data_root, progress=not quiet)
    typer.echo(f"{Manifest.load(str(written)).check().line()}\n{written}")


@app.command()
def models(
    check: Annotated[
        bool, typer.Option("--check", help="Build every architecture and find its towers.")
    ] = False,
    names: Annotated[
        list[str] | None, typer.Argument(help="Architectures; all where absent.")
    ] = None,
) -> None:
    """The open_clip architectures: blocks, widths and pooling per tower."""
    from vlmlayers.study.catalogue import models_text

    typer.echo(models_text(names or None, check=check))


@app.command()
def extract(
    model: Annotated[
        str,
        typer.Argument(
            help="Architecture, mini-clip, or a folder with open_clip_config.json and weights."
        ),
    ],
    datasets: Annotated[list[str], typer.Argument(help="Names, TOML files or image folders.")],
    out: Annotated[Path, typer.Option(help="Run folder.")],
    pretrained: Annotated[str | None, typer.Option(help="Tag or checkpoint file.")] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="An untrained model; every output says so.")
    ] = False,
    adapter: Annotated[
        Path | None,
        typer.Option(help="Trained adapter; the features are those of the adapted model."),
    ] = None,
    split: Annotated[str, typer.Option(help="train, val, test or all.")] = "train",
    items: Annotated[int, typer.Option(help="Items per dataset, 0 for all.")] = 0,
    text: Annotated[str, typer.Option(help="prompts or captions.")] = "prompts",
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    batch_size: Annotated[int, typer.Option(help="Items per forward pass.")] = 64,
    workers: Annotated[int, typer.Option(help="Decoding processes.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the draw of items.")] = 0,
    present_only: Annotated[
        bool, typer.Option("--present-only", help="Leave out items that are not on disk.")
    ] = False,
    skip_unreadable: Annotated[
        bool,
        typer.Option("--skip-unreadable", help="Leave unreadable images out instead of stopping."),
    ] = False,
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
    quiet: Quiet = False,
) -> None:
    """Record every position of both towers into RUN/features.

    Several processes share the work, one per GPU:
    `torchrun --nproc-per-node N -m vlmlayers extract …`.
    """
    from vlmlayers.study import check_study, run_study
    from vlmlayers.study.estimating import estimate_study
    from vlmlayers.study.streams import stream_study

    local = Path(model).is_dir()
    part = {
        "path" if local else "name": str(Path(model).resolve()) if local else model,
        "pretrained": pretrained,
        "random_weights": random_weights,
        "adapter": str(adapter.resolve()) if adapter else "",
    }
    made = check_study(
        {
            "models": [part],
            "datasets": datasets,
            "seed": seed,
            "extract": {
                "split": split,
                "items": items,
                "text": text,
                "precision": precision,
                "device": device,
                "batch_size": batch_size,
                "workers": workers,
                "present_only": present_only,
                "skip_unreadable": skip_unreadable,
            },
        },
        "the command line",
    )
    if estimate:
        typer.echo(estimate_study(made, out, data_root=data_root))
        return
    first = is_first_process()
    shown: dict[str, Any] = {
        "progress": not quiet,
        "echo": typer.echo if first else lambda line: None,
    }
    if streaming:
        done = stream_study(made, out, data_root=data_root, **shown)
        if first:
            typer.echo(done)
        return
    run_study(made, out, data_root=data_root, only=["extract"], force=force, **shown)


@app.command()
def score(
    run: Annotated[Path | None, typer.Argument(help="Run folder with features.")] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option("--metric", "-m", help="A metric; repeatable; the first ones where absent."),
    ] = None,
    settings: Settings = None,
    show: Annotated[
        bool, typer.Option("--list", help="Say what each metric is, and stop.")
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
    quiet: Quiet = False,
) -> None:
    """Score every position: features in, scores.parquet and scores.csv out."""
    from vlmlayers.study import verbs

    if show:
        typer.echo(verbs.metrics_text(metrics))
        return
    if run is None:
        raise UserError("vlmlayers score needs a run folder; make one with `vlmlayers extract`")
    typer.echo(
        verbs.score_run(
            run,
            metrics,
            verbs.parse_settings(settings or []),
            streaming=streaming,
            jobs=jobs,
            progress=not quiet,
        )
    )


@app.command()
def select(
    run: Annotated[Path, typer.Argument(help="Run folder, or a score table.")],
    rule: Annotated[
        str,
        typer.Option(
            help="threshold, knee, budget, paper, all, explicit, an "
            "installed rule, or path.py:function."
        ),
    ] = "threshold",
    settings: Settings = None,
    resamples: Annotated[int, typer.Option(help="Resampled tables behind the stability.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the resampling.")] = 0,
    out: Annotated[Path | None, typer.Option(help="The choice.json to write.")] = None,
) -> None:
    """Choose the layers to adapt: scores in, choice.json out."""
    from vlmlayers.study import verbs

    typer.echo(
        verbs.select_run(run, rule, verbs.parse_settings(settings or []), resamples, seed, out)
    )


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; several make a comparison.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the comparison; the current one where absent.")
    ] = None,
    title: Annotated[str, typer.Option(help="Heading.")] = "",
    force: Annotated[
        bool,
        typer.Option(
            "--force", hidden=True, help="Accepted for symmetry; a report is always written."
        ),
    ] = False,
) -> None:
    """Write report.html, report.md and figures; of several runs, a comparison."""
    from vlmlayers.report import write_comparison, write_report

    if len(runs) == 1:
        typer.echo(f"report {write_report(runs[0], title=title)}")
        return
    typer.echo(f"report {write_comparison(runs, out or Path(), title or 'Comparison')}")


@app.command()
def figures(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    formats: Annotated[
        list[str] | None, typer.Option("--format", help="svg, png, pdf; repeatable.")
    ] = None,
    paper: Annotated[
        Path | None,
        typer.Option(help="Draw the paper's figures and tables of all runs together, in here."),
    ] = None,
) -> None:
    """Draw the figures of runs again, each with the table it was drawn from."""
    if paper is not None:
        from vlmlayers.figures import draw_all

        for outcome in draw_all(runs, paper):
            typer.echo(outcome.line)
        return
    from vlmlayers.report import write_figures

    for run in runs:
        for path in write_figures(run, formats=tuple(formats or ("svg", "png", "pdf"))):
            typer.echo(str(path))


def main() -> None:
    """Run the command line: 0 done, 2 the user's input is wrong, 1 a fault, 130 stopped."""
    try:
        app()
    except UserError as error:
        typer.echo(f"Error: {printable(str(error))}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo(f"\n{RESUME}", err=True)
        sys.exit(130)
    except OSError as error:
        if error.errno not in DISK:
            raise
        typer.echo(f"Error: {printable(disk_trouble(error))}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
