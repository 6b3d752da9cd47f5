"""How tables name recipes: no two of other values alike, equal values always alike."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from vlmadapters.methods import METHODS
from vlmadapters.training.recipes import load_recipe, shipped_recipes
from vlmadapters.training.titles import title


def test_a_title_is_the_shipped_recipe_and_what_differs() -> None:
    mini = load_recipe("mini")
    assert title(mini) == "mini"
    assert title(mini.changed({"lr": 0.01, "epochs": 3})) == "mini lr=0.01 epochs=3"
    assert title(mini.changed({"crop_scale": (0.2, 1.0)})) == "mini crop_scale=0.2-1.0"
    assert title(mini.changed({"template": "a {}."})) == "mini template='a {}.'"
    assert title(mini.changed({"device_crops": True})) == "mini device_crops=True"
    warm = mini.changed({"schedule": "step", "warmup_epochs": 1})
    assert {"schedule=step", "warmup_epochs=1"} <= {*title(warm).split()}
    # What has a column of its own is left to it, and how a step is computed changes no number.
    for same in ({"shots": 4}, {"cuda_graph": False}, {"save_every": 5}):
        assert title(mini.changed(same)) == "mini"
    assert title(mini.changed({}, {"scale": 3.0})) == "mini"


def test_an_amount_is_named_by_the_placement_alone_until_it_is_replaced() -> None:
    placed = load_recipe("mini").at("5-12@lr=0.3,epochs=4")
    assert (title(placed), placed.label) == ("mini", "v5-12,t5-12@lr=0.3,epochs=4")
    other = placed.changed({"lr": 0.5})
    assert (title(other), other.label) == ("mini lr=0.5", "v5-12,t5-12@epochs=4")


def test_values_of_single_datasets_are_told_apart(tmp_path: Path) -> None:
    coop = load_recipe("published", "coop")  # 200 epochs, on ImageNet 50
    texts = {
        "none": "",
        "other": "[datasets.imagenet]\nepochs = 60\n",
        "more": "[datasets.imagenet]\nepochs = 50\n[datasets.dtd]\nepochs = 50\n",
        "settings": "[datasets.imagenet]\nepochs = 50\nsettings = { length = 4 }\n",
    }
    recipes = [coop, coop.changed({"epochs": 200}), coop.changed({"epochs": 50})]
    for name, text in texts.items():
        path = tmp_path / f"{name}.toml"
        path.write_text(f'method = "coop"\nextends = "published"\n{text}')
        recipes.append(load_recipe(path))
    path = tmp_path / "base.toml"
    path.write_text('method = "coop"\nextends = "published"\nepochs = 60\n')
    recipes.append(load_recipe(path))

    def trained(recipe: Any) -> list[Any]:
        names = ("imagenet", "dtd", "faces")
        return [(recipe.train_for(one).identity(), recipe.method_for(one)) for one in names]

    assert title(recipes[1]) == "published imagenet.epochs=200"
    for one, other in combinations(recipes, 2):
        assert (title(one) == title(other)) == (trained(one) == trained(other))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_recipes_that_ship_have_their_names(method: str, tmp_path: Path) -> None:
    shipped = shipped_recipes(method)
    for name, recipe in shipped.items():
        named = shipped[title(recipe)]  # another name only where another recipe says the same
        assert title(recipe) == name or (named.train, named.method) == (recipe.train, recipe.method)
    path = tmp_path / "own.toml"
    path.write_text(f'method = "{method}"\nextends = "published"\n')
    assert title(load_recipe(path)) == "published", "a file of the same values is no other recipe"
