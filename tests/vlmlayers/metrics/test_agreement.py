"""Agreement: published numbers, brute-force definitions, and the traps that METRICS names."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import orthogonal_procrustes
from scipy.spatial.distance import pdist
from scipy.stats import spearmanr

from vlmlayers.errors import UserError
from vlmlayers.metrics import calibrated, cka, cka_matrix, mutual_knn, procrustes, rsa
from vlmlayers.metrics.agreement import shape_angles, shapes
from vlmlayers.metrics.cka_matrix import cheaper_form
from vlmlayers.metrics.moments import CrossMoments, Moments, cka_from


@pytest.fixture(scope="module")
def published() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.RandomState(1337)
    x = random.randn(100, 10)
    return x, random.randn(100, 10) + x


@pytest.mark.parametrize("form", ["gram", "feature"])
def test_published_cka(published, form: str) -> None:
    assert cka(*published, debiased=False, form=form) == pytest.approx(0.55761, abs=5e-6)
    assert cka(*published, debiased=True, form=form) == pytest.approx(0.51346, abs=5e-6)


def test_published_rbf_cka(published) -> None:
    assert cka(*published, debiased=False, kernel="rbf") == pytest.approx(0.65483, abs=5e-6)


def _unbiased_hsic(k: np.ndarray, m: np.ndarray) -> float:
    """Song et al.'s estimator, written as in METRICS with explicit sums."""
    n = len(k)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    one = np.ones(n)
    return (
        np.trace(k @ m)
        + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
        - 2 / (n - 2) * (one @ k @ m @ one)
    ) / (n * (n - 3))


@pytest.mark.parametrize("n", [4, 7, 30])
@pytest.mark.parametrize("form", ["gram", "feature"])
def test_debiased_cka_is_the_ratio_of_unbiased_hsic(n: int, form: str) -> None:
    rng = np.random.default_rng(n)
    x, y = rng.normal(size=(n, 9)) + 3, rng.normal(size=(n, 5))
    k, m = x @ x.T, y @ y.T
    expected = _unbiased_hsic(k, m) / np.sqrt(_unbiased_hsic(k, k) * _unbiased_hsic(m, m))
    assert cka(x, y, form=form) == pytest.approx(expected, abs=1e-10)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(4, 40), st.integers(1, 30), st.integers(1, 30), st.booleans(), st.integers(0, 99)
)
def test_both_forms_of_cka_agree(n: int, a: int, b: int, debiased: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, a)), rng.normal(size=(n, b))
    forms = [cka(x, y, debiased=debiased, form=form) for form in ("gram", "feature")]
    assert forms[0] == pytest.approx(forms[1], abs=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_items_that_are_all_equally_far_apart_agree_with_nothing(seed: int) -> None:
    """Whatever the form: of unbiased HSIC there is nothing left but rounding."""
    rng = np.random.default_rng(seed)
    n = 4 + 3 * seed
    x = np.linalg.qr(rng.normal(size=(n + 5, n + 5)))[0][:n] * 37.3 + rng.normal(size=n + 5)
    y = rng.normal(size=(n, 5))
    for function in (cka, rsa):
        with pytest.raises(UserError, match="all items are equally similar"):
            function(x, y, **({"form": "gram"} if function is cka else {}))
    with pytest.raises(UserError, match="equally far apart"):
        cka(x, y, form="feature")
    for form in ("gram", "feature"):
        with pytest.raises(UserError, match="equally similar|no agreement with themselves"):
            cka_matrix([x], [y], form=form)
    with pytest.raises(UserError, match="equally far apart"):
        cka_from(Moments.of(x), Moments.of(y), CrossMoments.of(x, y))


def test_unrelated_features_show_why_debiasing_matters() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, 768)), rng.normal(size=(32, 512))
    assert cka(x, y, debiased=False) > 0.9
    assert abs(cka(x, y)) < 0.1


def test_debiased_cka_is_not_clamped() -> None:
    rng = np.random.default_rng(1)
    values = [cka(rng.normal(size=(20, 50)), rng.normal(size=(20, 50))) for _ in range(20)]
    assert min(values) < 0.0


def test_a_large_offset_in_float32_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 20))
    y = x @ rng.normal(size=(20, 15))
    shifted = (x + 1000).astype(np.float32)
    for form in ("gram", "feature"):
        assert cka(shifted, y, form=form) == pytest.approx(cka(x, y), abs=1e-4)


def test_feature_form_never_makes_a_matrix_of_items(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmlayers.metrics import agreement

    def refuse(*_: object) -> None:
        raise AssertionError("an n × n kernel was formed")

    monkeypatch.setattr(agreement, "linear_kernel", refuse)
    rng = np.random.default_rng(0)
    assert np.isfinite(cka(rng.normal(size=(300, 20)), rng.normal(size=(300, 10))))


def test_mutual_knn_counts_common_neighbours() -> None:
    rng = np.random.default_rng(2)
    x, y, k = rng.normal(size=(25, 6)), rng.normal(size=(25, 4)), 5

    def near(z: np.ndarray, i: int) -> set[int]:
        cosine = z @ z[i] / np.linalg.norm(z, axis=1)
        return set(sorted((j for j in range(len(z)) if j != i), key=lambda j: -cosine[j])[:k])

    expected = np.mean([len(near(x, i) & near(y, i)) / k for i in range(25)])
    assert mutual_knn(x, y, k=k) == pytest.approx(expected)
    assert mutual_knn(x, x, k=k) == pytest.approx(1.0)
    # Of all others, any two layers would share all: half of them is the most.
    assert mutual_knn(x, y, k=24) == mutual_knn(x, y, k=12) < 0.8


def test_mutual_knn_of_unrelated_features_lands_at_its_null() -> None:
    rng = np.random.default_rng(3)
    values = [mutual_knn(rng.normal(size=(60, 9)), rng.normal(size=(60, 9))) for _ in range(30)]
    assert np.mean(values) == pytest.approx(10 / 59, abs=0.01)


def test_tied_neighbours_are_shared_and_the_row_order_breaks_no_tie() -> None:
    """Two values of each feature: half of the others tie for ten places on either side."""
    rng = np.random.default_rng(4)
    values, moved = [], []
    for _ in range(10):
        x, y = (np.eye(2)[rng.permutation(100) % 2] + 0.5 for _ in range(2))
        values.append(mutual_knn(x, y))
        order = rng.permutation(100)
        moved.append(mutual_knn(x[order], y[order]))
    assert values == pytest.approx(moved, abs=1e-12)
    assert np.mean(values) == pytest.approx(10 / 99, abs=0.005)  # of chance


@pytest.mark.parametrize("k", [1, 3, 5])
def test_tied_neighbours_count_as_if_ties_were_broken_at_random(k: int) -> None:
    rng = np.random.default_rng(k)
    x, y = (np.repeat(rng.normal(size=(7, 4)), 2, axis=0)[rng.permutation(14)] for _ in range(2))
    broken = [
        mutual_knn(*(z + 1e-6 * rng.normal(size=z.shape) for z in (x, y)), k=k) for _ in range(3000)
    ]
    assert mutual_knn(x, y, k=k) == pytest.approx(np.mean(broken), abs=0.01)


def test_half_precision_is_read_as_its_numbers() -> None:
    """Squares of 300 leave the range of float16."""
    rng = np.random.default_rng(2)
    x, y = ((300 * rng.normal(size=(40, 6))).astype(np.float16) for _ in range(2))
    assert mutual_knn(x, y) == mutual_knn(x.astype(float), y.astype(float))


def test_rsa_is_spearman_of_distances() -> None:
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(20, 6)), rng.normal(size=(20, 3))
    assert rsa(x, y) == pytest.approx(spearmanr(pdist(x), pdist(y)).statistic, abs=1e-10)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(5, 12))
def test_procrustes_obeys_the_triangle_inequality(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    sets = [rng.normal(size=(n, int(rng.integers(2, 15)))) for _ in range(3)]
    sides = {pair: procrustes(sets[pair[0]], sets[pair[1]]) for pair in combinations(range(3), 2)}
    a, b, c = sides.values()
    assert a <= b + c + 1e-9 and b <= a + c + 1e-9 and c <= a + b + 1e-9


def test_procrustes_undoes_a_planted_rotation() -> None:
    rng = np.random.default_rng(5)
    x = rng.normal(size=(30, 8))
    rotation = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    assert procrustes(x, 3 * x @ rotation + 7) == pytest.approx(0.0, abs=1e-6)


def test_procrustes_of_all_positions_is_that_of_each_pair() -> None:
    rng = np.random.default_rng(0)
    xs = [rng.normal(size=(12, width)) + 3.0 for width in (4, 12, 60)]
    ys = [rng.normal(size=(12, width)) for width in (5, 11)]
    angles = shape_angles(shapes(xs), shapes(ys))
    # A second route: the rotation that scipy finds leaves a residual of 2 − 2 cos(angle).
    for i, x in enumerate(xs):
        for j, y in enumerate(ys):
            a, b = (np.pad(z - z.mean(axis=0), ((0, 0), (0, 60 - z.shape[1]))) for z in (x, y))
            a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
            rotation, _ = orthogonal_procrustes(a, b)
            residual = np.square(a @ rotation - b).sum()
            assert residual == pytest.approx(2 - 2 * np.cos(angles[i, j]), abs=1e-9)
    made = shapes(xs)
    whole, half = shape_angles(made, made), shape_angles(made, made, half=True)
    np.testing.assert_allclose(half, whole, atol=1e-7)


def test_equal_distances_share_their_rank() -> None:
    # Corners of a square and of a rectangle: every distance occurs more than once.
    square = np.array([[0, 0], [0, 1], [1, 0], [1, 1], [0.5, 0.5]], dtype=float)
    other = square * [1.0, 3.0]
    expected = spearmanr(pdist(square), pdist(other)).statistic
    assert rsa(square, other) == pytest.approx(expected)


def test_rounding_orders_no_equal_distances() -> None:
    """Three values of a feature, as a token's position at `embed`: distances are of four kinds."""
    rng = np.random.default_rng(8)
    x, y = rng.normal(size=(3, 12))[rng.integers(3, size=24)], rng.normal(size=(24, 6))
    expected = spearmanr(pdist(x).round(9), pdist(y)).statistic
    assert rsa(x, y) == pytest.approx(expected, abs=1e-9)
    assert rsa(x + 5.0, y) == pytest.approx(expected, abs=1e-9)


def test_calibration_puts_chance_at_zero_and_identity_at_one() -> None:
    shuffled = np.array([0.2, 0.2, 1.1])  # whose mean is chance, not what is in their middle
    assert calibrated(np.array([0.5, 1.0]), shuffled[:, None], 1.0) == pytest.approx([0.0, 1.0])


@pytest.mark.parametrize("function", [cka, mutual_knn, rsa, procrustes])
def test_bad_pairs_are_refused(function) -> None:
    x = np.random.default_rng(0).normal(size=(10, 3))
    if function in (cka, rsa):
        with pytest.raises(UserError, match="x has 3 items; at least 4"):
            function(x[:3], x[:3])
    with pytest.raises(UserError, match="rows must be paired"):
        function(x, x[:9])
    with pytest.raises(UserError, match="at least"):
        function(x[:2], x[:2])
    with pytest.raises(UserError, match="same features for all 10 items"):
        function(x, np.full((10, 3), 1000.1, dtype=np.float32))
    with pytest.raises(UserError, match="NaN or Inf, first at item 3, column 1"):
        bad = x.copy()
        bad[3, 1] = np.inf
        function(x, bad)
    with pytest.raises(UserError, match="expected \\(item, width\\)"):
        function(x[:, 0], x)


def test_unknown_forms_are_named() -> None:
    x = np.eye(5)
    with pytest.raises(UserError, match="unknown kernel 'linaer'; did you mean 'linear'"):
        cka(x, x, kernel="linaer")
    with pytest.raises(UserError, match="unknown form 'grams'; did you mean 'gram'"):
        cka(x, x, form="grams")
    with pytest.raises(UserError, match="half of all pairs"):
        cka(np.vstack([np.zeros((9, 2)), np.ones((1, 2))]), np.eye(10), kernel="rbf")
    for seed in range(4):  # what rounding leaves between equal items is no width
        rng = np.random.default_rng(seed)
        x, y = rng.normal(size=(3, 40))[[0] * 15 + [1] * 3 + [2] * 2], rng.normal(size=(20, 5))
        with pytest.raises(UserError, match="half of all pairs"):
            cka(x, y, kernel="rbf")


@pytest.mark.parametrize("form", ["gram", "feature"])
@pytest.mark.parametrize("debiased", [True, False])
def test_the_matrix_of_layers_holds_the_cka_of_each_pair(form: str, debiased: bool) -> None:
    rng = np.random.default_rng(6)
    xs = [(rng.normal(size=(50, d)) + 100).astype(np.float32) for d in (7, 80)]
    ys = [xs[0], xs[1] @ rng.normal(size=(80, 6)), rng.normal(size=(50, 5))]
    expected = [[cka(x, y, debiased=debiased) for y in ys] for x in xs]
    found = cka_matrix(xs, ys, debiased=debiased, form=form, block=16)
    assert found == pytest.approx(np.array(expected), abs=1e-6)
    lists = [[z.tolist() for z in side] for side in (xs, ys)]
    assert cka_matrix(*lists, debiased=debiased, form=form) == pytest.approx(found)
    tensors = [[torch.tensor(z, requires_grad=True) for z in side] for side in (xs, ys)]
    assert cka_matrix(*tensors, debiased=debiased, form=form) == pytest.approx(found)
    for wrong in (xs[0], [], [xs[0][0]]):
        with pytest.raises(UserError, match="two lists of layers"):
            cka_matrix(wrong, ys, form=form)


def test_an_option_of_the_other_kernel_is_refused() -> None:
    x = np.random.default_rng(0).normal(size=(9, 3))
    for options, name in (
        ({"sigma": 0.4}, "sigma"),
        ({"kernel": "rbf", "form": "feature"}, "form"),
    ):
        with pytest.raises(UserError, match=f"{name}.* leave it out"):
            cka(x, x, **options)


def test_the_cheaper_form_is_chosen() -> None:
    layers = [768] * 12, [512] * 12
    assert cheaper_form(1_000, *layers) == "gram"
    assert cheaper_form(50_000, *layers) == "feature"
    # Fewer operations, but 150 GB of Gram matrices.
    assert cheaper_form(20_000, [4096] * 24, [4096] * 24) == "feature"
    x = np.random.default_rng(7).normal(size=(40, 3))
    assert cka_matrix([x], [x])[0, 0] == pytest.approx(1.0)


def test_within_a_tower_each_layer_is_read_once() -> None:
    class Stored:
        """A layer on a disk."""

        shape, reads = (20, 3), 0

        def __len__(self) -> int:
            return 20

        def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
            self.reads += 1
            return np.random.default_rng(9).normal(size=self.shape)

    layer = Stored()
    cka_matrix([layer], [layer], form="gram")
    assert layer.reads == 1
    cka_matrix([layer], [Stored()], form="gram")
    assert layer.reads == 2


def test_bad_layers_are_refused() -> None:
    x = np.random.default_rng(8).normal(size=(20, 3))
    with pytest.raises(UserError, match=r"layers have \[19, 20\] items"):
        cka_matrix([x], [x[:19]])
    with pytest.raises(UserError, match="3 items; at least 4"):
        cka_matrix([x[:3]], [x[:3]])
    for form in ("gram", "feature"):
        with pytest.raises(UserError, match="are the same"):
            cka_matrix([x], [np.full((20, 3), 1000.1)], form=form)
        with pytest.raises(UserError, match="NaN or Inf"):
            cka_matrix([x], [np.where(np.eye(20, 3) > 0, np.nan, x)], form=form)
