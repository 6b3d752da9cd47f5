"""The table: every entry is complete, and what it declares holds for its function."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmlayers.errors import UserError
from vlmlayers.metrics import METRICS, metric, table
from vlmlayers.metrics.table import NATIVE, NEEDS, Metric
from vlmlayers.scores.run import RUNNERS

TESTED = {
    "labels",
    "pairs",
    "features",
    "modalities",
    "queries",
    "prompts",
    "datasets",
    "class parts",
    "styles",
    "style classes",
    "novel classes",
    "other datasets",
}
CASES = [(name, kind) for name, m in METRICS.items() if m.needs in TESTED for kind in m.invariances]
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


def _arrays(entry: Metric, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return feature matrices that belong together, and the arguments that follow them."""
    rng = np.random.default_rng(seed)
    n, width, classes = 36, 9, 3
    y = np.arange(n) % classes
    means = rng.normal(size=(classes, width))
    x = rng.normal(size=(n, width)) + means[y] + 0.5
    if entry.needs == "labels":
        return [x], [y]
    if entry.needs == "features":
        return [x], []
    if entry.needs == "pairs":
        return [x], [x[:, :6] + rng.normal(size=(n, 6))]
    if entry.needs == "prompts":
        return [x, means + rng.normal(size=means.shape)], [y]
    if entry.needs in ("modalities", "queries"):
        return [x, x + rng.normal(size=x.shape) - 1.0], []
    return [x[:18], x[18:27], x[27:]], [y[:18], y[18:27]]


def _value(entry: Metric, features: list[np.ndarray], rest: list[np.ndarray]) -> np.ndarray:
    settings_ = dict(entry.settings)
    if entry.needs in ("novel classes", "other datasets"):
        geometry, support, x = features
        return entry.function(geometry, rest[0], support, rest[1], x, classes=3)
    if len(features) == 3:
        fit, val, x = features
        return entry.function(fit, rest[0], val, rest[1], x, classes=3, **settings_)
    if "k" in entry.takes:
        settings_["k"] = 4
    return np.asarray(entry.function(*features, *rest, **settings_))


def _shuffled(entry: Metric, features: list, rest: list, seed: int) -> tuple[list, list]:
    order = np.random.default_rng(seed).permutation(len(features[0]))
    return [x[order] for x in features], [r[order] for r in rest]


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10_000))
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_declared_invariances_hold(name: str, kind: str, seed: int) -> None:
    entry = METRICS[name]
    features, rest = _arrays(entry, seed)
    expected = _value(entry, features, rest)
    if kind == "row order":
        value = _value(entry, *_shuffled(entry, features, rest, seed))
    else:
        value = _value(entry, [_transform(kind, x, seed) for x in features], rest)
    if expected.dtype.kind == "i":  # predictions: L-BFGS stops at a tolerance
        assert (value == expected).mean() >= 0.85
    else:
        assert value == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(("name", "kind"), CONTROLS)
def test_the_negative_control_changes_the_value(name: str, kind: str) -> None:
    entry = METRICS[name]
    changes = []
    for seed in range(3):
        features, rest = _arrays(entry, seed)
        moved = [features[0], *features[1:]]
        moved[0] = _transform(kind, features[0], seed)
        before, after = _value(entry, features, rest), _value(entry, moved, rest)
        changes.append(abs(float(after - before)))
    assert max(changes) > 1e-3


@pytest.mark.parametrize("name", [n for n, m in METRICS.items() if m.needs in TESTED])
def test_values_stay_inside_the_declared_bounds(name: str) -> None:
    entry = METRICS[name]
    value = _value(entry, *_arrays(entry, 0))
    if value.dtype.kind == "f":
        assert entry.bounds[0] - 1e-9 <= value <= entry.bounds[1] + 1e-9


@pytest.mark.parametrize("name", METRICS)
def test_every_entry_is_complete(name: str) -> None:
    entry = METRICS[name]
    assert entry.needs in NEEDS
    assert sum(entry.needs in needs for needs in RUNNERS) == 1
    assert entry.summary and entry.axis_label and entry.reference and entry.direction
    assert set(entry.spaces) <= set(NATIVE) and set(entry.towers) <= {"vision", "text"}
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
