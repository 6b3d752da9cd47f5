"""The verb `validate` of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vlmadapters.cli.inputs import (
    Method,
    RecipeName,
    Settings,
    TrainedOn,
    check_blocks,
    check_inputs,
    load_backbone,
    read_recipes,
)
from vlmadapters.validation.options import ValidateOptions
from vlmlayers.cli.options import DataRoot, Device, Model, with_options
from vlmlayers.errors import UserError
from vlmlayers.extraction import WeightsOptions
from vlmlayers.options import parse_settings
from vlmlayers.placement import Placement
from vlmlayers.runs import Run, score_table
from vlmlayers.words import counted

SHOWN = 5  # scores whose rank correlation the terminal lists


@with_options
def validate(
    *,
    model: Model,
    datasets: TrainedOn,
    out: Annotated[
        Path,
        typer.Option(
            help="Folder of validation.csv and the cells; a run folder will do.", file_okay=False
        ),
    ],
    weights: WeightsOptions,
    choice: Annotated[
        Path | None,
        typer.Option(help="A choice.json, or a run folder, whose scores are then read as well."),
    ] = None,
    placement: Annotated[
        str | None, typer.Option(help="Blocks in place of a choice, as in 5-12 or v5-12,t7-12.")
    ] = None,
    scores: Annotated[
        Path | None, typer.Option(help="Score table that outcomes are predicted from.")
    ] = None,
    options: ValidateOptions,
    seed: Annotated[
        int, typer.Option(help="Seed of random placements and of resampling, not of trainings.")
    ] = 0,
    recipe: RecipeName = None,
    settings: Settings = None,
    method: Method = "mma",
    device: Device = "auto",
    data_root: DataRoot = None,
) -> None:
    """Train at the chosen layers and elsewhere: was the choice good?

    A stopped run resumes with the same command. Several processes may share the work: start the
    same command twice.
    """
    chosen = _choice(choice, placement)
    # The scores that a choice was made from are those whose predictions are of interest.
    if scores is None and choice is not None and choice.is_dir():
        scores = choice
    if scores is not None:
        score_table(scores)  # that it is there; it is read once nothing else can be wrong
    from vlmadapters.validation.competitors import chosen_placement

    values = parse_settings(settings or [])
    (made,) = read_recipes(recipe, values, [method], model)
    placed = chosen_placement(made.method, chosen)  # refused before torch is imported
    check_inputs(model, weights, datasets, data_root)
    check_blocks(model, placed)
    from vlmadapters.cli.terminal import RANDOM, wrapped
    from vlmadapters.validation.validate import validate as run
    from vlmlayers.scores import read_scores

    loaded = load_backbone(model, weights, device)
    found = run(
        loaded,
        chosen,
        datasets,
        scores=None if scores is None else read_scores(scores),
        recipe=made,
        out=out,
        root=data_root,
        seed=seed,
        **dict(options),
    )
    if loaded.random_weights:
        typer.echo(RANDOM)
    typer.echo(wrapped(found.verdict) if found.void else _text(found, out))
    asked = {"datasets": datasets, "method": method, "recipe": recipe, "set": values, "seed": seed}
    # What decides only how fast it is stays out; which images count does not.
    asked |= options.model_dump(exclude={"together", "workers"})
    # In place of what a study of the run asked for: the files are no longer of that.
    given = {key: one for key, one in asked.items() if one is not None}
    Run(out).finish("validate", validate=given)
    if found.void:
        # No mistake of the user's, but a script should not take it for a result.
        raise typer.Exit(2)


def _choice(choice: Path | None, placement: str | None) -> Any:
    from vlmlayers.selection import LayerChoice

    if (choice is None) == (placement is None):
        raise UserError("name exactly one of --choice and --placement")
    if placement is not None:
        return Placement.parse(placement)
    assert choice is not None
    return LayerChoice.load(choice)


def _text(found: Any, out: Path) -> str:
    from vlmadapters.cli.terminal import labelled, wrapped

    named = found.placements["placement"] + " (" + found.placements["kind"] + ")"
    columns = ["base", "novel", "hm", "difference", "parameters"]
    lines = [wrapped(found.verdict)]  # how far a ranking repeats is said before it is shown
    lines.append(labelled(found.placements[columns].set_index(named.rename(None)), 2))
    lines.append("difference: of the harmonic mean (hm) to the chosen placement, in points")
    if found.untuned is not None:
        told = found.summary["untuned"]
        warning = f" WARNING: {told['warning']}." if told["warning"] else ""
        lines.append(wrapped(f"All at the recipe's amount: {told['verdict']}{warning}"))
    if found.correlations is not None and len(found.correlations):
        shown = found.correlations.head(SHOWN).set_index("score")
        lines.append(labelled(shown[["tau", "low", "high", "p_holm"]], 2))
        count = len(found.correlations)
        more = f", the {SHOWN} highest of {count}" if count > SHOWN else ""
        lines.append(wrapped(f"tau: of a score with the trained hm{more}; p_holm: of all scores"))
    if said := found.summary.get("predictors"):
        lines.append(wrapped(said))
    return "\n".join([*lines, f"{counted(len(found.table), 'cell')}, {out / 'validation.csv'}"])
