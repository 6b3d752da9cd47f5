"""Image folders and saved datasets through the `datasets` library, against what was written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
from data_fixtures import picture, write_manifest, write_pictures
from PIL import Image

from vlmlayers.errors import UserError
from vlmlayers.manifests import Item, Manifest, write_shards

datasets = pytest.importorskip("datasets", reason="needs the extra 'datasets'")
FILES = [f"{split}/{name}/{i}.png" for split, n in (("train", 3), ("validation", 1), ("test", 2))
         for name in ("ant", "bee") for i in range(n)]  # fmt: skip


def _manifest(folder: Path, extra: str = "") -> Manifest:
    """Return a dataset in `folder`; its manifest lies beside it, as the library sees all files."""
    text = f'folder = "./{folder.name}"\nlayout = "huggingface"\n{extra}'
    return Manifest.load(write_manifest(folder.parent, text))


def _no_images(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("an image was opened")

    monkeypatch.setattr(Image, "open", refuse)


def _save(folder: Path, splits: dict[str, list[str]], labels: bool = True) -> None:
    """Save pictures, numbered from 0 in each split, with the classes of `splits`."""
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])}
    parts = {}
    for split, names in splits.items():
        folder.mkdir(parents=True, exist_ok=True)
        content = {"image": [picture(i) for i in range(len(names))], "label": names}
        kept = {key: content[key] for key in kinds if labels or key == "image"}
        features = datasets.Features({key: kinds[key] for key in kept})
        parts[split] = datasets.Dataset.from_dict(kept, features=features)
    datasets.DatasetDict(parts).save_to_disk(str(folder))


# Image folders


def test_class_folders_agree_with_the_folder_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pictures(tmp_path / "insects", FILES)
    (tmp_path / "insects/train/notes.txt").write_text("no image")
    counts = "classes = 2\ncounts = { train = 6, val = 2, test = 4 }"
    manifest = _manifest(tmp_path / "insects", counts)
    plain = Manifest.load(tmp_path / "insects")
    with monkeypatch.context() as patch:
        _no_images(patch)
        assert manifest.splits() == plain.splits() == ("train", "val", "test")
        assert manifest.class_names() == ("ant", "bee")
        for split in manifest.splits():
            assert manifest.items(split) == plain.items(split)
    assert manifest.check(full=True).state == "complete"
    item = manifest.items("val")[0]
    assert manifest.location(item) == tmp_path / "insects/validation/ant/0.png"
    assert np.array_equal(manifest.open_image(item), plain.open_image(item))
    (tmp_path / "insects/test/bee/1.png").unlink()
    assert manifest.check().state == "incomplete" and manifest.check().missing == 1


def test_metadata_gives_labels_and_captions(tmp_path: Path) -> None:
    write_pictures(tmp_path / "set", ["train/x/1.png", "train/x/2.png", "test/y/3.png"])
    lines = "file_name,label,text\nx/1.png,wasp,one\nx/1.png,wasp,uno\nx/2.png,ant,two\n"
    (tmp_path / "set/train/metadata.csv").write_text(lines)
    (tmp_path / "set/test/metadata.csv").write_text("file_name,label,text\ny/3.png,wasp,three\n")
    manifest = _manifest(tmp_path / "set")
    assert manifest.class_names() == ("ant", "wasp")
    assert manifest.items("train") == [
        Item("train/x/1.png", 1, "wasp", ("one", "uno")), Item("train/x/2.png", 0, "ant", ("two",)),
    ]  # fmt: skip
    assert manifest.items("test") == [Item("test/y/3.png", 1, "wasp", ("three",))]
    (tmp_path / "set/test/y/3.png").unlink()
    assert [item.path for item in manifest.missing(manifest.items("all"))] == ["test/y/3.png"]


def test_a_row_may_list_its_captions(tmp_path: Path) -> None:
    """As Flickr30k does on the hub: five captions of an image in one row."""
    write_pictures(tmp_path / "set", ["1.png", "2.png"])
    rows = [{"file_name": "1.png", "text": ["one", "uno"]}, {"file_name": "2.png", "text": []}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "set/metadata.jsonl").write_text(lines)
    listed = _manifest(tmp_path / "set")
    assert [item.captions for item in listed.items("train")] == [("one", "uno"), ()]
    datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "set")).save_to_disk(
        str(tmp_path / "saved")
    )
    saved = _manifest(tmp_path / "saved")
    assert [item.captions for item in saved.items("train")] == [("one", "uno"), ()]


def test_metadata_without_labels_leaves_the_class_folders(tmp_path: Path) -> None:
    write_pictures(tmp_path / "set", ["train/bee/1.png", "train/ant/2.png"])
    text = "file_name,text\nbee/1.png,one\nant/2.png,two\n"
    (tmp_path / "set/train/metadata.csv").write_text(text)
    manifest = _manifest(tmp_path / "set")
    assert manifest.items("train") == [
        Item("train/bee/1.png", 1, "bee", ("one",)), Item("train/ant/2.png", 0, "ant", ("two",)),
    ]  # fmt: skip


def test_whole_number_labels_take_declared_names(tmp_path: Path) -> None:
    write_pictures(tmp_path / "set", ["1.png", "2.png"])
    (tmp_path / "set/metadata.csv").write_text("file_name,label\n1.png,1\n2.png,0\n")
    assert _manifest(tmp_path / "set").class_names() == ("0", "1")
    manifest = _manifest(tmp_path / "set", 'class_names = ["ant", "bee"]')
    assert [item.class_name for item in manifest.items("train")] == ["bee", "ant"]
    short = _manifest(tmp_path / "set", 'class_names = ["ant"]')
    with pytest.raises(UserError, match=r"1.png has label 1; labels are 0 to 0"):
        short.items("train")


def test_labels_far_apart_are_closed_up(tmp_path: Path) -> None:
    write_pictures(tmp_path / "set", ["1.png", "2.png"])
    (tmp_path / "set/metadata.csv").write_text("file_name,label\n1.png,5\n2.png,999999999\n")
    manifest = _manifest(tmp_path / "set")
    assert manifest.class_names() == ("5", "999999999")
    remark, coded = manifest.remarks()
    assert remark.startswith("its labels, 5 to 999999999, are counted from 0")
    assert coded.startswith("2 of 2 classes are named by a code, such as '5'")


def test_a_file_with_two_labels_is_refused(tmp_path: Path) -> None:
    write_pictures(tmp_path / "set", ["1.png"])
    (tmp_path / "set/metadata.csv").write_text("file_name,label\n1.png,ant\n1.png,bee\n")
    with pytest.raises(UserError, match=r"1.png has a second label"):
        _manifest(tmp_path / "set").items("train")


@pytest.mark.parametrize("path", ["../secret.png", "/etc/secret.png", "x/../../secret.png"])
def test_metadata_cannot_lead_outside(tmp_path: Path, path: str) -> None:
    write_pictures(tmp_path, ["set/1.png", "secret.png"])
    (tmp_path / "set/metadata.csv").write_text(f"file_name,label\n1.png,ant\n{path},bee\n")
    with pytest.raises(UserError) as caught:
        _manifest(tmp_path / "set").items("train")
    assert "\n" not in str(caught.value)


def test_archives_are_to_be_unpacked(tmp_path: Path) -> None:
    import zipfile

    write_pictures(tmp_path, ["a/1.png"])
    (tmp_path / "set").mkdir()
    with zipfile.ZipFile(tmp_path / "set/images.zip", "w") as archive:
        archive.write(tmp_path / "a/1.png", "a/1.png")
    with pytest.raises(UserError, match=r"is in an archive; unpack it"):
        _manifest(tmp_path / "set").items("train")


def test_what_is_no_such_dataset_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sample: no folder .*set"):
        _manifest(tmp_path / "set").items("train")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    for folder in ("set", "empty"):
        with pytest.raises(UserError, match="sample: ") as caught:
            _manifest(tmp_path / folder).items("train")
        assert "\n" not in str(caught.value) and folder in str(caught.value)


def test_a_script_in_the_folder_is_not_run(tmp_path: Path) -> None:
    write_pictures(tmp_path / "set", ["train/ant/1.png", "train/bee/1.png"])
    trap = f"open({str(tmp_path / 'ran')!r}, 'w')"
    for name in ("set", "imagefolder", "dataset"):
        (tmp_path / f"set/{name}.py").write_text(trap)
    assert len(_manifest(tmp_path / "set").items("train")) == 2
    assert not (tmp_path / "ran").exists()


# Saved datasets


def test_saved_dataset_is_read_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(tmp_path / "set", {"train": ["bee", "ant", "bee"], "validation": ["ant"]})
    manifest = _manifest(tmp_path / "set", "counts = { train = 3, val = 1 }")
    with monkeypatch.context() as patch:
        _no_images(patch)
        items = manifest.items("train")
    assert manifest.splits() == ("train", "val") and manifest.class_names() == ("ant", "bee")
    assert [(item.label, item.class_name) for item in items] == [
        (1, "bee"), (0, "ant"), (1, "bee"),
    ]  # fmt: skip
    assert len({item.path for item in manifest.items("all")}) == 4
    for number, item in enumerate(items):
        assert np.array_equal(manifest.open_image(item), picture(number).convert("RGB"))
        assert manifest.location(item) == tmp_path / "set"
    assert manifest.check(full=True).state == "complete"
    with pytest.raises(UserError, match="has no item 'train/00000009.png'"):
        manifest.open_image(Item("train/00000009.png", 0, "ant"))


def test_splits_that_number_their_classes_in_different_ways(tmp_path: Path) -> None:
    def part(numbers: list[int], names: list[str]) -> object:
        kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
        content = {"image": [picture() for _ in numbers], "label": numbers}
        return datasets.Dataset.from_dict(content, features=datasets.Features(kinds))

    # As where each split was encoded by itself, after it was drawn and filtered.
    train = part([2, 0, 1, -1], ["moth", "ant", "7"])
    parts = {"train": train, "test": part([0, 1, 2], ["7", "bee", "moth"])}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "set"))
    manifest = _manifest(tmp_path / "set")
    assert manifest.class_names() == ("moth", "ant", "7", "bee")
    said = [(item.label, item.class_name) for item in manifest.items("all")]
    assert said == [
        (2, "7"), (0, "moth"), (1, "ant"), (-1, ""), (2, "7"), (3, "bee"), (0, "moth"),
    ]  # fmt: skip


def test_a_dataset_of_two_kinds_of_classes_says_how_one_is_taken(tmp_path: Path) -> None:
    kinds = {"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=["ant", "bee"]),
             "coarse_label": datasets.ClassLabel(names=["insect"])}  # fmt: skip
    content = {"img": [picture()] * 2, "fine_label": [1, 0], "coarse_label": [0, 0]}
    one = datasets.Dataset.from_dict(content, features=datasets.Features(kinds))
    one.save_to_disk(str(tmp_path / "set"))
    with pytest.raises(UserError, match="has no classes to tell .*there are img, fine_label,"):
        _manifest(tmp_path / "set").require_classes(" to tell apart")
    (remark,) = _manifest(tmp_path / "set").remarks()
    columns = remark.partition("write ")[2]
    assert [i.label for i in _manifest(tmp_path / "set", columns).items("train")] == [1, 0]


def test_of_several_columns_of_images_the_one_called_so_or_named_is_taken(tmp_path: Path) -> None:
    def first(folder: str, names: tuple[str, str], columns: str = "") -> int:
        kinds = {**dict.fromkeys(names, datasets.Image()), "kind": datasets.Value("string")}
        colours = [[Image.new("RGB", (8, 8), (c, c, c))] for c in (0, 200)]
        content = {**dict(zip(names, colours)), "kind": ["ant"]}
        made = datasets.Dataset.from_dict(content, features=datasets.Features(kinds))
        made.save_to_disk(str(tmp_path / folder))
        manifest = _manifest(tmp_path / folder, columns)
        return int(np.asarray(manifest.open_image(manifest.items("train")[0])).max())

    assert first("usual", ("mask", "image")) == 200
    assert first("named", ("mask", "image"), 'columns = { path = "mask" }') == 0
    kept = {
        manifest.identity(manifest.items("train")).hash
        for columns in ("", 'columns = { path = "mask" }')
        for manifest in (_manifest(tmp_path / "named", columns),)
    }
    assert len(kept) == 2  # features of the one are not taken for those of the other
    assert first("one", ("left", "right"), 'columns = { path = "right", label = "kind" }') == 200
    with pytest.raises(UserError, match="has the images left, right; name one, as in columns = "):
        first("two", ("left", "right"))
    with pytest.raises(UserError, match="unknown column of label 'knid' in .* mean 'kind'"):
        first("typo", ("mask", "image"), 'columns = { label = "knid" }')


def test_saved_dataset_becomes_shards(tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="needs the extra 'shards'")
    _save(tmp_path / "set", {"train": ["bee", "ant", "bee"]})
    manifest = _manifest(tmp_path / "set")
    shards = Manifest.load(write_shards(manifest, "train", tmp_path / "out", progress=False))
    assert [i.label for i in shards.items("train")] == [1, 0, 1]
    for there, here in zip(shards.items("train"), manifest.items("train"), strict=True):
        assert np.array_equal(shards.open_image(there), manifest.open_image(here))


def test_one_saved_part_and_other_split_names(tmp_path: Path) -> None:
    _save(tmp_path / "set", {"train": ["ant"], "holdout": ["bee", "bee"]})
    with pytest.raises(UserError, match="the splits holdout, train in .* split_folders must say"):
        _manifest(tmp_path / "set").splits()
    manifest = _manifest(tmp_path / "set", 'split_folders = { test = "holdout" }')
    assert manifest.splits() == ("test",) and len(manifest.items("test")) == 2
    datasets.load_from_disk(str(tmp_path / "set"))["holdout"].save_to_disk(str(tmp_path / "one"))
    one = _manifest(tmp_path / "one")
    assert one.splits() == ("train",) and len(one.items("train")) == 2
    assert np.array_equal(one.open_image(one.items("train")[1]), picture(1).convert("RGB"))


def test_saved_dataset_without_images_labels_or_whole_files(tmp_path: Path) -> None:
    _save(tmp_path / "bare", {"train": ["ant", "bee"]}, labels=False)
    bare = _manifest(tmp_path / "bare")
    assert bare.class_names() == () and [i.label for i in bare.items("train")] == [-1, -1]
    kind = datasets.Features({"image": datasets.Image()})
    hole = datasets.Dataset.from_dict({"image": [picture(), None]}, features=kind)
    hole.save_to_disk(str(tmp_path / "hole"))
    item = _manifest(tmp_path / "hole").items("train")[1]
    with pytest.raises(UserError, match="the row of 'train/00000001' holds no image"):
        _manifest(tmp_path / "hole").open_image(item)
    datasets.Dataset.from_dict({"a": [1, 2]}).save_to_disk(str(tmp_path / "text"))
    with pytest.raises(UserError, match="has no column of images"):
        _manifest(tmp_path / "text").items("train")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/state.json").write_text("{")
    with pytest.raises(UserError, match="the package datasets cannot read .*broken") as caught:
        _manifest(tmp_path / "broken").items("train")
    assert "\n" not in str(caught.value)


# Parquet repositories


@pytest.mark.parametrize("told", [True, False])
def test_a_downloaded_repository_is_read_by_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    """Its files may say which column is an image and what the classes are called, or not."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])}
    (tmp_path / "set/data").mkdir(parents=True)
    (tmp_path / "set/README.md").write_text("---\nlicense: mit\n---\n")
    for split, labels in (("train", [1, 0, 1]), ("validation", [0])):
        columns = {"image": [picture(i) for i in range(len(labels))], "label": labels}
        table = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds)).data.table
        if not told:
            table = table.replace_schema_metadata({})
        parquet.write_table(table, tmp_path / f"set/data/{split}-00000-of-00001.parquet")
    manifest = Manifest.load(tmp_path / "set")
    assert manifest.splits() == ("train", "val")
    assert manifest.class_names() == (("ant", "bee") if told else ("0", "1"))
    items = manifest.items("train")
    assert [item.label for item in items] == [1, 0, 1]
    for number, item in enumerate(items):
        assert np.array_equal(manifest.open_image(item), picture(number).convert("RGB"))
    assert manifest.check(full=True).ok
    added = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds)).data.table
    parquet.write_table(added, tmp_path / "set/data/test-00000-of-00001.parquet")
    assert Manifest.load(tmp_path / "set").splits() == ("train", "val", "test")
