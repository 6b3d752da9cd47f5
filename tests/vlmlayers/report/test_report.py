"""The report says what the tables say, stands alone, and lets nothing a user wrote run."""

from __future__ import annotations

import base64
import gzip
import html
import io
import json
import re
import shlex
import shutil
import zipfile
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from run_folders import make_run
from score_tables import DATASETS, curve_rows, pair_rows, row, step, table
from typer.testing import CliRunner

from vlmlayers.cli import app
from vlmlayers.errors import UserError
from vlmlayers.files import read_json, write_json
from vlmlayers.placement import describe_blocks
from vlmlayers.report import write_comparison, write_figures, write_report
from vlmlayers.report.comparable import ALIKE, comparability
from vlmlayers.report.figures import plans
from vlmlayers.report.glossary import explained as glossary
from vlmlayers.report.made import made_tables, remarks
from vlmlayers.report.next_steps import next_steps
from vlmlayers.report.numbers import read_answer
from vlmlayers.report.payload import payload, script_json, validation_entry
from vlmlayers.report.sensitivity import sensitivity_table
from vlmlayers.report.several import differences, summary_table
from vlmlayers.report.tables import (
    answer_tables,
    comparison_table,
    tabular,
    validation_tables,
)
from vlmlayers.report.validation import RecordedValidation
from vlmlayers.runs import Run
from vlmlayers.scores import read_scores, write_scores
from vlmlayers.selection import LayerChoice, select
from vlmlayers.study.demo import summary
from vlmlayers.words import clauses, escape_markdown, markdown_table, percent, text_table

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


class Page(HTMLParser):
    """Collects tags, attributes and the text of script elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def validated(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = make_run(tmp_path_factory.mktemp("runs") / "validated", validated=True)
    write_report(run.folder, title=EVIL, note=EVIL)
    return run


@pytest.fixture(scope="module")
def random_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = make_run(tmp_path_factory.mktemp("runs") / "random", 24, 12, small=True, weights="random")
    written(run)
    return run


def written(run: Run, title: str = "") -> str:
    """Return the report of a run, with its figures in one format, which is all that is drawn."""
    return write_report(run.folder, title=title, formats=("svg",)).read_text()


def test_the_answer_comes_first_and_is_right(validated: Run) -> None:
    words = "".join(Page(validated.report.read_text()).words)
    answer = words.index("Adapt blocks 5–12 of the vision tower and blocks 5–12 of the text tower.")
    assert answer < words.index("Evidence") < words.index("How it was made")
    placed = pd.read_csv(validated.folder / "validation_placements.csv").set_index("placement")
    count = int(placed.loc["v5-12,t5-12", "parameters"])
    assert f"{count:,} at the chosen placement" in words
    assert "The chosen placement did worse than the default." in words
    assert "the same: vision 5–12, text 5–12" in words
    start = "5 (95 % of resamples start at 5)"
    assert f"vision {start}; text {start}" in words
    assert "threshold: blocks whose discriminability, and agreement where it counts, pass" in words


def test_the_answer_compares_with_the_papers_placement_the_best_and_zero_shot(
    validated: Run,
) -> None:
    table = comparison_table(read_answer(validated.folder).validation)
    assert table is not None
    cells = pd.read_csv(validated.validation)
    means = cells.groupby("placement")["hm"].mean()
    by_name = {row[0]: row for row in table.rows}
    assert list(by_name) == [
        "v5-12,t5-12 (chosen and the paper's)",
        f"{means.idxmax()} (best of all trained)",
        "zero-shot (no adapter)",
    ]
    ours, zero = means["v5-12,t5-12"], 52.4
    row = by_name["zero-shot (no adapter)"]
    assert row[3] == "52.4 [51.4, 53.4]"
    assert row[4] == f"{zero - ours:+.1f} [{zero - ours - 1:.1f}, {zero - ours + 1:.1f}]"
    assert "mean of 2 datasets and 3 seeds" in table.caption
    words = " ".join(Page(validated.report.read_text()).words)
    assert words.index("best of all trained") < words.index("Along depth")
    assert "none predicted the outcome." in words
    assert comparison_table(None) is None

    best = read_answer(validated.folder).validation
    assert best is not None and best.best == means.idxmax()
    row = summary_table([("a", read_answer(validated.folder))]).rows[0]
    assert row[-1] == f"{ours:.1f} (best {means.max():.1f})"


def test_means_are_said_to_be_of_the_runs_that_hold_every_placement(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", validated=True)
    cells = pd.read_csv(run.validation)
    lost = (cells.seed == 3) & (cells.placement == cells.placement[0])
    for kept, seeds in (
        (~lost, "2 seeds"),
        (~lost | (cells.dataset == cells.dataset[0]), "2 to 3 seeds"),
    ):
        cells[kept].to_csv(run.validation, index=False)
        table = comparison_table(read_answer(run.folder).validation)
        assert table is not None and f"mean of 2 datasets and {seeds}, " in table.caption


def test_results_that_the_study_does_not_ask_for_are_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", validated=True)
    said = "What validate found is not of the study file shown, which has no table [validate]."
    for study, told in ((None, False), ("[validate]\n", False), ("[search]\n", True)):
        if study is not None:
            run.study.write_text(study)
        assert (said in remarks(read_answer(run.folder))) is told


def test_the_best_placement_says_where_amounts_were_tuned(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", validated=True)
    recorded = RecordedValidation.read(run)
    assert recorded is not None and recorded.best_words == "best of all trained"
    cells = pd.read_csv(run.validation).assign(comparison="tuned")
    cells.to_csv(run.validation, index=False)
    table = comparison_table(RecordedValidation.read(run))
    assert table is not None
    assert f"{recorded.best} (best of all at tuned amounts)" in [row[0] for row in table.rows]
    given = cells.assign(comparison="given", hm=1.0)
    pd.concat([given, cells]).to_csv(run.validation, index=False)
    both = RecordedValidation.read(run)
    assert both is not None and both.cells["hm"].tolist() == pytest.approx(cells["hm"].tolist())


def test_the_answer_shows_every_placement_where_they_are_few(validated: Run) -> None:
    found = read_answer(validated.folder).validation
    assert found is not None
    few = replace(found, placements=found.placements.head(5))
    table = comparison_table(few)
    assert table is not None
    shown = [str(row[0]).partition(" ")[0] for row in table.rows]
    assert set(found.placements["placement"].head(5)) <= set(shown)
    rest = few.placements.set_index("placement")["hm"]
    named = {few.chosen, few.reference, few.best}
    others = [name for name in shown if name in rest.index and name not in named]
    assert [rest[name] for name in others] == sorted((rest[name] for name in others), reverse=True)


def test_a_tie_for_the_best_and_what_intervals_are_over_are_said(validated: Run) -> None:
    found = read_answer(validated.folder).validation
    assert found is not None
    level = replace(found, placements=found.placements.assign(hm=50.0))
    assert level.best_words == f"best of all trained, with {len(found.placements) - 1} equal"
    third = found.cells[found.cells["dataset"] == "digits"].assign(dataset="third")
    more = replace(found, cells=pd.concat([found.cells, third], ignore_index=True))
    for one, said in ((found, "runs of these datasets alone"), (more, "datasets")):
        table = comparison_table(one)
        assert table is not None and table.caption.endswith(f"95 % intervals over {said}")
    whole = next(one for one in validation_tables(found) if "best first" in one.caption)
    means = [float(row[3].partition(" ")[0]) for row in whole.rows]
    assert means == sorted(means, reverse=True) and len(means) == len(found.placements) + 1
    assert "v5-12,t5-12 (chosen and the paper's)" in [row[0] for row in whole.rows]


def test_only_the_papers_placement_is_called_so(validated: Run) -> None:
    answer = read_answer(validated.folder)
    found = answer.validation
    assert found is not None and found.reference_words == "the paper's"
    columns = "predictor kind tau low high p_holm pick gain gain_low gain_high gain_p_holm n"
    judged = pd.DataFrame([dict.fromkeys(columns.split(), 0.5)])
    whole = next(name for name in found.placements["placement"] if "all" in found.kind(name))
    other = replace(found, reference=whole, best=found.chosen, verdict="", judged=judged)
    table = comparison_table(other)
    assert table is not None
    assert f"{whole} (the reference)" in [row[0] for row in table.rows]
    assert {one["placement"]: one["reference"] for one in validation_entry(other)["points"]
            if one["reference"]} == {whole: "reference"}  # fmt: skip
    heads = [head for one in validation_tables(other) for head in one.headings]
    assert "HM against the reference [95 %]" in heads
    proof = dict(replace(answer, validation=other).facts())["Tested by training"]
    assert "the reference " in proof and "paper" not in proof + "".join(heads)


def test_the_choice_stands_there_as_text_to_copy(validated: Run) -> None:
    choice = LayerChoice.load(validated.choice)
    text = validated.report.with_suffix(".md").read_text()
    code = text.partition("### Fine-tune these layers")[2].split("```")[1]
    assert code.strip() in "".join(Page(validated.report.read_text()).words)
    assert "choice.to_peft(clip, r=8)" in code
    copied: dict[str, str] = {}
    exec(code[code.index("target_modules") :], copied)
    parts = [(t, i, part) for t in ("vision", "text") for i in range(12) for part in ("attn", "ln")]
    names = {f"{tower}.blocks.{i}.{part}": (tower, i, part) for tower, i, part in parts}
    hit = {names[name] for name in names if re.fullmatch(copied["target_modules"], name)}
    assert hit == {(t, i, "attn") for t, blocks in choice.zero_based.items() for i in blocks}


def test_the_sweep_is_told_apart_from_other_placements(validated: Run) -> None:
    validation = read_answer(validated.folder).validation
    assert validation is not None
    entry = validation_entry(validation)
    names = [point["placement"] for point in entry["points"]]
    assert names == [f"v{i}-12,t{i}-12" for i in range(1, 13)] + ["v5-12,t-"]
    assert [point["sweep"] for point in entry["points"]] == [True] * 12 + [False]
    assert entry["points"][-1]["kind"] == "vision"
    assert entry["zero_shot"]["novel"] == 55
    assert entry["points"][0]["base_difference_low"] is not None


def test_what_has_no_width_stands_without_brackets_and_the_chosen_beside_itself_is_a_dash(
    validated: Run,
) -> None:
    validation = read_answer(validated.folder).validation
    assert validation is not None
    untold = {"tau": 1.0, "low": None, "high": None, "p": 0.01, "n": 3}
    share = {"placement": 0.0, "low": 0.0, "high": 0.0, "placement_by_dataset": None, "n": 4}
    cells = {"cells": 2, "low": 2, "high": 2, "n": 4}
    repeats = {"between_seeds": untold, "variance": share, "cells_for_one_point": cells}
    placements = validation.placements
    tied = placements["placement"] == "v6-12,t6-12"
    none = dict.fromkeys(("difference_low", "difference_high"), float("nan"))
    placements = placements.mask(tied, placements.assign(difference=0.0, **none))
    said, outcomes, *_ = validation_tables(
        replace(validation, repeatability=repeats, placements=placements)
    )
    assert [row[1] for row in said.rows] == ["1.00", "0", "cannot be told", "2"]
    apart = {str(row[0]).split()[0]: row[4] for row in outcomes.rows}
    assert apart["v5-12,t5-12"] == "–" and apart["v6-12,t6-12"] == "+0.0"
    share |= {"high": 0.5, "placement_by_dataset": 0.25}
    again, *_ = validation_tables(
        replace(
            validation,
            repeatability={"variance": share, "cells_for_one_point": {**cells, "high": 9}},
        )
    )
    assert [row[1] for row in again.rows] == ["0 [0, 50]", "25", "2 [2, 9]"]


@pytest.mark.parametrize("rule", ["threshold", "knee", "budget"])
def test_a_choice_from_other_scores_is_told(tmp_path: Path, rule: str) -> None:
    """A run that is scored anew keeps its choice, which is not of the new scores."""
    run = make_run(tmp_path / "run", small=True)
    scores = read_answer(run.folder).scores
    select(scores, rule, resamples=20).save(run.choice)
    answer = read_answer(run.folder)
    assert not answer.stale
    said = dict(answer.facts())["Rule"]
    assert said.startswith(f"{rule}: ") and "`" not in said  # as a page shows it
    told = "the choice was made from other scores than these"
    for other, why in (
        (scores.assign(value=1 - scores["value"]), "of the vision tower differs"),
        (scores[scores["metric"] != "dataset_accuracy"], "dataset_accuracy"),
        (scores.assign(model="another"), "of toy (toy.safetensors), not of another ("),
    ):
        write_scores(other, run.folder)
        answer = read_answer(run.folder)
        assert answer.doubts[0].startswith(told) and why in answer.doubts[0]
    assert told in written(run)
    scores.attrs["weights_hash"] = "a" * 64
    select(scores, rule, resamples=20).save(run.choice)
    for digit in "ab":  # two files of one name
        scores.attrs["weights_hash"] = digit * 64
        write_scores(scores, run.folder)
        assert ("aaaaaaaaaaaa), not of toy" in read_answer(run.folder).stale) == (digit == "b")


def test_a_choice_by_an_earlier_search_is_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", small=True)
    found = {"pick": "v5-12,t5-12@scale=0.3", "decided": True, "statement": "Train there.",
             "default": "v5-12,t5-12", "towers": {"vision": 12, "text": 12}, "method": "mma",
             "to_zero_shot": {"adapt": "yes", "folds": [1]}, "cost": {"trainings": 3}}  # fmt: skip
    write_json(run.search, found)
    select(read_answer(run.folder).scores, "search", file=str(run.search)).save(run.choice)
    assert not read_answer(run.folder).stale
    write_json(run.search, found | {"pick": "v9-12,t9-12", "statement": "Train here."})
    answer = read_answer(run.folder)
    (told,) = [one for one in answer.doubts if one.startswith("the choice is of an earlier search")]
    assert told.endswith(f"run vlmlayers select {run.folder} --rule search again")
    run.search.unlink()
    assert not read_answer(run.folder).stale


def test_a_choice_is_made_again_by_its_rule_with_its_options(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", small=True)
    scores = read_answer(run.folder).scores
    select(scores, "threshold", accuracy=0.6, agreement_metric="none", resamples=20).save(
        run.choice
    )
    write_scores(scores.assign(value=1 - scores["value"]), run.folder)
    words = shlex.split(read_answer(run.folder).stale.rpartition("; run ")[2])
    assert words[:5] == ["vlmlayers", "select", str(run.folder), "--rule", "threshold"]
    assert words[5:] == ["--set", "accuracy=0.6", "--set", "agreement_metric=none", "again"]


def deepest(scores: pd.DataFrame) -> tuple[str, str]:
    return "11-12", "10-12"


def test_a_choice_by_an_own_rule_from_other_scores_is_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", small=True)
    scores = read_answer(run.folder).scores
    select(scores, deepest, resamples=0).save(run.choice)
    answer = read_answer(run.folder)
    assert not answer.stale and not answer.unscored
    write_scores(scores.sample(frac=1, random_state=0), run.folder)
    assert not read_answer(run.folder).stale
    # Streamed scores of images alone take the place of both towers'.
    alone = scores[(scores["tower"] == "vision") & (scores["other_tower"] != "text")]
    write_scores(alone, run.folder)
    answer = read_answer(run.folder)
    assert "other scores than these (they hold other values)" in answer.stale
    assert answer.headline == (
        "Adapt blocks 11–12 of the vision tower and blocks 10–12 of the text tower."
    )
    assert not any(firm for words, firm in answer.headline_parts if "text" in words)
    assert answer.paper.text == tuple(range(5, 13))
    assert "blocks 10–12 of the text tower" in written(run)


def test_a_validation_before_one_that_was_stopped_is_told(tmp_path: Path) -> None:
    """Its study may have asked for other trainings than lie there."""
    run = make_run(tmp_path / "run", small=True, validated=True)
    run.study.write_text("[validate]\nshots = 4\n")
    told = "Stage validate did not finish on the study file shown; what follows is of what lay"
    stopped = {"unfinished": {"validate": 2.0, "train": 1.0}}
    for ledger, said in ((stopped, True), ({**stopped, "validate": {"inputs": {}}}, False)):
        write_json(run.folder / "stages.json", ledger)
        found = remarks(read_answer(run.folder))
        assert any(one.startswith(told) for one in found) == said and len(found) == said
    run.validation.unlink()
    write_json(run.folder / "stages.json", stopped)
    assert not remarks(read_answer(run.folder)), "nothing is shown of it"


@pytest.mark.parametrize("void", [False, True])
def test_a_validation_of_another_model_is_left_out(tmp_path: Path, void: bool) -> None:
    """A run that is extracted from other weights keeps its trainings, which prove nothing now."""
    run = make_run(tmp_path / "run", small=True, validated=True)
    cells, notes = pd.read_csv(run.validation), read_json(run.verdict)
    model, weights = read_answer(run.folder).scores[["model", "weights"]].iloc[0]
    for of, digits, why in (
        ({"model": model, "weights": weights}, "abc", ""),
        ({"model": model, "weights": weights}, "cba", f"of {model} ({weights}, cba), not of"),
        ({"model": "another", "weights": weights}, "abc", f"of another ({weights}), not of"),
    ):
        cells.assign(**of).to_csv(run.validation, index=False)
        write_json(run.verdict, notes | {"weights_hash": digits, "void": void})
        answer = read_answer(run.folder)
        assert (answer.validation is None) == (void or bool(why))
        told = notes["verdict"] in f"{answer.doubts} {answer.facts()}"
        assert told == (not why)
        text = written(run)
        assert (f"Left out: the training in validation.csv, which is {why}" in text) == bool(why)


def test_how_a_later_extraction_was_made_is_not_shown_as_that_of_the_scores(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", small=True)
    scores = read_scores(run.folder)
    made = {"device": "cuda of the later one", "items": 77}
    run.record(model=read_json(run.provenance)["model"] | {"name": "big", "weights": "w"},
               extract=made)  # fmt: skip
    said = "provenance.json is of a later extraction, by big (w, abc)."
    for digits, later in (("", False), ("abc", False), ("cba", True)):
        scores.attrs |= {"weights_hash": digits} if digits else {}
        write_scores(scores, run.folder)
        answer = read_answer(run.folder)
        assert any(one.endswith(said) for one in remarks(answer)) is later
        text = written(run)
        for shown in (made["device"], "8,500,000", "blocks of width 128", "&lt;img src=x"):
            assert (shown in text) is not later, shown


def test_a_validation_of_another_choice_is_told(tmp_path: Path) -> None:
    """A run that chooses anew keeps its trainings, whose \"chosen\" is what was chosen before."""
    run = make_run(tmp_path / "run", small=True, validated=True)
    answer = read_answer(run.folder)
    assert not answer.unproved and answer.parameters == 8000
    LayerChoice((7, 8), (5, 6, 7, 8, 9, 10, 11, 12), "mine").save(run.choice)
    other = read_answer(run.folder)
    assert other.parameters is None and other.doubts == [other.unproved]
    assert other.unproved.startswith(
        "the choice was not trained: v5-12,t5-12 stood for it in the validation, and it is v7-8,t5-"
    )
    assert "`" not in other.unproved  # as a page shows it
    assert "the choice was not trained" in written(run)
    assert dict(other.facts())["Tested by training"].startswith("of the choice of then, v5-12,t5-")
    assert summary_table([("a", other)]).rows[0][-1] == "–"
    # A method of the text tower, as CoOp, was trained where the choice is in that tower.
    assert answer.validation is not None and other.validation is not None
    text = pd.DataFrame({"placement": ["v-,t5-12", "v-,t1"], "hm": 50.0})
    assert not replace(
        other, validation=replace(other.validation, placements=text, chosen="v-,t5-12")
    ).unproved


def test_a_knee_is_drawn_over_its_curve(tmp_path: Path) -> None:
    run = make_run(tmp_path / "knee", small=True)
    select(read_answer(run.folder).scores, "knee", resamples=20).save(run.choice)
    answer = read_answer(run.folder)
    fit = answer.choice.evidence["towers"]["text"]["values"]["dataset_accuracy"]["fit"]
    assert payload(answer)["fits"]["text"]["dataset_accuracy"] == pytest.approx(fit, rel=1e-4)


def test_nothing_is_loaded_and_nothing_foreign_runs(validated: Run) -> None:
    text = validated.report.read_text()
    page = Page(text)
    assert len(page.all("script")) == 2 and not page.all("iframe")
    assert all("onerror" not in attributes for _, attributes in page.tags)
    for _, attributes in page.tags:
        for name in ("src", "href"):
            value = attributes.get(name) or ""
            assert not re.match(r"(https?:)?//", value), value
            if name == "src" and name in attributes:
                assert value.startswith("data:"), value
    policy = next(a["content"] for a in page.all("meta") if "http-equiv" in a)
    assert policy is not None and "default-src 'none'" in policy
    assert "'unsafe-inline'" not in policy.split("script-src")[1].split(";")[0]
    assert "&lt;img src=x onerror=alert(1)&gt;" in text


def test_json_cannot_leave_its_script() -> None:
    content = {"name": EVIL + "\u2028&"}
    text = script_json(content)
    assert not set("<>&\u2028") & set(text) and json.loads(text) == content
    with pytest.raises(ValueError, match="JSON"):
        script_json({"value": float("nan")})


def test_embedded_downloads_hold_the_tables(validated: Run) -> None:
    page = Page(validated.report.read_text())
    links = {a["download"]: a["href"] for a in page.all("a") if "download" in a}
    packed = base64.b64decode(str(links["scores.csv.gz"]).partition(",")[2])
    table = pd.read_csv(io.BytesIO(gzip.decompress(packed)), keep_default_na=False)
    assert len(table) == len(pd.read_parquet(validated.scores))
    choice = json.loads(base64.b64decode(str(links["choice.json"]).partition(",")[2]))
    assert choice["vision"] == list(range(5, 13))
    for name in ("validation_placements.csv", "validation_correlations.csv", "validation.json"):
        content = base64.b64decode(str(links[name]).partition(",")[2])
        assert content == (validated.folder / name).read_bytes()
    for kind in ("svg", "png", "csv"):
        assert f"curves-dataset-accuracy.{kind}" in links


def test_a_report_leaves_no_figure_of_scores_that_are_gone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_report(run.folder, formats=("svg", "pdf"))
    (run.figures / "mine.svg").write_text("drawn by hand")
    scores = read_answer(run.folder).scores
    write_scores(scores[scores["metric"] != "centroid_gap"], run.folder)
    before = {path.name for path in run.figures.iterdir()}
    text = written(run)
    now = {path.name for path in run.figures.iterdir()}
    assert {"gap-centroid-gap.svg", "gap-centroid-gap.csv"} <= before - now
    assert "mine.svg" in now and not any(name.endswith(".pdf") for name in now), "as not drawn anew"
    assert "gap-centroid-gap" not in text
    (run.figures / "curves-class-accuracy.pdf").write_text("drawn since, by the verb figures")
    written(run)
    assert (run.figures / "curves-class-accuracy.pdf").exists()


def test_every_figure_has_its_table_and_alt_text(validated: Run) -> None:
    stems = {path.stem for path in validated.figures.iterdir()}
    assert {
        "curves-dataset-accuracy",
        "gap-centroid-gap",
        "agreement-cka-debiased",
        "selection-frequency",
        "placement-sweep",
        "cost",
        "predicted-trained",
    } <= stems
    for stem in stems:
        for kind in ("svg", "png", "csv"):
            assert (validated.figures / f"{stem}.{kind}").stat().st_size > 50, (stem, kind)
    sweep = pd.read_csv(validated.figures / "placement-sweep.csv")
    cells = pd.read_csv(validated.validation)
    assert sweep["hm"].max() == pytest.approx(cells.groupby("placement")["hm"].mean().max())
    images = Page(validated.report.read_text()).all("img")
    assert len(images) == len(stems) and all(len(str(one["alt"])) > 20 for one in images)


def test_random_weights_are_announced_everywhere(random_run: Run) -> None:
    assert "RANDOM WEIGHTS" in random_run.report.read_text().split("<header>")[0]
    markdown = (random_run.folder / "report.md").read_text()
    assert "**RANDOM WEIGHTS**" in markdown.split("Evidence")[0]
    svg = (random_run.figures / "curves-dataset-accuracy.svg").read_text()
    assert "random weights" in svg
    assert "Adapt <strong>blocks 9–24 of the vision tower" in random_run.report.read_text()


def test_a_start_that_resamples_do_not_give_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", small=True)
    content = json.loads(run.choice.read_text())
    vision, text = (content["evidence"]["towers"][tower] for tower in ("vision", "text"))
    content["vision"] = [7]
    vision |= {"start": {"value": 7, "low": 2, "high": 6}, "empty": 0.2}
    vision["frequency"] = [0.0, 0.6, 0.1, 0.1, 0.0, 0.4, 0.4, 0.2, 0.5, 0.3, 0.4, 0.4]
    text |= {"start": {"value": 5, "low": None, "high": None}, "empty": 1.0}
    run.choice.write_text(json.dumps(content))
    assert dict(read_answer(run.folder).facts())["First block"] == (
        "vision 7 (not where resamples start: 95 % of resamples that choose any start at 2 to 6, "
        "20 % choose none; block 7 is chosen in 40 % of all); "
        "text 5 (no resample chooses a block)"
    )
    assert read_answer(run.folder).headline == (
        "Adapt blocks 5–12 of the text tower. For the vision tower the data do not decide: the "
        "default stands, blocks 5–12."
    )
    text |= {"start": {"value": 5, "low": 4, "high": 6}, "empty": 0.0}
    run.choice.write_text(json.dumps(content))
    first = dict(read_answer(run.folder).facts())["First block"]
    assert first.endswith("text 5 (95 % of resamples start at 4 to 6)")


def test_doubts_are_a_list_and_firm_blocks_are_named(tmp_path: Path) -> None:
    """Full sentences in `choice.json`; the page lists the reasons one by one."""
    run = make_run(tmp_path / "run", small=True)
    assert dict(read_answer(run.folder).facts())["Firm blocks"] == (
        "vision 5–12, text 5–12 (in at least 75 % of the resamples; none of a tower in doubt)"
    )
    content = json.loads(run.choice.read_text())
    alike = {name: list(range(5, 13)) for name in "ab"}
    content["evidence"]["towers"]["vision"]["without"] = alike
    run.choice.write_text(json.dumps(content))
    firm = dict(read_answer(run.folder).facts())["Firm blocks"]
    assert "the resamples and of the choices without one dataset; none" in firm
    doubts = ["vision block 5 could be <b>chosen</b> or not", "the text start lies anywhere in 2–9"]
    content["evidence"] |= {
        "decided": False,
        "doubts": doubts,
        "statement": f"The data do not decide: {'; '.join(doubts)}.",
    }
    towers = content["evidence"]["towers"]
    towers["vision"]["frequency"][4] = 0.5
    run.choice.write_text(json.dumps(content))
    answer = read_answer(run.folder)
    assert answer.lead == "What the data leave open:"
    found = payload(answer)
    assert found["standing"]["vision"][4:6] == ("open", "firm")
    assert found["chosen"]["vision"] == tuple(range(5, 13)), "an open block is chosen all the same"
    told = " ".join(summary(run))
    assert "What the data leave open: - vision block 5" in told and "do not decide" not in told
    assert read_answer(make_run(tmp_path / "sure", small=True).folder).lead.endswith("this).")
    proof = " ".join(summary(make_run(tmp_path / "proved", small=True, validated=True)))
    assert "Tested by training: The chosen placement did worse" in proof.replace("- The", "The")
    assert dict(answer.facts())["Firm blocks"].startswith("vision 6–12, text 5–12 (")
    assert dict(answer.facts())["Open blocks"] == "vision 5, text none"
    assert answer.headline == (
        "Adapt blocks 6–12 of the vision tower (block 5 open) and blocks 5–12 of the text tower."
    )
    assert [words for words, firm in answer.headline_parts if firm] == [
        "blocks 6–12 of the vision tower", "blocks 5–12 of the text tower",
    ]  # fmt: skip
    towers["text"]["frequency"] = [0.4] * 12
    run.choice.write_text(json.dumps(content))
    assert read_answer(run.folder).headline == (
        "Adapt blocks 6–12 of the vision tower (block 5 open). For the text tower the data do not "
        "decide: the default stands, blocks 5–12."
    )
    towers["vision"]["frequency"] = [0.4] * 12
    run.choice.write_text(json.dumps(content))
    undecided = read_answer(run.folder)
    assert undecided.headline == (
        "The data do not decide: the default stands, blocks 5–12 of the vision and text towers."
    )
    assert undecided.lead == "Why the data do not decide:"
    assert not any(firm for _, firm in undecided.headline_parts), "nothing to be bold about"
    page = Page(written(run))
    assert len(page.all("li")) >= 2 and doubts[0] in " ".join(page.words)
    assert f"- {doubts[1]}" in (run.folder / "report.md").read_text()


def test_facts_say_what_the_curves_are_read_on_and_which_datasets_are_far(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", small=True)
    scores = read_answer(run.folder).scores

    def fact(label: str, table: pd.DataFrame) -> str | None:
        write_scores(table, run.folder)
        return dict(read_answer(run.folder).facts()).get(label)

    def behind(*parts: pd.DataFrame) -> str | None:
        return fact("Behind the curves", pd.concat([others, *parts], ignore_index=True))

    told = "Dataset accuracy (linear probe) is read on "
    accuracy = scores[scores["metric"] == "dataset_accuracy"]
    others = scores[scores["metric"] != "dataset_accuracy"]
    digits, shapes = (accuracy.assign(dataset=name) for name in ("digits", "shapes"))
    # Each dataset counts once, whatever its positions, and pooled rows stand for all.
    digits = digits.assign(n=1000 + 200 * (digits["position"] == "3"))
    shapes = shapes.assign(n=34).where(shapes["tower"] == "vision", shapes.assign(n=6))
    assert behind(digits, shapes) == told + "1,234 images and 1,206 texts"
    assert behind(digits, accuracy.assign(n=77)) == told + "77 images and 77 texts"
    assert behind(digits.assign(n=5 * (digits["tower"] == "vision"))) == told + "5 images"
    assert behind() is None

    values = {"far": -0.2, "near": 0.3, "at chance": -0.0004, "top": 0.7, "low": 0.1, "high": 0.5}
    margins = [
        accuracy.iloc[:1].assign(
            metric="zero_shot_margin", dataset=name, position="proj", other_tower="text",
            other_position="proj", space="joint", value=value, low=value - 0.05, high=value + 0.1,
            null=-0.0001,
        )
        for name, value in values.items()
    ]  # fmt: skip
    shown = [
        "far -0.200 [-0.250, -0.100], chance 0.000",
        "at chance 0.000 [-0.050, 0.100], chance 0.000",
        "low 0.100 [0.050, 0.200], chance 0.000", "near 0.300 [0.250, 0.400], chance 0.000",
    ]  # fmt: skip
    tail = "smaller is farther from the pretraining"
    assert fact("Zero-shot margin", pd.concat([scores, *margins], ignore_index=True)) == "; ".join(
        [*shown, "2 more", tail]
    )
    four = [margins[number] for number in (0, 1, 2, 4)]
    assert fact("Zero-shot margin", pd.concat([scores, *four], ignore_index=True)) == "; ".join(
        [*shown, tail]
    )
    assert fact("Zero-shot margin", scores) is None


def test_facts_of_a_validation_without_a_verdict_are_its_means(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", small=True, validated=True)
    facts = dict(read_answer(run.folder).facts())
    assert facts["Trained parameters"] == "8,000 at the chosen placement"
    (run.folder / "validation.json").unlink()
    means = pd.read_csv(run.validation).groupby("placement")["hm"].mean()
    proved = dict(read_answer(run.folder).facts())["Tested by training"]
    ours = f"{means['v5-12,t5-12']:.3g}"
    assert proved == (
        f"the paper's {ours}, chosen {ours}, best {means.idxmax()} with harmonic mean "
        f"{means.max():.3g}"
    )
    placed = pd.read_csv(run.folder / "validation_placements.csv")
    tie = placed["hm"].mask(placed["placement"] == "v5-12,t5-12", placed["hm"].max())
    placed.assign(hm=tie).drop(columns="parameters").to_csv(
        run.folder / "validation_placements.csv", index=False
    )
    facts = dict(read_answer(run.folder).facts())
    assert "Trained parameters" not in facts
    assert "best v5-12,t5-12 and v5-12,t- with harmonic mean 62.9" in facts["Tested by training"]
    run.validation.unlink()
    assert dict(read_answer(run.folder).facts())["Tested by training"].startswith("not yet; ")


def test_the_papers_placement_is_that_of_this_depth(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 24, 12, small=True)
    scaled = "vision 9–24, text 5–12"
    assert dict(read_answer(run.folder).facts())["The paper's placement"] == f"the same: {scaled}"
    LayerChoice(tuple(range(9, 25)), tuple(range(6, 13)), "mine").save(run.choice)
    answer = read_answer(run.folder)
    assert dict(answer.facts())["The paper's placement"] == (
        f"{scaled} (5–12 of 12, scaled to this depth)"
    )
    assert dict(answer.facts())["Rule"] == "mine"
    # A tower without scores has the depth that was recorded of it.
    write_scores(answer.scores[answer.scores["tower"] == "text"], run.folder)
    assert read_answer(run.folder).paper.vision == tuple(range(9, 25))
    assert read_answer(run.folder).unscored == ["vision"]
    LayerChoice(tuple(range(9, 25)), (), "mine").save(run.choice)
    assert read_answer(run.folder).headline == "Adapt blocks 9–24 of the vision tower."
    assert "they hold nothing of the vision tower" in read_answer(run.folder).stale


def test_a_search_of_another_model_says_nothing_of_this_one(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", small=True)
    found = {"statement": "Train v9.", "cost": {"trainings": 6.5},
             "to_zero_shot": {"folds": {"1": 0, "2": 0, "3": 0}}}  # fmt: skip
    ours = {"model": "toy", "weights": "toy.safetensors", "weights_hash": "abc"}
    told = "Train v9. Cost: 6.5 full trainings, 3 folds."
    for theirs, foreign in (
        ({}, ""),
        (ours, ""),
        (ours | {"model": "other"}, "other (toy.safetensors)"),
        (ours | {"weights": "b.pt"}, "toy (b.pt)"),
        (ours | {"weights_hash": "xyz"}, "toy (toy.safetensors, xyz)"),
    ):
        write_json(run.search, found | theirs)
        answer = read_answer(run.folder)
        assert answer.foreign_search == foreign
        shown = dict(answer.facts()).get("Search on training shots")
        assert shown == (None if foreign else told)
        assert bool(answer.search) is not bool(foreign)


def test_a_rule_that_reads_no_measurement_is_never_bold(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", small=True)
    select(read_answer(run.folder).scores, "explicit", vision="7-9").save(run.choice)
    answer = read_answer(run.folder)
    assert answer.headline_parts[1] == ("blocks 7–9 of the vision tower", False)
    assert answer.standing("vision") == ("frozen",) * 6 + ("fixed",) * 3 + ("frozen",) * 3
    assert answer.standing("text") == ("frozen",) * 12
    assert 'class="fixed chosen paper"' in written(run)


def test_the_ribbon_has_three_tints(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", small=True)
    content = json.loads(run.choice.read_text())
    content["evidence"]["towers"]["vision"]["frequency"][3:5] = [0.6, 0.6]
    run.choice.write_text(json.dumps(content))
    choice = read_answer(run.folder).choice
    assert (choice.firm("vision"), choice.open("vision")) == (tuple(range(6, 13)), (4, 5))
    cells = re.findall(r'<i class="([^"]+)" title="vision block', written(run))
    assert [one.split()[0] for one in cells] == ["frozen"] * 3 + ["open"] * 2 + ["firm"] * 7
    chosen = ["chosen" in one.split() for one in cells]
    assert chosen == [block in choice.blocks("vision") for block in range(1, 13)]
    assert chosen[3:5] == [False, True], "of two open blocks the rule chose one"


def test_other_settings_are_one_small_table(validated: Run) -> None:
    """Thresholds, poolings, rules and each dataset by itself, against the rule run by hand."""
    answer = read_answer(validated.folder)
    table = sensitivity_table(answer)
    assert table is not None
    rows = {row[0]: row[1:] for row in table.rows}
    for share in (0.3, 0.4, 0.5, 0.6, 0.7):
        own = select(answer.scores, resamples=0, accuracy=share, agreement=share)
        found = tuple(describe_blocks(own.blocks(tower)) for tower in ("vision", "text"))
        assert rows[f"threshold at {share:g} of the range"] == found
    assert rows["pooling other than cls and eot"] == ("not scored", "not scored")
    assert {"rule knee", "rule budget", "rule paper, the default"} <= set(rows)
    alone = next(row for name, row in rows.items() if "alone, by class accuracy" in name)
    one = answer.scores[answer.scores["dataset"] == DATASETS[0]]
    own = select(one, metric="class_accuracy", agreement_metric="none", resamples=0)
    assert alone == tuple(describe_blocks(own.blocks(tower)) for tower in ("vision", "text"))


def test_a_block_without_a_value_that_the_choice_does_not_read_leaves_a_report(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path / "run")
    scores = read_answer(run.folder).scores
    hole = (scores["metric"] == "class_accuracy") & (scores["position"] == "5")
    write_scores(scores[~hole], run.folder)
    table = sensitivity_table(read_answer(run.folder))
    assert table is not None
    alone = [row for row in table.rows if "alone, by class accuracy" in row[0]]
    assert [row[1:] for row in alone] == [("not at every block", "not at every block")]


def test_both_poolings_answer_where_both_were_scored(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", small=True)
    scores = read_answer(run.folder).scores
    mean = scores[scores["tower"] == "vision"].assign(pooling="mean")
    late = (mean["metric"] == "dataset_accuracy") & (mean["depth"] < 0.6)
    write_scores(pd.concat([scores, mean.assign(value=mean["value"].mask(late, 0.1))]), run.folder)
    table = sensitivity_table(read_answer(run.folder))
    assert table is not None
    rows = {row[0]: row[1] for row in table.rows}
    assert rows["pooling cls"] == "5–12" and rows["pooling mean"] == "8–12"
    assert "pooling eot" not in rows, "the texts have one pooling alone"


def test_other_settings_leave_what_they_do_not_name_as_it_was_chosen(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    scores = read_answer(run.folder).scores
    rules = (
        {"accuracy": 0.7, "metric": "class_accuracy", "agreement_metric": "none"},
        {"accuracy": 0.5, "metric": "class_accuracy", "agreement_metric": "none"},
    )
    for options in rules:
        choice = select(scores, "threshold", resamples=0, **options)
        choice.save(run.choice)
        table = sensitivity_table(read_answer(run.folder))
        assert table is not None
        rows = {row[0]: row[1:] for row in table.rows}
        chosen = tuple(describe_blocks(choice.blocks(tower)) for tower in ("vision", "text"))
        assert rows[f"threshold at {options['accuracy']} of the range"] == chosen
        (alone,) = (blocks for what, blocks in rows.items() if "alone, by class accuracy" in what)
        assert alone == chosen, "curves of all datasets are parallel, and the share is the choice's"


def test_each_other_setting_is_the_rule_run_by_hand_with_what_the_choice_was_made_by(
    tmp_path: Path,
) -> None:
    """Curves of other shapes, so that a metric, a share or an option that is mixed up shows."""
    run = make_run(tmp_path / "run", small=True)
    rise = [0.2 + 0.06 * block for block in range(12)]
    bend = [value**3 for value in rise]
    bend[10] = bend[3]  # which filling closes
    early = [1 - (1 - value) ** 4 for value in rise]
    ncm, inside = "dataset_accuracy_ncm", "skip_joint_change"
    parts = [
        curve_rows("dataset_accuracy", tower, step(12, 5)) for tower in ("vision", "text")
    ] + [
        curve_rows(name, tower, curve)
        for name, curves in ((ncm, (bend, early)), (inside, (rise[::-1], bend[::-1])))
        for tower, curve in zip(("vision", "text"), curves)
    ] + [
        pair_rows("cka", 12, 12, lambda i, j: 0.1 + (i + 2 * j) / 40),
        pair_rows("cka_debiased", 12, 12, lambda i, j: 0.8 if min(i, j) > 2 else 0.1),
    ]  # fmt: skip
    # Of single datasets: two for each start, six for that of block 9, given last.
    names = [f"{letter}{start}" for start in (*range(2, 9), 9, 9, 9) for letter in "ab"]
    names = [f"{name}-{number}" for number, name in enumerate(names)]
    for name in names:
        curve = step(12, int(name[1]))
        curve[-2] = 0.4  # which filling closes
        parts.append(curve_rows("class_accuracy", "vision", curve, dataset=name))
    parts.append(curve_rows("class_accuracy", "vision", rise, dataset="*"))
    scores = table(*parts)
    own = {"metric": ncm, "agreement_metric": "cka", "partner": "max", "fill": True}

    def rows(choice: LayerChoice, scores: pd.DataFrame) -> dict[str, tuple[str, ...]]:
        write_scores(scores, run.folder)
        choice.save(run.choice)
        found = sensitivity_table(read_answer(run.folder))
        assert found is not None
        return {row[0]: row[1:] for row in found.rows}

    def by_hand(rule: str, scores: pd.DataFrame = scores, **options: object) -> tuple[str, ...]:
        chosen = select(scores, rule, resamples=0, **options)
        return describe_blocks(chosen.vision), describe_blocks(chosen.text)

    shares = (0.3, 0.4, 0.5, 0.6, 0.7)
    choice = select(scores, "threshold", resamples=0, accuracy=0.4, agreement=0.6, **own)
    found = rows(choice, scores)
    for share in shares:
        expected = by_hand("threshold", **own, accuracy=share, agreement=share)
        assert found[f"threshold at {share:g} of the range"] == expected
        # Each share bears on both curves.
        assert expected != by_hand("threshold", **own, accuracy=share) or share == 0.5
    assert "rule threshold" not in found
    assert found["rule knee"] == by_hand("knee", metric=ncm) != by_hand("knee")
    budget = by_hand("budget", score=f"metric:{ncm}")
    assert found["rule budget"] == budget != by_hand("budget")
    (name,) = (name for name in found if name.startswith("rule budget by "))
    assert found[name] == by_hand("budget", score=f"metric:{inside}") != budget

    alone = [name for name in found if " alone" in name]
    six = [name for name in names if name[1] == "9"]
    assert alone[0] == f"{', '.join(six[:4])} and 2 more alone, by class accuracy (linear probe)"
    assert found[alone[0]] == ("9–12", "not scored"), "filled, as the choice was"
    assert len(alone) == 7 and found[alone[-1]] == ("2 more answers", "2 more answers")
    assert alone[-1] == "4 more datasets alone"

    pooled = scores[(scores["metric"] != "class_accuracy") | (scores["dataset"] == "*")]
    assert not [name for name in rows(choice, pooled) if " alone" in name]

    # Without what the towers agreed by, what is said of agreement is nothing to go by.
    without = scores[scores["metric"] != "cka"]
    bare = {"metric": ncm, "agreement_metric": "none", "fill": True}
    assert rows(choice, without)["threshold at 0.3 of the range"] == by_hand(
        "threshold", without, **bare, accuracy=0.3
    )
    found = rows(select(scores, "knee", resamples=0), scores)
    assert "rule knee" not in found and found["rule budget"] == by_hand("budget")
    assert found["rule threshold"] == by_hand("threshold")
    assert found[f"threshold at {0.7} of the range"] == by_hand(
        "threshold", accuracy=0.7, agreement=0.7
    )


def test_a_caption_of_agreement_counts_the_pairs_that_are_drawn(tmp_path: Path) -> None:
    """Agreement within a tower and of single datasets has other items and is not drawn."""
    run = make_run(tmp_path / "run", small=True)
    scores = read_answer(run.folder).scores
    pairs = scores[scores["metric"] == "cka_debiased"]
    within = pairs.assign(other_tower="vision", n=400, options="pairs=items")
    single = pairs.assign(dataset="digits", n=16)
    write_scores(pd.concat([scores, within, single]), run.folder)
    plan = next(p for p in plans(read_answer(run.folder)) if p.name == "agreement-cka-debiased")
    assert "n = 300 (vision)" in plan.caption and "items" not in plan.caption.partition("How")[2]


def test_the_score_that_a_figure_shows_is_said_to_be_the_best_of_several(validated: Run) -> None:
    correlations = pd.read_csv(validated.folder / "validation_correlations.csv")
    captions = {plan.name: plan.caption for plan in plans(read_answer(validated.folder))}
    assert len(correlations) > 1
    said = f"Of {len(correlations)} scores the one with the largest Kendall's τ, 0.50, which"
    assert said in captions["predicted-trained"]
    assert "the first looks best because it was looked for" in validated.report.read_text()


def test_captions_of_trainings_promise_no_mark_that_is_not_drawn(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", validated=True)
    for ends in (True, False):
        captions = {plan.name: plan.caption for plan in plans(read_answer(run.folder))}
        for name in ("placement-sweep", "cost", "predicted-trained"):
            assert ("95 % interval" in captions[name]) == ends, name
        assert ("Joined" in captions["placement-sweep"]) == ends
        placed = pd.read_csv(run.folder / "validation_placements.csv")
        placed.assign(hm_low=float("nan"), hm_high=float("nan")).to_csv(
            run.folder / "validation_placements.csv", index=False
        )
        cells = pd.read_csv(run.validation)
        cells.assign(kind=cells["kind"].str.replace("start", "single")).to_csv(
            run.validation, index=False
        )


def test_a_reading_starts_and_ends_where_there_is_a_number(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", small=True)
    scores = read_answer(run.folder).scores
    ends = (scores["metric"] == "dataset_accuracy") & scores["position"].isin(["embed", "proj"])
    write_scores(scores.assign(value=scores["value"].mask(ends)), run.folder)
    read = read_answer(run.folder).reading("dataset_accuracy")
    assert read.startswith("Vision: 0.40 at 1, 0.90 at 12. Text: 0.40 at 1, 0.90 at 12.")


@pytest.mark.parametrize(("column", "other"), [("pooling", "mean"), ("split", "test")])
def test_a_chart_and_its_caption_are_of_one_pooling_and_split_as_the_figure_is(
    tmp_path: Path, column: str, other: str
) -> None:
    run = make_run(tmp_path / "run", small=True)
    scores = read_answer(run.folder).scores
    lone = payload(read_answer(run.folder))
    beside = scores[scores["tower"] == "vision"].assign(**{column: other})
    joined = pd.concat([scores, beside.assign(value=beside["value"] / 2, n=beside["n"] * 2)])
    write_scores(joined, run.folder)
    found = payload(read_answer(run.folder))
    assert found["matrices"] == lone["matrices"] and found["curves"] == lone["curves"]
    for name, entry in lone["metrics"].items():
        assert found["metrics"][name]["caption"] == entry["caption"]


def test_what_to_do_next_is_a_command_that_can_be_typed(validated: Run) -> None:
    validated.record(
        given={"model": {"name": "ViT-B-16", "pretrained": "a b.pt", "mean": [0.5, 0.4, 0.3],
                         "random_weights": False}, "datasets": ["eurosat"], "data_root": "my data"},
        validate={"kinds": ["paper", "all"], "amounts": ["scale=0.3"], "set": {"shots": 8},
                  "items": 90, "seeds": [1, 2, 3], "present_only": True},
    )  # fmt: skip
    proof, adapt = next_steps(read_answer(validated.folder))
    folder = str(validated.folder)
    assert shlex.split(proof.code) == [
        "vlmlayers", "validate", "ViT-B-16", "--pretrained", "a b.pt", "--mean", "0.5,0.4,0.3",
        "eurosat", "--choice", folder, "--out", folder, "--data-root", "my data",
        "--set", "shots=8", "--amounts", "scale=0.3", "--kinds", "paper,all", "--items", "90",
        "--present-only", "--seeds", "1,2,3,4,5,6",
    ]  # fmt: skip
    summary = validated.folder / "validation.json"
    write_json(summary, read_json(summary) | {"training_seconds": 600.0})
    again = next_steps(read_answer(validated.folder))[0].text
    assert "about 10 min, as long as the 3 took here; testing comes on top" in again
    # As of a study that was given its third seed when two were trained.
    write_json(validated.folder / "stages.json", {"validate": {"seconds": 200.0}})
    assert next_steps(read_answer(validated.folder))[0].text == again
    (validated.folder / "stages.json").unlink()
    assert "choice.to_peft(clip" in adapt.code
    compile(adapt.code, "next", "exec")


def test_the_next_command_names_folders_and_what_was_left_out(validated: Run) -> None:
    """A study finds `photos` under its data root, and leaves out what is not on disk."""
    validated.record(
        given={"model": {"name": "mini-clip"}, "datasets": ["my data/photos", "own/signs.toml"],
               "data_root": "my data", "leaving_out": {"present_only": True}},
        validate={"datasets": ["photos", "signs", "faces"]},
    )  # fmt: skip
    words = shlex.split(next_steps(read_answer(validated.folder))[0].code)
    assert words[2:6] == ["mini-clip", "my data/photos", "own/signs.toml", "faces"]
    assert "--present-only" in words and "True" not in words
    validated.record(validate={"present_only": False})  # as a verb was told
    assert "--present-only" not in next_steps(read_answer(validated.folder))[0].code


def test_a_dataset_of_which_images_were_left_out_says_so(tmp_path: Path) -> None:
    """The options of the stage are those of most datasets: there it was "no"."""
    run = make_run(tmp_path, small=True)
    run.record(datasets={"digits": {"items": 9, "present_only": True}, "flags": {"items": 9}})
    (found,) = (t for t in made_tables(read_answer(run.folder)) if t.caption == "Datasets")
    place = found.headings.index("Present only")
    assert [row[place] for row in found.rows] == ["yes", "–"]


def test_the_time_of_a_proof_is_that_of_images_and_not_of_loading_the_model(tmp_path: Path) -> None:
    """640 images in 20 s: 32 a second, whatever the last extraction found made or took to load."""
    run = make_run(tmp_path / "run", 24, 12)
    assert "*" not in shlex.split(next_steps(read_answer(run.folder))[0].code), "of pooled scores"
    # The larger half of 13 classes and the one of 1 are base classes.
    datasets = {"toy": {"items": 600, "classes": 13, "seconds": 18.0},
                "lone": {"items": 40, "classes": 1, "seconds": 2.0}}  # fmt: skip
    given = {"model": {"name": "toy"}, "datasets": ["toy", "lone"]}
    run.record(datasets=datasets, given=given)
    write_json(run.folder / "stages.json", {"extract": {"seconds": 60.0}})
    text = next_steps(read_answer(run.folder))[0].text
    # 24 blocks and 8 more placements, 8 base classes, 16 shots, 5 epochs, 3 seeds, 1.5 passes
    minutes = 1.5 * 32 * 8 * 16 * 5 * 3 / 32 / 60
    # At tuned amounts each seed trains at the recipe's and for twice as long at its own, and all
    # of them share what finding that takes, eight trainings.
    hours = minutes / 3 * (3 + 3 * 2 + 8) / 60
    assert hours > 4 and minutes < 90
    assert (
        f"About {hours:.0f} h, or {minutes:.0f} min with --amount given, at the 32 images a second"
    ) in text
    # What the study will ask for when its turn comes: 4 shots, 10 epochs, 5 seeds
    run.study.write_text(
        '[validate]\ndatasets = "toy"\nset = { epochs = 10, lr = 0.1 }\nshots = 4\n'
        'amounts = "scale=0.3"\namount = "given"\nseeds = [1, 2, 3, 4, 5]\n'
    )
    proof = next_steps(read_answer(run.folder))[0]
    minutes = 1.5 * 32 * 8 * 4 * 10 * 5 / 32 / 60
    assert f"About {minutes:.0f} min, at the 32 images a second" in proof.text
    assert "32 placements, 5 seeds, 4 shots of each base class, 10 epochs" in proof.text
    folder = str(run.folder)
    assert shlex.split(proof.code)[3:] == [
        "toy", "--choice", folder, "--out", folder, "--set", "epochs=10", "--set", "lr=0.1",
        "--amounts", "scale=0.3", "--shots", "4", "--amount", "given", "--seeds", "1,2,3,4,5",
    ]  # fmt: skip
    # Of another number of epochs, or of placements.
    for other in ('method = "coop"', 'recipe = "mine.toml"', 'kinds = ["all"]'):
        run.study.write_text(f"[validate]\n{other}\n")
        assert "images a second" not in next_steps(read_answer(run.folder))[0].text
    run.study.unlink()
    run.record(datasets={key: one | {"seconds": 0.0} for key, one in datasets.items()})
    assert "images a second" not in next_steps(read_answer(run.folder))[0].text


def test_title_and_note_of_the_study_are_kept(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", small=True)
    run.record(report={"title": "My study", "note": "Of my own."}, left_out={"birds-val": "lost"})
    text = written(run)
    assert "<h1>My study</h1>" in text and "<p>Of my own.</p>" in text
    assert "Left out: birds-val. lost" in text
    assert "Left out: birds-val. lost" in (run.folder / "report.md").read_text()
    assert "<h1>Other</h1>" in written(run, "Other")


def test_words_are_explained_once_and_figures_come_as_one_archive(validated: Run) -> None:
    text = validated.report.read_text()
    explained = re.findall(r"<abbr[^>]*title=\"([^\"]+)\">([^<]+)</abbr>", text)
    assert ("One of the two encoders of the model: vision or text.", "tower") in explained
    assert str(glossary("a <b> block, a block")) == (
        'a &lt;b&gt; <abbr tabindex="0" title="One residual block of a tower, numbered from 1.">'
        "block</abbr>, a block"
    )
    links = {a["download"]: a["href"] for a in Page(text).all("a") if "download" in a}
    packed = base64.b64decode(str(links["figures.zip"]).partition(",")[2])
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        assert {Path(name).suffix for name in archive.namelist()} == {
            ".svg",
            ".png",
            ".pdf",
            ".csv",
        }
        for name in archive.namelist():
            assert archive.read(name) == (validated.figures / name).read_bytes()


def test_a_share_is_none_or_all_only_where_it_is() -> None:
    assert [percent(one) for one in (0, 0.002, 0.005, 0.5, 0.746, 0.997, 1)] == [
        "0 %", "< 1 %", "< 1 %", "50 %", "75 %", "> 99 %", "100 %",
    ]  # fmt: skip
    assert percent(0.25, 0.6) == "25–60 %" and percent(0.001, 1) == "< 1–100 %"


def test_a_block_score_is_not_called_by_the_metric_that_it_scales(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", small=True)
    scores = read_answer(run.folder).scores
    by = "metric:dataset_accuracy"
    select(scores, "budget", score=by, resamples=20).save(run.choice)
    (vision, *_) = answer_tables(read_answer(run.folder))
    assert vision.headings[1] == "Dataset accuracy (linear probe), share of range"
    assert vision.rows[0][1] == "0.00"


def test_what_the_choice_was_made_by_is_shown_first(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    scores = read_answer(run.folder).scores
    opened = {}
    for by, metric in {
        "accuracy": "dataset_accuracy",
        "metric:fisher_ratio": "fisher_ratio",
    }.items():
        select(scores, "budget", score=by, resamples=20).save(run.choice)
        page = write_report(run.folder, formats=["svg"]).read_text()
        depth = page[page.index("Along depth</h3>") :]
        opened[by] = re.sub("<[^>]+>", "", depth[: depth.index("<figure")])
        shown = re.search(r'<option value="(\w+)"', depth)
        assert shown is not None and shown[1] == metric
        first = next(iter(plans(read_answer(run.folder))))
        assert first.name == f"curves-{metric.replace('_', '-')}"
    assert "Dataset accuracy (linear probe). Vision:" in opened["accuracy"]
    assert "Why telling datasets apart" in opened["accuracy"]
    assert "Fisher ratio tr S_b / tr S_w. Vision:" in opened["metric:fisher_ratio"]
    assert "Why telling datasets apart" not in opened["metric:fisher_ratio"]


def test_a_column_of_all_datasets_has_no_place_of_a_single_one(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", small=True)
    scores = read_answer(run.folder).scores
    of_all, of_one = (
        row("mutual_knn_max", "vision", place, 12, value, dataset=dataset, other_tower="text",
            other_position="12")
        for dataset, place, value in (("*", "proj", 0.7), (DATASETS[0], "12", 0.6))
    )  # fmt: skip
    write_scores(pd.concat([scores, table([of_all, of_one])]), run.folder)
    found = answer_tables(read_answer(run.folder))[-1]
    assert found.headings[-1].endswith("closest pair, calibrated as a maximum")
    assert [line for line in found.rows if line[-1] != "–"] == [("vision proj", "0.900", "0.7")]


def test_a_long_fact_is_listed_clause_by_clause_and_loses_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", validated=True)
    verdict = (
        "The chosen placement (v5-12,t5-12) did worse than the default by far; the best placement "
        "(v9-12,t9-12; picked afterwards. Beware) is 0.4 points above it [0.1; 0.7]; here is 1. To "
        "see a point takes more cells than are here. Nothing <b>is</b> bold on a page of this "
        "kind, which shows marks as they are."
    )
    record = read_json(run.folder / "validation.json")
    write_json(run.folder / "validation.json", {**record, "verdict": verdict})
    page = write_report(run.folder, formats=["svg"]).read_text()
    proof = page[page.index('<div class="told">') :]
    listed = re.findall("<li>(.*?)</li>", proof[: proof.index("</div>")])
    clauses = [html.unescape(re.sub("<[^>]*>", "", one)) for one in listed]
    assert [one.split()[0] for one in clauses] == ["The", "the", "To", "Nothing"]
    letters = re.compile(r"[;.]? |[;.]$")
    assert letters.sub("", "".join(f"{one} " for one in clauses)) == letters.sub("", verdict)
    assert '<span class="whole">v9-12</span>,<wbr>' in listed[1]
    meaning = "The blocks of both towers that an adapter acts in."
    assert listed[0].count(meaning) == 1 and meaning not in listed[1], "a word is explained once"
    proof = (run.folder / "report.md").read_text().partition("## Test by training\n\n")[2]
    shown = [one.removeprefix("- ") for one in proof.partition("\n\n")[0].splitlines()]
    assert shown == [escape_markdown(one) for one in clauses]


def test_an_unmatched_bracket_of_a_name_does_not_keep_a_fact_in_one_piece() -> None:
    parts = [
        *(f"dataset {n} of a long name (one; of two) has its say here, and says it" for n in "ab"),
        "c) comes after them, with a clause that is long enough",
        "and the last one comes here, as long as those before it",
    ]
    assert clauses("; ".join(parts)) == parts


def test_numbers_of_a_column_have_the_same_decimals() -> None:
    rows = [["a", 0.55, 1.0, 3], ["b", 0.012345, None, 4], ["c", float("nan"), 250.0, 5]]
    table = tabular("Mixed", ["Name", "Share", "Width", "Count"], rows)
    assert [row[1:] for row in table.rows] == [
        ("0.550", "1", "3"), ("0.012", "–", "4"), ("–", "250", "5"),
    ]  # fmt: skip
    assert table.numeric == {1, 2, 3}
    apart = tabular("Words", ["What", "Value"], [["a", 0.5], ["b", "yes"], ["c", 1e-9]])
    assert [row[1] for row in apart.rows] == ["0.5", "yes", "1e-09"] and apart.numeric == set()
    assert tabular("", ["Name", "HM"], [["a", "61.2 [60.1, 62.3]"]]).numeric == {1}


def test_captions_say_how_the_values_were_made(random_run: Run) -> None:
    text = (random_run.folder / "report.md").read_text()
    made = "How: split train; native space; pooling cls (vision) and eot (text); "
    assert f"{made}n = 300 (vision) and 300 (text)" in text


def test_a_comparison_says_what_stands_against_it(tmp_path: Path) -> None:
    one, two = (make_run(tmp_path / name, small=True) for name in ("one", "two"))

    def said(**second: object) -> list[str]:
        first = {"extract": {"split": "val", "workers": 1}, "score": {"options": {"seeds": [1]}}}
        for run, changes in ((one, {}), (two, second)):
            run.record(**{**first, "datasets": {"digits": {"items_hash": "a"}}, **changes})
        return comparability([(run.folder.name, read_answer(run.folder)) for run in (one, two)])

    assert said() == [ALIKE]
    assert said(extract={"split": "val", "workers": 4}) == [ALIKE]
    assert said(score={"options": {"seeds": [1], "folds": 5}}) == [ALIKE], "five is the default"
    assert said(datasets={"digits": {"items_hash": "b"}}) == [
        "The runs saw different items of digits."
    ]
    assert said(datasets={"digits": {"items_hash": "a", "template": "{}"}}) == [ALIKE], "unrecorded"
    assert said(score={"options": {"seeds": [1, 2]}}, extract={"split": "test"}) == [
        "Stage extract, split: val in one, test in two.",
        "Stage score, seeds: [1] in one, [1, 2] in two.",
    ]
    scores = read_answer(one.folder).scores
    select(scores, "budget", resamples=20, n=4).save(two.choice)  # as the verb does
    assert "Stage select, rule: threshold in one, budget in two." in said()
    answer = read_answer(two.folder)
    rows = next(t for t in made_tables(answer) if t.caption == "Options").rows
    assert ("select", "rule", "budget") in [tuple(one) for one in rows]
    select(scores, resamples=20).save(two.choice)
    write_scores(scores.assign(dataset=scores["dataset"].replace("*", "flags")), two.folder)
    assert said()[0].startswith("The datasets differ: beside what all share, two has flags.")
    page = Page(write_comparison([one.folder, two.folder], tmp_path / "both").read_text())
    assert "The datasets differ" in " ".join(page.words)
    assert "The datasets differ" in (tmp_path / "both" / "report.md").read_text()


@pytest.mark.parametrize(
    ("two", "said"),
    [
        ({}, ALIKE),
        (
            {"data_hash": "other"},
            "Of digits and flags the runs saw files of the same names that differ or were copied.",
        ),
        (
            {"data_hash": "other", "items_hash": "b"},
            "The runs saw different items of digits and flags.",
        ),
        (
            {"template": "a {}."},
            "Stage extract, template of digits and flags: {} in one, a {}. in two.",
        ),
        ({"text": "captions"},
         "Stage extract, text of digits and flags: prompts in one, captions in two."),
        ({"present_only": True},
         "Stage extract, present only of digits and flags: False in one, True in two."),
    ],
)  # fmt: skip
def test_what_each_dataset_has_of_its_own_is_compared(
    two: dict[str, object], said: str, tmp_path: Path
) -> None:
    """What is recorded of the stage is what is asked of most datasets, and may be the same."""
    record = {"split": "val", "text": "prompts", "template": "{}", "present_only": False,
              "items_hash": "a", "data_hash": "b"}  # fmt: skip
    runs = []
    for name, own in (("one", {}), ("two", two)):
        run = make_run(tmp_path / name, small=True)
        one = record | own
        asked = {key: value for key, value in one.items() if not key.endswith("hash")}
        run.record(datasets={"digits": one, "flags": one}, extract=asked, score={"options": {}})
        runs.append((name, read_answer(run.folder)))
    assert comparability(runs) == [said]


def test_splits_of_one_dataset_are_compared_by_name_and_split(tmp_path: Path) -> None:
    """With two of a dataset a run calls them after their folders: nothing was compared."""
    val, train = {"split": "val", "items_hash": "a"}, {"split": "train", "items_hash": "b"}
    of_two = {f"digits-{one['split']}": {"name": "digits", **one} for one in (val, train)}
    runs = [make_run(tmp_path / name, small=True) for name in ("one", "two")]

    def said(**two: object) -> list[str]:
        for run, datasets in zip(runs, ({"digits": val}, of_two | two)):
            run.record(datasets=datasets, extract={"split": "val"}, score={"options": {}})
        return comparability([(run.folder.name, read_answer(run.folder)) for run in runs])

    splits = "Stage extract, split of digits: val in one, train and val in two."
    assert said() == [splits]
    other = {"digits-val": of_two["digits-val"] | {"items_hash": "c"}}
    assert said(**other) == ["The runs saw different items of digits.", splits]
    (told, _) = said(flags={"split": "val"})
    assert told.startswith("The datasets differ: beside what all share, two has flags.")


def test_other_counts_of_items_are_told_where_nothing_else_tells(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, small=True) for name in ("one", "two")]
    for run in runs:
        run.provenance.unlink(missing_ok=True)

    def said() -> list[str]:
        return comparability([(run.folder.name, read_answer(run.folder)) for run in runs])

    assert said() == []
    scores = read_answer(runs[1].folder).scores
    write_scores(scores.assign(n=scores["n"] // 2), runs[1].folder)
    (told,) = said()
    assert told.startswith("The scores are of different numbers of items of ")


def test_trainings_that_differ_are_told_beside_their_means(validated: Run, tmp_path: Path) -> None:
    """Of other methods, shots and datasets they stood in one column, and all was called alike."""
    runs = [tmp_path / name for name in ("one", "two")]
    for folder in runs:
        shutil.copytree(validated.folder, folder)

    def said() -> list[str]:
        return comparability([(folder.name, read_answer(folder)) for folder in runs])

    before = read_json(runs[1] / "validation.json")
    assert not any("Trained harmonic means" in one for one in said())
    other = {"method": "maple", "shots": 99, "recipe": {"lr": 7.0}}
    write_json(runs[1] / "validation.json", {**before, **other})
    assert not any("Trained harmonic means" in one for one in said()), "an earlier record says less"
    ours = {"method": "mma", "shots": 16, "recipe": {"lr": 0.5}}
    write_json(runs[0] / "validation.json", {**before, **ours})
    (told,) = [one for one in said() if one.startswith("Trained harmonic means do not compare: ")]
    assert "maple in two" in told and "99 in two" in told and "lr " in told and "7.0 in two" in told
    assert "items" not in told

    def trained(first: dict[str, object], second: dict[str, object]) -> list[str]:
        for folder, other in zip(runs, (first, second)):
            write_json(folder / "validation.json", {**before, **other})
            model = Run(folder).read_provenance()["model"]
            Run(folder).record(model=model | {"weights_hash": other["weights_hash"]})
        return [one for one in said() if one.startswith("Trained harmonic means")]

    how = {"method": "mma", "recipe": {"name": "a", "weight_decay": 0.1, "optimizer": "sgd"},
           "settings": {"scale": 0.1, "dim": 32}, "data": {"digits": {"hash": "x"}},
           "weights_hash": "one"}  # fmt: skip
    other = {"recipe": {"name": "b", "weight_decay": 0.2, "optimizer": "sgd"},
             "settings": {"scale": 0.3, "dim": 32}, "data": {"digits": {"hash": "y"}}}  # fmt: skip
    named = {"recipe": {**how["recipe"], "name": "b"}, "weights_hash": "two"}
    assert trained(how, how | named) == [], "models may differ, and names of recipes say nothing"
    orders = ({"seeds": one, "datasets": two} for one, two in (([1, 2], "ab"), ([2, 1], "ba")))
    assert trained(*(how | {**one, "datasets": list(one["datasets"])} for one in orders)) == []
    assert trained(how, how | other) == [
        "Trained harmonic means do not compare: weight_decay 0.1 in one, 0.2 in two; "
        "scale 0.1 in one, 0.3 in two; test images of digits, which differ or were copied."
    ]
    coop = {"method": "coop", "settings": {"n_ctx": 4}}
    assert trained(how, how | coop) == [
        "Trained harmonic means do not compare: method mma in one, coop in two."
    ]


def test_no_markup_of_another_language_is_shown(random_run: Run) -> None:
    words = " ".join(Page(random_run.report.read_text().split("<script")[0]).words)
    assert "not yet; the command vlmlayers validate trains here" in words
    report = (random_run.folder / "report.md").read_text().replace("```", "")  # fences of code
    assert "`" not in words and "`" not in report


def test_another_readout_of_the_dataset_is_drawn_and_compared(tmp_path: Path) -> None:
    folders = []
    for name in ("one", "two"):
        run = make_run(tmp_path / name, small=True)
        scores = read_answer(run.folder).scores
        other = scores.replace({"metric": {"dataset_accuracy": "dataset_accuracy_ncm"}})
        write_scores(other, run.folder)
        select(other, metric="dataset_accuracy_ncm", resamples=20).save(run.choice)
        folders.append(run.folder)
    write_report(folders[0])
    drawn = pd.read_csv(folders[0] / "figures" / "curves-dataset-accuracy-ncm.csv")
    assert set(drawn["metric"]) == {"dataset_accuracy_ncm"} and drawn["value"].max() == 0.9
    links = Page((folders[0] / "report.html").read_text()).all("a")
    assert "curves-dataset-accuracy-ncm.csv" in {one.get("download") for one in links}
    write_comparison(folders, tmp_path / "both")
    assert (tmp_path / "both" / "figures" / "runs-dataset-accuracy-ncm.svg").exists()
    summary = summary_table([(path.name, read_answer(path)) for path in folders])
    assert summary.caption.endswith("dataset accuracy (nearest mean)")
    column = summary.headings.index("Vision accuracy, embed")
    assert [one[column : column + 2] for one in summary.rows] == [("0.400", "0.900")] * 2


def test_every_table_beside_a_figure_names_model_and_weights(
    random_run: Run, validated: Run, tmp_path: Path
) -> None:
    for run, weights in ((random_run, "random"), (validated, "toy.safetensors")):
        files = sorted(run.figures.glob("*.csv"))
        assert len(files) >= 3
        links = {str(one.get("download")): one for one in Page(run.report.read_text()).all("a")}
        for file in files:
            table = pd.read_csv(file)
            assert list(table.columns[:2]) == ["model", "weights"], file.name
            assert set(table["model"]) == {"toy"} and set(table["weights"]) == {weights}
            uri = str(links[file.name]["href"])
            assert base64.b64decode(uri.partition(",")[2]) == file.read_bytes()
    write_comparison([validated.folder, random_run.folder], tmp_path / "both")
    both = pd.read_csv(tmp_path / "both" / "figures" / "runs-dataset-accuracy.csv")
    assert dict(zip(both["run"], both["weights"])) == {
        "validated": "toy.safetensors",
        "random (random)": "random",
    }
    for tower, end in (("vision", ""), ("text", "-text")):
        file = tmp_path / "both" / "figures" / f"runs-dataset-accuracy{end}.csv"
        assert set(pd.read_csv(file)["tower"]) == {tower}


def test_trained_outcomes_of_random_weights_are_marked(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", validated=True, weights="random")
    write_figures(run.folder, formats=("svg",))
    for name in ("placement-sweep", "cost", "predicted-trained", "selection-frequency"):
        assert "random weights" in (run.figures / f"{name}.svg").read_text(), name


def test_markdown_report_is_inert(validated: Run) -> None:
    text = (validated.folder / "report.md").read_text()
    assert "<script" not in text and "<img" not in text
    assert (
        "Adapt **blocks 5–12 of the vision tower**" in text
        and "](figures/curves-dataset-accuracy.svg)" in text
    )
    answer, _, evidence = text.partition("## Evidence")
    assert "(best of all trained)" in answer and "zero-shot (no adapter)" in answer
    assert "none predicted the outcome." in evidence
    for link in re.findall(r"\]\((figures/[^)]+)\)", text):
        assert (validated.folder / link).exists()


def test_runs_whose_folders_have_like_parents_stay_apart(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / one / "clip" / "run", small=True).folder for one in "ab"]
    write_comparison(folders, tmp_path / "both", formats=("svg",))
    table = pd.read_csv(next((tmp_path / "both" / "figures").glob("runs-*.csv")))
    assert set(table["run"]) == {"a/clip/run", "b/clip/run"}


def test_a_choice_of_a_shallower_tower_is_refused(tmp_path: Path) -> None:
    run, other = (make_run(tmp_path / str(deep), deep, deep, small=True) for deep in (12, 6))
    shutil.copy(other.choice, run.choice)
    with pytest.raises(UserError, match="choice is of 6 vision blocks and the scores are of 12"):
        write_report(run.folder)


def test_comparison_of_unequal_runs(validated: Run, random_run: Run, tmp_path: Path) -> None:
    path = write_comparison([validated.folder, random_run.folder], tmp_path / "both", "Two")
    text = path.read_text()
    assert "Runs: random." in text.split("<header>")[0]
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S).group(1))  # type: ignore[union-attr]
    assert [run["depth"]["vision"] for run in data["runs"]] == [12, 24]
    for link in re.findall(r'<a href="([^#"][^"]*report.html)"', text):
        assert (path.parent / link).resolve().exists()
    assert (tmp_path / "both" / "report.md").read_text().startswith("# Two")
    with pytest.raises(UserError, match="at least two"):
        write_comparison([validated.folder], tmp_path)
    with pytest.raises(UserError, match="is named twice; a comparison is of different runs"):
        write_comparison([validated.folder, f"{validated.folder}/."], tmp_path)
    with pytest.raises(UserError, match="whose own report would be replaced"):
        write_comparison([validated.folder, random_run.folder], random_run.folder)
    with pytest.raises(UserError, match="shows figures as svg or png"):
        write_comparison([validated.folder, random_run.folder], tmp_path, formats="pdf")


def test_a_comparison_sets_each_run_beside_the_others_by_what_all_of_them_have(
    tmp_path: Path,
) -> None:
    one = make_run(tmp_path / "one", validated=True)
    two = make_run(tmp_path / "two", 24, 12, small=True, weights="random")
    scores = read_answer(one.folder).scores
    ncm = scores[scores["metric"] == "dataset_accuracy"].assign(metric="dataset_accuracy_ncm")
    ncm = ncm.assign(value=ncm["depth"].where(ncm["tower"] == "vision", 0.05))
    write_scores(pd.concat([scores, ncm], ignore_index=True), one.folder)
    other = read_answer(two.folder).scores.replace("dataset_accuracy", "dataset_accuracy_ncm")
    write_scores(other, two.folder)
    choice = select(other, "explicit", vision="20-24", text="3")
    choice.save(two.choice)
    content = read_json(two.choice)
    content["evidence"] |= {"decided": False}
    write_json(two.choice, content)

    def shown() -> tuple[dict[str, str], ...]:
        pairs = [(run.folder.name, read_answer(run.folder)) for run in (one, two)]
        table = summary_table(pairs)
        assert table.caption.endswith("being dataset accuracy (nearest mean)")
        return tuple(dict(zip(table.headings, row)) for row in table.rows)

    first, second = shown()
    assert (first["Adapt vision"], first["Adapt text"], first["Decided"]) == ("5–12", "5–12", "yes")
    assert (second["Adapt vision"], second["Adapt text"]) == ("20–24", "3")
    assert second["Decided"] == "no" and second["Blocks"] == "vision 24 and text 12"
    assert (first["Weights"], second["Weights"]) == ("toy.safetensors", "random (UNTRAINED)")
    ends = [("Vision accuracy, embed", "embed"), ("Vision accuracy, last position", "proj")]
    for heading, position in ends:
        rows = ncm[(ncm["tower"] == "vision") & (ncm["position"] == position)]
        assert float(first[heading]) == pytest.approx(rows["value"].mean(), abs=0.001)
    assert [float(second[heading]) for heading, _ in ends] == [0.4, 0.9]
    gaps = scores[(scores["metric"] == "centroid_gap") & (scores["position"] == "proj")]
    assert float(first["Gap, last position"]) == pytest.approx(gaps["value"].mean(), abs=0.005)
    assert second["Gap, last position"] == second["Trained HM"] == second["Parameters"] == "–"
    assert first["Parameters"] == "8,000" and first["Trained HM"].endswith(")")
    # What was trained is of the choice of then.
    select(scores, "explicit", vision="2", text="3").save(one.choice)
    again, _ = shown()
    assert again["Adapt vision"] == "2" and again["Trained HM"] == again["Parameters"] == "–"


def test_what_runs_were_made_of_lists_first_what_differs(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, small=True) for name in ("one", "two")]
    runs[1].record(datasets={"shapes": {}, "digits": {}})
    notes = runs[1].read_provenance()["model"]
    runs[1].record(model={key: one for key, one in notes.items() if key != "parameters"})
    table = differences([(run.folder.name, read_answer(run.folder)) for run in runs])
    assert table.headings == ("What", "one", "two")
    differ = [row[1] != row[2] for row in table.rows]
    assert differ == sorted(differ, reverse=True) and {*differ} == {True, False}
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["Datasets"] == (DATASETS[2], "digits, shapes")
    assert [row[2] for row in table.rows if row[1] != "–"].count("–") == 1, "of no parameters"
    assert not any("–" in row[1] for row in table.rows)


def test_reading_is_computed_from_the_table(validated: Run) -> None:
    answer = read_answer(validated.folder)
    assert answer.reading("dataset_accuracy") == (
        "Vision: 0.40 at embed, 0.90 at proj. Text: 0.40 at embed, 0.90 at proj. Chance 0.10."
    )
    assert DATASETS[2] in set(answer.scores["dataset"])


def test_a_reading_says_where_a_curve_peaks_which_tie_and_chance_by_tower(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", small=True)
    scores = read_answer(run.folder).scores
    scores = scores[scores["metric"] == "dataset_accuracy"]
    vision, text = (scores["tower"] == tower for tower in ("vision", "text"))
    at = scores["position"].isin
    value = scores["value"].where(scores["value"].isna(), 0.2)
    value = value.mask(vision & at(["4", "7"]), 0.604).mask(vision & at(["5"]), 0.5959)
    null = scores["null"].mask(vision | text, -0.001).mask(vision & at(["2"]), 0.03)
    peak = "Vision: 0.20 at embed, 0.20 at proj, highest 0.60 at 4 (equal within 0.01: 4, 5, 7). "
    for lowest, tail in ((0.2, ""), (0.196, ""), (0.19, ", highest 0.20 at 1 (equal within 0.01:")):
        ends = value.mask(text & at(["embed", "proj"]), lowest)
        write_scores(scores.assign(value=ends, null=null), run.folder)
        read = read_answer(run.folder).reading("dataset_accuracy")
        assert read.startswith(peak) and tail in read
        assert (", highest 0.20" in read) == bool(tail)
        # −0.001 is shown as 0, and one tower's range is not the other's.
        assert read.endswith("Chance 0.00 to 0.03 for vision and 0.00 for text.")
    write_scores(scores.assign(value=-0.001, null=-0.001), run.folder)
    assert read_answer(run.folder).reading("dataset_accuracy") == (
        "Vision: 0.00 at embed, 0.00 at proj. Text: 0.00 at embed, 0.00 at proj. Chance 0.00."
    )


def test_figures_verb_and_bad_input(validated: Run, tmp_path: Path) -> None:
    run = make_run(tmp_path / "x", small=True)
    files = write_figures(run.folder, formats=("pdf", "png"))
    assert {path.suffix for path in files} == {".pdf", ".png", ".csv"}
    for call, message in (
        (lambda: write_report(run.folder, formats=("pdf",)), "svg or png"),
        (lambda: write_figures(run.folder, formats=("gif",)), "unknown figure format"),
        (lambda: write_report(run.folder, metrics=("rmgg",)), "unknown metric 'rmgg'"),
        (lambda: write_report(tmp_path), "not a run folder"),
    ):
        with pytest.raises(UserError, match=message):
            call()
    run.validation.write_text("placement,hm\na,1\n")
    with pytest.raises(UserError, match=r"lacks rows or the columns base, dataset"):
        write_report(run.folder)
    run.choice.unlink()
    with pytest.raises(UserError, match="vlmlayers select"):
        write_report(run.folder)


def test_the_verb_figures_leaves_none_of_earlier_scores(tmp_path: Path) -> None:
    run = make_run(tmp_path / "x", small=True)
    write_figures(run.folder, formats=("svg", "png"))
    (run.figures / "my_own.svg").write_text("of the user")
    write_figures(run.folder, formats=("pdf",))  # of the same scores: nothing goes
    assert {path.suffix for path in run.figures.glob("curves-*")} == {
        ".svg",
        ".png",
        ".pdf",
        ".csv",
    }
    write_scores(pd.read_parquet(run.scores).assign(value=0.5), run.folder)
    write_figures(run.folder, formats=("pdf",))
    assert {path.suffix for path in run.figures.glob("curves-*")} == {".pdf", ".csv"}  # no others
    assert (run.figures / "my_own.svg").exists()


def test_metrics_of_ones_own_and_those_that_are_named_are_drawn(tmp_path: Path) -> None:
    run = make_run(tmp_path / "x", small=True)
    scores = pd.read_parquet(run.scores)
    rows = scores[(scores["metric"] == "dataset_accuracy") & (scores["tower"] == "vision")]
    more = [rows.assign(metric=name) for name in ("mean_norm", "uniformity")]
    write_scores(pd.concat([scores, *more]), run.folder)
    drawn = {path.stem for path in write_figures(run.folder, formats=("svg",))}
    assert "curves-mean-norm" in drawn and "curves-uniformity" not in drawn
    call = CliRunner().invoke(app, ["figures", str(run.folder), "--metric", "uniformity"])
    assert "curves-uniformity.svg" in call.output, call.output
    call = CliRunner().invoke(app, ["report", str(run.folder), "--metric", "uniformity"])
    assert "Uniformity" in (run.folder / "report.md").read_text(), call.output
    for words in (["figures", "--paper", str(tmp_path / "paper")], ["report", str(run.folder)]):
        call = CliRunner().invoke(app, [*words, str(run.folder), "--metric", "uniformity"])
        assert "--metric is for the" in str(call.exception)


def test_text_tables() -> None:
    frame = pd.DataFrame({"name": ["a", "long name here"], "value": [1.5, float("nan")]})
    assert text_table(frame.to_dict("records"), {"name": 6}).splitlines()[1] == "a         1.5"
    assert escape_markdown("a|b <i>*") == "a\\|b &lt;i&gt;\\*"
    assert markdown_table(["h"], [["x\ny"]]).splitlines()[2] == "| x y |"
