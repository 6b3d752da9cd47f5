"""Models of transformers are trained on and tested as their own code answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from vlmadapters.data.images import Images
from vlmadapters.data.task import TaskData
from vlmadapters.protocols.train import train
from vlmadapters.recipes import load_recipe
from vlmlayers import cli
from vlmlayers.errors import UserError
from vlmlayers.manifests import Manifest
from vlmlayers.models import load_model, wrap_model
from vlmlayers.prompts import class_prompts

transformers = pytest.importorskip("transformers", reason="needs the extra 'hf'")
made = pytest.importorskip("transformers_models", reason="needs the extra 'hf'")


def test_a_folder_of_transformers_is_trained_and_its_zero_shot_is_transformers(
    tmp_path: Path,
) -> None:
    folder, out = made.clip_folder(tmp_path / "my_clip"), tmp_path / "run"
    words = f"train {folder} signs --method mma,coop --placement mma:1-2 --out {out} --seeds 1"
    settings = "--items 20 --set shots=1 --set epochs=2 --set scale=1 --set template=a{}"
    done = CliRunner().invoke(cli.app, [*words.split(), *settings.split()])
    assert done.exit_code == 0, done.output
    assert "Loading" not in done.output  # transformers' bar, which it draws into log files too
    table = pd.read_csv(out / "results.csv")
    assert set(table["method"]) >= {"zero-shot CLIP", "MMA", "CoOp"}
    row = table[(table["method"] == "zero-shot CLIP") & (table["split_kind"] == "base")].iloc[0]

    task = TaskData("signs", load_model(folder), limit=20)
    items, names = task.test("base"), task.task("base", "a{}").class_names
    clip = transformers.CLIPModel.from_pretrained(folder)
    pixels = transformers.CLIPImageProcessor.from_pretrained(folder)(
        images=[task.manifest.open_image(item, size=32) for item in items], return_tensors="pt"
    )
    tokens = transformers.CLIPTokenizer.from_pretrained(folder)(
        class_prompts(names, "a{}"), padding="max_length", max_length=77, return_tensors="pt"
    )
    with torch.no_grad():
        logits = clip(**pixels, input_ids=tokens["input_ids"]).logits_per_image
    truth = torch.tensor([item.label for item in items])
    found = logits.log_softmax(-1)[torch.arange(len(truth)), truth].mean()
    assert float(found) == pytest.approx(row["log_likelihood"], abs=2e-3)
    assert float((logits.argmax(-1) == truth).float().mean()) == pytest.approx(row["accuracy"])


@pytest.mark.parametrize("verb", ["train", "evaluate", "validate", "search"])
def test_a_model_without_texts_is_refused_in_one_line(verb: str, tmp_path: Path) -> None:
    folder = tmp_path / "my_vit"
    folder.mkdir()
    vit = timm.create_model("test_vit", pretrained=False)
    save_file(vit.state_dict(), folder / "model.safetensors")
    config = {"architecture": "test_vit", "num_classes": 1000, "pretrained_cfg": {}}
    (folder / "config.json").write_text(json.dumps(config))
    placed = ["--placement", "1-2"] if verb == "validate" else []
    done = CliRunner().invoke(cli.app, [verb, str(folder), "signs", "--out", "run", *placed])
    assert isinstance(done.exception, UserError), done.exception
    assert "has no text tower" in str(done.exception)


def test_a_model_of_patches_is_refused_in_one_line(tmp_path: Path) -> None:
    model = wrap_model(made.build("Siglip2"), preprocess=np.asarray, random_weights=True)
    with pytest.raises(UserError, match="takes patches, not images of one size"):
        Images(model, Manifest.load("signs"))
    recipe = load_recipe("mini", depths={"vision": 2, "text": 2})
    with pytest.raises(UserError, match="takes patches, not images of one size"):
        train(model, ["signs"], recipe, tmp_path, seeds=1, items=20, progress=False)
