"""Can a line tell images from texts? Held-out, because in a wide space it always can on the fit."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np

from vlmlayers.arguments import Natural, Takes, checked
from vlmlayers.errors import UserError
from vlmlayers.metrics.checks import FIXED, Array, Given, Labels, row_pairs, unit
from vlmlayers.metrics.gap import auc_weighted
from vlmlayers.metrics.readouts import logistic_logits


@checked
def modality_auc(
    x: Given,
    y: Given,
    pairs: Any = None,
    *,
    dims: Natural = 0,
    folds: Annotated[int, Takes(least=2)] = 5,
) -> float:
    """Return the held-out AUC of a linear classifier of images against texts.

    Logistic regression (C = 1, both modalities weigh the same) on unit rows, `folds` folds; what
    matches stays in one fold. It saturates at 1 in wide spaces, so `dims` asks for the same on the
    first principal components of the fitting part (0: all columns).

    Raises:
        UserError: Fewer than two groups of matching items.

    Reference: Shi et al. 2023; AUC: Hanley and McNeil 1982.
    """
    ones = np.ones((1, len(x))), np.ones((1, len(y)))
    return float(modality_auc_weighted(x, y, pairs, *ones, dims=dims, folds=folds)[0])


def modality_auc_weighted(
    x: Any, y: Any, pairs: Any, wx: Array, wy: Array, *, dims: int = 0, folds: int = 5
) -> Array:
    """Return the held-out AUC under each row of item weights, (draw,); the fits are shared."""
    x, y = unit(x), unit(y, "y")
    fold_x, fold_y = _folds(len(x), len(y), pairs, folds)
    scores_x, scores_y = np.zeros(len(x)), np.zeros(len(y))
    count = int(fold_x.max()) + 1
    fits = []
    for fold in range(count):
        inside_x, inside_y = fold_x == fold, fold_y == fold
        fit = np.vstack([x[~inside_x], y[~inside_y]])
        labels = np.repeat([0, 1], [int((~inside_x).sum()), int((~inside_y).sum())])
        held = np.vstack([x[inside_x], y[inside_y]])
        if dims:
            fit, held = _principal(fit, held, dims)
        fits.append((fit, labels, [held]))
    # One C: choosing it would need one more split, and an AUC reads only the order of the scores.
    found = logistic_logits(fits, classes=2, c_grid=(1.0,))
    total, sums = 0.0, np.zeros(len(wx))
    for fold, [[logits]] in enumerate(found):
        inside_x, inside_y = fold_x == fold, fold_y == fold
        score = logits[:, 0] - logits[:, 1]
        scores_x[inside_x], scores_y[inside_y] = np.split(score, [int(inside_x.sum())])
        # Scores of different fits have different scales: AUC within the fold, then the mean.
        weight_x, weight_y = wx[:, inside_x], wy[:, inside_y]
        full = (weight_x.sum(axis=1) > 0) & (weight_y.sum(axis=1) > 0)
        # A draw without an image, or without a text, of this fold says nothing: chance.
        part = np.full(len(wx), 0.5)
        part[full] = auc_weighted(
            scores_x[inside_x], scores_y[inside_y], weight_x[full], weight_y[full]
        )
        sums += part * inside_x.sum()
        total += inside_x.sum()
    return sums / total


def _folds(n_x: int, n_y: int, pairs: Any, folds: int) -> tuple[Labels, Labels]:
    """Return the fold of each image and of each text; matching rows share a fold."""
    pairs = row_pairs(pairs, n_x, n_y)
    # A group is one of the fewer side with all its matches, such as an image with its captions.
    by_text = len(np.unique(pairs[:, 0])) >= len(np.unique(pairs[:, 1]))
    groups = n_y if by_text else n_x
    if groups < 2:
        raise UserError("images and texts form one group; a held-out AUC needs at least 2")
    dealt = np.random.default_rng(FIXED).permutation(groups) % min(folds, groups)
    fold_x, fold_y = np.zeros(n_x, dtype=np.int64), np.zeros(n_y, dtype=np.int64)
    if by_text:
        fold_y[:] = dealt
        fold_x[pairs[:, 0]] = dealt[pairs[:, 1]]
    else:
        fold_x[:] = dealt
        fold_y[pairs[:, 1]] = dealt[pairs[:, 0]]
    return fold_x, fold_y


def _principal(fit: Array, held: Array, dims: int) -> tuple[Array, Array]:
    mean = fit.mean(axis=0)
    spread = fit - mean
    if len(fit) < fit.shape[1]:
        values, vectors = np.linalg.eigh(spread @ spread.T)
        # Of fewer rows than columns the same directions come from the smaller matrix.
        length = np.sqrt(np.maximum(values[-dims:], 1e-300))
        basis = spread.T @ (vectors[:, -dims:] / length)
    else:
        # Ascending, unlike an SVD: the last directions are the largest.
        basis = np.linalg.eigh(spread.T @ spread)[1][:, -dims:]
    return (fit - mean) @ basis, (held - mean) @ basis
