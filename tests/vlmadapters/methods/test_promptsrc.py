"""PromptSRC against its formulas, its records, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import shared_backbone
from stepping import assert_same_step, built, first_step, step_of
from torch.nn import functional as F

from vlmadapters.clip.savings import Savings
from vlmadapters.files import load_official, save_official
from vlmadapters.methods.deep_configs import PromptSRCConfig
from vlmadapters.methods.promptsrc import default_templates
from vlmadapters.training.recipes import load_recipe
from vlmlayers.errors import UserError

TEMPLATES = ("a photo of a {}.", "the origami {}.", "art of the {}.")
CONFIGS = [
    PromptSRCConfig((1, 2), (1, 2), templates=TEMPLATES),
    PromptSRCConfig((2,), (2, 3), templates=TEMPLATES, vision_length=2, image_weight=3.0),
    PromptSRCConfig((), (1,), templates=TEMPLATES),
    PromptSRCConfig((3,), (), templates=TEMPLATES),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.placement)
@torch.no_grad()
def test_the_loss_holds_features_near_those_of_the_plain_clip(config: PromptSRCConfig) -> None:
    method, backbone = built(config)
    clip, step = backbone.clip, step_of(method, backbone)
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    f0 = F.normalize(clip.encode_image(images), dim=-1)
    names = ("cat", "golden retriever", "bus")
    t0 = torch.stack(
        [
            sum(clip.encode_text(backbone.tokens([t.format(name)]))[0] for t in TEMPLATES)
            for name in names
        ]
    )
    t0 = F.normalize(t0, dim=-1)
    f = F.normalize(method.image_features(backbone, step.images), dim=-1)
    t = F.normalize(method.class_features(backbone, step.classes), dim=-1)
    scale = clip.logit_scale.exp()
    p, p0 = ((scale * a @ b.T).softmax(-1) for a, b in ((f, t), (f0, t0)))
    expected = {
        "cross_entropy": -p[range(4), step.labels].log().mean(),
        "text": (t - t0).abs().sum() / t.numel(),
        "image": (f - f0).abs().sum() / f.numel(),
        "logits": (p0 * (p0.log() - p.log())).sum() / p.numel(),
    }
    found = method.loss_parts(step)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-6, rtol=1e-4)
    e = expected
    whole = e["cross_entropy"] + 25 * e["text"] + config.image_weight * e["image"] + e["logits"]
    torch.testing.assert_close(method.loss(step), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.placement)
def test_savings_change_neither_loss_nor_gradients(config: PromptSRCConfig) -> None:
    saved, plain = (first_step(*built(config, savings)) for savings in (None, Savings.none()))
    assert_same_step(saved, plain)


@torch.no_grad()
def test_what_remains_is_the_weighted_mean_of_all_epochs_also_when_taken_up_again() -> None:
    config = PromptSRCConfig((1, 2), (1,), centre=2.0, spread=0.7)
    method, _ = built(config)
    generator, seen = torch.Generator().manual_seed(0), []
    for epoch in (1, 2, 3):
        for value in method.parameters():
            value.add_(torch.randn(value.shape, generator=generator))
        seen.append(method.official_state_dict())
        version = method.version
        method.end_epoch(epoch, 3)
        if epoch < 3:
            assert all(torch.equal(v, seen[-1][k]) for k, v in method.official_state_dict().items())
            again, _ = built(config)
            again.load_state_dict(method.state_dict())
            method = again
    weights = [math.exp(-0.5 * ((e - 2.0) / 0.7) ** 2) for e in (1, 2, 3)]
    for key, value in method.official_state_dict().items():
        mean = sum(w * one[key] for w, one in zip(weights, seen)) / sum(weights)
        torch.testing.assert_close(value, mean, atol=1e-6, rtol=1e-5)
    assert method.version > version


def test_a_centre_far_beyond_the_last_epoch_keeps_the_last_prompts() -> None:
    method, _ = built(PromptSRCConfig((), (1,), centre=1000.0, spread=0.5))
    before = method.official_state_dict()
    method.end_epoch(1, 2)
    with torch.no_grad():
        method.text["1"] += 1
    method.end_epoch(2, 2)
    found = method.official_state_dict()["prompt_learner.ctx"]
    torch.testing.assert_close(found, before["prompt_learner.ctx"] + 1)


def test_the_published_templates_are_sixty_and_start_with_the_common_one() -> None:
    found = default_templates()
    assert len(found) == len(set(found)) == 60
    assert found[:3] == ("a photo of a {}.", "a bad photo of a {}.", "a photo of many {}.")


def test_recipes_have_the_published_sizes_and_values_of_their_datasets() -> None:
    sizes = {}
    for name in ("published", "transfer", "few-shot"):
        config = load_recipe(name, "promptsrc").method
        assert isinstance(config, PromptSRCConfig)
        sizes[name] = 4 * 768 * len(config.vision) + 4 * 512 * len(config.text)
    assert sizes == {"published": 46_080, "transfer": 15_360, "few-shot": 46_080}
    recipe = load_recipe("few-shot", "promptsrc")
    placed = recipe.at("v1,t2")
    found: Any = [placed.method_for(name) for name in ("eurosat", "food101")]
    assert [(one.centre, one.spread) for one in found] == [(45, 5), (30, 30)]
    assert {one.placement for one in found} == {"v1,t2"}
    own: Any = recipe.changed({}, {"centre": 3.0}).method_for("eurosat")
    assert (own.centre, own.spread) == (3, 5)
    assert PromptSRCConfig.published({"vision": 24, "text": 12}).placement == "v1-18,t1-9"


def test_settings_of_a_dataset_that_the_method_lacks_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('method = "promptsrc"\n[datasets.dtd]\nsettings = { center = 1.0 }\n')
    with pytest.raises(UserError, match=r"mine.toml: .*'center'.* 'centre'"):
        load_recipe(path)


def test_files_of_the_authors_hold_the_plain_tower_as_well(tmp_path: Path) -> None:
    model, (method, _) = shared_backbone(), built(CONFIGS[0])
    theirs = save_official(tmp_path / "theirs.pth.tar", method)
    content = torch.load(theirs, weights_only=True)
    content["state_dict"]["prompt_learner.ZS_image_encoder.proj"] = torch.zeros(2, 2)
    torch.save(content, theirs)
    assert load_official(theirs, model, method="promptsrc").config.placement == "v1-2,t1-2"
    with pytest.raises(UserError, match=r"has vision \(1, 2\), asked for is \(2,\)"):
        load_official(theirs, model, CONFIGS[1])
