"""Read-outs: a classifier fitted on some items says the class of others.

Each takes (fitting features, their classes, validation features, their classes, features) and
returns the predicted class of each row. Every class weighs the same, whatever its size.
`normalise` says what comes first: `columns` to mean 0 and variance 1 of the fitting part, `rows` to
length 1, or `none` (the mean of the fitting part is removed, nothing else).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
SIDE_BY_SIDE = 1_000_000  # Numbers in the products of regressions that are fitted side by side.
WORTH_LEAVING = 0.75  # Share of problems still at work below which copying them pays.
Kept = NDArray[np.bool_]
Part = tuple[Array, Labels, Array, Labels, Array]  # as the arguments of a read-out


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
    part = fit, fit_labels, val, val_labels, x
    return logistic_of_parts([part], classes=classes, c_grid=c_grid, normalise=normalise)[0]


def logistic_of_parts(
    parts: Sequence[Part],
    *,
    classes: int,
    c_grid: tuple[float, ...] = C_GRID,
    normalise: str = "columns",
) -> list[Labels]:
    """Return what `logistic` predicts for each of several parts, fitted side by side."""
    fits, chosen_on = [], []
    for fit, fit_labels, val, val_labels, x in parts:
        fits.append((fit, class_ids(fit_labels, len(fit), classes, "fit_labels"), (val, x)))
        chosen_on.append(class_ids(val_labels, len(val), classes, "val_labels"))
    found = logistic_logits(fits, classes=classes, c_grid=c_grid, normalise=normalise)
    return [
        logits[_best_c(on_val, labels, classes)].argmax(axis=1)
        for (on_val, logits), labels in zip(found, chosen_on)
    ]


def logistic_logits(
    fits: Sequence[tuple[Array, Labels, Sequence[Array]]],
    *,
    classes: int,
    c_grid: tuple[float, ...] = C_GRID,
    normalise: str = "columns",
) -> list[list[Array]]:
    """Return the logits of every C, (C, item, class), of regressions fitted side by side.

    Args:
        fits: Of each the fitting features, their classes, and the features to classify.
        classes: Number of classes.
        c_grid: Inverse strengths of the ridge.
        normalise: See the module.
    """
    scaled, rest = [], []
    for fit, _, others in fits:
        own, *others = normalised(fit, *others, how=normalise)
        own, others = _rotate(own, others)
        scaled.append(own)
        rest.append(others)
    found = []
    largest = max(1, *(x.size for x in scaled))  # a constant position has no columns left
    most = max(1, SIDE_BY_SIDE // (largest * len(c_grid) * classes))
    for first in range(0, len(fits), most):
        batch = slice(first, first + most)
        labels = [labels for _, labels, _ in fits[batch]]
        solutions = _solve(scaled[batch], labels, classes, np.asarray(c_grid))
        for others, (weights, intercepts) in zip(rest[batch], solutions):
            found.append([x @ weights + intercepts for x in others])
    return found


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


def _best_c(logits: Array, labels: Labels, classes: int) -> int:
    weights = _balanced_weights(labels, classes)
    right = (logits.argmax(axis=2) == labels) @ weights
    loss = (_log_sum_exp(logits) - logits[:, np.arange(len(labels)), labels]) @ weights
    return int(np.lexsort((loss, -right))[0])


def _log_sum_exp(logits: Array) -> Array:
    top = logits.max(axis=-1, keepdims=True)
    return np.log(np.exp(logits - top).sum(axis=-1)) + top[..., 0]


def _solve(
    xs: Sequence[Array],
    labels: Sequence[Labels],
    classes: int,
    c_grid: Array,
    steps: int = 200,
    tolerance: float = 1e-4,
    memory: int = 10,
) -> list[tuple[Array, Array]]:
    """Return weights, (C, width, class), and intercepts, (C, 1, class), of every regression.

    L-BFGS on all regressions and all C at once, since one of them alone is too small to keep numpy
    busy. Each keeps its own curvature pairs and step length, and leaves when it has converged.
    """
    problems = _Problems.of(xs, labels, classes, c_grid)
    splits, grid = len(xs), len(c_grid)
    solution = np.zeros((splits, grid, problems.x.shape[2], classes))
    rows, columns = np.arange(splits), np.arange(grid)
    w = solution.copy()
    value, gradient = problems.value_and_gradient(w)
    pairs: list[tuple[Array, Array, Array]] = []
    for _ in range(steps):
        active = np.abs(gradient).max(axis=(2, 3)) > tolerance
        if not active.any():
            break
        here, there = _kept(active)
        if here.sum() * there.sum() <= WORTH_LEAVING * active.size:
            solution[np.ix_(rows, columns)] = w
            rows, columns, problems = rows[here], columns[there], problems.take(here, there)
            chosen = np.ix_(here, there)
            w, value, gradient, active = (a[chosen] for a in (w, value, gradient, active))
            pairs = [(s[chosen], c[chosen], u[chosen]) for s, c, u in pairs]
        direction = -_two_loop(gradient, pairs)
        slope = _dot(direction, gradient)
        bad = slope >= 0.0
        direction[bad], slope[bad] = -gradient[bad], -_dot(gradient, gradient)[bad]
        size = np.ones(value.shape)
        if not pairs:
            size = np.minimum(1.0, 1.0 / np.maximum(np.abs(gradient).sum(axis=(2, 3)), 1e-12))
        size = np.where(active, size, 0.0)
        new_w = w + size[..., None, None] * direction
        new_value, new_gradient = problems.value_and_gradient(new_w)
        for _ in range(20):
            failed = new_value > value + 1e-4 * size * slope + 1e-12
            if not failed.any():
                break
            size = np.where(failed, 0.5 * size, size)
            here, there = _kept(failed)
            again, part = np.ix_(here, there), problems.take(here, there)
            new_w[again] = w[again] + size[again][..., None, None] * direction[again]
            new_value[again], new_gradient[again] = part.value_and_gradient(new_w[again])
        step, change = new_w - w, new_gradient - gradient
        curvature = _dot(step, change)
        usable = np.where(curvature > 1e-14, curvature, 0.0)
        pairs = [*pairs[-(memory - 1) :], (step, change, usable)]
        w, value, gradient = new_w, new_value, new_gradient
    solution[np.ix_(rows, columns)] = w
    return [(own[:, : x.shape[1]], own[:, -1:]) for own, x in zip(solution, xs)]


@dataclass(frozen=True)
class _Problems:
    """Regressions side by side, padded with rows that weigh nothing and columns of zeros.

    Attributes:
        x: (split, item, width + 1), the last column ones.
        weights: (split, item), which sum to 1.
        target: (split, 1, width + 1, class), weighted sums of the items of each class.
        penalty: (split, C, width + 1, 1), 0 at the intercept.
    """

    x: Array
    weights: Array
    target: Array
    penalty: Array

    @classmethod
    def of(
        cls, xs: Sequence[Array], labels: Sequence[Labels], classes: int, c_grid: Array
    ) -> _Problems:
        items, width = max(map(len, xs)), max(x.shape[1] for x in xs)
        x = np.zeros((len(xs), items, width + 1))
        weights = np.zeros((len(xs), items))
        target = np.zeros((len(xs), 1, width + 1, classes))
        for number, (own, own_labels) in enumerate(zip(xs, labels)):
            n = len(own)
            x[number, :n, : own.shape[1]] = own
            x[number, :n, -1] = 1.0
            weights[number, :n] = _balanced_weights(own_labels, classes) / n
            shares = np.eye(classes)[own_labels] * weights[number, :n, None]
            target[number, 0] = x[number, :n].T @ shares
        sizes = np.array([len(own) for own in xs])
        penalty = np.repeat(1.0 / np.outer(sizes, c_grid)[..., None, None], width + 1, axis=2)
        penalty[:, :, -1] = 0.0
        return cls(x, weights, target, penalty)

    def take(self, rows: Kept, columns: Kept) -> _Problems:
        """Return some splits and some C."""
        penalty = self.penalty[np.ix_(rows, columns)]
        if rows.all():  # x may be large
            return replace(self, penalty=penalty)
        return _Problems(self.x[rows], self.weights[rows], self.target[rows], penalty)

    def value_and_gradient(self, w: Array) -> tuple[Array, Array]:
        """Return losses, (split, C), and gradients, (split, C, width + 1, class)."""
        splits, grid, width, classes = w.shape
        beside = w.transpose(0, 2, 1, 3).reshape(splits, width, -1)  # one product for all C
        share = (self.x @ beside).reshape(splits, -1, grid, classes)
        top = share.max(axis=3, keepdims=True)
        np.exp(np.subtract(share, top, out=share), out=share)
        total = share.sum(axis=3, keepdims=True)
        spread = (self.weights[:, None] @ (np.log(total) + top)[..., 0])[:, 0]
        share *= self.weights[..., None, None] / total
        beside = self.x.transpose(0, 2, 1) @ share.reshape(splits, -1, grid * classes)
        mean = beside.reshape(splits, width, grid, classes).transpose(0, 2, 1, 3)
        # Logits are linear: those of the own classes need no look at the items.
        ridge = self.penalty * w
        value = spread + _dot(0.5 * ridge - self.target, w)
        return value, mean + (ridge - self.target)


def _kept(wanted: Kept) -> tuple[Kept, Kept]:
    """Return the splits and the C of which any problem is wanted."""
    return np.asarray(wanted.any(axis=1)), np.asarray(wanted.any(axis=0))


def _dot(a: Array, b: Array) -> Array:
    """Return the inner product of each problem, (split, C)."""
    flat = a.reshape(*a.shape[:2], 1, -1) @ b.reshape(*b.shape[:2], -1, 1)
    product: Array = flat[..., 0, 0]
    return product


def _two_loop(gradient: Array, pairs: list[tuple[Array, Array, Array]]) -> Array:
    """Return the inverse-Hessian product of L-BFGS for every problem."""
    q = gradient.copy()
    if not pairs:
        return q
    scratch = np.empty_like(q)
    alphas = []
    for step, change, curvature in reversed(pairs):
        rho = np.divide(1.0, curvature, out=np.zeros_like(curvature), where=curvature > 0)
        alpha = rho * _dot(step, q)
        q -= np.multiply(alpha[..., None, None], change, out=scratch)
        alphas.append((alpha, rho))
    _, change, curvature = pairs[-1]
    norm = _dot(change, change)
    scale = np.divide(curvature, norm, out=np.ones_like(norm), where=(curvature > 0) & (norm > 0))
    q *= scale[..., None, None]
    for (step, change, _), (alpha, rho) in zip(pairs, reversed(alphas)):
        beta = alpha - rho * _dot(change, q)
        q += np.multiply(beta[..., None, None], step, out=scratch)
    return q
