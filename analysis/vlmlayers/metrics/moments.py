"""Sums that metrics can be computed from, without keeping features.

Each accumulator is a value: `of(rows)` makes one, `+` merges two. Sums are kept about the mean and
moved exactly when means differ (a pairwise update), so a large common offset costs no digits and
the order of merging does not matter up to rounding.

Reference: Chan, Golub and LeVeque 1983; higher moments: Pébay 2008.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vlmlayers.errors import UserError
from vlmlayers.metrics.checks import ROUNDING, Array, Labels, class_sums, triangle
from vlmlayers.words import counted


# eq=False here and below: comparing arrays gives an array, which has no single truth value.
@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of rows a = x − mean.

    Attributes:
        n: Number of rows.
        mean: (width,).
        scatter: Σ a aᵀ, (width, width).
        cubic: Σ ‖a‖² a, (width,).
        fourth: Σ ‖a‖⁴.
    """

    n: int
    mean: Array
    scatter: Array
    cubic: Array
    fourth: float

    @classmethod
    def of(cls, x: Array) -> Moments:
        """Return the moments of (item, width) rows."""
        mean = x.mean(axis=0)
        a = x - mean
        squares = np.square(a).sum(axis=1)
        return cls(len(x), mean, a.T @ a, squares @ a, float(squares @ squares))

    def __add__(self, other: Moments) -> Moments:
        n = self.n + other.n
        # From the first mean on, not a weighted sum: equal means then stay as they are, to the bit.
        mean = self.mean + (other.mean - self.mean) * (other.n / n)
        parts = [part.about(mean) for part in (self, other)]
        return Moments(n, mean, *(p + q for p, q in zip(*parts)))

    def about(self, centre: Array) -> tuple[Array, Array, float]:
        """Return scatter, cubic and fourth about another centre."""
        # Σ over a + d, expanded: terms with Σ a are absent, since a is about its own mean.
        d = self.mean - centre
        size = float(d @ d)
        trace = float(np.trace(self.scatter))
        moved = self.scatter @ d
        scatter = self.scatter + self.n * np.outer(d, d)
        cubic = self.cubic + 2.0 * moved + (trace + self.n * size) * d
        fourth = (
            self.fourth + 4.0 * float(self.cubic @ d) + 4.0 * float(d @ moved)
            + 2.0 * size * trace + self.n * size**2
        )  # fmt: skip
        return scatter, cubic, fourth


@dataclass(frozen=True, eq=False)
class CrossMoments:
    """Joint moments of paired rows a = x − mean_x and b = y − mean_y.

    Attributes:
        n: Number of pairs.
        mean_x: (width,).
        mean_y: (other width,).
        cross: Σ a bᵀ, (width, other width).
        sizes: Σ ‖a‖² and Σ ‖b‖².
        x2y: Σ ‖a‖² b, (other width,).
        y2x: Σ ‖b‖² a, (width,).
        x2y2: Σ ‖a‖² ‖b‖².
    """

    n: int
    mean_x: Array
    mean_y: Array
    cross: Array
    sizes: Array
    x2y: Array
    y2x: Array
    x2y2: float

    @classmethod
    def of(cls, x: Array, y: Array) -> CrossMoments:
        """Return the joint moments of paired rows."""
        mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)
        a, b = x - mean_x, y - mean_y
        p, q = np.square(a).sum(axis=1), np.square(b).sum(axis=1)
        sizes = np.array([p.sum(), q.sum()])
        return cls(len(x), mean_x, mean_y, a.T @ b, sizes, p @ b, q @ a, float(p @ q))

    def __add__(self, other: CrossMoments) -> CrossMoments:
        n = self.n + other.n
        share = other.n / n
        mean_x = self.mean_x + (other.mean_x - self.mean_x) * share
        mean_y = self.mean_y + (other.mean_y - self.mean_y) * share
        parts = [part.about(mean_x, mean_y) for part in (self, other)]
        return CrossMoments(n, mean_x, mean_y, *(p + q for p, q in zip(*parts)))

    def about(self, centre_x: Array, centre_y: Array) -> tuple[Array, Array, Array, Array, float]:
        """Return the sums about other centres."""
        d, e = self.mean_x - centre_x, self.mean_y - centre_y
        dd, ee = float(d @ d), float(e @ e)
        xx, yy = self.sizes
        cross = self.cross + self.n * np.outer(d, e)
        sizes = self.sizes + self.n * np.array([dd, ee])
        x2y = self.x2y + 2.0 * (d @ self.cross) + (xx + self.n * dd) * e
        y2x = self.y2x + 2.0 * (self.cross @ e) + (yy + self.n * ee) * d
        x2y2 = (
            self.x2y2 + 2.0 * float(self.x2y @ e) + 2.0 * float(self.y2x @ d)
            + 4.0 * float(d @ self.cross @ e) + ee * xx + dd * yy + self.n * dd * ee
        )  # fmt: skip
        return cross, sizes, x2y, y2x, x2y2


@dataclass(frozen=True, eq=False)
class ClassMoments:
    """Size and mean of each class.

    Attributes:
        counts: (class,).
        means: (class, width); zero where a class is empty.
    """

    counts: Array
    means: Array

    @classmethod
    def of(cls, x: Array, labels: Labels, classes: int) -> ClassMoments:
        """Return sizes and means of (item, width) rows."""
        counts = np.bincount(labels, minlength=classes).astype(np.float64)
        return cls(counts, class_sums(x, labels, classes) / np.maximum(counts, 1.0)[:, None])

    def __add__(self, other: ClassMoments) -> ClassMoments:
        counts = self.counts + other.counts
        share = other.counts / np.maximum(counts, 1.0)
        return ClassMoments(counts, self.means + (other.means - self.means) * share[:, None])


def fisher_from(total: Moments, classes: ClassMoments) -> float:
    """Return the Fisher trace ratio from sums.

    Raises:
        UserError: One class, or no scatter within classes.
    """
    if np.count_nonzero(classes.counts) < 2:
        raise UserError("labels name 1 class; at least 2 are needed")
    scatter = float(np.trace(total.scatter))
    between = float(classes.counts @ np.square(classes.means - total.mean).sum(axis=1))
    if scatter - between <= 1e-12 * max(scatter, 1e-300):
        raise UserError("no scatter within classes: every item equals its class mean")
    return between / (scatter - between)


def cka_from(x: Moments, y: Moments, cross: CrossMoments, *, debiased: bool = True) -> float:
    """Return linear CKA from sums of paired rows.

    Raises:
        UserError: Fewer than four pairs to debias from, or features that are constant or equally
            far apart.
    """
    n = cross.n
    if debiased and n < 4:
        raise UserError(f"{counted(n, 'pair')}; at least 4 are needed")
    both = hsic(n, cross.cross, cross.sizes[0], cross.sizes[1], cross.x2y2, debiased)
    own = [
        hsic(n, m.scatter, np.trace(m.scatter), np.trace(m.scatter), m.fourth, debiased)
        for m in (x, y)
    ]
    # Equal items leave no zero but the rounding of their mean.
    spread = [float(np.trace(m.scatter)) > 1e-12 * n * float(m.mean @ m.mean) for m in (x, y)]
    if min(own) <= 0.0 or not all(spread):
        raise UserError(f"the features of all {n} items are the same, or equally far apart")
    return both / float(np.sqrt(own[0] * own[1]))


def biased_cka_null(x: Moments, y: Moments) -> float:
    """Return the mean of biased CKA over all permutations of the pairs, tr K tr L / (n − 1)."""
    # The mean over all permutations is known exactly, so that none has to be drawn.
    traces = np.trace(x.scatter) * np.trace(y.scatter) / (x.n - 1)
    return float(traces / (np.linalg.norm(x.scatter) * np.linalg.norm(y.scatter)))


def frechet_from(x: Moments, y: Moments) -> float:
    """Return the Fréchet distance of two clouds with aligned centroids from sums.

    Raises:
        UserError: Fewer than two images (x) or two texts (y).
    """
    for name, n in (("x", x.n), ("y", y.n)):
        if n < 2:
            raise UserError(f"{name} has {counted(n, 'item')}; at least 2 are needed")
    first, second = x.scatter / (x.n - 1), y.scatter / (y.n - 1)
    root = _root(first)
    # Of the symmetric product: Σ_x Σ_y has the same eigenvalues but not the stable solver.
    middle = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ second @ root), 0.0)).sum()
    return float(np.sqrt(max(np.trace(first) + np.trace(second) - 2.0 * middle, 0.0)))


def _root(x: Array) -> Array:
    """Return the symmetric root of a positive semidefinite matrix."""
    values, vectors = np.linalg.eigh(x)
    # Zero eigenvalues come out slightly negative.
    return np.asarray((vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T)


def directions_from(x: Moments) -> tuple[Array, Array]:
    """Return eigenvalues and directions, (width, direction), of the centred scatter.

    Descending, and without those that are rounding noise.

    Raises:
        UserError: Constant features.
    """
    values, vectors = np.linalg.eigh(x.scatter)
    if values[-1] <= 1e-12 * x.n * float(x.mean @ x.mean):
        raise UserError(f"the features of all {x.n} items are the same")
    kept = np.flatnonzero(values > 1e-12 * values[-1])[::-1]
    return values[kept], vectors[:, kept]


def spectral_influence(
    function: Callable[[Array], float], values: Array, rows: Array, n: int
) -> Array:
    """Return how each row moves a function of the spectrum, (item,): its mean moves as the value.

    To first order a row a moves an eigenvalue of the covariance by (vᵀa)² less itself; what is
    taken off adds up to nothing, as the function does not see the scale.

    Args:
        function: Of the eigenvalues of a scatter, at any scale.
        values: Those of all n items, (direction,).
        rows: Centred features of some of them in these directions, (item, direction).
        n: Number of all items.

    Reference: Hampel 1974 (influence function).
    """
    step = 1e-5
    moved = [function(one) for one in values + step * np.diag(values)]
    slopes = (np.array(moved) - function(values)) / (step * values)
    return np.asarray(n * np.square(rows) @ slopes)


def frechet_null_from(x: Moments, y: Moments, rng: np.random.Generator, *, draws: int = 3) -> float:
    """Return the Fréchet distance of two clouds whose rows are mixed, as many as these have.

    As `gap.frechet_null` without rows to mix: those of either cloud are normal, with its own
    covariance. A few rows that scatter more than all others make the mixed clouds differ more than
    normal ones of the covariance of all.
    """
    roots = [_root(m.scatter / m.n) for m in (x, y)]
    n, m = (min(one.n, 10**9 - 1) for one in (x, y))  # more cannot be drawn, or told from so many
    values = []
    for _ in range(draws):
        stay = int(rng.hypergeometric(n, m, n))
        sides = ((stay, n - stay), (n - stay, m - n + stay))
        first, second = (_mixed_root(roots, counts, rng) for counts in sides)
        total = np.square(first).sum() + np.square(second).sum()
        shared = first.T @ second if first.shape[1] < second.shape[1] else second.T @ first
        # Singular values by the smaller symmetric product: several times faster than by SVD.
        squares = np.linalg.eigvalsh(shared @ shared.T)
        nuclear = np.sqrt(np.maximum(squares, 0.0)).sum()
        values.append(np.sqrt(max(total - 2.0 * nuclear, 0.0)))
    return float(np.mean(values))


def frechet_null_by_rows(
    x: Moments, y: Moments, rows: tuple[Array, Array], rng: np.random.Generator, *, draws: int = 5
) -> float:
    """Return what `frechet_null_from` does, with some rows of either cloud at hand.

    The smaller of two mixed clouds is drawn from the rows, and what is left of all sums is the
    other: nothing is assumed of how rows are distributed. In low blocks few rows stand for most of
    the scatter, or none is far out, and normal rows gave up to 1.3 times as much.

    Args:
        x: Moments of all rows of one cloud.
        y: Those of the other.
        rows: Random rows of x and of y, as many as the smaller cloud has at least.
        rng: Draws which are mixed.
        draws: Mixtures.
    """
    few, rest = sorted((x.n, y.n))
    total = x.scatter + y.scatter
    values = []
    for _ in range(draws):
        of_x = int(rng.hypergeometric(x.n, y.n, few))
        parts = [
            row[rng.permutation(len(row))[:count]] - m.mean
            for row, count, m in zip(rows, (of_x, few - of_x), (x, y))
        ]
        part = np.vstack(parts)
        # All rows together have the mean 0, so that the sums of the two parts are opposite.
        left = total - part.T @ part - np.outer(part.sum(axis=0), part.sum(axis=0)) / rest
        part = part - part.mean(axis=0)
        squares = np.linalg.eigvalsh(part @ left @ part.T) / ((few - 1) * (rest - 1))
        middle = np.sqrt(np.maximum(squares, 0.0)).sum()
        size = np.square(part).sum() / (few - 1) + np.trace(left) / (rest - 1)
        values.append(np.sqrt(max(size - 2.0 * middle, 0.0)))
    return float(np.mean(values))


def _mixed_root(roots: Sequence[Array], counts: Sequence[int], rng: np.random.Generator) -> Array:
    """Return R, of which R Rᵀ is a draw of the covariance of so many rows of each cloud."""
    width, most = len(roots[0]), int(np.argmax(counts))
    # White noise is centred and rows of a part are not: one more, but once, since all together are.
    rows = [n + (part != most) for part, n in enumerate(counts)]
    parts = [root @ white_noise_root(n, width, rng) for root, n in zip(roots, rows)]
    both = np.hstack(parts) / np.sqrt(sum(counts) - 1)
    return both if both.shape[1] <= width else triangle(both.T).T


def shrinkage_of(covariance: Array, n: int, fourth: float, width: int) -> tuple[float, float]:
    """Return Ledoit–Wolf shrinkage and mean variance of centred rows, from rotation invariants.

    Args:
        covariance: Of the rows, possibly rotated into their span.
        n: Number of rows.
        fourth: Σ ‖x‖⁴.
        width: Width before the rotation.

    Reference: Ledoit and Wolf 2004, section 3.
    """
    mean_variance = float(np.trace(covariance)) / width
    frobenius = float(np.square(covariance).sum())
    delta = frobenius - width * mean_variance**2
    if delta <= 0.0:
        return 1.0, mean_variance
    # Σ‖x xᵀ − S‖² = Σ‖x‖⁴ − n‖S‖²: no outer product is formed.
    beta = (fourth / n - frobenius) / n
    return float(np.clip(beta / delta, 0.0, 1.0)), mean_variance


def white_noise_root(n: int, width: int, rng: np.random.Generator) -> Array:
    """Return R, of which R Rᵀ is a draw of the centred scatter of n rows of white noise.

    Reference: Bartlett 1934 (decomposition of the Wishart distribution).
    """
    degrees = n - 1
    # Bartlett needs a scatter of full rank; below that the rows are few and cheap to draw.
    if degrees < width:
        return rng.standard_normal((width, degrees))
    lower = np.tril(rng.standard_normal((width, width)), -1)
    lower.flat[:: width + 1] = np.sqrt(rng.chisquare(degrees - np.arange(width)))
    return lower


def hsic(n: int, cross: Array, xx: float, yy: float, x2y2: float, debiased: bool) -> float:
    """Return n(n − 3) times the unbiased HSIC of centred features, or ‖XᵀY‖², from sums.

    Args:
        n: Number of pairs.
        cross: XᵀY, (width, other width).
        xx: Σ ‖x‖².
        yy: Σ ‖y‖².
        x2y2: Σ ‖x‖² ‖y‖².
        debiased: Which of the two.

    Reference: Song et al. 2012, with K and L written as products of features.
    """
    total = float(np.square(cross).sum())
    if not debiased:
        return total
    # Rows of K sum to zero where features are centred, and so those of K̃ to −‖x‖².
    found = total - n / (n - 2) * x2y2 + float(xx * yy) / ((n - 1) * (n - 2))
    # Of items that are all equally far apart only the rounding of the three terms is left.
    return found if abs(found) > ROUNDING * total else 0.0
