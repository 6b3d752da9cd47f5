"""The precision that training and testing compute in; devices and memory are known below."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch

from vlmlayers.errors import UserError
from vlmlayers.models.devices import resolve_precision
from vlmlayers.models.modes import in_float32
from vlmlayers.models.work import autocast


@contextmanager
def own_modes() -> Iterator[None]:
    """Compute with gradients and in no other precision than is asked for, whatever is set around.

    Notebooks switch gradients off or to float64 at their top, and a caller may train within its own
    autocast.
    """
    cpu, gpu = (torch.autocast(device, enabled=False) for device in ("cpu", "cuda"))
    with torch.inference_mode(False), torch.enable_grad(), cpu, gpu, in_float32():
        yield


def precision_of(
    precision: str, device: torch.device
) -> tuple[Callable[[], AbstractContextManager[Any]], Any]:
    """Return a function that opens the context to compute in, and the gradient scaler.

    Raises:
        UserError: The device does not compute in that precision; losses are scaled on GPUs only.
    """
    found = resolve_precision(precision, device)
    if found == "fp16" and device.type == "cpu":
        raise UserError("precision fp16 needs a GPU; use fp32 or bf16 on a CPU")
    scaler = torch.amp.GradScaler(device.type, enabled=found == "fp16")
    return partial(autocast, device, found), scaler
