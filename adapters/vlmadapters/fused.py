"""The arithmetic of open_clip's standard block, arranged for frozen weights.

Same function, fewer passes over memory: weights need no gradient, the adapter reuses the block's
first norm, and QuickGELU is SiLU once its factor 1.702 is folded into the two matrix products.
Agreement with the block's own forward is to float32 rounding (tested); blocks of any other kind
run their own forward.
"""

from __future__ import annotations

from typing import Any

import torch
from open_clip.transformer import LayerNorm, QuickGELU, ResidualAttentionBlock
from torch import Tensor, nn
from torch.nn import functional as F

QUICK = 1.702


def is_standard(block: nn.Module) -> bool:
    """Return whether `standard_block` computes the same as the block's own forward."""
    if type(block) is not ResidualAttentionBlock or hasattr(block, "ln_1_kv"):
        return False
    attention: Any = block.attn
    mlp: Any = block.mlp
    act = mlp.gelu
    return bool(
        type(block.ln_1) is LayerNorm
        and type(block.ln_2) is LayerNorm
        and attention.batch_first
        and attention._qkv_same_embed_dim
        and attention.in_proj_bias is not None
        and attention.bias_k is None
        and isinstance(act, (QuickGELU, nn.GELU))
        and getattr(act, "approximate", "none") == "none"
    )


def attend(
    block: Any, x: Tensor, u: Tensor, mask: Tensor | None, rows: Tensor | None = None
) -> Tensor:
    """Return x plus the block's attention.

    Args:
        block: A standard block.
        x: Input of the block, (item, token, width); (item, 1, width) with `rows`.
        u: `block.ln_1` of the block's whole input, (item, token, width).
        mask: Additive attention mask, (token, token), or None.
        rows: (item,) the only token of each item whose output is needed, or None for all.
    """
    attention, heads = block.attn, block.attn.num_heads
    n, tokens, width = u.shape
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    if rows is None:
        qkv = F.linear(u, weight, bias).view(n, tokens, 3, heads, width // heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (item, head, token, width / head)
    else:
        picked = u[torch.arange(n, device=u.device), rows]
        q = F.linear(picked, weight[:width], bias[:width]).view(n, heads, 1, width // heads)
        kv = F.linear(u, weight[width:], bias[width:]).view(n, tokens, 2, heads, width // heads)
        k, v = kv.permute(2, 0, 3, 1, 4)
        mask = None if mask is None else mask[rows][:, None, None]  # (item, 1, 1, token)
    mask = None if mask is None else mask.to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    out = out.transpose(1, 2).reshape(n, q.shape[2], width)
    out = block.ls_1(F.linear(out, attention.out_proj.weight, attention.out_proj.bias))
    in_place = not out.requires_grad and out.dtype == x.dtype
    return out.add_(x) if in_place else x + out


class _FrozenMLP(torch.autograd.Function):
    """x + c_proj(act(c_fc(norm(x)))) with the gradient of x only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Any, mlp: Any, quick: bool) -> Tensor:
        n, mean, rstd = torch.native_layer_norm(
            x, norm.normalized_shape, norm.weight, norm.bias, norm.eps
        )
        flat = n.view(-1, n.shape[-1])
        factor = QUICK if quick else 1.0
        t = torch.addmm(mlp.c_fc.bias, flat, mlp.c_fc.weight.t(), beta=factor, alpha=factor)
        ctx.parts, ctx.quick = (norm, mlp), quick
        ctx.save_for_backward(x, mean, rstd, t)
        h = F.silu(t) if quick else F.gelu(t)
        y = torch.addmm(mlp.c_proj.bias, h, mlp.c_proj.weight.t(), alpha=1 / factor)
        return y.view_as(x).add_(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        (norm, mlp), (x, mean, rstd, t) = ctx.parts, ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        to_h = flat @ mlp.c_proj.weight
        if ctx.quick:  # the two factors 1.702 and 1/1.702 cancel
            to_t = torch.ops.aten.silu_backward(to_h, t)
        else:
            to_t = torch.ops.aten.gelu_backward(to_h, t)
        to_n = (to_t @ mlp.c_fc.weight).view_as(x)
        to_x, _, _ = torch.ops.aten.native_layer_norm_backward(
            to_n, x, norm.normalized_shape, mean, rstd, norm.weight, norm.bias, [True, False, False]
        )
        return to_x.add_(grad), None, None, None


def feed_forward(block: Any, x: Tensor) -> Tensor:
    """Return x plus the block's multilayer perceptron, (item, token, width)."""
    plain = isinstance(block.ls_2, nn.Identity) and x.dtype == block.mlp.c_fc.weight.dtype
    if plain and not torch.is_autocast_enabled(x.device.type):
        return _FrozenMLP.apply(x, block.ln_2, block.mlp, isinstance(block.mlp.gelu, QuickGELU))
    return x + block.ls_2(block.mlp(block.ln_2(x)))
