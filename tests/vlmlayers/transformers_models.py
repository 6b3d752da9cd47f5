"""Tiny models of transformers with random weights, as their classes build them."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import torch
import transformers

WIDTHS = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
TEXT = {**WIDTHS, "vocab_size": 60, "max_position_embeddings": 12, "num_hidden_layers": 3}
VISION = {**WIDTHS, "num_hidden_layers": 4, "patch_size": 8, "image_size": 32}
TOKENS = {"bos_token_id": 0, "eos_token_id": 59, "pad_token_id": 59}
TINY_TOKENS = {"vocab_size": 49408, "eos_token_id": 49407, "bos_token_id": 49406,
               "pad_token_id": 49407, "max_position_embeddings": 77}  # fmt: skip
KINDS = ("CLIP", "CLIP of old files", "Siglip", "Siglip2")


def build(kind, seed=0):
    """Return an untrained model, the weights of its blocks made larger than they start."""
    name = kind.partition(" ")[0]
    text, vision = dict(TEXT), dict(VISION)
    if name == "CLIP":
        text |= {**TOKENS, "eos_token_id": 2} if "old" in kind else TOKENS
    else:
        text |= {**TOKENS, "projection_size": 32}
    if name == "Siglip2":
        vision["num_patches"] = 16
        del vision["image_size"]
    config = getattr(transformers, f"{name}Config")(
        text_config=text, vision_config=vision, **({"projection_dim": 24} if name == "CLIP" else {})
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{name}Model")(config)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.1 * torch.randn_like(weight))
    return model.eval()


def token_ids(kind="CLIP", n=5):
    """Return texts of different lengths: begin, words, end, and what pads them."""
    ids = torch.full((n, TEXT["max_position_embeddings"]), TOKENS["pad_token_id"])
    words = torch.Generator().manual_seed(3)
    for row in range(n):
        ids[row, : row + 3] = torch.randint(3, 58, (row + 3,), generator=words)
    return ids


def images(n=3, side=32):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(5))


def patches(n=3):
    """Return what SigLIP 2's processor makes of three images: 4 × 4, 2 × 5 and 3 × 3 patches."""
    shapes = torch.tensor([[4, 4], [2, 5], [3, 3]])[:n]
    pixels = torch.randn(n, 16, 3 * 64, generator=torch.Generator().manual_seed(6))
    mask = (torch.arange(16) < shapes.prod(1, keepdim=True)).long()
    return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def clip_folder(folder: Path) -> Path:
    """Write a folder as `save_pretrained` does: model, image processor and CLIP's tokenizer."""
    sizes = {**WIDTHS, "num_hidden_layers": 2}
    config = transformers.CLIPConfig(
        text_config={**sizes, **TINY_TOKENS},
        vision_config={**sizes, "patch_size": 8, "image_size": 32},
        projection_dim=16,
    )
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    transformers.CLIPImageProcessor(**size).save_pretrained(folder)
    words = open_clip.SimpleTokenizer()
    named = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {named.get(word, word): number for word, number in words.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    merges = sorted(words.bpe_ranks, key=words.bpe_ranks.get)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]))
    marks = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    described = {"tokenizer_class": "CLIPTokenizer", "pad_token": "<|endoftext|>", **marks}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return folder
