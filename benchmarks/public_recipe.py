"""A plain transcription of the public MMA training step, to measure against.

It does what the public code does and no more: prompts of 77 tokens through the whole text tower at
every step, activations laid out (token, item, width), the norm computed a second time for the
adapter, gradient scaling by two identity functions, nothing cached. It is written from the
description of the method and checked against recorded numbers (tests/vlmadapters).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmadapters.methods.mma.config import MMAConfig


class ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        """Return x."""
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Return the gradient times the factor."""
        return grads[0] * ctx.factor, None


class Block(nn.Module):
    """One residual block over (token, item, width) with the weights of an open_clip block."""

    def __init__(self, block: Any, mask: Tensor | None) -> None:
        super().__init__()
        width, heads = block.attn.embed_dim, block.attn.num_heads
        self.attn = nn.MultiheadAttention(width, heads)
        self.attn.load_state_dict(block.attn.state_dict())
        self.ln_1, self.ln_2, self.mlp, self.mask = block.ln_1, block.ln_2, block.mlp, mask

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=self.mask)[0]
        return x + self.mlp(self.ln_2(x))


class PublicMMA(nn.Module):
    """CLIP with the adapter in its forward pass, as the public code has it.

    Args:
        clip: A built-in open_clip `CLIP` with a vision transformer.
        config: Placement, inner width, α; the same blocks in both towers.
    """

    def __init__(self, clip: Any, config: MMAConfig) -> None:
        super().__init__()
        self.config, self.clip = config, clip
        visual, text = clip.visual.transformer, clip.transformer
        self.visual_blocks = nn.ModuleList(Block(b, None) for b in visual.resblocks)
        self.text_blocks = nn.ModuleList(Block(b, clip.attn_mask) for b in text.resblocks)
        self.requires_grad_(False)
        self.visual_adapter = self._branches(config.vision, visual.width)
        self.text_adapter = self._branches(config.text, text.width)
        self.shared_adapter = nn.ModuleDict(
            {
                str(b): nn.Sequential(nn.Linear(config.dim, config.dim), nn.ReLU())
                for b in config.vision
            }
        )
        for parameter in self.adapter_parameters().values():
            if parameter.ndim == 2:
                nn.init.kaiming_normal_(parameter, mode="fan_out", nonlinearity="relu")
            else:
                nn.init.zeros_(parameter)

    def _branches(self, blocks: tuple[int, ...], width: int) -> nn.ModuleDict:
        dim = self.config.dim
        return nn.ModuleDict(
            {
                str(b): nn.ModuleDict(
                    {
                        "down": nn.Sequential(nn.Linear(width, dim), nn.ReLU()),
                        "up": nn.Linear(dim, width),
                    }
                )
                for b in blocks
            }
        )

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters under the authors' names."""
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if name.split(".")[0] in ("visual_adapter", "text_adapter", "shared_adapter")
        }

    def _run(self, x: Tensor, blocks: nn.ModuleList, adapters: nn.ModuleDict) -> Tensor:
        scale = self.config.scale
        block: Any
        for number, block in enumerate(blocks, start=1):
            if str(number) not in adapters:
                x = block(x)
                continue
            adapter: Any = adapters[str(number)]
            y = block.ln_1(ScaleGradient.apply(x, scale))
            y = self.shared_adapter[str(number)](adapter["down"](y))
            y = ScaleGradient.apply(adapter["up"](y) * scale, 1 / scale)
            x = block(x) + y
        return x

    def encode_image(self, images: Tensor) -> Tensor:
        """Return joint features of images, (image, width)."""
        visual = self.clip.visual
        x = visual.conv1(images).flatten(2).transpose(1, 2)  # (image, patch, width)
        cls = visual.class_embedding.expand(len(x), 1, -1)
        x = visual.ln_pre(torch.cat([cls, x], dim=1) + visual.positional_embedding)
        x = self._run(x.transpose(0, 1), self.visual_blocks, self.visual_adapter).transpose(0, 1)
        return visual.ln_post(x[:, 0]) @ visual.proj

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Return joint features of prompts, (class, width)."""
        clip = self.clip
        x = clip.token_embedding(tokens) + clip.positional_embedding
        x = self._run(x.transpose(0, 1), self.text_blocks, self.text_adapter).transpose(0, 1)
        x = clip.ln_final(x)
        return x[torch.arange(len(x)), tokens.argmax(dim=-1)] @ clip.text_projection

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Return class logits, (image, class)."""
        image = F.normalize(self.encode_image(images), dim=-1)
        text = F.normalize(self.encode_text(tokens), dim=-1)
        return self.clip.logit_scale.exp() * image @ text.t()
