"""The stage `train` of a study, and the study files of the paper's three tables."""

from __future__ import annotations

import json
import shutil
import tomllib
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from vlmadapters import load_recipe
from vlmadapters.cli import train_stage
from vlmadapters.cli.search_stage import search
from vlmadapters.cli.train_stage import parts, train
from vlmadapters.cli.validate_stage import validate
from vlmadapters.methods import BUILT_IN, METHODS
from vlmadapters.protocols.results import COLUMNS
from vlmadapters.training.recipes import default_recipe
from vlmlayers.architectures import CONFIG_FILE, MINIATURES
from vlmlayers.cli import app
from vlmlayers.errors import UserError
from vlmlayers.manifests import Manifest
from vlmlayers.models import load_model
from vlmlayers.runs import Run
from vlmlayers.study import check_study, read_study, run_study
from vlmlayers.study.context import StageContext
from vlmlayers.study.stages import STAGES

STUDIES = Path(__file__).parents[3] / "data_manifests" / "studies"
TABLES = ("base_to_novel", "cross_dataset", "domain_generalization")
ELEVEN = {
    "imagenet", "caltech101", "oxford_pets", "stanford_cars", "oxford_flowers", "food101",
    "fgvc_aircraft", "sun397", "dtd", "eurosat", "ucf101",
}  # fmt: skip
SHIFTED = {"imagenet_v2", "imagenet_sketch", "imagenet_a", "imagenet_r"}


def study_of(table: str) -> Any:
    return read_study(STUDIES / f"mma_{table}.toml")


@pytest.mark.parametrize("table", TABLES)
def test_the_study_files_of_the_paper_name_its_values(table: str) -> None:
    study = study_of(table)
    assert study.stages == ("train",)
    assert (study.models[0].name, study.models[0].pretrained) == ("ViT-B-16-quickgelu", "openai")
    for part in parts(study.train):
        assert part.seeds == (1, 2, 3)
        assert part.protocol == table.replace("_", "-")
        assert not part.set and not part.placements, "the recipe as published"
        assert {*part.datasets, *part.targets} <= set(Manifest.names())


def test_each_table_is_covered() -> None:
    base, imagenet = parts(study_of("base_to_novel").train)
    assert {*base.datasets, *imagenet.datasets} == ELEVEN
    assert load_recipe(base.recipe).train.batch_size == 16
    assert load_recipe(imagenet.recipe).train.batch_size == 128
    assert load_recipe(base.recipe).train.epochs == load_recipe(imagenet.recipe).train.epochs == 5
    for table, targets in (
        ("cross_dataset", ELEVEN - {"imagenet"}), ("domain_generalization", SHIFTED),
    ):  # fmt: skip
        (part,) = parts(study_of(table).train)
        recipe = load_recipe(part.recipe)
        assert (part.datasets, set(part.targets)) == (("imagenet",), targets)
        assert (recipe.train.epochs, recipe.method.placement) == (1, "v9-12,t9-12")


@pytest.mark.parametrize("table", [*TABLES, "few_shot"])
def test_a_study_of_every_method_names_published_recipes_first(table: str) -> None:
    study = read_study(STUDIES / f"methods_{table}.toml")
    tables = parts(study.train)
    assert study.stages == ("train",) and study.models[0].pretrained == "openai"
    methods = [method for part in tables for method in part.methods]
    assert sorted(methods) == sorted({*BUILT_IN} - {"zero-shot"})
    for part in tables:
        assert part.protocol == table.replace("_", "-") and part.seeds == (1, 2, 3)
        assert not part.set and not part.placements
        for method, recipe in part.recipes.items():
            assert load_recipe(recipe or "published", method).source or method == "mma"
        named = {"few_shot": (), "base_to_novel": (), "domain_generalization": SHIFTED}
        assert set(part.targets) == set(named.get(table, ELEVEN - {"imagenet"}))
    trained = {one.name for one in study.datasets}
    assert trained == (ELEVEN if table in ("few_shot", "base_to_novel") else {"imagenet"})


def test_each_method_of_a_table_may_have_a_recipe_of_its_own() -> None:
    part = {"method": ["maple", "coop"], "recipe": {"maple": "transfer"}}
    assert parts([part])[0].recipes == {"maple": "transfer", "coop": ""}
    assert parts([{"method": ["mma", "coop"], "recipe": "mini"}])[0].recipes["coop"] == "mini"
    assert load_recipe("published").train_for("imagenet").batch_size == 128


def test_a_table_without_a_recipe_takes_that_of_the_backbone(tmp_path: Path) -> None:
    """As the verb `train` does; an epoch of CoOp's published recipe is warm-up, and refused."""
    part = {"method": ["coop"], "set": {"epochs": 1, "shots": 1}, "seeds": [1], "items": 8}
    content = {"models": [{"name": "mini-clip"}], "datasets": ["digits"], "stages": ["train"]}
    run_study(check_study(content | {"train": [part]}), tmp_path, progress=False)
    assert "CoOp" in set(pd.read_csv(tmp_path / "results.csv")["method"])
    part |= {"recipe": "published"}
    with pytest.raises(UserError, match="all of them warm-up"):
        run_study(check_study(content | {"train": [part]}), tmp_path, progress=False)


@pytest.mark.parametrize("name", list(MINIATURES))
def test_both_miniatures_take_the_recipe_for_small_backbones(name: str) -> None:
    assert default_recipe(name) == default_recipe(name, "coop") == "mini"
    assert default_recipe("ViT-B-16") == "published"


def test_a_miniature_is_known_by_its_folder_and_by_a_copy(tmp_path: Path) -> None:
    """By name it took its own recipe, by path the published one, which does not move it."""
    copy = shutil.copytree(MINIATURES["mini-clip-taught"], tmp_path / "copy")
    for path in (MINIATURES["mini-clip-taught"], copy):
        assert default_recipe(str(path)) == "mini"
        assert load_model(path).name == "mini-clip-taught"
    config = copy / CONFIG_FILE
    config.write_text(config.read_text().replace("0.26862954", "0.27"))
    assert default_recipe(str(copy)) == "published"
    assert load_model(copy).name == "copy"


def test_another_model_in_a_folder_called_mini_clip_is_not_taken_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its name in Python it took the recipe `mini`, by its path on the command line not."""
    folder = shutil.copytree(MINIATURES["mini-clip-taught"], tmp_path / "mine" / "mini-clip")
    config = folder / CONFIG_FILE
    config.write_text(config.read_text().replace("0.26862954", "0.27"))
    monkeypatch.chdir(folder.parent)
    weights = folder / "model.safetensors"
    for one in (load_model("./mini-clip"), load_model("local", config=config, checkpoint=weights)):
        assert one.name == "mine/mini-clip" and default_recipe(one.name) == "published"
    shipped = load_model(MINIATURES["mini-clip"])
    assert load_model("mini-clip").weights_hash == shipped.weights_hash


def small(table: str) -> Any:
    """Return the study of a table on the miniature CLIP, drawings and one short epoch."""
    content = tomllib.loads((STUDIES / f"mma_{table}.toml").read_text(encoding="utf-8"))
    content |= {"models": [{"name": "mini-clip"}], "datasets": ["shapes_filled"]}
    for part in content["train"]:
        part |= {"datasets": ["shapes_filled"], "seeds": [1], "items": 16, "workers": 0}
        part |= {"recipe": "mini", "set": {"epochs": 1, "shots": 2}, "placements": ["12"]}
        if "targets" in part:
            part["targets"] = ["shapes_outline", "digits"]
    return check_study(content)


@pytest.mark.parametrize("verb", ["train", "search"])
def test_the_recipe_that_was_checked_is_trained(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe file that changes while the model is loaded is not read again."""
    file, given = tmp_path / "mine.toml", []
    file.write_text('extends = "mini"\nlr = 0.25\n')

    def loaded(*_: Any) -> Any:
        file.write_text("broken")
        return load_model("mini-clip")

    def run(model: Any, datasets: Any, recipes: Any = None, *_: Any, **named: Any) -> None:
        given.append(recipes[0] if recipes else named["recipe"])
        raise KeyboardInterrupt

    monkeypatch.setattr(f"vlmadapters.cli.{verb}.load_backbone", loaded)
    where = {"train": "protocols.train.train", "search": "validation.search.search"}[verb]
    monkeypatch.setattr(f"vlmadapters.{where}", run)
    words = [verb, "mini-clip", "faces", "--out", str(tmp_path), "--recipe", str(file)]
    CliRunner().invoke(app, words)
    assert [recipe.train.lr for recipe in given] == [0.25]


def test_a_study_that_only_trains_writes_results_and_does_it_once(tmp_path: Path) -> None:
    study = small("cross_dataset")
    said: list[str] = []
    run_study(study, tmp_path, progress=False, echo=said.append)
    table = pd.read_csv(tmp_path / "results.csv")
    trained = table[table["method"] == "MMA"]
    assert set(trained["dataset"]) == {"shapes_filled", "shapes_outline", "digits"}
    assert set(trained["placement"]) == {"v12,t12"} and set(trained["shots"]) == {2}
    assert not (tmp_path / "features").exists()
    run_study(study, tmp_path, progress=False, echo=said.append)
    assert said[-1] == "train    unchanged"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({}, "test faces by base-to-novel on different images: items is 20 and 0; give them one"),
        ({"datasets": ["signs", "faces"]}, "tables 1 and 3 .* test faces .* one items"),
        ({"items": 20, "skip_unreadable": True}, "skip_unreadable is False and True"),
        ({"protocol": "cross-dataset", "targets": ["digits"]}, "test digits by cross-dataset"),
        ({"items": 20}, ""),
        ({"protocol": "few-shot"}, ""),
        ({"datasets": ["signs"]}, ""),
    ],
)
def test_tables_that_test_a_dataset_on_different_images_are_refused(
    other: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Results of the second passed for those of the first, whose zero-shot CLIP stood for both."""
    transfer = {"protocol": "cross-dataset", "datasets": ["charts"], "targets": ["digits"]}
    tables = [{"items": 20}, transfer | {"items": 20}, {"method": ["mma", "coop"]} | other]
    context = context_of({"train": tables}, tmp_path)
    with pytest.raises(UserError, match=message) if message else nullcontext():
        train.check(context)


@pytest.mark.parametrize("second", ["a photo of a {}.", "{}!"])
def test_tables_of_two_templates_have_zero_shot_rows_of_one_and_say_so(
    second: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The rows of the other were dropped without a word."""

    def rows(template: str) -> pd.DataFrame:
        return pd.DataFrame(
            [dict.fromkeys(COLUMNS, 0) | {"template": template, "precision": "fp32"}]
        )

    made = iter([rows("a photo of a {}."), rows(second)])
    monkeypatch.setattr(train_stage, "_run", lambda *_: next(made))
    monkeypatch.setattr(StageContext, "load_model", lambda _: None)
    monkeypatch.setattr("vlmlayers.study.stages.model_record", lambda _: {})
    train(context_of({"train": [{}, {}]}, tmp_path))
    assert ("differ in template; zero-shot rows are of the first" in caplog.text) == (
        second == "{}!"
    )
    assert len(pd.read_csv(tmp_path / "results.csv")) == 1


def context_of(tables: dict[str, Any], folder: Path) -> StageContext:
    """Return the context of a study with some tables, run in the folder that its files lie in."""
    study = check_study({"models": [{"name": "mini-clip"}], "datasets": ["faces"]} | tables)
    return StageContext(Run(folder), study, study.models[0], folder)


def inputs(stage: str, table: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return what a stage depends on in a study with a table for it."""
    tables = {stage: [table] if stage == "train" else table}
    return STAGES[stage].inputs(context_of(tables, folder))


@pytest.mark.parametrize(
    ("placements", "depends"),
    [(["choice"], True), (["mma:choice"], True), (["mma:5-12"], False), ([], False)],
)
def test_training_at_the_choice_is_done_again_after_another(
    placements: list[str], depends: bool, tmp_path: Path
) -> None:
    found = []
    for choice in ("one", "another"):
        Run(tmp_path).choice.write_text(choice)
        found.append(inputs("train", {"placements": placements}, tmp_path))
    assert (found[0] != found[1]) is depends


@pytest.mark.parametrize("stage", ["train", "search"])
def test_what_was_not_trained_on_is_taken_in_once_it_is_extracted(
    stage: str, tmp_path: Path
) -> None:
    """By other options of its extraction: the images are as they were."""
    study = check_study(
        {
            "models": [{"name": "mini-clip"}],
            "datasets": ["shapes_filled", {"name": "digits", "split": "test"}],
            stage: [{}] if stage == "train" else {},
        }
    )
    context = StageContext(Run(tmp_path), study, study.models[0], tmp_path)
    found = []
    for left_out in ({"digits-test": "no image"}, {}):
        context.run.record(left_out=left_out)
        found.append(STAGES[stage].inputs(context)["data"].keys())
    assert found == [{"shapes_filled"}, {"shapes_filled", "digits"}]


def test_another_template_of_a_dataset_is_tested_with_again(tmp_path: Path) -> None:
    """Zero-shot rows have it, and some methods read it; the images are the same."""
    for number, colour in enumerate(["red", "green", "blue"] * 4):
        file = tmp_path / f"data/{('train', 'test')[number % 2]}/{colour}/{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), colour).save(file)
    lines = 'title = "T"\nlayout = "folder"\nsplit_folders = { train = "train", test = "test" }\n'
    part = {"method": "linear-probe", "protocol": "few-shot", "seeds": [1], "set": {"shots": 1}}
    content = {"models": [{"name": "mini-clip"}], "datasets": ["data"], "stages": ["train"]}
    study = check_study(content | {"train": [part]})

    def results(template: str, out: str) -> tuple[list[str], list[str]]:
        (tmp_path / "data/manifest.toml").write_text(f'{lines}zero_shot_template = "{template}"\n')
        said: list[str] = []
        run_study(study, tmp_path / out, base=tmp_path, progress=False, echo=said.append)
        table = pd.read_csv(tmp_path / out / "results.csv")
        return table["template"].tolist(), [line for line in said if "unchanged" in line]

    first, _ = results("the colour {}.", "run")
    assert results("the colour {}.", "run") == (first, ["train    unchanged"])
    again = results("a patch of {}.", "run")
    assert again == results("a patch of {}.", "fresh") and again[0] != first


@pytest.mark.parametrize("stage", ["train", "search", "validate"])
@pytest.mark.parametrize("said_by", ["set", "recipe", "dataset"])
def test_changed_descriptions_are_trained_with_again(
    stage: str, said_by: str, tmp_path: Path
) -> None:
    file, recipe = tmp_path / "texts.json", tmp_path / "mine.toml"
    setting = f'settings.descriptions = "{file}"\n'
    own = {"set": "", "recipe": setting, "dataset": f"datasets.faces.{setting}"}
    recipe.write_text(f'method = "lweib"\n{own[said_by]}')
    table = {"method": "lweib", "recipe": "mine.toml"}
    if said_by == "set":
        table |= {"set": {"descriptions": str(file)}}
    found = []
    for text in ("A smile.", "A grin."):
        file.write_text(json.dumps({"face": [text]}))
        found.append(inputs(stage, table, tmp_path))
    assert found[0] != found[1]


@pytest.mark.parametrize("said_by", ["set", "recipe", "dataset"])
def test_descriptions_may_lie_beside_the_file_that_names_them(said_by: str, tmp_path: Path) -> None:
    """As its other files do, wherever the study is run from."""
    (tmp_path / "texts.json").write_text('{"face": ["A smile."]}')
    setting = 'settings.descriptions = "texts.json"\n'
    own = {"set": "", "recipe": setting, "dataset": f"datasets.faces.{setting}"}
    (tmp_path / "mine.toml").write_text(f'method = "lweib"\n{own[said_by]}')
    table: dict[str, Any] = {"method": "lweib", "recipe": "mine.toml"}
    if said_by == "set":
        table |= {"set": {"descriptions": "texts.json"}}
    for stage in (train, search, validate):
        name = "train" if stage is train else stage.name
        tables = {name: [table] if stage is train else table}
        files = stage.files(context_of(tables, tmp_path))
        assert tmp_path / "texts.json" in files and tmp_path / "mine.toml" in files


@pytest.mark.slow
@pytest.mark.parametrize("table", ["base_to_novel", "domain_generalization"])
def test_the_other_studies_run_the_same_way(table: str, tmp_path: Path) -> None:
    run_study(small(table), tmp_path, progress=False)
    results = pd.read_csv(tmp_path / "results.csv")
    assert set(results["protocol"]) == {table.replace("_", "-")}
    halves = {"base", "novel"} if table == "base_to_novel" else {"all"}
    assert set(results["split_kind"]) == halves


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"protocl": "few-shot"}, "did you mean 'protocol'"),
        ({"protocol": "few_shot"}, "did you mean 'few-shot'"),
        ({"protocol": "cross-dataset"}, "needs target datasets"),
        ({"targets": ["signs"]}, "tests the datasets that it trains on and no target"),
        ({"item": 8}, "unknown key 'item'; did you mean 'items'"),
        ({"recipe": "publishd"}, "did you mean 'published'"),
        ({"datasets": ["digts"]}, "did you mean 'digits'"),
        ({"placements": ["12-5-1"]}, "placement"),
        ({"recipe": {"mma": "publishd"}}, "did you mean 'published'"),
        ({"recipe": {"mmma": "mini"}}, "unknown method 'mmma' in recipe of .*'mma'"),
        ({"seeds": ["one"]}, r"\[\[train\]\]: seeds\[0\] is 'one'; a whole number"),
    ],
)
def test_a_wrong_table_is_refused_before_anything_runs(
    wrong: dict[str, Any], message: str, tmp_path: Path
) -> None:
    content = {"models": [{"name": "mini-clip"}], "datasets": ["digits"], "train": [wrong]}
    with pytest.raises(UserError, match=message):
        run_study(check_study(content), tmp_path, only=["train"], progress=False)
    assert not (tmp_path / "results.csv").exists()


def test_a_method_beside_the_study_is_found_and_marks_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(METHODS, "_registered", {})
    file = tmp_path / "beside.py"
    file.write_text(
        "from dataclasses import dataclass\n"
        "import vlmadapters as va\n"
        "@dataclass(frozen=True)\n"
        "class Config(va.MMAConfig):\n"
        "    name, title = 'beside', 'Beside'\n"
        "class Mine(va.METHODS['mma']):\n"
        "    Config = Config\n"
    )
    (tmp_path / "mine.toml").write_text("learning_rate = 0.1\n")
    table = {"method": "beside.py:Mine", "recipe": "mine.toml", "datasets": ["faces"]}
    study = SimpleNamespace(train=[table])
    context = SimpleNamespace(study=study, base=tmp_path, data_root=None)
    with pytest.raises(UserError, match="unknown key 'learning_rate' in .*mine.toml"):
        train.check(context)
    (tmp_path / "mine.toml").write_text("lr = 0.1\n")
    assert train.files(context) == [tmp_path / "mine.toml", file]
    with pytest.raises(UserError, match="beside.py does not exist"):
        parts([{"method": "beside.py:Mine"}])
