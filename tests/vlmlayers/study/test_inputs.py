"""What makes a stage of a study run again: each thing that its result depends on, and no other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlmlayers.files import write_json
from vlmlayers.runs import Run, fingerprint
from vlmlayers.study import STAGES, StageContext, check_study
from vlmlayers.study.stages import _given

STUDY: dict[str, Any] = {
    "title": "Mine",
    "models": [{"name": "mini-clip"}],
    "datasets": [{"name": "digits", "items": 12}],
    "extract": {"split": "test"},
    "score": {"metrics": ["skip_joint_change"], "options": {"bootstrap": 20}},
    "select": {"rule": "own.py:rule"},
}


def marks(tmp_path: Path, change: dict[str, Any], **given: Any) -> dict[tuple[str, str], str]:
    """Return the mark of each input of a study that differs in some tables."""
    study = check_study(STUDY | change)
    context = StageContext(Run(tmp_path / "run"), study, study.models[0], tmp_path, **given)
    return {
        (name, key): fingerprint(value)
        for name in ("extract", "score", "select", "report")
        for key, value in STAGES[name].inputs(context).items()
    }


def written(name: str) -> Callable[[Path], None]:
    """Return what changes a file beside the study."""
    return lambda folder: (folder / name).write_text("other")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"title": "Other"}, ["report title"]),
        ({"models": [{"name": "ViT-B-32", "pretrained": "openai"}]}, ["extract model"]),
        ({"models": [{"name": "mini-clip", "random_weights": True}]}, ["extract model"]),
        ({"datasets": [{"name": "digits", "items": 13}]}, ["extract datasets"]),
        ({"datasets": [{"name": "letters", "items": 12}]}, ["extract datasets"]),
        (
            {"datasets": [{"name": "digits", "items": 12, "template": "a {}"}]},
            ["extract datasets"],
        ),
        ({"extract": {"split": "test", "batch_size": 9}}, ["extract options"]),
        ({"extract": {"split": "test", "pooling": {"vision": "mean"}}}, ["extract options"]),
        ({"extract": {"split": "test", "workers": 2}}, []),  # who decodes changes nothing
        ({"seed": 1}, ["extract datasets", "score seed", "select seed"]),
        (
            {"score": {"metrics": ["skip_accuracy_drop"], "options": {"bootstrap": 20}}},
            ["score metrics"],
        ),
        (
            {"score": {"metrics": ["skip_joint_change"], "options": {"bootstrap": 21}}},
            ["score options"],
        ),
        ({"select": {"rule": "own.py:other"}}, ["select select"]),
        ({"select": {"rule": "own.py:rule", "resamples": 20}}, ["select select"]),
        ({"report": {"formats": ["svg"]}}, ["report report"]),
        ({"report": {"note": "of today"}}, ["report report"]),
        ({"validate": {}}, ["report asked"]),
        ({"search": {}, "select": {"rule": "own.py:rule"}}, ["report asked"]),
    ],
)
def test_a_key_of_the_study_is_an_input_of_its_stage(
    change: dict[str, Any], expected: list[str], tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text("rule = other = None\n")
    assert changed(marks(tmp_path, {}), marks(tmp_path, change)) == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (written("own.py"), ["select own_rule"]),
        (written("run/scores.parquet"), ["report files", "select scores"]),
        (written("run/choice.json"), ["report files"]),
        (written("run/search.json"), ["report files"]),
        (written("run/validation.csv"), ["report files"]),
        (written("run/study.toml"), ["report files"]),
        (written("run/validation-2.csv"), ["report files"]),
        (
            lambda folder: Run(folder / "run").record(left_out={"digits-test": "no image"}),
            ["report files", "score left_out"],
        ),
        (
            lambda folder: write_json(
                folder / "run" / "stages.json", {"extract": {"inputs": {"model": "another"}}}
            ),
            ["score extract"],
        ),
    ],
)
def test_a_file_is_an_input_of_the_stages_that_read_it(
    change: Callable[[Path], None], expected: list[str], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "own.py").write_text("rule = None\n")
    before = marks(tmp_path, {})
    change(tmp_path)
    assert changed(before, marks(tmp_path, {})) == expected


@pytest.mark.parametrize(
    ("options", "read"), [({}, "run/search.json"), ({"file": "found.json"}, "found.json")]
)
def test_the_search_that_is_chosen_by_is_an_input(
    options: dict[str, str], read: str, tmp_path: Path
) -> None:
    asked = {"select": {"rule": "search", "options": options}}
    for name in ("run/search.json", "found.json"):
        write_json(tmp_path / name, {})
        before = marks(tmp_path, asked)
        written(name)(tmp_path)
        assert ("select search" in changed(before, marks(tmp_path, asked))) is (name == read)


def test_a_file_that_a_rule_is_given_is_an_input(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("rule = None\n")
    (tmp_path / "blocks.json").write_text("[1]")
    asked = {"select": {"rule": "own.py:rule", "options": {"file": "blocks.json", "word": "x"}}}
    before = marks(tmp_path, asked)
    written("blocks.json")(tmp_path)
    assert changed(before, marks(tmp_path, asked)) == ["select files"]


def test_device_and_version_are_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = marks(tmp_path, {}, device="cpu")
    assert changed(before, marks(tmp_path, {}, device="cuda")) == ["extract device"]
    monkeypatch.setattr("vlmlayers.study.stages.version", lambda package: "0.0.1")
    assert changed(before, marks(tmp_path, {}, device="cpu")) == [
        "report version", "score version", "select version",
    ]  # fmt: skip


def changed(before: dict[tuple[str, str], str], after: dict[tuple[str, str], str]) -> list[str]:
    """Return stage and name of each input that differs, sorted."""
    every = sorted({*before, *after})
    return [" ".join(key) for key in every if before.get(key) != after.get(key)]


def test_the_next_command_gets_what_a_study_looked_up(tmp_path: Path) -> None:
    """A verb looks where it is started, and leaves nothing out that is not said."""
    photos = tmp_path / "data" / "photos"
    photos.mkdir(parents=True)
    part = {"name": "photos", "present_only": True}
    study = check_study(STUDY | {"datasets": [part, "digits"]})
    run = Run(tmp_path / "run")
    found = _given(StageContext(run, study, study.models[0], tmp_path, tmp_path / "data"))
    assert found["datasets"] == [str(photos), "digits"]
    assert found["leaving_out"] == {"present_only": True}
