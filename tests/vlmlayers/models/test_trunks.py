"""Image models alone: timm, transformers and DINO, each against the states that it tells itself."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
import transformers
import transformers_models
from torch import nn

from vlmlayers.errors import UserError
from vlmlayers.models import Recorder, find_towers

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 8}


class Dino(nn.Module):
    """What DINO's authors publish, in its parts: class token, registers, blocks, norm."""

    def __init__(self, registers):
        super().__init__()
        self.embed_dim, self.num_register_tokens = 16, registers
        self.patch_embed = nn.Conv2d(3, 16, 8, 8)
        self.patch_embed.img_size = (32, 32)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 16))
        self.register_tokens = nn.Parameter(torch.randn(1, registers, 16))
        layer = {"d_model": 16, "nhead": 2, "dim_feedforward": 32, "batch_first": True}
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(**layer) for _ in range(3))
        self.norm = nn.LayerNorm(16)

    def states(self, x):
        patches = self.patch_embed(x).flatten(2).mT
        special = torch.cat([self.cls_token, self.register_tokens], 1).expand(len(x), -1, -1)
        found = [torch.cat([special, patches], 1)]
        for block in self.blocks:
            found.append(block(found[-1]))
        return found

    def forward(self, x):
        return self.norm(self.states(x)[-1])[:, 0]


def moved(model):
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    return model.eval()


def hugging_face(name, **more):
    config = getattr(transformers, f"{name}Config")(image_size=32, **SIZES, **more)
    return moved(getattr(transformers, f"{name}Model")(config))


def hidden(model, x):
    return model(pixel_values=x, output_hidden_states=True).hidden_states


def intermediates(model, x):
    options = {"output_fmt": "NLC", "return_prefix_tokens": True}
    found = model.forward_intermediates(x, intermediates_only=True, **options)
    return [None, *(torch.cat([special, patches], 1) for patches, special in found)]


MODELS = {
    "timm": (lambda: moved(timm.create_model("test_vit", num_classes=0)), 1, intermediates),
    "timm, with classes": (lambda: moved(timm.create_model("test_vit2")), None, None),
    "timm stages": (lambda: moved(timm.create_model("test_convnext")), None, None),
    "DINOv2": (lambda: hugging_face("Dinov2"), 1, hidden),
    "registers": (lambda: hugging_face("Dinov2WithRegisters", num_register_tokens=2), 3, hidden),
    "ViT": (lambda: hugging_face("ViT"), 1, hidden),
    "CLIP": (lambda: hugging_face("CLIPVision", intermediate_size=64), 1, hidden),
    "Siglip": (lambda: hugging_face("SiglipVision", intermediate_size=64), 0, hidden),
    "MSN": (lambda: hugging_face("ViTMSN"), 1, hidden),
    "DINO": (lambda: moved(Dino(2)), 3, lambda m, x: m.states(x)),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_an_image_model_alone_has_a_vision_tower_and_its_own_states(name):
    build, prefix, states = MODELS[name]
    model = build()
    towers = find_towers(model)
    assert list(towers) == ["vision"]
    tower = towers["vision"]
    side = tower.example(1).shape[-1]
    x = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(2))
    recorder = Recorder(tower, ("native", "normed", "joint"))
    assert list(recorder.shapes()) == ["native", "normed"]  # there is nothing to be joint with
    with recorder:
        found = recorder(x)
    assert list(found["native"]) == ["embed", *map(str, range(1, tower.depth + 1)), "final"]
    if states is None:
        return
    assert tower.prefix == prefix
    with torch.inference_mode():
        known = states(model, x)
    for position, state in zip(("embed", "1", "2"), known):
        if state is not None:
            picked = state[:, 0] if tower.pooling == "cls" else state.mean(1)
            np.testing.assert_allclose(found["native"][position], picked.numpy(), atol=2e-5)
    with Recorder(tower, ("native",), "mean") as mean:
        patches = mean(x)["native"]["2"]
    np.testing.assert_allclose(patches, known[2][:, prefix:].mean(1).numpy(), atol=2e-5)


def test_final_is_what_the_model_gives_out():
    model = hugging_face("Dinov2")
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode(), Recorder(find_towers(model)["vision"]) as recorder:
        final = recorder(x)["native"]["final"]
        np.testing.assert_allclose(final, model(x).pooler_output.numpy(), atol=2e-5)


def test_joint_alone_is_refused_where_there_is_none():
    with pytest.raises(UserError, match=r"no joint embedding; ask for native or normed"):
        Recorder(find_towers(Dino(0))["vision"], ("joint",))


@pytest.mark.parametrize("name", ["levit_128s", "efficientformerv2_s0"])
def test_stages_are_averaged_over_places_whatever_the_order_of_their_axes(name):
    """Stages of LeViT give tokens, of the other maps; widths are those that timm tells itself."""
    model = moved(timm.create_model(name))
    tower = find_towers(model)["vision"]
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(2))
    seen = []
    hooks = [b.register_forward_hook(lambda _m, _a, out: seen.append(out)) for b in tower.blocks]
    with torch.inference_mode():
        own = model.forward_head(model.forward_features(x), pre_logits=True)
    for hook in hooks:
        hook.remove()
    with Recorder(tower, ("native",)) as recorder:
        found = recorder(x)["native"]
    for block, (out, told) in enumerate(zip(seen, model.feature_info), start=1):
        assert tower.widths[str(block)] == told["num_chs"]
        axes = 1 if out.ndim == 3 else (2, 3)
        np.testing.assert_allclose(found[str(block)], out.mean(axes), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found["final"], own, rtol=1e-3, atol=1e-5)


def test_a_mean_that_takes_in_the_class_token_is_the_models_own_pool():
    model = moved(timm.create_model("test_vit", global_pool="avg", pool_include_prefix=True))
    tower = find_towers(model)["vision"]
    assert tower.pooling == "model" and tower.token_pooling == "mean"
    x = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        tokens = model.forward_features(x)
        own = model.forward_head(tokens, pre_logits=True)
        torch.testing.assert_close(tower.norm_after(tower.attend(tokens)), own)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cait_xxs24_224", {"depth": 2}, "is not the model's own pooled feature"),
        ("crossvit_tiny_240", {}, "gives out list, not one tensor"),
        ("naflexvit_base_patch16_map", {"depth": 1}, "a map pool that is not known"),
    ],
)
def test_trunks_of_other_makes_are_refused_in_a_line(name, options, message):
    with pytest.raises(UserError, match=message):
        Recorder(find_towers(moved(timm.create_model(name, **options)))["vision"]).shapes()


def test_a_mixer_has_no_norm_after_its_pool():
    model = moved(timm.create_model("mixer_s32_224"))
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode(), Recorder(find_towers(model)["vision"]) as recorder:
        own = model.forward_head(model.forward_features(x), pre_logits=True)
        np.testing.assert_allclose(recorder(x)["native"]["final"], own, rtol=1e-3, atol=1e-5)


def test_models_whose_passes_are_random_or_of_another_kind_are_refused():
    """A masked autoencoder would give other features each time, of a quarter of the patches."""
    masked = hugging_face("ViTMAE")
    with pytest.raises(UserError, match=r"a random part of the patches .*mask_ratio to 0"):
        find_towers(masked)
    masked.config.mask_ratio = 0.0
    tower = find_towers(masked)["vision"]
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    found = []
    for _ in range(2):
        with Recorder(tower) as recorder:
            found.append(recorder(x)["native"])
    for position, values in found[0].items():
        np.testing.assert_allclose(values, found[1][position], atol=1e-4)
    config = transformers.Siglip2VisionConfig(**SIZES, intermediate_size=64, num_patches=16)
    with pytest.raises(UserError, match="give the whole Siglip2Model"):
        find_towers(transformers.Siglip2VisionModel(config))
    two = transformers_models.build("CLIP")
    del two.vision_model.post_layernorm
    with pytest.raises(UserError, match="has no post_layernorm: known are CLIPModel"):
        find_towers(two)
