"""The verb `search` of the command line."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmadapters.cli.options import (
    Method,
    RecipeName,
    Settings,
    Together,
    Workers,
    check_inputs,
    load_backbone,
    read_recipes,
    read_seeds,
)
from vlmlayers.cli.options import (
    DataRoot,
    Device,
    Model,
    PresentOnly,
    SkipUnreadable,
    Weights,
    named,
    repeated,
    several,
    with_weights,
)
from vlmlayers.errors import UserError, check_one_of


@with_weights
def search(
    model: Model,
    datasets: Annotated[
        list[str], named("Datasets searched on: names, TOML files or image folders.")
    ],
    out: Annotated[
        Path, typer.Option(help="Folder of search.csv, search.json and the cells; a run folder.")
    ],
    weights: Weights,
    method: Method = "mma",
    budget: Annotated[
        float | None,
        typer.Option(
            help="Largest cost, in multiples of one full training; all where absent.",
            show_default=False,
        ),
    ] = None,
    placement: Annotated[
        list[str] | None,
        repeated(
            "Blocks to try beside the default, as in 9-12; the usual ones where absent.",
            metavar="PLACE",
        ),
    ] = None,
    amount: Annotated[
        list[str] | None,
        repeated(
            "Amount to try, as in scale=0.3,epochs=15; multiples of the recipe's where absent.",
            metavar="AMOUNT",
        ),
    ] = None,
    criterion: Annotated[
        str, typer.Option(help="log_likelihood, base_log_likelihood or accuracy, held out.")
    ] = "log_likelihood",
    folds: Annotated[
        int, typer.Option(help="Folds of each draw; more tell smaller differences.")
    ] = 8,
    novel: Annotated[
        bool, typer.Option(help="Hold out half of the base classes whole as well.")
    ] = True,
    seeds: Annotated[list[str] | None, several("Seeds; 1 where absent.")] = None,
    recipe: RecipeName = None,
    settings: Settings = None,
    together: Together = 12,
    device: Device = "auto",
    workers: Workers = None,
    present_only: PresentOnly = False,
    skip_unreadable: SkipUnreadable = False,
    data_root: DataRoot = None,
) -> None:
    """Find how much and where to train, from training shots of base classes alone.

    A stopped search resumes with the same command. `vlmlayers train --placement` takes the setting
    that it picks.
    """
    from vlmadapters.validation.judge import CRITERIA
    from vlmlayers.options import parse_settings
    from vlmlayers.placement import Amount, Placement

    check_one_of("criterion", criterion, CRITERIA, where="--criterion")
    if folds < 2 or (budget is not None and budget <= 0):
        raise UserError("--folds takes 2 or more, --budget a number above 0")
    for one in placement or []:
        Placement.parse(one)
    for one in amount or []:
        Amount.parse(one)
    (made,) = read_recipes(recipe, parse_settings(settings or []), [method], model)
    drawn = read_seeds(seeds)
    check_inputs(model, weights, datasets, data_root)
    from vlmadapters.cli.terminal import RANDOM
    from vlmadapters.validation.candidates import scaled
    from vlmadapters.validation.search import search as run

    loaded = load_backbone(model, weights, device)
    found = run(
        loaded,
        datasets,
        budget=budget,
        placement=placement,
        amounts=amount,
        criterion=criterion,
        folds=folds,
        novel=novel,
        **drawn,
        recipe=scaled(made, {name: tower.depth for name, tower in loaded.towers.items()}),
        out=out,
        root=data_root,
        together=together,
        workers=workers,
        present_only=present_only,
        skip_unreadable=skip_unreadable,
    )
    if loaded.random_weights:
        typer.echo(RANDOM)
    typer.echo(_text(found, out))


def _text(found: Any, out: Path) -> str:
    summary = found.summary
    means = found.table.groupby("setting", sort=False)[
        ["base", "novel", "base_log_likelihood", "novel_log_likelihood"]
    ].mean()
    means.insert(0, "folds", found.table["setting"].value_counts())
    means["difference"] = means.index.map(summary["mean_differences"])
    means = means.sort_values("difference", ascending=False).rename_axis(None)
    means.columns = [name.replace("log_likelihood", "LL") for name in means.columns]
    shown = means.to_string(float_format=lambda value: f"{value:.3f}")
    shown += "\nLL: held-out log-likelihood; difference: of the criterion to the default"
    left_out = [f"left out: {one['setting']} ({one['why']})" for one in summary["skipped"]]
    cost = summary["cost"]
    spent = f"cost {cost['trainings']:.1f} full trainings, {cost['seconds']:.0f} s of training"
    statement = textwrap.fill(found.statement, 80, break_on_hyphens=False)
    return "\n".join([shown, *left_out, statement, f"{spent}, {out / 'search.json'}"])
