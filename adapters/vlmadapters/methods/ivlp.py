"""IVLP: independent deep prompts in both towers, or in one of them alone.

Reference: the controls of Khattak et al., "MaPLe: Multi-modal Prompt Learning", CVPR 2023.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlmadapters.clip.frozen import Backbone
from vlmadapters.data.task import Task
from vlmadapters.methods.config import MethodConfig
from vlmadapters.methods.deep import DeepPrompts, drawn_prompts, with_fitting_words
from vlmadapters.methods.deep_configs import IVLPConfig
from vlmadapters.methods.official import check_settings, matched_keys

# In the public code block 1 has its prompts outside the transformer, and is block 0.
FIRST = {"vision": "image_encoder.VPT", "text": "prompt_learner.ctx"}
ENCODERS = {"vision": "image_encoder", "text": "text_encoder"}
OFFICIAL = re.compile(
    r"prompt_learner\.ctx|image_encoder\.VPT"
    r"|(?:image|text)_encoder\.transformer\.resblocks\.(\d+)\.VPT_shallow"
)


class IVLP(DeepPrompts):
    """Free prompt vectors at chosen blocks; nothing couples towers or blocks.

    Args:
        config: Blocks, numbers of prompts, words.
        backbone: The frozen CLIP.
        task: The classes trained on; nothing of them is kept.
        seed: Seed of the initial values: N(0, 0.02²), or words at text block 1.
    """

    Config = IVLPConfig
    varies = False
    config: IVLPConfig

    def __init__(self, config: IVLPConfig, backbone: Backbone, task: Task, seed: int = 0) -> None:
        super().__init__(config, backbone)
        generator = torch.Generator().manual_seed(seed)
        widths = {name: walk.tower.width for name, walk in backbone.walks.items()}
        self.vision = drawn_prompts(
            config.vision, config.vision_length, widths["vision"], generator
        )
        self.text = drawn_prompts(config.text, config.text_length, widths["text"], generator)
        self.start_from_words(self.text, backbone)

    def vectors(self, tower: str, block: int) -> Tensor:
        """Return the prompts of a chosen block, (prompt, width)."""
        return getattr(self, tower)[str(block)]

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
    def config_of_official(
        cls, state: Mapping[str, Tensor], where: str, config: MethodConfig | None = None
    ) -> MethodConfig:
        """Read blocks and numbers of prompts from keys and shapes; words are not in them."""
        found: dict[str, Any] = {"vision": (), "text": ()}
        matches = matched_keys(state, OFFICIAL, where, cls.Config.title)
        for key, match in sorted(matches.items()):
            tower, value = "vision" if key.startswith("image") else "text", state[key]
            found[tower] += (int(match[1] or 0) + 1,)
            found[f"{tower}_length"] = value.shape[0] if value.ndim == 2 else 1
        for tower in ENCODERS:
            found[tower] = tuple(sorted(found[tower]))
        if config is not None:
            return check_settings(config, found, where)
        made = cls.Config(**found)
        return with_fitting_words(made, made.text_length)
