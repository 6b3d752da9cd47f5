"""What an extraction will cost, from a few measured batches: time, disk, memory."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor

from vlmlayers.arguments import Natural, checked
from vlmlayers.errors import UserError, shortened
from vlmlayers.features.writer import Shapes
from vlmlayers.metrics.moments import ClassMoments, Moments
from vlmlayers.models.decoding import decode, decoding_processes
from vlmlayers.models.devices import memory_errors, resolve_precision
from vlmlayers.models.modes import on_cpu
from vlmlayers.models.nvjpeg import refuse_nvjpeg
from vlmlayers.models.recording import Recorder
from vlmlayers.models.stream import CHUNK
from vlmlayers.models.vlm import VLM, LoadedModel
from vlmlayers.models.work import autocast, bytes_per_item
from vlmlayers.positions import SPACES, TOKENS

SAMPLE = 200  # items of a dataset that streaming keeps where nothing else is said
ADDED = ["images", "store_h", "store_gb", "stream_h", "stream_mb"]
DECIMALS = {
    "images": 0, "encode": 2, "decode": 2, "write": 3, "add": 3, "store_h": 3, "store_gb": 3,
    "stream_h": 3, "stream_mb": 1,
}  # fmt: skip
_ENOUGH = 8_000_000  # bytes whose writing is timed


@dataclass(frozen=True)
class Costs:
    """Measured constants of one model on one machine.

    Attributes:
        forward: Seconds per image for the tower with recording, on this device; with its captions.
        decode: Seconds per image to read and preprocess, in one process.
        bytes_per_image: Bytes that the store takes per image.
        stream_bytes: Bytes that streaming keeps (float64), per process: accumulators and the
            sample held out. They do not grow with the number of images.
        device: Where `forward` was measured.
        batch_size: With which batch size.
        write: Seconds per image to write its features.
        add: Seconds per image to add its features to the accumulators, on the host.
    """

    forward: float
    decode: float
    bytes_per_image: int
    stream_bytes: int
    device: str
    batch_size: int
    write: float = 0.0
    add: float = 0.0

    def seconds(self, images: float, workers: int = 0, *, streaming: bool = False) -> float:
        """Return the time of one process for some images.

        Decoding runs beside the model when there are workers, and before it when there are none.
        A store takes at least as long as its disk; streaming adds its sums to the model's time.
        """
        model = self.forward + self.add if streaming else self.forward
        busy = self.decode + model if workers == 0 else max(self.decode / workers, model)
        return images * (busy if streaming else max(busy, self.write))


def stream_bytes(
    vision: Shapes, text: Shapes, classes: int, sample: int = SAMPLE, captions: bool = True
) -> int:
    """Return what streaming keeps of a dataset, whatever its size.

    Moments of images and, with captions, of these and of their pairs, class means, and the sample
    of items held out. Class prompts need no sums.
    """
    widths_of = {space: _widths(by) for space, by in vision.items()}
    others = {space: _widths(by) for space, by in text.items()} if captions else {}
    total = sample * sum(sum(by.values()) for by in (*widths_of.values(), *others.values()))
    for space, widths in widths_of.items():
        other = others.get(space, {})
        partner = [other.get(position, max(other.values(), default=0)) for position in widths]
        total += sum(w * w for w in widths.values()) + sum(w * w for w in other.values())
        total += sum(w * t for w, t in zip(widths.values(), partner))
        total += classes * sum(widths.values())
    return 8 * total


def _widths(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    return {position: shape[-1] for position, shape in shapes.items()}


@on_cpu()
def measure_costs(
    model: VLM,
    manifest: Any,
    items: Sequence[Any],
    *,
    root: Path | None = None,
    spaces: Sequence[str] = ("native", "joint"),
    pooling: str | None = None,
    batch_size: int = 64,
    precision: str = "fp32",
    decoding: str = "full",
    tower: str | None = None,
    captions: bool = False,
    repeats: int = 3,
    disk: Path | None = None,
) -> Costs:
    """Measure on one batch of real images what an image costs.

    Args:
        model: What `load_model` returns.
        manifest: Opens the images.
        items: Items of the planned extraction; the first batch is used.
        root: Data root.
        spaces: Spaces of the planned extraction.
        pooling: Its vision pooling.
        batch_size: Its batch size.
        precision: Its precision.
        decoding: `full`, `reduced` or `nvjpeg`; see `extract`.
        tower: `vision` where the planned extraction records that one alone.
        captions: Whether it records the captions of the images, which count with their images.
        repeats: Timed runs, of which the fastest counts.
        disk: Folder on the disk of the planned store; the system's temporary one where None.

    Raises:
        UserError: No items, or the first images cannot be read.
    """
    if not items:
        raise UserError("there is nothing to estimate: no items")
    if decoding == "nvjpeg":
        refuse_nvjpeg(model, manifest, items, root)
    recorder = Recorder(model.towers["vision"], spaces, pooling)
    shapes = recorder.shapes()
    text = None if tower == "vision" else model.towers.get("text")
    texts = {} if text is None else Recorder(text, spaces, None).shapes()
    batch, decoding_seconds = _decoded(model, manifest, items[:batch_size], root, decoding)
    advice = f"lower batch_size ({batch_size}; --batch-size), or take another device"
    precision = resolve_precision(precision, model.device)
    with memory_errors(model.device, advice), recorder, autocast(model.device, precision):
        # The first run also loads kernels and fills caches, and is not timed.
        features = recorder(batch)
        # The fastest run: what makes others slower is not the model.
        forward = min(_timed(lambda: recorder(batch))[1] for _ in range(repeats))
        each, told = 0.0, [text for item in items[:batch_size] for text in item.captions]
        if captions and text is not None and told:
            each = sum(len(item.captions) for item in items) / len(items)
            tokens = model.tokenize(told[:batch_size]).to(model.device)
            with Recorder(text, spaces, None) as of_text:
                of_text(tokens)
                spent = min(_timed(lambda: of_text(tokens))[1] for _ in range(repeats))
            forward += each * len(batch) * spent / len(tokens)
    stored = bytes_per_item(shapes) + round(each * bytes_per_item(texts))
    flat = [x.reshape(len(x), -1) for by in features.values() for x in by.values()]
    rows = np.concatenate(flat, axis=1)
    classes = len(manifest.class_names(root))
    # Only vectors can be streamed: not tokens by themselves, nor what heads attend to.
    added = {s: by for s, by in features.items() if s in SPACES and recorder.pooling != TOKENS}
    kept = {space: shapes[space] for space in added}
    own = 8 * sum(shape[-1] ** 2 for by in kept.values() for shape in by.values())
    joint = stream_bytes(kept, texts, 0, sample=0, captions=captions)
    return Costs(
        forward / len(batch),
        decoding_seconds / len(batch),
        stored,
        stream_bytes(kept, texts, classes, captions=captions) if added else 0,
        str(model.device),
        len(batch),
        _write_seconds(rows, repeats, disk) / len(batch) * stored / bytes_per_item(shapes),
        # Both towers and their pairs are added at the rate of the vision tower.
        _add_seconds(added, classes, joint / own, repeats) / len(batch) if added else 0.0,
    )


def _decoded(
    model: VLM, manifest: Any, items: Sequence[Any], root: Path | None, decoding: str
) -> tuple[Tensor, float]:
    """Return the images of items as the model takes them, and the time to decode them."""
    batches = decode(
        manifest,
        items,
        [range(len(items))],
        preprocess=model.preprocess,
        root=root,
        size=model.image_size,
        workers=0,
        decoding=decoding,
        device=model.device,
    )
    (_, batch, bad), seconds = _timed(lambda: next(batches))
    if batch is None:
        raise UserError(f"the first images cannot be read: {bad[0]}")
    return batch.to(model.device, model.input_dtype), seconds


def _write_seconds(rows: NDArray[np.floating], repeats: int, disk: Path | None) -> float:
    """Return the time to write rows and have them on the disk, in a file without a name."""
    content = np.ascontiguousarray(rows, dtype=np.float32).tobytes()
    # A few kilobytes would time the call and not the disk.
    content *= max(1, _ENOUGH // len(content))

    def write() -> None:
        with tempfile.TemporaryFile(dir=disk) as handle:
            handle.write(content)
            handle.flush()
            # Else the time would be that of the system's cache.
            os.fsync(handle.fileno())

    try:
        seconds = min(_timed(write)[1] for _ in range(repeats))
    except OSError:  # a folder that cannot be written: the extraction will say so
        return 0.0
    return seconds * rows.nbytes / len(content)


def _add_seconds(
    features: Mapping[str, Mapping[str, Any]], classes: int, share: float, repeats: int
) -> float:
    """Return the time to add a batch to the sums.

    The rows are repeated to the chunk that streaming adds at once.

    Args:
        features: Those of the vision tower.
        classes: Number of classes, of which means are kept; 0 where there are none.
        share: What all moments take, as a multiple of those of the vision tower.
        repeats: Timed runs, of which the fastest counts.
    """
    count = len(next(iter(next(iter(features.values())).values())))
    times = -(-CHUNK // count)
    tiled = [
        np.tile(np.asarray(x, np.float64), (times, 1))
        for by in features.values()
        for x in by.values()
    ]
    labels = np.arange(times * count) % max(classes, 1)

    def add() -> None:
        for x in tiled:
            made = Moments.of(x)
            made + made  # as a chunk joins those before it

    def add_means() -> None:
        for x in tiled:
            made = ClassMoments.of(x, labels, classes)
            made + made

    spent = share * min(_timed(add)[1] for _ in range(repeats))
    # Apart: they grow with the width and not with its square.
    if classes:
        spent += min(_timed(add_means)[1] for _ in range(repeats))
    return spent / times


@on_cpu()
@checked
def estimate(
    model: LoadedModel,
    planned: Sequence[Any],
    *,
    out: str | Path | None = None,
    workers: Natural | None = None,
    **options: Any,
) -> str:
    """Return what an extraction will cost: time, disk and memory of each dataset, as text.

    Args:
        model: What `load_model` returns.
        planned: (manifest, items) of each dataset.
        out: Folder of the planned store; its disk's free space is compared.
        workers: Decoding processes; None as `extract` chooses them.
        **options: See `measure_costs`.

    Raises:
        UserError: Nothing is planned, or not in pairs.
    """
    if not planned:
        raise UserError("estimate: planned names no dataset; give a manifest and its items")
    for one in planned:
        if not isinstance(one, tuple | list) or len(one) != 2:
            raise UserError(
                "estimate: planned takes pairs of a manifest and its items, such as "
                f"[(manifest, manifest.items('train'))], not {shortened(repr(one))}"
            )
    # Of the store's folder, or of the nearest one above it that is there.
    path = None if out is None else Path(out).absolute()
    disk = path and next(one for one in (path, *path.parents) if one.exists())
    costs = [measure_costs(model, made, items, disk=disk, **options) for made, items in planned]
    processes = [decoding_processes(workers, len(items), model.device) for _, items in planned]
    rows = [
        {
            "dataset": made.name if len(made.name) <= 18 else f"{made.name[:17]}…",
            "images": len(items),
            "encode": 1e3 * one.forward,
            "decode": 1e3 * one.decode,
            "write": 1e3 * one.write,
            "add": 1e3 * one.add,
            "store_h": one.seconds(len(items), decoding) / 3600,
            "store_gb": len(items) * one.bytes_per_image / 1e9,
            "stream_h": one.seconds(len(items), decoding, streaming=True) / 3600,
            "stream_mb": one.stream_bytes / 1e6,
        }
        for one, (made, items), decoding in zip(costs, planned, processes)
    ]
    table = pd.DataFrame(rows)
    if len(rows) > 1:
        table.loc[len(rows)] = {"dataset": "all", **table[ADDED].sum()}
    formats = {name: f"{{:.{digits}f}}".format for name, digits in DECIMALS.items()}
    lines = [
        f"{model.name} in one process on {costs[0].device}, batches of {costs[0].batch_size}",
        f"{costs[0].bytes_per_image} bytes per image in a store; milliseconds per image to encode,",
        "decode, write, and add to sums (--streaming, which keeps stream_mb in memory);",
        "hours of a store and of streaming:\n",
        table.to_string(index=False, formatters=formats, na_rep=""),
    ]
    if disk is not None:
        lines.append(f"\nfree on this disk: {shutil.disk_usage(disk).free / 1e9:.1f} GB")
    return "\n".join(lines) + "\n"


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start
