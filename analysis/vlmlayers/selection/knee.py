"""Two joined straight lines through a curve, and whether one would do as well."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from vlmlayers.arguments import checked
from vlmlayers.errors import UserError
from vlmlayers.metrics.checks import Array, Given
from vlmlayers.selection.curves import EXACT

LEVEL = 0.05
DRAWS = 20_000  # p at the level is then known to ± 0.003
# Correlation of the noise of neighbouring blocks, which share a residual stream: between seeds of
# the miniature CLIP it is 0.3 to 0.5.
ALIKE = 0.5


@checked
def fit_knee(curve: Given) -> dict[str, Any]:
    """Fit y = a + b·x + c·max(0, x − k) over blocks and return the best knee k.

    `p` is the share of straight lines with noise that a knee improves as much as this curve, by
    (SSE of one line − SSE of two) / SSE of two at the best knee of each. The noise of their blocks
    is normal and that of neighbours correlates by 0.5: they are judged too good rather than too
    bad where blocks are independent. `better_than_line` says whether p is at most 0.05.

    Raises:
        UserError: The tower has fewer than four blocks, or the curve a value that is not finite.

    Reference: Andrews 1993 (the largest F over change points), with its null simulated.
    """
    if curve.ndim != 1 or not np.isfinite(curve).all():
        raise UserError("fit_knee takes a finite number for each block")
    depth = len(curve)
    if depth < 4:
        raise UserError(f"the rule 'knee' needs at least 4 blocks, not {depth}; use 'threshold'")
    x = np.arange(1, depth + 1, dtype=float)
    fits = []
    # At block 1 or the last one the second line would have no block of its own.
    for knee in range(2, depth):
        design = np.stack([np.ones(depth), x, np.maximum(0, x - knee)], axis=1)  # (block, 3)
        fits.append((*_least_squares(design, curve), knee))
    # Of equal fits that of the lowest knee, on every machine and in any order of rows: they differ
    # by rounding, that of a flat curve too.
    spread = np.square(curve - curve.mean()).sum()
    slack = EXACT * max(float(spread), EXACT * float(np.square(curve).sum()))
    least = min(error for error, *_ in fits) + slack
    error, weights, fitted, knee = next(fit for fit in fits if fit[0] <= least)
    line, _, _ = _least_squares(np.stack([np.ones(depth), x], axis=1), curve)
    # A perfect fit leaves nothing to divide by.
    floor = 1e-12 * max(float(np.var(curve)) * depth, 1e-12)
    null = _bends_of_lines(depth)
    above = len(null) - int(np.searchsorted(null, (line - error) / (error + floor)))
    p = round((1 + above) / (1 + len(null)), 5)
    return {
        "knee": int(knee),
        "slope_before": float(weights[1]),
        "slope_after": float(weights[1] + weights[2]),
        "squared_error": float(error),
        "line_squared_error": float(line),
        "p": p,
        "better_than_line": p <= LEVEL,
        "fitted": fitted.tolist(),
    }


@cache
def _bends_of_lines(depth: int) -> Array:
    """Return (SSE of one line − SSE of two) / SSE of two of straight lines with noise, ascending.

    Neither the line nor the size of the noise changes it, so that the noise alone is drawn.
    """
    noise = np.random.default_rng(0).standard_normal((DRAWS, depth))
    for block in range(1, depth):
        noise[:, block] = ALIKE * noise[:, block - 1] + np.sqrt(1 - ALIKE**2) * noise[:, block]
    x = np.arange(1, depth + 1, dtype=float)
    line, _ = np.linalg.qr(np.stack([np.ones(depth), x], axis=1))  # (block, 2)
    hinges = np.maximum(0, x[:, None] - np.arange(2, depth))  # (block, knee)
    hinges -= line @ (line.T @ hinges)
    hinges /= np.linalg.norm(hinges, axis=0)
    noise -= (noise @ line) @ line.T
    gain = np.square(noise @ hinges).max(axis=1)
    return np.sort(gain / (np.square(noise).sum(axis=1) - gain))


def _least_squares(design: Array, curve: Array) -> tuple[float, Array, Array]:
    weights = np.linalg.lstsq(design, curve, rcond=None)[0]
    fitted = design @ weights
    return float(np.square(curve - fitted).sum()), np.asarray(weights), fitted
