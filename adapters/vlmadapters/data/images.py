"""Images for training and evaluation: decoded once, augmented as the published recipe does.

Which view of which image a step sees is a pure function of seed, epoch and index. So a resumed
run, a run over several processes and every placement of a sweep see the same views.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import InterpolationMode, Normalize, ToTensor
from torchvision.transforms.v2 import functional as V

from vlmadapters.data.augmentation import Augmentation
from vlmadapters.data.crops import resized_crops
from vlmadapters.data.kept import Kept, Room, arriving, shared_room
from vlmlayers.data.unreadable import WAY_OUT, Unreadable, reason
from vlmlayers.errors import UnreadableImage, UserError
from vlmlayers.identity import DataIdentity
from vlmlayers.manifests import Item, Manifest
from vlmlayers.models.decoding import WORTH_STARTING, decode_pixels, decoding_processes, forks
from vlmlayers.models.devices import placed

T = TypeVar("T")
CPU = torch.device("cpu")
THREADS = 4  # that decode and crop
ORDER = 0x0D  # key of the order of items in an epoch


class Images:
    """The images of one dataset for one model; decoded images stay in memory while they fit.

    Args:
        model: The model, for its preprocessing.
        manifest: The dataset.
        root: The data root.
        room: Memory for decoded images; None takes the `shared_room` that all datasets share.
        workers: Processes that decode where there are many images, and threads that decode few of
            them and crop; 0 works in the calling thread. None takes one for each core but one
            beside a GPU, and 0 on a CPU, whose cores the model keeps busy.

    Raises:
        UserError: `workers` is negative.
    """

    def __init__(
        self,
        model: Any,
        manifest: Manifest,
        root: Any = None,
        *,
        room: Room | None = None,
        workers: int | None = None,
    ) -> None:
        if workers is not None and workers < 0:
            raise UserError(f"workers is {workers}; it must be 0 or more")
        self.manifest, self.root, self.room = manifest, root, room or shared_room(CPU)
        self.transform, self.device = model.preprocess, model.device
        # Of what the tower takes: open_clip and transformers name their sizes differently.
        shape = model.towers["vision"].example(0).shape
        if len(shape) != 4:
            raise UserError(
                f"{model.name} takes patches, not images of one size, which training crops and "
                "tests; choose a backbone of one image size"
            )
        self.size = (int(shape[2]), int(shape[3]))
        self.mean, self.std = _normalisation(model.preprocess)
        self._mean, self._std = (placed(one, self.device) for one in (self.mean, self.std))
        self.workers = decoding_processes(workers, WORTH_STARTING, self.device)
        # Few: threads hand the interpreter's lock around between short operations, and from some
        # number on they wait for nothing else.
        self.pool = ThreadPoolExecutor(min(self.workers, THREADS)) if self.workers else None
        self._raw, self._ready = Kept(self.room), Kept(self.room)
        self._uploaded, self._tested = (Kept(shared_room(self.device)) for _ in range(2))

    def identity(self, items: Sequence[Item]) -> DataIdentity:
        """Return what some items are at this moment."""
        return self.manifest.identity(items, self.root)

    def rest(self) -> None:
        """Mark these images as not needed for now: they are dropped where others need room."""
        for kept in (self._raw, self._ready, self._uploaded, self._tested):
            kept.room.rest(kept)

    def raw(self, item: Item) -> Tensor:
        """Return the image as decoded, (3, height, width), uint8."""
        return self._raw.get(item.path, lambda: _pixels(self._open(item)))

    def ready(self, item: Item) -> Tensor:
        """Return the image resized and cropped for evaluation, (3, height, width), uint8."""
        return self._ready.get(item.path, lambda: self._resized(self._open(item)))

    def _open(self, item: Item) -> Any:
        return self.manifest.open_image(item, self.root, size=max(self.size))

    @property
    def _resized(self) -> _Resized:
        return _Resized(self.transform, self.mean, self.std)

    @contextmanager
    def arriving(
        self,
        trained: Sequence[Item] = (),
        tested: Sequence[Item] = (),
        *,
        then: Sequence[tuple[Images, Sequence[Item], Sequence[Item]]] = (),
    ) -> Iterator[None]:
        """Let processes decode ahead what is not kept, while it fits.

        They are started where it is worth it: threads decode images that are few.

        Args:
            trained: Items to decode as `raw` does.
            tested: Items to decode as `ready` does, after these.
            then: Likewise of other images, after all of these, as far as the time suffices.
        """
        wanted = self._lacking(trained, tested)
        for images, *items in then:
            wanted |= images._lacking(*items)
        few = len(wanted) < WORTH_STARTING
        if few or not self.workers or not forks() or self.room.full:
            yield
            return
        begin = partial(decode_pixels, list(wanted.values()), workers=self.workers)
        with arriving(list(wanted), begin):
            yield

    def _lacking(
        self, trained: Sequence[Item], tested: Sequence[Item]
    ) -> dict[tuple[Kept, str], Callable[[], Tensor]]:
        """Return where images that are not kept belong, and what makes them."""
        opened = partial(_opened, self.manifest, self.root, max(self.size))
        ways = ((self._raw, _pixels, trained), (self._ready, self._resized, tested))
        return {
            (kept, item.path): partial(opened, item, convert)
            for kept, convert, items in ways
            for item in items
            if kept.lacks(item.path)
        }

    def uploaded(self, items: Sequence[Item]) -> list[Tensor]:
        """Return images as decoded on the model's device, (3, height, width) each, uint8.

        They stay there while they fit into `shared_room` of the device.
        """

        def upload(item: Item) -> Tensor:
            return self._uploaded.get(item.path, lambda: placed(self.raw(item), self.device))

        # Workers decode what is not there; to ask them for the rest would cost more than it is.
        lacking = [item for item in items if item.path not in self._uploaded]
        made = dict(zip((item.path for item in lacking), self._map(upload, lacking)))
        return [made[item.path] if item.path in made else upload(item) for item in items]

    def _map(self, function: Any, *arguments: Iterable[Any]) -> list[Any]:
        try:
            mapped = map if self.pool is None else self.pool.map
            return list(mapped(function, *arguments))
        except UnreadableImage as error:
            raise UnreadableImage(f"{error}; {WAY_OUT}") from None

    def unreadable(self, items: Sequence[Item], *, tested: bool) -> Unreadable:
        """Return which items cannot be read; the others are kept while they fit.

        Args:
            items: The items to try.
            tested: Decode them for evaluation, else for training.
        """

        def fault(item: Item) -> str:
            try:
                self.ready(item) if tested else self.raw(item)
            except (UserError, OSError) as error:
                return reason(item.path, error)
            return ""

        with self.arriving(tested=items) if tested else self.arriving(items):
            faults = enumerate(self._map(fault, items))
        return Unreadable({row: found for row, found in faults if found})

    def normalised(self, pixels: Sequence[Tensor]) -> Tensor:
        """Stack images of one size and normalise them as the model expects, on its device."""
        # To the device as bytes, a quarter of the transfer of floats.
        return self._normalised(placed(torch.stack(list(pixels)), self.device).float())

    def _normalised(self, batch: Tensor) -> Tensor:
        return batch.div_(255).sub_(self._mean).div_(self._std)

    def augmented(
        self,
        items: Sequence[Item],
        draws: NDArray[np.float64],
        augmentation: Augmentation,
        *,
        on_device: bool = False,
    ) -> Tensor:
        """Return one augmented view of each item, normalised, (item, 3, height, width).

        Args:
            items: The items.
            draws: (item, numbers) random numbers, of `Augmentation.draws`.
            augmentation: What the numbers mean.
            on_device: Crop on the model's device, by `resized_crops`, instead of the CPU.
        """
        if on_device:
            images = self.uploaded(items)
            boxes = [augmentation.box(draw, *image.shape[1:]) for draw, image in zip(draws, images)]
            return self._normalised(resized_crops(images, np.array(boxes, np.int64), self.size))

        def view(item: Item, draw: NDArray[np.float64]) -> Tensor:
            raw = self.raw(item)
            top, left, h, w, flip = augmentation.box(draw, raw.shape[1], raw.shape[2])
            # PIL's resize, which the published recipe uses, is always antialiased; for tensors
            # torchvision leaves the choice.
            crop = V.resized_crop(
                raw, top, left, h, w, list(self.size), InterpolationMode.BICUBIC, antialias=True
            )
            return crop.flip(-1) if flip else crop

        return self.normalised(self._map(view, items, draws))

    def ahead(self, make: Callable[[T], Tensor], parts: Iterable[T]) -> Iterator[Tensor]:
        """Yield `make(part)` of each part, the next one made while the caller works on this one.

        Without workers each is made when it is asked for.
        """
        if self.pool is None:
            yield from map(make, parts)
            return
        parts = iter(parts)
        # A thread of its own: a batch that waits in the pool for crops of the same pool would, with
        # one worker, wait for itself.
        with ThreadPoolExecutor(1) as maker:
            # One ahead and no more, since each is a whole batch in memory.
            pending = [maker.submit(make, part) for part in islice(parts, 1)]
            while pending:
                ready = pending.pop().result()
                pending += [maker.submit(make, part) for part in islice(parts, 1)]
                yield ready

    def _stacked(self, items: Sequence[Item]) -> Tensor:
        """Return a batch as it is tested, on the model's device, uint8.

        On a GPU it stays there, while it fits into the `shared_room`, for the next seed or method.
        """

        def stack() -> Tensor:
            return placed(torch.stack(self._map(self.ready, items)), self.device)

        if self.device.type == "cpu":  # whose memory has the images already
            return stack()
        return self._tested.get(tuple(item.path for item in items), stack)

    def batches(self, items: Sequence[Item], batch_size: int) -> Iterator[Tensor]:
        """Yield the items for evaluation, in order, (item, 3, height, width)."""

        def make(start: int) -> Tensor:
            part = items[start : start + batch_size]
            # Not in place: the bytes may be kept.
            return self._normalised(self._stacked(part).float())

        with self.arriving(tested=items):
            yield from self.ahead(make, range(0, len(items), batch_size))


@dataclass(frozen=True, eq=False)
class _Resized:
    """Makes of a PIL image what evaluation resizes and crops, (3, height, width), uint8.

    Without the images that are kept, as it is given to other processes.
    """

    transform: Any
    mean: Tensor
    std: Tensor

    def __call__(self, image: Any) -> Tensor:
        steps: Sequence[Any] = getattr(self.transform, "transforms", ())
        # What these two make of bytes is undone below: they need not be made floats at all.
        if len(steps) > 1 and isinstance(steps[-2], ToTensor) and isinstance(steps[-1], Normalize):
            for step in steps[:-2]:
                image = step(image)
            return _pixels(image)
        # Normalisation is undone to keep a byte a value; 8-bit input makes this exact.
        made: Tensor = self.transform(image) * self.std + self.mean
        return made.mul(255).round().clamp(0, 255).to(torch.uint8)


def _opened(
    manifest: Manifest, root: Any, size: int, item: Item, convert: Callable[[Any], Tensor]
) -> Tensor:
    return convert(manifest.open_image(item, root, size=size))


def _pixels(image: Any) -> Tensor:
    """Return a PIL image as (3, height, width), uint8."""
    # As bytes, a quarter of floats; contiguous, or crops would gather across channels.
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def _normalisation(preprocess: Any) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation that a transform normalises with, (3, 1, 1) each."""
    for step in getattr(preprocess, "transforms", ()):
        if hasattr(step, "mean") and hasattr(step, "std"):
            return _channels(step.mean), _channels(step.std)
    processor = getattr(preprocess, "processor", None)  # of transformers
    if processor is not None and processor.do_normalize:
        return _channels(processor.image_mean), _channels(processor.image_std)
    raise UserError(
        "the model's preprocessing has no normalisation step; load the model with load_model"
    )


def _channels(values: Any) -> Tensor:
    return torch.as_tensor(values).view(3, 1, 1)


def as_first_seen(items: Sequence[T], seed: int) -> list[T]:
    """Return items in the order in which the first epoch of a training sees them."""
    return [items[i] for i in _order(len(items), seed, 0)]


def _order(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch, ORDER]).permutation(n)


def epoch_batches(
    n: int, batch_size: int, seed: int, epoch: int, *, drop_last: bool = True
) -> list[NDArray[np.int64]]:
    """Return the item indices of each step of an epoch.

    Fewer items than one batch make one batch of them all. A last batch that is smaller than the
    others is dropped, or kept without `drop_last`.
    """
    order = _order(n, seed, epoch)
    # As in Dassl: the last partial batch is dropped, but never the only one.
    size = min(batch_size, n)
    end = n - size + 1 if drop_last else n
    return [order[start : start + size] for start in range(0, end, size)]
