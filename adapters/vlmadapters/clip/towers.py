"""What an adapter needs to know of a backbone; the module trees are known in `vlmlayers.models`."""

from __future__ import annotations

from typing import Annotated

from torch import nn

from vlmlayers.arguments import Takes
from vlmlayers.errors import UserError
from vlmlayers.models.towers import Tower, find_towers

# `train` takes a model whole, and what takes its module alone has to say so.
Clip = Annotated[nn.Module, Takes("a torch module, such as `model.clip`", "torch modules")]
# Names of the norm that blocks apply to their input: open_clip, timm, Hugging Face.
FIRST_NORMS = ("ln_1", "norm1", "layer_norm1")


def backbone_towers(clip: nn.Module) -> dict[str, Tower]:
    """Return both towers of a CLIP whose blocks an adapter can stand beside.

    Raises:
        UserError: There is no text tower, a tower has no transformer blocks, or its blocks have no
            first norm.
    """
    towers = find_towers(clip)
    if "text" not in towers:
        raise UserError(
            f"the model has no text tower ({towers['vision'].family}), which its classes are told "
            "by; choose a CLIP or one of its like"
        )
    for tower in towers.values():
        if tower.kind != "blocks":
            raise UserError(
                f"the {tower.name} tower ({tower.family}) has {tower.kind}, not transformer "
                "blocks; the multi-modal adapter needs blocks of one width with a first norm"
            )
        first_norm(tower.blocks[0], tower)
    return towers


def backbone_depths(clip: nn.Module) -> dict[str, int]:
    """Return the number of blocks of both towers; see `backbone_towers` for errors."""
    return {name: tower.depth for name, tower in backbone_towers(clip).items()}


def first_norm(block: nn.Module, tower: Tower) -> nn.Module:
    """Return the norm a block applies to its input.

    Raises:
        UserError: There is none, as in post-norm blocks.
    """
    for name in FIRST_NORMS:
        norm = getattr(block, name, None)
        if isinstance(norm, nn.Module):
            return norm
    raise UserError(
        f"the {tower.name} tower's blocks ({tower.family}, {type(block).__name__}) have no first "
        "norm, which the multi-modal adapter reads; choose a backbone of pre-norm blocks"
    )
