"""Read-outs: a classifier fitted on some items says the class of others.

Each takes (fitting features, their classes, validation features, their classes, features) and
returns the predicted class of each row. Every class weighs the same, whatever its size.
`normalise` says what comes first: `columns` to mean 0 and variance 1 of the fitting part, `rows` to
length 1, or `none` (the mean of the fitting part is removed, nothing else).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vlmlayers.arguments import Count, checked
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.metrics.checks import (
    SAME,
    Array,
    Given,
    Labels,
    class_ids,
    matrix,
    squared_distances,
    unit_rows,
)

C_GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
NORMALISE = ("columns", "rows", "none")


def standardiser(fit: Array) -> tuple[Array, Array]:
    """Return mean and factor per column; columns that are constant up to rounding get 0."""
    mean = fit.mean(axis=0)
    spread = fit.std(axis=0)
    constant = spread <= SAME * np.abs(mean)
    return mean, np.where(constant, 0.0, 1.0 / np.where(spread > 0.0, spread, 1.0))


def standardised(fit: Array, *others: Array) -> list[Array]:
    """Return all arrays scaled to zero mean and unit variance of the fitting part, float64."""
    return normalised(fit, *others)


def normalised(fit: Array, *others: Array, how: str = "columns") -> list[Array]:
    """Return all arrays normalised, float64; see the module for what `how` may be.

    Raises:
        UserError: Unknown normalisation, NaN, or another width than the fitting part.
    """
    check_one_of("normalise", how, NORMALISE)
    parts = [matrix(part) for part in (fit, *others)]
    for part in parts[1:]:
        if part.shape[1] != parts[0].shape[1]:
            raise UserError(
                f"features to classify have width {part.shape[1]}, those that are fitted "
                f"{parts[0].shape[1]}"
            )
    if how == "rows":
        parts = [unit_rows(part) for part in parts]
    mean, factor = standardiser(parts[0])
    if how != "columns":
        factor = (factor > 0.0).astype(np.float64)
    return [(part - mean) * factor for part in parts]


@checked
def logistic(
    fit: Given,
    fit_labels: Any,
    val: Given,
    val_labels: Any,
    x: Given,
    *,
    classes: Count,
    c_grid: tuple[float, ...] = C_GRID,
    normalise: str = "columns",
) -> Labels:
    """Predict by multinomial logistic regression, C chosen on the validation part.

    Minimises C Σ w_i cross-entropy_i + ½‖W‖² with an unpenalised intercept, by L-BFGS, for all C
    at once; the C with the best validation accuracy (then the smallest loss) predicts.

    Reference: Radford et al. 2021, section A.3 (linear probes of CLIP).
    """
    fit_labels = class_ids(fit_labels, len(fit), classes, "fit_labels")
    val_labels = class_ids(val_labels, len(val), classes, "val_labels")
    logits = logistic_logits(
        fit, fit_labels, [val, x], classes=classes, c_grid=c_grid, normalise=normalise
    )
    best = _best_c(logits[0], val_labels, classes)
    return logits[1][best].argmax(axis=1)


def logistic_logits(
    fit: Array,
    fit_labels: Labels,
    parts: list[Array],
    *,
    classes: int,
    c_grid: tuple[float, ...] = C_GRID,
    normalise: str = "columns",
) -> list[Array]:
    """Return for each part the logits of every C, (C, item, class)."""
    scaled, *others = normalised(fit, *parts, how=normalise)
    scaled, others = _rotate(scaled, others)
    weights = _balanced_weights(fit_labels, classes)
    solution = _solve(_with_ones(scaled), fit_labels, weights, classes, np.asarray(c_grid))
    return [np.einsum("nd,gdk->gnk", _with_ones(part), solution, optimize=True) for part in others]


@checked
def nearest_mean(
    fit: Given,
    fit_labels: Any,
    val: Given,
    val_labels: Any,
    x: Given,
    *,
    classes: Count,
    normalise: str = "columns",
) -> Labels:
    """Predict the class whose mean is nearest (Euclidean, normalised features).

    Reference: Mensink et al. 2013 (nearest class mean).
    """
    fit_labels = class_ids(fit_labels, len(fit), classes, "fit_labels")
    scaled, x = normalised(fit, x, how=normalise)
    means = class_means(scaled, fit_labels, classes)
    return squared_distances(x, means).argmin(axis=1)


@checked
def k_nearest(
    fit: Given,
    fit_labels: Any,
    val: Given,
    val_labels: Any,
    x: Given,
    *,
    classes: Count,
    k: Count = 10,
    normalise: str = "columns",
) -> Labels:
    """Predict by the votes of the k nearest fitting items (cosine, normalised features).

    k is at most the size of the smallest class. Votes weigh 1/size of their class; the nearest
    neighbour breaks ties.

    Reference: Cover and Hart 1967; as used for frozen features by Caron et al. 2021.
    """
    fit_labels = class_ids(fit_labels, len(fit), classes, "fit_labels")
    scaled, x = normalised(fit, x, how=normalise)
    k = min(k, int(np.bincount(fit_labels, minlength=classes).min()))
    near = np.argsort(-(unit_rows(x) @ unit_rows(scaled).T), axis=1, kind="stable")[:, :k]
    votes = _balanced_weights(fit_labels, classes)[near] + 1e-9 * np.arange(k, 0, -1)
    ballots = np.zeros((len(x), classes))
    np.add.at(ballots, (np.arange(len(x))[:, None], fit_labels[near]), votes)
    return ballots.argmax(axis=1)


def class_means(x: Array, labels: Labels, classes: int) -> Array:
    """Return the mean of each class, (class, width)."""
    counts = np.bincount(labels, minlength=classes)
    sums = np.eye(classes)[:, labels] @ x
    return sums / np.maximum(counts, 1)[:, None]


def _balanced_weights(labels: Labels, classes: int) -> Array:
    """Return item weights with mean 1 that make every class weigh the same."""
    counts = np.bincount(labels, minlength=classes)
    present = np.count_nonzero(counts)
    return len(labels) / (present * counts[labels])


def _rotate(fit: Array, others: list[Array]) -> tuple[Array, list[Array]]:
    """Rotate into the span of the fitting items where they are fewer than the columns.

    The ridge penalty is rotation invariant and its solution lies in that span: nothing changes.
    """
    n, width = fit.shape
    if n >= width:
        return fit, others
    values, vectors = np.linalg.eigh(fit @ fit.T)
    keep = values > 1e-10 * max(values[-1], 1e-300)
    basis = fit.T @ (vectors[:, keep] / np.sqrt(values[keep]))  # (width, rank)
    return fit @ basis, [part @ basis for part in others]


def _with_ones(x: Array) -> Array:
    return np.hstack([x, np.ones((len(x), 1))])


def _best_c(logits: Array, labels: Labels, classes: int) -> int:
    weights = _balanced_weights(labels, classes)
    right = (logits.argmax(axis=2) == labels) @ weights
    loss = (_log_sum_exp(logits) - logits[:, np.arange(len(labels)), labels]) @ weights
    return int(np.lexsort((loss, -right))[0])


def _log_sum_exp(logits: Array) -> Array:
    top = logits.max(axis=-1, keepdims=True)
    return np.log(np.exp(logits - top).sum(axis=-1)) + top[..., 0]


def _solve(
    x: Array,
    labels: Labels,
    weights: Array,
    classes: int,
    c_grid: Array,
    steps: int = 200,
    tolerance: float = 1e-4,
    memory: int = 10,
) -> Array:
    """Return the coefficients for every C, (C, width, class), by L-BFGS on all C at once.

    One product X·W serves all C; every C keeps its own curvature pairs and step length.
    """
    n, width = x.shape
    grid = len(c_grid)
    penalty = np.ones(width)
    penalty[-1] = 0.0
    penalty = penalty[None, :, None] / (c_grid[:, None, None] * n)
    rows = np.arange(n)

    def value_and_gradient(w: Array) -> tuple[Array, Array]:
        logits = (x @ w.transpose(1, 0, 2).reshape(width, -1)).reshape(n, grid, classes)
        top = logits.max(axis=2, keepdims=True)
        share = np.exp(logits - top)
        total = share.sum(axis=2, keepdims=True)
        loss = np.log(total[..., 0]) + top[..., 0] - logits[rows, :, labels]
        share /= total
        share[rows, :, labels] -= 1.0
        share *= weights[:, None, None] / n
        gradient = (x.T @ share.reshape(n, -1)).reshape(width, grid, classes).transpose(1, 0, 2)
        value = weights @ loss / n + 0.5 * (penalty * w * w).sum(axis=(1, 2))
        return value, gradient + penalty * w

    w = np.zeros((grid, width, classes))
    value, gradient = value_and_gradient(w)
    pairs: list[tuple[Array, Array, Array]] = []
    for _ in range(steps):
        active = np.abs(gradient).max(axis=(1, 2)) > tolerance
        if not active.any():
            break
        direction = -_two_loop(gradient, pairs)
        slope = _dot(direction, gradient)
        bad = slope >= 0.0
        direction[bad], slope[bad] = -gradient[bad], -_dot(gradient, gradient)[bad]
        size = np.ones(grid)
        if not pairs:
            size = np.minimum(1.0, 1.0 / np.maximum(np.abs(gradient).sum(axis=(1, 2)), 1e-12))
        size = np.where(active, size, 0.0)
        for _ in range(20):
            new_w = w + size[:, None, None] * direction
            new_value, new_gradient = value_and_gradient(new_w)
            failed = new_value > value + 1e-4 * size * slope + 1e-12
            if not failed.any():
                break
            size = np.where(failed, 0.5 * size, size)
        step, change = new_w - w, new_gradient - gradient
        curvature = _dot(step, change)
        usable = np.where(curvature > 1e-14, curvature, 0.0)
        pairs = [*pairs[-(memory - 1) :], (step, change, usable)]
        w, value, gradient = new_w, new_value, new_gradient
    return w


def _dot(a: Array, b: Array) -> Array:
    """Return the inner product of each problem of the batch, (C,)."""
    return np.einsum("gi,gi->g", a.reshape(len(a), -1), b.reshape(len(b), -1))


def _two_loop(gradient: Array, pairs: list[tuple[Array, Array, Array]]) -> Array:
    """Return the inverse-Hessian product of L-BFGS for every problem of the batch."""
    q = gradient.copy()
    if not pairs:
        return q
    alphas = []
    for step, change, curvature in reversed(pairs):
        rho = np.divide(1.0, curvature, out=np.zeros_like(curvature), where=curvature > 0)
        alpha = rho * _dot(step, q)
        q -= alpha[:, None, None] * change
        alphas.append((alpha, rho))
    _, change, curvature = pairs[-1]
    norm = _dot(change, change)
    scale = np.divide(curvature, norm, out=np.ones_like(norm), where=(curvature > 0) & (norm > 0))
    q *= scale[:, None, None]
    for (step, change, _), (alpha, rho) in zip(pairs, reversed(alphas)):
        q += (alpha - rho * _dot(change, q))[:, None, None] * step
    return q
