"""The stage `train` of a study: protocols of the paper, run as the study file says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from vlmadapters.cli.options import CHOICE, read_placements, read_recipes
from vlmlayers.errors import check_one_of
from vlmlayers.manifests import Manifest, distinct
from vlmlayers.options import Options, validated


class TrainPart(Options):
    """One table `[[train]]`.

    Attributes:
        protocol: Name of a protocol.
        datasets: Trained on, each by itself; those of the study where empty.
        targets: Tested by transfer.
        method: Name of a method, or several, each trained with its own recipe.
        recipe: Name of a recipe, or a TOML file beside the study; or one for each method that does
            not take `published`, as in `{ maple = "transfer" }`.
        set: Values of the recipes or methods.
        placements: Such as `5-12`, or `maple:1-9` for one of several methods; `choice` is the
            study's own choice; the recipe's where empty.
        seeds: Of draw, initialisation, order and views.
        together: Placements trained side by side.
        limit: Use at most so many test items of each dataset; 0 uses all.
        workers: Threads that decode images; what suits the machine where absent.
        present_only: Leave out items whose image is not on disk; as in the extraction where None.
        skip_unreadable: Leave out images that cannot be read; as in the extraction where None.
    """

    protocol: str = "base-to-novel"
    datasets: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    method: str | tuple[str, ...] = "mma"
    recipe: str | dict[str, str] = "published"
    set: dict[str, Any] = Field(default_factory=dict)
    placements: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (1, 2, 3)
    together: int = 12
    limit: int = 0
    workers: int | None = Field(None, ge=0)
    present_only: bool | None = None
    skip_unreadable: bool | None = None

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods as a tuple."""
        return (self.method,) if isinstance(self.method, str) else self.method

    @property
    def recipes(self) -> dict[str, str]:
        """The recipe of each method."""
        if isinstance(self.recipe, str):
            return dict.fromkeys(self.methods, self.recipe)
        return {method: self.recipe.get(method, "published") for method in self.methods}


def parts(tables: Any) -> list[TrainPart]:
    """Return the tables `[[train]]` of a study, checked as far as no data are needed.

    Raises:
        UserError: A key, protocol, recipe, dataset, placement or value is wrong.
    """
    from vlmadapters.protocols.table import protocol_of

    found = []
    for table in tables:
        part = validated(TrainPart, table, "[[train]]")
        protocol_of(part.protocol, part.targets, "[[train]]")
        if not isinstance(part.recipe, str):
            for method in part.recipe:
                check_one_of("method", method, part.methods, where="recipe of [[train]]")
        if not any(name.endswith(".toml") for name in part.recipes.values()):
            recipes = read_recipes(part.recipes, part.set, part.methods)
            read_placements(recipes, [one for one in part.placements if not _is_choice(one)])
        found.append(part)
    return found


def _is_choice(placement: str) -> bool:
    return placement.rpartition(":")[2] == CHOICE


def check(context: Any) -> None:
    """Check the tables and the names of their datasets before the study's first stage."""
    parts(context.study.train)
    datasets(context)


def datasets(context: Any) -> list[Manifest]:
    """Return what the tables train and test on; the stage is run again where one has changed."""
    names = [
        name
        for table in context.study.train
        for name in (*table.get("datasets", ()), *table.get("targets", ()))
    ]
    without = any(not table.get("datasets") for table in context.study.train)
    own = context.manifests if without else []
    return distinct([*own, *_loaded(context, names)], context.data_root)


def files(context: Any) -> list[Path]:
    """Return the files of recipes; the stage is run again where one has changed."""
    named = (name for part in parts(context.study.train) for name in part.recipes.values())
    found = dict.fromkeys(recipe_name(context, name) for name in named)
    return [Path(name) for name in found if name.endswith(".toml")]


def recipe_name(context: Any, name: str) -> str:
    """Return the name of a recipe, or its TOML file, which may lie beside the study."""
    local = Path(context.base) / name
    return str(local) if name.endswith(".toml") and local.exists() else name


def _loaded(context: Any, names: Sequence[str]) -> list[Manifest]:
    return [Manifest.load(context.dataset_name(name)) for name in names]


def train(context: Any) -> None:
    """Train and test by each table `[[train]]`; write `results.csv` into the run folder.

    Cells, trained adapters and the table of each protocol lie under `training/`. A stopped run
    resumes where it was.

    Args:
        context: `vlmlayers.study.StageContext`.

    Raises:
        UserError: A table is wrong, or a dataset is not there.
    """
    import pandas as pd

    from vlmadapters.protocols.results import KEY
    from vlmadapters.validation.methods import methods_verdict
    from vlmlayers.files import write_csv
    from vlmlayers.runs import environment
    from vlmlayers.study.stages import model_record

    found = parts(context.study.train)
    model = context.load_model()
    tables = [_run(context, model, part, number) for number, part in enumerate(found, 1)]
    table = pd.concat(tables, ignore_index=True)
    table = table.drop_duplicates(KEY, ignore_index=True)  # zero-shot CLIP stands in several
    path = write_csv(context.run.folder / "results.csv", table)
    context.run.record(train={"model": model_record(model), "environment": environment()})
    if verdict := methods_verdict(table):
        context.echo(f"train    {verdict}")
    context.echo(f"train    {len(table)} results: {path}")


def _run(context: Any, model: Any, part: TrainPart, number: int) -> Any:
    from vlmadapters.protocols.experiment import Experiment

    names = {method: recipe_name(context, name) for method, name in part.recipes.items()}
    recipes = read_recipes(names, part.set, part.methods)
    choice = context.run.choice if any(map(_is_choice, part.placements)) else None
    configs = read_placements(recipes, part.placements, choice)
    sources = _loaded(context, part.datasets) if part.datasets else context.extracted_manifests
    context.doing(f"train    {part.protocol} on {', '.join(one.name for one in sources)}")
    left_out = part.model_dump(include={"present_only", "skip_unreadable"})
    experiment = Experiment(
        part.protocol,
        model,
        recipes,
        context.run.folder / "training" / f"{number}-{part.protocol}",
        root=context.data_root,
        targets=_loaded(context, part.targets),
        limit=part.limit,
        workers=part.workers,
        **{key: context.leaving_out[key] if own is None else own for key, own in left_out.items()},
        save_adapters=True,
        progress=context.progress,
    )
    return experiment.run(sources, configs, part.seeds, together=part.together)
