"""Discriminability with labels: how well one layer's features separate classes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import scipy

from vlmlayers.arguments import Count, checked
from vlmlayers.errors import UserError
from vlmlayers.metrics.checks import (
    ROUNDING,
    Array,
    Given,
    Labels,
    centred,
    class_ids,
    class_means,
    class_sums,
    classes,
    nearest_shares,
    refuse_width,
    squared_distances,
    unit,
)
from vlmlayers.metrics.moments import shrinkage_of


@checked
def fisher_ratio(x: Given, labels: Any) -> float:
    """Return tr S_b / tr S_w, scatter between over scatter within classes.

    Under shuffled labels about (C − 1)/(n − C).

    Raises:
        UserError: One class, constant features, or no scatter within any class.

    Reference: Fisher 1936; Fukunaga 1990, section 10.2.
    """
    x = centred(x, smallest_n=3)
    y = classes(labels, len(x))
    # tr S_w is what S_b leaves of the total: deviations from class means are never formed.
    total = np.square(x).sum()
    between = np.bincount(y) @ np.square(_means(x, y)).sum(axis=1)
    if total - between <= 1e-12 * total:
        raise UserError("no scatter within classes: every item equals its class mean")
    return float(between / (total - between))


@checked
def lda_criterion(x: Given, labels: Any, *, width: int | None = None) -> float:
    """Return tr(S_w⁻¹ S_b) with S_w shrunk after Ledoit and Wolf, so n ≤ d is allowed.

    S_b is Σ n_c (μ_c − μ)(μ_c − μ)ᵀ / n and S_w the covariance of items about their class means.

    Args:
        x: (item, width).
        labels: (item,).
        width: Width of the features before an exact rotation into their span.

    Raises:
        UserError: One class, or no scatter within any class.

    Reference: Fukunaga 1990, section 10.2; Ledoit and Wolf 2004.
    """
    x = centred(x, smallest_n=3)
    y = classes(labels, len(x))
    within = x - _means(x, y)[y]
    if np.square(within).sum() <= 1e-12 * np.square(x).sum():
        raise UserError("no scatter within classes: every item equals its class mean")
    return _explained(_shrunk_inverse(within, width), _weighted_means(x, y))


@checked
def h_score(x: Given, labels: Any, *, width: int | None = None) -> float:
    """Return tr(Σ⁻¹ cov(E[f|y])) with the covariance Σ shrunk after Ledoit and Wolf.

    Without shrinkage it equals C − 1 for true and shuffled labels alike where n ≤ d, so only the
    regularised form exists here.

    Raises:
        UserError: One class, or constant features.

    Reference: Bao et al. 2019; regularised: Ibrahim et al. 2021.
    """
    return float(h_score_relabelled(x, [labels], width=width)[0])


def h_score_relabelled(x: Any, labels: Iterable[Any], *, width: int | None = None) -> Array:
    """Return the H-score under each of several labellings, (draw, item) to (draw,)."""
    x = centred(x, smallest_n=3)
    solve = _shrunk_inverse(x, width)
    return np.array([_explained(solve, _weighted_means(x, classes(y, len(x)))) for y in labels])


def distances(x: Any) -> Array:
    """Return the Euclidean distances between items, (item, item).

    Raises:
        UserError: Fewer than three items, or constant features.
    """
    return np.sqrt(squared_distances(centred(x, smallest_n=3)))


def silhouette_values(distances: Array, labels: Any) -> Array:
    """Return (b − a)/max(a, b) of each item from the distances between them; 0 in classes of one.

    Raises:
        UserError: One class.
    """
    y = classes(labels, len(distances))
    counts = np.bincount(y)
    sums = class_sums(distances, y, len(counts)).T  # (item, class): distances are symmetric
    rows = np.arange(len(y))
    # An item is not among the others of its class: its distance to itself adds nothing to the sum.
    own = sums[rows, y] / np.maximum(counts[y] - 1, 1)
    others = sums / counts
    others[rows, y] = np.inf
    nearest = others.min(axis=1)
    largest = np.maximum(own, nearest)
    score = np.divide(nearest - own, largest, out=np.zeros(len(y)), where=largest > 0)
    return np.where(counts[y] > 1, score, 0.0)


def mean_silhouette(distances: Array, labels: Any) -> float:
    """Return the mean silhouette from the distances between items, (item, item)."""
    return float(silhouette_values(distances, labels).mean())


@checked
def silhouette(x: Given, labels: Any) -> float:
    """Return the mean silhouette with Euclidean distance.

    Raises:
        UserError: One class, or constant features.

    Reference: Rousseeuw 1987.
    """
    return mean_silhouette(distances(x), labels)


def cosines(x: Any) -> Array:
    """Return the cosines between items, (item, item), an item with itself at −∞.

    Raises:
        UserError: Fewer than three items, or a row of zeros.
    """
    x = unit(x, smallest_n=3)
    # Cosines and not distances: norms grow along the residual stream and would pick the neighbours.
    similarity = x @ x.T
    np.fill_diagonal(similarity, -np.inf)
    return np.asarray(similarity)


def same_label_share(similarity: Array, labels: Any, *, k: int = 10) -> float:
    """Return the share of the k most similar others that have an item's label, over all items.

    Others that tie for the last places take equal shares of them, so a constant is at chance.
    """
    y = classes(labels, len(similarity))
    k = min(k, len(y) - 1)
    shares = nearest_shares(similarity, k)
    return float((shares * (y[:, None] == y)).sum(axis=1).mean() / k)


@checked
def neighbourhood_overlap(x: Given, labels: Any, *, k: Count = 10) -> float:
    """Return the share of the k nearest other items (cosine) that have the same label.

    Raises:
        UserError: One class, fewer than three items, or a row of zeros.

    Reference: Doimo et al. 2020.
    """
    return same_label_share(cosines(x), labels, k=k)


def zero_shot_values(x: Any, prompts: Any, labels: Any) -> Array:
    """Return for each item whether its class prompt is the nearest one (cosine), 0 or 1.

    Items tied between several prompts count with their share, so a constant is exactly chance.
    """
    x, prompts = unit(x), unit(prompts, "prompts")
    refuse_width(prompts, "prompts", x, "images")
    similarity = x @ prompts.T  # (item, class)
    # Equal prompts differ by rounding, which must not pick one of them.
    best = similarity >= similarity.max(axis=1, keepdims=True) - ROUNDING
    own = best[np.arange(len(similarity)), class_ids(labels, *similarity.shape)]
    return own / best.sum(axis=1)


@checked
def zero_shot_accuracy(x: Given, prompts: Given, labels: Any) -> float:
    """Return the share of items whose class prompt is the nearest one (cosine).

    Args:
        x: Image features in `joint` space, (item, width).
        prompts: One prompt feature per class, (class, width).
        labels: Row of `prompts` that is right for each item, (item,).

    Reference: Radford et al. 2021, section 3.1.
    """
    return float(zero_shot_values(x, prompts, labels).mean())


def fisher_null(n: int, labels: Labels) -> float:
    """Return the Fisher ratio expected under shuffled labels, (C − 1)/(n − C)."""
    count = len(np.unique(labels))
    return (count - 1) / (n - count) if n > count else float("nan")


def same_label_null(n: int, labels: Labels) -> float:
    """Return the chance that another item has the same label, Σ n_c(n_c − 1)/(n(n − 1))."""
    counts = np.unique(labels, return_counts=True)[1]
    # Without the item itself: Σ p_c² is right for draws with replacement only.
    return float((counts * (counts - 1)).sum() / (n * (n - 1)))


def same_label_most(labels: Labels, *, k: int = 10) -> float:
    """Return the largest neighbourhood overlap there can be, the mean of min(k, n_c − 1)/k."""
    k = min(k, len(labels) - 1)
    counts = np.unique(labels, return_counts=True)[1]
    # An item of a small class has k neighbours, but fewer others of its class.
    return float((counts * np.minimum(counts - 1, k)).sum() / (k * len(labels)))


def _means(x: Array, y: Labels) -> Array:
    return class_means(x, y, int(y.max()) + 1)


def _weighted_means(x: Array, y: Labels) -> Array:
    """Return class means times the root of the class share, (class, width): MᵀM is S_b."""
    return _means(x, y) * np.sqrt(np.bincount(y) / len(y))[:, None]


def _explained(solve: Callable[[Array], Array], means: Array) -> float:
    """Return tr(Σ⁻¹ MᵀM)."""
    return float((means.T * solve(means.T)).sum())


def _shrunk_inverse(x: Array, width: int | None) -> Callable[[Array], Array]:
    """Return the product with Σ⁻¹, Σ the shrunk covariance of centred x, for columns in its span.

    Raises:
        UserError: The covariance is singular and calls for no shrinkage.
    """
    # Shrinkage aims at the mean variance over all columns, also those that a rotation left out.
    n = len(x)
    covariance = x.T @ x / n
    fourth = float(np.square(np.square(x).sum(axis=1)).sum())
    shrinkage, size = shrinkage_of(covariance, n, fourth, max(width or 0, x.shape[1]))
    ridge = shrinkage * size
    # Fully shrunk, Σ is a multiple of the identity and needs no factor.
    if shrinkage >= 1.0:
        return lambda columns: columns / size
    if ridge <= 0.0:
        raise UserError("covariance is singular and shrinkage is zero; use more items")
    covariance *= 1.0 - shrinkage
    covariance.flat[:: len(covariance) + 1] += ridge
    # Solved and never inverted: an inverse costs more and loses the digits of small eigenvalues.
    factor = scipy.linalg.cho_factor(covariance, lower=True, overwrite_a=True)
    return lambda columns: np.asarray(scipy.linalg.cho_solve(factor, columns))


def reduce_rows(x: Any) -> Array:
    """Return the centred items rotated into their span: (item, ≤ min(n − 1, width)), exact.

    Metrics that are invariant to rotation and translation cost less on the result.
    """
    x = centred(x)
    n, width = x.shape
    if n > width:
        return x
    values, vectors = np.linalg.eigh(x @ x.T)
    # Centring takes one direction away; what is left of it is rounding.
    keep = values > 1e-12 * max(values[-1], 1e-300)
    return vectors[:, keep] * np.sqrt(values[keep])
