"""MaPLe against IVLP with the same vectors, its records, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from backbones import shared_backbone, some_images
from stepping import TASK, assert_same_step, built, first_step

from vlmadapters.clip.savings import Savings
from vlmadapters.methods.deep_configs import IVLPConfig, MaPLeConfig
from vlmadapters.training.recipes import load_recipe

CONFIGS = [
    MaPLeConfig((1, 2, 3), (1, 2, 3)),
    MaPLeConfig((1,), (1,), length=3),
    MaPLeConfig((2, 3), (1, 3), length=5, words=""),
    MaPLeConfig((3,), ()),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.placement)
def test_features_are_those_of_free_prompts_with_the_projected_vectors(config: MaPLeConfig) -> None:
    method, backbone = built(config)
    lengths = {"vision_length": config.length, "text_length": config.length}
    free, _ = built(IVLPConfig(config.vision, config.text, words=config.words, **lengths))
    with torch.no_grad():
        for block in config.text:
            free.text[str(block)].copy_(method.prompts[str(block)])
        for block in config.vision:
            linear = method.projections[str(block)]
            vectors = method.prompts[str(block)] @ linear.weight.t() + linear.bias
            free.vision[str(block)].copy_(vectors)
        start = method.first(backbone, "vision")
        images = backbone.images(some_images(shared_backbone()), [start])[start]
        for one, other in (
            (method.image_features(backbone, images), free.image_features(backbone, images)),
            *[[m.class_features(backbone, m.prepare(backbone, TASK)) for m in (method, free)]],
        ):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.placement)
def test_savings_change_neither_loss_nor_gradients(config: MaPLeConfig) -> None:
    saved, plain = (first_step(*built(config, savings)) for savings in (None, Savings.none()))
    assert_same_step(saved, plain)
    assert saved.keys() == {"loss", *dict(built(config)[0].named_parameters())}


def test_vectors_that_only_a_projection_reads_are_no_prompts_of_the_text() -> None:
    method, backbone = built(MaPLeConfig((1, 2), (1,)))
    classes = method.prepare(backbone, TASK)
    with torch.no_grad():
        before = method.class_features(backbone, classes)
        method.prompts["2"].add_(1)
        assert torch.equal(method.class_features(backbone, classes), before)


def test_later_projections_start_from_one_draw_and_block_1_from_words() -> None:
    method, backbone = built(CONFIGS[0])
    first, second, third = (method.projections[block].weight for block in "123")
    assert torch.equal(second, third)
    assert not torch.equal(first, second)
    assert float(first.detach().abs().max()) <= 32**-0.5
    ids = backbone.tokens(["a photo"])[0, 1:3]
    assert torch.equal(method.prompts["1"], backbone.clip.token_embedding.weight[ids])


def test_the_published_placement_has_the_published_number_of_parameters() -> None:
    config = load_recipe("published", "maple").method
    assert isinstance(config, MaPLeConfig)
    assert config == MaPLeConfig.published({"vision": 12, "text": 12})
    blocks = len(config.vision)
    assert blocks * (config.length * 512 + 512 * 768 + 768) == 3_555_072
    assert MaPLeConfig.published({"vision": 24, "text": 4}).placement == "v1-3,t1-3"
