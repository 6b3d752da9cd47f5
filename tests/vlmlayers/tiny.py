"""Tiny open_clip models of every family, and a dataset of drawn images, for tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm import is_model
from torch._subclasses.fake_tensor import FakeTensorMode

from vlmlayers.errors import UnreadableImage
from vlmlayers.identity import DataIdentity
from vlmlayers.manifests.items import Item
from vlmlayers.models import VLM, wrap_model
from vlmlayers.models.load import build_clip

VISION = {"image_size": 32, "layers": 3, "width": 48, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 12, "vocab_size": 64, "width": 32, "heads": 2, "layers": 3}
BIDIRECTIONAL = {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}


def config(vision: dict | None = None, text: dict | None = None, **more: Any) -> dict[str, Any]:
    return {
        "embed_dim": 24,
        "vision_cfg": {**VISION, **(vision or {})},
        "text_cfg": {**TEXT, **(text or {})},
        **more,
    }


def timm(name: str, size: int, pool: str = "", proj: str | None = "linear") -> dict[str, Any]:
    visual = {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj, "image_size": size}
    return {"embed_dim": 24, "vision_cfg": visual, "text_cfg": TEXT}


MULTIMODAL = {"width": 32, "context_length": 12, "vocab_size": 64, "heads": 2, "layers": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "clip": config(),
    "quickgelu": config(quick_gelu=True),
    "clipa": config({"pool_type": "avg"}, BIDIRECTIONAL),
    "norm after pool": config({"final_ln_after_pool": True, "pool_type": "avg"}),
    "eos": config(text={"pool_type": "eos", "eos_id": 2}),
    "first": config(text={"pool_type": "first", "no_causal_mask": True}),
    "custom text": config(text={"proj_bias": True}, custom_text=True),
    "custom blocks": config({"qk_norm": True, "scale_fc": True}, {"scale_attn": True}),
    "coca": config(
        {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        {"embed_cls": True, "output_tokens": True},
        custom_text=True,
        multimodal_cfg=MULTIMODAL,
    ),
    "coca mean": config(
        {
            "attentional_pool": True,
            "attn_pooler_heads": 2,
            "pool_type": "avg",
            "output_tokens": True,
        },
        {"embed_cls": True, "output_tokens": True},
        custom_text=True,
        multimodal_cfg=MULTIMODAL,
    ),
    "resnet": config({"layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "image_size": 64}),
    "timm vit token": timm("test_vit", 160, "token", None),
    "timm vit mean": timm("test_vit", 160, "avg"),
    "timm vit map": timm("test_vit3", 160, "map", "none") | {"custom_text": True},
    "timm vit registers": timm("test_vit2", 160),
    "timm relpos": timm("test_vit_relpos", 160),
    "timm eva": timm("eva02_tiny_patch14_224", 224, "token", None),
    "timm convnext": timm("test_convnext", 160, "", "mlp"),
    "timm resnet": timm("test_resnet", 160),
    "timm fastvit": timm("fastvit_t8", 256, "avg", None),
}
if not is_model("test_vit_relpos"):  # a timm before 1.0.29 or so
    del FAMILIES["timm relpos"]
SLOW_FAMILIES: dict[str, dict[str, Any]] = {
    "timm pe": timm("vit_pe_core_tiny_patch16_384", 384, "map", None),
    "timm swin": timm("swin_s3_tiny_224", 224),
    "timm hybrid": timm("vitamin_small_224", 224),
    "timm siglip": timm("vit_base_patch32_siglip_256", 256, "map", "none"),
}


def build(family: str, seed: int = 0) -> torch.nn.Module:
    """Return a tiny model whose every parameter differs from its default, norms included."""
    clip = build_clip({**FAMILIES, **SLOW_FAMILIES}[family], seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in clip.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * noise)
    return clip.eval()


def images(clip: torch.nn.Module, count: int = 3, seed: int = 0) -> torch.Tensor:
    size = clip.visual.image_size
    size = (size, size) if isinstance(size, int) else size
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def token_ids(lengths: tuple[int, ...] = (3, 6, 4), context: int = 12) -> torch.Tensor:
    """Return texts that start with 1, end with 63 (the highest id) and then 2, padded with 0."""
    ids = torch.zeros(len(lengths), context, dtype=torch.long)
    generator = torch.Generator().manual_seed(5)
    for row, length in enumerate(lengths):
        ids[row, 0] = 1
        ids[row, 1 : length - 1] = torch.randint(3, 60, (length - 2,), generator=generator)
        ids[row, length - 1] = 63
        ids[row, length] = 2
    return ids


def tokenizer(texts: list[str]) -> torch.Tensor:
    """Return ids by letters, ended by 63 and, for models that read there, 2."""
    ids = torch.zeros(len(texts), 12, dtype=torch.long)
    for row, text in enumerate(texts):
        letters = [1, *(3 + ord(letter) % 57 for letter in text[-9:]), 63, 2]
        ids[row, : len(letters)] = torch.tensor(letters)
    return ids


def preprocess(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 128 - 1).permute(2, 0, 1)


def model(family: str = "clip", seed: int = 0) -> VLM:
    return wrap_model(
        build(family, seed), preprocess, tokenizer, name=f"tiny {family}", weights=f"seed {seed}"
    )


@dataclass
class DrawnManifest:
    """A manifest of images drawn from their paths; some can be made unreadable."""

    name: str = "drawn"
    count: int = 22
    hash: str = "0123"
    template: str = "a photo of a {}."
    captioned: bool = True
    broken: set[str] = field(default_factory=set)
    names: tuple[str, ...] = ("cat", "tree frog", "a {brace} <b>")
    opened: list[str] = field(default_factory=list)

    def class_names(self, root: Any = None) -> tuple[str, ...]:
        return self.names

    def prompt(self, name: str, template: str | None = None) -> str:
        return (template or self.template).replace("{}", name)

    def items(self, split: str, root: Any = None) -> list[Item]:
        return [
            Item(
                f"{split}/{i:03d}.png",
                i % 3,
                self.names[i % 3] if self.names else "",
                (f"first {i}", f"second {i}") if self.captioned else (),
            )
            for i in range(self.count)
        ]

    def sample(self, split: str, n: int, seed: int = 0, root: Any = None) -> list[Item]:
        return self.items(split)[:n]

    def identity(self, items: Any, root: Any = None) -> DataIdentity:
        marks = (f"{self.hash} {item.path in self.broken} {item.captions}" for item in items)
        rows = ((item.path, item.label, mark) for item, mark in zip(items, marks))
        return DataIdentity(self.names, tuple(rows))

    def refuse_missing(self, items: Any, root: Any = None) -> None:
        """Nothing is missing where all is drawn."""

    def open_image(self, item: Item, root: Any = None, size: int | None = None) -> Image.Image:
        self.opened.append(item.path)
        if item.path in self.broken:
            raise UnreadableImage(f"{item.path} is cut short")
        rng = np.random.default_rng(int(item.path[-7:-4]))
        return Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))


@cache
def fakes_gpus() -> bool:
    """Return whether fake CUDA tensors take random numbers; torch 2.6 asks a driver for them."""
    try:
        with FakeTensorMode():
            torch.empty(2, device="cuda").uniform_()
    except RuntimeError:
        return False
    return True


def skip_without_fake_gpus() -> None:
    if not fakes_gpus():
        pytest.skip(f"torch {torch.__version__} fakes no GPU where there is no driver")
