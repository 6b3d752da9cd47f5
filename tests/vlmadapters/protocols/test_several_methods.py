"""Several methods by one command: who gets which placement, and what they share."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from backbones import shared_backbone
from typer.testing import CliRunner

import vlmadapters as va
from vlmadapters.cli.inputs import read_placements, read_recipes
from vlmadapters.cli.train_stage import parts
from vlmadapters.methods import METHODS
from vlmadapters.protocols.results import UNMOVED, ZERO_SHOT_CLIP, summarise
from vlmadapters.training.recipes import Recipe, TrainConfig
from vlmlayers.errors import UserError
from vlmlayers.manifests import Item, Manifest
from vlmlayers.selection import LayerChoice

NAMES = ["mma", "coop", "maple"]
CHOICE = LayerChoice((2, 3), (3,), "explicit")


def placed(*placements: str) -> list[str]:
    recipes = read_placements(read_recipes("published", {}, NAMES), placements, CHOICE)
    return [f"{one.method.name} {one.method.placement}" for one in recipes]


def test_a_placement_is_for_every_method_or_for_the_one_it_names() -> None:
    assert placed() == ["mma v5-12,t5-12", "coop v-,t1", "maple v1-9,t1-9"]
    assert placed("mma:9-12", "mma:5-12", "coop:t2") == [
        "mma v9-12,t9-12", "mma v5-12,t5-12", "coop v-,t2", "maple v1-9,t1-9",
    ]  # fmt: skip
    assert placed("2-3", "coop:t1") == ["mma v2-3,t2-3", "coop v-,t1", "maple v2-3,t2-3"]
    assert placed("choice") == ["mma v2-3,t3", "coop v-,t3", "maple v2-3,t3"]
    assert placed("maple:choice")[-1] == "maple v2-3,t3"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "mma,cop"], "unknown method 'cop'; did you mean 'coop'?"),
        (["--method", "mma,mma"], "the method mma is named 2 times"),
        (["--method", "zero-shot", "--placement", "5"], "zero-shot has no placement"),
        (["--method", "mma,coop", "--placement", "v5,t5"], "coop acts at no vision block; .*mma:5"),
        (["--method", "mma", "--placement", "coop:t1"], "is for coop, and mma is trained"),
        (["--method", "mma,coop", "--set", "leng=4"], "unknown key 'leng' in --set"),
        (["evaluate", "mini-clip", "faces", "--precision", "fp9"], "unknown precision 'fp9'"),
    ],
)
def test_mistakes_are_one_line_before_torch(words: list[str], message: str, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom vlmlayers.cli import app\nfrom vlmlayers.errors import UserError\n"
        "from typer.testing import CliRunner\n"
        "done = CliRunner().invoke(app, sys.argv[1:])\n"
        "assert isinstance(done.exception, UserError), done.exception\n"
        "assert 'torch' not in sys.modules\nprint(done.exception)"
    )
    training = ["train", "mini-clip", "faces", "--out", str(tmp_path / "o")]
    command = words if words[0] == "evaluate" else [*training, *words]
    done = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert pd.Series([done.stdout]).str.contains(message).all(), done.stdout
    assert len(done.stdout.splitlines()) == 1


def test_tables_of_a_study_are_held_to_the_same() -> None:
    part = {"method": NAMES, "placements": ["mma:9-12", "maple:choice"], "set": {"scale": 0.1}}
    assert parts([part])[0].methods == tuple(NAMES)
    with pytest.raises(UserError, match="zero-shot has no placement"):
        parts([{"method": ["mma", "zero-shot"], "placements": ["9-12"]}])
    with pytest.raises(UserError, match="unknown key 'scal'.*did you mean 'scale'"):
        parts([{"method": NAMES, "set": {"scal": 0.1}}])


def test_a_sweep_gives_each_method_what_it_has_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlmadapters.cli import train as verbs
    from vlmlayers.cli import app

    monkeypatch.setattr(verbs, "load_backbone", lambda *_: shared_backbone())
    words = [
        "train",
        "ViT-B-16",
        "--random-weights",
        "shapes_filled",
        "--seeds",
        "1",
        "--items",
        "32",
        "--quiet",
    ]
    words += ["--out", str(tmp_path), "--method", ",".join(NAMES)]
    words += ["--placement", "mma:2-3", "--placement", "maple:1-2"]
    small = {"epochs": 2, "shots": 2, "lr": 0.05, "warmup_epochs": 0}
    words += [part for key, value in small.items() for part in ("--set", f"{key}={value}")]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "one training" in done.output and "seconds compare no methods" in done.output
    assert " (harmonic mean" in done.output
    assert max(map(len, done.output.splitlines()[:-1])) <= 80
    table = pd.read_csv(tmp_path / "results.csv", keep_default_na=False)
    assert (table.method == ZERO_SHOT_CLIP).sum() == 2, "zero-shot once, for all methods"
    trained = table[table.seed == 1]
    assert dict(zip(trained.method, trained.placement)) == {
        "MMA": "v2-3,t2-3", "CoOp": "v-,t1", "MaPLe": "v1-2,t1-2",
    }  # fmt: skip
    assert (trained.parameters > 0).all() and (trained.seconds > 0).all()
    assert trained[trained.method == "MMA"].settings.str.startswith("dim=32").all()
    summary = summarise(table).set_index(["method", "metric"])
    coop = trained[trained.method == "CoOp"]
    assert summary.parameters["CoOp", "hm"] == coop.parameters.iloc[0]
    assert summary.seconds["CoOp", "hm"] == pytest.approx(coop.seconds.mean())

    recipe = va.load_recipe("published", "coop").changed(small, {})
    alone = va.train(
        shared_backbone(), "shapes_filled", [recipe], seeds=1, items=32, progress=False
    )
    ours = alone[alone.method == "CoOp"].accuracy.tolist()
    assert ours == pytest.approx(coop.accuracy.tolist())


def test_recipes_from_python_are_values_or_one_name() -> None:
    with pytest.raises(UserError, match="one name of a recipe, or recipes as `load_recipe`"):
        va.train(shared_backbone(), "shapes_filled", ["mini", "published"])
    twice = [va.load_recipe("published", "coop")] * 2
    with pytest.raises(UserError, match="two of one method"):
        va.train(shared_backbone(), "shapes_filled", twice)


def test_zero_shot_clip_of_other_words_than_a_methods_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "vlmadapters")
    first, second = (va.load_recipe("mini", name).at("t2") for name in ("mma", "coop"))
    first, second = (one.changed({"epochs": 2, "shots": 1}) for one in (first, second))
    faces = {"seeds": 1, "items": 8, "progress": False}
    va.train(shared_backbone(), "faces", [first, second], **faces)
    assert "recipes differ" not in caplog.text
    other = second.replaced({"template": "{}!", "precision": "bf16"}, {})
    va.train(shared_backbone(), "faces", [first, other], **faces)
    said = "differ in template (coop on faces: '{}!'); zero-shot CLIP has that of the first, "
    assert f"{said}'a photo of a {{}}.'" in caplog.text
    assert (
        "differ in precision (coop on faces: 'bf16'); all are tested in that of the first, 'fp32'"
        in caplog.text
    )
    caplog.clear()
    # Also what is given beside the recipes, and one that differs on a single dataset.
    va.train(shared_backbone(), "faces", first, configs=[first.replaced({"template": "{}!"}, {})],
             **faces)  # fmt: skip
    own = replace(first, datasets={"flags": {"template": "{}?"}})
    va.train(shared_backbone(), ["faces", "flags"], own, **faces)
    told = [one for one in caplog.messages if "recipes differ" in one]
    assert ["(mma on faces: '{}!')" in told[0], "(mma on flags: '{}?')" in told[1]] == [True, True]
    assert len(told) == 2


@pytest.mark.parametrize("method", ["mma", "coop"])
def test_other_words_than_those_of_zero_shot_clip_are_no_change_by_training(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A recipe's template for one dataset passed for what training had changed there."""
    scale = {"scale": 1e-9} if method == "mma" else {}
    still = va.load_recipe("mini", method).at("t2")
    still = still.changed({"shots": 1, "lr": 1e-12, "epochs": 2}, scale)
    other = replace(still, datasets={"faces": {"template": "noise, an ugly {} of many"}})
    found = va.train(shared_backbone(), "faces", other, seeds=1, items=40, progress=False)
    trained = found[found.seed == 1]
    assert set(trained.note) == {UNMOVED} and set(trained.changed) == {0.0}
    assert set(trained.template) == {"noise, an ugly {} of many"}
    plain = found[found.method == ZERO_SHOT_CLIP]
    # MMA's prompts are in other words, whose answers differ; CoOp's start from its own.
    same = plain.log_likelihood.tolist() == pytest.approx(trained.log_likelihood.tolist(), abs=1e-6)
    assert same == (method == "coop")


def test_classes_that_one_dataset_of_several_cannot_hold_out_are_refused_before_the_first(
    tmp_path: Path,
) -> None:
    """The setting of a dataset was looked at in its turn, after the others had trained."""
    coop = va.load_recipe("mini", "coop").at("t2").changed({"shots": 1, "epochs": 2})
    own = replace(coop, datasets={"flags": {"settings": {"class_specific": True}}})
    with pytest.raises(UserError, match="learns something of each class and cannot be tested"):
        va.train(shared_backbone(), ["faces", "flags"], own, tmp_path, seeds=1, items=8,
                 progress=False)  # fmt: skip
    assert not (tmp_path / "cells").exists()


@pytest.mark.parametrize(
    ("method", "settings", "line"),
    [
        ("rpo", {"pairs": 70}, "70 text prompts stand; use 6. pairs at most"),
        ("coop", {"words": "", "length": 73}, "77 at most; use 7. context words at most"),
        ("lweib", {"descriptions": "texts.json"}, "8 classes have no description: "),
    ],
)
def test_classes_that_a_method_cannot_take_are_refused_before_an_image_is_seen(
    method: str,
    settings: dict[str, Any],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.json").write_text('{"a class of another dataset": ["Red."]}')
    seen: list[Item] = []
    monkeypatch.setattr(Manifest, "open_image", lambda *arguments, **_: seen.append(arguments[1]))
    config = METHODS.config(method).published({"vision": 3, "text": 3}, **settings)
    recipe = Recipe("test", TrainConfig(shots=2), config)
    with pytest.raises(UserError, match=line):
        va.train(shared_backbone(), "shapes_filled", [recipe], seeds=(1,), progress=False)
    assert not seen
