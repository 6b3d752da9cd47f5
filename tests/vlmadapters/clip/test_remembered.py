"""Casts and masks are worked out once, change no bit, and follow a tensor that changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbones import shared_backbone, some_images
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vlmadapters.clip.arithmetic import mix
from vlmadapters.clip.frozen import Backbone
from vlmadapters.clip.products import frozen_linear
from vlmadapters.clip.remembered import is_causal, lowered, scaled

INFINITY = float("inf")


class Casts(TorchDispatchMode):
    """Notes the sizes of what is cast."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[torch.Size] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.overloadpacket.__name__ == "_to_copy":
            self.sizes.append(args[0].shape)
        return function(*args, **(kwargs or {}))


def low() -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.fixture
def weight() -> torch.Tensor:
    return nn.Parameter(torch.randn(6, 4), requires_grad=False)


def test_a_frozen_weight_is_cast_once_and_to_the_same_bits(weight: torch.Tensor) -> None:
    x, bias = torch.randn(3, 4), torch.randn(6)
    with low():
        expected = F.linear(x, weight, bias)
        assert torch.equal(frozen_linear(x, weight, bias), expected)
        assert lowered(weight) is lowered(weight)
    assert lowered(weight) is weight


@pytest.mark.parametrize("change", ["in place", "its data"])
def test_a_weight_that_changes_is_cast_again(weight: torch.Tensor, change: str) -> None:
    with low():
        before = lowered(weight)
        if change == "in place":
            weight.mul_(2)
        else:
            weight.data = weight * 2
        assert torch.equal(lowered(weight), 2 * before)


def test_a_product_with_a_number_is_made_once_and_follows_the_tensor(weight: torch.Tensor) -> None:
    assert scaled(weight, 1.0) is weight
    assert scaled(weight, 2.0) is scaled(weight, 2.0)
    assert torch.equal(scaled(weight, 3.0), 3 * weight)
    weight.mul_(2)
    assert torch.equal(scaled(weight, 3.0), 3 * weight)


def test_trained_and_half_weights_are_left_to_autocast(weight: torch.Tensor) -> None:
    trained, half = nn.Parameter(weight.clone()), weight.half()
    with low():
        assert lowered(trained) is trained
        assert lowered(half) is half


def test_what_a_test_cast_can_be_trained_with(weight: torch.Tensor) -> None:
    x = torch.randn(3, 4, requires_grad=True)
    with low():
        with torch.inference_mode():
            lowered(weight)
        frozen_linear(x, weight, None).sum().backward()
    assert x.grad is not None


def test_a_walk_under_autocast_casts_no_weight_of_a_block_twice() -> None:
    model = shared_backbone()
    model.clip.requires_grad_(False)
    backbone, images = Backbone(model.clip), some_images(model, 2)
    weights = {p.shape for block in backbone.vision.tower.blocks for p in block.parameters()}

    def features() -> torch.Tensor:
        with torch.no_grad(), low():
            return backbone.features("vision", backbone.images(images, [1])[1])

    first = features()
    with Casts() as casts:
        assert torch.equal(features(), first)
    matrices = {shape for shape in weights if len(shape) == 2}
    assert not matrices & set(casts.sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_a_causal_mask_has_the_bits_of_the_additive_one(dtype: torch.dtype) -> None:
    mask = torch.full((9, 9), -INFINITY).triu(1)
    q, k, v = (torch.randn(5, 9, 32, dtype=dtype, requires_grad=True) for _ in range(3))
    heads = [one.unflatten(-1, (4, 8)).transpose(1, 2) for one in (q, k, v)]
    plain = F.scaled_dot_product_attention(*heads, attn_mask=mask.to(dtype))
    expected = plain.transpose(1, 2).flatten(2)
    found = mix(q, k, v, 4, mask)
    assert torch.equal(found, expected)
    for a, b in zip(*(torch.autograd.grad(out.sum(), (q, k, v)) for out in (found, expected))):
        assert torch.equal(a, b)


def test_masks_are_told_apart() -> None:
    causal = torch.full((4, 4), -INFINITY).triu(1)
    assert is_causal(causal) and is_causal(causal)
    others = {
        "hides itself too": torch.full((4, 4), -INFINITY).triu(),
        "hides nothing": torch.zeros(4, 4),
        "biased": causal + torch.eye(4),
        "of single queries": causal[:2],
        "of items and heads": causal[None, None],
        "boolean": torch.ones(4, 4, dtype=torch.bool).tril(),
    }
    assert not [name for name, mask in others.items() if is_causal(mask)]
    causal[0, 0] = 1.0
    assert not is_causal(causal)
