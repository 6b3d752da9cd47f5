"""What each block does in its model: taken out, as a part of the embedding, and by gradients.

Scores of features say what a block holds; these say what the model makes of it. Each is a forward
or backward pass over a few hundred images and the class prompts, and a row of the score table.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vlmlayers.arguments import Count, Seed, checked
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.manifests import Item
from vlmlayers.metrics.checks import Array
from vlmlayers.metrics.class_level import zero_shot_values
from vlmlayers.metrics.intervals import (
    bootstrap_weights,
    jackknife_groups,
    jackknife_interval,
    mean_interval,
)
from vlmlayers.metrics.model_level import (
    accuracy_drops,
    contribution_shares,
    gradient_alignment,
    joint_changes,
    zero_shot_margins,
)
from vlmlayers.models.extract import prepare
from vlmlayers.models.modes import at_rest, in_float32, on_cpu
from vlmlayers.models.options import Dataset, ExtractOptions
from vlmlayers.models.recording import block_outputs
from vlmlayers.models.residual import BIAS, Change, changed, contributions, require_stream
from vlmlayers.models.tower import Tower
from vlmlayers.models.vlm import LoadedModel
from vlmlayers.models.work import autocast
from vlmlayers.positions import EMBED, JOINT, PROJ, relative_depth
from vlmlayers.progress import bar
from vlmlayers.prompts import EXAMINED
from vlmlayers.scores.missing import NothingScored
from vlmlayers.scores.schema import score_frame

if TYPE_CHECKING:
    import pandas as pd

LOG = logging.getLogger(__name__)
# Keys of the draws, which recorded values depend on.
WEIGHTS, HALVES, SHUFFLED, SHUFFLED_HALVES = 1, 2, 3, 4
_GROUPS = 10  # of the jackknife over gradients
_SHUFFLES = 5  # behind the null of gradients; one is mostly noise, and each is a backward pass


@on_cpu()
@checked
def examine(
    model: LoadedModel,
    data: Dataset,
    split: str = "train",
    metrics: Sequence[str] | None = None,
    *,
    items: Count | Sequence[Item] = 200,
    root: str | Path | None = None,
    template: str | None = None,
    batch_size: Count = 32,
    seed: Seed = 0,
    bootstrap: Count = 200,
    progress: bool = True,
) -> pd.DataFrame:
    """Return scores that need the model itself: what each block of both towers does in it.

    `pandas.concat([scores, examine(…)])` is a score table; rules read it as `metric:NAME`.

    Args:
        model: What `load_model` returns; its blocks must be residual, not stages.
        data: A dataset's name, path or `Manifest`.
        split: `train`, `val` or `test`.
        metrics: Names of `vlmlayers.metrics.METRICS` that need the model; None for all of them.
        items: Images to draw with balanced classes, or the items themselves.
        root: Data root; see `Manifest`.
        template: Prompt with `{}` for the class name; the manifest's common one where None.
        batch_size: Images per forward pass.
        seed: Seed of the draw of items, and of the split of classes of `gradient_alignment`.
        bootstrap: Draws of each interval.
        progress: Show a progress bar.

    Returns:
        A table with `SCORE_COLUMNS`. `n` counts images, or prompts where a value is of prompts
        alone. The null is what a block gives that does nothing: 0; of `gradient_alignment` it is
        the mean over five shuffles of the labels inside each half of the classes, and of
        `zero_shot_margin`, which has one row per dataset, that with all labels shuffled.
        `attrs["refused"]` says what could not be computed, and why: `contribution` of a tower with
        an attention pool, `gradient_alignment` of fewer than four classes.

    Raises:
        UserError: Unknown metric, a tower of stages, no text tower, nothing that could be
            computed, or what `extract` raises.
    """
    names = tuple(_MEASURES) if metrics is None else tuple(metrics)
    if not names:
        raise UserError("examine needs a metric; name one, or leave metrics out for all of them")
    for name in names:
        check_one_of("metric", name, _MEASURES)
    # The caller may hold inference mode, which knows no gradients, or types of its own.
    with torch.inference_mode(False), autocast(model.device, "fp32"), in_float32():
        inputs = _Inputs.of(
            model,
            data,
            split,
            ExtractOptions(
                items=items,
                root=None if root is None else Path(root),
                template=template,
                batch_size=batch_size,
                seed=seed if isinstance(items, int) else 0,
                progress=progress,
            ),
        )
        with at_rest(model.clip):
            table = _Rows(inputs, split, seed, bootstrap)
            for name in bar(names, "examining", unit="metric", show=progress):
                try:
                    _MEASURES[name](table, name)
                except UserError as error:
                    table.refuse(name, str(error))
    if not table.rows:
        raise NothingScored(table.refused[0]["reason"], table.refused)
    protocol = {"items": len(inputs.labels), "seed": seed, "bootstrap": bootstrap}
    return score_frame(table.rows, refused=table.refused, protocol=protocol)


@dataclass(frozen=True, eq=False)
class _Inputs:
    """Images and class prompts as the towers take them."""

    model: LoadedModel
    dataset: str
    labels: NDArray[np.int64]
    batches: Mapping[str, list[Tensor]]

    @classmethod
    def of(cls, model: Any, data: Any, split: str, options: ExtractOptions) -> _Inputs:
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
        and so are those that pad.
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
        return nn.functional.one_hot(kind, 3).float()


def _back(tower: Tower, tokens: Tensor) -> Tensor:
    """Return tokens in the layout of a block's output."""
    return tokens if tower.batch_axis in (None, 0) else tokens.transpose(0, 1)


class _Rows:
    """The rows, and how intervals are made."""

    def __init__(self, inputs: _Inputs, split: str, seed: int, bootstrap: int) -> None:
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

        A `difference` of right and wrong has a width where it is the same of all items as well:
        no item of few has changed is not none of all. See `mean_interval`.
        """
        labels = self.inputs.labels
        strata = labels if len(values) == len(labels) else np.zeros(len(values), np.int64)
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


def _intervene(table: _Rows, name: str) -> None:
    """Add what changes when a block is skipped, or adds its mean."""
    kind, what = name.split("_", 1)
    for tower in table.inputs.batches:
        for block, found in enumerate(table.without(kind, tower), start=1):
            drop = what == "accuracy_drop"
            if drop:
                values = accuracy_drops(table.right, table.zero_shot({tower: found}))
            else:
                values = joint_changes(table.base[tower], found)
            table.add_mean(name, tower, str(block), values, difference=drop)


def _change(means: list[Tensor] | None) -> Change:
    """Return the change that leaves a block out, or lets it add a mean batch by batch."""
    # A mean keeps later blocks on inputs like those of training; skipping also takes a bias away.
    if means is None:
        return lambda x, out: x
    # Means were made batch by batch, and the pass meets the batches in the same order.
    batches = iter(means)
    return lambda x, out: x + next(batches).to(x.dtype)


def _contribution(table: _Rows, name: str) -> None:
    """Add the share of the embedding that each part of the stream makes."""
    inputs = table.inputs
    for tower, batches in inputs.batches.items():
        found = [contributions(inputs.model.towers[tower], batch) for batch in batches]
        whole = table.base[tower]
        for position in found[0]:
            if position != BIAS:
                part = torch.cat([one[position] for one in found])
                table.add_mean(
                    name, tower, position, contribution_shares(part.cpu().numpy(), whole)
                )


def _margin(table: _Rows, name: str) -> None:
    """Add how clearly images match their class: how near the dataset is to the pretraining."""
    labels, side = table.inputs.labels, table.base
    shuffled = np.random.default_rng([table.seed, SHUFFLED]).permutation(labels)
    found, chance = (
        zero_shot_margins(side["vision"], side["text"], truth) for truth in (labels, shuffled)
    )
    table.add_mean(name, "vision", PROJ, found, float(chance.mean()))


def _gradients(table: _Rows, name: str) -> None:
    """Add how alike the gradients of two halves of the classes are, with respect to a shift.

    A vector added to all tokens of a block's output stands for the block's parameters: it is what
    an adapter's bias is, and short enough to keep for every group of a jackknife.
    """
    inputs, labels = table.inputs, table.inputs.labels
    present = np.unique(labels)
    if len(present) < 4:
        raise UserError(f"{name} needs 4 classes, two in each half; {inputs.dataset} has fewer")
    rng = np.random.default_rng([table.seed, HALVES])
    halves = np.array_split(rng.permutation(present), 2)
    of = [np.flatnonzero(np.isin(labels, half)) for half in halves]
    labellings = np.tile(labels, (1 + _SHUFFLES, 1))
    draws = np.random.default_rng([table.seed, SHUFFLED_HALVES])
    # Inside each half: both losses keep their classes, and lose what tells the images apart.
    for shuffled, rows in product(labellings[1:], of):
        shuffled[rows] = draws.permutation(labels[rows])
    groups = min(_GROUPS, *(len(rows) for rows in of))
    kept = [jackknife_groups(labels[rows], groups, rng) for rows in of]
    dealt = [[np.delete(rows, stay) for stay in parts] for rows, parts in zip(of, kept)]
    measured, *chance = _Alignment.of(inputs, labellings, halves, dealt)
    nulls = [one.whole() for one in chance]
    for (tower, block), value in measured.whole().items():
        left_out = np.array([measured.whole(without)[tower, block] for without in range(groups)])
        low, high = jackknife_interval(value, left_out)
        # A jackknife interval is symmetric and may leave the range of a cosine.
        interval = max(float(low), -1.0), min(float(high), 1.0)
        null = float(np.mean([one[tower, block] for one in nulls]))
        table.add(name, tower, str(block), value, interval, null, len(labels), "jackknife")


@dataclass(frozen=True)
class _Alignment:
    """Gradients of two losses, (half, group, width), by tower and block."""

    gradients: Mapping[tuple[str, int], Array]

    @classmethod
    def of(
        cls,
        inputs: _Inputs,
        labellings: NDArray[np.int64],
        halves: Sequence[NDArray[np.int64]],
        dealt: Sequence[Sequence[NDArray[np.int64]]],
    ) -> list[_Alignment]:
        """Return those of each labelling of the images, (labelling, item)."""
        images = torch.cat(inputs.batches["vision"])
        places = [
            (t, b) for t in inputs.batches for b in range(1, inputs.model.towers[t].depth + 1)
        ]
        found: list[dict[tuple[str, int], list[list[Array]]]] = [
            {place: [[], []] for place in places} for _ in labellings
        ]
        for half, (classes, groups) in enumerate(zip(halves, dealt)):
            classes = np.sort(classes)
            for rows in groups:
                truths = torch.from_numpy(np.searchsorted(classes, labellings[:, rows]))
                gradients = _shift_gradients(inputs, images[rows], classes, truths, places)
                for own, parts in zip(found, gradients):
                    for place, part in zip(places, parts):
                        own[place][half].append(part.double().cpu().numpy())
        return [cls({place: np.array(parts) for place, parts in own.items()}) for own in found]

    def whole(self, without: int | None = None) -> dict[tuple[str, int], float]:
        """Return the cosine of the two summed gradients, one group left out or none."""
        made = {}
        for place, parts in self.gradients.items():
            rest = parts if without is None else np.delete(parts, without, axis=1)
            base, novel = rest.sum(axis=1)
            made[place] = gradient_alignment(base, novel)
        return made


def _shift_gradients(
    inputs: _Inputs,
    images: Tensor,
    classes: NDArray[np.int64],
    truths: Tensor,
    places: Sequence[tuple[str, int]],
) -> list[tuple[Tensor, ...]]:
    """Return the gradient of the summed cross-entropy with respect to a shift at each block.

    For each of several truths, (truth, item): one forward pass, and a backward pass for each.
    """
    towers = inputs.model.towers
    prompts = inputs.batches["text"][0][torch.from_numpy(classes)]
    scale = getattr(inputs.model.clip, "logit_scale", None)
    with torch.enable_grad(), ExitStack() as stack:
        # All shifts are zero, so that one backward pass gives the gradients of every block.
        shifts = []
        for tower, block in places:
            width = towers[tower].widths[str(block)]
            shift = torch.zeros(width, device=images.device, requires_grad=True)
            stack.enter_context(changed(towers[tower], block, _shifted(shift)))
            shifts.append(shift)
        unit = [
            nn.functional.normalize(towers[tower].run(batch).float(), dim=-1)
            for tower, batch in (("vision", images), ("text", prompts))
        ]
        logits = unit[0] @ unit[1].T * (100.0 if scale is None else scale.exp().float())
        # A sum: gradients of groups add up, whatever their sizes.
        losses = [
            nn.functional.cross_entropy(logits, truth.to(logits.device), reduction="sum")
            for truth in truths
        ]
        last = len(losses) - 1
        return [
            torch.autograd.grad(loss, shifts, retain_graph=number < last)
            for number, loss in enumerate(losses)
        ]


def _shifted(shift: Tensor) -> Change:
    return lambda x, out: out + shift.to(out.dtype)


_MEASURES: Mapping[str, Callable[[_Rows, str], None]] = MappingProxyType(
    {
        "skip_accuracy_drop": _intervene,
        "skip_joint_change": _intervene,
        "mean_accuracy_drop": _intervene,
        "mean_joint_change": _intervene,
        "contribution": _contribution,
        "gradient_alignment": _gradients,
        "zero_shot_margin": _margin,
    }
)
