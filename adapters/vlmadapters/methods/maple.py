"""MaPLe: deep text prompts, from which the vision prompts of the same blocks are projected.

Reference: Khattak, Rasheed, Maaz, Khan, Khan, "MaPLe: Multi-modal Prompt Learning", CVPR 2023.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn

from vlmadapters.clip.frozen import Backbone
from vlmadapters.data.task import Task
from vlmadapters.methods.config import MethodConfig
from vlmadapters.methods.deep import DeepPrompts, drawn_prompts, with_fitting_words
from vlmadapters.methods.deep_configs import MaPLeConfig
from vlmadapters.methods.linear import drawn_linear
from vlmadapters.methods.official import check_settings, matched_keys
from vlmlayers.errors import UserError

# Ours to the authors' names: of block 1, and of later blocks, which they count from 0.
NAMES = {
    "prompts": ("ctx", "compound_prompts_text"),
    "projections": ("proj", "compound_prompt_projections"),
}
OFFICIAL = re.compile(
    r"prompt_learner\.(ctx|proj|compound_prompts_text|compound_prompt_projections)"
    r"(?:\.(\d+))?(?:\.(?:weight|bias))?"
)


class MaPLe(DeepPrompts):
    """Coupled prompts: text vectors P_b at block b, and W_b P_b + c_b in the vision tower there.

    A vision block whose number is no chosen text block has text vectors of its own, which only its
    projection reads.

    Args:
        config: Blocks, number of prompts, words.
        backbone: The frozen CLIP.
        task: The classes trained on; nothing of them is kept.
        seed: Seed of the initial values: vectors from N(0, 0.02²), or words at block 1; projections
            uniform within ±1/√(text width), one draw for block 1 and one for all later blocks.
    """

    Config = MaPLeConfig
    varies = False

    def __init__(self, config: MaPLeConfig, backbone: Backbone, task: Task, seed: int = 0) -> None:
        super().__init__(config, backbone)
        generator = torch.Generator().manual_seed(seed)
        text, vision = (backbone.walks[name].tower.width for name in ("text", "vision"))
        blocks = sorted({*config.vision, *config.text})
        self.prompts = drawn_prompts(blocks, config.length, text, generator)
        self.start_from_words(self.prompts, backbone)
        # The public code makes one later projection and copies it, so that all start equal.
        first, later = (drawn_linear(text, vision, generator) for _ in range(2))
        self.projections = nn.ModuleDict(
            {str(block): first if block == 1 else deepcopy(later) for block in config.vision}
        )

    def vectors(self, tower: str, block: int) -> Tensor:
        """Return the prompts of a chosen block, (prompt, width)."""
        source: Tensor = self.prompts[str(block)]
        return self.projections[str(block)](source) if tower == "vision" else source

    def official_names(self) -> dict[str, str]:
        """Return our parameter names to those of the authors' checkpoints."""
        names = {}
        for name, _ in self.named_parameters():
            kind, block, *part = name.split(".")
            first, later = NAMES[kind]
            known = first if block == "1" else f"{later}.{int(block) - 2}"
            names[name] = ".".join(["prompt_learner", known, *part])
        return names

    @classmethod
    def config_of_official(
        cls, state: Mapping[str, Tensor], where: str, config: MethodConfig | None = None
    ) -> MethodConfig:
        """Read blocks and number of prompts from keys and shapes; words are not in them.

        Text vectors that only a projection reads are not told apart from text prompts.
        """
        blocks: dict[str, set[int]] = {"prompts": set(), "projections": set()}
        length = 1
        for key, match in matched_keys(state, OFFICIAL, where, cls.Config.title).items():
            value = state[key]
            kind = next(kind for kind, names in NAMES.items() if match[1] in names)
            blocks[kind].add(int(match[2]) + 2 if match[2] else 1)
            length = value.shape[0] if kind == "prompts" and value.ndim else length
        if not blocks["projections"]:
            raise UserError(f"{where} is of another method than MaPLe: it holds no projection")
        vision = tuple(sorted(blocks["projections"]))
        if config is not None:
            return check_settings(config, {"vision": vision, "length": length}, where)
        made = cls.Config(vision, tuple(sorted(blocks["prompts"])), length=length)
        return with_fitting_words(made, length)
