"""Metrics that run the model again: on the model and the images that the run was extracted from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from run_folders import tiny_clip

import vlmlayers as vl
from vlmlayers.errors import UserError
from vlmlayers.runs import Run
from vlmlayers.study import check_study, run_study
from vlmlayers.study.verbs import score_run

QUICK = {"seeds": [1], "bootstrap": 20}
MODEL = ["skip_joint_change"]


def write_images(folder: Path, red: int = 0) -> Path:
    """Write two classes of three images."""
    for number in range(6):
        file = folder / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (red, 40 * number, 0)).save(file)
    return folder


def extracted(folder: Path, data: str = "digits", base: Path | str = ".", **model: object) -> Run:
    """Extract features of a tiny model, untrained where no weights are named."""
    weights = model or {"random_weights": True}
    part = {"path": str(folder / "tiny-clip"), **weights}
    if not (folder / "tiny-clip").exists():
        tiny_clip(folder / "tiny-clip")
    study = check_study(
        {"models": [part], "datasets": [data], "extract": {"items": 6, "device": "cpu"}}
    )
    return run_study(study, folder / "run", base=base, only=["extract"], progress=False)[0]


def test_weights_that_were_overwritten_since_are_not_scored_beside_the_earlier(
    tmp_path: Path,
) -> None:
    folder, file = tiny_clip(tmp_path / "tiny-clip"), tmp_path / "e.pt"
    weights = vl.load_model(str(folder), random_weights=True).clip.state_dict()
    torch.save(weights, file)
    run = extracted(tmp_path, pretrained=str(file))
    torch.save({key: 1.5 * value for key, value in weights.items()}, file)
    with pytest.raises(UserError, match="another model .*: weights_hash is .*extract again with"):
        score_run(run.folder, ["effective_rank", *MODEL], QUICK, progress=False)
    assert not run.scores.exists()
    torch.save(weights, file)
    notes = run.read_provenance()["model"]
    run.record(model=notes | {"structure": notes["structure"] | {"eps": ["2"]}})
    with pytest.raises(UserError, match=r"structure.eps is \['2'\] there, absent here"):
        score_run(run.folder, MODEL, QUICK, progress=False)
    # As an earlier version recorded it.
    run.record(model={key: value for key, value in notes.items() if key != "structure"})
    score_run(run.folder, MODEL, QUICK, progress=False)
    assert run.scores.exists()


def test_images_of_another_folder_of_the_same_name_are_not_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, red in (("one", 0), ("other", 255)):
        write_images(tmp_path / name / "pics", red)
    monkeypatch.chdir(tmp_path / "one")
    run = extracted(tmp_path, "pics")
    monkeypatch.chdir(tmp_path / "other")
    with pytest.raises(UserError, match=r"images of pics .*other/pics: 4 .* 4 altered.*--force"):
        score_run(run.folder, MODEL, QUICK, progress=False)
    assert not run.scores.exists()
