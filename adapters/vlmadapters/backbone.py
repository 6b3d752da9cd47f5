"""What an adapter needs to know of a backbone; the module trees are known in `vlmlayers.models`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from vlmlayers.errors import UserError


@dataclass
class _T:
    blocks: list
    width: int

    @property
    def depth(self) -> int:
        return len(self.blocks)


def backbone_towers(clip: nn.Module) -> dict[str, Any]:
    return {"vision": _T(list(clip.visual.transformer.resblocks), clip.visual.transformer.width),
            "text": _T(list(clip.transformer.resblocks), clip.transformer.width)}


def first_norm(block: nn.Module) -> nn.Module:
    """Return the norm a block applies to its input."""
    for name in ("ln_1", "norm1", "layer_norm1"):
        norm = getattr(block, name, None)
        if isinstance(norm, nn.Module):
            return norm
    raise UserError(
        f"a {type(block).__name__} block has no first norm, and the adapter reads its output; "
        "this backbone cannot be adapted"
    )


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Hold every parameter's `requires_grad` at False for the length of the context."""
    trained = [p for p in module.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
