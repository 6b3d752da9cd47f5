"""The rule `search`: what a search on training shots picked is the choice, zero-shot included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from run_folders import make_run
from score_tables import planted

from vlmlayers.errors import UserError
from vlmlayers.placement import Placement
from vlmlayers.report import write_report
from vlmlayers.report.numbers import read_answer
from vlmlayers.report.searched import search_tables
from vlmlayers.selection import LayerChoice, select
from vlmlayers.study.verbs import select_run

DEFAULT = "v5-12,t5-12"


def difference(mean: float, low: float, high: float) -> dict[str, Any]:
    folds = [{"dataset": "d", "seed": 1, "fold": f, "difference": mean} for f in (1, 2, 3, 4)]
    wins = 4 if mean > 0 else 0
    return {"mean": mean, "low": low, "high": high, "decided": low > 0, "wins": wins,
            "folds": folds}  # fmt: skip


def found(pick: str = "v9-12,t9-12@scale=0.3", adapt: str = "yes", **more: Any) -> dict[str, Any]:
    gain = difference(0.2, 0.1, 0.3)
    return {
        "default": DEFAULT,
        "pick": pick,
        "decided": pick != DEFAULT,
        "runner_up": DEFAULT,
        "difference": None if pick == DEFAULT else gain,
        "runner_up_difference": None,
        "to_zero_shot": {"setting": pick, "adapt": adapt, **difference(0.5, 0.4, 0.6)},
        "heats": [{"stage": "amount", "default": DEFAULT, "rivals": [pick], "best": pick,
                   "difference": gain, "pick": pick}],
        "mean_differences": {pick: 0.2, DEFAULT: 0.0},
        "statement": f"Train {pick}.",
        "criterion": {"name": "log_likelihood", "means": "held-out log-likelihood"},
        "method": "mma",
        "cost": {"trainings": 6.5, "budget": None, "seconds": 12.0, "steps": 9, "steps_of_one": 3},
        **more,
    }  # fmt: skip


def written(folder: Path, **values: Any) -> str:
    path = folder / "search.json"
    path.write_text(json.dumps(found(**values)))
    return str(path)


def test_the_pick_is_the_choice_with_its_amount(tmp_path: Path) -> None:
    choice = select(planted(12, 12, (5, 5)), "search", file=written(tmp_path))
    assert choice.placement == Placement.parse("9-12@scale=0.3")
    assert choice.decided and choice.statement == "Train v9-12,t9-12@scale=0.3."
    assert LayerChoice.load(choice.save(tmp_path / "choice.json")).placement == choice.placement


@pytest.mark.parametrize(
    ("pick", "adapt", "headline", "decided"),
    [
        ("v9-12,t9-12@scale=0.3", "yes",
         "Adapt blocks 9–12 of the vision tower and blocks 9–12 of the text tower by scale=0.3.",
         True),
        (DEFAULT, "yes", "The data do not decide: the default stands, blocks 5–12 of the vision "
         "tower and blocks 5–12 of the text tower.", False),
        ("zero-shot", "no", "Do not adapt: zero-shot CLIP does better on held-out shots.", True),
        ("v12,t-", "unknown", "Adapt block 12 of the vision tower.", False),
    ],
)  # fmt: skip
def test_the_report_answers_what_the_search_found(
    tmp_path: Path, pick: str, adapt: str, headline: str, decided: bool
) -> None:
    run = make_run(tmp_path / "run", small=True)
    written(run.folder, pick=pick, adapt=adapt)
    select_run(run.folder, "search", {}, 0, 0)
    answer = read_answer(run.folder)
    assert answer.headline == headline and answer.choice.decided is decided
    assert any(firm for _, firm in answer.headline_parts) is decided, "bold where it is decided"
    page = write_report(run.folder, formats=("svg",)).read_text()
    text = (run.folder / "report.md").read_text().replace("\\", "")
    for part in ("6.5 full trainings", "4 of 4 folds", "+0.200 [0.100, 0.300]", "+0.500"):
        assert part in page and part in text


def test_differences_to_the_default_name_the_setting_that_was_trained(tmp_path: Path) -> None:
    """Where training does not pay the pick is zero-shot CLIP, which ran against no default."""
    run = make_run(tmp_path / "run", small=True)
    worse = {"setting": "v12,t12", "adapt": "no", **difference(-0.5, -0.6, -0.4)}
    gain, second = difference(0.2, 0.1, 0.3), difference(0.125, 0.1, 0.15)
    written(run.folder, pick="zero-shot", runner_up="v9,t9", to_zero_shot=worse, difference=gain,
            runner_up_difference=second)  # fmt: skip
    rows = {row[0]: row[1:3] for row in search_tables(read_answer(run.folder))[0].rows}
    assert rows["Pick against the default"] == ("v12,t12", "+0.200 [0.100, 0.300]")
    assert rows["Runner-up against the default"] == ("v9,t9", "+0.125 [0.100, 0.150]")


@pytest.mark.parametrize(("low", "decided"), [(-0.1, False), (0.05, True)])
def test_a_pick_that_may_be_the_luckiest_of_several_is_in_doubt(
    tmp_path: Path, low: float, decided: bool
) -> None:
    gain = difference(0.2, 0.1, 0.3) | {"among": {"rivals": 6, "low": low, "high": 0.5}}
    choice = select(planted(12, 12, (5, 5)), "search", file=written(tmp_path, difference=gain))
    assert choice.placement == Placement.parse("9-12@scale=0.3") and choice.decided is decided
    told = "as the best of 6 settings, the one that the search picked cannot be told"
    assert any(told in one for one in choice.evidence["doubts"]) is not decided


def test_a_search_of_other_weights_is_no_evidence_of_the_run(tmp_path: Path) -> None:
    """As one that was copied, or that a folder kept after the model had changed."""
    run = make_run(tmp_path / "run", small=True)
    written(run.folder, weights="random")
    page = write_report(run.folder, formats=("svg",)).read_text()
    assert "full trainings" not in page and "search.json</a>" not in page
    for text in (page, (run.folder / "report.md").read_text()):
        assert "Left out: the search in search.json, which is of" in text and "(random)" in text


def test_a_search_of_weights_of_the_same_name_is_none_of_the_run(tmp_path: Path) -> None:
    """As of `model.safetensors` of another folder, or of a file that was trained on since."""
    run = make_run(tmp_path / "run", small=True)
    run.record(model={**run.read_provenance().get("model", {}), "weights_hash": "b" * 64})
    file = written(run.folder, weights_hash="a" * 64)
    with pytest.raises(UserError, match=r"aaaaaaaaaaaa\), the features beside it of other weights"):
        select_run(run.folder, "search", {}, 0, 0)
    assert (
        "Left out: the search in search.json"
        in write_report(run.folder, formats=("svg",)).read_text()
    )
    run.record(model={"weights_hash": "a" * 64})
    select_run(run.folder, "search", {}, 0, 0)
    assert read_answer(run.folder).search["pick"] == found()["pick"] and Path(file).is_file()


def test_scores_of_one_tower_take_a_search_of_both(tmp_path: Path) -> None:
    scores = planted(12, 12, (5, 5))
    alone = scores[(scores["tower"] == "vision") & (scores["other_tower"] != "text")]
    file = written(tmp_path, towers={"vision": 12, "text": 12})
    assert select(alone, "search", file=file).placement == Placement.parse("9-12@scale=0.3")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "other"}, r"is of other \(.*\), the scores of"),
        ({"weights": "random"}, r"is of .* \(random\), the scores of .*; search again"),
        ({"pick": "@lr=0.1"}, "acts at no block"),
        ({"pick": "recipe"}, "acts at no block"),
        ({"pick": "13"}, "names vision block 13"),
    ],
)
def test_a_search_that_is_no_choice_here_is_refused(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        select(planted(12, 12, (5, 5)), "search", file=written(tmp_path, **values))


def test_without_a_search_the_rule_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; run `vlmlayers search`"):
        select(planted(12, 12, (5, 5)), "search", file=str(tmp_path / "search.json"))
    (tmp_path / "search.json").write_text('{"pick": "5-12"}')
    with pytest.raises(UserError, match="lacks decided, method, statement, to_zero_shot"):
        select(planted(12, 12, (5, 5)), "search", file=str(tmp_path / "search.json"))
