"""Rules recover planted layers, say when they cannot, and refuse bad input in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from score_tables import curve_rows, full, pair_rows, planted, row, step, table

from vlmlayers import plots
from vlmlayers.errors import UserError
from vlmlayers.scores.reading import Reading, check_scores, depths, partner_block
from vlmlayers.scores.summaries import curves, how_made
from vlmlayers.selection import (
    LayerChoice,
    available_scores,
    block_scores,
    fit_knee,
    paper_blocks,
    placement_score,
    predict,
    select,
)
from vlmlayers.selection.curves import BlockTable, agreement_curve, normalise
from vlmlayers.selection.rules import Pick, _range_quantile
from vlmlayers.selection.stability import doubts, stability
from vlmlayers.study.stages import _rule_mark


def span(first: int, last: int) -> tuple[int, ...]:
    return tuple(range(first, last + 1))


@pytest.mark.parametrize(
    ("depths", "start"),
    [((12, 12), (5, 5)), ((24, 24), (9, 9)), ((24, 12), (15, 8)), ((6, 12), (3, 6))],
)
def test_planted_step_is_found(depths: tuple[int, int], start: tuple[int, int]) -> None:
    scores = planted(*depths, start)
    choice = select(scores, resamples=20)
    assert choice.vision == span(start[0], depths[0])
    assert choice.text == span(start[1], depths[1])
    assert choice.decided
    for tower in ("vision", "text"):
        found = choice.evidence["towers"][tower]
        frequency = np.array(found["frequency"])
        assert set(np.flatnonzero(frequency == 1) + 1) == set(choice.blocks(tower))
        assert found["start"]["low"] == found["start"]["high"] == choice.blocks(tower)[0]


@pytest.mark.parametrize("depths", [(12, 12), (24, 24), (24, 12), (6, 12)])
@pytest.mark.parametrize(
    ("rule", "options", "share"),
    [
        ("threshold", {}, 0.5),
        ("budget", {}, 0.5),
        ("budget", {"span": False, "score": "metric:dataset_accuracy"}, 0.5),
        ("paper", {}, 1 / 3),
        ("all", {}, 0.0),
    ],
)
def test_every_rule_on_every_depth(
    rule: str, options: dict[str, object], share: float, depths: tuple[int, int]
) -> None:
    """The planted step leaves a share of each tower below it, which the rule has to find."""
    first = [1 + round(share * depth) for depth in depths]
    resampled = {} if rule in ("paper", "all") else {"resamples": 20}
    choice = select(planted(*depths, (first[0], first[1])), rule, **resampled, **options)
    assert (choice.vision, choice.text) == (span(first[0], depths[0]), span(first[1], depths[1]))
    for tower, depth in zip(("vision", "text"), depths):
        found = choice.evidence["towers"][tower]
        assert found["depth"] == depth
        if resampled:
            assert len(found["frequency"]) == depth


def test_the_split_that_is_read_of_each_dataset_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Of `digits` both splits are there, of `signs` one: val of one joined test of the other."""
    rows = []
    for dataset, split, shift in (("digits", "test", 0.0), ("signs", "test", 0.1),
                                  ("digits", "val", 0.2)):  # fmt: skip
        for tower in ("vision", "text"):
            values = [0.1 * block + shift for block in range(1, 5)]
            rows += curve_rows("fisher_ratio", tower, values, dataset=dataset, split=split)
    scores = table(rows)
    choice = select(scores, "budget", resamples=0, n=2, score="metric:fisher_ratio")
    assert "split test of signs and val of digits is read, not test of digits; " in caplog.text
    assert choice.evidence["chosen_on"] == {"digits": "val", "signs": "test"}
    assert choice.chosen_on("signs") and not choice.chosen_on("digits")
    undivided = LayerChoice((1,), (), "all", {"chosen_on": {"signs": "all", "*": "train/val"}})
    assert undivided.chosen_on("signs") and undivided.chosen_on("digits", "val")
    assert not undivided.chosen_on("digits")
    assert how_made(scores, "fisher_ratio").startswith("split test of signs and val of digits; ")
    assert how_made(scores[scores["split"] == "test"], "fisher_ratio").startswith("split test; ")


PLAIN_RULES = """
def passing(scores, share):
    def scaled(rows, key):
        means = rows.groupby(rows[key].astype(int))["value"].mean()
        return (means - means.min()) / (means.max() - means.min())

    blocks = scores[scores["position"].str.isdecimal()]
    pairs = blocks[blocks["position"] == blocks["other_position"]]
    chosen = []
    for tower in ("vision", "text"):
        own = blocks[(blocks["metric"] == "dataset_accuracy") & (blocks["tower"] == tower)]
        passes = (scaled(own, "position") >= share) & (scaled(pairs, "position") >= share)
        chosen.append([int(block) for block in passes.index[passes]])
    return chosen

def best(scores, n):
    blocks = scores[(scores["metric"] == "dataset_accuracy") & scores["position"].str.isdecimal()]
    mean = blocks.groupby(["tower", blocks["position"].astype(int)])["value"].mean()
    return [sorted(mean[tower].nlargest(n).index) for tower in ("vision", "text")]
"""


@pytest.mark.parametrize(
    ("rule", "options", "plain", "plain_options"),
    [
        ("threshold", {"accuracy": 0.5, "agreement": 0.5}, "passing", {"share": 0.5}),
        ("budget", {"n": 4, "span": False, "score": "metric:dataset_accuracy"}, "best", {"n": 4}),
    ],
)
def test_resamples_are_those_of_tables_read_by_hand(
    tmp_path: Path,
    rule: str,
    options: dict[str, object],
    plain: str,
    plain_options: dict[str, object],
) -> None:
    """The same rule written in pandas, run on each resampled table, is as stable."""
    curves_of = [
        curve_rows("dataset_accuracy", tower, list(np.linspace(0.4, 0.9, 12)), half=0.15,
                   seeds=(0, 1, 2), jitter=0.03)
        for tower in ("vision", "text")
    ]  # fmt: skip
    pairs = pair_rows("cka_debiased", 12, 12, lambda i, j: 0.05 * min(i, j), half=0.1)
    (tmp_path / "plain.py").write_text(PLAIN_RULES, encoding="utf-8")
    # Alone what the rule reads: the draws depend on the rows, and a rule in pandas gets them all.
    scores = table(*curves_of, *([pairs] if rule == "threshold" else []))
    ours = select(scores, rule, resamples=40, seed=3, **options)
    theirs = select(scores, f"{tmp_path / 'plain.py'}:{plain}", resamples=40, seed=3,
                    **plain_options)  # fmt: skip
    assert (ours.vision, ours.text) == (theirs.vision, theirs.text)
    for tower in ("vision", "text"):
        found, expected = (one.evidence["towers"][tower] for one in (ours, theirs))
        assert {key: found[key] for key in ("frequency", "start", "same", "empty")} == {
            key: expected[key] for key in ("frequency", "start", "same", "empty")
        }
        assert any(0 < share < 1 for share in found["frequency"])


@pytest.mark.parametrize(("depths", "knees"), [((12, 12), (4, 7)), ((24, 12), (15, 5))])
def test_the_knee_of_each_tower_is_its_own(depths: tuple[int, int], knees: tuple[int, int]) -> None:
    parts = [
        curve_rows("dataset_accuracy", tower, list(0.2 + 0.04 * np.minimum(np.arange(d), k - 1)))
        for tower, d, k in zip(("vision", "text"), depths, knees)
    ]
    choice = select(table(*parts), "knee", resamples=20)
    assert (choice.vision, choice.text) == (span(knees[0], depths[0]), span(knees[1], depths[1]))
    fit = choice.evidence["towers"]["vision"]["values"]["dataset_accuracy"]["fit"]
    assert len(fit) == depths[0] and fit[-1] == pytest.approx(0.2 + 0.04 * (knees[0] - 1))


def test_zero_shot_accuracy_is_a_curve_although_it_names_a_partner() -> None:
    """Every block is related to the other tower's `proj`, not to its partner in depth."""
    scores = full(12, 12)
    rows = scores[scores["metric"] == "zero_shot_accuracy"]
    assert set(rows["other_position"]) == {"proj"}
    expected = [0.1 + 0.04 * b for b in range(12)]
    found = BlockTable.of(scores, {"vision": 12, "text": 12}).curve("zero_shot_accuracy", "vision")
    assert found == pytest.approx(expected)
    assert len(curves(scores, "zero_shot_accuracy", "digits")) == 14
    assert "metric:zero_shot_accuracy" in available_scores(scores)
    deep = BlockTable.of(full(24, 12), {"vision": 24, "text": 12})
    gap = deep.curve("centroid_gap", "vision")
    assert gap == pytest.approx([1.2 - 0.4 * b / 24 + 0.05 for b in range(1, 25)])


def test_a_retrieval_is_of_the_tower_that_asks_and_a_gap_of_both() -> None:
    """By `curve`, which rules read, and by block scores alike."""
    rows = []
    for block, asks, answers in ((1, 0.1, 0.9), (2, 0.4, 0.6), (3, 0.5, 0.5)):
        place = {"other_position": str(block), "space": "joint"}
        for tower, value, other in (("vision", asks, "text"), ("text", answers, "vision")):
            beside = {**place, "other_tower": other}
            rows.append(row("retrieval_r1", tower, str(block), 3, value, **beside))
        beside = {**place, "other_tower": "text"}
        rows.append(row("rmg", "vision", str(block), 3, 1 - asks, **beside))
    scores = table(rows)
    ranks = {"vision": [0.0, 0.75, 1.0], "text": [1.0, 0.25, 0.0]}
    found = block_scores(scores, "metric:retrieval_r1")
    read = BlockTable.of(scores, {"vision": 3, "text": 3})
    for tower, expected in ranks.items():
        assert found[tower] == pytest.approx(expected)
        assert normalise(read.curve("retrieval_r1", tower)) == pytest.approx(expected)
    assert placement_score(scores, [3], [1], "metric:retrieval_r1") == pytest.approx(1.0)
    gaps = block_scores(scores, "metric:rmg")
    assert gaps["vision"].tolist() == gaps["text"].tolist() == pytest.approx([1.0, 0.25, 0.0])


def test_budget_finds_the_planted_span() -> None:
    choice = select(planted(24, 12, (17, 5)), "budget", n=8, resamples=20)
    assert (choice.vision, choice.text) == (span(17, 24), span(5, 12))


@pytest.mark.parametrize("together", [True, False])
def test_a_budget_takes_the_lower_of_equal_blocks_in_any_order_of_rows(together: bool) -> None:
    """Means of 0.1, 0.2 and 0.3 differ in the last digit by the order in which they are added."""
    parts = [
        curve_rows("fisher_ratio", tower, [value] * 6, seeds=[seed])
        for tower in ("vision", "text")
        for seed, value in enumerate((0.1, 0.2, 0.3))
    ]
    scores = table(*parts)
    rule = {"n": 2, "score": "metric:fisher_ratio", "span": together}
    for number in range(30):
        shuffled = scores.sample(frac=1, random_state=number)
        assert select(shuffled, "budget", resamples=0, **rule).vision == (1, 2)


def test_threshold_needs_both_accuracy_and_agreement() -> None:
    scores = table(
        curve_rows("dataset_accuracy", "vision", step(8, 3)),
        curve_rows("dataset_accuracy", "text", step(8, 3)),
        pair_rows("cka_debiased", 8, 8, lambda i, j: 0.1 * min(i, j)),
    )
    both = select(scores, resamples=0)
    alone = select(scores, agreement_metric="none", resamples=0)
    assert alone.vision == span(3, 8)
    assert both.vision == span(5, 8)  # (i − 1)/7 ≥ 0.5 first holds at block 5
    flat = scores.assign(value=0.5)
    none = select(flat, resamples=0), select(flat, agreement_metric="none", resamples=0)
    said = [choice.evidence["towers"]["vision"]["notes"][-1] for choice in none]
    assert said[0] == "no vision block passes dataset_accuracy and cka_debiased together"
    assert said[1] == "no vision block passes dataset_accuracy", "one metric is not together"


def test_agreement_that_was_not_computed_is_not_asked_for_again() -> None:
    within = pair_rows("cka_debiased", 8, 8, lambda i, j: 0.5)
    scores = table(
        curve_rows("class_accuracy", "vision", step(8, 3)),
        curve_rows("class_accuracy", "text", step(8, 3)),
        [{**row, "other_tower": "vision"} for row in within],
    )
    with pytest.raises(UserError, match="score it with both towers, or choose with agreement_met"):
        select(scores, resamples=0)
    note = {"dataset": "a", "tower": "text", "position": "", "reason": "3 items; at least 4"}
    scores.attrs["refused"] = [{"metric": "cka_debiased", **note}]
    with pytest.raises(UserError, match=r"blocks \(3 items; at least 4\); choose with agreement_m"):
        select(scores, resamples=0)


@pytest.mark.parametrize("metric", ["procrustes", "centroid_gap"])
def test_a_distance_is_not_taken_for_agreement(metric: str) -> None:
    """From block 5 on towers agree: their distance is small there, and 1–4 would have passed."""
    pairs = pair_rows(metric, 12, 12, lambda i, j: 0.3 if min(i, j) >= 5 else 1.2)
    curves_of = [curve_rows("dataset_accuracy", t, [0.5] * 12) for t in ("vision", "text")]
    with pytest.raises(UserError, match=f"a larger {metric} means .*, such as cka_debiased"):
        select(table(pairs, *curves_of), accuracy=0.0, agreement_metric=metric, resamples=0)
    near = [{**one, "metric": "mutual_knn", "value": 1.3 - one["value"]} for one in pairs]
    choice = select(
        table(near, *curves_of), accuracy=0.0, agreement_metric="mutual_knn", resamples=0
    )
    assert choice.vision == choice.text == span(5, 12)


def test_threshold_fills_the_gap_between_blocks_that_pass_where_asked_to() -> None:
    high = [0.1, 0.1, 0.9, 0.1, 0.8, 0.1, 0.9, 0.1]
    scores = table(curve_rows("dataset_accuracy", "vision", high))
    asked = {"agreement_metric": "none", "resamples": 0}
    assert select(scores, fill=False, **asked).vision == (3, 5, 7)
    assert select(scores, fill=True, **asked).vision == (3, 4, 5, 6, 7)


def test_resampling_finds_the_noise_that_was_put_in() -> None:
    """Block 5 sits exactly on the threshold, so that half of all resamples choose it."""
    values = [0.4, 0.4, 0.4, 0.4, 0.65, 0.9, 0.9, 0.9]
    exact = curve_rows("dataset_accuracy", "vision", values)
    for one in exact:
        if one["position"] == "5":
            one["low"], one["high"] = 0.6, 0.7
    choice = select(table(exact), agreement_metric="none", resamples=400)
    found = choice.evidence["towers"]["vision"]
    assert 0.4 < found["frequency"][4] < 0.6
    assert found["frequency"][:4] == [0, 0, 0, 0] and found["frequency"][5:] == [1, 1, 1]
    share = f"{100 * found['frequency'][4]:.0f} %"
    assert not choice.decided
    assert f"vision block 5 could be chosen or not (chosen in {share}" in choice.statement
    assert (found["start"]["low"], found["start"]["high"]) == (5, 6)


@pytest.mark.parametrize(("rare", "ends"), [(6, (2, 9)), (4, (5, 5))])
def test_the_interval_of_the_start_leaves_a_fortieth_out_on_either_side(
    rare: int, ends: tuple[int, int]
) -> None:
    """Of 200 resamples so many start at block 2, and as many at 9; all others at 5."""
    starts = iter([5, *[2] * rare, *[9] * rare, *[5] * (200 - 2 * rare)])
    scores = table(curve_rows("dataset_accuracy", "vision", step(12, 5)))
    seen = BlockTable.of(scores, {"vision": 12})
    found = stability(lambda _: {"vision": Pick(span(next(starts), 12))}, seen, 200, 0)
    start = found["vision"]["start"]
    assert (start["low"], start["high"]) == ends


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, ""),
        ({"share": {5: 0.75, 4: 0.25}}, ""),
        ({"share": {5: 0.74}}, "block 5 could be chosen or not"),
        ({"share": {4: 0.26}}, "block 4 could be chosen or not"),
        ({"start": {"value": 5, "low": 4, "high": 8}}, ""),
        ({"start": {"value": 5, "low": 4, "high": 9}}, "start lies anywhere in 4–9"),
        ({"empty": 0.05}, ""),
        ({"empty": 0.055}, "choose no vision block"),
    ],
)
def test_a_choice_is_doubted_from_a_quarter_a_third_and_a_twentieth_on(
    changed: dict[str, Any], said: str
) -> None:
    """Of resamples that disagree, of the depth that the start spans, of empty resamples."""
    share = dict(zip(span(1, 12), [0.0] * 4 + [1.0] * 8)) | changed.get("share", {})
    found = {
        "frequency": list(share.values()),
        "start": changed.get("start", {"value": 5, "low": 5, "high": 5}),
        "empty": changed.get("empty", 0.0),
        "without": {},
    }
    reasons = doubts("vision", 12, span(5, 12), found)
    assert [said in one for one in reasons] == ([True] if said else [])


@pytest.mark.parametrize(("empty", "doubted"), [(0.95, False), (0.94, True)])
def test_no_block_is_a_choice_where_nineteen_of_twenty_resamples_make_it(
    empty: float, doubted: bool
) -> None:
    found = {
        "frequency": [0.05] * 12,
        "start": {"value": None, "low": 5, "high": 5},
        "empty": empty,
        "without": {},
    }
    assert bool(doubts("vision", 12, (), found)) is doubted


def test_seeds_that_disagree_widen_the_start() -> None:
    early = curve_rows("dataset_accuracy", "vision", step(12, 3), seeds=(0,))
    late = curve_rows("dataset_accuracy", "vision", step(12, 10), seeds=(1,))
    choice = select(table(early, late), agreement_metric="none", accuracy=0.9, resamples=200)
    assert choice.evidence["towers"]["vision"]["start"] == {"value": 10, "low": 3, "high": 10}
    assert "the vision start lies anywhere in 3–10" in choice.statement


def rule_of(folder: Path, picks: str) -> str:
    """A rule of `planted` scores, which may pick otherwise on values that were `moved`."""
    file = folder / "mine.py"
    file.write_text(
        "def mine(scores):\n"
        "    moved = (scores['value'] * 10 % 1).clip(lower=1e-6).round(9).nunique() > 2\n"
        f"    return {picks}\n"
    )
    return f"{file}:mine"


def test_a_score_of_one_tower_predicts_nothing_of_the_other() -> None:
    """A number there would rank the placement among those that the score can judge."""
    scores = table(
        curve_rows("dataset_accuracy", "vision", np.linspace(0.5, 0.9, 12)),
        curve_rows("dataset_accuracy", "text", np.linspace(0.5, 0.9, 12)),
        curve_rows("novel_class_accuracy", "vision", np.linspace(0.5, 0.9, 12)),
    )
    for name in ("mean_accuracy_x_novel", "metric:novel_class_accuracy"):
        assert np.isnan(placement_score(scores, [], [5, 6], name))
        assert placement_score(scores, [12], [5, 6], name) == pytest.approx(1)
    assert np.isfinite(placement_score(scores, [], [5, 6], "mean_accuracy"))


def test_scores_of_one_tower_predict_placements_that_name_blocks_of_both() -> None:
    """As a study of the vision tower does that validates: the published placement has text."""
    scores = table(curve_rows("dataset_accuracy", "vision", np.linspace(0.5, 0.9, 12)))
    found = predict(scores, {"both": "v12,t5-12", "text": "t5-12", "none": "v-,t-"})
    assert {"mean_accuracy", "relative_depth", "blocks_adapted"} <= {*found["score"]}
    wide = found.pivot(index="score", columns="placement", values="predicted")
    assert wide.loc["mean_accuracy", "both"] == wide.loc["relative_depth", "both"] == 1
    assert wide["text"].isna().all() and np.isfinite(wide[["both", "none"]]).all(axis=None)
    with pytest.raises(UserError, match="vision block 13, but the vision tower has 12 blocks"):
        predict(scores, {"deep": "v13"})


def test_seeds_that_split_the_same_items_make_nothing_surer() -> None:
    """Block 6 lies half an interval above its threshold; its chance to pass is Φ(1)."""
    curve = [0.5] * 5 + [0.71] + [0.9] * 6
    shares = []
    for seeds in ((1,), tuple(range(1, 11))):
        rows = curve_rows("dataset_accuracy", "vision", curve, seeds=seeds)
        for one in rows:
            if one["position"] == "6":
                one["low"], one["high"] = 0.71 - 0.0196, 0.71 + 0.0196
        choice = select(table(rows), agreement_metric="none", accuracy=0.5, resamples=1000)
        shares.append(choice.evidence["towers"]["vision"]["frequency"][5])
    assert shares == pytest.approx([0.841, 0.841], abs=0.04)


def test_the_order_of_rows_changes_no_share() -> None:
    scores = table(
        curve_rows("dataset_accuracy", "vision", np.linspace(0.5, 0.9, 12), half=0.1, seeds=(1, 2))
    )
    found = [
        select(one, agreement_metric="none", resamples=50).evidence["towers"]["vision"]
        for one in (scores, scores.sample(frac=1, random_state=3))
    ]
    assert found[0]["frequency"] == found[1]["frequency"] and 0 < found[0]["same"] < 1


def test_tables_of_categories_or_without_splits_are_read_as_others() -> None:
    scores = planted()
    words = ["metric", "dataset", "tower", "position", "pooling", "other_tower", "other_position"]
    for table_of in (scores.astype(dict.fromkeys(words, "category")), scores.drop(columns="split")):
        choice = select(table_of, resamples=20)
        assert choice == select(scores, resamples=20)
        assert not choice.chosen_on("digits")


def test_metrics_and_datasets_of_other_seeds_are_in_every_resample() -> None:
    """A draw among the seeds of all would lack what has none of them, and weigh datasets anew."""
    rows = [*pair_rows("cka_debiased", 12, 12, lambda i, j: 0.9 if min(i, j) >= 5 else 0.2, seed=7)]
    for tower in ("vision", "text"):
        rows += curve_rows("dataset_accuracy", tower, step(12, 5), half=0.01, seeds=(0, 1))
    assert select(table(rows), resamples=20).decided
    # Halfway between the curves of two datasets block 6 passes, and by that of one alone it fails.
    rows = []
    for name, seeds, middle in (("a", (1, 2), 0.5), ("b", (3, 4), 1.0)):
        curve = [0.2] * 5 + [middle] + [1.0] * 6
        rows += curve_rows("class_accuracy", "vision", curve, seeds=seeds, dataset=name)
    choice = select(
        table(rows), metric="class_accuracy", agreement_metric="none", accuracy=0.6, resamples=100
    )
    assert choice.evidence["towers"]["vision"]["frequency"] == [0.0] * 5 + [1.0] * 7


def test_a_choice_that_one_dataset_makes_is_undecided() -> None:
    """Two of three datasets fall where the third rises, and their mean rises."""
    falling, rising = np.linspace(0.62, 0.5, 12), np.linspace(0.1, 0.95, 12)
    curves = {"a": falling, "b": falling, "c": rising}
    scores = table(*(
        curve_rows("class_accuracy", "vision", curve, half=0.001, dataset=name)
        for name, curve in curves.items()
    ))  # fmt: skip
    asked: dict[str, Any] = {"metric": "class_accuracy", "agreement_metric": "none"}
    choice = select(scores, "threshold", resamples=20, **asked)
    found = choice.evidence["towers"]["vision"]
    assert choice.vision == tuple(range(7, 13)) and found["same"] == 1
    assert found["without"] == {"a": list(range(7, 13)), "b": list(range(7, 13)),
                                "c": list(range(1, 7))}  # fmt: skip
    assert not choice.decided and choice.firm("vision") == ()
    told = "vision blocks 1–12 hang on single datasets: without c the rule chooses 1–6"
    assert told in choice.statement
    alike = select(scores[scores["dataset"] != "c"], "threshold", resamples=20, **asked)
    assert alike.decided and alike.firm("vision") == tuple(range(1, 7))
    # Pooled rows are of all datasets at once, which none can be left out of.
    pooled = table(curve_rows("class_accuracy", "vision", rising, half=0.001, dataset="*"))
    found = select(pooled, "threshold", resamples=20, **asked).evidence["towers"]["vision"]
    assert found["without"] == {}


def test_a_tower_that_one_dataset_alone_has_is_chosen_from_it() -> None:
    """As of classes with one prompt each beside captions, whose classes have several."""
    rising = np.linspace(0.1, 0.9, 12)
    scores = table(
        curve_rows("class_accuracy", "vision", rising, half=0.001, dataset="a"),
        curve_rows("class_accuracy", "vision", rising, half=0.001, dataset="b"),
        curve_rows("class_accuracy", "text", rising, half=0.001, dataset="b"),
    )
    asked: dict[str, Any] = {"metric": "class_accuracy", "agreement_metric": "none"}
    choice = select(scores, "threshold", resamples=20, **asked)
    assert choice.text == tuple(range(7, 13))
    assert choice.evidence["towers"]["vision"]["without"] == {"a": list(range(7, 13))}


def test_a_start_outside_its_own_interval_is_a_doubt(tmp_path: Path) -> None:
    """The rule starts at 7 on the values as measured and at 6 on any that were moved."""
    rule = rule_of(tmp_path, "range(6 if moved else 7, 13), range(5, 13)")
    choice = select(planted(), rule, resamples=20)
    assert choice.evidence["towers"]["vision"]["start"] == {"value": 7, "low": 6, "high": 6}
    assert not choice.decided
    assert (
        "95 % of the resamples that choose any vision block start at 6, not at 7 as here"
        in choice.statement
    )
    assert "The data decide for vision 7–12 and text 5–12 (" in choice.statement
    assert "vision block 6 left out here, but chosen in 100 % of the resamples" in choice.statement


def test_that_no_block_is_chosen_is_a_doubt_where_resamples_say_otherwise(tmp_path: Path) -> None:
    rule = rule_of(tmp_path, "range(5, 13), range(5, 13) if moved else ()")
    apart = select(planted(), rule, resamples=20)
    said = "100 % of the resamples choose a text block, and here none is chosen"
    assert said in apart.evidence["doubts"] and not apart.decided
    agreed = select(planted(), rule_of(tmp_path, "range(5, 13), ()"), resamples=20)
    assert agreed.evidence["towers"]["text"]["empty"] == 1 and agreed.evidence["doubts"] == []


def test_a_block_that_resamples_seldom_choose_is_a_doubt(tmp_path: Path) -> None:
    """Block 3 is chosen on the values as measured only, beside a start that nothing moves."""
    rule = rule_of(tmp_path, "[1] + [3, 4] * (not moved) + [9, 10, 11, 12], range(5, 13)")
    choice = select(planted(), rule, resamples=20)
    assert choice.evidence["towers"]["vision"]["frequency"][:4] == [1, 0, 0, 0]
    assert choice.evidence["doubts"] == [
        "vision blocks 3–4 chosen here, but in only 0 % of the resamples"
    ]
    assert not choice.decided
    assert choice.statement.startswith("The data decide for vision 1, 9–12 and text 5–12 (")


def test_flat_curve_is_undecided_and_chooses_nothing() -> None:
    choice = select(
        table(curve_rows("dataset_accuracy", "vision", [0.5] * 6)),
        agreement_metric="none",
        resamples=0,
    )
    assert choice.vision == () and not choice.decided
    assert "the same at every vision block" in choice.statement


@pytest.mark.parametrize("rule", ["threshold", "paper", "all"])
def test_a_tower_without_scores_is_said_to_be_left_out_for_that(rule: str) -> None:
    """`text none` reads as a finding, where nothing was looked at."""
    alone = table(curve_rows("dataset_accuracy", "vision", step(12, 5)))
    said = " No text block is chosen: the scores hold nothing of that tower."
    assert select(alone, rule, resamples=0).statement.endswith(said)
    assert said not in select(planted(), rule, resamples=0).statement
    assert said not in select(alone, "explicit", vision="5-12", resamples=0).statement


def test_a_curve_within_its_interval_is_undecided() -> None:
    rising = list(np.linspace(0.97, 0.99, 8))
    for half, decided in ((0.02, False), (0.0001, True)):
        scores = table(curve_rows("dataset_accuracy", "vision", rising, half=half))
        choice = select(scores, agreement_metric="none", resamples=0)
        assert choice.decided is decided
        assert ("varies by 0.02 over its blocks" in choice.statement) is not decided


@pytest.mark.parametrize(
    ("rule", "options", "depth"),
    [
        ("threshold", {"agreement_metric": "none"}, 4),
        ("threshold", {"agreement_metric": "none"}, 24),
        ("budget", {"score": "metric:dataset_accuracy"}, 12),
        ("knee", {}, 12),
    ],
)
def test_blocks_that_are_all_alike_seldom_pass_for_a_curve(
    rule: str, options: dict[str, Any], depth: int
) -> None:
    """Of noise alone the range over many blocks is often wider than the interval of one."""
    generator = np.random.default_rng(depth)
    noise = 0.6 + 0.02 * generator.standard_normal((200, depth))
    decided = [
        select(
            table(curve_rows("dataset_accuracy", "vision", list(values), half=1.96 * 0.02)),
            rule,
            resamples=0,
            **options,
        ).decided
        for values in noise
    ]
    # 5 of 100, give or take its own error; a knee has a straight line to be told from as well.
    assert (0.0 if rule == "knee" else 0.01) <= np.mean(decided) <= 0.09


@pytest.mark.parametrize(
    ("rule", "options"), [("threshold", {}), ("budget", {"score": "agreement"})]
)
def test_agreement_that_is_noise_makes_no_block_firm(rule: str, options: dict[str, Any]) -> None:
    """The range of noise is scaled to 0–1 as well, and its highest blocks stay the highest."""
    generator = np.random.default_rng(0)
    firm = []
    for number in range(40):
        noise = 0.3 + 0.02 * generator.standard_normal((12, 12))
        rows = pair_rows(
            "cka_debiased", 12, 12, lambda i, j, cells=noise: cells[i - 1, j - 1], half=0.04
        )
        for tower in ("vision", "text"):
            rows += curve_rows("dataset_accuracy", tower, list(np.linspace(0.4, 0.9, 12)))
        choice = select(table(rows), rule, resamples=20, seed=number, **options)
        firm.append(bool(choice.firm("vision") or choice.firm("text")))
    assert np.mean(firm) <= 0.2  # 5 in 100 of each tower, and three standard errors


def test_the_mean_of_many_datasets_is_surer_than_each_of_them() -> None:
    """A rise of 0.06 is within the interval of one of 16 datasets, 0.08, not of their mean, 0.02.

    Seeds share their items: three of them make the interval of one dataset no narrower.
    """
    rising = [0.5] * 6 + [0.56] * 6
    for datasets, seeds, decided in ((16, (1,), True), (1, (1,), False), (1, (1, 2, 3), False)):
        scores = table(*(
            curve_rows("class_accuracy", "vision", rising, half=0.04, seeds=seeds,
                       dataset=f"d{number}") for number in range(datasets)
        ))  # fmt: skip
        choice = select(scores, metric="class_accuracy", agreement_metric="none", resamples=50)
        assert bool(choice.evidence["towers"]["vision"]["notes"]) is not decided
        assert choice.firm("vision") == (span(7, 12) if decided else ())
    widths = BlockTable.of(scores, {"vision": 12}).interval_widths("class_accuracy", "vision")
    assert widths == pytest.approx([0.08] * 12)


def test_no_block_is_firm_in_a_tower_that_the_rule_doubts() -> None:
    """One wide interval moves nothing else: the resamples agree, and yet the curve is noise."""
    rows = []
    for tower, half in (("vision", 0.004), ("text", 0.0001)):
        rows += curve_rows("dataset_accuracy", tower, [0.98] * 6 + [0.985] * 6, half=half)
    choice = select(table(rows), agreement_metric="none", accuracy=0.01, resamples=50)
    late = span(7, 12)
    assert set(late) <= set(choice.vision)
    assert min(choice.evidence["towers"]["vision"]["frequency"][6:]) >= 0.75
    assert choice.firm("vision") == () and choice.open("vision") == span(1, 12)
    assert choice.firm("text") == late
    assert choice.statement.startswith(
        "The data decide for text 7–12. They do not decide for the rest: dataset_accuracy of the "
        "vision "
    )


def test_the_statement_names_the_blocks_that_are_firm() -> None:
    """Vision 5 is chosen in about half of the resamples; the rest of its tower is firm."""
    values = [0.5] * 4 + [0.75] + [1.0] * 7
    rows = curve_rows("dataset_accuracy", "vision", values, half=0.02)
    choice = select(table(rows), agreement_metric="none", resamples=50)
    assert choice.firm("vision") == span(6, 12) and choice.open("vision") == (5,)
    assert choice.statement.startswith(
        "The data decide for vision 6–12. They do not decide for the rest: vision block 5 "
    )


def test_same_seed_same_evidence() -> None:
    scores = planted(half=0.4)
    first, second = select(scores, resamples=30, seed=4), select(scores, resamples=30, seed=4)
    other = select(scores, resamples=30, seed=5)
    assert first.to_dict() == second.to_dict() != other.to_dict()


@pytest.mark.parametrize("knee", [3, 6, 9])
def test_knee_recovers_the_change_point(knee: int) -> None:
    x = np.arange(1, 13)
    curve = 0.2 + 0.06 * np.minimum(x, knee) + 0.002 * x
    fit = fit_knee(curve)
    assert fit["knee"] == knee and fit["better_than_line"]
    assert fit["slope_before"] == pytest.approx(0.062) and fit["slope_after"] == pytest.approx(
        0.002
    )
    scores = table(curve_rows("dataset_accuracy", "vision", list(curve)))
    choice = select(scores, "knee", resamples=0)
    assert choice.vision == span(knee, 12)
    assert choice.evidence["towers"]["vision"]["knee"]["knee"] == knee


def test_four_blocks_suffice_for_a_knee_and_three_do_not() -> None:
    assert fit_knee(np.array([0.1, 0.2, 0.8, 0.8]))["knee"] in (2, 3)
    with pytest.raises(UserError, match="at least 4 blocks, not 3"):
        fit_knee(np.array([0.1, 0.2, 0.8]))


def test_knee_on_a_straight_line_is_undecided() -> None:
    generator = np.random.default_rng(0)
    line = np.linspace(0.2, 0.8, 12) + 0.01 * generator.standard_normal(12)
    scores = table(curve_rows("dataset_accuracy", "vision", list(line)))
    assert "one straight line fits" in select(scores, "knee", resamples=0).statement


@pytest.mark.parametrize("depth", [4, 6, 12, 24])
@pytest.mark.parametrize(("rise", "alike"), [(0.0, 0.0), (1.0, 0.0), (1.0, 0.5)])
def test_a_straight_line_with_noise_seldom_passes_for_two(
    depth: int, rise: float, alike: float
) -> None:
    """Level or rising, and also where the noise of neighbouring blocks correlates."""
    noise = np.random.default_rng(depth).standard_normal((400, depth))
    for block in range(1, depth):
        noise[:, block] = alike * noise[:, block - 1] + np.sqrt(1 - alike**2) * noise[:, block]
    curves = np.linspace(0, rise, depth) + 0.1 * noise
    # At most 5 of 100, give or take three standard errors of 400 curves.
    assert np.mean([fit_knee(curve)["better_than_line"] for curve in curves]) <= 0.083


def test_p_of_a_knee_is_how_often_a_line_with_such_noise_bends_as_much() -> None:
    """By a second route: each line is drawn and fitted."""
    noise = np.random.default_rng(0).standard_normal((1500, 5))
    for block in range(1, 5):
        noise[:, block] = 0.5 * noise[:, block - 1] + np.sqrt(0.75) * noise[:, block]

    def bend(fit: dict[str, Any]) -> float:
        return float(fit["line_squared_error"] / fit["squared_error"])

    fit = fit_knee([0, 0.1, 0.05, 0.2, 0.6])
    chance = [bend(fit_knee(0.3 * np.arange(5) + curve)) for curve in noise]
    # Three standard errors of 1500 lines.
    assert fit["p"] == pytest.approx(np.mean(np.array(chance) >= bend(fit)), abs=0.033)


@pytest.mark.parametrize(
    ("depth", "noise", "least"), [(6, 0.05, 0.4), (12, 0.08, 0.8), (24, 0.1, 0.95)]
)
def test_a_plateau_before_a_rise_is_told_from_a_straight_line(
    depth: int, noise: float, least: float
) -> None:
    rise = np.maximum(0, np.arange(depth) - depth / 2 + 0.5)
    drawn = noise * np.random.default_rng(depth).standard_normal((200, depth))
    found = [fit_knee(curve)["better_than_line"] for curve in rise / rise.max() + drawn]
    assert np.mean(found) >= least


@pytest.mark.parametrize(
    ("curve", "knee"),
    [([0, 0, 0, 1, 1, 1], 2), ([0, 0, 0, 0, 1, 1, 1, 1], 3), ([1, 3, 3, 1], 2), ([2] * 6, 2)],
)
def test_of_knees_that_fit_alike_the_lower_one_is_taken(curve: list[float], knee: int) -> None:
    """Rounding, by the scale of a curve or the order of rows, must not decide between them."""
    for scale, shift in ((1.0, 0.0), (0.1, 0.3), (0.7, 0.123456), (1e-3, 0.9)):
        assert fit_knee(scale * np.array(curve, float) + shift)["knee"] == knee
    values = 0.1 * np.array(curve, float)
    rows = [
        curve_rows("class_accuracy", "vision", list(values + 0.1 * number), dataset=str(number))
        for number in range(3)
    ]
    for order in range(10):
        scores = table(*rows).sample(frac=1, random_state=order)
        assert select(scores, "knee", metric="class_accuracy", resamples=0).vision[0] == knee


def test_half_of_a_tower_of_one_block_is_that_block() -> None:
    scores = table(curve_rows("class_accuracy", "vision", [0.5]))
    choice = select(scores, "budget", score="metric:class_accuracy", resamples=0)
    assert choice.vision == (1,)


def test_budget_without_span_takes_the_best_blocks() -> None:
    scores = table(curve_rows("class_accuracy", "vision", [0.1, 0.9, 0.2, 0.8, 0.3, 0.7]))
    choice = select(scores, "budget", n=2, span=False, score="metric:class_accuracy", resamples=0)
    assert choice.vision == (2, 4)
    joined = select(scores, "budget", n=3, span=True, score="metric:class_accuracy", resamples=0)
    assert joined.vision == (2, 3, 4)


@pytest.mark.parametrize(("depth", "first"), [(12, 5), (24, 9), (6, 3), (1, 1), (32, 11)])
def test_paper_placement_scales(depth: int, first: int) -> None:
    assert paper_blocks(depth) == span(first, depth)


def test_fixed_rules() -> None:
    scores = planted(24, 12, (9, 5))
    assert select(scores, "paper").vision == span(9, 24)
    assert select(scores, "all").text == span(1, 12)
    explicit = select(scores, "explicit", vision="3,5-7", text=[2, 4])
    assert (explicit.vision, explicit.text) == ((3, 5, 6, 7), (2, 4))
    assert "Fixed by the rule" in explicit.statement
    with pytest.raises(UserError, match="the rule 'all' takes no options, and 'n' is set"):
        select(scores, "all", n=3)


def test_a_measured_choice_without_resamples_is_not_called_fixed() -> None:
    assert select(planted(), "budget", resamples=0).statement.startswith("Nothing was resampled")


def test_own_rule_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def last(scores, n=2):\n    return range(13 - n, 13), [12]\n"
        "def wrong(scores):\n    return 'all'\n"
        "def deep(scores):\n    return [99], []\n"
        "def typo(scores):\n    return {'visoin': [1]}\n"
        "def number(scores):\n    return {0: [1], 1: [2]}\n"
    )
    choice = select(planted(), f"{file}:last", n=3, resamples=20)
    assert (choice.vision, choice.text) == ((10, 11, 12), (12,))
    assert choice.evidence["towers"]["vision"]["frequency"][-3:] == [1, 1, 1]
    assert choice.statement.startswith("Fixed by the rule, not by the measurements: ")
    for name, message in (
        ("wrong", "must return a LayerChoice"),
        ("typo", "unknown tower 'visoin'.*did you mean 'vision'"),
        ("number", "unknown tower 0 in what rule .* valid: vision, text"),
        ("deep", "vision block 99"),
        ("lost", "did you mean 'last'"),
    ):
        with pytest.raises(UserError, match=message):
            select(planted(), f"{file}:{name}")
    with pytest.raises(UserError, match="cannot be called with these options"):
        select(planted(), f"{file}:last", m=3)
    with pytest.raises(UserError, match="does not exist"):
        select(planted(), "absent.py:rule")
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_this_name\n")
    with pytest.raises(UserError, match="fails on import"):
        select(planted(), f"{broken}:rule")


@pytest.mark.parametrize("sign", [1, -1])
def test_an_own_rule_that_reads_scores_is_not_called_fixed(sign: int) -> None:
    """However sure the data are of it, and whichever end it takes."""

    def best(scores: pd.DataFrame) -> dict[str, list[int]]:
        rows = scores[(scores["metric"] == "dataset_accuracy") & (scores["tower"] == "vision")]
        blocks = rows[rows["position"].str.isdecimal()].groupby("position")["value"].mean() * sign
        return {"vision": [int(blocks.idxmax())], "text": []}

    value = 0.5 + 0.3 * planted()["position"].eq("7")
    sure = planted().assign(value=value, low=value - 0.01, high=value + 0.01)
    assert (select(sure, best, resamples=20).evidence["towers"]["vision"]["same"] == 1) == (
        sign > 0
    )
    assert not select(sure, best, resamples=20).statement.startswith("Fixed")


def test_errors_of_an_own_rule_are_told_as_its_own(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        "def broken(scores): return len(5), 3\n"
        "def twice(scores): return [3, 3], [1]\n"
        "def half(scores): return [1.5], []\n"
        "def flat(scores): return [5, 6]\n"
    )
    # Not for a wrong call: its traceback says where.
    with pytest.raises(TypeError, match="has no len"):
        select(planted(), f"{file}:broken")
    for name in ("twice", "half"):
        with pytest.raises(UserError, match=rf"what rule '.*own.py:{name}' returns: block "):
            select(planted(), f"{file}:{name}")
    with pytest.raises(UserError, match=r"a \(vision, text\) pair of blocks, not \[5, 6\]"):
        select(planted(), f"{file}:flat")  # two blocks, and not one of each tower


def test_an_option_without_end_is_saved(tmp_path: Path) -> None:
    def first(scores: pd.DataFrame, most: float) -> tuple[list[int], list[int]]:
        return [1], [1]

    choice = select(planted(), first, resamples=0, most=np.inf)
    again = LayerChoice.load(choice.save(tmp_path / "choice.json"))
    assert again == choice and again.evidence["options"] == {"most": "inf"}


def test_own_rule_from_an_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A distribution as pip leaves it: a module, and metadata that name it."""
    (tmp_path / "my_rules.py").write_text(
        "def ends(scores, n=1):\n    return range(1, n + 1), [12]\n"
    )
    info = tmp_path / "my_rules-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-rules\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[vlmlayers.rules]\nends = my_rules:ends\nlost = my_rules:lost\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    choice = select(planted(), "ends", resamples=20, n=2)
    assert (choice.vision, choice.text, choice.rule) == ((1, 2), (12,), "ends")
    assert choice.evidence["towers"]["vision"]["frequency"][:3] == [1, 1, 0]
    with pytest.raises(UserError, match="did you mean 'ends'"):
        select(planted(), "endz")
    with pytest.raises(UserError, match="'lost' of an installed package cannot be read"):
        select(planted(), "lost")
    # A study chooses again where the package's code has changed.
    before = _rule_mark("ends")
    (tmp_path / "my_rules.py").write_text("def ends(scores, n=1):\n    return [1], [1]\n")
    assert before and _rule_mark("ends") != before and _rule_mark("threshold") == ""


def test_agreement_reads_equal_relative_depth() -> None:
    scores = table(pair_rows("cka_debiased", 4, 8, lambda i, j: 100 * i + j))
    matrix = BlockTable.of(scores, {"vision": 4, "text": 8}).agreement("cka_debiased")
    assert agreement_curve(matrix, "vision").tolist() == [102, 204, 306, 408]
    assert agreement_curve(matrix, "vision", "max").tolist() == [108, 208, 308, 408]
    assert agreement_curve(matrix, "text")[-1] == 408
    partners = [partner_block(b, 24, 12) for b in range(1, 25)]
    assert partners == sorted([*range(1, 13)] * 2)


def test_agreement_within_a_tower_alone_is_told_from_none() -> None:
    scores = planted(12, 12, (5, 5))
    scores.loc[scores["metric"] == "cka_debiased", "other_tower"] = "vision"
    said = "has no cka_debiased between vision and text blocks; score it with both towers, or"
    with pytest.raises(UserError, match=said):
        select(scores)


def test_agreement_of_too_few_pairs_is_refused() -> None:
    depths = {"vision": 4, "text": 4}
    whole = pair_rows("cka_debiased", 4, 4, lambda i, j: 0.1 * i, dataset="a")
    part = [row for row in pair_rows("cka_debiased", 4, 4, lambda i, j: 0.9, dataset="b")
            if int(row["position"]) < 3]  # fmt: skip
    with pytest.raises(UserError, match="no value of b between vision block 3 and text block 1"):
        BlockTable.of(table(whole, part), depths).agreement("cka_debiased")
    matrix = np.ones((4, 4))
    matrix[:, 2] = np.nan
    assert agreement_curve(matrix, "vision", "max").tolist() == [1, 1, 1, 1]
    with pytest.raises(UserError, match="agreement of text block 3 with any block of the other"):
        agreement_curve(matrix, "text", "max")
    why = {("text", "3"): "all items have the same features"}
    for tower in ("vision", "text"):
        with pytest.raises(UserError, match="block 3 .* has no value: all items have the same"):
            agreement_curve(matrix, tower, reason=lambda *place: why.get(place, ""))


def test_datasets_of_other_seeds_are_refused() -> None:
    falling, rising = [0.9, 0.6, 0.3], [0.3, 0.6, 0.9]
    scores = table(*(
        curve_rows("class_accuracy", tower, curve, seeds=seeds, dataset=name)
        for tower in ("vision", "text")
        for name, curve, seeds in (("a", falling, (1, 2, 3)), ("b", rising, (1,)))
    ))  # fmt: skip
    told = "has 3 seeds of a at block 1 and 1 of b at block 1, so that one would weigh"
    with pytest.raises(UserError, match=told):
        select(scores, "threshold", metric="class_accuracy", agreement_metric="none")
    thinned = table(*(
        curve_rows("class_accuracy", "vision", curve, seeds=(1, 2, 3), dataset=name)
        for name, curve in (("a", falling), ("b", rising))
    ))  # fmt: skip
    lost = (thinned["dataset"] == "a") & (thinned["position"] == "2") & (thinned["seed"] > 1)
    told = "3 seeds of a at block 1 and 1 of a at block 2"
    with pytest.raises(UserError, match=told):
        select(thinned[~lost], "threshold", metric="class_accuracy", agreement_metric="none")
    # Pairs of blocks are means over datasets as blocks are.
    pairs = table(*(
        pair_rows("cka_debiased", 3, 3, lambda i, j, rise=rise: 0.5 + rise * i * j, dataset=name,
                  seed=seed)
        for name, rise, seeds in (("a", 0.05, (1, 2, 3)), ("b", -0.05, (1,))) for seed in seeds
    ))  # fmt: skip
    told = "has 3 seeds of a between vision block 1 and text block 1 and 1 of b between vision"
    with pytest.raises(UserError, match=told):
        select(pairs, "budget", n=1, score="metric:cka_debiased")


def test_a_placement_is_predicted_however_it_is_written() -> None:
    ways = {
        "text": "v3-5,t4", "pair": ((3, 4, 5), (4,)), "of text": ("3-5", "4"),
        "choice": LayerChoice((3, 4, 5), (4,), "mine"),
    }  # fmt: skip
    found = predict(planted(), ways, ["contrast_accuracy"])
    expected = placement_score(planted(), "3-5", "4", "contrast_accuracy")
    assert (found["predicted"] == expected).all() and set(found["vision"]) == {"3 4 5"}
    for wrong in (3, ((1, 2),), {"vision": [1]}, [5, 6]):
        with pytest.raises(UserError, match="placement 'a' takes text such as"):
            predict(planted(), {"a": wrong}, ["contrast_accuracy"])


def test_a_knee_is_fitted_to_any_finite_curve() -> None:
    curve = [0.1, 0.1, 0.1, 0.3, 0.5, 0.7]
    assert fit_knee(curve) == fit_knee(np.array(curve)) and fit_knee(curve)["knee"] == 3
    # Up to the last block but one, behind which a single step is left.
    assert fit_knee([0.1, 0.1, 0.1, 0.1, 0.1, 0.7])["knee"] == 5
    for wrong in ([0.1, np.nan, 0.3, 0.4], np.ones((5, 2))):
        with pytest.raises(UserError, match="finite number for each block"):
            fit_knee(wrong)
    with pytest.raises(UserError, match="blocks takes .*whole numbers from 1"):
        block_scores(planted(), "accuracy", {"vision": 0})


def test_the_threshold_that_is_told_is_the_one_that_blocks_pass() -> None:
    curve = [0.4, 0.5, 0.61, 0.7, 0.59, 0.9]
    scores = table(curve_rows("class_accuracy", "vision", curve))
    asked = {"metric": "class_accuracy", "agreement_metric": "none", "resamples": 0}
    choice = select(scores, accuracy=0.4, **asked)
    told = choice.evidence["towers"]["vision"]["values"]["class_accuracy"]["threshold"]
    assert told == pytest.approx(0.6) and choice.vision == (3, 4, 6)


@pytest.mark.parametrize(("span", "doubted"), [(0.0455, True), (0.0470, False)])
def test_noise_is_told_by_the_published_point_of_the_studentized_range(
    span: float, doubted: bool
) -> None:
    """Its upper 5 % point for 12 means and known variance is 4.62 standard errors, here of 0.01."""
    rows = curve_rows("class_accuracy", "vision", np.linspace(0.5, 0.5 + span, 12), half=0.0196)
    rows[3] |= {"low": 0.1, "high": 0.9}  # one wide interval says nothing of the others
    choice = select(table(rows), "knee", metric="class_accuracy", resamples=0)
    notes = choice.evidence["towers"]["vision"]["notes"]
    assert any("varies by" in note for note in notes) is doubted


@pytest.mark.parametrize("blocks", [2, 12, 48])
def test_the_range_of_noise_is_scipys(blocks: int) -> None:
    known = scipy.stats.studentized_range.ppf(0.95, blocks, np.inf)
    assert _range_quantile(blocks) == pytest.approx(known, rel=1e-8)


def test_a_block_exactly_at_its_threshold_passes() -> None:
    """Whatever the mean over seeds rounds to."""
    for low, high in ((7, 19), (11, 37), (13, 59)):
        curve = [low / 60, (low + high) / 120, high / 60, high / 60]
        scores = table(*(curve_rows("class_accuracy", tower, curve, seeds=(0, 1, 2))
                         for tower in ("vision", "text")))  # fmt: skip
        choice = select(scores, "threshold", resamples=0, metric="class_accuracy",
                        agreement_metric="none", accuracy=0.5)  # fmt: skip
        assert choice.vision == choice.text == (2, 3, 4)


def choice_of(content: str, folder: Path) -> LayerChoice:
    path = folder / "choice.json"
    path.write_text(content)
    return LayerChoice.load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "must hold an object"),
        ('{"vision": [1], "text": [], "rule": "x", "visoin": 1}', "did you mean 'vision'"),
        ('{"vision": [1], "rule": "x"}', "lacks the key 'text'"),
        ('{"vision": [0], "text": [], "rule": "x"}', "not a whole number from 1"),
        ('{"vision": [1.5], "text": [], "rule": "x"}', "not a whole number from 1"),
        ('{"vision": "5-12", "text": [], "rule": "x"}', "must be a list of whole numbers"),
        ('{"vision": [], "text": [], "rule": 3}', "'rule' must be a name"),
        (
            '{"vision": [13], "text": [], "rule": "x", '
            '"evidence": {"towers": {"vision": {"depth": 12}}}}',
            "vision block 13, but the vision tower has 12 blocks",
        ),
    ],
)
def test_bad_choice_files(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        choice_of(content, tmp_path)


def test_choice_round_trip(tmp_path: Path) -> None:
    choice = select(planted(), resamples=20)
    again = LayerChoice.load(choice.save(tmp_path / "a" / "choice.json"))
    assert LayerChoice.load(tmp_path / "a") == again, "a run folder stands for its choice"
    assert again == choice and again.evidence == choice.evidence
    assert json.loads((tmp_path / "a" / "choice.json").read_text())["vision"] == list(span(5, 12))
    assert "5–12" in choice._repr_html_() and "5–12" in str(choice)
    with pytest.raises(UserError, match="cannot read the choice"):
        LayerChoice.load(tmp_path / "absent.json")


def test_a_choice_shows_itself_in_ten_lines() -> None:
    choice = select(planted(), resamples=20)
    first, *said = repr(choice).splitlines()
    assert first == f"LayerChoice({choice})" and " ".join(said) == choice.statement != ""
    assert repr(LayerChoice([1, 2], [3], "mine")) == "LayerChoice(vision 1–2, text 3 (rule mine))"
    long = repr(LayerChoice([1], [2], "mine", {"statement": "so it is " * 500})).splitlines()
    assert len(long) <= 10 and max(map(len, long)) <= 80 and long[-1].endswith("…")


@pytest.mark.parametrize(("resamples", "warned"), [(0, False), (5, True), (20, False)])
def test_few_resamples_are_said_to_say_little(
    resamples: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    select(planted(), resamples=resamples)
    assert ("resamples say little" in caplog.text) is warned


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "treshold"}, "did you mean 'threshold'"),
        ({"acuracy": 0.5}, "did you mean 'accuracy'"),
        ({"accuracy": 1.5}, "accuracy takes a number from 0 to 1, not 1.5"),
        ({"accuracy": "much"}, "accuracy takes a number from 0 to 1, not 'much'"),
        ({"fill": "perhaps"}, "fill takes True or False"),
        ({"partner": "dept"}, "did you mean 'depth'"),
        ({"metric": "dataset_acuracy"}, "did you mean 'dataset_accuracy'"),
        ({"resamples": -1}, "resamples takes a whole number from 0, not -1"),
        ({"resamples": 1}, "resamples is 1; at least 2 are needed"),
        ({"resamples": 1, "rule": "knee"}, "or 0 to skip that"),
        ({"rule": "budget", "n": 13}, "exceeds the 12 vision blocks"),
        ({"rule": "budget", "n": -1}, "n takes a whole number from 0, not -1"),
        ({"rule": "budget", "score": "acuracy"}, "did you mean 'accuracy'"),
        ({"rule": "budget", "score": "accuracy_x_novel"}, "needs the metric"),
        ({"rule": "explicit"}, "names no block"),
        ({"seed": 3, "resamples": 0}, "seed is of the resampling, and resamples is 0"),
        ({"seed": 3, "rule": "paper"}, "rule 'paper' reads no score; leave seed out"),
        ({"resamples": 20, "rule": "all"}, "rule 'all' reads no score; leave resamples out"),
        (
            {"agreement": 0.7, "agreement_metric": "none"},
            "agreement is of agreement between towers, and agreement_metric is none",
        ),
        ({"partner": "max", "agreement_metric": "none"}, "partner is of agreement between towers"),
        (
            {"rule": "explicit", "vision": "1-13"},
            "vision block 13, but the vision tower has 12 blocks",
        ),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        select(planted(), **options)  # type: ignore[arg-type]


def test_agreement_has_no_options_where_one_tower_is_scored() -> None:
    scores = planted()
    alone = scores[(scores.tower == "vision") & (scores.metric == "dataset_accuracy")]
    assert select(alone, resamples=0).vision == select(scores, resamples=0).vision
    with pytest.raises(UserError, match="partner is of .*, and there is one tower alone"):
        select(alone, partner="max")


def test_why_a_metric_has_no_value_at_blocks_is_said_where_it_is_known() -> None:
    """As of a text tower with fewer prompts than the metric needs: the note is of each block."""
    scores = planted()
    few = scores[(scores.tower != "text") | ~scores.metric.str.startswith("dataset_accuracy")]
    few.attrs["refused"] = [
        {"metric": "dataset_accuracy", "dataset": "*", "tower": "text", "position": str(block),
         "reason": "11 items; at least 15 are needed"}
        for block in range(1, 13)
    ]  # fmt: skip
    why = "block 1, 2.*: 11 items; at least 15 .*"
    said_of = {"threshold": why, "knee": why, "budget": "no value on the text tower"}
    for rule, words in said_of.items():
        with pytest.raises(UserError, match=f"{words}; choose by another") as said:
            select(few, rule)
        score = str(said.value).partition("--set score=")[2].rstrip(")")
        assert select(
            few, "budget", score=score, resamples=0
        ).text  # what it says to do can be done


def test_what_else_to_choose_by_has_a_value_everywhere() -> None:
    scores = planted()
    scores.attrs["refused"] = [
        {"metric": "twonn", "dataset": "*", "tower": "", "position": "", "reason": "too few"}
    ]
    with pytest.raises(UserError, match="twonn was not computed: too few; .* score=metric:"):
        select(scores, "knee", metric="twonn")
    halved = scores[(scores.metric == "dataset_accuracy") & (scores.position != "7")]
    with pytest.raises(
        UserError, match="twonn was not computed.* choose by another metric or rule$"
    ):
        select(halved, "knee", metric="twonn")


def test_a_block_that_a_dataset_lacks_is_not_chosen_for_the_others() -> None:
    one = planted()
    one = one[one.metric == "dataset_accuracy"].assign(metric="class_accuracy")
    easy, hard = one.assign(dataset="easy", value=0.9), one.assign(dataset="hard", value=0.1)
    half = pd.concat([easy, hard[hard.position != "3"]])
    with pytest.raises(UserError, match="no value of hard at block 3, where it is a mean over ot"):
        select(half, "budget", score="metric:class_accuracy", n=1)
    for whole in (easy, pd.concat([easy, hard])):
        assert select(whole, "budget", score="metric:class_accuracy", n=1, resamples=0).vision


def test_bad_tables() -> None:
    scores = planted()
    for table_, message in (
        (scores.drop(columns="value"), "lacks the columns value"),
        (scores.iloc[:0], "is empty"),
        (scores.assign(value="high"), "holds 'high' in the column value, where a number is"),
        (scores.assign(model=["a", *["b"] * (len(scores) - 1)]), "holds 2 models"),
        (scores[scores.position != "7"], "has no value at block 7"),
        (scores[scores.metric != "cka_debiased"], "score it as well, or choose with agreement_"),
        (scores[scores.position.isin(["embed", "proj"])], "no value at any block"),
        (scores.assign(value=scores.value.where(scores.position != "3")), "not finite at block 3"),
    ):
        with pytest.raises(UserError, match=message):
            select(table_)
    with pytest.raises(UserError, match="holds 2 models"):
        block_scores(pd.concat([scores, scores.assign(model="b")]), "accuracy")
    with pytest.raises(UserError, match="at least 4 blocks"):
        select(planted(3, 3, (2, 2)), "knee")
    written = scores.assign(value=scores.value.map(str))  # as of a table of text
    curve = curves(written, "dataset_accuracy")
    pd.testing.assert_frame_equal(curve, curves(scores, "dataset_accuracy"))


@pytest.mark.parametrize("rule", ["threshold", "knee", "budget"])
def test_a_table_with_another_readout_is_chosen_by_when_its_option_is_given(rule: str) -> None:
    """Streamed sums have an LDA, and not the logistic read-out that rules take by themselves."""
    scores = planted()
    streamed = scores.assign(
        metric=scores.metric.replace("dataset_accuracy", "dataset_accuracy_lda")
    )
    with pytest.raises(UserError, match=r"no dataset_accuracy but .*\(--set \w+=\S+\)$") as said:
        select(streamed, rule, resamples=0)
    key, value = str(said.value).rpartition("--set ")[2].rstrip(")").split("=")
    chosen = select(streamed, rule, resamples=0, **{key: value})
    usual = select(scores, rule, **({"score": "accuracy"} if rule == "budget" else {}))
    assert chosen.vision and (chosen.vision, chosen.text) == (usual.vision, usual.text)


def test_a_budget_without_its_metric_says_which_one_would_do() -> None:
    scores = planted()
    for kept in ("cka_debiased", "dataset_accuracy"):
        lacking = scores[scores.metric == kept].assign(metric="other")
        with pytest.raises(
            UserError, match="needs the metric .*; score it; choose by .*--set"
        ) as no:
            select(lacking, "budget", resamples=0)
        value = str(no.value).rpartition("--set score=")[2].rstrip(")")
        assert select(lacking, "budget", resamples=0, score=value).vision


def test_placement_scores_prefer_the_planted_placement() -> None:
    scores = planted()
    placements = {
        "planted": (span(5, 12), span(5, 12)),
        "low": (span(1, 8), span(1, 8)),
        "one": ((1,), (1,)),
        "all": (span(1, 12), span(1, 12)),
    }
    frame = predict(scores, placements).pivot(
        index="placement", columns="score", values="predicted"
    )
    for name in ("contrast_accuracy", "contrast_accuracy_x_agreement", "captured_minus_cost"):
        assert frame[name].idxmax() == "planted", name
    assert frame.loc["planted", "mean_accuracy"] == 1
    assert frame.loc["low", "mean_accuracy"] == pytest.approx(0.5)
    assert frame.loc["all", "blocks_adapted"] == 1
    assert frame.loc["one", "relative_depth"] == pytest.approx(1 / 12)
    assert "metric:dataset_accuracy" in frame.columns


def test_placement_scores_are_what_they_say_of_blocks_in_the_middle() -> None:
    """Blocks of one tower scale to 0, 0.2 … 1, those of the other to 0, 0.5 and 1."""
    scores = table(
        curve_rows("dataset_accuracy", "vision", [0.3, 0.4, 0.5, 0.6, 0.7, 0.8]),
        curve_rows("dataset_accuracy", "text", [0.2, 0.5, 0.8]),
    )
    taken, left = [0.2, 0.4, 0.5], [0, 0.6, 0.8, 1, 0, 1]
    found = placement_score(scores, (2, 3), (2,), "contrast_accuracy")
    assert found == pytest.approx(np.mean(taken) - np.mean(left))
    everywhere = placement_score(scores, span(1, 6), span(1, 3), "contrast_accuracy")
    assert everywhere == pytest.approx(np.mean([*taken, *left]))  # nothing is left to compare with
    assert placement_score(scores, (2, 3), (2,), "blocks_adapted") == pytest.approx(3 / 9)
    # All of the score for half the price of all blocks, as `PLACEMENT_SCORES` says.
    whole = placement_score(planted(), span(1, 12), span(1, 12), "captured_minus_cost")
    assert whole == pytest.approx(0.5)


def test_rounding_ranks_no_placement_above_its_equal() -> None:
    """Blocks of one tower are as deep on average as the same blocks of both."""
    for start in span(1, 12):
        blocks = span(start, 12)
        pairs = (blocks, blocks), (blocks, ()), ((), blocks)
        assert len({placement_score(planted(), *pair, "relative_depth") for pair in pairs}) == 1


def test_placement_scores_on_unequal_towers_and_any_metric() -> None:
    scores = full(24, 12)
    assert "mean_accuracy_x_novel" not in available_scores(scores)
    assert "metric:class_accuracy" in available_scores(scores)
    one = (scores["metric"] == "dataset_accuracy") & (scores["tower"] == "vision")
    lacking = scores[~(one & (scores["position"] == "2"))]
    lost = {*available_scores(scores)} - {*available_scores(lacking)}
    assert lost == {"metric:dataset_accuracy"}
    with pytest.raises(UserError, match="dataset_accuracy of the vision tower has no value at bl"):
        predict(lacking, {"a": "v2-3,t2"})
    low = placement_score(scores, span(1, 8), span(1, 4), "metric:class_accuracy")
    high = placement_score(scores, span(17, 24), span(9, 12), "metric:class_accuracy")
    assert low < high
    assert set(block_scores(scores, "agreement")) == {"vision", "text"}
    with pytest.raises(UserError, match="vision block 25, but the vision tower has 24 blocks"):
        placement_score(scores, (25,), ())
    with pytest.raises(UserError, match="did you mean 'mean_accuracy'"):
        placement_score(scores, (1,), (), "mean_acuracy")


@pytest.mark.parametrize("rule", ["threshold", "knee", "budget"])
def test_values_that_no_resample_moves_leave_the_tower_open(rule: str) -> None:
    """A table without intervals gives the same choice in every resample, which shows nothing."""
    scores = planted()
    own = scores["metric"] == "dataset_accuracy"
    blocks = scores.loc[own, "position"].replace({"embed": "1", "proj": "12"}).astype(int)
    # A rise up to block 5, which one straight line does not fit.
    for name, moved in (("value", 0.0), ("low", -0.01), ("high", 0.01)):
        scores.loc[own, name] = 0.4 + 0.1 * blocks.clip(upper=5) + moved
    one = own & (scores["tower"] == "vision")
    scores.loc[one & (scores["position"] == "6"), ["low", "high"]] = np.nan
    choice = select(scores.astype({"metric": "category"}), rule, resamples=20)
    assert "of its 0 values" not in choice.statement
    said = "dataset_accuracy of the vision tower has no interval at 3 of its 36 values"
    assert f"{said}, which no resample moves" in choice.statement
    assert not choice.evidence["decided"] and not choice.firm("vision") and choice.firm("text")


def test_scorings_that_were_joined_are_refused_and_several_heads_of_one_are_not() -> None:
    one = table(curve_rows("dataset_accuracy", "vision", [0.2, 0.4, 0.6]))
    heads = [one.assign(options=f"bootstrap=9;head={head}") for head in (1, 2)]
    assert len(check_scores(pd.concat(heads, ignore_index=True))) == 2 * len(one)
    other = one.assign(options="bootstrap=99;head=1")
    with pytest.raises(UserError, match="several values of dataset_accuracy at vision"):
        check_scores(pd.concat([heads[0], other], ignore_index=True))


def test_rows_of_all_datasets_together_are_read_where_no_dataset_is_named() -> None:
    whole = table(curve_rows("dataset_accuracy", "vision", [0.2, 0.4, 0.6]))
    parts = [whole.assign(dataset=name, value=0.5) for name in ("a", "b")]
    scores = pd.concat([*parts, whole], ignore_index=True)
    for reading, datasets in ((Reading(), {"*"}), (Reading(dataset="b"), {"b"})):
        assert set(reading.rows(scores, "dataset_accuracy", "vision")["dataset"]) == datasets
    found = Reading().rows(pd.concat(parts), "dataset_accuracy", "vision")
    assert set(found["dataset"]) == {"a", "b"}


def test_depth_is_what_the_scores_say_of_it_or_refused() -> None:
    scores = full()
    first = scores["position"].isin(["1", "2", "3"])
    part = scores[first & scores["other_position"].isin(["", "1", "2", "3"])]
    assert depths(part) == {"vision": 12, "text": 12}
    gaps = part[(part["metric"] == "centroid_gap") & (part["tower"] == "vision")]
    with pytest.raises(UserError, match="end at vision block 3 of 12 and have none of the text"):
        select(gaps, "paper")
    whole = scores[(scores["metric"] == "centroid_gap") & (scores["tower"] == "vision")]
    assert select(whole, "paper").text == tuple(range(5, 13)), "all partners are there"
    wrong = part.copy()
    wrong.loc[wrong.index[wrong["position"] == "1"][0], "depth"] = 0.01
    with pytest.raises(UserError, match="vision towers of 12 and 100 blocks, by its column depth"):
        select(wrong, "paper")
    worded = scores.assign(depth=scores["depth"].astype(object).where(~first, "1/12"))
    with pytest.raises(UserError, match="holds '1/12' in the column depth, where a number"):
        select(worded, "paper")


def test_a_table_that_pandas_read_itself_is_the_table(tmp_path: Path) -> None:
    """Positions that are blocks alone become numbers in a file, empty words NaN."""
    scores = full()
    blocks = scores["position"].str.isdecimal()
    paired = scores["other_position"].str.isdecimal() | (scores["other_position"] == "")
    scores = scores[blocks & paired]
    scores.to_csv(tmp_path / "mine.csv", index=False)
    read = pd.read_csv(tmp_path / "mine.csv")
    assert read["position"].dtype == int and read["other_position"].dtype == float
    for rule in ("threshold", "knee", "budget", "paper"):
        own, theirs = (select(one, rule, resamples=0) for one in (scores, read))
        assert own.placement == theirs.placement
    drawn = [curves(one, "dataset_accuracy") for one in (scores, read)]
    pd.testing.assert_frame_equal(*drawn, check_dtype=False)
    ax = plots.layer_curves(read, "dataset_accuracy")
    assert len(ax.lines) >= 2
    assert plots.agreement_matrix(read).images
