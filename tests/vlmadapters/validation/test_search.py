"""Search: it sees training shots of base classes alone, and says what the folds bear out."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from backbones import shared_backbone
from PIL import Image
from scipy import stats

import vlmadapters as va
from vlmadapters.data.folds import folds
from vlmadapters.data.task import TaskData
from vlmadapters.methods.config import MethodConfig
from vlmadapters.methods.deep_configs import CLIPLoRAConfig
from vlmadapters.methods.mma.config import MMAConfig
from vlmadapters.protocols.experiment import Experiment
from vlmadapters.training.recipes import Recipe, TrainConfig, load_recipe
from vlmadapters.training.trainer import Trainer
from vlmadapters.validation.candidates import (
    check_searchable,
    crossed,
    tell_own_amounts,
    tried_amounts,
    tried_placements,
)
from vlmadapters.validation.judge import SEARCH_COLUMNS, Difference, difference, ranking
from vlmadapters.validation.options import SearchOptions
from vlmadapters.validation.race import Heat, Race
from vlmadapters.validation.search import Search, _statement, _unmoved, search
from vlmlayers.errors import UserError
from vlmlayers.manifests import Manifest
from vlmlayers.placement import Amount, Placement
from vlmlayers.selection import LayerChoice
from vlmlayers.words import UNTRAINED, counted, interval

RECIPE = Recipe(
    "tiny",
    TrainConfig(lr=0.05, epochs=1, batch_size=4, shots=4),
    MMAConfig.span(2, 3, dim=4, scale=0.5),
)
NAMES = ("red", "green", "blue", "gray", "cyan", "pink", "lime", "plum")
QUICK: dict[str, Any] = {
    "recipe": RECIPE,
    "amounts": ["scale=5", "epochs=2"],
    "placement": ["3", "1-3"],
    "folds": 2,
    "progress": False,
}


def dataset(base: Path, *, hidden: bool = False, classes: int = 8, images: int = 6) -> Manifest:
    """Write eight classes listed in a table; `hidden` leaves only base training images there."""
    rows = []
    generator = np.random.default_rng(3)
    for split, count in (("train", 6), ("val", 2), ("test", 3)):
        for label, name in enumerate(NAMES[:classes]):
            for i in range(images if split == "train" and label < 2 else count):
                path = f"{split}-{name}-{i}.png"
                rows.append(f"{path},{label},{name},{split}")
                noise = generator.integers(0, 200, (4, 4, 3)).astype(np.uint8)
                noise[..., label % 3] = 30 * label
                if not hidden or (split == "train" and label < 4):
                    (base / "images").mkdir(parents=True, exist_ok=True)
                    Image.fromarray(noise).resize((32, 32)).save(base / "images" / path)
    (base / "items.csv").write_text("path,label,class_name,split\n" + "\n".join(rows) + "\n")
    (base / "manifest.toml").write_text(
        'title = "Colours"\nkind = "colours"\nfolder = "."\nimages = "images"\n'
        'layout = "table"\nsplit_file = "items.csv"\n'
        f"classes = {classes}\n"
    )
    return Manifest.load(base / "manifest.toml")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return dataset(tmp_path_factory.mktemp("colours"))


@pytest.fixture(scope="module")
def finished(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("search")
    search(shared_backbone(), [manifest], out=out, **QUICK)
    return out


def test_without_test_split_and_novel_classes_it_finds_the_same(
    manifest: Manifest, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = dataset(tmp_path, hidden=True)
    opened: set[str] = set()
    plain = Manifest.open_image

    def told(self: Manifest, item: Any, *arguments: Any, **options: Any) -> Any:
        opened.add(item.path)
        return plain(self, item, *arguments, **options)

    monkeypatch.setattr(Manifest, "open_image", told)
    found = va.search(shared_backbone(), [hidden], **QUICK)
    base = {f"train-{name}-" for name in NAMES[:4]}
    assert opened and {path[:-5] for path in opened} == base
    recorded = pd.read_csv(finished / "search.csv")
    measured = ["setting", "base", "novel", "base_log_likelihood", "novel_log_likelihood", "steps"]
    pd.testing.assert_frame_equal(found.table[measured], recorded[measured])


def test_folds_hold_out_every_shot_once_and_half_of_the_classes_in_turn(
    manifest: Manifest,
) -> None:
    data = TaskData(manifest, shared_backbone())
    drawn = {item.path for item in data.shots(4, 1, "base")}
    made = folds(data, 4, 1, 4)
    held: Counter[str] = Counter()
    for fold in made:
        train, base, novel = (
            {item.path for item in items}
            for items in (fold.shots(4, 1, "base"), fold.test("base"), fold.test("novel"))
        )
        assert train | base | novel == drawn and len(train) + len(base) + len(novel) == len(drawn)
        named = [{path.split("-")[1] for path in one} for one in (train, base, novel)]
        assert named[0] == named[1] == set(fold.names("base"))
        assert named[2] == set(fold.names("novel")) and len(named[2]) == 2
        assert fold.validation(4, 1, "base") == []
        held.update(base)
    for one, other in zip(made[::2], made[1::2]):
        assert set(one.names("base")) == set(other.names("novel"))
    assert max(held.values()) == 1
    assert {fold.held_out for fold in made} == {1 / 4}
    whole = folds(data, 4, 1, 2, apart=False)
    assert {fold.held_out for fold in whole} == {1 / 2}
    assert all(len(fold.names("all")) == 4 and not fold.apart for fold in whole)
    assert {item.path for fold in whole for item in fold.test("all")} == drawn


def test_a_class_of_one_shot_is_trained_on_and_seeds_draw_other_inner_classes(
    tmp_path: Path,
) -> None:
    """Held out, the one shot would test a class that its fold never saw."""
    data = TaskData(dataset(tmp_path, images=1), shared_backbone())
    for fold in folds(data, 4, 1, 4):
        trained = {item.label for item in fold.shots(4, 1, "base")}
        assert trained == set(range(len(fold.names("base"))))
    drawn = {frozenset(folds(data, 4, seed, 2)[0].names("base")) for seed in range(8)}
    assert len(drawn) > 2


@pytest.mark.parametrize(
    ("classes", "images", "shots", "message"),
    [
        (8, 6, 1, "^shots is 1, and a fold .*; give 2 shots or more"),
        (3, 1, 4, "needs two training images of a class"),
        (2, 6, 4, "has one base class of two"),
        (1, 6, 4, "has one class, 'red'"),
        (3, 0, 4, "has no image of its base classes in split 'train'"),
    ],
)
def test_folds_need_two_base_classes_and_two_shots(
    tmp_path: Path, classes: int, images: int, shots: int, message: str
) -> None:
    made = dataset(tmp_path, classes=classes, images=images)
    with pytest.raises(UserError, match=message):
        search(shared_backbone(), [made], **QUICK, shots=shots)


def test_too_few_classes_to_hold_out_are_said_and_small_folds_warn_of_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    still = RECIPE.changed({"lr": 1e-9}, {})
    made = dataset(tmp_path, classes=6)
    found = search(shared_backbone(), [made], **QUICK | {"recipe": still, "placement": ()})
    assert ": too few base classes to hold any out whole." in found.statement
    assert "Compared by held-out log-likelihood" in found.statement
    assert "-0.000" not in found.statement
    assert not caplog.messages
    # Nothing novel was held out, of which the criterion could be a mean.
    for criterion, means in (
        ("log_likelihood", "held-out log-likelihood of inner base classes"),
        ("accuracy", "accuracy of inner base classes, percent"),
    ):
        options = QUICK | {"placement": (), "criterion": criterion, "novel": False}
        quiet = search(shared_backbone(), [made], **options)
        assert "too few" not in quiet.statement
        assert f" Compared by {means}." in quiet.statement
        assert quiet.summary["criterion"] == {"name": criterion, "means": means}


def test_the_runner_up_ran_in_every_fold(manifest: Manifest) -> None:
    found = search(shared_backbone(), [manifest], **QUICK | {"folds": 4})
    said, folds_of = found.summary, found.table["setting"].value_counts()
    dropped = [one for one in folds_of.index if folds_of[one] < 4]
    second = said["runner_up"]
    assert dropped and second not in (said["pick"], "zero-shot", *dropped)
    if second == said["default"]:
        assert said["runner_up_difference"] is None
    else:
        expected = difference(found.table, second, said["default"], "log_likelihood")
        assert said["runner_up_difference"] == expected.to_dict()


def test_a_search_over_datasets_and_seeds_counts_each_draw(
    manifest: Manifest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One of few classes beside one of many, each by the values that the recipe has for it."""
    few = dataset(tmp_path / "few", classes=6)
    (tmp_path / "few" / "manifest.toml").rename(tmp_path / "few" / "small.toml")
    few = Manifest.load(tmp_path / "few" / "small.toml")
    own = {few.name: {"epochs": 3, "shots": 2}}
    options = QUICK | {"recipe": replace(RECIPE, datasets=own), "out": tmp_path / "out"}
    options |= {"amounts": ["lr=0.5"], "criterion": "accuracy", "seeds": (2, 3)}
    found = search(shared_backbone(), [manifest, few], **options)
    said, table = json.loads((tmp_path / "out" / "search.json").read_text()), found.table
    written = {path.name for path in (tmp_path / "out").iterdir()}
    # A training's `results.csv` and cells may lie in the same run folder.
    assert {"search.csv", "search.json", "folds"} <= written
    assert not written & {"cells", "results.csv"}
    assert (said["datasets"], said["seeds"]) == ([manifest.name, few.name], [2, 3])
    assert f"{few.name} (epochs=3)" not in caplog.text, "placements are tried at other rates alone"
    draws = table[table["setting"] == "v2-3,t2-3"].set_index(["dataset", "seed", "fold"])
    assert list(draws.index) == [
        (one.name, seed, fold)
        for fold in (1, 2) for one in (manifest, few) for seed in (2, 3)
    ]  # fmt: skip
    # 4 of 16 shots of 4 classes are trained on, 3 of 6 of 3 classes, in batches of 4 at most.
    small = draws.index.get_level_values("dataset") == few.name
    assert draws["steps"].tolist() == np.where(small, 3, 1).tolist()
    assert draws["novel"].isna().tolist() == small.tolist() and said["novel_held_out"] is True
    assert f" {few.name}: too few base classes to hold any out whole." in found.statement
    cost = said["cost"]
    assert cost["steps_of_one"] == 2 * (4 + 3), (
        "of either seed four batches and three epochs of one"
    )
    assert cost["steps"] == table["steps"].sum() > 0
    assert cost["trainings"] == pytest.approx(cost["steps"] / 14, abs=0.01)
    once = table.drop_duplicates(["dataset", "seed", "fold", "setting"])
    assert len(once) == len(table)
    # Told to a tenth of a second.
    assert cost["seconds"] == pytest.approx(table["seconds"].sum(), abs=0.06)
    assert said["criterion"]["name"] == "accuracy" and "harmonic mean" in said["criterion"]["means"]
    assert f" Compared by {said['criterion']['means']}." in found.statement
    order = ranking(table, "v2-3,t2-3", "accuracy")
    assert list(said["mean_differences"].items()) == list(order.items())
    model = shared_backbone()
    assert (said["model"], said["weights_hash"]) == (model.name, model.weights_hash)
    assert said["towers"] == {"vision": 3, "text": 3}
    assert (said["method"], said["settings"]["scale"]) == ("mma", 0.5)
    # Each fold by itself: what is drawn for one seed or dataset is not what is for another.
    for seed in (2, 3):
        fold = folds(TaskData(few, model), 2, seed, 2)[0]
        items = fold.test("all")
        pixels = torch.cat(list(fold.images.batches(items, 50)))
        with torch.no_grad():
            classes = model.tokenizer(fold.task("all").prompts())
            logits = va.class_logits(model.clip, pixels, classes).double()
        labels = torch.tensor([item.label for item in items])
        plain = table.set_index(["dataset", "seed", "fold", "setting"]).loc[
            (few.name, seed, 1, "zero-shot")
        ]
        expected = -torch.nn.functional.cross_entropy(logits, labels).item()
        assert plain["base_log_likelihood"] == pytest.approx(expected, abs=1e-4)
        assert plain["base"] == pytest.approx(100 * (logits.argmax(1) == labels).double().mean())
        assert (plain["steps"], plain["held_out"]) == (0, 0.5)


def test_log_likelihood_of_zero_shot_is_that_of_the_model(manifest: Manifest) -> None:
    model, data = shared_backbone(), TaskData(manifest, shared_backbone())
    fold = folds(data, 4, 1, 2)[0]
    table = search(model, [manifest], **QUICK).table
    row = table[(table["setting"] == "zero-shot") & (table["fold"] == 1)].iloc[0]
    for kind in ("base", "novel"):
        items, task = fold.test(kind), fold.task(kind)
        pixels = torch.cat(list(data.images.batches(items, 50)))
        with torch.no_grad():
            logits = va.class_logits(model.clip, pixels, model.tokenizer(task.prompts()))
        chance = torch.softmax(logits.double(), 1).numpy()
        labels = np.array([item.label for item in items])
        expected = np.log(chance[np.arange(len(labels)), labels]).mean()
        assert row[f"{kind}_log_likelihood"] == pytest.approx(expected, abs=1e-4)
        assert row[kind] == pytest.approx(100 * (chance.argmax(1) == labels).mean())


def test_what_it_writes(finished: Path) -> None:
    table = pd.read_csv(finished / "search.csv")
    assert tuple(table.columns) == SEARCH_COLUMNS
    said = json.loads((finished / "search.json").read_text())
    assert said["weights"] == "random" and said["random_weights"] is True
    assert said["statement"].startswith(f"{UNTRAINED}. "), "on every output that it touches"
    assert said["default"] == "v2-3,t2-3" and said["folds"] == 2 and said["skipped"] == []
    assert {"v2-3,t2-3@scale=5", "v2-3,t2-3@epochs=2"} <= set(table["setting"])
    assert set(table.loc[table["stage"] == "zero-shot", "setting"]) == {"zero-shot"}
    epochs = dict(zip(table["setting"], table["steps"]))
    assert epochs["v2-3,t2-3@epochs=2"] == 2 * epochs["v2-3,t2-3"]
    assert said["cost"]["trainings"] == pytest.approx(table["steps"].sum() / 4, abs=0.01)
    assert said["to_zero_shot"]["adapt"] in ("yes", "no", "unknown")
    for heat in said["heats"]:
        found = difference(table, heat["best"], heat["default"], "log_likelihood")
        assert heat["difference"]["mean"] == pytest.approx(found.mean)
        assert heat["pick"] == (heat["best"] if found.low > 0 else heat["default"])


@pytest.mark.parametrize("file", ["write_csv", "write_json"])
def test_a_stop_between_its_files_leaves_no_mixture_of_two_searches(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pick of the first stood beside the settings of the second."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    found = Search(pd.DataFrame({"setting": ["a"]}), {"pick": "a"})
    found.write(tmp_path)
    monkeypatch.setattr(f"vlmadapters.validation.search.{file}", stop)
    with pytest.raises(KeyboardInterrupt):
        found.write(tmp_path)
    assert not (tmp_path / "search.json").exists()


@pytest.mark.parametrize(("scale", "judged"), [(20.0, "accuracy"), (100.0, "log_likelihood")])
def test_at_another_scale_of_cosines_accuracy_says_whether_training_pays(
    manifest: Manifest, scale: float, judged: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shared_backbone()
    monkeypatch.setattr(model.clip.logit_scale, "data", torch.tensor(scale).log())
    recipe = Recipe("tiny", RECIPE.train, CLIPLoRAConfig((2, 3), (2, 3)))
    options = QUICK | {"recipe": recipe, "amounts": ["lr=0.5"], "placement": ["3"]}
    found = search(model, [manifest], **options)
    said = found.summary["to_zero_shot"]
    expected = difference(found.table, said["setting"], "zero-shot", judged)
    assert said["criterion"] == judged
    assert (said["mean"], said["low"]) == pytest.approx((expected.mean, expected.low))
    apart = judged == "accuracy"
    assert ("scales cosines by 100, this backbone by 20," in found.statement) is apart
    assert ("zero-shot" in found.summary["mean_differences"]) is not apart


def test_a_finished_search_trains_nothing_again(
    manifest: Manifest, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Experiment, "train_and_test", lambda *_: pytest.fail("trained again"))
    again = search(shared_backbone(), [manifest], out=finished, **QUICK)
    assert again.statement == json.loads((finished / "search.json").read_text())["statement"]


def test_folds_of_other_shots_are_not_taken_for_changed_data(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A study that searches with 4 shots and validates with 2 has both under one name."""
    data = dataset(tmp_path / "data")
    given = QUICK | {"amounts": ["scale=5"], "placement": ["3"], "out": tmp_path / "out"}

    def changes(shots: int, folds: int = 2) -> list[str]:
        caplog.clear()
        search(shared_backbone(), [data], **given | {"shots": shots, "folds": folds})
        return [message for message in caplog.messages if "has changed since" in message]

    assert not [*changes(4), *changes(2), *changes(4, folds=3), *changes(4)]
    for image in (tmp_path / "data" / "images").glob("train-*.png"):
        Image.new("RGB", (8, 8), "white").save(image)
    assert any("-f1 train has changed since" in message for message in changes(4))


def test_a_recipe_by_name_or_as_loaded_is_searched_at_the_blocks_of_the_model(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Recipe] = []

    def track(_data: Any, default: Recipe, *_: Any, **__: Any) -> None:
        given.append(default)
        raise KeyboardInterrupt

    monkeypatch.setattr("vlmadapters.validation.search.Track", track)
    for recipe in (None, "published", load_recipe("published")):
        with pytest.raises(KeyboardInterrupt):
            search(shared_backbone(), [manifest], recipe=recipe)
    assert [one.label for one in given] == 3 * ["v2-3,t2-3"], "of 12 blocks it is 5 to 12"
    own = {(shared_backbone().name, "coop"): "few-shot"}
    monkeypatch.setattr(
        "vlmadapters.protocols.train.default_recipe", lambda *of: own.get(of, "published")
    )
    with pytest.raises(KeyboardInterrupt):
        search(shared_backbone(), [manifest], "coop")
    assert (given[-1].name, given[-1].method.name) == ("few-shot", "coop")
    with pytest.raises(UserError, match="the recipe is of mma, not of coop"):
        search(shared_backbone(), [manifest], "coop", recipe=RECIPE)


def test_own_values_are_told_where_a_multiple_is_tried(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Amounts that are given stay as they are; placements without one are tried at three times."""

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vlmadapters.validation.search.Track", stop)
    own = {manifest.name: {"epochs": 3, "settings": {"scale": 2.0}}}
    options = QUICK | {"recipe": replace(RECIPE, datasets=own)}
    for change, told in (
        ({"placement": ["3@scale=2"]}, ""),
        ({"placement": ["3@scale=2", "3"]}, f"{manifest.name} (scale=2.0), which"),
        ({"placement": (), "amounts": None}, f"{manifest.name} (scale=2.0, epochs=3), which"),
    ):
        caplog.clear()
        with pytest.raises(KeyboardInterrupt):
            search(shared_backbone(), [manifest], **options | change)
        assert told in caplog.text and bool(told) == bool(caplog.text)


def test_data_are_read_as_asked_and_what_is_told_of_them_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """From the root, without images that cannot be read; test images among those trained on."""
    folder = tmp_path / "root" / "colours"
    dataset(folder)
    text = (folder / "manifest.toml").read_text()
    with (folder / "items.csv").open("a") as listed:
        listed.write("train-red-0.png,0,red,test\n")
    file = tmp_path / "lists" / "colours.toml"
    file.parent.mkdir()
    text = text.replace('folder = "."', 'folder = "colours"')
    file.write_text(text.replace('"items.csv"', '"colours/items.csv"'))
    for number in range(3):
        (folder / "images" / f"train-green-{number}.png").write_text("no image")
    options = QUICK | {"root": tmp_path / "root", "placement": (), "amounts": ["scale=5"]}
    with pytest.raises(UserError, match="train-green-"):
        search(shared_backbone(), [file], **options)
    found = search(shared_backbone(), [file, file], **options, skip_unreadable=True)
    assert found.summary["datasets"] == ["colours"]
    assert any("colours" in one and "training" in one for one in caplog.messages)
    for name in ("other", "more"):
        dataset(tmp_path / name)
        (tmp_path / name / "manifest.toml").rename(tmp_path / name / "same.toml")
    with pytest.raises(UserError, match="two datasets are called 'same'"):
        both = [tmp_path / name / "same.toml" for name in ("other", "more")]
        search(shared_backbone(), both, **QUICK)


def test_the_pick_of_a_search_is_a_placement_with_its_amount() -> None:
    for pick, blocks, amount in (
        ("v3,t1-3@scale=2", ((3,), (1, 2, 3)), "scale=2"),
        ("@lr=0.5", ((), ()), "lr=0.5"),
        ("recipe", ((), ()), ""),
        ("zero-shot", ((), ()), ""),
    ):
        found = Search(pd.DataFrame(), {"pick": pick, "decided": bool(amount)})
        assert (tuple(found.placement), str(found.placement.amount)) == (blocks, amount)
        assert found.decided is bool(amount)


def test_trainings_that_move_no_accuracy_are_told(manifest: Manifest, finished: Path) -> None:
    told = "No setting's accuracy is other than zero-shot CLIP's in any fold"
    assert told not in json.loads((finished / "search.json").read_text())["statement"]
    still = RECIPE.changed({"lr": 1e-12}, {"scale": 1e-9})
    options = {**QUICK, "recipe": still, "amounts": ["epochs=2"]}
    assert told in search(shared_backbone(), [manifest], **options).statement
    moved = pd.DataFrame({"dataset": "a", "seed": 1, "fold": [1, 1, 2, 2], "novel": 50.0})
    moved["base"] = [40.0, 40.0, 40.0, 60.0]
    assert not _unmoved(moved) and _unmoved(moved[:2])


def test_placements_race_at_the_amount_found(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    heats: list[tuple[Recipe, list[Recipe], float]] = []

    def picking_the_first(_: Race, stage: str, default: Recipe, rivals: Any, budget: float) -> Any:
        heats.append((default, list(rivals), budget))
        return heats[0][1][0]

    monkeypatch.setattr(Race, "run", picking_the_first)
    with pytest.raises(UserError, match="no comparison"):  # as no heat was run
        search(shared_backbone(), [manifest], budget=50.0, **QUICK)
    (default, amounts, share), (tuned, placements, left) = heats
    assert [one.label for one in (default, *amounts)] == [
        "v2-3,t2-3", "v2-3,t2-3@scale=5", "v2-3,t2-3@epochs=2",
    ]  # fmt: skip
    assert tuned == amounts[0]
    assert [one.label for one in placements] == [
        f"{place}@scale={scale}" for place in ("v3,t3", "v1-3,t1-3") for scale in (5, 15)
    ]
    assert (share, left) == (30.0, 50.0)  # six tenths; and all, of which nothing was spent


def test_a_rival_that_diverges_is_left_out_and_changes_nothing_else(
    manifest: Manifest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    amounts = {"amounts": ["scale=5", "lr=1e30,epochs=3", "lr=1e30"]}
    found = search(shared_backbone(), [manifest], out=tmp_path, **QUICK | amounts)
    alone = search(shared_backbone(), [manifest], **QUICK | {"amounts": ["scale=5"]})
    columns = [name for name in SEARCH_COLUMNS if name != "seconds"]
    pd.testing.assert_frame_equal(found.table[columns], alone.table[columns])
    why = {one["setting"]: one["why"] for one in found.summary["skipped"]}
    assert "became nan in epoch 2" in why["v2-3,t2-3@lr=1e+30,epochs=3"]  # and after its last step:
    assert "logits that are not finite" in why["v2-3,t2-3@lr=1e+30"] and len(why) == 2
    assert found.statement == f"{alone.statement} Left out: 2 settings."
    assert "left out of the amount: v2-3,t2-3@lr=1e+30; the model gives logits" in caplog.text
    assert not list(tmp_path.glob("folds/unfinished/*"))


def test_a_search_in_which_all_or_the_default_diverge_says_so(manifest: Manifest) -> None:
    lone = QUICK | {"amounts": ["lr=1e30"], "placement": ["2-3"]}
    with pytest.raises(UserError, match=r"nothing was trained to the end .* smaller amounts"):
        search(shared_backbone(), [manifest], **lone)
    wild = RECIPE.changed({"lr": 1e30}, {})
    with pytest.raises(UserError, match="logits that are not finite") as refused:
        search(shared_backbone(), [manifest], **QUICK | {"recipe": wild})
    assert "beside the default" not in str(refused.value), "it is the default that diverges"


def test_what_the_budget_leaves_out_is_named(manifest: Manifest) -> None:
    found = search(shared_backbone(), [manifest], budget=3.2, **QUICK)
    cost = found.summary["cost"]
    assert cost["trainings"] <= cost["budget"] == 3.2
    skipped = {one["setting"]: one["why"] for one in found.summary["skipped"]}
    assert skipped and set(skipped.values()) == {"budget"}
    assert not set(skipped) & set(found.table["setting"])
    assert f"Left out: {counted(len(skipped), 'setting')}." in found.statement
    first, *said = repr(found).splitlines()
    assert first == f"Search(pick {found.summary['pick']})"
    assert "".join("".join(said).split()) == "".join(found.statement.split())
    assert len(found.summary["heats"][0]["rivals"]) == 2, "0.6 of it pay for both amounts"
    least = search(shared_backbone(), [manifest], budget=1.2, **QUICK).summary
    assert [heat["stage"] for heat in least["heats"]] == ["amount"], "amount comes first"
    half = search(shared_backbone(), [manifest], budget=2.0, **QUICK).summary["heats"]
    assert [heat["stage"] for heat in half] == ["amount", "placement"], "0.4 are left for places"
    assert half[0]["rivals"] == ["v2-3,t2-3@scale=5"]
    # Of 1.0 that is left two rivals take 0.75, as the default has run: 0.25 for each fold.
    assert half[1]["rivals"] == ["v3,t3", "v3,t3@scale=1.5"]
    # An amount that is dear by itself is left out and leaves the places their share.
    dear = QUICK | {"amounts": ["epochs=40", *(f"scale={2 + one}" for one in range(6))]}
    found = search(shared_backbone(), [manifest], budget=3.0, **dear).summary
    assert [heat["stage"] for heat in found["heats"]] == ["amount", "placement"]
    assert found["skipped"][0] == {
        "stage": "amount", "setting": "v2-3,t2-3@epochs=40", "why": "budget",
    }  # fmt: skip
    # Without places amounts have all of it: 1.75 are more than 0.6 of 2.
    (heat,) = search(
        shared_backbone(), [manifest], budget=2.0, **QUICK | {"placement": ()}
    ).summary["heats"]
    assert len(heat["rivals"]) == 2
    usual = QUICK | {"amounts": None, "placement": ()}
    (heat,) = search(shared_backbone(), [manifest], budget=1.0, **usual).summary["heats"]
    assert heat["rivals"] == ["v2-3,t2-3@scale=1.5"], "of multiples three times the rate alone"
    # A fold takes 2 steps, a full training 6: two folds of two settings 1.33. A budget of 1.3,
    # which was named here, was refused in its turn.
    uneven = RECIPE.changed({"batch_size": 3, "drop_last": False})
    tight = QUICK | {"recipe": uneven, "amounts": ["scale=5"], "placement": ()}
    with pytest.raises(UserError, match=r"one with the default takes 1\.4; raise"):
        search(shared_backbone(), [manifest], budget=1.3, **tight)
    assert search(shared_backbone(), [manifest], budget=1.4, **tight).summary["heats"]
    for number, advice in ((2, ""), (3, ", or take fewer folds")):
        match = rf"0\.1 times a full training allows no comparison; one .* the budget{advice}$"
        with pytest.raises(UserError, match=match):
            search(shared_backbone(), [manifest], budget=0.1, **QUICK | {"folds": number})


@dataclass(frozen=True)
class WarmConfig(MethodConfig):
    name: ClassVar[str] = "warm"
    title: ClassVar[str] = "Warm"


class Warm(va.Method):
    """Learns a temperature: it acts at no block."""

    Config = WarmConfig

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.heat = torch.nn.Parameter(torch.zeros(()))

    def logits(self, backbone: Any, images: torch.Tensor, classes: Any) -> torch.Tensor:
        return super().logits(backbone, images, classes) * self.heat.exp()


def test_a_method_without_placement_searches_its_amount(manifest: Manifest) -> None:
    va.METHODS.register(Warm)
    recipe = Recipe("warm", RECIPE.train, WarmConfig())
    options = QUICK | {"recipe": recipe, "amounts": None, "placement": None}
    found = search(shared_backbone(), [manifest], **options)
    assert {heat["stage"] for heat in found.summary["heats"]} == {"amount"}
    tried = {"@lr=0.15", "@lr=0.15,epochs=3", "@epochs=3", "@lr=0.5", "@lr=0.0167"}
    assert set(found.table["setting"]) == {"zero-shot", "recipe"} | tried


@pytest.mark.parametrize("method", ["linear-probe", "tip", "zero-shot"])
def test_what_no_step_trains_has_no_amount_to_search(method: str, manifest: Manifest) -> None:
    recipe = load_recipe("published", method)
    with pytest.raises(UserError, match=f"{method} has nothing to search"):
        search(shared_backbone(), [manifest], **QUICK | {"recipe": recipe})
    with pytest.raises(UserError, match=f"lr is not read: {method} is fitted in closed form"):
        recipe.at("@lr=0.1,epochs=3")


class FittedConfig(MMAConfig):
    """As MMA, said to be fitted in closed form."""

    @property
    def in_steps(self) -> bool:
        return False


def test_placements_of_what_no_step_trains_are_tried_at_one_amount() -> None:
    recipe = Recipe("fitted", RECIPE.train, FittedConfig((2, 3), (2, 3)))
    check_searchable(recipe.method)
    assert tried_amounts(recipe) == []
    assert [one.label for one in crossed(recipe, [recipe.at("3")])] == ["v3,t3"]


def test_placements_are_tried_at_the_amount_found_and_at_three_times_its_rate() -> None:
    """The rate is a method's scale where it has one; what a placement names itself stays."""
    places = [RECIPE.at(one) for one in ("3", "1-3@lr=0.01")]

    def tried(amount: str) -> list[str]:
        return [one.label for one in crossed(RECIPE.at(amount), places)]

    assert [one.label for one in crossed(RECIPE, places)] == [
        "v3,t3", "v3,t3@scale=1.5", "v1-3,t1-3@lr=0.01",
    ]  # fmt: skip
    assert tried("@scale=5,epochs=2")[:2] == [
        "v3,t3@scale=5,epochs=2", "v3,t3@scale=15,epochs=2",
    ]  # fmt: skip
    assert tried("@epochs=2")[1] == "v3,t3@scale=1.5,epochs=2"
    per_shot = RECIPE.changed({"steps_per_shot": 6})
    assert [str(one.amount) for one in tried_amounts(per_shot)] == [
        "scale=1.5", "scale=1.5,steps_per_shot=18", "steps_per_shot=18", "scale=5", "scale=0.167",
    ]  # fmt: skip
    steps = [
        one.train.steps_per_shot * one.method.to_dict()["scale"] for one in tried_amounts(per_shot)
    ]
    assert steps == pytest.approx([9, 27, 9, 30, 1], rel=0.01)


def test_the_recipes_own_amount_is_no_rival() -> None:
    given = [Amount.parse(words) for words in ("scale=0.5", "epochs=1", "lr=0.05", "scale=5")]
    assert [one.label for one in tried_amounts(RECIPE, given)] == ["v2-3,t2-3@scale=5"]
    places = map(Placement.parse, ("2-3", "2-3@scale=0.5", "@lr=0.05", "@scale=5", "3", "3"))
    found = tried_placements(RECIPE, {"vision": 3, "text": 3}, places)
    assert [one.label for one in found] == ["v2-3,t2-3@scale=5", "v3,t3"]
    usual = tried_placements(RECIPE, {"vision": 12, "text": 12})
    assert [one.label for one in usual] == [
        "v5-12,t5-12", "v1-12,t1-12", "v7-12,t7-12", "v12,t12", "v2-3,t-", "v-,t2-3",
    ]  # fmt: skip
    rpo = load_recipe("published", "rpo")  # which reads in both towers or not at all
    usual = tried_placements(rpo, {"vision": 12, "text": 12})
    assert [one.label for one in usual] == ["v7-12,t7-12", "v12,t12"]
    again = tried_placements(
        RECIPE.at("@scale=5"), {"vision": 3, "text": 3}, [Placement.parse("@scale=5")]
    )
    assert again == []


def test_values_of_one_dataset_that_multiples_replace_are_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    recipe = load_recipe("published", "lasp")
    tell_own_amounts(recipe, ["flickr8k"])
    assert not caplog.text
    tell_own_amounts(recipe, ["eurosat", "flickr8k", "eurosat", "food101"])
    assert (
        "of its own for eurosat (epochs=300), food101 (lr=0.002, epochs=10), which" in caplog.text
    )
    # What multiples leave as it is stays unsaid: a method with a scale keeps each dataset's lr.
    caplog.clear()
    own = {"a": {"lr": 0.1}, "b": {"epochs": 9, "lr": 1.0}, "c": {"settings": {"scale": 2.0}}}
    scaled = replace(RECIPE, datasets=own)
    tell_own_amounts(scaled, own)
    assert "for b (epochs=9), c (scale=2.0), which" in caplog.text
    multiple = scaled.at("@scale=1.5")
    assert multiple.train_for("a").lr == 0.1 and multiple.method_for("c").settings()["scale"] == 1.5
    fitted = Recipe("fitted", RECIPE.train, FittedConfig((2, 3), (2, 3)), datasets=own)
    caplog.clear()
    tell_own_amounts(fitted, own)
    assert not caplog.text


def test_a_rival_that_ties_in_every_fold_is_not_called_worse() -> None:
    tie = Difference(0.0, 0.0, 0.0, 0, (("a", 1, 0, 0.0), ("a", 1, 1, 0.0)))
    worse = Difference(-0.2, -0.3, -0.1, 0, tie.folds)

    plain = Difference(0.1, -0.1, 0.3, 1, tie.folds)

    def said(found: Difference) -> str:
        race: Any = SimpleNamespace(heats=[Heat("placement", "a", ("b",), "b", found, "a")])
        return _statement(race, "a", "a", None, plain)

    assert "the best rival, b, cannot be told from it (+0.000 [0.000, 0.000]" in said(tie)
    assert "every rival that was followed is worse, the best by 0.200" in said(worse)


def test_what_decides_does_not_read_as_0() -> None:
    """Seen: "Training pays: +0.022 [0.000, 0.043]", of a lower bound of 0.00007."""
    plain = Difference(0.0217, 0.0000694, 0.0434, 6, (("a", 1, 0, 0.03), ("a", 1, 1, 0.01)))
    race: Any = SimpleNamespace(heats=[Heat("placement", "a", ("b",), "b", plain, "b")])
    said = _statement(race, "b", "a", None, plain)
    assert said.endswith("Training pays: +0.022 [0.0001, 0.043] against zero-shot CLIP.")
    below = replace(plain, mean=-0.02, low=-0.04, high=-0.000002)
    assert "[-0.040, -0.000002] against" in _statement(race, "b", "a", None, below)
    assert interval(-1e-9, 0.0) == "[0.000, 0.000]" and interval(5e-4, 1) == "[0.001, 1.000]"


def test_the_best_of_several_has_an_interval_for_all_of_them() -> None:
    """Of six rivals that change nothing the best passes 0 far more often than one does."""
    generator = np.random.default_rng(0)
    spreads = np.sqrt(generator.chisquare(8, (2000, 6)) / 8)
    best = np.argmax(means := generator.standard_normal((2000, 6)), axis=1)
    rows = np.arange(2000)
    found = [
        Difference(mean, mean - 2.306 * spread, mean + 2.306 * spread, 1, (), spread, 8)
        for mean, spread in zip(means[rows, best], spreads[rows, best])
    ]
    assert np.mean([one.low > 0 for one in found]) > 0.08
    assert np.mean([one.among(6)[0] > 0 for one in found]) < 0.03
    assert found[0].among(1) == pytest.approx((found[0].low, found[0].high), abs=1e-3)
    gain = Difference(0.3, 0.1, 0.5, 4, (("a", 1, 0, 0.3), ("a", 1, 1, 0.3)), 0.1, 8)
    race: Any = SimpleNamespace(heats=[Heat("placement", "a", ("b", "c"), "b", gain, "b")])
    said = _statement(race, "b", "a", gain, gain)
    low, high = gain.among(2)
    assert f"It is the best of 2; for all at once: [{low:.3f}, {high:.3f}]." in said
    doubtful = replace(gain, low=0.06, high=0.54, spread=0.13)
    assert doubtful.decided and doubtful.among(2)[0] < 0
    said = _statement(race, "b", "a", doubtful, gain)
    assert "], so that as such it cannot be told from the default." in said


def test_placements_of_a_method_of_one_tower_lie_there(manifest: Manifest) -> None:
    made = load_recipe("published", "coop")
    short = {"epochs": 1, "warmup_epochs": 0, "shots": 4, "batch_size": 4, "steps_per_shot": 0}
    recipe = made.changed(short, {})
    options = QUICK | {"recipe": recipe, "amounts": (), "placement": None}
    found = search(shared_backbone(), [manifest], **options)
    tried = [Placement.parse(one) for one in set(found.table["setting"])]
    assert {one.vision for one in tried} == {()} and (1, 2, 3) in {one.text for one in tried}
    assert {heat["stage"] for heat in found.summary["heats"]} == {"placement"}


def test_what_learns_each_class_by_itself_is_tested_on_the_classes_it_trains(
    manifest: Manifest,
) -> None:
    short = {"epochs": 1, "warmup_epochs": 0, "shots": 4, "batch_size": 4, "steps_per_shot": 0}
    recipe = load_recipe("published", "coop").changed(short, {"class_specific": True})
    options = QUICK | {"recipe": recipe, "amounts": ["lr=0.5"], "placement": ()}
    told = " No class was held out whole: coop learns each by itself."
    for novel in (True, False):
        found = search(shared_backbone(), [manifest], **options, novel=novel)
        assert found.table["novel"].isna().all() and found.summary["novel_held_out"] is False
        assert (told in found.statement) is novel, "where nothing novel was asked for"


def test_a_choice_is_tried_at_the_amount_that_it_was_found_at() -> None:
    choice = LayerChoice((2, 3), (3,), "search", {"amount": "scale=5"})
    for given, placed in (
        (choice, "v2-3,t3@scale=5"),
        ([SimpleNamespace(vision=(1,), text=(2,)), "3"], "v1,t2 v3,t3"),
    ):
        found = SearchOptions(placement=given).placement
        assert found is not None and " ".join(map(str, found)) == placed


def planted(effect: float, noise: float, seed: int, count: int = 4) -> pd.DataFrame:
    """Return a search table in which the setting `b` is better than `a` by an effect."""
    generator = np.random.default_rng(seed)
    rows = []
    for fold in range(1, count + 1):
        level = generator.normal()
        for setting, more in (("a", 0.0), ("b", effect)):
            value = level + more + noise * generator.normal()
            rows.append(("amount", "d", 1, fold, 0.25, setting, 50.0, 50.0, value, value, 5, 1.0))
    return pd.DataFrame(rows, columns=list(SEARCH_COLUMNS))


def test_the_interval_is_that_of_nadeau_and_bengio() -> None:
    table = planted(0.2, 0.1, 5)
    wide = table.pivot(index="fold", columns="setting", values="base_log_likelihood")
    paired = (wide["b"] - wide["a"]).to_numpy()
    found = difference(table, "b", "a", "log_likelihood")
    scale = paired.std(ddof=1) * np.sqrt(1 / 4 + 1 / 3)
    low, high = stats.t.interval(0.95, 3, loc=paired.mean(), scale=scale)
    assert (found.mean, found.low, found.high) == pytest.approx((paired.mean(), low, high))
    assert found.wins == (paired > 0).sum()
    assert ranking(table, "a", "log_likelihood") == pytest.approx({"b": paired.mean(), "a": 0.0})


def test_draws_weigh_the_same_and_their_variances_add_up() -> None:
    """Eight folds of one dataset are no more than four of another; their errors are independent."""
    parts = [planted(0.2, 0.1, 5), planted(0.6, 0.1, 6, 8).assign(dataset="e")]
    one, two = (difference(part, "b", "a", "log_likelihood") for part in parts)
    both = difference(pd.concat(parts), "b", "a", "log_likelihood")
    assert both.mean == pytest.approx((one.mean + two.mean) / 2)
    assert both.spread == pytest.approx(np.hypot(one.spread, two.spread) / 2)
    half = stats.t.isf(0.025, 3 + 7) * both.spread
    assert (both.low, both.high) == pytest.approx((both.mean - half, both.mean + half))
    lone = planted(5, 0.1, 7, 1).assign(dataset="f")  # one fold, which has no variance
    more = difference(pd.concat([*parts, lone]), "b", "a", "log_likelihood")
    assert (more.mean, more.low, more.high) == (both.mean, both.low, both.high)
    order = ranking(pd.concat(parts), "a", "log_likelihood")
    assert order == pytest.approx({"b": both.mean, "a": 0.0})


def test_the_log_likelihood_is_the_mean_of_both_halves_or_of_the_one_there_is() -> None:
    table = planted(0.2, 0.0, 1)
    better = table["setting"] == "b"
    table.loc[better, "novel_log_likelihood"] += 0.4
    assert difference(table, "b", "a", "log_likelihood").mean == pytest.approx(0.4)
    assert difference(table, "b", "a", "base_log_likelihood").mean == pytest.approx(0.2)
    bare = table.assign(novel_log_likelihood=np.nan)
    assert difference(bare, "b", "a", "log_likelihood").mean == pytest.approx(0.2)


def test_a_planted_difference_is_found_and_none_is_not() -> None:
    strong = [difference(planted(0.5, 0.05, s), "b", "a", "log_likelihood") for s in range(50)]
    assert all(one.low > 0 for one in strong)
    turned = difference(planted(0.5, 0.05, 0), "a", "b", "log_likelihood")
    assert turned.decided and turned.high < 0, "worse beyond doubt is decided as well"
    none = [difference(planted(0.0, 0.05, s), "b", "a", "log_likelihood") for s in range(300)]
    assert np.mean([one.decided for one in none]) <= 0.05


def test_accuracy_as_criterion_is_the_harmonic_mean() -> None:
    table = planted(0.0, 0.1, 1)
    table.loc[table["setting"] == "b", "novel"] = 30.0
    found = difference(table, "b", "a", "accuracy")
    assert found.mean == pytest.approx(2 * 50 * 30 / 80 - 50)
    bare = table.assign(novel=np.nan, base=table["base"].mask(table["setting"] == "b", 60.0))
    assert difference(bare, "b", "a", "accuracy").mean == pytest.approx(10), "base alone"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "likelihood"}, "did you mean"),
        ({"amounts": ["rate=3"]}, "rate"),
        ({"amounts": ["epochs=0.5"]}, "whole number"),
        ({"placement": ["9"]}, "names vision block 9"),
        ({"seeds": ()}, "there is no seed"),
    ],
)
def test_what_it_refuses(manifest: Manifest, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        search(shared_backbone(), [manifest], **(QUICK | options))


def test_recipes_take_the_amount_that_a_placement_names() -> None:
    made = RECIPE.at(Placement.parse("3@scale=0.3,epochs=15"))
    assert (made.method.vision, made.method.text) == ((3,), (3,))
    assert (made.method.to_dict()["scale"], made.train.epochs) == (0.3, 15)
    assert made.label == "v3,t3@scale=0.3,epochs=15" and made.amount == Amount(0.3, epochs=15)
    with pytest.raises(UserError, match="coop has no scale"):
        load_recipe("published", "coop").at(Placement.parse("@scale=0.3"))
    with pytest.raises(UserError, match="@epochs=1 is all warm-up: coop warms up for 1 epoch;"):
        load_recipe("published", "coop").at("@epochs=1")


def test_more_folds_draw_inner_classes_and_shots_anew(manifest: Manifest) -> None:
    data = TaskData(manifest, shared_backbone())
    made = folds(data, 4, 1, 10)
    assert len(made) == 10 and {fold.held_out for fold in made} == {1 / 4}
    held = Counter(item.path for fold in made[:8] for item in fold.test("base"))
    assert set(held.values()) <= {1, 2}
    splits = {frozenset(fold.names("novel")) for fold in made}
    assert len(splits) > 2, "four classes split in more ways than one pair of halves"


@pytest.mark.parametrize("of_dataset", [False, True])
def test_a_fold_trains_on_its_share_of_steps_per_shot_by_the_values_of_its_dataset(
    of_dataset: bool, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, updates = {"steps_per_shot": 8}, []
    made = RECIPE.changed({} if of_dataset else values)
    made = replace(made, datasets={manifest.name: values} if of_dataset else {})
    update = Trainer.update

    def counting(self: Trainer, *arguments: Any) -> None:
        updates.extend(self.configs)
        update(self, *arguments)

    monkeypatch.setattr(Trainer, "update", counting)
    options = QUICK | {"recipe": made, "amounts": ["scale=5"], "placement": ()}
    table = search(shared_backbone(), [manifest], **options).table
    steps = table.loc[table["stage"] == "amount", "steps"]
    assert set(steps) == {8 * 4 / 4}, "of 4 shots of 4 classes a fold trains 2 of 2 classes"
    assert len(updates) == table["steps"].sum(), "as many are made"


def test_a_whole_draw_keeps_its_steps_and_epochs_shrink_by_themselves() -> None:
    made = RECIPE.changed({"steps_per_shot": 8})
    assert made.train.of_share(1.0) == made.train and RECIPE.train.of_share(0.1) == RECIPE.train
    # To the nearest step, and to one at least.
    shrunk = [made.train.of_share(share).steps_per_shot for share in (0.45, 0.35, 0.01)]
    assert shrunk == [4, 3, 1]


def fold_gains(generator: np.random.Generator, count: int) -> list[float]:
    """Return what predicting the mean of trained shots gains over predicting zero, in each fold.

    Shots are normal about 0.5; of 64 every fold holds out 16.
    """
    shots = generator.normal(0.5, 1, 64)
    gains = []
    for _ in range(count // 4):
        for held in generator.permutation(64).reshape(4, 16):
            mean = np.delete(shots, held).mean()
            gains.append(((shots[held] ** 2 - (shots[held] - mean) ** 2) / 2).mean())
    return gains


def test_the_interval_covers_the_true_difference_and_narrows_with_more_folds() -> None:
    truth = (0.5**2 - 1 / 48) / 2
    generator, widths = np.random.default_rng(1), {}
    for count in (4, 12):
        found = []
        for _ in range(150):
            table, gains = planted(0.0, 0.0, 0, count), np.zeros((count, 2))
            gains[:, 1] = fold_gains(generator, count)  # of the settings a and b
            table = table.assign(
                base_log_likelihood=gains.ravel(), novel_log_likelihood=gains.ravel()
            )
            found.append(difference(table, "b", "a", "log_likelihood"))
        assert np.mean([one.low < truth < one.high for one in found]) > 0.93
        widths[count] = np.mean([one.high - one.low for one in found])
    assert widths[12] < 0.75 * widths[4]
