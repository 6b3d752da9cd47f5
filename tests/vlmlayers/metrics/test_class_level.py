"""Discriminability: scikit-learn as the second route, planted classes, degenerate input."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.covariance import LedoitWolf, ledoit_wolf_shrinkage
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import silhouette_score
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

from vlmlayers.errors import UserError
from vlmlayers.metrics import (
    METRICS,
    balanced_accuracy,
    checks,
    fisher_ratio,
    h_score,
    k_nearest,
    lda_criterion,
    logistic,
    logme,
    nearest_mean,
    neighbourhood_overlap,
    normalised_accuracy,
    silhouette,
    transfer_predict,
    zero_shot_accuracy,
)
from vlmlayers.metrics.class_level import (
    fisher_null,
    reduce_rows,
    same_label_null,
)
from vlmlayers.metrics.gap import retrieval_hits
from vlmlayers.metrics.moments import shrinkage_of
from vlmlayers.metrics.readouts import (
    C_GRID,
    _best_c,
    logistic_logits,
    logistic_of_parts,
    normalised,
)
from vlmlayers.metrics.regression import balanced_weights
from vlmlayers.metrics.separability import modality_auc_left_out
from vlmlayers.metrics.transfer import discriminant, within_scatter
from vlmlayers.metrics.transferability import logme_relabelled

LABELLED = [fisher_ratio, lda_criterion, silhouette, h_score, logme, neighbourhood_overlap]


def planted(n: int = 90, width: int = 12, classes: int = 5, gap: float = 1.5, seed: int = 0):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    return rng.normal(size=(n, width)) + gap * rng.normal(size=(classes, width))[y], y


@pytest.mark.parametrize(("n", "width"), [(90, 12), (40, 100)])
def test_logistic_regression_finds_the_optimum_of_scikit_learn(n: int, width: int) -> None:
    x, y = planted(n, width)
    other = planted(n, width, seed=0)[0] + 0.1
    ours = logistic_logits([(x, y, [other])], classes=5)[0][0]
    scaled, other = normalised(x, other)
    for i, c in enumerate(C_GRID):
        model = LogisticRegression(C=c, max_iter=2000, tol=1e-8).fit(scaled, y)
        shares = np.exp(ours[i] - ours[i].max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        assert shares == pytest.approx(model.predict_proba(other), abs=0.02)


def test_unequal_classes_weigh_the_same() -> None:
    x, y = planted(120, 6, 2, gap=0.5)
    kept = (y == 0) | (np.arange(120) < 30)
    x, y = x[kept], y[kept]
    ours = logistic_logits([(x, y, [x])], classes=2, c_grid=(0.1,))[0][0][0]
    scaled = normalised(x)[0]
    # Two opposite weight vectors of half the length cost half: C of the binary form is doubled.
    model = LogisticRegression(C=0.2, class_weight="balanced", tol=1e-8).fit(scaled, y)
    assert ours[:, 1] - ours[:, 0] == pytest.approx(model.decision_function(scaled), abs=5e-3)


def test_read_outs_predict_as_scikit_learn_does() -> None:
    x, y = planted(gap=0.8)
    other, _ = planted(gap=0.8, seed=1)
    scaled, other_scaled = normalised(x, other)
    assert (
        nearest_mean(x, y, x, y, other, classes=5)
        == NearestCentroid().fit(scaled, y).predict(other_scaled)
    ).all()
    one = KNeighborsClassifier(1, metric="cosine").fit(scaled, y)
    assert (k_nearest(x, y, x, y, other, classes=5, k=1) == one.predict(other_scaled)).all()
    shrunk = LinearDiscriminantAnalysis(
        solver="lsqr", covariance_estimator=_Within(within_scatter(x, y))
    ).fit(x, y)
    assert (discriminant(x, y, x, y, other, classes=5) == shrunk.predict(other)).all()


def test_what_is_computed_in_parts_is_as_from_the_whole(monkeypatch) -> None:
    """Of 50,000 items, or of a thousand classes, not all fits into memory at once."""
    x, y = planted(gap=0.8)
    other, _ = planted(gap=0.8, seed=1)
    shuffled = np.stack([y, np.roll(y, 3), y[::-1]])

    def found() -> tuple[np.ndarray, ...]:
        votes = k_nearest(x, y, x, y, other, classes=5, k=3)
        apart = modality_auc_left_out(x, other + 0.3, None)
        hits = retrieval_hits(x, other, np.stack([np.arange(90) // 3, np.arange(90)], axis=1))
        return votes, logme_relabelled(x, shuffled), apart, hits

    whole = found()
    assert 1000 * len(x) < checks.AT_ONCE
    monkeypatch.setattr(checks, "AT_ONCE", 3 * len(x))
    monkeypatch.setattr(checks, "SMALL", 0)
    for one, of_parts in zip(whole, found()):
        assert of_parts == pytest.approx(one, rel=1e-9)


def test_the_order_of_items_that_tie_decides_no_vote() -> None:
    """Few distinct rows: what is tenth of many equal ones is a matter of order."""
    rng = np.random.default_rng(7)
    kinds = rng.normal(size=(6, 4))
    rows, y = rng.integers(0, 6, 150), rng.integers(0, 3, 150)
    first = k_nearest(kinds[rows], y, kinds, y, kinds, classes=3)
    for _ in range(20):
        order = rng.permutation(150)
        again = k_nearest(kinds[rows][order], y[order], kinds, y, kinds, classes=3)
        assert (again == first).all()
    # All ten places go to items of its own kind, whose classes share them by what they are of all.
    shares = np.stack([np.bincount(y[rows == one], minlength=3) for one in range(6)])
    assert shares.sum(axis=1).min() > 10
    assert (first == (shares / np.bincount(y)).argmax(axis=1)).all()


def test_of_classes_with_equal_votes_the_nearer_neighbours_win() -> None:
    fit, y = np.array([[1, 0], [-1, 0], [0, 1], [0, -1]]), [0, 0, 1, 1]
    asked = [[2, 1], [1, 2], [-1, 2], [-2, -1]]  # one of the two nearest is of either class
    found = k_nearest(fit, y, fit, y, asked, classes=2, k=2, normalise="none")
    assert found.tolist() == [0, 1, 1, 0]


class _Within:
    """Hands scikit-learn's LDA one covariance for every class, shrunk by scikit-learn."""

    def __init__(self, scatter) -> None:
        self.scatter = scatter

    def fit(self, x: np.ndarray) -> _Within:
        width = x.shape[1]
        data, y = planted(gap=0.8)
        within = data - np.stack([data[y == c].mean(axis=0) for c in range(5)])[y]
        self.covariance_ = LedoitWolf(assume_centered=True).fit(within).covariance_
        assert self.covariance_.shape == (width, width)
        return self


def test_c_is_chosen_on_the_validation_part() -> None:
    x, y = planted(60, 40, 2, gap=0.2)
    val, val_y = planted(60, 40, 2, gap=0.2, seed=0)
    val = val + np.random.default_rng(9).normal(size=val.shape)
    logits = logistic_logits([(x, y, [val, x])], classes=2)[0]
    accuracy = [(part.argmax(axis=1) == val_y).mean() for part in logits[0]]
    chosen = logistic(x, y, val, val_y, x, classes=2)
    best = [i for i, value in enumerate(accuracy) if value == max(accuracy)]
    assert any((logits[1][i].argmax(axis=1) == chosen).all() for i in best)


def test_the_strength_is_chosen_by_classes_that_weigh_the_same() -> None:
    """One calls all nine items of the large class right, one five of them and the other."""
    labels = np.array([0] * 9 + [1])
    said = np.array([[0] * 10, [0] * 5 + [1] * 5])
    assert _best_c(np.eye(2)[said], labels, 2) == 1


def test_regressions_fitted_side_by_side_are_those_fitted_alone() -> None:
    """Of different sizes and ranks, some with fewer items than columns, some that end early."""
    rng = np.random.default_rng(4)
    parts = []
    for n, spread in ((12, 0.1), (30, 1.0), (45, 3.0), (31, 0.0)):
        y = np.arange(n) % 3
        x = rng.normal(size=(n, 20)) + spread * rng.normal(size=(3, 20))[y]
        parts.append((x, y, x[:9] + 0.5, y[:9], rng.normal(size=(15, 20))))
    together = logistic_of_parts(parts, classes=3)
    for part, found in zip(parts, together):
        assert np.array_equal(found, logistic(*part, classes=3))
    fits = [(x, y, [x, other]) for x, y, _, _, other in parts]
    for fit, (own, other) in zip(fits, logistic_logits(fits, classes=3)):
        alone = logistic_logits([fit], classes=3)[0]
        assert own == pytest.approx(alone[0], abs=1e-9)
        assert other == pytest.approx(alone[1], abs=1e-9)


@pytest.mark.parametrize("readout", [logistic, nearest_mean, k_nearest, discriminant])
def test_a_constant_predicts_one_class(readout) -> None:
    x, y = np.full((30, 8), 1000.3, dtype=np.float32), np.arange(30) % 3
    noise = 1e-4 * np.random.default_rng(0).normal(size=(2, 30, 8)).astype(np.float32)
    assert len(np.unique(readout(x + noise[0], y, x, y, x + noise[1], classes=3))) == 1


def test_fisher_ratio_from_scatter_matrices() -> None:
    x, y = planted(40, 60)
    means = np.stack([x[y == c].mean(axis=0) for c in range(5)])
    within = ((x - means[y]) ** 2).sum()
    between = sum((y == c).sum() * ((means[c] - x.mean(axis=0)) ** 2).sum() for c in range(5))
    assert fisher_ratio(x + 1000, y) == pytest.approx(between / within)


def test_silhouette_is_that_of_scikit_learn() -> None:
    x, y = planted()
    y[0] = 17  # a class of one
    assert silhouette(x, y) == pytest.approx(silhouette_score(x, y))


def test_shrinkage_is_that_of_scikit_learn() -> None:
    for n, width in ((30, 80), (80, 30)):
        x = planted(n, width)[0]
        x = x - x.mean(axis=0)
        expected = ledoit_wolf_shrinkage(x, assume_centered=True)
        for rows in (x, reduce_rows(x)):
            fourth = (np.linalg.norm(rows, axis=1) ** 4).sum()
            found, _ = shrinkage_of(rows.T @ rows / n, n, fourth, width)
            assert found == pytest.approx(expected)


@pytest.mark.parametrize(("n", "width"), [(40, 60), (80, 10)])
def test_lda_and_h_score_from_explicit_inverses(n: int, width: int) -> None:
    x, y = planted(n, width)
    x = x - x.mean(axis=0)
    means = np.stack([x[y == c].mean(axis=0) for c in range(5)])[y]
    between = means.T @ means / n
    for function, about in ((lda_criterion, x - means), (h_score, x)):
        covariance = LedoitWolf(assume_centered=True).fit(about).covariance_
        expected = np.trace(np.linalg.inv(covariance) @ between)
        assert function(x, y) == pytest.approx(expected)
        assert function(reduce_rows(x), y, width=width) == pytest.approx(expected)


@pytest.mark.parametrize(("n", "width"), [(30, 50), (60, 8)])
def test_logme_reaches_the_maximum_of_the_evidence(n: int, width: int) -> None:
    x, y = planted(n, width, 2)
    x = x - x.mean(axis=0)
    target = (y == 0) - (y == 0).mean()
    # An intercept takes one direction of the items: n − 1 observations beside the constant one.
    basis = np.linalg.qr(np.column_stack([np.ones(n), np.eye(n)[:, 1:]]))[0][:, 1:]
    x_in, target_in = basis.T @ x, basis.T @ target

    def negative_evidence(log: np.ndarray) -> float:
        log = np.clip(log, -15, 15)
        covariance = np.exp(-log[1]) * np.eye(n - 1) + np.exp(-log[0]) * x_in @ x_in.T
        _, log_det = np.linalg.slogdet(covariance)
        data = target_in @ np.linalg.solve(covariance, target_in)
        return 0.5 * (log_det + data + (n - 1) * np.log(2 * np.pi)) / (n - 1)

    starts = [
        minimize(negative_evidence, start, method="Nelder-Mead").fun
        for start in ([0.0, 0.0], [3.0, 1.0])
    ]
    assert logme(x, y) == pytest.approx(-min(starts), abs=1e-3)


def test_logme_of_features_that_say_nothing_is_that_of_no_features() -> None:
    """Orthogonal to the labels, so that the best head has no weights: a normal density is left."""
    y = np.arange(40) % 2
    target = (y == 0) - 0.5
    x = np.random.default_rng(3).normal(size=(40, 6))
    x = x - x.mean(axis=0)
    x -= np.outer(target, target @ x) / (target @ target)
    variance = (target @ target) / 39
    assert logme(x, y) == pytest.approx(-0.5 * (np.log(2 * np.pi * variance) + 1), abs=1e-6)


def test_logme_reads_directions_in_any_order() -> None:
    """Rotated features come with the largest direction last, principal components with it first."""
    y = np.arange(40) % 3
    rows = np.random.default_rng(4).normal(size=(40, 6)) + np.eye(6)[y] * 2
    axes = np.linalg.qr(rows - rows.mean(axis=0))[0] * np.geomspace(1e4, 1e-4, 6)
    assert logme(axes, y) == pytest.approx(logme(axes[:, ::-1], y), abs=1e-9)


def test_logme_is_not_fooled_by_a_missing_label_id() -> None:
    x, y = planted()
    assert logme(x, y * 10) == pytest.approx(logme(x, y))


def test_neighbourhood_overlap_by_counting() -> None:
    x, y = planted(30)
    u = x / np.linalg.norm(x, axis=1, keepdims=True)
    shares = []
    for i in range(30):
        order = [j for j in np.argsort(-(u @ u[i])) if j != i][:4]
        shares.append(np.mean(y[order] == y[i]))
    assert neighbourhood_overlap(x, y, k=4) == pytest.approx(np.mean(shares))


@pytest.mark.parametrize("sizes", [(9, 3), (3, 9)])
def test_neighbourhood_overlap_of_a_constant_is_that_of_any_others(sizes: tuple[int, int]) -> None:
    """Whatever the order of the rows, of which the first ones would be taken."""
    y = np.repeat([0, 1], sizes)
    others = np.mean([(np.sum(y == label) - 1) / 11 for label in y])
    assert neighbourhood_overlap(np.ones((12, 4)), y, k=4) == pytest.approx(others)
    # One place left for two equal items, of which one has the label: half of it.
    x = np.array([[1.0, 0.0], [1.0, 0.1], [1.0, -0.1], [0.0, 1.0]])
    assert neighbourhood_overlap(x, [0, 0, 1, 1], k=1) == pytest.approx((0.5 + 1) / 4)


def test_with_all_others_as_neighbours_overlap_is_chance() -> None:
    x, _ = planted(12)
    y = np.repeat([0, 1, 2], [6, 4, 2])
    expected = np.mean([np.mean(np.delete(y, i) == y[i]) for i in range(12)])
    assert neighbourhood_overlap(x, y, k=99) == pytest.approx(expected)
    assert same_label_null(12, y) == pytest.approx(expected)


def test_the_fisher_ratio_of_shuffled_labels_is_its_null() -> None:
    rng, y = np.random.default_rng(5), np.repeat([0, 1, 2], [8, 8, 4])
    x = rng.normal(size=(20, 30))
    found = [fisher_ratio(x, rng.permutation(y)) for _ in range(300)]
    assert fisher_null(20, y) == pytest.approx(np.mean(found), rel=0.05)


def test_zero_shot_is_exactly_chance_for_a_constant() -> None:
    prompts = np.eye(4)
    same = np.random.default_rng(1).normal(size=4) * np.geomspace(0.01, 90, 4)[:, None]
    images = np.random.default_rng(2).normal(size=(40, 4))
    # Prompts of one direction, whose cosines differ by rounding.
    assert zero_shot_accuracy(images, same, np.arange(40) % 4) == pytest.approx(0.25)
    assert zero_shot_accuracy(np.ones((8, 4)), prompts, np.arange(8) % 4) == pytest.approx(0.25)
    assert zero_shot_accuracy(prompts[[0, 1, 2]], prompts, [0, 1, 3]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("readout", [nearest_mean, transfer_predict])
def test_a_class_without_an_item_to_learn_it_from_is_refused(readout) -> None:
    """Its mean would lie at the centre, nearest to items that lie there."""
    x, y = planted(30, classes=3)
    middle = x.mean(axis=0)[None]
    assert readout(x, y, x, y, middle, classes=3) in (0, 1, 2)
    known = y != 1
    with pytest.raises(UserError, match="class 1 of 3 has no item to take a mean of"):
        readout(x[known], y[known], x[known], y[known], middle, classes=3)


def test_a_geometry_of_one_direction_still_tells_classes_apart() -> None:
    """Items vary along one axis alone, and by one amount: nothing calls for shrinkage."""
    axis, apart = np.eye(5)[0], np.eye(5)[1]
    x = np.stack([axis, -axis, apart + axis, apart - axis])
    y, asked = np.array([0, 0, 1, 1]), np.stack([9 * axis + 0.9 * apart, -9 * axis + 0.1 * apart])
    assert transfer_predict(x, y, x, y, asked, classes=2).tolist() == [1, 0]


def test_weights_of_classes_have_a_mean_of_one_where_a_class_is_missing() -> None:
    weights = balanced_weights(np.array([0, 0, 0, 2]), 3)
    assert weights.mean() == pytest.approx(1.0) and weights[:3].sum() == pytest.approx(weights[3])


def test_what_a_block_does_has_the_sign_that_its_metric_says() -> None:
    drops, changes, shares, cosine, margins = (
        METRICS[name].function
        for name in ("skip_accuracy_drop", "skip_joint_change", "contribution",
                     "gradient_alignment", "zero_shot_margin")
    )  # fmt: skip
    # Lost by the skip, right either way, won by it.
    assert drops([1, 1, 0], [0, 1, 1]).tolist() == [1, 0, -1]
    x = np.random.default_rng(0).normal(size=(3, 4))
    turned = x * [[2.0], [-1.0], [1.0]]
    assert changes(x, turned) == pytest.approx([0.0, 2.0, 0.0])
    part = np.random.default_rng(1).normal(size=(3, 4))
    assert shares(part, x) + shares(x - part, x) == pytest.approx(np.ones(3))
    assert cosine([3.0, 4.0], [-6.0, -8.0]) == pytest.approx(-1.0)
    prompts = np.array([[1.0, 0.0], [0.6, 0.8]])
    assert margins(prompts, prompts, [0, 0]) == pytest.approx([0.4, -0.4])
    for call in (lambda: drops([1], [1, 0]), lambda: changes(x[:1], x), lambda: shares(x[:1], x)):
        with pytest.raises(UserError, match="differ; items must be paired"):
            call()
    with pytest.raises(UserError, match="novel has NaN"):
        cosine([1.0, 2.0], [np.nan, 1.0])


def test_features_of_other_widths_are_refused_by_name() -> None:
    x, y = planted(30, classes=3)
    with pytest.raises(UserError, match="prompts have width 5, images 12"):
        zero_shot_accuracy(x, np.ones((3, 5)), y)
    with pytest.raises(UserError, match="shots have width 5, those of the geometry 12"):
        transfer_predict(x, y, x[:, :5], y, x[:, :5], classes=3)
    with pytest.raises(UserError, match="to classify have width 5, those of the geometry 12"):
        transfer_predict(x, y, x, y, x[:, :5], classes=3)


def test_what_is_no_confusion_has_no_accuracy() -> None:
    for counts in (np.ones(3), np.ones((2, 3)), np.ones((1, 1))):
        with pytest.raises(UserError, match="expected two classes or more"):
            normalised_accuracy(counts)
    for wrong in (np.nan, -1.0):
        with pytest.raises(UserError, match="counts hold NaN, or less than 0"):
            balanced_accuracy([[3, wrong], [1, 1]])


def test_a_geometry_learned_elsewhere_helps_novel_classes() -> None:
    rng = np.random.default_rng(0)
    noise = np.array([8.0] * 10 + [0.3] * 10)  # the first ten directions vary inside every class

    def draw(classes: int, each: int) -> tuple[np.ndarray, np.ndarray]:
        y = np.repeat(np.arange(classes), each)
        return rng.normal(size=(classes, 20))[y] + noise * rng.normal(size=(len(y), 20)), y

    base, base_y = draw(10, 30)
    x, y = draw(5, 42)
    shots = np.arange(len(y)) % 42 < 2
    arguments = (x[shots], y[shots], x[~shots])
    learned = transfer_predict(base, base_y, *arguments, classes=5)
    scatter = rng.normal(size=(300, 20))
    untaught = transfer_predict(scatter, np.arange(300) % 10, *arguments, classes=5)
    assert (learned == y[~shots]).mean() > (untaught == y[~shots]).mean() + 0.3


@pytest.mark.parametrize("function", LABELLED)
def test_bad_labels_are_refused(function) -> None:
    x, y = planted(20)
    with pytest.raises(UserError, match="name 1 class"):
        function(x, np.zeros(20))
    with pytest.raises(UserError, match="labels have shape"):
        function(x, y[:-1])
    with pytest.raises(UserError, match="at least 3"):
        function(x[:2], y[:2])
    with pytest.raises(UserError, match="NaN or Inf"):
        function(np.where(np.eye(20, 12) > 0, np.nan, x), y)


@pytest.mark.parametrize("function", [f for f in LABELLED if f is not neighbourhood_overlap])
def test_constant_features_are_refused(function) -> None:
    with pytest.raises(UserError, match="same features for all"):
        function(np.full((12, 4), 3.3), np.arange(12) % 2)


@pytest.mark.parametrize("function", [fisher_ratio, lda_criterion])
def test_items_equal_to_their_class_mean_are_refused(function) -> None:
    for size, offset in ((1.0, 0.0), (1 / 3, 0.1)):  # the means of the second are off by rounding
        with pytest.raises(UserError, match="no scatter within classes"):
            function(size * np.eye(3)[np.arange(21) % 3] + offset, np.arange(21) % 3)


def test_a_row_of_zeros_has_no_neighbours() -> None:
    with pytest.raises(UserError, match="row of zeros"):
        neighbourhood_overlap(np.vstack([np.zeros(3), np.eye(3)]), [0, 0, 1, 1])


def test_a_position_that_is_constant_predicts_as_chance_does() -> None:
    """Fewer items than columns: rotating into the span of the items leaves no column."""
    fit, rest = np.ones((6, 9)), np.ones((4, 9))
    labels = np.arange(6) % 2
    predicted = logistic(fit, labels, rest, np.arange(4) % 2, rest, classes=2)
    assert len(set(predicted.tolist())) == 1


def test_the_strength_of_a_ridge_is_above_zero() -> None:
    x, y = planted()
    with pytest.raises(UserError, match="c_grid takes numbers above 0, not -1.0"):
        logistic(x, y, x, y, x, classes=5, c_grid=(1.0, -1.0))
