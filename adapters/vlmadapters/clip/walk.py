"""Walk through a tower block by block, from any block on, with or without a method acting on it.

What lies below the first block that a method changes is frozen and can be computed once, or without
a graph, or once for many placements. A walk gives the same features as the tower's own forward; it
checks that on a sample at the start and otherwise leaves the whole forward to the tower.

The residual stream is kept in single precision under autocast: in bfloat16 what an adapter of
scale 0.001 adds lies below the rounding of the stream.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vlmadapters.clip.arithmetic import at, attend, attend_one, feed_forward, is_standard
from vlmadapters.clip.towers import first_norm
from vlmlayers.errors import UserError
from vlmlayers.models.modes import eval_mode
from vlmlayers.models.tower import Apply, Tower, same

TOLERANCE = 1e-4  # relative, in float32: rounding lies at 1e-6, a wrong layout or mask near 1
# (block, its input, attention mask, rows) to its output: of all tokens, (item, token, width), or of
# the token at `rows` of each item, (item, 1, width), where rows are given.
Inside = Callable[[Any, Tensor, Tensor | None, Tensor | None], Tensor]


@dataclass(frozen=True, eq=False)
class State:
    """Activations on their way through a tower.

    Attributes:
        inputs: What went into the tower: images, or token ids after the cut.
        x: Input of the next block in the block's own layout, or None before block 1.
        block: Number of the next block.
        args: Further arguments the tower gives its blocks.
        kwargs: Further keyword arguments, such as `attn_mask`.
        length: Tokens of an item where it entered block 1, of which the embedding is pooled: what a
            method appends later is not. 0 where the blocks' layout has no axis of tokens.
        norm_in: What normed the tokens that entered block 1: what is appended there takes it too.
        finished: The walk is done, and `x` is the joint embedding, (item, joint).
        note: What a method's `prepare` has noted of these inputs, such as the slots of its context.
    """

    inputs: Tensor
    x: Tensor | None = None
    block: int = 0
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    length: int = 0
    norm_in: Apply = same
    finished: bool = False
    note: Any = None


class Acting(Protocol):
    """What a walk asks of a method at each block; `vlmadapters.methods.base` says what is meant."""

    def before(self, x: Tensor, tower: str, block: int, state: State) -> Tensor:
        """Return the tokens that enter a block."""

    def inside(self, tower: str, block: int) -> Inside | None:
        """Return what computes a block in its place, or None."""

    def reads_norm(self, tower: str, block: int) -> bool:
        """Whether `beside` acts at a block."""

    def beside(self, out: Tensor, u: Tensor, tower: str, block: int) -> Tensor:
        """Return a block's output with the method's contribution."""


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
        # In evaluation mode, or dropout would make the two passes differ.
        with torch.no_grad(), eval_mode(tower.model):
            self.steps = self.agrees()

    def agrees(self) -> bool:
        """Whether walking gives what the tower's own forward gives, on two random inputs."""
        # Two items tell a wrong batch axis; random ones, as the mask and the pooled token matter.
        example = self.tower.example(2)
        generator = torch.Generator().manual_seed(0)
        if example.is_floating_point():
            inputs = torch.rand(example.shape, generator=generator).to(example)
        else:
            # From 1, since 0 is padding; below 50, since every vocabulary has these ids.
            inputs = torch.randint(1, 50, example.shape, generator=generator).to(example)
        try:
            # By way of block 2, so that a stop between blocks is tried as well as the end.
            walked = self.finish(self.advance(self.enter(inputs), 2))
            expected = self.tower.run(inputs)
        except torch.OutOfMemoryError:
            raise  # says nothing about the tower
        except (RuntimeError, TypeError, IndexError, AttributeError, ValueError):
            return False  # a forward that cannot be taken apart runs whole
        error = (walked - expected).norm() / expected.norm().clamp_min(1e-12)
        # Half precision rounds in every block; an error of 5 % is still far below a wrong layout's.
        low = expected.dtype in (torch.float16, torch.bfloat16)
        return bool(error < (0.05 if low else TOLERANCE))

    @cached_property
    def takes_more(self) -> bool:
        """Whether tokens can be appended: blocks are given nothing else that counts tokens."""
        if not self.steps:
            return False
        with torch.no_grad():
            state = self.enter(self.tower.example(1))
        # A mask or rotary table has a size of its own and would not fit more tokens.
        given = (*state.args, *state.kwargs.values())
        return state.length > 0 and all(value is None for value in given)

    def enter(self, inputs: Tensor, margin: int = 0) -> State:
        """Return the state before block 1.

        Args:
            inputs: Images, or token ids.
            margin: Text columns to keep behind the longest end-of-text.
        """
        if self.cut:
            cut = self.tower.cut(inputs)
            inputs = inputs[:, : cut.shape[1] + margin] if margin else cut
        if not self.steps:
            return State(inputs)
        seen: list[State] = []

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0]
            # Blocks add to what they are given: a float32 input keeps the whole stream in float32.
            if torch.is_autocast_enabled(x.device.type):
                x = x.float()
            items_first = self.tower.layout == "tokens" and self.tower.batch_axis in (None, 0)
            length = x.shape[1] if items_first else 0
            seen.append(State(inputs, x, 1, args[1:], kwargs, length, self.tower.norm_in))
            raise _Reached

        # What comes before block 1 (patches, embeddings, dropout of patches) differs by family and
        # is left to the tower's own forward, which is stopped where block 1 would run.
        handle = self.tower.blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.tower.run(inputs)
        except _Reached:
            pass
        finally:
            handle.remove()
        return seen[0]

    def advance(self, state: State, to: int, method: Acting | None = None) -> State:
        """Return the state before block `to`."""
        if state.x is None or state.finished:
            return state
        x = state.x
        for block in range(state.block, to):
            x = self._block(block, x, state, method)
        return replace(state, x=x, block=max(to, state.block))

    def finish(self, state: State, method: Acting | None = None) -> Tensor:
        """Run what remains and return the joint embedding, (item, joint)."""
        tower = self.tower
        if state.x is None:
            return tower.run(state.inputs)
        if state.finished:
            return state.x
        # Only the pooled token leaves the last block, and its output needs no other's: with known
        # rows that block is run for one query per item.
        rows = self._rows(state.inputs, state.length)
        whole = rows is None or not self.last_token or not self._is_fused(tower.depth, state)
        if whole or state.block > tower.depth:
            state = self.advance(state, tower.depth + 1, method)
            assert state.x is not None
            # Prompts that a method appended are dropped: the head pools the tower's own tokens.
            x = state.x if method is None or not state.length else state.x[:, : state.length]
            return self.head(x, rows)
        state = self.advance(state, tower.depth, method)
        assert state.x is not None
        x = self._block(tower.depth, state.x, state, method, rows)
        assert rows is not None
        return self.head(x, torch.zeros_like(rows))

    def _rows(self, inputs: Tensor, length: int) -> Tensor | None:
        """Return the index of the pooled token of each item, or None where all tokens count."""
        tower = self.tower
        if not tower.picks_token(tower.pooling):
            return None
        if tower.pooling == "eot" and tower.ends is not None:
            return tower.ends(inputs)
        last = tower.suffix or tower.pooling == "model"  # else the class token, which comes first
        return torch.full((len(inputs),), length - 1 if last else 0, device=inputs.device)

    def _is_fused(self, block: int, state: State) -> bool:
        return self.fused[block - 1] and self._is_plain(state)

    def _is_plain(self, state: State) -> bool:
        """Whether blocks are given nothing but tokens and one mask for all heads and items."""
        mask = state.kwargs.get("attn_mask")
        # A mask with further axes differs by head or item; the fused attention picks rows of one
        # (token, token) mask.
        known = set(state.kwargs) <= {"attn_mask"} and not state.args
        return known and (mask is None or mask.ndim == 2)

    def _block(
        self,
        number: int,
        x: Tensor,
        state: State,
        method: Acting | None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Return the output of one block; of the tokens at `rows` only, where given."""
        module: Any = self.tower.blocks[number - 1]
        name, mask = self.tower.name, state.kwargs.get("attn_mask")
        inside, beside = None, False
        if method is not None:
            # First of all: new prompts of a block are part of what its norm and attention read.
            x = method.before(x, name, number, state)
            inside, beside = method.inside(name, number), method.reads_norm(name, number)
        u = x
        if inside is not None:
            if not (is_standard(module) and self._is_plain(state)):
                raise UserError(
                    f"the method works inside the {name} tower's blocks, and these "
                    f"({self.tower.family}, {type(module).__name__}) are not open_clip's standard "
                    "ones; choose another backbone, or a method that acts beside blocks"
                )
            out = inside(module, x, mask, rows)
            if beside:
                # Computed again: what `inside` normed stays inside it.
                u = first_norm(module, self.tower)(x)
                u = u if rows is None else at(u, rows)
        elif not self._is_fused(number, state):
            out = module(x, *state.args, **state.kwargs)
            u = first_norm(module, self.tower)(x) if beside else x
        else:
            u = module.ln_1(x)
            if rows is None:
                out = attend(module, x, u, mask, self.onednn)
            else:
                out = attend_one(module, at(x, rows), u, rows, mask, self.onednn)
                u = at(u, rows)
            out = feed_forward(module, out, self.onednn)
        if method is None or not beside:
            return out
        return method.beside(out, u, name, number)

    def head(self, x: Tensor, rows: Tensor | None) -> Tensor:
        """Return the joint embedding of the last block's output, (item, joint).

        In single precision also under autocast: it is one product of one token, and its rounding
        would hide what a small step changed.

        Args:
            x: (item, token, width).
            rows: Index of the pooled token of each item; None pools as the tower does.
        """
        tower = self.tower
        with torch.autocast(x.device.type, enabled=False):
            x = tower.tokens(x)  # (item, token, width)
            if rows is not None:
                return tower.project(tower.norm_after(tower.norm(at(x, rows)[:, 0])))
            x = tower.norm(x)
            pooled = tower.attend(x) if tower.attend is not None else x[:, tower.prefix :].mean(1)
            return tower.project(tower.norm_after(pooled))
