"""Read-outs: a classifier fitted on some items predicts the class of others.

Each takes (fitting features, their classes, validation features, their classes, features) and
returns the predicted class of each row. Every class weighs the same, whatever its size.
`normalise` says what comes first: `columns` to mean 0 and variance 1 of the fitting part, `rows` to
length 1, or `none` (the mean of the fitting part is removed, nothing else).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlmlayers.arguments import Count, Positive, checked
from vlmlayers.errors import check_one_of
from vlmlayers.metrics.checks import (
    SAME,
    Array,
    Given,
    Labels,
    batches,
    class_ids,
    class_means,
    class_sums,
    matrix,
    nearest_shares,
    refuse_width,
    squared_distances,
    unit_rows,
)
from vlmlayers.metrics.regression import balanced_weights, log_sum_exp, solve

C_GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
NORMALISE = ("columns", "rows", "none")
Part = tuple[Array, Labels, Array, Labels, Array]  # as the arguments of a read-out


def standardiser(fit: Array) -> tuple[Array, Array]:
    """Return mean and factor per column; columns that are constant up to rounding get 0."""
    mean = fit.mean(axis=0)
    spread = fit.std(axis=0)
    # Scaling a column of pure rounding to variance 1 would make noise as loud as signal.
    constant = spread <= SAME * np.abs(mean)
    return mean, np.where(constant, 0.0, 1.0 / np.where(spread > 0.0, spread, 1.0))


def normalised(fit: Array, *others: Array, how: str = "columns") -> list[Array]:
    """Return all arrays normalised, float64; see the module for what `how` may be.

    Raises:
        UserError: Unknown normalisation, NaN, or another width than the fitting part.
    """
    check_one_of("normalise", how, NORMALISE)
    parts = [matrix(part) for part in (fit, *others)]
    for part in parts[1:]:
        refuse_width(part, "features to classify", parts[0], "those that are fitted")
    if how == "rows":
        parts = [unit_rows(part) for part in parts]
    mean, factor = standardiser(parts[0])
    if how != "columns":
        # Columns that are constant in the fit go in any case: elsewhere they may take any value.
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
    c_grid: tuple[Positive, ...] = C_GRID,
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
    # All problems of a batch hold their padded products at once.
    for batch in batches(len(fits), largest * len(c_grid) * classes):
        labels = [labels for _, labels, _ in fits[batch]]
        solutions = solve(scaled[batch], labels, classes, np.asarray(c_grid))
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
    # Nothing is chosen here, so the validation part goes unused: all read-outs are called alike.
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

    k is at most the size of the smallest class. Votes weigh 1/size of their class; of classes with
    equal votes that of the larger sum of 1 + cosine is predicted. Items that tie for the last
    places take equal shares of them, so that the order of the fitting items tells nothing.

    Reference: Cover and Hart 1967; as used for frozen features by Caron et al. 2021.
    """
    fit_labels = class_ids(fit_labels, len(fit), classes, "fit_labels")
    scaled, x = normalised(fit, x, how=normalise)
    # With more neighbours than the smallest class has items, others would always outvote it.
    k = min(k, int(np.unique(fit_labels, return_counts=True)[1].min()))
    x, fitted = unit_rows(x), unit_rows(scaled).T
    weights = balanced_weights(fit_labels, classes)
    return np.concatenate([
        _outvoting(x[batch] @ fitted, fit_labels, weights, k, classes)
        for batch in batches(len(x), len(scaled))
    ])  # fmt: skip


def _outvoting(
    similarity: Array, fit_labels: Labels, weights: Array, k: int, classes: int
) -> Labels:
    """Return the class that wins the votes of the k most similar, of each row."""
    votes = nearest_shares(similarity, k)
    # What is added by cosine is too little to outvote anything and enough to break a tie.
    votes *= weights + 1e-9 * (1.0 + similarity)
    ballots = class_sums(votes.T, fit_labels, classes).T
    # Sums of equal votes differ by rounding, which must not pick one of the classes.
    most = ballots.max(axis=1, keepdims=True)
    return (ballots >= most * (1.0 - 4e-15)).argmax(axis=1)


def _rotate(fit: Array, others: list[Array]) -> tuple[Array, list[Array]]:
    """Rotate into the span of the fitting items where they are fewer than the columns.

    The ridge penalty is rotation invariant and its solution lies in that span: nothing changes.
    """
    n, width = fit.shape
    if n >= width:
        return fit, others
    values, vectors = np.linalg.eigh(fit @ fit.T)
    # Centred rows span one direction less than there are rows; rounding leaves a trace of it.
    keep = values > 1e-10 * max(values[-1], 1e-300)
    lengths, vectors = np.sqrt(values[keep]), vectors[:, keep]
    # The basis itself, fit.T @ vectors / lengths, is the widest of all matrices: it is not formed.
    return vectors * lengths, [(part @ fit.T) @ (vectors / lengths) for part in others]


def _best_c(logits: Array, labels: Labels, classes: int) -> int:
    # Balanced as in the fit, or the largest class would choose C.
    weights = balanced_weights(labels, classes)
    right = (logits.argmax(axis=2) == labels) @ weights
    loss = (log_sum_exp(logits) - logits[:, np.arange(len(labels)), labels]) @ weights
    # The last key of lexsort is the first that it sorts by.
    return int(np.lexsort((loss, -right))[0])
