"""Products with frozen weights, through the faster of the libraries that torch brings along.

On a CPU torch hands float32 matrices to MKL, which keeps its best code for processors of its own
maker: on an AMD EPYC oneDNN, which torch uses for other types, multiplies the same matrices in less
than half the time (benchmarks/training.py). The result is the same to float32 rounding.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@cache
def has_onednn() -> bool:
    """Return whether torch offers oneDNN's linear map and it multiplies as torch does."""
    if not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=generator) for s in ((2, 3, 8), (8, 16), (16,)))
    try:
        found = _onednn(x, weight.t(), bias)
    except (AttributeError, RuntimeError, TypeError):
        return False  # built without it, or by a torch whose operator has another signature
    return torch.allclose(found, F.linear(x, weight.t(), bias), atol=1e-5)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    made: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return made


def suits(x: Tensor, weight: Tensor) -> bool:
    """Return whether oneDNN can take a product: float32 on a CPU, outside autocast."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and has_onednn()
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None, onednn: bool) -> Tensor:
    """Return `x · weightᵀ + bias` without a graph.

    Args:
        x: (…, width in).
        weight: (width out, width in); may be a transposed view.
        bias: (width out,) or None.
        onednn: Whether `suits` was asked and said yes.
    """
    if onednn:
        return _onednn(x.contiguous(), weight, bias)
    return F.linear(x, weight, bias)


class _FrozenLinear(torch.autograd.Function):
    """A linear map by oneDNN with the gradient of its input only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return product(x, weight, bias, True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return product(grads[0], ctx.weight.t(), None, True), None, None


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None, onednn: bool = True) -> Tensor:
    """Return `x · weightᵀ + bias` with a gradient for x alone.

    Args:
        x: (…, width in).
        weight: (width out, width in), frozen.
        bias: (width out,), frozen, or None.
        onednn: Use oneDNN where it suits.
    """
    if onednn and suits(x, weight):
        made: Tensor = _FrozenLinear.apply(x, weight, bias)
        return made
    return F.linear(x, weight, bias)
