"""Agreement between two sets of features of the same items, whatever their widths.

All but Procrustes are one idea: each side becomes an n × n kernel, the kernel a *signature* of
Frobenius norm 1, and agreement is the inner product of two signatures. So a whole
position × position matrix is one product, and a permutation of items costs one gather.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vlmlayers.arguments import Count, Positive, checked
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.metrics.checks import (
    ROUNDING,
    Array,
    Given,
    centred,
    matrix,
    nearest_shares,
    paired,
    squared_distances,
    triangle,
    unit,
    varies,
)
from vlmlayers.metrics.moments import CrossMoments, Moments, cka_from

Signature = Callable[..., Array]
SIGMA = 0.5  # width of the RBF kernel, in units of the root of the median squared distance


def linear_kernel(x: Array) -> Array:
    """Return the Gram matrix of centred rows, (n, n)."""
    x = _spread_out(x)
    return x @ x.T


def rbf_kernel(x: Array, *, sigma: float) -> Array:
    """Return exp(−‖x_i − x_j‖² / 2s²) with s = sigma × the root of the median squared distance.

    The median is over all n² pairs, as published: an item with itself counts.
    """
    return _rbf(distance_kernel(x), sigma)


def _rbf(squares: Array, sigma: float) -> Array:
    # Relative to the data: with an absolute width the norm of a layer would decide, not its shape.
    median = float(np.median(squares))
    if median <= ROUNDING * squares.max():  # what rounding leaves between items that coincide
        raise UserError("half of all pairs of items coincide; the kernel has no width")
    return np.exp(-squares / (2.0 * sigma**2 * median))


def cosine_kernel(x: Array) -> Array:
    """Return the cosines between rows, not centred, (n, n)."""
    # For its refusal alone: where all items are equal, so are all cosines, and nothing agrees.
    _spread_out(x)
    x = unit(x)
    return x @ x.T


def distance_kernel(x: Array) -> Array:
    """Return squared Euclidean distances between rows, (n, n)."""
    # Ranks are all that RSA reads, and a root does not change them.
    return squared_distances(_spread_out(x))


def _spread_out(x: Array) -> Array:
    """Return centred rows, or complain where they differ by rounding only."""
    mean = x.mean(axis=0)
    centred = x - mean
    if not varies(centred, mean):
        raise UserError(f"the features of all {len(x)} items are the same")
    return centred


def biased_signature(kernel: Array) -> Array:
    """Return the doubly centred kernel at norm 1: inner products are biased CKA."""
    # Centred features do not suffice: an RBF kernel of centred rows is not centred itself.
    rows = kernel.mean(axis=0)
    centred = kernel - rows[None, :] - rows[:, None] + rows.mean()
    return _normalised(centred, np.linalg.norm(kernel))


def debiased_signature(kernel: Array) -> Array:
    """Return the U-centred kernel at norm 1: inner products are debiased CKA.

    The inner product of U-centred kernels is n(n − 3) times the unbiased HSIC.

    Reference: Székely and Rizzo 2014 (U-centring); Song et al. 2012 (unbiased HSIC).
    """
    n = len(kernel)
    # Similarities of items with themselves are what biases HSIC: they go before any mean is taken.
    hollow = kernel.copy()
    np.fill_diagonal(hollow, 0.0)
    rows = hollow.sum(axis=0)
    # With these divisors every row sums to zero off its diagonal; plain means would not do.
    sums = rows[None, :] + rows[:, None]
    sums /= n - 2
    hollow -= sums
    hollow += rows.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(hollow, 0.0)
    return _normalised(hollow, np.linalg.norm(kernel))


def rbf_signature(squares: Array) -> Array:
    """Return the debiased signature of the RBF kernel, from squared distances.

    From these and not from the kernel: some of the items have a median distance of their own, and
    what is left without a group of them is the metric of the rest.
    """
    return debiased_signature(_rbf(squares, SIGMA))


def neighbour_signature(kernel: Array, *, k: int = 10) -> Array:
    """Return the indicator of each row's k nearest others, at norm 1 where none tie.

    Others that tie for the last places take equal shares of them, which sum to k in every row.
    """
    n = len(kernel)
    k = neighbours(n, k)
    # A copy: one kernel serves the value, its null and every jackknife group.
    distance = -kernel
    np.fill_diagonal(distance, np.inf)
    # Only who is near counts, not in which order: a partition is cheaper than a sort.
    near = np.argpartition(distance, k, axis=1)[:, : k + 1]
    nearest = np.take_along_axis(distance, near, axis=1)
    last, next_one = nearest[:, :k].max(axis=1), nearest[:, k]
    result = np.zeros((n, n))
    # n·k equal entries: the product of two signatures is the mean share of common neighbours.
    np.put_along_axis(result, near[:, :k], 1.0 / np.sqrt(n * k), axis=1)
    # Equal cosines differ by rounding, which must not pick one of them; nor must the row order,
    # which both sides share and would so agree by.
    rows = np.flatnonzero(next_one - last <= ROUNDING)
    if len(rows):
        result[rows] = nearest_shares(-distance[rows], k) / np.sqrt(n * k)
    return result


def rank_signature(kernel: Array) -> Array:
    """Return the centred ranks of the off-diagonal entries, at norm 1."""
    n = len(kernel)
    # The diagonal would add n equal top ranks, the same in every layer.
    upper = np.triu(np.ones((n, n), dtype=bool), 1)
    ranks = _ranks(kernel[upper])
    result = np.zeros((n, n))
    result[upper] = ranks - ranks.mean()
    return _normalised(result + result.T)


def _ranks(values: Array) -> Array:
    """Return ranks from 1; values that are equal up to rounding share their mean rank."""
    order = np.argsort(values)
    ordered = values[order]
    # Equal distances differ by rounding, which must not order them.
    group = np.cumsum(np.diff(ordered, prepend=ordered[0]) > ROUNDING * ordered[-1])
    shared = np.bincount(group, np.arange(1.0, len(values) + 1.0)) / np.bincount(group)
    ranks = np.empty(len(values))
    ranks[order] = shared[group]
    return ranks


def neighbours(n: int, k: int) -> int:
    """Return k, at most half of the other items: with all of them every layer agrees."""
    return max(1, min(k, (n - 1) // 2))


@checked
def cka(
    x: Given,
    y: Given,
    *,
    debiased: bool = True,
    kernel: str = "linear",
    sigma: Positive = SIGMA,
    form: str = "auto",
) -> float:
    """Return centred kernel alignment of paired rows.

    HSIC(K, L) / √(HSIC(K, K) HSIC(L, L)). Biased HSIC is ‖Y_cᵀX_c‖² for linear kernels; it grows
    as n falls, so never compare it at different n. Debiased HSIC is unbiased and its ratio can be
    negative; it is not clamped.

    Args:
        x: (item, width).
        y: (item, other width).
        debiased: Use the unbiased estimate of HSIC (n ≥ 4).
        kernel: `linear` or `rbf`.
        sigma: Width of the RBF kernel in units of the root of the median squared distance.
        form: `gram` (n × n), `feature` (width × width, linear only) or `auto`: the cheaper one.

    Raises:
        UserError: Rows not paired, too few items, constant features, or an option of the other
            kernel.

    Reference: Kornblith et al. 2019; debiased: Song et al. 2012, Nguyen et al. 2021.
    """
    check_one_of("kernel", kernel, ("linear", "rbf"))
    check_one_of("form", form, ("auto", "gram", "feature"))
    if kernel == "linear" and sigma != SIGMA:
        raise UserError("sigma is the width of the RBF kernel; take kernel='rbf', or leave it out")
    if kernel == "rbf" and form == "feature":
        raise UserError("form='feature' is of the linear kernel; leave it out")
    # Unbiased HSIC divides by n − 3.
    x, y = paired(x, y, 4 if debiased else 2)
    n, a, b = len(x), x.shape[1], y.shape[1]
    # n²(a + b) operations for two Gram matrices against n·a·b for a product of columns, which is
    # less wherever items are more than columns.
    cheaper = "feature" if kernel == "linear" and n * (a + b) > a * b else "gram"
    if (cheaper if form == "auto" else form) == "feature":
        return cka_from(Moments.of(x), Moments.of(y), CrossMoments.of(x, y), debiased=debiased)
    signature = debiased_signature if debiased else biased_signature
    if kernel == "linear":
        first, second = linear_kernel(x), linear_kernel(y)
    else:
        first, second = rbf_kernel(x, sigma=sigma), rbf_kernel(y, sigma=sigma)
    return float((signature(first) * signature(second)).sum())


@checked
def mutual_knn(x: Given, y: Given, *, k: Count = 10) -> float:
    """Return the mean share of common k nearest neighbours (cosine, self excluded).

    Others that tie for the last places take equal shares of them on either side: what ties broken
    at random give on average. So chance is k/(n − 1) with ties as well, and features that tie
    agree with themselves by less than 1.

    Raises:
        UserError: Rows not paired, fewer than three items, or a row of zeros.

    Reference: Huh et al. 2024, The Platonic Representation Hypothesis.
    """
    # For its refusals alone: cosines are of the rows as they are, not centred.
    paired(x, y, 3)
    first, second = cosine_kernel(matrix(x)), cosine_kernel(matrix(y, "y"))
    return float((neighbour_signature(first, k=k) * neighbour_signature(second, k=k)).sum())


@checked
def rsa(x: Given, y: Given) -> float:
    """Return Spearman's correlation of the two Euclidean distance matrices' upper triangles.

    Raises:
        UserError: Rows not paired, fewer than four items, or constant features.

    Reference: Kriegeskorte et al. 2008.
    """
    # Three items have three distances, and Spearman's correlation then only ±½ or ±1.
    x, y = paired(x, y, 4)
    first, second = distance_kernel(x), distance_kernel(y)
    return float((rank_signature(first) * rank_signature(second)).sum())


@checked
def procrustes(x: Given, y: Given) -> float:
    """Return the angular Procrustes distance arccos(‖X_cᵀY_c‖_* / (‖X_c‖‖Y_c‖)), in radians.

    A true metric on shapes: 0 where a rotation and a scale map one onto the other.

    Raises:
        UserError: Rows not paired, fewer than three items, or constant features.

    Reference: Williams et al. 2021, Generalized shape metrics.
    """
    x, y = paired(x, y, 3)
    return float(shape_angles(shapes([x]), shapes([y]))[0, 0])


def shapes(xs: Sequence[Array]) -> Array:
    """Return centred features at norm 1, rotated into at most n columns: (position, n, width).

    Args:
        xs: Features of the same items at several positions, (item, width) each.

    Raises:
        UserError: Constant features.
    """
    compact = [_compact(centred(x)) for x in xs]
    # Columns of zeros change no inner product, so that shapes of all widths fit in one array.
    result = np.zeros((len(xs), len(compact[0]), max(x.shape[1] for x in compact)))
    for place, x in zip(result, compact):
        place[:, : x.shape[1]] = x / np.linalg.norm(x)
    return result


def shape_angles(first: Array, second: Array, *, half: bool = False) -> Array:
    """Return the angular Procrustes distance of every shape with every other, (a, b).

    Args:
        first: Shapes, (a, item, width).
        second: Shapes, (b, item, other width), rows in the order of the first.
        half: Compute cells with b ≥ a only and mirror them: both sides are one tower.
    """
    products = [x.T @ second[i if half else 0 :] for i, x in enumerate(first)]
    # One call for all cells: they are small, and calls would cost more than decompositions.
    nuclear = np.linalg.svd(np.concatenate(products), compute_uv=False).sum(axis=1)
    angles = np.zeros((len(first), len(second)))
    cells = np.triu_indices(len(first)) if half else np.indices(angles.shape).reshape(2, -1)
    # Rounding takes the norm of equal shapes past 1, where there is no angle.
    angles[cells[0], cells[1]] = np.arccos(np.clip(nuclear, 0.0, 1.0))
    return np.maximum(angles, angles.T) if half else angles


def _compact(x: Array) -> Array:
    """Return x rotated into its span where items are fewer than columns."""
    # Singular values of XᵀY do not see rotations of the columns, so that n columns suffice.
    n, width = x.shape
    return x if n >= width else triangle(x.T).T


def _normalised(signature: Array, kernel_norm: Any = 0.0) -> Array:
    norm = np.linalg.norm(signature)
    # What rounding leaves of equal similarities is no signature.
    if norm <= ROUNDING * kernel_norm:
        raise UserError("all items are equally similar; agreement is undefined")
    signature /= norm
    return signature


@checked
def calibrated(value: Any, shuffled: Given, best: float) -> Array:
    """Return (value − mean of shuffled)/(best − mean of shuffled): chance 0, identity 1.

    Args:
        value: Agreement, any shape.
        shuffled: The same with the items of one side permuted, (permutation, …).
        best: The value of identical features.

    Reference: Hubert and Arabie 1985 (adjustment for chance), with a permutation null.
    """
    # Not clamped: agreement below chance is a finding and comes out negative.
    chance = shuffled.mean(axis=0)
    return (value - chance) / (best - chance)
