"""Small random backbones of several families, and a dataset drawn by code, for the tests."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from vlmlayers.models.load import VLM, build_clip, wrap_model

SIZE = 32


def config(vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None) -> Any:
    vision_cfg = {"image_size": SIZE, "layers": 3, "width": 64, "head_width": 32, "patch_size": 8}
    text_cfg = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3}
    return {
        "embed_dim": 32,
        "quick_gelu": True,
        "vision_cfg": vision_cfg | (vision or {}),
        "text_cfg": text_cfg | (text or {}),
    }


FAMILIES: dict[str, dict[str, Any]] = {
    "clip": config(),
    "gelu, average pool": config({"pool_type": "avg", "final_ln_after_pool": True})
    | {"quick_gelu": False},
    "custom text": config(text={"pool_type": "eos", "eos_id": 49407}) | {"custom_text": True},
    "no causal mask, last token": config(text={"no_causal_mask": True, "pool_type": "last"})
    | {"custom_text": True},
    "layer scale, custom blocks": config({"qk_norm": True, "ls_init_value": 0.1}),
    "depths differ": config({"layers": 4, "width": 96}, {"layers": 2}),
}


def timm(name: str, pool: str, projection: str) -> dict[str, Any]:
    vision = {
        "image_size": 224,
        "timm_model_name": name,
        "timm_pool": pool,
        "timm_proj": projection,
    }
    made = config()
    return made | {"vision_cfg": vision, "custom_text": True}


FAMILIES["timm SigLIP, attention pool"] = timm("vit_base_patch32_siglip_256", "map", "none")
FAMILIES["timm SigLIP, attention pool"] |= {"embed_dim": 768}
FAMILIES["timm SigLIP, attention pool"]["vision_cfg"]["image_size"] = 256
FAMILIES["timm ViT, average pool"] = timm("vit_tiny_patch16_224", "avg", "linear")
FAMILIES["timm EVA"] = timm("eva02_tiny_patch14_224", "token", "linear")


@cache
def shared_backbone(name: str = "clip") -> VLM:
    """The same, built once; for tests that leave it as it was."""
    return backbone(name)


def backbone(name: str = "clip") -> VLM:
    clip = build_clip(FAMILIES[name])
    size = FAMILIES[name]["vision_cfg"]["image_size"]
    transform = open_clip.image_transform(size, is_train=False)
    return wrap_model(
        clip,
        transform,
        open_clip.SimpleTokenizer(),
        name=name,
        weights="random",
        random_weights=True,
    )


def saved_backbone(folder: Path) -> Path:
    """Write the shared backbone as a local model, and return its folder."""
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config()}))
    state = {k: v.clone().contiguous() for k, v in shared_backbone().clip.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    return folder


COLOURS = ("red", "green", "blue", "gray")


def colour_folder(base: Path, **counts: int) -> Path:
    """Draw an image folder of four colours, so many images of each in a split, and return it."""
    generator = np.random.default_rng(3)
    for split, count in counts.items():
        for label, name in enumerate(COLOURS):
            folder = base / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                noise = generator.integers(0, 200, (4, 4, 3)).astype(np.uint8)
                if label < 3:
                    noise[..., label] = 255
                Image.fromarray(noise).resize((32, 32)).save(folder / f"{i}.png")
    return base


def some_images(model: VLM, n: int = 2, seed: int = 0) -> Tensor:
    shape = model.towers["vision"].example(n).shape
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def some_tokens(model: VLM, n: int = 3) -> Tensor:
    words = ["a photo of a cat.", "a photo of a golden retriever dog.", "a blurry photo of a bus."]
    return model.tokenizer(words[:n])
