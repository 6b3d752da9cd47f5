"""What the adapter adds to a block's output, as one step of autograd.

    out + α · up(relu(shared(relu(down(u)))))

The parameters receive the gradient as if α were 1, and u the true one. Intermediate results are
few and narrow: two activations of the inner width are kept, and the sum is made in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmadapters.clip.products import product, suits


class _Branch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, u: Tensor, scale: float, *parameters: Tensor) -> Tensor:
        kind = u.device.type
        # Autocast does not reach into a custom function, so the casts are made here.
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else u.dtype
        onednn = suits(u, parameters[0])
        ctx.dtypes = out.dtype, u.dtype, [p.dtype for p in parameters]
        u, cast = u.to(dtype), _cast(parameters, [dtype] * len(parameters))
        down, down_bias, shared, shared_bias, up, up_bias = cast
        with torch.autocast(kind, enabled=False):
            # In place: the derivative of relu can be read from its output.
            first = F.relu(product(u, down, down_bias, onednn), inplace=True)
            second = F.relu(product(first, shared, shared_bias, onednn), inplace=True)
            y = product(second, up, up_bias, onednn)
        ctx.scale, ctx.onednn = scale, onednn
        ctx.save_for_backward(u, first, second, down, shared, up)
        return torch.add(out, y, alpha=scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        u, first, second, down, shared, up = ctx.saved_tensors
        out_dtype, u_dtype, dtypes = ctx.dtypes
        grad = grads[0].to(u.dtype)

        def back(grad: Tensor, weight: Tensor) -> Tensor:
            return product(grad, weight.t(), None, ctx.onednn)

        to_second = torch.ops.aten.threshold_backward(back(grad, up), second, 0)
        to_first = torch.ops.aten.threshold_backward(back(to_second, shared), first, 0)
        to_u = None
        # In the lowest adapted block nothing below u is trained.
        if ctx.needs_input_grad[1]:
            # The only α of the backward pass: parameters get the gradient as if it were 1.
            to_u = back(to_first * ctx.scale, down).to(u_dtype)
        steps = ((to_first, u), (to_second, first), (grad, second))
        made = [part for left, right in steps for part in _linear_gradients(left, right)]
        to_parameters = _cast(made, dtypes)
        to_out = grads[0].to(out_dtype) if ctx.needs_input_grad[0] else None
        return to_out, to_u, None, *to_parameters


def _cast(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Return tensors in other dtypes: on a GPU by one kernel, where a step waits for launches."""
    if all(tensor.dtype == dtype for tensor, dtype in zip(tensors, dtypes)):
        return list(tensors)
    made = [torch.empty_like(tensor, dtype=dtype) for tensor, dtype in zip(tensors, dtypes)]
    torch._foreach_copy_(made, list(tensors))
    return made


def _linear_gradients(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of weight and bias of a linear map of x."""
    flat = grad.reshape(-1, grad.shape[-1])  # (item · token, width out)
    return flat.t() @ x.reshape(-1, x.shape[-1]), flat.sum(0)


def add_branch(out: Tensor, u: Tensor, scale: float, *parameters: Tensor) -> Tensor:
    """Return a block's output with the adapter's contribution.

    Args:
        out: Output of the block, (item, token, width).
        u: The block's input after its first norm, same shape.
        scale: The factor α.
        *parameters: Weight and bias of the linear maps down, shared and up.
    """
    return _Branch.apply(out, u, scale, *parameters)
