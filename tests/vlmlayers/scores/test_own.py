"""Metrics and rules that are functions of the user's own."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from synthetic import make_features, many

import vlmlayers as vl
from vlmlayers.errors import UserError
from vlmlayers.metrics import METRICS, Metric, fisher_ratio, retrieval
from vlmlayers.metrics.gap import retrieval_hits, retrieval_null
from vlmlayers.scores import refusals

QUICK = {"bootstrap": 20, "shuffles": 3, "jackknife": 5}


def mean_norm(x):
    """Return the mean length of the features."""
    return np.linalg.norm(x, axis=1).mean()


def class_spread(x, labels, power=1):
    """Return the Fisher ratio, by another name."""
    return fisher_ratio(x, labels) ** power


def of(scores: pd.DataFrame, metric: str) -> pd.DataFrame:
    return scores[scores["metric"] == metric].reset_index(drop=True)


@pytest.fixture(scope="module")
def scores() -> pd.DataFrame:
    return vl.score(many(2), [mean_norm, class_spread, "fisher_ratio", "lda_criterion"], **QUICK)


def test_a_function_stands_in_the_table_under_its_name(scores: pd.DataFrame) -> None:
    features = many(2)[0]
    rows = of(scores, "mean_norm")
    row = rows[
        (rows.dataset == features.dataset) & (rows.tower == "vision") & (rows.position == "2")
    ]
    expected = np.linalg.norm(features["vision"]["2"], axis=1).mean()
    assert row["value"].item() == pytest.approx(expected, rel=1e-6)
    assert row["n"].item() == len(features["vision"])
    assert set(rows["tower"]) == {"vision", "text"}


def test_value_interval_and_null_are_those_of_the_shipped_twin(scores: pd.DataFrame) -> None:
    """The same function as a shipped metric gets its value; its interval is no point."""
    own, shipped = of(scores, "class_spread"), of(scores, "fisher_ratio")
    assert list(own["position"]) == list(shipped["position"])
    for column in ("value", "low", "high", "n"):
        np.testing.assert_allclose(own[column], shipped[column])
    # The formula of the shipped null is what shuffled labels give.
    np.testing.assert_allclose(own["null"], shipped["null"], rtol=0.5)
    assert (own["high"] > own["low"]).all()


def test_the_null_without_labels_breaks_what_columns_share() -> None:
    """Copies of one column correlate; shuffled one by one they do not."""

    def shared(x):
        return float(np.corrcoef(x[:, 0], x[:, 1])[0, 1])

    features = make_features()
    column = np.random.default_rng(0).normal(size=(60, 1)).repeat(24, axis=1)
    for by_position in features["vision"].arrays.values():
        for position in by_position:
            by_position[position] = column
    row = of(vl.score(features, shared, **{**QUICK, "shuffles": 50}), "shared").iloc[0]
    assert (row["value"], row["low"], row["high"]) == pytest.approx((1.0, 1.0, 1.0))
    assert abs(row["null"]) < 0.1


def test_a_metric_without_a_finite_value_is_refused_without_a_warning_of_numpy() -> None:
    def endless(x: object) -> float:
        return float("inf")

    with warnings.catch_warnings(), pytest.raises(UserError, match="endless is inf"):
        warnings.simplefilter("error", RuntimeWarning)
        vl.score(make_features(), [endless], progress=False, **QUICK)


def test_what_cannot_be_resampled_has_a_value_and_no_interval() -> None:
    brightness = np.linspace(0, 1, 60)

    def follows_brightness(x):
        return float(np.corrcoef(x[:, 0], brightness)[0, 1])

    with pytest.warns(UserWarning, match="follows_brightness") as said:
        table = vl.score(
            [make_features(), make_features("other", items=30, number=1)],
            [follows_brightness],
            **QUICK,
        )
    assert set(table["dataset"]) == {"alpha"} and set(table["tower"]) == {"vision"}
    assert table["value"].notna().all() and table["null"].notna().all()
    assert table[["low", "high"]].isna().all().all()
    assert "follows_brightness of other (follows_brightness fails: ValueError" in str(
        said[0].message
    )
    assert "fails" in refusals(table)["reason"].iloc[0]
    # A value without an interval is not moved by resampling: the choice is the same each time.
    choice = vl.select(table, "budget", score="metric:follows_brightness", n=1)
    assert choice.evidence["towers"]["vision"]["same"] == 1.0


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: 0.0, "metric needs a name for the tables; write <lambda> as a `def`"),
        (lambda x, y, z: 0.0, "needs a name"),
        (fisher_ratio, "there is a metric 'fisher_ratio' already"),
        (np.interp, "must take features, or features and labels"),
    ],
)
def test_what_cannot_be_a_metric_is_refused(function: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        vl.score(make_features(), [function])


def bounded(bounds: Any) -> Metric:
    return Metric(mean_norm, "own", "features", "", "", bounds=bounds)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (mean_norm, r"METRICS\['mine'\] is a value of type function, no vlmlayers.metrics.Metric"),
        (Metric(mean_norm, "own", "feature", "", ""), "unknown needs 'feature' in METRICS"),
        (Metric(mean_norm, "own", "queries", "", ""), r"METRICS\['mine'\] needs 'queries', whose"),
        (bounded(None), r"METRICS\['mine'\] has bounds None; they are two numbers"),
        (bounded((1.0, 0.0)), r"bounds \(1.0, 0.0\); they are two numbers, the smallest"),
        (bounded((0.0, float("nan"))), r"bounds \(0.0, nan\); they are two numbers"),
        (replace(bounded((0, 9)), null="shufle"), "unknown null 'shufle' in .*mean 'shuffle'"),
        (Metric(fisher_ratio, "own", "labels", "", "", (0, 99), null="gaussian"), "features alone"),
    ],
)
def test_what_a_notebook_declares_wrongly_is_named(
    monkeypatch: pytest.MonkeyPatch, entry: object, message: str
) -> None:
    monkeypatch.setitem(METRICS, "mine", entry)
    with pytest.raises(UserError, match=message):
        vl.score(make_features(), ["mine"])


def test_a_value_outside_its_declared_bounds_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipped to them, its interval would not hold it."""
    monkeypatch.setitem(METRICS, "mine", Metric(mean_norm, "own", "features", "", ""))
    with pytest.raises(UserError, match=r"mine is \d.*, and declares bounds of 0 and 1"):
        vl.score(make_features(), ["mine"], **QUICK)


def test_what_one_metric_refuses_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Agreement and retrieval too: what fails at one place has no value there alone."""

    def widths(x: np.ndarray, y: np.ndarray) -> float:
        if x.shape[1] < y.shape[1]:
            raise UserError("the first is narrower")
        return x.shape[1] / y.shape[1]

    entry = Metric(widths, "agreement", "pairs", "", "", null="shuffle")
    monkeypatch.setitem(METRICS, "widths_max", entry)
    ranks = Metric(retrieval, "gap", "queries", "", "", per_item=retrieval_hits,
                   null=retrieval_null, spaces=("joint",))  # fmt: skip
    monkeypatch.setitem(METRICS, "first", ranks)
    features = make_features()
    features.vision.arrays["joint"]["2"][3] = 0.0
    names = ["widths_max", "retrieval_r1", "first", "pair_distance"]
    table = vl.score(features, names, jobs=1, **QUICK)
    refused = {(note["metric"], note["position"]): note["reason"] for note in
               table.attrs["refused"]}  # fmt: skip
    for name in names[1:]:
        rows = table[(table["metric"] == name) & (table["tower"] == "vision")]
        assert list(rows["position"]) == ["embed", "1", "3", "proj"]
        assert "row of zeros (item 3)" in refused[name, "2"]
    same = [of(table, name).drop(columns=["metric", "options"]) for name in names[1:3]]
    pd.testing.assert_frame_equal(*(one.reset_index(drop=True) for one in same))
    own = of(table, "widths_max")  # of 24 columns, of 16 in texts, and 12 at `proj`
    assert own["tower"].equals(own["other_tower"]) and set(own["value"]) == {1.0}
    assert refused["widths_max", ""] == "the first is narrower"
    assert refused["widths_max", "2"] == "widths_max is 1.333, and declares bounds of 0 and 1"


def test_a_metric_from_a_file(tmp_path: Path, scores: pd.DataFrame) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def mean_norm(x):\n    return (x ** 2).sum(axis=1).__pow__(0.5).mean()\n")
    table = vl.score(many(2), [f"{file}:mean_norm"], jobs=2, **QUICK)
    np.testing.assert_allclose(table["value"], of(scores, "mean_norm")["value"])
    with pytest.raises(UserError, match="unknown metric 'mean_nrm' in .*mine.py"):
        vl.score(many(2), [f"{file}:mean_nrm"])


def test_a_function_chooses(scores: pd.DataFrame) -> None:
    def last_blocks(scores, number=1):
        rows = scores[scores["position"].str.isdecimal()]
        depth = rows["position"].astype(int).max()
        return {"vision": range(depth - number + 1, depth + 1), "text": f"{depth}"}

    choice = vl.select(scores, rule=last_blocks, number=2, resamples=20)
    assert (choice.vision, choice.text, choice.rule) == ((2, 3), (3,), "last_blocks")
    assert choice.evidence["towers"]["vision"]["frequency"] == [0.0, 1.0, 1.0]

    with pytest.raises(UserError, match="rule needs a name for the tables; write <lambda>"):
        vl.select(scores, rule=lambda scores: ((1,), (1,)))
    last_blocks.__name__ = "paper"
    with pytest.raises(UserError, match="there is a rule 'paper' already"):
        vl.select(scores, rule=last_blocks)
