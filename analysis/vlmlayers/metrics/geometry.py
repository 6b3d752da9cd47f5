"""Geometry of one layer: how many directions it uses and how its items spread.

What depends on n: rank-like measures grow with n, so compare them at one n only.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import scipy

from vlmlayers.arguments import Takes, checked
from vlmlayers.errors import UserError
from vlmlayers.metrics.checks import (
    Array,
    Given,
    Labels,
    centred,
    class_sums,
    classes,
    mean_of_pairs,
    ratio,
    squared_distances,
    unit,
)

NEAR = 1e-5  # of the items' spread; float32 and another batch size leave less between equal items


def spectrum(x: Any) -> Array:
    """Return the eigenvalues of the centred scatter, descending, rounding noise removed."""
    x = centred(x)
    # Both products have the same eigenvalues but for zeros; the smaller one costs less.
    small = x @ x.T if len(x) <= x.shape[1] else x.T @ x
    values = np.linalg.eigvalsh(small)[::-1]
    # Zero eigenvalues come out as ±1e-16, which a root or a logarithm would turn into directions.
    return values[values > 1e-12 * values[0]]


@checked
def effective_rank(x: Given) -> float:
    """Return exp(entropy of the normalised singular values) of centred features.

    Reference: Roy and Vetterli 2007; RankMe, Garrido et al. 2023 (there without centring).
    """
    return rank_of(spectrum(x))


def rank_of(eigenvalues: Array) -> float:
    """Return the effective rank from the eigenvalues of the scatter."""
    # Singular values, as in RankMe; the entropy of eigenvalues is `spectral_entropy`.
    return float(np.exp(entropy_of(np.sqrt(eigenvalues))))


@checked
def spectral_entropy(x: Given) -> float:
    """Return the von Neumann entropy of the centred scatter at trace 1, in nats.

    Reference: von Neumann 1932; for layers of networks, Skean et al. 2025.
    """
    return entropy_of(spectrum(x))


def entropy_of(eigenvalues: Array) -> float:
    """Return the entropy of values at sum 1, of the eigenvalues of the scatter von Neumann's."""
    # 0 log 0 is 0 in the limit but NaN in floating point.
    share = eigenvalues[eigenvalues > 0.0] / eigenvalues.sum()
    return float(-(share * np.log(share)).sum())


@checked
def participation_ratio(x: Given) -> float:
    """Return (Σλ)² / Σλ² of the eigenvalues of the centred scatter.

    Reference: Gao et al. 2017.
    """
    return participation_of(spectrum(x))


def participation_of(eigenvalues: Array) -> float:
    """Return the participation ratio from the eigenvalues of the scatter."""
    return float(eigenvalues.sum() ** 2 / np.square(eigenvalues).sum())


@checked
def mean_cosine(x: Given) -> float:
    """Return the mean cosine between different items, not centred: anisotropy.

    Reference: Ethayarajh 2019.
    """
    return float(mean_cosine_weighted(x, np.ones((1, len(x))))[0])


def mean_cosine_weighted(x: Any, weights: Array) -> Array:
    """Return the mean cosine under each row of item weights, (draw,)."""
    return mean_cosine_of(unit(x, smallest_n=2), weights)


def mean_cosine_of(x: Array, weights: Array) -> Array:
    """Return the mean cosine of unit rows under each row of item weights, (draw,)."""
    # Σ_ij w_i w_j x_i·x_j = ‖Σ w_i x_i‖²: no pair is looked at.
    return mean_of_pairs(np.square(weights @ x).sum(axis=1), weights)


@checked
def mean_cosine_centred(x: Given) -> float:
    """Return the mean cosine between different items after centring; about −1/(n − 1) at best.

    Reference: Ethayarajh 2019; centred: Cai et al. 2021.
    """
    return mean_cosine(centred(x))


@checked
def uniformity(x: Given) -> float:
    """Return log mean exp(−2‖x_i − x_j‖²) of unit rows over i ≠ j; lower is more uniform.

    Reference: Wang and Isola 2020.
    """
    return float(uniformity_weighted(x, np.ones((1, len(x))))[0])


def uniformity_weighted(x: Any, weights: Array) -> Array:
    """Return uniformity under each row of item weights, (draw,)."""
    kernel = np.exp(-2.0 * squared_distances(unit(x, smallest_n=2)))
    return np.log(mean_of_pairs(((weights @ kernel) * weights).sum(axis=1), weights))


@checked
def alignment(x: Given, labels: Any) -> float:
    """Return the mean ‖x_i − x_j‖² of unit rows over pairs of the same class; lower is closer.

    Raises:
        UserError: One class, or no class with two items.

    Reference: Wang and Isola 2020 (there over two views of one item).
    """
    value = float(alignment_weighted(x, labels, np.ones((1, len(x))))[0])
    if np.isnan(value):
        raise UserError("no class has two items; alignment needs pairs of the same class")
    return value


def alignment_weighted(x: Any, labels: Any, weights: Array) -> Array:
    """Return alignment under each row of item weights, (draw,)."""
    x = unit(x, smallest_n=2)
    y = classes(labels, len(x))
    apart, pairs = np.zeros(len(weights)), np.zeros(len(weights))
    for c in range(int(y.max()) + 1):
        w = weights[:, y == c]
        size, own = w.sum(axis=1), np.square(w).sum(axis=1)
        # Σ_{i≠j} w_i w_j (2 − 2 x_i·x_j): items drawn twice are at distance 0 from themselves.
        apart += 2.0 * (size**2 - np.square(w @ x[y == c]).sum(axis=1))
        pairs += size**2 - own
    return ratio(apart, pairs)


def alignment_relabelled(x: Any, labels: Labels) -> Array:
    """Return alignment under each of several labellings, (draw, item) to (draw,)."""
    x = unit(x, smallest_n=2)
    values = []
    for y in labels:
        y = classes(y, len(x))
        size = np.bincount(y).astype(np.float64)
        apart = 2.0 * (np.square(size).sum() - np.square(class_sums(x, y, len(size))).sum())
        values.append(ratio(apart, np.square(size).sum() - size.sum()))
    return np.array(values)


def distinct(x: Array) -> Labels:
    """Return the rows that coincide with none before them up to rounding, ascending."""
    x = centred(x)
    return _apart(x, squared_distances(x))


def _apart(x: Array, squares: Array) -> Labels:
    near = squares <= NEAR**2 * np.square(x).sum() / len(x)
    return np.flatnonzero(~np.triu(near, 1).any(axis=0))


@checked
def twonn(x: Given, *, discard: Annotated[float, Takes(least=0, most=0.9)] = 0.1) -> float:
    """Return the TwoNN intrinsic dimension: slope of −log(1 − F(μ)) against log μ.

    μ is the ratio of the distances to the second and first neighbour, F its empirical distribution
    i/n, i = 1…n; the largest `discard` share is left out. Items that coincide with another up to
    rounding count once.

    Raises:
        UserError: Fewer than ten distinct items.

    Reference: Facco et al. 2017.
    """
    x = centred(x)
    squares = squared_distances(x)
    kept = _apart(x, squares)
    if (n := len(kept)) < 10:
        raise UserError(f"{n} distinct items; TwoNN needs at least 10")
    squares = squares if n == len(x) else squares[np.ix_(kept, kept)]
    # Items are not their own neighbours. Coinciding ones had to go before: μ would be infinite.
    np.fill_diagonal(squares, np.inf)
    first, second = np.sqrt(np.partition(squares, 1, axis=1)[:, :2]).T
    log_ratio = np.sort(np.log(second / first))
    # Rounded first, as 1 − 0.9 falls short of 0.1. At F = 1 the logarithm is infinite.
    keep = min(int(round(n * (1.0 - discard), 6)), n - 1)
    # i from 1: counted from 0 the estimate is 0.85 of the published one at n = 20.
    height = -np.log1p(-np.arange(1, keep + 1) / n)
    # Least squares through the origin, since F(1) = 0: an intercept would tilt the slope.
    return float((log_ratio[:keep] @ height) / np.square(log_ratio[:keep]).sum())


def uniformity_null(n: int, width: int) -> float:
    """Return uniformity of directions drawn evenly, −4 + log ₀F₁(width/2; 4) ≈ −4 + 8/width."""
    # ‖x − y‖² = 2 − 2 cos, and E exp(κ cos) = ₀F₁(width/2; κ²/4). Of few columns 8/width is far too
    # large: of one or two it led out of what uniformity can be.
    return -4.0 + float(np.log(scipy.special.hyp0f1(width / 2.0, 4.0)))


def centred_null(n: int, width: int) -> float:
    """Return the mean centred cosine of items without structure, −1/(n − 1)."""
    # Centred rows sum to zero: each has to point away from the others a little.
    return -1.0 / (n - 1)
