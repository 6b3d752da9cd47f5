"""Muon for many matrices of few shapes: those of one shape take a step together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

POLYNOMIAL = (3.4445, -4.7750, 2.0315)  # of Jordan et al.: steep at zero, so five rounds suffice
ROUNDS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """Bring the singular values of (matrix, row, column) near 1, by Newton–Schulz in bfloat16.

    Reference:
        Jordan et al. 2024, Muon: an optimizer for hidden layers in neural networks.
    """
    a, b, c = POLYNOMIAL
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ROUNDS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


class Muon(Optimizer):
    """Momentum whose matrices are made orthogonal, with decoupled weight decay.

    Its steps have the root mean square of AdamW's, so one schedule serves both. torch's own takes
    each matrix alone: a hundred small ones are thousands of launches a step.

    Args:
        matrices: Two-dimensional parameters.
        lr: Learning rate.
        momentum: Of the gradients, Nesterov's.
        weight_decay: Share of the rate by which weights shrink.

    Reference:
        Liu et al. 2025, Muon is scalable for LLM training (the size of a step).
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
    ) -> None:
        alike = defaultdict(list)
        for matrix in matrices:
            alike[matrix.shape].append(matrix)
        groups: list[dict[str, Any]] = [{"params": group} for group in alike.values()]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take a step; every parameter needs a gradient."""
        for group in self.param_groups:
            matrices = group["params"]
            gradients = torch.stack([matrix.grad for matrix in matrices])
            state = self.state[matrices[0]]  # of all matrices of the shape
            if not state:
                state["momentum"] = torch.zeros_like(gradients)
            mean = state["momentum"].lerp_(gradients, 1 - group["momentum"])
            update = orthogonalise(gradients.lerp(mean, group["momentum"])).float().contiguous()
            size = 0.2 * max(update.shape[1:]) ** 0.5
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(matrices, update.unbind(), alpha=-group["lr"] * size)
