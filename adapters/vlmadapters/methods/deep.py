"""Deep prompts: vectors that replace context words of class prompts, or are appended to images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmadapters.clip.frozen import Backbone
from vlmadapters.clip.walk import State
from vlmadapters.methods.configs import PLACEHOLDER, split_words
from vlmadapters.methods.context import context_prompts, context_state
from vlmlayers.errors import UserError


def prompt_state(
    backbone: Backbone, names: Sequence[str], words: str, length: int, block: int
) -> State:
    """Return the frozen state of class prompts at a block, whose first tokens will be overwritten.

    Args:
        backbone: The frozen CLIP with its tokenizer.
        names: Class names.
        words: Words before the name; empty for placeholders, one for each slot.
        length: Number of slots.
        block: Number of the block.
    """
    context = split_words(words) or [PLACEHOLDER] * length
    return context_state(backbone, *context_prompts(backbone, names, context, length), block)


def append(x: Tensor, vectors: Tensor, block: int, state: State) -> Tensor:
    """Return the tokens of a block's input with vectors behind the tower's own tokens.

    They take the place of those appended before; at block 1 they pass the tower's input norm.

    Args:
        x: (item, token, width).
        vectors: (vector, width).
        block: Number of the block.
        state: The walk's state.
    """
    vectors = state.norm_in(vectors) if block == 1 else vectors
    vectors = vectors.to(x.dtype).expand(len(x), -1, -1)
    return torch.cat([x[:, : state.length], vectors], 1)


def check_appends(backbone: Backbone, method: str) -> None:
    """Raise a UserError where a backbone's vision tower takes no further tokens."""
    if not backbone.vision.takes_more:
        raise UserError(
            f"{method} appends tokens to those of an image, and the blocks of this vision tower "
            f"({backbone.vision.tower.family}) do not take them; choose an open_clip vision tower"
        )
