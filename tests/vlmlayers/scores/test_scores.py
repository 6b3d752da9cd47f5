"""Scores: the protocol recovers planted stories, lands at its nulls, and refuses out loud."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest, hypergeom
from score_tables import curve_rows, row
from score_tables import table as table_of
from synthetic import make_features, many

from vlmlayers.errors import UserError
from vlmlayers.features import LayerFeatures, TowerFeatures
from vlmlayers.metrics import METRICS, Metric, rmg, transfer_predict
from vlmlayers.metrics.declare import MODEL
from vlmlayers.metrics.intervals import (
    bootstrap_weights,
    jackknife_groups,
    jackknife_interval,
    mean_interval,
    wilson,
)
from vlmlayers.plots import layer_curves
from vlmlayers.report.payload import metric_entry
from vlmlayers.scores import (
    CONTRACT_COLUMNS,
    SCORE_COLUMNS,
    ScoreOptions,
    read_scores,
    refusals,
    score,
    score_cost,
    score_frame,
    score_matrix,
    score_streaming,
    stated_options,
    write_scores,
)
from vlmlayers.scores.gaps import match
from vlmlayers.scores.options import Draw, generator
from vlmlayers.scores.parts import balanced_rows, deal, shots_and_queries
from vlmlayers.scores.projection import project
from vlmlayers.scores.reading import ceiling, check_scores
from vlmlayers.scores.readouts import (
    Split,
    _ceiling,
    _numbered,
    accuracy_interval,
    class_split,
    dataset_split,
)
from vlmlayers.scores.run import chosen_metrics, job_count, make_tasks
from vlmlayers.scores.scoring import make_groups
from vlmlayers.scores.summaries import agreement, curves, how_made, over_datasets, overview
from vlmlayers.scores.transfers import base_and_novel, families
from vlmlayers.selection import select

# Those of blocks run the model, and those of heads need spaces that extraction adds where asked.
OF_FEATURES = {name for name, entry in METRICS.items() if entry.needs not in (MODEL, "heads")}
QUICK = {"bootstrap": 50, "permutations": 20, "shuffles": 2, "seeds": (1, 2)}


@pytest.fixture(scope="module")
def scores() -> pd.DataFrame:
    features = [
        *many(3),
        make_features("captioned", number=9, captions=2),
        make_features("restyled", number=5, names="set0"),
    ]
    return score(features, jackknife=5, **QUICK)


@pytest.fixture(scope="module")
def parallel() -> tuple[pd.DataFrame, pd.DataFrame]:
    """One table by one process and the same by two."""
    metrics = ["dataset_recall", "fisher_ratio", "rsa_calibrated", "effective_rank", "rmg", "twonn"]
    features = [*many(2), replace(make_features("few", items=5, classes=2, number=4))]
    one, two = (score(features, metrics, jobs=jobs, **QUICK) for jobs in (1, 2))
    return one, two


def test_the_table_does_not_depend_on_the_number_of_processes(parallel) -> None:
    one, two = parallel
    assert len(set(one["metric"])) == 6
    pd.testing.assert_frame_equal(one, two, check_exact=True)
    assert len(refusals(one)) > 0
    pd.testing.assert_frame_equal(refusals(one), refusals(two))
    assert set(one.attrs["cost"]) == set(two.attrs["cost"])
    assert one.attrs["protocol"] == two.attrs["protocol"]


def test_what_goes_wrong_in_another_process_is_still_one_line() -> None:
    from vlmlayers.scores.run import ScoreTask, results_of

    def fails(*_) -> None:
        raise UserError("the third dataset is not there")

    task = ScoreTask(fails, make_groups([make_features()], ScoreOptions())[0], {})
    with pytest.raises(UserError, match="^the third dataset is not there$"):
        list(results_of([task, task], ScoreOptions(), jobs=2))


def test_a_metric_added_at_run_time_is_known_in_every_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entry = Metric(
        lambda x: float(np.abs(x).max()), "geometry", "features", "largest", "", (0.0, np.inf)
    )
    monkeypatch.setitem(METRICS, "largest_value", entry)
    features = make_features()
    table = score(features, ["largest_value"], jobs=2)
    assert features.vision is not None
    expected = np.abs(features.vision.arrays["native"]["2"]).max()
    row = table[(table.tower == "vision") & (table.position == "2")]
    assert row["value"].item() == pytest.approx(expected)


def test_processes_are_started_for_much_work_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr("vlmlayers.runs.QUOTA", Path("no such file"))
    groups, every = make_groups(many(2), ScoreOptions()), chosen_metrics(None)
    assert job_count(None, groups, every) == 1
    monkeypatch.setattr("vlmlayers.scores.run.WORTH_SHARING", 1000)
    assert job_count(None, groups, every) == 8
    assert job_count(3, groups, every) == 3
    with pytest.raises(UserError, match="jobs is 0; at least 1"):
        score(make_features(), jobs=0)


def test_tasks_hold_every_metric_of_every_dataset_once() -> None:
    groups, every = make_groups(many(3), ScoreOptions()), chosen_metrics(None)
    tasks = make_tasks(groups, every)
    for name, metric in every.items():
        holding = [task for task in tasks if name in task.metrics]
        members = [m.dataset for task in holding for m in task.group.members]
        assert sorted(members) == [f"set{i}" for i in range(3)]
        assert all(metric.base in (*task.metrics, "") for task in holding)


def _mean(table: pd.DataFrame, metric: str, tower: str, position: str, dataset: str = "*") -> float:
    rows = table[
        (table.metric == metric)
        & (table.tower == tower)
        & (table.position == position)
        & (table.dataset == dataset)
    ]
    assert len(rows)
    return float(rows["value"].mean())


def test_the_table_has_the_columns_of_the_contract(scores: pd.DataFrame) -> None:
    assert tuple(scores.columns) == SCORE_COLUMNS
    assert SCORE_COLUMNS[:16] == CONTRACT_COLUMNS
    assert str(scores["n"].dtype) == str(scores["seed"].dtype) == "int64"


def test_every_metric_is_scored_or_refused(scores: pd.DataFrame) -> None:
    assert set(scores["metric"]) == OF_FEATURES


def test_every_value_has_interval_null_and_n(scores: pd.DataFrame) -> None:
    assert np.isfinite(scores[["value", "low", "high", "null", "depth"]]).all().all()
    assert (scores["low"] <= scores["high"]).all() and (scores["n"] > 0).all()
    assert scores["options"].str.contains("interval=").all()


def test_what_is_calibrated_has_its_value_in_its_interval(scores: pd.DataFrame) -> None:
    """Below chance as well, where the metric that is calibrated cannot be."""
    rows = scores[scores["metric"].str.endswith("_calibrated")]
    assert set(rows[rows["value"] < 0]["metric"]) > {"cka_biased_calibrated"}
    assert rows["value"].between(rows["low"] - 1e-9, rows["high"] + 1e-9).all()
    assert rows["high"].max() <= 1


def test_what_is_calibrated_is_its_metric_and_interval_from_chance_to_identity(
    scores: pd.DataFrame,
) -> None:
    """A line through both for each cell, and nothing is the closest pair within one tower."""
    place = ["dataset", "tower", "position", "other_tower", "other_position", "space"]
    for name in ("cka_biased", "cka_debiased", "rsa", "mutual_knn", "procrustes"):
        plain, made = (
            scores[scores["metric"] == one].set_index(place).sort_index()
            for one in (name, f"{name}_calibrated")
        )
        best = 0.0 if name == "procrustes" else 1.0
        chance = plain["null"]
        value = (plain["value"] - chance) / (best - chance)
        # A difference of the metric, as half of an interval is one before it meets a bound.
        half = (plain["high"] - plain["low"]) / (best - chance).abs() / 2
        free = (plain["high"] + plain["low"] - 2 * plain["value"]).abs() < 1e-9
        free &= made["high"] < 1
        assert made["value"].to_numpy() == pytest.approx(value.to_numpy(), abs=1e-6)
        found = (made["high"] - made["low"])[free] / 2
        assert free.sum() > 5 and found.to_numpy() == pytest.approx(half[free].to_numpy(), abs=1e-6)
    variants = scores["metric"].str.contains("_calibrated|_max")
    assert (scores[variants]["null"] == 0).all()
    largest = scores[scores["metric"].str.endswith("_max")]
    assert (largest["tower"] != largest["other_tower"]).all()


def test_dataset_accuracy_rises_with_the_planted_depth(scores: pd.DataFrame) -> None:
    for name in (
        "dataset_accuracy",
        "dataset_accuracy_ncm",
        "dataset_accuracy_knn",
        "dataset_accuracy_lda",
    ):
        for tower in ("vision", "text"):
            values = [_mean(scores, name, tower, p) for p in ("embed", "1", "3")]
            assert values[0] < 0.45 and values[0] < values[1] < values[2]
    seeds = scores[(scores.metric == "dataset_accuracy")]["seed"]
    assert set(seeds) == {1, 2}


def test_derived_dataset_metrics_follow_from_the_confusion(scores: pd.DataFrame) -> None:
    one = scores[(scores.tower == "vision") & (scores.position == "2") & (scores.seed == 1)]
    accuracy = one.loc[one.metric == "dataset_accuracy", "value"].item()
    recall = one[one.metric == "dataset_recall"]
    assert recall["value"].mean() == pytest.approx(accuracy)
    assert one.loc[one.metric == "dataset_invariance", "value"].item() == pytest.approx(
        1 - (accuracy - 1 / 5) / (1 - 1 / 5)
    )
    wrong = one[(one.metric == "dataset_confusion") & (one.dataset == "set0")]
    assert wrong["value"].sum() == pytest.approx(1 - recall.set_index("dataset").value["set0"])
    assert set(wrong["options"].str.extract(r"predicted=(\w+)")[0]) == {
        "set1",
        "set2",
        "captioned",
        "restyled",
    }


def test_a_constant_embedding_scores_exactly_chance_or_is_refused() -> None:
    members = []
    for member in many(2):
        tower = member.tower("vision")
        arrays = {s: dict(by) for s, by in tower.arrays.items()}
        arrays["native"]["embed"] = np.full_like(arrays["native"]["embed"], 0.1234)
        members.append(replace(member, vision=replace(tower, arrays=arrays)))
    table = score(members, positions=["embed", "1"], **QUICK)
    here = table[
        (table.tower == "vision")
        & (table.position == "embed")
        & (table.space == "native")
        & ~table.metric.isin(["mean_cosine"])
    ]
    exact = here[here.metric.str.startswith("dataset_accuracy")]
    assert len(exact) == 8 and exact["value"].to_numpy() == pytest.approx(0.5)
    refused = refusals(table)
    refused = refused[(refused.tower == "vision") & (refused.position == "embed")]
    assert {"fisher_ratio", "cka_debiased", "mutual_knn", "effective_rank"} <= set(refused.metric)
    assert refused["reason"].str.contains("same").any()


@pytest.mark.parametrize(
    "name",
    [
        "class_accuracy_ncm",
        "silhouette",
        "h_score",
        "lda_criterion",
        "logme",
        "neighbourhood_overlap",
        "alignment",
        "fisher_ratio",
    ],
)
def test_shuffled_labels_land_at_the_null(name: str) -> None:
    member = make_features(items=90, strength=2.0)
    rng = np.random.default_rng(3)
    values, nulls = [], []
    for _ in range(6):
        tower = replace(member.tower("vision"), labels=rng.permutation(member.vision.labels))
        table = score(
            replace(member, vision=tower),
            [name],
            positions=["3"],
            bootstrap=20,
            shuffles=10,
            seeds=(1,),
        )
        table = table[table.tower == "vision"]
        values += table["value"].tolist()
        nulls += table["null"].tolist()
    true = score(member, [name], positions=["3"], bootstrap=20, seeds=(1,))
    signal = abs(true[true.tower == "vision"]["value"].iloc[0] - np.mean(nulls))
    assert abs(np.mean(values) - np.mean(nulls)) < 0.25 * signal


def test_unrelated_towers_land_at_their_permutation_null() -> None:
    table = score(
        make_features(items=80, classes=20, strength=0.0),
        ["cka_biased", "cka_biased_calibrated", "cka_biased_max", "mutual_knn_max"],
        **QUICK,
    )
    across = table[table.other_tower.eq("text") & table.tower.eq("vision")]
    raw = across[across.metric == "cka_biased"]
    assert raw["value"].mean() == pytest.approx(raw["null"].mean(), abs=0.02)
    assert raw["null"].mean() > 0.4  # the biased estimate is far from 0 on unrelated data
    assert across[across.metric == "cka_biased_calibrated"]["value"].mean() == pytest.approx(
        0.0, abs=0.05
    )
    p = across[across.metric == "cka_biased_max"]["options"].str.extract(r";p=([\d.]+)")[0]
    assert float(p.iloc[0]) > 0.04


def towers_of(dataset: str, names: str, vision: np.ndarray, text: np.ndarray) -> LayerFeatures:
    """Return a dataset with a position, an image and a prompt for each class."""
    member = make_features(dataset, items=len(vision), classes=len(vision), names=names)
    arrays = ({"native": {"1": x.astype(np.float32)}} for x in (vision, text))
    vision_arrays, text_arrays = arrays
    return replace(
        member,
        vision=replace(member.vision, arrays=vision_arrays),
        text=replace(member.text, arrays=text_arrays),
    )


def agreement_of(table: pd.DataFrame, dataset: str, towers: str = "vision text") -> pd.Series:
    tower, other = towers.split()
    rows = table[(table.dataset == dataset) & (table.tower == tower) & (table.other_tower == other)]
    return rows.iloc[0]


def p_of(row: pd.Series) -> float:
    return float(dict(part.split("=") for part in row.options.split(";"))["p"])


def test_agreement_weighs_datasets_alike_whatever_their_seeds() -> None:
    pair = {"other_tower": "text", "other_position": "1"}
    rows = [
        row("cka_debiased", "vision", "1", 1, value, dataset=dataset, seed=seed, null=value, **pair)
        for dataset, seeds, value in (("a", (1, 2, 3), 0.9), ("b", (1,), 0.1))
        for seed in seeds
    ]
    table = pd.DataFrame(rows)
    found = agreement(table)
    assert found[["value", "null"]].to_numpy().tolist() == [[pytest.approx(0.5)] * 2]
    curve = over_datasets(curves(table, "cka_debiased"))
    assert found["value"].tolist() == pytest.approx(curve["value"].tolist())


def test_a_mean_over_datasets_has_no_interval_of_a_part_of_them() -> None:
    rows = [
        row("cka_debiased", "vision", position, 0.5, value, low=low, high=high, dataset=dataset)
        for position in ("1", "2")
        for dataset, value, low, high in (("a", 0.9, np.nan, np.nan), ("b", 0.1, 0.0, 0.2))
        if (position, dataset) != ("2", "a")
    ]
    mean = over_datasets(curves(pd.DataFrame(rows), "cka_debiased")).set_index("position")
    assert mean.loc["1", "value"] == pytest.approx(0.5)
    assert mean.loc["1", ["low", "high"]].isna().all()
    assert mean.loc["2", ["low", "high"]].tolist() == pytest.approx([0.0, 0.2])


def test_one_dataset_with_prompts_is_not_all_of_those_with_captions() -> None:
    members = [make_features("alpha", classes=6), make_features("beta", captions=True)]
    table = score(members, ["cka_debiased"], progress=False, jobs=1)
    across = table[table.tower != table.other_tower]
    assert set(across.dataset) == {"alpha", "beta"}
    assert "*" in set(table[table.tower == table.other_tower].dataset)
    refused = [one["dataset"] for one in table.attrs["refused"] if "captions" in one["reason"]]
    assert refused == ["*"]
    # That towers are pooled each by itself must not hide how the two agree in each dataset.
    mean = across.groupby(["position", "other_position"]).value.mean()
    found = agreement(table).set_index(["position", "other_position"]).value
    pd.testing.assert_series_equal(found.sort_index(), mean.sort_index())


def test_styles_without_items_of_the_shared_classes_are_refused() -> None:
    names = tuple(f"kind {i}" for i in range(4))
    one, other = (
        replace(make_features(name, classes=6), class_names=(*names, f"{name} 4", f"{name} 5"))
        for name in ("alpha", "beta")
    )
    other = other.take_images(np.flatnonzero(other.vision.labels >= 4))
    with pytest.raises(UserError, match="0 items; at least 15 are needed"):
        score([one, other], ["style_accuracy"], progress=False, jobs=1)


def test_the_dataset_with_too_few_classes_is_named_not_the_smallest() -> None:
    members = [make_features("few", items=60, classes=2), make_features("many", items=30)]
    with pytest.raises(UserError, match="few has 2 independent items"):
        score(members, ["dataset_accuracy"], vision_split="class", progress=False, jobs=1)


def test_the_band_of_a_curve_joins_its_interval_and_its_seeds_as_a_root_of_squares() -> None:
    """Intervals reach 1.47 deviations of 0.1 and seeds 1.96 of them: a triangle of 3, 4 and 5."""
    table = pd.DataFrame([
        row("class_accuracy", "vision", "1", 1, value, half=0.147, seed=seed)
        for seed, value in enumerate((0.4, 0.5, 0.6))
    ])  # fmt: skip
    found = curves(table, "class_accuracy").iloc[0]
    assert found[["value", "low", "high"]].tolist() == pytest.approx([0.5, 0.255, 0.745], abs=1e-4)


def test_the_ceiling_is_that_of_the_split_that_is_read() -> None:
    """The caption says it of the rows that are drawn; the line and the band must not differ."""
    parts = [
        row("dataset_accuracy", "text", "1", 1, 0.6, half=0.2, split=split, options=options)
        for split, options in (("train", "ceiling=0.75"), ("test", "ceiling=0.65"))
    ]
    table = pd.DataFrame(parts)
    assert "at most 0.75 (text)" in how_made(table, "dataset_accuracy")
    assert ceiling(table, "dataset_accuracy", "text") == 0.75
    assert curves(table, "dataset_accuracy")["high"].tolist() == [0.75]


def test_a_caption_says_over_what_a_curve_is_a_mean() -> None:
    def made(*options: str) -> str:
        rows = [
            row("attention_distance", "vision", block, 2, 0.5, dataset="a", options=one)
            for one in options
            for block in "12"
        ]
        return how_made(pd.DataFrame(rows), "attention_distance")

    assert "mean over 3 heads" in made(*(f"interval=bootstrap;head={i}" for i in (1, 2, 3)))
    both = made(*(f"source={s};family={f}" for s, f in (("a", "x"), ("b", "x"), ("a", "y"))))
    assert "mean over 2 sources and 2 families" in both
    assert "mean over" not in made("interval=bootstrap;head=1")


def test_an_overview_reads_the_pooled_rows_where_there_are_some() -> None:
    """And a band ends where the metric does."""
    parts = {"*": 0.9, "digits": 0.3, "signs": 0.4}
    rows = [
        curve_rows("class_accuracy", "vision", [value, 0.02], dataset=name, half=0.3)
        for name, value in parts.items()
    ]
    found = overview(table_of(*rows))["class_accuracy", "vision"]
    assert found.loc[["1", "2"]].tolist() == [0.9, 0.02]
    ends = curves(table_of(*rows), "class_accuracy", "*").set_index("position")
    assert (ends["seeds"] == 0).all(), "nothing was drawn"
    assert ends.loc["1", ["low", "high"]].tolist() == pytest.approx([0.6, 1.0])
    assert ends.loc["2", ["low", "high"]].tolist() == pytest.approx([0.0, 0.32])


def test_an_overview_keeps_a_tower_without_a_number() -> None:
    table = pd.DataFrame([
        row("dataset_accuracy", tower, "1", 1, value)
        for tower, value in (("vision", 0.5), ("text", float("nan")))
    ])  # fmt: skip
    wide = overview(table)
    assert wide["dataset_accuracy"]["vision"].tolist() == [0.5]
    assert wide["dataset_accuracy"]["text"].isna().all()


def test_agreement_within_a_tower_alone_is_no_curve() -> None:
    table = score(replace(make_features(), text=None), ["cka_debiased"], **QUICK)
    for show in (overview, lambda table: layer_curves(table, "cka_debiased")):
        with pytest.raises(UserError, match="values along a tower"):
            show(table)


def test_a_class_name_of_two_datasets_is_one_row_of_pooled_agreement() -> None:
    """As two, with one text and alike images, unrelated towers had a CKA of 0.38 and p = 0.005."""
    rng = np.random.default_rng(0)
    vision, text = rng.normal(size=(16, 24)), rng.normal(size=(16, 16))
    noise = rng.normal(scale=0.1, size=(2, 16, 24))
    # By what prompts read of it, which folders may spell in two ways.
    pair = [towers_of(f"d{i}", spelt, vision + noise[i], text)
            for i, spelt in enumerate(("same kind", "Same_kind"))]  # fmt: skip
    table = score(pair, ["cka_debiased"], **{**QUICK, "permutations": 199})
    pooled = agreement_of(table, "*")
    assert pooled.n == 16 and p_of(pooled) > 0.05
    # By a second route: the means themselves as a dataset of their own.
    alone = towers_of("mean", "same", vision + noise.mean(axis=0), text)
    (expected,) = [agreement_of(score(alone, ["cka_debiased"], **QUICK), "mean")]
    assert pooled["value"] == pytest.approx(expected["value"], abs=1e-6)
    assert agreement_of(table, "*", "text text").n == 16
    assert agreement_of(table, "*", "vision vision").n == 32
    apart = [towers_of(f"d{i}", f"d{i}", vision + noise[i], text) for i in range(2)]
    assert agreement_of(score(apart, ["cka_debiased"], **QUICK), "*").n == 32


@pytest.mark.parametrize(("metric", "classes"), [("cka_debiased", 4), ("mutual_knn", 8)])
def test_a_permutation_that_ties_counts_against_the_claim(metric: str, classes: int) -> None:
    """The draws are in single precision; their ties with the value were lost to rounding."""
    rng = np.random.default_rng(0)
    centres = 10 * np.eye(classes)[np.arange(classes) // (classes // 2)]
    vision, text = (centres + rng.normal(scale=0.3, size=centres.shape) for _ in range(2))
    member = towers_of("few", "few", vision, text)
    table = score(member, [metric], **{**QUICK, "permutations": 999})
    entry = METRICS[metric]
    kernel, signature = entry.parts
    options = {"k": 3} if entry.takes else {}
    a, b = (
        signature(kernel(x.astype(np.float32).astype(float)), **options) for x in (vision, text)
    )
    orders = [rng.permutation(classes) for _ in range(4000)]
    draws = np.array([(a * b[np.ix_(one, one)]).sum() for one in orders])
    exact = (draws >= (a * b).sum() - 1e-9).mean()
    assert exact > 0.02
    assert p_of(agreement_of(table, "few")) == pytest.approx(exact, rel=0.4)


def test_the_maximum_needs_the_maximum_in_its_null(scores: pd.DataFrame) -> None:
    one = scores[
        (scores.dataset == "captioned")
        & (scores.other_tower == "text")
        & (scores.tower == "vision")
    ]
    largest = one[one.metric == "cka_debiased_max"].iloc[0]
    cells = one[one.metric == "cka_debiased"]
    best = cells.loc[cells["value"].idxmax()]
    assert (best.position, best.other_position) == (largest.position, largest.other_position)
    calibrated = one[one.metric == "cka_debiased_calibrated"]["value"].max()
    assert largest["value"] < calibrated


def test_planted_agreement_is_found(scores: pd.DataFrame) -> None:
    rng = np.random.default_rng(0)
    member = make_features("twin", items=40, classes=40, strength=0.0)
    x = rng.normal(size=(40, 16)).astype(np.float32)
    turned = x @ np.linalg.qr(rng.normal(size=(16, 16)))[0].astype(np.float32)
    member = replace(
        member,
        vision=replace(member.vision, arrays={"native": {"1": x}}),
        text=replace(member.text, arrays={"native": {"1": turned}}),
    )
    names = ["cka_debiased", "rsa", "mutual_knn", "procrustes", "cka_debiased_calibrated"]
    table = score(member, names, **QUICK)
    across = table[(table.tower == "vision") & (table.other_tower == "text")].set_index("metric")
    assert across.loc[
        ["cka_debiased", "rsa", "mutual_knn", "cka_debiased_calibrated"], "value"
    ].to_numpy() == pytest.approx(1.0, abs=1e-5)
    assert across.loc["procrustes", "value"] == pytest.approx(0.0, abs=1e-2)
    assert across["options"].str.contains("p=0.0476").sum() >= 4  # none of 20 permutations


def test_a_matrix_is_square_and_symmetric_within_a_tower(scores: pd.DataFrame) -> None:
    inner = score_matrix(scores, "cka_debiased", dataset="set0", other_tower="vision")
    assert list(inner.index) == list(inner.columns) == ["embed", "1", "2", "3", "final", "proj"]
    assert inner.to_numpy() == pytest.approx(inner.to_numpy().T)
    assert np.diag(inner) == pytest.approx(np.ones(6))
    for other, matrix in (
        ("vision", inner),
        ("text", score_matrix(scores, "cka_debiased", dataset="set0")),
    ):
        read = agreement(scores, "cka_debiased", "vision", other, "set0")
        read = read.set_index(["position", "other_position"])["value"]
        assert all(read[pair] == matrix.loc[pair] for pair in read.index) and len(read) >= 21
    across = score_matrix(scores, "rsa_calibrated")
    assert across.shape == (6, 6)
    with pytest.raises(UserError, match="no rsa between vision and text for dataset 'nowhere'"):
        score_matrix(scores, "rsa", dataset="nowhere")


def test_a_matrix_is_of_one_split_and_pooling_not_their_mean() -> None:
    one, other, unseen = (make_features(seed=seed) for seed in range(3))
    assert other.vision is not None
    features = [
        one,
        replace(other, vision=replace(other.vision, pooling="mean")),
        replace(unseen, split="val"),
    ]
    asked = {"positions": ["1", "2"], "permutations": 2}
    table, alone = (score(given, ["cka_debiased"], **asked) for given in (features, one))
    found, expected = (score_matrix(t, "cka_debiased", dataset="alpha") for t in (table, alone))
    pd.testing.assert_frame_equal(found, expected)


def test_a_tower_that_two_poolings_of_the_other_share_is_scored_once() -> None:
    one, second = make_features("alpha"), make_features("beta", seed=1)
    pooled = [
        replace(each, vision=replace(each.vision, pooling="mean"))
        for each in (one, second)
        if each.vision is not None
    ]
    asked = {"metrics": ["effective_rank", "cka_debiased"], "permutations": 2}
    table, alone = (score(given, **asked) for given in ([one, second, *pooled], [one, second]))
    text, expected = (each[each["tower"] == "text"] for each in (table, alone))
    pd.testing.assert_frame_equal(text.reset_index(drop=True), expected.reset_index(drop=True))
    assert set(table["pooling"]) == {*alone["pooling"], "mean"}
    assert table.attrs["protocol"] == alone.attrs["protocol"]
    check_scores(table)


def test_the_gap_is_that_of_the_plain_function(scores: pd.DataFrame) -> None:
    member = make_features("captioned", number=9, captions=2)
    pairs = np.stack([member.text.pairs, np.arange(120)], axis=1)
    for position in ("embed", "proj"):
        x, y = (t.array(position, "joint") for t in member.towers)
        row = scores[
            (scores.metric == "rmg")
            & (scores.dataset == "captioned")
            & (scores.position == position)
        ].iloc[0]
        assert row["value"] == pytest.approx(rmg(x, y, pairs))
        assert (row["space"], row["other_tower"], row["other_position"], row["n"]) == (
            "joint",
            "text",
            position,
            120,
        )


@pytest.mark.parametrize("metric", ["pair_distance", "matched_cosine"])
def test_the_null_of_pairs_is_what_all_others_give(metric: str) -> None:
    x = np.random.default_rng(0).normal(size=(50, 8))
    y = x + 0.3 * np.random.default_rng(1).normal(size=x.shape)
    member = LayerFeatures.from_arrays({1: x}, {1: y}, pairs=np.arange(50), space="joint")
    found = score(member, [metric], bootstrap=20, shuffles=100).iloc[0]
    cosine = (x / np.linalg.norm(x, axis=1)[:, None]) @ (y / np.linalg.norm(y, axis=1)[:, None]).T
    every = cosine if metric == "matched_cosine" else np.sqrt(2 - 2 * cosine)
    assert found["value"] == pytest.approx(np.diag(every).mean())
    assert found["null"] == pytest.approx(every.mean(), abs=0.02)
    assert abs(found["value"] - found["null"]) > 0.5


def test_recall_by_chance_is_of_the_candidates_and_refused_where_they_are_few() -> None:
    """Six prompts for sixty images: of the images ten are of each class."""
    table = score(make_features(), ["retrieval_r5", "retrieval_r10"], positions=["2"], bootstrap=20)
    five = table[table.metric == "retrieval_r5"].set_index("tower")["null"]
    assert five["vision"] == pytest.approx(5 / 6)
    assert five["text"] == pytest.approx(hypergeom.sf(0, 60, 10, 5))
    assert table[table.metric == "retrieval_r10"]["tower"].tolist() == ["text"]
    assert "6 candidates; at least 11 are needed" in refusals(table)["reason"].tolist()


def test_chance_of_zero_shot_is_among_all_prompts() -> None:
    whole = make_features()
    assert whole.vision is not None
    few = whole.take_images(np.flatnonzero(whole.vision.labels < 4))
    table = score(few, ["zero_shot_accuracy"], positions=["2"], bootstrap=20)
    assert len(table) and table["null"].to_numpy() == pytest.approx(1 / 6)


def test_a_left_out_dataset_lends_nothing_to_its_own_geometry() -> None:
    """What varies inside its classes is learned on the other one, whose columns differ in scale."""
    ours, theirs = many(2)
    assert ours.vision is not None and theirs.vision is not None
    scale = np.geomspace(0.05, 20, 24)[np.random.default_rng(0).permutation(24)]
    arrays = {"native": {"2": theirs.vision.array("2") * scale}}
    theirs = replace(theirs, text=None, vision=replace(theirs.vision, arrays=arrays))
    asked = {"positions": ["2"], "seeds": (1,), "shots": 2, "bootstrap": 20}
    table = score([replace(ours, text=None), theirs], ["left_out_accuracy"], **asked)
    x, y = ours.vision.array("2"), ours.vision.labels
    shots, rest = shots_and_queries(y, 2, generator(Draw.SHOTS, 1))
    geometry = theirs.vision.array("2"), theirs.vision.labels
    found = transfer_predict(*geometry, x[shots], y[shots], x[rest], classes=6)
    both = np.vstack([x, geometry[0]]), np.concatenate([y, geometry[1] + 6])
    leaked = transfer_predict(*both, x[shots], y[shots], x[rest], classes=6)
    right, wrong = (np.mean([np.mean(p[y[rest] == c] == c) for c in range(6)])
                    for p in (found, leaked))  # fmt: skip
    assert table.set_index("dataset").loc["set0", "value"] == pytest.approx(right) != wrong
    base, novel = base_and_novel(np.repeat(np.arange(5), 2))
    assert (base.tolist(), novel.tolist()) == (list(range(6)), list(range(6, 10)))


def test_zero_shot_holds_the_other_tower_at_proj(scores: pd.DataFrame) -> None:
    rows = scores[(scores.metric == "zero_shot_accuracy") & (scores.dataset == "set0")]
    assert set(rows["other_position"]) == {"proj"}
    ends = rows[rows.position == "proj"]["value"]
    assert len(ends) == 2 and ends.nunique() == 1


@pytest.mark.parametrize("name", ["dataset_accuracy", "class_accuracy", "procrustes"])
def test_positions_scored_together_score_as_each_alone(name: str) -> None:
    members = many(3, items=30, classes=3)
    options = {**QUICK, "jackknife": 4}
    together = score(members, [name], **options)
    apart = [score(members, [name], positions=p, **options) for p in ("embed", "2", "final")]
    for part in apart:
        keys = ["tower", "dataset", "position", "other_tower", "other_position", "seed"]
        both = part.merge(together, on=keys, suffixes=("", "_together"))
        assert len(both) == len(part)
        for column in ("value", "low", "high", "null"):
            np.testing.assert_allclose(both[column], both[f"{column}_together"], atol=1e-7)


def test_a_position_that_a_read_out_refuses_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entry = METRICS["class_accuracy"]

    def picky(parts: list, **options: object) -> list:
        if any(np.ptp(part[0]) == 0.0 for part in parts):
            raise UserError("this place is constant")
        return entry.of_parts(parts, **options)

    monkeypatch.setitem(METRICS, "class_accuracy", replace(entry, of_parts=picky))
    features = make_features()
    features.vision.arrays["native"]["2"][:] = 1.0
    table = score(features, ["class_accuracy"], jobs=1, **QUICK)
    mine = table[table["tower"] == "vision"]
    assert set(features.vision.arrays["native"]) - set(mine["position"]) == {"2"}
    refused = [note for note in table.attrs["refused"] if note["tower"] == "vision"]
    assert [(n["position"], n["reason"]) for n in refused] == [("2", "this place is constant")]


def test_styles_and_transfer(scores: pd.DataFrame) -> None:
    style = scores[scores.metric == "style_accuracy"]
    assert style["options"].str.contains("family=restyled\\+set0").all()
    assert style.groupby("position")["value"].mean()["3"] > 0.8
    cross = scores[scores.metric == "cross_style_accuracy"]
    assert set(cross["dataset"]) == {"set0", "restyled"}
    novel = scores[(scores.metric == "novel_class_accuracy") & (scores.position == "3")]
    assert novel["value"].mean() > 0.7 and set(novel["null"].round(6)) == {round(1 / 3, 6)}


TOGETHER = [
    "dataset_accuracy_ncm", "dataset_accuracy_lda", "dataset_recall", "dataset_confusion",
    "style_accuracy", "cross_style_accuracy", "left_out_accuracy", "cka_debiased",
    "cka_debiased_max", "procrustes",
]  # fmt: skip


def _placed(table: pd.DataFrame) -> pd.DataFrame:
    keys = [name for name in table.columns if name not in ("value", "low", "high", "null", "n")]
    assert not table.duplicated(keys).any()
    return table.sort_values(keys, ignore_index=True)


@pytest.mark.parametrize("make", [score, score_streaming])
def test_what_several_datasets_give_together_does_not_depend_on_their_order(make) -> None:  # type: ignore[no-untyped-def]
    members = [
        make_features("middle", items=61, names="same"),
        make_features("last", number=1, items=83, names="same"),
        make_features("first", number=2, items=74),
    ]
    options = QUICK if make is score else {"sample": 30}
    names = TOGETHER if make is score else ["dataset_accuracy_lda", "cka_debiased", "cka_biased"]
    one = make(members, names, **options)
    for order in ((2, 0, 1), (1, 0, 2)):
        other = make([members[i] for i in order], names, **options)
        pd.testing.assert_frame_equal(_placed(one), _placed(other), check_exact=True)
    if make is score:  # rows of single datasets come as these were named
        recalls = one[one["metric"] == "dataset_recall"]
        assert list(dict.fromkeys(recalls["dataset"])) == ["middle", "last", "first"]


def test_captions_without_classes_stand_beside_prompts_in_any_order() -> None:
    """A prompt stays on one side of the split with its class, a caption with its image."""
    told = make_features("told", number=1, captions=2)
    bare = [replace(tower, labels=np.full(len(tower), -1)) for tower in told.towers]
    told = replace(told, class_names=(), vision=bare[0], text=bare[1])
    for name in ("asked", "zoned"):  # before and after in the order of names
        pair = [(told, told.text), (one := make_features(name, classes=20), one.text)]
        split = dataset_split(sorted(pair, key=lambda p: p[0].dataset), ScoreOptions(), 1)
        captions = split.fold[split.labels == (name == "asked")].reshape(-1, 2)
        assert len(captions) == 60 and (captions[:, 0] == captions[:, 1]).all()
        assert split.options["split_by"] == "class"


@pytest.mark.parametrize("make", [score, score_streaming])
def test_features_that_are_computed_unlike_are_told_by_name(
    make, caplog: pytest.LogCaptureFixture
) -> None:  # type: ignore[no-untyped-def]
    """Their rounding differs, which alone tells datasets where a class token is still the same."""

    def made(*identities: dict[str, str]) -> list[LayerFeatures]:
        return [replace(m, identity=i) for m, i in zip(many(3), identities)]

    options = QUICK if make is score else {"sample": 30}
    plain, half, reduced = {"precision": "fp32"}, {"precision": "bf16"}, {"decoding": "reduced"}
    make(made({}, plain, plain), ["dataset_accuracy_lda"], **options)
    make(made(plain, half, plain), ["effective_rank"], **options)  # which pools no datasets
    assert "datasets differ" not in caplog.text
    make(made(plain, half, plain | reduced), ["dataset_accuracy_lda"], **options)
    assert "datasets differ in precision: fp32 in set0, set2; bf16 in set1. dataset_acc" in (
        caplog.text
    )
    assert "datasets differ in decoding: full in set0, set1; reduced in set2" in caplog.text


@pytest.mark.parametrize("make", [score, score_streaming])
def test_texts_that_are_made_unlike_are_told_by_name(
    make, caplog: pytest.LogCaptureFixture
) -> None:  # type: ignore[no-untyped-def]
    def named(*templates: str | None) -> list[LayerFeatures]:
        identities = [{} if one is None else {"template": one} for one in templates]
        return [replace(m, identity=i) for m, i in zip(many(3), identities)]

    metrics = ["dataset_accuracy_lda", "cka_debiased", "effective_rank"]
    options = QUICK if make is score else {"sample": 30}
    for alike in (("a {}.",) * 3, (None, "a {}.", None)):
        make(named(*alike), metrics, **options)
        assert "how their texts are made" not in caplog.text
    make(named("a {}.", "a {}.", "{} texture"), metrics, **options)
    (told,) = [r.getMessage() for r in caplog.records if "texts are made" in r.getMessage()]
    assert "made: 'a {}.' in set0, set1; '{} texture' in set2. Of the text tower, " in told
    assert "dataset_accuracy_lda, cka_debiased of all datasets together" in told
    caplog.clear()
    make(named("a {}.", "a {}.", "{} texture"), ["effective_rank"], **options)
    make(named("a {}.")[:1], metrics, **options)
    assert "texts are made" not in caplog.text
    if make is score:  # sums pool captions with captions alone
        captions = make_features("told", number=9, captions=1)
        make([*named("a {}.")[:1], captions], metrics, **options)
        assert "made: 'a {}.' in set0; captions in told." in caplog.text


def test_families_need_shared_class_names() -> None:
    sources = [(m, m.vision) for m in [*many(2), make_features("twin", names="set1")]]
    ((members, shared),) = families(sources)
    assert [m.dataset for m, _ in members] == ["set1", "twin"] and len(shared) == 6


def test_prompts_are_split_by_class_and_shared_names_stay_together() -> None:
    members = [*many(2, classes=10), make_features("twin", number=2, names="set1", classes=10)]
    sources = [(m, m.text) for m in members]
    split = dataset_split(sources, ScoreOptions(), seed=1)
    by_name: dict[str, set[int]] = {}
    names = [name for m in members for name in m.class_names]
    for name, fold in zip(names, split.fold):
        by_name.setdefault(name, set()).add(int(fold))
    assert all(len(folds) == 1 for folds in by_name.values())
    assert split.options["split_by"] == "class"
    assert split.options["ceiling"] == pytest.approx((1 + 0.5 + 0.5) / 3, abs=1e-3)
    by_class = ScoreOptions(vision_split="class")
    assert (
        "ceiling" not in dataset_split([(m, m.vision) for m in members], by_class, seed=1).options
    )
    other = replace(members[2].text, ids=tuple(f"a sketch of {i}" for i in members[2].text.ids))
    sources = [*sources[:2], (members[2], other)]  # another template tells the datasets apart
    assert dataset_split(sources, ScoreOptions(), seed=1).options["ceiling"] == 1


def test_what_shared_prompts_leave_possible_is_stated() -> None:
    """A curve at its ceiling is saturated, not flat; nothing else tells the two apart."""
    members = [*many(2, classes=10), make_features("twin", number=2, names="set1", classes=10)]
    table = score(members, ["dataset_accuracy_ncm", "dataset_recall"], **QUICK)
    assert ceiling(table, "dataset_accuracy_ncm", "text") == pytest.approx(2 / 3, abs=1e-3)
    assert ceiling(table, "dataset_accuracy_ncm", "vision") == 1
    assert ceiling(table, "dataset_recall", "text") == 1
    caption = metric_entry("dataset_accuracy_ncm", table)["caption"]
    assert "at most 0.67 (text), as datasets share prompts" in caption
    flat = table.assign(value=0.6, low=0.1, high=0.9)
    ends = curves(flat, "dataset_accuracy_ncm").groupby("tower")["high"].max()
    assert ends.to_dict() == {"text": pytest.approx(2 / 3, abs=1e-3), "vision": 0.9}
    flat.loc[flat.position == "1", "value"] = 0.61
    doubts = select(flat, metric="dataset_accuracy_ncm", agreement_metric="none", resamples=0)
    assert "at most 0.67 can be reached, as datasets share prompts" in str(doubts.evidence)


def test_what_small_classes_leave_of_a_neighbourhood_is_stated() -> None:
    """Of ten neighbours three can be of a class of four, and all of one of twelve."""
    member = make_features(items=28, classes=2)
    labels = np.repeat([0, 1, 2, 3, 4], [4, 4, 4, 4, 12])
    apart = np.random.default_rng(0).normal(size=(28, 24)) + 100 * np.eye(24)[labels]
    arrays = {"native": {"1": apart, "2": member.vision.arrays["native"]["2"]}}
    vision = replace(member.vision, labels=labels, arrays=arrays)
    named = replace(member, vision=vision, text=None, class_names=tuple("abcde"))
    table = score(named, ["neighbourhood_overlap"], **QUICK).set_index("position")
    most = (16 * 0.3 + 12) / 28
    assert table["options"].str.endswith(f";ceiling={round(most, 4)}").all()
    assert table.loc["1", "value"] == pytest.approx(most)  # told apart without a mistake
    assert table.loc["2", "value"] < most and (table["high"] <= most + 1e-12).all()
    table = table.reset_index()
    caption = metric_entry("neighbourhood_overlap", table)["caption"]
    assert "at most 0.6 (vision), as classes are small" in caption
    large = score(make_features(items=60, classes=3), ["neighbourhood_overlap"], **QUICK)
    assert "at most" not in metric_entry("neighbourhood_overlap", large)["caption"]


@pytest.mark.parametrize("sizes", [(20, 20), (12, 30)])
def test_copies_of_a_prompt_are_resampled_together(sizes: tuple[int, int]) -> None:
    """Eight names are in both datasets: of two copies one is right, whatever is predicted."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], sizes)
    groups = np.concatenate([np.arange(size) + 100 * i for i, size in enumerate(sizes)])
    groups[groups >= 100] -= 100 * (groups[groups >= 100] < 108)
    fold, held = np.zeros(len(labels), int), range(1)
    best = _ceiling(labels, _numbered(groups.tolist()))
    every = np.array(list(product([0, 1], repeat=8)))  # what may be said of the shared names
    right = (every == 0).sum(1) / sizes[0] + (every == 1).sum(1) / sizes[1]
    assert best == pytest.approx((right.max() + sum((size - 8) / size for size in sizes)) / 2)
    split = Split(1, (), labels, fold, 1, held, 2, {}, groups, best)
    said = dict(zip(groups.tolist(), labels.tolist()))  # all that can be right is right
    said |= {name: int(sizes[1] < sizes[0]) for name in range(8)}
    predicted = np.array([said[g] for g in groups.tolist()])
    value = np.trace(split.counts(predicted) / np.array(sizes)[:, None]) / 2
    low, high = split.interval(predicted, 200)
    assert high == pytest.approx(value) == pytest.approx(best) and low < best - 0.02
    for wrong in (0.1, 0.3, 0.5):
        flips = {g: rng.random() < wrong for g in said}
        noisy = np.where([flips[g] for g in groups.tolist()], 1 - predicted, predicted)
        low, high = split.interval(noisy, 4000)
        assert low < high <= best
        if sizes == (20, 20) and high < best:  # names of their own vary alone: two strata of 12
            shares = [(noisy == labels)[(groups >= 8) & (labels == i)].mean() for i in (0, 1)]
            error = np.sqrt(sum(p * (1 - p) / 11 * (12 / 20) ** 2 for p in shares) / 4)
            assert high - low == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_no_text_interval_passes_what_shared_prompts_leave_possible() -> None:
    members = [*many(2, classes=10), make_features("twin", number=2, names="set1", classes=10)]
    members[2] = replace(members[2], text=members[1].text)
    table = score(members, ["dataset_accuracy_ncm", "dataset_accuracy"], **QUICK)
    text = table[table.tower == "text"]
    most = text["options"].str.extract("ceiling=([0-9.]+)")[0].astype(float)
    assert (text["high"] <= most + 1e-4).all() and (text["low"] < text["high"]).all()
    hidden = score(members, ["dataset_invariance"], **QUICK).query("tower == 'text'")
    least = hidden["options"].str.extract("floor=([0-9.]+)")[0].astype(float)
    # 1 where all is guessed, 0 where each of three is told.
    assert least.to_numpy() == pytest.approx(1.5 * (1 - most.iloc[0]), abs=1e-3)
    assert (hidden["low"] >= least - 1e-3).all()


@pytest.mark.parametrize("strength", [0.0, 8.0])
def test_invariance_is_the_accuracy_said_otherwise_with_its_interval(strength: float) -> None:
    """Where datasets are told apart without an error as well: nothing there is certain."""
    members = [*many(2, strength=strength), make_features("third", number=7, strength=strength)]
    table = score(members, ["dataset_accuracy", "dataset_invariance"], **QUICK)
    keys = ["tower", "position", "seed"]
    both = table.set_index(keys)
    accuracy, invariance = (both[both.metric == f"dataset_{name}"].sort_index()
                            for name in ("accuracy", "invariance"))  # fmt: skip
    for mine, theirs in (("value", "value"), ("low", "high"), ("high", "low")):
        expected = (1 - accuracy[theirs]) / (1 - 1 / 3)
        np.testing.assert_allclose(invariance[mine], expected, atol=1e-12)
    if strength:
        sure = invariance[accuracy["value"].to_numpy() == 1.0]
        assert len(sure) and (sure["high"] > 0.005).all()


def test_agreement_of_towers_is_of_class_means_however_many_images_a_class_has() -> None:
    """And of every class, where two have one name."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(5), (2, 3, 5, 10, 20))
    images, texts = rng.normal(size=(40, 6)) + 3, rng.normal(size=(5, 4))
    features = LayerFeatures.from_arrays(
        {"1": images}, labels=labels, class_names=("one", "one", "two", "six", "ten"),
        text={"1": texts}, text_labels=np.arange(5),
    )  # fmt: skip
    means = np.stack([images[labels == label].mean(axis=0) for label in range(5)])
    row = agreement_of(score(features, ["cka_debiased"], **QUICK), features.dataset)
    assert (row["value"], row["n"]) == (
        pytest.approx(METRICS["cka_debiased"].function(means, texts), abs=1e-5),
        5,
    )


def test_rows_of_agreement_are_bounded_for_all_datasets_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(METRICS, "cka_debiased", replace(METRICS["cka_debiased"], largest_n=8))
    table = score(many(2, items=30), ["cka_debiased"], positions=["1"], **QUICK)
    found = {
        towers: [agreement_of(table, dataset, towers)["n"] for dataset in ("set0", "*")]
        for towers in ("vision vision", "text text", "vision text")
    }
    assert found == {"vision vision": [8, 8], "text text": [6, 8], "vision text": [6, 8]}


def test_three_rows_agree_by_construction_and_give_no_interval() -> None:
    few, more = (
        agreement_of(score(make_features(classes=n), ["cka_biased"], **QUICK), "alpha")
        for n in (4, 5)
    )
    assert np.isnan([few["low"], few["high"]]).all() and more["low"] < more["high"]


def test_captions_are_not_pooled_with_prompts(scores: pd.DataFrame) -> None:
    """Three datasets and one of the same class names have prompts, which are 18 classes."""
    row = agreement_of(scores[scores["metric"] == "cka_debiased"], "*")
    assert row["n"] == 18 and "pairs=class_means" in row["options"]


def test_every_class_is_in_every_part_of_a_split_by_class() -> None:
    labels = np.repeat([0, 1, 2], (3, 12, 15))
    split = class_split(replace(make_features(items=30).vision, labels=labels), ScoreOptions(), 1)
    assert split.folds == 3 and (pd.crosstab(split.labels, split.fold) > 0).all(axis=None)


def test_captions_of_an_image_are_in_one_part_of_a_split_by_class() -> None:
    text = make_features(items=30, classes=3, captions=4).text
    split = class_split(text, ScoreOptions(), seed=1)
    (rows,) = split.rows
    assert len(rows) == 120 and split.folds > 2
    assert (pd.crosstab(text.pairs[rows], split.fold) > 0).sum(axis=1).eq(1).all()


def test_images_are_equally_many_and_spread_over_classes() -> None:
    members = [make_features("small", items=30), make_features("large", items=90, number=1)]
    split = dataset_split([(m, m.vision) for m in members], ScoreOptions(), seed=1)
    assert [len(rows) for rows in split.rows] == [30, 30]
    sizes = pd.crosstab(split.labels, split.fold)
    assert (sizes == 6).all().all()
    by_class = dataset_split(
        [(m, m.vision) for m in members], ScoreOptions(vision_split="class"), seed=1
    )
    assert by_class.options["split_by"] == "class"
    classes = np.concatenate(
        [m.vision.labels[r] + 10 * i for i, (m, r) in enumerate(zip(members, by_class.rows))]
    )
    assert (pd.crosstab(classes, by_class.fold) > 0).sum(axis=1).max() == 1


def test_datasets_of_unequal_size_can_keep_all_items_and_weigh_the_same() -> None:
    members = [make_features("small", items=30), make_features("large", items=90, number=1)]
    table = score(members, ["dataset_accuracy", "dataset_recall"], balance="weights", **QUICK)
    images = table[(table.tower == "vision") & (table.position == "3") & (table.seed == 1)]
    assert images["options"].str.contains("balance=weights").all()
    by_dataset = images.set_index("dataset")
    assert by_dataset.loc["*", "n"] == by_dataset.loc[["small", "large"], "n"].sum() > 60
    assert by_dataset.loc["*", "value"] == pytest.approx(
        by_dataset.loc[["small", "large"], "value"].mean()
    )


@pytest.mark.parametrize("how", ["columns", "rows", "none"])
def test_what_read_outs_do_to_features_first_is_an_option_and_recorded(how: str) -> None:
    names = ["dataset_accuracy", "dataset_accuracy_ncm", "dataset_accuracy_knn", "dataset_recall"]
    names += ["class_accuracy_ncm"]
    table = score(many(2), names, normalise=how, positions=["3"], **QUICK)
    assert set(table["metric"]) == set(names)
    assert table["options"].str.contains(f"normalise={how}").all()
    assert table.attrs["protocol"]["normalise"] == how
    assert (table[table.metric == "dataset_accuracy"]["value"] > 0.8).all()


def test_each_smallest_n_is_enforced(monkeypatch: pytest.MonkeyPatch) -> None:
    members = [
        *many(2, items=12, classes=3),
        make_features("captioned", number=9, items=12, classes=3, captions=1),
        make_features("restyled", number=5, names="set0", items=24, classes=4),
        make_features("again", number=6, names="set0", items=24, classes=4),
    ]
    for name, entry in METRICS.items():
        if not entry.base:
            monkeypatch.setitem(METRICS, name, replace(entry, smallest_n=10_000))
    names = [name for name in METRICS if name in OF_FEATURES and not METRICS[name].base]
    names.remove("mean_cosine")
    monkeypatch.setitem(METRICS, "mean_cosine", replace(METRICS["mean_cosine"], smallest_n=3))
    table = score(members, [*names, "mean_cosine"], positions=["3", "proj"], **QUICK)
    assert set(table["metric"]) == {"mean_cosine"}
    words = refusals(table).groupby("metric")["reason"].agg(" ".join)
    assert set(words.index) == set(names)
    assert words.str.contains("at least 10000 are needed").all()


def test_a_caption_can_state_the_options_behind_a_metric(scores: pd.DataFrame) -> None:
    words = stated_options(scores, "dataset_accuracy")
    by_tower = ("split by item (vision) and class (text)",
                "balance equal (vision) and weights (text)")  # fmt: skip
    for fact in (*by_tower, "folds 5",
                 "normalise columns", "interval bootstrap", "seeds 1, 2"):  # fmt: skip
        assert fact in words
    agreement = stated_options(scores, "cka_debiased")
    assert "permutations 20" in agreement and "seeds" not in agreement and " p " not in agreement
    assert stated_options(scores, "none of this name") == ""
    caption = metric_entry("dataset_accuracy", scores)["caption"]
    most = "at most 0.8 (text), as datasets share prompts"
    assert caption.endswith(f"(text); {words}; {most}.")
    assert "Chance: 1 / number of datasets" in caption


def test_a_caption_between_towers_names_how_both_pool(scores: pd.DataFrame) -> None:
    """Rows of a gap hold the vision tower's pooling; rows of the text tower hold its own."""
    assert set(scores.loc[scores["metric"] == "centroid_gap", "tower"]) == {"vision"}
    assert "pooling cls (vision) and eot (text); n" in how_made(scores, "centroid_gap")
    gaps = scores[scores["metric"] == "centroid_gap"]
    assert "pooling cls (vision); n" in how_made(gaps, "centroid_gap")  # nothing tells the other's
    other = scores.assign(model="another", pooling="mean")
    told = how_made(gaps, "centroid_gap", beside=pd.concat([scores, other]))
    assert "pooling cls (vision) and eot (text); n" in told


def test_classes_that_class_metrics_leave_out_are_told(caplog: pytest.LogCaptureFixture) -> None:
    full = make_features(items=60)
    labels = full.vision.labels
    few = full.take_images(np.r_[np.flatnonzero(labels < 3), np.flatnonzero(labels == 3)[:2]])
    for jobs in (1, 2):
        caplog.clear()
        table = score(few, ["class_accuracy_ncm", "fisher_ratio"], jobs=jobs, **QUICK)
        [line] = [one.getMessage() for one in caplog.records]
        assert line == (
            "alpha: 1 of 4 classes has fewer than 3 items in the vision tower and is left out of "
            "class_accuracy_ncm; take more items"
        )
        own = table[table.metric == "class_accuracy_ncm"]
        assert own["options"].str.contains("classes_left_out=1").all()
    caplog.clear()
    score(full, ["class_accuracy_ncm"], **QUICK)
    score(few, ["fisher_ratio"], **QUICK)
    assert not caplog.records


def test_captions_of_an_image_stay_in_one_fold() -> None:
    members = [make_features(f"c{i}", number=i, captions=3) for i in range(2)]
    split = dataset_split([(m, m.text) for m in members], ScoreOptions(), seed=2)
    images = np.concatenate([m.text.pairs + 1000 * i for i, m in enumerate(members)])
    assert (pd.crosstab(images, split.fold) > 0).sum(axis=1).max() == 1


def test_captions_of_an_image_are_no_items_of_their_own() -> None:
    """Five alike of each image: rows that are near in pairs, and of one class whatever it is."""
    many = make_features("captioned", items=120, classes=4, captions=5)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(120, 16))  # without classes
    texts = np.repeat(images, 5, axis=0) + 0.1 * rng.normal(size=(600, 16))
    text = replace(many.text, arrays={"native": {"1": texts, "2": np.exp(texts)}})
    many = replace(many, text=text)
    firsts = replace(text.take(np.arange(0, 600, 5)), pairs=np.arange(120))
    names = ["neighbourhood_overlap", "fisher_ratio", "alignment", "twonn", "uniformity",
             "effective_rank", "cka_debiased", "mutual_knn"]  # fmt: skip
    five, one = (score(m, names, **QUICK) for m in (many, replace(many, text=firsts)))
    within = five.other_tower.isin(["", "text"])
    five, one = (t[(t.tower == "text") & within] for t in (five, one))
    pd.testing.assert_frame_equal(five, one)
    assert set(five.metric) == {*names} and set(five.n) == {120}
    assert five.options.str.contains("captions=first|pairs=first_captions").all()
    overlap = five[five.metric == "neighbourhood_overlap"]
    assert (overlap.low < overlap.null).all() and (overlap.null < overlap.high).all()


def test_captions_of_datasets_without_classes_are_told_apart_too() -> None:
    named, other = (make_features(f"c{i}", number=i, captions=3) for i in range(2))
    nameless = replace(named, class_names=())
    table = score([nameless, other], ["dataset_accuracy"], bootstrap=20, progress=False)
    with_names = score([named, other], ["dataset_accuracy"], bootstrap=20, progress=False)
    text = [one[one["tower"] == "text"]["value"].to_numpy() for one in (table, with_names)]
    assert len(text[0]) and np.abs(text[0] - text[1]).max() < 0.1


def test_a_score_is_the_same_twice_and_another_seed_differs() -> None:
    members = many(2)
    names = ["dataset_accuracy", "rmg", "cka_debiased", "effective_rank"]
    first, again = (score(members, names, **QUICK) for _ in range(2))
    pd.testing.assert_frame_equal(first, again, check_flags=False)
    other = score(members, ["dataset_accuracy"], seeds=(7,), bootstrap=50)
    mine = first[(first.metric == "dataset_accuracy") & (first.seed == 1)]["value"].to_numpy()
    assert not np.array_equal(mine, other["value"].to_numpy())


def test_scoring_leaves_the_global_generator_alone() -> None:
    np.random.seed(5)
    expected = np.random.random()
    np.random.seed(5)
    score(many(2), ["dataset_accuracy_ncm"], **QUICK)
    assert np.random.random() == expected


def test_intervals_cover_the_truth() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        values = (rng.random(100) < 0.7).astype(float)
        low, high = mean_interval(values, bootstrap_weights(np.zeros(100, int), 200, rng))
        hits += low <= 0.7 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_the_fisher_interval_covers_its_expectation() -> None:
    tables = [
        score(
            make_features(seed=s, strength=0.0, items=60),
            ["fisher_ratio"],
            positions=["1"],
            seeds=(1,),
        )
        for s in range(40)
    ]
    rows = pd.concat([t[t.tower == "vision"] for t in tables])
    assert rows["value"].mean() == pytest.approx(rows["null"].iloc[0], rel=0.1)
    assert ((rows["low"] <= rows["null"]) & (rows["null"] <= rows["high"])).mean() >= 0.8


@pytest.mark.parametrize("right", [True, False])
def test_an_accuracy_without_a_mistake_or_a_hit_has_the_interval_of_its_items(right: bool) -> None:
    sizes = np.array([10, 20])
    counts = np.diag(sizes) if right else np.diag(sizes)[:, ::-1]
    expected = binomtest(30 if right else 0, 30).proportion_ci(method="wilson")
    assert accuracy_interval(counts, 50) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(("shared", "found"), [(4, 0), (5, 1)])
def test_a_family_shares_half_of_its_names(shared: int, found: int) -> None:
    one = make_features(classes=10)
    names = (*one.class_names[:shared], *(f"other {i}" for i in range(10 - shared)))
    sources = [(each, each.tower("vision")) for each in (one, replace(one, class_names=names))]
    assert len(families(sources)) == found


@pytest.mark.parametrize("seed", range(5))
def test_folds_differ_by_one_group_at_most_however_large_the_groups_are(seed: int) -> None:
    groups = np.repeat(np.arange(20), [6] * 10 + [1] * 10)
    alike = [0] * len(groups)
    fold = deal(alike, groups.tolist(), alike, 2, np.random.default_rng(seed))
    assert np.ptp(np.bincount(fold)) <= 6


def test_one_query_per_class_still_has_an_interval() -> None:
    member = make_features(items=60, classes=30, strength=1.0)
    table = score(member, ["novel_class_accuracy"], positions=["2"], seeds=(1,), bootstrap=100)
    row = table.iloc[0]
    assert row["n"] == 15 and row["low"] < row["value"] < row["high"]


def test_shares_of_one_dataset_come_with_wilsons_interval(scores: pd.DataFrame) -> None:
    rows = scores[scores.metric == "dataset_recall"]
    assert rows["options"].str.contains("interval=wilson").all()
    assert (rows["high"] - rows["low"] > 0.05).all()


def test_a_share_of_captions_is_as_sure_as_of_so_many_images() -> None:
    members = [make_features(name, number=i, captions=5) for i, name in enumerate("ab")]
    table = score(members, ["dataset_recall"], positions=["2"], **QUICK)
    for one in table[table["tower"] == "text"].to_dict("records"):
        expected = wilson(one["value"], one["n"] / 5)
        assert (one["low"], one["high"]) == pytest.approx(expected)


def test_items_that_coincide_count_once_in_all_that_is_said_of_an_intrinsic_dimension() -> None:
    """Sixty images, each twice: the row is that of the sixty alone, n and interval included."""
    once = make_features(items=60)
    twice = once.take_images(np.repeat(np.arange(60), 2))
    options = {"positions": ["2"], "progress": False}
    one, two = (score(f, ["twonn"], **options).set_index("tower").loc["vision"]
                for f in (once, twice))  # fmt: skip
    columns = ["value", "low", "high", "null", "n"]
    assert two[columns].tolist() == pytest.approx(one[columns].tolist()) and two["n"] == 60
    few = once.take_images(np.repeat(np.arange(12), 5))
    with pytest.raises(UserError, match="12 distinct items; at least 20 are needed"):
        score(few, ["twonn"], **options)


def test_captions_are_drawn_as_often_as_their_image_and_prompts_once() -> None:
    draws = np.random.default_rng(0).integers(0, 4, (3, 60)).astype(float)
    captioned = match(make_features(captions=2), 0, ScoreOptions())
    found = captioned.text_weights(draws)
    assert found.shape == (3, 120)
    assert all((found[:, text] == draws[:, image]).all() for image, text in captioned.pairs)
    assert (match(make_features(), 0, ScoreOptions()).text_weights(draws) == 1).all()


def test_images_are_matched_with_the_first_prompt_of_their_class_or_left_out() -> None:
    """Class 1 has no prompt, 4 two of them, 5 no image."""
    whole = make_features()
    assert whole.vision is not None and whole.text is not None
    text = whole.text.take([5, 4, 0, 4, 3, 2])
    member = replace(whole.take_images(np.flatnonzero(whole.vision.labels < 5)), text=text)
    found = match(member, 0, ScoreOptions())
    labels = member.tower("vision").labels
    assert (labels[found.images] == text.labels[found.texts][found.pairs[:, 1]]).all()
    assert sorted(found.images) == np.flatnonzero(labels != 1).tolist()
    assert sorted(found.texts) == [1, 2, 4, 5]


def test_jackknife_groups_leave_each_item_out_once() -> None:
    kept = jackknife_groups(np.arange(47) % 4, 10, np.random.default_rng(0))
    left_out = np.concatenate([np.setdiff1d(np.arange(47), rows) for rows in kept])
    assert sorted(left_out) == list(range(47))
    assert max(47 - len(rows) for rows in kept) - min(47 - len(rows) for rows in kept) <= 1
    # Of each of four classes every group takes as many, or one more.
    sizes = np.array([np.bincount(rows % 4, minlength=4) for rows in kept])
    assert np.ptp(sizes, axis=0).max() <= 1
    few = jackknife_groups(np.zeros(3, int), 10, np.random.default_rng(0))
    assert sorted(map(len, few)) == [2, 2, 2]  # a group without an item would count as a draw


def test_balanced_rows_deal_and_shots() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [50, 5, 20])
    rows = balanced_rows(labels, 15, rng)
    assert np.bincount(labels[rows]).tolist() == [5, 5, 5] and (np.diff(rows) > 0).all()
    fold = deal(labels.tolist(), list(range(75)), labels.tolist(), 5, rng)
    assert (pd.crosstab(labels, fold).loc[1] == 1).all()
    support, query = shots_and_queries(labels, 2, rng)
    assert np.bincount(labels[support]).tolist() == [2, 2, 2]
    assert sorted([*support, *query]) == list(range(75))


def test_items_per_dataset_keeps_images_and_captions_together() -> None:
    member = make_features(captions=2, items=60)
    table = score(member, ["pair_distance", "effective_rank"], items_per_dataset=24, **QUICK)
    assert set(table[table.metric == "pair_distance"]["n"]) == {48}
    assert set(table[(table.metric == "effective_rank") & (table.tower == "vision")]["n"]) == {24}


def test_towers_of_different_depth_meet_at_equal_relative_depth() -> None:
    deep, flat = make_features(blocks=6), make_features(blocks=3)
    member = replace(deep, text=flat.text)
    table = score(member, ["centroid_gap"], **QUICK)
    pairs = dict(zip(table["position"], table["other_position"]))
    assert pairs["embed"] == "embed" and pairs["6"] == "3" and pairs["2"] == "1"
    assert pairs["proj"] == "proj"


@pytest.mark.parametrize(("deep", "flat"), [(24, 12), (32, 24), (12, 6)])
def test_a_curve_has_every_block_where_towers_differ_in_depth(deep: int, flat: int) -> None:
    """Blocks halfway between two of the other tower have a partner, and readers keep its row."""
    vision, text = (make_features(blocks=blocks, items=30) for blocks in (deep, flat))
    member = replace(vision, text=text.text)
    table = score(member, ["centroid_gap"], **QUICK)
    assert len(curves(table, "centroid_gap")) == len(table) == deep + 2  # embed and proj
    some = score(member, ["centroid_gap"], positions=["1", "3", "5"], **QUICK)
    assert list(curves(some, "centroid_gap")["position"]) == ["1", "3", "5"]
    streamed = score_streaming([member], ["cka_debiased"], sample=20)
    assert len(curves(streamed, "cka_debiased")) == deep + 3  # and final
    vision, text = (make_features(blocks=blocks, items=30, captions=1) for blocks in (deep, flat))
    streamed = score_streaming([replace(vision, text=text.text)], ["cka_debiased"], sample=20)
    assert len(curves(streamed, "cka_debiased")) == len(streamed) == deep + 3


def test_prompts_of_a_class_weigh_the_same_whatever_their_norm() -> None:
    """As Radford et al. 2021 average them; by their norms the first images would be wrong."""
    images = np.array([[1.0, 0.1], [1.0, 0.2], [0.1, 1.0], [0.2, 1.0]])
    prompts = np.array([[1.0, 0.0], [0.0, 50.0], [0.3, 1.0], [0.0, 1.0]])
    features = LayerFeatures.from_arrays(
        {"proj": images}, {"proj": prompts}, labels=[0, 0, 1, 1], text_labels=[0, 0, 1, 1],
        space="joint",
    )  # fmt: skip
    table = score(features, ["zero_shot_accuracy"], **QUICK)
    assert table.loc[table["tower"] == "vision", "value"].item() == 1.0


def test_agreement_of_one_position_is_read_at_its_partner() -> None:
    """Not as a mean with the agreement of the tower with itself, which is 1."""
    table = score(make_features(), ["cka_debiased"], positions=["2"], **QUICK)
    across = table[(table["tower"] == "vision") & (table["other_tower"] == "text")]
    found = curves(table, "cka_debiased")
    assert list(found["tower"]) == ["vision"]
    assert found["value"].item() == across["value"].item() < 1.0


def test_agreement_of_some_positions_is_read_at_their_partners() -> None:
    """The towers are as deep as they are, not as deep as the last position that was scored."""
    table = score(make_features(blocks=6), ["cka_debiased"], positions=["2", "4"], **QUICK)
    found = curves(table, "cka_debiased").query("tower == 'vision'").set_index("position")["value"]
    across = table.query("tower == 'vision' and other_tower == 'text'")
    cells = across.set_index(["position", "other_position"])["value"]
    assert found.to_dict() == {one: cells[one, one] for one in ("2", "4")}


def test_other_spaces_on_request() -> None:
    table = score(make_features(), ["fisher_ratio", "rmg"], spaces=["joint"], **QUICK)
    assert set(table["space"]) == {"joint"} and set(table["metric"]) == {"fisher_ratio", "rmg"}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"metrics": ["dataset_accuracy", "left_out_accuracy", "style_accuracy"]},
            r"dataset_accuracy \(1 dataset; at least 2 are needed\); left_out_accuracy \(1 data.*"
            r"style_accuracy \(no two datasets share four or more class names\)",
        ),
        (
            {"metrics": "fisher_ratio", "spaces": "normed"},
            r"fisher_ratio \(no normed features were extracted, as by --spaces normed\)",
        ),
        (
            {"metrics": "centroid_gap", "spaces": "native"},
            r"centroid_gap \(it is defined in joint space only\)",
        ),
        ({"metrics": "centroid_gap", "positions": "final"}, "centroid_gap .no joint features"),
    ],
)
def test_no_score_at_all_is_refused_with_the_reasons(options: dict, reason: str) -> None:
    with pytest.raises(UserError, match=f"nothing was scored: {reason}"):
        score(make_features(), **options, **QUICK)


def test_what_was_asked_for_and_not_computed_is_named() -> None:
    few = make_features("few", number=3, items=6, classes=6)
    members, names = [*many(2), few], ["fisher_ratio", "cka_debiased", "centroid_gap"]
    with pytest.warns(UserWarning) as said:
        score(members, names, positions=["embed", 3, "final"], **QUICK)
    (warning,) = said
    assert warning.filename == __file__
    assert str(warning.message) == (
        "not computed: fisher_ratio of few (one item per class); "
        "centroid_gap at final (it has no value there)"
    )
    with pytest.warns(UserWarning) as said:
        score(many(2), ["fisher_ratio", "style_accuracy"], spaces=["native", "normed"], **QUICK)
    assert [str(warning.message) for warning in said] == [
        "not computed: fisher_ratio in normed space (no normed features were extracted, as by "
        "--spaces normed); "
        "style_accuracy (no two datasets share four or more class names)"
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score(many(2), positions=3, **QUICK)  # of all metrics some always do not apply
        score(many(2), ["cka_debiased", "cka_debiased_max"], positions=3, **QUICK)


def test_where_all_that_was_not_computed_stands_is_said() -> None:
    """On a terminal "`refusals` lists all" named nothing that is there."""
    names = ["dataset_accuracy", "dataset_accuracy_ncm", "dataset_confusion", "style_accuracy"]
    with pytest.warns(UserWarning) as said:
        score(make_features(), [*names, "dataset_invariance", "cka_debiased"], **QUICK)
    told = "; and 1 more; the report and `vlmlayers.scores.refusals` list all"
    assert str(said[0].message).endswith(told)


def test_a_dataset_of_two_classes_leaves_the_text_tower_out_and_says_so() -> None:
    two = make_features("two", number=1, classes=2)
    with pytest.warns(UserWarning) as said:
        table = score([*many(2), two], ["dataset_accuracy", "cka_debiased"], **QUICK)
    reason = "two has 2 independent items; at least 3 are needed to split"
    assert str(said[0].message) == f"not computed: dataset_accuracy of the text tower ({reason})"
    with pytest.raises(UserError, match=f"no value at block 1, .*: {reason}; choose by another"):
        select(table)
    alone = score(make_features(), ["dataset_accuracy", "cka_debiased"], **QUICK)
    with pytest.raises(UserError, match="dataset_accuracy was not computed: 1 dataset; at least 2"):
        select(alone)


def test_too_few_prompts_for_dataset_accuracy_are_said() -> None:
    few = [make_features(f"set{i}", number=i, classes=4) for i in range(2)]
    with pytest.warns(UserWarning) as said:
        score(few, ["dataset_accuracy_ncm", "dataset_confusion"], **QUICK)
    why = "8 items; at least 15 are needed"
    assert str(said[0].message) == (
        f"not computed: dataset_accuracy_ncm of the text tower ({why}); "
        f"dataset_confusion of the text tower ({why})"
    )


@pytest.mark.parametrize(
    ("here", "there", "what"),
    [
        ({"weights_hash": "a"}, {"weights_hash": "b"}, "model's weights"),
        ({"weights_hash": "a", "preprocessing": {"mean": [0.5], "size": 9}},
         {"weights_hash": "a", "preprocessing": {"mean": [0.4]}}, r"preprocessing \(mean\)"),
    ],
)  # fmt: skip
def test_two_models_of_one_name_are_not_scored_as_one(here, there, what) -> None:
    """As of a file of weights that was written anew between two extractions, or two in memory."""
    first, second, third = many(3)
    first, third = (replace(one, identity=i) for one, i in ((first, here), (third, there)))
    message = f"features of set0 and set2 differ in their .*{what}, and both .* apart"
    with pytest.raises(UserError, match=message):
        score([first, second, third], ["dataset_accuracy_ncm"], **QUICK)
    with pytest.raises(UserError, match=message):
        project([first, second, third], "1")
    apart = replace(third, weights="another")
    found = score([first, second, apart], ["effective_rank"], **QUICK)
    assert found.groupby("weights", observed=True)["dataset"].nunique().to_dict() == {
        first.weights: 2, "another": 1
    }  # fmt: skip
    project([replace(first, identity={}), second, third], "1")  # where nothing tells


def test_one_model_of_two_widths_is_refused() -> None:
    first, second = many(2)
    wider = {p: np.hstack([x, x]) for p, x in second.tower("text").arrays["native"].items()}
    text = replace(second.tower("text"), arrays={"native": wider})
    with pytest.raises(UserError, match="text features at .* wide in set0 and .* in set1"):
        score([first, replace(second, text=text)], "twonn", **QUICK)


def test_features_that_are_scored_apart_are_said_to_be() -> None:
    first, second = many(2)
    apart = [first, replace(second, split="test")]
    with pytest.raises(UserError, match="1 dataset; at least 2 are needed; those of another split"):
        score(apart, "dataset_accuracy", **QUICK)


def test_a_position_that_one_dataset_lacks_is_told(caplog: pytest.LogCaptureFixture) -> None:
    whole, part = (make_features(name, number=i, classes=10) for i, name in enumerate("ab"))
    arrays = part.tower("vision").arrays["native"]
    kept = {position: array for position, array in arrays.items() if position != "2"}
    vision = replace(part.tower("vision"), arrays={**part.tower("vision").arrays, "native": kept})
    both = [whole, replace(part, vision=vision)]
    table = score(both, ["dataset_accuracy"], bootstrap=20, progress=False)
    assert "2" not in set(table.query("tower == 'vision'")["position"])
    assert "2" in set(table.query("tower == 'text'")["position"])
    assert "b lacks 2 of the vision tower, where other datasets have it" in caplog.text
    caplog.clear()
    score(both, ["dataset_accuracy"], positions=["1"], bootstrap=20, progress=False)
    score(both, ["silhouette"], bootstrap=20, progress=False)  # of each dataset by itself
    assert "lacks" not in caplog.text


def test_too_few_items_are_refused_not_guessed() -> None:
    tiny = make_features(items=8, classes=4)
    table = score([tiny, make_features("other", number=1, items=8, classes=2)], **QUICK)
    refused = refusals(table)
    assert "0 classes with 3 items or more; at least 2 are needed" in refused["reason"].tolist()
    assert "8 items; at least 20 are needed" in refused["reason"].tolist()
    assert refused["reason"].str.contains("has 2 independent items; at least 3").any()
    assert np.isfinite(table[["value", "null"]]).all().all()
    # Of four paired rows, or two groups, none can be left out: no interval, not one of width 0.
    without = table["options"].str.contains("interval=none")
    assert {"cka_debiased", "modality_auc"} <= set(table[without]["metric"])
    assert table[without][["low", "high"]].isna().all().all()
    assert np.isfinite(table[~without][["low", "high"]]).all().all()


def _broken(value: float) -> LayerFeatures:
    member = make_features("flowers")
    tower = member.tower("text")
    arrays = {s: {p: a.copy() for p, a in by.items()} for s, by in tower.arrays.items()}
    arrays["native"]["2"][4, 0] = value
    return replace(member, text=replace(tower, arrays=arrays))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_inf_name_dataset_tower_and_position(value: float) -> None:
    with pytest.raises(UserError, match=r"flowers, text at 2 \(native\) has NaN or Inf in item 4"):
        score(_broken(value), ["fisher_ratio"])


@pytest.mark.parametrize(("draws", "warned"), [(5, True), (20, False)])
def test_few_draws_are_said_to_make_no_interval(
    draws: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    score(make_features(), ["class_accuracy_ncm"], **QUICK | {"bootstrap": draws})
    assert (f"bootstrap is {draws}: an interval is what so few" in caplog.text) is warned


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"metrics": ["dataset_acuracy"]},
            "unknown metric 'dataset_acuracy'; did you mean 'dataset_",
        ),
        ({"spaces": ["jiont"]}, "unknown space 'jiont'; did you mean 'joint'"),
        ({"positions": ["17"]}, "unknown position '17' in the features"),
        ({"positions": ["prj"]}, "unknown position 'prj'; did you mean 'proj'"),
        ({"bootstrap": 1}, "bootstrap is 1; at least 2 is needed"),
        ({"folds": 2}, "folds is 2; at least 3 is needed"),
        ({"seeds": ()}, r"seeds is \(\); a list of at least 1 is needed"),
        ({"seeds": [1, 2, 1]}, "'seeds': names 1 twice"),
        ({"metrics": []}, "no metric is named; leave metrics out"),
        ({"balance": "equl"}, "unknown balance 'equl'; did you mean 'equal'"),
        ({"normalise": "row"}, "unknown normalise 'row'; did you mean 'rows'"),
        ({"vision_split": "clas"}, "unknown vision_split 'clas'; did you mean 'class'"),
        (
            {"metrics": ["class_accuracy"], "balance": "weights"},
            "balance is an option of dataset_accuracy, .*, none of which is scored",
        ),
        (
            {"metrics": ["fisher_ratio"], "folds": 4},
            "folds is an option of dataset_accuracy, .*, class_accuracy, .*, none of which",
        ),
    ],
)
def test_wrong_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        score(make_features(), **options)


def test_wrong_features_are_named() -> None:
    with pytest.raises(UserError, match="no features to score"):
        score([])
    with pytest.raises(UserError, match="dataset 'alpha' appears twice"):
        score([make_features(), make_features()])
    empty = TowerFeatures("vision", 1, "cls", "images", (), np.empty(0, np.int64), {})
    with pytest.raises(UserError, match="vision features have no items"):
        score(LayerFeatures("m", "w", "none", "train", (), empty))


def test_one_function_and_one_entry_add_a_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    def mean_norm(x: np.ndarray) -> float:
        """Return the root mean square length of the features."""
        return float(np.sqrt(np.square(x).sum(axis=1).mean()))

    def entry(null: str) -> Metric:
        return Metric(mean_norm, "geometry", "features", "length", "", (0.0, np.inf), null=null)

    monkeypatch.setitem(METRICS, "mean_norm", entry("none"))
    member = make_features()
    table = score(member, ["mean_norm"], positions=["2"])
    row = table[table.tower == "vision"].iloc[0]
    assert row["value"] == pytest.approx(mean_norm(member.vision.array("2")), rel=1e-6)
    assert row["low"] < row["value"] < row["high"] and np.isnan(row["null"])
    monkeypatch.setitem(METRICS, "mean_norm", entry("shuffle"))
    with pytest.raises(UserError, match="null 'shuffle' of mean_norm needs labels"):
        score(member, ["mean_norm"])


def test_one_name_is_enough() -> None:
    assert list(chosen_metrics("rmg")) == ["rmg"]


@pytest.mark.parametrize("name", ["scores.parquet", "scores.csv"])
def test_tables_come_back_as_they_were(scores: pd.DataFrame, tmp_path, name: str) -> None:
    write_scores(scores, tmp_path)
    back = read_scores(tmp_path / name)
    pd.testing.assert_frame_equal(back, scores, check_flags=False)
    assert back.attrs["refused"] == scores.attrs["refused"]
    assert score_cost(back).equals(score_cost(scores)) and score_cost(back)["seconds"].sum() > 0
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".part")]


def test_altered_and_damaged_tables_are_refused(scores: pd.DataFrame, tmp_path) -> None:
    parquet, text = write_scores(scores.head(20), tmp_path)
    text.write_text(text.read_text()[:-5])
    with pytest.raises(UserError, match="does not match its checksum"):
        read_scores(text)
    (tmp_path / "scores.json").unlink()
    parquet.write_bytes(parquet.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read as a score table"):
        read_scores(tmp_path)
    with pytest.raises(UserError, match="does not exist; run `vlmlayers score` first"):
        read_scores(tmp_path / "nothing.csv")
    pd.DataFrame({"metric": ["a"]}).to_csv(text, index=False)
    with pytest.raises(UserError, match="lacks the columns model, weights"):
        read_scores(text)
    scores.head(2).assign(value=["high", "low"]).to_csv(text, index=False)
    with pytest.raises(UserError, match="text where a number belongs"):
        read_scores(text)
    for content, why in (([1], "must hold an object"), ({"sha256": 1}, "is damaged")):
        (tmp_path / "scores.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=f"{why}.* run `vlmlayers score` again or delete it"):
            read_scores(text)


def test_names_in_any_script_are_read_where_the_locale_is_not_utf8(
    scores: pd.DataFrame, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = scores.head(20)
    table.attrs["refused"] = [{"reason": "of café"}]
    write_scores(table, tmp_path)
    plain = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda path, encoding="ascii", **more: plain(path, encoding, **more)
    )
    assert read_scores(tmp_path).attrs["refused"] == [{"reason": "of café"}]


def test_a_folder_that_cannot_be_written_is_named(scores: pd.DataFrame, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*scores.parquet"):
        write_scores(scores, tmp_path / "file" / "run")
    with pytest.raises(UserError, match="mine.csv is named like a file"):
        write_scores(scores, tmp_path / "mine.csv")
    with pytest.raises(UserError, match="the score table lacks the columns"):
        write_scores(pd.DataFrame({"value": [1.0]}), tmp_path)


def test_an_empty_table_is_a_table(tmp_path) -> None:
    write_scores(score_frame([]), tmp_path)
    assert read_scores(tmp_path).empty and read_scores(tmp_path / "scores.csv").empty


@pytest.mark.parametrize("metric", ["cka_debiased", "cka_biased", "rsa", "procrustes"])
def test_an_agreement_that_a_part_of_the_items_lacks_has_no_interval(metric: str) -> None:
    """At `embed` two prompts of many differ from the rest; without them all are alike."""
    rng = np.random.default_rng(0)
    arrays = {str(block): rng.normal(size=(20, 6)) for block in (1, 2)}
    features = LayerFeatures.from_arrays({"embed": np.eye(20, 6) * (np.arange(20) < 1)[:, None],
                                             **arrays}, labels=np.zeros(20, int))  # fmt: skip
    scores = score(features, metrics=[metric], progress=False)
    at_embed = (scores[["position", "other_position"]] == "embed").any(axis=1)
    assert scores["value"].notna().all()
    assert scores.loc[at_embed, ["low", "high"]].isna().all(axis=None)
    unknown = scores["options"].str.contains("interval=none")
    assert (unknown == scores["low"].isna()).all()
    assert scores.loc[~at_embed, ["low", "high"]].notna().all(axis=None)


def test_what_is_named_twice_is_scored_once() -> None:
    asked = {"positions": [1, "1"], "spaces": ["joint", "joint"], "progress": False}
    scores = score(make_features(), ["effective_rank"] * 2, **asked)
    assert scores["tower"].tolist() == ["vision", "text"]


def test_the_number_of_neighbours_is_noted_as_it_was_used() -> None:
    """A class of five, one of them held out and one for validation, has three to vote for it."""
    features = [make_features(items=30), make_features("beta", number=1, items=36)]
    metrics = ["class_accuracy_knn", "dataset_accuracy_knn", "neighbourhood_overlap"]
    asked = {"positions": ["1"], "seeds": [1], "progress": False}
    many, same = (score(features, metrics, k=k, **asked) for k in (500, 3))

    def noted(table: pd.DataFrame, metric: str, dataset: str) -> str:
        rows = table[(table["metric"] == metric) & (table["dataset"] == dataset)]
        options = rows.loc[rows["tower"] == "vision", "options"]
        return str(options.str.extract(r"\bk=(\d+)")[0].unique().item())

    assert noted(many, "neighbourhood_overlap", "alpha") == "29"
    assert noted(many, "dataset_accuracy_knn", "*") == "18"
    for table in (many, same):
        assert noted(table, "class_accuracy_knn", "alpha") == "3"
    classes = [t.loc[(t["metric"] == metrics[0]) & (t["dataset"] == "alpha")] for t in (many, same)]
    pd.testing.assert_frame_equal(*classes)


@pytest.mark.parametrize(
    "name", [name for name, entry in METRICS.items() if entry.needs == "pairs"]
)
def test_the_interval_of_an_agreement_is_a_jackknife_of_the_metric_itself(name: str) -> None:
    """What all rows have in common, such as the width of a kernel, is made anew without some."""
    features = make_features(classes=30, items=60)
    assert features.vision is not None and features.text is not None
    found = score([features], [name], permutations=2, shuffles=2)
    across = found["other_tower"] != found["tower"]
    cell = found[across & (found["position"] == "2") & (found["other_position"] == "3")].iloc[0]
    x = features.vision.arrays["native"]["2"].astype(float)
    x = np.stack([x[features.vision.labels == c].mean(axis=0) for c in range(30)])
    y = features.text.arrays["native"]["3"].astype(float)
    metric = partial(METRICS[name].function, **METRICS[name].settings)
    kept = jackknife_groups(np.zeros(30, int), 10, generator(Draw.ALIGNED_GROUPS))
    value = metric(x, y)
    ends = jackknife_interval(value, np.array([metric(x[rows], y[rows]) for rows in kept]))
    assert cell["value"] == pytest.approx(value)
    least, most = METRICS[name].bounds
    assert cell[["low", "high"]].tolist() == pytest.approx(np.clip(ends, least, most), rel=1e-6)
