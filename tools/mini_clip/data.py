"""Training images of the recipe: decoded once to small squares, drawn by a function of the step."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mini_clip.teacher import concept_of
from vlmlayers.data import builtin
from vlmlayers.errors import UserError
from vlmlayers.files import checksum
from vlmlayers.manifests import Item, Manifest
from vlmlayers.progress import track

CAPTIONED = 0.15  # share of drawings whose text is a caption, not a class prompt
SIDE = 80  # pixels of a cached square; crops of it feed the 64-pixel model
CHUNK = 256  # images that a process decodes at a time


@dataclass(frozen=True, eq=False)
class Source:
    """One training set, decoded.

    Attributes:
        name: Manifest name.
        weight: Share of every batch, before the shares are normalised.
        drawn: Whether the images are built-in drawings: never mirrored, cropped hard, nor shown to
            the teacher.
        images: (item, 3, SIDE, SIDE) uint8, memory-mapped.
        items: The manifest's items, in the same order.
    """

    name: str
    weight: float
    drawn: bool
    images: NDArray[np.uint8]
    items: Sequence[Item]


@dataclass(frozen=True, eq=False)
class Batch:
    """One step's images and texts, photographs before drawings.

    Attributes:
        rows: (item,) places among the images of all sources, end to end.
        photographs: Number of photographs.
        texts: (item,) one text per image.
        groups: (item,) images of one group share their texts: they are positives of each other.
        own: (item,) the teacher's concept that an image's class names; -1 for none.
    """

    rows: NDArray[np.int64]
    photographs: int
    texts: list[str]
    groups: list[str]
    own: NDArray[np.int64]


def _squares(name: str, root: Path | None, items: Sequence[Item]) -> NDArray[np.uint8]:
    manifest = Manifest.load(name)
    squares = []
    for item in items:
        image = manifest.open_image(item, root, size=SIDE)
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        small = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box)
        squares.append(np.asarray(small, dtype=np.uint8).transpose(2, 0, 1))
    return np.stack(squares)


def load_source(
    name: str,
    weight: float,
    folder: Path,
    root: Path | None,
    limit: int | None,
    show: bool = True,
) -> Source:
    """Decode a manifest's training split once into a cached array, on all cores.

    Args:
        name: Manifest name.
        weight: Share of every batch.
        folder: Where the cache lies; its key holds everything that it depends on.
        root: Data root.
        limit: Use the first so many items only (built-in sets are as long as asked for).
        show: Whether to show progress.

    Raises:
        UserError: The manifest has no training image under the data root.
    """
    manifest = Manifest.load(name)
    drawn = name in builtin.names()
    items = manifest.items("train", root, present_only=not drawn)[:limit]
    if not items:
        raise UserError(f"{name}: no training image under the data root; give --data-root")
    key = checksum(json.dumps([name, SIDE, manifest.hash, [i.path for i in items]]))[:16]
    path = folder / f"{name}-{key}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_suffix(".partial")
        cache = np.lib.format.open_memmap(
            partial_path, mode="w+", dtype=np.uint8, shape=(len(items), 3, SIDE, SIDE)
        )
        chunks = [items[k : k + CHUNK] for k in range(0, len(items), CHUNK)]
        decode = partial(_squares, name, root)
        with ProcessPoolExecutor(min(len(chunks), os.cpu_count() or 1)) as pool:
            found = pool.map(decode, chunks) if len(chunks) > 1 else map(decode, chunks)
            for k, squares in enumerate(track(found, name, total=len(chunks), show=show)):
                cache[k * CHUNK : k * CHUNK + len(squares)] = squares
        cache.flush()
        partial_path.replace(path)
    return Source(name, weight, drawn, np.load(path, mmap_mode="r"), items)


def sample_batch(
    sources: Sequence[Source],
    size: int,
    templates: Mapping[str, Sequence[str]],
    seed: int,
    step: int,
    draws: int = 0,
) -> Batch:
    """Draw one batch: a pure function of seed and step, so that a resumed run sees the same.

    Few sources in a batch make most negatives items of the same dataset, which are the hard ones:
    a dataset is easily told from another, a class less so. One template per source and batch keeps
    the number of distinct texts, and with it the cost of the text tower, low.

    Args:
        sources: Training sets.
        size: Number of images.
        templates: `first` (the common prompt) and `others`.
        seed: Seed of the run.
        step: Number of the step.
        draws: Draw so many sources by their weight, with replacement, and share the batch between
            them; 0 draws a source for each image.
    """
    generator = np.random.default_rng((seed, step))
    shares = np.array([source.weight for source in sources])
    chosen = generator.choice(len(sources), size=draws or size, p=shares / shares.sum())
    which = sorted(np.resize(chosen, size).tolist(), key=lambda s: (sources[s].drawn, s))
    template = {s: draw_template(templates, generator) for s in dict.fromkeys(which)}
    starts = np.cumsum([0, *(len(source.items) for source in sources)])
    rows, own = np.empty(size, np.int64), np.full(size, -1)
    texts, groups = [], []
    for place, s in enumerate(which):
        source = sources[s]
        index = int(generator.integers(len(source.items)))
        item = source.items[index]
        text, group = _text(source, item, index, template[s], generator)
        concept = None if source.drawn else concept_of(item.class_name)
        rows[place] = starts[s] + index
        own[place] = -1 if concept is None else concept
        texts.append(text)
        groups.append(group)
    return Batch(rows, sum(not sources[s].drawn for s in which), texts, groups, own)


def _text(
    source: Source,
    item: Item,
    index: int,
    template: str,
    generator: np.random.Generator,
) -> tuple[str, str]:
    """Return a text for an item and the group whose members are positives of each other."""
    if not item.class_name:
        return _pick(item.captions, generator), f"{source.name}:{index}"
    name = item.class_name.replace("_", " ")
    if source.drawn and item.captions and generator.random() < CAPTIONED:
        return _pick(item.captions, generator), name
    return template.replace("{}", name), name


def _pick(texts: Sequence[str], generator: np.random.Generator) -> str:
    return texts[int(generator.integers(len(texts)))]


def draw_template(templates: Mapping[str, Sequence[str]], generator: np.random.Generator) -> str:
    """Draw a template: the first one in half of the cases."""
    return _pick(templates["first" if generator.random() < 0.5 else "others"], generator)


class Views:
    """Random crops of one step's images: scale, place and mirror are drawn once, for any size.

    Drawings are cropped little and never mirrored: left and right are part of what they show.

    Args:
        images: (item, 3, height, width) uint8, photographs before drawings.
        photographs: Number of photographs.
        generator: Private generator, on the device of the images.
        strength: 0 gives centre crops of the whole image without colour change.
    """

    def __init__(
        self, images: Tensor, photographs: int, generator: torch.Generator, strength: float = 1.0
    ) -> None:
        self.images, self.photographs, self.generator = images, photographs, generator
        drawing = torch.arange(len(images), device=images.device) >= photographs
        self.soft = torch.where(drawing, 0.35, 1.0) * strength
        area = 1 - self.soft * self._uniform(0, 0.65)
        ratio = torch.exp(self.soft * self._uniform(-0.28, 0.28))
        width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
        mirrored = (self._uniform(0, 1) < 0.5 * (strength > 0)) & ~drawing
        self.theta = torch.zeros(len(images), 2, 3, device=images.device)
        self.theta[:, 0, 0] = torch.where(mirrored, -width, width)
        self.theta[:, 1, 1] = height
        self.theta[:, 0, 2] = self._uniform(-1, 1) * (1 - width)
        self.theta[:, 1, 2] = self._uniform(-1, 1) * (1 - height)

    def _uniform(self, low: float, high: float) -> Tensor:
        drawn = torch.rand(len(self.images), generator=self.generator, device=self.images.device)
        return low + (high - low) * drawn

    def crops(self, size: int, items: slice = slice(None)) -> Tensor:
        """Return the crops of some items, (item, 3, size, size) in [0, 1]."""
        images, theta = self.images[items], self.theta[items]
        grid = F.affine_grid(theta, [len(theta), 3, size, size], align_corners=False)
        pixels = F.grid_sample(
            images.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False
        )
        return pixels / 255

    def augmented(self, size: int, mixed: float = 0.0) -> Tensor:
        """Return normalised crops with texture, colour and light changed, (item, 3, size, size).

        Args:
            size: Pixels of the crop.
            mixed: Share of photographs whose texture is mixed with that of another one.
        """
        images, n = self.crops(size), self.photographs
        if mixed and n:
            images[:n] = _mix_textures(images[:n], mixed, self.generator)
        brightness, contrast = (1 + self.soft * self._uniform(-0.3, 0.3) for _ in range(2))
        mean = images.mean((1, 2, 3), keepdim=True)
        images = (images - mean) * contrast[:, None, None, None]
        images = images + mean * brightness[:, None, None, None]
        grey = (self._uniform(0, 1) < 0.1 * self.soft)[:, None, None, None]
        images = torch.where(grey, images.mean(1, keepdim=True), images).clamp(0, 1)
        mean, std = _normal(images.device)
        return (images - mean) / std


def _mix_textures(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Give some images a part of the amplitudes of others; the phases, and so the outlines, stay.

    Reference:
        Xu et al. 2021, A Fourier-based framework for domain generalization (amplitude mix).
    """
    chosen, weight = torch.rand(2, len(images), 1, 1, 1, generator=generator, device=images.device)
    other = torch.randperm(len(images), generator=generator, device=images.device)
    spectrum = torch.fft.rfft2(images)
    size = spectrum.abs()
    mixture = torch.polar(size.lerp(size[other], weight), spectrum.angle())
    mixed = torch.fft.irfft2(mixture, s=images.shape[-2:]).clamp(0, 1)
    return torch.where(chosen < share, mixed, images)


@cache  # a copy to a GPU would be waited for at every step
def _normal(device: torch.device) -> tuple[Tensor, Tensor]:
    rows = (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    mean, std = torch.tensor(rows, device=device)[..., None, None]
    return mean, std
