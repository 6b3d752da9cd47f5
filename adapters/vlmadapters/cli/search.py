"""The verb `search` of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vlmadapters.cli.inputs import (
    Method,
    RecipeName,
    Settings,
    check_blocks,
    check_inputs,
    depths_of,
    load_backbone,
    read_recipes,
)
from vlmadapters.validation.options import SearchOptions
from vlmlayers.cli.options import DataRoot, Device, Model, named, with_options
from vlmlayers.extraction import WeightsOptions
from vlmlayers.options import parse_settings
from vlmlayers.runs import Run


@with_options
def search(
    model: Model,
    datasets: Annotated[
        list[str], named("Datasets searched on: names, image folders, tables or TOML files.")
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="Folder of search.csv, search.json and the cells; a run folder.", file_okay=False
        ),
    ],
    weights: WeightsOptions,
    options: SearchOptions,
    method: Method = "mma",
    recipe: RecipeName = None,
    settings: Settings = None,
    device: Device = "auto",
    data_root: DataRoot = None,
) -> None:
    """Find how much and where to train, on training shots alone.

    Those of base classes: test images and novel classes are not looked at. A stopped search resumes
    with the same command. `vlmlayers train --placement` takes the setting that it picks.
    """
    values = parse_settings(settings or [])
    (made,) = read_recipes(recipe, values, [method], model)
    from vlmadapters.validation.candidates import check_searchable

    check_searchable(made.method)
    check_inputs(model, weights, datasets, data_root)
    for placed in options.placement or ():
        check_blocks(model, placed)
    # Not before the checks, as torch takes seconds to import.
    from vlmadapters.validation.search import search as run

    loaded = load_backbone(model, weights, device)
    if depths_of(loaded) != depths_of(model):  # from which blocks may follow
        (made,) = read_recipes(recipe, values, [method], loaded)
    found = run(loaded, datasets, recipe=made, out=out, root=data_root, **dict(options))
    typer.echo(_text(found, out))
    Run(out).finish("search")


def _text(found: Any, out: Path) -> str:
    from vlmadapters.cli.terminal import labelled, wrapped

    summary = found.summary
    means = found.table.groupby("setting", sort=False)[
        ["base", "novel", "base_log_likelihood", "novel_log_likelihood"]
    ].mean()
    means = means.dropna(axis=1, how="all")  # no class was held out whole
    means.insert(0, "folds", found.table["setting"].value_counts())
    means["difference"] = means.index.map(summary["mean_differences"])
    means = means.sort_values("difference", ascending=False).rename_axis(None)
    means.columns = [name.replace("log_likelihood", "LL") for name in means.columns]
    shown = labelled(means, 3)
    shown += "\nLL: held-out log-likelihood; difference: of the criterion to the default"
    left_out = [wrapped(f"left out: {one['setting']} ({one['why']})") for one in summary["skipped"]]
    cost = summary["cost"]
    spent = f"cost {cost['trainings']:.1f} full trainings, {cost['seconds']:.0f} s of training"
    statement = wrapped(found.statement)
    return "\n".join([shown, *left_out, statement, f"{spent}, {out / 'search.json'}"])
