"""Linear CKA of every layer of one model with every layer of another, for any number of items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlmlayers.arguments import Count, checked
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.metrics.agreement import biased_signature, debiased_signature, linear_kernel
from vlmlayers.metrics.checks import Array, matrix, numbers, varies
from vlmlayers.metrics.moments import hsic
from vlmlayers.words import counted

GRAM_BYTES = 2**29  # kept Gram matrices may take half a gigabyte, else features are summed


@checked
def cka_matrix(
    xs: Sequence[Any],
    ys: Sequence[Any],
    *,
    debiased: bool = True,
    form: str = "auto",
    block: Count = 8192,
) -> Array:
    """Return linear CKA of each of `xs` with each of `ys`, (len(xs), len(ys)).

    The Gram form keeps one n × n matrix per layer and costs n² per cell. The feature form reads
    the rows in blocks and keeps width × width sums: its memory does not grow with n.

    Args:
        xs: Layers, (item, width) each; rows of all layers belong together.
        ys: Layers of the other model or tower.
        debiased: Use the unbiased estimate of HSIC (n ≥ 4).
        form: `gram`, `feature` or `auto`: the one with fewer operations, within memory.
        block: Rows per block of the feature form.

    Raises:
        UserError: Rows not paired, too few items, constant or NaN features.

    Reference: Kornblith et al. 2019; debiased: Song et al. 2012.
    """
    check_one_of("form", form, ("auto", "gram", "feature"))
    xs, ys = _layers(xs), _layers(ys)
    sizes = {len(z) for z in [*xs, *ys]}
    if len(sizes) != 1:
        raise UserError(f"layers have {sorted(sizes)} items; rows must be paired")
    n = sizes.pop()
    if n < 4:
        raise UserError(f"{counted(n, 'item')}; at least 4 are needed")
    if form == "auto":
        form = cheaper_form(n, [z.shape[1] for z in xs], [z.shape[1] for z in ys])
    return _by_gram(xs, ys, debiased) if form == "gram" else _by_features(xs, ys, debiased, block)


def _layers(side: Sequence[Any]) -> list[Any]:
    """Return layers as arrays; what has a shape stays, as it may be read in blocks from a file."""
    layers = [z if hasattr(z, "shape") else numbers(z, "a layer") for z in side]
    if not layers or any(len(z.shape) != 2 for z in layers):
        raise UserError("cka_matrix takes two lists of layers, (item, width) each")
    return layers


def cheaper_form(n: int, widths: Sequence[int], others: Sequence[int]) -> str:
    """Return the form that needs fewer operations and whose matrices fit."""
    layers = len(widths) + len(others)
    gram = n * n * (sum(widths) + sum(others) + len(widths) * len(others))
    own = sum(d * d for d in [*widths, *others])
    feature = n * (sum(widths) * sum(others) + own)
    return "gram" if gram < feature and layers * n * n * 8 <= GRAM_BYTES else "feature"


def _by_gram(xs: Sequence[Any], ys: Sequence[Any], debiased: bool) -> Array:
    signature = debiased_signature if debiased else biased_signature

    def stacked(side: Sequence[Any]) -> Array:
        rows = np.empty((len(side), len(side[0]) ** 2))
        for row, z in zip(rows, side):
            row[:] = signature(linear_kernel(matrix(z))).ravel()
        return rows

    # The same arrays, not equal ones: within a tower every signature is made once.
    same = len(xs) == len(ys) and all(x is y for x, y in zip(xs, ys, strict=True))
    first = stacked(xs)
    return first @ (first if same else stacked(ys)).T


def _by_features(xs: Sequence[Any], ys: Sequence[Any], debiased: bool, block: int) -> Array:
    n = len(xs[0])
    means = [[_mean(z, block) for z in side] for side in (xs, ys)]
    # Own HSIC first: it refuses constant layers before the many cells are computed.
    own = [
        np.array([_hsic(z, [z], m, [m], block, debiased)[0] for z, m in zip(side, centres)])
        for side, centres in zip((xs, ys), means)
    ]
    if min(o.min() for o in own) <= 0.0:
        raise UserError(f"the {n} items have no agreement with themselves; use more items")
    cross = np.stack([_hsic(x, ys, m, means[1], block, debiased) for x, m in zip(xs, means[0])])
    return cross / np.sqrt(np.outer(*own))


def _mean(x: Any, block: int) -> Array:
    """Return the mean row in float64.

    Raises:
        UserError: NaN, or all items are the same.
    """
    n = len(x)
    total = sum(matrix(x[i : i + block]).sum(axis=0) for i in range(0, n, block))
    mean = np.asarray(total / n)
    # A second pass: a variance from sums of squares would lose its digits to a large mean.
    blocks = (matrix(x[i : i + block]) - mean for i in range(0, n, block))
    if not any(varies(rows, mean) for rows in blocks):
        raise UserError(f"the features of all {n} items are the same")
    return mean


def _hsic(
    x: Any, ys: Sequence[Any], mean: Array, means: Sequence[Array], block: int, debiased: bool
) -> Array:
    """Return n(n − 3) HSIC (or ‖XᵀY‖²) of one layer with several, summed over blocks of rows."""
    n = len(x)
    cross = [np.zeros((x.shape[1], y.shape[1])) for y in ys]
    sizes, joint, own = np.zeros(len(ys)), np.zeros(len(ys)), 0.0
    for start in range(0, n, block):
        rows = slice(start, start + block)
        # Centred first, which leaves HSIC as it is, and several of its terms zero.
        a = matrix(x[rows]) - mean
        squares = np.square(a).sum(axis=1)
        own += float(squares.sum())
        for j, (y, centre) in enumerate(zip(ys, means)):
            b = a if y is x else matrix(y[rows]) - centre
            cross[j] += a.T @ b
            others = squares if y is x else np.square(b).sum(axis=1)
            sizes[j] += others.sum()
            joint[j] += squares @ others
    sums = zip(cross, sizes, joint)
    return np.array([hsic(n, c, own, size, both, debiased) for c, size, both in sums])
