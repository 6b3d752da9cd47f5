"""The stage `validate` of a study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmlayers.errors import UserError, check_one_of

# Keys of the table [validate] of a study file beside those of `validate.validate`.
OWN = ("datasets", "set")
PASSED = (
    "kinds",
    "seeds",
    "shots",
    "recipe",
    "method",
    "reference",
    "random_count",
    "together",
    "limit",
    "workers",
)


def check(context: Any) -> None:
    """Check the table `[validate]`, its recipe and its datasets, before the study's first stage.

    Args:
        context: `vlmlayers.study.StageContext`.

    Raises:
        UserError: A key or name is unknown, or a value has the wrong type.
    """
    from vlmadapters.cli.options import read_recipe

    options = _checked(context.options)
    recipe = _recipe(context, options.get("recipe") or "published")
    read_recipe(recipe, _settings(options), options.get("method", "mma"))
    if "datasets" in options:
        _manifests(context, options["datasets"])


def validate(context: Any) -> None:
    """Train at the choice of a run and at its competitors; write `validation*` into its folder.

    The table `[validate]` may name `datasets` (the study's own where absent), `kinds`, `seeds`,
    `shots`, `method`, `recipe`, `set` (values of the recipe or the method), `reference`,
    `random_count`, `together`, `limit` and `workers`.

    Args:
        context: `vlmlayers.study.StageContext`.

    Raises:
        UserError: A key or name is unknown, or a value has the wrong type.
    """
    from vlmadapters.training.recipes import default_recipe
    from vlmadapters.validation import validate as library

    options = _checked(context.options)
    model = context.load_model()
    settings = _settings(options)
    options.pop("set", None)
    recipe = _recipe(context, options.pop("recipe", None) or default_recipe(model.name))
    manifests = _manifests(context, options.pop("datasets", None))
    from vlmadapters.cli.options import read_recipe

    found = library.validate(
        model,
        context.choice,
        manifests,
        scores=context.scores,
        recipe=read_recipe(recipe, settings, options.pop("method", "mma")),
        out=context.run.folder,
        root=context.data_root,
        seed=context.seed,
        progress=context.progress,
        notes={"chosen_on": _chosen_on(context)},
        **options,
    )
    cells = f"{found.table['placement'].nunique()} placements, {len(found.table)} cells"
    context.echo(f"validate {cells}: {found.verdict}")


def _checked(given: dict[str, Any]) -> dict[str, Any]:
    options = dict(given)
    for key, value in options.items():
        check_one_of("key", key, (*OWN, *PASSED), where="[validate]")
        kind = _kind(key)
        if isinstance(value, bool) or not isinstance(value, kind):
            raise UserError(
                f"[validate] {key} is {value!r}; it must be {_WORDS[kind]}, as in {_EXAMPLES[kind]}"
            )
    for number in options.get("seeds", ()):
        if isinstance(number, bool) or not isinstance(number, int):
            raise UserError(f"[validate] seeds holds {number!r}; seeds are whole numbers")
    return options


_WORDS = {int: "a whole number", str: "a name", list: "a list", dict: "a table"}
_EXAMPLES = {int: "16", str: '"paper"', list: "[1, 2, 3]", dict: "{ lr = 0.03 }"}


def _kind(key: str) -> type:
    if key in ("datasets", "kinds", "seeds"):
        return list
    if key == "set":
        return dict
    return str if key in ("recipe", "method", "reference") else int


def _settings(options: dict[str, Any]) -> list[str]:
    return [f"{key}={_text(value)}" for key, value in options.get("set", {}).items()]


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _recipe(context: Any, name: str) -> str:
    local = Path(context.base) / name
    return str(local) if name.endswith(".toml") and local.exists() else name


def _manifests(context: Any, names: list[str] | None) -> list[Any]:
    """Return the datasets to train on; the study's own where none are named."""
    if names is None:
        return [data.manifest for data in context.datasets]
    from vlmlayers.manifests import Manifest

    known = {data.manifest.name: data.manifest for data in context.datasets}
    return [known.get(name) or Manifest.load(context.dataset_name(name)) for name in names]


def _chosen_on(context: Any) -> dict[str, str]:
    """Return the split that each dataset was analysed on: a choice made on test images says so."""
    return {data.manifest.name: str(data.options["split"]) for data in context.datasets}
