"""Frozen activations: a model's class prompts and images below the first adapted block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vlmadapters.backbone import backbone_towers
from vlmadapters.config import MMAConfig
from vlmadapters.mma import Adapter, scaled_cosines
from vlmadapters.recipes import Savings
from vlmadapters.walk import State, Walk

VIEW_BYTES = 4 << 30


def start_of(config: MMAConfig | None, tower: str, depth: int) -> int:
    """Return the first adapted block of a tower; the last block where none is adapted.

    Up to there activations are frozen and kept for all tokens; the last block needs one only.
    """
    blocks = getattr(config, tower) if config is not None else ()
    return blocks[0] if blocks else depth


class Backbone:
    """A CLIP taken apart into walks over both towers, for one choice of savings.

    Where either tower cannot be taken apart, both run whole and adapters are attached by hooks.
    """

    def __init__(self, clip: nn.Module, savings: Savings | None = None) -> None:
        self.clip, self.savings = clip, savings or Savings()
        towers = backbone_towers(clip)
        options = {name: getattr(self.savings, name) for name in ("last_token", "fused", "onednn")}
        self.vision = Walk(towers["vision"], **options)
        self.text = Walk(towers["text"], cut=self.savings.cut_prompts, **options)
        self.steps = self.vision.steps and self.text.steps
        self.vision.steps = self.text.steps = self.steps

    def start(self, config: MMAConfig | None, tower: str) -> int:
        """Return the first adapted block of a tower; the last block where none is adapted."""
        return start_of(config, tower, getattr(self, tower).tower.depth)

    def prompts(self, tokens: Tensor, starts: Iterable[int]) -> dict[int, State]:
        """Return the frozen state of class prompts at each of the blocks asked for."""
        return climb(self.text, self.text.enter, tokens, starts, self.savings.text_prefix)

    def images(self, images: Tensor, starts: Iterable[int]) -> dict[int, State]:
        """Return the frozen state of images at each of the blocks asked for."""
        return climb(self.vision, self.vision.enter, images, starts, self.savings.image_prefix)

    def features(self, tower: str, state: State, adapter: Adapter | None) -> Tensor:
        """Return joint embeddings from a frozen state on, (item, joint)."""
        walk: Walk = getattr(self, tower)
        if self.steps or adapter is None:
            return walk.finish(state, adapter)
        with adapter.attached(self.clip):
            return walk.finish(state)

    def logits(self, images: State, prompts: State, adapter: Adapter | None) -> Tensor:
        """Return class logits, (image, class)."""
        return scaled_cosines(
            self.clip,
            self.features("vision", images, adapter),
            self.features("text", prompts, adapter),
        )


def climb(
    walk: Walk,
    enter: Callable[[Tensor], State],
    inputs: Tensor,
    starts: Iterable[int],
    shared: bool = True,
) -> dict[int, State]:
    """Walk up once without a graph and return the state at each of the blocks asked for.

    Without `shared` every block asked for gets the state before block 1: nothing is saved.
    """
    wanted = sorted(set(starts))
    with torch.no_grad():
        state = enter(inputs)
        found: dict[int, State] = {}
        for block in wanted:
            if shared:
                state = walk.advance(state, block)
            found[block] = state
    return found


class ViewCache:
    """Frozen image activations of a fixed set of views, filled as they are first seen.

    Args:
        backbone: The backbone.
        starts: Blocks whose inputs are needed. All are stored where they fit into `limit` bytes,
            else only the lowest, from where the others are walked to.
        rows: Number of views in all.
        limit: Bytes that the cache may take.
    """

    def __init__(
        self, backbone: Backbone, starts: Iterable[int], rows: int, limit: int = VIEW_BYTES
    ) -> None:
        self.backbone, self.starts, self.limit = backbone, sorted(set(starts)), limit
        self.filled = np.zeros(rows, dtype=bool)
        self.stored: dict[int, Tensor] = {}
        self.form: State | None = None

    def states(
        self, rows: NDArray[np.int64], load: Callable[[NDArray[np.int64]], Tensor]
    ) -> dict[int, State]:
        """Return the states of some views, computing what is not there yet.

        Args:
            rows: Numbers of the views.
            load: Positions within `rows` to preprocessed images.
        """
        missing = np.flatnonzero(~self.filled[rows])
        if len(missing):
            self._fill(rows[missing], load(missing))
        assert self.form is not None
        index = torch.from_numpy(rows)
        device = self.form.inputs.device
        kept = {
            block: replace(
                self.form,
                x=x[index].to(device),
                block=block,
                inputs=self.form.inputs[:1].expand(len(rows), -1, -1, -1),
            )
            for block, x in self.stored.items()
        }
        if len(kept) == len(self.starts):
            return kept
        lowest = kept[self.starts[0]]
        return climb(self.backbone.vision, lambda _: lowest, lowest.inputs, self.starts)

    def _fill(self, rows: NDArray[np.int64], images: Tensor) -> None:
        states = self.backbone.images(images, self.starts)
        first = states[self.starts[0]]
        if first.x is None:
            raise NotImplementedError("a backbone that runs whole has no frozen prefix to keep")
        if self.form is None:
            self.form = replace(first, inputs=first.inputs[:1].clone())
            each = first.x[0].numel() * first.x.element_size() * len(self.filled)
            fits = each * len(self.starts) <= self.limit
            keep: Sequence[int] = self.starts if fits else self.starts[:1]
            shape = (len(self.filled), *first.x.shape[1:])
            self.stored = {block: torch.empty(shape, dtype=first.x.dtype) for block in keep}
        index = torch.from_numpy(rows)
        for block, store in self.stored.items():
            store[index] = _tokens(states[block]).to(store.device)
        self.filled[rows] = True


def _tokens(state: State) -> Tensor:
    assert state.x is not None
    return state.x.detach()
