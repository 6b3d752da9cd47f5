"""The stage `validate` of a study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from vlmadapters.cli.options import read_recipes
from vlmadapters.cli.train_stage import recipe_name
from vlmlayers.manifests import Manifest, distinct
from vlmlayers.options import Options, Several, validated


class ValidatePart(Options):
    """The table `[validate]`; what is not named is as in `vlmadapters.validate`.

    Attributes:
        datasets: Trained on; those of the study where absent.
        method: Name of the method.
        recipe: Name of a recipe, or a TOML file beside the study; the backbone's where absent.
        set: Values of the recipe or the method.
        kinds: Competitors.
        seeds: Of draw, initialisation, order and views.
        shots: Items per class; the recipe's where absent.
        reference: Kind that the verdict compares with.
        random_count: Random placements of equal size.
        together: Placements trained side by side.
        limit: Use at most so many test items of each dataset; 0 uses all.
        workers: Threads that decode images.
        present_only: Leave out items whose image is not on disk; as in the extraction where absent.
        skip_unreadable: Leave out images that cannot be read; as in the extraction where absent.
    """

    datasets: Several[str] | None = None
    method: str = "mma"
    recipe: str | None = None
    set: dict[str, Any] = Field(default_factory=dict)
    kinds: Several[str] | None = None
    seeds: Several[int] | None = None
    shots: int | None = Field(None, ge=1)
    reference: str | None = None
    random_count: int | None = Field(None, ge=0)
    together: int | None = Field(None, ge=1)
    limit: int | None = Field(None, ge=0)
    workers: int | None = Field(None, ge=0)
    present_only: bool | None = None
    skip_unreadable: bool | None = None

    def passed(self) -> dict[str, Any]:
        """Return what is handed on to `vlmadapters.validate` as it is."""
        own = {"datasets", "method", "recipe", "set"}
        return self.model_dump(exclude=own, exclude_none=True)


def check(context: Any) -> None:
    """Check the table `[validate]`, its recipe and its datasets, before the study's first stage.

    Args:
        context: `vlmlayers.study.StageContext`.

    Raises:
        UserError: A key or name is unknown, or a value has the wrong type.
    """
    part = _part(context)
    name = recipe_name(context, part.recipe or "published")
    read_recipes(name, part.set, [part.method])
    datasets(context)


def datasets(context: Any) -> list[Manifest]:
    """Return the datasets to train on; the study's own where none are named.

    The stage is run again where one of them has changed.
    """
    known = {manifest.name: manifest for manifest in context.manifests}
    names = _part(context).datasets
    if names is None:
        return list(context.extracted_manifests)
    found = [known.get(name) or Manifest.load(context.dataset_name(name)) for name in names]
    return distinct(found, context.data_root)


def files(context: Any) -> list[Path]:
    """Return the file of the recipe; the stage is run again where it has changed."""
    name = recipe_name(context, _part(context).recipe or "")
    return [Path(name)] if name.endswith(".toml") else []


def validate(context: Any) -> None:
    """Train at the choice of a run and at its competitors; write `validation*` into its folder.

    Args:
        context: `vlmlayers.study.StageContext`.

    Raises:
        UserError: A key or name is unknown, or a value has the wrong type.
    """
    from vlmadapters.validation import validate as library

    part = _part(context)
    model = context.load_model()
    name = recipe_name(context, part.recipe) if part.recipe else None
    (recipe,) = read_recipes(name, part.set, [part.method], model.name)
    found = library.validate(
        model,
        context.choice,
        datasets(context),
        scores=context.scores,
        recipe=recipe,
        out=context.run.folder,
        root=context.data_root,
        seed=context.seed,
        progress=context.progress,
        notes={"chosen_on": _chosen_on(context)},
        **{**context.leaving_out, **part.passed()},
    )
    cells = f"{found.table['placement'].nunique()} placements, {len(found.table)} cells"
    context.echo(f"validate {cells}: {found.verdict}")


def _part(context: Any) -> ValidatePart:
    return validated(ValidatePart, context.options, "[validate]")


def _chosen_on(context: Any) -> dict[str, str]:
    """Return the split that each dataset was analysed on: a choice made on test images says so."""
    return {data.manifest.name: str(data.options["split"]) for data in context.datasets}
