"""Deep prompts: vectors that replace context words of class prompts, or are appended to images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vlmadapters.clip.frozen import Backbone
from vlmadapters.clip.walk import State
from vlmadapters.data.task import Task
from vlmadapters.methods.base import Method
from vlmadapters.methods.config import MethodConfig
from vlmadapters.methods.configs import PLACEHOLDER, split_words
from vlmadapters.methods.context import context_prompts, context_state, word_vectors
from vlmadapters.methods.official import is_prompt
from vlmlayers.errors import UserError

# CoOp's, which is also that of CLIP's token embeddings before their training.
STD = 0.02
C = TypeVar("C", bound=Any)


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
    # Whatever an earlier block appended ends here: prompts do not pile up.
    return torch.cat([x[:, : state.length], vectors], 1)


def check_appends(backbone: Backbone, method: str) -> None:
    """Raise a UserError where a backbone's vision tower takes no further tokens."""
    if not backbone.vision.takes_more:
        raise UserError(
            f"{method} appends tokens to those of an image, and the blocks of this vision tower "
            f"({backbone.vision.tower.family}) do not take them; choose an open_clip vision tower"
        )


def drawn_prompts(
    blocks: Iterable[int], length: int, width: int, generator: torch.Generator
) -> nn.ParameterDict:
    """Draw prompts of each block, (prompt, width), from N(0, 0.02²)."""
    made = {str(b): torch.empty(length, width).normal_(0, STD, generator=generator) for b in blocks}
    return nn.ParameterDict({block: nn.Parameter(value) for block, value in made.items()})


def with_fitting_words(config: C, length: int) -> C:
    """Return settings read from a checkpoint, without words where these are fewer than prompts."""
    return config if length <= len(split_words(config.words)) else replace(config, words="")


class DeepPrompts(Method):
    """What methods with prompts at blocks have in common: where these enter.

    At a chosen text block, tokens 1..n of every class prompt are overwritten by the block's
    vectors; at block 1 they receive positional embeddings like words. At the first chosen vision
    block, its vectors are appended to the tokens, at block 1 through the tower's input norm; at
    later ones they overwrite those appended. Other blocks carry the tokens on.

    Args:
        config: Blocks and words.
        backbone: The frozen CLIP.
    """

    config: Any

    def __init__(self, config: MethodConfig, backbone: Backbone) -> None:
        super().__init__(config)
        if config.vision:
            check_appends(backbone, config.title)

    def start_from_words(self, prompts: nn.ParameterDict, backbone: Backbone) -> None:
        """Let the prompts of text block 1, if chosen, start from the words, if any."""
        words = split_words(self.config.words)
        if 1 in self.config.text and words:
            prompts["1"] = nn.Parameter(word_vectors(backbone, words, len(prompts["1"])))

    def vectors(self, tower: str, block: int) -> Tensor:
        """Return the prompts of a chosen block, (prompt, width)."""
        raise NotImplementedError

    def prepare(self, backbone: Backbone, task: Task) -> Any:
        """Return the state of the class prompts at the first chosen text block."""
        if not self.config.text:
            return super().prepare(backbone, task)
        start = self.first(backbone, "text")
        length = len(self.vectors("text", start))
        # Words beyond the slots stay frozen between prompts and name, as in MaPLe: with 2 prompts
        # and "a photo of a" the text goes on with "of a".
        words = split_words(self.config.words) or [PLACEHOLDER] * length
        tokens, slots = context_prompts(backbone, task.class_names, words, length)
        return context_state(backbone, tokens, slots, start)

    def before(self, x: Tensor, tower: str, block: int, state: State) -> Tensor:
        """Return the tokens that enter a block, with the block's prompts among them."""
        if block not in getattr(self.config, tower):
            return x
        vectors = self.vectors(tower, block)
        if tower == "vision":
            return append(x, vectors, block, state)
        return state.note.write(x, vectors, block)

    @classmethod
    def is_official_key(cls, key: str) -> bool:
        """Whether a key of the authors' checkpoints is a prompt."""
        return is_prompt(key)
