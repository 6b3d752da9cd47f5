"""LogME: how well a linear head would explain the labels, without training one."""

from __future__ import annotations

from typing import Any

import numpy as np

from vlmlayers.metrics.checks import Array, centred, classes, one_hot


def logme(x: Any, labels: Any, *, steps: int = 100) -> float:
    """Return the maximal log evidence per item of a Bayesian linear head, mean over classes.

    Each class indicator (centred, as are the features: a head with intercept) is y ~ N(Xw, β⁻¹)
    with w ~ N(0, α⁻¹); α and β maximise the evidence by MacKay's fixed point. Labels are
    renumbered without holes first: a missing label id would inflate the mean.

    Raises:
        UserError: One class, fewer than three items, or constant features.

    Reference: You et al. 2021, LogME, ICML.
    """
    x = centred(x, smallest_n=3)
    y = classes(labels, len(x))
    target = one_hot(y)
    target -= target.mean(axis=0)
    squared, projected, outside = _spectrum(x, target)
    # Centring takes one direction away from items and targets alike: n − 1 observations are left.
    return float(_evidence(squared, projected, outside, len(x) - 1, x.shape[1], steps).mean())


def _spectrum(x: Array, target: Array) -> tuple[Array, Array, Array]:
    """Return squared singular values (r,), squared projections (r, C) and what is left (C,)."""
    small = x @ x.T if len(x) <= x.shape[1] else x.T @ x
    values, vectors = _eigen(small)
    keep = values > 1e-10 * values[-1]
    values, vectors = values[keep], vectors[:, keep]
    left = vectors if len(x) <= x.shape[1] else x @ vectors / np.sqrt(values)
    projected = np.square(left.T @ target)
    outside = np.maximum(np.square(target).sum(axis=0) - projected.sum(axis=0), 1e-12)
    return values, projected, outside


def _eigen(matrix: Array) -> tuple[Array, Array]:
    """Return eigenvalues, ascending, and vectors; free where rotated features made it diagonal."""
    diagonal = np.diagonal(matrix)
    off = np.abs(matrix - np.diag(diagonal)).max()
    if off > 1e-12 * diagonal.max():
        return np.linalg.eigh(matrix)
    order = np.argsort(diagonal)
    return diagonal[order], np.eye(len(matrix))[:, order]


def _evidence(
    squared: Array, projected: Array, outside: Array, n: int, width: int, steps: int
) -> Array:
    """Return the maximal evidence of each class divided by n, (C,)."""
    alpha = np.ones(projected.shape[1])
    beta = np.ones(projected.shape[1])
    for _ in range(steps):
        damped = alpha + beta * squared[:, None]  # (r, C)
        gamma = (beta * squared[:, None] / damped).sum(axis=0)
        weight = (beta**2 * squared[:, None] * projected / damped**2).sum(axis=0)
        residual = (alpha**2 * projected / damped**2).sum(axis=0) + outside
        new_alpha = np.clip(gamma / np.maximum(weight, 1e-12), 1e-12, 1e12)
        new_beta = np.clip((n - gamma) / np.maximum(residual, 1e-12), 1e-12, 1e12)
        moved = np.abs(new_alpha / alpha - 1).max() + np.abs(new_beta / beta - 1).max()
        alpha, beta = new_alpha, new_beta
        if moved < 1e-4:  # the evidence is stationary there: its own error is the square
            break
    damped = alpha + beta * squared[:, None]
    weight = (beta**2 * squared[:, None] * projected / damped**2).sum(axis=0)
    residual = (alpha**2 * projected / damped**2).sum(axis=0) + outside
    rank = len(squared)
    log_det = np.log(damped).sum(axis=0) + (width - rank) * np.log(alpha)
    evidence = 0.5 * (
        n * np.log(beta)
        + width * np.log(alpha)
        - n * np.log(2 * np.pi)
        - beta * residual
        - alpha * weight
        - log_det
    )
    return evidence / n
