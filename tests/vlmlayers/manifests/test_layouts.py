"""Each layout: what it reads, in which order, and what it refuses."""

from __future__ import annotations

import json
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pandas as pd
import pytest
from data_fixtures import coop_dataset, folder_dataset, write_manifest, write_pictures

from vlmlayers.errors import UserError
from vlmlayers.manifests import Item, Manifest, distinct

OUTSIDE = ["../secret.jpg", "/etc/passwd", "a/../../b.jpg", "..", "\\\\host\\x.jpg", "C:/x.jpg",
           "a\\..\\b.jpg", ""]  # fmt: skip


# CoOp's split files


def test_coop_keeps_the_files_order(tmp_path: Path) -> None:
    rows = [["z/2.jpg", 1, "zebra"], ["a/1.jpg", 0, "ant"], ["z/1.jpg", 1, "zebra"]]
    manifest = coop_dataset(tmp_path, {"train": rows, "test": [["a/9.jpg", 0, "ant"]], "val": []})
    assert manifest.items("train") == [Item(*row) for row in rows]
    assert manifest.splits() == ("train", "test")
    assert manifest.class_names() == ("ant", "zebra")
    assert [item.path for item in manifest.items("all")][-1] == "a/9.jpg"


@pytest.mark.parametrize("path", OUTSIDE)
def test_coop_paths_stay_inside(tmp_path: Path, path: str) -> None:
    manifest = coop_dataset(tmp_path, {"train": [["ok.jpg", 0, "x"], [path, 0, "x"]]})
    with pytest.raises(UserError, match=r"entry 1 names .*leaves the dataset's folder; refused"):
        manifest.items("train")


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ("{", "is not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"train": [["a", ' + "9" * 5000 + ', "x"]]}', "is not valid JSON"),
        ([], "no 'train', 'val' or 'test' at its top"),
        ({"dev": []}, "no 'train', 'val' or 'test' at its top"),
        ({"train": {"a": 1}}, "is not a list of [path, label, class name]"),
        ({"train": [["a.jpg", 0]]}, "expected [path, label, class name]"),
        ({"train": [[3, 0, "x"]]}, "has '3' where a path is expected"),
        ({"train": [["a.jpg", "0", "x"]]}, "labels are whole numbers from 0"),
        ({"train": [["a.jpg", True, "x"]]}, "labels are whole numbers from 0"),
        ({"train": [["a.jpg", -1, "x"]]}, "labels are whole numbers from 0"),
        ({"train": [["a.jpg", 0, None]]}, "has 'None' where text is expected"),
        ({"train": [["a.jpg", 0, "\ud800"]]}, "where text is expected"),
        ({"train": [["a\0.jpg", 0, "x"]]}, "is not a usable file name; refused"),
        ({"train": [["\ud800.jpg", 0, "x"]]}, "is not a usable file name; refused"),
        ({"train": [["a.jpg", 0, "x"], ["b.jpg", 0, "y"]]}, "label 0 has two class names, 'x' and"),
        ({"train": [["a.jpg", 10**9, "x"]]}, "labels must be 0, 1, 2, …; 0 is missing"),
    ],
)
def test_coop_refuses_what_is_no_split_file(tmp_path: Path, lists: object, message: str) -> None:
    manifest = coop_dataset(tmp_path, lists)
    with pytest.raises(UserError) as caught:
        manifest.items("train")
    assert message in str(caught.value) and "split.json" in str(caught.value)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()


def test_coop_missing_and_altered_split_files(tmp_path: Path) -> None:
    extra = f'split_sha256 = "{"0" * 64}"\nget = "https://example.org/split.json"'
    manifest = coop_dataset(tmp_path, {"train": [["a.jpg", 0, "x"]]}, extra)
    with pytest.raises(UserError, match=r"is altered: its sha256 is \w{12}…, the manifest expects"):
        manifest.items("train")
    (tmp_path / "split.json").unlink()
    with pytest.raises(
        UserError, match=r"split file not found at .* get it: https://example.org/s"
    ):
        manifest.items("train")


@pytest.mark.parametrize(
    ("layout", "row"), [("table", "path,class_name\na.jpg,{}\n"), ("captions", "a.jpg\t{}\n")]
)
def test_other_lists_are_compared_with_their_hash_too(
    tmp_path: Path, layout: str, row: str
) -> None:
    known = sha256(row.format("x").encode()).hexdigest()
    text = f'layout = "{layout}"\nsplit_file = "items.csv"\nsplit_sha256 = "{known}"'
    manifest = Manifest.load(write_manifest(tmp_path, text))
    (tmp_path / "items.csv").write_text(row.format("x"))
    assert [item.path for item in manifest.items("train")] == ["a.jpg"]
    (tmp_path / "items.csv").write_text(row.format("other"))
    with pytest.raises(UserError, match="items.csv is altered: its sha256 is"):
        manifest.items("train")


def test_numbers_of_declared_names_count_from_one_only_where_all_of_them_fit(
    tmp_path: Path,
) -> None:
    def read(*numbers: int) -> list[str]:
        rows = "".join(f"{number}.jpg,{number}\n" for number in numbers)
        (tmp_path / "items.csv").write_text(f"path,label\n{rows}")
        text = 'layout = "table"\nsplit_file = "items.csv"\nclass_names = ["x", "y", "z"]'
        manifest = Manifest.load(write_manifest(tmp_path, text))
        items = [item for split in manifest.splits() for item in manifest.items(split)]
        return [item.class_name for item in sorted(items, key=lambda item: item.path)]

    assert read(0, 1, 2) == ["x", "y", "z"]
    assert read(1, 2, 3) == ["x", "y", "z"]
    assert read(1, 2) == ["y", "z"]  # images of the first class are missing
    with pytest.raises(UserError, match="has label 3; labels are 0 to 2"):
        read(0, 1, 2, 3)


def test_coop_reads_a_file_again_after_it_changed(tmp_path: Path) -> None:
    manifest = coop_dataset(tmp_path, {"train": [["a.jpg", 0, "x"]]})
    assert len(manifest.items("train")) == 1
    coop_dataset(tmp_path, {"train": [["a.jpg", 0, "x"], ["b.jpg", 0, "x"]]})
    assert len(manifest.items("train")) == 2


# Image folders


def test_folder_sorts_classes_and_files(tmp_path: Path) -> None:
    paths = ["test/b/1.png", "train/b/2.PNG", "train/a/deep/3.jpg", "train/b/1.png"]
    splits = 'split_folders = { train = "train", test = "test" }'
    manifest = folder_dataset(tmp_path, paths, splits)
    (tmp_path / "train/a/notes.txt").write_text("no image")
    (tmp_path / "train/.cache").mkdir()
    assert manifest.class_names() == ("a", "b")
    assert manifest.items("train") == [
        Item("train/a/deep/3.jpg", 0, "a"), Item("train/b/1.png", 1, "b"),
        Item("train/b/2.PNG", 1, "b"),
    ]  # fmt: skip
    assert manifest.items("test") == [Item("test/b/1.png", 1, "b")]
    assert manifest.location(manifest.items("test")[0]) == tmp_path / "test/b/1.png"


def test_folder_without_splits_is_divided_by_hash(tmp_path: Path) -> None:
    paths = [f"{name}/{i:02d}.png" for name in "ab" for i in range(20)]
    manifest = folder_dataset(tmp_path, paths)
    parts = {split: manifest.items(split) for split in ("train", "val", "test")}
    for part, size in zip(parts.values(), (10, 4, 6)):
        assert Counter(item.label for item in part) == {0: size, 1: size}
    assert sorted(item.path for part in parts.values() for item in part) == paths
    write_pictures(tmp_path, ["b/20.png"])
    assert [i for i in manifest.items("train") if i.label == 0] == parts["train"][:10]
    both = folder_dataset(tmp_path, [], "fractions = { train = 0.5, test = 0.5 }")
    assert both.splits() == ("train", "test") and len(both.items("test")) == 21


def test_the_only_image_of_a_class_is_one_to_train_on(tmp_path: Path) -> None:
    manifest = folder_dataset(tmp_path, [*(f"a/{i}.png" for i in range(10)), "b/0.png"])
    sizes = [Counter(i.label for i in manifest.items(part)) for part in ("train", "val", "test")]
    assert sizes == [{0: 5, 1: 1}, {0: 2}, {0: 3}]


def test_folder_names_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("n02 second thing\nn01 first\n\nn03 third\n")
    keyed = 'class_name_file = "names.txt"\nsplit_folders = { test = "." }'
    manifest = folder_dataset(tmp_path, ["n01/a.png", "n02/a.png"], keyed)
    assert manifest.class_names() == ("first", "second thing")
    assert manifest.items("test")[1] == Item("n02/a.png", 1, "second thing")
    write_pictures(tmp_path, ["n09/a.png"])
    told = r"names.txt has no name for 1 of 3 class folders in .*, first 'n09'; move what is no"
    with pytest.raises(UserError, match=told):
        manifest.items("test")


def test_folder_names_may_be_rows_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("n01 first\nn02 second\nn03 third\n")
    rows = 'class_name_file = "names.txt"\nlabel_order = "rows"\nsplit_folders = { test = "x" }'
    manifest = folder_dataset(tmp_path, ["x/2/a.png", "x/0/a.png"], rows)
    assert manifest.class_names() == ("first", "second", "third")
    assert [(i.label, i.class_name) for i in manifest.items("test")] == [(0, "first"), (2, "third")]
    write_pictures(tmp_path, ["x/3/a.png"])
    with pytest.raises(UserError, match="the folder '3' is not the number of one of the 3 rows"):
        manifest.items("test")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n01\n", r"line 1 of .*names.txt has a key but no class name"),
        ("n01 a\nn01 b\n", r"line 2 of .*names.txt repeats the key 'n01'"),
        (b"n01 \xff\n", r"names.txt is not UTF-8 text"),
        (None, r"the file of class names not found at"),
    ],
)
def test_files_of_names_are_checked(tmp_path: Path, text: str | bytes | None, message: str) -> None:
    if text is not None:
        content = text if isinstance(text, bytes) else text.encode()
        (tmp_path / "names.txt").write_bytes(content)
    manifest = folder_dataset(tmp_path, ["n01/a.png"], 'class_name_file = "names.txt"')
    with pytest.raises(UserError, match=message):
        manifest.items("test")


def test_folder_that_is_missing_or_has_other_classes(tmp_path: Path) -> None:
    manifest = folder_dataset(tmp_path, ["a/1.png"], 'class_names = ["x", "y"]')
    with pytest.raises(UserError, match=r"1 class folders under .*, but the manifest names 2"):
        manifest.items("train")
    absent = Manifest.load(write_manifest(tmp_path, 'layout = "folder"\nfolder = "gone"'))
    with pytest.raises(
        UserError, match=r"no folder .*gone; put it there, or name another data root"
    ):
        absent.items("train", root=tmp_path)


def test_links_that_the_user_laid_are_followed(tmp_path: Path) -> None:
    """A hub's cache, a subset made of links, and class folders that are links."""
    write_pictures(tmp_path, ["blobs/0a.png", "store/b/1.png", "store/b/2.png"])
    data = tmp_path / "data"
    manifest = folder_dataset(data, ["a/1.png"], 'split_folders = { test = "." }')
    (data / "a/2.png").symlink_to("../../blobs/0a.png")
    (data / "b").symlink_to(tmp_path / "store/b")
    items = manifest.items("test")
    assert [item.path for item in items] == ["a/1.png", "a/2.png", "b/1.png", "b/2.png"]
    assert all(manifest.open_image(item).size == (12, 8) for item in items)
    listed = coop_dataset(data, {"test": [["b/1.png", 0, "x"], ["a/2.png", 0, "x"]]})
    assert listed.check().ok and listed.open_image(listed.items("test")[0]).size == (12, 8)
    with pytest.raises(UserError, match="leaves the dataset's folder; refused"):
        listed.location(Item("../store/b/1.png", 0, "x"))


def test_links_to_nothing_are_missing(tmp_path: Path) -> None:
    manifest = folder_dataset(tmp_path, ["a/1.png", "b/1.png"], 'split_folders = { test = "." }')
    (tmp_path / "b/2.png").symlink_to(tmp_path / "gone.png")
    result = manifest.check()
    assert (result.state, result.first_missing) == ("incomplete", ("b/2.png",))
    assert len(manifest.items("test", present_only=True)) == 2
    listed = coop_dataset(tmp_path, {"test": [["a/1.png", 0, "x"], ["b/2.png", 0, "x"]]})
    assert listed.check().first_missing == ("b/2.png",)


@pytest.mark.parametrize("target", ["..", ".", "../b"])
def test_links_that_lead_back_are_refused(tmp_path: Path, target: str) -> None:
    manifest = folder_dataset(tmp_path, ["a/1.png", "b/1.png"], 'split_folders = { test = "." }')
    (tmp_path / "b/other").symlink_to(tmp_path / "a")
    (tmp_path / "a/back").symlink_to(target)
    with pytest.raises(UserError, match="leads back to where it lies"):
        manifest.items("test")


def test_what_systems_leave_behind_is_no_class_and_no_image(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = ["cat/1.png", "cat/2.JPG", "dog/in/1.png"]
    junk = ["__MACOSX/cat/1.png", "cat/.ipynb_checkpoints/1.png", ".x/1.png", "dog/@eaDir/1.png"]
    manifest = folder_dataset(tmp_path, paths + junk, 'split_folders = { test = "." }')
    for name in ("dog/._1.png", "dog/Thumbs.db", "dog/.DS_Store", "dog/3.heic", "loose.png"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "empty/inner").mkdir(parents=True)
    assert manifest.class_names() == ("cat", "dog")
    assert [item.path for item in manifest.items("test")] == paths
    result = manifest.check()
    assert result.ok
    for words in (
        "hidden or left by a system (5)", "class folders without an image (1), first 'empty'",
        "images in a format that is not read (1), first 'dog/3.heic'",
        "images in no class folder (1), first 'loose.png'",
    ):  # fmt: skip
        assert words in result.line() and words in caplog.text


def test_a_class_without_images_in_one_split_is_a_class(tmp_path: Path) -> None:
    paths = ["train/cat/1.png", "train/dog/1.png", "test/cat/1.png"]
    splits = 'split_folders = { train = "train", test = "test" }\n'
    manifest = folder_dataset(tmp_path, paths, splits)
    (tmp_path / "test/dog").mkdir()
    assert manifest.class_names() == ("cat", "dog")
    (tmp_path / "train/hen").mkdir()
    declared = folder_dataset(tmp_path, [], splits + 'class_names = ["a cat", "a dog", "a hen"]')
    assert declared.class_names() == ("a cat", "a dog", "a hen")


def test_a_flat_folder_is_told_how_it_can_be_read(tmp_path: Path) -> None:
    write_pictures(tmp_path / "set", ["train/a/1.png", "val/1.png", "val/2.png"])
    manifest = Manifest.load(tmp_path / "set")
    assert len(manifest.items("train")) == 1
    with pytest.raises(UserError, match=r"val/? holds 2 images but no class folders; sort them"):
        manifest.items("val")
    assert manifest.check().state == "unusable"
    (tmp_path / "set/val/metadata.csv").write_text("file_name,class_name\n1.png,a\n2.png,b\n")
    assert [i.class_name for i in Manifest.load(tmp_path / "set").items("val")] == ["a", "b"]


def test_folder_names_in_two_unicode_forms_are_one_class(tmp_path: Path) -> None:
    names = [unicodedata.normalize(form, "é") for form in ("NFC", "NFD")]
    paths = [f"{split}/{name}/1.png" for split, name in zip(("train", "test"), names)]
    write_pictures(tmp_path / "set", paths)
    manifest = Manifest.load(tmp_path / "set")
    assert manifest.class_names() == ("é",)
    assert [len(manifest.items(split)) for split in ("train", "test")] == [1, 1]


def test_a_splits_folder_may_be_a_link(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["elsewhere/a/1.png"])
    data = tmp_path / "data"
    data.mkdir()
    (data / "train").symlink_to(tmp_path / "elsewhere")
    manifest = folder_dataset(data, [], 'split_folders = { train = "train" }')
    assert manifest.open_image(manifest.items("train")[0]).size == (12, 8)


def test_a_plain_folder_needs_no_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path / "pets", ["train/cat/1.png", "valid/cat/2.png", "train/dog/1.png"])
    manifest = Manifest.load(tmp_path / "pets")
    assert manifest.name == "pets" and manifest.splits() == ("train", "val")
    assert manifest.items("val") == [Item("valid/cat/2.png", 0, "cat")]
    (tmp_path / "pets/manifest.toml").write_text('title = "Own"\nlayout = "folder"\nfolder = "."')
    assert Manifest.load(tmp_path / "pets").title == "Own"
    monkeypatch.chdir(tmp_path)
    assert Manifest.load("pets").title == "Own"
    write_pictures(tmp_path / "digits", ["cat/1.png"])
    assert Manifest.load("digits").layout == "builtin"  # a name that is known stays what it is
    with pytest.raises(UserError, match="unknown dataset 'pest'.*no folder of that name is here"):
        Manifest.load("pest")
    with pytest.raises(UserError, match="takes a string or a path, not ''"):
        Manifest.load("")


def test_a_silent_manifest_reads_a_folder_as_its_path_does(tmp_path: Path) -> None:
    paths = ["train/cat/1.png", "train/dog/1.png", "Test/cat/2.png"]
    manifest = folder_dataset(tmp_path / "pets", paths)
    assert manifest.class_names() == ("cat", "dog") and manifest.splits() == ("train", "test")
    assert [item.path for item in manifest.items("test")] == ["Test/cat/2.png"]
    plain = Manifest.load(tmp_path / "pets")
    assert [plain.items(split) for split in plain.splits()] == [
        manifest.items(split) for split in manifest.splits()
    ]
    # Whoever gives shares says that the folders are classes.
    divided = folder_dataset(tmp_path / "pets", [], "fractions = { train = 0.5, test = 0.5 }")
    assert divided.class_names() == ("Test", "train")


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    write_pictures(
        tmp_path / "set", [f"{c}/{i}.png" for c in ("bus", "car", "train") for i in "123"]
    )
    assert Manifest.load(tmp_path / "set").class_names() == ("bus", "car", "train")
    assert folder_dataset(tmp_path / "set", []).class_names() == ("bus", "car", "train")
    write_pictures(tmp_path / "set", ["val/bus/4.png"])
    assert Manifest.load(tmp_path / "set").splits() == ("train", "val")


def test_classes_beside_the_splits_are_said_to_be_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    used = ["train/cat/1.png", "val/cat/2.png"]
    other = ["validation/cat/3.png", "extra/dog/4.png"]
    # No classes: figures beside the images, what a system made, and a run of this package.
    write_pictures(tmp_path, [*used, *other, "docs/1.png", "@eaDir/cat/1.png", "out/figures/1.png"])
    (tmp_path / "out/provenance.json").write_text("{}")
    manifest = Manifest.load(tmp_path)
    assert [item.path for item in manifest.items("all")] == used
    said = "left out: folders of classes that are no split (2), first 'extra'"
    assert said in caplog.text
    assert manifest.check().remarks == (said,) and said in manifest.check().line()
    deeper = folder_dataset(tmp_path, [], 'split_folders = { test = "extra", val = "." }')
    assert not any("no split" in remark for remark in deeper.remarks())


# Tables


def write_table(path: Path, rows: list[dict[str, object]]) -> None:
    frame = pd.DataFrame(rows)
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        frame.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")


def table_dataset(folder: Path, file: str, extra: str = "") -> Manifest:
    text = f'folder = "."\nlayout = "table"\nsplit_file = "{file}"\n{extra}'
    return Manifest.load(write_manifest(folder, text))


ROWS: list[dict[str, object]] = [
    {"path": "b.jpg", "label": "zebra, plain", "split": "train", "caption": "one \u2028 zebra"},
    {"path": "a.jpg", "label": "NA", "split": "train", "caption": "an ant"},
    {"path": "b.jpg", "label": "zebra, plain", "split": "train", "caption": 'a "horse"'},
    {"path": "c.jpg", "label": "NA", "split": "test", "caption": ""},
]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_tables_of_every_kind_say_the_same(tmp_path: Path, suffix: str) -> None:
    write_table(tmp_path / f"t.{suffix}", ROWS)
    manifest = table_dataset(tmp_path, f"t.{suffix}")
    assert manifest.class_names() == ("NA", "zebra, plain")
    assert manifest.items("train") == [
        Item("b.jpg", 1, "zebra, plain", ("one \u2028 zebra", 'a "horse"')),
        Item("a.jpg", 0, "NA", ("an ant",)),
    ]
    assert manifest.items("test") == [Item("c.jpg", 0, "NA")]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_row_may_list_its_captions(tmp_path: Path, suffix: str) -> None:
    rows: list[dict[str, object]] = [
        {"path": "b.jpg", "caption": ["one", "uno", ""]},
        {"path": "a.jpg", "caption": []},
        {"path": "b.jpg", "caption": ["ein"]},
    ]
    write_table(tmp_path / f"t.{suffix}", [{**row, "split": "train"} for row in rows])
    items = table_dataset(tmp_path, f"t.{suffix}").items("train")
    assert items == [Item("b.jpg", -1, "", ("one", "uno", "ein")), Item("a.jpg", -1, "")]
    write_table(tmp_path / f"u.{suffix}", [{"path": "a.jpg", "caption": [1, 2]}])
    with pytest.raises(UserError, match="row 1 of .* has '1' where text is expected"):
        table_dataset(tmp_path, f"u.{suffix}").items("train")


def test_a_folder_of_shards_says_that_it_needs_a_manifest(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"train-0{number}.tar").write_bytes(b"")
    found = Manifest.load(tmp_path).check()
    assert found.state == "unusable" and "holds 2 .tar files and no images" in found.line()
    with pytest.raises(UserError, match='write a manifest with layout = "shards"'):
        Manifest.load(tmp_path).items("train")


def test_a_list_of_captions_that_pandas_wrote_as_text_is_no_caption(tmp_path: Path) -> None:
    rows = pd.DataFrame({"path": ["a.jpg"], "caption": [["one", "it's"]], "split": "train"})
    rows.to_csv(tmp_path / "t.csv")
    with pytest.raises(UserError, match="row 1 .*has the list .* as one text; write a row for"):
        Manifest.load(tmp_path / "t.csv").items("train")
    rows.assign(caption="[Beach] at noon").to_csv(tmp_path / "u.csv")
    assert Manifest.load(tmp_path / "u.csv").items("train")[0].captions == ("[Beach] at noon",)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_a_plain_table_needs_no_manifest(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_table(tmp_path / f"zoo.{suffix}", ROWS)
    write_pictures(tmp_path, ["a.jpg", "b.jpg"])
    manifest = Manifest.load(tmp_path / f"zoo.{suffix}")
    assert manifest.name == "zoo" and manifest.class_names() == ("NA", "zebra, plain")
    assert manifest.open_image(manifest.items("train")[1]).size == (12, 8)
    found = manifest.check().line()
    assert f"zoo: incomplete, 2 of 3 images here; not in {tmp_path}: c.jpg" in found
    monkeypatch.chdir(tmp_path)
    assert Manifest.load(f"zoo.{suffix}").splits() == ("train", "test")
    hub = [{"file_name": "a.jpg", "label": "ant"}, {"file_name": "b.jpg", "label": "bee"}]
    write_table(tmp_path / "metadata.jsonl", hub)  # type: ignore[arg-type]
    assert Manifest.load("metadata.jsonl").class_names() == ("ant", "bee")


def test_a_table_of_items_has_the_name_of_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("ants", "bees"):
        write_pictures(tmp_path / folder, ["a.jpg", "b.jpg", "c.jpg"])
        write_table(tmp_path / folder / "items.csv", ROWS)
    monkeypatch.chdir(tmp_path / "bees")
    both = [Manifest.load(tmp_path / "ants/items.csv"), Manifest.load("items.csv")]
    assert [(one.name, one.title) for one in both] == [("ants", "ants"), ("bees", "bees")]
    assert distinct(both) == both


def test_a_folder_of_the_name_of_a_drawn_dataset_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Manifest.load("faces")
    assert not caplog.messages
    write_pictures(tmp_path / "faces", ["a/0.jpg", "b/0.jpg"])
    Manifest.load("faces")
    assert "faces is a dataset that is drawn by code; ./faces is the folder of that" in caplog.text
    caplog.clear()
    assert Manifest.load("./faces").layout == "folder" and not caplog.messages


def test_a_folder_of_one_class_names_the_table_beside_it(tmp_path: Path) -> None:
    write_pictures(tmp_path / "zoo", ["images/a.jpg", "images/b.jpg"])
    assert Manifest.load(tmp_path / "zoo").remarks() == ()
    write_table(tmp_path / "zoo/items.csv", ROWS)
    assert "one class, 'images'; if items.csv says" in Manifest.load(tmp_path / "zoo").remarks()[0]


def test_classes_that_are_folders_of_folders_are_told(tmp_path: Path) -> None:
    """Several datasets in one folder were classes of one, their own classes gone, unsaid."""
    write_pictures(tmp_path / "all", [f"{a}/{b}/1.png" for a in "xy" for b in ("ant", "bee")])
    (remark,) = Manifest.load(tmp_path / "all").remarks()
    assert remark.startswith("each of its 2 classes is a folder of folders; where those inside")
    assert remark.endswith(f"give such as {tmp_path / 'all/x'}")
    assert not Manifest.load(tmp_path / "all/x").remarks()
    write_pictures(tmp_path / "all", ["y/2.png"])  # as folders inside some classes are usual
    assert not Manifest.load(tmp_path / "all").remarks()


def test_table_with_numbers_and_names(tmp_path: Path) -> None:
    rows = [{"file": f"{i}.jpg", "y": i % 2, "word": "ab"[i % 2]} for i in range(20)]
    write_table(tmp_path / "t.parquet", rows)  # type: ignore[arg-type]
    columns = 'columns = { path = "file", label = "y", class_name = "word" }'
    manifest = table_dataset(tmp_path, "t.parquet", columns)
    assert manifest.class_names() == ("a", "b")
    assert [len(manifest.items(split)) for split in ("train", "val", "test")] == [10, 4, 6]
    named = table_dataset(tmp_path, "t.parquet", columns + '\nclass_names = ["first", "second"]')
    assert {item.class_name for item in named.items("train")} == {"first", "second"}
    words = table_dataset(tmp_path, "t.parquet", 'columns = { path = "file", class_name = "word" }')
    assert words.items("train") == manifest.items("train")


@pytest.mark.parametrize(
    ("rows", "extra", "message"),
    [
        ([{"pth": "a.jpg"}], "", "has no column 'path' (it has: ['pth']); did you mean 'pth'?"),
        (
            [{"path": f"{i}.jpg", "label": "a", "part": "train"} for i in range(2)],
            'columns = { split = "prat" }',  # by which they were divided by a hash instead
            "unknown column of split 'prat' in ",
        ),
        (
            [{"path": f"{i}.jpg", "label": i, "class_name": "ab"[i]} for i in range(2)],
            'class_names = ["b", "a"]',
            "label 0 is called 'a' beside it and 'b' by the declared names",
        ),
        (
            [{"a.JPG": "b.jpg", "a cat": "a dog"}],
            "",
            "write one of column names above it, as path,",
        ),
        ([{"path": "../a.jpg"}], "", "row 1 of"),
        ([{"path": ""}], "", "no row of"),
        ([{"path": "", "label": "x"}], "", "row 1 of"),
        ([{"path": "a.jpg", "split": "dev"}], "", "has the split 'dev'; splits are train, val"),
        ([{"path": "a", "label": "x"}, {"path": "b", "label": ""}], "", "row 2 of"),
        ([{"path": "a", "label": "x"}, {"path": "a", "label": "y"}], "", "'a' a second label"),
        ([{"path": "a", "label": "x"}], 'class_names = ["y"]', "class 'x', which is not declared"),
        ([{"path": "a", "label": 3}], 'class_names = ["y"]', "label 3; labels are 0 to 0"),
        ([{"path": "a", "label": -1}], "", "label -1; labels are 0, 1, 2, …"),
    ],
)
def test_tables_are_checked(tmp_path: Path, rows: list, extra: str, message: str) -> None:
    write_table(tmp_path / "t.csv", rows)
    with pytest.raises(UserError) as caught:
        table_dataset(tmp_path, "t.csv", extra).items("train")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("t.xls", b"", "is not a table; its suffix must be one of .csv"),
        ("t.parquet", b"PAR1 not really", "cannot be read as a table"),
        ("t.jsonl", b"[1, 2]", "a line is not a JSON object"),
        ("t.jsonl", b"{", "cannot be read as a table"),
        ("t.jsonl", b'{"path": "a"}\n{"label": 1}', "row 2 of"),
        ("t.csv", b"path\n\xff", "is not UTF-8 text"),
        ("t.csv", b'path\n"' + b"x" * 200_000, "cannot be read as a table"),
    ],
)
def test_files_that_are_no_tables(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError) as caught:
        table_dataset(tmp_path, file).items("train")
    assert message in str(caught.value)


@pytest.mark.parametrize("label", ["{0}", "{0}.0", "n0{0}", " {0} "])
def test_words_beside_labels_are_the_class_names(tmp_path: Path, label: str) -> None:
    """Whatever the label is: a number, one as pandas writes it, a WordNet id."""
    names = ["goldfish", "tree frog", "hen"]
    rows: list[dict[str, object]] = [
        {"path": f"{i}.jpg", "label": label.format(i % 3), "class_name": names[i % 3]}
        for i in range(6)
    ]
    write_table(tmp_path / "t.csv", rows)
    manifest = table_dataset(tmp_path, "t.csv")
    assert manifest.class_names() == tuple(names)
    found = {item.path: item.class_name for item in manifest.items("all")}
    assert found == {row["path"]: row["class_name"] for row in rows}
    write_table(tmp_path / "t.csv", [*rows, {**rows[0], "path": "x.jpg", "class_name": "hen"}])
    with pytest.raises(UserError, match="has two class names, 'goldfish' and 'hen'"):
        manifest.items("train")


def test_labels_of_a_table_are_closed_up(tmp_path: Path) -> None:
    write_table(tmp_path / "t.csv", [{"path": f"{n}.jpg", "label": n} for n in (12, 3, 7)])
    manifest = table_dataset(tmp_path, "t.csv")
    assert manifest.class_names() == ("3", "7", "12")
    counted = "its labels, 3 to 12, are counted from 0"
    found, coded = manifest.remarks()
    assert found == counted and coded.startswith("3 of 3 classes are named by a code, such as '3'")
    rows = [{"path": f"{n}.jpg", "label": n, "class_name": f"no {n}"} for n in (12, 3, 7)]
    write_table(tmp_path / "named.csv", rows)
    assert table_dataset(tmp_path, "named.csv").remarks() == (counted,)


def test_a_check_says_a_remark_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_table(tmp_path / "t.csv", [{"path": f"{n}.jpg", "label": n} for n in (21, 22)])
    remark = "its labels, 21 to 22, are counted from 0"
    assert remark in table_dataset(tmp_path, "t.csv").check().line() and remark not in caplog.text


def test_classes_with_one_prompt_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No model tells them apart by text; lists of ImageNet have some, so nothing is refused."""
    names = ["crane", "night_owl", "gull", "crane", "Night owl"]
    rows = [
        {"path": f"{n}.jpg", "label": n, "class_name": name, "split": "train"}
        for n, name in enumerate(names)
    ]
    write_table(tmp_path / "t.csv", rows)
    manifest = table_dataset(tmp_path, "t.csv")
    remark = (
        "classes with one prompt, which text cannot tell apart: 'crane', 'crane'; 'night_owl', "
        "'Night owl'"
    )
    assert remark in manifest.check().line() and not caplog.text
    assert len(manifest.items("train")) == 5 and f"{manifest.name}: {remark}" in caplog.text
    spec = manifest.spec.model_copy(update={"drop_classes": ("crane", "Night owl")})
    told = replace(manifest, spec=spec)
    assert told.class_names() == ("night_owl", "gull") and not told.remarks()


PLAIN = ["path,class_name", "in/\u00e90.png,owl", "in/\u00e91.png,gull"]
HABITS: dict[str, Callable[[str, Path], str]] = {
    "absolute": lambda text, folder: text.replace("in/", f"{folder}/in/"),
    "from the table": lambda text, folder: text.replace("in/", "../in/"),
    "backslashes": lambda text, folder: text.replace("/", "\\"),
    "dots": lambda text, folder: text.replace("in/", "./in//"),
    "blanks around": lambda text, folder: text.replace(",", " , ").replace("owl", "owl\t"),
    "blank rows": lambda text, folder: text.replace("\n", "\n,\n") + "\n,\n\n",
    "semicolons": lambda text, folder: text.replace(",", ";"),
    "tabs": lambda text, folder: text.replace(",", "\t"),
    "quotes": lambda text, folder: text.replace("owl", '"owl"').replace("path,", '"path", '),
    "capitals": lambda text, folder: text.replace("path,class_name", "Path,Class_Name"),
    "two Unicode forms": lambda text, folder: unicodedata.normalize("NFD", text),
    "a mark of byte order": lambda text, folder: "\ufeff" + text,
    "lines of Windows": lambda text, folder: text.replace("\n", "\r\n"),
    "an index": lambda text, folder: ",".join(["", *text.replace("\n", "\n7,").split(",")]),
}


@pytest.mark.parametrize("habit", HABITS)
def test_habits_of_tables(tmp_path: Path, habit: str) -> None:
    write_pictures(tmp_path, ["in/\u00e90.png", "in/\u00e91.png"])
    text = HABITS[habit]("\n".join(PLAIN), tmp_path)
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/t.csv").write_bytes(text.encode())
    manifest = table_dataset(tmp_path, "lists/t.csv")
    assert manifest.class_names() == ("gull", "owl")
    items = sorted(manifest.items("all"), key=lambda item: item.path)
    assert [(item.label, item.class_name) for item in items] == [(1, "owl"), (0, "gull")]
    assert [unicodedata.normalize("NFC", item.path) for item in items] == [
        "in/\u00e90.png", "in/\u00e91.png",
    ]  # fmt: skip
    assert manifest.check(full=True).ok and not manifest.missing(items)


def test_tables_of_spreadsheets_in_wide_characters(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["in/\u00e90.png", "in/\u00e91.png"])
    (tmp_path / "t.tsv").write_bytes("\n".join(PLAIN).replace(",", "\t").encode("utf-16"))
    assert table_dataset(tmp_path, "t.tsv").check(full=True).ok


def test_two_ways_to_write_a_class_are_one(tmp_path: Path) -> None:
    words = ["caf\u00e9", " caf\u00e9", "cafe\u0301 ", "caf\u00e9\u00a0"]
    write_table(tmp_path / "t.jsonl", [{"path": f"{i}", "label": w} for i, w in enumerate(words)])
    assert table_dataset(tmp_path, "t.jsonl").class_names() == ("caf\u00e9",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\na.jpg,cat, black\n", "row 1 has 3 cells under 2 columns; put quotes around"),
        ("path,label, label\na.jpg,1,2\n", "two columns are called 'label'"),
        ("path,label\n/other/a.jpg,1\n", "row 1 of"),
        ("path,label\n/other/a.jpg,1\n", "refused; paths are to be relative to"),
        ("path,split\na.jpg,Training\nb.jpg,holdout\n", "row 2 of"),
    ],
)
def test_tables_that_cannot_be_read_say_why(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError) as caught:
        table_dataset(tmp_path, "t.csv").items("train")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_words_for_splits(tmp_path: Path) -> None:
    words = ["Training", "valid ", "TEST", "validation"]
    write_table(tmp_path / "t.csv", [{"path": f"{i}", "split": w} for i, w in enumerate(words)])
    manifest = table_dataset(tmp_path, "t.csv")
    assert [len(manifest.items(split)) for split in ("train", "val", "test")] == [1, 2, 1]


def test_rows_without_a_split_beside_others_are_refused(tmp_path: Path) -> None:
    words = ["train", "", "test", ""]
    write_table(tmp_path / "t.csv", [{"path": f"{i}.png", "split": w} for i, w in enumerate(words)])
    with pytest.raises(UserError, match="2 images without a split, such as '1.png', where others"):
        table_dataset(tmp_path, "t.csv").items("train")


def test_a_table_without_classes_says_which_columns_there_are(tmp_path: Path) -> None:
    write_table(tmp_path / "t.csv", [{"path": "a.jpg", "class": "x"}])
    manifest = table_dataset(tmp_path, "t.csv")
    assert manifest.class_names() == ()
    line = manifest.check().line()
    assert "no column 'label' or 'class_name' says a class; there are path, class" in line
    assert 'write columns = { class_name = "class" }' in line


def test_hugging_face_image_folder(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        write_pictures(tmp_path / "hf", [f"{split}/0.png", f"{split}/1.png"])
        rows = [{"file_name": f"{i}.png", "text": f"picture {i}", "label": i} for i in range(2)]
        write_table(tmp_path / "hf" / split / "metadata.jsonl", rows)  # type: ignore[arg-type]
    manifest = Manifest.load(tmp_path / "hf")
    assert manifest.splits() == ("train", "val")
    assert manifest.items("val")[1] == Item("validation/1.png", 1, "1", ("picture 1",))
    assert manifest.open_image(manifest.items("val")[1]).size == (12, 8)
    write_pictures(tmp_path / "flat", [f"{i}.png" for i in range(10)])
    flat_rows = [{"file_name": f"{i}.png", "text": "t"} for i in range(10)]
    write_table(tmp_path / "flat/metadata.csv", flat_rows)  # type: ignore[arg-type]
    flat = Manifest.load(tmp_path / "flat")
    assert len(flat.items("all")) == 10 and flat.class_names() == ()
    (tmp_path / "hf/train/metadata.jsonl").unlink()
    with pytest.raises(UserError, match=r"no table .*train/metadata.jsonl"):
        manifest.items("train")


def test_without_the_library_of_hugging_face_its_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pictures(tmp_path / "set", ["train/ant/1.png"])
    text = 'folder = "./set"\nlayout = "huggingface"'
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs the package datasets; .*vlm-layers\[datasets\]"):
        Manifest.load(write_manifest(tmp_path, text)).items("train")


# Plain lists and captions


def test_lists_keep_spaces_and_slashes_in_names(tmp_path: Path) -> None:
    (tmp_path / "variants.txt").write_text("F/A-18\nMetroliner\nDHC-8-100\n")
    (tmp_path / "train.txt").write_text("0034309 DHC-8-100\n1025794 F/A-18\n")
    text = (
        'folder = "."\nlayout = "lists"\nclass_keys = false\nclass_name_file = "variants.txt"\n'
        'split_files = { train = "train.txt", test = "test.txt" }'
    )
    manifest = Manifest.load(write_manifest(tmp_path, text))
    assert manifest.items("train") == [
        Item("0034309.jpg", 2, "DHC-8-100"), Item("1025794.jpg", 0, "F/A-18"),
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"no list .*test.txt"):
        manifest.items("test")
    (tmp_path / "test.txt").write_text("1 Spitfire\n")
    with pytest.raises(UserError, match=r"line 1 of .* names the class 'Spitfire', which is not"):
        manifest.items("test")


def captions_dataset(folder: Path, text: str) -> Manifest:
    folder.mkdir(exist_ok=True)
    (folder / "c.tsv").write_text(text, encoding="utf-8")
    keys = 'folder = "."\nlayout = "captions"\nsplit_file = "c.tsv"\ntail = { test = 2, val = 1 }'
    return Manifest.load(write_manifest(folder, keys))


def test_captions_are_grouped_and_split_from_the_tail(tmp_path: Path) -> None:
    lines = [f"{i}.jpg\tcaption {i}{j}" for i in (4, 2, 9, 7) for j in range(2)]
    manifest = captions_dataset(tmp_path, "\n".join(lines) + "\n")
    assert manifest.items("train") == [Item("4.jpg", -1, "", ("caption 40", "caption 41"))]
    assert [item.path for item in manifest.items("val")] == ["2.jpg"]
    assert [item.path for item in manifest.items("test")] == ["9.jpg", "7.jpg"]
    few = captions_dataset(tmp_path / "few", "1.jpg\tx\n")
    assert few.splits() == ("test",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg no tab", r"line 1 of .* is not: file name, tab, caption"),
        ("a.jpg\tx\nb.jpg\t ", r"line 2 of .* is not: file name, tab, caption"),
        ("../a.jpg\tx", "leaves the dataset's folder; refused"),
    ],
)
def test_captions_are_checked(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        captions_dataset(tmp_path, text).items("test")
