"""CLIP-Adapter against its formula, its records, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import shared_backbone, some_images
from stepping import assert_same_step, built, first_step
from torch.nn import functional as F

from vlmadapters.clip.savings import Savings
from vlmadapters.data.task import Task
from vlmadapters.files import load_official, save_official
from vlmadapters.methods.head_configs import CLIPAdapterConfig
from vlmlayers.errors import UserError

CONFIGS = [
    CLIPAdapterConfig(),
    CLIPAdapterConfig(ratio=0.6, text_ratio=0.3, reduction=2),
    CLIPAdapterConfig(ratio=0.0, text_ratio=1.0),
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", ["clip", "timm ViT, average pool"])
@torch.no_grad()
def test_logits_follow_the_formula_in_the_datasets_own_template(
    config: CLIPAdapterConfig, family: str
) -> None:
    method, backbone = built(config, family=family)
    clip, images = backbone.clip, some_images(shared_backbone(family))
    task = Task(("oak", "sea_lion"), own_template="{} texture.")
    sides: list[Any] = []
    for side, ratio, v in (
        ("fc", config.ratio, clip.encode_image(images)),
        (
            "text_fc",
            config.text_ratio,
            clip.encode_text(backbone.tokens(["oak texture.", "sea lion texture."])),
        ),
    ):
        if ratio:
            first, second = (getattr(method, side)[i].weight for i in (0, 2))
            v = ratio * (second @ (first @ v.T).relu()).relu().T + (1 - ratio) * v
        sides.append(F.normalize(v, dim=-1))
    expected = clip.logit_scale.exp() * sides[0] @ sides[1].T
    end = method.first(backbone, "vision")
    features = method.image_features(backbone, backbone.images(images, [end])[end])
    texts = method.class_features(backbone, method.prepare(backbone, task))
    found = method.logits(backbone, features, texts)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
def test_savings_change_neither_loss_nor_gradients(config: CLIPAdapterConfig) -> None:
    saved, plain = (first_step(*built(config, savings)) for savings in (None, Savings.none()))
    assert_same_step(saved, plain)


def test_images_and_texts_are_frozen_to_the_end() -> None:
    method, backbone = built(CONFIGS[1])
    assert [method.first(backbone, tower) for tower in ("vision", "text")] == [4, 4]


def test_initial_weights_are_drawn_as_torch_draws_them() -> None:
    for value in built(CONFIGS[0])[0].parameters():
        bound = value.shape[1] ** -0.5
        assert 0.8 * bound < float(value.detach().abs().max()) <= bound


def test_a_file_for_another_width_is_refused(tmp_path: Path) -> None:
    path = save_official(tmp_path / "a.pth.tar", built(CONFIGS[0])[0])
    with pytest.raises(UserError, match=r"fc.0.weight has shape \(8, 32\).* and \(192, 768\)"):
        load_official(path, shared_backbone("timm SigLIP, attention pool"), method="clipadapter")


def test_a_reduction_leaves_a_width() -> None:
    with pytest.raises(UserError, match="joint width 32 by a reduction of 64"):
        built(CLIPAdapterConfig(reduction=64))
