"""What an extraction will cost, from a few measured batches: time, disk, memory."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from vlmlayers.errors import UserError
from vlmlayers.models.load import VLM
from vlmlayers.models.recording import Recorder
from vlmlayers.models.work import autocast

IMAGES = (10_000, 100_000, 1_000_000, 10_000_000, 100_000_000, 1_000_000_000)
PROCESSES = (1, 8, 64)
_SHOW = {"hours": "{:.2f}", "store_gb": "{:,.2f}", "stream_mb": "{:,.1f}"}


@dataclass(frozen=True)
class Costs:
    """Measured constants of one model on one machine.

    Attributes:
        forward: Seconds per image for the tower with recording, on this device.
        decode: Seconds per image to read and preprocess, in one process.
        bytes_per_image: Bytes that the store takes per image.
        stream_bytes: Bytes of streaming accumulators (second moments of every position, float64);
            they do not grow with the number of images.
        device: Where `forward` was measured.
        batch_size: With which batch size.
    """

    forward: float
    decode: float
    bytes_per_image: int
    stream_bytes: int
    device: str
    batch_size: int

    def seconds(self, images: float, processes: int = 1, workers: int = 0) -> float:
        """Return the time for some images.

        Decoding runs beside the model when there are workers, and before it when there are none.
        """
        share = images / processes
        if workers == 0:
            return share * (self.decode + self.forward)
        return share * max(self.decode / workers, self.forward)

    def limit(self, workers: int) -> str:
        """Return what takes longer, `model` or `decoding`."""
        slow = self.decode / max(workers, 1)
        return "decoding" if slow > self.forward else "model"


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
    repeats: int = 3,
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
        repeats: Timed runs, of which the fastest counts.

    Raises:
        UserError: No items, or the first images cannot be read.
    """
    if not items:
        raise UserError("there is nothing to estimate: no items")
    recorder = Recorder(model.towers["vision"], spaces, pooling)
    widths = recorder.widths()
    size = model.image_size
    batch, decode = _timed(
        lambda: torch.stack(
            [
                model.preprocess(manifest.open_image(item, root=root, size=size))
                for item in items[:batch_size]
            ]
        )
    )
    batch = batch.to(model.device, next(model.clip.parameters()).dtype)
    with recorder, autocast(model.device, precision):
        recorder(batch)
        forward = min(_timed(lambda: recorder(batch))[1] for _ in range(repeats))
    per_space = [list(by_position.values()) for by_position in widths.values()]
    return Costs(
        forward / len(batch),
        decode / len(batch),
        4 * sum(sum(part) for part in per_space),
        8 * sum(width * width for part in per_space for width in part),
        str(model.device),
        len(batch),
    )


def scale_table(
    costs: Costs,
    *,
    images: Sequence[int] = IMAGES,
    processes: Sequence[int] = PROCESSES,
    workers: int = 0,
    free: float | None = None,
) -> pd.DataFrame:
    """Return time, disk and memory for numbers of images and processes.

    Args:
        costs: Measured constants.
        images: Numbers of images.
        processes: Numbers of processes, one device each.
        workers: Decoding processes of each.
        free: Bytes of free disk; decides between a store and streaming.

    Returns:
        One row per pair: hours, what limits it, gigabytes of the store, megabytes of streaming
        accumulators, and `keep`: `store` where it fits the disk, else `stream`. A store is read
        again for every new metric; streaming has to be told all metrics beforehand.
    """
    rows = []
    for count in images:
        size = count * costs.bytes_per_image
        for number in processes:
            rows.append(
                {
                    "images": count,
                    "processes": number,
                    "hours": costs.seconds(count, number, workers) / 3600,
                    "limited_by": costs.limit(workers),
                    "store_gb": size / 1e9,
                    "stream_mb": costs.stream_bytes / 1e6,
                    "keep": "store" if free is None or size <= free else "stream",
                }
            )
    return pd.DataFrame(rows)


def estimate(
    model: VLM,
    manifest: Any,
    items: Sequence[Any],
    *,
    out: str | Path | None = None,
    workers: int = 0,
    **options: Any,
) -> str:
    """Return the cost of an extraction, and a table of the same for other sizes, as text.

    Args:
        model: What `load_model` returns.
        manifest: The dataset.
        items: The planned items.
        out: Folder of the planned store; its disk's free space is compared.
        workers: Decoding processes.
        **options: See `measure_costs`.
    """
    costs = measure_costs(model, manifest, items, **options)
    free = None if out is None else shutil.disk_usage(_existing(Path(out))).free
    own = scale_table(costs, images=[len(items)], processes=[1], workers=workers, free=free)
    table = scale_table(costs, workers=workers, free=free)
    minutes = costs.seconds(len(items), 1, workers) / 60
    head = (
        f"{model.name} on {manifest.name}: {len(items)} images, {minutes:.1f} minutes by one "
        f"process on {costs.device}, store {own['store_gb'][0]:.3f} GB\n"
        f"measured: model {1e3 * costs.forward:.2f} ms and decoding {1e3 * costs.decode:.2f} ms "
        f"per image (batch {costs.batch_size}), {costs.bytes_per_image} bytes per image"
    )
    room = "" if free is None else f"\nfree on this disk: {free / 1e9:.1f} GB"
    return f"{head}{room}\n\n{_text(table)}\n"


def _text(table: pd.DataFrame) -> str:
    formatters: Mapping[str, Callable[[Any], str]] = {
        **{name: pattern.format for name, pattern in _SHOW.items()},
        "images": "{:.0e}".format,
    }
    return str(table.to_string(index=False, formatters=dict(formatters)))


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start
