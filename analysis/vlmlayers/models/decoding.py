"""Decode images in fixed batches, in this process or in workers, in the order of the items."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from multiprocessing import current_process
from pathlib import Path
from shutil import disk_usage
from threading import current_thread, main_thread
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from vlmlayers.data.unreadable import reason
from vlmlayers.errors import UserError, shortened
from vlmlayers.models.nvjpeg import JPEGFiles, OnPixels, decoded
from vlmlayers.runs import cores

LOG = logging.getLogger(__name__)
CPU = torch.device("cpu")
EMPTY = torch.empty(0, dtype=torch.uint8)
# Images that a process hands over at a time, fewer where they are large: twice as many are under
# way for each process.
HANDED_OVER, HANDED_BYTES = 16, 8 << 20
# Processes that are not forked import all anew, for many seconds of every core. How Python starts
# them by itself depends on its version, and on how this process was started.
FORKS = sys.platform == "linux"
SHARED_MEMORY = "/dev/shm"
WORTH_STARTING = 512  # images that take longer to decode than processes to start
MOST_PROCESSES = 16


class _Images(Dataset[tuple[int, Any]]):
    def __init__(
        self,
        manifest: Any,
        items: Sequence[Any],
        root: Path | None,
        preprocess: Any,
        size: int,
        decoding: str,
    ) -> None:
        self.manifest, self.items, self.preprocess = manifest, items, preprocess
        # Named where it is asked for: other datasets that open images need not know of it.
        reduced = {"reduced": True} if decoding == "reduced" else {}
        self.where = {"root": root, "size": size, **reduced}

    def __getitem__(self, row: int) -> tuple[int, Any]:
        item = self.items[row]
        try:
            image = self.manifest.open_image(item, **self.where)
            made = image if isinstance(image, Tensor) else self.preprocess(image)
        # Returned, not raised: an error in a decoding process would end the whole extraction.
        except (UserError, OSError) as error:
            return row, reason(item.path, error)
        # Else it would be taken for the reason why an image could not be read.
        if not isinstance(made, Tensor) or not made.is_floating_point():
            kind = made.dtype if isinstance(made, Tensor) else f"a {type(made).__name__}"
            raise UserError(
                f"preprocess makes {kind} of an image; the model takes a floating tensor of "
                "(3, height, width)"
            )
        return row, made.detach().cpu()  # a batch leaves from pinned memory, whoever prepared it


def _handed_over(pixels: Tensor) -> Any:
    """Return a tensor in shared memory where that has room, else as an array.

    Containers keep shared memory small, and where it is full torch fails in a thread that nobody
    hears of: the batch would be waited for for ever. Arrays go through a pipe, more slowly.
    """
    if get_worker_info() is None:
        return pixels
    try:
        memory = disk_usage(SHARED_MEMORY)
        if memory.free - pixels.nbytes > memory.total // 2:  # others need some as well
            return pixels.share_memory_()
    except (OSError, RuntimeError):
        pass
    return pixels.numpy()


def _collate(samples: list[tuple[int, Any]]) -> tuple[list[int], Any, dict[int, str]]:
    # The batch keeps its place and its other images: batches are part of what a store is.
    good = [(row, image) for row, image in samples if isinstance(image, Tensor)]
    bad = {row: image for row, image in samples if not isinstance(image, Tensor)}
    for row, image in good[1:]:
        if image.shape != good[0][1].shape:
            (first, whole), other = good[0], tuple(image.shape)
            raise UserError(
                f"images of one batch differ after preparation: row {first} is "
                f"{tuple(whole.shape)}, row {row} {other}; prepare all to one size"
            )
    stacked = _handed_over(torch.stack([image for _, image in good])) if good else None
    return [row for row, _ in good], stacked, bad


def batches_of(rows: int, size: int) -> list[list[int]]:
    """Return row numbers batch by batch; the division depends on nothing but these two numbers."""
    return [list(part) for part in _split(range(rows), size)]


def decode(
    manifest: Any,
    items: Sequence[Any],
    batches: Sequence[Sequence[int]],
    *,
    preprocess: Any,
    root: Path | None,
    size: int,
    workers: int,
    decoding: str = "full",
    device: torch.device = CPU,
) -> Iterator[tuple[list[int], Tensor | None, dict[int, str]]]:
    """Yield rows, stacked images, and reasons of those that failed, batch by batch in order.

    All processes decode the first batch, then all the next: a batch of one process's own would
    be late, and then all of them would come at once, for a GPU to wait and then the processes.

    Args:
        manifest: Opens the images.
        items: All items; rows index them.
        batches: Rows of each batch.
        preprocess: PIL image → tensor.
        root: Data root.
        size: Pixels that the model takes, a hint for drawn images.
        workers: Decoding processes; 0 decodes here, as a daemonic process does with any number.
        decoding: `full`, `reduced` or `nvjpeg`.
        device: The model's: images are on it where it is a GPU; `nvjpeg` decodes on it.

    Where a decoding process dies the rest is decoded here.

    Raises:
        NotJPEG: `nvjpeg` meets another image.
    """
    on_device = decoding == "nvjpeg"
    images: Dataset[tuple[int, Any]] = (
        JPEGFiles(manifest, items, root)
        if on_device
        else _Images(manifest, items, root, preprocess, size, decoding)
    )
    processes = 0 if current_process().daemon else workers  # which may not have children
    at_a_time = _at_a_time(torch.float32.itemsize * 3 * size**2) if processes else sys.maxsize
    parts = [list(part) for batch in batches for part in _split(batch, at_a_time)]
    loaded = _loaded(
        images,
        parts,
        processes,
        # Two batches are under way, whoever decodes them: one that the model takes, and the next.
        ahead=2 * max(map(len, batches), default=1),
        collate_fn=list if on_device else _collate,
        pin_memory=device.type == "cuda" and not on_device,
    )
    prepare = OnPixels.of(preprocess, size, device) if on_device else None
    for batch in batches:
        made = list(islice(loaded, len(_split(batch, at_a_time))))
        if prepare is None:
            yield _joined(made, device)
            continue
        samples = [sample for part in made for sample in part]
        rows, pixels, bad = _collate(decoded(samples, items, prepare.shape, device))
        yield rows, None if pixels is None else prepare.finish(pixels), bad


def _at_a_time(nbytes: int) -> int:
    """Return how many images of a size a process hands over at a time."""
    return min(HANDED_OVER, max(HANDED_BYTES // max(nbytes, 1), 1))


def _split(rows: Sequence[int], most: int) -> list[Sequence[int]]:
    return [rows[start : start + most] for start in range(0, len(rows), most)]


def _joined(
    parts: Sequence[tuple[list[int], Any, dict[int, str]]], device: torch.device
) -> tuple[list[int], Tensor | None, dict[int, str]]:
    """Return parts of a batch as one, on the device where that is a GPU."""
    # From pinned memory: the copies run beside the model, and nothing is copied here.
    to = device if device.type == "cuda" else CPU
    pixels = [
        torch.as_tensor(one).to(to, non_blocking=True) for _, one, _ in parts if one is not None
    ]
    whole = pixels[0] if len(pixels) == 1 else torch.cat(pixels) if pixels else None
    bad = {row: why for *_, reasons in parts for row, why in reasons.items()}
    return [row for rows, *_ in parts for row in rows], whole, bad


def _loaded(
    images: Dataset[Any],
    batches: Sequence[Sequence[int]],
    workers: int,
    *,
    ahead: int,
    **options: Any,
) -> Iterator[Any]:
    """Yield each batch as processes make it, or this one once one of them has failed."""
    done, failed = 0, ""
    for processes in (min(workers, len(batches)), 0):
        each = -(-ahead // max(processes * len(batches[0]), 1)) if processes else None
        loader: DataLoader[Any] = DataLoader(
            images,
            # Whole batches in a fixed order: a batch by its number is what a store resumes.
            batch_sampler=batches[done:],  # type: ignore
            num_workers=processes,
            prefetch_factor=each and max(each, 2),
            multiprocessing_context="fork" if FORKS and processes else None,
            generator=torch.Generator().manual_seed(0),  # else it draws from global state
            **options,
        )
        try:
            with _interrupts_wait():
                made: Any = iter(loader)  # starts the processes
            if processes:
                _do_not_interrupt(made)
            for batch in made:
                if failed:
                    LOG.warning(
                        "decoding in processes failed, mostly for lack of memory (%s); the rest is "
                        "decoded without them, more slowly: fewer workers need less",
                        failed,
                    )
                    failed = ""
                yield batch
                done += 1
            return
        # Whether a process died or an image raised shows here, where the latter does so as itself.
        except Exception as error:
            if not processes:
                raise
            # Of what a process raised the last line says what it was, those before it where.
            *_, last = str(error).strip().splitlines() or [type(error).__name__]
            failed = shortened(last, 200)


class _Pixels(Dataset[Tensor | None]):
    def __init__(self, makers: Sequence[Callable[[], Tensor]]) -> None:
        self.makers = makers

    def __getitem__(self, row: int) -> Tensor | None:
        try:
            return self.makers[row]()
        except Exception:  # noqa: BLE001 of any code; who needs the image meets it
            return None


def _end_to_end(images: list[Tensor | None]) -> tuple[list[Any], Any]:
    # One tensor of a batch, whatever sizes it has: each that a process hands over is an open file.
    shapes = [None if image is None else image.shape for image in images]
    pixels = torch.cat([EMPTY, *(one.flatten() for one in images if one is not None)])
    return shapes, _handed_over(pixels)


def _ignore_interrupts(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def decode_pixels(
    makers: Sequence[Callable[[], Tensor]], *, workers: int
) -> Generator[Tensor | None]:
    """Fork processes that decode images; return these in order.

    None stands for an image that cannot be read. Where `forks` says no it fails.

    Args:
        makers: What opens each image and makes a uint8 tensor of it, of any shape.
        workers: Decoding processes, 1 or more.

    Raises:
        RuntimeError: A decoding process died, mostly for lack of memory.
    """
    images = _Pixels(makers)
    first = images[0]
    batches = batches_of(len(makers), 1 if first is None else _at_a_time(first.nbytes))
    loader: DataLoader[Any] = DataLoader(
        images,
        batch_sampler=batches,
        num_workers=min(workers, len(batches)),
        collate_fn=_end_to_end,
        multiprocessing_context="fork",
        # Ctrl-C reaches them as well: who waits for their images would do so until a timeout.
        worker_init_fn=_ignore_interrupts,
        generator=torch.Generator().manual_seed(0),  # else the loader draws from global state
    )
    with _interrupts_wait():
        handed_over: Any = iter(loader)  # starts the processes
    _do_not_interrupt(handed_over)
    return _apart(handed_over)


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Have Ctrl-C wait meanwhile: Python drops what is raised in its hooks around a fork."""
    before, heard = signal.getsignal(signal.SIGINT), []
    if not callable(before) or current_thread() is not main_thread():
        yield
        return
    signal.signal(signal.SIGINT, lambda *which: heard.append(which))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if heard:
        before(*heard[0])


def _do_not_interrupt(loader: Any) -> None:
    """Let the death of a loader's processes reach who waits for their images, and nobody else.

    Where a loader has once been used in the main thread, torch raises it in whatever that does.
    """
    # Torch's own list of those it looks after; a torch without it raises as before.
    with suppress(ImportError, AttributeError):
        from torch.utils.data._utils.signal_handling import _remove_worker_pids

        _remove_worker_pids(id(loader))
        loader._worker_pids_set = False


def _apart(handed_over: Iterator[tuple[list[Any], Any]]) -> Generator[Tensor | None]:
    for shapes, pixels in handed_over:
        # Of this process, which closes the file that was handed over.
        own = torch.as_tensor(pixels).clone()
        sizes = [0 if shape is None else shape.numel() for shape in shapes]
        for shape, part in zip(shapes, own.split(sizes)):
            yield None if shape is None else part.view(shape)


def forks() -> bool:
    """Return whether processes can be forked here: on Linux, and not by a daemonic process."""
    return FORKS and not current_process().daemon


def decoding_processes(asked: int | None, images: int, device: torch.device) -> int:
    """Return how many processes decode: as many as asked for, else what pays on this machine.

    Beside a GPU one for each core but the one that feeds it. On a CPU the model itself keeps the
    cores busy, and few images are decoded before processes have started: none then.

    Args:
        asked: A number, or None to choose.
        images: How many images there are.
        device: Where the model runs.
    """
    if asked is not None:
        return asked
    if device.type == "cpu" or images < WORTH_STARTING:
        return 0
    return min(max(cores() - 1, 1), MOST_PROCESSES)
