"""Dataset level: which dataset does an item come from? Functions of the confusion counts."""

from __future__ import annotations

import numpy as np

from vlmlayers.arguments import Count, checked
from vlmlayers.errors import UserError
from vlmlayers.metrics.checks import Array, Given, class_ids


@checked
def confusion(truth: Given, predicted: Given, classes: Count) -> Array:
    """Return counts by true (row) and predicted (column) class, (class, class).

    Raises:
        UserError: Numbers that are no classes, or not as many of one as of the other.
    """
    truth = class_ids(truth, len(truth), classes, "truth")
    predicted = class_ids(predicted, len(truth), classes, "predicted")
    counts = np.zeros((classes, classes))
    np.add.at(counts, (truth, predicted), 1.0)
    return counts


def confusion_shares(counts: Array) -> Array:
    """Return the share of each true class that is predicted as each class, (…, class, class).

    Raises:
        UserError: These are no counts, or a class has no held-out item.
    """
    if counts.ndim < 2 or counts.shape[-1] != counts.shape[-2] or counts.shape[-1] < 2:
        raise UserError(f"counts have shape {counts.shape}; expected two classes or more, by two")
    if not (counts >= 0).all():
        raise UserError("counts hold NaN, or less than 0")
    total = counts.sum(axis=-1, keepdims=True)
    if not total.all():
        raise UserError("a class has no held-out item; extract more items or use fewer folds")
    return counts / total


def recall(counts: Array) -> Array:
    """Return the share of each class that is recognised, (…, class)."""
    return np.diagonal(confusion_shares(counts), axis1=-2, axis2=-1)


@checked
def balanced_accuracy(counts: Given) -> Array:
    """Return the mean recall over classes: accuracy where every class weighs the same, (…)."""
    return recall(counts).mean(axis=-1)


@checked
def normalised_accuracy(counts: Given) -> Array:
    """Return balanced accuracy rescaled so that chance is 0 and perfect is 1, (…)."""
    chance = 1.0 / counts.shape[-1]
    return (balanced_accuracy(counts) - chance) / (1.0 - chance)


def invariance(counts: Array) -> Array:
    """Return 1 − normalised balanced accuracy: 1 where the dataset cannot be told, (…)."""
    return 1.0 - normalised_accuracy(counts)
