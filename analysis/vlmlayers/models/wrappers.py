"""What a model may be handed over in, and how to get at the model itself."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

LOG = logging.getLogger(__name__)


def unwrapped(model: nn.Module, say: bool = True) -> nn.Module:
    """Return the model inside `DataParallel`, `DistributedDataParallel`, `torch.compile` or peft.

    Hooks do not fire on these wrappers, or fire in copies. The log says what was taken off, unless
    the model is only looked at; what a peft wrapper put inside stays there and is measured too.
    """
    words: list[str] = []
    while (inside := _inside(model)) is not None:
        words.append(type(model).__name__ if inside[0] == "" else inside[0])
        model = inside[1]
    if words and say:
        LOG.warning("took %s out of %s", type(model).__name__, ", ".join(words))
    return model


def _inside(model: Any) -> tuple[str, nn.Module] | None:
    """Return the name of a wrapper, empty for that of its class, and what is in it."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return "", model.module
    if hasattr(model, "_orig_mod"):
        return "torch.compile", model._orig_mod
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        return "", model.get_base_model()
    return None
