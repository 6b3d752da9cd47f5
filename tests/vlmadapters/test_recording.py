"""The scripts that tune the recipes `mini` and record the comparison of methods."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from shutil import copy

import numpy as np
import pandas as pd
import pytest

from vlmadapters.training.recipes import load_recipe
from vlmlayers.runs import Run, environment
from vlmlayers.study import read_study

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "figures"))
import record_methods  # noqa: E402
import tune_methods  # noqa: E402


def test_nothing_is_tuned_on_what_is_reported() -> None:
    study = read_study(record_methods.STUDY)
    reported = {one.name for one in study.datasets}
    assert len(reported) == 6
    assert not reported & set(tune_methods.DATASETS.split(","))
    (table,) = study.train
    assert table["recipe"] == "mini" and set(tune_methods.trained_methods()) < set(table["method"])


def test_the_best_mean_of_each_method_is_picked() -> None:
    outcomes = {
        ("a", 0.1): (50, 60),
        ("a", 0.3): (56, 55),
        ("b", 1.0): (40, 41),
        ("b", 3.0): (1, 9),
    }
    found = pd.DataFrame([
        {"method": method, "lr": lr, "dataset": f"d{i}", "seed": 1, "base": hm, "novel": hm,
         "hm": hm, "seconds": 1.0}
        for (method, lr), values in outcomes.items() for i, hm in enumerate(values)
    ])  # fmt: skip
    means = tune_methods.averages(found)
    picked = means[means["picked"]].set_index("method")
    assert picked["lr"].to_dict() == {"a": 0.3, "b": 1.0}
    assert picked["hm"].tolist() == [55.5, 40.5]


@pytest.mark.parametrize("method", tune_methods.trained_methods())
def test_a_picked_rate_changes_the_rate_of_the_recipe_alone(method: str, tmp_path: Path) -> None:
    path = Path(copy(tune_methods.RECIPES / f"{method}.toml", tmp_path))
    before = path.read_text("utf-8").splitlines()
    tune_methods.write_rate(path, 0.123)
    after = path.read_text("utf-8").splitlines()
    differing = [line for line in after if line not in before]
    assert differing == ["lr = 0.123"]
    head = after.index("[mini]")
    assert "[" not in "".join(after[head + 1 : after.index("lr = 0.123")])
    assert len(after) - len(before) in (0, 1)


def test_every_recipe_on_the_grid_differs_in_its_rate_alone() -> None:
    recipe = load_recipe("mini", "coop")
    trial = recipe.at("@lr=0.5")
    assert trial.train == replace(recipe.train, lr=0.5) and trial.method == recipe.method


def test_a_record_says_what_ran_and_what_came_out(tmp_path: Path) -> None:
    generator, rows = np.random.default_rng(2), []
    for dataset in ("a", "b", "c"):
        for method, gain in (("zero-shot CLIP", 0.0), ("LASP", 0.05), ("Tip-Adapter", 0.02)):
            for seed in (-1,) if method == "zero-shot CLIP" else (1, 2):
                rows += [
                    {
                        "protocol": "base-to-novel", "method": method, "model": "mini-clip",
                        "weights": "w", "dataset": dataset, "source": dataset, "split_kind": kind,
                        "placement": "v1-12,t-" if method == "LASP" else "", "settings": "",
                        "shots": 16, "seed": seed, "n": 100, "parameters": 3, "template": "",
                        "accuracy": 0.5 + gain + 0.001 * generator.normal(),
                        "seconds": 7.0 if seed > 0 else 0.0,
                        "note": "sees more" if method == "LASP" else "",
                    }
                    for kind in ("base", "novel")
                ]  # fmt: skip
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    pd.DataFrame(rows).to_csv(run.folder / "results.csv", index=False)
    model = {"name": "mini-clip", "weights": "w", "weights_hash": "0" * 64}
    run.record(train={"model": model, "environment": environment()})
    table, page = record_methods.record(run, tmp_path, "mini_clip", "the command")
    assert pd.read_csv(table).shape[0] == len(rows)
    text = page.read_text("utf-8")
    assert "LASP v1-12,t- did best" in text and "LASP: sees more." in text
    assert "Tip-Adapter did worse" in text
    assert "the command" in text and "| datasets | a, b, c |" in text
