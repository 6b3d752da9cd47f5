"""Merging streamed sums over processes by all-reduce: every process ends with the whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed

from vlmlayers.errors import UserError
from vlmlayers.metrics.moments import ClassMoments, CrossMoments, Moments
from vlmlayers.models.processes import Processes
from vlmlayers.scores.sums import DatasetSums, Key

Widths = Mapping[Key, int]


def merge_over_processes(sums: DatasetSums, widths: Widths, processes: Processes) -> DatasetSums:
    """Return what one pass over the items of all processes would have kept, in every process.

    The sample is the one that a single process keeps, in the order of its hashes; sums differ by
    rounding alone. Each process sends its sums once, so that the time does not grow with items.

    Args:
        sums: What this process has seen; it may be nothing.
        widths: Width of each (tower, space, position), the same in every process.
        processes: Place of this process.

    Raises:
        UserError: Two processes were given the same item.
    """
    # Every process sorts the same hashes, so that all agree on the sample without more messages.
    every = _gathered(sums.hashes, processes)
    kept = every[: sums.sample_size]
    if len(np.unique(kept)) < len(kept):
        raise UserError(f"{sums.head.dataset}: an item came twice; each must come once")
    mine = np.isin(sums.hashes, kept)
    own = replace(
        sums, moments=dict(sums.moments), classes=dict(sums.classes), cross=dict(sums.cross)
    )
    # Rows that smaller hashes of other processes push out of the sample still count in the sums.
    if not mine.all():
        rest = {key: x[~mine] for key, x in sums.sample.items()}
        own.absorb(rest, sums.labels[~mine])
    place = np.searchsorted(kept, sums.hashes[mine])
    merged = DatasetSums(own.head, own.sample_size, kept, np.empty(0, np.int64), {})
    merged.prompts = own.prompts
    # One process fills a row and the others leave zeros: a sum puts every row in its place.
    labels = np.zeros(len(kept), np.int64)
    labels[place] = sums.labels[mine]
    merged.labels = summed(labels, processes)
    for key, width in widths.items():
        rows = np.zeros((len(kept), width))
        if len(place):
            rows[place] = sums.sample[key][mine]
        merged.sample[key] = summed(rows, processes)
    _merge_sums(own, merged, widths, len(every) > len(kept), processes)
    return merged


def _merge_sums(
    own: DatasetSums, merged: DatasetSums, widths: Widths, more: bool, processes: Processes
) -> None:
    seen = next((m.n for m in own.moments.values()), 0)
    if not more and not int(summed(np.array([seen], np.int64), processes)[0]):
        return  # every item is in the sample
    for key, width in widths.items():
        merged.moments[key] = _moments(own.moments.get(key), width, processes)
        if key[0] == "vision" and own.class_count:
            found = own.classes.get(key)
            merged.classes[key] = _class_moments(found, (own.class_count, width), processes)
    for space, position, other in merged.crossed():
        shape = widths["vision", space, position], widths["text", space, other]
        pair = space, position, other
        merged.cross[pair] = _cross_moments(own.cross.get(pair), shape, processes)


def _moments(part: Moments | None, width: int, processes: Processes) -> Moments:
    own = part or Moments(0, np.zeros(width), np.zeros((width, width)), np.zeros(width), 0.0)
    n = int(summed(np.array([own.n], np.int64), processes)[0])
    mean = summed(own.n * own.mean, processes) / n
    # Sums of products may only be added when they are about the same mean.
    scatter, cubic, fourth = own.about(mean)
    return Moments(
        n,
        mean,
        summed(scatter, processes),
        summed(cubic, processes),
        float(summed(np.array([fourth]), processes)[0]),
    )


def _cross_moments(
    part: CrossMoments | None, shape: tuple[int, int], processes: Processes
) -> CrossMoments:
    x, y = (np.zeros(width) for width in shape)
    own = part or CrossMoments(0, x, y, np.zeros(shape), np.zeros(2), y, x, 0.0)
    n = int(summed(np.array([own.n], np.int64), processes)[0])
    mean_x = summed(own.n * own.mean_x, processes) / n
    mean_y = summed(own.n * own.mean_y, processes) / n
    cross, sizes, x2y, y2x, x2y2 = own.about(mean_x, mean_y)
    parts = [summed(np.asarray(p), processes) for p in (cross, sizes, x2y, y2x)]
    last = float(summed(np.array([x2y2]), processes)[0])
    return CrossMoments(n, mean_x, mean_y, parts[0], parts[1], parts[2], parts[3], last)


def _class_moments(
    part: ClassMoments | None, shape: tuple[int, int], processes: Processes
) -> ClassMoments:
    own = part or ClassMoments(np.zeros(shape[0]), np.zeros(shape))
    counts = summed(own.counts, processes)
    sums = summed(own.counts[:, None] * own.means, processes)
    return ClassMoments(counts, sums / np.maximum(counts, 1.0)[:, None])


def summed(values: NDArray[Any], processes: Processes) -> NDArray[Any]:
    """Return the sum of an array over all processes, in every process."""
    if processes.world == 1:
        return np.array(values)
    # A copy, since all_reduce writes into what it is given.
    tensor = torch.from_numpy(np.array(values, order="C"))
    distributed.all_reduce(tensor)
    return tensor.numpy()


def _gathered(hashes: NDArray[np.uint64], processes: Processes) -> NDArray[np.uint64]:
    """Return the hashes of all processes, ascending."""
    # gloo gathers arrays of one size only; sums of zero-padded ones serve for any.
    counts = np.zeros(processes.world, np.int64)
    counts[processes.rank] = len(hashes)
    counts = summed(counts, processes)
    start = int(counts[: processes.rank].sum())
    every = np.zeros(int(counts.sum()), np.int64)  # collectives know no unsigned numbers
    every[start : start + len(hashes)] = hashes.view(np.int64)
    return np.sort(summed(every, processes).view(np.uint64))
