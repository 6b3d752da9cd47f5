"""Recipes whose values differ by dataset."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from backbones import shared_backbone

import vlmadapters as va
from vlmadapters.cli.inputs import read_recipes
from vlmadapters.clip.savings import Savings
from vlmadapters.methods import BUILT_IN, METHODS
from vlmadapters.methods.config import VIT_B_16
from vlmadapters.methods.configs import KgCoOpConfig
from vlmadapters.training.recipes import Recipe, TrainConfig, load_recipe
from vlmadapters.training.trainer import Trainer
from vlmlayers.errors import UserError

TEXT = """
method = "kgcoop"
epochs = 3
settings = { weight = 2.0 }

[datasets.faces]
epochs = 7
settings = { weight = 5.0, words = "", length = 4 }
"""


@pytest.fixture()
def recipe(tmp_path: Path) -> Recipe:
    path = tmp_path / "own.toml"
    path.write_text(TEXT)
    return load_recipe(path)


CHANGED: dict[str, Any] = {
    "optimizer": "adamw", "lr": 0.1, "momentum": 0.5, "beta2": 0.9, "eps": 1e-6,
    "weight_decay": 0.1, "max_norm": 1.0, "schedule": "step", "warmup_epochs": 1,
    "warmup_lr": 1e-3, "final_lr": 1e-4, "epochs": 7, "steps_per_shot": 3, "updates_per_batch": 2,
    "batch_size": 8, "drop_last": False, "shots": 4, "template": "{}", "precision": "bf16",
    "crop_scale": (0.5, 1.0), "crop_ratio": (1.0, 1.0), "flip": 0.0, "cached_views": 2,
    "device_crops": True,
}  # fmt: skip
ALIKE = {"savings": Savings.none(), "save_every": 3, "cuda_graph": False}  # change no number


def test_what_a_recipe_is_known_by_changes_with_each_value_that_a_result_depends_on() -> None:
    assert {*CHANGED, *ALIKE} == {one.name for one in fields(TrainConfig)}
    plain = TrainConfig().identity()
    for key, value in CHANGED.items():
        assert replace(TrainConfig(), **{key: value}).identity() != plain, key
    assert replace(TrainConfig(), **ALIKE).identity() == plain
    # Steps of the warm-up counted into the cosine once: those results are others.
    stepwise = replace(TrainConfig(), schedule="step", warmup_epochs=1).identity()
    assert stepwise["schedule"] != "step" == replace(TrainConfig(), schedule="step").schedule


DEEP = {"vision": 24, "text": 12}
# Learning rate, epochs, batch and warm-up epochs, of the authors' papers, scripts or logs.
PUBLISHED = {
    ("mma", "published", ""): (0.0015, 5, 16, 0),
    ("mma", "published", "imagenet"): (0.0015, 5, 128, 0),
    ("coop", "published", ""): (0.002, 200, 32, 1),
    ("coop", "published", "imagenet"): (0.002, 50, 32, 1),
    ("coop", "few-shot-4", ""): (0.002, 100, 32, 1),
    ("coop", "few-shot-2", ""): (0.002, 100, 32, 1),
    ("coop", "few-shot-1", ""): (0.002, 50, 32, 1),
    ("cocoop", "published", ""): (0.002, 10, 1, 1),
    ("kgcoop", "published", ""): (0.002, 100, 128, 1),
    ("proda", "published", ""): (0.001, 100, 4, 1),
    ("lasp", "published", "oxford_pets"): (0.032, 25, 32, 3),
    ("lasp", "published", "caltech101"): (0.032, 50, 32, 5),
    ("lasp", "published", "eurosat"): (0.032, 300, 32, 7),
    ("lasp", "published", "food101"): (0.002, 10, 1, 1),
    ("lasp", "virtual", "caltech101"): (0.032, 50, 32, 5),
    ("maple", "published", ""): (0.0035, 5, 4, 1),
    ("maple", "transfer", ""): (0.0026, 2, 4, 1),
    ("ivlp", "published", ""): (0.0035, 5, 4, 1),
    ("ivlp", "published-text", ""): (0.0025, 5, 4, 1),
    ("ivlp", "published-vision", ""): (0.0025, 5, 4, 1),
    ("promptsrc", "published", ""): (0.0025, 20, 4, 1),
    ("promptsrc", "few-shot", ""): (0.0025, 50, 4, 1),
    ("rpo", "published", ""): (0.01, 15, 4, 1),
    ("rpo", "transfer", ""): (0.005, 15, 4, 1),
    ("lweib", "published", ""): (0.28, 25, 16, 0),
    ("lweib", "transfer", ""): (0.15, 10, 128, 0),
    ("clipadapter", "published", ""): (0.002, 200, 32, 1),
    ("clipadapter", "published", "imagenet"): (0.002, 50, 32, 1),  # by CoOp's commands for it
}


@pytest.mark.parametrize(
    ("name", "method", "placement"),
    [
        ("published", "cliplora", "v1-24,t1-12"),
        ("mini", "mma", "v9-24,t5-12"),
        ("published", "maple", "v1-9,t1-9"),
        ("published-text", "ivlp", "v-,t1-12"),
        ("published-transfer", "mma", "v17-24,t9-12"),
        ("transfer", "promptsrc", "v1-6,t1-3"),
        ("transfer", "maple", "v1-3,t1-3"),
        ("published", "coop", "v-,t1"),
        ("published", "lasp", "v1-24,t-"),
        ("published", "tip", ""),
    ],
)
def test_a_recipe_acts_at_the_published_blocks_of_any_depth(
    name: str, method: str, placement: str
) -> None:
    assert load_recipe(name, method, DEEP).method.placement == placement
    assert read_recipes(name, {}, [method], "mini-clip")[0] == load_recipe(name, method)
    loaded = load_recipe(name, method).changed({"template": "one {}"})
    assert loaded.fitted(DEEP).method.placement == placement


@pytest.mark.parametrize("key", PUBLISHED, ids=" ".join)
def test_recipes_of_sgd_have_the_published_values(key: tuple[str, str, str]) -> None:
    method, name, dataset = key
    train = load_recipe(name, method).train_for(dataset)
    assert (train.lr, train.epochs, train.batch_size, train.warmup_epochs) == PUBLISHED[key]
    assert (train.optimizer, train.momentum, train.weight_decay) == ("sgd", 0.9, 5e-4)
    assert (train.schedule, train.final_lr, train.warmup_lr) == ("epoch", 0.0, 1e-5)
    assert (train.crop_scale, train.flip, train.drop_last) == ((0.08, 1.0), 0.5, True)
    shots = name.removeprefix("few-shot-")
    assert train.shots == (int(shots) if shots.isdecimal() else 16)


@pytest.mark.parametrize("method", BUILT_IN)
def test_settings_that_nobody_names_are_those_of_the_published_recipe(method: str) -> None:
    """Python's `CoOpConfig()` and the command line's default are one method."""
    assert METHODS.config(method).published(VIT_B_16) == load_recipe("published", method).method


@pytest.mark.parametrize(("dataset", "epochs"), [("dtd", 20), ("eurosat", 100)])
def test_the_recipe_of_tip_adapter_f_has_the_published_values(dataset: str, epochs: int) -> None:
    train = load_recipe("published", "tip-f").train_for(dataset)
    assert (train.optimizer, train.lr, train.eps, train.weight_decay) == ("adamw", 1e-3, 1e-4, 0.01)
    assert (train.schedule, train.final_lr, train.warmup_epochs) == ("step", 0.0, 0)
    assert (train.epochs, train.batch_size, train.drop_last) == (epochs, 256, False)
    assert (train.momentum, train.beta2, train.crop_scale) == (0.9, 0.999, (0.5, 1.0))


def test_a_recipe_is_one_line_in_a_notebook() -> None:
    line = repr(load_recipe("mini").changed({"weight_decay": 0.25, "epochs": 3}))
    assert line.startswith("Recipe(mini, MMA v5-12,t5-12: dim=32, scale=0.1, ")
    assert "weight_decay=0.25" in line and "epochs=3" in line
    assert "momentum" not in line and "Savings" not in line and len(line) < 200


def test_blocks_that_a_file_names_stay(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text('method = "mma"\nextends = "mini"\nsettings = { vision = [5, 6], text = [] }\n')
    assert load_recipe(path, "mma", DEEP).method.placement == "v5-6,t-"


def test_blocks_that_are_named_of_a_loaded_recipe_stay() -> None:
    loaded = load_recipe("mini")
    for named in (
        loaded.changed({}, {"vision": (5, 6), "text": (5,)}),
        loaded.at("v5-6,t5@epochs=2"),
        loaded.with_method(va.MMAConfig((5, 6), (5,))),
    ):
        assert named.fitted(DEEP).method.placement == "v5-6,t5"
    assert loaded.at("@epochs=2").fitted(DEEP).method.placement == "v9-24,t5-12"


def test_a_placement_names_no_amount_that_was_replaced_since() -> None:
    """Tables named the scale of the placement where settings of the method had another."""
    named = load_recipe("mini").at("5-12@scale=0.3,lr=0.2")
    for made, left in (
        (named.with_method(va.MMAConfig.span(5, 12, scale=0.1)), "@lr=0.2"),
        (named.changed({}, {"scale": 0.1}), "@lr=0.2"),
        (named.changed({"lr": 0.1}), "@scale=0.3"),
        (named.with_method(va.MMAConfig.span(5, 12, scale=0.3)), "@scale=0.3,lr=0.2"),
    ):
        assert made.label == f"v5-12,t5-12{left}"


@pytest.mark.parametrize("depth", range(1, 33))
def test_blocks_of_a_recipe_are_a_block_or_more_of_any_depth(depth: int) -> None:
    depths = {"vision": depth, "text": 12}
    upper = load_recipe("published-transfer", "mma", depths).method.vision
    lower = load_recipe("transfer", "promptsrc", depths).method.vision
    assert upper == tuple(range(upper[0], depth + 1)) and abs(len(upper) - depth / 3) <= 1
    assert lower == tuple(range(1, lower[-1] + 1)) and abs(len(lower) - depth / 4) <= 1


def test_training_acts_at_the_published_blocks_of_the_backbone(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text('method = "cliplora"\nextends = "mini"\nepochs = 1\nshots = 1\n')
    model = shared_backbone()
    found = va.train(model, "faces", path, method="cliplora", seeds=1, items=4, progress=False)
    assert set(found["placement"]) == {"", "v1-3,t1-3"}
    loaded = va.load_recipe(path).changed({"lr": 0.1})
    again = va.train(model, "faces", loaded, method="cliplora", seeds=1, items=4, progress=False)
    assert set(again["placement"]) == {"", "v1-3,t1-3"}
    (read,) = read_recipes(str(path), {"lr": 0.1}, ["cliplora"], model)
    assert (read.label, read.train.lr) == ("v1-3,t1-3", 0.1)


def test_pairs_of_a_recipe_stay_on_the_backbone_that_it_is_fitted_to(tmp_path: Path) -> None:
    """Recipes as values trained MMA without them, those named by their file with them."""
    path = tmp_path / "own.toml"
    path.write_text("settings = { pairs = [[9, 10]] }")
    loaded = va.load_recipe(path)
    assert loaded.fitted(DEEP).method == va.load_recipe(path, depths=DEEP).method
    changed = va.load_recipe("published").changed({}, {"pairs": ((9, 10),)})
    assert changed.fitted(DEEP).method.shared_pairs() == ((9, 10),)
    with pytest.raises(UserError, match="vision 9, text 10"):
        changed.fitted({"vision": 4, "text": 4})


def test_training_and_settings_follow_the_dataset(recipe: Recipe) -> None:
    assert recipe.train_for("faces").epochs == 7 and recipe.train_for("pets").epochs == 3
    assert recipe.method_for("faces") == KgCoOpConfig(weight=5.0, words="", length=4)
    assert recipe.method_for("pets") == KgCoOpConfig(weight=2.0)


@pytest.mark.parametrize("own", ["lr = 0.3", "settings = { scale = 0.9 }"])
def test_a_dataset_is_trained_by_its_own_values(own: str, tmp_path: Path) -> None:
    def trained(text: str) -> list[float]:
        path = tmp_path / "own.toml"
        path.write_text(f'extends = "mini"\nepochs = 1\nshots = 1\n{text}\n')
        found = va.train(shared_backbone(), "faces", path, placement="1-3", seeds=1, items=8,
                         progress=False)  # fmt: skip
        # What differs by dataset is no setting that datasets are averaged by.
        shown = found["settings"][found["method"] == "MMA"].str.contains("scale=")
        assert shown.tolist() == [not ("datasets" in text and "scale" in text)] * len(shown)
        return found["log_likelihood"].tolist()

    common = trained(own)
    assert trained(f"[datasets.faces]\n{own}") == common != trained("")
    assert trained(f"[datasets.pets]\n{own}") == trained("")


def test_what_is_asked_for_holds_on_every_dataset(recipe: Recipe) -> None:
    placed = KgCoOpConfig(text=(2,), weight=3.0)
    own = recipe.method_for("faces").settings()
    assert recipe.with_method(placed).method_for("faces").settings() == own | {"weight": 3.0}
    assert recipe.with_method(placed).method_for("faces").text == (2,)
    changed = recipe.changed({"epochs": 1}, {"weight": 3.0})
    assert changed.train_for("faces").epochs == 1
    assert changed.method_for("faces") == KgCoOpConfig(weight=3.0, words="", length=4)
    assert changed.varied == {"words", "length"}
    assert recipe.changed({"epochs": 1}) == recipe.changed({"epochs": 1}, {})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("settings = { weigth = 5.0 }", "weight"),
        ("settings = { weight = -1.0 }", "weight takes a number from 0"),
        ("epoch = 7", "epochs"),
        # These two were dropped without a word, though tables named them.
        ("beta2 = 0.9", "beta2 of faces is not read: the optimizer is sgd"),
        ("steps_per_shot = 2\nepochs = 3", "epochs of faces is not read: steps_per_shot"),
        # Tables named the blocks of the other datasets for this one too.
        ("settings = { text = [2] }", "the settings of faces name text blocks"),
    ],
)
def test_a_wrong_value_of_a_dataset_is_one_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "own.toml"
    path.write_text(f'method = "kgcoop"\n[datasets.faces]\n{line}\n')
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(path)
    assert "own.toml" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "line",
    ["settings = 3", "savings = true", "datasets = [1]", "datasets = { faces = 3 }", "method = 3"],
)
def test_a_value_in_place_of_a_table_is_one_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "own.toml"
    path.write_text(line)
    with pytest.raises(UserError, match="as a table, not|unknown method '3'"):
        load_recipe(path)


def test_what_one_dataset_reads_is_taken_and_inherited_values_may_stand_unread(
    tmp_path: Path,
) -> None:
    path = tmp_path / "own.toml"
    path.write_text('method = "kgcoop"\n[datasets.faces]\noptimizer = "adamw"\nbeta2 = 0.9\n')
    assert load_recipe(path).train_for("faces").beta2 == 0.9
    # The shipped one has other epochs for ImageNet, which the steps of this file replace.
    path.write_text('method = "coop"\nextends = "few-shot"\nsteps_per_shot = 3\n')
    assert load_recipe(path).train_for("imagenet").steps_per_shot == 3


def test_a_dataset_whose_training_is_all_warm_up_is_refused_before_another_one_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It showed when its turn came, after hours of others."""
    path = tmp_path / "own.toml"
    path.write_text(
        'method = "coop"\nepochs = 2\nshots = 1\n[datasets.shapes_filled]\nwarmup_epochs = 2\n'
    )
    monkeypatch.setattr(Trainer, "fit", lambda self: pytest.fail("something was trained"))
    with pytest.raises(UserError, match=r"coop .* 2 epochs on shapes_filled, .* train 3 epochs"):
        va.train(shared_backbone(), ["faces", "shapes_filled"], path, method="coop", seeds=1,
                 progress=False)  # fmt: skip


def test_recipes_in_place_of_settings_follow_the_depth_of_the_backbone_too() -> None:
    """`configs` trained a recipe at the blocks of ViT-B/16, or refused it on fewer."""
    loaded = load_recipe("mini", "cliplora").changed({"epochs": 1, "shots": 1})
    found = va.train(shared_backbone(), "faces", loaded, configs=[loaded], seeds=1, items=4,
                     progress=False)  # fmt: skip
    assert set(found["placement"]) == {"", "v1-3,t1-3"}
