"""Training images of the recipe: decoded once to small squares, drawn by a function of the step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mini_clip.teacher import Lesson, teach
from vlmlayers.data import builtin
from vlmlayers.errors import UserError
from vlmlayers.files import checksum
from vlmlayers.manifests import Item, Manifest
from vlmlayers.progress import track

CAPTIONED = 0.15  # share of drawings whose text is a caption, not a class prompt
SIDE = 80  # pixels of a cached square; crops of it feed the 64-pixel model


@dataclass(frozen=True, eq=False)
class Source:
    """One training set, decoded.

    Attributes:
        name: Manifest name.
        weight: Share of every batch, before the shares are normalised.
        drawn: Whether the images are built-in drawings: never mirrored, nor cropped hard.
        images: (item, 3, SIDE, SIDE) uint8, memory-mapped.
        items: The manifest's items, in the same order.
        lesson: What the teacher says about them; None for a source that it is not asked about.
    """

    name: str
    weight: float
    drawn: bool
    images: NDArray[np.uint8]
    items: Sequence[Item]
    lesson: Lesson | None = None


@dataclass(frozen=True, eq=False)
class Batch:
    """One step's images and texts.

    Attributes:
        images: (item, 3, SIDE, SIDE) uint8.
        drawn: (item,) bool.
        texts: (item,) one text per image.
        groups: (item,) images of one group share their texts: they are positives of each other.
        taught: Rows that the teacher was asked about.
        lesson: What it said, of these rows; None where there are none.
    """

    images: Tensor
    drawn: Tensor
    texts: list[str]
    groups: list[str]
    taught: Sequence[int] = ()
    lesson: Lesson | None = None


def _square(image: Image.Image) -> NDArray[np.uint8]:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    small = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box)
    return np.asarray(small, dtype=np.uint8).transpose(2, 0, 1)


def load_source(
    name: str,
    weight: float,
    folder: Path,
    root: Path | None,
    limit: int | None,
    show: bool = True,
    taught: bool = False,
) -> Source:
    """Decode a manifest's training split once into a cached array.

    Args:
        name: Manifest name.
        weight: Share of every batch.
        folder: Where the cache lies; its key holds everything that it depends on.
        root: Data root.
        limit: Use the first so many items only (built-in sets are as long as asked for).
        show: Whether to show progress.
        taught: Whether to ask the teacher about its images; it is never asked about drawings.

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
        partial = path.with_suffix(".partial")
        cache = np.lib.format.open_memmap(
            partial, mode="w+", dtype=np.uint8, shape=(len(items), 3, SIDE, SIDE)
        )
        with ThreadPoolExecutor(2) as pool:
            squares = pool.map(lambda i: _square(manifest.open_image(i, root, size=SIDE)), items)
            for row, square in enumerate(track(squares, name, total=len(items), show=show)):
                cache[row] = square
        cache.flush()
        partial.replace(path)
    images = np.load(path, mmap_mode="r")
    lesson = None
    if taught and not drawn:
        lesson = teach(name, images, [item.class_name for item in items], folder, key, show)
    return Source(name, weight, drawn, images, items, lesson)


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
    drawn_sources = generator.choice(len(sources), size=draws or size, p=shares / shares.sum())
    which = np.resize(drawn_sources, size)
    template = {s: draw_template(templates, generator) for s in dict.fromkeys(which.tolist())}
    images = np.empty((size, 3, SIDE, SIDE), np.uint8)
    texts, groups, drawn, taught, lessons = [], [], [], [], []
    for row, s in enumerate(which.tolist()):
        source = sources[s]
        index = int(generator.integers(len(source.items)))
        item = source.items[index]
        images[row] = source.images[index]
        text, group = _text(source, item, index, template[s], generator)
        texts.append(text)
        groups.append(group)
        drawn.append(source.drawn)
        if source.lesson is not None:
            taught.append(row)
            lessons.append(source.lesson.take([index]))
    lesson = Lesson.joined(lessons) if lessons else None
    return Batch(torch.from_numpy(images), torch.tensor(drawn), texts, groups, taught, lesson)


def _text(
    source: Source,
    item: Item,
    index: int,
    template: str,
    generator: np.random.Generator,
) -> tuple[str, str]:
    """Return a text for an item and the group whose members are positives of each other."""
    if not item.class_name:
        return str(generator.choice(list(item.captions))), f"{source.name}:{index}"
    name = item.class_name.replace("_", " ")
    if source.drawn and item.captions and generator.random() < CAPTIONED:
        return str(generator.choice(list(item.captions))), name
    return template.replace("{}", name), name


def draw_template(templates: Mapping[str, Sequence[str]], generator: np.random.Generator) -> str:
    """Draw a template: the first one in half of the cases."""
    pool = templates["first"] if generator.random() < 0.5 else templates["others"]
    return str(generator.choice(list(pool)))


def augment(
    batch: Batch,
    size: int,
    generator: torch.Generator,
    strength: float = 1.0,
    mixed: float = 0.0,
) -> Tensor:
    """Return normalised random crops, (item, 3, size, size): scale, place, mirror, colour, texture.

    Drawings are cropped little and never mirrored: left and right are part of what they show.

    Args:
        batch: Images of one step.
        size: Pixels of the crop.
        generator: Private generator.
        strength: 0 gives centre crops of the whole image without colour change.
        mixed: Share of photographs whose texture is mixed with that of another one.
    """
    n = len(batch.images)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(shape or (n,)).uniform_(low, high, generator=generator)

    soft = torch.where(batch.drawn, 0.35, 1.0) * strength
    area = 1 - soft * uniform(0, 0.65)
    ratio = torch.exp(soft * uniform(-0.28, 0.28))
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    mirror = torch.where((uniform(0, 1) < 0.5 * (strength > 0)) & ~batch.drawn, -1.0, 1.0)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = width * mirror, height
    theta[:, 0, 2] = uniform(-1, 1) * (1 - width)
    theta[:, 1, 2] = uniform(-1, 1) * (1 - height)
    grid = F.affine_grid(theta, [n, 3, size, size], align_corners=False)
    images = F.grid_sample(
        batch.images.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )
    images = images / 255
    photographs = (~batch.drawn).nonzero().flatten()
    if mixed and len(photographs):
        images[photographs] = _mix_textures(images[photographs], mixed, generator)
    brightness = 1 + soft * uniform(-0.3, 0.3)
    contrast = 1 + soft * uniform(-0.3, 0.3)
    mean = images.mean((1, 2, 3), keepdim=True)
    images = (images - mean) * contrast[:, None, None, None] + mean * brightness[
        :, None, None, None
    ]
    grey = (uniform(0, 1) < 0.1 * soft)[:, None, None, None]
    images = torch.where(grey, images.mean(1, keepdim=True), images).clamp(0, 1)
    return (images - _MEAN) / _STD


def _mix_textures(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Give some images a part of the amplitudes of others; the phases, and so the outlines, stay.

    Reference:
        Xu et al. 2021, A Fourier-based framework for domain generalization (amplitude mix).
    """
    chosen = torch.rand(len(images), generator=generator) < share
    weight = torch.rand(len(images), generator=generator)[:, None, None, None]
    other = torch.randperm(len(images), generator=generator)
    spectrum = torch.fft.rfft2(images)
    size = spectrum.abs()
    mixture = torch.polar(size.lerp(size[other], weight), spectrum.angle())
    mixed = torch.fft.irfft2(mixture, s=images.shape[-2:]).clamp(0, 1)
    return torch.where(chosen[:, None, None, None], mixed, images)


_MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073))[:, None, None]
_STD = torch.tensor((0.26862954, 0.26130258, 0.27577711))[:, None, None]
