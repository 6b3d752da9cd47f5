"""The work of one extraction: batches through both towers, into memory or into a store."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmlayers.data.unreadable import Unreadable
from vlmlayers.errors import UserError
from vlmlayers.features import LayerFeatures
from vlmlayers.features.writer import Shapes, StoreWriter, TowerPlan, reuse
from vlmlayers.files import checksum
from vlmlayers.identity import DataIdentity, texts_hash
from vlmlayers.models.decoding import batches_of, decode, decoding_processes
from vlmlayers.models.devices import casts_kept, memory_errors, products_in
from vlmlayers.models.options import ExtractOptions
from vlmlayers.models.processes import Processes
from vlmlayers.models.recording import Features, Recorder
from vlmlayers.models.sink import MemorySink, Sink
from vlmlayers.models.vlm import VLM
from vlmlayers.positions import TOKENS
from vlmlayers.progress import bar
from vlmlayers.words import counted

LOG = logging.getLogger(__name__)
MOST_TOKEN_BYTES = 8_000_000_000  # of all tokens of a tower: samples to look at, not whole datasets
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Texts:
    """The texts of one extraction: prompts by class, or captions by image."""

    kind: str
    texts: tuple[str, ...]
    labels: NDArray[np.int64]
    template: str
    pairs: NDArray[np.int64] | None = None

    def identity(self) -> dict[str, Any]:
        """Return all of the texts that values depend on, as JSON values."""
        content = texts_hash(self.texts)
        found = {"text": self.kind, "template": self.template, "texts_hash": content}
        if self.pairs is not None:  # the same captions may be of other images
            found["pairs_hash"] = checksum(",".join(map(str, self.pairs.tolist())))
        return found


@dataclass
class Work:
    """All that one extraction needs."""

    model: VLM
    manifest: Any
    split: str
    items: Sequence[Any]
    texts: Texts | None
    recorders: Mapping[str, Recorder]
    options: ExtractOptions
    filled: int = field(default=0, init=False)
    context: int = field(default=0, init=False)

    @cached_property
    def data(self) -> DataIdentity:
        """The items as they lie on the disk when the work begins."""
        return self.manifest.identity(self.items, self.options.root)

    def in_memory(self, header: Mapping[str, Any], identity: Mapping[str, Any]) -> LayerFeatures:
        """Return features held in memory."""
        if Processes.current().world > 1:
            raise UserError("extraction by several processes needs out=, a folder for the store")
        self.refuse_missing()
        sink = MemorySink(self.plans())
        self._fill(sink, Processes(0, 1))
        self.settle(sink.bad)
        return sink.features(**header, identity=identity)

    def on_disk(
        self, folder: Path, header: Mapping[str, Any], identity: Mapping[str, Any]
    ) -> LayerFeatures:
        """Return memory-mapped features of a store: a whole one, a resumed one or a new one."""
        processes = Processes.current()
        found = reuse(folder, identity, self.data, self.options.skip_unreadable)
        if found is not None:
            LOG.debug("%s is whole and of this extraction: taken as it is", folder)
            return found
        self.refuse_missing()
        writer = StoreWriter(
            folder, header, identity, self.plans(), self.data, processes.rank, processes.barrier
        )
        try:
            writer.start()
            for name, plan in writer.towers.items():
                there, all_of_it = len(writer.done[name]), len(plan.batches)
                LOG.debug("%s: %s, %d of %d batches are there", folder, name, there, all_of_it)
            self._fill(writer, processes)
            processes.barrier()
            self.settle(writer.unreadable())
            return writer.finish()
        finally:
            writer.close()

    def refuse_missing(self) -> None:
        """Refuse images that are not on disk, unless what cannot be read is to be left out."""
        if "vision" in self.recorders and not self.options.skip_unreadable:
            self.manifest.refuse_missing(self.items, self.options.root)

    def plans(self) -> dict[str, TowerPlan]:
        """Return ids, labels, batches and shapes of both towers."""
        labels = [int(item.label) for item in self.items]
        paths = tuple(str(item.path) for item in self.items)
        plans = {}
        if "vision" in self.recorders:
            plans["vision"] = self._plan("vision", "images", paths, labels, None)
        if (texts := self.texts) is not None:
            pairs = None if texts.pairs is None else [int(row) for row in texts.pairs]
            of = [int(label) for label in texts.labels]
            plans["text"] = self._plan("text", texts.kind, texts.texts, of, pairs)
        return plans

    def _plan(
        self, name: str, kind: str, ids: tuple[str, ...], labels: Sequence[int], pairs: Any
    ) -> TowerPlan:
        recorder = self.recorders[name]
        by_token = recorder.pooling == TOKENS
        # A tokenizer may give another number of columns than the tower can take.
        texts = self.model.tokenize(list(ids[:2])) if by_token and name == "text" else None
        shapes = recorder.shapes(None if texts is None else texts.to(self.model.device))
        names = recorder.token_names(shapes) if by_token else ()
        if by_token:
            _refuse_large(bytes_per_item(shapes), name, ids)
        return TowerPlan(
            recorder.tower.depth,
            recorder.pooling,
            recorder.joint_pooling,
            kind,
            ids,
            labels,
            self._batches(len(ids)),
            shapes,
            pairs,
            names,
        )

    def _batches(self, rows: int) -> list[list[int]]:
        return batches_of(rows, self.options.batch_size)

    def _fill(self, sink: Sink, processes: Processes) -> None:
        """Run the batches that are left for this process: images, then texts."""
        if self.texts is not None and not sink.done["text"]:
            # A tokenizer may come from the hub: that it cannot is said before hours of images.
            self.model.tokenize(list(self.texts.texts[:1]))
        if "vision" in self.recorders:
            self._fill_images(sink, processes)
        if self.texts is not None:
            self._fill_texts(sink, processes, self.texts.texts)

    def _fill_images(self, sink: Sink, processes: Processes) -> None:
        batches = self._batches(len(self.items))
        share = processes.share(len(batches))
        left = [b for b in share if b not in sink.done["vision"]]
        total, rest = (sum(len(batches[b]) for b in some) for some in (share, left))
        recorder = self.recorders["vision"]

        def put(
            batch: int,
            rows: Sequence[int],
            images: Tensor | None,
            made: Callable[[], Features],
            bad: Mapping[int, str],
        ) -> int:
            features = made()
            refuse_not_finite(features, rows, recorder, self.items)
            # By its own images: the recorder may hold the next batch by now.
            features = recorder.without_padding(features, images)
            sink.put("vision", batch, rows, features, bad)
            return len(batches[batch])

        # Waited for and written by a thread while the model computes the next batch, else a GPU
        # waits for launches and disks; one batch at a time, so that memory and what a stopped run
        # has to redo stay small.
        pending: Future[int] | None = None
        with (
            self.recording(recorder),
            ThreadPoolExecutor(1) as writer,
            bar(
                total=total,
                initial=total - rest,
                unit="image",
                description=f"{self.manifest.name} {self.split}",
                show=self.options.progress and processes.rank == 0,
            ) as shown,
        ):
            for batch, rows, images, bad in self.images(batches, left):
                made: Callable[[], Features] = (
                    dict if images is None else self.start(recorder, images)
                )
                if pending is not None:
                    shown.update(pending.result())
                pending = writer.submit(put, batch, rows, images, made, bad)
            if pending is not None:
                shown.update(pending.result())

    def _fill_texts(self, sink: Sink, processes: Processes, texts: Sequence[str]) -> None:
        recorder, batches = self.recorders["text"], self._batches(len(texts))
        with self.recording(recorder):
            for batch in processes.share(len(batches)):
                if batch not in sink.done["text"]:
                    rows = batches[batch]
                    features = self.record(recorder, self.tokens([texts[r] for r in rows]))
                    refuse_not_finite(features, rows, recorder, texts)
                    sink.put("text", batch, rows, recorder.without_padding(features), {})
        self.tell_cut()

    def tokens(self, texts: list[str]) -> Tensor:
        """Return the token ids of texts, (text, context), and count those that fill it."""
        ids = self.model.tokenize(texts)
        tower = self.recorders["text"].tower
        if tower.valid is not None:
            # By the run that pads, a text that fills its columns is one short: its end mark pads.
            there = tower.valid(ids) if tower.ends is not None else tower.valid(ids)[:, :-1]
            self.filled += int(there.all(1).sum())
            self.context = ids.shape[1]
        return ids

    def tell_cut(self) -> None:
        """Warn of texts that are likely not seen to their end."""
        if self.filled:
            LOG.warning(
                "%s: %s all %d tokens that the text tower takes; what goes beyond is cut off",
                self.manifest.name,
                f"{counted(self.filled, 'text')} {'fills' if self.filled == 1 else 'fill'}",
                self.context,
            )

    def images(
        self, batches: Sequence[Sequence[int]], left: Sequence[int]
    ) -> Iterator[tuple[int, list[int], Tensor | None, dict[int, str]]]:
        """Yield number, readable rows, images and reasons of the others for the batches left."""
        unreadable, seen = Unreadable(), 0
        stream = decode(
            self.manifest,
            self.items,
            [batches[b] for b in left],
            root=self.options.root,
            preprocess=self.model.preprocess,
            size=self.model.image_size,
            workers=decoding_processes(
                self.options.workers, sum(len(batches[b]) for b in left), self.model.device
            ),
            decoding=self.options.decoding,
            device=self.model.device,
        )
        for batch, (rows, images, bad) in zip(left, stream):
            unreadable.reasons.update(bad)
            seen += len(rows) + len(bad)
            # Else a wrong data root would be found out after hours, image by image.
            if unreadable.mostly_fails(seen) and not self.options.skip_unreadable:
                unreadable.settle(self.manifest.name, seen, skip=False)
            yield batch, rows, images, bad

    def settle(self, bad: Mapping[int, str]) -> None:
        """Stop where images could not be read, or say that they are left out where they may be."""
        total, skip = len(self.items), self.options.skip_unreadable
        Unreadable(dict(bad)).settle(self.manifest.name, total, skip=skip)

    @contextmanager
    def recording(self, recorder: Recorder) -> Iterator[None]:
        """Hold what batches are recorded in, one after another."""
        halved = self.options.precision in _AUTOCAST
        with recorder, casts_kept(self.model.clip) if halved else nullcontext():
            yield

    def record(self, recorder: Recorder, batch: Tensor) -> Features:
        """Return the features of one batch of images or token ids."""
        return self.start(recorder, batch)()

    def start(self, recorder: Recorder, batch: Tensor) -> Callable[[], Features]:
        """Return what gives the features of one batch of images or token ids, see `Recorder`.

        To be called inside `recording`, which drops the casts that are kept from batch to batch.
        """
        device, size = self.model.device, self.options.batch_size
        # Token ids stay whole numbers; only images take the type of the weights.
        kind = self.model.input_dtype if batch.is_floating_point() else None
        advice = f"lower batch_size ({size}; --batch-size), or take another device"
        with memory_errors(device, advice), autocast(device, self.options.precision, keep=True):
            # From pinned memory, which `decode` was asked for, the copy runs beside the model.
            batch = batch.to(device, kind, non_blocking=True)
            try:
                return recorder.start(batch, keep_casts=self.options.precision in _AUTOCAST)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError, IndexError):
                if recorder.tower.name == "vision":  # texts may have any number of columns
                    recorder.tower.refuse_misfit(batch)
                raise


def bytes_per_item(shapes: Shapes) -> int:
    """Return what an item takes in a store, from the shapes of its rows by space and position."""
    return 4 * sum(prod(shape) for by in shapes.values() for shape in by.values())


@contextmanager
def autocast(device: torch.device, precision: str, *, keep: bool = False) -> Iterator[None]:
    """Hold a pass at a precision: by autocast, or for fp32 and tf32 by that of products.

    `keep` is for passes inside `casts_kept`.
    """
    if precision in _AUTOCAST:
        # Without torch's cache of cast weights, which is emptied where the outermost autocast ends:
        # inside a caller's, each step after the first would be taken with the weights of that.
        with torch.autocast(device.type, dtype=_AUTOCAST[precision], cache_enabled=keep):
            yield
        return
    # The caller may be inside an autocast of its own.
    with torch.autocast(device.type, enabled=False), products_in(precision):
        yield


def _refuse_large(bytes_per_item: int, tower: str, ids: Sequence[str]) -> None:
    """Refuse token features of more items than anyone can look at.

    Raises:
        UserError: Says how many items there is room for.
    """
    if bytes_per_item * len(ids) > MOST_TOKEN_BYTES:
        raise UserError(
            f"every token of {len(ids):,} items of the {tower} tower takes "
            f"{bytes_per_item * len(ids) / 1e9:,.0f} GB; take at most "
            f"{MOST_TOKEN_BYTES // bytes_per_item:,} with items= (--items), fewer spaces, or "
            "one tower with tower= (--tower)"
        )


def refuse_not_finite(
    features: Features, rows: Sequence[int], recorder: Recorder, items: Sequence[Any]
) -> None:
    """Stop at NaN or Inf features.

    Raises:
        UserError: Names tower, position and the first item.
    """
    for space, by_position in features.items():
        for position, values in by_position.items():
            # All at once: rows are looked at only where something is wrong.
            if np.isfinite(values).all():
                continue
            bad = ~np.isfinite(values).reshape(len(values), -1).all(axis=1)
            first = items[rows[int(np.argmax(bad))]]
            raise UserError(
                f"NaN or Inf in {recorder.tower.name} features at {position} ({space}), "
                f"{int(bad.sum())} of {len(rows)} items of a batch, first "
                f"{getattr(first, 'path', first)!r}; use precision fp32, or check the weights"
            )
