"""A run folder is read part by part, and what it lacks is said."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from run_folders import make_run

import vlmlayers as vl


def test_every_part_of_a_run_is_reached(tmp_path):
    made = make_run(tmp_path / "run", validated=True, small=True)
    layers = {"1": np.eye(3), "2": np.eye(3)}
    vl.LayerFeatures.from_arrays(layers, dataset="mine").save(made.features / "mine-train")
    run = vl.open_run(tmp_path / "run")
    assert run.scores.equals(vl.read_scores(made.folder))
    assert run.choice == vl.LayerChoice.load(made.choice)
    assert set(run.validation.columns) >= {"placement", "dataset", "seed", "hm"}
    assert run.provenance["model"]["weights_hash"] == "abc"
    assert list(run.features) == ["mine-train"] and "mine" not in run.features
    np.testing.assert_array_equal(run.features["mine-train"].vision[1], np.eye(3))
    assert "1 features, scores, choice, validation" in repr(run)
    with pytest.raises(vl.UserError, match=r"unknown dataset 'mine'.*did you mean 'mine-train'"):
        run.features["mine"]


def test_what_was_searched_and_trained_is_reached(tmp_path):
    folder = make_run(tmp_path / "run", validated=True, small=True).folder
    (folder / "results.csv").write_text("method,placement,accuracy\nMMA,9,0.5\nCLIP,,0.25\n")
    (folder / "search.json").write_text('{"pick": "v5-12,t5-12"}')
    (folder / "search.csv").write_text("setting,fold\nzero-shot,1\n")
    run = vl.open_run(folder)
    assert run.results["placement"][0] == "9" and run.results["accuracy"].sum() == 0.75
    assert run.search == {"pick": "v5-12,t5-12"}
    shown = repr(run.verdict)
    assert run.verdict["verdict"].split()[-1] in shown and "predictors" in shown
    assert len(shown.splitlines()) < 20, "sentences, not what each value is"
    assert run.tables["search"].equals(pd.DataFrame({"setting": ["zero-shot"], "fold": [1]}))
    assert {"results", "search", "validation"} <= set(run.tables) and "scores" not in run.tables
    assert "scores, search, choice, results, validation" in repr(run)
    with pytest.raises(vl.UserError, match=r"unknown table 'serch'.*did you mean 'search'"):
        run.tables["serch"]


def test_a_folder_of_one_verb_is_a_run(tmp_path):
    (tmp_path / "results.csv").write_text("method,placement,accuracy\nMMA,9,0.5\n")
    run = vl.open_run(tmp_path)
    assert len(run.results) == 1
    with pytest.raises(vl.UserError, match="holds no search.json; make one with `vlmlayers sea"):
        run.search  # noqa: B018


def test_what_a_run_lacks_is_said(tmp_path):
    make_run(tmp_path / "several" / "one", 4, 3, small=True)
    with pytest.raises(vl.UserError, match="holds no validation.csv; make one with `vlmlayers val"):
        vl.open_run(tmp_path / "several" / "one").validation  # noqa: B018
    with pytest.raises(vl.UserError, match="one holds no tables but its scores"):
        vl.open_run(tmp_path / "several" / "one").tables["validation"]
    with pytest.raises(vl.UserError, match="name a run folder: it holds the runs one"):
        vl.open_run(tmp_path / "several")
    with pytest.raises(vl.UserError, match="no scores.parquet; it holds the runs one"):
        vl.write_report(tmp_path / "several")
    with pytest.raises(vl.UserError, match="nowhere does not exist; name a run folder"):
        vl.open_run(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(vl.UserError, match="file is no folder; name a run folder"):
        vl.open_run(tmp_path / "file")
