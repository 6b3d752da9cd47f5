"""Linear layers whose weights leave torch's global random state alone."""

from __future__ import annotations

import torch
from torch import nn


def new_linear(width_in: int, width_out: int, *, bias: bool = True) -> nn.Linear:
    """Return a linear map whose weights are still to be drawn."""
    return torch.nn.utils.skip_init(nn.Linear, width_in, width_out, bias=bias)


def drawn_linear(
    width_in: int, width_out: int, generator: torch.Generator, *, bias: bool = True
) -> nn.Linear:
    """Return a linear map drawn as torch draws them: uniform within ±1/√(width in)."""
    made = new_linear(width_in, width_out, bias=bias)
    for value in made.parameters():
        nn.init.uniform_(value, -(width_in**-0.5), width_in**-0.5, generator=generator)
    return made
