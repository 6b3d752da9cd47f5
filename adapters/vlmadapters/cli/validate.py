"""The verb `validate` of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vlmadapters.cli.options import (
    Limit,
    Method,
    RecipeName,
    Seeds,
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
from vlmlayers.placement import Amount
from vlmlayers.runs import Run, score_table


@with_weights
def validate(
    model: Model,
    datasets: Annotated[
        list[str], named("Datasets trained on: names, TOML files or image folders.")
    ],
    out: Annotated[
        Path, typer.Option(help="Folder of validation.csv and the cells; a run folder will do.")
    ],
    weights: Weights,
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
    kinds: Annotated[
        list[str] | None,
        several(
            "Competitors: paper, all, lower, upper, last, start, single, random, vision, text; "
            "all but single where absent."
        ),
    ] = None,
    amount: Annotated[
        str,
        typer.Option(
            help="tuned: each placement at its own amount, found on training shots, and at the "
            "recipe's beside it; given: at the recipe's alone, several times as fast."
        ),
    ] = "tuned",
    amounts: Annotated[
        list[str] | None,
        repeated(
            "Amount that tuning tries, as in scale=0.3,epochs=15; multiples of the recipe's "
            "where absent.",
            metavar="AMOUNT",
        ),
    ] = None,
    folds: Annotated[int, typer.Option(help="Folds that amounts are tuned on.")] = 4,
    reference: Annotated[str, typer.Option(help="Kind that the verdict compares with.")] = "paper",
    recipe: RecipeName = None,
    settings: Settings = None,
    method: Method = "mma",
    seeds: Seeds = None,
    random_count: Annotated[int, typer.Option(help="Random placements of equal size.")] = 3,
    together: Together = 12,
    device: Device = "auto",
    limit: Limit = 0,
    workers: Workers = None,
    present_only: PresentOnly = False,
    skip_unreadable: SkipUnreadable = False,
    data_root: DataRoot = None,
) -> None:
    """Train at the chosen layers and elsewhere: was the choice good?

    A stopped run resumes with the same command. Several processes may share the work: start the
    same command twice.
    """
    check_one_of("amount", amount, ("tuned", "given"), where="--amount")
    if folds < 2:
        raise UserError("--folds takes 2 or more")
    for one in amounts or []:
        Amount.parse(one)
    chosen = _choice(choice, placement)
    if scores is None and choice is not None and choice.is_dir():
        scores = choice
    if scores is not None:
        score_table(scores)  # that it is there; it is read once nothing else can be wrong
    from vlmadapters.validation.competitors import DEFAULT_KINDS, KINDS, chosen_placement
    from vlmlayers.options import parse_settings

    wanted = kinds or DEFAULT_KINDS
    for kind in (*wanted, reference):
        check_one_of("kind of placement", kind, KINDS)
    values = parse_settings(settings or [])
    (made,) = read_recipes(recipe, values, [method], model)
    chosen_placement(made.method, chosen)  # refused before torch is imported
    drawn = read_seeds(seeds)
    check_inputs(model, weights, datasets, data_root)
    from vlmadapters.cli.terminal import RANDOM
    from vlmadapters.validation.validate import validate as run
    from vlmlayers.scores import read_scores

    loaded = load_backbone(model, weights, device)
    found = run(
        loaded,
        chosen,
        datasets,
        scores=None if scores is None else read_scores(scores),
        kinds=wanted,
        amount=amount,
        amounts=amounts,
        folds=folds,
        **drawn,
        recipe=made,
        out=out,
        root=data_root,
        reference=reference,
        random_count=random_count,
        together=together,
        limit=limit,
        workers=workers,
        present_only=present_only,
        skip_unreadable=skip_unreadable,
    )
    if Run(out).provenance.exists():
        asked = {
            "datasets": datasets,
            "method": method,
            "recipe": recipe,
            "set": values,
            "kinds": kinds,
            "amount": amount,
            "amounts": amounts,
            "folds": folds,
            "reference": reference,
            "random_count": random_count,
            "limit": limit,
            **drawn,
        }
        # In place of what a study of the run asked for: the files are no longer of that.
        Run(out).record(validate={key: one for key, one in asked.items() if one is not None})
    if loaded.random_weights:
        typer.echo(RANDOM)
    if found.void:
        typer.echo(found.verdict)
        raise typer.Exit(2)
    typer.echo(_text(found, out))


def _choice(choice: Path | None, placement: str | None) -> Any:
    from vlmlayers.placement import Placement
    from vlmlayers.selection import LayerChoice

    if (choice is None) == (placement is None):
        raise UserError("name either --choice or --placement, not both and not neither")
    if placement is not None:
        return Placement.parse(placement)
    assert choice is not None
    return LayerChoice.load(choice / "choice.json" if choice.is_dir() else choice)


def _text(found: Any, out: Path) -> str:
    columns = ["placement", "kind", "base", "novel", "hm", "difference", "parameters"]
    shown = {"index": False, "float_format": lambda value: f"{value:.2f}"}
    lines = [found.verdict]  # how far a ranking repeats is said before it is shown
    lines.append(found.placements[columns].to_string(**shown))
    if found.untuned is not None:
        told = found.summary["untuned"]
        warning = f" WARNING: {told['warning']}." if told["warning"] else ""
        lines.append(f"All at the recipe's amount: {told['verdict']}{warning}")
    if found.correlations is not None:
        best = found.correlations.head(5)[["score", "tau", "low", "high", "p"]]
        lines.append(best.to_string(**shown))
    return "\n".join([*lines, f"{len(found.table)} cells, {out / 'validation.csv'}"])
