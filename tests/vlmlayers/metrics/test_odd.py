"""Odd inputs for every metric of the table: each is refused in words or answered sensibly."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import PLAIN_NEEDS, metric_inputs, metric_value

from vlmlayers.errors import UserError
from vlmlayers.metrics import (
    METRICS,
    fisher_ratio,
    h_score,
    k_nearest,
    logme,
    nearest_mean,
    pair_distance,
)
from vlmlayers.metrics.transfer import discriminant

PLAIN = [name for name, entry in METRICS.items() if entry.needs in PLAIN_NEEDS]
MOVABLE = [name for name in PLAIN if "translation" in METRICS[name].invariances]
LABELLED = [name for name in PLAIN if METRICS[name].needs == "labels"]
UNTUNED = (nearest_mean, k_nearest, discriminant)
READOUTS = [name for name in PLAIN if "classes" in str(METRICS[name].null)]


def wrong(name: str, value: np.ndarray, classes: int = 3) -> str:
    """Return what is wrong with a value: not finite, or out of its bounds; empty where nothing."""
    low, high = METRICS[name].bounds
    if value.dtype.kind == "i":
        low, high = 0, classes - 1
    if value.size == 0 or not np.isfinite(value).all():
        return f"{value} is not finite"
    inside = (value >= low - 1e-9).all() and (value <= high + 1e-9).all()
    return "" if inside else f"{value} is not in [{low}, {high}]"


def wrong_unless_refused(name: str, make: Callable[[], np.ndarray]) -> str:
    """Return what is wrong with a value; a refusal in words is right as well."""
    try:
        value = make()
    except UserError as error:
        return "" if len(str(error)) > 10 else f"refused with {str(error)!r}"
    return wrong(name, np.asarray(value))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", PLAIN)
def test_nan_and_inf_are_never_silent(name: str, bad: float) -> None:
    entry = METRICS[name]
    for number in range(len(metric_inputs(entry)[0])):
        if number == 1 and entry.function in UNTUNED:
            continue  # these do not read the validation part
        features, rest = metric_inputs(entry)
        features[number] = features[number].copy()
        features[number][2, 1] = bad
        with pytest.raises(UserError, match="NaN or Inf"):
            metric_value(entry, features, rest)


@pytest.mark.parametrize("scale", [1e100, 1e-100])
@pytest.mark.parametrize("name", PLAIN)
def test_values_whose_products_are_no_numbers_are_refused(name: str, scale: float) -> None:
    """Their sums would be infinite or zero, and items pass for the same."""
    entry = METRICS[name]
    features, rest = metric_inputs(entry)
    with pytest.raises(UserError, match="whose products leave the range of float64"):
        metric_value(entry, [x * scale for x in features], rest)


@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 10_000))
@pytest.mark.parametrize("name", MOVABLE)
def test_an_offset_of_1000_in_float32_costs_only_its_rounding(name: str, seed: int) -> None:
    entry = METRICS[name]
    features, rest = metric_inputs(entry, seed)
    if entry.needs == "pairs":
        features, rest = [*features, *rest], []
    plain = metric_value(entry, features, rest)
    moved = metric_value(entry, [(x + 1000.0).astype(np.float32) for x in features], rest)
    if plain.dtype.kind == "i":
        assert (moved == plain).mean() >= 0.85
    else:
        assert moved == pytest.approx(plain, rel=2e-3, abs=2e-3)


@pytest.mark.parametrize("name", PLAIN)
def test_more_columns_than_items_give_a_value_inside_the_bounds(name: str) -> None:
    entry = METRICS[name]
    assert not wrong(name, np.asarray(metric_value(entry, *metric_inputs(entry, n=24, width=120))))


@pytest.mark.parametrize("name", PLAIN)
def test_two_items_are_refused_or_mean_something(name: str) -> None:
    entry = METRICS[name]
    features, rest = metric_inputs(entry, n=2, classes=2)
    if len(features) == 3:
        features, rest = metric_inputs(entry, n=8, classes=2)
        rest[0][:] = rest[0][:1]  # two classes, of which one has no fitting item
    assert not wrong_unless_refused(name, lambda: metric_value(entry, features, rest, classes=2))


@pytest.mark.parametrize("name", PLAIN)
def test_constant_features_are_refused_or_mean_something(name: str) -> None:
    entry = METRICS[name]
    features, rest = metric_inputs(entry)
    features = [np.full_like(x, 1000.1, dtype=np.float32) for x in features]
    assert not wrong_unless_refused(name, lambda: metric_value(entry, features, rest))


@pytest.mark.parametrize("name", LABELLED)
def test_one_class_is_refused(name: str) -> None:
    features, rest = metric_inputs(METRICS[name])
    with pytest.raises(UserError, match="labels name 1 class; at least 2 are needed"):
        metric_value(METRICS[name], features, [np.zeros_like(rest[0])])


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(2, 12),
    width=st.integers(1, 8),
    name=st.sampled_from([name for name in PLAIN if name not in READOUTS]),
)
def test_small_random_inputs_never_give_nonsense(seed: int, n: int, width: int, name: str) -> None:
    entry = METRICS[name]
    features, rest = metric_inputs(entry, seed, n=n, width=width, classes=2)
    assert not wrong_unless_refused(name, lambda: metric_value(entry, features, rest, classes=2))


SIX = np.random.default_rng(0).normal(size=(6, 3))


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ([1j], "holds no numbers"),
        ([[1, 2]], "holds no numbers, or rows of different lengths"),
        ([], r"have shape \(5,\); expected \(6,\)"),
        (
            [-1],
            "has -1 at item 5; classes are whole numbers from 0, and items without one are left",
        ),
        ([0.5], "has 0.5 at item 5"),
        ([np.nan], "has nan at item 5"),
    ],
)
def test_labels_that_name_no_class_are_refused(last: list[object], message: str) -> None:
    labels = [0, 0, 0, 1, 1, *last]
    with pytest.raises(UserError, match=f"^labels {message}"):
        fisher_ratio(SIX, labels)
    for function in (h_score, logme):
        with pytest.raises(UserError, match=f"^labels {message}"):
            function(SIX, labels)
    with pytest.raises(UserError, match=f"^fit_labels {message}"):
        nearest_mean(SIX, labels, SIX, labels, SIX, classes=2)


def test_a_class_beyond_their_number_is_refused_and_the_last_one_is_taken() -> None:
    labels = [0, 0, 1, 1, 2, 2]
    assert set(nearest_mean(SIX, labels, SIX, labels, SIX, classes=3)) <= {0, 1, 2}
    with pytest.raises(UserError, match="fit_labels name class 2; 2 classes are 0 to 1"):
        nearest_mean(SIX, labels, SIX, labels, SIX, classes=2)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([0, 1, 2], r"pairs have shape \(3,\); expected \(pair, 2\)"),
        ([[0, 1, 2]], r"pairs have shape \(1, 3\)"),
        (np.empty((0, 2)), r"pairs have shape \(0, 2\)"),
        ([[0, 0], [6, 1]], r"pair 1 is \(6, 1\); rows of x are 0 to 5, of y 0 to 3"),
        ([[5, 4]], r"pair 0 is \(5, 4\)"),
        ([[0, -1]], r"pair 0 is \(0, -1\)"),
        ([[0.5, 0]], r"pair 0 is \(0.5, 0\)"),
        ([["a", "b"]], "pairs holds no numbers"),
    ],
)
def test_pairs_that_are_no_rows_are_refused(pairs: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pair_distance(SIX, SIX[:4], pairs)
    assert pair_distance(SIX, SIX[:4], [[3, 3]]) == pytest.approx(0)  # the last one is a row
