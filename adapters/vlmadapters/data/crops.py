"""Resized crops of a whole batch on one device, in a number of operators that no batch raises."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmlayers.models.devices import placed

REACH = 2  # a cubic kernel is 0 from there on
SHARPNESS = -0.5  # the cubic's free number, of PIL and of torch's antialiased resize
# Values of a batch before it is resized, at some 13 bytes each: more go in two halves.
VALUES = 1 << 26


def resized_crops(
    images: Sequence[Tensor], boxes: NDArray[np.int64], size: tuple[int, int]
) -> Tensor:
    """Return one crop of each image, resized by an antialiased bicubic filter.

    A resize is linear in rows and in columns: `vertical · crop · horizontalᵀ` with a matrix of
    `resampling` on either side. The products are float32 under autocast too, and in TF32 only where
    the process has asked for it. Nothing waits for the device.

    Args:
        images: (3, height, width) each, uint8, on one device; sizes may differ.
        boxes: (image, 5): top, left, height, width, and whether to flip the columns.
        size: Height and width of the result.

    Returns:
        (image, 3, height, width), whole numbers from 0 to 255 as float32, on the images' device.
        They are those of torchvision's `resized_crop` of float32 images, clamped and rounded; of
        uint8 images it rounds and clamps between columns and rows too, which shows at sharp edges.
    """
    top, left, height, width, flip = boxes.T
    half = len(images) // 2
    if half and len(images) * 3 * height.max() * width.max() > VALUES:
        parts = (slice(half), slice(half, None))
        return torch.cat([resized_crops(images[part], boxes[part], size) for part in parts])
    device = images[0].device
    crops = _padded(images, top, left, height, width)
    positions, weights = resampling(
        np.stack([height, width]), size, np.stack([np.zeros_like(flip), flip]) > 0
    )
    longest = max(height.max(), width.max(), positions.shape[-1])
    matrices = torch.zeros(*weights.shape[:-1], longest, device=device)
    matrices.scatter_(-1, placed(positions, device), placed(weights, device))
    n, rows, _, columns = crops.shape
    vertical = matrices[0, :, : size[0], :rows]
    horizontal = matrices[1, :, : size[1], :columns]
    with torch.autocast(device.type, enabled=False):
        across = crops.view(n, 3 * rows, columns) @ horizontal.mT  # (image, row · channel, width)
        found = vertical @ across.view(n, rows, 3 * size[1])  # (image, height, channel · width)
    found = found.view(n, size[0], 3, size[1]).transpose(1, 2).contiguous()
    return found.clamp_(0, 255).round_()


def _padded(
    images: Sequence[Tensor],
    top: NDArray[np.int64],
    left: NDArray[np.int64],
    height: NDArray[np.int64],
    width: NDArray[np.int64],
) -> Tensor:
    """Return boxes of images, (image, row, channel, column), float32, of the size of the largest.

    Smaller ones repeat their last row and column.
    """
    # One gather out of all images end to end, as one for each image would be many small ones.
    full = np.array([image.shape for image in images])
    start = np.cumsum([0, *full.prod(1)[:-1]])
    y = top[:, None] + np.minimum(np.arange(height.max()), height[:, None] - 1)
    x = left[:, None] + np.minimum(np.arange(width.max()), width[:, None] - 1)
    channel = (full[:, 1] * full[:, 2])[:, None] * np.arange(3)
    row = (start[:, None] + y * full[:, 2:])[..., None] + channel[:, None]  # (image, row, channel)
    rows, columns = (placed(torch.from_numpy(one), images[0].device) for one in (row, x))
    pixels = torch.cat([image.flatten() for image in images])
    return pixels[rows[..., None] + columns[:, None, None]].float()


def resampling(
    lengths: NDArray[np.int64], sizes: Sequence[int], reverse: NDArray[np.bool_]
) -> tuple[Tensor, Tensor]:
    """Return which pixels an antialiased bicubic resize reads for each of its results.

    Where a result stands for several pixels, the kernel is as much wider. Pixels outside do not
    count: the weights of those inside are normalised.

    Args:
        lengths: (axis, image) pixels before.
        sizes: Pixels after, of each axis.
        reverse: (axis, image) Whether to give the results in reverse.

    Returns:
        Positions, int64, and weights, float32, (axis, image, result, read). All axes have as many
        results as the largest; beyond its own an axis repeats one. Positions of one result differ,
        and those beyond the pixels have weight 0.

    Reference: Keys 1981, "Cubic convolution interpolation for digital image processing", with
        PIL's width and borders.
    """
    last = np.array(sizes)[:, None, None] - 1
    result = np.minimum(np.arange(max(sizes)), last)
    result = np.where(reverse[..., None], last - result, result)
    ratio = lengths[..., None] / (last + 1)
    stretch = np.maximum(ratio, 1.0)
    centre = (result + 0.5) * ratio
    reads = np.arange(int(np.ceil(2 * REACH * stretch.max())) + 1)
    first = np.floor(centre - REACH * stretch + 0.5).astype(np.int64)
    first = first.clip(0, np.maximum(lengths[..., None] - len(reads), 0))
    positions = first[..., None] + reads
    distance = (positions + 0.5 - centre[..., None]) / stretch[..., None]
    weights = _cubic(np.abs(distance)) * (positions < lengths[..., None, None])
    weights /= weights.sum(-1, keepdims=True)
    return torch.from_numpy(positions), torch.from_numpy(weights.astype(np.float32))


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return Keys' kernel at distances that are not negative."""
    near = ((SHARPNESS + 2) * x - (SHARPNESS + 3)) * x * x + 1
    far = SHARPNESS * (((x - 5) * x + 8) * x - 4)
    return np.where(x < 1, near, np.where(x < REACH, far, 0.0))
