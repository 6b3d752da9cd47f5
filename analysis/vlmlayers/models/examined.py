"""What `examine` works on: the images and prompts as the towers take them, and the table's rows."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vlmlayers.errors import UserError
from vlmlayers.metrics.checks import Array
from vlmlayers.metrics.class_level import zero_shot_values
from vlmlayers.metrics.intervals import bootstrap_weights, mean_interval
from vlmlayers.models.extract import prepare
from vlmlayers.models.options import ExtractOptions
from vlmlayers.models.recording import block_outputs
from vlmlayers.models.residual import Change, changed, require_stream
from vlmlayers.models.tower import Tower
from vlmlayers.models.vlm import LoadedModel
from vlmlayers.positions import EMBED, JOINT, relative_depth
from vlmlayers.prompts import EXAMINED

LOG = logging.getLogger(__name__)
WEIGHTS = 1  # key of the bootstrap's draws, which recorded values depend on


@dataclass(frozen=True, eq=False)
class Inputs:
    """Images and class prompts as the towers take them."""

    model: LoadedModel
    dataset: str
    labels: NDArray[np.int64]
    batches: Mapping[str, list[Tensor]]

    @classmethod
    def of(cls, model: Any, data: Any, split: str, options: ExtractOptions) -> Inputs:
        """Return those of a dataset's items, once all is known to be there."""
        if "text" not in model.towers:
            raise UserError(f"{model.name} has no text tower: there is no zero-shot to examine")
        for tower in model.towers.values():
            require_stream(tower)
        if not data.class_names(options.root):
            raise UserError(f"{data.name} has no classes{EXAMINED}")
        work, _, _ = prepare(model, data, split, options)
        work.refuse_missing()
        plan = work.plans()["vision"].batches
        images, kept = [], []
        for _, rows, batch, bad in work.images(plan, range(len(plan))):
            if bad:
                raise UserError(f"{next(iter(bad.values()))}; examine readable images")
            assert batch is not None
            images.append(batch.to(model.device, model.input_dtype))
            kept += rows
        text = model.towers["text"]
        assert work.texts is not None
        prompts = text.cut(model.tokenize(list(work.texts.texts)).to(model.device))
        labels = np.array([int(work.items[row].label) for row in kept], dtype=np.int64)
        return cls(model, work.manifest.name, labels, {"vision": images, "text": [prompts]})

    def embedding(self, tower: str, block: int = 0, change: Change | None = None) -> Array:
        """Return the joint embedding of a tower's items, with one block's output changed or not."""
        side = self.model.towers[tower]
        with torch.inference_mode(), ExitStack() as stack:
            if change is not None:
                stack.enter_context(changed(side, block, change))
            found = [side.run(batch).float().cpu().numpy() for batch in self.batches[tower]]
        return np.concatenate(found).astype(np.float64)

    def mean_added(self, tower: str) -> dict[int, list[Tensor]]:
        """Return what each block adds, averaged over items, per batch and in the tower's layout.

        Images are averaged token by token, without patches that pad them. Texts differ in length:
        their end-of-text tokens are averaged with each other, all tokens before with each other,
        and so are those that pad, and class tokens.
        """
        side = self.model.towers[tower]
        sums: dict[int, Tensor] = {}
        groups = [self._token_groups(side, batch) for batch in self.batches[tower]]
        for batch, group in zip(self.batches[tower], groups):
            seen: dict[str, Tensor] = {}
            with torch.inference_mode(), block_outputs(side, seen.__setitem__):
                side.run(batch)
                for block in range(1, side.depth + 1):
                    before = EMBED if block == 1 else str(block - 1)
                    added = side.tokens(seen[str(block)]) - side.tokens(seen[before])
                    part = torch.einsum("ntg,ntd->gd", group, added.float())
                    sums[block] = sums[block] + part if block in sums else part
        sizes = torch.stack([group.sum((0, 1)) for group in groups])  # (batch, group)
        counts = sizes.sum(0).clamp(min=1)[:, None]
        return {
            block: [
                _back(side, torch.einsum("ntg,gd->ntd", group, total / counts)) for group in groups
            ]
            for block, total in sums.items()
        }

    def _token_groups(self, side: Tower, batch: Tensor) -> Tensor:
        """Return which tokens are averaged together, (item, token, group), in one group at most."""
        seen: dict[str, Tensor] = {}
        with torch.inference_mode(), block_outputs(side, seen.__setitem__):
            side.run(batch[:1])
        count = side.tokens(seen[EMBED]).shape[1]
        if side.ends is None:
            group = torch.eye(count, device=batch.device).expand(len(batch), -1, -1)
            if side.name == "vision" and side.valid is not None:
                return group * side.valid(batch)[..., None]  # patches that pad are nobody's
            return group
        place, ends = torch.arange(count, device=batch.device), side.ends(batch)[:, None]
        # How much pads a text depends on the longest one, and must not enter the mean of words.
        kind = (place >= ends).long() + (place > ends).long()
        kind[:, : side.prefix] = 3
        kind[:, count - side.suffix :] = 3  # behind what pads, and is what such a tower gives out
        return nn.functional.one_hot(kind, 4).float()


def _back(tower: Tower, tokens: Tensor) -> Tensor:
    """Return tokens in the layout of a block's output."""
    return tokens if tower.batch_axis in (None, 0) else tokens.transpose(0, 1)


def _change(means: list[Tensor] | None) -> Change:
    """Return the change that leaves a block out, or lets it add a mean batch by batch."""
    # A mean keeps later blocks on inputs like those of training; skipping also takes a bias away.
    if means is None:
        return lambda x, out: x
    # Means were made batch by batch, and the pass meets the batches in the same order.
    batches = iter(means)
    return lambda x, out: x + next(batches).to(x.dtype)


class Rows:
    """The rows, and how intervals are made."""

    def __init__(self, inputs: Inputs, split: str, seed: int, bootstrap: int) -> None:
        self.inputs, self.split, self.seed, self.draws = inputs, split, seed, bootstrap
        self.rows: list[dict[str, Any]] = []
        self.refused: list[dict[str, str]] = []
        self.base = {tower: inputs.embedding(tower) for tower in inputs.batches}
        self.right = self.zero_shot({})
        self.made: dict[tuple[str, str], list[Array]] = {}

    def without(self, kind: str, tower: str) -> list[Array]:
        """Return the embedding without each block in turn (`skip`), or with its `mean`; once."""
        if (kind, tower) not in self.made:
            means = self.inputs.mean_added(tower) if kind == "mean" else {}
            self.made[kind, tower] = [
                self.inputs.embedding(tower, block, _change(means.get(block)))
                for block in range(1, self.inputs.model.towers[tower].depth + 1)
            ]
        return self.made[kind, tower]

    def refuse(self, metric: str, reason: str) -> None:
        """Note what cannot be computed, as `vlmlayers.score` does, and say so."""
        LOG.warning("%s on %s is left out: %s", metric, self.inputs.dataset, reason)
        place = {"dataset": self.inputs.dataset, "tower": "", "position": ""}
        self.refused.append({"metric": metric, **place, "reason": reason})

    def zero_shot(self, instead: Mapping[str, Array]) -> Array:
        """Return for each image whether it is classified correctly, with some features replaced."""
        # One tower changes at a time, so that a drop belongs to its block.
        side = {**self.base, **instead}
        return zero_shot_values(side["vision"], side["text"], self.inputs.labels)

    def add_mean(
        self,
        metric: str,
        tower: str,
        position: str,
        values: Array,
        null: float = 0.0,
        *,
        difference: bool = False,
    ) -> None:
        """Add the mean of values, one per image or per prompt, with its bootstrap interval.

        A `difference` of right and wrong has a width where it is the same of all items as well, and
        reaches both ways: no item of few has changed is not none of all. See `mean_interval`.
        """
        # By place, not by number: there may be as many prompts as images.
        of_images = tower == "vision" or difference
        strata = self.inputs.labels if of_images else np.zeros(len(values), np.int64)
        rng = np.random.default_rng([self.seed, WEIGHTS])
        weights = bootstrap_weights(strata, self.draws, rng)
        interval = mean_interval(values, weights, difference=difference)
        self.add(metric, tower, position, values.mean(), interval, null, len(values), "bootstrap")

    def add(
        self,
        metric: str,
        tower: str,
        position: str,
        value: float,
        interval: tuple[float, float],
        null: float,
        n: int,
        how: str,
    ) -> None:
        """Add one row."""
        model, side = self.inputs.model, self.inputs.model.towers[tower]
        self.rows.append(
            {
                "model": model.name,
                "weights": model.weights,
                "dataset": self.inputs.dataset,
                "split": self.split,
                "tower": tower,
                "position": position,
                "depth": relative_depth(position, side.depth),
                "space": JOINT,
                "pooling": side.pooling,
                "metric": metric,
                "value": float(value),
                "low": float(interval[0]),
                "high": float(interval[1]),
                "null": float(null),
                "n": n,
                "seed": self.seed,
                "other_tower": "",
                "other_position": "",
                "options": f"interval={how}",
            }
        )
