"""LogME: how well a linear head would explain the labels, without training one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from vlmlayers.arguments import checked
from vlmlayers.metrics.checks import Array, Given, Labels, batches, centred, class_sums, classes

DECADES = 0.25  # spacing of the grid of λ; the evidence is a sum of sigmoids of ln λ, each wider


@checked
def logme(x: Given, labels: Any) -> float:
    """Return the maximal log evidence per item of a Bayesian linear head, mean over classes.

    Each class indicator (centred, as are the features: a head with intercept) is y ~ N(Xw, β⁻¹)
    with w ~ N(0, α⁻¹). The best β follows from λ = α/β, so the evidence is maximised over λ alone:
    on a grid, then by Newton's method. Labels are renumbered without holes first: a missing label
    id would inflate the mean.

    Raises:
        UserError: One class, fewer than three items, or constant features.

    Reference: You et al. 2021, LogME, ICML.
    """
    return float(logme_relabelled(x, [labels])[0])


def logme_relabelled(x: Any, labels: Iterable[Any]) -> Array:
    """Return LogME under each of several labellings, (draw, item) to (draw,).

    The spectrum of the features is computed once.
    """
    x = centred(x, smallest_n=3)
    squared, left = _spectrum(x)
    targets = [_projections(left, classes(y, len(x))) for y in labels]
    projected, outside = (np.concatenate(of, axis=-1) for of in zip(*targets))
    # Centring takes one direction away from items and targets alike: n − 1 observations are left.
    evidence = np.concatenate([
        _evidence(squared, projected[:, batch], outside[batch], len(x) - 1)
        for batch in batches(len(outside), len(squared))
    ])  # fmt: skip
    ends = np.cumsum([len(own) for _, own in targets])[:-1]
    return np.array([part.mean() for part in np.split(evidence, ends)])


def _spectrum(x: Array) -> tuple[Array, Array]:
    """Return squared singular values, ascending (r,), and left singular vectors (item, r)."""
    small = x @ x.T if len(x) <= x.shape[1] else x.T @ x
    values, vectors = _eigen(small)
    keep = values > 1e-10 * values[-1]
    values, vectors = values[keep], vectors[:, keep]
    return values, vectors if len(x) <= x.shape[1] else x @ vectors / np.sqrt(values)


def _projections(left: Array, y: Labels) -> tuple[Array, Array]:
    """Return squared projections of the centred class indicators (r, C), and what is left (C,)."""
    counts = np.bincount(y)
    shares = counts / len(y)
    sums = class_sums(left, y, len(counts)) - np.outer(shares, left.sum(axis=0))
    projected = np.square(sums).T
    # Rounding can take a target that lies in the span below zero, where ln Q does not exist.
    return projected, np.maximum(counts * (1.0 - shares) - projected.sum(axis=0), 1e-12)


def _eigen(matrix: Array) -> tuple[Array, Array]:
    """Return eigenvalues, ascending, and vectors; free where rotated features made it diagonal."""
    diagonal = np.diagonal(matrix)
    off = np.abs(matrix - np.diag(diagonal)).max()
    if off > 1e-12 * diagonal.max():
        return np.linalg.eigh(matrix)
    order = np.argsort(diagonal)
    return diagonal[order], np.eye(len(matrix))[:, order]


def _evidence(squared: Array, projected: Array, outside: Array, n: int) -> Array:
    """Return the maximal evidence of each class divided by n, (C,).

    With the best β = n / Q the log evidence of a class is, up to a constant,
    −n/2 ln Q + ½ Σ ln d_i, where d_i = λ/(λ + s_i) and Q = Σ p_i d_i + outside.
    """
    # Four decades below the spectrum nothing is shrunk any more; nine above it everything is, as
    # labels without relation to the features want it.
    low, high = np.log10(squared[0]) - 4.0, np.log10(squared[-1]) + 9.0
    grid = np.log(10.0) * np.arange(low, high + DECADES, DECADES)
    kept = _kept(grid, squared)  # (r, g)
    residual = projected.T @ kept + outside[:, None]  # (C, g)
    best = (np.log(kept).sum(axis=0) - n * np.log(residual)).argmax(axis=1)
    point, step = grid[best], grid[1] - grid[0]
    # So near the maximum three steps reach rounding; none may leave the neighbouring grid cells.
    for _ in range(3):
        d = _kept(point, squared)  # (r, C)
        falling = d * (1.0 - d)
        q = (projected * d).sum(axis=0) + outside
        slope_q = (projected * falling).sum(axis=0) / q
        bend_q = (projected * falling * (1.0 - 2.0 * d)).sum(axis=0) / q
        slope = (1.0 - d).sum(axis=0) - n * slope_q
        bend = -falling.sum(axis=0) - n * (bend_q - slope_q**2)
        move = np.divide(-slope, bend, out=np.zeros_like(slope), where=bend < 0.0)
        point = np.clip(point + move, grid[best] - step, grid[best] + step)
    d = _kept(point, squared)
    q = (projected * d).sum(axis=0) + outside
    evidence = np.log(d).sum(axis=0) - n * (np.log(2.0 * np.pi * q / n) + 1.0)
    return np.asarray(0.5 * evidence / n)


def _kept(log_lambda: Array, squared: Array) -> Array:
    """Return λ/(λ + s) for every s and λ, (r, λ)."""
    return 1.0 / (1.0 + squared[:, None] * np.exp(-log_lambda))
