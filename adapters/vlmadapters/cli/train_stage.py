"""The stage `train` of a study: protocols of the paper, run as the study file says."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from vlmadapters.cli.inputs import read_placements, read_recipes
from vlmadapters.cli.stages import (
    check_classes,
    library_options,
    load,
    method_files,
    method_name,
    recipe_files,
    recipe_name,
)
from vlmadapters.protocols.options import TrainOptions
from vlmadapters.protocols.table import protocol_of
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.files import files_beside
from vlmlayers.manifests import Manifest, distinct
from vlmlayers.options import validated
from vlmlayers.placement import is_choice
from vlmlayers.words import counted

LOG = logging.getLogger(__name__)
# What decides which images test; the results table has no column for it.
TESTED_BY = ("items", "present_only", "skip_unreadable")


class TrainPart(TrainOptions):
    """One table `[[train]]`.

    Attributes:
        datasets: Trained on, each by itself; those of the study where empty.
        targets: Tested by transfer.
        method: Name of a method, or several, each trained with its own recipe.
        recipe: Name of a recipe, or a TOML file beside the study; or one for each of some methods,
            as in `{ maple = "transfer" }`; the backbone's where absent.
        set: Values of the recipes or methods; a file may lie beside the study.
        placements: Such as `5-12`, or `maple:1-9` for one of several methods; `choice` is the
            study's own choice; the recipe's where empty.
    """

    datasets: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    method: str | tuple[str, ...] = "mma"
    recipe: str | dict[str, str] | None = None
    set: dict[str, Any] = Field(default_factory=dict)
    placements: tuple[str, ...] = ()

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods as a tuple."""
        return (self.method,) if isinstance(self.method, str) else self.method

    @property
    def recipes(self) -> dict[str, str]:
        """The recipe of each method; empty for the one that the method has for the backbone."""
        if isinstance(self.recipe, str):
            return dict.fromkeys(self.methods, self.recipe)
        return {method: (self.recipe or {}).get(method, "") for method in self.methods}


def parts(tables: Any, base: Path = Path()) -> list[TrainPart]:
    """Return the tables `[[train]]` of a study, checked as far as no data are needed.

    Args:
        tables: The tables.
        base: Folder of the study, where files of recipes and methods may lie.

    Raises:
        UserError: A key, protocol, recipe, dataset, placement or value is wrong.
    """
    found = []
    for table in tables:
        part = validated(TrainPart, table, "[[train]]")
        protocol_of(part.protocol, part.targets, "[[train]]")
        if isinstance(part.recipe, dict):
            for method in part.recipe:
                check_one_of("method", method, part.methods, where="recipe of [[train]]")
        placed = [one for one in part.placements if not is_choice(one)]
        read_placements(_recipes(base, part), placed)
        found.append(part)
    return found


def _methods(base: Path, part: TrainPart) -> list[str]:
    return [method_name(base, one) for one in part.methods]


def _recipes(base: Path, part: TrainPart, model: Any = "") -> list[Any]:
    """Return the recipe of each method of a table with its values set, for a model."""
    named = part.recipes.items()
    names = {method_name(base, one): recipe_name(base, name) for one, name in named}
    return read_recipes(names, files_beside(base, part.set), _methods(base, part), model)


def _sources(context: Any, part: TrainPart) -> list[Manifest]:
    """Return what a table trains on: of the study's own datasets those that were extracted."""
    return [load(context, name) for name in part.datasets] or list(context.extracted_manifests)


def _targets(context: Any, part: TrainPart) -> list[Manifest]:
    return [load(context, name) for name in part.targets]


def _tested(context: Any, part: TrainPart) -> list[Manifest]:
    """Return what a table may test on, also where an earlier run left some of it out."""
    own = [load(context, name) for name in part.datasets] or context.manifests
    return [*own, *_targets(context, part)]


def _refuse_other_images(context: Any, found: Sequence[TrainPart]) -> None:
    """Refuse tables that test one dataset by one protocol on different images.

    All of them are one table of results, where these would pass for the same.
    """
    first: dict[tuple[str, str], tuple[int, dict[str, Any]]] = {}
    for number, part in enumerate(found, 1):
        asked = library_options(context, part, TrainOptions)
        for one in _tested(context, part):
            other, theirs = first.setdefault((part.protocol, one.name), (number, asked))
            for key in TESTED_BY:
                if theirs[key] != asked[key]:
                    raise UserError(
                        f"tables {other} and {number} of [[train]] test {one.name} by "
                        f"{part.protocol} on different images: {key} is {theirs[key]} and "
                        f"{asked[key]}; give them one {key}"
                    )


@dataclass(frozen=True)
class TrainStage:
    """The stage `train`; called with the `StageContext` of a study, it does each table's work."""

    def check(self, context: Any) -> None:
        """Check the tables and their datasets before the study's first stage."""
        found = parts(context.study.train, context.base)
        named = [one for part in found for one in _tested(context, part)]
        check_classes(context, distinct(named, context.data_root))
        _refuse_other_images(context, found)

    def datasets(self, context: Any) -> list[Manifest]:
        """Return what the tables train and test on; the stage is run again where one changed."""
        found = parts(context.study.train, context.base)
        named = [
            one for part in found for one in (*_sources(context, part), *_targets(context, part))
        ]
        return distinct(named, context.data_root)

    def files(self, context: Any) -> list[Path]:
        """Return the files of recipes, of methods that do not ship, and those that these read.

        The stage is run again where one has changed.
        """
        found = parts(context.study.train, context.base)
        names = [name for one in found for name in one.recipes.values()]
        methods = dict.fromkeys(name for one in found for name in _methods(context.base, one))
        recipes = [recipe for one in found for recipe in _recipes(context.base, one)]
        read = [file for recipe in recipes for file in recipe.files]
        return recipe_files(context, names) + method_files(list(methods)) + read

    def __call__(self, context: Any) -> None:
        """Train and test by each table `[[train]]`; write `results.csv` into the run folder.

        Cells, trained adapters and the table of each protocol lie under `training/`. A stopped run
        resumes where it was.
        """
        import pandas as pd

        from vlmadapters.protocols.results import KEY
        from vlmadapters.validation.methods import methods_verdict
        from vlmlayers.files import write_csv
        from vlmlayers.runs import environment
        from vlmlayers.study.stages import model_record

        found = parts(context.study.train, context.base)
        model = context.load_model()
        tables = [_run(context, model, part, number) for number, part in enumerate(found, 1)]
        table = pd.concat(tables, ignore_index=True)
        # Zero-shot CLIP stands in several, of the same images as `check` sees to.
        for key in ("template", "precision"):
            if (table.groupby([*KEY], dropna=False)[key].nunique() > 1).any():
                LOG.warning("tables [[train]] differ in %s; zero-shot rows are of the first", key)
        table = table.drop_duplicates(KEY, ignore_index=True)
        path = write_csv(context.run.results, table)
        context.run.record(train={"model": model_record(model), "environment": environment()})
        if verdict := methods_verdict(table):
            context.echo(f"train    {verdict}")
        context.echo(f"train    {counted(len(table), 'result')}: {path}")


def _run(context: Any, model: Any, part: TrainPart, number: int) -> Any:
    from vlmadapters.protocols.train import tell_of_choice
    from vlmadapters.protocols.train import train as library

    recipes = _recipes(context.base, part, model)
    choice = context.run.choice if any(map(is_choice, part.placements)) else None
    sources, targets = _sources(context, part), _targets(context, part)
    tell_of_choice(choice, model, [*sources, *targets])
    context.doing(f"train    {part.protocol} on {', '.join(one.name for one in sources)}")
    return library(
        model,
        sources,
        recipes,
        context.run.folder / "training" / f"{number}-{part.protocol}",
        configs=read_placements(recipes, part.placements, choice),
        targets=targets,
        root=context.data_root,
        save_adapters=True,
        progress=context.progress,
        **library_options(context, part, TrainOptions),
    )


train = TrainStage()
