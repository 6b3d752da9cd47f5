"""Random crops and flips as pure functions of seed, view and index; no torch is imported."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TRIES = 10  # as torchvision makes before it takes the central crop
VIEWS = 0xC0  # key of the draws of crops and flips


@dataclass(frozen=True)
class Augmentation:
    """Random resized crop and horizontal flip.

    Attributes:
        crop_scale: Range of the crop's share of the image's area.
        crop_ratio: Range of the crop's aspect ratio, drawn uniformly in its logarithm.
        flip: Probability of a horizontal flip.

    Reference: torchvision's RandomResizedCrop, whose distribution this is.
    """

    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def draws(self, n: int, seed: int, view: int) -> NDArray[np.float64]:
        """Return the random numbers of one view of `n` images, (n, numbers), each in [0, 1)."""
        return np.random.default_rng([seed, view, VIEWS]).random((n, 4 * TRIES + 1))

    def box(
        self, draw: NDArray[np.float64], height: int, width: int
    ) -> tuple[int, int, int, int, bool]:
        """Return top, left, height and width of the crop, and whether to flip it."""
        # Every try has numbers of its own: an image takes as many, whichever try fits.
        u = draw[:-1].reshape(TRIES, 4)
        area = (
            height
            * width
            * (self.crop_scale[0] + u[:, 0] * (self.crop_scale[1] - self.crop_scale[0]))
        )
        low, high = math.log(self.crop_ratio[0]), math.log(self.crop_ratio[1])
        ratio = np.exp(low + u[:, 1] * (high - low))
        w = np.round(np.sqrt(area * ratio)).astype(int)
        h = np.round(np.sqrt(area / ratio)).astype(int)
        flip = bool(draw[-1] < self.flip)
        # The first try that fits counts, as in torchvision, which makes no further ones.
        for i in np.flatnonzero((w > 0) & (w <= width) & (h > 0) & (h <= height)):
            top, left = int(u[i, 2] * (height - h[i] + 1)), int(u[i, 3] * (width - w[i] + 1))
            return top, left, int(h[i]), int(w[i]), flip
        h0, w0 = self._largest(height, width)  # ten misses: the central crop nearest in ratio
        return (height - h0) // 2, (width - w0) // 2, h0, w0, flip

    def _largest(self, height: int, width: int) -> tuple[int, int]:
        if width / height < self.crop_ratio[0]:
            return round(width / self.crop_ratio[0]), width
        if width / height > self.crop_ratio[1]:
            return height, round(height * self.crop_ratio[1])
        return height, width
