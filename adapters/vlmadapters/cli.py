"""The verbs `train` and `evaluate` of the command line; each is one call of the library."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vlmlayers.errors import UserError

DataRoot = Annotated[
    Path | None,
    typer.Option(
        "--data-root", help="Folder that the datasets lie in; else VLMLAYERS_DATA, else ./data."
    ),
]
Model = Annotated[
    str,
    typer.Argument(
        help="Architecture, mini-clip, or a folder with open_clip_config.json and weights."
    ),
]
Pretrained = Annotated[str | None, typer.Option(help="Tag or checkpoint file.")]
RandomWeights = Annotated[
    bool, typer.Option("--random-weights", help="An untrained model; every output says so.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, …")]
Limit = Annotated[int, typer.Option(help="Test items per dataset, 0 for all.")]
Workers = Annotated[int, typer.Option(help="Threads that decode images.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]


def train(
    model: Model,
    datasets: Annotated[
        list[str], typer.Argument(help="Datasets trained on: names, TOML files or image folders.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of cells, adapters and results.csv.")],
    protocol: Annotated[
        str, typer.Option(help="base-to-novel, few-shot, cross-dataset or domain-generalization.")
    ] = "base-to-novel",
    target: Annotated[
        list[str] | None, typer.Option(help="Dataset tested by transfer; repeatable.")
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(
            help="published, published-imagenet, published-transfer, mini, or a TOML file.",
        ),
    ] = "published",
    placement: Annotated[
        list[str] | None,
        typer.Option(
            help="Blocks, as in 5-12 or v5-12,t7-12; repeatable; the recipe's where absent."
        ),
    ] = None,
    choice: Annotated[Path | None, typer.Option(help="A choice.json to train at.")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, as in 1,2,3.")] = "1,2,3",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            "-s",
            metavar="KEY=VALUE",
            help="A value of the recipe or the adapter, as in lr=0.03 or scale=0.1; repeatable.",
        ),
    ] = None,
    together: Annotated[int, typer.Option(help="Placements trained side by side.")] = 12,
    pretrained: Pretrained = None,
    random_weights: RandomWeights = False,
    device: Device = "auto",
    limit: Limit = 0,
    workers: Workers = 0,
    data_root: DataRoot = None,
    published: Annotated[
        bool, typer.Option("--published", help="Show published numbers beside ours.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Train MMA by a protocol of the paper and test it, beside zero-shot CLIP.

    A stopped run goes on with the same command. Several GPUs:
    `torchrun --nproc-per-node N -m vlmadapters.cli train …`.
    """
    from vlmadapters import parallel
    from vlmadapters.protocols import Experiment

    made = _recipe(recipe, settings or [])
    configs = _placements(made.adapter, placement or [], choice)
    with parallel.process_group() as (rank, _):
        loaded = _load(model, pretrained, random_weights, device)
        experiment = Experiment(
            protocol,
            loaded,
            made,
            out,
            root=data_root,
            targets=target or (),
            limit=limit,
            workers=workers,
            save_adapters=True,
            progress=not quiet and rank == 0,
        )
        table = experiment.run(datasets, configs, _seeds(seeds), together=together)
    if rank == 0:
        typer.echo(_text(table, published))
        typer.echo(f"results {out / 'results.csv'}")


def evaluate(
    model: Model,
    datasets: Annotated[list[str], typer.Argument(help="Datasets tested.")],
    out: Annotated[Path | None, typer.Option(help="results.csv to write.")] = None,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(
            help="Trained adapter: .safetensors of ours or the authors' .pth.tar; repeatable. None "
            "evaluates zero-shot CLIP alone."
        ),
    ] = None,
    kind: Annotated[
        list[str] | None, typer.Option(help="Classes tested: all, base or novel; repeatable.")
    ] = None,
    template: Annotated[str, typer.Option(help="Prompt template.")] = "a photo of a {}.",
    scale: Annotated[
        float,
        typer.Option(help="Scale of an adapter in the authors' layout, which does not store it."),
    ] = 0.001,
    pretrained: Pretrained = None,
    random_weights: RandomWeights = False,
    device: Device = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")] = "auto",
    limit: Limit = 0,
    workers: Workers = 0,
    data_root: DataRoot = None,
    quiet: Quiet = False,
) -> None:
    """Test zero-shot CLIP and trained adapters on datasets."""
    from vlmadapters.checkpoints import atomically
    from vlmadapters.targets import evaluate_adapters

    loaded = _load(model, pretrained, random_weights, device)
    adapters = {path: _adapter(path, loaded, scale) for path in adapter or []}
    table = evaluate_adapters(
        loaded,
        datasets,
        adapters,
        kinds=kind or ["all"],
        template=template,
        root=data_root,
        precision=precision,
        limit=limit,
        workers=workers,
        progress=not quiet,
    )
    typer.echo(_text(table, False))
    if out is not None:
        atomically(out, lambda part: table.to_csv(part, index=False))
        typer.echo(f"results {out}")


def _adapter(path: Path, model: Any, scale: float) -> Any:
    from dataclasses import replace

    from vlmadapters.checkpoints import load_adapter, load_official

    if path.suffix == ".safetensors":
        return load_adapter(path, model)
    made = load_official(path, model.clip)
    made.config = replace(made.config, scale=scale)
    return made


def _load(model: str, pretrained: str | None, random_weights: bool, device: str) -> Any:
    from vlmadapters.parallel import local_device
    from vlmlayers.models import load_model

    return load_model(
        model,
        pretrained,
        random_weights=random_weights,
        device=local_device() if device == "auto" else device,
    )


def _recipe(name: str, settings: list[str]) -> Any:
    from dataclasses import fields

    from vlmadapters.recipes import TrainConfig, load_recipe
    from vlmlayers.errors import check_one_of

    own = [f.name for f in fields(TrainConfig) if f.name not in ("savings", "scale")]
    values: dict[str, Any] = {}
    for setting in settings:
        key, mark, text = setting.partition("=")
        check_one_of("key", key, [*own, "dim", "scale", "crop_scale"], where="--set")
        if not mark:
            raise UserError(f"--set {setting!r} has no value; write KEY=VALUE")
        values[key] = _value(key, text)
    # `scale` on the command line is the adapter's; the crop's range is `crop_scale`.
    adapter: dict[str, Any] = {key: values.pop(key) for key in ("dim", "scale") if key in values}
    if "crop_scale" in values:
        values["scale"] = values.pop("crop_scale")
    return load_recipe(name).changed(values, adapter)


def _value(key: str, text: str) -> Any:
    if key in ("template", "precision"):
        return text
    try:
        if key == "crop_scale":
            low, high = text.split(",")
            return float(low), float(high)
        whole = ("epochs", "batch_size", "shots", "cached_views", "save_every", "dim")
        return int(text) if key in whole else float(text)
    except ValueError:
        raise UserError(f"--set {key}={text}: {text!r} is not a number of the right kind") from None


def _placements(adapter: Any, placements: list[str], choice: Path | None) -> list[Any]:
    from vlmadapters.config import MMAConfig, parse_placement

    configs = [adapter.with_placement(*parse_placement(text)) for text in placements]
    if choice is not None:
        configs.append(MMAConfig.from_choice(choice, dim=adapter.dim, scale=adapter.scale))
    return configs or [adapter]


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--seeds {text!r} is not a list of whole numbers such as 1,2,3") from None


def _text(table: Any, published: bool) -> str:
    from vlmadapters.results import summarise, with_published
    from vlmlayers.manifests import Manifest

    summary = summarise(table)
    if published:
        names = set(summary["dataset"]) & set(Manifest.names())
        summary = with_published(summary, {name: Manifest.load(name).title for name in names})
    shown = summary.copy()
    for column in ("mean", "sd"):
        shown[column] = [f"{100 * v:.2f}" if v == v else "" for v in shown[column]]
    columns = ["method", "placement", "dataset", "metric", "mean", "sd", "seeds", "note"]
    lines = [shown[columns].to_string(index=False)]
    if bool(table["random_weights"].any()):
        lines.insert(0, "The backbone has RANDOM weights: these numbers say nothing about a model.")
    return "\n".join(lines)


if __name__ == "__main__":  # what torchrun starts, as in `torchrun -m vlmadapters.cli train …`
    from vlmlayers.cli import main

    main()
