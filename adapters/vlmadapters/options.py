"""Options of the verbs `train`, `evaluate` and `validate` alone, and what they mean."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vlmlayers.errors import UserError

Limit = Annotated[int, typer.Option(help="Test items per dataset, 0 for all.")]
Workers = Annotated[int, typer.Option(help="Threads that decode images.")]


def load_backbone(model: str, pretrained: str | None, random_weights: bool, device: str) -> Any:
    """Load the model that the arguments name; `auto` takes a GPU where there is one."""
    from vlmadapters.parallel import local_device
    from vlmlayers.models import load_model

    return load_model(
        model,
        pretrained,
        random_weights=random_weights,
        device=local_device() if device == "auto" else device,
    )


def read_recipe(name: str, settings: list[str]) -> Any:
    """Return a recipe with the settings KEY=VALUE of the command line applied."""
    from dataclasses import fields, replace

    from vlmadapters.recipes import Savings, TrainConfig, load_recipe
    from vlmlayers.errors import check_one_of

    recipe = load_recipe(name)
    savings = [f.name for f in fields(Savings)]
    own = [f.name for f in fields(TrainConfig) if f.name not in ("savings", "scale")]
    values: dict[str, Any] = {}
    for setting in settings:
        key, mark, text = setting.partition("=")
        check_one_of("key", key, [*own, *savings, "dim", "scale", "crop_scale"], where="--set")
        if not mark:
            raise UserError(f"--set {setting!r} has no value; write KEY=VALUE")
        values[key] = _value(key, text, key in savings)
    switched = {key: values.pop(key) for key in savings if key in values}
    # `scale` on the command line is the adapter's; the crop's range is `crop_scale`.
    adapter: dict[str, Any] = {key: values.pop(key) for key in ("dim", "scale") if key in values}
    if "crop_scale" in values:
        values["scale"] = values.pop("crop_scale")
    values["savings"] = replace(recipe.train.savings, **switched)
    return recipe.changed(values, adapter)


def _value(key: str, text: str, switch: bool) -> Any:
    if key in ("template", "precision"):
        return text
    try:
        if switch:
            return {"true": True, "false": False}[text.lower()]
        if key in ("crop_scale", "ratio"):
            low, high = text.split(",")
            return float(low), float(high)
        whole = ("epochs", "batch_size", "shots", "cached_views", "save_every", "dim")
        return int(text) if key in whole else float(text)
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


def read_placements(adapter: Any, placements: list[str], choice: Path | None) -> list[Any]:
    """Return the adapters to train: named placements, a choice's, or else the recipe's own."""
    from vlmadapters.config import MMAConfig
    from vlmlayers.placement import Placement

    configs = [adapter.with_placement(*Placement.parse(text)) for text in placements]
    if choice is not None:
        configs.append(MMAConfig.from_choice(choice, dim=adapter.dim, scale=adapter.scale))
    return configs or [adapter]


def read_seeds(text: str) -> list[int]:
    """Read seeds such as 1,2,3."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--seeds {text!r} is not a list of whole numbers such as 1,2,3") from None
