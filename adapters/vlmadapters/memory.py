"""How much memory a training step takes, estimated before it starts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmadapters.config import MMAConfig
from vlmadapters.frozen import Backbone
from vlmadapters.machine import available_memory
from vlmadapters.walk import Walk
from vlmlayers.errors import UserError

# Values kept per token and unit of width in a block with a graph: input and statistics of two
# norms, three attention inputs and its output, four wide hidden units, two residual sums, adapter.
KEPT, TRANSIENT = 14, 20


def estimate_memory(
    backbone: Backbone, configs: Sequence[MMAConfig], batch_size: int, tokens: Tensor
) -> int:
    """Return the bytes that activations and gradients of one step take at the peak.

    Placements are updated one after the other, so the largest one counts.

    Args:
        backbone: The backbone.
        configs: Placements.
        batch_size: Images per step and process.
        tokens: (class, token) of the class prompts, full length.
    """
    images = batch_size * view_tokens(backbone)
    if backbone.savings.cut_prompts:
        tokens = backbone.text.tower.cut(tokens)
    return max(
        _tower_bytes(backbone, config, "vision", images)
        + _tower_bytes(backbone, config, "text", tokens.numel())
        for config in configs
    )


def _tower_bytes(backbone: Backbone, config: MMAConfig, name: str, tokens: int) -> int:
    walk: Walk = getattr(backbone, name)
    depth, blocks = walk.tower.depth, getattr(config, name)
    graph = depth + 1 - backbone.start(config, name) if blocks else 0
    return 4 * tokens * walk.tower.width * (KEPT * graph + TRANSIENT)


def view_tokens(backbone: Backbone) -> int:
    """Return how many tokens the vision tower makes of one image."""
    with torch.no_grad():
        x = backbone.vision.enter(backbone.vision.tower.example(1)).x
    if x is not None:
        return x.numel() // backbone.vision.tower.width
    height, width = backbone.vision.tower.example(1).shape[-2:]
    return (height // 16) * (width // 16) + 1


def view_bytes(backbone: Backbone, views: int, starts: int) -> int:
    """Return the bytes that the frozen activations of some views take at `starts` blocks."""
    return 4 * views * starts * view_tokens(backbone) * backbone.vision.tower.width


def check_memory(
    backbone: Backbone,
    configs: Sequence[MMAConfig],
    batch_size: int,
    tokens: Tensor,
    kept: int = 0,
) -> None:
    """Raise a UserError where a training step would not fit into memory.

    Args:
        backbone: The backbone.
        configs: Placements.
        batch_size: Images per step and process.
        tokens: (class, token) of the class prompts, full length.
        kept: Bytes of frozen activations that will be kept in main memory.
    """
    device = next(backbone.clip.parameters()).device
    step, free = estimate_memory(backbone, configs, batch_size, tokens), available_memory(device)
    needed = step + (kept if device.type == "cpu" else 0)
    if needed > free:
        cache = f", {kept / 1e9:.1f} GB of it for cached views" if kept else ""
        raise UserError(
            f"training needs about {needed / 1e9:.1f} GB{cache}, and {device} has "
            f"{free / 1e9:.1f} GB free; lower batch_size ({batch_size}), adapt later blocks, use "
            "fewer classes or fewer cached_views"
        )
