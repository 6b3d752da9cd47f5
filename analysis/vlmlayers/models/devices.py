"""Where a model computes, in which precision, and what happens when memory runs out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vlmlayers.errors import UserError, check_one_of, one_line

PRECISIONS = ("fp32", "bf16", "fp16")
_CPU_IS_FULL = ("can't allocate memory", "not enough memory")  # torch has no type of error for it


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Return the device that a name stands for.

    `auto` takes a GPU where there is one. Under `torchrun` each process of a machine takes a GPU
    of its own where none is numbered. A GPU that is chosen becomes the process's current one.

    Raises:
        UserError: There is no such kind of device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
        if found.type != "cuda" or not torch.cuda.is_available():
            return found
        if found.index is None:
            found = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(found)
    except RuntimeError as error:
        raise UserError(
            f"cannot use device {str(device)!r} ({one_line(error)}); use 'cpu' or 'cuda'"
        ) from error
    return found


def resolve_precision(precision: str, device: torch.device) -> str:
    """Return the precision that a name stands for on a device.

    `auto` is fp32 on a CPU, bf16 on a GPU that has it in hardware, and fp16 on an older one.

    Raises:
        UserError: There is no such precision.
    """
    check_one_of("precision", precision, ("auto", *PRECISIONS))
    if precision != "auto":
        return precision
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def free_memory(device: torch.device) -> int:
    """Return the bytes that can still be taken on a GPU, with what torch holds for later use."""
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + cached)


@contextmanager
def told_of_memory(device: torch.device, advice: str) -> Iterator[None]:
    """Turn running out of memory into one line that ends with what to do.

    Raises:
        UserError: Memory ran out within the context.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and not any(words in str(error) for words in _CPU_IS_FULL):
            raise
        raise UserError(f"{device} is out of memory: {advice}") from error
