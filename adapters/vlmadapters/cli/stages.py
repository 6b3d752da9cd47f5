"""What the stages of a study that train have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import Field

from vlmadapters.cli.inputs import read_recipes
from vlmadapters.methods import BUILT_IN, METHODS
from vlmlayers.files import files_beside
from vlmlayers.manifests import Manifest, distinct
from vlmlayers.options import Options, Several, validated
from vlmlayers.prompts import APART
from vlmlayers.study.preflight import captioned
from vlmlayers.user_code import is_user_code


class MethodPart(Options):
    """What the table of a stage that trains one method holds besides the library's options.

    Attributes:
        datasets: Trained on; those of the study where absent.
        method: Name of the method.
        recipe: Name of a recipe, or a TOML file beside the study; the backbone's where absent.
        set: Values of the recipe or the method; a file may lie beside the study.
    """

    datasets: Several[str] | None = None
    method: str = "mma"
    recipe: str | None = None
    set: dict[str, Any] = Field(default_factory=dict)


Part = TypeVar("Part", bound=MethodPart)


@dataclass(frozen=True)
class MethodStage(Generic[Part]):
    """A stage that trains one method; called with the `StageContext` of a study, it does that.

    Attributes:
        name: Name of its table.
        part: What the table may say.
        options: Those of the library among it.
        work: Does the work with the context, the part, the datasets, and what the library takes.
    """

    name: str
    part: type[Part]
    options: type[Options]
    work: Callable[[Any, Part, dict[str, Any]], None]

    def table(self, context: Any) -> Part:
        """Return the stage's table of a study.

        Raises:
            UserError: A key or value is wrong.
        """
        found = validated(self.part, context.table(self.name), f"[{self.name}]")
        return found.model_copy(update={"method": method_name(context.base, found.method)})

    def check(self, context: Any) -> None:
        """Check the table, its recipe and its datasets, before the study's first stage."""
        _recipe(context, self.table(context))
        check_classes(context, self.datasets(context))

    def datasets(self, context: Any) -> list[Manifest]:
        """Return the datasets to train on; the stage is run again where one of them has changed."""
        part = self.table(context)
        if part.datasets is None:
            return list(context.extracted_manifests)
        known = {manifest.name: manifest for manifest in context.manifests}
        found = [known.get(name) or load(context, name) for name in part.datasets]
        return distinct(found, context.data_root)

    def files(self, context: Any) -> list[Path]:
        """Return the files of the recipe, of a method that does not ship, and those it reads.

        The stage is run again where one has changed.
        """
        part = self.table(context)
        own = recipe_files(context, [part.recipe or ""]) + method_files([part.method])
        return own + _recipe(context, part).files

    def __call__(self, context: Any) -> None:
        """Do the work of the stage."""
        part, model = self.table(context), context.load_model()
        given = {
            "model": model,
            "datasets": self.datasets(context),
            "recipe": _recipe(context, part, model),
            "out": context.run.folder,
            "root": context.data_root,
            "progress": context.progress,
            **library_options(context, part, self.options),
        }
        self.work(context, part, given)


def _recipe(context: Any, part: MethodPart, model: Any = "") -> Any:
    """Return the recipe of a table with its values set; that of a model where none is named."""
    name = recipe_name(context.base, part.recipe) if part.recipe else None
    return read_recipes(name, files_beside(context.base, part.set), [part.method], model)[0]


def library_options(context: Any, part: Options, options: type[Options]) -> dict[str, Any]:
    """Return the options of the library that a table has; images are left out as in extraction."""
    found = {name: getattr(part, name) for name in options.model_fields}
    said = part.model_fields_set  # a `false` written there overrides the extraction's
    return found | {key: own for key, own in context.leaving_out.items() if key not in said}


def check_classes(context: Any, manifests: Sequence[Manifest]) -> None:
    """Refuse datasets that are known to have no classes, before hours of earlier stages.

    Raises:
        UserError: Names the first one.
    """
    for manifest in captioned(manifests, context.data_root):
        manifest.require_classes(APART, context.data_root)


def load(context: Any, name: str) -> Manifest:
    """Return a dataset by the name that it has in a study."""
    return Manifest.load(context.dataset_name(name))


def recipe_name(base: Path, name: str) -> str:
    """Return the name of a recipe, or its TOML file, which may lie beside the study."""
    local = base / name
    return str(local) if name.endswith(".toml") and local.exists() else name


def method_name(base: Path, name: str) -> str:
    """Return the name of a method, or its file and class, which may lie beside the study."""
    local = base / name
    beside = is_user_code(name) and Path(str(local).rpartition(":")[0]).exists()
    return str(local) if beside else name


def method_files(names: Sequence[str]) -> list[Path]:
    """Return the files of the methods among some that do not ship."""
    return [METHODS.file(name) for name in names if name not in BUILT_IN]


def recipe_files(context: Any, names: Sequence[str]) -> list[Path]:
    """Return the recipes among some that are files."""
    found = dict.fromkeys(recipe_name(context.base, name) for name in names)
    return [Path(name) for name in found if name.endswith(".toml")]
