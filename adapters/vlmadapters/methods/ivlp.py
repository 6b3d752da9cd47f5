"""IVLP: independent deep prompts in both towers, or in one of them alone.

Reference: the controls of Khattak et al., "MaPLe: Multi-modal Prompt Learning", CVPR 2023.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmadapters.clip.frozen import Backbone
from vlmadapters.clip.walk import State
from vlmadapters.data.task import Task
from vlmadapters.methods.base import Method
from vlmadapters.methods.config import MethodConfig
from vlmadapters.methods.configs import IVLPConfig, split_words
from vlmadapters.methods.context import word_vectors
from vlmadapters.methods.deep import append, check_appends, prompt_state
from vlmadapters.methods.official import check_keys, check_settings

STD = 0.02
FIRST = {"vision": "image_encoder.VPT", "text": "prompt_learner.ctx"}
ENCODERS = {"vision": "image_encoder", "text": "text_encoder"}
OFFICIAL = re.compile(
    r"prompt_learner\.ctx|image_encoder\.VPT"
    r"|(?:image|text)_encoder\.transformer\.resblocks\.(\d+)\.VPT_shallow"
)


class IVLP(Method):
    """Free prompt vectors at chosen blocks; nothing couples towers or blocks.

    At a chosen text block, tokens 1..n of every class prompt are overwritten by the block's
    vectors; at block 1 they receive positional embeddings like words. At the first chosen vision
    block, its vectors are appended to the tokens, at block 1 through the tower's input norm; at
    later ones they overwrite those appended. Other blocks carry the tokens on.

    Args:
        config: Blocks, numbers of prompts, words.
        backbone: The frozen CLIP.
        task: The classes trained on; nothing of them is kept.
        seed: Seed of the initial values: N(0, 0.02²), or words at text block 1.
    """

    Config = IVLPConfig
    config: IVLPConfig

    def __init__(self, config: IVLPConfig, backbone: Backbone, task: Task, seed: int = 0) -> None:
        super().__init__(config)
        if config.vision:
            check_appends(backbone, config.title)
        generator = torch.Generator().manual_seed(seed)

        def drawn(tower: str) -> nn.ParameterDict:
            size = getattr(config, f"{tower}_length"), backbone.walks[tower].tower.width
            blocks = getattr(config, tower)
            draws = [torch.empty(size).normal_(0, STD, generator=generator) for _ in blocks]
            return nn.ParameterDict(dict(zip(map(str, blocks), map(nn.Parameter, draws))))

        self.vision, self.text = drawn("vision"), drawn("text")
        if 1 in config.text and config.words:
            words = word_vectors(backbone, split_words(config.words), config.text_length)
            self.text["1"] = nn.Parameter(words)

    def prepare(self, backbone: Backbone, task: Task) -> Any:
        """Return the state of the class prompts at the first chosen text block."""
        if not self.config.text:
            return super().prepare(backbone, task)
        start, length = self.first(backbone, "text"), self.config.text_length
        return prompt_state(backbone, task.class_names, self.config.words, length, start)

    def before(self, x: Tensor, tower: str, block: int, state: State) -> Tensor:
        """Return the tokens that enter a block, with the block's prompts among them."""
        if block not in getattr(self.config, tower):
            return x
        prompts = getattr(self, tower)[str(block)]
        if tower == "vision":
            return append(x, prompts, block, state)
        written: Tensor = state.note.write(x, prompts, block)
        return written

    def official_names(self) -> dict[str, str]:
        """Return our parameter names to those of the authors' checkpoints."""
        return {
            f"{tower}.{block}": FIRST[tower]
            if block == 1
            else f"{ENCODERS[tower]}.transformer.resblocks.{block - 1}.VPT_shallow"
            for tower in ENCODERS
            for block in getattr(self.config, tower)
        }

    @classmethod
    def is_official_key(cls, key: str) -> bool:
        """Whether a key of the authors' checkpoints is a prompt; the others are the backbone's."""
        learner = key.startswith("prompt_learner.") and "token_" not in key
        return learner or OFFICIAL.fullmatch(key) is not None

    @classmethod
    def config_of_official(
        cls, state: Mapping[str, Tensor], where: str, config: MethodConfig | None = None
    ) -> MethodConfig:
        """Read blocks and numbers of prompts from keys and shapes; words are not in them."""
        check_keys(state, OFFICIAL, where, cls.Config.title)
        found: dict[str, Any] = {"vision": (), "text": ()}
        for key, value in sorted(state.items()):
            match = OFFICIAL.fullmatch(key)
            tower = "vision" if key.startswith("image") else "text"
            found[tower] += (int(match[1]) + 1 if match and match[1] else 1,)
            found[f"{tower}_length"] = value.shape[0] if value.ndim == 2 else 1
        for tower in ENCODERS:
            found[tower] = tuple(sorted(found[tower]))
        if config is not None:
            check_settings(config, found, where)
            return config
        made = cls.Config(**found)
        fits = made.text_length <= len(split_words(made.words))
        return made if fits else replace(made, words="")
