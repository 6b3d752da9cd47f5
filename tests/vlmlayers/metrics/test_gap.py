"""The modality gap and the geometry of one layer: definitions written out, planted truths."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
from scipy.linalg import sqrtm
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from vlmlayers.errors import UserError
from vlmlayers.metrics import (
    alignment,
    centroid_gap,
    effective_rank,
    frechet_gap,
    matched_cosine,
    mean_cosine,
    mean_cosine_centred,
    modality_auc,
    pair_distance,
    participation_ratio,
    retrieval,
    rmg,
    spectral_entropy,
    twonn,
    uniformity,
)
from vlmlayers.metrics.checks import unit_rows
from vlmlayers.metrics.gap import (
    centroid_gap_null,
    centroid_gap_weighted,
    retrieval_null,
    rmg_weighted,
)
from vlmlayers.metrics.geometry import (
    alignment_weighted,
    centred_null,
    distinct,
    mean_cosine_weighted,
    uniformity_null,
    uniformity_weighted,
)
from vlmlayers.metrics.separability import _folds, modality_auc_left_out


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture
def clouds() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(14, 6)) + 1.0, rng.normal(size=(14, 6)) - 0.5


def test_gap_by_definition(clouds) -> None:
    x, y = map(unit, clouds)
    assert centroid_gap(*clouds) == pytest.approx(np.linalg.norm(x.mean(0) - y.mean(0)))
    assert pair_distance(*clouds) == pytest.approx(
        np.mean([np.linalg.norm(a - b) for a, b in zip(x, y)])
    )
    assert matched_cosine(*clouds) == pytest.approx(np.mean([a @ b for a, b in zip(x, y)]))
    own = [
        np.mean([(1 - z[i] @ z[j]) / 2 for i in range(14) for j in range(14) if i != j])
        for z in (x, y)
    ]
    match = np.mean([(1 - a @ b) / 2 for a, b in zip(x, y)])
    assert rmg(*clouds) == pytest.approx(match / (match + sum(own) / 2))


def test_frechet_gap_by_matrix_roots(clouds) -> None:
    x, y = map(unit, clouds)
    a, b = np.cov(x.T), np.cov(y.T)
    root = sqrtm(a)
    expected = np.trace(a) + np.trace(b) - 2 * np.trace(sqrtm(root @ b @ root)).real
    assert frechet_gap(*clouds) ** 2 == pytest.approx(expected, abs=1e-9)
    assert frechet_gap(x, x) == pytest.approx(0.0, abs=1e-6)
    few = np.cov(y[:9].T)  # of a prompt per class there are fewer
    expected = np.trace(a) + np.trace(few) - 2 * np.trace(sqrtm(root @ few @ root)).real
    assert frechet_gap(x, y[:9]) ** 2 == pytest.approx(expected, abs=1e-9)


def test_rmg_has_its_two_landmarks() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(50, 8))
    assert rmg(x, x) == pytest.approx(0.0)
    strangers = [rmg(x, rng.normal(size=(50, 8))) for _ in range(20)]
    assert np.mean(strangers) == pytest.approx(0.5, abs=0.01)


def test_centroid_gap_of_one_cloud_lands_at_its_null() -> None:
    rng = np.random.default_rng(2)
    draws = [(rng.normal(size=(80, 64)), rng.normal(size=(20, 64))) for _ in range(30)]
    assert np.mean([centroid_gap(*d) for d in draws]) == pytest.approx(
        centroid_gap_null(*draws[0]), rel=0.05
    )


def test_class_prompts_pair_with_many_images() -> None:
    prompts = np.eye(3)
    labels = np.array([0, 0, 1, 2])
    images = prompts[labels]
    pairs = np.stack([np.arange(4), labels], axis=1)
    assert pair_distance(images, prompts, pairs) == pytest.approx(0.0)
    assert retrieval(images, prompts, pairs, k=1) == 1.0
    assert retrieval(prompts, images, pairs[:, ::-1], k=1) == 1.0


def test_a_query_without_a_match_is_not_asked() -> None:
    x, pairs = np.eye(3), [[0, 0], [1, 1]]
    assert retrieval(x, x[:2], pairs) == 1.0
    assert retrieval(x, x[:2], [[0, 0], [1, 0]]) == 0.5


def test_rounding_decides_between_no_equal_candidates() -> None:
    """Texts of one direction and of many lengths, whose cosines differ in their last digit."""
    x = np.random.default_rng(3).normal(size=(40, 7))
    texts = np.random.default_rng(4).normal(size=7) * np.geomspace(0.01, 90, 40)[:, None]
    assert len(np.unique(unit(texts) @ unit(x)[0])) > 1
    assert retrieval(x, texts, k=3) == pytest.approx(3 / 40)


def test_retrieval_ranks_by_hand(clouds) -> None:
    x, y = map(unit, clouds)
    for k in (1, 5, 10):
        hits = [i in np.argsort(-(y @ x[i]))[:k] for i in range(14)]
        assert retrieval(*clouds, k=k) == pytest.approx(np.mean(hits))


def test_retrieval_of_a_constant_is_chance() -> None:
    assert retrieval(np.ones((8, 2)), np.ones((8, 2)), k=2) == pytest.approx(2 / 8)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_retrieval_of_ties_is_that_of_their_random_order(k: int) -> None:
    """Equal images whose prompts have several matches each, some of which stand out."""
    labels = np.repeat(np.arange(4), 5)
    pairs = np.stack([labels, np.arange(20)], axis=1)
    prompts, images = np.ones((4, 2)), np.ones((20, 2))
    chance = retrieval_null(20, np.full(4, 5), k)
    assert retrieval(prompts, images, pairs, k=k) == pytest.approx(chance)
    images[[0, 6, 12]] = [1.0, 1.2], [1.2, 1.0], [1.0, 1.2]  # further off than the rest
    generator, shuffled = np.random.default_rng(0), []
    for _ in range(4000):  # ties broken at random
        order = np.lexsort((generator.random(20), -np.round(unit_rows(images) @ np.ones(2), 9)))
        first = labels[order[:k]]
        shuffled.append(np.mean([(first == label).any() for label in range(4)]))
    assert retrieval(prompts, images, pairs, k=k) == pytest.approx(np.mean(shuffled), abs=0.02)


def test_retrieval_null_is_hypergeometric() -> None:
    expected = np.mean([1 - comb(20 - m, 5) / comb(20, 5) for m in (1, 3)])
    assert retrieval_null(20, np.array([1, 3]), 5) == pytest.approx(expected)
    assert retrieval_null(4, np.array([1]), 10) == pytest.approx(1.0)


def test_modality_auc_sees_a_planted_gap_and_nothing_else() -> None:
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(100, 10)), rng.normal(size=(100, 10))
    assert modality_auc(x, y) == pytest.approx(0.5, abs=0.12)
    assert modality_auc(x + 2, y - 2) > 0.99
    assert modality_auc(x + 2, y - 2, dims=2) > 0.95


@pytest.mark.parametrize("which", ["centroid_gap", "rmg"])
def test_weights_of_gaps_repeat_items(clouds, which: str) -> None:
    x, y = clouds
    w = np.random.default_rng(5).integers(0, 3, 14)
    rows = np.repeat(np.arange(14), w)
    pairs = np.stack([np.arange(14)] * 2, axis=1)
    if which == "centroid_gap":
        assert centroid_gap_weighted(x, y, pairs, w[None], w[None])[0] == pytest.approx(
            centroid_gap(x[rows], y[rows])
        )
    else:  # pairs of one item with itself are left out: repeated items are not neighbours
        u, v = unit(x), unit(y)
        apart = np.array([(1 - u[i] @ v[i]) / 2 for i in range(14)])

        def inner(z: np.ndarray) -> float:
            both = np.outer(w, w) * (1 - np.eye(14))
            return float((both * (1 - z @ z.T) / 2).sum() / both.sum())

        match = (w @ apart) / w.sum()
        expected = match / (match + 0.5 * (inner(u) + inner(v)))
        assert rmg_weighted(x, y, pairs, w[None], w[None])[0] == pytest.approx(expected)


def test_a_pair_is_drawn_with_its_image_where_texts_are_prompts(clouds) -> None:
    """Two draws of images whose prompts stay: what is left out counts in no pair."""
    x, prompts = clouds[0], clouds[1][:4]
    owner = np.arange(14) % 4
    pairs = np.stack([np.arange(14), owner], axis=1)
    kept = np.flatnonzero(np.random.default_rng(6).random(14) < 0.6)
    weights = np.isin(np.arange(14), kept).astype(float)
    found = rmg_weighted(x, prompts, pairs, weights[None], np.ones((1, 4)))[0]
    left = np.stack([np.arange(len(kept)), owner[kept]], axis=1)
    assert 4 < len(kept) < 14 and found == pytest.approx(rmg(x[kept], prompts, left))


def test_bad_clouds_are_refused(clouds) -> None:
    x, y = clouds
    with pytest.raises(UserError, match="pass `pairs`"):
        pair_distance(x, y[:-1])
    with pytest.raises(UserError, match="`joint` space only"):
        rmg(x, y[:, :-1])
    with pytest.raises(UserError, match="x has 1 item; at least 2"):
        rmg(x[:1], y[:1])
    with pytest.raises(UserError, match="all images and texts coincide"):
        rmg(np.ones((3, 2)), np.ones((3, 2)))
    with pytest.raises(UserError, match="row of zeros"):
        centroid_gap(np.zeros((2, 2)), y[:, :2])
    with pytest.raises(UserError, match="one group"):
        modality_auc(x, y[:1], np.stack([np.arange(14), np.zeros(14, int)], axis=1))


@pytest.mark.parametrize(
    ("sizes", "pairs"),
    [
        ((12, 8), [(i, 2 * (i % 4) + j) for i in range(12) for j in range(2)]),  # two prompts each
        ((40, 40), [(i, i) for i in range(6)]),
        ((40, 12), [(i, 2 * i + j) for i in range(6) for j in range(2)]),
    ],
)
def test_folds_keep_together_what_matches_and_spread_what_does_not(
    sizes: tuple[int, int], pairs: list[tuple[int, int]]
) -> None:
    folds = _folds(*sizes, pairs, 4)
    assert all(folds[0][image] == folds[1][text] for image, text in pairs)
    for fold in folds:
        assert np.bincount(fold, minlength=4).min() > 0
    x, y = (np.random.default_rng(n).normal(size=(n, 5)) for n in sizes)
    assert np.isfinite(modality_auc(x, y, pairs))


def test_modality_auc_takes_no_more_components_than_the_items_span() -> None:
    x, y = np.random.default_rng(8).normal(size=(2, 4, 50))
    assert modality_auc(x, y, dims=40) == modality_auc(x, y, dims=6)


def test_spectral_measures_of_a_planted_spectrum() -> None:
    rng = np.random.default_rng(6)
    left = np.linalg.qr(rng.normal(size=(50, 4)) - 0)[0]
    left = np.linalg.qr(left - left.mean(axis=0))[0]
    x = left @ np.diag([3.0, 2.0, 1.0, 1.0]) @ np.linalg.qr(rng.normal(size=(9, 4)))[0].T
    singular = np.array([3, 2, 1, 1]) / 7
    eigen = np.array([9, 4, 1, 1]) / 15
    assert effective_rank(x + 1000) == pytest.approx(np.exp(-(singular * np.log(singular)).sum()))
    assert spectral_entropy(x) == pytest.approx(-(eigen * np.log(eigen)).sum())
    assert participation_ratio(x) == pytest.approx(1 / (eigen**2).sum())


@pytest.mark.parametrize("n", [5, 12, 40])
def test_centred_items_without_structure_point_a_little_away_from_each_other(n: int) -> None:
    rng = np.random.default_rng(n)
    values = [mean_cosine_centred(rng.normal(size=(n, 300))) for _ in range(20)]
    assert centred_null(n, 300) == pytest.approx(np.mean(values), rel=0.02)


@pytest.mark.parametrize(("n", "width"), [(60, 8), (30, 200)])
def test_modality_auc_on_components_sees_the_gap_once_its_direction_is_among_them(
    n: int, width: int
) -> None:
    """The largest spread is the same in both modalities, the second one tells them apart."""
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(2, n, width)) * 0.02
    for side, gap in ((x, 0.3), (y, -0.3)):
        side[:, 0] += gap
        side[:, 1] += rng.normal(size=n)
        side[:, 2] += 3
    assert 0.3 < modality_auc(x, y, dims=1) < 0.7
    assert modality_auc(x, y, dims=2) > 0.95


@pytest.mark.parametrize("dims", [0, 2])
@pytest.mark.parametrize("prompts", [False, True])
def test_modality_auc_without_a_fold_is_that_of_the_other_items(dims: int, prompts: bool) -> None:
    """By scikit-learn: each other fold, told by what is fitted on neither of the two."""
    rng = np.random.default_rng(6)
    x, y = rng.normal(size=(40, 6)) + 0.4, rng.normal(size=(8 if prompts else 40, 6)) - 0.4
    owner = np.arange(40) % len(y)
    pairs = np.stack([np.arange(40), owner], axis=1)
    folds = np.random.default_rng(0).permutation(len(y)) % 5
    data, told = np.vstack([unit(x), unit(y)]), np.repeat([1, 0], [40, len(y)])
    fold = np.concatenate([folds[owner], folds])
    expected = []
    for left in (*range(5), -1):  # last without none of them, which is the value itself
        parts, sizes = [], []
        for held in set(range(5)) - {left}:
            fit = (fold != left) & (fold != held)
            z = PCA(dims).fit(data[fit]).transform(data) if dims else data
            z = (z - z[fit].mean(axis=0)) / z[fit].std(axis=0)
            # Two opposite columns of weights, as in our softmax, are half as long as one.
            model = LogisticRegression(C=2.0, class_weight="balanced", tol=1e-8, max_iter=1000)
            score = model.fit(z[fit], told[fit]).decision_function(z[fold == held])
            parts.append(roc_auc_score(told[fold == held], score))
            sizes.append(int((folds[owner] == held).sum()))
        expected.append(np.average(parts, weights=sizes))
    found = modality_auc_left_out(x, y, pairs, dims=dims)
    assert found == pytest.approx(expected[:-1], abs=0.01)
    assert np.ptp(found) > 0.01
    assert modality_auc(x, y, pairs, dims=dims) == pytest.approx(expected[-1], abs=0.003)


def test_captions_of_an_image_are_held_out_together_as_images_of_a_prompt_are() -> None:
    """Images and texts change places: four of the one to each of the other, in equal folds."""
    rng = np.random.default_rng(7)
    few, many = rng.normal(size=(10, 6)) + 0.3, rng.normal(size=(40, 6)) - 0.3
    pairs = np.stack([np.repeat(np.arange(10), 4), np.arange(40)], axis=1)
    expected = modality_auc(many, few, pairs[:, ::-1])
    assert 0.5 < expected < 0.99
    assert modality_auc(few, many, pairs) == pytest.approx(expected, abs=1e-3)
    two = pairs[:8]  # of two images none is left to fit on where one is out and one held out
    assert np.isnan(modality_auc_left_out(few[:2], many[:8], two)).all()


def test_pairwise_geometry_by_loops() -> None:
    rng = np.random.default_rng(7)
    x, y = rng.normal(size=(9, 4)) + 1, np.arange(9) % 2
    u = unit(x)
    pairs = [(i, j) for i in range(9) for j in range(9) if i != j]
    assert mean_cosine(x) == pytest.approx(np.mean([u[i] @ u[j] for i, j in pairs]))
    c = unit(x - x.mean(axis=0))
    assert mean_cosine_centred(x) == pytest.approx(np.mean([c[i] @ c[j] for i, j in pairs]))
    squares = {p: ((u[p[0]] - u[p[1]]) ** 2).sum() for p in pairs}
    assert uniformity(x) == pytest.approx(
        np.log(np.mean([np.exp(-2 * s) for s in squares.values()]))
    )
    same = [squares[p] for p in pairs if y[p[0]] == y[p[1]]]
    assert alignment(x, y) == pytest.approx(np.mean(same))


def test_weights_of_geometry_skip_an_item_with_itself() -> None:
    rng = np.random.default_rng(8)
    x, y, w = rng.normal(size=(9, 4)), np.arange(9) % 2, rng.integers(0, 3, 9)
    u = unit(x)
    both = np.outer(w, w) * (1 - np.eye(9))
    squares = ((u[:, None] - u[None]) ** 2).sum(axis=2)
    assert mean_cosine_weighted(x, w[None])[0] == pytest.approx(
        (both * (u @ u.T)).sum() / both.sum()
    )
    assert uniformity_weighted(x, w[None])[0] == pytest.approx(
        np.log((both * np.exp(-2 * squares)).sum() / both.sum())
    )
    same = both * (y[:, None] == y[None])
    assert alignment_weighted(x, y, w[None])[0] == pytest.approx(
        (same * squares).sum() / same.sum()
    )


@pytest.mark.parametrize("width", [1, 2, 3, 8, 100])
def test_uniform_directions_land_at_the_null(width: int) -> None:
    x = np.random.default_rng(9).normal(size=(800, width))
    assert uniformity(x) == pytest.approx(uniformity_null(800, width), abs=0.02)


@pytest.mark.parametrize("dimension", [2, 5])
def test_twonn_recovers_a_planted_dimension(dimension: int) -> None:
    rng = np.random.default_rng(10)
    plane = rng.uniform(size=(800, dimension)) @ rng.normal(size=(dimension, 30))
    assert twonn(plane) == pytest.approx(dimension, rel=0.15)


def test_twonn_counts_from_one() -> None:
    x = np.random.default_rng(11).normal(size=(20, 4))
    nearest = np.sort(np.linalg.norm(x[:, None] - x[None], axis=2), axis=1)
    ratio = np.sort(np.log(nearest[:, 2] / nearest[:, 1]))[:18]
    height = -np.log(1 - np.arange(1, 19) / 20)
    assert twonn(x) == pytest.approx(ratio @ height / (ratio @ ratio))


@pytest.mark.parametrize("jitter", [0.0, 1e-12, 1e-9, 1e-7, 1e-6])
def test_twonn_counts_items_that_coincide_up_to_rounding_once(jitter: float) -> None:
    rng = np.random.default_rng(12)
    x = rng.normal(size=(40, 4))
    near = x[:25] + jitter * rng.normal(size=(25, 4))
    assert twonn(np.vstack([x, near, near[:10]])) == pytest.approx(twonn(x))
    with pytest.raises(UserError, match="9 distinct items; TwoNN needs at least 10"):
        twonn(np.vstack([x[:9], near[:9]]))


@pytest.mark.parametrize(("size", "offset"), [(1.0, 0.0), (1000.0, 0.0), (1.0, 1000.0)])
def test_items_apart_by_more_than_rounding_are_distinct(size: float, offset: float) -> None:
    """Whatever the scale and the mean: by 1/20000 of the spread, not by a millionth."""
    x = np.random.default_rng(14).normal(size=(40, 4))
    for apart, expected in ((1e-4, 80), (2e-6, 40)):
        both = np.vstack([x, x + [apart, 0, 0, 0]])
        assert len(distinct(size * both + offset)) == expected
    assert twonn(x[:10]) > 0


def test_directions_without_spread_count_for_nothing() -> None:
    """Rounding leaves hundreds of them a little each."""
    left, right = (np.linalg.qr(np.random.default_rng(s).normal(size=(400, 4)))[0] for s in (1, 2))
    left = np.linalg.qr(left - left.mean(axis=0))[0]
    assert effective_rank(left @ right.T) == pytest.approx(4.0, abs=1e-9)


def test_twonn_may_use_every_item_with_a_finite_height() -> None:
    x = np.random.default_rng(13).normal(size=(40, 4))
    assert np.isfinite(twonn(x, discard=0.0)) and np.isfinite(twonn(x[:10], discard=0.9))
    with pytest.raises(UserError, match="twonn: discard takes a number from 0 to 0.9, not 1.0"):
        twonn(x, discard=1.0)


def test_degenerate_geometry_is_refused() -> None:
    same = np.full((30, 3), 7.7, dtype=np.float32)
    for function in (
        effective_rank,
        participation_ratio,
        spectral_entropy,
        mean_cosine_centred,
        twonn,
    ):
        with pytest.raises(UserError, match="same features"):
            function(same)
    with pytest.raises(UserError, match="TwoNN needs at least 10"):
        twonn(np.eye(5))
    with pytest.raises(UserError, match="no class has two items"):
        alignment(np.eye(3), [0, 1, 2])
    with pytest.raises(UserError, match="at least 2"):
        mean_cosine(np.ones((1, 3)))
