"""Curves measured again on adapted features: the same as the attached adapter, never mixed up."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbones import backbone, colour_folder, saved_backbone
from PIL import Image
from typer.testing import CliRunner

from vlmadapters.cli.attached import attach_for_good
from vlmadapters.files import load_method, save_method
from vlmadapters.methods.mma.config import MMAConfig
from vlmadapters.methods.mma.module import new_adapter
from vlmadapters.protocols.experiment import Experiment
from vlmadapters.training.recipes import Recipe, TrainConfig
from vlmlayers.cli import app
from vlmlayers.errors import UserError
from vlmlayers.manifests import Manifest
from vlmlayers.models import extract, load_model
from vlmlayers.scores import read_scores

RECIPE = Recipe(
    "tiny",
    TrainConfig(lr=0.5, epochs=2, batch_size=4, shots=3),
    MMAConfig.span(2, 3, dim=4, scale=0.5),
)


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colour_folder(tmp_path_factory.mktemp("data") / "colours", train=6, test=2)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model on disk; nothing trained it, but it has weights that are its own."""
    return saved_backbone(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def adapter(colours: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that was really trained, as `vlmlayers train` leaves it."""
    out = tmp_path_factory.mktemp("trained")
    sweep = Experiment(
        "base-to-novel", load_model(str(model_folder)), RECIPE, out, save_adapters=True,
        progress=False,
    )  # fmt: skip
    sweep.run([Manifest.load(colours)], seeds=[1])
    return next((out / "adapters").glob("*.safetensors"))


def test_features_are_those_of_the_attached_adapter(
    colours: Path, model_folder: Path, adapter: Path, tmp_path: Path
) -> None:
    manifest = Manifest.load(colours)
    plain = load_model(str(model_folder))
    before = extract(plain, manifest, "train", progress=False)
    model = attach_for_good(load_model(str(model_folder)), adapter)
    after = extract(model, manifest, "train", out=tmp_path / "store", progress=False)
    images = torch.stack([
        plain.preprocess(Image.open(manifest.location(i)).convert("RGB"))
        for i in manifest.items("train")
    ])  # fmt: skip
    with load_method(adapter, plain).attached(plain.clip), torch.no_grad():
        expected = plain.clip.encode_image(images).numpy()  # type: ignore[operator]
    assert np.allclose(after.vision.array("proj"), expected, atol=1e-5)
    for tower in (before.vision, before.text):
        other = after.vision if tower is before.vision else after.text
        for position in ("embed", "1"):
            assert np.array_equal(tower.array(position), other.array(position))
        for position in ("2", "3", "proj"):
            assert np.abs(tower.array(position) - other.array(position)).max() > 1e-3


@pytest.mark.parametrize("split", ["train", "test"])
def test_features_of_what_an_adapter_was_trained_on_are_announced(
    split: str, colours: Path, model_folder: Path, adapter: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = attach_for_good(load_model(str(model_folder)), adapter)
    extract(model, Manifest.load(colours), split, progress=False)
    assert ("was trained on images of colours" in caplog.text) == (split == "train")


def test_an_adapted_model_is_another_model(
    colours: Path, model_folder: Path, adapter: Path, tmp_path: Path
) -> None:
    plain = load_model(str(model_folder))
    model = attach_for_good(load_model(str(model_folder)), adapter)
    assert model.weights_hash != plain.weights_hash
    assert model.weights == f"{plain.weights} + MMA v2-3,t2-3 (colours, seed 1)"
    extract(plain, Manifest.load(colours), "test", out=tmp_path / "store", progress=False)
    with pytest.raises(UserError, match="belongs to another extraction"):
        extract(model, Manifest.load(colours), "test", out=tmp_path / "store", progress=False)
    with pytest.raises(UserError, match="a method is attached to this backbone"):
        attach_for_good(model, save_method(tmp_path / "again", new(model), model))
    with pytest.raises(UserError, match="adapter .* does not exist"):
        attach_for_good(plain, tmp_path / "absent.safetensors")
    with pytest.raises(UserError, match="was trained on"):
        attach_for_good(backbone("depths differ"), adapter)


def new(model: Any) -> Any:
    return new_adapter(model.clip, RECIPE.method)


def test_an_adapter_in_the_authors_layout(
    model_folder: Path, adapter: Path, tmp_path: Path
) -> None:
    plain = load_model(str(model_folder))
    state = load_method(adapter, plain).official_state_dict()
    torch.save({"state_dict": state}, tmp_path / "model.pth.tar")
    model = attach_for_good(load_model(str(model_folder)), tmp_path / "model.pth.tar")
    assert model.weights.endswith("+ MMA v2-3,t2-3")


STUDY = """
title = "Before and after"
datasets = ["{data}"]
models = [
    {{ path = "{model}", label = "before" }},
    {{ path = "{model}", adapter = "{adapter}", label = "after" }},
]
[extract]
items = 20
[score]
metrics = ["class_accuracy_ncm", "cka_debiased", "centroid_gap", "fisher_ratio"]
options = {{ bootstrap = 20 }}
[select]
rule = "paper"
[report]
formats = ["svg"]
[validate]
seeds = [1]
kinds = ["all"]
shots = 2
set = {{ epochs = 1, batch_size = 4, dim = 4, scale = 0.5 }}
"""


def test_a_study_compares_before_and_after(
    colours: Path, model_folder: Path, adapter: Path, tmp_path: Path
) -> None:
    file = tmp_path / "study.toml"
    file.write_text(STUDY.format(data=colours, model=model_folder, adapter=adapter))
    words = ["study", str(file), "--out", str(tmp_path / "out"), "--quiet"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    runs = {name: tmp_path / "out" / name for name in ("before", "after")}
    assert (runs["before"] / "validation.csv").exists()
    assert not (runs["after"] / "validation.csv").exists()
    record = json.loads((runs["after"] / "provenance.json").read_text())["model"]
    assert len(record["adapter_hash"]) == 64
    text = (tmp_path / "out" / "report.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S).group(1))  # type: ignore[union-attr]
    assert [run["name"] for run in data["runs"]] == ["before", "after"]
    assert "+ MMA v2-3,t2-3 (colours, seed 1)" in text
    curves = {}
    for name, folder in runs.items():
        rows = read_scores(folder)
        rows = rows[(rows["metric"] == "fisher_ratio") & (rows["tower"] == "vision")]
        curves[name] = rows.set_index("position")["value"]
    assert curves["before"]["1"] == curves["after"]["1"]
    assert curves["before"]["3"] != curves["after"]["3"]
    again = CliRunner().invoke(app, words[:-1], catch_exceptions=False)
    assert again.output.count("unchanged") == 9


def test_the_verb_extract_takes_an_adapter(
    colours: Path, model_folder: Path, adapter: Path, tmp_path: Path
) -> None:
    words = ["extract", str(model_folder), str(colours), "--out", str(tmp_path), "--quiet"]
    done = CliRunner().invoke(app, [*words, "--adapter", str(adapter)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "provenance.json").read_text())["model"]
    assert "+ MMA v2-3,t2-3" in record["weights"]
    with pytest.raises(UserError, match=r"adapter \S*nothing does not exist$"):
        CliRunner().invoke(app, [*words, "--adapter", "nothing"], catch_exceptions=False)
    # What is there is not said to be missing.
    for option in ("--adapter", "--pretrained"):
        with pytest.raises(UserError, match="is a folder; name a file in it"):
            CliRunner().invoke(app, [*words, option, str(adapter.parent)], catch_exceptions=False)
