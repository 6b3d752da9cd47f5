"""The precision that training and testing compute in; devices and memory are known below."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch

from vlmlayers.errors import UserError
from vlmlayers.models.devices import resolve_precision
from vlmlayers.models.work import autocast


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
