"""Protocols from the draw to the table: what is tested, resumed, summarised and said."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from backbones import saved_backbone, shared_backbone
from PIL import Image
from scipy.stats import binomtest
from typer.testing import CliRunner

from vlmadapters.cli.terminal import results_text
from vlmadapters.clip.frozen import Backbone
from vlmadapters.data.fewshot import few_shot
from vlmadapters.data.images import Images, Room
from vlmadapters.data.options import DataOptions
from vlmadapters.data.task import Task
from vlmadapters.methods.base import Method
from vlmadapters.methods.head_configs import TipConfig
from vlmadapters.methods.mma.config import MMAConfig
from vlmadapters.methods.mma.module import new_adapter
from vlmadapters.methods.tip import Tip
from vlmadapters.protocols.cells import Cell, CellFolder
from vlmadapters.protocols.evaluate import Evaluator
from vlmadapters.protocols.experiment import Experiment
from vlmadapters.protocols.published import published_titles, with_published
from vlmadapters.protocols.results import (
    COLUMNS,
    UNMOVED,
    UNMOVED_FIT,
    UNMOVED_TEST,
    ZERO_SHOT_CLIP,
    ZERO_SHOT_METHODS,
    ZERO_SHOT_OWN,
    accuracy_fields,
    half_fields,
    names,
    summarise,
)
from vlmadapters.protocols.train import base_to_novel, train
from vlmadapters.protocols.trained import evaluate_methods
from vlmadapters.training.recipes import Recipe, TrainConfig, load_recipe
from vlmadapters.training.trainer import Trainer
from vlmadapters.validation.methods import compare_methods
from vlmlayers.errors import UserError
from vlmlayers.figures.published import published
from vlmlayers.files import lock
from vlmlayers.manifests import Item, Manifest
from vlmlayers.manifests.items import balanced_sample
from vlmlayers.models.decoding import decode_pixels
from vlmlayers.placement import Placement

CONFIG = MMAConfig.span(2, 3, dim=4, scale=0.3)
RECIPE = Recipe("test", TrainConfig(lr=0.3, epochs=1, batch_size=8, shots=2), CONFIG)
QUICK: dict[str, Any] = {"items": 48, "progress": False}


def run(out: Path | None = None, **options: Any) -> pd.DataFrame:
    values = {"seeds": (1, 2), "recipe": RECIPE, **QUICK, **options}
    return base_to_novel(shared_backbone(), ["shapes_filled"], out=out, **values)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    return run(tmp_path_factory.mktemp("out"))


def test_a_script_written_for_the_first_version_runs() -> None:
    given = shared_backbone(), ["shapes_filled"], RECIPE, None
    found = base_to_novel(*given, seeds=(1,), limit=24, progress=False)
    assert set(found["n"]) == {12} and set(found["protocol"]) == {"base-to-novel"}
    with pytest.raises(UserError, match="unknown argument 'limit'"):
        base_to_novel(*given, limit=24, items=24)


def test_the_table_has_both_halves_every_seed_and_both_baselines(table: pd.DataFrame) -> None:
    assert tuple(table.columns) == COLUMNS
    trained = table[table.method == "MMA"]
    assert sorted(zip(trained.split_kind, trained.seed)) == [
        ("base", 1), ("base", 2), ("novel", 1), ("novel", 2),
    ]  # fmt: skip
    assert (table.method == ZERO_SHOT_CLIP).sum() == 2
    assert table.method.nunique() == 3
    assert table.accuracy.between(table.low, table.high).all()
    assert set(trained.placement) == {"v2-3,t2-3"}
    assert (trained.shots == 2).all()
    assert table.random_weights.all()


def test_a_sweep_decodes_each_test_image_once_where_those_of_one_dataset_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: Counter[tuple[str, str]] = Counter()
    plain = Manifest.open_image

    def told(manifest: Manifest, item: Item, *arguments: Any, **options: Any) -> Any:
        opened[manifest.name, item.path] += 1
        return plain(manifest, item, *arguments, **options)

    monkeypatch.setattr(Manifest, "open_image", told)
    names = ("shapes_filled", "shapes_outline")
    several = [CONFIG, MMAConfig.span(3, 3, dim=4, scale=0.3)]
    tested = [
        (name, item.path)
        for name in names
        for item in balanced_sample(Manifest.load(name).items("test"), 16, 0)
    ]
    tables = []
    for images_that_fit, times in ((1000, {1}), (60, {1}), (0, {5})):
        room = Room(images_that_fit * 3 * 32 * 32)
        monkeypatch.setattr("vlmadapters.data.images.shared_room", lambda device, room=room: room)
        opened.clear()
        experiment = Experiment(
            "base-to-novel",
            shared_backbone(),
            RECIPE,
            options=DataOptions(items=16),
            progress=False,
        )
        table = experiment.run(names, several, seeds=(1, 2), together=1)
        assert {opened[one] for one in tested} == times  # without room: 4 cells and zero-shot
        assert room.used <= room.limit
        tables.append(table.drop(columns="seconds"))
    for other in tables[1:]:
        pd.testing.assert_frame_equal(tables[0], other, check_exact=True)


def trained_cells(folder: Path) -> list[Path]:
    return sorted(p for p in (folder / "cells").iterdir() if "zero-shot" not in p.name)


def test_a_stop_between_the_files_of_a_group_leaves_no_state_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(folder: CellFolder, cell: Cell, rows: Any) -> None:
        if trained_cells(tmp_path):
            raise KeyboardInterrupt
        write(folder, cell, rows)

    write = CellFolder.write
    (tmp_path / "cells").mkdir()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CellFolder, "write", stop)
        run(tmp_path, seeds=1, placement=["2", "3"])
    assert len(trained_cells(tmp_path)) == 1
    assert list((tmp_path / "unfinished").glob("*/training.pt"))
    run(tmp_path, seeds=1, placement=["2", "3"])
    assert len(trained_cells(tmp_path)) == 2
    assert not (tmp_path / "unfinished").exists()


def test_what_a_process_left_that_was_killed_as_it_began_is_removed(tmp_path: Path) -> None:
    """Nothing names its cells, so that no run in other groups ever removed it."""
    left = tmp_path / "unfinished" / "0123456789abcdef"
    left.mkdir(parents=True)
    (left / ".cells.json.4194305-1.part").touch()
    other = CellFolder(tmp_path).begin([Cell("of another process", {})])
    run(tmp_path, seeds=1, placement="2")
    assert list((tmp_path / "unfinished").iterdir()) == [other]


def test_a_finished_run_is_read_where_nothing_can_be_written(tmp_path: Path) -> None:
    run(tmp_path, seeds=1, placement="2")
    shutil.rmtree(tmp_path / "locks")
    CellFolder(tmp_path).forget()
    assert not (tmp_path / "locks").exists()


def test_adapters_that_an_earlier_command_did_not_keep_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As after `validate` in one folder: `train` ended well and left no adapter there."""
    options = {"seeds": (1,), "items": 8, "progress": False}
    given = shared_backbone(), ["shapes_filled"], RECIPE, tmp_path
    train(*given, **options)
    assert "lacks" not in caplog.text
    train(*given, save_adapters=True, **options)
    (cell,) = (tmp_path / "cells").glob("*-mma-*.json")
    assert "adapters lacks 1 adapter: " in caplog.text and str(cell) in caplog.text
    caplog.clear()
    cell.unlink()
    train(*given, save_adapters=True, **options)
    assert [path.stem for path in (tmp_path / "adapters").glob("*.safetensors")] == [cell.stem]
    assert "lacks" not in caplog.text


def test_a_finished_cell_is_not_trained_again(tmp_path: Path) -> None:
    first = run(tmp_path)
    cells = {p: p.stat().st_mtime_ns for p in trained_cells(tmp_path)}
    assert len(cells) == 2
    again = run(tmp_path)
    assert cells == {p: p.stat().st_mtime_ns for p in trained_cells(tmp_path)}
    pd.testing.assert_frame_equal(first, again)
    next(iter(cells)).unlink()
    pd.testing.assert_frame_equal(
        first.drop(columns="seconds"), run(tmp_path).drop(columns="seconds")
    )
    assert not (tmp_path / "unfinished").exists()
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "results.csv", keep_default_na=False)[["seed", "accuracy"]],
        first[["seed", "accuracy"]],
    )


def test_a_run_that_is_killed_before_its_cell_is_written_does_not_train_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(seeds=(1,))

    def killed(cells: CellFolder, cell: Cell, rows: Any) -> None:
        if "mma" in cell.name:
            raise KeyboardInterrupt

    def trained(trainer: Trainer, *_: Any) -> None:
        pytest.fail("trained again")

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(CellFolder, "write", killed)
        run(tmp_path, seeds=(1,))
    monkeypatch.setattr(Trainer, "update", trained)
    again = run(tmp_path, seeds=(1,))
    pd.testing.assert_frame_equal(first.drop(columns="seconds"), again.drop(columns="seconds"))


def test_the_table_holds_the_cells_of_earlier_commands(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def stored() -> pd.DataFrame:
        file = tmp_path / "results.csv"
        return pd.read_csv(file, keep_default_na=False, float_precision="round_trip")

    low, high = (CONFIG.with_placement(blocks, blocks) for blocks in ((2,), (3,)))
    first = run(tmp_path, configs=[low], seeds=(1,))
    second = run(tmp_path, configs=[high], seeds=(2,))
    assert set(second[second.method == "MMA"].placement) == {"v3,t3"}
    both = stored()
    assert not both.duplicated(list(COLUMNS[:10])).any()
    assert len(both) == len(first) + len(second) - (first.method != "MMA").sum()
    kept = both[both.placement == "v2,t2"]
    assert kept.accuracy.tolist() == first[first.method == "MMA"].accuracy.tolist()
    assert "leaves out" not in caplog.text

    run(tmp_path, configs=[replace(low, scale=0.2)], seeds=(1,))  # no column tells scales apart
    assert "leaves out 2 finished cells of another recipe" in caplog.text
    assert len(stored()) == len(first)
    next(iter((tmp_path / "cells").glob("*v3,t3*"))).write_text("{", encoding="utf-8")
    run(tmp_path, configs=[low], seeds=(1,))
    assert "is damaged" in caplog.text and len(stored()) == len(first)


def test_recipes_settings_and_shots_of_one_method_stay_apart() -> None:
    others = {
        "plain": RECIPE,
        "epochs": RECIPE.changed({"epochs": 2}),
        "scale": RECIPE.changed({}, {"scale": 0.2}),
        "shots": RECIPE.changed({"shots": 1}),
    }
    found = run(configs=list(others.values()))
    trained = found[found.method == "MMA"]
    assert len(trained) == 4 * 4, "two halves, two seeds"
    alone = run(configs=[others["epochs"]])
    summary = summarise(found)
    epochs = summary[summary.recipe.str.contains("epochs=2")].set_index("metric")
    alone = summarise(alone).query("method == 'MMA'").set_index("metric")
    assert epochs["mean"].tolist() == alone["mean"].tolist()
    shown = names(trained).drop_duplicates().tolist()
    assert [len(set(shown)), *("shots" in one for one in shown)] == [4, True, True, True, True]
    assert ["scale=0.2" in one for one in shown] == [False, False, True, False]
    assert ["epochs=2" in one for one in shown] == [False, True, False, False]
    text = results_text(summary)
    assert all(text.count(f"  {name}, 2 seeds\n") == 1 for name in shown)
    assert set(compare_methods(found).method) == {*shown, ZERO_SHOT_CLIP}


def test_settings_that_follow_the_dataset_are_not_named_as_those_of_all() -> None:
    of_dataset = replace(RECIPE, datasets={"shapes_filled": {"settings": {"scale": 0.2}}})
    followed, fixed = (
        found[found.method == "MMA"].reset_index(drop=True)
        for found in (
            run(seeds=(1,), recipe=recipe)
            for recipe in (of_dataset, RECIPE.changed({}, {"scale": 0.2}))
        )
    )
    assert followed["log_likelihood"].equals(fixed["log_likelihood"])
    assert fixed["settings"].str.contains("scale=0.2").all()
    assert not followed["settings"].str.contains("scale").any()
    assert followed["settings"].str.contains("dim=").all()


def test_one_cell_serves_two_names_of_the_same_values(tmp_path: Path) -> None:
    lr = RECIPE.train.lr
    tables = [run(tmp_path, seeds=1, placement=["2", f"2@lr={lr}"]) for _ in range(2)]
    for table in tables:  # the second reads what the first has written
        assert set(table.placement) == {"", "v2,t2", f"v2,t2@lr={lr}"}
    columns = tables[0].columns.drop("seconds")
    pd.testing.assert_frame_equal(tables[0][columns], tables[1][columns])


def test_a_cell_that_an_earlier_command_named_otherwise_stands_in_the_table_once(
    tmp_path: Path,
) -> None:
    """Of an amount and of a recipe with its values; both names stood there, as two settings."""
    run(tmp_path, seeds=(1, 2), placement=["2@lr=0.2", "3@lr=0.2"])
    run(tmp_path, recipe=RECIPE.changed({"lr": 0.2}), seeds=(1,), placement=["2"])
    stored = pd.read_csv(tmp_path / "results.csv", keep_default_na=False)
    trained = stored[stored.seed > 0]
    assert set(trained.placement) == {"v2,t2", "v3,t3"} and trained.recipe.nunique() == 1
    assert len(trained) == 2 * 2 * 2  # placements, seeds, halves
    run(tmp_path, seeds=(1,), placement=["2@lr=0.2"])
    stored = pd.read_csv(tmp_path / "results.csv", keep_default_na=False)
    assert set(stored[stored.seed > 0].placement) == {"v2,t2@lr=0.2", "v3,t3@lr=0.2"}
    assert "lr" not in stored.recipe.iloc[-1]


def test_a_results_file_as_pandas_reads_it_is_summarised(tmp_path: Path) -> None:
    """Empty notes and placements are NaN there."""
    found = run(tmp_path, seeds=(1,))
    columns = ["method", "dataset", "metric", "mean", "seeds"]
    read = summarise(pd.read_csv(tmp_path / "results.csv"))
    pd.testing.assert_frame_equal(read[columns], summarise(found)[columns])
    # Joined with a table in memory, zero-shot CLIP was two methods, without an average.
    joined = pd.concat([found, pd.read_csv(tmp_path / "results.csv").assign(dataset="other")])
    average = summarise(joined).query("dataset == 'average'")
    assert set(average["method"]) == set(found["method"])


def test_the_seconds_of_a_summary_are_of_trainings_not_of_rows() -> None:
    """A dataset of one half has one row, another two rows of the same training."""
    halves = [("a", "base", 10.0), ("a", "novel", 10.0), ("b", "base", 40.0)]
    rows = [
        {"protocol": "base-to-novel", "method": "MMA", "model": "m", "weights": "w", "seed": 1,
         "dataset": dataset, "source": dataset, "split_kind": kind, "placement": "v1", "shots": 4,
         "accuracy": 0.5, "note": "", "parameters": 5, "seconds": seconds}
        for dataset, kind, seconds in halves
    ]  # fmt: skip
    assert set(summarise(pd.DataFrame(rows))["seconds"]) == {25.0}


def test_another_recipe_has_cells_of_its_own_and_the_log_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "vlmadapters.protocols.cells")
    for out, recipe, why in (
        (None, RECIPE, "nothing is kept on disk"),
        (tmp_path, RECIPE, f"there is no {tmp_path}"),
        (tmp_path, RECIPE.changed({"lr": 0.1}, {}), "train.lr is 0.3 there, 0.1 here"),
    ):
        caplog.clear()
        run(out, seeds=(1,), recipe=recipe)
        (said,) = [one for one in caplog.messages if "has to be made" in one]
        assert why in said
    assert len(trained_cells(tmp_path)) == 2


def test_placements_in_one_group_are_those_of_single_runs() -> None:
    configs = [CONFIG, MMAConfig.span(1, 3, dim=4, scale=0.3)]
    together = run(configs=configs, seeds=(1,))
    single = pd.concat([run(configs=[c], seeds=(1,)) for c in configs]).drop_duplicates(
        ["method", "split_kind", "placement"]
    )
    columns = ["method", "split_kind", "placement"]
    left = together.set_index(columns).accuracy.sort_index()
    assert left.equals(single.set_index(columns).accuracy.sort_index())


def test_processes_that_decode_beside_a_training_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vlmadapters.data.images.WORTH_STARTING", 16)
    told = [run(workers=workers).drop(columns="seconds") for workers in (0, 2)]
    pd.testing.assert_frame_equal(*told)


def test_the_images_of_the_first_steps_are_decoded_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of their draw, the first batch would wait for nearly all of them."""
    monkeypatch.setattr("vlmadapters.data.images.WORTH_STARTING", 16)
    decoded: list[str] = []
    seen: list[str] = []

    def noted(makers: Any, **options: Any) -> Any:
        decoded.extend(make.args[3].path for make in makers)
        return decode_pixels(makers, **options)

    def augmented(self: Images, items: Any, *given: Any, **options: Any) -> Any:
        seen.extend(item.path for item in items)
        return augments(self, items, *given, **options)

    augments = Images.augmented
    monkeypatch.setattr("vlmadapters.data.images.decode_pixels", noted)
    monkeypatch.setattr(Images, "augmented", augmented)
    run(seeds=(1,), workers=2)
    first = list(dict.fromkeys(seen))
    assert len(first) >= 8
    assert decoded[: len(first)] == first


def test_the_images_of_the_next_dataset_are_decoded_beside_the_last_seed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("vlmadapters.data.images.WORTH_STARTING", 16)
    names, told = ["shapes_filled", "textures"], list[str]()
    trains = Experiment.train_and_test

    def noted(makers: Any, **options: Any) -> Any:
        told.append("decode " + ", ".join(dict.fromkeys(make.args[0].name for make in makers)))
        return decode_pixels(makers, **options)

    def training(self: Experiment, source: str, seed: int, settings: Any) -> Any:
        told.append(f"train {source} {seed}")
        return trains(self, source, seed, settings)

    monkeypatch.setattr("vlmadapters.data.images.decode_pixels", noted)
    monkeypatch.setattr(Experiment, "train_and_test", training)

    def table(workers: int, out: Path | None = None) -> pd.DataFrame:
        options = {**QUICK, "workers": workers, "seeds": (1, 2)}
        told.clear()
        return base_to_novel(shared_backbone(), names, RECIPE, out, **options).drop(
            columns="seconds"
        )

    expected = table(0)
    pd.testing.assert_frame_equal(table(2, tmp_path), expected)
    assert told == [
        "train shapes_filled 1", "decode shapes_filled", "train shapes_filled 2",
        "decode textures", "train textures 1", "decode textures", "train textures 2",
    ]  # fmt: skip
    for file in (tmp_path / "cells").glob("shapes_filled-mma-*-s2-*"):
        file.unlink()
    table(2, tmp_path)  # goes on: nothing comes after it
    assert told == ["train shapes_filled 2", "decode shapes_filled"]


def test_each_draw_is_made_once_and_looked_through_in_its_turn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With `skip_unreadable`, whose look decodes all of a dataset that comes next."""
    names, told, draws = ["shapes_filled", "textures"], list[str](), list[tuple[Any, ...]]()
    trains, looks = Experiment.train_and_test, Images.unreadable

    def training(self: Experiment, source: str, seed: int, settings: Any) -> Any:
        told.append(f"train {source}")
        return trains(self, source, seed, settings)

    def looking(self: Images, *given: Any, **options: Any) -> Any:
        told.append(f"look {self.manifest.name}")
        return looks(self, *given, **options)

    def drawing(items: list[Item], *given: Any) -> list[Item]:
        draws.append((items[0], *given))
        return few_shot(items, *given)

    monkeypatch.setattr(Experiment, "train_and_test", training)
    monkeypatch.setattr(Images, "unreadable", looking)
    monkeypatch.setattr("vlmadapters.data.task.few_shot", drawing)
    options = {**QUICK, "seeds": (1,), "skip_unreadable": True}
    base_to_novel(shared_backbone(), names, RECIPE, tmp_path, **options)
    assert told.index("train textures") < told.index("look textures")
    assert len(draws) == len(set(draws))


def test_datasets_that_others_work_on_come_last_and_the_table_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process then decodes few datasets, where all of them once decoded all."""
    names = ["shapes_filled", "shapes_outline", "textures"]

    def table(out: Path) -> pd.DataFrame:
        found = base_to_novel(shared_backbone(), names, RECIPE, out, seeds=(1, 2), **QUICK)
        return found.drop(columns="seconds")

    expected = table(tmp_path / "alone")
    locks = sorted((tmp_path / "alone" / "locks").glob("shapes_filled-mma-*-s2-*"))
    out, order = tmp_path / "shared", []
    (out / "locks").mkdir(parents=True)
    other = lock(out / "locks" / locks[0].name, wait=False)
    trains = Experiment.train_and_test

    def noted(self: Experiment, source: str, seed: int, settings: Any) -> Any:
        order.append((source, seed))
        if order == [("shapes_outline", 1)]:
            assert other is not None
            other.close()  # the other process dies, and leaves what it had not finished
        return trains(self, source, seed, settings)

    monkeypatch.setattr(Experiment, "train_and_test", noted)
    pd.testing.assert_frame_equal(table(out), expected)
    assert order == [(name, seed) for name in (*names[1:], names[0]) for seed in (1, 2)]


def test_transfer_tests_every_class_of_every_target(caplog: pytest.LogCaptureFixture) -> None:
    targets = ["shapes_outline", "textures"]
    for protocol in ("cross-dataset", "domain-generalization"):
        found = train(shared_backbone(), "shapes_filled", RECIPE, protocol=protocol,
                      targets=targets, seeds=(1,), **QUICK)  # fmt: skip
        trained = found[found.method == "MMA"]
        assert list(trained.dataset) == ["shapes_filled", *targets]
        assert set(trained.source) == {"shapes_filled"}
        assert set(trained.split_kind) == {"all"}
        told = [one for one in caplog.messages if "whose shift it is to be" in one]
        # The classes of `shapes_outline` are those of the source, those of `textures` are not.
        assert [one.split(", such")[0].split(" of ")[-1] for one in told] == (
            ["textures"] if protocol == "domain-generalization" else []
        )
    summary = summarise(found)
    # Zero-shot CLIP, which was trained on nothing, is averaged over the same targets.
    for method in ("MMA", *ZERO_SHOT_METHODS):
        ours = summary[(summary.method == method)].set_index("dataset")["mean"]
        assert list(ours.index) == ["shapes_filled", *targets, "average"]
        assert ours["average"] == pytest.approx(ours[targets].mean())


@pytest.mark.parametrize("split", ["test", "val"])
def test_what_is_tested_chooses_no_setting(split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tip-Adapter searched alpha and beta on validation items that were then tested."""
    given: list[Any] = []
    monkeypatch.setattr(Tip, "finish", lambda method, data: given.append(data.validation))
    options = {"recipe": "mini", "method": ["tip"], "seeds": (1,), "items": 16, "progress": False}
    train(shared_backbone(), ["shapes_filled"], split=split, **options)
    assert [one is None for one in given] == [split == "val"]


def test_a_source_among_its_targets_is_tested_once(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"protocol": "cross-dataset", "seeds": (1,), **QUICK}
    tested: list[str] = []
    answers = Evaluator.answers

    def noted(own: Evaluator, images: Images, *given: Any) -> list[Any]:
        tested.append(images.manifest.name)
        return answers(own, images, *given)

    monkeypatch.setattr(Evaluator, "answers", noted)
    names = ["textures", "shapes_filled"]
    among = train(shared_backbone(), "shapes_filled", RECIPE, targets=names, **options)
    assert sorted(tested) == 2 * ["shapes_filled"] + 2 * ["textures"]
    apart = train(shared_backbone(), "shapes_filled", RECIPE, targets=names[:1], **options)
    # Its answers counted twice in the share that training changed.
    pd.testing.assert_frame_equal(among.drop(columns="seconds"), apart.drop(columns="seconds"))


def test_one_placement_may_be_a_value_or_a_mapping() -> None:
    """What `search` returns as its placement was taken apart and refused as a layer choice."""
    for one in (Placement((2,), (3,)), {"vision": (2,), "text": (3,)}, [Placement((2,), (3,))]):
        found = run(seeds=(1,), placement=one)
        assert set(found.placement) == {"", "v2,t3"}


def test_few_shot_trains_all_classes() -> None:
    found = train(shared_backbone(), ["shapes_filled"], RECIPE, protocol="few-shot", seeds=(3,),
                  **QUICK)  # fmt: skip
    assert set(found.split_kind) == {"all"}
    assert set(found.seed) == {-1, 3}


def test_a_training_that_changed_nothing_says_so(caplog: pytest.LogCaptureFixture) -> None:
    idle = RECIPE.changed({"lr": 1e-9}, {"scale": 1e-9})
    found = base_to_novel(shared_backbone(), ["shapes_filled"], idle, seeds=(1, 2), **QUICK)
    trained = found[found.method == "MMA"]
    assert set(trained.note) == {UNMOVED}
    assert (trained.changed == 0).all()
    assert sum(UNMOVED in one.getMessage() for one in caplog.records) == 1  # of two cells
    assert summarise(found).query("method == 'MMA'").note.eq(UNMOVED).all()


@pytest.mark.parametrize(
    ("method", "note"),
    [("tip", UNMOVED_FIT), ("linear-probe", UNMOVED_FIT), ("clipadapter", UNMOVED)],
)
def test_what_has_no_rate_is_not_told_to_raise_it(
    method: str, note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlmadapters.protocols.experiment.EFFECT", 2.0)  # no change is as large
    recipe = load_recipe("mini", method).replaced({"shots": 2, "epochs": 1}, {})
    found = train(shared_backbone(), ["shapes_filled"], recipe, protocol="few-shot", seeds=(1,),
                  **QUICK)  # fmt: skip
    assert set(found[found.seed == 1].note) == {note}


def test_a_test_whose_answers_are_those_of_zero_shot_clip_says_so() -> None:
    """As of a linear probe that does not know all classes, whose row bore its name alone."""
    model = shared_backbone()
    moved = new_adapter(model.clip, MMAConfig.span(2, 3, dim=4, scale=5.0), seed=1)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in moved.parameters():
            value.normal_(generator=random)
    still = new_adapter(model.clip, MMAConfig.span(2, 3, dim=4, scale=0.0), seed=1)
    moved.touch()
    methods = {Path("moved"): moved, Path("still"): still}
    found = evaluate_methods(model, ["shapes_filled"], methods, items=40, progress=False)
    assert found.note.tolist() == ["", "", "", UNMOVED_TEST]
    assert found.changed.tolist()[2] > 0
    # What changed is told from zero-shot CLIP in the words of the test, not in the dataset's own.
    other = evaluate_methods(
        model, ["shapes_filled"], {Path("still"): still}, template="{}", items=40, progress=False
    )
    assert other.changed.tolist()[2] == 0


def test_zero_shot_rows_are_of_the_common_template_and_of_the_datasets_own() -> None:
    model, words = shared_backbone(), "{} texture."
    own = Manifest.load("shapes_filled")
    own = replace(own, spec=own.spec.model_copy(update={"zero_shot_template": words}))
    options = {"items": 40, "progress": False}
    trained = train(model, own, RECIPE, seeds=(1,), protocol="few-shot", **options)
    tip = Tip.build(TipConfig(), Backbone(model.clip, tokenizer=model.tokenizer), Task())
    tested = evaluate_methods(model, [own], {Path("tip"): tip}, **options)
    other = evaluate_methods(model, [own], {}, template=words, **options)
    for table in (trained, tested):
        plain = table[table.method.isin(ZERO_SHOT_METHODS)].set_index("method")
        assert plain.template[ZERO_SHOT_CLIP] == "a photo of a {}."
        assert plain.template[ZERO_SHOT_OWN] == words
        assert plain.log_likelihood[ZERO_SHOT_OWN] == pytest.approx(other.log_likelihood[0])
    # An empty cache answers as zero-shot CLIP does in the dataset's own words.
    assert tested.note.tolist() == ["", "", UNMOVED_TEST] and tested.changed[2] > 0


def test_an_evaluation_tells_of_test_images_that_are_listed_for_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = []
    for name in ("blue", "green", "lime", "red"):
        Image.new("RGB", (16, 16), name).save(tmp_path / f"{name}.png")
        rows += [f"{name}.png,{name},{split}" for split in ("train", "test")]
    table = tmp_path / "leaky.csv"
    table.write_text("\n".join(["path,label,split", *rows]))
    model = shared_backbone()
    still = new_adapter(model.clip, MMAConfig.span(2, 3, dim=4, scale=1e-9), seed=1)
    evaluate_methods(model, [str(table)], {}, progress=False)
    assert not caplog.messages  # zero-shot CLIP was trained on none of them
    evaluate_methods(model, [str(table)], {Path("a"): still}, kinds=["all", "base"], progress=False)
    assert caplog.messages == [
        "4 of 4 test images of leaky are among its training images, first blue.png"
    ]


def rows(**columns: Any) -> pd.DataFrame:
    defaults = {
        "protocol": "base-to-novel", "method": "MMA", "model": "m", "weights": "w",
        "placement": "p", "shots": 16, "note": "", "source": "",
    }  # fmt: skip
    return pd.DataFrame({**defaults, **columns}).fillna("")


def test_means_harmonic_means_and_averages_by_hand() -> None:
    found = summarise(
        rows(
            dataset=["a"] * 4 + ["b"] * 4,
            split_kind=["base", "novel"] * 4,
            seed=[1, 1, 2, 2] * 2,
            accuracy=[0.8, 0.6, 0.9, 0.5, 0.4, 0.2, 0.4, 0.2],
        )
    ).set_index(["dataset", "metric"])
    assert found["mean"]["a", "base"] == pytest.approx(0.85)
    assert found["sd"]["a", "base"] == pytest.approx(np.std([0.8, 0.9], ddof=1))
    assert found["mean"]["a", "hm"] == pytest.approx(2 * 0.85 * 0.55 / 1.4)
    base, novel = (0.85 + 0.4) / 2, (0.55 + 0.2) / 2
    assert found["mean"]["average", "hm"] == pytest.approx(2 * base * novel / (base + novel))
    assert found["seeds"]["average", "base"] == 2


def test_datasets_of_few_shot_trainings_are_averaged_too() -> None:
    """Each was trained on by itself, so that no source sets them apart."""
    table = rows(dataset=["a", "b"], source=["a", "b"], split_kind="all", seed=1,
                 accuracy=[0.8, 0.4], protocol="few-shot")  # fmt: skip
    assert summarise(table).set_index("dataset")["mean"]["average"] == pytest.approx(0.6)


@pytest.mark.parametrize("truth", [[0, 1] * 4, [0] * 3 + [1] * 3, [1, 0, 0, 1, 1, 0]])
def test_two_halves_of_a_test_hold_the_same_classes(truth: list[int]) -> None:
    labels = np.array(truth)
    found = half_fields(labels, labels == 1)
    assert found == {"first_half": 0.5, "second_half": 0.5}
    for item in np.eye(len(labels), dtype=bool):  # each is in one of the halves
        one, other = sorted(half_fields(labels, item).values())
        assert one == 0 < other


def test_a_note_of_one_half_is_not_told_of_the_other() -> None:
    """Of base 90 % beside zero-shot's 80 it was said that the answers are those of zero-shot."""
    table = rows(dataset="a", split_kind=["base", "novel"] * 2, seed=[1, 1, 2, 2],
                 accuracy=[0.9, 0.6] * 2, note=["", "same", "", "same"])  # fmt: skip
    assert set(summarise(table).note) == {"same (novel)"}
    table.loc[3, "note"] = ""
    assert set(summarise(table).note) == {"same (novel, in 1 of 2 runs)"}
    assert set(summarise(table.assign(note="same")).note) == {"same"}


def test_there_is_no_average_where_no_seed_has_all_datasets() -> None:
    """Its sd over seeds was the difference between the datasets, its mean that of the seeds."""
    apart = rows(dataset=["a"] * 3 + ["b"], split_kind="base", seed=[1, 2, 3, 4],
                 accuracy=[0.9, 0.9, 0.9, 0.1])  # fmt: skip
    found = summarise(apart)
    assert list(found["dataset"]) == ["a", "b"]
    text = results_text(found)
    assert "90.0" in text and "average" not in text
    # Nor over those that are complete: one of three has no novel accuracy by any seed.
    halves = rows(dataset=[*"aabbc"], split_kind=["base", "novel"] * 2 + ["base"], seed=1,
                  accuracy=[0.8, 0.6, 0.8, 0.9, 0.4])  # fmt: skip
    assert set(summarise(halves)["dataset"]) == {*"abc"}
    joined = pd.concat([apart, rows(dataset=["b"], split_kind="base", seed=[2], accuracy=[0.3])])
    average = summarise(joined).set_index("dataset").loc["average"]
    assert (average["mean"], average["seeds"]) == (pytest.approx(0.6), 1)


@pytest.mark.parametrize("absent", ["row", "value"])
def test_seeds_are_counted_and_paired_by_what_each_has(absent: str) -> None:
    """Of seed 2 dataset `b` has no novel accuracy: neither its HM nor an average is of it."""
    table = rows(
        dataset=["a"] * 4 + ["b"] * 4,
        split_kind=["base", "novel"] * 4,
        seed=[1, 1, 2, 2] * 2,
        accuracy=[0.8, 0.6, 0.8, 0.9, 0.4, 0.4, 0.8, 0.1],
    )
    table.loc[7, "accuracy"] = np.nan
    summary = summarise(table.dropna() if absent == "row" else table)
    found = summary.set_index(["dataset", "metric"])
    assert found.seeds["b"].to_dict() == {"base": 2, "novel": 1, "hm": 1}
    assert found["mean"]["b", "base"] == pytest.approx(0.6)
    assert found["mean"]["b", "hm"] == pytest.approx(0.4), "of seed 1 alone"
    average = found.loc["average"]
    assert average.seeds.eq(1).all() and average.sd.isna().all()
    assert average["mean"].drop("hm").to_dict() == pytest.approx({"base": 0.6, "novel": 0.5})
    assert "MMA p, 1–2 seeds" in results_text(summary)


def test_a_cell_of_two_accuracies_is_refused_and_a_repeated_one_is_one() -> None:
    table = rows(dataset="a", split_kind=["base", "novel"], seed=1, accuracy=[0.8, 0.6])
    again = table.assign(accuracy=[0.8, 0.4])
    with pytest.raises(UserError, match=r"MMA p twice on a \(novel\), seed 1, with different"):
        summarise(pd.concat([table, again]))
    pd.testing.assert_frame_equal(summarise(pd.concat([table, table])), summarise(table))


def test_averages_side_by_side_are_of_the_same_targets() -> None:
    """A source of one training is a target of another; no average has either of them."""
    columns = {"protocol": "cross-dataset", "split_kind": "all", "seed": 1}
    per_source = [
        rows(dataset=list("abcd"), source=source, accuracy=accuracy, **columns)
        for source, accuracy in (("a", [0.9, 0.1, 0.6, 0.8]), ("b", [0.2, 0.9, 0.5, 0.9]))
    ]
    plain = rows(
        dataset=list("abcd"), method=ZERO_SHOT_CLIP, accuracy=[0.5, 0.5, 0.4, 0.6], **columns
    )
    found = summarise(pd.concat([*per_source, plain])).query("dataset == 'average'")
    assert dict(zip(found["source"], found["mean"])) == pytest.approx({"a": 0.7, "b": 0.7, "": 0.5})


def test_averages_over_unlike_datasets_name_them() -> None:
    """As those of two tables that were joined."""
    columns = {"split_kind": "base", "seed": 1, "accuracy": 0.5}
    wide, narrow = (rows(dataset=list(of), method=of, **columns) for of in ("cab", "ab"))
    found = summarise(pd.concat([wide, narrow]))
    notes = found[found["dataset"] == "average"].set_index("method")["note"].to_dict()
    assert notes == {"cab": "average of a, b, c", "ab": "average of a, b"}
    assert "average, ab: average of a, b" in results_text(found)
    assert summarise(wide)["note"].eq("").all()


def test_published_numbers_stand_beside_ours() -> None:
    summary = summarise(
        rows(dataset=["ucf101"] * 2, split_kind=["base", "novel"], seed=[1, 1], accuracy=[0.9, 0.7])
    )
    found = with_published(summary, {"ucf101": "UCF101"})
    published = found[(found.origin == "published") & (found.method == "MMA")]
    values = published[published.dataset == "ucf101"].set_index("metric")["mean"]
    assert values["novel"] == pytest.approx(0.8003)
    assert published.note.str.contains("inconsistent as printed").any()


def test_a_published_transfer_stands_beside_no_accuracy_on_the_source() -> None:
    """From Caltech101 to ImageNet, where all that is published goes from ImageNet to Caltech101."""
    titles = {"imagenet": "ImageNet", "caltech101": "Caltech101", "dtd": "DTD"}

    def shown(*sources: str) -> tuple[pd.DataFrame, list[str]]:
        columns = {"protocol": "cross-dataset", "split_kind": "all", "seed": 1, "accuracy": 0.5}
        made = [rows(dataset=list(titles), source=source, **columns) for source in sources]
        plain = rows(dataset=list(titles), source="", method=ZERO_SHOT_CLIP, **columns)
        found = with_published(summarise(pd.concat([*made, plain])), titles)
        lines = [line.split("  ")[0] for line in results_text(found).splitlines()]
        mma = found[(found["origin"] == "published") & (found["method"] == "MMA")]
        return mma.set_index("dataset")["mean"], lines

    numbers, lines = shown("caltech101")
    assert numbers.to_dict() == pytest.approx({"dtd": 0.4657})
    assert {"caltech101 (source)", "imagenet", "dtd"} <= {*lines}
    numbers, lines = shown("imagenet")
    assert dict(numbers) == pytest.approx({"imagenet": 0.71, "caltech101": 0.938, "dtd": 0.4657})
    assert {"caltech101", "imagenet (source)", "dtd"} <= {*lines}
    numbers, lines = shown("imagenet", "caltech101")  # rows of both kinds name their source
    assert {*numbers.index} == {*titles} <= {*lines}


@pytest.mark.parametrize("protocol", ["base-to-novel", "domain-generalization"])
def test_a_published_average_stands_beside_ours_of_the_same_datasets_alone(protocol: str) -> None:
    """One of eleven datasets stood beside ours of two."""
    printed = published(protocol.replace("-", "_"), Path("figures/tables"))["dataset"].unique()
    spelled = [one for one in printed if one != "average"]
    titles = {one.lower(): one for one in spelled}
    kinds, source = (
        (["base", "novel"], "") if protocol == "base-to-novel" else (["all"], "imagenet")
    )

    def averages(*names: str) -> set[str]:
        columns = {"protocol": protocol, "seed": 1, "accuracy": 0.5}
        made = [rows(dataset=one, source=source or one, split_kind=kinds, **columns)
                for one in names]  # fmt: skip
        found = with_published(summarise(pd.concat(made)), titles)
        return set(found.loc[found["dataset"] == "average", "origin"])

    assert averages(*titles) == {"ours", "published"}
    assert averages(*list(titles)[:-1]) == averages(*titles, "faces") == {"ours"}


def test_published_numbers_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / "dtd" / name).mkdir(parents=True)  # a folder with the name of a known dataset
        Image.new("RGB", (8, 8)).save(tmp_path / "dtd" / name / "1.png")
    mine = [str(tmp_path / "dtd"), "ucf101"]
    assert published_titles("cross-dataset", ["imagenet"], mine) == {
        "imagenet": "ImageNet",
        "ucf101": "UCF101",
    }
    with pytest.raises(UserError, match="no number of ucf101, imagenet is published for cross"):
        published_titles("cross-dataset", ["ucf101"], ["imagenet"])
    with pytest.raises(UserError, match="no number of dtd is published for base-to-novel"):
        published_titles("base-to-novel", mine[:1])
    with pytest.raises(UserError, match="no published numbers of few-shot stand beside ours"):
        published_titles("few-shot", mine)


@pytest.mark.parametrize(("correct", "n"), [(0, 10), (3, 10), (50, 50), (700, 1000)])
def test_the_interval_is_wilsons(correct: int, n: int) -> None:
    expected = binomtest(correct, n).proportion_ci(method="wilson")
    fields = accuracy_fields(correct, n)
    assert (fields["low"], fields["high"]) == pytest.approx((expected.low, expected.high))
    assert fields["accuracy"] == correct / n


def test_no_item_has_no_accuracy() -> None:
    fields = accuracy_fields(0, 0)
    assert np.isnan(fields["accuracy"]) and (fields["low"], fields["high"]) == (0, 1)


def test_the_published_recipe_is_the_default() -> None:
    recipe = load_recipe("published")
    t, a = recipe.train, recipe.method
    assert (t.lr, t.momentum, t.weight_decay, t.epochs) == (0.0015, 0.9, 5e-4, 5)
    assert (t.batch_size, t.shots, t.template) == (16, 16, "a photo of a {}.")
    assert (t.crop_scale, t.flip, t.cached_views) == ((0.08, 1.0), 0.5, 0)
    assert a == MMAConfig.span(5, 12, dim=32, scale=0.001)
    assert t == TrainConfig()
    assert load_recipe("published-imagenet").train == replace(t, batch_size=128)
    transfer = load_recipe("published-transfer")
    assert (transfer.train.epochs, transfer.method.vision) == (1, (9, 10, 11, 12))


def test_a_recipe_file_extends_a_shipped_one(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'extends = "published"\nlr = 0.1\nsettings = { scale = 0.2 }\nsavings = { fused = false }\n'
    )
    recipe = load_recipe(path)
    assert (recipe.train.lr, recipe.method.scale, recipe.train.savings.fused) == (0.1, 0.2, False)
    assert recipe.method.vision == load_recipe("published").method.vision


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rate = 1", "unknown key 'learning_rate'"),
        ("lr = -1", "lr takes a number above 0, not -1"),
        ("settings = { skale = 1 }", "did you mean 'scale'"),
        ("savings = { fuzed = true }", "did you mean 'fused'"),
        ('extends = "publisched"', "did you mean 'published'"),
        ("lr = ", "is not valid TOML"),
        ('lr = "high"', "recipe.toml: TrainConfig: lr takes a number above 0, not 'high'"),
        ("epochs = 1.5", "epochs takes a whole number from 1, not 1.5"),
        ("momentum = 2", "momentum takes a number from 0 to 1, not 2"),
        ("flip = true", "flip takes a number from 0 to 1, not True"),
        ("crop_scale = [0.5]", "crop_scale takes 2 numbers"),
        ("crop_scale = [0.5, 2.0]", "must rise, above 0 and 1 at most"),
        ("crop_scale = [0, 1]", "crop_scale is 0 to 1; it must rise, above 0"),
        ("crop_ratio = [2.0, 1.0]", "crop_ratio is 2 to 1; it must rise, above 0"),
        ('savings = { fused = "no" }', "fused takes True or False, not 'no'"),
        ("settings = { pairs = [[5]] }", "not a vision block and a text block"),
    ],
)
def test_mistakes_in_a_recipe_are_named(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_recipe(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: load_recipe("publisht"), "did you mean 'published'"),
        (lambda: load_recipe("absent.toml"), "cannot read the recipe"),
        (lambda: Experiment("base2novel", shared_backbone(), RECIPE), "did you mean"),
        (lambda: Experiment("cross-dataset", shared_backbone(), RECIPE), "needs target"),
        (lambda: summarise(pd.DataFrame(columns=list(COLUMNS))), "is empty"),
    ],
)
def test_mistakes_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_a_damaged_cell_is_named(tmp_path: Path) -> None:
    run(tmp_path, seeds=(1,))
    cell = trained_cells(tmp_path)[0]
    assert json.loads(cell.read_text())["identity"]["seed"] == 1
    cell.write_text(cell.read_text()[:50])
    with pytest.raises(UserError, match="is damaged"):
        run(tmp_path, seeds=(1,))


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    return saved_backbone(tmp_path / "model")


def test_train_and_evaluate_on_the_command_line(model_folder: Path, tmp_path: Path) -> None:
    from vlmlayers.cli import app

    out = tmp_path / "out"
    command = ["train", str(model_folder), "shapes_filled", "--out", str(out), "--seeds", "1"]
    command += ["--placement", "2-3", "--placement", "v3,t2-3", "--items", "32", "--quiet"]
    settings = ("epochs=1", "shots=1", "batch_size=8", "lr=0.1", "scale=0.1", "dim=4")
    settings += ("momentum=0.8", "crop_ratio=0.8,1.25", "crop_scale=0.5,1", "onednn=false")
    command += [part for setting in settings for part in ("--set", setting)]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0
    assert "MMA v3,t2-3 " in result.output
    assert max(map(len, result.output.splitlines()[:-1])) <= 80
    found = pd.read_csv(out / "results.csv", keep_default_na=False)
    assert set(found[found.method == "MMA"].placement) == {"v2-3,t2-3", "v3,t2-3"}
    adapter = next(p for p in (out / "adapters").glob("*.safetensors") if "v2-3" in p.name)
    test = ["evaluate", str(model_folder), "shapes_filled", "--adapter", str(adapter)]
    test += ["--kind", "base", "--kind", "novel", "--items", "32", "--out", str(tmp_path / "e.csv")]
    result = CliRunner().invoke(app, [*test, "--quiet"], catch_exceptions=False)
    assert result.exit_code == 0
    again = pd.read_csv(tmp_path / "e.csv", keep_default_na=False)
    key = ["split_kind"]
    left = found[found.placement == "v2-3,t2-3"].set_index(key)
    right = again[again.method == "MMA"].set_index(key)
    assert left.accuracy.to_dict() == pytest.approx(right.accuracy.to_dict())
    # A training's is over all that it is tested on.
    changed = np.average(right.changed, weights=right.n)
    assert changed > 0 and left.changed.tolist() == pytest.approx([changed] * 2)
    same = CliRunner().invoke(app, [*test, "--quiet", "--method", "mma"], catch_exceptions=False)
    assert same.exit_code == 0
    for option, message in (
        ("--method=maple", "is of mma; --method says maple"),
        ("--scale=0.1", "holds its settings; --scale is for authors' layouts"),
        ("--set=class_at=front", "holds its settings; --set is for authors' layouts"),
        ("--template=plain", "template takes .* exactly once .*, not 'plain'"),
    ):
        with pytest.raises(UserError, match=message):
            CliRunner().invoke(app, [*test, option], catch_exceptions=False)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--set", "lr"], "is not KEY=VALUE"),
        (["--set", "epochs=many"], "--set: epochs takes a whole number from 1, not 'many'"),
        (["--set", "ebochs=1"], "did you mean 'epochs'"),
        (["--seeds", "1,1,3"], r"'seeds': names 1 twice; a seed again is no new draw"),
        (["--seeds", "one"], r"seeds\[0\] is 'one'; a whole number is needed"),
        (["--placement", "low"], "cannot read the placement"),
        (["--recipe", "publishd"], "did you mean 'published'"),
        (["--set", "fused=maybe"], "--set: fused takes True or False, not 'maybe'"),
        (["--set", "crop_ratio=1"], "--set: crop_ratio takes 2 numbers, not 1"),
        (["--pairs", "5-7"], "cannot read --pairs"),
        (["--placement", "2-3", "--seeds=1,-1"], r"seeds\[1\] is '-1'; at least 0 is needed"),
        (["--placement", "2-3", "--together", "0"], "together is 0"),
        (["--placement", "2-3", "--workers=-1"], "workers"),
        (["--placement", "2-3", "--pairs", "1:2"], "names a block that is not adapted"),
        (["--pairs", "1:2"], "names a block that is not adapted"),
        (["--method", "coop", "--pairs", "1:2"], "--pairs is for mma; coop shares nothing"),
    ],
)
def test_mistakes_on_the_command_line_are_named_before_the_model_is_loaded(
    extra: list[str],
    message: str,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vlmlayers.cli import app

    monkeypatch.setattr("vlmlayers.models.load_model", None)
    command = ["train", str(model_folder), "shapes_filled", "--out", str(tmp_path / "o"), *extra]
    with pytest.raises(UserError, match=message):
        CliRunner().invoke(app, command, catch_exceptions=False)


@pytest.mark.parametrize(
    ("verb", "is_file"),
    [("train", False), ("search", False), ("validate --placement=2-3", False), ("evaluate", True)],
)
def test_an_output_of_another_kind_is_named_before_the_model_is_loaded(
    verb: str, is_file: bool, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table could not take the place of a folder, as was said after all had been tested."""
    from vlmlayers.cli import app

    monkeypatch.setattr("vlmlayers.models.load_model", None)
    out, what = tmp_path / "there", "is a directory" if is_file else "is a file"
    out.mkdir() if is_file else out.touch()
    command = [*verb.split(), str(model_folder), "shapes_filled", "--out", str(out)]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 2
    assert "Invalid value for '--out'" in result.output and what in result.output


@pytest.mark.slow
def test_training_beats_zero_shot_on_real_base_classes(
    shared_data: Path, shared_weights: Path
) -> None:
    from vlmlayers.models import load_model

    model = load_model(str(shared_weights / "real-mini"))
    found = base_to_novel(
        model, ["scenes15"], load_recipe("mini"), seeds=(1,), root=shared_data, progress=False
    )  # fmt: skip
    base = found[found.split_kind == "base"].set_index("method").accuracy
    assert base["MMA"] > base[ZERO_SHOT_CLIP] + 0.015


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        (lambda ids: ids + 60_000, "take the tokenizer of the model"),
        (lambda ids: {"input_ids": ids}, "it is to make a tensor of token ids"),
    ],
)
def test_a_tokenizer_of_another_model_is_refused_as_extraction_does(
    spoilt: Any, message: str
) -> None:
    model = shared_backbone()
    other = replace(model, tokenizer=lambda texts: spoilt(model.tokenizer(texts)))
    with pytest.raises(UserError, match=message):
        Evaluator(other).class_features(Method(), Task(("owl", "bus")))
