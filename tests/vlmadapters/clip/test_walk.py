"""Walking through a tower gives what its own forward gives, and its gradients."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from backbones import FAMILIES, backbone, config, shared_backbone, some_images, some_tokens
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

from vlmadapters.clip.arithmetic import at, feed_forward, is_standard
from vlmadapters.clip.frozen import Backbone
from vlmadapters.clip.logits import class_logits, scaled_cosines
from vlmadapters.clip.savings import Savings
from vlmadapters.clip.walk import Inside
from vlmadapters.methods.mma.config import MMAConfig
from vlmadapters.methods.mma.module import attach
from vlmlayers.models.load import build_clip
from vlmlayers.positions import TOWERS


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_of_the_walk_are_those_of_the_hooks(family: str) -> None:
    model = shared_backbone(family)
    images, tokens = some_images(model), some_tokens(model)
    depth = min(tower.depth for tower in model.towers.values())
    with attach(model.clip, MMAConfig.span(2, depth, scale=0.5)) as mma:
        expected = class_logits(model.clip, images, tokens)
        expected.square().sum().backward()
        gradients = {k: p.grad.clone() for k, p in mma.named_parameters() if p.grad is not None}
    mma.zero_grad()
    walk = Backbone(model.clip)
    assert walk.steps
    start = {t: mma.first(walk, t) for t in ("vision", "text")}
    logits = walk.logits(
        walk.images(images, [start["vision"]])[start["vision"]],
        walk.prompts(tokens, [start["text"]])[start["text"]],
        mma,
    )
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)
    logits.square().sum().backward()
    for key, parameter in mma.named_parameters():
        if key in gradients:
            error = (parameter.grad - gradients[key]).norm() / gradients[key].norm()
            assert error < 1e-4, key


@pytest.mark.parametrize("savings", [Savings(), Savings.none()], ids=["all", "none"])
def test_a_method_may_act_inside_a_block_and_beside_it(savings: Savings) -> None:
    """What it computes inside is the block itself here, so that only what is beside changes."""
    model = shared_backbone()
    images, tokens = some_images(model), some_tokens(model)
    with attach(model.clip, MMAConfig.span(1, 3, scale=0.5)) as mma, torch.no_grad():
        expected = class_logits(model.clip, images, tokens)
    seen = []

    class Both:
        before, beside, reads_norm = mma.before, mma.beside, mma.reads_norm

        @staticmethod
        def inside(tower: str, block: int) -> Inside:
            def whole(
                module: nn.Module, x: Tensor, mask: Tensor | None, rows: Tensor | None
            ) -> Tensor:
                seen.append((tower, block, rows is None))
                out = module(x, attn_mask=mask)
                return out if rows is None else at(out, rows)

            return whole

    walk = Backbone(model.clip, savings)
    with torch.no_grad():
        states = walk.images(images, [1])[1], walk.prompts(tokens, [1])[1]
        features = [walk.walks[state].finish(one, Both()) for state, one in zip(TOWERS, states)]
        found = scaled_cosines(model.clip, *features)
        plain = class_logits(model.clip, images, tokens)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert (found - plain).abs().max() > 0.1
    assert seen == [
        (tower, block, block < 3 or not savings.last_token)
        for tower in TOWERS
        for block in (1, 2, 3)
    ]


def test_towers_of_one_block_are_walked() -> None:
    clip = build_clip(config({"layers": 1}, {"layers": 1}))
    walk, images = Backbone(clip), some_images(shared_backbone())
    assert walk.steps
    with torch.no_grad():
        expected = clip.encode_image(images)
        for state in walk.images(images, [1, 2]).values():
            found = walk.features("vision", state)
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def test_tokens_can_be_appended_where_blocks_are_given_tokens_alone() -> None:
    plain = Backbone(shared_backbone().clip)
    assert plain.vision.takes_more and not plain.text.takes_more, "a mask has a size of its own"
    rotary = Backbone(shared_backbone("timm EVA").clip)
    assert rotary.steps and not rotary.vision.takes_more


def test_room_behind_prompts_is_kept_for_a_method_that_asks_for_it() -> None:
    model = shared_backbone()
    tokens = some_tokens(model)
    longest = int(tokens.argmax(-1).max()) + 1
    for margin, columns in ((0, longest), (3, longest + 3), (100, 77)):
        state = Backbone(model.clip).prompts(tokens, [2], margin)[2]
        assert state.x is not None and state.inputs.shape[1] == columns == state.x.shape[1]


def test_logits_are_scaled_cosines_and_the_bias_of_sigmoid_losses() -> None:
    clip = SimpleNamespace(logit_scale=torch.tensor(2.0).log(), logit_bias=torch.tensor(-3.0))
    images, texts = torch.tensor([[5.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, -4.0]])
    expected = torch.tensor([[2 - 3, 0 - 3, 2 * 0.6 - 3]])
    torch.testing.assert_close(scaled_cosines(clip, images, texts), expected)


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_fused_perceptron_rounds_no_more_than_the_blocks_own_under_autocast(
    dtype: torch.dtype, quick: bool
) -> None:
    block = backbone("clip").towers["vision"].blocks[0]
    block.requires_grad_(False)
    block.mlp.gelu = QuickGELU() if quick else nn.GELU()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 50, block.ln_2.normalized_shape[0], generator=generator, requires_grad=True)
    weights = torch.randn(x.shape, generator=generator)

    def run(fused: bool, low: bool) -> torch.Tensor:
        with torch.autocast("cpu", dtype=dtype, enabled=low):
            out = feed_forward(block, x, fused=fused)
        (gradient,) = torch.autograd.grad(out, x, weights)
        assert out.dtype == gradient.dtype == torch.float32
        return torch.stack([out - x, gradient - weights]).detach()

    exact = run(False, False)
    own, fused = ((run(way, True) - exact).flatten(1).norm(dim=1) for way in (False, True))
    assert (fused > 0).all() and (fused < 1.1 * own).all()


def test_standard_blocks_are_recognised_and_others_left_to_themselves() -> None:
    def first(name: str) -> bool:
        return is_standard(shared_backbone(name).towers["vision"].blocks[0])

    assert first("clip")
    assert not first("layer scale, custom blocks")
    assert not first("timm EVA")


def test_a_backbone_that_cannot_be_taken_apart_runs_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shared_backbone()
    images, tokens = some_images(model), some_tokens(model)
    monkeypatch.setattr("vlmadapters.clip.walk.Walk.agrees", lambda self: False)
    walk = Backbone(model.clip, Savings())
    with attach(model.clip, MMAConfig.span(2, 3, scale=0.5)) as mma, torch.no_grad():
        expected = class_logits(model.clip, images, tokens)
    with torch.no_grad():
        found = walk.logits(walk.images(images, [2])[2], walk.prompts(tokens, [2])[2], mma)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_prompts_are_cut_after_the_longest_end_of_text() -> None:
    model = shared_backbone()
    tokens = some_tokens(model)
    state = Backbone(model.clip).prompts(tokens, [2])[2]
    assert state.x is not None
    assert state.x.shape[1] == int(tokens.argmax(-1).max()) + 1 < 77
    whole = Backbone(model.clip, Savings(cut_prompts=False)).prompts(tokens, [2])[2]
    assert whole.x is not None
    assert whole.x.shape[1] == 77


@pytest.mark.parametrize("family", FAMILIES)
def test_without_an_adapter_the_walk_gives_the_models_own_features(family: str) -> None:
    model = shared_backbone(family)
    images, tokens = some_images(model), some_tokens(model)
    walk = Backbone(model.clip)
    with torch.no_grad():
        expected = model.clip.encode_image(images), model.clip.encode_text(tokens)
        for kind, inputs, feature in zip(("vision", "text"), (images, tokens), expected):
            depth = getattr(walk, kind).tower.depth
            states = (walk.images if kind == "vision" else walk.prompts)(
                inputs, range(1, depth + 2)
            )
            assert sorted(states) == list(range(1, depth + 2))
            for state in states.values():
                found = walk.features(kind, state, None)
                torch.testing.assert_close(found, feature, atol=2e-5, rtol=1e-5)
