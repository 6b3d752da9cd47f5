"""CoCoOp: learned context that is shifted by the image.

Reference: Zhou, Yang, Loy, Liu, "Conditional Prompt Learning for Vision-Language Models", CVPR
2022.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmadapters.clip.frozen import Backbone
from vlmadapters.clip.logits import scaled_cosines, single
from vlmadapters.clip.walk import State
from vlmadapters.data.task import Task
from vlmadapters.methods.configs import CoCoOpConfig
from vlmadapters.methods.context import some_prompts
from vlmadapters.methods.coop import CONTEXT, CoOp
from vlmadapters.methods.linear import drawn_linear

TEXTS = 4096  # texts that go through the text tower at once


class CoCoOp(CoOp):
    """Context words that a small network shifts by the image; every image has its own texts.

        context of image i = context + W2 · relu(W1 · image feature + c1) + c2

    All context words are shifted by the same vector. The texts of an image are its own, so that
    a batch takes images × classes of them and none can be kept.

    Args:
        config: Blocks, words or length.
        backbone: The frozen CLIP, for widths and initial values.
        task: The classes trained on.
        seed: Seed of the initialisation.

    Reference: Zhou et al., CoCoOp, CVPR 2022, equation 2 and section 3.2.
    """

    Config = CoCoOpConfig
    axes = (2,)
    official = re.compile(rf"{CONTEXT.pattern}|meta_net\.linear[12]\.(?:weight|bias)")

    def __init__(self, config: CoCoOpConfig, backbone: Backbone, task: Task, seed: int = 0) -> None:
        super().__init__(config, backbone, task, seed)
        self.meta_net = _meta_net(backbone.joint, backbone.text.tower.width, seed)

    def class_features(self, backbone: Backbone, classes: State) -> State:
        """Return the frozen state of the class prompts: their features wait for an image."""
        return classes

    def logits(self, backbone: Backbone, images: Tensor, classes: Any) -> Tensor:
        """Return scaled cosines between each image and its own texts, (image, class)."""
        count = len(classes.inputs)
        images = F.normalize(single(images), dim=-1)
        # Images × classes texts with their graphs would not fit in memory for many classes.
        at_once = max(1, TEXTS // count)
        parts = []
        for some, shift in zip(images.split(at_once), self.meta_net(images).split(at_once)):
            # All prompts of the first image, then those of the next: what `view` below relies on.
            rows = torch.arange(count, device=images.device).repeat(len(some))
            state = some_prompts(classes, rows)
            note = replace(state.note, shift=shift.repeat_interleave(count, 0))
            texts = backbone.features("text", replace(state, note=note), self)
            texts = texts.view(len(some), count, -1)  # (image, class, joint)
            parts.append(scaled_cosines(backbone.clip, some[:, None], texts)[:, 0])
        return torch.cat(parts)


def _meta_net(joint: int, width: int, seed: int) -> nn.Sequential:
    """Return the network from image feature to shift."""
    generator = torch.Generator().manual_seed(seed)
    # A sixteenth, as published; at least 1 on miniature backbones.
    hidden = max(1, joint // 16)
    first, second = drawn_linear(joint, hidden, generator), drawn_linear(hidden, width, generator)
    return nn.Sequential(OrderedDict(linear1=first, relu=nn.ReLU(), linear2=second))
