"""The stage `search` of a study: its pick is the choice, and validation says what it had said."""

from __future__ import annotations

import json
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

from vlmlayers.cli import app
from vlmlayers.errors import UserError
from vlmlayers.files import write_json
from vlmlayers.report.next_steps import next_steps
from vlmlayers.report.numbers import read_answer
from vlmlayers.runs import Run, writing_alone
from vlmlayers.selection import LayerChoice
from vlmlayers.study import check_study, run_study

STUDY: dict[str, Any] = {
    "models": [{"name": "mini-clip"}],
    "datasets": ["shapes_filled", "digits"],
    "extract": {"items": 40},
    "score": {"metrics": ["dataset_accuracy_ncm"], "options": {"bootstrap": 20, "seeds": [1]}},
    "search": {
        "datasets": "shapes_filled",
        "set": {"epochs": 1},
        "shots": 4,
        "folds": 2,
        "amounts": ["scale=0.3"],
        "placement": ["12"],
    },
    "report": {"formats": ["svg"]},
}


def test_the_pick_of_a_study_is_its_choice(tmp_path: Path) -> None:
    validated = {
        "set": {"epochs": 1, "lr": 0.3, "scale": 1.0},
        "shots": 2,
        "seeds": 1,
        "kinds": "last",
        "items": 8,
    }
    validated["amount"] = "given"
    study = check_study(STUDY | {"validate": validated | {"datasets": "shapes_filled"}})
    said: list[str] = []
    run_study(study, tmp_path, progress=False, echo=said.append)
    found = json.loads((tmp_path / "search.json").read_text())
    choice = LayerChoice.load(tmp_path / "choice.json")
    assert choice.rule == "search" and choice.statement == found["statement"]
    assert str(choice.placement) == found["pick"]
    assert set(pd.read_csv(tmp_path / "search.csv")["dataset"]) == {"shapes_filled"}
    judged = json.loads((tmp_path / "validation.json").read_text())
    assert judged["verdict"].endswith(found["statement"])
    assert judged["search"]["pick"] == found["pick"]
    assert any(line.startswith("search   ") for line in said)
    said.clear()
    run_study(study, tmp_path, progress=False, echo=said.append)
    assert {f"{name:8} unchanged" for name in ("search", "select", "validate")} <= {*said}
    said.clear()
    other = study.model_copy(update={"seed": 7})  # which random placements are drawn by
    (run,) = run_study(other, tmp_path, only=["validate"], progress=False, echo=said.append)
    assert "validate unchanged" not in said and run.read_provenance()["validate"]["seed"] == 7
    words = shlex.split(next_steps(read_answer(run))[0].code)[1:]
    done = CliRunner().invoke(app, [*words, "--quiet"])
    assert done.exit_code == 0, done.output
    assert "as long as the 2 took here" in next_steps(read_answer(run))[0].text
    assert run.read_provenance()["validate"]["seed"] == 7, "the same random placements again"


@pytest.mark.parametrize("verb", ["search", "validate"])
def test_a_verb_adds_to_a_run_once_no_other_process_writes_it(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both would write what they read before the other wrote."""
    run, waiting = Run(tmp_path), Event()
    write_json(run.provenance, {"outdated": {verb: [], "score": []}})
    write_json(tmp_path / "stages.json", {"unfinished": {verb: 1.0}})
    module, library = f"vlmadapters.cli.{verb}", f"vlmadapters.validation.{verb}.{verb}"
    monkeypatch.setattr(library, lambda *_, **__: SimpleNamespace(void=False))
    monkeypatch.setattr(f"{module}.load_backbone", lambda *_: SimpleNamespace(random_weights=False))
    monkeypatch.setattr(f"{module}._text", lambda *_: "found")
    monkeypatch.setattr("vlmadapters.cli.search.depths_of", lambda _: None)
    monkeypatch.setattr("vlmlayers.files.say", lambda _: waiting.set())
    words = [verb, "mini-clip", "digits", "--out", str(tmp_path)]
    words += ["--placement", "12"] if verb == "validate" else []
    with ThreadPoolExecutor() as pool:
        with writing_alone(tmp_path):  # as a study does
            ledger = run.read("stages.json")
            done = pool.submit(CliRunner().invoke, app, words)
            assert waiting.wait(60) and not done.done()
            write_json(tmp_path / "stages.json", {**ledger, "score": {}})
        assert done.result().exit_code == 0, done.result()
    assert run.read("stages.json") == {"unfinished": {}, "score": {}}
    assert run.read_provenance()["outdated"] == {"score": []}
    assert ("validate" in run.read_provenance()) == (verb == "validate")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"buget": 3}, "did you mean 'budget'"),
        ({"criterion": "likelihood"}, "did you mean 'log_likelihood'"),
        ({"folds": 1}, "at least 2"),
        ({"placement": "12-5"}, "reversed"),
        ({"amounts": "alpha=3"}, "unknown key 'alpha'"),
        ({"datasets": ["digts"]}, "did you mean 'digits'"),
    ],
)
def test_a_wrong_table_is_refused_before_anything_runs(
    wrong: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        run_study(check_study(STUDY | {"search": wrong}), tmp_path, progress=False)
    assert not (tmp_path / "features").exists()


def test_another_rule_may_choose_beside_a_search() -> None:
    assert check_study(STUDY).select.rule == "search"
    assert check_study(STUDY | {"select": {"rule": "paper"}}).select.rule == "paper"
