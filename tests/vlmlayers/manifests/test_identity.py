"""What a dataset is: what tells two states of it apart, and how the difference is said."""

from __future__ import annotations

import os
import shutil
import time
import unicodedata
from pathlib import Path

import pytest
from data_fixtures import coop_dataset, folder_dataset, picture, write_manifest, write_pictures

from vlmlayers.errors import UserError
from vlmlayers.identity import DataIdentity
from vlmlayers.manifests import Manifest, distinct, write_shards

PATHS = [f"train/{name}/{i}.png" for name in ("bird", "cat") for i in range(3)]


def pictures(folder: Path, paths: list[str] = PATHS) -> Manifest:
    write_pictures(folder, paths)
    return Manifest.load(folder)


def now(manifest: Manifest) -> DataIdentity:
    return manifest.identity(manifest.items("train"))


def later(file: Path) -> None:
    """Move a file's time of change a second on."""
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))


def test_nothing_changes_where_nothing_changed(tmp_path: Path) -> None:
    first = now(pictures(tmp_path / "pics"))
    assert now(Manifest.load(tmp_path / "pics")) == first
    shutil.copytree(tmp_path / "pics", tmp_path / "away" / "pics")
    copy = now(Manifest.load(tmp_path / "away" / "pics"))
    assert copy == first and copy.hash == first.hash
    assert first.summary() == {"hash": first.hash, "images": 6, "classes": 2}
    (tmp_path / "pics" / "notes.txt").write_text("no image")
    assert now(Manifest.load(tmp_path / "pics")) == first


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda base: write_pictures(base, ["train/dog/0.png", "train/dog/1.png"]),
            "6 images then, 8 now: 2 added, first 'train/dog/0.png'; classes 2 then, 3 now",
        ),
        (
            lambda base: write_pictures(base, ["train/ant/0.png"]),  # moves every label
            "6 images then, 7 now: 1 added, first 'train/ant/0.png'; classes 2 then, 3 now",
        ),
        (
            lambda base: write_pictures(base, ["train/café/0.png"]),
            "6 images then, 7 now: 1 added, first 'train/café/0.png'; classes 2 then, 3 now",
        ),
        (
            lambda base: (base / "train/cat/1.png").unlink(),
            "6 images then, 5 now: 1 removed, first 'train/cat/1.png'",
        ),
        (
            lambda base: picture(9, (30, 20)).save(base / "train/bird/0.png"),
            "6 images then, 6 now: 1 altered, first 'train/bird/0.png'",
        ),
        (
            lambda base: later(base / "train/bird/2.png"),
            "6 images then, 6 now: 1 altered, first 'train/bird/2.png'",
        ),
        (
            lambda base: (base / "train/cat").rename(base / "train/dog"),
            "6 images then, 6 now: 3 added, first 'train/dog/0.png'; 3 removed, first "
            "'train/cat/0.png'; class 1 'cat' then, 'dog' now",
        ),
    ],
)
def test_what_changed_is_said(tmp_path: Path, change, said: str) -> None:
    then = now(pictures(tmp_path / "pics"))
    change(tmp_path / "pics")
    after = now(Manifest.load(tmp_path / "pics"))
    assert after.hash != then.hash
    assert after.changes(then) == said


def test_a_file_of_another_size_and_the_same_time_is_another(tmp_path: Path) -> None:
    """As where an archive is unpacked again, which sets the times that it holds."""
    then = now(pictures(tmp_path / "pics"))
    file = tmp_path / "pics" / PATHS[0]
    stamp = file.stat()
    picture(9, (30, 20)).save(file)
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert (
        now(Manifest.load(tmp_path / "pics"))
        .changes(then)
        .endswith(f"1 altered, first {PATHS[0]!r}")
    )


def test_a_file_that_is_listed_in_the_other_unicode_form_is_known(tmp_path: Path) -> None:
    listed, stored = (unicodedata.normalize(form, "café.png") for form in ("NFC", "NFD"))
    manifest = coop_dataset(tmp_path, {"train": [[listed, 0, "x"]]})
    write_pictures(tmp_path, [stored])
    then = now(manifest)
    later(tmp_path / stored)
    assert "1 altered" in now(manifest).changes(then)


def test_lists_count_with_labels_captions_and_order(tmp_path: Path) -> None:
    rows = [["a.jpg", 0, "x"], ["b.jpg", 1, "y"], ["c.jpg", 1, "y"]]
    then = now(coop_dataset(tmp_path / "1", {"train": rows}))
    same = now(coop_dataset(tmp_path / "2", {"train": rows, "test": rows}))
    turned = now(coop_dataset(tmp_path / "3", {"train": rows[::-1]}))
    moved = now(coop_dataset(tmp_path / "4", {"train": [*rows[:2], ["c.jpg", 0, "x"]]}))
    named = now(coop_dataset(tmp_path / "5", {"train": [["a.jpg", 0, "z"], *rows[1:]]}))
    assert then == same
    assert turned.changes(then) == "3 images then, 3 now: in another order"
    assert moved.changes(then) == "3 images then, 3 now: 1 altered, first 'c.jpg'"
    assert "class 0 'x' then, 'z' now" in named.changes(then)
    assert same.altered(then) == []
    for other in (turned, moved, named):  # no files of one list: work on it cannot go on
        assert other.altered(then) is None
    captions = []
    for text in ("one", "two"):
        (tmp_path / "captions.txt").write_text(f"a.jpg\t{text}\n")
        file = write_manifest(tmp_path, 'layout = "captions"\nsplit_file = "captions.txt"')
        captions.append(now(Manifest.load(file)))
    assert captions[1].changes(captions[0]) == "1 images then, 1 now: 1 altered, first 'a.jpg'"


def test_a_list_is_the_same_where_its_files_are_not(tmp_path: Path) -> None:
    manifest = pictures(tmp_path)
    then = now(manifest)
    later(tmp_path / PATHS[0])
    assert now(manifest).listed == then.listed
    (tmp_path / PATHS[0]).unlink()
    assert now(manifest).listed != then.listed


def test_shards_are_marked_by_their_tar_files(tmp_path: Path) -> None:
    manifest = Manifest.load(
        write_shards(pictures(tmp_path / "pics"), "train", tmp_path / "tars", 4, progress=False)
    )
    then = now(manifest)
    assert now(manifest) == then
    later(tmp_path / "tars" / "train-00001.tar")
    assert now(manifest).changes(then).startswith("6 images then, 6 now: 2 altered")


def test_a_conversion_takes_altered_images_and_leaves_the_other_shards(tmp_path: Path) -> None:
    manifest = pictures(tmp_path / "pics")
    write_shards(manifest, "train", tmp_path / "tars", 4, progress=False)
    before = [file.stat().st_mtime_ns for file in sorted((tmp_path / "tars").glob("*.tar"))]
    picture(9, (30, 20)).save(tmp_path / "pics" / PATHS[5])
    written = write_shards(manifest, "train", tmp_path / "tars", 4, progress=False)
    after = [file.stat().st_mtime_ns for file in sorted((tmp_path / "tars").glob("*.tar"))]
    assert after[0] == before[0] and after[1] != before[1]
    shards = Manifest.load(written)
    assert shards.open_image(shards.items("train")[5]).size == (30, 20)
    whole = (tmp_path / "tars" / "train-00000.tar").read_bytes()
    (tmp_path / "tars" / "train-00000.tar").write_bytes(whole[: len(whole) // 2])
    write_shards(manifest, "train", tmp_path / "tars", 4, progress=False)
    assert (tmp_path / "tars" / "train-00000.tar").read_bytes() == whole


def test_what_is_drawn_has_the_version_of_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest.load("digits")
    then = now(manifest)
    assert now(manifest) == then
    assert {mark.split()[0] for *_, mark in then.items} == {"drawn"}
    monkeypatch.setattr("vlmlayers.manifests.identify.code_hash", lambda: "of another version")
    assert now(manifest).altered(then) == list(range(len(then.items)))


def test_a_stored_dataset_is_marked_by_its_tables(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra 'datasets'")
    rows = {"image": [picture(i) for i in range(3)], "label": ["a", "b", "a"]}
    data = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": data}).save_to_disk(str(tmp_path / "saved"))
    manifest = Manifest.load(tmp_path / "saved")
    then = now(manifest)
    assert now(manifest) == then
    later(next((tmp_path / "saved").rglob("*.arrow")))
    assert now(manifest).changes(then).startswith("3 images then, 3 now: 3 altered")


def test_images_beside_a_run_are_marked_by_themselves(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["a/0.png", "b/0.png"])
    (tmp_path / "items.csv").write_text("path,label,split\na/0.png,a,train\nb/0.png,b,train\n")
    manifest = Manifest.load(tmp_path / "items.csv")
    then = now(manifest)
    scores = tmp_path / "runs" / "mine" / "scores.parquet"
    scores.parent.mkdir(parents=True)
    scores.write_bytes(b"of a run, no dataset")
    assert now(manifest) == then
    later(tmp_path / "a" / "0.png")
    assert "1 altered, first 'a/0.png'" in now(manifest).changes(then)


def test_a_run_beside_class_folders_is_no_class(tmp_path: Path) -> None:
    write_pictures(tmp_path, [f"{name}/{i}.png" for name in ("bird", "cat") for i in range(3)])
    for run in (tmp_path / "runs" / "mine", tmp_path / "runs" / "several" / "mine"):
        write_pictures(run, ["figures/curves.png"])
        (run / "provenance.json").write_text("{}")
        (run / "scores.parquet").write_bytes(b"of a run, no dataset")
    found = Manifest.load(tmp_path).check()
    assert "complete, 6 of 6 images here; left out: folders of runs (2), first" in found.line()
    assert Manifest.load(tmp_path).class_names() == ("bird", "cat")


def test_an_identity_survives_the_disk_and_a_damaged_file_says_nothing(tmp_path: Path) -> None:
    file, identity = tmp_path / "data.gz", now(pictures(tmp_path / "pics"))
    assert DataIdentity.read(file) is None
    identity.save(file)
    assert DataIdentity.read(file) == identity
    whole = file.read_bytes()
    assert whole == identity.packed()
    for damaged in (whole[:-9], b"", b"no gzip", whole[:20] + b"\0" + whole[21:]):
        file.write_bytes(damaged)
        assert DataIdentity.read(file) is None


def test_a_full_check_tells_the_content_that_all_copies_share(tmp_path: Path) -> None:
    manifest = pictures(tmp_path / "pics")
    shutil.copytree(tmp_path / "pics", tmp_path / "b" / "pics", copy_function=shutil.copyfile)
    later(tmp_path / "b" / "pics" / PATHS[0])
    copy = Manifest.load(tmp_path / "b" / "pics")
    assert now(copy) != now(manifest)
    assert copy.check(full=True).content == manifest.check(full=True).content != ""
    assert f"content {copy.check(full=True).content}" in copy.check(full=True).line()
    assert copy.check().content == ""
    stamp = (tmp_path / "pics" / PATHS[0]).stat()
    content = (tmp_path / "pics" / PATHS[0]).read_bytes()
    (tmp_path / "pics" / PATHS[0]).write_bytes(content[:-1] + b"\x83")  # the very same size
    os.utime(tmp_path / "pics" / PATHS[0], ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert manifest.check(full=True).content != copy.check(full=True).content


def test_a_hundred_thousand_items_take_a_moment(tmp_path: Path) -> None:
    rows = [[f"{i % 100}/{i}.jpg", i % 100, f"class {i % 100}"] for i in range(100_000)]
    manifest = coop_dataset(tmp_path, {"train": rows})
    items = manifest.items("train")
    began = time.process_time()
    identity = manifest.identity(items)
    assert identity.hash
    assert time.process_time() - began < 20  # about one on a quiet machine


def test_two_datasets_of_one_name_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pictures(tmp_path / "a" / "images")
    second = pictures(tmp_path / "b" / "images")
    monkeypatch.chdir(tmp_path / "a")
    again = Manifest.load("images")
    digits = Manifest.load("digits")
    assert distinct([first, digits, again, digits]) == [first, digits]
    with pytest.raises(UserError, match="two datasets are called 'images': .*a/images and .*b/im"):
        distinct([first, digits, second])
    toml = folder_dataset(tmp_path / "c", ["bird/0.png"]).source
    assert toml is not None
    other = Manifest.load(toml.rename(toml.with_name("images.toml")))
    with pytest.raises(UserError, match="rename one, or write a manifest of another name"):
        distinct([first, other])
