"""What is known and what is on disk: states, tables, the exit code, and safe HTML."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from data_fixtures import coop_dataset, folder_dataset, picture, write_manifest, write_pictures
from PIL import Image

from vlmlayers.errors import UserError
from vlmlayers.manifests import Item, Manifest, check_table, exit_code, list_table
from vlmlayers.manifests.layouts.folder import FolderLayout

ROWS = [[f"{name}/{i}.png", label, name] for label, name in enumerate("ab") for i in range(5)]


def expect(train: int) -> str:
    return f'counts = {{ train = {train} }}\nclasses = 2\nget = "https://example.org"'


def test_states_of_a_split_file(tmp_path: Path) -> None:
    manifest = coop_dataset(tmp_path, {"train": ROWS}, expect(10))
    nothing = manifest.check()
    assert (nothing.state, nothing.found, nothing.missing) == ("missing", 0, 10)
    write_pictures(tmp_path, [row[0] for row in ROWS[:6]])  # type: ignore[misc]
    partly = manifest.check()
    assert (partly.state, partly.found, partly.missing) == ("incomplete", 6, 4)
    assert partly.first_missing == ("b/1.png", "b/2.png", "b/3.png")
    assert partly.line() == (
        f"sample: incomplete, 6 of 10 images here; not in {tmp_path}: b/1.png, b/2.png, b/3.png, "
        "…; get it: https://example.org"
    )
    write_pictures(tmp_path, [row[0] for row in ROWS[6:]])  # type: ignore[misc]
    assert manifest.check().line() == "sample: complete, 10 of 10 images here"
    assert manifest.check(full=True).ok


def test_altered_lists_are_told(tmp_path: Path) -> None:
    write_pictures(tmp_path, [row[0] for row in ROWS])  # type: ignore[misc]
    counts = coop_dataset(tmp_path, {"train": ROWS}, expect(12)).check()
    assert counts.state == "altered"
    assert counts.notes == ("train lists 10 items where 12 are expected",)
    classes = coop_dataset(tmp_path, {"train": ROWS[:5]}, expect(5)).check()
    assert classes.notes == ("1 class where 2 are expected",)
    twice = coop_dataset(tmp_path, {"train": ROWS, "val": ROWS[:2]}).check()
    assert twice.notes == ("2 images are in train and val (first: a/0.png)",)
    lists = {"train": [*ROWS, *ROWS[:3]], "val": ROWS[9:], "test": ROWS[6:]}
    assert coop_dataset(tmp_path, lists).check().notes == (
        "3 paths are listed more than once",
        "1 image is in train and val (first: b/4.png)",
        "4 images are in train and test (first: b/1.png)",
        "1 image is in val and test (first: b/4.png)",
    )
    assert coop_dataset(tmp_path, {"train": ROWS[:6], "test": ROWS[6:]}).check().notes == ()
    digest = f'split_sha256 = "{"a" * 64}"\n' + expect(10)
    hashed = coop_dataset(tmp_path, {"train": ROWS}, digest).check()
    assert hashed.state == "altered" and "its sha256 is" in hashed.notes[0]
    broken = coop_dataset(tmp_path, "{", expect(10)).check()
    assert broken.state == "unusable" and "is not valid JSON" in broken.notes[0]


def test_folders_with_fewer_or_more_images(tmp_path: Path) -> None:
    paths = [f"t/{name}/{i}.png" for name in "ab" for i in range(5)]
    splits = 'split_folders = { train = "t" }\n'
    assert folder_dataset(tmp_path, paths, splits + expect(10)).check().ok
    fewer = folder_dataset(tmp_path, [], splits + expect(12)).check()
    assert (fewer.state, fewer.found, fewer.missing) == ("incomplete", 10, 2)
    more = folder_dataset(tmp_path, [], splits + expect(9)).check()
    assert (more.state, more.notes) == ("altered", ("train lists 10 items where 9 are expected",))
    gone = Manifest.load(write_manifest(tmp_path, 'layout = "folder"\nfolder = "x"\n' + expect(9)))
    result = gone.check(root=tmp_path)
    assert (result.state, result.missing) == ("missing", 9)
    assert result.line().count("get it") == 1
    # Of images that nobody looked for, as without a split file, no number is said.
    assert result.line().startswith(f"sample: missing; no folder {tmp_path / 'x'}; get it")
    broken = coop_dataset(tmp_path, "{", expect(9)).check()
    assert broken.line().startswith("sample: unusable; ") and "images here" not in broken.line()


def test_a_line_says_which_split_is_short(tmp_path: Path) -> None:
    """As where of ImageNet only the validation images are there."""
    text = 'split_folders = { train = "train", test = "val" }\n'
    text += "counts = { train = 1300, test = 4 }\nclasses = 2"
    paths = [f"val/{name}/{i}.png" for name in "ab" for i in range(2)]
    found = folder_dataset(tmp_path, paths, text).check()
    assert (found.state, found.missing, found.notes) == ("incomplete", 1300, ())
    assert found.line() == "sample: incomplete, 4 of 1,304 images here; train 0 of 1,300"
    (tmp_path / paths[0]).unlink()
    assert "; train 0 of 1,300, test 3 of 4" in folder_dataset(tmp_path, [], text).check().line()


def test_use_tells_what_is_not_as_expected(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A part of ImageNet's classes is an easier task, whose accuracy looks like the whole one's."""
    splits = 'split_folders = { train = "t" }\n'
    paths = [f"t/{name}/1.png" for name in "ab"]
    whole = folder_dataset(tmp_path, paths, splits + expect(2))
    assert whole.items("train") and not caplog.messages
    part = folder_dataset(tmp_path, [], splits + "counts = { train = 9 }\nclasses = 3")
    assert len(part.items("train")) == len(part.items("train")) == 2
    assert caplog.messages == [
        "sample: train lists 2 items where 9 are expected",
        "sample: 2 classes where 3 are expected",
    ]


def test_a_check_lists_each_split_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ImageNet's million files on a network disk a listing takes minutes."""
    text = 'split_folders = { train = "t", test = "v" }'
    manifest = folder_dataset(tmp_path, ["t/a/1.png", "t/b/1.png", "v/a/1.png"], text)
    asked, items = list[str](), FolderLayout.items

    def counting(layout: FolderLayout, split: str) -> list[Item]:
        asked.append(split)
        return items(layout, split)

    monkeypatch.setattr(FolderLayout, "items", counting)
    assert manifest.check().ok and asked == ["train", "test"]


def test_full_check_decodes_every_image(tmp_path: Path) -> None:
    write_pictures(tmp_path, [row[0] for row in ROWS])  # type: ignore[misc]
    (tmp_path / "b/3.png").write_bytes(b"not an image")
    manifest = coop_dataset(tmp_path, {"train": ROWS}, expect(10))
    assert manifest.check().ok
    result = manifest.check(full=True)
    assert result.state == "altered" and len(result.unreadable) == 1
    assert "b/3.png is not an image of a known format" in result.line()


def test_full_check_tells_images_that_are_copies(tmp_path: Path) -> None:
    """Those of a test split in the training split above all: they were trained on."""
    splits = {"train": ROWS[:6], "test": ROWS[6:]}
    manifest = coop_dataset(tmp_path, splits)
    for number, row in enumerate(ROWS):
        write_pictures(tmp_path, [str(row[0])])  # with its folder
        Image.new("RGB", (4, 4), (20 * number, 0, 0)).save(tmp_path / str(row[0]))
    assert manifest.check(full=True).remarks == ()
    first, second, test = (str(ROWS[i][0]) for i in (0, 1, 7))
    for copy in (second, test):
        shutil.copy(tmp_path / first, tmp_path / copy)
    result = manifest.check(full=True)
    assert result.ok and manifest.check().remarks == ()
    assert result.remarks == (
        f"2 images copied from others, 1 of another split, as {first} (train) and {test} (test)",
    )


def test_tables_and_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_dataset(tmp_path / "good", ["x/1.png"], 'split_folders = { test = "." }')
    write_manifest(tmp_path / "m", 'layout = "folder"\nfolder = "nowhere"', name="bad")
    write_manifest(
        tmp_path / "m", 'layout = "folder"\nfolder = "good"\nsplit_folders = { test = "." }',
        name="good",
    )  # fmt: skip
    monkeypatch.setenv("VLMLAYERS_MANIFESTS", str(tmp_path / "m"))
    known = list_table(tmp_path).set_index("name")
    assert list(known.index) == Manifest.names()
    assert known.loc["good", "here"] and not known.loc["bad", "here"]
    assert known.loc["imagenet", "train"] == 1_281_167
    both = check_table(["good", "bad"], tmp_path)
    assert list(both["state"]) == ["complete", "missing"]
    assert exit_code(both, ["good", "bad"]) == 2
    assert exit_code(check_table(["good"], tmp_path), ["good"]) == 0
    overview = check_table(root=tmp_path)
    assert list(overview["name"]) == Manifest.names()
    assert exit_code(overview) == 0
    with pytest.raises(UserError, match="unknown dataset 'goood'; did you mean 'good'"):
        check_table(["goood"], tmp_path)


def test_html_is_escaped(tmp_path: Path) -> None:
    text = 'title = "<script>alert(1)</script>"\nlayout = "folder"\nnote = "a < b & \\"c\\""'
    html = Manifest.load(write_manifest(tmp_path, text))._repr_html_()
    assert "<script>" not in html and "&lt;script&gt;" in html
    assert "a &lt; b &amp; &quot;c&quot;" in html
    assert "note" in html and "citation" not in html


def test_location_of_a_file_that_is_not_there(tmp_path: Path) -> None:
    manifest = coop_dataset(tmp_path, {"train": ROWS})
    with pytest.raises(UserError, match=r"a/0.png is missing; `vlmlayers data check` says more"):
        manifest.open_image(manifest.items("train")[0])
    (tmp_path / "a").mkdir()
    picture().save(tmp_path / "a/0.png")
    assert manifest.open_image(manifest.items("train")[0], size=99).size == (12, 8)
