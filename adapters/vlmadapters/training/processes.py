"""Several processes under `torchrun`: each takes its share of every batch, gradients are averaged.

The parameters after a step are those of one process with the whole batch, except of methods whose
steps draw for each image or compare within the batch: dropout, as of CLIP-LoRA, and LwEIB's classes
are drawn for a process's share.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from vlmlayers.errors import UserError
from vlmlayers.models.devices import resolve_device
from vlmlayers.runs import processes_launched
from vlmlayers.words import counted

N = TypeVar("N", np.int64, np.float64)


@contextmanager
def process_group() -> Iterator[tuple[int, int]]:
    """Join the other processes; yields (rank, number of processes), (0, 1) when alone."""
    if processes_launched() == 1:
        yield 0, 1
        return
    backend, here = "gloo", int(os.environ.get("LOCAL_WORLD_SIZE", processes_launched()))
    # Fewer GPUs than processes are taken for a model on the CPU: NCCL wants one for each.
    if torch.cuda.is_available() and here <= torch.cuda.device_count():
        backend = "cpu:gloo,cuda:nccl"  # the model may be on either
        resolve_device("cuda")
    dist.init_process_group(backend)
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        # A thread of gloo that still gives back the tensors of the last exchange needs the
        # interpreter, which torch 2.6 holds while it waits for that thread: neither would end.
        time.sleep(0.2)
        dist.destroy_process_group()


def rank_and_size() -> tuple[int, int]:
    """Return rank and number of processes of the group, (0, 1) where there is none."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_first() -> bool:
    """Whether this process writes files and shows progress: the first of the group, or alone."""
    return rank_and_size()[0] == 0


def check_divides(batch_sizes: Iterable[int]) -> None:
    """Raise a UserError unless every process gets an equal share of each batch."""
    first, *later = dict.fromkeys(batch_sizes)
    _, size = rank_and_size()
    if first % size:
        raise UserError(
            f"a batch of {first} does not divide over {size} processes; choose a batch size "
            f"that is a multiple of {size}"
        )
    # Each process's mean would count the same, however few images it is over.
    for last in later:
        if last % size:
            raise UserError(
                f"the last batch of an epoch, of {counted(last, 'image')}, does not divide over "
                f"{size} processes; choose another batch size, or drop_last=true"
            )


def share(items: Any) -> Any:
    """Return this process's share of a list or array: every n-th of n, from its rank on."""
    rank, size = rank_and_size()
    return items[rank::size]


def gathered(mine: NDArray[N], n: int, device: torch.device) -> NDArray[N]:
    """Return the numbers of all `n` items from what each process has of its `share`.

    Args:
        mine: (share,) numbers of this process's items.
        n: Number of items in all.
        device: Device that the processes communicate through.
    """
    rank, size = rank_and_size()
    if size == 1:
        return mine
    # A sum over zeros, not all_gather: shares differ by one item where n does not divide.
    own = torch.from_numpy(mine).to(device)
    whole = torch.zeros(n, dtype=own.dtype, device=device)
    whole[rank::size] = own
    dist.all_reduce(whole)
    return whole.cpu().numpy()


def average(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over processes, in one message."""
    _, size = rank_and_size()
    if size == 1:
        return
    # In one message: the adapters have hundreds of small tensors, and latency would dominate.
    # The same parameters have a gradient in every process, so the flat vectors match.
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    flat /= size
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients])):
        gradient.copy_(part.view_as(gradient))


def mean_over_processes(value: Tensor) -> Tensor:
    """Return the mean of a number over processes, on its device and without a graph."""
    _, size = rank_and_size()
    value = value.detach()
    if size > 1:
        value = value.clone()
        dist.all_reduce(value)
        value /= size
    return value
