"""CLIP-LoRA against merged weights, its records, and what it refuses."""

from __future__ import annotations

from copy import deepcopy
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import stepping
import torch
from backbones import shared_backbone, some_images
from stepping import TASK, assert_same_step, first_step, moved, step_of
from torch.nn import functional as F

from vlmadapters.clip.savings import Savings
from vlmadapters.files import load_official
from vlmadapters.methods.cliplora import CLIPLoRA
from vlmadapters.methods.deep_configs import CLIPLoRAConfig
from vlmadapters.training.optimization import learning_rate
from vlmadapters.training.recipes import load_recipe
from vlmlayers.errors import UserError

ROWS = {"q": 0, "k": 1, "v": 2}
CONFIGS = [
    CLIPLoRAConfig((1, 2, 3), (1, 2, 3), dropout=0.0),
    CLIPLoRAConfig((2,), (3,), dropout=0.0, matrices=("o", "q"), rank=3, alpha=2.0),
    CLIPLoRAConfig((1, 3), (), dropout=0.0, matrices=("v",)),
    CLIPLoRAConfig((), (2, 3), dropout=0.0, matrices=("k", "v", "o")),
]


def built(config: CLIPLoRAConfig, savings: Savings | None = None, family: str = "clip") -> Any:
    """Return the method with changes that are not zero, and its backbone."""
    method, backbone = stepping.built(config, savings, family)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in method.named_parameters():
            if name.endswith("up"):
                value.normal_(0, 0.1, generator=generator)
    return method, backbone


def merged(method: CLIPLoRA, clip: Any) -> Any:
    """Return a copy of a CLIP with the changes added to its weights."""
    clip, config = deepcopy(clip), method.config
    scale = config.alpha / sqrt(config.rank)
    for tower, blocks in (
        ("text", clip.transformer.resblocks),
        ("vision", clip.visual.transformer.resblocks),
    ):
        for number in getattr(config, tower):
            attention = blocks[number - 1].attn
            for matrix in config.matrices:
                prefix = f"{tower}.{number}.{matrix}"
                up, down = (method.get_parameter(f"{prefix}.{one}") for one in ("up", "down"))
                weight = attention.out_proj.weight
                if matrix in ROWS:
                    weight = attention.in_proj_weight.chunk(3)[ROWS[matrix]]
                weight.add_(scale * up @ down)
    return clip


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.placement)
@pytest.mark.parametrize("family", ["clip", "gelu, average pool", "depths differ"])
@torch.no_grad()
def test_logits_are_those_of_a_clip_with_the_changes_merged(
    config: CLIPLoRAConfig, family: str
) -> None:
    if family == "depths differ":
        config = config.with_placement(config.vision, [b for b in config.text if b < 3])
        if not (config.vision or config.text):
            return
    for savings in (None, Savings.none()):
        method, backbone = built(config, savings, family)
        images, clip = some_images(shared_backbone(family)), merged(method, backbone.clip)
        texts = backbone.tokens([f"a photo of a {n}." for n in ("cat", "golden retriever", "bus")])
        v, t = (F.normalize(one) for one in (clip.encode_image(images), clip.encode_text(texts)))
        start = method.first(backbone, "vision")
        found = method.eval().logits(
            backbone,
            method.image_features(backbone, backbone.images(images, [start])[start]),
            method.class_features(backbone, method.prepare(backbone, TASK)),
        )
        torch.testing.assert_close(found, 100 * v @ t.T, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.placement)
def test_savings_change_neither_loss_nor_gradients(config: CLIPLoRAConfig) -> None:
    saved, plain = (first_step(*built(config, savings)) for savings in (None, Savings.none()))
    assert_same_step(saved, plain)


def test_savings_change_nothing_under_the_same_dropout() -> None:
    config = CLIPLoRAConfig((1, 3), (2, 3), dropout=0.4, matrices=("q", "k", "v", "o"))
    generator = torch.Generator().manual_seed(0)
    names = CLIPLoRA.build(config, built(config)[1], TASK).official_names().values()
    draws = {}
    for name in {name.rpartition(".")[0] for name in names}:
        shape = (17, 4, 64) if name.startswith("visual") else (77, 3, 32)
        draws[name] = torch.rand(shape, generator=generator) > 0.4
    saved, plain = (
        first_step(*built(config, savings), draws=draws) for savings in (None, Savings.none())
    )
    assert_same_step(saved, plain)
    none = first_step(*built(config))
    assert not torch.allclose(none["loss"], saved["loss"])


def test_dropout_follows_the_steps_generator_and_keeps_the_mean() -> None:
    config = CLIPLoRAConfig((1,), (), dropout=0.25, matrices=("v",), alpha=4.0)
    method, backbone = built(config)
    before = torch.get_rng_state()
    losses = [float(method.loss(step_of(method, backbone))) for _ in range(2)]
    assert losses[0] == losses[1]
    step = step_of(method, backbone)
    many = torch.tensor([float(method.loss(step)) for _ in range(200)])
    assert len(set(many.tolist())) > 100
    with torch.no_grad():
        expected = float(method.eval().loss(step))
    assert abs(float(many.mean()) - expected) < 4 * float(many.std()) / sqrt(200) + 0.02
    assert torch.equal(before, torch.get_rng_state())


def test_without_dropout_gradients_are_those_of_differences_and_as_published_not() -> None:
    config = CLIPLoRAConfig((1, 2), (), dropout=0.0)
    method, backbone = built(config)
    step = step_of(method, backbone)
    backbone.clip.requires_grad_(False)

    def slope(value: torch.nn.Parameter, direction: torch.Tensor, size: float = 1e-2) -> float:
        losses = []
        with torch.no_grad():
            for sign in (1, -1):
                value += sign * size * direction
                losses.append(float(method.loss(step)))
                value -= sign * size * direction
        return (losses[0] - losses[1]) / (2 * size)

    method.loss(step).backward()
    value = method.get_parameter("vision.1.v.up")
    gradient = value.grad.clone()
    direction = gradient / gradient.norm()
    assert slope(value, direction) == pytest.approx(float(gradient.norm()), rel=0.02)
    theirs, _ = built(CLIPLoRAConfig((1, 2), (), dropout=0.0, as_published=True))
    loss = theirs.loss(step)
    loss.backward()
    assert float(loss) == pytest.approx(float(method.loss(step)))
    for block, same in (("1", False), ("2", True)):
        pair = [one.get_parameter(f"vision.{block}.v.up").grad for one in (method, theirs)]
        assert torch.allclose(*pair, rtol=1e-4, atol=1e-6) == same


def test_the_start_is_clip() -> None:
    for name, value in stepping.built(CONFIGS[0])[0].named_parameters():
        bound = value.shape[1] ** -0.5 if name.endswith("down") else 0.0
        assert 0.8 * bound <= float(value.detach().abs().max()) <= bound


def test_the_recipe_has_the_published_size_and_schedule() -> None:
    recipe = load_recipe("published", "cliplora")
    config, train = recipe.method, recipe.train
    assert isinstance(config, CLIPLoRAConfig)
    widths = 768 * len(config.vision) + 512 * len(config.text)
    assert 2 * config.rank * len(config.matrices) * widths == 184_320
    rates = [learning_rate(train, step, 8000, 8000) for step in (0, 4000, 8000)]
    assert rates == pytest.approx([2e-4, (2e-4 + 1e-6) / 2, 1e-6])


def test_files_of_the_authors_are_read_by_the_names_of_their_positions() -> None:
    def content(encoder: str, position: str, layers: int) -> dict[str, Any]:
        part = {"w_lora_A": torch.zeros(2, 8), "w_lora_B": torch.zeros(8, 2)}
        told = {"r": 2, "alpha": 1, "encoder": encoder, "params": ["q"], "position": position}
        weights = {f"layer_{i}": {"q_proj": part} for i in range(layers)}
        return {"weights": weights, "metadata": told}

    for encoder, position, layers, placement in (
        ("both", "all", 24, "v1-12,t1-12"),
        ("both", "all", 36, "v1-24,t1-12"),
        ("text", "mid", 4, "v-,t5-8"),
        ("text", "bottom", 4, "v-,t1-4"),
        ("both", "up", 8, "v9-12,t9-12"),
        ("both", "half-bottom", 12, "v1-6,t1-6"),
        ("both", "half-bottom", 18, "v1-12,t1-6"),
        ("both", "half-up", 18, "v13-24,t7-12"),
        ("vision", "half-up", 12, "v13-24,t-"),
        ("vision", "top3", 3, "v10-12,t-"),
    ):
        state = CLIPLoRA.official_state(content(encoder, position, layers), "a.pt")
        assert CLIPLoRA.config_of_official(state, "a.pt").placement == placement
    for encoder, position, layers in (("both", "mid", 7), ("both", "middle", 8)):
        with pytest.raises(UserError, match=r"a.pt is not a CLIP-LoRA file"):
            CLIPLoRA.official_state(content(encoder, position, layers), "a.pt")


def test_weights_alone_are_read_without_what_they_were_trained_by(tmp_path: Path) -> None:
    path, saved = tmp_path / "a.pt", moved(built(CONFIGS[1])[0], 0.1).official_state_dict()
    torch.save(saved, path)
    read = load_official(path, shared_backbone(), CONFIGS[1]).official_state_dict()
    assert read.keys() == saved.keys() and all(torch.equal(read[key], saved[key]) for key in saved)


def test_hooks_cannot_attach_it_and_export_can_merge_it() -> None:
    method, backbone = built(CONFIGS[2])
    with pytest.raises(UserError, match="CLIP-LoRA .* `vlmlayers export` merges it into weights"):
        method.attached(backbone.clip)
    assert method.merged(backbone)


def test_blocks_of_another_kind_are_refused() -> None:
    method, backbone = built(CONFIGS[2], family="layer scale, custom blocks")
    with pytest.raises(UserError, match="not open_clip's standard"):
        first_step(method, backbone)
