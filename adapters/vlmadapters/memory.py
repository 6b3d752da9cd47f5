"""How much memory a training step takes, estimated before it starts."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from vlmadapters.config import MMAConfig
from vlmadapters.frozen import Backbone
from vlmlayers.errors import UserError
from vlmlayers.models.towers import Tower

# Values kept per token and unit of width in a block with a graph: input and statistics of two
# norms, three attention inputs and its output, four wide hidden units, two residual sums, adapter.
KEPT, TRANSIENT = 14, 20


def estimate_memory(
    backbone: Backbone, configs: Sequence[MMAConfig], batch_size: int, classes: int
) -> int:
    """Return the bytes that activations and gradients of one step take at the peak.

    Placements are updated one after the other, so the largest one counts.
    """
    return max(
        _tower_bytes(backbone, config, "vision", batch_size)
        + _tower_bytes(backbone, config, "text", classes)
        for config in configs
    )


def _tower_bytes(backbone: Backbone, config: MMAConfig, name: str, items: int) -> int:
    tower: Tower = getattr(backbone, name).tower
    tokens = _tokens(tower)
    graph = tower.depth + 1 - backbone.start(config, name) if getattr(config, name) else 0
    return 4 * items * tokens * tower.width * (KEPT * graph + TRANSIENT)


def _tokens(tower: Tower) -> int:
    example = tower.example(1)
    if example.ndim == 2:
        return example.shape[1]
    patch = 16
    return (example.shape[-1] // patch) * (example.shape[-2] // patch) + 1


def available_memory(device: torch.device) -> int:
    """Return the bytes free on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    if not hasattr(os, "sysconf"):
        return 1 << 62
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def check_memory(
    backbone: Backbone, configs: Sequence[MMAConfig], batch_size: int, classes: int
) -> None:
    """Raise a UserError where a training step would not fit into memory."""
    device = next(backbone.clip.parameters()).device
    needed, free = estimate_memory(backbone, configs, batch_size, classes), available_memory(device)
    if needed > free:
        raise UserError(
            f"a training step needs about {needed / 1e9:.1f} GB and {device} has {free / 1e9:.1f} "
            f"GB free; lower batch_size ({batch_size}), adapt later blocks, or use fewer classes"
        )
