"""What every metric does to its arrays first: shapes, finite values, float64, degenerate cases."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmlayers.errors import UserError

Array = NDArray[np.float64]
Labels = NDArray[np.int64]

# Below this ratio of spread to size, items differ by rounding only (float32 keeps about 1e-7).
SAME = 1e-6


def matrix(x: Any, name: str = "x", smallest_n: int = 1) -> Array:
    """Return `x` as a finite float64 matrix, (item, width).

    Raises:
        UserError: Wrong number of axes, too few rows, or a value that is NaN or infinite.
    """
    array = np.asarray(x, dtype=np.float64)
    if array.ndim != 2:
        raise UserError(f"{name} has shape {array.shape}; expected (item, width)")
    if len(array) < smallest_n:
        raise UserError(f"{name} has {len(array)} items; at least {smallest_n} are needed")
    if not np.isfinite(array).all():
        row, column = np.argwhere(~np.isfinite(array))[0]
        raise UserError(f"{name} has NaN or Inf, first at item {row}, column {column}")
    return array


def centred(x: Any, name: str = "x", smallest_n: int = 2) -> Array:
    """Return `x` in float64 with the mean of each column removed.

    Raises:
        UserError: As `matrix`, or all items are the same up to rounding.
    """
    array = matrix(x, name, smallest_n)
    mean = array.mean(axis=0)
    result = array - mean
    if not varies(result, mean):
        raise UserError(f"{name} has the same features for all {len(array)} items")
    return result


def varies(centred_x: Array, mean: Array) -> bool:
    """Return whether the items differ by more than the rounding of their common mean."""
    spread = np.sqrt(np.square(centred_x).sum() / len(centred_x))
    return bool(spread > SAME * np.sqrt(np.square(mean).sum()) and spread > 0.0)


def paired(x: Any, y: Any, smallest_n: int = 2) -> tuple[Array, Array]:
    """Return two centred matrices whose rows belong together.

    Raises:
        UserError: As `centred`, or the numbers of rows differ.
    """
    if len(x) != len(y):
        raise UserError(f"x has {len(x)} items and y has {len(y)}; rows must be paired")
    return centred(x, "x", smallest_n), centred(y, "y", smallest_n)


def unit(x: Any, name: str = "x", smallest_n: int = 1) -> Array:
    """Return the rows of `x` at length 1, float64.

    Raises:
        UserError: As `matrix`, or a row of zeros, which has no direction.
    """
    array = matrix(x, name, smallest_n)
    length = np.linalg.norm(array, axis=1, keepdims=True)
    if not length.all():
        raise UserError(f"{name} has a row of zeros (item {int(np.argmin(length))}): no direction")
    return array / length


def unit_rows(x: Array) -> Array:
    """Return the rows of `x` at length 1; a row of zeros, which has no direction, stays."""
    length = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(length > 0.0, length, 1.0)


def classes(labels: Any, n: int, smallest_class: int = 1) -> Labels:
    """Return labels renumbered 0..C−1 without holes, (item,).

    Raises:
        UserError: Wrong length, fewer than two classes, or a class with too few items.
    """
    given = np.asarray(labels)
    if given.shape != (n,):
        raise UserError(f"labels have shape {given.shape}; expected ({n},)")
    _, numbered, counts = np.unique(given, return_inverse=True, return_counts=True)
    if len(counts) < 2:
        raise UserError(f"labels name {len(counts)} class; at least 2 are needed")
    if counts.min() < smallest_class:
        raise UserError(
            f"a class has {counts.min()} items; at least {smallest_class} per class are needed"
        )
    return numbered.astype(np.int64)


def ratio(top: Array, bottom: Array) -> Array:
    """Return top / bottom, NaN where the bottom is not positive: a draw that holds no pair."""
    out = np.full(np.broadcast(top, bottom).shape, np.nan)
    return np.divide(top, bottom, out=out, where=bottom > 0)


def one_hot(labels: Labels) -> Array:
    """Return the class indicator matrix, (item, class)."""
    return np.eye(int(labels.max()) + 1)[labels]


def squared_distances(x: Array, y: Array | None = None) -> Array:
    """Return squared Euclidean distances between rows, (n, m), never negative."""
    other = x if y is None else y
    cross = x @ other.T
    result = np.square(x).sum(1)[:, None] + np.square(other).sum(1)[None, :] - 2.0 * cross
    np.maximum(result, 0.0, out=result)
    if y is None:
        np.fill_diagonal(result, 0.0)
    return result


def triangle(x: Array) -> Array:
    """Return the triangular factor of QR: the same inner products of columns in fewer rows."""
    return np.asarray(np.linalg.qr(x, mode="r"))
