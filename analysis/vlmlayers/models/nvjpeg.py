"""JPEG files decoded and prepared on a device: the CPU only reads their bytes.

torchvision decodes by nvJPEG on a GPU; by libjpeg on a CPU, which the tests make use of.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import Compose, ToTensor

from vlmlayers.data.unreadable import reason
from vlmlayers.errors import DataFault, NotJPEG, UserError, one_line
from vlmlayers.models.devices import memory_errors
from vlmlayers.models.vlm import VLM

# What undoes an EXIF orientation: rows and columns change places from 5 on, then axes are reversed.
_REVERSED = {2: (-1,), 3: (-2, -1), 4: (-2,), 6: (-1,), 7: (-2, -1), 8: (-2,)}


def refuse_nvjpeg(
    model: VLM, manifest: Any, items: Sequence[Any], root: Path | None = None
) -> None:
    """Refuse to decode on a GPU where there is none, or images or a model not made for it.

    Raises:
        UserError: Says which of them.
    """
    if model.device.type != "cuda":
        raise UserError(
            f"decoding nvjpeg decodes on a CUDA device, and the model is on {model.device}; take "
            "device cuda, or decoding full or reduced"
        )
    OnPixels.of(model.preprocess, model.image_size, model.device)
    with suppress(DataFault):  # what cannot be read is left out or refused with all others
        manifest.read_jpeg(items[0], root)


class JPEGFiles(Dataset[tuple[int, Any]]):
    """The encoded images of items, each with its row; a reason where one cannot be read."""

    def __init__(self, manifest: Any, items: Sequence[Any], root: Path | None) -> None:
        self.manifest, self.items, self.root = manifest, items, root

    def __getitem__(self, row: int) -> tuple[int, Any]:
        item = self.items[row]
        try:
            return row, self.manifest.read_jpeg(item, self.root)
        except NotJPEG as error:
            return row, error  # raised by `decoded`: from a process it would come with its trace
        except (UserError, OSError) as error:
            return row, reason(item.path, error)


def decoded(
    samples: Sequence[tuple[int, Any]],
    items: Sequence[Any],
    shape: Callable[[Tensor], Tensor],
    device: torch.device,
) -> list[tuple[int, Any]]:
    """Return the pixels of a batch on the device; reasons where they cannot be decoded.

    Args:
        samples: Row and what `JPEGFiles` gives.
        items: All items.
        shape: Of `OnPixels`.
        device: Where to decode.

    Raises:
        NotJPEG: An image is no JPEG.
        UserError: The device cannot decode one that is whole, or has no memory left.
    """
    for _, sample in samples:
        if isinstance(sample, NotJPEG):
            raise sample
    good = [(row, *sample) for row, sample in samples if isinstance(sample, tuple)]
    made = {row: sample for row, sample in samples if not isinstance(sample, tuple)}
    try:
        pixels: list[Any] = _pixels([content for _, content, _ in good], device)
    except RuntimeError:  # one is broken: the decoder gives all of a batch or none
        with memory_errors(device, "lower batch_size, or take decoding full or reduced"):
            pixels = [_pixels_or_fault(one, device, items[row].path) for row, one, _ in good]
    for (row, _, orientation), image in zip(good, pixels):
        if isinstance(image, Tensor):
            made[row] = shape(upright(image, orientation))
        else:
            made[row] = reason(items[row].path, image)
    return [(row, made[row]) for row, _ in samples]


def _pixels(contents: Sequence[bytes], device: torch.device) -> list[Tensor]:
    """Return decoded images, (3, height, width), uint8."""
    if not contents:
        return []
    # A copy, since torch warns of tensors over read-only bytes.
    encoded = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in contents]
    with warnings.catch_warnings():  # torchvision names another package for the years to come
        warnings.simplefilter("ignore")
        found = decode_jpeg(encoded, mode=ImageReadMode.RGB, device=device)
    return list(found)


def _pixels_or_fault(content: bytes, device: torch.device, path: str) -> Tensor | UserError:
    try:
        return _pixels([content], device)[0]
    except torch.OutOfMemoryError:
        raise  # says nothing about the image
    except RuntimeError as error:
        fault = one_line(error)
    try:
        _pixels([content], torch.device("cpu"))
    except RuntimeError:
        return UserError(f"cannot be decoded: {fault}")
    # The device is at fault: told of each image, it would read as a dataset that is broken.
    raise UserError(f"nvJPEG cannot decode {path}, which is whole: {fault}; take decoding full or "
                    "reduced")  # fmt: skip


def upright(pixels: Tensor, orientation: int) -> Tensor:
    """Return pixels, (channel, height, width), as their EXIF orientation (1 to 8) wants them."""
    if orientation >= 5:
        pixels = pixels.transpose(-2, -1)
    return pixels.flip(_REVERSED.get(orientation, ()))


@dataclass(frozen=True)
class OnPixels:
    """A model's preprocessing for decoded pixels.

    Attributes:
        shape: (3, height, width), uint8 → (3, side, side), uint8: as an image's, but for the
            rounding of the resampling.
        finish: (image, 3, side, side), uint8 → normalised. Of a whole batch: torchvision waits for
            the device once each time.
    """

    shape: Callable[[Tensor], Tensor]
    finish: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, preprocess: Any, size: int, device: torch.device) -> OnPixels:
        """Split a preprocessing of steps that take tensors where images become numbers.

        Args:
            preprocess: The model's.
            size: Pixels of the model's side.
            device: Where the pixels are.

        Raises:
            UserError: It is of other steps.
        """
        # A function of Pillow's images alone, in open_clip 3.1; these pixels are RGB already.
        steps = [
            step
            for step in getattr(preprocess, "transforms", ())
            if getattr(step, "__name__", "") != "_convert_to_rgb"
        ]
        place = next((i for i, step in enumerate(steps) if isinstance(step, ToTensor)), None)
        shape, rest = Compose(steps[:place]), Compose(steps[(place or 0) + 1 :])
        try:
            # Not square, so that steps that resize or crop have something to do.
            tried = shape(torch.zeros(3, size, size + 1, dtype=torch.uint8, device=device))
        except (AttributeError, RuntimeError, TypeError, ValueError):
            tried = None
        if place is None or not isinstance(tried, Tensor):
            raise UserError(
                "decoding nvjpeg prepares images on the GPU, which this model's own preprocessing "
                "cannot; take decoding full or reduced"
            )
        return cls(shape, lambda batch: rest(batch.float().div_(255)))
