"""Validation: the same numbers as runs of their own, each cell once, nothing trained again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import groupby, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from backbones import COLOURS, FAMILIES, backbone, colour_folder, config, shared_backbone
from PIL import Image
from typer.testing import CliRunner

from vlmadapters.cli import validate_stage
from vlmadapters.methods.mma.config import MMAConfig
from vlmadapters.protocols.experiment import Experiment
from vlmadapters.protocols.results import UNMOVED, ZERO_SHOT_METHODS
from vlmadapters.protocols.train import train
from vlmadapters.training.recipes import Recipe, TrainConfig
from vlmadapters.validation import outcome
from vlmadapters.validation.competitors import Competitor
from vlmadapters.validation.outcome import label_of, summarise
from vlmadapters.validation.search import search
from vlmadapters.validation.validate import validate
from vlmadapters.validation.verdict import VALIDATION_COLUMNS
from vlmlayers.errors import UserError
from vlmlayers.files import write_json
from vlmlayers.manifests import Manifest
from vlmlayers.placement import Placement
from vlmlayers.report.next_steps import next_steps
from vlmlayers.report.numbers import read_answer
from vlmlayers.report.validation import RecordedValidation as reported
from vlmlayers.report.validation import void_verdict
from vlmlayers.runs import Run
from vlmlayers.scores.schema import SCORE_COLUMNS
from vlmlayers.selection import LayerChoice, select
from vlmlayers.selection.chooser import _splits
from vlmlayers.words import UNTRAINED

RECIPE = Recipe(
    "tiny",
    TrainConfig(lr=0.05, epochs=1, batch_size=4, shots=2),
    MMAConfig.span(2, 3, dim=4, scale=0.5),
)
CHOICE = LayerChoice((2, 3), (2, 3), "explicit")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    base = tmp_path_factory.mktemp("data") / "colours"
    return Manifest.load(colour_folder(base, train=3, test=5))


def run(manifest: Manifest, out: Path | None = None, **options: Any) -> pd.DataFrame:
    settings = {"kinds": ("all", "vision"), "seeds": (1, 2), "recipe": RECIPE, "progress": False,
                "amount": "given"}  # fmt: skip
    model = options.pop("model", None) or shared_backbone("clip")
    choice = options.pop("choice", CHOICE)
    return validate(model, choice, [manifest], out=out, **(settings | options)).table


@pytest.fixture(scope="module")
def finished(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweep")
    run(manifest, out)
    return out


def trained_cells(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """Return a list that every trained cell is added to, as (seed, placement)."""
    seen: list[tuple[int, str]] = []
    plain: Callable[..., Any] = Experiment.train_and_test

    def counted(self: Experiment, source: str, seed: int, settings: Any) -> Any:
        seen.extend((seed, one.label) for one in settings)
        return plain(self, source, seed, settings)

    monkeypatch.setattr(Experiment, "train_and_test", counted)
    return seen


def test_cells_trained_together_equal_runs_of_their_own(manifest: Manifest) -> None:
    table = run(manifest)
    assert tuple(table.columns) == VALIDATION_COLUMNS
    assert list(table["placement"][:3]) == ["v2-3,t2-3", "v1-3,t1-3", "v2-3,t-"]
    assert list(table["kind"][:3]) == ["chosen+paper", "all", "vision"]
    assert len(table) == 6
    for _, row in table[table["seed"] == 2].iterrows():
        alone = Experiment("base-to-novel", shared_backbone("clip"), RECIPE, progress=False)
        blocks = [tuple(map(int, row[tower].split())) for tower in ("vision", "text")]
        results = alone.run([manifest], [RECIPE.method.with_placement(*blocks)], [2])
        by_kind = results[results["method"] == "MMA"].set_index("split_kind")["accuracy"]
        base, novel = row["base"], row["novel"]
        assert (base, novel) == pytest.approx((100 * by_kind["base"], 100 * by_kind["novel"]))
        assert row["hm"] == pytest.approx(2 / (1 / base + 1 / novel) if base and novel else 0)
        assert (row["n_base"], row["n_novel"]) == (10, 10)


def test_each_number_of_a_cell_is_that_of_its_own_half_setting_and_dataset() -> None:
    """From results whose numbers all differ; the second seed of one dataset lacks a placement."""
    rng, rows, labels = np.random.default_rng(0), [], ["v2-3,t2-3 @lr=0.1", "v1-3,t1-3"]
    for dataset, seed, label in [("b", 2, labels[0]), *product("ba", (1,), labels)]:
        for kind, n in (("base", 30), ("novel", 20)):
            row = {"dataset": dataset, "seed": seed, "placement": label, "split_kind": kind}
            row |= dict(zip(("accuracy", "first_half", "second_half"), rng.uniform(size=3)))
            row |= {"method": "MMA", "model": "m", "weights": "w", "shots": 4, "n": n}
            rows.append(row | {"changed": 0.001 * seed, "seconds": 2.0, "parameters": 7})
    plain = [
        {"dataset": dataset, "split_kind": kind, "method": method, "accuracy": rng.uniform()}
        for dataset, kind, method in product("ab", ("base", "novel"), ZERO_SHOT_METHODS)
    ]
    found = outcome.validation_table(
        pd.DataFrame(rows + plain),
        [
            Competitor("chosen", Placement.parse("v2-3,t2-3")),
            Competitor("all", Placement.parse(labels[1])),
        ],
        {"tuned": labels},
    )
    cells = [("b", 2, labels[0]), *product("ba", (1,), labels)]
    assert [*zip(found["dataset"], found["seed"], found["kind"])] == [
        (dataset, seed, "chosen" if label == labels[0] else "all") for dataset, seed, label in cells
    ]
    assert list(found["amount"]) == ["lr=0.1", "lr=0.1", "", "lr=0.1", ""]
    for place, row in enumerate(found.to_dict("records")):
        base, novel = rows[2 * place : 2 * place + 2]
        for ours, theirs in (
            ("hm", "accuracy"), ("hm_first_half", "first_half"), ("hm_second_half", "second_half")
        ):  # fmt: skip
            assert row[ours] == pytest.approx(200 / (1 / base[theirs] + 1 / novel[theirs]))
        assert (row["base"], row["novel"]) == (100 * base["accuracy"], 100 * novel["accuracy"])
        zero = [
            one for one in plain if one["dataset"] == row["dataset"] and "," not in one["method"]
        ]
        assert [row["zero_shot_base"], row["zero_shot_novel"]] == [
            100 * z["accuracy"] for z in zero
        ]
        assert (row["n_base"], row["n_novel"], row["changed"]) == (30, 20, row["seed"] == 2)


@pytest.mark.parametrize(("split", "told"), [("test", True), ("all", True), ("val", False)])
def test_layers_chosen_on_the_images_that_test_them_are_told(
    split: str, told: bool, manifest: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    """By every route: the choice itself says on which split its scores were."""
    table = scores().assign(split=split)
    chosen = select(table, "threshold", agreement_metric="none", resamples=0)
    assert chosen.evidence["chosen_on"] == {"*": split}, "pooled rows name no dataset"
    named = table.assign(dataset=[manifest.name, *["other"] * (len(table) - 1)])
    by_name = replace(chosen, evidence={**chosen.evidence, "chosen_on": {manifest.name: split}})
    assert _splits(named) == {manifest.name: split, "other": split}
    for choice in (chosen, by_name):
        caplog.clear()
        found = validate(
            shared_backbone("clip"), choice, [manifest], recipe=RECIPE, seeds=(1,), kinds=("all",),
            amount="given", progress=False,
        )  # fmt: skip
        warned = f"the layers were chosen on test images of {manifest.name}"
        assert (warned in found.verdict) is told and (warned in caplog.text) is told
        caplog.clear()
        short = replace(RECIPE, train=replace(RECIPE.train, epochs=1))
        train(shared_backbone("clip"), [manifest], short, placement=[choice], seeds=(1,),
              progress=False)  # fmt: skip
        assert (warned in caplog.text) is told
        assert found.summary["chosen_on"] == choice.evidence["chosen_on"]
    assert "chosen_on" not in select(table, "paper", resamples=0).evidence


def test_test_images_among_those_trained_on_are_told(
    manifest: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    """Once a run, whatever trains, and by what it writes; a target alone is not trained on."""
    assert manifest.source is not None
    leaky = manifest.source.parent / "leaky.csv"
    rows = [f"colours/train/{name}/{i}.png,{name},train" for name in COLOURS for i in range(3)]
    test = [f"colours/test/{name}/0.png,{name},test" for name in COLOURS]
    leaky.write_text(
        "\n".join(["path,label,split", *rows, *test, rows[4].replace(",train", ",test")])
    )
    told = (
        "1 of 5 test images of leaky are among its training images, first colours/train/green/1.png"
    )
    quick: dict[str, Any] = {"recipe": RECIPE, "progress": False}
    model, trained = shared_backbone("clip"), {"seeds": (1, 2), "placement": ["2-3", "1-3"]}

    def said() -> int:
        count = caplog.messages.count(told)
        caplog.clear()
        return count

    table = train(model, [manifest, leaky], RECIPE, progress=False, **trained)
    noted = table["note"].str.contains(told, regex=False)
    assert said() == 1 and noted.sum() == 8  # two placements, halves and seeds
    assert (table[noted].dataset == "leaky").all() and set(table[noted].method) == {"MMA"}
    few = {**trained, "protocol": "cross-dataset", "progress": False}
    table = train(model, [manifest], RECIPE, targets=[leaky], **few)
    assert said() == 0 and not table["note"].str.contains("training images").any()
    search(model, [leaky], folds=2, amounts=["scale=5"], shots=2, **quick)
    assert said() == 1
    for amount in ("given", "tuned"):
        found = validate(
            model, CHOICE, [manifest, leaky], amount=amount, kinds=("all",), seeds=(1,), **quick
        )
        assert said() == 1 and found.verdict.startswith(f"{UNTRAINED}. WARNING: {told}. ")
    clean = validate(model, CHOICE, [manifest], kinds=("all",), seeds=(1,), amount="given", **quick)
    assert said() == 0 and "training images" not in clean.verdict


def test_a_run_in_which_training_changes_nothing_is_void_after_its_first_seed(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    still = RECIPE.changed({"lr": 1e-12}, {"scale": 1e-9})
    seen = trained_cells(monkeypatch)
    choice, model = CHOICE, shared_backbone("clip")
    (tmp_path / "validation_placements.csv").write_text("of an earlier run", encoding="utf-8")
    found = validate(
        model, choice, [manifest], recipe=still, seeds=(1, 2), together=1, out=tmp_path,
        kinds=("all", "vision"), progress=False, amount="given",
    )  # fmt: skip
    assert [seed for seed, _ in seen] == [1, 1, 1], "nothing more once the first seed shows it"
    assert found.void and "VOID: the recipe tiny (lr 1e-12, scale 1e-09)" in found.verdict
    assert f"changed no prediction of {model.name} on {manifest.name}, so" in found.verdict
    assert "--recipe mini" in found.verdict and "--set lr=1e-11 --set scale=1e-07" in found.verdict
    assert found.table["base"].tolist() == found.table["zero_shot_base"].tolist()
    assert json.loads((tmp_path / "validation.json").read_text())["void"] is True
    assert not (tmp_path / "validation_placements.csv").exists()
    assert reported.read(Run(tmp_path)) is None, "a report has nothing to show for it"
    assert void_verdict(Run(tmp_path)) == found.verdict
    moved = run(manifest, recipe=RECIPE.changed({"lr": 1.0, "epochs": 3}, {}), seeds=(1,))
    assert moved["changed"].any()


@pytest.mark.parametrize("together", [1, 12])
def test_a_dataset_that_training_does_not_change_does_not_end_a_run_on_others(
    together: int, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert manifest.source is not None
    shutil.copytree(manifest.source, tmp_path / "easy")
    easy, trained = Manifest.load(tmp_path / "easy"), []
    plain: Callable[..., Any] = Experiment.train_and_test

    def unmoved(self: Experiment, source: str, seed: int, settings: Any) -> Any:
        trained.append((source, seed))
        still = {"changed": 0.0, "note": UNMOVED} if source == "easy" else {}
        return [[row | still for row in rows] for rows in plain(self, source, seed, settings)]

    monkeypatch.setattr(Experiment, "train_and_test", unmoved)
    found = [
        validate(
            shared_backbone("clip"), CHOICE, data, recipe=RECIPE, seeds=(1, 2), kinds=("all",),
            amount="given", together=together, progress=False,
        )
        for data in ([easy, manifest], [manifest, easy])
    ]  # fmt: skip
    order = ["dataset", "seed", "placement"]
    tables = [one.table.sort_values(order, ignore_index=True) for one in found]
    assert not any(one.void for one in found)
    assert len(tables[0]) == 2 * 2 * 2, "placements, datasets, seeds"
    pd.testing.assert_frame_equal(*(one.drop(columns="seconds") for one in tables))
    half = [pair for pair, _ in groupby(trained[: len(trained) // 2])]
    assert half == [("easy", 1), (manifest.name, 1), ("easy", 2), (manifest.name, 2)]


@pytest.mark.parametrize("written", [0, 1, 2, 3])
def test_a_stop_between_its_files_leaves_no_mixture_of_two_validations(
    written: int, finished: Path, manifest: Manifest, tmp_path: Path, monkeypatch: Any
) -> None:
    """As of a disk that is full: the first one's verdict stood above cells of the second."""
    out, left = shutil.copytree(finished, tmp_path / "run"), [written]
    assert reported.read(Run(out)) is not None

    def stopping(write: Callable[..., Any], path: Path, content: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return write(path, content)

    for name in ("write_csv", "write_json"):
        monkeypatch.setattr(outcome, name, partial(stopping, getattr(outcome, name)))
    with pytest.raises(KeyboardInterrupt):
        run(manifest, out, kinds=("text",), choice="3", seeds=(1,))
    assert reported.read(Run(out)) is None


@pytest.mark.parametrize(
    ("held", "after", "expected"),
    [
        ("", "", "A1 B1"),
        ("", "B1", "A1 B1 A2 B2"),
        ("B1", "", "A1 B1 B1"),
        ("B1", "B1", "A1 B1 B1 A2 B2"),
        ("A1", "B1", "A1 B1 A2 B2"),
    ],
)
def test_first_seeds_that_another_process_holds_are_waited_for_while_nothing_moved(
    held: str, after: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Experiment("base-to-novel", shared_backbone("clip"), RECIPE, stop_unmoved=True)
    monkeypatch.setattr(one.identities, "cell", lambda *_: None)
    monkeypatch.setattr(one.cells, "read", lambda _: None)
    monkeypatch.setattr(one.cells, "others_hold", lambda _: False)
    found: dict[tuple[str, int], Any] = {}
    order = []
    for pair in one._in_turn(["A", "B"], [1, 2], [RECIPE], found):
        order.append(name := f"{pair[0]}{pair[1]}")
        known = name != held or pair in found
        found[pair] = [{"note": "" if name == after else UNMOVED}] if known else None
    assert " ".join(order) == expected


def test_a_finished_cell_is_not_trained_again(
    manifest: Manifest, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = pd.read_csv(finished / "validation.csv", keep_default_na=False)
    seen = trained_cells(monkeypatch)
    run(manifest, finished)
    assert seen == []
    next(finished.glob("cells/*v1-3,t1-3-s2-*.json")).unlink()
    again = run(manifest, finished)
    assert seen == [(2, "v1-3,t1-3")]
    pd.testing.assert_frame_equal(
        again.drop(columns="seconds"), before.drop(columns="seconds"), check_dtype=False
    )


def test_a_cell_of_another_process_is_waited_for_and_taken_over_when_it_dies(
    manifest: Manifest, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = next(finished.glob("cells/*v1-3,t1-3-s1-*.json"))
    cell.unlink()
    hold = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); "
        "print('held', flush=True); time.sleep(120)"
    )
    lock = finished / "locks" / f"{cell.stem}.lock"
    assert lock.exists()
    holder = subprocess.Popen([sys.executable, "-c", hold, str(lock)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    seen = trained_cells(monkeypatch)
    waiting = threading.Thread(target=run, args=(manifest, finished))
    waiting.start()
    waiting.join(1.5)
    assert waiting.is_alive()
    assert seen == []
    holder.kill()
    holder.wait()
    waiting.join(60)
    assert not waiting.is_alive()
    assert seen == [(1, "v1-3,t1-3")]
    assert cell.exists()


def test_two_at_once_train_every_cell_once(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = trained_cells(monkeypatch)
    models = [backbone("clip"), backbone("clip")]
    models[1].clip.load_state_dict(models[0].clip.state_dict())
    tables: list[pd.DataFrame] = []

    configs = [RECIPE.method.with_placement(*[blocks] * 2) for blocks in ((1,), (2,), (3,))]

    def work(model: Any) -> None:
        sweep = Experiment("base-to-novel", model, RECIPE, tmp_path, progress=False)
        tables.append(sweep.run([manifest], configs, (1, 2, 3), together=1))

    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(seen) == len(set(seen)) == 9
    assert len(tables) == 2
    pd.testing.assert_frame_equal(tables[0], tables[1])


WORKER = """
import sys
from pathlib import Path
from test_validate import RECIPE, Experiment
from backbones import backbone
from vlmlayers.manifests import Manifest
from vlmlayers.placement import Placement
import torch
data, out, log = map(Path, sys.argv[1:])
plain = Experiment.train_and_test
def told(self, source, seed, configs):
    with log.open("a") as file:
        file.writelines(f"{seed} {one.placement}\\n" for one in configs)
    return plain(self, source, seed, configs)
Experiment.train_and_test = told
model = backbone("clip")
with torch.no_grad():
    for n, weights in enumerate(model.clip.parameters()):
        weights.normal_(0, 0.05, generator=torch.Generator().manual_seed(n))
sweep = Experiment("base-to-novel", model, RECIPE, out, progress=False)
configs = [RECIPE.method.with_placement(b, b) for b in ((1,), (2,), (3,))]
table = sweep.run([data], configs, (1, 2, 3, 4), together=1)
print(len(table))
"""


PATHS = [str(Path(__file__).parent), *sys.path]  # a worker imports this module and its helpers


@pytest.mark.slow
def test_two_processes_share_a_sweep(manifest: Manifest, tmp_path: Path) -> None:
    source = next(iter({manifest.location(i).parents[2] for i in manifest.items("test")}))
    log = tmp_path / "trained"
    words = [sys.executable, "-c", WORKER, str(source), str(tmp_path / "out"), str(log)]
    place = {**os.environ, "PYTHONPATH": os.pathsep.join(PATHS), "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(words, env=place, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = [worker.communicate(timeout=900)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    trained = log.read_text().split("\n")[:-1]
    assert len(trained) == len(set(trained)) == 12
    assert said[0] == said[1]


def test_a_damaged_cell_is_named(manifest: Manifest, tmp_path: Path) -> None:
    run(manifest, tmp_path, seeds=(1,))
    cell = next(tmp_path.glob("cells/*v1-3*.json"))
    cell.write_text("{")
    with pytest.raises(UserError, match=r"v1-3.*is damaged .*remove it"):
        run(manifest, tmp_path, seeds=(1,))


FAMILIES["24 and 12 blocks"] = config({"layers": 24, "width": 32}, {"layers": 12})


@pytest.mark.parametrize(
    ("family", "chosen", "paper", "starts"),
    [
        ("depths differ", ((3, 4), (2,)), "v2-4,t1-2", 4),
        ("24 and 12 blocks", ((9, 24), (5,)), "v9-24,t5-12", 24),
    ],
)
def test_deep_and_unequal_towers(
    family: str, chosen: Any, paper: str, starts: int, manifest: Manifest
) -> None:
    model = shared_backbone(family)
    choice = LayerChoice(*chosen, "explicit")
    table = run(manifest, model=model, choice=choice, kinds=["start"], seeds=[1])
    assert label_of(table, "paper") == paper
    kinds = table["kind"].str.split("+")
    assert sum("start" in kind for kind in kinds) == starts
    assert table["vision"].str.split().map(lambda b: int(b[-1])).max() == len(
        model.towers["vision"].blocks
    )
    assert table["text"].str.split().map(lambda b: int(b[-1])).max() == len(
        model.towers["text"].blocks
    )
    assert np.isfinite(table[["base", "novel", "hm"]].to_numpy()).all()


def scores() -> pd.DataFrame:
    rows = [
        {"tower": tower, "position": str(b), "depth": b / 3, "value": b / 10}
        for tower in ("vision", "text")
        for b in (1, 2, 3)
    ]
    fixed = {"metric": "dataset_accuracy", "dataset": "*", "space": "native", "pooling": "model",
             "model": "m", "weights": "w", "split": "test", "n": 9, "seed": 0,
             "low": np.nan, "high": np.nan, "null": 0.0}  # fmt: skip
    extra = {"other_tower": "", "other_position": "", "options": ""}
    return pd.DataFrame(rows).assign(**fixed, **extra)[list(SCORE_COLUMNS)]


def context(folder: Path, manifest: Manifest, said: list[str], **options: Any) -> Any:
    small = {"lr": 0.05, "epochs": 1, "batch_size": 4, "dim": 4, "scale": 0.5}
    data = SimpleNamespace(manifest=manifest, options={"split": "train"})
    asked = {"shots": 2, "seeds": [1], "set": small, "amount": "given"} | options
    return SimpleNamespace(
        run=Run(folder), table=lambda name: asked,
        datasets=[data], manifests=[manifest], extracted_manifests=[manifest], data_root=None,
        load_model=lambda: shared_backbone("clip"),
        scores=scores(), choice=CHOICE, seed=0, echo=said.append, progress=False, base=folder,
        dataset_name=lambda name: name, leaving_out={},
    )  # fmt: skip


def test_the_stage_writes_what_the_report_reads(manifest: Manifest, tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "results.csv").write_text("of the stage train", encoding="utf-8")
    validate_stage.validate(context(tmp_path, manifest, said, kinds=["all", "lower", "text"]))
    assert (tmp_path / "results.csv").read_text(encoding="utf-8") == "of the stage train"
    found = reported.read(Run(tmp_path))
    assert found is not None
    assert (found.chosen, found.reference) == ("v2-3,t2-3", "v2-3,t2-3")
    assert len(found.cells) == 4
    assert set(found.placements["placement"]) == set(found.cells["placement"])
    assert {"relative_depth", "metric:dataset_accuracy"} <= set(found.predicted["score"])
    assert said == [f"validate 4 placements, 4 cells: {found.verdict}"]
    notes = json.loads((tmp_path / "validation.json").read_text())
    assert "chosen_on" not in notes, "this choice read no scores"
    assert (notes["recipe"]["shots"], notes["recipe"]["lr"], notes["settings"]["dim"]) == (
        2,
        0.05,
        4,
    )


def test_the_stage_records_where_its_datasets_are(manifest: Manifest, tmp_path: Path) -> None:
    """The next command is a verb's, which does not look under the data root of a study."""
    of_study = context(tmp_path, manifest, [], kinds=["all"], datasets=[manifest.name])
    of_study.dataset_name = lambda name: f"data/{name}"
    validate_stage.validate(of_study)
    assert Run(tmp_path).read_provenance()["validate"]["datasets"] == [f"data/{manifest.name}"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": [1]}, r"\[validate\]: unknown key 'seed'; did you mean 'seeds'"),
        ({"seeds": ["a"]}, "seeds.*'a'"),
        ({"shots": "sixteen"}, "shots.*'sixteen'"),
        ({"shots": 0}, "shots.*at least 1"),
        ({"set": {"learning": 1}}, "unknown key 'learning'"),
        ({"kinds": ["uper"]}, "unknown kind of placement 'uper'.*upper"),
        ({"datasets": ["caltech102"]}, "caltech101"),
        ({"recipe": "minis"}, "unknown recipe of mma 'minis'"),
    ],
)
def test_wrong_stage_options_are_named(
    options: dict[str, Any], message: str, manifest: Manifest, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        validate_stage.validate(context(tmp_path, manifest, [], **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": []}, "there is no seed to validate on"),
        ({"kinds": []}, "kinds is ..; a list of at least 1 is needed"),
        ({"kinds": ["alll"]}, "unknown kind of placement 'alll'"),
        ({"reference": "papr"}, "unknown reference 'papr'"),
        ({"reference": "random", "random_count": 0}, "of which MMA has no placement beside the c"),
        ({"reference": "text", "choice": "v2-3"}, "of which MMA has no placement beside the c"),
        ({"choice": LayerChoice((), (), "explicit")}, "adapts no block in either tower"),
        ({"choice": LayerChoice((9,), (), "explicit")}, "vision block 9, but the vision tower has"),
    ],
)
def test_wrong_arguments_are_named(
    options: dict[str, Any], message: str, manifest: Manifest
) -> None:
    with pytest.raises(UserError, match=message):
        run(manifest, **options)


def test_nothing_to_test_on_is_named(manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no dataset to validate on"):
        validate(shared_backbone("clip"), CHOICE, [], recipe=RECIPE)
    for split in ("train", "test"):
        (tmp_path / "one" / split / "only").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "one" / split / "only" / "0.png")
    with pytest.raises(UserError, match="has one class"):
        run(Manifest.load(tmp_path / "one"))
    table = run(manifest, seeds=(1,))
    with pytest.raises(UserError, match="no placement of kind 'lower'"):
        summarise(table, reference="lower")
    for empty in (table[:0], table.assign(comparison="both"), table[:0].drop(columns="comparison")):
        with pytest.raises(UserError, match="validation table"):
            summarise(empty)


def test_a_summary_counts_the_runs_that_its_numbers_are_of(manifest: Manifest) -> None:
    table = run(manifest, seeds=(1, 2)).query("comparison == 'given'")
    last = table.index[-1]
    assert summarise(table).summary["seeds"] == [1, 2]
    assert summarise(table.drop(last)).summary["seeds"] == [1]
    table.loc[last, ["base", "hm"]] = np.nan
    assert summarise(table).summary["seeds"] == [1]


def test_a_training_that_both_comparisons_share_is_counted_once(manifest: Manifest) -> None:
    given = run(manifest, seeds=(1,)).query("comparison == 'given'")
    tuned = given.assign(comparison="tuned", seconds=50.0)
    tuned.loc[tuned.index[0], "amount"] = "@0.3"
    both = pd.concat([tuned, given.assign(seconds=50.0)], ignore_index=True)
    expected = 50.0 * (len(given) + 1)  # side by side, each takes an equal share of the time
    assert summarise(both).summary["training_seconds"] == pytest.approx(expected, abs=0.1)


def test_what_is_said_beside_tuned_amounts_is_of_the_recipes(manifest: Manifest) -> None:
    given = run(manifest, seeds=(1,)).query("comparison == 'given'")
    tuned = given.assign(comparison="tuned", hm=given["hm"] + 7)
    found = summarise(pd.concat([tuned, given], ignore_index=True))
    own = given.loc[given["placement"] == found.summary["chosen"], "hm"].item()
    assert f"harmonic mean {own:.1f}" in found.summary["untuned"]["verdict"]
    assert f"harmonic mean {own + 7:.1f}" in found.summary["verdict"]
    assert found.untuned is not None
    plain = found.untuned.set_index("placement")["hm"]
    assert plain[found.summary["chosen"]] == pytest.approx(own)


def test_the_verb(manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmadapters.cli import validate as validate_verb
    from vlmlayers.cli import app

    monkeypatch.setattr(validate_verb, "load_backbone", lambda *_: shared_backbone("clip"))
    source = str(next(iter({manifest.location(i).parents[2] for i in manifest.items("test")})))
    small = ["lr=0.05", "epochs=1", "batch_size=4", "shots=2", "dim=4", "scale=0.5"]
    words = ["validate", "mini-clip", source, "--out", str(tmp_path), "--seeds", "1", "--quiet"]
    words += [
        "--amount",
        "given",
        "--kinds",
        "all,lower",
        *(part for one in small for part in ("-s", one)),
    ]
    done = CliRunner().invoke(app, [*words, "--placement", "2-3"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "RANDOM weights" in done.output
    said = json.loads((tmp_path / "validation.json").read_text())["verdict"]
    assert said in " ".join(done.output.split())
    shown = [line for line in done.output.splitlines() if str(tmp_path) not in line]
    assert max(map(len, shown)) <= 80
    CHOICE.save(tmp_path / "choice.json")
    backbone = shared_backbone("clip")
    ours = scores().assign(model=backbone.name, weights=backbone.weights)
    ours.to_csv(tmp_path / "scores.csv", index=False)
    write_json(tmp_path / "provenance.json", {"validate": {"seeds": [9]}, "seed": 3})  # a study's
    again = [*words, "--choice", str(tmp_path), "--present-only", "--workers", "0"]
    done = CliRunner().invoke(app, again, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "validation_correlations.csv").exists()
    recorded = Run(tmp_path).read_provenance()
    # Without it the command that the report advises is refused for the images that are not there.
    advised = next_steps(read_answer(tmp_path))[0].code.split()
    assert "--present-only" in advised and "--workers" not in advised
    assert recorded["seed"] == 3 and recorded["validate"]["datasets"] == [source]
    assert recorded["validate"]["seeds"] == [1] and recorded["validate"]["set"]["shots"] == 2
    assert recorded["validate"]["kinds"] == ["all", "lower"]
    # No training changed an answer: no mistake of the user's, and no result for a script either.
    still = [*words, "--placement", "2-3", "--out", str(tmp_path / "still")]
    still = ["lr=1e-12" if one == "lr=0.05" else one for one in still]
    still = ["scale=1e-9" if one == "scale=0.5" else one for one in still]
    done = CliRunner().invoke(app, still, catch_exceptions=False)
    assert done.exit_code == 2 and "VOID" in done.output and "difference:" not in done.output
    for wrong in ([], ["--placement", "2-3", "--choice", "x"]):
        with pytest.raises(UserError, match="exactly one of --choice and --placement"):
            CliRunner().invoke(app, words + wrong, catch_exceptions=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.assign(value=np.nan), "dataset_accuracy of the vision tower is not finite"),
        (lambda s: s[s["position"] != "3"], "block"),
        (lambda s: s.drop(columns="null"), "lacks the columns null"),
        (lambda s: "runs/mine", "scores takes a score table"),
    ],
)
def test_scores_that_cannot_predict_are_refused_before_training(
    change: Callable[[pd.DataFrame], Any], message: str, manifest: Manifest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(Experiment, "run", lambda *_, **__: pytest.fail("it trained"))
    with pytest.raises(UserError, match=message):
        run(manifest, scores=change(scores()))


def test_scores_of_another_model_are_told_and_a_dataset_is_tuned_on_once(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Stop(Exception):
        pass

    def track(data: Any, *_: Any, **__: Any) -> None:
        raise Stop(len(data))

    monkeypatch.setattr("vlmadapters.validation.validate.Track", track)
    with pytest.raises(Stop, match="^1$"):
        validate(
            shared_backbone("clip"), CHOICE, [manifest, manifest], recipe=RECIPE,
            scores=scores(), seeds=(1, 2), kinds=("all",), progress=False,
        )  # fmt: skip
    assert "the scores that predict are of m (w), not of " in caplog.text


@pytest.mark.parametrize("start", ["validate", "train", "train at its path"])
def test_a_choice_of_another_model_is_told(
    start: str, tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Its blocks are there in a model of equal depth, and were not chosen for it."""
    monkeypatch.setattr(Experiment, "run", lambda *_, **__: sys.exit("it trains"))
    model = shared_backbone("clip")
    ours = {"model": model.name, "weights": model.weights}
    same, other = ({"weights_hash": one} for one in (model.weights_hash, "0123456789abcdef"))
    for evidence, told in (
        (ours, ""),
        (ours | same, ""),
        (ours | other, f"{model.name} ({model.weights}, 0123456789ab)"),
        ({"model": "m", "weights": "w"}, "m (w)"),
    ):
        caplog.clear()
        choice = replace(CHOICE, evidence=evidence)
        path = choice.save(tmp_path / "choice.json")
        with pytest.raises(SystemExit, match="it trains"):
            if start == "validate":
                validate(model, choice, [manifest], recipe=RECIPE, amount="given")
            else:
                train(model, [manifest], RECIPE, placement=[choice if start == "train" else path])
        text = caplog.text
        assert (f"the choice was made from scores of {told}, not of " in text) == bool(told), text
        assert told or "made from scores" not in text


def test_a_choice_among_another_number_of_blocks_is_not_trained(manifest: Manifest) -> None:
    towers = {"vision": {"depth": 12}, "text": {"depth": 12}}
    choice = replace(CHOICE, evidence={"towers": towers})
    for start in (
        lambda model: validate(model, choice, [manifest], recipe=RECIPE, amount="given"),
        lambda model: train(model, [manifest], RECIPE, placement=[choice]),
    ):
        with pytest.raises(UserError, match="made among 12 vision blocks, and the vision tower"):
            start(shared_backbone("clip"))
