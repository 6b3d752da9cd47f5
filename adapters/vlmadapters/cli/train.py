"""The verbs `train` and `evaluate`; each is one call of the library."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmadapters.cli.inputs import (
    RecipeName,
    Settings,
    TrainedOn,
    check_blocks,
    check_inputs,
    depths_of,
    load_backbone,
    read_pairs,
    read_placements,
    read_recipes,
)
from vlmadapters.data.options import DataOptions
from vlmadapters.methods import METHODS
from vlmadapters.methods.config import OURS
from vlmadapters.protocols.options import TrainOptions
from vlmadapters.protocols.table import protocol_of
from vlmlayers.arguments import PRECISIONS, taken
from vlmlayers.cli.options import (
    DataRoot,
    Device,
    Model,
    key_values,
    named,
    repeated,
    several,
    with_options,
)
from vlmlayers.errors import UserError, check_one_of, no_file
from vlmlayers.extraction import WeightsOptions
from vlmlayers.options import parse_settings
from vlmlayers.placement import CHOICE
from vlmlayers.prompts import TEMPLATE, Template

LOG = logging.getLogger(__name__)


@with_options
def train(
    *,
    model: Model,
    datasets: TrainedOn,
    out: Annotated[
        Path, typer.Option(help="Folder of cells, adapters and results.csv.", file_okay=False)
    ],
    weights: WeightsOptions,
    target: Annotated[list[str] | None, several("Dataset tested by transfer.")] = None,
    method: Annotated[
        list[str] | None, several("Method, with its own recipe; mma where absent.")
    ] = None,
    recipe: RecipeName = None,
    placement: Annotated[
        list[str] | None,
        repeated(
            "Blocks, as in 5-12 or v5-12,t7-12, with an amount in 5-12@scale=0.3,epochs=15, "
            "or maple:1-9 for one of several methods; the recipe's where absent.",
            metavar="PLACE",
        ),
    ] = None,
    choice: Annotated[
        Path | None, typer.Option(help="A choice.json, or a run folder, to train at.")
    ] = None,
    pairs: Annotated[
        list[str] | None,
        several(
            "Vision and text block that share a projection, as in 5:7; equal numbers where absent."
        ),
    ] = None,
    options: TrainOptions,
    settings: Settings = None,
    device: Device = "auto",
    data_root: DataRoot = None,
    published: Annotated[
        bool, typer.Option("--published", help="Show published numbers beside ours.")
    ] = False,
) -> None:
    """Train methods by a protocol of the paper, beside zero-shot CLIP.

    A stopped run resumes with the same command. Several processes may share
    the work: start the same command on each GPU.
    """
    protocol_of(options.protocol, target or (), "--protocol")
    places = [*(placement or []), *([CHOICE] if choice is not None else [])]
    read = partial(
        _read,
        recipe=recipe,
        values=parse_settings(settings or []),
        methods=method or ["mma"],
        places=places,
        choice=choice,
        pairs=None if pairs is None else read_pairs(pairs),
    )
    made, placed = read(model)
    check_inputs(model, weights, [*datasets, *(target or ())], data_root)
    for one in placed if places else ():
        check_blocks(model, one.method)
    titles = None
    if published:
        from vlmadapters.protocols.published import published_titles

        titles = published_titles(options.protocol, datasets, target or ())
    # Not before the checks: torch takes seconds to import, and a wrong name is answered at once.
    from vlmadapters.cli.terminal import wrapped
    from vlmadapters.protocols.train import tell_of_choice
    from vlmadapters.protocols.train import train as run
    from vlmadapters.training import processes
    from vlmadapters.validation.methods import methods_verdict

    with processes.process_group() as (rank, _):
        loaded = load_backbone(model, weights, device)
        if depths_of(loaded) != depths_of(model):  # from which blocks may follow
            made, placed = read(loaded)
        tell_of_choice(choice, loaded, [*datasets, *(target or ())])
        table = run(
            loaded,
            datasets,
            made,
            out,
            configs=placed,
            targets=target or (),
            root=data_root,
            save_adapters=True,
            progress=rank == 0,
            **dict(options),
        )
    if rank == 0:
        verdict = methods_verdict(table)
        typer.echo(_text(table, titles, noted=not verdict))
        if verdict:
            typer.echo(wrapped(verdict))
        typer.echo(f"results {out / 'results.csv'}")


@with_options
def evaluate(
    *,
    model: Model,
    datasets: Annotated[list[str], named("Datasets tested.")],
    weights: WeightsOptions,
    out: Annotated[Path | None, typer.Option(help="results.csv to write.", dir_okay=False)] = None,
    adapter: Annotated[
        list[str] | None,
        several(
            "Trained adapter: .safetensors of ours or the authors' .pth.tar; zero-shot CLIP alone "
            "where absent."
        ),
    ] = None,
    kind: Annotated[
        list[str] | None, several("Classes tested: all, base or novel; all where absent.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Method of a file in its authors' layout, mma where absent; or the class of a "
            "method of your own, as my_method.py:Mine."
        ),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            help=f"Prompt template; where absent that which the adapters were trained with, or "
            f"{TEMPLATE!r}."
        ),
    ] = None,
    scale: Annotated[
        float | None,
        typer.Option(
            help="Scale of an adapter in the authors' layout, which does not store it; the "
            "published one where absent. Short for --set scale=."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        key_values(
            "What else the authors' layout does not store, as in class_at=front of CoOp or "
            "ratio=0.6 of CLIP-Adapter."
        ),
    ] = None,
    device: Device = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32, tf32, bf16 or fp16.")] = "auto",
    options: DataOptions,
    data_root: DataRoot = None,
) -> None:
    """Test zero-shot CLIP and trained adapters on datasets."""
    from vlmadapters.data.fewshot import SPLIT_KINDS

    files = [Path(one) for one in adapter or ()]
    given = _unstored(files, method, scale, settings or [])
    if method is not None:
        METHODS.config(method)  # a file's is known from here on
    if template is not None:
        taken("evaluate", "template", Template, template)
    check_one_of("precision", precision, PRECISIONS)
    kinds = kind or ["all"]
    for name in kinds:
        check_one_of("kind of classes", name, SPLIT_KINDS)
    check_inputs(model, weights, datasets, data_root)
    from vlmadapters.data.task import TaskData
    from vlmadapters.files import load_trained
    from vlmadapters.protocols.trained import evaluate_methods
    from vlmlayers.files import write_csv

    loaded = load_backbone(model, weights, device)
    asked = _template(template, files)
    task = None
    if len(datasets) == len(kinds) == 1:  # the authors' layouts leave class names out
        task = TaskData(datasets[0], loaded, data_root).task(kinds[0], asked)
    adapters = {
        path: load_trained(path, loaded, method=method, settings=given, task=task) for path in files
    }
    table = evaluate_methods(
        loaded,
        datasets,
        adapters,
        kinds=kinds,
        template=asked,
        root=data_root,
        precision=precision,
        **dict(options),
    )
    typer.echo(_text(table))
    _tell_precision(files, str(table["precision"].iloc[0]))
    if out is not None:
        write_csv(out, table)
        typer.echo(f"results {out}")


def _unstored(
    files: list[Path], method: str | None, scale: float | None, settings: list[str]
) -> dict[str, Any]:
    """Return the settings that files in their authors' layout leave out.

    Raises:
        UserError: A file is not there, or what is given is for none of them.
    """
    given = parse_settings([*settings, *([] if scale is None else [f"scale={scale!r}"])])
    option = "--scale" if scale is not None else "--set" if given else "--method"
    if (given or method is not None) and not files:
        raise UserError(f"{option} is for an adapter in its authors' layout; name it by --adapter")
    for path in files:
        if not path.is_file():
            raise UserError(f"adapter {path} {no_file(path)}")
        if given and path.suffix == OURS:
            raise UserError(f"{path} holds its settings; {option} is for authors' layouts")
    return given


def _read(
    model: Any,
    *,
    recipe: str | None,
    values: dict[str, Any],
    methods: list[str],
    places: list[str],
    choice: Path | None,
    pairs: tuple[tuple[int, ...], ...] | None,
) -> tuple[list[Any], list[Any]]:
    """Return the recipes and what is trained by them, for a model's name or the loaded one."""
    made = read_recipes(recipe, values, methods, model)
    placed = read_placements(made, places, choice)
    if pairs is None:
        return made, placed
    for method in (one.method for one in placed):
        if "pairs" not in method.settings():
            raise UserError(f"--pairs is for mma; {method.name} shares nothing between its towers")
    # Without a placement the depth tells which blocks there are to pair.
    if not places and depths_of(model) is None:
        return made, placed
    return made, [one.changed({}, {"pairs": pairs}) for one in placed]


def _tell_precision(files: list[Path], now: str) -> None:
    """Warn of adapters that were tested in another precision where they were trained."""
    from vlmadapters.files import read_info

    for path in files:
        then = read_info(path).provenance.get("precision", now) if path.suffix == OURS else now
        if then != now:
            LOG.warning("%s was trained and tested in %s, and is tested in %s here; --precision %s "
                        "does as its training", path, then, now, then)  # fmt: skip


def _template(given: str | None, files: list[Path]) -> str:
    """Return the template to test with: the one given, or that of the adapters' training.

    Raises:
        UserError: None is given, and the adapters were trained with different ones.
    """
    from vlmadapters.files import read_info

    trained = {path: read_info(path).task.template for path in files if path.suffix == OURS}
    if given is None:
        several = list(dict.fromkeys(trained.values()))
        if len(several) > 1:
            raise UserError(
                f"the adapters were trained with {len(several)} templates ({', '.join(several)}); "
                "name one by --template, or test each by itself"
            )
        return several[0] if several else TEMPLATE
    for path, own in trained.items():
        if own != given:
            LOG.warning("%s was trained with %r and is tested with %r", path, own, given)
    return given


def _text(table: Any, titles: dict[str, str] | None = None, *, noted: bool = True) -> str:
    from vlmadapters.cli.terminal import images_text, results_text
    from vlmadapters.protocols.published import with_published
    from vlmadapters.protocols.results import summarise

    summary = summarise(table)
    if titles:
        summary = with_published(summary, titles)
    text = results_text(summary, bool(table["random_weights"].any()), noted=noted)
    return f"{text}\n{images_text(table)}"
