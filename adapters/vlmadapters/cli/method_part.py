"""What the tables of stages that train one method have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from vlmadapters.cli.options import read_recipes
from vlmadapters.cli.train_stage import recipe_name
from vlmlayers.manifests import Manifest, distinct
from vlmlayers.options import Options, Several


class MethodPart(Options):
    """A table of a study that trains one method on some datasets.

    Attributes:
        datasets: Trained on; those of the study where absent.
        method: Name of the method.
        recipe: Name of a recipe, or a TOML file beside the study; the backbone's where absent.
        set: Values of the recipe or the method.
        seeds: Of draw, initialisation, order and views.
        shots: Items per class; the recipe's where absent.
        together: Settings trained side by side.
        workers: Threads that decode images; what suits the machine where absent.
        present_only: Leave out items whose image is not on disk; as in the extraction where absent.
        skip_unreadable: Leave out images that cannot be read; as in the extraction where absent.
    """

    datasets: Several[str] | None = None
    method: str = "mma"
    recipe: str | None = None
    set: dict[str, Any] = Field(default_factory=dict)
    seeds: Several[int] | None = None
    shots: int | None = Field(None, ge=1)
    together: int | None = Field(None, ge=1)
    workers: int | None = Field(None, ge=0)
    present_only: bool | None = None
    skip_unreadable: bool | None = None

    def passed(self, context: Any) -> dict[str, Any]:
        """Return what is handed on to the library as it is; what is absent is left to it."""
        own = {"datasets", "method", "recipe", "set"}
        return {**context.leaving_out, **self.model_dump(exclude=own, exclude_none=True)}

    def manifests(self, context: Any) -> list[Manifest]:
        """Return the datasets to train on; the study's own where none are named."""
        if self.datasets is None:
            return list(context.extracted_manifests)
        known = {manifest.name: manifest for manifest in context.manifests}
        found = [
            known.get(name) or Manifest.load(context.dataset_name(name)) for name in self.datasets
        ]
        return distinct(found, context.data_root)

    def files(self, context: Any) -> list[Path]:
        """Return the file of the recipe, where it is one."""
        name = recipe_name(context, self.recipe or "")
        return [Path(name)] if name.endswith(".toml") else []

    def read_recipe(self, context: Any, model: str = "") -> Any:
        """Return the recipe with its values set; that of a model where none is named."""
        name = recipe_name(context, self.recipe) if self.recipe else None
        return read_recipes(name, self.set, [self.method], model)[0]
