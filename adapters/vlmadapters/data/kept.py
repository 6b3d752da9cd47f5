"""Decoded images in memory, within what the machine has, made by who asks or by processes ahead."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cache
from multiprocessing import ProcessError
from threading import Condition, Event, RLock, Thread, current_thread
from weakref import WeakSet, finalize

import torch
from torch import Tensor

from vlmlayers.errors import one_line
from vlmlayers.models.devices import available_memory

LOG = logging.getLogger(__name__)
KEEP_SHARE = 4  # the rest of memory is for training
# Of torch where a process died, of the queue where it did while it handed a batch over, of the
# system that starts none.
BROKEN_OFF = (RuntimeError, OSError, EOFError, ProcessError)


class Room:
    """Memory for images of many datasets together.

    Args:
        limit: Bytes that they may take.

    Attributes:
        full: The last images did not fit.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.used, self.full = limit, 0, False
        self._idle: WeakSet[Kept] = WeakSet()
        # Several threads decode; reentrant, as images may be collected, and give back, at any time.
        self._lock = RLock()

    def take(self, owner: Kept, size: int) -> bool:
        """Return whether `size` more bytes fit, and count them; idle images are dropped."""
        with self._lock:
            self._idle.discard(owner)
            while self.used + size > self.limit and self._idle:
                self.used -= self._idle.pop().forget()
            self.full = self.used + size > self.limit
            if not self.full:
                self.used += size
            return not self.full

    def rest(self, owner: Kept) -> None:
        """Allow images to be dropped once others need their room."""
        with self._lock:
            self._idle.add(owner)
            self.full = False

    def give_back(self, images: dict[Hashable, Tensor]) -> None:
        """Free the room of images that nothing refers to any more."""
        with self._lock:
            self.used -= sum(image.numel() for image in images.values())
            self.full = False


@cache
def shared_room(device: torch.device) -> Room:
    """Return the room of this process on a device: a quarter of what is left there at first use.

    Processes that `torchrun` started on this machine share that quarter of main memory.
    """
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
    return Room(available_memory(device) // (KEEP_SHARE * sharing))


class Kept:
    """Images of one dataset, uint8, by their path, for as long as a room has space for them.

    Batches are kept as well, by the paths of their images.

    Args:
        room: The room.
    """

    def __init__(self, room: Room) -> None:
        self.room = room
        self._images: dict[Hashable, Tensor] = {}
        self._coming: set[str] = set()  # by `arriving`
        self._changed = Condition()
        # With the images as argument: a callback that held `self` would keep it alive for ever.
        finalize(self, room.give_back, self._images)

    def __contains__(self, path: str) -> bool:
        return path in self._images

    def lacks(self, path: str) -> bool:
        """Return whether an image is neither kept nor on its way."""
        return path not in self._images and path not in self._coming

    def get(self, path: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """Return an image, made where it is not kept; one that is on its way is waited for."""
        if path in self._coming:
            with self._changed:
                self._changed.wait_for(lambda: path not in self._coming)
        image = self._images.get(path)
        if image is None:
            image = make()
            self._keep(path, image)
        return image

    def _keep(self, path: Hashable, image: Tensor) -> bool:
        fits = self.room.take(self, image.numel())
        # Of two threads that make one image the first is kept.
        if fits and self._images.setdefault(path, image) is not image:
            self.room.give_back({path: image})
        return fits

    def expect(self, path: str) -> None:
        """Let who asks for an image wait until it has arrived, or will not."""
        self._coming.add(path)

    def arrive(self, path: str, image: Tensor | None) -> bool:
        """Take an image that was expected, None if there is none; return whether it had room."""
        fits = path in self._images or image is None or self._keep(path, image)
        with self._changed:
            self._coming.discard(path)
            self._changed.notify_all()
        return fits

    def forget(self) -> int:
        """Drop all images, and return how many bytes they took."""
        size = sum(image.numel() for image in self._images.values())
        self._images.clear()
        return size


@contextmanager
def arriving(
    wanted: Sequence[tuple[Kept, str]], begin: Callable[[], Generator[Tensor | None]]
) -> Iterator[None]:
    """Fill places by a thread; who asks for one of these images meanwhile waits for it.

    What does not fit, or is not there when the context ends, is left to who asks for it.

    Args:
        wanted: Where images are kept, and their paths.
        begin: Starts to make them, and returns them in order; None stands for one that fails.
    """
    begun, stop = Event(), Event()
    for kept, path in wanted:
        kept.expect(path)

    def fill() -> None:
        try:
            with closing(begin()) as images:
                begun.set()
                for (kept, path), image in zip(wanted, images):
                    if not kept.arrive(path, image) or stop.is_set():
                        break
        except BROKEN_OFF as error:
            LOG.warning(
                "a decoding process died, mostly for lack of memory (%s); threads decode the rest, "
                "more slowly",
                one_line(error),
            )
        finally:
            begun.set()
            for kept, path in wanted:
                kept.arrive(path, None)

    # Not the main thread, in which torch would raise the death of a process it has started; that
    # one waits, as a process that is forked while others compute inherits their locks.
    filler = Thread(target=fill, daemon=True)
    try:
        filler.start()
        begun.wait()
        yield
    finally:
        stop.set()
        # A forgotten context may be collected in the thread itself, an interrupt come before it.
        if current_thread() is not filler and filler.is_alive():
            filler.join()
