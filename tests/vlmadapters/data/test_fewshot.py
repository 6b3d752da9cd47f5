"""The few-shot draw against an independent publication of it, and the split into halves."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from backbones import shared_backbone
from PIL import Image

from vlmadapters.data.fewshot import (
    base_or_novel,
    few_shot,
    few_shot_validation,
    kind_labels,
)
from vlmadapters.data.folds import folds
from vlmadapters.data.task import TaskData
from vlmlayers.errors import UserError
from vlmlayers.manifests import Item, Manifest
from vlmlayers.prompts import class_prompts


@pytest.mark.parametrize("kind", ["all", "base", "novel"])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_items_of_each_split_have_the_labels_of_the_classes_asked_for(
    kind: str, split: str
) -> None:
    data = TaskData("shapes_filled", shared_backbone())
    draw = {"train": data.shots, "val": data.validation}.get(split)
    items = data.test(kind) if draw is None else draw(2, 1, kind)
    task = data.task(kind)
    assert {item.label for item in items} == set(range(len(task.class_names)))
    assert all(item.class_name == task.class_names[item.label] for item in items)
    assert {*task.class_names} | {*task.other_names} == {*data.class_names}
    assert {item.path for item in items} <= {item.path for item in data.manifest.items(split)}


@pytest.mark.parametrize("dataset", ["caltech101", "dtd", "oxford_pets"])
@pytest.mark.parametrize("shots", [1, 4, 16])
def test_the_draw_is_the_published_one(dataset: str, shots: int, shared_data: Path) -> None:
    path = shared_data / "coop_splits/indices" / dataset / f"shot_{shots}-seed_1.json"
    published = json.loads(path.read_text())
    data = TaskData(dataset, shared_backbone(), shared_data)
    train, val = (data.manifest.items(split, root=shared_data) for split in ("train", "val"))
    drawn = few_shot(train, shots, seed=1)
    validating = few_shot_validation(val, train, shots, seed=1)
    for items, split in ((drawn, "train"), (validating, "val")):
        for item, expected in zip(items, published[split]["data"], strict=True):
            assert expected["impath"].endswith("/" + item.path)
            assert (item.label, item.class_name) == (expected["label"], expected["classname"])
    assert data.shots(shots, 1, "all", readable=False) == drawn
    assert data.shots(shots, 1, "all", "val", readable=False) == validating


def some_items(classes: int = 5, each: int = 7) -> list[Item]:
    return [Item(f"{i}.jpg", i % classes, f"class_{i % classes}") for i in range(classes * each)]


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_the_draw_depends_on_items_shots_and_seed_alone(seed: int) -> None:
    random.seed(99)
    state = random.getstate()
    first = few_shot(some_items(), 3, seed)
    assert random.getstate() == state
    random.seed(5)
    assert few_shot(some_items(), 3, seed) == first
    assert few_shot(some_items(), 3, seed + 1) != first
    labels = [item.label for item in first]
    assert labels == sorted(labels)
    assert len(set(first)) == 15


def test_classes_draw_in_the_order_in_which_they_first_appear() -> None:
    items = [Item(f"{label}-{i}.jpg", label, str(label)) for i in range(5) for label in (2, 0, 1)]
    generator = random.Random(3)
    expected = [generator.sample([i for i in items if i.label == one], 2) for one in (2, 0, 1)]
    assert few_shot(items, 2, 3) == [item for drawn in expected for item in drawn]


def test_a_small_class_gives_all_it_has() -> None:
    items = [*some_items(2, 5), Item("only.jpg", 2, "rare")]
    drawn = few_shot(items, 4, 1)
    assert [item.label for item in drawn] == [0] * 4 + [1] * 4 + [2]


def test_classes_with_fewer_images_than_shots_are_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Results name the shots asked for, and nothing else tells of those that are not there."""
    for name, size in (("blue", 6), ("green", 2), ("red", 6), ("white", 6)):
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(size):
            Image.new("RGB", (4, 4), name).save(tmp_path / "train" / name / f"{number}.png")
    data = TaskData(str(tmp_path), shared_backbone())
    assert [len(data.shots(4, seed, "base")) for seed in (1, 2)] == [6, 6]
    assert len(data.shots(4, 1, "novel")) == 8
    (said,) = caplog.messages
    assert "1 of 2 classes trained on have fewer than 4 images, the smallest 2" in said
    caplog.clear()
    folds(data, 4, 1, 2)[0].shots(4, 1, "all")
    assert not caplog.messages


def test_classes_without_an_image_are_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They stay answers to choose from, and no image is theirs."""
    for name in ("blue", "green", "red", "white"):
        for split in ("train", "test"):
            (tmp_path / split / name).mkdir(parents=True)
            if (split, name) != ("test", "green"):
                Image.new("RGB", (4, 4), name).save(tmp_path / split / name / "0.png")
    data = TaskData(str(tmp_path), shared_backbone())
    for _ in range(2):
        data.check("all", "train")
        data.check("base", "test")
        data.check("novel", "test")
    (said,) = caplog.messages
    assert "no image of 1 of 2 classes in split 'test', such as 'green'" in said
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "train" / "blue" / "1.png")
    parts = folds(TaskData(str(tmp_path), shared_backbone()), 2, 1, 2)
    caplog.clear()
    held_out = [{item.label for item in one.test("all")} for one in parts]
    for one in parts:
        one.check("all", "test")
    assert {0} in held_out and not caplog.messages  # green's one image is in one fold at most


def test_classes_of_few_images_are_tested_in_every_fold(tmp_path: Path) -> None:
    """Two with two images each, drawn as the inner base ones, stopped a search at fold 7."""
    for name, size in zip("abcdefgh", (8, 8, 2, 2, 1, 1, 1, 1)):
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(size):
            Image.new("RGB", (4, 4)).save(tmp_path / "train" / name / f"{number}.png")
    data = TaskData(str(tmp_path), shared_backbone())
    for seed in range(4):
        for fold in folds(data, 8, seed, 8):
            assert {0, 1} <= {item.label for item in fold.test("all")}
            assert {0, 1} == {item.label for item in fold.shots(8, 1, "base")}


def test_all_that_is_drawn_is_of_the_items_that_were_first_listed(tmp_path: Path) -> None:
    """An image added in the middle of a run is in no draw of it: the identity does not name it."""

    def add(number: int) -> None:
        for folder in ("train/blue", "train/red", "test/blue", "test/red"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4)).save(tmp_path / folder / f"{number}.png")

    for number in range(3):
        add(number)
    data = TaskData(str(tmp_path), shared_backbone())
    data.check("all", "train")
    data.check("all", "test")
    add(3)
    assert [len(data.shots(8, seed, "all")) for seed in (1, 2)] == [6, 6]
    assert len(data.test("all")) == 6
    assert len(TaskData(str(tmp_path), shared_backbone()).shots(8, 1, "all")) == 8


def test_test_images_among_those_for_training_are_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [f"{name}/{i}.png,{name}" for name in ("blue", "green", "red") for i in range(4)]
    table = tmp_path / "leaky.csv"
    for shared, tested in (([], rows[3:4]), (rows[:2], rows[:3])):
        train = [row for row in rows if row in shared or row not in tested]
        listed = [f"{row},{split}" for split, part in (("train", train), ("test", tested))
                  for row in part]  # fmt: skip
        table.write_text("\n".join(["path,label,split", *listed]))
        data = TaskData(str(table), shared_backbone())
        # No image is there: nothing is opened.
        told = [data.tell_of_shared() for _ in range(2)]
        assert told == 2 * [
            "2 of 3 test images of leaky are among its training images, first blue/0.png"
            if shared
            else ""
        ]
        assert caplog.messages == [one for one in told[:1] if one]
        assert data.tell_of_shared("val") == ""  # there is none


def test_halves_are_cut_at_the_sorted_labels_and_relabelled() -> None:
    assert kind_labels("base", [3, 1, 0, 2, 4]) == (0, 1, 2)
    assert kind_labels("novel", [3, 1, 0, 2, 4]) == (3, 4)
    items = some_items()
    base, novel = base_or_novel(items, "base", range(5)), base_or_novel(items, "novel", range(5))
    assert {i.label for i in base} == {0, 1, 2}
    assert {(i.label, i.class_name) for i in novel} == {(0, "class_3"), (1, "class_4")}
    assert len(base) + len(novel) == len(items)
    assert base_or_novel(items, "all", range(5)) == items


def test_counts_of_the_published_splits(shared_data: Path) -> None:
    counts = {"caltech101": (50, 50), "oxford_pets": (19, 18), "dtd": (24, 23), "eurosat": (5, 5)}
    for name, expected in counts.items():
        labels = {item.label for item in Manifest.load(name).items("train", root=shared_data)}
        assert tuple(len(kind_labels(kind, labels)) for kind in ("base", "novel")) == expected


def test_prompts_replace_underscores_and_keep_braces_of_names() -> None:
    assert class_prompts(["a_b", "c{}d"], "a photo of a {}.") == [
        "a photo of a a b.",
        "a photo of a c{}d.",
    ]


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="shots is 0"):
        few_shot(some_items(), 0, 1)
    with pytest.raises(UserError, match="no items to draw from"):
        few_shot([], 1, 1)
    with pytest.raises(UserError, match="did you mean 'novel'"):
        kind_labels("novle", [1])
    with pytest.raises(UserError, match="exactly once"):
        class_prompts(["x"], "no place")
