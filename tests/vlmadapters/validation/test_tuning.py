"""Placements at their own amount: tuned on training shots, trained as named, and warned of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from backbones import colour_folder, shared_backbone

import vlmlayers as vl
from vlmadapters.methods.mma.config import MMAConfig
from vlmadapters.protocols.experiment import Experiment
from vlmadapters.training.recipes import Recipe, TrainConfig, load_recipe
from vlmadapters.validation.tuning import AMOUNT_COLUMNS, size_warning, times
from vlmadapters.validation.validate import validate
from vlmlayers.errors import UserError
from vlmlayers.manifests import Manifest
from vlmlayers.placement import Placement
from vlmlayers.report.tables import comparison_table, validation_tables
from vlmlayers.report.validation import RecordedValidation
from vlmlayers.runs import Run
from vlmlayers.words import UNTRAINED

RECIPE = Recipe(
    "tiny",
    TrainConfig(lr=0.05, epochs=1, batch_size=4, shots=4),
    MMAConfig.span(2, 3, dim=4, scale=0.5),
)
QUICK: dict[str, Any] = {"recipe": RECIPE, "kinds": ("all",), "seeds": (1,), "progress": False}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    base = colour_folder(tmp_path_factory.mktemp("data") / "colours", train=5, test=5)
    return Manifest.load(base)


@pytest.fixture(scope="module")
def tuned(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tuned")
    validate(shared_backbone("clip"), Placement.parse("2-3"), [manifest], out=out, **QUICK)
    return out


def test_each_placement_is_trained_at_the_amount_that_did_best(
    manifest: Manifest, tuned: Path
) -> None:
    table = pd.read_csv(tuned / "validation.csv", keep_default_na=False)
    assert list(table["comparison"]) == ["tuned", "tuned", "given", "given"]
    assert list(table["placement"]) == 2 * ["v2-3,t2-3", "v1-3,t1-3"]
    assert set(table.loc[table["comparison"] == "given", "amount"]) == {""}
    found = json.loads((tuned / "validation.json").read_text())
    for row in table[table["comparison"] == "tuned"].to_dict("records"):
        assert found["tuning"]["amounts"][row["placement"]] == (row["amount"] or "recipe")
        setting = RECIPE.at(row["placement"] + (f"@{row['amount']}" if row["amount"] else ""))
        alone = Experiment("base-to-novel", shared_backbone("clip"), RECIPE, progress=False)
        results = alone.run([manifest], [setting], [1])
        by_kind = results[results["method"] == "MMA"].set_index("split_kind")["accuracy"]
        assert row["base"] == pytest.approx(100 * by_kind["base"])
    said = found["verdict"].removeprefix(f"{UNTRAINED}. ")
    assert found["comparison"] == "tuned" and said.startswith("Each placement at its own amount")


def test_an_amount_that_diverges_is_left_out(manifest: Manifest, tmp_path: Path) -> None:
    amounts = {"amounts": ["scale=5", "lr=1e30"]}
    chosen = Placement.parse("2-3")
    validate(shared_backbone("clip"), chosen, [manifest], out=tmp_path, **QUICK | amounts)
    tried = pd.read_csv(tmp_path / "validation_amounts.csv", keep_default_na=False)
    assert sorted(tried["amount"]) == ["none", "recipe", "recipe", "scale=5", "scale=5"]
    assert len(pd.read_csv(tmp_path / "validation.csv")) == 4


def test_the_untuned_comparison_stands_beside_with_its_warning(tuned: Path) -> None:
    table = pd.read_csv(tuned / "validation.csv", keep_default_na=False)
    warned = table.groupby("comparison")["warning"].unique()
    assert list(warned["tuned"]) == [""] and "4 to 6 blocks" in warned["given"][0]
    beside = json.loads((tuned / "validation.json").read_text())["untuned"]
    assert "mostly compares amounts" in beside["warning"]
    recorded = RecordedValidation.read(Run(tuned))
    assert recorded is not None and len(recorded.cells) == 2
    captions = [one.caption for one in validation_tables(recorded)]
    assert any("All at the recipe's amount" in one and "mostly" in one for one in captions)


def test_the_answer_shows_the_tuned_comparison_beside_the_untuned(tuned: Path) -> None:
    recorded = RecordedValidation.read(Run(tuned))
    shown = comparison_table(recorded)
    assert shown is not None and "own tuned amount, beside all at the recipe's" in shown.caption
    table = pd.read_csv(tuned / "validation.csv", keep_default_na=False)
    rows = {row[0].partition(" ")[0]: dict(zip(shown.headings, row)) for row in shown.rows}
    for one in table.to_dict("records"):
        row = rows[one["placement"]]
        how = "Harmonic mean" + (", untuned" if one["comparison"] == "given" else "")
        assert row[how] == f"{one['hm']:.1f}"  # of one run, which has no interval
        if one["comparison"] == "tuned":
            assert row["Placement"].endswith(f"by {one['amount'] or 'the recipe’s amount'})")


def test_the_amounts_tried_and_the_folds_can_be_named(manifest: Manifest) -> None:
    options = QUICK | {"amounts": ["scale=5"], "folds": 2}
    found = validate(shared_backbone("clip"), Placement.parse("2-3"), [manifest], **options)
    assert found.summary["tuning"]["folds"] == 2 and found.amounts is not None
    assert set(found.amounts["amount"]) == {"recipe", "scale=5", "none"}
    assert set(found.amounts["n"]) == {2}
    with pytest.raises(UserError, match="cannot read the amount 'much'"):
        validate(shared_backbone("clip"), "2-3", [manifest], **(QUICK | {"amounts": ["much"]}))


def test_an_amount_in_epochs_of_a_recipe_in_steps_is_counted_in_steps(manifest: Manifest) -> None:
    per_shot = RECIPE.changed({"steps_per_shot": 6})  # 24 steps; an epoch of 8 images takes 2
    options = QUICK | {"recipe": per_shot, "amounts": ["epochs=3", "steps_per_shot=3"], "folds": 2}
    found = validate(shared_backbone("clip"), "2-3", [manifest], **options)
    assert found.amounts is not None
    times_of = found.amounts[found.amounts["placement"] == "v2-3,t2-3"].set_index("amount")["times"]
    assert times_of.to_dict() == {"recipe": 1.0, "epochs=3": 0.25, "steps_per_shot=3": 0.5}


def test_the_amount_of_a_search_is_tried_at_every_placement(
    manifest: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    choice = vl.LayerChoice((2, 3), (2, 3), "search", {"amount": "scale=5"})
    options = QUICK | {"amounts": ["scale=2"], "folds": 2}
    found = validate(shared_backbone("clip"), choice, [manifest], **options)
    assert found.amounts is not None
    tried = found.amounts.groupby("placement")["amount"].agg(set).drop("zero-shot")
    assert len(tried) == 2 and all(one == {"recipe", "scale=2", "scale=5"} for one in tried)
    validate(shared_backbone("clip"), choice, [manifest], **(QUICK | {"amount": "given"}))
    assert "not at the choice's scale=5" in caplog.text
    with pytest.raises(UserError, match="leave @scale=5 out of the placement and give --amounts"):
        validate(shared_backbone("clip"), "2-3@scale=5", [manifest], **QUICK)


def test_a_comparison_at_one_amount_says_so_in_front(manifest: Manifest, tmp_path: Path) -> None:
    options = QUICK | {"amount": "given", "out": tmp_path}
    found = validate(shared_backbone("clip"), Placement.parse("2-3"), [manifest], **options)
    assert found.verdict.startswith(f"{UNTRAINED}. WARNING: placements of 4 to 6 blocks")
    recorded = RecordedValidation.read(Run(tmp_path))
    assert recorded is not None and "one amount" in recorded.warning
    assert size_warning(["v2-3,t2-3", "v1-2,t1-2", "zero-shot"]) == ""
    assert size_warning(["v3,t3@scale=1", "v2-3,t2-3"]) == ""  # each at an amount of its own
    # Of 2 and 4 blocks at one, of 12 and 18 at another: none of 2 is compared with one of 18.
    several = ["1@scale=1", "1-2@scale=1", "1-6@scale=2", "1-9@scale=2", "3@scale=7"]
    assert size_warning(several).startswith(
        "placements of 2 to 4 and of 12 to 18 blocks are compared at one amount each, which"
    )
    named = pd.read_csv(tmp_path / "validation_placements.csv", keep_default_na=False)
    assert named.loc[named["placement"] != "zero-shot", "warning"].str.contains("one amount").all()
    answer = comparison_table(recorded)
    assert answer is not None and "Warning: placements of 4 to 6 blocks" in answer.caption
    with pytest.raises(UserError, match="did you mean 'tuned'"):
        validate(shared_backbone("clip"), "2-3", [manifest], **(QUICK | {"amount": "tune"}))


def test_a_search_may_choose_zero_shot_and_validation_proves_that(
    manifest: Manifest, tmp_path: Path
) -> None:
    said = {"pick": "zero-shot", "statement": "Do not train.", "decided": True}
    choice = vl.LayerChoice((), (), "search", {"search": said})
    options = QUICK | {"amount": "given", "out": tmp_path}
    found = validate(shared_backbone("clip"), choice, [manifest], **options)
    assert found.summary["chosen"] == "zero-shot"
    first, *said = repr(found).splitlines()
    assert first == "Validation(2 cells)"
    assert "".join("".join(said).split()) == "".join(found.verdict.split())
    rows = found.placements.set_index("placement")
    assert rows.loc["zero-shot", "difference"] == 0 and len(rows) == 3
    assert "(zero-shot, harmonic mean" in found.verdict
    assert found.verdict.endswith("The search on training shots had said: Do not train.")
    recorded = RecordedValidation.read(Run(tmp_path))
    assert recorded is not None and recorded.chosen == "zero-shot"


def test_the_figure_has_a_line_per_placement(tuned: Path) -> None:
    amounts = pd.read_csv(tuned / "validation_amounts.csv")
    assert tuple(amounts.columns) == AMOUNT_COLUMNS
    trained = amounts[amounts["placement"] != "zero-shot"]
    plain = amounts[amounts["placement"] == "zero-shot"]
    assert plain[["amount", "times"]].to_numpy().tolist() == [["none", 0.0]]
    assert set(trained.groupby("placement")["amount"].nunique()) == {6}
    axes = vl.plots.amount_curves(amounts)
    titles = [ax.get_title("left") for ax in axes]
    assert titles == ["Base classes", "Novel classes", "Harmonic mean"]
    line = axes[0].get_lines()[0]
    one = amounts[amounts["placement"] == "v2-3,t2-3"].groupby("times")["base"].mean()
    assert np.allclose(line.get_xdata(), one.index) and np.allclose(line.get_ydata(), one)
    axes[0].figure.canvas.draw()
    words = [label.get_text() for label in axes[0].get_xticklabels(which="both")]
    assert {"0.3", "1", "3"} <= set(words) and not any("10^" in word for word in words)
    assert amounts["novel"].isna().all() and amounts["hm"].isna().all()  # four classes, all base
    assert [text.get_text() for text in axes[2].texts] == ["None was held out"]
    with pytest.raises(UserError, match="lacks times"):
        vl.plots.amount_curves(amounts.drop(columns="times"))


def test_an_amount_counts_scale_rate_and_steps() -> None:
    assert times(RECIPE.at("3@scale=1.5,epochs=3"), RECIPE, 3) == pytest.approx(9)
    coop = load_recipe("published", "coop")
    assert times(coop.at("@lr=0.02"), coop, 1) == pytest.approx(10)
    mini = load_recipe("mini")  # scale 0.1 and 5 epochs: a figure joins both at three
    assert times(mini.at("@scale=0.3"), mini, 1) == times(mini.at("@epochs=15"), mini, 3)
