"""How tables name a recipe: by the shipped one that it is nearest to, and by what differs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from vlmadapters.training.recipes import Recipe, shipped_recipes

# Tables have a column for it.
ELSEWHERE = {"shots"}


def title(recipe: Recipe) -> str:
    """Return what a recipe trains by, in the words of a table: `mini` or `mini lr=0.01`.

    It follows from the values alone: a file with those of a shipped recipe has its name, and no two
    recipes of different values share a title. The blocks, the amount that a placement names, shots
    and the method's settings have columns of their own.
    """
    bases = _bases(recipe.method.name)
    found = {name: _differing(recipe, base) for name, base in bases.items()}

    def far(name: str) -> tuple[int, int, bool]:
        # Some that ship differ in the settings or in shots alone.
        theirs = bases[name].method.settings()
        others = [key for key, value in recipe.method.settings().items() if value != theirs[key]]
        return len(found[name]), len(others), recipe.train.shots != bases[name].train.shots

    nearest = min(found, key=far)
    return " ".join([nearest, *(f"{key}={_text(value)}" for key, value in found[nearest].items())])


@cache
def _bases(method: str) -> Mapping[str, Recipe]:
    return shipped_recipes(method)


def _differing(recipe: Recipe, base: Recipe) -> dict[str, Any]:
    """Return the values in which a recipe differs from another; those of datasets after theirs."""
    # An amount in epochs also ends the counting by shots.
    named = {"steps_per_shot"} if recipe.amount.epochs else set()
    left = ELSEWHERE | named | set(recipe.amount.given())
    whole = _values(recipe), _values(base)
    found = {key: value for key, value in whole[0].items() if value != whole[1].get(key)}
    found = {key: value for key, value in found.items() if key not in left}
    shared = dict(found)
    for dataset in dict.fromkeys((*base.datasets, *recipe.datasets)):
        own, theirs = _values(recipe, dataset), _values(base, dataset)
        for key, value in own.items():
            # What a reader takes it for who knows the base and what was said before.
            if key not in left and value != shared.get(key, theirs.get(key)):
                found[f"{dataset}.{key}"] = value
    return found


def _values(recipe: Recipe, dataset: str = "") -> dict[str, Any]:
    """Return what a recipe trains by, with such settings of its method as follow the dataset."""
    settings = recipe.method_for(dataset).settings()
    train = recipe.train_for(dataset)
    # As the user wrote it: the identity of a cell may say more.
    named = {"device_crops": False} | train.identity() | {"schedule": train.schedule}
    # The placement's blocks and other settings stand in columns of their own.
    return named | {key: settings.get(key) for key in recipe.varied}


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "-".join(map(str, value))
    return repr(value) if isinstance(value, str) and " " in value else str(value)
