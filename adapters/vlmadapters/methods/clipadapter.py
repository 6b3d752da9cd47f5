"""CLIP-Adapter: a small perceptron on the final feature, mixed into it by a constant ratio.

Reference: Gao et al., "CLIP-Adapter: Better Vision-Language Models with Feature Adapters",
IJCV 2024.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlmadapters.clip.frozen import Backbone
from vlmadapters.clip.logits import single
from vlmadapters.clip.walk import State
from vlmadapters.data.task import Task
from vlmadapters.methods.base import Method
from vlmadapters.methods.config import MethodConfig
from vlmadapters.methods.head_configs import CLIPAdapterConfig
from vlmadapters.methods.linear import drawn_linear
from vlmadapters.methods.official import matched_keys
from vlmlayers.errors import UserError

SIDES = {"fc": "ratio", "text_fc": "text_ratio"}
OFFICIAL = re.compile(r"(?:text_)?fc\.[02]\.weight")


class CLIPAdapter(Method):
    """Final features mixed with what a perceptron makes of them; no block is touched.

        a  = relu(W2 · relu(W1 · v))
        v' = ratio · a + (1 - ratio) · v

    v is the joint feature before it is normalised. The public code has the image side alone; the
    class side is described in the paper.

    Args:
        config: Ratios and inner width.
        backbone: The frozen CLIP.
        task: The classes trained on; nothing of them is kept.
        seed: Seed of the initial weights: uniform within 1/√(width in), as torch draws them.
    """

    Config = CLIPAdapterConfig
    varies = False
    config: CLIPAdapterConfig

    def __init__(
        self, config: CLIPAdapterConfig, backbone: Backbone, task: Task, seed: int = 0
    ) -> None:
        super().__init__(config)
        width, inner = backbone.joint, backbone.joint // config.reduction
        if not inner:
            raise UserError(
                f"{config.name} divides the joint width {width} by a reduction of "
                f"{config.reduction}, which leaves nothing; lower reduction"
            )
        generator = torch.Generator().manual_seed(seed)
        if config.ratio:
            self.fc = _perceptron(width, inner, generator)
        if config.text_ratio:
            self.text_fc = _perceptron(width, inner, generator)

    def prepare(self, backbone: Backbone, task: Task) -> Any:
        """Return the features of the classes in hand-made prompts."""
        end = self.first(backbone, "text")
        return backbone.prompts(backbone.tokens(task.prompts(task.hand_made)), [end])[end]

    def image_features(self, backbone: Backbone, state: State) -> Tensor:
        """Return adapted joint features of images, (image, joint)."""
        v = super().image_features(backbone, state)
        return _mixed(self.fc, v, self.config.ratio) if self.config.ratio else v

    def class_features(self, backbone: Backbone, classes: Any) -> Any:
        """Return adapted joint features of classes, (class, joint)."""
        t = super().class_features(backbone, classes)
        return _mixed(self.text_fc, t, self.config.text_ratio) if self.config.text_ratio else t

    @classmethod
    def config_of_official(
        cls, state: Mapping[str, Tensor], where: str, config: MethodConfig | None = None
    ) -> MethodConfig:
        """Check inner width and adapted sides; the ratios are not in the authors' files."""
        matched_keys(state, OFFICIAL, where, cls.Config.title)
        sides = {key.partition(".")[0] for key in state}
        shapes = [tuple(v.shape) for k, v in state.items() if ".0." in k and v.ndim == 2]
        if not shapes:
            raise UserError(f"{where} lacks the first weight of {cls.Config.title}; copy it again")
        inner, width = shapes[0]
        if config is None:
            # 0.2 is a constant of the public code, which does not store it.
            shares = [0.2 if side in sides else 0.0 for side in SIDES]
            return cls.Config(
                ratio=shares[0], text_ratio=shares[1], reduction=width // max(inner, 1)
            )
        assert isinstance(config, CLIPAdapterConfig)
        wanted = {side for side, name in SIDES.items() if getattr(config, name)}
        if sides != wanted:
            raise UserError(
                f"{where} holds {_words(sides)}, asked for is {_words(wanted)}; change the ratios"
            )
        if width // config.reduction != inner:
            raise UserError(
                f"{where} has an inner width of {inner}, asked for is {width // config.reduction}; "
                "change reduction"
            )
        return config


def _perceptron(width: int, inner: int, generator: torch.Generator) -> nn.Sequential:
    """Return two linear maps with a ReLU behind each, without biases."""
    down = drawn_linear(width, inner, generator, bias=False)
    up = drawn_linear(inner, width, generator, bias=False)
    # The public code has the last ReLU as well: what is mixed in is never negative.
    return nn.Sequential(down, nn.ReLU(), up, nn.ReLU())


def _mixed(perceptron: nn.Module, v: Tensor, ratio: float) -> Tensor:
    with torch.autocast(v.device.type, enabled=False):
        v = single(v)
        return ratio * perceptron(v) + (1 - ratio) * v


def _words(sides: set[str]) -> str:
    return " and ".join(sorted(sides)) or "nothing"
