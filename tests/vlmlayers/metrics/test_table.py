"""The table: every entry is complete, and what it declares holds for its function."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from joblib.externals.loky import get_reusable_executor
from synthetic import PLAIN_NEEDS, make_features, metric_inputs, metric_value

from vlmlayers.errors import UserError
from vlmlayers.metrics import METRICS, metric, table
from vlmlayers.metrics.declare import MODEL, NEEDS, Metric
from vlmlayers.positions import ATTENTION, SPACES
from vlmlayers.report.payload import metric_entry
from vlmlayers.scores import ScoreOptions, score, score_streaming
from vlmlayers.scores.run import RUNNERS
from vlmlayers.study.stages import _metric_mark
from vlmlayers.study.verbs import metrics_text

PLAIN = {name: entry for name, entry in METRICS.items() if entry.needs in PLAIN_NEEDS}
CASES = [(name, kind) for name, entry in PLAIN.items() for kind in entry.invariances]
CONTROLS = [(name, m.sensitive) for name, m in METRICS.items() if m.sensitive]


def _transform(kind: str, x: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if kind == "rotation":
        return x @ np.linalg.qr(rng.normal(size=(x.shape[1], x.shape[1])))[0]
    if kind == "scale":
        return x * float(rng.uniform(0.1, 10))
    if kind == "translation":
        return x + rng.normal(size=x.shape[1]) * 20
    assert kind == "columns"  # a different scale for each column: no metric but a probe forgives it
    return x * rng.uniform(0.02, 5, size=x.shape[1])


def _shuffled(entry: Metric, features: list, rest: list, seed: int) -> tuple[list, list]:
    order = np.random.default_rng(seed).permutation(len(features[0]))
    return [x[order] for x in features], [r[order] for r in rest]


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10_000))
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_declared_invariances_hold(name: str, kind: str, seed: int) -> None:
    entry = METRICS[name]
    features, rest = metric_inputs(entry, seed)
    expected = metric_value(entry, features, rest)
    if kind == "row order":
        value = metric_value(entry, *_shuffled(entry, features, rest, seed))
    else:
        value = metric_value(entry, [_transform(kind, x, seed) for x in features], rest)
    if expected.dtype.kind == "i":  # predictions: L-BFGS stops at a tolerance
        assert (value == expected).mean() >= 0.85
    else:
        assert value == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(("name", "kind"), CONTROLS)
def test_the_negative_control_changes_the_value(name: str, kind: str) -> None:
    entry = METRICS[name]
    changes = []
    for seed in range(5):
        features, rest = metric_inputs(entry, seed)
        if len(features) == 3:  # a read-out: all parts move, and columns differ in scale
            features = [x * np.geomspace(0.1, 10, x.shape[1]) for x in features]
            moved = [_transform(kind, x, seed) for x in features]
        else:
            moved = [_transform(kind, features[0], seed), *features[1:]]
        before, after = metric_value(entry, features, rest), metric_value(entry, moved, rest)
        changes.append(np.abs(np.asarray(after) - np.asarray(before)).max())
    assert max(changes) > 1e-3


def test_every_metric_of_features_has_a_negative_control() -> None:
    assert [name for name, entry in PLAIN.items() if not entry.sensitive] == []


@pytest.mark.parametrize("name", PLAIN)
def test_values_stay_inside_the_declared_bounds(name: str) -> None:
    entry = METRICS[name]
    value = metric_value(entry, *metric_inputs(entry, 0))
    if value.dtype.kind == "f":
        assert entry.bounds[0] - 1e-9 <= value <= entry.bounds[1] + 1e-9


@pytest.mark.parametrize("name", METRICS)
def test_every_entry_is_complete(name: str) -> None:
    entry = METRICS[name]
    assert entry.needs in NEEDS
    assert sum(entry.needs in needs for needs in [*RUNNERS, (MODEL,)]) == 1
    assert entry.summary and entry.axis_label and entry.reference and entry.direction
    assert set(entry.spaces) <= {*SPACES, *ATTENTION} and set(entry.towers) <= {"vision", "text"}
    assert entry.smallest_n >= 2
    assert not entry.base or entry.base in METRICS
    assert "Reference:" in (entry.function.__doc__ or "") or entry.level == "dataset"
    assert entry.null != "none" and isinstance(entry.null_text, str)
    if entry.sensitive:
        assert entry.sensitive not in entry.invariances


def test_the_table_for_people_has_a_row_per_metric() -> None:
    shown = table()
    assert list(shown["metric"]) == list(METRICS)
    assert not shown.isna().any().any()
    assert metric("rmg").axis_label == "relative modality gap"


def test_an_unknown_metric_is_named_with_the_nearest_one() -> None:
    with pytest.raises(UserError, match="unknown metric 'fischer_ratio'; did you mean 'fisher_rat"):
        metric("fischer_ratio")


def test_the_list_shows_what_is_declared_in_80_columns() -> None:
    text = metrics_text()
    assert max(map(len, text.splitlines())) <= 80
    entries = [line[3:].split(" (")[0] for line in text.splitlines() if line[3:4].strip()]
    assert [name for name in entries if name in METRICS] == list(METRICS)
    one = " ".join(metrics_text(["fisher_ratio"]).split())
    for fact in ("*~ fisher_ratio (class)", "larger: more discriminable", "range 0 … ∞", "n ≥ 6",
                 "(C − 1)/(n − C)", "unchanged by rotation", "Fisher 1936"):  # fmt: skip
        assert fact in one
    assert "silhouette" not in one
    for option in ScoreOptions.model_fields:
        assert re.search(rf"^   {option}[=:]", text, re.M) and f" {option}=" not in one
    with pytest.raises(UserError, match="unknown metric 'rmgg'; did you mean 'rmg'"):
        metrics_text(["rmgg"])


@pytest.mark.parametrize("name", [n for n, m in METRICS.items() if m.relabelled])
def test_many_labellings_at_once_give_what_each_gives_alone(name: str) -> None:
    entry = METRICS[name]
    features, rest = metric_inputs(entry, n=30, width=40)
    rng = np.random.default_rng(3)
    labels = np.stack([rng.permutation(rest[0]) for _ in range(4)])
    assert entry.relabelled is not None
    together = entry.relabelled(features[0], labels)
    alone = [entry.function(features[0], y) for y in labels]
    np.testing.assert_allclose(together, alone, rtol=1e-12)
    assert np.ptp(together) > 0


@pytest.mark.parametrize("name", [n for n, m in METRICS.items() if m.parts and m.needs != "pairs"])
def test_the_chain_of_the_parts_is_the_metric(name: str) -> None:
    entry = METRICS[name]
    features, rest = metric_inputs(entry, n=30, width=7)
    if entry.needs in ("novel classes", "other datasets"):
        geometry, support, x = features
        first = entry.parts[0](geometry, rest[0]).factor()
        chained = entry.parts[1](first, support, rest[1], x, classes=3)
    else:
        options = {"k": 4} if "k" in entry.takes else {}
        chained = entry.parts[1](entry.parts[0](*features), *rest, **options)
    np.testing.assert_array_equal(chained, metric_value(entry, features, rest))


PACKAGED = """
from vlmlayers.metrics import Metric

def spread(x):
    \"\"\"Return the largest distance of a row from the mean.\"\"\"
    return float(((x - x.mean(axis=0)) ** 2).sum(axis=1).max() ** 0.5)

def sizes_match(x, y, power):
    \"\"\"Return the correlation of the lengths of rows that belong together.\"\"\"
    a, b = ((z**2).sum(axis=1) ** (power / 2) for z in (x, y))
    return float(((a - a.mean()) * (b - b.mean())).mean() / (a.std() * b.std()))

radius = Metric(
    spread, "geometry", "features", "radius of the cloud", "", bounds=(0.0, float("inf")),
    direction="wider", spaces=("native",), towers=("vision",), null="gaussian",
)
sizes = Metric(
    sizes_match, "agreement", "pairs", "correlation of lengths", "", bounds=(-1.0, 1.0),
    direction="more alike", null="shuffle", settings={"power": 1},
)
right = Metric(spread, "class", "prompts", "right", "")
found = Metric(spread, "gap", "queries", "found", "", per_item=spread, null=0.0)
novel = Metric(spread, "dataset", "novel classes", "novel", "")
typo = Metric(spread, "geometry", "feature", "typo", "")
number = 3
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A distribution as pip leaves it: a module, and metadata that name what it offers."""
    (tmp_path / "my_measures.py").write_text(PACKAGED)
    info = tmp_path / "my_measures-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-measures\nVersion: 1.0\n")
    names = (
        "spread",
        "radius",
        "sizes",
        "right",
        "found",
        "novel",
        "typo",
        "number",
        "lost",
        "fisher_ratio = my_measures:spread",
    )
    lines = [name if "=" in name else f"{name} = my_measures:{name}" for name in names]
    (info / "entry_points.txt").write_text("\n".join(["[vlmlayers.metrics]", *lines]))
    monkeypatch.syspath_prepend(str(tmp_path))
    get_reusable_executor().shutdown()  # workers of earlier tests know nothing of the package
    yield tmp_path
    sys.modules.pop("my_measures", None)


def test_metrics_of_an_installed_package_are_scored_by_name(package: Path) -> None:
    member = make_features()
    scores = score(member, ["spread", "radius"], jobs=2)
    assert scores.groupby("metric").size().to_dict() == {"spread": 12, "radius": 6}
    x = member.tower("vision").arrays["native"]["2"]
    expected = np.linalg.norm(x - x.mean(axis=0), axis=1).max()
    at = scores[(scores.tower == "vision") & (scores.position == "2") & (scores.space == "native")]
    assert at["value"].to_numpy() == pytest.approx(expected)
    # A report reads what it declares; a name that ships stays what it was.
    assert metric_entry("radius", scores)["label"] == "Radius of the cloud"
    assert "chance: each column shuffled by itself" in metrics_text(["spread"])
    assert "spread" not in METRICS and metric("fisher_ratio") is METRICS["fisher_ratio"]
    with pytest.raises(UserError, match="did you mean 'spread'"):
        metric("spred")
    with pytest.raises(UserError, match="'spread'; valid"):
        score_streaming([member], ["spread"])


def test_agreement_and_a_null_of_noise_of_a_package_are_scored_as_shipped_ones(
    package: Path,
) -> None:
    member = make_features()
    scores = score(member, ["sizes", "radius"], jobs=1, shuffles=19)
    sides = [member.tower(name).arrays["native"]["2"] for name in ("vision", "text")]
    means = sides[0].reshape(10, 6, -1).mean(axis=0)  # labels are 0 to 5, over and over
    lengths = [np.linalg.norm(x, axis=1) for x in (means, sides[1])]
    rows = scores[(scores.position == "2") & (scores.other_position == "2")]
    found = rows.set_index(["tower", "other_tower"])
    expected = np.corrcoef(*lengths)[0, 1]
    assert found.loc[("vision", "text"), "value"] == pytest.approx(expected, abs=1e-5)
    across = scores[(scores.tower == "vision") & (scores.other_tower == "text")]
    across = across.set_index(["position", "other_position"])["value"]
    for here, there in (("1", "3"), ("3", "1")):  # which differ: the towers are two
        images = member.tower("vision").arrays["native"][here].reshape(10, 6, -1).mean(axis=0)
        texts = member.tower("text").arrays["native"][there]
        expected = np.corrcoef(*(np.linalg.norm(x, axis=1) for x in (images, texts)))[0, 1]
        assert across[here, there] == pytest.approx(expected, abs=1e-5)
    own = found.loc[("vision", "vision")]  # of all images, and no shuffle comes near itself
    assert (own["value"], own["n"]) == (pytest.approx(1.0), 60) and "p=0.05" in own["options"]
    assert abs(own["null"]) < 0.1
    noise = np.random.default_rng(8).normal(size=(200, *sides[0].shape))
    largest = np.linalg.norm(noise - noise.mean(axis=1, keepdims=True), axis=2).max(axis=1)
    null = scores.loc[(scores.metric == "radius") & (scores.position == "2"), "null"].item()
    assert largest.min() <= null <= largest.max()


def test_what_a_package_offers_wrongly_is_named(package: Path) -> None:
    with pytest.raises(UserError, match="my_measures:number is no metric; it has to be a function"):
        metric("number")
    with pytest.raises(UserError, match="'lost' of an installed package cannot be read"):
        metric("lost")
    for name, lacks in (("right", "per_item"), ("found", "a null that is"), ("novel", "parts")):
        with pytest.raises(UserError, match=f"my_measures:{name} needs '.*', whose .* {lacks}"):
            metric(name)
    with pytest.raises(UserError, match="unknown needs 'feature' in my_.*; did you mean 'feat"):
        metric("typo")


def test_a_study_scores_again_where_a_packages_metric_has_changed(package: Path) -> None:
    before = _metric_mark("radius")
    assert before == _metric_mark("spread") and not _metric_mark("twonn")
    (package / "my_measures.py").write_text(PACKAGED.replace("max()", "min()"))
    assert _metric_mark("radius") not in ("", before)
