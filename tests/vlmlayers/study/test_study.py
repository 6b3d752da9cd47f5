"""Studies: schema messages, stages that run once, and resuming after a kill."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from run_folders import tiny_clip
from typer.testing import CliRunner

from vlmlayers.cli import app
from vlmlayers.errors import UserError
from vlmlayers.features.writer import StoreWriter, take_lock
from vlmlayers.files import read_json, write_json
from vlmlayers.manifests import Manifest
from vlmlayers.models.devices import resolve_device
from vlmlayers.report import write_report
from vlmlayers.runs import Run, fingerprint, writing_alone
from vlmlayers.scores import read_scores
from vlmlayers.selection import LayerChoice
from vlmlayers.study import STAGES, check_study, read_study, run_study
from vlmlayers.study.context import StageContext
from vlmlayers.study.demo import demo_source, demo_study, position_table
from vlmlayers.study.runner import pick_stages
from vlmlayers.study.scoring import recorded_context
from vlmlayers.study.stages import file_marks
from vlmlayers.study.streams import stream_study
from vlmlayers.study.verbs import score_run, select_run
from vlmlayers.words import UNTRAINED

BASE: dict[str, Any] = {
    "models": [{"name": "mini-clip"}],
    "datasets": ["digits", "shapes_filled"],
}
STUDIES = Path(__file__).parents[3] / "data_manifests" / "studies"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": []}, "did you mean 'models'"),
        ({"extract": {"itmes": 3}}, "did you mean 'items'"),
        ({"models": [{"name": "a", "pretraned": "x"}]}, "did you mean 'pretrained'"),
        ({"datasets": [{"name": "a", "splt": "train"}]}, "did you mean 'split'"),
        ({"models": []}, "at least 1"),
        ({"models": [{}]}, "either 'name' or 'path'"),
        ({"models": [{"name": "a"}, {"name": "a"}]}, "named twice; give each a label"),
        ({"datasets": ["digits", "digits"]}, "named twice"),
        ({"extract": {"template": "photo"}}, "exactly once"),
        ({"datasets": [{"name": "digits", "template": "photo"}]}, "exactly once"),
        (
            {"datasets": [{"name": "digits", "text": "captions", "template": "a {}"}]},
            "template of dataset 'digits' makes prompts of class names; text = 'captions'",
        ),
        (
            {"extract": {"text": "captions", "template": "a {}"}},
            r"template of \[extract\] makes prompts of class names",
        ),
        ({"extract": {"tower": "vision", "template": "a {}"}}, "template makes prompts; tower"),
        ({"extract": {"precision": "fp8"}}, "fp32"),
        ({"score": {"metrics": ["dataset_acuracy"]}}, "did you mean 'dataset_accuracy'"),
        ({"score": {"options": {"bootstraps": 3}}}, "did you mean 'bootstrap'"),
        (
            {"score": {"metrics": ["cka_debiased"], "options": {"shots": 3}}},
            "shots is an option of .*, none of which is scored",
        ),
        (
            {"models": [{"name": "a", "adapter": "b.safetensors"}], "validate": {}},
            r"the table \[validate\] is for backbones, and every model has an adapter",
        ),
        (
            {"models": [{"name": "a", "adapter": "b.safetensors"}], "train": [{}]},
            r"the table \[train\] is for backbones, and every model has an adapter",
        ),
        ({"select": {"rule": "treshold"}}, "did you mean 'threshold'"),
        ({"select": {"options": {"acuracy": 1}}}, "did you mean 'accuracy'"),
        (
            {"select": {"rule": "paper", "resamples": 20}},
            "rule 'paper' reads no score; leave resamples out",
        ),
        ({"select": {"rule": "own.py:rule", "resamples": 1}}, "resamples is 1; at least 2"),
        ({"search": {}, "select": {"resamples": 20}}, "rule 'search' reads no score"),
        ({"report": {"formats": ["gif"]}}, "svg"),
    ],
)
def test_schema_messages(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check_study({**BASE, **change}, "s.toml")
    assert "s.toml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_with_an_adapter_is_measured_and_not_trained(tmp_path: Path) -> None:
    models = [{"name": "a"}, {"name": "a", "adapter": "b.safetensors"}]
    tables: dict[str, Any] = {"search": {}, "train": [{}], "validate": {}}
    study = check_study({**BASE, "models": models, **tables}, "s.toml")
    for part, trained in zip(study.models, (True, False)):
        context = StageContext(Run(tmp_path), study, part, tmp_path)
        assert {STAGES[name].wanted(context) for name in tables} == {trained}


def test_study_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_study(tmp_path / "absent.toml")
    file = tmp_path / "s.toml"
    file.write_text("models = [")
    with pytest.raises(UserError, match="is not valid TOML"):
        read_study(file)


def test_shipped_studies_are_known_by_name() -> None:
    assert read_study("small_demo") == read_study(STUDIES / "small_demo.toml")
    with pytest.raises(UserError, match="did you mean 'small_demo'"):
        read_study("smal_demo")
    with pytest.raises(UserError, match="ship with the package .* small_demo"):
        read_study("lost.toml")


def test_a_misspelt_key_is_named_before_what_it_leaves_missing() -> None:
    with pytest.raises(UserError, match="unknown key 'modles'; did you mean 'models'"):
        check_study({"modles": [{"name": "mini-clip"}], "datasets": ["digits"]})


def test_missing_images_are_told_before_any_dataset_is_encoded(tmp_path: Path) -> None:
    """The second dataset lacks its images; the first must not be encoded only to find that out."""
    (tmp_path / "list.csv").write_text("path,label,class_name,split\nlost/1.png,0,cat,train\n")
    (tmp_path / "lost.toml").write_text(
        'title = "Lost"\nfolder = "."\nlayout = "table"\nsplit_file = "list.csv"\n'
    )
    extract: dict[str, Any] = {"split": "train", "items": 8}
    study = check_study({**BASE, "datasets": ["digits", "lost.toml"], "extract": extract})
    with pytest.raises(UserError, match="lost: 1 of 1 images are not in"):
        run_study(study, tmp_path / "out", base=tmp_path)
    assert not (tmp_path / "out" / "features").exists()
    # The text tower alone needs no image.
    extract["tower"] = "text"
    texts = check_study({**BASE, "datasets": ["lost.toml"], "extract": extract})
    run_study(texts, tmp_path / "texts", base=tmp_path, only=["extract"], progress=False)
    assert [*(tmp_path / "texts/features").iterdir()]


@pytest.mark.parametrize("file", sorted(STUDIES.glob("*.toml")), ids=lambda p: p.stem)
def test_committed_studies_are_valid(file: Path) -> None:
    from vlmlayers.manifests import Manifest

    study = read_study(file)
    for dataset in study.datasets:
        assert dataset.name in Manifest.names(), dataset.name


@pytest.mark.parametrize("random_weights", [False, True])
def test_the_demo_leaves_a_study_file_that_runs_it_again(random_weights: bool) -> None:
    content = tomllib.loads(demo_source(random_weights))
    study = check_study(content)
    assert study == demo_study(random_weights) and study.datasets
    assert study.models[0].random_weights is random_weights
    assert "# half of the classes" in demo_source()  # the comments stay


def test_models_are_looked_up_beside_the_study_then_under_the_data_root(tmp_path: Path) -> None:
    from vlmlayers.study import StageContext

    study = check_study({**BASE, "models": [{"path": "w"}]})
    (tmp_path / "data" / "w").mkdir(parents=True)
    context = StageContext(
        Run(tmp_path / "out"), study, study.models[0], tmp_path / "base", tmp_path / "data"
    )
    assert context.model_arguments()["name"] == str(tmp_path / "data" / "w")
    (tmp_path / "base" / "w").mkdir(parents=True)
    assert context.model_arguments()["name"] == str(tmp_path / "base" / "w")
    shutil.rmtree(tmp_path / "base")
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(UserError, match="model folder w does not exist"):
        context.model_arguments()


def test_a_dataset_without_classes_is_refused_before_others_are_extracted(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (32, 32)).save(tmp_path / "0.png")
    (tmp_path / "c.tsv").write_text("0.png\ta dot\n")
    (tmp_path / "set.toml").write_text(
        'title = "Mine"\nfolder = "."\nlayout = "captions"\nsplit_file = "c.tsv"\nclasses = 0\n'
    )
    study = check_study({**BASE, "datasets": ["digits", "set.toml"], "extract": {"items": 20}})
    with pytest.raises(UserError, match="set has no classes to make prompts of; use text="):
        run_study(study, tmp_path / "run", base=tmp_path, only=["extract"], progress=False)
    assert not (tmp_path / "run" / "features").exists()


def test_image_folders_are_looked_up_like_models(tmp_path: Path) -> None:
    """A bare name is a folder where no dataset is called so: the README names `my_images`."""
    from PIL import Image

    from vlmlayers.study import StageContext

    def draw(folder: Path, count: int) -> None:
        for name in (f"{kind}/{i}.png" for kind in ("cat", "dog") for i in range(count)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(folder / name)

    def count(*names: Any) -> list[int]:
        study = check_study({**BASE, "datasets": list(names), "extract": {"split": "all"}})
        context = StageContext(
            Run(tmp_path / "out"), study, study.models[0], tmp_path / "base", tmp_path / "data"
        )
        return [len(dataset.items) for dataset in context.datasets]

    draw(tmp_path / "data/mine", 3)
    draw(tmp_path / "base/digits", 3)
    assert count("mine", "digits") == [6, 300]
    every = Manifest.load("digits").items("all")
    assert count("mine", {"name": "digits", "items": 0}) == [6, len(every)]
    draw(tmp_path / "base/mine", 5)
    assert count("mine") == [10]
    with pytest.raises(UserError, match="no folder of that name is here"):
        count("mein")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": [{"name": "mini-clip"}, {"name": "ViT-B-61"}]}, "did you mean 'ViT-B-16'"),
        ({"models": [{"name": "mini-clip"}, {"path": "lost"}]}, "folder lost does not exist"),
        (
            {"models": [{"name": "local", "config": "no.json", "checkpoint": "a.safetensors"}]},
            "config no.json does not exist",
        ),
        ({"select": {"rule": "lost.py:rule"}}, "lost.py"),
        ({"score": {"metrics": ["cka_debiased"]}}, "'threshold' reads dataset_accuracy, which the"),
        ({"score": {"metrics": ["dataset_accuracy"]}}, "'threshold' reads cka_debiased, which the"),
        ({"select": {"options": {"metric": "twonn"}}}, "'threshold' reads twonn"),
        ({"select": {"rule": "knee", "options": {"metric": "twonn"}}}, "'knee' reads twonn"),
        ({"select": {"rule": "budget", "options": {"score": "metric:twonn"}}}, "reads twonn"),
        (
            {"select": {"rule": "budget", "options": {"score": "accuracy_x_novel"}}},
            "'budget' reads novel_class_accuracy",
        ),
        (
            {"select": {"rule": "budget", "options": {"score": "acuracy"}}},
            "unknown block score 'acuracy'; did you mean 'accuracy'",
        ),
        ({"datasets": ["digits"]}, "needs at least two datasets of one split, where the study has"),
        (
            {"datasets": ["digits", {"name": "shapes_filled", "split": "test"}]},
            "dataset_accuracy, which needs .* where the study has one of each of train, test; add",
        ),
        ({"datasets": ["digits"]}, r'agreement: rule = "budget", options = \{ score = "agreement"'),
        (
            {"extract": {"tower": "text"}, "select": {"rule": "budget"}},
            "reads cka_debiased, which needs both towers, where the study records the text tower",
        ),
        ({"validate": {"sedes": [1]}}, r"\[validate\]: unknown key 'sedes'; did you mean 'seeds'"),
        ({"validate": {"recipe": "publishd"}}, "publishd"),
        ({"validate": {"set": {"lrr": 1}}}, "did you mean 'lr'"),
        ({"validate": {"datasets": ["digitz"]}}, "did you mean 'digits'"),
        ({"report": {"metrics": ["twonn"]}}, r"unknown metric 'twonn' in \[report\]"),
        ({"report": {"metrics": ["centroid_gpa"]}}, "did you mean 'centroid_gap'"),
    ],
)
def test_what_fails_late_is_told_before_the_first_stage(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        run_study(check_study({**BASE, **change}), tmp_path / "run", base=tmp_path, progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"score": {"metrics": ["dataset_accuracy"]}, "extract": {"tower": "vision"}},
        {
            "score": {"metrics": ["dataset_accuracy"]},
            "select": {"options": {"agreement_metric": "none"}},
        },
        {
            "score": {"metrics": ["own.py:norm"]},
            "select": {"rule": "knee", "options": {"metric": "norm"}},
        },
        {"score": {"metrics": ["twonn"]}, "select": {"rule": "own.py:rule"}},
        {"score": {"metrics": ["twonn"]}, "select": {"rule": "paper"}},
        {"score": {"metrics": ["twonn"]}, "search": {}},
        {"datasets": ["digits"], "select": {"options": {"metric": "class_accuracy"}}},
        {"datasets": ["digits", "flags", {"name": "digits", "split": "test"}]},
    ],
    ids=str,
)
def test_a_rule_that_finds_all_it_reads_is_taken(change: dict[str, Any], tmp_path: Path) -> None:
    """Only the next thing to be checked stops this study: a table that is wrong."""
    (tmp_path / "own.py").write_text(
        "def norm(x):\n    return float((x**2).sum())\n\ndef rule(scores):\n    return [1], [1]\n"
    )
    study = check_study({**BASE, **change, "validate": {"sedes": [1]}})
    with pytest.raises(UserError, match="did you mean 'seeds'"):
        run_study(study, tmp_path / "run", base=tmp_path, progress=False)


def test_a_study_that_names_its_rule_is_refused_as_it_is_read_whatever_stage_is_meant() -> None:
    """Extraction alone may take hours, on another machine than the choice."""
    knee = {"select": {"rule": "knee", "options": {"metric": "twonn"}}}
    with pytest.raises(UserError, match=r"^s.toml: the rule 'knee' reads twonn, which the study"):
        check_study({**BASE, **knee}, "s.toml")
    check_study({**BASE, **knee, "stages": ["extract", "score"]})  # it never selects
    check_study({**BASE, **knee, "score": {"metrics": ["twonn"]}})


def test_what_is_scored_is_only_compared_where_both_stages_run(tmp_path: Path) -> None:
    study = check_study({**BASE, "score": {"metrics": ["twonn"]}, "validate": {"sedes": [1]}})
    for only in (["score", "validate"], ["select", "validate"]):
        with pytest.raises(UserError, match="did you mean 'seeds'"):
            run_study(study, tmp_path / "run", base=tmp_path, only=only, progress=False)


def test_a_changed_rule_beside_the_study_is_run_again(
    done: Run, study_file: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(done.folder, copy)
    shutil.copytree(study_file.parent, tmp_path / "base")
    text = study_file.read_text().replace('options = { metric = "dataset_accuracy_ncm" }\n', "")
    file = tmp_path / "base" / "s.toml"
    file.write_text(text.replace("resamples = 20", 'rule = "own.py:rule"\nresamples = 20'))
    for block in (1, 2):
        own = f"def rule(scores):\n    return [{block}], [{block}]\n"
        (tmp_path / "base" / "own.py").write_text(own)
        only = ["select"]
        run = run_study(read_study(file), copy, base=file.parent, only=only, progress=False)[0]
        assert read_json(run.choice)["vision"] == [block]


def test_fingerprint_sees_every_change() -> None:
    one = {"a": [1, 2], "b": {"c": None}}
    assert fingerprint(one) == fingerprint({"b": {"c": None}, "a": [1, 2]})
    assert fingerprint(one) != fingerprint({"a": [2, 1], "b": {"c": None}})


TINY = """
title = "Tiny"
models = [{ path = "tiny-clip", random_weights = true }]
datasets = [{ name = "digits", items = 32 }, "letters", "flags"]
[extract]
split = "test"
items = 40
batch_size = 8
[score]
metrics = ["dataset_accuracy_ncm", "cka_debiased", "centroid_gap", "class_accuracy_ncm",
  "skip_joint_change", "zero_shot_margin"]
options = { seeds = [1], bootstrap = 20, permutations = 2 }
[select]
options = { metric = "dataset_accuracy_ncm" }
resamples = 20
[report]
formats = ["svg"]
"""


@pytest.fixture(scope="module")
def study_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of an untrained model of unequal towers, which needs no download."""
    folder = tmp_path_factory.mktemp("study")
    tiny_clip(folder / "tiny-clip")
    path = folder / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def done(study_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("out") / "tiny"
    return run_study(
        read_study(study_file),
        out,
        base=study_file.parent,
        source=study_file.read_text(),
        progress=False,
    )[0]


def test_run_folder_holds_what_the_contract_names(done: Run) -> None:
    names = {path.name for path in done.folder.iterdir()}
    assert {
        "study.toml",
        "provenance.json",
        "features",
        "scores.parquet",
        "scores.csv",
        "choice.json",
        "figures",
        "report.html",
        "report.md",
    } <= names
    record = done.read_provenance()
    towers = record["model"]["towers"]
    assert (towers["vision"]["blocks"], towers["vision"]["width"]) == (4, 32)
    assert (towers["text"]["blocks"], towers["text"]["width"]) == (3, 16)
    assert record["model"]["random_weights"]
    for name in ("report.html", "report.md"):
        assert "RANDOM WEIGHTS" in (done.folder / name).read_text()
    assert set(record["datasets"]) == {"digits", "letters", "flags"}
    assert record["environment"]["versions"]["torch"]
    assert record["extract"]["device"] == str(resolve_device("auto"))
    took = sum(one["seconds"] for one in record["datasets"].values())
    assert 0 < took < read_json(done.folder / "stages.json")["extract"]["seconds"]
    assert all(one["manifest_hash"] for one in record["datasets"].values())


def test_metrics_of_the_model_stand_beside_those_of_features(done: Run, tmp_path: Path) -> None:
    """In a study, and by `score` alone, which finds model and data in the run's provenance."""
    scores = read_scores(done.folder)
    skipped = scores[scores["metric"] == "skip_joint_change"]
    assert skipped.groupby(["dataset", "tower"]).size().unstack().eq([3, 4]).all(axis=None)
    assert (skipped["null"] == 0).all() and (skipped["low"] <= skipped["high"]).all()
    text = (done.folder / "report.md").read_text()
    assert "rule budget by change of joint features without the block" in text
    margins = scores[scores["metric"] == "zero_shot_margin"].sort_values("value")
    assert f"{margins['dataset'].iloc[0]} {margins['value'].iloc[0]:z.3f}" in text
    copy = tmp_path / "copy"
    shutil.copytree(done.folder, copy)
    metrics = ["skip_joint_change", "class_accuracy_ncm"]
    score_run(copy, metrics, {"seeds": [1], "bootstrap": 20}, progress=False)
    again = read_scores(copy)
    assert set(again["metric"]) == set(metrics)
    alone = again[again["metric"] == "skip_joint_change"].reset_index(drop=True)
    pd.testing.assert_frame_equal(alone, skipped.reset_index(drop=True))
    (copy / "provenance.json").unlink()
    with pytest.raises(UserError, match="does not say which model and data"):
        score_run(copy, metrics, {}, progress=False)


def test_demo_table_reads_the_scores(done: Run) -> None:
    from vlmlayers.report.numbers import read_answer

    answer = read_answer(done)
    table = position_table(answer)
    assert list(table["position"]) == ["embed", "1", "2", "3", "4", "proj"]
    scores = answer.scores
    gap = scores[(scores["metric"] == "centroid_gap") & (scores["position"] == "3")]["value"].mean()
    assert table.loc[3, "gap"] == f"{gap:.2f}"
    assert {i for i, words in enumerate(table["chosen"]) if "vision" in words} == set(
        answer.choice.vision
    )


def test_each_of_several_files_of_one_name_marks_a_stage(tmp_path: Path) -> None:
    files = [tmp_path / folder / "mine.toml" for folder in ("a", "b")]
    for file in files:
        file.parent.mkdir()
        file.write_text("lr = 0.1\n")
    before = file_marks(files)
    assert file_marks(files[:1]) == {"mine.toml": before["mine.toml"]}
    for file in files:
        file.write_text("lr = 0.25\n")
        assert file_marks(files) not in (before, {})
        before = file_marks(files)


def test_unchanged_stages_do_not_run_again(done: Run, study_file: Path) -> None:
    before = read_json(done.folder / "stages.json")
    said: list[str] = []
    run_study(
        read_study(study_file),
        done.folder,
        base=study_file.parent,
        progress=False,
        echo=said.append,
    )
    assert "RANDOM WEIGHTS" in said[0]
    assert said[1:] == [f"{name:8} unchanged" for name in ("extract", "score", "select", "report")]
    assert read_json(done.folder / "stages.json") == before


def test_a_change_runs_what_depends_on_it_and_nothing_else(
    done: Run, study_file: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(done.folder, copy)
    changed = study_file.read_text().replace('options = { metric = "dataset_accuracy_ncm" }\n', "")
    changed = changed.replace("resamples = 20", 'rule = "paper"')
    file = tmp_path / "s.toml"
    file.write_text(changed)
    said: list[str] = []
    run = run_study(
        read_study(file), copy, base=study_file.parent, progress=False, echo=said.append
    )[0]
    assert said[1:3] == ["extract  unchanged", "score    unchanged"]
    assert any(line.startswith("select   vision") for line in said)
    assert read_json(run.choice)["rule"] == "paper"
    assert "Fixed by the rule" in run.report.read_text()


def test_what_a_verb_wrote_since_is_not_taken_for_the_studys_own(
    done: Run, study_file: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(done.folder, copy)
    select_run(copy, "paper", {}, 200, 0)
    said: list[str] = []
    options: dict[str, Any] = {"base": study_file.parent, "progress": False, "echo": said.append}
    run_study(read_study(study_file), copy, only=["report"], **options)
    assert read_json(copy / "choice.json")["rule"] == "paper"  # what is not picked stays
    run_study(read_study(study_file), copy, skip=["report"], **options)
    assert read_json(copy / "choice.json") == read_json(done.choice)
    assert "score    unchanged" in said and "select   unchanged" not in said


def test_a_stage_left_out_after_its_options_changed_is_told(
    done: Run, study_file: Path, tmp_path: Path
) -> None:
    """The report shows the study as it is now; it says which stage ran on another."""
    copy, file = tmp_path / "copy", tmp_path / "s.toml"
    shutil.copytree(done.folder, copy)
    options: dict[str, Any] = {"base": study_file.parent, "progress": False}
    file.write_text(study_file.read_text().replace("seeds = [1]", "seeds = [2]"))
    assert file.read_text() != study_file.read_text()
    said: list[str] = []
    run_study(read_study(file), copy, start="select", echo=said.append, **options)
    assert any("score    not run again, though changed since: options;" in line for line in said)
    assert not any(line.startswith("extract") for line in said)
    for name in ("report.html", "report.md"):
        assert "not what stage score ran on" in (copy / name).read_text()
    run_study(read_study(file), copy, **options)  # nothing is left out
    for name in ("report.html", "report.md"):
        assert "not what stage score ran on" not in (copy / name).read_text()


def test_an_extraction_that_was_stopped_is_told_by_what_goes_on_from_its_stores(
    done: Run, study_file: Path, tmp_path: Path
) -> None:
    """Refused halfway, it leaves stores of the study as it is now beside those of earlier."""
    copy, file = tmp_path / "copy", tmp_path / "s.toml"
    shutil.copytree(done.folder, copy)
    changed = study_file.read_text().replace("items = 40", "items = 30")
    # Metrics of the model are refused for other images than were extracted.
    changed = changed.replace(',\n  "skip_joint_change", "zero_shot_margin"', "")
    file.write_text(changed)
    shutil.rmtree(copy / "features" / "letters-test")
    options: dict[str, Any] = {"base": study_file.parent, "progress": False}
    with pytest.raises(UserError, match="belongs to another extraction"):
        run_study(read_study(file), copy, **options)
    said: list[str] = []
    run_study(read_study(file), copy, start="score", echo=said.append, **options)
    assert pd.read_parquet(copy / "scores.parquet").n.max() > 32  # of a mixture, as is said
    (line,) = [line for line in said if line.startswith("extract")]
    assert " ".join(line.split()) == (
        "extract did not finish on these inputs; what follows goes on from what lies there"
    )
    assert read_json(copy / "provenance.json")["outdated"] == {"extract": []}
    for name in ("report.html", "report.md"):
        assert "extract did not finish on the study file shown" in (copy / name).read_text()
    run_study(read_study(file), copy, force=True, only=["extract"], **options)
    run_study(read_study(file), copy, start="score", echo=said.append, **options)
    assert read_json(copy / "provenance.json")["outdated"] == {}
    assert "did not finish" not in (copy / "report.md").read_text()
    # A study that was stopped in a stage, whose work a verb has done since.
    ledger = read_json(copy / "stages.json")
    write_json(copy / "stages.json", {**ledger, "unfinished": {"select": 1.0, "score": 1.0}})
    select_run(copy, "paper", {}, 200, 0)
    assert read_json(copy / "stages.json")["unfinished"] == {"score": 1.0}
    anew = "choice.json was written anew by a verb since the study shown was run"
    assert anew not in (copy / "report.md").read_text()
    write_report(copy, formats=("svg",))
    shown = (copy / "report.md").read_text()
    assert shown.count(anew) == 1
    (copy / "stages.json").unlink()  # as the single verbs leave a run
    run_study(read_study(file), copy, only=["score"], echo=said.append, **options)
    assert sum(line.startswith("extract") for line in said) == 1


def test_the_report_tells_of_an_extraction_beside_the_study_shown(
    done: Run, study_file: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(done.folder, copy)
    options: dict[str, Any] = {"base": study_file.parent, "progress": False, "only": ["extract"]}
    source = study_file.read_text()
    told = "The folder features was written anew by a verb since the study shown was run"

    def shown() -> str:
        write_report(copy, formats=("svg",))
        return (copy / "report.md").read_text()

    run_study(read_study(study_file), copy, **options)  # a verb, which does as the study says
    assert told not in shown()
    other = check_study(tomllib.loads(source.replace("items = 40", "items = 30")))
    run_study(other, copy, force=True, **options)
    assert told in shown()
    run_study(read_study(study_file), copy, source=source, force=True, **options)
    assert told not in shown()


def test_scores_name_stores_that_the_last_extraction_did_not_write(
    done: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(done.folder, copy)
    provenance = read_json(copy / "provenance.json")
    *kept, dropped = provenance["datasets"].items()
    write_json(copy / "provenance.json", provenance | {"datasets": dict(kept)})
    score_run(copy, ["dataset_accuracy_ncm"], {"seeds": [1]}, progress=False)
    name, record = dropped
    (warned,) = [line for line in caplog.messages if "of an earlier extraction" in line]
    assert f"{name}-{record['split']} of an earlier" in warned
    assert all(f"{other}-" not in warned.partition(": ")[2] for other, _ in kept)
    select_run(copy, "threshold", {"metric": "dataset_accuracy_ncm", "agreement_metric": "none"},
               20, 0)  # fmt: skip
    write_report(copy, formats=("svg",))
    shown = (copy / "report.md").read_text().replace("\\", "")  # before marks of Markdown
    beside = "scored, of an earlier extraction"
    assert f"| {name} | {beside} | {record['split']} |" in shown
    assert shown.count(beside) == 1


def test_a_seed_of_items_goes_with_a_rule_that_draws_nothing(
    done: Run, study_file: Path, tmp_path: Path
) -> None:
    copy, file = tmp_path / "copy", tmp_path / "s.toml"
    shutil.copytree(done.folder, copy)
    source = study_file.read_text().replace("resamples = 20", 'rule = "paper"')
    source = source.replace('options = { metric = "dataset_accuracy_ncm" }\n', "")
    file.write_text("seed = 3\n" + source)
    (run,) = run_study(
        read_study(file), copy, base=study_file.parent, progress=False, only=["select"]
    )
    assert read_json(run.choice)["rule"] == "paper"
    assert run.read_provenance()["seed"] == 0, "by which the items were drawn"


def test_stages_can_be_picked_and_say_what_they_need(study_file: Path, tmp_path: Path) -> None:
    study = read_study(study_file)
    for options, message in (
        ({"only": ["scores"]}, "did you mean 'score'"),
        ({"only": ["select"]}, "stage 'score' writes; run with --from score"),
        ({"start": "score"}, "stage 'extract' writes"),
        ({"only": ["extract", "select"]}, "stage 'score' writes"),
        ({"start": "score", "only": ["score"]}, "not both"),
    ):
        with pytest.raises(UserError, match=message):
            run_study(study, tmp_path / "none", base=study_file.parent, progress=False, **options)
        assert not (tmp_path / "none").exists(), "it is said before the first stage"


def test_an_interrupted_study_finishes_with_the_same_tables(
    done: Run, study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C arrives inside the second dataset, between two batches."""
    from vlmlayers.manifests import Manifest

    drawn = 0
    open_image = Manifest.open_image

    def interrupted(self: Manifest, *args: Any, **options: Any) -> Any:
        nonlocal drawn
        drawn += 1
        if drawn == 60:
            raise KeyboardInterrupt
        return open_image(self, *args, **options)

    options = {"base": study_file.parent, "source": study_file.read_text(), "progress": False}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Manifest, "open_image", interrupted)
        run_study(read_study(study_file), tmp_path, **options)
    assert drawn == 60 and not (tmp_path / "scores.parquet").exists()
    assert list(read_json(tmp_path / "stages.json")["unfinished"]) == ["extract"]
    run_study(read_study(study_file), tmp_path, **options)
    assert set(read_json(tmp_path / "stages.json")) == set(read_json(done.folder / "stages.json"))
    pd.testing.assert_frame_equal(
        pd.read_parquet(tmp_path / "scores.parquet"), pd.read_parquet(done.scores)
    )


@pytest.mark.slow
def test_a_killed_study_finishes_with_the_same_tables(
    done: Run, study_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    command = [
        sys.executable,
        "-m",
        "vlmlayers.cli",
        "study",
        str(study_file),
        "--out",
        str(out),
        "--quiet",
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # As many as here: features of another number of threads differ in their last digits.
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    end = time.monotonic() + 90
    while not (out / "features" / "digits-test").exists() and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "scores.parquet").exists()
    run_study(read_study(study_file), out, base=study_file.parent, progress=False)
    pd.testing.assert_frame_equal(
        pd.read_parquet(out / "scores.parquet"), pd.read_parquet(done.scores)
    )
    assert (out / "choice.json").read_bytes() == done.choice.read_bytes()


def test_another_extraction_is_refused_and_forced(
    done: Run, study_file: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(done.folder, copy)
    file = tmp_path / "s.toml"
    file.write_text(study_file.read_text().replace("items = 40", "items = 30"))
    options = {"base": study_file.parent, "progress": False, "only": ["extract"]}
    with pytest.raises(UserError, match=r"belongs to another extraction.*--force"):
        run_study(read_study(file), copy, **options)
    run = run_study(read_study(file), copy, force=True, **options)[0]
    assert {one["items"] for one in run.read_provenance()["datasets"].values()} == {30, 32}


def test_unfinished_work_of_another_extraction_is_refused_and_forced(
    study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, options = tmp_path / "out", {"base": study_file.parent, "only": ["extract"]}
    made = read_study(study_file)
    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        stopped.setattr(StoreWriter, "_seal", lambda _: signal.raise_signal(signal.SIGINT))
        run_study(made, out, progress=False, **options)
    assert [path.name for path in (out / "features").iterdir()] == ["digits-test.partial"]
    extract = made.extract.model_copy(update={"batch_size": 7})
    other = made.model_copy(update={"extract": extract})
    with pytest.raises(UserError, match=r"belongs to another extraction.*--force"):
        run_study(other, out, progress=False, **options)
    run_study(other, out, progress=False, force=True, **options)
    assert not list((out / "features").glob("*.partial"))


def test_stages_are_picked_and_skipped() -> None:
    assert pick_stages((), None) == list(STAGES)
    assert pick_stages((), None, ["validate"]) == [name for name in STAGES if name != "validate"]
    assert pick_stages((), "select", ["train", "validate"]) == ["select", "report"]
    with pytest.raises(UserError, match="no stage is left to run: score without score"):
        pick_stages(["score"], None, ["score"])


def test_a_study_and_a_manifest_are_told_apart(study_file: Path, repository: Path) -> None:
    with pytest.raises(UserError, match="dtd.toml is the manifest of a dataset, not a study"):
        read_study(repository / "data_manifests/dtd.toml")
    with pytest.raises(UserError, match="tiny.toml is a study, not a dataset; run it by"):
        Manifest.load(study_file)


@pytest.mark.parametrize("stage", ["search", "train", "validate"])
def test_a_stage_that_is_asked_for_and_has_no_table_is_refused(stage: str, tmp_path: Path) -> None:
    for content, only in ((BASE, [stage]), ({**BASE, "stages": [stage]}, [])):
        with pytest.raises(UserError, match=f"the stage '{stage}' has nothing to do"):
            run_study(check_study(content), tmp_path / "out", only=only)
    assert pick_stages(["report", "score"], None) == ["score", "report"]
    with pytest.raises(UserError, match="did you mean 'validate'"):
        pick_stages((), None, ["validat"])
    with pytest.raises(UserError, match="either --only or --from"):
        pick_stages(["score"], "score")


def test_a_dataset_that_fails_is_left_out_with_a_note(
    study_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An image that is none ends its own dataset, not the study; mended, it is taken in."""
    from PIL import Image

    for name in ("cat/1.png", "dog/1.png"):
        (tmp_path / "broken" / name).parent.mkdir(parents=True)
        (tmp_path / "broken" / name).write_text("no image")
    content = tomllib.loads(study_file.read_text())
    content["datasets"] = [*content["datasets"], {"name": "broken", "split": "all"}]
    shutil.copytree(study_file.parent / "tiny-clip", tmp_path / "tiny-clip")
    study, lines = check_study(content), []
    (run,) = run_study(study, tmp_path / "out", base=tmp_path, progress=False, echo=lines.append)
    assert any("broken is left out: " in line for line in lines)
    assert list(run.read_provenance()["left_out"]) == ["broken-all"]
    scored = pd.read_parquet(run.scores)
    again = {"start": "score", "skip": ["report"], "progress": False}  # it needs no store of broken
    run_study(study, tmp_path / "out", base=tmp_path, **again)
    score_run(run.folder, ["effective_rank"], {}, progress=False)  # as the verb alone does
    assert "broken-all is left out, as by its extraction: " in caplog.text
    assert set(pd.read_parquet(run.scores)["dataset"]) == set(scored["dataset"]) - {"*"}
    assert "Left out: broken-all." in run.report.read_text()
    assert "broken" not in set(pd.read_parquet(run.scores)["dataset"])
    for name in ("cat/1.png", "dog/1.png"):
        Image.new("RGB", (40, 40), "red").save(tmp_path / "broken" / name)
    run_study(study, tmp_path / "out", base=tmp_path, progress=False)
    assert run.read_provenance()["left_out"] == {}
    assert "Left out" not in run.report.read_text()
    alone = {"datasets": [{"name": "lost", "split": "all"}], "select": {"rule": "paper"}}
    (tmp_path / "lost" / "cat").mkdir(parents=True)
    (tmp_path / "lost" / "cat" / "1.png").write_text("no image")
    with pytest.raises(UserError, match="1.png"):
        run_study(check_study(content | alone), tmp_path / "alone", base=tmp_path, progress=False)


@pytest.fixture
def to_stream(tmp_path: Path) -> Any:
    tiny_clip(tmp_path / "tiny-clip")
    return check_study(
        {
            "models": [{"path": "tiny-clip", "random_weights": True}],
            "datasets": ["digits", "shapes_filled"],
            "extract": {"items": 30, "split": "val"},
            "score": {"metrics": ["effective_rank"]},
            "select": {"rule": "budget", "options": {"score": "metric:effective_rank"}},
        }
    )


def test_a_streamed_run_says_of_itself_what_a_plain_one_does(
    to_stream: Any, tmp_path: Path
) -> None:
    places: dict[str, Any] = {"base": tmp_path, "progress": False}
    (plain,) = run_study(to_stream, tmp_path / "plain", only=["extract", "score"], **places)
    told = stream_study(to_stream, tmp_path / "sums", metrics=["effective_rank"], **places)
    assert UNTRAINED in told
    streamed = Run(tmp_path / "sums")
    ours, theirs = streamed.read_provenance(), plain.read_provenance()
    assert ours["extract"].pop("streaming") is True and ours["score"]["streaming"] is True
    assert set(ours) == set(theirs)
    assert all(one.pop("seconds") > 0 for of in (ours, theirs) for one in of["datasets"].values())
    for fact in ("model", "datasets", "left_out", "given", "extract", "seed"):
        assert ours[fact] == theirs[fact], fact
    assert ours["datasets"]["digits"]["items_hash"] and ours["model"]["random_weights"]
    stages = [run.read("stages.json")["extract"] for run in (streamed, plain)]
    assert stages[0]["inputs"].pop("streaming") and stages[0]["inputs"] == stages[1]["inputs"]
    assert stages[0]["seconds"] > 0
    marks = [read_scores(run.scores).attrs["features"] for run in (streamed, plain)]
    assert marks[0] == marks[1] and len(marks[0]) == 2
    select_run(streamed.folder, "budget", {"score": "metric:effective_rank"}, 0, 0)
    evidence = LayerChoice.load(streamed.folder).evidence
    assert evidence["weights_hash"] == ours["model"]["weights_hash"]
    page = write_report(streamed.folder, formats=("svg",)).read_text()
    digits = ours["datasets"]["digits"]
    for fact in (digits["title"], digits["manifest_hash"], ours["model"]["weights_hash"]):
        assert fact in page, fact
    assert recorded_context(streamed).model_arguments()["random_weights"]


def test_a_stream_ends_what_an_earlier_extraction_counts_for(
    to_stream: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, lines = tmp_path / "out", []
    places: dict[str, Any] = {"base": tmp_path, "progress": False}
    only = {"only": ["extract", "score"], **places}
    fewer = to_stream.model_copy(
        update={"extract": to_stream.extract.model_copy(update={"items": 20})}
    )
    run_study(fewer, out, **only)
    stopped = Run(out).read("stages.json") | {"unfinished": {"score": 1.0}}
    write_json(out / "stages.json", stopped)
    stream_study(to_stream, out, metrics=["effective_rank"], **places)
    assert not Run(out).read("stages.json").get("unfinished")  # a stream scores as well
    # Of the same datasets by name, and yet not what is in the stores.
    run_study(to_stream, out, only=["score"], echo=lines.append, **places)
    assert "not run again, though changed since: streaming" in "".join(lines).replace("\n", " ")
    score_run(out, ["effective_rank"], {}, progress=False)
    assert "of an extraction before the last one, which was streamed" in caplog.text
    with pytest.raises(UserError, match="30 now: 10 added"):
        run_study(to_stream, out, **only)
    run_study(to_stream, out, force=True, **only)
    assert "streaming" not in Run(out).read_provenance()["extract"]
    assert "streaming" not in Run(out).read("stages.json")["extract"]["inputs"]
    assert set(read_scores(Run(out).scores)["n"]) >= {30}


def test_a_stopped_stream_goes_on_from_its_sums_unless_it_is_forced(
    to_stream: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, drawn = tmp_path / "out", []
    original = Manifest.open_image

    def counting(self: Manifest, item: Any, *args: Any, **more: Any) -> Any:
        if self.name == "shapes_filled" and stops:
            raise KeyboardInterrupt
        drawn.append(self.name)
        return original(self, item, *args, **more)

    monkeypatch.setattr(Manifest, "open_image", counting)
    places: dict[str, Any] = {"base": tmp_path, "progress": False, "metrics": ["effective_rank"]}
    with pytest.raises(UserError, match="class_accuracy"):
        stream_study(to_stream, out, **places | {"metrics": ["class_accuracy"]})
    assert not out.exists()
    for force, again in ((False, 30), (True, 60)):
        stops = True
        with pytest.raises(KeyboardInterrupt):
            stream_study(to_stream, out, **places)
        assert (out / "streams" / "digits-val" / "sums.0.npz").exists()
        drawn.clear()
        stops = False
        stream_study(to_stream, out, force=force, **places)
        assert len(drawn) == again
        assert not (out / "streams").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": [{"name": "mini-clip"}, {"name": "mini-clip", "random_weights": True}]},
         "streaming takes one model at a time; name one"),
        ({"models": [{"name": "mini-clip", "pretrained": "nosuch"}]}, "nosuch"),
        ({"extract": {"tower": "text"}}, "streaming sums both towers"),
        ({"extract": {"pooling": {"vision": "tokens"}}}, "streaming sums one vector per item"),
        ({"extract": {"spaces": ["attention_entropy"]}}, "streaming sums one vector per item"),
    ],
)  # fmt: skip
def test_what_cannot_be_streamed_is_said_before_a_model_is_loaded(
    change: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StageContext, "load_model", lambda *_: pytest.fail("a model is loaded"))
    study = check_study({"models": [{"name": "mini-clip"}], "datasets": ["digits"], **change})
    with pytest.raises(UserError, match=message):
        stream_study(study, tmp_path / "out", metrics=["effective_rank"], progress=False)
    assert not (tmp_path / "out").exists()


def test_a_stream_leaves_out_a_dataset_that_fails(to_stream: Any, tmp_path: Path) -> None:
    for name in ("cat/1.png", "dog/1.png"):
        (tmp_path / "broken" / name).parent.mkdir(parents=True)
        (tmp_path / "broken" / name).write_text("no image")
    content = to_stream.model_dump(exclude_unset=True, by_alias=True)
    content["datasets"] = ["digits", {"name": "broken", "split": "all"}]
    study, lines = check_study(content), []
    places: dict[str, Any] = {"base": tmp_path, "progress": False, "echo": lines.append}
    stream_study(study, tmp_path / "out", metrics=["effective_rank"], **places)
    notes = Run(tmp_path / "out").read_provenance()
    assert list(notes["left_out"]) == ["broken-all"] and set(notes["datasets"]) == {"digits"}
    assert any("broken is left out: " in line for line in lines)


def test_a_study_that_fails_before_it_made_anything_leaves_no_run_folder(
    study_file: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "damaged.safetensors"
    weights.write_bytes(b"no weights")
    source = study_file.read_text().replace("random_weights = true", f'checkpoint = "{weights}"')
    study = check_study(tomllib.loads(source))
    options: dict[str, Any] = {"base": study_file.parent, "progress": False}
    with pytest.raises(UserError, match=r"damaged\.safetensors"):
        run_study(study, tmp_path / "out", source=source, **options)
    assert not (tmp_path / "out").exists()


def test_a_folder_in_which_a_study_works_is_refused_to_others(
    done: Run, study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two studies in one folder would end with the scores of one under the title of the other."""
    run = Run(tmp_path / "run")
    shutil.copytree(done.folder, run.folder)
    before = (run.folder / "study.toml").read_bytes()
    study, options = read_study(study_file), {"base": study_file.parent, "progress": False}
    models = [
        part.model_copy(update={"label": name})
        for part, name in zip(study.models * 2, ("run", "other"))
    ]
    several = study.model_copy(update={"models": models})
    refused = []

    def work(context: StageContext) -> None:
        for call in (
            lambda: run_study(study, run.folder, source="title = 'another'", **options),
            lambda: run_study(several, tmp_path, **options),  # whose first model has this folder
            lambda: select_run(run.folder, "paper", {}, 0, 0),
        ):
            with pytest.raises(UserError) as error:
                call()
            refused.append(str(error.value))
        assert CliRunner().invoke(app, ["score", str(run.folder)]).exit_code
        select_run(run.folder, "paper", {}, 0, 0, tmp_path / "choice.json")

    stage = replace(STAGES["report"], inputs=lambda context: {"now": time.time()}, run=work)
    monkeypatch.setitem(STAGES, "report", stage)
    run_study(study, run.folder, **options)
    told = f"another process is writing {run.folder}; wait for it or choose another folder"
    assert refused == [told] * 3
    assert (run.folder / "study.toml").read_bytes() == before
    assert not (tmp_path / "other").exists()
    monkeypatch.undo()
    run_study(study, run.folder, only=["select"], **options)  # which is free again


def test_processes_of_one_torchrun_share_a_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with writing_alone(tmp_path / "run"):
        monkeypatch.setenv("RANK", "1")
        with writing_alone(tmp_path / "run"):
            pass
    assert not (tmp_path / "run").exists()


def test_the_report_is_there_before_the_long_stages(
    done: Run, study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(done.folder, run.folder)
    run.report.unlink()
    found = []
    stage = replace(
        STAGES["validate"],
        inputs=lambda context: {},
        run=lambda context: found.append(context.run.report.exists()),
        outputs=lambda context: [],
        wanted=lambda context: True,
    )
    monkeypatch.setitem(STAGES, "validate", stage)
    run_study(read_study(study_file), run.folder, base=study_file.parent, progress=False)
    assert found == [True]


def test_a_store_that_another_process_writes_ends_the_study(
    study_file: Path, tmp_path: Path
) -> None:
    """Only what is wrong with a dataset's own files leaves it out."""
    study = read_study(study_file)
    (name, *_) = study.datasets
    folder = f"{name.name}-{study.part(name)['split']}"
    partial = tmp_path / "out" / "features" / f"{folder}.partial"
    partial.mkdir(parents=True)
    with (
        take_lock(partial / "lock", partial),
        pytest.raises(UserError, match="another process is writing"),
    ):
        run_study(study, tmp_path / "out", base=study_file.parent, progress=False)
    assert len(study.datasets) > 1
