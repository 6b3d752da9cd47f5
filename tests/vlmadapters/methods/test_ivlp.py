"""IVLP against a plain forward pass, its records, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import shared_backbone, some_images
from stepping import TASK, assert_same_step, built, first_step, moved
from torch import Tensor

from vlmadapters.clip.savings import Savings
from vlmadapters.files import load_official, save_official
from vlmadapters.methods.deep_configs import IVLPConfig
from vlmadapters.methods.ivlp import IVLP
from vlmadapters.training.recipes import load_recipe
from vlmlayers.errors import UserError

CONFIGS = [
    IVLPConfig((1, 2, 3), (1, 2, 3)),
    IVLPConfig((1,), (1,), vision_length=3, text_length=1),
    IVLPConfig((2,), (2, 3), words="a blurry photo of a"),
    IVLPConfig((1, 3), (1, 3), text_length=6, words=""),
    IVLPConfig((3,), ()),
    IVLPConfig((), (2,)),
]


@torch.no_grad()
def plain_features(
    method: IVLP, clip: Any, images: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """Both towers' features by the sheet's rules, in a loop over open_clip's own blocks."""
    visual, config = clip.visual, method.config
    x = visual.conv1(images).flatten(2).transpose(1, 2)
    x = (
        torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1)
        + visual.positional_embedding
    )
    own = x.shape[1]
    if 1 in config.vision:
        x = torch.cat([x, method.vision["1"].expand(len(x), -1, -1)], 1)
    x = visual.ln_pre(x)
    for number, block in enumerate(visual.transformer.resblocks, 1):
        if number > 1 and number in config.vision:
            x = torch.cat([x[:, :own], method.vision[str(number)].expand(len(x), -1, -1)], 1)
        x = block(x)
    images_out = visual.ln_post(x[:, 0]) @ visual.proj
    y, slots = clip.token_embedding(tokens), slice(1, 1 + config.text_length)
    if 1 in config.text:
        y[:, slots] = method.text["1"]
    y = y + clip.positional_embedding
    for number, block in enumerate(clip.transformer.resblocks, 1):
        if number > 1 and number in config.text:
            y[:, slots] = method.text[str(number)]
        y = block(y, attn_mask=clip.attn_mask)
    ends = clip.ln_final(y)[torch.arange(len(y)), tokens.argmax(1)]
    return [images_out, ends @ clip.text_projection]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.placement)
def test_features_are_those_of_a_plain_forward_pass(config: IVLPConfig) -> None:
    method, backbone = built(config)
    images, clip = some_images(shared_backbone()), backbone.clip
    words = config.words or " ".join(["X"] * config.text_length)
    names = ("cat", "golden retriever", "bus")
    tokens = backbone.tokens([f"{words} {name}." for name in names])
    start = method.first(backbone, "vision")
    with torch.no_grad():
        found = method.image_features(backbone, backbone.images(images, [start])[start])
        texts = method.class_features(backbone, method.prepare(backbone, TASK))
    expected = plain_features(method, clip, images, tokens)
    torch.testing.assert_close(found, expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(texts, expected[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.placement)
def test_savings_change_neither_loss_nor_gradients(config: IVLPConfig) -> None:
    saved, plain = (first_step(*built(config, savings)) for savings in (None, Savings.none()))
    assert_same_step(saved, plain)


@pytest.mark.parametrize(
    "family", ["gelu, average pool", "no causal mask, last token", "timm ViT, average pool"]
)
def test_other_families_learn_in_both_towers(family: str) -> None:
    method, backbone = built(IVLPConfig((1, 2), (1, 2)), family=family)
    step = first_step(method, backbone)
    assert all(bool(gradient.any()) for name, gradient in step.items() if name != "loss")


def test_a_tower_with_rotary_positions_takes_no_further_tokens() -> None:
    with pytest.raises(UserError, match=r"IVLP appends tokens .*timm Eva.* choose an open_clip"):
        built(IVLPConfig((1,), ()), family="timm EVA")
    built(IVLPConfig((), (1,)), family="timm EVA")


def test_block_1_starts_from_words_and_the_rest_near_zero() -> None:
    method, backbone = built(IVLPConfig((1, 2), (1, 2)))
    ids = backbone.tokens(["a photo"])[0, 1:3]
    assert torch.equal(method.text["1"], backbone.clip.token_embedding.weight[ids])
    drawn = torch.cat([method.vision["1"].flatten(), method.vision["2"].flatten()])
    assert 0.015 < float(drawn.detach().std()) < 0.025


def test_words_of_blanks_alone_are_none() -> None:
    """They started from end-of-text."""
    started = [built(IVLPConfig((), (1,), words=words))[0].text["1"] for words in ("", " ", "_")]
    assert all(torch.equal(one, started[0]) for one in started)


@pytest.mark.parametrize(
    ("recipe", "parameters"),
    [("published", 30_720), ("published-text", 24_576), ("published-vision", 73_728)],
)
def test_recipes_have_the_published_number_of_parameters(recipe: str, parameters: int) -> None:
    config = load_recipe(recipe, "ivlp").method
    assert isinstance(config, IVLPConfig)
    vision = len(config.vision) * config.vision_length * 768
    assert vision + len(config.text) * config.text_length * 512 == parameters


def test_files_of_the_authors_may_hold_frozen_parts(tmp_path: Path) -> None:
    model, method = shared_backbone(), moved(built(CONFIGS[0])[0], 0.1)
    theirs = save_official(tmp_path / "theirs.pth.tar", method)
    content = torch.load(theirs, weights_only=True)
    content["state_dict"] |= {
        "prompt_learner.token_prefix": torch.zeros(3, 1, 32),
        "image_encoder.conv1.weight": torch.zeros(1),
    }
    torch.save(content, theirs)
    read = load_official(theirs, model, method.config).state_dict()
    assert all(torch.equal(read[key], value) for key, value in method.state_dict().items())


def test_bad_fits_are_one_line() -> None:
    with pytest.raises(UserError, match="block 4"):
        built(IVLPConfig((4,), ()))
    with pytest.raises(UserError, match="too few for a context of 6"):
        method, backbone = built(IVLPConfig((), (2,), text_length=6))
        method.prepare(backbone, TASK)
