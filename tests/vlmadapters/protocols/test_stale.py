"""Nothing that is kept is shown for other data, another precision, device or preprocessing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from backbones import backbone, shared_backbone
from PIL import Image

from vlmadapters.methods.head_configs import TipConfig
from vlmadapters.methods.mma.config import MMAConfig
from vlmadapters.protocols.cells import Cell, CellFolder
from vlmadapters.protocols.experiment import Experiment
from vlmadapters.protocols.train import train
from vlmadapters.protocols.trained import evaluate_methods
from vlmadapters.training.recipes import Recipe, TrainConfig
from vlmadapters.training.trainer import Trainer
from vlmlayers.errors import UserError

CONFIG = MMAConfig.span(2, 3, dim=4, scale=0.3)
RECIPE = Recipe("test", TrainConfig(lr=0.3, epochs=1, batch_size=8, shots=2), CONFIG)
FOUR = ("airplane", "bird", "cat", "deer")
EIGHT = (*FOUR, "dog", "frog", "horse", "ship")


def add_classes(folder: Path, names: tuple[str, ...], images: int = 4) -> Path:
    """Draw a small image folder with train and test; a class is a colour with some noise."""
    for split in ("train", "test"):
        for label, name in enumerate(names):
            place = folder / split / name
            place.mkdir(parents=True, exist_ok=True)
            for i in range(images):
                rng = np.random.default_rng([label, i, split == "test"])
                noise = rng.integers(0, 30, (16, 16, 3))
                colour = np.array([label * 29, 255 - label * 31, 40 * (label % 3)])
                pixels = (noise + colour).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.png")
    return folder


def repaint(file: Path) -> None:
    """Replace an image under its name, a second later."""
    Image.new("RGB", (16, 16), "white").save(file)
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))


def run(folder: Path, out: Path, seeds: tuple[int, ...] = (1,), **options: Any) -> pd.DataFrame:
    model = options.pop("model", None) or shared_backbone()
    return train(model, folder, RECIPE, out, protocol="few-shot", seeds=seeds, progress=False,
                 **options)  # fmt: skip


def stored(out: Path) -> pd.DataFrame:
    return pd.read_csv(out / "results.csv", keep_default_na=False)


def test_a_folder_that_grew_is_trained_again_and_not_mixed_with_what_it_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pics = add_classes(tmp_path / "pics", FOUR)
    small = run(pics, tmp_path / "out")
    assert run(pics, tmp_path / "out").equals(small)
    assert not caplog.records
    add_classes(pics, EIGHT)
    grown = run(pics, tmp_path / "out")
    fresh = run(pics, tmp_path / "fresh")
    assert set(small.n) == {16} and set(grown.n) == {32}
    assert grown.accuracy.tolist() == fresh.accuracy.tolist()
    assert "pics train has changed since" in caplog.text
    assert "16 images then, 32 now: 16 added, first 'train/dog/0.png'" in caplog.text
    assert "classes 4 then, 8 now" in caplog.text
    assert "leaves out 2 finished cells of data that have changed since" in caplog.text
    run(pics, tmp_path / "out", (1, 2))
    table = stored(tmp_path / "out")
    assert set(table.n) == {32} and sorted(table[table.method == "MMA"].seed) == [1, 2]


def test_what_an_earlier_command_left_of_other_datasets_stays_apart_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, other = (add_classes(tmp_path / name, FOUR) for name in ("first", "other"))
    run(first, tmp_path / "out", (1,))
    repaint(first / "test" / "cat" / "0.png")
    run(first, tmp_path / "out", (2,))
    caplog.clear()
    run(other, tmp_path / "out", (1,))
    table = stored(tmp_path / "out")
    trained = table[table.method == "MMA"]
    assert sorted(zip(trained.dataset, trained.seed)) == [("first", 2), ("other", 1)]
    assert "leaves out 2 finished cells of data that have changed" in caplog.text


def test_another_dataset_in_a_folder_of_the_same_name_gets_numbers_of_its_own(
    tmp_path: Path,
) -> None:
    run(add_classes(tmp_path / "a" / "images", FOUR), tmp_path / "out")
    second = add_classes(tmp_path / "b" / "images", EIGHT)
    assert set(run(second, tmp_path / "out").n) == {32}
    assert set(stored(tmp_path / "out").n) == {32}


def test_a_copy_with_the_same_times_is_the_same_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pics = add_classes(tmp_path / "pics", FOUR)
    before = run(pics, tmp_path / "out")
    (tmp_path / "moved").mkdir()
    moved = pics.rename(tmp_path / "moved" / "pics")
    monkeypatch.setattr(
        "vlmadapters.training.trainer.Trainer.fit", lambda self: pytest.fail("trained again")
    )
    assert run(moved, tmp_path / "out").equals(before)


CHANGES: dict[str, dict[str, Any]] = {
    "items": {"items": 8},
    "shots": {"recipe": RECIPE.changed({"shots": 1})},
    "template": {"recipe": RECIPE.changed({"template": "{}"})},
    "rate": {"recipe": RECIPE.changed({"lr": 0.1})},
    "settings": {"recipe": RECIPE.changed({}, {"scale": 0.2})},
    "seed": {"seeds": (2,)},
    "protocol": {"protocol": "base-to-novel"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_of_other_values_gives_what_an_empty_one_does(change: str, tmp_path: Path) -> None:
    pics, model = add_classes(tmp_path / "pics", FOUR), shared_backbone()

    def table(out: Path | None, **changed: Any) -> pd.DataFrame:
        asked = {"recipe": RECIPE, "protocol": "few-shot", "seeds": (1,), "items": 12} | changed
        found = train(model, pics, out=out, progress=False, **asked)
        return found.drop(columns="seconds")

    before = table(tmp_path / "out")
    after, fresh = (table(out, **CHANGES[change]) for out in (tmp_path / "out", None))
    pd.testing.assert_frame_equal(after, fresh)
    assert not after.equals(before)


BESIDE = {"nothing": {}, "split": {"split": "val"}, **CHANGES}


@pytest.mark.parametrize("change", BESIDE)
def test_a_table_puts_datasets_beside_each_other_only_where_they_compare(
    change: str, tmp_path: Path
) -> None:
    pictures = [add_classes(tmp_path / name, FOUR) for name in ("first", "other")]
    for one, changed in zip(pictures, ({}, BESIDE[change])):
        shutil.copytree(one / "train", one / "val")
        asked = {"recipe": RECIPE, "protocol": "few-shot", "seeds": (1,), "items": 12} | changed
        train(shared_backbone(), one, out=tmp_path / "out", progress=False, **asked)
    table = stored(tmp_path / "out")
    trained = table.method == "MMA"
    # For seeds and protocols a table has columns.
    both = change in ("nothing", "seed", "protocol")
    assert set(table.dataset[trained]) == {"other", *["first"] * both}
    both = change not in ("split", "items", "template")  # on which zero-shot CLIP depends
    assert set(table.dataset[~trained]) == {"other", *["first"] * both}


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_image_under_the_same_name_counts(tmp_path: Path, split: str) -> None:
    pics = add_classes(tmp_path / "pics", FOUR)
    run(pics, tmp_path / "out")
    repaint(pics / split / "cat" / "0.png")
    run(pics, tmp_path / "out")
    assert len(list((tmp_path / "out" / "cells").glob("pics-mma*.json"))) == 2


def test_an_image_of_a_target_counts(tmp_path: Path) -> None:
    first, other = (add_classes(tmp_path / name, FOUR) for name in ("first", "other"))
    transfer = {"recipe": RECIPE, "protocol": "cross-dataset", "targets": [other], "seeds": (1,)}
    tables = []
    for out in (tmp_path / "out", tmp_path / "out", None):
        tables.append(train(shared_backbone(), first, out=out, progress=False, **transfer))
        if len(tables) == 1:
            repaint(other / "test" / "cat" / "0.png")
    before, after, fresh = (one.drop(columns="seconds") for one in tables)
    pd.testing.assert_frame_equal(after, fresh)
    assert not after.equals(before)


def test_two_datasets_of_one_name_are_refused(tmp_path: Path) -> None:
    one = add_classes(tmp_path / "a" / "images", FOUR)
    two = add_classes(tmp_path / "b" / "images", FOUR)
    model, refused = shared_backbone(), "two datasets are called 'images'"
    with pytest.raises(UserError, match=refused):
        evaluate_methods(model, [one, two], {}, progress=False)
    with pytest.raises(UserError, match=refused):
        train(model, [one, two], RECIPE, protocol="few-shot", progress=False)
    with pytest.raises(UserError, match=refused):
        train(model, one, RECIPE, protocol="cross-dataset", targets=[two], progress=False)
    twice = evaluate_methods(model, [one, one], {}, progress=False)
    assert len(twice) == 2


def identities(out: Path, what: str) -> list[Any]:
    cells = sorted((out / "cells").glob("*.json"))
    return [json.loads(cell.read_text())["identity"][what] for cell in cells]


def test_precision_device_and_mode_are_resolved_in_every_key_and_row(tmp_path: Path) -> None:
    table = run(add_classes(tmp_path / "pics", FOUR), tmp_path / "out")
    assert set(table.precision) == {"fp32"} and set(table.device) == {"cpu"}
    assert set(identities(tmp_path / "out", "precision")) == {"fp32"}
    models = identities(tmp_path / "out", "model")
    assert {(one["device"], one["mode"]) for one in models} == {("cpu", "eval")}
    trained = [one for one in (tmp_path / "out" / "cells").iterdir() if "mma" in one.name]
    recipe = json.loads(trained[0].read_text())["identity"]["train"]
    assert recipe["precision"] == "fp32"


def test_a_run_of_another_precision_shares_no_cell(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pics = add_classes(tmp_path / "pics", FOUR)
    run(pics, tmp_path / "out")
    half = RECIPE.changed({"precision": "bf16"}, {})
    table = train(shared_backbone(), pics, half, tmp_path / "out", protocol="few-shot",
                  seeds=(1,), progress=False)  # fmt: skip
    assert set(table.precision) == {"bf16"} == set(stored(tmp_path / "out").precision)
    assert "leaves out 2 finished cells of another recipe" in caplog.text


def test_other_preprocessing_shares_no_cell(tmp_path: Path) -> None:
    pics = add_classes(tmp_path / "pics", FOUR)
    run(pics, tmp_path / "out")
    other = replace(shared_backbone(), preprocess_config={"mean": 0.4})
    run(pics, tmp_path / "out", model=other)
    assert len(list((tmp_path / "out" / "cells").glob("pics-mma*.json"))) == 2


def test_another_vocabulary_shares_no_cell(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def other_words(texts: list[str]) -> torch.Tensor:
        ids: torch.Tensor = shared_backbone().tokenizer(texts)
        return torch.where((ids > 300) & (ids < 40_000), ids + 1000, ids)

    pics = add_classes(tmp_path / "pics", FOUR)
    run(pics, tmp_path / "out")
    other = replace(shared_backbone(), tokenizer=other_words)
    table = run(pics, tmp_path / "out", model=other)
    fresh = run(pics, tmp_path / "fresh", model=other)
    assert table.log_likelihood.tolist() == fresh.log_likelihood.tolist()
    assert "leaves out 2 finished cells of another" in caplog.text
    assert len(stored(tmp_path / "out")) == len(stored(tmp_path / "fresh"))
    # Taken again in its own vocabulary, and cells of OpenAI's say nothing of it, as ever.
    assert run(pics, tmp_path / "out", model=other).equals(table)
    targets = map(str, identities(tmp_path / "out", "targets"))
    assert sorted("tokens" in one for one in targets) == [False, False, True, True]


def test_a_cell_of_an_earlier_version_is_neither_used_nor_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pics = add_classes(tmp_path / "pics", FOUR)
    run(pics, tmp_path / "old")
    old = CellFolder(tmp_path / "out")
    for cell in (tmp_path / "old" / "cells").iterdir():
        content = json.loads(cell.read_text())
        known = {k: v for k, v in content["identity"].items() if k not in ("model", "data")}
        old.write(Cell("pics-old", {**known, "weights": "a hash"}), content["rows"])
    table = run(pics, tmp_path / "out", (2,))
    assert set(table[table.method == "MMA"].seed) == {2}
    assert set(stored(tmp_path / "out").seed) == {-1, 2}
    assert "leaves out 2 finished cells of another" in caplog.text


def test_a_model_in_train_mode_is_measured_in_eval_mode_and_given_back(tmp_path: Path) -> None:
    pics = add_classes(tmp_path / "pics", FOUR)
    rest, busy = backbone(), backbone()
    busy.clip.train().requires_grad_(True)
    busy.clip.visual.patch_dropout = torch.nn.Dropout(0.9)
    for one in (rest, busy):
        one.clip.transformer.resblocks[0].ls_1 = torch.nn.Dropout(0.9).train(one is busy)
    tables = [run(pics, tmp_path / name, model=m) for name, m in (("a", rest), ("b", busy))]
    columns = ["method", "log_likelihood", "changed"]
    assert tables[0][columns].equals(tables[1][columns])
    assert all(module.training for module in busy.clip.modules())
    assert all(parameter.requires_grad for parameter in busy.clip.parameters())


@contextmanager
def _in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    assert torch.get_default_dtype() == torch.float64
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "around",
    [
        torch.no_grad,
        torch.inference_mode,
        partial(torch.autocast, "cpu", dtype=torch.bfloat16),
        _in_float64,
        lambda: torch.device("meta"),  # as `torch.set_default_device` of a GPU
    ],
)
def test_a_run_computes_as_its_recipe_says_whatever_is_switched_on_around_it(
    around: Callable[[], Any], tmp_path: Path
) -> None:
    """Without gradients there was a traceback, and `fp32` stood beside what others had made."""
    pics, model = add_classes(tmp_path / "pics", FOUR), backbone()
    plain = run(pics, tmp_path / "plain", model=model)
    with around():
        before = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
        within = run(pics, tmp_path / "within", model=model)
        assert before == (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"))
        (zero_shot, *_) = evaluate_methods(model, [pics], {}, progress=False).log_likelihood
    pd.testing.assert_frame_equal(within.drop(columns="seconds"), plain.drop(columns="seconds"))
    assert zero_shot == plain.log_likelihood[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_whose_weights_are_written_by_way_of_data_is_another(
    precision: str, tmp_path: Path
) -> None:
    """Its cells were taken for the model that it had been, and in bf16 its cast weights."""

    def averaged(model: Any) -> Any:
        generator = torch.Generator().manual_seed(3)
        for weight in model.clip.parameters():
            weight.data.mul_(1 + torch.rand(weight.shape, generator=generator))
        return model

    pics, model = add_classes(tmp_path / "pics", FOUR), backbone()
    recipe = RECIPE.changed({"precision": precision})
    first, second, fresh = (
        train(one(), pics, recipe, tmp_path / out, protocol="few-shot", seeds=1, progress=False)
        for one, out in (
            (lambda: model, "out"),
            (lambda: averaged(model), "out"),
            (lambda: averaged(backbone()), "fresh"),
        )
    )
    assert second.log_likelihood.tolist() == fresh.log_likelihood.tolist()
    assert second.log_likelihood.tolist() != first.log_likelihood.tolist()


STEPS = replace(RECIPE.train, schedule="step", warmup_epochs=1, epochs=2)


@pytest.mark.parametrize(
    ("recipe", "split"),
    [
        (Recipe("test", RECIPE.train, TipConfig(views=1)), "val"),
        (Recipe("test", RECIPE.train, TipConfig(views=1)), "test"),
        (replace(RECIPE, train=STEPS), "test"),
    ],
)
def test_a_cell_of_what_is_computed_in_another_way_now_is_trained_again(
    recipe: Recipe, split: str, tmp_path: Path
) -> None:
    """It was taken for the same: nothing in its identity said that the code had changed."""
    pics = add_classes(tmp_path / "pics", FOUR)
    shutil.copytree(pics / "test", pics / "val")

    def made(seed: int) -> pd.DataFrame:
        options = {"protocol": "few-shot", "seeds": (seed,), "split": split, "progress": False}
        return train(shared_backbone(), pics, recipe, tmp_path / "out", **options)

    fresh = made(1)
    (file,) = (tmp_path / "out" / "cells").glob(f"*-{recipe.method.name}-*.json")
    content = json.loads(file.read_text())
    schedule = {"schedule": recipe.train.schedule}
    old = content["identity"] | {"train": content["identity"]["train"] | schedule}
    old.pop("validation", None)
    assert old != content["identity"]
    rows = [row | {"accuracy": -1.0} for row in content["rows"]]
    file.unlink()
    CellFolder(tmp_path / "out").write(Cell(file.name.rpartition("-")[0], old), rows)
    assert made(1).accuracy.tolist() == fresh.accuracy.tolist()
    made(2)
    assert (stored(tmp_path / "out").accuracy >= 0).all()


def test_an_unfinished_training_of_altered_images_is_refused(tmp_path: Path) -> None:
    pics = add_classes(tmp_path / "pics", FOUR, images=2)
    made = Experiment("few-shot", shared_backbone(), RECIPE, progress=False)
    data = made.datasets.add(pics)

    def trainer() -> Any:
        items = data.shots(2, 1, "all")
        return Trainer(
            shared_backbone(), data.images, items, data.task("all"), [CONFIG], RECIPE.train,
            folder=tmp_path / "state", progress=False,
        )  # fmt: skip

    trainer().fit()
    repaint(pics / "train" / "deer" / "1.png")
    with pytest.raises(UserError, match=r"8 images then, 8 now: 1 altered, first 'train/deer/1"):
        trainer().fit()
