"""Manifests as a whole: the schema, what is shipped, samples, and agreement with publications."""

from __future__ import annotations

import csv
import json
import os
import pickle
import random
from collections import Counter
from hashlib import sha256
from itertools import permutations
from pathlib import Path

import pytest
from data_fixtures import coop_dataset, folder_dataset, write_manifest, write_pictures

from vlmlayers.errors import UserError
from vlmlayers.manifests import Item, Manifest
from vlmlayers.manifests.items import SPLITS, stratified_split
from vlmlayers.prompts import TEMPLATE

SHIPPED = sorted(path.stem for path in Path(__file__).parents[3].glob("data_manifests/*.toml"))
PAPER = {
    "ImageNet": "imagenet", "Caltech101": "caltech101", "OxfordPets": "oxford_pets",
    "StanfordCars": "stanford_cars", "Flowers102": "oxford_flowers", "Food101": "food101",
    "FGVCAircraft": "fgvc_aircraft", "SUN397": "sun397", "DTD": "dtd", "EuroSAT": "eurosat",
    "UCF101": "ucf101", "ImageNetV2": "imagenet_v2", "ImageNet-Sketch": "imagenet_sketch",
    "ImageNet-A": "imagenet_a", "ImageNet-R": "imagenet_r",
}  # fmt: skip
ON_DISK = {
    "caltech101": (100, 8242), "cifar10": (10, 4000), "cue_conflict": (16, 1280),
    "edges": (16, 160), "silhouettes": (16, 160), "scenes15": (15, 1500),
    "tiny_imagenet": (200, 14000), "tiny_imagenet_shards": (200, 20000), "flickr8k": (0, 1000),
    "rsscn7": (7, 980), "grocery": (81, 4414),
}  # fmt: skip


@pytest.fixture
def shared_root(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLMLAYERS_DATA", str(shared_data))
    return shared_data


# The schema


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('layuot = "folder"\nlayout = "folder"', "unknown key 'layuot'; did you mean 'layout'?"),
        ('layout = "folder"\nzzzzzz = 1', "unknown key 'zzzzzz'; valid: title, kind, folder"),
        ('kind = "x"', "the key 'layout' is missing"),
        ('layout = "zip"', "unknown layout 'zip'; valid: 'coop', 'folder'"),
        ('layout = "coop"', "layout 'coop' needs the key 'split_file'"),
        ('layout = "lists"', "layout 'lists' needs the key 'split_files'"),
        ('layout = "shards"', "layout 'shards' needs the key 'shards'"),
        ('layout = "folder"\ntemplate = "a photo"', "must hold '{}' exactly once"),
        ('layout = "folder"\ntemplate = "{} and {}"', "must hold '{}' exactly once"),
        ('layout = "folder"\ntemplate = "{0} {}"', "must hold '{}' exactly once"),
        ('layout = "folder"\nfolder = "../x"', "leaves the dataset's folder"),
        ('layout = "folder"\nfolder = "/etc"', "leaves the dataset's folder"),
        ('layout = "folder"\nimages = "a/../../b"', "leaves the dataset's folder"),
        ('layout = "folder"\ncounts = { dev = 3 }', "'dev' is not a split"),
        ('layout = "folder"\ncounts = { test = -3 }', "counts.test is -3; at least 0"),
        ('layout = "folder"\ncarve = { test = 0.1 }', "carve can only make 'val'"),
        (
            'layout = "coop"\nsplit_file = "s.json"\nclass_names = ["a"]',
            "layout 'coop' does not read 'class_names'",
        ),
        ('layout = "folder"\ncolumns = { label = "a" }', "layout 'folder' does not read 'columns'"),
        (
            'layout = "captions"\nsplit_file = "c"\nfractions = { train = 0.5, test = 0.5 }',
            "layout 'captions' does not read 'fractions'",
        ),
        (
            'layout = "folder"\nsplit_folders = { train = "a" }\n'
            "fractions = { train = 0.5, test = 0.5 }",
            "fractions divide a folder without split_folders",
        ),
        ('layout = "folder"\nfractions = { train = 0.5, test = 0.1 }', "add up to 0.6, not to 1"),
        (
            'layout = "folder"\ncolumns = { pth = "x" }',
            "unknown key 'columns.pth'; did you mean 'path'?",
        ),
        ('layout = "folder"\nsplit_sha256 = "abc"', "split_sha256 is 'abc'"),
        ('layout = "builtin"', "layout 'builtin' is for datasets that are drawn by code"),
        ("layout = ", "is not valid TOML"),
        ("x = " + "[" * 5000, "is not valid TOML: nested too deeply"),
    ],
)
def test_a_wrong_manifest_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = write_manifest(tmp_path, text)
    with pytest.raises(UserError) as caught:
        Manifest.load(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_manifests(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.toml does not exist"):
        Manifest.load(tmp_path / "absent.toml")
    (tmp_path / "large.toml").write_bytes(b"#" * 4_000_001)
    with pytest.raises(UserError, match="is larger than 4,000,000 bytes"):
        Manifest.load(tmp_path / "large.toml")
    (tmp_path / "latin.toml").write_bytes('title = "é"'.encode("latin-1"))
    with pytest.raises(UserError, match="is not valid TOML"):
        Manifest.load(tmp_path / "latin.toml")
    for name in ("image.png", "shard.tar", "items.xlsx", "split.json"):
        (tmp_path / name).write_bytes(b"\x89")
        with pytest.raises(UserError, match=f"{name} is neither a folder of images, nor a table"):
            Manifest.load(tmp_path / name)


def test_unknown_name_comes_with_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown dataset 'caltech_101'; did you mean 'caltech101'"):
        Manifest.load("caltech_101")


def test_hash_follows_the_content_and_not_the_comments(tmp_path: Path) -> None:
    text = 'layout = "folder"\nkind = "a"'
    plain = Manifest.load(write_manifest(tmp_path / "a", text))
    commented = Manifest.load(write_manifest(tmp_path / "b", "# why\n" + text))
    changed = Manifest.load(write_manifest(tmp_path / "c", text.replace('"a"', '"b"')))
    assert plain.hash == commented.hash != changed.hash
    assert pickle.loads(pickle.dumps(plain)) == plain
    assert len({plain, pickle.loads(pickle.dumps(plain)), changed}) == 2


def test_own_folder_of_manifests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_manifest(tmp_path, 'title = "Mine"\nlayout = "folder"', name="mine")
    write_manifest(tmp_path, 'title = "My DTD"\nlayout = "folder"', name="dtd")
    monkeypatch.setenv("VLMLAYERS_MANIFESTS", str(tmp_path))
    assert {"mine", "caltech101"} <= set(Manifest.names())
    assert Manifest.load("mine").title == "Mine"
    assert Manifest.load("dtd").title == "My DTD"


# What is shipped


def test_shipped_manifests_agree_with_the_papers_table(shared_paper: Path) -> None:
    with (shared_paper / "datasets.csv").open(encoding="utf-8") as handle:
        rows = {row["dataset"]: row for row in csv.DictReader(handle)}
    assert set(rows) == set(PAPER)
    for title, name in PAPER.items():
        manifest, row = Manifest.load(name), rows[title]
        assert manifest.title == title
        assert manifest.spec.classes == int(row["classes"])
        assert manifest.spec.folder + "/" == row["folder"]
        assert manifest.template == TEMPLATE == row["mma_public_config_template"]
        assert manifest.zero_shot_template == row["zero_shot_template(CoOp zsclip.py)"]
        expected = {split: row[split] for split in ("train", "val", "test") if row[split] != "-"}
        if name == "imagenet":
            assert expected.pop("train") == "1.28M"
            assert round(manifest.spec.counts["train"] / 1e6, 2) == 1.28
        counts = {key: str(count) for key, count in manifest.spec.counts.items()}
        assert expected.items() <= counts.items()
        assert len(counts) == len(expected) + (name == "imagenet")
        if row["split_json"].endswith(".json"):
            assert Path(manifest.spec.split_file[0]).name == row["split_json"]


def test_every_shipped_manifest_is_complete() -> None:
    assert len(SHIPPED) >= 23
    for name in SHIPPED:
        spec = Manifest.load(name).spec
        assert spec.licence and spec.citation and spec.get and spec.counts and spec.kind, name
        assert spec.classes is not None, name


@pytest.mark.shared
@pytest.mark.parametrize(("name", "expected"), ON_DISK.items())
def test_datasets_on_disk(name: str, expected: tuple[int, int], shared_root: Path) -> None:
    manifest = Manifest.load(name)
    result = manifest.check()
    assert result.state == "complete", result.line()
    assert (len(manifest.class_names()), result.found) == expected
    items = manifest.items(manifest.splits()[-1])
    assert manifest.open_image(items[-1]).mode == "RGB"
    assert all(manifest.class_names()[item.label] == item.class_name for item in items[:50]
               if item.label >= 0)  # fmt: skip


@pytest.mark.shared
@pytest.mark.parametrize("shots", [1, 4, 16])
@pytest.mark.parametrize("name", ["caltech101", "dtd", "oxford_pets"])
def test_published_few_shot_draws(name: str, shots: int, shared_root: Path) -> None:
    """The order of the items is what makes an independent publication of the draws come out."""
    by_label: dict[int, list[Item]] = {}
    for item in Manifest.load(name).items("train"):
        by_label.setdefault(item.label, []).append(item)
    generator = random.Random(1)
    drawn = [item for items in by_label.values() for item in generator.sample(items, shots)]
    path = shared_root / f"coop_splits/indices/{name}/shot_{shots}-seed_1.json"
    published = json.loads(path.read_text())["train"]["data"]
    assert [(item.label, item.class_name) for item in drawn] == [
        (entry["label"], entry["classname"]) for entry in published
    ]
    assert all(e["impath"].endswith(f"/{item.path}") for e, item in zip(published, drawn))


@pytest.mark.shared
@pytest.mark.parametrize(
    "name", ["caltech101", "dtd", "eurosat", "oxford_flowers", "oxford_pets", "stanford_cars",
             "ucf101"]
)  # fmt: skip
def test_class_names_agree_with_their_publication(name: str, shared_root: Path) -> None:
    text = (shared_root / f"coop_splits/classnames/{name}.txt").read_text(encoding="utf-8")
    assert list(Manifest.load(name).class_names()) == text.split("\n")[: text.count("\n")]


@pytest.mark.shared
def test_items_without_a_single_image(shared_root: Path) -> None:
    manifest = Manifest.load("eurosat")
    assert not (shared_root / "eurosat").exists()
    assert [len(manifest.items(s)) for s in ("train", "val", "test")] == [13500, 5400, 8100]
    assert manifest.items("train")[0] == Item(
        "AnnualCrop/AnnualCrop_1381.jpg", 0, "Annual Crop Land"
    )


@pytest.mark.shared
def test_present_items_only(shared_root: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = Manifest.load("dtd")
    present = manifest.items("all", present_only=True)
    assert len(present) == 1200
    assert "dtd all: 4440 of 5640 items are not on disk and are left out" in caplog.text
    assert len({item.label for item in present}) == 10
    assert len(manifest.class_names()) == 47
    drawn = manifest.sample("train", 50, present_only=True)
    assert set(Counter(item.label for item in drawn).values()) == {5}


@pytest.mark.shared
def test_shards_hold_other_images_of_the_same_classes(shared_root: Path) -> None:
    shards, folder = Manifest.load("tiny_imagenet_shards"), Manifest.load("tiny_imagenet")
    assert shards.class_names() == folder.class_names()
    assert shards.class_names()[:2] == ("goldfish", "European fire salamander")
    items = shards.items("train")
    stems = {item.path.rpartition("/")[2].partition(".")[0] for item in items}
    assert not stems & {Path(item.path).stem for item in folder.items("train")}
    wnids = sorted({path.name for path in (shared_root / "tiny-imagenet/train").iterdir()})
    assert all(wnids[item.label] in item.path for item in items[::97])


@pytest.mark.shared
def test_captions_are_paired_with_their_image(shared_root: Path) -> None:
    manifest = Manifest.load("flickr8k")
    first = manifest.items("train")[0]
    assert first.path == "1000268201_693b08cb0e.jpg"
    assert len(first.captions) == 5
    assert first.captions[1] == "A girl going into a wooden building ."
    lines = (shared_root / "flickr8k/captions.tsv").read_text().splitlines()
    assert manifest.items("test")[-1].path == lines[-1].partition("\t")[0]
    assert first.label == -1 and manifest.class_names() == ()


# Built-in datasets


def test_built_in_datasets_are_listed_and_drawn() -> None:
    built_in = [name for name in Manifest.names() if Manifest.load(name).layout == "builtin"]
    assert {"digits", "textures"} <= set(built_in)
    for name in built_in:
        manifest = Manifest.load(name)
        assert manifest.check().state == "built-in"
        item = manifest.items("test")[3]
        assert item.path == "test/000003"
        assert item.class_name == manifest.class_names()[item.label]
        assert item.captions[0]
        assert manifest.open_image(item, size=32).size == (32, 32)
        with pytest.raises(UserError, match="is drawn by code; its items have no files"):
            manifest.location(item)


# Names, prompts, samples


NAMES = [
    "<b>bold</b>", "{} {0} {name}", "two\nlines", "שלום עולם", "🦊", "x" * 10_000, "a_b", "100 %s",
]  # fmt: skip


def test_any_class_name_goes_through(tmp_path: Path) -> None:
    lists = {"train": [[f"{i}.jpg", i, name] for i, name in enumerate(NAMES)]}
    manifest = coop_dataset(tmp_path, lists)
    assert list(manifest.class_names()) == NAMES
    prompts = manifest.prompts()
    assert prompts[1] == "a photo of a {} {0} {name}."
    assert prompts[6] == "a photo of a a b."
    assert manifest.prompts(template="{}!")[7] == "100 %s!"


@pytest.mark.parametrize("classes", [1, 2, 5000])
def test_any_number_of_classes(tmp_path: Path, classes: int) -> None:
    lists = {"test": [[f"{i}.jpg", i % classes, f"c{i % classes}"] for i in range(3 * classes)]}
    manifest = coop_dataset(tmp_path, lists)
    assert manifest.class_names() == tuple(f"c{i}" for i in range(classes))
    drawn = manifest.sample("test", 2 * classes, seed=4)
    assert set(Counter(item.label for item in drawn).values()) == {2}


def test_samples_are_balanced_nested_and_in_order(tmp_path: Path) -> None:
    labels = [0] * 40 + [1] * 5 + [2] * 40
    lists = {"train": [[f"{i}.jpg", label, str(label)] for i, label in enumerate(labels)]}
    manifest = coop_dataset(tmp_path, lists)
    items = manifest.items("train")
    small, large = manifest.sample("train", 12, seed=3), manifest.sample("train", 45, seed=3)
    assert Counter(item.label for item in small) == {0: 4, 1: 4, 2: 4}
    assert Counter(item.label for item in large) == {0: 20, 1: 5, 2: 20}
    assert set(small) < set(large)
    assert [items.index(item) for item in large] == sorted(items.index(item) for item in large)
    assert manifest.sample("train", 12, seed=3) == small != manifest.sample("train", 12, seed=4)
    assert manifest.sample("train", 1000) == items
    # Which class has one item more is drawn as well.
    assert {manifest.sample("train", 1, seed=seed)[0].label for seed in range(30)} == {0, 1, 2}
    state = random.getstate()
    manifest.sample("train", 5)
    assert random.getstate() == state
    with pytest.raises(UserError, match="n takes a whole number from 1, not 0"):
        manifest.sample("train", 0)


def test_a_draw_among_what_is_there_is_as_large_as_one_of_all(tmp_path: Path) -> None:
    paths = [f"train/{name}/{i}.png" for name in "ab" for i in range(6)]
    rows = [[path, int("/b/" in path), path[6]] for path in paths]
    manifest = coop_dataset(tmp_path, {"train": rows})
    write_pictures(tmp_path, there := paths[::2])
    drawn = manifest.sample("train", 6, present_only=True)
    assert [item.path for item in drawn] == there


def test_renames_and_filters_close_the_labels_up(tmp_path: Path) -> None:
    rows = [[f"{i}.jpg", i % 4, "abcd"[i % 4]] for i in range(8)]
    extra = 'drop_classes = ["b"]\nrenames = { d = "delta" }'
    manifest = coop_dataset(tmp_path / "1", {"train": rows}, extra)
    assert manifest.class_names() == ("a", "c", "delta")
    assert [(item.label, item.class_name) for item in manifest.items("train")] == [
        (0, "a"), (1, "c"), (2, "delta"), (0, "a"), (1, "c"), (2, "delta"),
    ]  # fmt: skip
    only = coop_dataset(tmp_path / "2", {"train": rows}, 'only_classes = ["d", "b"]')
    assert only.class_names() == ("b", "d")
    renamed = 'renames = { d = "delta" }\n'
    for name in ("d", "delta"):  # as the files have it, or as it is called here
        left = coop_dataset(tmp_path / name, {"train": rows}, f'{renamed}drop_classes = ["{name}"]')
        assert left.class_names() == ("a", "b", "c")
        one = coop_dataset(tmp_path / name, {"train": rows}, f'{renamed}only_classes = ["{name}"]')
        assert [(i.label, i.class_name) for i in one.items("train")] == [(0, "delta")] * 2
    wrong = coop_dataset(tmp_path / "3", {"train": rows}, 'only_classes = ["abcd"]')
    with pytest.raises(UserError, match="unknown class 'abcd' in only_classes of"):
        wrong.items("train")


# Splits


def test_splits_that_are_not_there(tmp_path: Path) -> None:
    paths = [f"{split}/{name}/{i}.png" for split in ("train", "test") for name in "ab"
             for i in range(10)]  # fmt: skip
    extra = 'split_folders = { train = "train", test = "test" }\n'
    manifest = folder_dataset(tmp_path, paths, extra)
    with pytest.raises(UserError, match="sample has no split 'val'; it has: train, test; `carve`"):
        manifest.items("val")
    with pytest.raises(UserError, match="unknown split 'tset'; did you mean 'test'"):
        manifest.items("tset")
    carved = folder_dataset(tmp_path, [], extra + "carve = { val = 0.2 }")
    assert carved.splits() == ("train", "val", "test")
    train, val = carved.items("train"), carved.items("val")
    assert Counter(item.label for item in val) == {0: 2, 1: 2}
    assert {*train, *val} == set(manifest.items("train")) and len(train) == 16
    assert carved.items("test") == manifest.items("test")
    first = sorted(train + val, key=lambda item: sha256(item.path.encode()).hexdigest())
    for name in "ab":  # those of the lowest hashes
        paths = [item.path for item in first if item.class_name == name]
        assert {item.path for item in val if item.class_name == name} == {*paths[:2]}


def test_a_val_that_is_there_is_not_carved_again(tmp_path: Path) -> None:
    rows = {part: [[f"{part}{i}.jpg", 0, "a"] for i in range(5)] for part in ("train", "val")}
    plain = coop_dataset(tmp_path / "1", rows)
    both = coop_dataset(tmp_path / "2", rows, "carve = { val = 0.4 }")
    assert [both.items(part) for part in rows] == [plain.items(part) for part in rows]


def test_captions_stay_with_images_whose_class_is_renamed(tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text("path,class_name,caption\na.png,x,one\na.png,x,two\n")
    text = 'layout = "table"\nsplit_file = "items.csv"\nrenames = { x = "y" }'
    (item,) = Manifest.load(write_manifest(tmp_path, text)).items("train")
    assert item == Item("a.png", 0, "y", ("one", "two"))


@pytest.mark.parametrize("count", range(1, 8))
@pytest.mark.parametrize("shares", [(0.5, 0.2, 0.3), (0.05, 0.5, 0.45), (0.01, 0.98, 0.01)])
@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_a_split_leaves_an_image_to_train_on_in_whatever_order_it_is_written(
    count: int, shares: tuple[float, ...], order: tuple[int, ...]
) -> None:
    items = [Item(f"{i}.png", 0, "only") for i in range(count)]
    fractions = {SPLITS[i]: shares[i] for i in order}
    parts = stratified_split(items, fractions)
    assert sorted(i.path for part in parts.values() for i in part) == [i.path for i in items]
    assert parts["train"]


def test_images_are_divided_by_the_hash_of_their_paths() -> None:
    """Files of one scene follow each other by name: shares of names would be of other scenes."""
    items = [Item(f"{name}/{i:02d}.png", k, name) for k, name in enumerate("ab") for i in range(10)]
    parts = stratified_split(items, {"train": 0.7, "val": 0.1, "test": 0.2})
    for name in "ab":
        paths = [item.path for item in items if item.class_name == name]
        ranked = sorted(paths, key=lambda path: sha256(path.encode()).hexdigest())
        drawn = (ranked[:7], ranked[7:8], ranked[8:])  # 0.7 + 0.1 is a little less than 0.8
        for part, expected in zip(parts.values(), drawn, strict=True):
            assert [i.path for i in part if i.class_name == name] == sorted(expected)


def test_a_val_that_is_carved_leaves_the_only_image_of_a_class(tmp_path: Path) -> None:
    rows = [["a0.jpg", 0, "a"], *([f"b{i}.jpg", 1, "b"] for i in range(5))]
    manifest = coop_dataset(tmp_path, {"train": rows}, "carve = { val = 0.2 }")
    assert Counter(item.class_name for item in manifest.items("train")) == {"a": 1, "b": 4}
    assert Counter(item.class_name for item in manifest.items("val")) == {"b": 1}


def test_a_list_beside_its_manifest_goes_before_one_under_the_data_root(tmp_path: Path) -> None:
    manifest = coop_dataset(tmp_path / "mine", {"train": [["a.jpg", 0, "x"]]})
    coop_dataset(tmp_path / "root", {"train": [["b.jpg", 0, "x"]] * 2})
    assert [i.path for i in manifest.items("train", root=tmp_path / "root")] == ["a.jpg"]
    (tmp_path / "mine" / "split.json").unlink()
    assert len(manifest.items("train", root=tmp_path / "root")) == 2


def test_a_list_that_changed_is_read_again_though_its_time_is_the_same(tmp_path: Path) -> None:
    for count in (1, 2):
        manifest = coop_dataset(tmp_path, {"train": [["a.jpg", 0, "x"]] * count})
        os.utime(tmp_path / "split.json", (1, 1))
        assert len(manifest.items("train")) == count


def test_data_root_comes_from_argument_then_variable_then_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, place in enumerate(["argument", "variable", "here/data"], start=1):
        rows = [["a.jpg", 0, "x"]] * number
        coop_dataset(tmp_path / place / "set", {"train": rows})
    path = write_manifest(
        tmp_path, 'folder = "set"\nlayout = "coop"\nsplit_file = "set/split.json"'
    )
    manifest = Manifest.load(path)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("VLMLAYERS_DATA", raising=False)
    assert len(manifest.items("train")) == 3
    monkeypatch.setenv("VLMLAYERS_DATA", str(tmp_path / "variable"))
    assert len(manifest.items("train")) == 2
    assert len(manifest.items("train", root=tmp_path / "argument")) == 1
