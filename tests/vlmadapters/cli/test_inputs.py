"""What the verbs that train take: which recipe each method gets, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from backbones import shared_backbone
from typer.testing import CliRunner

from vlmadapters.cli.inputs import (
    check_blocks,
    depths_of,
    read_pairs,
    read_placements,
    read_recipes,
)
from vlmadapters.cli.search import _text
from vlmadapters.training.recipes import load_recipe
from vlmlayers.cli import app
from vlmlayers.errors import UserError
from vlmlayers.placement import Placement


def test_each_method_gets_the_recipe_that_is_named_for_it_or_the_models() -> None:
    named = {"mma": "published", "coop": "", "maple": "published"}
    for model, mine in (("mini-clip", "mini"), ("ViT-B-16", "published")):
        mma, coop, maple = read_recipes(named, {}, ["mma", "coop", "maple"], model)
        assert (mma.name, coop.name, maple.name) == ("published", mine, "published")
        assert read_recipes(None, {}, ["mma"], model)[0].name == mine
        assert read_recipes("few-shot", {}, ["coop"], model)[0].name == "few-shot"
    assert [one.method.name for one in (mma, coop, maple)] == ["mma", "coop", "maple"]


def test_a_value_is_set_for_the_methods_that_have_it_and_nothing_else_changes() -> None:
    values = {"lr": 0.5, "scale": 0.25, "fused": False, "words": "one of a", "epochs": 3}
    mma, coop = read_recipes("published", values, ["mma", "coop"])
    first, second = (load_recipe("published", name) for name in ("mma", "coop"))
    assert mma == first.changed(
        {"lr": 0.5, "epochs": 3, "savings": mma.train.savings}, {"scale": 0.25}
    )
    assert coop.method == second.changed({}, {"words": "one of a"}).method
    assert (coop.train.lr, coop.train.epochs) == (0.5, 3)
    for made, own in ((mma, first), (coop, second)):
        saved, before = made.train.savings, own.train.savings
        assert before.fused is not False and saved.fused is False
        assert saved == type(saved)(**{**vars(before), "fused": False})
    # Read by one of them, it is no mistake; read by none, it is.
    _, trained = read_recipes("published", {"momentum": 0.5}, ["tip", "mma"])
    assert trained.train.momentum == 0.5
    with pytest.raises(
        UserError, match="^--set momentum is not read: tip is fitted in closed form"
    ):
        read_recipes("published", {"momentum": 0.5}, ["tip"])
    with pytest.raises(UserError, match="unknown key 'lengt' in --set; did you mean 'length'"):
        read_recipes("published", {"lengt": 1}, ["mma", "coop"])
    with pytest.raises(UserError, match="the method coop is named 3 times; name it once"):
        read_recipes("published", {}, ["coop", "mma", "coop", "coop"])


def test_blocks_are_checked_where_a_models_name_tells_its_depth() -> None:
    assert depths_of("mini-clip") == {"vision": 12, "text": 12}
    assert depths_of("not-there-yet") is None
    assert depths_of(shared_backbone()) == {"vision": 3, "text": 3}
    check_blocks("mini-clip", Placement((12,), (1, 12)))
    for placed in (Placement((13,), (1,)), Placement((), (2, 13))):
        tower = "vision" if placed.vision else "text"
        told = f"the placement {placed} names {tower} block 13, but the {tower} tower has 12"
        with pytest.raises(UserError) as refused:
            check_blocks("mini-clip", SimpleNamespace(vision=placed.vision, text=placed.text))
        assert str(refused.value).startswith(told)
        check_blocks("not-there-yet", placed)


def test_pairs_are_two_numbers_each() -> None:
    assert read_pairs(["5:7", "6:8"]) == ((5, 7), (6, 8))
    for words in (["5:7", "6"], ["5:7:9"], ["a:b"], []):
        with pytest.raises(UserError, match=f"cannot read --pairs '{','.join(words)}'; write"):
            read_pairs(words)


def test_only_of_several_methods_each_is_to_be_given_a_placement_of_its_own() -> None:
    recipes = read_recipes("published", {}, ["mma", "coop"])
    with pytest.raises(
        UserError, match="coop acts at no vision block.*; name a placement for each"
    ):
        read_placements(recipes, ["5-12"])[1] and read_placements(recipes, ["v5,t5"])
    with pytest.raises(UserError) as refused:
        read_placements(recipes[1:], ["v5,t5"])
    assert "name a placement for each" not in str(refused.value)
    # Nor is it the way out of what no method can take or of a name that is none of theirs.
    for wrong in (["12-5"], ["5-12@alpha=3"], ["maple:1-9"]):
        with pytest.raises(UserError) as refused:
            read_placements(recipes, wrong)
        assert "name a placement for each" not in str(refused.value)


@pytest.mark.parametrize("depth", [3, 12])
def test_search_is_handed_what_is_typed_and_the_recipe_for_the_loaded_depth(
    depth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def run(*positional: Any, **named: Any) -> None:
        given.extend((positional, named))
        raise KeyboardInterrupt

    loaded: Any = shared_backbone()
    if depth == 12:
        monkeypatch.setattr(
            "vlmadapters.cli.search.depths_of", lambda _: {"vision": 12, "text": 12}
        )
    monkeypatch.setattr("vlmadapters.cli.search.load_backbone", lambda *_: loaded)
    monkeypatch.setattr("vlmadapters.validation.search.search", run)
    words = ["search", "mini-clip", "faces", "digits", "--out", str(tmp_path / "out")]
    words += ["--recipe", "published", "--set", "lr=0.25", "--folds", "5", "--budget", "7.5"]
    words += ["--placement", "2-3", "--placement", "3@scale=2", "--amounts", "scale=3,epochs=2"]
    words += ["--no-novel", "--seeds", "4,5", "--shots", "6", "--criterion", "accuracy"]
    CliRunner().invoke(app, words)
    (model, datasets), named = given
    assert model is loaded and datasets == ["faces", "digits"]
    recipe = named.pop("recipe")
    assert recipe.label == {3: "v2-3,t2-3", 12: "v5-12,t5-12"}[depth]
    assert (recipe.name, recipe.train.lr) == ("published", 0.25)
    assert (named.pop("out"), named.pop("root")) == (tmp_path / "out", None)
    asked = {
        name: named[name] for name in ("folds", "budget", "novel", "seeds", "shots", "criterion")
    }
    assert asked == {
        "folds": 5, "budget": 7.5, "novel": False, "seeds": (4, 5), "shots": 6,
        "criterion": "accuracy",
    }  # fmt: skip
    assert list(map(str, named["placement"])) == ["v2-3,t2-3", "v3,t3@scale=2"]
    assert list(named["amounts"]) == ["scale=3,epochs=2"]


def test_the_table_of_a_search_is_best_first_with_means_over_the_folds_of_each() -> None:
    rows = [
        ("a", 50.0, -1.0), ("zero-shot", 40.0, -3.0), ("b", 70.0, -0.5), ("c", 90.0, -2.0),
        ("a", 60.0, -2.0), ("zero-shot", 42.0, -3.5), ("b", 74.0, -0.25),
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=["setting", "base", "base_log_likelihood"])
    table = table.assign(novel=np.nan, novel_log_likelihood=np.nan)
    summary = {
        "mean_differences": {"b": 1.125, "a": 0.0, "c": -1.0},
        "skipped": [{"stage": "amount", "setting": "d", "why": "budget"}],
        "cost": {"trainings": 2.26, "seconds": 61.4},
    }
    found = SimpleNamespace(table=table, summary=summary, statement="Train b.")
    lines = _text(found, Path("runs/mine")).splitlines()
    cells = [line.split() for line in lines]
    assert cells[0] == ["folds", "base", "base_LL", "difference"], (
        "no column for what nothing is of"
    )
    assert [row[0] for row in cells[1:5]] == ["b", "a", "c", "zero-shot"]
    assert cells[1][1:] == ["2", "72.000", "-0.375", "1.125"]
    assert cells[3][1:] == ["1", "90.000", "-2.000", "-1.000"]
    assert lines[5].startswith("LL: held-out log-likelihood")
    assert lines[6:8] == ["left out: d (budget)", "Train b."]
    assert lines[8] == f"cost 2.3 full trainings, 61 s of training, {Path('runs/mine/search.json')}"
