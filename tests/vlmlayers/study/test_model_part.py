"""Which weights a study or a command names: found, handed on, and refused before torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vlmlayers.errors import UserError
from vlmlayers.runs import Run
from vlmlayers.study import StageContext
from vlmlayers.study.preflight import check_before
from vlmlayers.study.schema import ExtractPart, check_study
from vlmlayers.study.scoring import recorded_context
from vlmlayers.study.verbs import study_of


def context_of(tmp_path: Path, **model: Any) -> StageContext:
    study = check_study({"title": "x", "models": [model], "datasets": ["digits"]})
    return StageContext(Run(tmp_path / "out"), study, study.models[0], tmp_path / "base")


def test_a_model_of_a_study_takes_the_options_of_load_model(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "w.pt").write_bytes(b"")
    options = {"mean": [0.5, 0.5, 0.5], "std": 0.25, "interpolation": "bilinear"}
    options |= {"resize_mode": "squash", "image_size": 96, "like": "openai"}
    context = context_of(tmp_path, name="ViT-B-32", pretrained="w.pt", **options)
    found = context.model_arguments()
    assert found.pop("pretrained") == str(tmp_path / "base" / "w.pt")
    assert found == {
        **options,
        "name": "ViT-B-32",
        "mean": (0.5, 0.5, 0.5),
        "random_weights": False,
    }
    assert context_of(tmp_path, name="ViT-B-32", pretrained="openai").model_arguments() == {
        "name": "ViT-B-32",
        "pretrained": "openai",
        "random_weights": False,
    }


@pytest.mark.parametrize("key", ["pretrained", "checkpoint"])
def test_a_file_of_weights_that_changed_is_another_model(tmp_path: Path, key: str) -> None:
    (tmp_path / "base").mkdir()
    file = tmp_path / "base" / "w.pt"
    marks = []
    for content in (b"one", b"two"):
        file.write_bytes(content)
        marks.append(context_of(tmp_path, name="mini-clip", **{key: "w.pt"}).model_fingerprint())
    assert marks[0] != marks[1]


def test_the_weights_of_a_folder_that_a_study_has_as_name_are_part_of_a_model(
    tmp_path: Path,
) -> None:
    marks = []
    for content in (b"one", b"two"):
        (tmp_path / "open_clip_config.json").write_text("{}")
        (tmp_path / "open_clip_model.safetensors").write_bytes(content)
        marks.append(context_of(tmp_path, name=str(tmp_path)).model_fingerprint())
    assert marks[0] != marks[1]


@pytest.mark.parametrize("name", ["RN50", "mini-clip"])
def test_a_run_in_a_folder_called_as_its_model_is_not_taken_for_that(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Run(Path(name))
    (tmp_path / name).mkdir()
    found = study_of(
        name, ["digits"], {}, adapter=None, method=None, seed=0, extraction=ExtractPart(items=0)
    )
    assert found.models[0].name == name
    record = {"split": "test", "text": "captions", "present_only": False, "asked": 2}
    given = {"model": {"name": name}, "datasets": ["digits"]}
    run.record(given=given, datasets={"digits": record}, extract={}, seed=0)
    assert recorded_context(run).model_arguments()["name"] == name


def test_a_run_of_images_alone_is_of_a_study_without_templates(tmp_path: Path) -> None:
    record = {"split": "test", "text": "prompts", "present_only": False, "asked": 2}
    record["template"] = "a photo of a {}."
    given = {"model": {"name": "mini-clip"}, "datasets": ["digits"]}
    run = Run(tmp_path)
    run.record(given=given, datasets={"digits": record}, extract={"tower": "vision"}, seed=0)
    assert recorded_context(run).study.extract.tower == "vision"


@pytest.mark.parametrize("name", ["snap", "mini-clip"])
def test_the_weights_of_a_folder_are_part_of_a_model(tmp_path: Path, name: str) -> None:
    """Also of one that is called as a model that ships."""
    folder = tmp_path / "base" / name
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds no weights"):
        context_of(tmp_path, path=name).model_fingerprint()
    marks = []
    for content in (b"one", b"two"):
        (folder / "open_clip_pytorch_model.bin").write_bytes(content)
        marks.append(context_of(tmp_path, path=name).model_fingerprint())
    assert marks[0] != marks[1]


@pytest.mark.parametrize(
    "name", ["config.json", "merges.txt", "merges.txt.gz", "spiece.model", "words/tokenizer.json"]
)
def test_the_vocabulary_of_a_folder_is_part_of_a_model(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "base" / "snap"
    (folder / "words").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "tokenizer.json").write_bytes(b"another of its name")
    marks = []
    for content in (b"one", b"two", b"two"):
        (folder / name).write_bytes(content)
        marks.append(context_of(tmp_path, path="snap").model_fingerprint())
    assert marks[0] != marks[1] == marks[2]


def test_a_file_that_is_not_there_is_said_before_the_first_stage(tmp_path: Path) -> None:
    for name in ("nowhere.pt", "some/where"):
        context = context_of(tmp_path, name="mini-clip", pretrained=name)
        with pytest.raises(UserError, match=f"checkpoint {name} does not exist .looked for /"):
            check_before([context], ["extract"])


def vlmlayers(*words: str) -> tuple[int, str]:
    code = (
        "import sys; from vlmlayers.cli import main\n"
        "try: main()\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    return done.returncode, done.stderr


def test_wrong_weights_are_one_line_without_torch(tmp_path: Path) -> None:
    out = ("digits", "--out", str(tmp_path / "run"))
    for words, expected in (
        (
            ("--pretrained", "nowhere.pt"),
            f"checkpoint nowhere.pt does not exist (looked for {Path('nowhere.pt').absolute()}); "
            "mini-clip has no tags, its weights are named by a file",
        ),
        (("--mean", "grey"), "extract: 'mean': 'grey' is not three numbers such as 0.5,0.5,0.5"),
    ):
        code, errors = vlmlayers("extract", "mini-clip", *out, *words)
        assert (code, errors.splitlines()) == (2, [f"Error: {expected}", "False"])


def test_the_options_of_weights_reach_the_features(tmp_path: Path) -> None:
    options = ("--image-size", "96,64", "--mean", "0.5", "--interpolation", "bilinear")
    words = ("digits", "--split", "val", "--items", "4", "--quiet", "--out", str(tmp_path / "run"))
    code, errors = vlmlayers("extract", "mini-clip", *words, *options)
    assert code == 0, errors
    assert "positional_embedding resized" in errors
    store = json.loads((tmp_path / "run" / "features" / "digits-val" / "store.json").read_text())
    made = json.dumps(store)
    assert '"mean": [0.5, 0.5, 0.5]' in made and '"size": [96, 64]' in made and "bilinear" in made
