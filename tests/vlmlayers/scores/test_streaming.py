"""Streaming: sums merge exactly, in any order, and give what the features themselves give."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import make_features, many

from vlmlayers.errors import UserError
from vlmlayers.features import LayerFeatures, TowerFeatures
from vlmlayers.features.store import DamagedStore
from vlmlayers.metrics import (
    centroid_gap,
    cka,
    effective_rank,
    fisher_ratio,
    frechet_gap,
    participation_ratio,
    spectral_entropy,
)
from vlmlayers.metrics.gap import frechet_null
from vlmlayers.metrics.moments import (
    ClassMoments,
    CrossMoments,
    Moments,
    biased_cka_null,
    cka_from,
    directions_from,
    fisher_from,
    frechet_from,
    frechet_null_by_rows,
    frechet_null_from,
    white_noise_root,
)
from vlmlayers.scores import score, score_streaming
from vlmlayers.scores.streamed import STREAMED, in_chunks, streamed_scores
from vlmlayers.scores.sums import StreamingScores

PARTS = {
    Moments: ("mean", "scatter", "cubic", "fourth"),
    CrossMoments: ("mean_x", "mean_y", "cross", "sizes", "x2y", "y2x", "x2y2"),
    ClassMoments: ("counts", "means"),
}


def _assert_same(a: object, b: object, scale: float = 1.0) -> None:
    for name in PARTS[type(a)]:
        one, two = np.asarray(getattr(a, name)), np.asarray(getattr(b, name))
        size = max(float(np.abs(one).max()), 1e-12) * scale
        assert np.abs(one - two).max() <= 1e-10 * size, name


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 30),
    st.integers(1, 30),
    st.integers(1, 30),
    st.sampled_from([0.0, 3.0, 1000.0]),
)
def test_merging_equals_one_pass_and_is_associative(
    seed: int, a: int, b: int, c: int, offset: float
) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(a + b + c, 5)) + offset, rng.normal(size=(a + b + c, 3)) - offset
    labels = rng.integers(0, 4, a + b + c)
    cuts = [slice(0, a), slice(a, a + b), slice(a + b, None)]
    # Odd sums about the mean nearly cancel: their error is measured against their even neighbours.
    scale = 1e3 if offset == 1000.0 else 1e2
    for make, whole in (
        (lambda s: Moments.of(x[s]), Moments.of(x)),
        (lambda s: CrossMoments.of(x[s], y[s]), CrossMoments.of(x, y)),
        (lambda s: ClassMoments.of(x[s], labels[s], 4), ClassMoments.of(x, labels, 4)),
    ):
        first, second, third = (make(cut) for cut in cuts)
        _assert_same(whole, (first + second) + third, scale)
        _assert_same(whole, first + (second + third), scale)


def test_two_halves_equal_the_whole_to_ten_digits() -> None:
    rng = np.random.default_rng(0)
    x = np.exp(rng.normal(size=(4000, 20))) + 5
    y = np.exp(rng.normal(size=(4000, 10)))
    _assert_same(Moments.of(x), Moments.of(x[:2000]) + Moments.of(x[2000:]))
    _assert_same(
        CrossMoments.of(x, y),
        CrossMoments.of(x[:2000], y[:2000]) + CrossMoments.of(x[2000:], y[2000:]),
    )


@pytest.mark.parametrize("offset", [0.0, 1000.0, 100_000.0])
def test_metrics_from_sums_are_the_metrics(offset: float) -> None:
    rng = np.random.default_rng(1)
    x, labels = rng.normal(size=(300, 12)), np.arange(300) % 4
    x += rng.normal(size=(4, 12))[labels] + offset
    y = x[:, :5] + rng.normal(size=(300, 5))
    sums = Moments.of(x[:200]) + Moments.of(x[200:])
    other = Moments.of(y[:50]) + Moments.of(y[50:])
    cross = CrossMoments.of(x[:10], y[:10]) + CrossMoments.of(x[10:], y[10:])
    classes = ClassMoments.of(x[:9], labels[:9], 4) + ClassMoments.of(x[9:], labels[9:], 4)
    assert fisher_from(sums, classes) == pytest.approx(fisher_ratio(x, labels), rel=1e-8)
    for debiased in (True, False):
        assert cka_from(sums, other, cross, debiased=debiased) == pytest.approx(
            cka(x, y, debiased=debiased), rel=1e-8
        )
    values = directions_from(sums)[0]
    assert values.sum() ** 2 / (values**2).sum() == pytest.approx(participation_ratio(x), rel=1e-8)


def test_frechet_gap_from_sums() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(200, 6)) + 1, rng.normal(size=(150, 6))
    x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
    assert frechet_from(Moments.of(x), Moments.of(y)) == pytest.approx(frechet_gap(x, y), abs=1e-7)


@pytest.mark.parametrize(("n", "m"), [(4000, 4000), (5000, 100), (200, 60)])
def test_frechet_null_from_sums_is_that_of_mixed_rows(n: int, m: int) -> None:
    """At the number of rows of the clouds: of 200 of them it is far above."""
    rng = np.random.default_rng(5)
    spread = np.linspace(1, 0.2, 64)
    x, y = rng.normal(size=(n, 64)) * spread + 0.5, rng.normal(size=(m, 64)) * spread
    x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
    ours = frechet_null_from(Moments.of(x), Moments.of(y), rng)
    assert ours == pytest.approx(frechet_null(x, y), rel=0.07)


@pytest.mark.parametrize(("n", "m"), [(400, 50), (50, 200), (300, 300)])
def test_the_frechet_null_is_of_clouds_that_scatter_unlike(n: int, m: int) -> None:
    """As in low layers, where few prompts scatter far more than many images do."""
    rng = np.random.default_rng(6)
    x, y = rng.normal(size=(n, 32)) * 0.02 + 0.5, rng.normal(size=(m, 32)) + 0.5
    x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
    ours = frechet_null_from(Moments.of(x), Moments.of(y), rng, draws=20)
    assert ours == pytest.approx(frechet_null(x, y, draws=20), rel=0.1)


@pytest.mark.parametrize(("n", "m", "kept"), [(3000, 40, 99), (40, 3000, 99), (120, 120, 120)])
def test_the_frechet_null_is_of_rows_that_are_not_normal(n: int, m: int, kept: int) -> None:
    """Rows of two heaps: normal ones of their covariance scatter unevenly."""
    rng = np.random.default_rng(9)
    heaps = np.where(np.arange(max(n, m)) % 2, 1.0, -1.0)[:, None] * np.eye(8)[0]
    x, y = (heaps[:k] + 0.05 * rng.normal(size=(k, 8)) for k in (n, m))
    sums, rows = [Moments.of(z) for z in (x, y)], (x[:kept], y[:kept])
    ours = frechet_null_by_rows(*sums, rows, rng, draws=200)
    mixed = np.mean([gap_of_mixed(x, y, np.random.default_rng(seed)) for seed in range(200)])
    assert ours == pytest.approx(mixed, rel=0.07)
    assert frechet_null_from(*sums, rng, draws=40) > 1.2 * mixed


def test_a_frechet_null_of_rows_is_the_gap_of_the_two_parts_that_are_drawn() -> None:
    rng = np.random.default_rng(11)
    x, y = rng.normal(size=(9, 4)) + 3, 2 * rng.normal(size=(6, 4))
    found = frechet_null_by_rows(
        Moments.of(x), Moments.of(y), (x, y), np.random.default_rng(1), draws=1
    )
    again = np.random.default_rng(1)
    of_x = int(again.hypergeometric(9, 6, 6))
    orders = again.permutation(9), again.permutation(6)
    apart = [(z - z.mean(axis=0))[order] for z, order in zip((x, y), orders)]
    drawn = np.vstack([apart[0][:of_x], apart[1][: 6 - of_x]])
    rest = np.vstack([apart[0][of_x:], apart[1][6 - of_x :]])
    assert 0 < of_x < 6 and found == pytest.approx(
        frechet_from(Moments.of(drawn), Moments.of(rest)), rel=1e-9
    )


def gap_of_mixed(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> float:
    rows = rng.permutation(np.vstack([x - x.mean(axis=0), y - y.mean(axis=0)]))
    parts = [part - part.mean(axis=0) for part in (rows[: len(x)], rows[len(x) :])]
    return frechet_from(*(Moments.of(part) for part in parts))


def test_the_streamed_frechet_null_is_that_of_mixed_rows() -> None:
    """Of many images beside few prompts, of which all are kept."""
    rng = np.random.default_rng(10)
    labels = np.arange(600) % 6
    images = np.eye(8)[0] + np.where(labels % 2, 1.0, -1.0)[:, None] * np.eye(8)[1]
    images += 0.02 * rng.normal(size=(600, 8))
    texts = np.eye(8)[2] + np.where(np.arange(6) % 2, 1.0, -1.0)[:, None] * np.eye(8)[1]
    one = LayerFeatures.from_arrays(
        {"1": images},
        labels=labels,
        text={"1": texts + 0.02 * rng.normal(size=(6, 8))},
        text_labels=np.arange(6),
        space="joint",
    )
    table = score_streaming([one], ["frechet_gap"], sample=50)
    clouds = (np.asarray(z.arrays["joint"]["1"], np.float64) for z in (one.vision, one.text))
    x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in clouds)
    mixed = [gap_of_mixed(x, y, np.random.default_rng(seed)) for seed in range(200)]
    error = np.std(mixed) / np.sqrt(5)
    assert table["null"].item() == pytest.approx(np.mean(mixed), abs=2.5 * error)


def test_the_frechet_null_of_a_billion_rows_is_that_of_fewer() -> None:
    x = Moments.of(np.random.default_rng(7).normal(size=(50, 4)))
    many = replace(x, n=3 * 10**9, scatter=x.scatter * 6e7)
    fewer = replace(x, n=5 * 10**6, scatter=x.scatter * 1e5)
    big, small = (frechet_null_from(one, one, np.random.default_rng(8)) for one in (many, fewer))
    assert 0.0 < big < small / 8


def test_biased_null_is_the_mean_over_permutations() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(30, 20)), rng.normal(size=(30, 25))
    shuffled = [cka(x, y[rng.permutation(30)], debiased=False) for _ in range(300)]
    assert biased_cka_null(Moments.of(x), Moments.of(y)) == pytest.approx(
        np.mean(shuffled), abs=0.005
    )


@pytest.mark.parametrize(("n", "width"), [(50, 8), (6, 20)])
def test_white_noise_has_the_moments_of_drawn_noise(n: int, width: int) -> None:
    rng = np.random.default_rng(4)
    roots = [white_noise_root(n, width, rng) for _ in range(300)]
    ours = [root @ root.T for root in roots]
    drawn = [np.cov(rng.normal(size=(n, width)).T) * (n - 1) for _ in range(300)]
    assert np.mean([np.trace(s) for s in ours]) == pytest.approx((n - 1) * width, rel=0.03)
    assert np.mean([(s**2).sum() for s in ours]) == pytest.approx(
        np.mean([(s**2).sum() for s in drawn]), rel=0.06
    )


def test_degenerate_sums_are_refused() -> None:
    x = np.full((10, 3), 1000.1)
    same, labels = Moments.of(x), np.arange(10) % 2
    with pytest.raises(UserError, match="are the same"):
        directions_from(same)
    with pytest.raises(UserError, match="name 1 class"):
        fisher_from(same, ClassMoments.of(x, np.zeros(10, int), 3))
    with pytest.raises(UserError, match="no scatter within classes"):
        fisher_from(same, ClassMoments.of(x, labels, 2))
    with pytest.raises(UserError, match="are the same"):
        cka_from(same, same, CrossMoments.of(x, x))
    with pytest.raises(UserError, match="at least 4"):
        cka_from(Moments.of(x[:3]), Moments.of(x[:3]), CrossMoments.of(x[:3], x[:3]))


@pytest.fixture(scope="module")
def features() -> list[LayerFeatures]:
    return [*many(2, items=300), make_features("captioned", number=7, items=300, captions=1)]


def _by_place(table):
    keys = ["dataset", "tower", "position", "metric", "space"]
    return table.set_index(keys)[["value", "low", "high", "null", "n"]].sort_index()


def test_chunks_order_and_merging_change_nothing(features: list[LayerFeatures]) -> None:
    whole = score_streaming(features, sample=50)
    pieces = [chunk for member in features for chunk in in_chunks(member, 37)]
    order = np.random.default_rng(0).permutation(len(pieces))
    halves = StreamingScores(50), StreamingScores(50)
    for i in order:
        halves[i % 2].update(pieces[i])
    for _ in range(2):  # nor does a merge change what it is made of
        merged = streamed_scores(halves[0].merge(halves[1]))
    a, b = _by_place(whole), _by_place(merged)
    assert (a.index == b.index).all()
    assert a.to_numpy() == pytest.approx(b.to_numpy(), rel=1e-8)  # intervals and nulls as well


def test_streamed_values_are_those_of_the_features(features: list[LayerFeatures]) -> None:
    streamed = _by_place(score_streaming(features, sample=60))
    member = features[2]  # one caption per image: the pairs are the same in both
    x, y = (t.array("2", "joint") for t in member.towers)
    native = [t.array("2") for t in member.towers]
    expected = {
        ("fisher_ratio", "native"): fisher_ratio(native[0], member.vision.labels),
        ("cka_debiased", "native"): cka(*native),
        ("cka_biased", "native"): cka(*native, debiased=False),
        ("centroid_gap", "joint"): centroid_gap(x, y),
        ("frechet_gap", "joint"): frechet_gap(x, y),
        ("effective_rank", "native"): effective_rank(native[0]),
        ("participation_ratio", "native"): participation_ratio(native[0]),
        ("spectral_entropy", "native"): spectral_entropy(native[0]),
    }
    for (metric, space), value in expected.items():
        row = streamed.loc[[("captioned", "vision", "2", metric, space)]].iloc[0]
        assert row["value"] == pytest.approx(value, rel=1e-6), metric
        assert row["low"] <= row["value"] <= row["high"] and row["n"] == 300
    plain = score([member], ["fisher_ratio"], bootstrap=20, positions=["2"])
    place = ("captioned", "vision", "2", "fisher_ratio", "native")
    assert streamed.loc[[place], "null"].item() == pytest.approx(plain["null"].iloc[0])
    rng = np.random.default_rng(0)
    shuffled = [cka(native[0], native[1][rng.permutation(300)], debiased=False) for _ in range(40)]
    gap = streamed.loc[[("captioned", "vision", "2", "frechet_gap", "joint")], "null"].item()
    assert gap == pytest.approx(frechet_null(x, y), rel=0.1), "of all 300, not of the 60 kept"
    for metric, null in (("cka_biased", np.mean(shuffled)), ("cka_debiased", 0.0)):
        found = streamed.loc[[("captioned", "vision", "2", metric, "native")], "null"].item()
        assert found == pytest.approx(null, rel=0.02)


@pytest.mark.parametrize(("classes", "items"), [(5, 60), (300, 3000)])
def test_the_interval_of_a_streamed_fisher_ratio_is_that_of_fresh_samples(
    classes: int, items: int
) -> None:
    """Also where the sample holds one item of a class or none, as of the classes of ImageNet."""
    means = np.random.default_rng(0).normal(size=(classes, 8))
    labels = np.arange(items) % classes
    found = []
    for seed in range(25):
        x = means[labels] + np.random.default_rng([1, seed]).normal(size=(items, 8))
        ids = tuple(f"{seed} {item}" for item in range(items))
        tower = TowerFeatures("vision", 1, "cls", "images", ids, labels, {"native": {"1": x}})
        names = tuple(f"class {c}" for c in range(classes))
        one = LayerFeatures("m", "w", "drawn", "train", names, tower)
        found.append(score_streaming([one], ["fisher_ratio"]).iloc[0])
    values, widths = [r["value"] for r in found], [r["high"] - r["low"] for r in found]
    expected = 2 * 2.262 * np.std(values, ddof=1)  # Student's t of ten groups
    assert np.median(widths) == pytest.approx(expected, rel=0.4)


@pytest.mark.parametrize("metric", ["effective_rank", "participation_ratio", "spectral_entropy"])
def test_intervals_of_streamed_spectra_are_those_of_fresh_samples(metric: str) -> None:
    """Also where the sample has fewer items than columns, as of a model of ordinary width."""
    spread, found = np.arange(1, 65) ** -0.5, []
    for seed in range(25):
        rng = np.random.default_rng(seed)
        # Norms differ by item, as those of features do.
        x = rng.normal(size=(800, 64)) * spread * np.exp(0.3 * rng.normal(size=(800, 1)))
        ids, labels = tuple(f"{seed} {item}" for item in range(800)), np.zeros(800, np.int64)
        tower = TowerFeatures("vision", 1, "cls", "images", ids, labels, {"native": {"1": x}})
        one = LayerFeatures("m", "w", "drawn", "train", ("a",), tower)
        found.append(score_streaming([one], [metric], sample=32).iloc[0])
    values, widths = [r["value"] for r in found], [r["high"] - r["low"] for r in found]
    expected = 2 * 2.262 * np.std(values, ddof=1)  # Student's t of ten groups
    assert np.median(widths) == pytest.approx(expected, rel=0.35)


def test_streamed_dataset_accuracy_tells_the_same_story(features: list[LayerFeatures]) -> None:
    streamed = score_streaming(features, ["dataset_accuracy_lda"], sample=80)
    plain = score(features, ["dataset_accuracy_lda"], seeds=(1, 2, 3))
    plain = plain[plain.tower == "vision"].groupby("position")["value"].mean()
    streamed = streamed.set_index("position")["value"]
    assert (streamed - plain).abs().max() < 0.12
    assert streamed["embed"] < streamed["1"] < streamed["3"]


def _wide_chunk(rows: int, start: int) -> LayerFeatures:
    rng = np.random.default_rng(start)
    x = rng.normal(size=(rows, 32)).astype(np.float32)
    ids = tuple(str(start + i) for i in range(rows))
    tower = TowerFeatures(
        "vision", 1, "cls", "images", ids, np.arange(rows) % 5, {"native": {"1": x}}
    )
    return LayerFeatures("m", "w", "noise", "train", tuple("abcde"), tower)


def test_memory_is_flat_in_n() -> None:
    peaks = []
    for n in (10_000, 80_000):
        sums = StreamingScores(100)
        tracemalloc.start()
        for start in range(0, n, 2_000):
            sums.update(_wide_chunk(2_000, start))
        streamed_scores(sums, ["effective_rank", "fisher_ratio"])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.15 * peaks[0]


def test_wrong_streams_are_refused(features: list[LayerFeatures]) -> None:
    with pytest.raises(UserError, match="unknown streaming metric 'silhouette'"):
        score_streaming(features, ["silhouette"])
    with pytest.raises(UserError, match="unknown metric 'fisher'"):
        score_streaming(features, ["fisher"])
    with pytest.raises(UserError, match="no features came"):
        score_streaming([])
    with pytest.raises(UserError, match="sample is 3; at least 20"):
        StreamingScores(3)
    with pytest.raises(UserError, match="samples of 20 and 30 items cannot be merged"):
        StreamingScores(20).merge(StreamingScores(30))
    sums = StreamingScores(20)
    sums.update(features[0])
    with pytest.raises(UserError, match="cannot join those of toy random train"):
        sums.update(replace(features[1], model="another"))
    assert list(sums.datasets) == [features[0].dataset]  # what is refused leaves nothing behind
    with pytest.raises(UserError, match="no vision features came"):
        sums.update(replace(features[1], vision=None))
    with pytest.raises(UserError, match="an item came twice"):
        sums.update(features[0])  # most of it is no longer in the sample
    few = features[0].vision.take(np.arange(5))
    fresh = StreamingScores(20)
    fresh.update(replace(features[0], vision=few))
    with pytest.raises(UserError, match="an item came twice"):
        fresh.update(replace(features[0], vision=few))
    with pytest.raises(UserError, match="class 5 has images but no prompt"):
        StreamingScores(20).update(replace(features[0], text=features[0].text.take(np.arange(5))))
    captions = features[2]
    with pytest.raises(UserError, match="an image of a chunk has no caption"):
        StreamingScores(20).update(replace(captions, text=captions.text.take(np.arange(9))))


@pytest.mark.parametrize("merged", [False, True])
def test_what_is_scored_apart_or_is_another_model_cannot_join(merged: bool) -> None:
    """The same is refused of features that come and of sums that are merged."""
    first, second = make_features(), make_features("other", number=1)
    halves = [first.take_images(np.arange(60)[part]) for part in (slice(30), slice(30, None))]
    mean = replace(second, vision=replace(second.vision, pooling="mean"))
    captions = make_features(captions=1).take_images(np.arange(30, 60))
    bare = {"native": {p: x for p, x in halves[1].vision.arrays["native"].items() if p != "2"}}
    for start, other, message in (
        (
            first,
            mean,
            r"other: features of toy random train pooled by mean \(vision\) and eot \(text\) "
            r"cannot join those of toy random train pooled by cls \(vision\) and eot \(text\) in "
            "alpha; score them apart",
        ),
        (first, replace(second, text=None), r"of toy random train pooled by cls \(vision\) cannot"),
        (
            first,
            make_features("other", number=1, widths=(20, 16, 12)),
            "vision features at embed are 24 wide in alpha and 20 in other, .* of toy random",
        ),
        (
            halves[0],
            replace(halves[1], class_names=tuple("abcdef")),
            "alpha: parts of it differ in class names, and are no chunks of one dataset",
        ),
        (halves[0], captions, "alpha: parts of it differ in class prompts, and"),
        (
            halves[0],
            replace(halves[1], vision=replace(halves[1].vision, arrays=bare)),
            "alpha: parts of it differ in the positions of the vision tower, and",
        ),
    ):
        sums, more = StreamingScores(20), StreamingScores(20)
        sums.update(start)
        with pytest.raises(UserError, match=message):
            if merged:
                more.update(other)
                sums.merge(more)
            else:
                sums.update(other)
        assert sums.datasets[start.dataset].n == len(start.vision)


def test_what_merged_sums_take_in_is_not_counted_in_those_they_are_of() -> None:
    one, other = many(2)
    first, second = StreamingScores(20), StreamingScores(20)
    half = len(one.vision) // 2
    first.update(one.take_images(np.arange(half)))
    second.update(other.take_images(np.arange(half)))
    merged = first.merge(second)
    for member in (one, other):
        merged.update(member.take_images(np.arange(half, len(member.vision))))
    assert [sums.n for sums in merged.datasets.values()] == [len(one.vision), len(other.vision)]
    assert first.datasets[one.dataset].n == second.datasets[other.dataset].n == half


def test_of_a_chunk_that_is_refused_nothing_stays() -> None:
    sums, (one,) = StreamingScores(20), many(1)
    with pytest.raises(UserError, match="came twice"):
        sums.update(one.take_images([0, 1, 2, 0]))
    assert not sums.datasets


def test_sums_mark_the_features_they_are_of_as_plain_scores_do() -> None:
    members = [replace(one, identity={"items_hash": one.dataset}) for one in many(2)]
    names = ["effective_rank"]
    plain = score(members, names, bootstrap=20).attrs["features"]
    assert set(plain) == {"set0 (train)", "set1 (train)"}
    assert score_streaming(members, names, sample=30).attrs["features"] == plain
    # Items of one dataset that were extracted in two parts have the marks of both.
    parts = [members[0].take_images(rows) for rows in np.split(np.arange(60), 2)]
    parts[1] = replace(parts[1], identity={"items_hash": "rest"})
    sums = [StreamingScores(30), StreamingScores(30)]
    for one, part in zip(sums, parts):
        one.update(part)
    both = streamed_scores(sums[0].merge(sums[1]), names).attrs["features"]["set0 (train)"]
    assert both[:1] == plain["set0 (train)"] and len(set(both)) == 2
    assert streamed_scores(sums[0], names).attrs["features"] == {"set0 (train)": both[:1]}


def _without_classes(name: str, number: int, captions: int = 1) -> LayerFeatures:
    given = make_features(name, number=number, items=120, captions=captions)
    vision, text = (replace(t, labels=np.full(len(t), -1)) for t in given.towers)
    return replace(given, class_names=(), vision=vision, text=text)


@pytest.mark.parametrize("sample", [30, 200])
def test_captions_without_classes_stream_to_their_plain_scores(sample: int) -> None:
    members = [_without_classes(f"c{i}", i) for i in range(2)]
    said = "not computed: fisher_ratio .its items have no classes"
    with pytest.warns(UserWarning, match=said):
        streamed = score_streaming(members, list(STREAMED), sample=sample)
    with pytest.warns(UserWarning, match=said):
        plain = score(members, list(STREAMED), bootstrap=20, permutations=5)
    assert set(plain["metric"]) == set(streamed["metric"]) == set(STREAMED) - {"fisher_ratio"}
    read = streamed["metric"] == "dataset_accuracy_lda"  # other items are held out
    assert set(streamed[read]["tower"]) == {"vision", "text"}
    keys = ["metric", "dataset", "tower", "position", "other_tower", "other_position"]
    both = streamed[~read].merge(plain, on=keys, suffixes=("", "_plain"))
    assert len(both) == sum(~read) == 116
    np.testing.assert_allclose(both["value"], both["value_plain"], rtol=1e-5, atol=1e-6)


def test_a_dataset_of_one_class_streams_to_its_plain_scores() -> None:
    one = make_features("one", classes=1, items=120)
    names = ["fisher_ratio", "centroid_gap", "frechet_gap", "effective_rank", "cka_debiased"]
    plain, streamed = (
        make([one], names, **options)
        for make, options in ((score, {"bootstrap": 20}), (score_streaming, {"sample": 30}))
    )
    both = streamed.merge(plain, on=["metric", "tower", "position", "other_position"])
    assert len(both) == len(streamed) and set(both["metric"]) == {"centroid_gap", "effective_rank"}
    np.testing.assert_allclose(both["value_x"], both["value_y"], rtol=1e-5)
    for table in (plain, streamed):
        told = {note["metric"]: note["reason"] for note in table.attrs["refused"][::-1]}
        assert told["frechet_gap"] == "y has 1 item; at least 2 are needed"
        assert told["fisher_ratio"] == "labels name 1 class; at least 2 are needed"
    with pytest.raises(UserError, match="x has 1 item; at least 2"):
        frechet_from(Moments.of(np.ones((1, 3))), Moments.of(np.eye(3)))


def test_one_dataset_or_too_few_items_are_refused_out_loud() -> None:
    with pytest.raises(UserError, match="nothing was scored.*at least 2 are needed"):
        score_streaming(make_features(items=60), ["dataset_accuracy_lda"])
    single = make_features(items=60)
    lone = replace(single, vision=single.vision.take([0]))
    with pytest.raises(UserError, match="nothing was scored: dataset_accuracy_lda"):
        score_streaming([lone, make_features("other", number=1)], ["dataset_accuracy_lda"])


def test_small_datasets_hold_out_half_and_large_ones_the_sample() -> None:
    small, large = make_features(items=60), make_features("other", number=1, items=500)
    table = score_streaming([small, large], ["dataset_accuracy_lda"], sample=100)
    rows = table[table.tower == "vision"]
    assert set(rows["n"]) == {30 + 100}
    assert rows["options"].str.contains("fitted_on=430").all()


def test_a_constant_embedding_streams_to_exactly_chance() -> None:
    members = []
    for member in many(4):
        arrays = {"native": {"embed": np.full((60, 24), 0.1234, dtype=np.float32)}}
        members.append(replace(member, vision=replace(member.vision, arrays=arrays), text=None))
    table = score_streaming(members, ["dataset_accuracy_lda"])
    assert table["value"].tolist() == [0.25]


def test_streamed_prompts_are_scored_as_without_streaming(features: list[LayerFeatures]) -> None:
    members = features[:2]
    streamed = score_streaming(members, ["dataset_accuracy_lda"])
    plain = score(members, ["dataset_accuracy_lda"])
    columns = ["position", "value", "low", "high", "null", "n", "seed"]
    first, second = (
        t[t.tower == "text"][columns].reset_index(drop=True) for t in (streamed, plain)
    )
    pd.testing.assert_frame_equal(first, second)


def test_class_prompts_are_kept_once_and_not_summed_for_each_image(
    features: list[LayerFeatures],
) -> None:
    for member in features:
        assert member.text is not None
        sums = StreamingScores(20)
        sums.update(member)
        (kept,) = sums.datasets.values()
        towers = {"vision"} if member.text.pairs is None else {"vision", "text"}
        assert {key[0] for key in (*kept.sample, *kept.moments)} == towers


def test_streamed_agreement_with_prompts_is_that_of_class_means(
    features: list[LayerFeatures],
) -> None:
    """Not of images with the prompt of their class, which repeats: any vector agrees like that."""
    members, names = features[:2], ["cka_debiased", "cka_biased"]
    streamed, plain = score_streaming(members, names, sample=60), score(members, names)
    plain = plain[plain["tower"] != plain["other_tower"]]
    key = ["metric", "dataset", "tower", "position", "other_position"]
    both = streamed.merge(plain, on=key, suffixes=("", "_plain"))
    assert len(both) == len(streamed) == len(plain) and set(streamed["dataset"]) >= {"*"}
    for name in ("value", "low", "high", "null", "n"):
        np.testing.assert_allclose(both[name], both[f"{name}_plain"], atol=1e-6)
    assert streamed["options"].str.contains("pairs=class_means").all()


def test_streamed_gaps_are_those_of_the_features_also_with_odd_prompts() -> None:
    """Several prompts of a class, and classes without an image."""
    whole = make_features(items=60)
    assert whole.text is not None and whole.vision is not None
    twice = np.repeat(np.arange(6), 2)
    text = whole.text.take(twice)
    moved = {  # the second prompt of each class is another text
        space: {p: x + np.arange(12)[:, None] % 2 for p, x in by_position.items()}
        for space, by_position in text.arrays.items()
    }
    several = replace(whole, text=replace(text, arrays=moved, ids=tuple(map(str, range(12)))))
    fewer = whole.take_images(np.flatnonzero(whole.vision.labels < 4))
    for one in (several, replace(fewer, text=whole.text)):
        stored = score([one], ["centroid_gap", "frechet_gap"], bootstrap=20, permutations=5)
        streamed = score_streaming([one], ["centroid_gap", "frechet_gap"], sample=30)
        both = stored.merge(streamed, on=["metric", "position", "other_position"])
        assert len(both) == len(stored) == len(streamed)
        np.testing.assert_allclose(both["value_x"], both["value_y"], atol=1e-6)
        centroids = both[both.metric == "centroid_gap"]
        np.testing.assert_allclose(centroids["null_x"], centroids["null_y"])


def test_streamed_captions_are_read_out_from_their_sums() -> None:
    members = [make_features(f"c{i}", number=i, items=300, captions=1) for i in range(2)]
    table = score_streaming(members, ["dataset_accuracy_lda"], sample=80)
    text = table[table.tower == "text"].set_index("position")["value"]
    assert text["embed"] < text["1"] < text["3"]


def test_sums_say_that_they_hold_the_first_caption_of_an_image() -> None:
    member = make_features(items=60, captions=2)
    text = member.tower("text")
    first = text.take(np.unique(text.pairs, return_index=True)[1])
    alone = replace(member, text=replace(first, pairs=np.arange(60)))
    names = ["centroid_gap", "cka_debiased"]
    streamed = score_streaming([member], names, sample=30)
    pd.testing.assert_frame_equal(streamed, score_streaming([alone], names, sample=30))
    assert streamed["options"].str.contains("pairs=first_captions").all()
    stored = score([member], names, bootstrap=5, permutations=5)
    across = stored[(stored.tower == "vision") & (stored.other_tower == "text")]
    across = across.set_index("metric")["options"]
    assert across["cka_debiased"].str.contains("pairs=first_captions").all()
    assert across["centroid_gap"].str.contains("pairs=captions").all()


def test_saved_sums_that_pair_other_blocks_are_refused(tmp_path: Path) -> None:
    from vlmlayers.models.stream import _arrays, _load  # torch

    sums = StreamingScores(20)
    sums.update(
        replace(make_features(blocks=6, captions=1), text=make_features(blocks=3, captions=1).text)
    )
    (one,) = sums.datasets.values()
    np.savez(tmp_path / "sums.0.npz", **_arrays(one))
    assert _load(tmp_path / "sums.0.npz", one).cross.keys() == one.cross.keys()
    one.cross["native", "3", "1"] = one.cross.pop(("native", "3", "2"))
    np.savez(tmp_path / "sums.0.npz", **_arrays(one))
    with pytest.raises(DamagedStore, match="as an earlier version did; delete"):
        _load(tmp_path / "sums.0.npz", one)
