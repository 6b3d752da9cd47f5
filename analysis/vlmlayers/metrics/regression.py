"""Ridge-penalised multinomial regressions, many of them fitted side by side.

One of them alone is too small to keep numpy busy. The losses are weighted means in which every
class weighs the same, whatever its size.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vlmlayers.metrics.checks import Array, Labels, class_sums

STEPS = 200  # at most
CONVERGED = 1e-4  # largest entry of the gradient at which a regression has
WORTH_LEAVING = 0.75  # Share of unconverged problems below which copying them out pays.
Kept = NDArray[np.bool_]


def balanced_weights(labels: Labels, classes: int) -> Array:
    """Return item weights with mean 1 that make every class weigh the same."""
    counts = np.bincount(labels, minlength=classes)
    # Classes without an item in this part share no weight.
    present = np.count_nonzero(counts)
    # Unweighted, ImageNet would be 45.6 % of the fit on the paper's 11 datasets at 16 shots.
    return len(labels) / (present * counts[labels])


def log_sum_exp(logits: Array) -> Array:
    """Return the logarithm of the sum of exponentials over the last axis."""
    # Less the largest logit, so that exp cannot overflow.
    top = logits.max(axis=-1, keepdims=True)
    return np.log(np.exp(logits - top).sum(axis=-1)) + top[..., 0]


def solve(
    xs: Sequence[Array], labels: Sequence[Labels], classes: int, c_grid: Array
) -> list[tuple[Array, Array]]:
    """Return weights, (C, width, class), and intercepts, (C, 1, class), of every regression.

    L-BFGS on all regressions and all C at once. Each keeps its own curvature and step length, and
    leaves when it has converged.

    Args:
        xs: (item, width) of each, normalised.
        labels: (item,) class ids of each.
        classes: Number of classes.
        c_grid: Inverse strengths of the ridge.
    """
    problems = _Problems.of(xs, labels, classes, c_grid)
    solution = np.zeros((len(problems.owner), classes, problems.x.shape[2]))
    index = np.arange(len(solution))
    w = solution.copy()
    value, gradient = problems.value_and_gradient(w)
    curvature = _Curvature(gradient)
    for _ in range(STEPS):
        # The loss is a weighted mean, so that one tolerance suits every number of items.
        active = np.abs(_flat(gradient)).max(axis=1) > CONVERGED
        if not active.any():
            break
        # Taking the rest out copies it, which pays only when many have converged.
        if active.sum() <= WORTH_LEAVING * len(active):
            solution[index] = w
            index, problems, curvature = (
                index[active],
                problems.take(active),
                curvature.take(active),
            )
            w, value, gradient = w[active], value[active], gradient[active]
            active = active[active]
        direction = curvature.direction(gradient)
        slope = _dot(direction, gradient)
        # Near the minimum rounding can turn a direction uphill: steepest descent in its place.
        bad = slope >= 0.0
        direction[bad], slope[bad] = -gradient[bad], -_dot(gradient, gradient)[bad]
        # Full steps suit L-BFGS, but the first has no curvature to say how long a step is.
        size = np.ones(len(value))
        if not curvature.count:
            size = np.minimum(1.0, 1.0 / np.maximum(np.abs(_flat(gradient)).sum(axis=1), 1e-12))
        # Converged problems stay in the batch until it shrinks, and must not move on.
        size = np.where(active, size, 0.0)
        new_w = w + size[:, None, None] * direction
        new_value, new_gradient = problems.value_and_gradient(new_w)
        for _ in range(20):
            # Armijo's condition; the last term lets decreases below rounding pass.
            failed = new_value > value + 1e-4 * size * slope + 1e-12
            if not failed.any():
                break
            size[failed] *= 0.5
            new_w[failed] = w[failed] + size[failed, None, None] * direction[failed]
            again = problems.take(failed).value_and_gradient(new_w[failed])
            new_value[failed], new_gradient[failed] = again
        curvature.add(new_w - w, new_gradient, new_gradient - gradient)
        w, value, gradient = new_w, new_value, new_gradient
    solution[index] = w
    grid = len(c_grid)
    by_split = solution.transpose(0, 2, 1).reshape(len(xs), grid, -1, classes)
    return [(own[:, : x.shape[1]], own[:, -1:]) for own, x in zip(by_split, xs)]


@dataclass(frozen=True)
class _Problems:
    """Regressions side by side, padded with items that weigh nothing and columns of zeros.

    Attributes:
        x: (split, item, width + 1), the last column ones.
        weights: (split, item), which sum to 1.
        target: (split, class, width + 1), weighted sums of the items of each class.
        owner: (problem,), ascending: the split that a problem fits.
        penalty: (problem, 1, width + 1), 0 at the intercept.
    """

    x: Array
    weights: Array
    target: Array
    owner: Labels
    penalty: Array

    @classmethod
    def of(
        cls, xs: Sequence[Array], labels: Sequence[Labels], classes: int, c_grid: Array
    ) -> _Problems:
        items, width = max(map(len, xs)), max(x.shape[1] for x in xs)
        x = np.zeros((len(xs), items, width + 1))
        weights = np.zeros((len(xs), items))
        target = np.zeros((len(xs), classes, width + 1))
        for number, (own, own_labels) in enumerate(zip(xs, labels)):
            n = len(own)
            x[number, :n, : own.shape[1]] = own
            x[number, :n, -1] = 1.0
            weights[number, :n] = balanced_weights(own_labels, classes) / n
            weighted = weights[number, :n, None] * x[number, :n]
            target[number] = class_sums(weighted, own_labels, classes)
        sizes = np.array([len(own) for own in xs])
        penalty = np.repeat(1.0 / np.outer(sizes, c_grid).reshape(-1, 1, 1), width + 1, axis=2)
        penalty[:, :, -1] = 0.0
        return cls(x, weights, target, np.repeat(np.arange(len(xs)), len(c_grid)), penalty)

    def take(self, kept: Kept) -> _Problems:
        """Return some of the problems."""
        return replace(self, owner=self.owner[kept], penalty=self.penalty[kept])

    def value_and_gradient(self, w: Array) -> tuple[Array, Array]:
        """Return losses, (problem,), and gradients, (problem, class, width + 1)."""
        problems, classes, width = w.shape
        share = np.empty((problems, classes, self.x.shape[1]))
        mean = np.empty_like(w)
        ends = np.searchsorted(self.owner, np.arange(len(self.x) + 1)).tolist()
        runs = [(x, slice(a, b)) for x, a, b in zip(self.x, ends, ends[1:]) if a < b]
        for x, run in runs:  # one product for all problems of a split
            np.matmul(w[run].reshape(-1, width), x.T, out=share[run].reshape(-1, len(x)))
        weights = self.weights[self.owner]
        # Less the largest logit, so that exp cannot overflow.
        top = share.max(axis=1, keepdims=True)
        np.exp(np.subtract(share, top, out=share), out=share)
        total = share.sum(axis=1, keepdims=True)
        spread = _dot(np.log(total) + top, weights)
        share *= weights[:, None] / total
        for x, run in runs:
            np.matmul(share[run].reshape(-1, len(x)), x, out=mean[run].reshape(-1, width))
        # Logits are linear: those of the own classes need no look at the items.
        target, ridge = self.target[self.owner], self.penalty * w
        mean += ridge
        mean -= target
        ridge *= 0.5
        ridge -= target
        return spread + _dot(ridge, w), mean


class _Curvature:
    """What L-BFGS knows of the Hessians: the last steps and what they changed in the gradients.

    The two-loop recursion, written in inner products: these are kept from step to step, so that
    the long vectors are read three times instead of being rewritten at every turn of both loops.

    Reference: Nocedal and Wright 2006, algorithm 7.4; in inner products: Chen et al. 2014.
    """

    def __init__(self, like: Array, memory: int = 10) -> None:
        problems = len(like)
        self.count = 0
        self.vectors = np.zeros((2, problems, memory, like[0].size))  # steps and changes
        self.cross = np.zeros((memory, memory, problems))  # step · change
        self.square = np.zeros((memory, memory, problems))  # change · change
        self.products = np.zeros((2, memory, problems))  # step · gradient and change · gradient

    def take(self, kept: Kept) -> _Curvature:
        """Return what is known of some of the problems."""
        made = copy(self)
        made.vectors = self.vectors[:, kept]
        for name in ("cross", "square", "products"):
            setattr(made, name, getattr(self, name)[..., kept])
        return made

    def add(self, step: Array, gradient: Array, change: Array) -> None:
        """Remember a step in place of the oldest; all are (problem, class, width + 1).

        Args:
            step: The step.
            gradient: The gradient where it led.
            change: What it changed in the gradient.
        """
        slot = self.count % len(self.cross)
        self.count += 1
        used = min(self.count, len(self.cross))
        steps, changes = self.vectors[:, :, :used]
        steps[:, slot], changes[:, slot] = _flat(step), _flat(change)
        before = self.products[:, :used].copy()
        for kept, vectors in zip(self.products, (steps, changes)):
            kept[:used] = (vectors @ _flat(gradient)[..., None])[..., 0].T
        self.cross[:used, slot], self.square[:used, slot] = self.products[:, :used] - before
        self.cross[slot, slot], self.square[slot, slot] = _dot(step, change), _dot(change, change)
        self.square[slot, :used] = self.square[:used, slot]

    def direction(self, gradient: Array) -> Array:
        """Return minus the approximate inverse Hessian times the last gradient of every problem."""
        if not self.count:
            return -gradient
        memory = len(self.cross)
        used = min(self.count, memory)
        order = [(self.count - 1 - age) % memory for age in range(used)]  # newest first
        own = np.einsum("iip->ip", self.cross)
        # A step along which the gradient did not grow would make the inverse Hessian indefinite.
        usable = own > 1e-14
        inverse = np.divide(1.0, own, out=np.zeros_like(own), where=usable)
        newest = self.square[order[0], order[0]]
        scale = np.ones_like(newest)
        np.divide(own[order[0]], newest, out=scale, where=usable[order[0]] & (newest > 0))
        alpha, rest = np.zeros_like(own), np.zeros_like(own)
        # Slots that are not filled yet, here those of older steps, hold zeros and add nothing.
        for i in order:
            alpha[i] = inverse[i] * (self.products[0, i] - (self.cross[i] * alpha).sum(axis=0))
        start = scale * (self.products[1] - (self.square * alpha).sum(axis=1))
        for i in reversed(order):
            rest[i] = alpha[i] - inverse[i] * (start[i] + (self.cross[:, i] * rest).sum(axis=0))
        steps, changes = self.vectors[:, :, :used]
        made = ((scale * alpha)[:used].T[:, None] @ changes)[:, 0]
        made -= (rest[:used].T[:, None] @ steps)[:, 0]
        made -= scale[:, None] * _flat(gradient)
        return made.reshape(gradient.shape)


def _flat(x: Array) -> Array:
    return x.reshape(len(x), -1)


def _dot(a: Array, b: Array) -> Array:
    """Return the inner product of each problem, (problem,)."""
    return np.asarray(np.einsum("pi,pi->p", _flat(a), _flat(b)))
