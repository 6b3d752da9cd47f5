"""What a block does in its model, from embeddings that the model gives with and without it.

`vlmlayers.models.examine` runs the model and fills these in; each returns one value per item whose
mean is the metric, but for gradients, which belong to all items together.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vlmlayers.arguments import checked
from vlmlayers.errors import UserError
from vlmlayers.metrics.checks import Array, Given, class_ids, matrix, refuse_width, unit, unit_rows


@checked
def accuracy_drops(right: Given, changed: Given) -> Array:
    """Return the zero-shot accuracy of each item that a change of one block takes away.

    Args:
        right: Whether each item is classified correctly, (item,), 0 to 1.
        changed: The same with the block skipped, or with what it adds replaced by its mean.

    Reference: Veit, Wilber and Belongie 2016 (skip); Wang et al. 2023 (mean).
    """
    before, after = (matrix(given[..., None]) for given in (right, changed))
    _refuse_unpaired(before, after)
    return (before - after)[:, 0]


@checked
def joint_changes(x: Given, changed: Given) -> Array:
    """Return 1 − cosine of each item's joint embedding before and after a change of one block.

    Args:
        x: Joint embeddings, (item, width).
        changed: The same with the block skipped, or with what it adds replaced by its mean.

    Reference: Veit, Wilber and Belongie 2016 (skip); Wang et al. 2023 (mean).
    """
    x, changed = matrix(x), matrix(changed, "changed")
    _refuse_unpaired(x, changed)
    return 1.0 - cosines(x, changed)


@checked
def contribution_shares(part: Given, x: Given) -> Array:
    """Return the share of each item's joint embedding that a part adds: its projection on it.

    Args:
        part: What the part adds, (item, width), as `vlmlayers.models.contributions` gives it.
        x: Joint embeddings, (item, width).

    Reference: Gandelsman, Efros and Steinhardt 2024.
    """
    part, x = matrix(part, "part"), matrix(x)
    _refuse_unpaired(part, x)
    # By ‖x‖² and not by both norms as a cosine: so the shares of all parts sum to 1.
    return np.asarray((part * x).sum(axis=1) / np.square(x).sum(axis=1))


@checked
def gradient_alignment(base: Given, novel: Given) -> float:
    """Return the cosine of the gradients of inner-base and inner-novel loss at one block.

    Args:
        base: Gradient of the loss over one half of the classes, (width,).
        novel: That of the other half.

    Reference: Yu et al. 2020.
    """
    one, other = matrix(base[None], "base"), matrix(novel[None], "novel")
    _refuse_unpaired(one, other)
    return float(cosines(one, other)[0])


@checked
def relative_gradient_norm(gradient: Given, weights: Given) -> float:
    """Return ‖gradient‖ / ‖weights‖ of one block, its parameters laid end to end.

    Args:
        gradient: Of the mean zero-shot cross-entropy of a batch, by each parameter, (parameter,);
            or the length of the gradient by each tensor, which gives the same.
        weights: The parameters, or the length of each tensor.

    Raises:
        UserError: Other shapes, values that are not finite, or weights that are all zero.

    Reference: Lee et al. 2023, Surgical fine-tuning improves adaptation to distribution shifts,
    where a layer's learning rate is set by it.
    """
    one, other = matrix(gradient[None], "gradient"), matrix(weights[None], "weights")
    _refuse_unpaired(one, other)
    size = np.linalg.norm(other)
    if size == 0:
        raise UserError("the weights are all zero; nothing is relative to them")
    return float(np.linalg.norm(one) / size)


@checked
def zero_shot_margins(x: Given, prompts: Given, labels: Any) -> Array:
    """Return each item's cosine with its class prompt, less that with the nearest other prompt.

    Small margins are those of data that are far from the pretraining.

    Args:
        x: Joint embeddings of images, (item, width).
        prompts: One prompt embedding per class, (class, width).
        labels: Row of `prompts` that is right for each item, (item,).

    Reference: Radford et al. 2021, section 3.1.
    """
    similar = _cosines_with(x, prompts)
    own = np.eye(similar.shape[1], dtype=bool)[class_ids(labels, *similar.shape)]
    return np.asarray(similar[own] - np.where(own, -np.inf, similar).max(axis=1))


def chance_margin(x: Given, prompts: Given, labels: Any) -> float:
    """Return the mean of `zero_shot_margins` over every way to deal the labels to the items."""
    similar = _cosines_with(x, prompts)
    items, classes = similar.shape
    share = np.bincount(class_ids(labels, items, classes), minlength=classes) / items
    second, first = np.partition(similar, -2, axis=1)[:, -2:].T[..., None]  # (item, 1) each
    nearest = np.where(similar == first, second, first)  # prompt other than that of each class
    return float((similar - nearest).mean(axis=0) @ share)


def _cosines_with(x: Given, prompts: Given) -> Array:
    """Return the cosine of every item with every prompt, (item, class)."""
    x, prompts = unit(x), unit(prompts, "prompts", 2)
    refuse_width(prompts, "prompts", x, "images")
    return x @ prompts.T


def _refuse_unpaired(x: Array, y: Array) -> None:
    # Of one row numpy would make as many as the other has.
    if x.shape != y.shape:
        raise UserError(f"shapes {x.shape} and {y.shape} differ; items must be paired")


def cosines(x: Array, y: Array) -> Array:
    """Return the cosine of each pair of rows, (item,), 0 where one is zero."""
    return np.asarray((unit_rows(x) * unit_rows(y)).sum(axis=1))
