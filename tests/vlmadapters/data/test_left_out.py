"""Images that are missing or broken, and data without classes, in training and evaluation."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from backbones import shared_backbone
from PIL import Image
from typer.testing import CliRunner

from vlmadapters.cli import train_stage, validate_stage
from vlmadapters.data.options import ReadOptions
from vlmadapters.data.task import TaskData
from vlmadapters.methods.mma.config import MMAConfig
from vlmadapters.protocols.train import base_to_novel
from vlmadapters.protocols.trained import evaluate_methods
from vlmadapters.training.recipes import Recipe, TrainConfig
from vlmadapters.validation.validate import validate
from vlmlayers.errors import UserError
from vlmlayers.models import extract
from vlmlayers.runs import Run
from vlmlayers.selection import LayerChoice
from vlmlayers.study.context import StageContext
from vlmlayers.study.schema import check_study

RECIPE = Recipe(
    "tiny", TrainConfig(lr=0.05, epochs=1, batch_size=4, shots=2), MMAConfig.span(3, 3, dim=4)
)
CHOICE = LayerChoice((3,), (3,), "explicit")
SKIP = ReadOptions(skip_unreadable=True)
NAMES = ("ant", "bee", "cat", "dog")


def write(base: Path, names: tuple[str, ...] = NAMES, each: int = 4) -> Path:
    """Write an image folder with train and test; every picture is of one colour of its own."""
    for split in ("train", "test"):
        for label, name in enumerate(names):
            (base / split / name).mkdir(parents=True)
            for number in range(each):
                colour = (60 * label, 40 * number, 200 * (split == "test"))
                Image.new("RGB", (32, 32), colour).save(base / split / name / f"{number}.png")
    return base


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """One test image of each class and one training image of `ant` are cut short."""
    base = write(tmp_path / "pets")
    for path in [*base.glob("test/*/1.png"), base / "train/ant/2.png"]:
        path.write_bytes(b"")
    return base


WORK: dict[str, Callable[..., Any]] = {
    "train": lambda data, **options: base_to_novel(
        shared_backbone(), [data], RECIPE, seeds=(1, 2), progress=False, **options
    ),
    "evaluate": lambda data, **options: evaluate_methods(
        shared_backbone(), [data], {}, kinds=("all", "base", "novel"), progress=False, **options
    ),
    "validate": lambda data, **options: validate(
        shared_backbone(), CHOICE, [data], recipe=RECIPE, kinds=("all",), seeds=(1, 2),
        amount="given", progress=False, **options,
    ).table,
}  # fmt: skip


@pytest.mark.parametrize("work", WORK)
def test_broken_images_stop_the_work_or_are_left_out(
    work: str, broken: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UserError, match=r"is empty \(0 bytes\); repair it, or leave .*--skip-unr"):
        WORK[work](str(broken))
    caplog.clear()
    left_out = WORK[work](str(broken), skip_unreadable=True)
    assert "4 of 16 images of pets cannot be read and are left out, first test/ant/1" in caplog.text
    for path in broken.glob("*/*/*.png"):
        if not path.stat().st_size:
            path.unlink()
    pd.testing.assert_frame_equal(
        WORK[work](str(broken)).drop(columns="seconds"), left_out.drop(columns="seconds")
    )


def test_what_was_trained_without_broken_images_does_not_pass_for_a_run_with_them(
    broken: Path, tmp_path: Path
) -> None:
    WORK["train"](broken, out=tmp_path / "out", skip_unreadable=True)
    with pytest.raises(UserError, match="skip-unreadable"):
        WORK["train"](broken, out=tmp_path / "out")


@pytest.mark.parametrize("work", WORK)
def test_absent_images_stop_the_work_or_are_left_out(
    work: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = write(tmp_path / "pets")
    rows = [f"{p.relative_to(base)},{p.parent.name},{p.parts[-3]}" for p in base.glob("*/*/*.png")]
    (base / "t.csv").write_text("\n".join(["path,label,split", *sorted(rows)]))
    text = 'title = "pets"\nfolder = "."\nlayout = "table"\nsplit_file = "t.csv"'
    (base / "pets.toml").write_text(text)
    for number in (0, 1, 2):
        (base / f"train/ant/{number}.png").unlink()
        (base / f"test/ant/{number}.png").unlink()
    with pytest.raises(UserError, match=r"images are not in .*--present-only"):
        WORK[work](str(base / "pets.toml"))
    table = WORK[work](str(base / "pets.toml"), present_only=True)
    assert len(table)
    assert "pets test: 3 of 16 items are not on disk and are left out, first test/ant/0" in (
        caplog.text
    )
    assert len(WORK[work](str(base / "pets.toml"), skip_unreadable=True)) == len(table)


def test_other_images_are_drawn_for_broken_ones(broken: Path) -> None:
    data = TaskData(str(broken), shared_backbone(), options=SKIP)
    for seed in range(5):
        drawn = data.shots(3, seed, "all")
        assert len(drawn) == 12 and "train/ant/2.png" not in {item.path for item in drawn}
    shutil.rmtree(broken / "train/bee")
    for number in range(4):
        (broken / f"train/ant/{number}.png").write_bytes(b"")
    fewer = TaskData(str(broken), shared_backbone(), options=SKIP)
    assert {item.class_name for item in fewer.shots(3, 0, "all")} == {"cat", "dog"}
    for path in broken.glob("train/*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="12 of 12 images of pets cannot be read"):
        TaskData(str(broken), shared_backbone(), options=SKIP).shots(4, 0, "all")


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize(
    ("names", "gone", "message"),
    [
        (("ant",), "", "pets has one class, 'ant'"),
        (NAMES, "test/cat test/dog", "pets has no image of its novel classes in split 'test'"),
        (NAMES, "train/ant train/bee", "pets has no image of its base classes in split 'train'"),
    ],
)
def test_what_cannot_be_told_apart_is_refused_in_one_line(
    tmp_path: Path, work: str, names: tuple[str, ...], gone: str, message: str
) -> None:
    base = write(tmp_path / "pets", names, each=2)
    for folder in gone.split():
        for path in (base / folder).glob("*.png"):
            path.unlink()
    if work == "evaluate" and "train" in gone:
        assert len(WORK[work](str(base)))
        return
    with pytest.raises(UserError, match=message):
        WORK[work](str(base))


def test_items_that_leave_a_half_without_test_images_are_refused(tmp_path: Path) -> None:
    """Before any training: its accuracy would be of no image."""
    base = str(write(tmp_path / "pets", NAMES, each=2))
    with pytest.raises(UserError, match=r"pets has no image of its \w+ classes in 1 item of split"):
        base_to_novel(shared_backbone(), base, recipe=RECIPE, items=1, progress=False)


@pytest.mark.parametrize("work", WORK)
def test_data_without_classes_name_the_columns_that_are_there(tmp_path: Path, work: str) -> None:
    base = write(tmp_path / "pets")
    rows = [f"{p.relative_to(base)},{p.parent.name},{p.parts[-3]}" for p in base.glob("*/*/*.png")]
    (base / "t.csv").write_text("\n".join(["path,kind of animal,split", *sorted(rows)]))
    text = 'title = "pets"\nfolder = "."\nlayout = "table"\nsplit_file = "t.csv"'
    (base / "pets.toml").write_text(text)
    with pytest.raises(UserError, match="no classes.* there are path, kind of animal, split"):
        WORK[work](str(base / "pets.toml"))


def test_images_without_a_class_among_others_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    picture = (write(tmp_path / "pets") / "train/ant/0.png").read_bytes()
    for split in ("train", "test"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            for name in ("0.png", "1.png", "1.cls", "2.png", "2.cls"):
                content = picture if name.endswith("png") else name[:1].encode()
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    shards = 'title = "mixed"\nlayout = "shards"\nfolder = "./"\n[shards]\n'
    file = tmp_path / "mixed.toml"
    file.write_text(f'{shards}train = "train.tar"\ntest = "test.tar"')
    data = TaskData(str(file), shared_backbone())
    data.check("all", "test")
    data.check("base", "test")
    said = "mixed: 1 of 3 images in split 'test' have no class and are left out, first test.tar/0"
    assert caplog.text.count(said) == 1
    assert [item.label for item in data.test("all")] == [0, 1]
    # They take no share of the items asked for.
    assert len(TaskData(str(file), shared_backbone(), limit=2).test("all")) == 2
    # Features would hold them, and nothing that reads features may.
    refused = "mixed: 1 of 3 items have no class, first train.tar/0.png"
    with pytest.raises(UserError, match=refused):
        extract(shared_backbone(), file, "train", progress=False)


def test_a_half_of_one_class_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    TaskData(str(write(tmp_path / "pets", NAMES[:3])), shared_backbone()).check("novel", "test")
    assert "pets has one novel class: every answer is right there" in caplog.text


def test_the_verbs_take_both_options(broken: Path, caplog: pytest.LogCaptureFixture) -> None:
    from vlmlayers.cli import app

    words = ["evaluate", "mini-clip", str(broken), "--items", "9", "--quiet", "--present-only"]
    result = CliRunner().invoke(app, [*words, "--skip-unreadable"])
    assert result.exit_code == 0, result.output
    assert "images of pets cannot be read and are left out" in caplog.text
    for verb in ("train", "validate", "extract"):
        shown = CliRunner().invoke(app, [verb, "--help"]).output
        assert "--skip-unreadable" in shown and "--present-only" in shown


@pytest.mark.parametrize("own", [{}, {"present_only": False, "skip_unreadable": False}])
def test_a_study_trains_on_what_it_extracts(
    broken: Path, tmp_path: Path, own: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`[validate]` and `[[train]]` leave out what `[extract]` does, unless they say otherwise."""
    words = {"seeds": [1], "set": {"epochs": 1, "shots": 2, "dim": 4}, **own}
    content = {
        "models": [{"name": "ViT-B-32", "random_weights": True}],
        "datasets": [str(broken)],
        "extract": {"present_only": True, "skip_unreadable": True},
        "validate": {"kinds": ["all"], **words},
        "train": [{"placements": ["3"], **words}],
    }
    study = check_study(content)
    context = StageContext(Run(tmp_path / "run"), study, study.models[0], tmp_path, progress=False)
    monkeypatch.setattr(StageContext, "load_model", lambda self: shared_backbone())
    monkeypatch.setattr(StageContext, "scores", None)
    CHOICE.save(context.run.choice)
    for stage in (train_stage.train, validate_stage.validate):
        if own:
            with pytest.raises(UserError, match="--skip-unreadable"):
                stage(context)
        else:
            stage(context)
