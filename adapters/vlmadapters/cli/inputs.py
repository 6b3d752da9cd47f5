"""What the verbs that train or test take: how it is typed, read and checked before torch."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from vlmlayers.architectures import check_model, known_depths, refuse_image_model
from vlmlayers.arguments import taken
from vlmlayers.cli.options import key_values, named
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.extraction import WeightsOptions
from vlmlayers.placement import CHOICE, Placement
from vlmlayers.positions import TOWERS
from vlmlayers.progress import timed
from vlmlayers.prompts import APART

LOG = logging.getLogger(__name__)

TrainedOn = Annotated[
    list[str], named("Datasets trained on: names, image folders, tables or TOML files.")
]
Method = Annotated[str, typer.Option(help="Method to train, as in mma, maple or coop.")]
RecipeName = Annotated[
    str | None,
    typer.Option(
        help="A recipe of the method: published, mini, …, or a TOML file; mini for the mini-clip, "
        "else published, where absent."
    ),
]
Settings = Annotated[
    list[str] | None,
    key_values("A value of the recipe or the method, as in lr=0.03 or scale=0.1."),
]


def load_backbone(model: str, weights: WeightsOptions, device: str) -> Any:
    """Load the model that the arguments name; `auto` takes a GPU where there is one."""
    from vlmlayers.models import load_model

    with timed(LOG, f"loading {model}"):
        return load_model(model, **weights.arguments(), device=device)


def read_recipes(
    name: str | Mapping[str, str] | None,
    settings: Mapping[str, Any],
    methods: Sequence[str],
    model: Any = "",
) -> list[Any]:
    """Return one recipe per method with some values set.

    A key is a field of the recipe, a saving, or a setting of a method; one that only some of the
    methods have is set for those.

    Args:
        name: Name or TOML file of the recipe, or one for each method; where None or empty that of
            the method for the model.
        settings: Values to set, by key.
        methods: Names of methods.
        model: The loaded model, whose depth the placements of recipes follow, or its name; they
            are those of ViT-B/16 where the name does not tell the depth.

    Raises:
        UserError: A name or key is unknown, a value is wrong or not read beside the others, or a
            method is named twice.
    """
    from vlmadapters.training.recipes import default_recipe, load_recipe

    named = dict.fromkeys(methods, name) if name is None or isinstance(name, str) else name
    title = model if isinstance(model, str) else model.name
    recipes = [
        load_recipe(named[one] or default_recipe(title, one), one, depths_of(model))
        for one in methods
    ]
    names = [one.method.name for one in recipes]
    for one in names:
        if names.count(one) > 1:
            raise UserError(f"the method {one} is named {names.count(one)} times; name it once")
    keys = list(dict.fromkeys(key for one in recipes for key in _holders(one)))
    for key in settings:
        check_one_of("key", key, keys, where="--set")
    made = [_with_settings(one, settings) for one in recipes]
    for key in settings:
        why = [one.unread().get(key, "") for one in made if key in _holders(one)]
        if all(why):  # one that only some of the methods read is set for those
            raise UserError(f"--set {key} is not read: {why[0]}")
    return made


def depths_of(model: Any) -> dict[str, int] | None:
    """Return the number of blocks of a model's towers; None where it is a name that tells not."""
    if isinstance(model, str):
        told = known_depths(model)
        return told if set(told) == set(TOWERS) else None
    from vlmadapters.clip.towers import backbone_depths  # brings torch

    return backbone_depths(model.clip)


def _holders(recipe: Any) -> dict[str, Any]:
    """Return each key that can be set, to the record that holds its value."""
    train, savings = recipe.train, recipe.train.savings
    found = {f.name: train for f in fields(train) if f.name != "savings"}
    found |= {f.name: savings for f in fields(savings)}
    return found | {key: recipe.method for key in recipe.method.settings()}


def _with_settings(recipe: Any, settings: Mapping[str, Any]) -> Any:
    holders, savings = _holders(recipe), recipe.train.savings

    def given(record: Any) -> dict[str, Any]:
        kinds = get_type_hints(type(record), include_extras=True)
        return {
            key: taken("--set", key, kinds[key], value)
            for key, value in settings.items()
            if holders.get(key) is record
        }

    train = {**given(recipe.train), "savings": replace(savings, **given(savings))}
    return recipe.replaced(train, given(recipe.method))


def check_inputs(
    model: str, weights: WeightsOptions, names: Sequence[str], root: Path | None
) -> None:
    """Check a model and datasets before torch is imported: a wrong name is said at once.

    Raises:
        UserError: The model or its weights are unknown, it has no text tower, or a dataset is
            unknown, not listed or without classes, or two have one name.
    """
    from vlmlayers.manifests import Manifest, distinct

    check_model(model, **weights.arguments())
    refuse_image_model(model)
    for manifest in distinct(map(Manifest.load, names), root):
        manifest.require_classes(APART, root)
        for split in manifest.splits(root):
            manifest.items(split, root=root)


def check_blocks(model: str, placed: Any) -> None:
    """Check before a model is loaded that it has the blocks of a placement, where that is known.

    Args:
        model: Its name.
        placed: Anything with `vision` and `text` blocks.

    Raises:
        UserError: Names the first block beyond its tower.
    """
    depths, whole = known_depths(model), Placement(placed.vision, placed.text)
    vision, text = (whole.blocks(tower) if tower in depths else () for tower in TOWERS)
    Placement(vision, text).check(depths, f"the placement {whole}")


def read_pairs(words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Read pairs of blocks that share a projection, such as 5:7 and 6:8 (vision:text).

    Raises:
        UserError: A word is not two block numbers with a colon between.
    """
    try:
        pairs = tuple(tuple(int(n) for n in pair.split(":")) for pair in words)
    except ValueError:
        pairs = ()
    if not pairs or any(len(pair) != 2 for pair in pairs):
        text = ",".join(words)
        raise UserError(f"cannot read --pairs {text!r}; write vision:text blocks, as in 5:7,6:8")
    return pairs


def read_placements(
    recipes: Sequence[Any], placements: Sequence[str], choice: Any = None
) -> list[Any]:
    """Return the settings to train: each method at what is named for it, or else its recipe's own.

    Args:
        recipes: One recipe per method.
        placements: Such as `5-12`, `5-12@scale=0.3,epochs=15`, `maple:1-9` for one of several
            methods, or `choice`.
        choice: The layer choice that `choice` stands for, or its path.

    Raises:
        UserError: A placement cannot be read, or a method cannot act there.
    """
    from vlmadapters.training.recipes import settings_at

    def taken_by(recipe: Any) -> bool:
        try:
            settings_at([recipe], [one for one in placements if ":" not in one], {CHOICE: choice})
        except UserError:
            return False
        return True

    try:
        return settings_at(recipes, placements, {CHOICE: choice})
    except UserError as error:
        # What none of them can take, as it cannot be read, is no placement for any of them.
        more = "; name a placement for each, as in mma:5-12"
        apart = len(set(map(taken_by, recipes))) > 1
        raise UserError(f"{error}{more if apart else ''}") from None
