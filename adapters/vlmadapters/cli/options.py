"""Options of the verbs `train`, `evaluate` and `validate` alone, and what they mean."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vlmlayers.errors import UserError

Limit = Annotated[int, typer.Option(help="Test items per dataset, 0 for all.")]
Method = Annotated[
    str, typer.Option(help="Method to train, as `vlmlayers train --list` names them.")
]
Workers = Annotated[int, typer.Option(help="Threads that decode images.")]


def load_backbone(model: str, pretrained: str | None, random_weights: bool, device: str) -> Any:
    """Load the model that the arguments name; `auto` takes a GPU where there is one."""
    from vlmadapters.device import local_device
    from vlmlayers.models import load_model

    return load_model(
        model,
        pretrained,
        random_weights=random_weights,
        device=local_device() if device == "auto" else device,
    )


def read_recipe(name: str, settings: list[str], method: str = "mma") -> Any:
    """Return a method's recipe with the settings KEY=VALUE of the command line applied.

    A key is a field of the recipe, a saving, or a setting of the method.
    """
    from dataclasses import fields, replace

    from vlmadapters.clip.savings import Savings
    from vlmadapters.training.recipes import TrainConfig, load_recipe
    from vlmlayers.errors import check_one_of

    recipe = load_recipe(name, method)
    savings = [f.name for f in fields(Savings)]
    train = [f.name for f in fields(TrainConfig) if f.name != "savings"]
    own = list(recipe.method.settings())
    values: dict[str, Any] = {}
    for setting in settings:
        key, mark, text = setting.partition("=")
        check_one_of("key", key, [*train, *savings, *own], where="--set")
        if not mark:
            raise UserError(f"--set {setting!r} has no value; write KEY=VALUE")
        holder = recipe.train if key in train else recipe.train.savings
        now = getattr(recipe.method if key in own else holder, key)
        values[key] = _value(key, text, now)
    switched = {key: values.pop(key) for key in savings if key in values}
    changed = {key: values.pop(key) for key in own if key in values}
    values["savings"] = replace(recipe.train.savings, **switched)
    return recipe.changed(values, changed)


def _value(key: str, text: str, now: Any) -> Any:
    """Read a value of the type that a key has now."""
    if isinstance(now, str):
        return text
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
