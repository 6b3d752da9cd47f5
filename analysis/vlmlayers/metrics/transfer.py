"""Generalizability as measured transfer: geometry learned on some classes, used on others.

The geometry is the within-class covariance (shrunk). Novel classes are told apart by the nearest
mean of a few shots in that geometry: what generalizes is which directions vary inside a class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy

from vlmlayers.arguments import Count, checked
from vlmlayers.errors import UserError
from vlmlayers.metrics.checks import (
    Array,
    Given,
    Labels,
    class_ids,
    class_means,
    classes,
    matrix,
    refuse_width,
    varies,
)
from vlmlayers.metrics.moments import shrinkage_of


@dataclass(frozen=True, eq=False)
class WithinScatter:
    """Scatter of items about their class means; a sum, so scatters of datasets add up.

    Attributes:
        scatter: (width, width).
        n: Number of items.
        fourth: Σ ‖item − class mean‖⁴, which the shrinkage needs.
    """

    scatter: Array
    n: int
    fourth: float

    def __add__(self, other: WithinScatter) -> WithinScatter:
        return WithinScatter(
            self.scatter + other.scatter, self.n + other.n, self.fourth + other.fourth
        )

    def factor(self) -> Any:
        """Return the Cholesky factor of the covariance shrunk after Ledoit and Wolf."""
        width = len(self.scatter)
        covariance = self.scatter / self.n
        shrinkage, size = shrinkage_of(covariance, self.n, self.fourth, width)
        if size <= 0.0:
            raise UserError("no scatter within classes: the geometry is undefined")
        # At least 1e-4, or fewer items than columns would leave the covariance singular.
        shrinkage = max(shrinkage, 1e-4)
        # In place: of a wide tower this is the largest array here.
        covariance *= 1.0 - shrinkage
        covariance.flat[:: width + 1] += shrinkage * size
        return scipy.linalg.cho_factor(covariance, lower=True, overwrite_a=True)


def within_scatter(x: Any, labels: Any) -> WithinScatter:
    """Return the scatter within classes of (item, width) features.

    Raises:
        UserError: One class, or NaN.
    """
    x = matrix(x, smallest_n=3)
    y = classes(labels, len(x))
    deviations = x - class_means(x, y, int(y.max()) + 1)[y]
    fourth = float(np.square(np.square(deviations).sum(axis=1)).sum())
    return WithinScatter(deviations.T @ deviations, len(x), fourth)


def few_shot_predict(
    factor: Any, support: Array, support_labels: Labels, x: Array, *, classes: int
) -> Labels:
    """Return the class of each row whose few-shot mean is nearest in the given geometry."""
    # A common shift changes no answer here, but large offsets would cost digits.
    centre = support.mean(axis=0)
    means = class_means(support - centre, support_labels, classes)
    return discriminant_predict(factor, means, x - centre)


def discriminant_predict(factor: Any, means: Array, x: Array) -> Labels:
    """Return the class of each row whose mean is nearest under a factored covariance."""
    # The distance less its term in x alone, which all classes share; all priors are equal.
    solved = scipy.linalg.cho_solve(factor, means.T)  # (width, class)
    return (x @ solved - 0.5 * (means.T * solved).sum(axis=0)).argmax(axis=1)


@checked
def transfer_predict(
    geometry: Given,
    geometry_labels: Any,
    support: Given,
    support_labels: Any,
    x: Given,
    *,
    classes: Count,
) -> Labels:
    """Predict classes from a few shots, in a geometry learned on other classes.

    Args:
        geometry: Features of base classes or of other datasets, (item, width).
        geometry_labels: Their classes.
        support: The few shots of the novel classes.
        support_labels: Their classes, 0..classes − 1.
        x: Features to classify.
        classes: Number of novel classes.

    Reference: Mensink et al. 2013, Distance-based image classification.
    """
    geometry, support, x = matrix(geometry), matrix(support, "support"), matrix(x)
    for part, name in ((support, "shots"), (x, "features to classify")):
        refuse_width(part, name, geometry, "those of the geometry")
    factor = within_scatter(geometry, geometry_labels).factor()
    labels = class_ids(support_labels, len(support), classes, "support_labels")
    return few_shot_predict(factor, support, labels, x, classes=classes)


def discriminant(
    fit: Array, fit_labels: Labels, val: Array, val_labels: Labels, x: Array, *, classes: int
) -> Labels:
    """Predict the class with the nearest mean in the shrunk within-class covariance (LDA).

    Features are not standardised: LDA needs only sums of them, so streaming has the same read-out.

    Reference: Fisher 1936; shrinkage: Ledoit and Wolf 2004.
    """
    fit, x = matrix(fit), matrix(x)
    centre = fit.mean(axis=0)
    fit, x = fit - centre, x - centre
    if not varies(fit, centre):
        return np.zeros(len(x), dtype=np.int64)
    factor = within_scatter(fit, fit_labels).factor()
    return discriminant_predict(factor, class_means(fit, fit_labels, classes), x)
