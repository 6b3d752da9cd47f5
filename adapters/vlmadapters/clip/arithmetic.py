"""The arithmetic of open_clip's standard block, arranged for frozen weights.

Same function, fewer passes over memory: weights need no gradient, the adapter reuses the block's
first norm, and QuickGELU is SiLU once its factor 1.702 is folded into the norm before and the
residual sum after. Agreement with the block's own forward is to float32 rounding (tested); blocks
of any other kind run their own forward.
"""

from __future__ import annotations

from typing import Any

import torch
from open_clip.transformer import LayerNorm, QuickGELU, ResidualAttentionBlock
from torch import Tensor, nn
from torch.nn import functional as F

from vlmadapters.clip.products import frozen_linear, product, suits
from vlmadapters.clip.remembered import is_causal, lowered, scaled

# OpenAI trained its models with this approximation of GELU; exact GELU gives other features.
QUICK = 1.702


def is_standard(block: nn.Module) -> bool:
    """Return whether the functions below compute the same as the block's own forward."""
    # By type, not isinstance: a subclass may compute something else. `ln_1_kv` marks blocks that
    # attend to another sequence, as in the decoders of CoCa.
    if type(block) is not ResidualAttentionBlock or hasattr(block, "ln_1_kv"):
        return False
    attention: Any = block.attn
    mlp: Any = block.mlp
    act = mlp.gelu
    return bool(
        type(block.ln_1) is LayerNorm
        and type(block.ln_2) is LayerNorm
        and attention.batch_first
        # Without it torch keeps three projections, and `in_proj_weight` is None.
        and attention._qkv_same_embed_dim
        and attention.in_proj_bias is not None
        and attention.bias_k is None
        and isinstance(act, (QuickGELU, nn.GELU))
        # F.gelu and its derivative below are the exact ones.
        and getattr(act, "approximate", "none") == "none"
    )


def at(x: Tensor, rows: Tensor) -> Tensor:
    """Return one token of each item, (item, 1, width)."""
    # Not by an index of tensors: its gradient sorts on a GPU, by ten kernels, in case rows repeat.
    return x.gather(1, rows[:, None, None].expand(-1, 1, x.shape[-1]))


def attend(block: Any, x: Tensor, u: Tensor, mask: Tensor | None, onednn: bool = True) -> Tensor:
    """Return x plus the block's attention, (item, token, width).

    Args:
        block: A standard block.
        x: Input of the block, (item, token, width).
        u: `block.ln_1` of it.
        mask: Additive attention mask, (token, token), or None.
        onednn: Use oneDNN where it suits and is faster.
    """
    attention = block.attn
    qkv = frozen_linear(u, attention.in_proj_weight, attention.in_proj_bias, onednn)
    q, k, v = qkv.chunk(3, -1)
    return _leave(block, x, mix(q, k, v, attention.num_heads, mask), onednn)


def mix(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """Return multi-head attention before its output projection, (item, query, width).

    Args:
        q: Queries, (item, query, width).
        k: Keys, (item, token, width).
        v: Values, (item, token, width).
        heads: Number of heads.
        mask: Additive attention mask, (query, token) or with items and heads before it, or None.
    """
    q, k, v = (one.unflatten(-1, (heads, -1)).transpose(1, 2) for one in (q, k, v))
    # The same bits; a GPU's fastest kernels know this mask and no other.
    causal = mask is not None and is_causal(mask)
    mask = None if mask is None or causal else mask.to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return out.transpose(1, 2).flatten(2)


def attend_one(
    block: Any, x: Tensor, u: Tensor, rows: Tensor, mask: Tensor | None, onednn: bool = True
) -> Tensor:
    """Return x plus the block's attention for one token of each item, (item, 1, width).

    With a single query, keys and values of the other tokens need not be formed: the query goes
    through the key map's transpose, q · (K u) = (Kᵀ q) · u, and the attention's mean is taken of u
    before the value map. The key's bias is the same for every token and drops out of the softmax.

    Args:
        block: A standard block.
        x: Input of the block at those tokens, (item, 1, width).
        u: `block.ln_1` of the block's whole input, (item, token, width).
        rows: (item,) index of the token.
        mask: Additive attention mask, (token, token), or None.
        onednn: Use oneDNN where it suits and is faster.
    """
    # For T tokens 2 · width² + 2 · heads · T · width multiplications an item, where forming keys
    # and values takes 2 · T · width².
    attention, heads = block.attn, block.attn.num_heads
    n, _, width = u.shape
    size = width // heads
    weight, bias = lowered(attention.in_proj_weight), attention.in_proj_bias
    to_k, to_v = (weight[i * width : (i + 1) * width].view(heads, size, width) for i in (1, 2))
    q = frozen_linear(at(u, rows)[:, 0], weight[:width], bias[:width], onednn).view(n, heads, size)
    # The scale goes to the query, the smallest of the factors.
    asked = torch.einsum("nhd,hdw->nhw", q * size**-0.5, to_k)  # (item, head, width)
    scores = asked @ u.transpose(1, 2)  # (item, head, token)
    if mask is not None:
        scores = scores + mask[rows][:, None].to(scores.dtype)
    # The weights sum to 1, so the value map's bias can be added after the mean.
    seen = scores.softmax(-1).to(u.dtype) @ u  # (item, head, width)
    out = torch.einsum("nhw,hdw->nhd", seen, to_v) + bias[2 * width :].view(heads, size)
    return _leave(block, x, out.reshape(n, 1, width), onednn)


def keys_values(block: Any, x: Tensor, onednn: bool = True) -> tuple[Tensor, Tensor]:
    """Return the keys and values of a block's attention, (item, head, token, width / head).

    Args:
        block: A standard block.
        x: Input of the block, (item, token, width).
        onednn: Use oneDNN where it suits and is faster.
    """
    attention, heads, (n, tokens, width) = block.attn, block.attn.num_heads, x.shape
    weight, bias = lowered(attention.in_proj_weight)[width:], attention.in_proj_bias[width:]
    made = frozen_linear(block.ln_1(x), weight, bias, onednn)
    k, v = made.view(n, tokens, 2, heads, width // heads).permute(2, 0, 3, 1, 4)
    return k, v


def attend_others(
    block: Any, x: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None, onednn: bool = True
) -> Tensor:
    """Return x plus the block's attention of x to other tokens alone, (item, token, width).

    Args:
        block: A standard block.
        x: The tokens that attend, (item, token, width).
        keys: Keys of the tokens attended to, as `keys_values` returns them.
        values: Their values, likewise.
        seen: Which of these an item's tokens see, (item, token); None is all.
        onednn: Use oneDNN where it suits and is faster.
    """
    attention, heads, (n, tokens, width) = block.attn, block.attn.num_heads, x.shape
    weight, bias = lowered(attention.in_proj_weight)[:width], attention.in_proj_bias[:width]
    q = frozen_linear(block.ln_1(x), weight, bias, onednn)
    q = q.view(n, tokens, heads, width // heads).transpose(1, 2)
    # True means seen here; `nn.MultiheadAttention` takes boolean masks in the opposite sense.
    mask = None if seen is None else seen[:, None, None]
    out = F.scaled_dot_product_attention(q, keys.to(q.dtype), values.to(q.dtype), attn_mask=mask)
    return _leave(block, x, out.transpose(1, 2).reshape(n, tokens, width), onednn)


def _leave(block: Any, x: Tensor, out: Tensor, onednn: bool) -> Tensor:
    projection = block.attn.out_proj
    out = block.ls_1(frozen_linear(out, projection.weight, projection.bias, onednn))
    # `out` was made here and nobody else holds it; x may be needed again, so it is the one kept.
    in_place = not out.requires_grad and out.dtype == x.dtype
    return out.add_(x) if in_place else x + out


class _FrozenMLP(torch.autograd.Function):
    """x + c_proj(act(c_fc(norm(x)))) with the gradient of x only; under autocast low products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Any, mlp: Any, quick: bool, onednn: bool) -> Tensor:
        # QuickGELU is x · σ(1.702 x) = silu(1.702 x) / 1.702. The factor goes into the norm, which
        # is linear in its weight and bias, and out again with the sum at the end.
        factor = QUICK if quick else 1.0
        kind, first, last = x.device.type, mlp.c_fc, mlp.c_proj
        # Autocast does not reach into a custom function, so the casts are made here; those of
        # frozen weights are there already.
        low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        weights = [lowered(linear.weight).to(low) for linear in (first, last)]
        biases = [lowered(scaled(linear.bias, factor)).to(low) for linear in (first, last)]
        with torch.autocast(kind, enabled=False):
            # n itself is not saved for the way back: only the gradient of a weight would need it.
            n, mean, rstd = torch.native_layer_norm(
                x,
                norm.normalized_shape,
                scaled(norm.weight, factor),
                scaled(norm.bias, factor),
                norm.eps,
            )
            t = product(n.to(low), weights[0], biases[0], onednn)
            if ctx.needs_input_grad[0]:
                ctx.parts = norm, weights, quick, onednn
                # t and not h: the activation's derivative reads its input, and h would be needed
                # for the gradient of a weight only.
                ctx.save_for_backward(x, mean, rstd, t)
                h = F.silu(t) if quick else F.gelu(t)
            else:  # t is read no more
                h = F.silu(t, inplace=True) if quick else F.gelu(t)
            y = product(h, weights[1], biases[1], onednn)
            out = y if y.dtype == x.dtype else None  # the sum keeps the stream's precision
            return torch.add(x, y, alpha=1 / factor, out=out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        (norm, (first, last), quick, onednn), (x, mean, rstd, t) = ctx.parts, ctx.saved_tensors
        to_h = product(grad.to(last.dtype), last.t(), None, onednn)
        # The two factors 1.702 and 1 / 1.702 cancel.
        backward = torch.ops.aten.silu_backward if quick else torch.ops.aten.gelu_backward
        to_n = product(backward(to_h, t), first.t(), None, onednn).to(x.dtype)
        to_x, _, _ = torch.ops.aten.native_layer_norm_backward(
            to_n, x, norm.normalized_shape, mean, rstd, norm.weight, norm.bias, [True, False, False]
        )
        return to_x.add_(grad), None, None, None, None


def feed_forward(block: Any, x: Tensor, onednn: bool = True, fused: bool = True) -> Tensor:
    """Return x plus the block's multilayer perceptron, (item, token, width).

    Args:
        block: A standard block.
        x: What the perceptron sees and is added to, (item, token, width).
        onednn: Use oneDNN where it suits and is faster.
        fused: Use fewer passes over memory, which round otherwise than the block's own forward.
    """
    weight = block.mlp.c_fc.weight
    # Layer scale would stand between product and sum.
    if fused and isinstance(block.ls_2, nn.Identity) and x.dtype == weight.dtype:
        quick = isinstance(block.mlp.gelu, QuickGELU)
        use = onednn and suits(x, weight)
        return _FrozenMLP.apply(x, block.ln_2, block.mlp, quick, use)
    return feed_normed(block, x, block.ln_2(x), onednn)


def feed_normed(block: Any, x: Tensor, u: Tensor, onednn: bool = True) -> Tensor:
    """Return x plus the block's multilayer perceptron of u, with gradients for both.

    Args:
        block: A standard block.
        x: What the perceptron is added to, (item, token, width).
        u: What it sees, such as x after a norm that is not the block's own, same shape.
        onednn: Use oneDNN where it suits and is faster.
    """
    first, last = block.mlp.c_fc, block.mlp.c_proj
    hidden = block.mlp.gelu(frozen_linear(u, first.weight, first.bias, onednn))
    return x + block.ls_2(frozen_linear(hidden, last.weight, last.bias, onednn))
