"""The precision that training and testing compute in; devices and memory are known below."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch

from vlmlayers.errors import UserError
from vlmlayers.models.devices import products_in, resolve_precision
from vlmlayers.models.modes import in_float32, on_cpu
from vlmlayers.models.work import autocast


@contextmanager
def own_modes() -> Iterator[None]:
    """Compute with gradients and in no other precision than is asked for, whatever is set around.

    Notebooks switch gradients off, and to float64, TF32 or tensors on a GPU at their top, and a
    caller may train within its own autocast.
    """
    cpu, gpu = (torch.autocast(device, enabled=False) for device in ("cpu", "cuda"))
    gradients, products = torch.enable_grad(), products_in("fp32")
    with torch.inference_mode(False), gradients, cpu, gpu, in_float32(), products, on_cpu():
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
