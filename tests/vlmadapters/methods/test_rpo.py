"""RPO against masked attention over whole sequences, its records, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import shared_backbone, some_images
from stepping import TASK, assert_same_step, built, first_step, moved
from torch import Tensor
from torch.nn import functional as F

from vlmadapters.clip.savings import Savings
from vlmadapters.data.task import Task
from vlmadapters.files import load_official, save_official
from vlmadapters.methods.deep_configs import RPOConfig
from vlmadapters.methods.rpo import RPO
from vlmlayers.errors import UserError

CONFIGS = [
    RPOConfig((1, 2, 3), (1, 2, 3), pairs=3),
    RPOConfig((1, 2, 3), (1, 2, 3), pairs=1),
    RPOConfig((2, 3), (3,), pairs=2),
    RPOConfig((1, 3), (1, 3), pairs=4),
]


def masked(blocks: Any, x: Tensor, prompts: Tensor, at: Any, chosen: Any, mask: Tensor) -> Tensor:
    """Run blocks over sequences in which prompts stand at some positions, hidden from all rows."""
    x = x.clone()
    x[at] = prompts.flatten(0, 1)
    for number, block in enumerate(blocks, 1):
        heads = mask.repeat_interleave(block.attn.num_heads, 0)
        out = block(x, attn_mask=heads)
        if number not in chosen:
            out[at] = x[at]
        x = out
    return x[at].view_as(prompts)


def plain_features(method: RPO, clip: Any, images: Tensor, tokens: Tensor) -> list[Tensor]:
    """Both towers' features by the sheet's masks, over open_clip's own blocks."""
    visual, config, hidden = clip.visual, method.config, float("-inf")
    x = visual.conv1(images).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1)
    x = x + visual.positional_embedding
    count, own, pairs = *x.shape[:2], config.pairs
    prompts = method.img_prompt if 1 not in config.vision else visual.ln_pre(method.img_prompt)
    x = torch.cat([visual.ln_pre(x), x.new_zeros(count, pairs, x.shape[2])], 1)
    mask = torch.zeros(count, own + pairs, own + pairs)
    mask[:, :, own:] = hidden
    at = torch.zeros(count, own + pairs, dtype=torch.bool)
    at[:, own:] = True
    blocks = visual.transformer.resblocks
    found = masked(blocks, x, prompts.expand(count, -1, -1), at, config.vision, mask)
    y = clip.token_embedding(tokens) + clip.positional_embedding
    mask = clip.attn_mask.expand(len(y), -1, -1).clone()
    at = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, end in enumerate(tokens.argmax(1).tolist()):
        mask[row, :, end + 1 :] = hidden
        at[row, end + 1 : end + 1 + pairs] = True
    texts = method.text_prompt.expand(len(y), -1, -1)
    read = masked(clip.transformer.resblocks, y, texts, at, config.text, mask)
    return [visual.ln_post(found) @ visual.proj, clip.ln_final(read) @ clip.text_projection]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.placement} {c.pairs}")
def test_loss_and_gradients_are_those_of_masked_attention_over_all_tokens(
    config: RPOConfig,
) -> None:
    method, backbone = built(config)
    found = first_step(moved(method, 0.3), backbone)
    other, _ = built(config)
    shape = backbone.vision.tower.example(4).shape
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    names = [name.replace("_", " ") for name in TASK.class_names]
    tokens = backbone.tokens([f"a photo of a {name}." for name in names])
    pairs = plain_features(moved(other, 0.3), backbone.clip, images, tokens)
    cosines = torch.einsum("ikd,ckd->ick", *(F.normalize(x, dim=-1) for x in pairs)).mean(-1)
    loss = F.cross_entropy(backbone.clip.logit_scale.exp() * cosines, torch.arange(4) % 3)
    loss.backward()
    gradients = {name: value.grad for name, value in other.named_parameters()}
    assert_same_step(found, {"loss": loss.detach(), **gradients})


@pytest.mark.parametrize("config", CONFIGS[::2], ids=lambda c: c.placement)
def test_savings_change_neither_loss_nor_gradients(config: RPOConfig) -> None:
    saved, plain = (first_step(*built(config, savings)) for savings in (None, Savings.none()))
    assert_same_step(saved, plain)


def test_only_queries_of_the_prompts_have_a_graph() -> None:
    method, backbone = built(CONFIGS[0])
    start = method.first(backbone, "vision")
    images = backbone.images(some_images(shared_backbone(), 8), [start])[start]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        method.image_features(backbone, images)
    per_token = [shape for shape in kept if len(shape) == 3 and shape[1] == images.length]
    assert not per_token


def test_prompts_start_near_the_embeddings_of_end_of_text_and_class_token() -> None:
    method, backbone = built(CONFIGS[0])
    clip = backbone.clip
    starts = (clip.token_embedding.weight[49407], clip.visual.class_embedding)
    for prompts, start in zip((method.text_prompt, method.img_prompt), starts):
        lengths = (prompts - start).norm(dim=-1)
        torch.testing.assert_close(lengths, torch.full((3,), 0.1))
    assert method.parameter_count() == 3 * (32 + 64)


def test_underscores_of_names_stay_as_published_only() -> None:
    task, spaced = Task(("golden_retriever", "cat")), Task(("golden retriever", "cat"))
    for as_published in (False, True):
        method, backbone = built(RPOConfig((1,), (1,), as_published=as_published))
        with torch.no_grad():
            one, other = (
                method.class_features(backbone, method.prepare(backbone, some))
                for some in (task, spaced)
            )
        assert torch.allclose(one, other) is not as_published


def test_a_text_without_room_for_the_prompts_says_how_many_fit() -> None:
    task = Task(("cat", "cat " * 40))
    method, backbone = built(RPOConfig((1,), (1,), pairs=60))
    method.prepare(backbone, TASK)
    with pytest.raises(UserError, match=r"leaves 30 of 77 tokens .* use 30 pairs at most"):
        method.prepare(backbone, task)
    fitting, _ = built(RPOConfig((1,), (1,), pairs=30))
    fitting.prepare(backbone, task)
    with pytest.raises(UserError, match="use 30 pairs at most"):
        built(RPOConfig((1,), (1,), pairs=31))[0].prepare(backbone, task)


@pytest.mark.parametrize("family", ["layer scale, custom blocks", "timm ViT, average pool"])
def test_towers_without_standard_blocks_are_refused(family: str) -> None:
    with pytest.raises(UserError, match="rpo reads inside open_clip's standard blocks"):
        built(CONFIGS[1], family=family)


def test_a_file_does_not_say_at_which_blocks_it_reads(tmp_path: Path) -> None:
    model, path = shared_backbone(), save_official(tmp_path / "a.pth.tar", built(CONFIGS[0])[0])
    with pytest.raises(UserError, match="12"):  # those of ViT-B/16
        load_official(path, model, method="rpo")
