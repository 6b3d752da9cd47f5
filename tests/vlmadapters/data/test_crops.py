"""Crops of a batch against torchvision's, one image at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as V

from vlmadapters.data import crops
from vlmadapters.data.crops import resampling, resized_crops


def drawn(n: int, seed: int, largest: int = 150) -> tuple[list[Tensor], NDArray[np.int64]]:
    """Return images of noise, whose edges are as sharp as can be, and a box in each."""
    rng, images, boxes = np.random.default_rng(seed), [], []
    for _ in range(n):
        height, width = rng.integers(1, largest, 2)
        h, w = rng.integers(1, height + 1), rng.integers(1, width + 1)
        top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
        pixels = rng.integers(0, 256, (3, height, width)).astype(np.uint8)
        images.append(torch.from_numpy(pixels))
        boxes.append((top, left, h, w, rng.integers(0, 2)))
    return images, np.array(boxes)


def torchvisions(image: Tensor, box: NDArray[np.int64], size: tuple[int, int]) -> Tensor:
    *where, flip = map(int, box)
    mode = InterpolationMode.BICUBIC
    crop = V.resized_crop(image, *where, list(size), mode, antialias=True)
    return crop.float().clamp(0, 255).round().flip(-1 if flip else ())


@pytest.mark.parametrize("size", [(32, 32), (17, 50), (90, 8), (1, 1)])
@pytest.mark.parametrize("seed", range(5))
def test_crops_are_torchvisions(size: tuple[int, int], seed: int) -> None:
    images, boxes = drawn(6, seed)
    found = resized_crops(images, boxes, size)
    assert found.dtype == torch.float32 and found.shape == (6, 3, *size)
    expected = torch.stack([torchvisions(i.float(), b, size) for i, b in zip(images, boxes)])
    assert (found - expected).abs().max() <= 1
    assert (found != expected).double().mean() < 1e-3, "a sum halfway between two levels is rare"
    of_bytes = torch.stack([torchvisions(i, b, size) for i, b in zip(images, boxes)])
    assert (found - of_bytes).abs().mean() < 0.5


def test_a_crop_does_not_depend_on_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    images, boxes = drawn(7, 0)
    together = resized_crops(images, boxes, (32, 32))
    alone = [resized_crops([i], b[None], (32, 32)) for i, b in zip(images, boxes)]
    assert (together - torch.cat(alone)).abs().max() <= 1
    monkeypatch.setattr(crops, "VALUES", 1)  # halved down to single images
    assert torch.equal(resized_crops(images, boxes, (32, 32)), torch.cat(alone))


def test_autocast_does_not_lower_the_products() -> None:
    images, boxes = drawn(4, 1)
    expected = resized_crops(images, boxes, (32, 32))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(resized_crops(images, boxes, (32, 32)), expected)


def test_an_image_of_the_size_asked_for_stays_as_it_is() -> None:
    image = drawn(1, 2)[0][0]
    size = image.shape[1], image.shape[2]
    for flip in (0, 1):
        found = resized_crops([image], np.array([[0, 0, *size, flip]]), size)
        assert torch.equal(found[0], (image.flip(-1) if flip else image).float())


def test_weights_are_of_pixels_inside_and_sum_to_one() -> None:
    lengths = np.array([[1, 2, 90], [5, 40, 7]])
    positions, weights = resampling(lengths, (8, 11), np.zeros((2, 3), bool))
    assert positions.shape == weights.shape and positions.shape[:3] == (2, 3, 11)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 11))
    inside = positions < torch.from_numpy(lengths)[..., None, None]
    assert (positions >= 0).all() and (weights[~inside] == 0).all()


class Counted(TorchDispatchMode):
    """Counts the operators that are not mere views."""

    count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def test_a_large_batch_takes_no_more_operators_than_one_image() -> None:
    counts = []
    for n in (1, 16):
        images, boxes = drawn(n, 3)
        with Counted() as counted:
            resized_crops(images, boxes, (32, 32))
        counts.append(counted.count)
    assert counts[0] == counts[1] <= 15
