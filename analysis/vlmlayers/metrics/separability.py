"""Can a line tell images from texts? Held-out, because in a wide space it always can on the fit."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Annotated, Any

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from vlmlayers.arguments import Natural, Takes, checked
from vlmlayers.errors import UserError
from vlmlayers.metrics.checks import FIXED, Array, Given, Labels, batches, row_pairs, unit
from vlmlayers.metrics.gap import auc
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

    Logistic regression on unit rows, their columns standardised on the fitting part, both
    modalities weighing the same, `folds` folds; what matches stays in one fold. It saturates at 1
    in wide spaces, so `dims` asks for the same on the first principal components of the fitting
    part, which the standardising whitens (0: all columns).

    That is `logistic` at C = 1, whose ridge is on a column of weights of either modality; of one
    column, their difference, it is C = 2: scikit-learn's, with `class_weight="balanced"`.

    Raises:
        UserError: Fewer than two groups of matching items.

    Reference: Shi et al. 2023; AUC: Hanley and McNeil 1982.
    """
    x, y = unit(x), unit(y, "y")
    fold_x, fold_y = _folds(len(x), len(y), pairs, folds)
    count = int(fold_x.max()) + 1
    of_fold = _aucs(x, y, fold_x, fold_y, [(fold,) for fold in range(count)], dims)
    return float(np.bincount(fold_x) @ np.diagonal(of_fold) / len(x))


def modality_auc_left_out(x: Any, y: Any, pairs: Any, *, dims: int = 0, folds: int = 5) -> Array:
    """Return the held-out AUC without each of the folds, fitted without it as well, (fold,).

    NaN where fewer than three folds leave nothing to fit on.
    """
    x, y = unit(x), unit(y, "y")
    fold_x, fold_y = _folds(len(x), len(y), pairs, folds)
    sizes = np.bincount(fold_x)
    if len(sizes) < 3:
        return np.full(len(sizes), np.nan)
    # What is fitted without two folds serves twice: either is held out where the other is left out.
    pairs_of_folds = list(combinations(range(len(sizes)), 2))
    held = _aucs(x, y, fold_x, fold_y, pairs_of_folds, dims)  # (held out, left out)
    weights = sizes[:, None] * ~np.eye(len(sizes), dtype=bool)
    return np.asarray((weights * held).sum(axis=0) / weights.sum(axis=0))


def _aucs(
    x: Array,
    y: Array,
    fold_x: Labels,
    fold_y: Labels,
    absent: Sequence[tuple[int, ...]],
    dims: int,
) -> Array:
    """Return the AUC of each fold by fits without some folds, (fold, the other fold or itself)."""
    found: list[list[Array]] = []
    # Each fit copies most of the rows of both modalities; a few that are small are held together.
    for batch in batches(len(absent), (x.size + y.size) // 2):
        fits = []
        for folds in absent[batch]:
            out_x, out_y = np.isin(fold_x, folds), np.isin(fold_y, folds)
            fit = np.vstack([x[~out_x], y[~out_y]])
            labels = np.repeat([0, 1], [int((~out_x).sum()), int((~out_y).sum())])
            held = [np.vstack([x[fold_x == fold], y[fold_y == fold]]) for fold in folds]
            if dims:
                fit, held = _principal(fit, held, dims)
            fits.append((fit, labels, held))
        # One C: choosing it would need one more split, and an AUC reads only the order of scores.
        found += logistic_logits(fits, classes=2, c_grid=(1.0,))
    count = int(fold_x.max()) + 1
    of_fold = np.zeros((count, count))
    for folds, parts in zip(absent, found):
        for fold, other, [logits] in zip(folds, folds[::-1], parts):
            # Scores of different fits have different scales: AUC within the fold, then the mean.
            images, texts = np.split(logits[:, 0] - logits[:, 1], [int((fold_x == fold).sum())])
            of_fold[fold, other] = auc(images, texts)
    return of_fold


def _folds(n_x: int, n_y: int, pairs: Any, folds: int) -> tuple[Labels, Labels]:
    """Return the fold of each image and of each text; matching rows share a fold."""
    pairs = row_pairs(pairs, n_x, n_y)
    # A group is all that matches by way of others, such as an image with its captions. Those of
    # the fewer side come first, and groups are numbered by their first item.
    by_text = len(np.unique(pairs[:, 0])) >= len(np.unique(pairs[:, 1]))
    starts = np.array((n_y, 0) if by_text else (0, n_x))  # of images and of texts
    ends = (pairs + starts).T
    shape = n_x + n_y, n_x + n_y
    links = csr_array((np.ones(len(pairs)), (ends[0], ends[1])), shape=shape)
    count, group = connected_components(links, directed=False)
    # Dealt first, so that every fold has images and texts; what has no match is dealt apart.
    matched = np.unique(group[ends[0]])
    if len(matched) < 2:
        raise UserError("images and texts form one group; a held-out AUC needs at least 2")
    rng = np.random.default_rng(FIXED)
    dealt = np.zeros(count, dtype=np.int64)
    for some in (matched, np.setdiff1d(np.arange(count), matched)):
        dealt[some] = rng.permutation(len(some)) % min(folds, len(matched))
    fold_x, fold_y = (dealt[group[start:][:n]] for start, n in zip(starts, (n_x, n_y)))
    return fold_x, fold_y


def _principal(fit: Array, held: Sequence[Array], dims: int) -> tuple[Array, list[Array]]:
    mean = fit.mean(axis=0)
    spread = fit - mean
    if len(fit) < fit.shape[1]:
        values, vectors = np.linalg.eigh(spread @ spread.T)
        # Of fewer rows than columns the same directions come from the smaller matrix.
        # There are no more than rows span: what rounding leaves of the rest is no direction.
        kept = values[-dims:] > 1e-12 * max(values[-1], 1e-300)
        basis = spread.T @ (vectors[:, -dims:][:, kept] / np.sqrt(values[-dims:][kept]))
    else:
        # Ascending, unlike an SVD: the last directions are the largest.
        basis = np.linalg.eigh(spread.T @ spread)[1][:, -dims:]
    return spread @ basis, [(part - mean) @ basis for part in held]
