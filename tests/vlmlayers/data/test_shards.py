"""Webdataset shards: random access, exact counts, conversion, and what is refused."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from data_fixtures import coop_dataset, folder_dataset, picture, write_manifest, write_pictures

from vlmlayers.data.shards import index_shard, read_member
from vlmlayers.errors import UnreadableImage, UserError
from vlmlayers.manifests import Item, Manifest, write_shards

NAMES = ["a {} <b>", 'quo"te\n', "\u007f\\", "747"]


def png(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def shards_dataset(folder: Path, extra: str = "") -> Manifest:
    text = f'folder = "."\nlayout = "shards"\nshards = {{ train = "train-*.tar" }}\n{extra}'
    return Manifest.load(write_manifest(folder, text))


def source(folder: Path, count: int = 11) -> Manifest:
    rows = [[f"x/{i}.png", i % len(NAMES), NAMES[i % len(NAMES)]] for i in range(count)]
    write_pictures(folder, [str(row[0]) for row in rows])
    return coop_dataset(folder, {"train": rows, "test": rows[:3]}, 'licence = "CC \\"BY\\""')


def test_conversion_keeps_items_pixels_and_names(tmp_path: Path) -> None:
    manifest = source(tmp_path / "from")
    written = write_shards(manifest, ["train", "test"], tmp_path / "to", 4, progress=False)
    shards = Manifest.load(written)
    assert shards.check(full=True).state == "complete"
    assert sorted(path.name for path in (tmp_path / "to").glob("[!.]*")) == [
        "manifest.toml", "test-00000.tar", "train-00000.tar", "train-00001.tar", "train-00002.tar",
    ]  # fmt: skip
    assert shards.class_names() == tuple(NAMES)
    assert shards.spec.licence == 'CC "BY"'
    for split, count in (("train", 11), ("test", 3)):
        before, after = manifest.items(split), shards.items(split)
        assert len(after) == count
        assert [(i.label, i.class_name) for i in before] == [(i.label, i.class_name) for i in after]
        for old, new in zip(before, after):
            pixels = np.asarray(shards.open_image(new))
            np.testing.assert_array_equal(pixels, np.asarray(manifest.open_image(old)))
    assert shards.location(shards.items("train")[5]) == tmp_path / "to/train-00001.tar"
    assert shards.items("train")[5].path == "train-00001.tar/00000005.png"


def test_conversion_is_deterministic_and_goes_on(tmp_path: Path) -> None:
    manifest = source(tmp_path / "from")
    write_shards(manifest, "train", tmp_path / "a", 4, progress=False)
    again = write_shards(manifest, "train", tmp_path / "b", 4, progress=False)
    for path in sorted((tmp_path / "a").glob("*.tar")):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    twice = write_shards(Manifest.load(again), "train", tmp_path / "c", 100, progress=False)
    first, last = Manifest.load(again), Manifest.load(twice)
    assert [i.label for i in first.items("train")] == [i.label for i in last.items("train")]
    with pytest.raises(UserError, match="per_shard takes a whole number from 1, not 0"):
        write_shards(manifest, "train", tmp_path / "d", 0)


def test_conversion_of_captions(tmp_path: Path) -> None:
    write_pictures(tmp_path / "from", ["1.png", "2.png"])
    captions = {"1.png": ["one", "a\nfirst"], "2.png": "two"}
    rows = [{"path": path, "caption": text, "split": "train"} for path, text in captions.items()]
    (tmp_path / "from/c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = 'folder = "."\nlayout = "table"\nsplit_file = "c.jsonl"'
    captioned = Manifest.load(write_manifest(tmp_path / "from", text))
    shards = Manifest.load(write_shards(captioned, "train", tmp_path / "to", progress=False))
    assert [(i.label, i.captions) for i in shards.items("train")] == [
        (-1, ("one", "a first")), (-1, ("two",)),
    ]  # fmt: skip
    assert shards.class_names() == ()


def test_conversion_of_drawn_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest.load("flags")
    items = manifest.items("val")[:7]
    monkeypatch.setattr(Manifest, "items", lambda self, split, root=None: items)
    written = write_shards(manifest, "val", tmp_path, 3, progress=False)
    monkeypatch.undo()
    shards = Manifest.load(written)
    assert shards.class_names() == manifest.class_names()
    for old, new in zip(items, shards.items("val"), strict=True):
        assert (old.label, old.captions) == (new.label, new.captions)
        pixels = np.asarray(shards.open_image(new))
        np.testing.assert_array_equal(pixels, np.asarray(manifest.open_image(old)))


def test_images_of_another_ending_are_converted_to_one_that_is_read(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", [("a.img", png(3)), ("a.cls", b"0")])
    odd = shards_dataset(tmp_path, 'members = { image = "img" }')
    shards = Manifest.load(write_shards(odd, "train", tmp_path / "to", progress=False))
    ((mine,), (theirs,)) = odd.items("train"), shards.items("train")
    np.testing.assert_array_equal(odd.open_image(mine), shards.open_image(theirs))


def test_a_failed_conversion_leaves_no_half_shard(tmp_path: Path) -> None:
    manifest = source(tmp_path / "from")
    (tmp_path / "from/x/6.png").unlink()
    with pytest.raises(UserError, match=r"x/6\.png cannot be read: No such file"):
        write_shards(manifest, "train", tmp_path / "to", 4, progress=False)
    assert [path.name for path in (tmp_path / "to").glob("[!.]*")] == ["train-00000.tar"]
    (tmp_path / "to/train-00000.tar").touch()
    before = (tmp_path / "to/train-00000.tar").stat().st_mtime_ns
    write_pictures(tmp_path / "from", ["x/6.png"])
    written = write_shards(manifest, "train", tmp_path / "to", 4, progress=False)
    assert Manifest.load(written).check(full=True).ok
    assert (tmp_path / "to/train-00000.tar").stat().st_mtime_ns == before  # it went on


def test_a_conversion_adds_to_nothing_else(tmp_path: Path) -> None:
    manifest = source(tmp_path / "from")
    write_shards(manifest, "train", tmp_path / "to", 4, progress=False)
    with pytest.raises(UserError, match="holds another conversion; choose another folder"):
        write_shards(manifest, "train", tmp_path / "to", 5, progress=False)
    write_tar(tmp_path / "mine/x.tar", [("a.png", png())])
    for folder, held in (("mine", "x.tar"), ("from", "sample.toml")):
        with pytest.raises(UserError, match=f"holds {held}, which is of no conversion"):
            write_shards(manifest, "train", tmp_path / folder, 4, progress=False)
    assert len(index_shard(tmp_path / "mine/x.tar")) == 1
    assert not (tmp_path / "from/manifest.toml").exists()


def test_all_splits_are_converted_by_that_word(tmp_path: Path) -> None:
    written = write_shards(source(tmp_path / "from"), "all", tmp_path / "to", progress=False)
    assert Manifest.load(written).splits() == ("train", "test")


def test_the_verb_converts_and_checks(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from vlmlayers.cli import app

    paths = [f"train/{name}/{i}.jpg" for name in ("gull", "owl") for i in range(4)]
    folder_dataset(tmp_path / "from", paths, 'split_folders = { train = "train" }')
    arguments = [str(tmp_path / "from/sample.toml"), "--out", str(tmp_path / "to"), "--quiet"]
    result = CliRunner().invoke(app, ["data", "shards", *arguments, "--per-shard", "3"])
    assert result.exit_code == 0, result.output
    assert "8" in result.output
    assert len(list((tmp_path / "to").glob("*.tar"))) == 3
    assert len(Manifest.load(tmp_path / "to").items("train")) == 8


def test_writing_without_the_library_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "webdataset.writer", None)
    with pytest.raises(UserError, match="needs the package webdataset; install it with"):
        write_shards(source(tmp_path / "from"), "train", tmp_path / "to", progress=False)


def test_webdataset_itself_reads_what_is_written(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset", reason="needs the extra 'shards'")
    manifest = source(tmp_path / "from")
    write_shards(manifest, "train", tmp_path / "to", 4, progress=False)
    files = sorted(str(path) for path in (tmp_path / "to").glob("train-*.tar"))
    pipeline = webdataset.WebDataset(files, shardshuffle=False).decode("rgb8")
    samples = list(pipeline.to_tuple("png", "cls", "json"))
    assert [label for _, label, _ in samples] == [item.label for item in manifest.items("train")]
    assert [extra["path"] for *_, extra in samples] == [i.path for i in manifest.items("train")]
    np.testing.assert_array_equal(
        samples[5][0], np.asarray(manifest.open_image(manifest.items("train")[5]))
    )


def test_classes_are_numbers_or_words(tmp_path: Path) -> None:
    numbers = [("b.png", png()), ("b.cls", b"2\n"), ("a.png", png()), ("a.cls", b"0")]
    write_tar(tmp_path / "1/train-0.tar", numbers)
    plain = shards_dataset(tmp_path / "1")
    assert plain.class_names() == ("0", "2")  # no class is made up between them
    assert plain.items("train")[0] == Item("train-0.tar/b.png", 1, "2")
    words = [("d/b.png", png()), ("d/b.cls", b"zebra"), ("d/a.png", png()), ("d/a.cls", b"ant")]
    write_tar(tmp_path / "2/train-0.tar", words)
    named = shards_dataset(tmp_path / "2")
    assert [(i.path, i.label) for i in named.items("train")] == [
        ("train-0.tar/d/b.png", 1), ("train-0.tar/d/a.png", 0),
    ]  # fmt: skip
    declared = shards_dataset(tmp_path / "1", 'class_names = ["x", "y"]')
    with pytest.raises(UserError, match=r"b\.png has label 2; labels are 0 to 1"):
        declared.items("train")
    write_tar(tmp_path / "1/train-0.tar", [("a.png", png()), ("a.cls", b"99999999")])
    assert plain.class_names() == ("99999999",)


def test_numbers_from_one_are_counted_from_zero(tmp_path: Path) -> None:
    members = [(f"{i}.{end}", body) for i in (1, 2, 3)
               for end, body in (("png", png(i)), ("cls", str(i).encode()))]  # fmt: skip
    write_tar(tmp_path / "train-0.tar", members)
    plain = shards_dataset(tmp_path)
    assert [(i.label, i.class_name) for i in plain.items("train")] == [
        (0, "1"), (1, "2"), (2, "3"),
    ]  # fmt: skip
    assert "its labels, 1 to 3, are counted from 0" in plain.check().line()
    declared = shards_dataset(tmp_path, 'class_names = ["x", "y", "z"]')
    assert [i.class_name for i in declared.items("train")] == ["x", "y", "z"]
    more = shards_dataset(tmp_path, 'class_names = ["w", "x", "y", "z"]')
    assert [i.class_name for i in more.items("train")] == ["x", "y", "z"]


def test_keys_that_repeat_lose_no_sample(tmp_path: Path) -> None:
    """Files of several folders packed under their bare names, as `webdataset` reads them."""
    seeds = [(label, number) for label in range(4) for number in range(3)]
    members = []
    for label, number in seeds:
        members.append((f"image_{number}.cls", str(label).encode()))
        members.append((f"image_{number}.png", png(10 * label + number)))
    path = write_tar(tmp_path / "train-0.tar", members)
    manifest = shards_dataset(tmp_path)
    items = manifest.items("train")
    assert [item.label for item in items] == [label for label, _ in seeds]
    assert len({item.path for item in items}) == 12 and manifest.check(full=True).ok
    for item, (label, number) in zip(items, seeds, strict=True):
        pixels = np.asarray(picture(10 * label + number))
        np.testing.assert_array_equal(np.asarray(manifest.open_image(item)), pixels)
    webdataset = pytest.importorskip("webdataset", reason="needs the extra 'shards'")
    theirs = webdataset.WebDataset(str(path), shardshuffle=False).to_tuple("cls")
    assert [int(label) for (label,) in theirs] == [item.label for item in items]


def test_members_of_one_sample_may_lie_apart(tmp_path: Path) -> None:
    path = tmp_path / "train-0.tar"
    write_tar(path, [("a.png", png()), ("b.png", png()), ("a.cls", b"a"), ("b.cls", b"b")])
    assert [i.class_name for i in shards_dataset(tmp_path).items("train")] == ["a", "b"]
    write_tar(path, [("a.png", png()), ("b.png", png()), ("a.png", png()), ("a.cls", b"1")])
    assert [i.label for i in shards_dataset(tmp_path).items("train")] == [-1, -1, 0]


def test_a_key_that_comes_again_at_once_is_another_sample(tmp_path: Path) -> None:
    names = [("a.png", png(1)), ("a.cls", b"0"), ("a.png", png(2)), ("a.cls", b"1")]
    write_tar(tmp_path / "train-0.tar", names)
    manifest = shards_dataset(tmp_path)
    items = manifest.items("train")
    assert [item.label for item in items] == [0, 1]
    for item, seed in zip(items, (1, 2), strict=True):
        np.testing.assert_array_equal(np.asarray(manifest.open_image(item)), picture(seed))


def test_shards_of_a_pattern_are_read_by_name_whatever_was_written_first(tmp_path: Path) -> None:
    for number in (2, 0, 1):
        members = [("x.PNG", png()), ("x.CLS", b"%d" % number)]  # endings in any case
        write_tar(tmp_path / f"train-{number}.tar", members)
    items = shards_dataset(tmp_path).items("train")
    assert [(item.path.partition("/")[0], item.label) for item in items] == [
        (f"train-{number}.tar", number) for number in range(3)
    ]


ODD = ["README", "README.md", "._0.png", "./._0.cls", "__MACOSX/0.png", "meta.json", ".x/0.png"]


@pytest.mark.parametrize("name", ODD)
def test_members_of_no_sample_are_left_out_and_told(tmp_path: Path, name: str) -> None:
    write_tar(tmp_path / "train-0.tar", [(name, b"\0\5"), ("0.png", png()), ("0.cls", b"1")])
    manifest = shards_dataset(tmp_path)
    assert [item.path for item in manifest.items("train")] == ["train-0.tar/0.png"]
    told = f"left out: members of no sample (1), first 'train-0.tar/{name}'"
    assert told in manifest.check().line()
    write_tar(tmp_path / "train-0.tar", [(name, b"\0\5")])
    with pytest.raises(UserError, match="holds no sample with an image"):
        manifest.items("train")


def test_which_image_of_a_sample_counts(tmp_path: Path) -> None:
    def paths(names: list[str], extra: str = "") -> list[str]:
        write_tar(tmp_path / "train-0.tar", [(name, png()) for name in names])
        return [i.path.partition("/")[2] for i in shards_dataset(tmp_path, extra).items("train")]

    assert paths(["0.mask.png", "0.jpg"]) == ["0.jpg"]  # a bare format goes first
    assert paths(["0.rgb.png"]) == ["0.rgb.png"]
    with pytest.raises(UserError, match=r"'0' has the images jpg, png; say in the manifest which"):
        paths(["0.png", "0.jpg"])
    named = 'members = { image = ["rgb.png", "JPG"] }'
    assert paths(["0.png", "0.jpg"], named) == ["0.jpg"]
    assert paths(["0.png", "0.jpg", "0.rgb.png"], named) == ["0.rgb.png"]
    with pytest.raises(UserError, match="unknown key 'members.img'; did you mean 'image'"):
        paths(["0.png"], 'members = { img = "png" }')


def test_names_of_members_can_be_set(tmp_path: Path) -> None:
    names = [("0.png", png()), ("0.class", b"ant"), ("0.cls", b"7"), ("0.alt", b"one\ntwo")]
    write_tar(tmp_path / "train-0.tar", names)
    manifest = shards_dataset(tmp_path, 'members = { label = "class", caption = "alt" }')
    assert manifest.items("train") == [Item("train-0.tar/0.png", 0, "ant", ("one", "two"))]
    assert manifest.open_image(manifest.items("train")[0]).size == (12, 8)


def test_members_are_read_in_any_order(tmp_path: Path) -> None:
    contents = {f"{i:03d}.png": png(i) for i in range(20)}
    path = write_tar(tmp_path / "train-0.tar", list(contents.items()))
    for name in np.random.default_rng(0).permutation(list(contents)).tolist():
        assert read_member(path, name) == contents[name]
    with pytest.raises(UserError, match=r"train-0\.tar holds no image '999\.png'"):
        read_member(path, "999.png")


def test_a_changed_shard_is_indexed_again(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "train-0.tar", [("a.png", png(1))])
    assert len(index_shard(path)) == 1
    write_tar(path, [("b.png", png(2)), ("c.png", png(3))] * 1)
    assert [sample.image for sample in index_shard(path)] == ["b.png", "c.png"]


def test_shards_that_are_refused(tmp_path: Path) -> None:
    manifest = shards_dataset(tmp_path)
    with pytest.raises(UserError, match=r"no shard .*train-\*\.tar"):
        manifest.items("train")
    path = tmp_path / "train-0.tar"
    cases: list[tuple[bytes, str]] = [
        (b"no tar at all" * 100, "cannot be read as an uncompressed tar"),
        (write_tar(path, [("a.png", png())], "w:gz").read_bytes(), "as an uncompressed tar"),
        (write_tar(path, [("a.cls", b"1")]).read_bytes(), r"sample 'a' has no image among"),
        (write_tar(path, [("a.png", png()), ("a.cls", b"\xff")]).read_bytes(), "is not UTF-8 text"),
        (write_tar(path, [("a.png", b"x" * 9000)]).read_bytes()[:4000], "is truncated in|tar:"),
        (
            write_tar(path, [("a.png", png()), ("a.txt", b"x" * 1_000_001)]).read_bytes(),
            "is too large for text",
        ),
        (write_tar(path, [("../a.png", png())]).read_bytes(), "leaves the dataset's folder"),
    ]
    for number, (content, message) in enumerate(cases):
        other = tmp_path / str(number)
        other.mkdir()
        (other / "train-0.tar").write_bytes(content)
        with pytest.raises(UserError, match=message):
            shards_dataset(other).items("train")
    with pytest.raises(UserError, match=r"gone\.tar cannot be read: No such file"):
        index_shard(tmp_path / "gone.tar")
    with pytest.raises(UserError, match=r"gone\.tar cannot be read: No such file"):
        read_member(tmp_path / "gone.tar", "a.png")


def test_an_unreadable_image_in_a_shard_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", [("a.png", b"text"), ("b.png", png())])
    manifest = shards_dataset(tmp_path)
    bad, good = manifest.items("train")
    with pytest.raises(UnreadableImage, match=r"train-0\.tar/a\.png is not an image"):
        manifest.open_image(bad)
    assert manifest.open_image(good).size == (12, 8)


@pytest.mark.parametrize("name", ["part-0", "a.TAR", "x.tar/part-0.tar"])
def test_a_shard_whose_name_does_not_tell_it_from_its_images_is_refused(
    tmp_path: Path, name: str
) -> None:
    write_tar(tmp_path / name, [("0.png", png())])
    text = f'folder = "."\nlayout = "shards"\nshards = {{ train = "{name}" }}'
    with pytest.raises(UserError, match=f"the shard .*{name} is to end in .tar, and no folder"):
        Manifest.load(write_manifest(tmp_path, text)).items("train")


def test_a_shard_may_be_a_link(tmp_path: Path) -> None:
    outside = write_tar(tmp_path / "outside.tar", [("a.png", png())])
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train-0.tar").symlink_to(outside)
    manifest = shards_dataset(tmp_path / "data")
    assert manifest.open_image(manifest.items("train")[0]).size == (12, 8)


def test_folders_convert_with_their_class_names(tmp_path: Path) -> None:
    paths = [f"{name}/{i}.jpg" for name in ("gull", "owl") for i in range(4)]
    manifest = folder_dataset(tmp_path / "from", paths, 'split_folders = { test = "." }')
    shards = Manifest.load(write_shards(manifest, "test", tmp_path / "to", 3, progress=False))
    assert shards.class_names() == ("gull", "owl")
    original = (tmp_path / "from/owl/2.jpg").read_bytes()
    assert read_member(tmp_path / "to/test-00002.tar", "00000006.jpg") == original
