"""Walk through a tower block by block, from any block on, with or without an adapter.

What lies below the first adapted block is frozen and can be computed once, or without a graph, or
once for many placements. A walk gives the same features as the tower's own forward; it checks that
on a sample at the start and otherwise leaves the whole forward to the tower.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmadapters.backbone import first_norm
from vlmadapters.fused import attend, attend_one, feed_forward, is_standard
from vlmadapters.mma import Adapter
from vlmlayers.models.towers import Tower

TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False)
class State:
    """Activations on their way through a tower.

    Attributes:
        inputs: What went into the tower: images, or token ids after the cut.
        x: Input of the next block in the block's own layout, or None before block 1.
        block: Number of the next block.
        args: Further arguments the tower gives its blocks.
        kwargs: Further keyword arguments, such as `attn_mask`.
    """

    inputs: Tensor
    x: Tensor | None = None
    block: int = 0
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


class _Reached(Exception):
    """The walk has seen what enters block 1."""


class Walk:
    """One tower's forward pass in steps.

    Args:
        tower: The tower.
        cut: Drop text columns that no pooled token can see.
        last_token: Compute only the pooled token's query in the last block.
        fused: Use the fused arithmetic for standard blocks.
        onednn: Let oneDNN multiply in these, where it suits.
    """

    def __init__(
        self,
        tower: Tower,
        *,
        cut: bool = True,
        last_token: bool = True,
        fused: bool = True,
        onednn: bool = True,
    ) -> None:
        self.tower, self.cut, self.last_token, self.onednn = tower, cut, last_token, onednn
        self.fused = [fused and is_standard(block) for block in tower.blocks]
        self.steps = True
        with torch.no_grad():
            self.steps = self._agrees()

    def _agrees(self) -> bool:
        """Whether walking gives what the tower's own forward gives, on two random inputs."""
        example = self.tower.example(2)
        generator = torch.Generator().manual_seed(0)
        if example.is_floating_point():
            inputs = torch.rand(example.shape, generator=generator).to(example)
        else:
            inputs = torch.randint(1, 50, example.shape, generator=generator).to(example)
        try:
            walked = self.finish(self.advance(self.enter(inputs), 2))
            expected = self.tower.run(inputs)
        except (RuntimeError, TypeError, IndexError, AttributeError):
            return False  # a forward that cannot be taken apart runs whole
        error = (walked - expected).norm() / expected.norm().clamp_min(1e-12)
        low = expected.dtype in (torch.float16, torch.bfloat16)
        return bool(error < (0.05 if low else TOLERANCE))

    def enter(self, inputs: Tensor) -> State:
        """Return the state before block 1."""
        if self.cut:
            inputs = self.tower.cut(inputs)
        if not self.steps:
            return State(inputs)
        seen: list[State] = []

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(State(inputs, args[0], 1, args[1:], kwargs))
            raise _Reached

        handle = self.tower.blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.tower.run(inputs)
        except _Reached:
            pass
        finally:
            handle.remove()
        return seen[0]

    def advance(self, state: State, to: int, adapter: Adapter | None = None) -> State:
        """Return the state before block `to`."""
        if state.x is None:
            return state
        x = state.x
        for block in range(state.block, to):
            x = self._block(block, x, state, adapter)
        return replace(state, x=x, block=max(to, state.block))

    def finish(self, state: State, adapter: Adapter | None = None) -> Tensor:
        """Run what remains and return the joint embedding, (item, joint)."""
        tower = self.tower
        if state.x is None:
            return tower.run(state.inputs)
        rows = self._rows(state.inputs, len(state.x))
        whole = rows is None or not self.last_token or not self._is_fused(tower.depth, state)
        if whole or state.block > tower.depth:
            state = self.advance(state, tower.depth + 1, adapter)
            return self._head(state.x, rows)
        state = self.advance(state, tower.depth, adapter)
        assert state.x is not None
        x = self._block(tower.depth, state.x, state, adapter, rows)[:, 0]
        return tower.project(tower.norm_after(tower.norm(x)))

    def _rows(self, inputs: Tensor, n: int) -> Tensor | None:
        """Return the index of the pooled token of each item, or None where all tokens count."""
        tower = self.tower
        if not tower.picks_token(tower.pooling):
            return None
        if tower.pooling == "eot" and tower.ends is not None:
            return tower.ends(inputs)
        last = tower.suffix or tower.pooling == "model"  # else the class token, which comes first
        return torch.full((n,), -1 if last else 0, device=inputs.device)

    def _is_fused(self, block: int, state: State) -> bool:
        mask = state.kwargs.get("attn_mask")
        known = set(state.kwargs) <= {"attn_mask"} and not state.args
        return self.fused[block - 1] and known and (mask is None or mask.ndim == 2)

    def _block(
        self,
        number: int,
        x: Tensor,
        state: State,
        adapter: Adapter | None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Return the output of one block; of the tokens at `rows` only, where given."""
        module: Any = self.tower.blocks[number - 1]
        adapted = adapter is not None and number in getattr(adapter.config, self.tower.name)
        if not self._is_fused(number, state):
            out = module(x, *state.args, **state.kwargs)
            u = first_norm(module, self.tower)(x) if adapted else x
        else:
            u, mask = module.ln_1(x), state.kwargs.get("attn_mask")
            if rows is None:
                out = attend(module, x, u, mask, self.onednn)
            else:
                each = torch.arange(len(x), device=x.device)
                out = attend_one(module, x[each, rows][:, None], u, rows, mask, self.onednn)
                u = u[each, rows][:, None]  # (item, 1, width)
            out = feed_forward(module, out, self.onednn)
        if adapter is None or not adapted:
            return out
        return adapter.add_to(out, u, self.tower.name, number)

    def _head(self, x: Tensor | None, rows: Tensor | None) -> Tensor:
        tower = self.tower
        assert x is not None
        x = tower.norm(tower.tokens(x))  # (item, token, width)
        if rows is not None:
            pooled = x[torch.arange(len(x), device=x.device), rows]
        elif tower.attend is not None:
            pooled = tower.attend(x)
        else:
            pooled = x[:, tower.prefix :].mean(1)
        return tower.project(tower.norm_after(pooled))
