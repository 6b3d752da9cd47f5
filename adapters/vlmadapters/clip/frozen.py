"""Frozen activations: a model's class prompts and images below the first block that changes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vlmadapters.clip.logits import scaled_cosines
from vlmadapters.clip.remembered import forget_written
from vlmadapters.clip.savings import Savings
from vlmadapters.clip.towers import backbone_towers
from vlmadapters.clip.walk import State, Walk
from vlmlayers.errors import UserError
from vlmlayers.models.devices import available_memory, placed

# A view at a block of ViT-B/16 takes 0.6 MB (197 × 768 floats): 4 GiB hold 7,000 of them.
VIEW_BYTES, FEATURE_BYTES = 4 << 30, 512 << 20
DEVICE_SHARE = 4  # a cache of views takes at most this part of a GPU's free memory


class Backbone:
    """A CLIP taken apart into walks over both towers, for one choice of savings.

    Where either tower cannot be taken apart, both run whole, and only methods that can be attached
    by hooks act on it.

    A CLIP whose weights are in half precision is copied into single precision: the residual stream
    and trainable parameters stay in it, and autocast lowers the products alone.

    Args:
        clip: The CLIP.
        savings: What is skipped because it changes nothing; all of it where None.
        tokenizer: Texts to token ids; needed by `tokens`.
    """

    def __init__(
        self, clip: nn.Module, savings: Savings | None = None, tokenizer: Any = None
    ) -> None:
        self.clip, self.savings, self.tokenizer = _single(clip), savings or Savings(), tokenizer
        forget_written(self.clip.parameters())
        towers = backbone_towers(self.clip)
        options = {name: getattr(self.savings, name) for name in ("last_token", "fused", "onednn")}
        self.vision = Walk(towers["vision"], **options)
        self.text = Walk(towers["text"], cut=self.savings.cut_prompts, **options)
        # Both or neither: a method acts on the two towers in one way, by steps or by hooks.
        self.steps = self.vision.steps and self.text.steps
        self.vision.steps = self.text.steps = self.steps
        # Kept here and not with a trainer: every training and test on this backbone reads them.
        self._features: dict[Hashable, Tensor] = {}

    @property
    def walks(self) -> dict[str, Walk]:
        """The walks by the name of their tower."""
        return {"vision": self.vision, "text": self.text}

    @property
    def device(self) -> torch.device:
        """The device that the CLIP is on."""
        return next(self.clip.parameters()).device

    @cached_property
    def joint(self) -> int:
        """Width of the joint embedding."""
        # By running it: the projection lies at other places and under other names in each family.
        tower = self.text.tower
        with torch.no_grad():
            return int(tower.run(tower.example(1)).shape[-1])

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Return token ids of texts, (text, token), on the backbone's device."""
        if self.tokenizer is None:
            raise UserError("this backbone has no tokenizer; pass the model's to Backbone")
        return self.tokenizer(list(texts)).to(self.device)

    def prompts(self, tokens: Tensor, starts: Iterable[int], margin: int = 0) -> dict[int, State]:
        """Return the frozen state of texts at each of the blocks asked for.

        Args:
            tokens: (text, token) ids, full length.
            starts: Numbers of blocks; depth + 1 stands for the joint embedding.
            margin: Columns to keep behind the longest end-of-text, for a method that sees them.
        """
        enter = partial(self.text.enter, margin=margin)
        return climb(self.text, enter, tokens, starts, self.savings.text_prefix)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Return frozen joint features of texts, (text, joint), not normalised."""
        end = self.text.tower.depth + 1
        return self.features("text", self.prompts(self.tokens(texts), [end])[end])

    def images(self, images: Tensor, starts: Iterable[int]) -> dict[int, State]:
        """Return the frozen state of images at each of the blocks asked for."""
        return climb(self.vision, self.vision.enter, images, starts, self.savings.image_prefix)

    def is_plain(self, starts: Iterable[int]) -> bool:
        """Whether of images nothing but their frozen joint features is asked for, and kept."""
        depth = self.vision.tower.depth
        return self.savings.image_prefix and all(start > depth for start in starts)

    def plain_features(self, key: Hashable, batches: Callable[[], Iterable[Tensor]]) -> Tensor:
        """Return frozen joint features of images, made once for all methods that ask for them.

        The latest are kept, `FEATURE_BYTES` of them in all.

        Args:
            key: Everything that the images and their precision depend on.
            batches: Makes the images, (image, 3, height, width) each.

        Returns:
            (image, joint), not normalised.
        """
        # Taken out and put in again below: dictionaries keep the order of insertion, so that the
        # first key is the one that was not used for longest.
        found = self._features.pop(key, None)
        if found is None:
            end = self.vision.tower.depth + 1
            with torch.no_grad():
                made = [self.features("vision", self.images(x, [end])[end]) for x in batches()]
                found = torch.cat(made) if made else torch.empty(0, self.joint, device=self.device)
        self._features[key] = found  # behind the others: those in front go first
        # The last one stays however large it is: the caller holds it anyway.
        while len(self._features) > 1 and self._kept_bytes() > FEATURE_BYTES:
            self._features.pop(next(iter(self._features)))
        return found

    def _kept_bytes(self) -> int:
        return sum(one.nbytes for one in self._features.values())

    def plain_state(self, features: Tensor) -> State:
        """Return the state of images at the end of the tower from their joint features."""
        end = self.vision.tower.depth + 1
        return State(features, features, end, finished=True)

    def features(self, tower: str, state: State, method: Any = None) -> Tensor:
        """Return joint embeddings from a frozen state on, (item, joint).

        Args:
            tower: `vision` or `text`.
            state: Where to start.
            method: The method that acts on the way; None is the plain backbone.
        """
        walk = self.walks[tower]
        # A finished state is the joint embedding, at which no block is left to act in.
        if self.steps or method is None or state.finished:
            return walk.finish(state, method)
        with method.attached(self.clip):
            return walk.finish(state)

    def logits(self, images: State, prompts: State, method: Any = None) -> Tensor:
        """Return scaled cosines between images and class prompts, (image, class)."""
        features = (
            self.features(name, state, method)
            for name, state in (("vision", images), ("text", prompts))
        )
        return scaled_cosines(self.clip, *features)


def _single(clip: nn.Module) -> nn.Module:
    # A copy, since the model stays its owner's; none where nothing would change.
    half = (torch.float16, torch.bfloat16)
    return deepcopy(clip).float() if any(p.dtype in half for p in clip.parameters()) else clip


def climb(
    walk: Walk,
    enter: Callable[[Tensor], State],
    inputs: Tensor,
    starts: Iterable[int],
    shared: bool = True,
) -> dict[int, State]:
    """Walk up once without a graph and return the state at each of the blocks asked for.

    Block depth + 1 stands for the joint embedding. Without `shared` every other block asked for
    gets the state before block 1: nothing is saved.
    """
    # In rising order: a walk cannot go back, and each state is made from the one below it.
    wanted = sorted(set(starts))
    with torch.no_grad():
        state = enter(inputs)
        found: dict[int, State] = {}
        for block in wanted:
            if block > walk.tower.depth:
                found[block] = replace(state, x=walk.finish(state), block=block, finished=True)
                continue
            if shared:
                state = walk.advance(state, block)
            found[block] = state
    return found


class ViewCache:
    """Frozen image activations of a fixed set of views, filled as they are first seen.

    They stay on the backbone's device where it has room, else in main memory, pinned for a GPU.

    Args:
        backbone: The backbone.
        starts: Blocks whose inputs are needed. All are stored where they fit into `limit` bytes,
            else only the lowest, from where the others are walked to.
        rows: Number of views in all.
        limit: Bytes that the cache may take; `VIEW_BYTES` where None.
    """

    def __init__(
        self, backbone: Backbone, starts: Iterable[int], rows: int, limit: int | None = None
    ) -> None:
        self.backbone, self.starts = backbone, sorted(set(starts))
        self.limit = VIEW_BYTES if limit is None else limit
        self.filled = np.zeros(rows, dtype=bool)
        self.stored: dict[int, Tensor] = {}
        self.form: State | None = None
        # By start, the block whose input is stored: block 1 of all where no prefix is saved.
        self.entered: dict[int, int] = {}
        self._place: dict[str, Any] = {}

    def states(
        self, rows: NDArray[np.int64], load: Callable[[NDArray[np.int64]], Tensor]
    ) -> dict[int, State]:
        """Return the states of some views, computing what is not there yet.

        Args:
            rows: Numbers of the views.
            load: Positions within `rows` to preprocessed images.
        """
        # By row, not all at once: a training that stops early pays for the views that it saw.
        missing = np.flatnonzero(~self.filled[rows])
        if len(missing):
            self._fill(rows[missing], load(missing))
        assert self.form is not None
        index, device = torch.from_numpy(rows), self.form.inputs.device
        index = placed(index, self._place["device"])
        # The walk reads only the number of its inputs from here on; the pixels are not kept.
        inputs = self.form.inputs[:1].expand(len(rows), -1, -1, -1)
        depth = self.backbone.vision.tower.depth
        kept = {
            start: replace(
                self.form,
                x=placed(x[index], device),
                block=self.entered[start],
                inputs=inputs,
                finished=self.entered[start] > depth,
            )
            for start, x in self.stored.items()
        }
        if len(kept) == len(self.starts):
            return kept
        lowest = kept[self.starts[0]]
        return climb(self.backbone.vision, lambda _: lowest, inputs, self.starts)

    def _fill(self, rows: NDArray[np.int64], images: Tensor) -> None:
        states = self.backbone.images(images, self.starts)
        made = {block: state.x for block, state in states.items() if state.x is not None}
        if len(made) < len(states):
            raise NotImplementedError("a backbone that runs whole has no frozen prefix to keep")
        if self.form is None:
            first = states[self.starts[0]]
            # Cloned: a slice would keep the pixels of the whole first batch alive.
            self.form = replace(first, inputs=first.inputs[:1].clone())
            self.entered = {start: state.block for start, state in states.items()}
            views = len(self.filled)
            size = views * sum(x[0].nbytes for x in made.values())
            # The lowest state leads to all others, at the cost of the blocks between.
            keep: Sequence[int] = self.starts if size <= self.limit else self.starts[:1]
            size = views * sum(made[b][0].nbytes for b in keep)
            self._place = self._where(size)
            # Empty, not zeros: in main memory pages are then provided as rows are written, so that
            # views which are never seen take no room.
            self.stored = {
                block: torch.empty(
                    (views, *made[block].shape[1:]), dtype=made[block].dtype, **self._place
                )
                for block in keep
            }
        index = placed(torch.from_numpy(rows), self._place["device"])
        for block, store in self.stored.items():
            store[index] = made[block].detach().to(store.device)
        # Last, so that a batch which fails on the way is computed again.
        self.filled[rows] = True

    def _where(self, size: int) -> dict[str, Any]:
        device = self.backbone.device
        if device.type == "cpu" or size <= available_memory(device) // DEVICE_SHARE:
            return {"device": device}
        # Copies from pinned memory overlap with the GPU's work; from pageable memory they wait.
        return {"device": torch.device("cpu"), "pin_memory": device.type == "cuda"}
