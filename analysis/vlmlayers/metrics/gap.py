"""The modality gap, on unit rows in `joint` space: how far images are from their texts.

Every function takes images (item, width), texts (item, width) and `pairs` (pair, 2): the image
row and the text row of each matching pair; None pairs row i with row i.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from vlmlayers.arguments import Count, checked
from vlmlayers.errors import UserError
from vlmlayers.metrics.checks import (
    FIXED,
    ROUNDING,
    Array,
    Given,
    Labels,
    batches,
    row_pairs,
    triangle,
    unit,
)
from vlmlayers.metrics.geometry import mean_cosine_of


@checked
def centroid_gap(x: Given, y: Given, pairs: Any = None) -> float:
    """Return ‖mean x − mean y‖ of unit rows. Samples of one cloud give about √(1/n_x + 1/n_y).

    Reference: Liang et al. 2022, Mind the Gap.
    """
    return float(centroid_gap_weighted(x, y, pairs, *_ones(x, y))[0])


def centroid_gap_weighted(x: Any, y: Any, pairs: Any, wx: Array, wy: Array) -> Array:
    """Return the centroid gap under each row of item weights, (draw,)."""
    x, y = _clouds(x, y)
    # `pairs` do not matter here; the protocol calls every gap metric with the same arguments.
    means = [w @ rows / w.sum(axis=1, keepdims=True) for w, rows in ((wx, x), (wy, y))]
    return np.linalg.norm(means[0] - means[1], axis=1)


def pair_distances(x: Any, y: Any, pairs: Any = None) -> Array:
    """Return ‖x_i − y_j‖ of each matching pair of unit rows, (pair,)."""
    x, y, pairs = _inputs(x, y, pairs)
    return np.linalg.norm(x[pairs[:, 0]] - y[pairs[:, 1]], axis=1)


@checked
def pair_distance(x: Given, y: Given, pairs: Any = None) -> float:
    """Return the mean distance ‖x_i − y_i‖ of matching unit rows.

    Reference: Liang et al. 2022; Schrodi et al. 2025 (L2I).
    """
    return float(pair_distances(x, y, pairs).mean())


def pair_cosines(x: Any, y: Any, pairs: Any = None) -> Array:
    """Return the cosine of each matching pair, (pair,)."""
    x, y, pairs = _inputs(x, y, pairs)
    return (x[pairs[:, 0]] * y[pairs[:, 1]]).sum(axis=1)


@checked
def matched_cosine(x: Given, y: Given, pairs: Any = None) -> float:
    """Return the mean cosine of matching rows.

    Reference: Hessel et al. 2021 (CLIPScore, unscaled).
    """
    return float(pair_cosines(x, y, pairs).mean())


@checked
def rmg(x: Given, y: Given, pairs: Any = None) -> float:
    """Return the relative modality gap d_match / (d_match + ½(d_img + d_txt)), d = (1 − cos)/2.

    0 where pairs coincide, ½ where pairs are as far apart as strangers of one modality.

    Raises:
        UserError: Fewer than two images or two texts, or all items coincide.

    Reference: Schrodi et al. 2025, Two Effects, One Trigger.
    """
    return float(rmg_weighted(x, y, pairs, *_ones(x, y))[0])


def rmg_weighted(x: Any, y: Any, pairs: Any, wx: Array, wy: Array) -> Array:
    """Return the relative modality gap under each row of item weights, (draw,)."""
    x, y, pairs = _inputs(x, y, pairs, smallest_n=2)
    apart = (1.0 - (x[pairs[:, 0]] * y[pairs[:, 1]]).sum(axis=1)) / 2.0
    # A pair is drawn with its image, so that captions of one image stay together.
    weight = wx[:, pairs[:, 0]]
    match = weight @ apart / weight.sum(axis=1)
    own = 0.5 * sum((1.0 - mean_cosine_of(z, w)) / 2.0 for z, w in ((x, wx), (y, wy)))
    if (match + own <= 1e-12).any():
        raise UserError("all images and texts coincide; the relative gap is undefined")
    return match / (match + own)


@checked
def frechet_gap(x: Given, y: Given, pairs: Any = None) -> float:
    """Return the Fréchet distance of the two clouds once their centroids are aligned.

    √(tr Σ_x + tr Σ_y − 2 tr (Σ_x^½ Σ_y Σ_x^½)^½) of unit rows; the last term is the nuclear norm
    of X_c Y_cᵀ, so no matrix root is taken.

    Raises:
        UserError: Fewer than two images or two texts.

    Reference: Dowson and Landau 1982.
    """
    return _cloud_distance(*_clouds(x, y, smallest_n=2))


def nuclear_norm(x: Array, y: Array) -> float:
    """Return the sum of the singular values of X Yᵀ; for rows ≫ width at the cost of width³."""
    # The orthogonal factor of QR leaves singular values as they are.
    if len(x) > x.shape[1]:
        x = triangle(x)
    if len(y) > y.shape[1]:
        y = triangle(y)
    return float(np.linalg.svd(x @ y.T, compute_uv=False).sum())


def auc(scores_x: Array, scores_y: Array) -> float:
    """Return the chance that an image scores above a text, ties counting half."""
    # Ranks by binary search, so that images × texts comparisons are never held at once.
    order = np.sort(scores_y)
    below, to = np.searchsorted(order, scores_x, "left"), np.searchsorted(order, scores_x, "right")
    return float((below + to).mean() / (2 * len(order)))


def _ranks(similarity: Array, match: NDArray[np.bool_]) -> Labels:
    """Return how many candidates rank above the best match, level with it, and so match: (3, x)."""
    # Equal cosines differ by rounding, which must not decide between them: hence the margin.
    best = np.where(match, similarity, -np.inf).max(axis=1, keepdims=True)
    above = (similarity > best + ROUNDING) & ~match
    level = np.abs(similarity - best) <= ROUNDING
    return np.stack([kind.sum(axis=1) for kind in (above, level, level & match)])


def retrieval_hits(x: Any, y: Any, pairs: Any = None, *, k: int = 1) -> Array:
    """Return for each row of x that has a match whether one is among its k nearest of y, 0 or 1.

    Ties count with the chance of a random order of them, so a constant tower scores like chance
    and not like the row order.
    """
    x, y, pairs = _inputs(x, y, pairs)
    # A query without a match could only ever miss.
    asked, row = np.unique(pairs[:, 0], return_inverse=True)
    shape = len(asked), len(y)
    match = csr_array((np.ones(len(row), dtype=bool), (row, pairs[:, 1])), shape=shape)
    ranks = [_ranks(x[asked[some]] @ y.T, match[some].toarray()) for some in batches(*shape)]
    above, tied, right = np.concatenate(ranks, axis=1)
    places = np.clip(k - above, 0, tied)  # that the tied candidates share
    missed = np.ones(len(places))
    for place in range(min(k, len(y))):
        left = np.maximum(tied - right - place, 0) / np.maximum(tied - place, 1)
        missed *= np.where(place < places, left, 1.0)
    return 1.0 - missed


@checked
def retrieval(x: Given, y: Given, pairs: Any = None, *, k: Count = 1) -> float:
    """Return recall at k: the share of queries x with a match among their k nearest of y.

    Reference: Karpathy and Fei-Fei 2015.
    """
    return float(retrieval_hits(x, y, pairs, k=k).mean())


def retrieval_null(n_texts: int, matches: Labels, k: int = 1) -> float:
    """Return 1 − Π (N − m − i)/(N − i) over i < k for m matches of N: recall of a random order."""
    steps = np.arange(min(k, n_texts))[None, :]
    left = np.maximum(n_texts - matches[:, None] - steps, 0) / (n_texts - steps)
    return float((1.0 - left.prod(axis=1)).mean())


def _clouds(x: Any, y: Any, smallest_n: int = 1) -> tuple[Array, Array]:
    """Return the unit rows of both, which have to be in one space."""
    x, y = unit(x, smallest_n=smallest_n), unit(y, "y", smallest_n=smallest_n)
    if x.shape[1] != y.shape[1]:
        raise UserError(
            f"images have width {x.shape[1]} and texts {y.shape[1]}; "
            "a gap exists in `joint` space only"
        )
    return x, y


def _inputs(x: Any, y: Any, pairs: Any, smallest_n: int = 1) -> tuple[Array, Array, Labels]:
    x, y = _clouds(x, y, smallest_n)
    return x, y, row_pairs(pairs, len(x), len(y))


def _ones(x: Any, y: Any) -> tuple[Array, Array]:
    return np.ones((1, len(x))), np.ones((1, len(y)))


def centroid_gap_null(x: Any, y: Any, pairs: Any = None) -> float:
    """Return √(1/n_x + 1/n_y), the centroid gap of two samples of one cloud."""
    # For clouds that cover the sphere (variance 1). A narrow cone gives less: conservative.
    return float(np.sqrt(1.0 / len(x) + 1.0 / len(y)))


def frechet_null(x: Any, y: Any, pairs: Any = None, *, draws: int = 5) -> float:
    """Return the same distance after the centred rows of both modalities are mixed at random."""
    x, y = _clouds(x, y, smallest_n=2)
    # Centred apart, so that the null has no gap of means and yet the shapes of both clouds.
    rows = np.vstack([x - x.mean(axis=0), y - y.mean(axis=0)])
    rng = np.random.default_rng(FIXED)
    values = []
    for _ in range(draws):
        order = rng.permutation(len(rows))
        values.append(_cloud_distance(rows[order[: len(x)]], rows[order[len(x) :]]))
    return float(np.mean(values))


def _cloud_distance(x: Array, y: Array) -> float:
    x = (x - x.mean(axis=0)) / np.sqrt(len(x) - 1)
    y = (y - y.mean(axis=0)) / np.sqrt(len(y) - 1)
    total = np.square(x).sum() + np.square(y).sum()
    # Rounding can take the difference of equal clouds a little below 0.
    return float(np.sqrt(max(total - 2.0 * nuclear_norm(x, y), 0.0)))
