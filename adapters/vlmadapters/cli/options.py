"""Options of the verbs `train`, `evaluate` and `validate` alone, and what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmlayers.cli.options import Weights
from vlmlayers.errors import UserError, check_one_of

Limit = Annotated[int, typer.Option(help="Test items per dataset, 0 for all.")]
Method = Annotated[
    str, typer.Option(help="Method to train, as `vlmlayers train --list` names them.")
]
Workers = Annotated[int, typer.Option(help="Threads that decode images.")]


def load_backbone(model: str, weights: Weights, device: str) -> Any:
    """Load the model that the arguments name; `auto` takes a GPU where there is one."""
    from vlmlayers.models import load_model

    return load_model(model, **weights.arguments(), device=device)


def read_recipes(name: str, settings: list[str], methods: Sequence[str]) -> list[Any]:
    """Return one recipe per method with the settings KEY=VALUE of the command line applied.

    A key is a field of the recipe, a saving, or a setting of a method; one that only some of the
    methods have is set for those.
    """
    from vlmadapters.training.recipes import load_recipe

    recipes = [load_recipe(name, method) for method in methods]
    pairs = []
    for setting in settings:
        key, mark, text = setting.partition("=")
        known = list(dict.fromkeys(key for one in recipes for key in _holders(one)))
        check_one_of("key", key, known, where="--set")
        if not mark:
            raise UserError(f"--set {setting!r} has no value; write KEY=VALUE")
        pairs.append((key, text))
    return [_with_settings(one, pairs) for one in recipes]


def read_recipe(name: str, settings: list[str], method: str = "mma") -> Any:
    """Return a method's recipe with the settings KEY=VALUE of the command line applied."""
    return read_recipes(name, settings, [method])[0]


def _holders(recipe: Any) -> dict[str, Any]:
    """Return each key that can be set, to the record that holds its value."""
    from dataclasses import fields

    train, savings = recipe.train, recipe.train.savings
    found = {f.name: train for f in fields(train) if f.name != "savings"}
    found |= {f.name: savings for f in fields(savings)}
    return found | {key: recipe.method for key in recipe.method.settings()}


def _with_settings(recipe: Any, pairs: Sequence[tuple[str, str]]) -> Any:
    from dataclasses import replace

    holders = _holders(recipe)
    values: dict[int, dict[str, Any]] = {}
    for key, text in pairs:
        if key in holders:
            of_holder = values.setdefault(id(holders[key]), {})
            of_holder[key] = _value(key, text, getattr(holders[key], key))
    savings = replace(recipe.train.savings, **values.get(id(recipe.train.savings), {}))
    train = {**values.get(id(recipe.train), {}), "savings": savings}
    return recipe.changed(train, values.get(id(recipe.method), {}))


def _value(key: str, text: str, now: Any) -> Any:
    """Read a value of the type that a key has now."""
    if isinstance(now, str):
        return text
    if now is None:
        raise UserError(f"--set {key} cannot be set on the command line; write a recipe file")
    try:
        if isinstance(now, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(now, tuple):
            return tuple(type(now[0])(part) for part in text.split(","))
        return int(text) if isinstance(now, int) else float(text)
    except KeyError:
        raise UserError(f"--set {key}={text}: write {key}=true or {key}=false") from None
    except ValueError:
        raise UserError(f"--set {key}={text}: {text!r} is not a number of the right kind") from None


def find_datasets(names: Sequence[str], root: Path | None) -> None:
    """Raise a UserError where a dataset is not known or its items cannot be listed.

    Before torch is imported: a wrong name or path is said at once.
    """
    from vlmlayers.manifests import Manifest

    for name in names:
        manifest = Manifest.load(name)
        for split in manifest.splits(root):
            manifest.items(split, root=root)


def read_pairs(text: str) -> tuple[tuple[int, ...], ...]:
    """Read pairs of blocks that share a projection, such as 5:7,6:8 (vision:text)."""
    try:
        pairs = tuple(tuple(int(n) for n in pair.split(":")) for pair in text.split(","))
    except ValueError:
        pairs = ()
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise UserError(f"cannot read --pairs {text!r}; write vision:text blocks, as in 5:7,6:8")
    return pairs


def read_placements(method: Any, placements: list[str], choice: Path | None) -> list[Any]:
    """Return the settings to train: at named placements, a choice's, or else the recipe's own."""
    from vlmlayers.placement import Placement

    configs = [method.with_placement(*Placement.parse(text)) for text in placements]
    if choice is not None:
        configs.append(type(method).from_choice(choice, **method.settings()))
    return configs or [method]


def read_seeds(text: str) -> list[int]:
    """Read seeds such as 1,2,3."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--seeds {text!r} is not a list of whole numbers such as 1,2,3") from None
