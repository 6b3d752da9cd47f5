"""What every metric does to its arrays first: shapes, finite values, float64, degenerate cases."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from vlmlayers.arguments import Takes
from vlmlayers.errors import UserError
from vlmlayers.words import counted

Array = NDArray[np.float64]
Labels = NDArray[np.int64]

# Seed of what a metric draws inside itself: it is a function of its arguments alone.
FIXED = 0
# Below this ratio of spread to size, items differ by rounding only (float32 keeps about 1e-7).
SAME = 1e-6
# Equal cosines, and shares of a kernel's norm of which nothing is left, differ by less in float64.
ROUNDING = 1e-12
# Numbers, in what is fitted or compared side by side, that are held at once.
AT_ONCE = 1_000_000
# Products below it are quicker than the preparation of fewer of them.
SMALL = 250_000
# Beyond it, and below its inverse, sums of fourth powers are infinite or nothing in float64.
LARGEST = 1e70


def as_array(x: Any) -> NDArray[Any]:
    """Return an array, a tensor or lists as an array of numbers.

    Raises:
        TypeError, ValueError: It holds something else, such as complex numbers or text.
    """
    if hasattr(x, "detach"):  # a tensor, in whatever precision and wherever it lies
        x = x.detach().cpu()
        # Before numpy sees it, which has no bfloat16.
        x = x.double() if x.is_floating_point() else x
    array = np.asarray(x)
    # Decimals, fractions, and whole numbers beyond 64 bits arrive as objects.
    if array.dtype.kind == "O":
        array = array.astype(np.float64)
    if array.dtype.kind not in "fiub" or not array.ndim:
        raise TypeError(f"{array.dtype} are no real numbers, or it is one number")
    return array


def numbers(x: Any, name: str) -> NDArray[Any]:
    """Return `x` as an array of numbers.

    Raises:
        UserError: It holds something else, or rows of different lengths.
    """
    try:
        return as_array(x)
    except (TypeError, ValueError):
        raise UserError(f"{name} holds no numbers, or rows of different lengths") from None


def matrix(x: Any, name: str = "x", smallest_n: int = 1) -> Array:
    """Return `x` as a finite float64 matrix, (item, width).

    Raises:
        UserError: No numbers, wrong number of axes, too few rows, a value that is NaN or infinite,
            or values too large or small for sums of their fourth powers.
    """
    # float64 before anything is squared: in float32 an offset of 100, such as single dimensions of
    # CLIP's residual stream have, took a CKA of 0.9621 to 0.0000.
    array = numbers(x, name).astype(np.float64, copy=False)
    if array.ndim != 2:
        raise UserError(f"{name} has shape {array.shape}; expected (item, width)")
    if len(array) < smallest_n:
        raise UserError(
            f"{name} has {counted(len(array), 'item')}; at least {smallest_n} are needed"
        )
    # A NaN or infinite value passes through both of these.
    largest = float(np.maximum(array.max(initial=0.0), -array.min(initial=0.0)))
    if not np.isfinite(largest):
        row, column = np.argwhere(~np.isfinite(array))[0]
        raise UserError(f"{name} has NaN or Inf, first at item {row}, column {column}")
    if largest and not 1 / LARGEST < largest < LARGEST:
        raise UserError(
            f"{name} has values up to {largest:.0e}, whose products leave the range of float64; "
            "scale them"
        )
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


def classes(labels: Any, n: int) -> Labels:
    """Return labels renumbered 0..C−1 without holes, (item,).

    Raises:
        UserError: Wrong length, fewer than two classes, or numbers that are no classes: negative,
            NaN or fractions.
    """
    given = np.asarray(labels, dtype=str) if _are_names(labels) else numbers(labels, "labels")
    if given.shape != (n,):
        raise UserError(f"labels have shape {given.shape}; expected ({n},)")
    if given.dtype.kind in "if":
        refuse_no_class(given)
    # Without holes: an id that no item has would inflate LogME and leave a class without a mean.
    found, numbered = np.unique(given, return_inverse=True)
    if len(found) < 2:
        raise UserError(f"labels name {len(found)} class; at least 2 are needed")
    return numbered.astype(np.int64)


def _are_names(labels: Any) -> bool:
    """Return whether all labels are text."""
    if isinstance(labels, np.ndarray) and labels.dtype.kind != "O":
        return labels.dtype.kind == "U"
    return isinstance(labels, Iterable) and all(isinstance(label, str) for label in labels)


def refuse_no_class(labels: NDArray[Any], name: str = "labels") -> None:
    """Refuse numbers that name no class, and name the first: negative, NaN or a fraction.

    Raises:
        UserError: Says where, and that an item without a class has to be left out.
    """
    # Not `labels < 0`: NaN compares as false and would pass.
    wrong = ~(labels >= 0) if labels.dtype.kind != "f" else ~((labels >= 0) & (labels % 1 == 0))
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        raise UserError(
            f"{name} has {labels[first]:g} at item {first}; classes are whole numbers from 0, and "
            "items without one are left out"
        )


def row_pairs(pairs: Any, n_x: int, n_y: int) -> Labels:
    """Return matching rows of x and y as whole numbers, (pair, 2); row i with row i where None.

    Raises:
        UserError: Rows that do not exist, no pair, or None for x and y of different lengths.
    """
    if pairs is None:
        if n_x != n_y:
            raise UserError(f"x has {n_x} items and y has {n_y}; pass `pairs`")
        return np.stack([np.arange(n_x)] * 2, axis=1)
    given = numbers(pairs, "pairs")
    if given.ndim != 2 or given.shape[1] != 2 or not len(given):
        raise UserError(f"pairs have shape {given.shape}; expected (pair, 2)")
    outside = ~((given >= 0) & (given < (n_x, n_y)) & (given % 1 == 0)).all(axis=1)
    if outside.any():
        first = int(np.flatnonzero(outside)[0])
        row, other = given[first]
        raise UserError(
            f"pair {first} is ({row:g}, {other:g}); rows of x are 0 to {n_x - 1}, of y 0 to "
            f"{n_y - 1}"
        )
    return given.astype(np.int64, copy=False)


def class_ids(labels: Any, n: int, count: int, name: str = "labels") -> Labels:
    """Return the class of each of n items as a whole number below `count`, (item,).

    Raises:
        UserError: Wrong length, no numbers, or as `refuse_no_class`; a class beyond `count`.
    """
    given = numbers(labels, name)
    if given.shape != (n,):
        raise UserError(f"{name} have shape {given.shape}; expected ({n},)")
    refuse_no_class(given, name)
    if n and given.max() >= count:
        raise UserError(f"{name} name class {given.max():g}; {count} classes are 0 to {count - 1}")
    return given.astype(np.int64, copy=False)


def refuse_width(x: Array, name: str, other: Array, other_name: str) -> None:
    """Refuse features that are not as wide as others.

    Raises:
        UserError: Names both and their widths.
    """
    if x.shape[1] != other.shape[1]:
        raise UserError(
            f"{name} have width {x.shape[1]}, {other_name} {other.shape[1]}; they must be of one "
            "space"
        )


def ratio(top: Array, bottom: Array) -> Array:
    """Return top / bottom, NaN where the bottom is not positive: a draw that holds no pair."""
    out = np.full(np.broadcast(top, bottom).shape, np.nan)
    return np.divide(top, bottom, out=out, where=bottom > 0)


def mean_of_pairs(sums: Array, weights: Array) -> Array:
    """Return the weighted mean over pairs, (draw,), of what is 1 of an item with itself.

    `sums` are over all i and j: of an item with itself and with its copies in a draw too.
    """
    own = np.square(weights).sum(axis=1)
    return ratio(sums - own, np.square(weights.sum(axis=1)) - own)


def batches(count: int, each: int) -> list[slice]:
    """Return slices of so many things, each of so many numbers, that are held at once."""
    number = min(-(-count * each // AT_ONCE), count)
    ends = np.linspace(0, count, max(number, 1) + 1).astype(int).tolist()
    return [slice(*both) for both in pairwise(ends)]


def class_sums(x: Array, labels: Labels, classes: int) -> Array:
    """Return the sum of the rows of each class, (class, width)."""
    n = len(labels)
    # A product with indicators takes the additions of one class for every class, of which there
    # may be a thousand; of little it is quicker than to set up the other way.
    if classes * x.size <= SMALL:
        return np.asarray(np.eye(classes)[labels].T @ x)
    member = csr_array((np.ones(n), labels, np.arange(n + 1)), shape=(n, classes))
    return np.asarray(member.T @ x)


def class_means(x: Array, labels: Labels, classes: int) -> Array:
    """Return the mean of each class, (class, width).

    Raises:
        UserError: A class has no item.
    """
    counts = np.bincount(labels, minlength=classes)
    # A mean of nothing would lie at the centre, and be the nearest one to items there.
    if not counts.all():
        raise UserError(f"class {int(counts.argmin())} of {classes} has no item to take a mean of")
    return class_sums(x, labels, classes) / counts[:, None]


def squared_distances(x: Array, y: Array | None = None) -> Array:
    """Return squared Euclidean distances between rows, (n, m), never negative."""
    other = x if y is None else y
    cross = x @ other.T
    # One matrix product instead of n·m differences; rounding can leave a little less than zero.
    result = np.square(x).sum(1)[:, None] + np.square(other).sum(1)[None, :] - 2.0 * cross
    np.maximum(result, 0.0, out=result)
    if y is None:
        np.fill_diagonal(result, 0.0)
    return result


def nearest_shares(similarity: Array, k: int) -> Array:
    """Return how much each column counts among the k most similar of each row, 0 to 1.

    Those that tie for the last places take equal shares of them.
    """
    last = -np.partition(-similarity, k - 1, axis=1)[:, k - 1, None]
    # Equal cosines differ by rounding, which must not pick one of them; nor must their order.
    above = similarity > last + ROUNDING
    tied = (similarity >= last - ROUNDING) & ~above
    share = (k - above.sum(axis=1, keepdims=True)) / tied.sum(axis=1, keepdims=True)
    return np.asarray(above + share * tied)


def triangle(x: Array) -> Array:
    """Return the triangular factor of QR: the same inner products of columns in fewer rows."""
    return np.asarray(np.linalg.qr(x, mode="r"))


# What public functions take as features: lists and tensors as well.
Given = Annotated[NDArray[Any], Takes("an array of numbers", "arrays of numbers", convert=as_array)]
