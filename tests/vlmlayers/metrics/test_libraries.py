"""Every metric that a kept library has, against that library, on ten random inputs each.

scikit-learn, SciPy and scikit-dimension; what none of them has is tested in the files beside this
one by its definition.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
from scipy import linalg, spatial, stats
from scipy.optimize import minimize
from scipy.spatial import distance
from sklearn import covariance, discriminant_analysis, linear_model, neighbors
from sklearn import metrics as sk
from sklearn.decomposition import PCA
from sklearn.metrics import pairwise
from sklearn.preprocessing import KernelCenterer, StandardScaler, normalize, scale

from vlmlayers import metrics as ours
from vlmlayers.metrics.class_level import silhouette_values
from vlmlayers.metrics.dataset_level import recall
from vlmlayers.metrics.gap import auc, pair_cosines, pair_distances
from vlmlayers.metrics.intervals import wilson

skdim = pytest.importorskip("skdim", reason="needs the extra 'dev'")
Array = np.ndarray


class Draw:
    """One random input: features of two sides, labels with five items or more per class."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.n, self.width = int(rng.integers(24, 60)), int(rng.integers(3, 12))
        self.classes = int(rng.integers(2, 5))
        self.labels = rng.permutation(np.arange(self.n) % self.classes)
        story = rng.normal(size=(self.classes, self.width))
        self.x = rng.normal(size=(self.n, self.width)) + story[self.labels] + 0.5
        self.y = self.x @ rng.normal(size=(self.width, self.width)) + rng.normal(size=self.x.shape)
        self.prompts = story + 0.3 * rng.normal(size=story.shape)
        self.k = int(rng.integers(1, 6))

    @property
    def within(self) -> Array:
        """Deviations from the class means."""
        means = np.stack([self.x[self.labels == c].mean(axis=0) for c in range(self.classes)])
        return self.x - means[self.labels]

    @property
    def between(self) -> Array:
        """Covariance of the class means, each item counting once."""
        means = self.x - self.x.mean(axis=0) - self.within
        return means.T @ means / self.n


def same_class_pairs(d: Draw) -> list[tuple[int, int]]:
    return [(i, j) for i, j in combinations(range(d.n), 2) if d.labels[i] == d.labels[j]]


def evidence_by_search(d: Draw) -> float:
    """LogME by SciPy's normal density, the evidence maximised over both precisions by search."""
    # Centred: n − 1 free observations, in the basis where features make them independent.
    basis = linalg.null_space(np.ones((1, d.n)))
    spread, axes = linalg.eigh(basis.T @ d.x @ d.x.T @ basis)
    found = []
    for c in range(d.classes):
        target = axes.T @ basis.T @ (d.labels == c).astype(float)

        def loss(logs: Array, target: Array = target) -> float:
            width = np.sqrt(np.exp(logs[0]) * spread.clip(0.0) + np.exp(logs[1]))
            return -float(stats.norm.logpdf(target, scale=width).sum())

        exact = {"xatol": 1e-7, "fatol": 1e-10, "maxiter": 4000}
        ends = [minimize(loss, start, method="Nelder-Mead", options=exact).fun
                for start in ((-2, -2), (-12, -2))]  # fmt: skip
        found.append(-min(ends) / (d.n - 1))
    return float(np.mean(found))


def distances(x: Array) -> Array:
    return distance.squareform(distance.pdist(x))


def neighbours(x: Array, k: int) -> Array:
    return neighbors.NearestNeighbors(n_neighbors=k, metric="cosine").fit(x).kneighbors()[1]


def common_neighbours(d: Draw) -> float:
    sides = neighbours(d.x, d.k), neighbours(d.y, d.k)
    return float(np.mean([len(set(a) & set(b)) / d.k for a, b in zip(*sides)]))


def biased_cka(first: Array, second: Array) -> float:
    kernels = [KernelCenterer().fit_transform(k) for k in (first, second)]
    return float(1.0 - distance.cosine(kernels[0].ravel(), kernels[1].ravel()))


def rbf(x: Array, width: float) -> Array:
    median = np.median(np.square(distances(x)))  # items with themselves too, as published
    return pairwise.rbf_kernel(x, gamma=1.0 / (2.0 * width**2 * median))


def spectrum(d: Draw) -> Array:
    return PCA().fit(d.x).explained_variance_


def frechet(d: Draw) -> float:
    covariances = [np.cov(normalize(side), rowvar=False) for side in (d.x, d.y)]
    root = linalg.sqrtm(covariances[0] @ covariances[1])
    return float(np.sqrt(max(np.trace(covariances[0] + covariances[1] - 2 * root.real), 0.0)))


def unlike(x: Array) -> float:
    """Mean (1 − cos)/2 between different rows."""
    return float(distance.pdist(x, "cosine").mean() / 2.0)


def relative_gap(d: Draw) -> float:
    match = float(pairwise.paired_cosine_distances(d.x, d.y).mean() / 2.0)
    return match / (match + (unlike(d.x) + unlike(d.y)) / 2.0)


def right_at_k(d: Draw) -> float:
    similarity = pairwise.cosine_similarity(d.x, d.y)
    return float(sk.top_k_accuracy_score(np.arange(d.n), similarity, k=d.k))


def shrunk(x: Array) -> Array:
    return covariance.ledoit_wolf(x, assume_centered=True)[0]


NUMBERS: dict[str, tuple[Callable[[Draw], float], Callable[[Draw], float]]] = {
    "fisher_ratio": (
        lambda d: ours.fisher_ratio(d.x, d.labels),
        lambda d: sk.calinski_harabasz_score(d.x, d.labels) * (d.classes - 1) / (d.n - d.classes),
    ),
    "lda_criterion": (
        lambda d: ours.lda_criterion(d.x, d.labels),
        lambda d: np.trace(linalg.solve(shrunk(d.within), d.between)),
    ),
    "h_score": (
        lambda d: ours.h_score(d.x, d.labels),
        lambda d: np.trace(linalg.solve(shrunk(d.x - d.x.mean(axis=0)), d.between)),
    ),
    "silhouette": (
        lambda d: ours.silhouette(d.x, d.labels),
        lambda d: sk.silhouette_score(d.x, d.labels),
    ),
    "neighbourhood_overlap": (
        lambda d: ours.neighbourhood_overlap(d.x, d.labels, k=d.k),
        lambda d: (d.labels[neighbours(d.x, d.k)] == d.labels[:, None]).mean(),
    ),
    "zero_shot_accuracy": (
        lambda d: ours.zero_shot_accuracy(d.x, d.prompts, d.labels),
        lambda d: sk.accuracy_score(
            d.labels, pairwise.cosine_similarity(d.x, d.prompts).argmax(axis=1)
        ),
    ),
    "logme": (lambda d: ours.logme(d.x, d.labels), evidence_by_search),
    "cka, biased": (
        lambda d: ours.cka(d.x, d.y, debiased=False),
        lambda d: biased_cka(pairwise.linear_kernel(d.x), pairwise.linear_kernel(d.y)),
    ),
    "cka, RBF": (
        lambda d: ours.cka(d.x, d.y, debiased=False, kernel="rbf", sigma=0.7),
        lambda d: biased_cka(rbf(d.x, 0.7), rbf(d.y, 0.7)),
    ),
    "mutual_knn": (lambda d: ours.mutual_knn(d.x, d.y, k=d.k), common_neighbours),
    "rsa": (
        lambda d: ours.rsa(d.x, d.y),
        lambda d: stats.spearmanr(distance.pdist(d.x), distance.pdist(d.y)).statistic,
    ),
    "procrustes": (
        lambda d: np.sin(ours.procrustes(d.x, d.y)) ** 2,
        lambda d: spatial.procrustes(d.x, d.y)[2],
    ),
    "pair_distance": (
        lambda d: ours.pair_distance(d.x, d.y),
        lambda d: pairwise.paired_euclidean_distances(normalize(d.x), normalize(d.y)).mean(),
    ),
    "matched_cosine": (
        lambda d: ours.matched_cosine(d.x, d.y),
        lambda d: 1.0 - pairwise.paired_cosine_distances(d.x, d.y).mean(),
    ),
    "centroid_gap": (
        lambda d: ours.centroid_gap(d.x, d.y),
        lambda d: distance.euclidean(normalize(d.x).mean(axis=0), normalize(d.y).mean(axis=0)),
    ),
    "rmg": (lambda d: ours.rmg(d.x, d.y), relative_gap),
    "frechet_gap": (lambda d: ours.frechet_gap(d.x, d.y), frechet),
    "retrieval": (lambda d: ours.retrieval(d.x, d.y, k=d.k), right_at_k),
    "effective_rank": (
        lambda d: ours.effective_rank(d.x),
        lambda d: np.exp(stats.entropy(np.sqrt(spectrum(d)))),
    ),
    "spectral_entropy": (
        lambda d: ours.spectral_entropy(d.x),
        lambda d: stats.entropy(spectrum(d)),
    ),
    "participation_ratio": (
        lambda d: ours.participation_ratio(d.x),
        lambda d: skdim.id.lPCA(ver="participation_ratio").fit(d.x).dimension_,
    ),
    "twonn": (lambda d: ours.twonn(d.x), lambda d: skdim.id.TwoNN().fit(d.x).dimension_),
    "twonn, a quarter discarded": (
        lambda d: ours.twonn(d.x, discard=0.25),
        lambda d: skdim.id.TwoNN(discard_fraction=0.25).fit(d.x).dimension_,
    ),
    "mean_cosine": (
        lambda d: ours.mean_cosine(d.x),
        lambda d: 1.0 - distance.pdist(d.x, "cosine").mean(),
    ),
    "mean_cosine_centred": (
        lambda d: ours.mean_cosine_centred(d.x),
        lambda d: 1.0 - distance.pdist(scale(d.x, with_std=False), "cosine").mean(),
    ),
    "uniformity": (
        lambda d: ours.uniformity(d.x),
        lambda d: np.log(np.exp(-2.0 * distance.pdist(normalize(d.x), "sqeuclidean")).mean()),
    ),
    "alignment": (
        lambda d: ours.alignment(d.x, d.labels),
        lambda d: np.mean([distances(normalize(d.x))[pair] ** 2 for pair in same_class_pairs(d)]),
    ),
}


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", NUMBERS)
def test_a_metric_is_that_of_the_library(name: str, seed: int) -> None:
    mine, theirs = NUMBERS[name]
    draw = Draw(seed)
    tolerance = 1e-5 if name == "logme" else 1e-8  # theirs is searched for, not computed
    assert mine(draw) == pytest.approx(float(theirs(draw)), rel=tolerance, abs=1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_items_one_by_one_are_those_of_scikit_learn(seed: int) -> None:
    d = Draw(seed)
    assert np.allclose(
        silhouette_values(distances(d.x), d.labels), sk.silhouette_samples(d.x, d.labels)
    )
    apart = pairwise.paired_euclidean_distances(normalize(d.x), normalize(d.y))
    assert np.allclose(pair_distances(d.x, d.y), apart)
    assert np.allclose(pair_cosines(d.x, d.y), 1 - pairwise.paired_cosine_distances(d.x, d.y))


@pytest.mark.parametrize("seed", range(10))
def test_counts_and_shares_are_those_of_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    classes = int(rng.integers(2, 6))
    truth = np.concatenate([np.arange(classes), rng.integers(0, classes, 40)])
    predicted = np.where(rng.random(len(truth)) < 0.6, truth, rng.integers(0, classes, len(truth)))
    counts = ours.confusion(truth, predicted, classes)
    assert (counts == sk.confusion_matrix(truth, predicted)).all()
    assert np.allclose(recall(counts), sk.recall_score(truth, predicted, average=None))
    assert np.isclose(ours.balanced_accuracy(counts), sk.balanced_accuracy_score(truth, predicted))
    assert np.isclose(
        ours.normalised_accuracy(counts),
        sk.balanced_accuracy_score(truth, predicted, adjusted=True),
    )
    hits = int(np.trace(counts))
    low, high = wilson(hits / len(truth), len(truth))
    theirs = stats.binomtest(hits, len(truth)).proportion_ci(method="wilson")
    assert np.allclose((low, high), (theirs.low, theirs.high))


@pytest.mark.parametrize("seed", range(10))
def test_the_area_under_the_curve_is_that_of_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    images, texts = rng.normal(0.5, 1.0, 30).round(1), rng.normal(0.0, 1.0, 20).round(1)
    theirs = sk.roc_auc_score(np.repeat([1, 0], [30, 20]), np.concatenate([images, texts]))
    assert auc(images, texts) == pytest.approx(theirs)


@pytest.mark.parametrize("seed", range(10))
def test_read_outs_predict_as_scikit_learn_does(seed: int) -> None:
    d = Draw(seed)
    size = d.n // d.classes // 3  # as many of each class in each part: no weights are needed
    rows = [np.flatnonzero(d.labels == c)[: 3 * size].reshape(3, size) for c in range(d.classes)]
    fit, val, out = (np.concatenate([of_class[part] for of_class in rows]) for part in range(3))
    given = (d.x[fit], d.labels[fit], d.x[val], d.labels[val], d.x[out])
    scaler = StandardScaler().fit(d.x[fit])
    scaled, asked = scaler.transform(d.x[fit]), scaler.transform(d.x[out])

    nearest = neighbors.NearestCentroid().fit(scaled, d.labels[fit])
    assert (ours.nearest_mean(*given, classes=d.classes) == nearest.predict(asked)).all()

    one = neighbors.KNeighborsClassifier(1, metric="cosine").fit(scaled, d.labels[fit])
    assert (ours.k_nearest(*given, classes=d.classes, k=1) == one.predict(asked)).all()

    # Of two classes scikit-learn keeps one weight vector, of twice the length: C doubles.
    twice = 2 if d.classes == 2 else 1
    models = [
        linear_model.LogisticRegression(C=twice * c, tol=1e-8, max_iter=2000).fit(scaled, given[1])
        for c in (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    ]
    held = scaler.transform(d.x[val])
    best = max(models, key=lambda m: (m.score(held, given[3]),
                                      -sk.log_loss(given[3], m.predict_proba(held))))  # fmt: skip
    shares = np.sort(best.predict_proba(asked), axis=1)
    clear = shares[:, -1] - shares[:, -2] > 0.02
    predicted = ours.logistic(*given, classes=d.classes)
    assert clear.any() and (predicted == best.predict(asked))[clear].all()

    shrinkage = covariance.ledoit_wolf(
        d.x[fit] - nearest_means(d.x[fit], d.labels[fit]), assume_centered=True
    )[1]
    lda = discriminant_analysis.LinearDiscriminantAnalysis(
        solver="lsqr", shrinkage=shrinkage, priors=np.full(d.classes, 1 / d.classes)
    ).fit(d.x[fit], d.labels[fit])
    transferred = ours.transfer_predict(
        d.x[fit], d.labels[fit], d.x[fit], d.labels[fit], d.x[out], classes=d.classes
    )
    assert (transferred == lda.predict(d.x[out])).all()


def nearest_means(x: Array, labels: Array) -> Array:
    return np.stack([x[labels == c].mean(axis=0) for c in labels])
