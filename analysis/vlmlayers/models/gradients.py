"""Gradients of the zero-shot loss at each block: how alike those of two tasks are, and how large.

`examine` hands over the images, the prompts and the table that the rows go into.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vlmlayers.errors import UserError
from vlmlayers.metrics.checks import Array
from vlmlayers.metrics.intervals import jackknife_groups, jackknife_interval
from vlmlayers.metrics.model_level import gradient_alignment, relative_gradient_norm
from vlmlayers.models.examined import Inputs, Rows
from vlmlayers.models.residual import Change, changed

# Keys of the draws, which recorded values depend on.
HALVES, SHUFFLED_HALVES, BATCHES = 2, 4, 5
_GROUPS = 10  # of the jackknife
_SHUFFLES = 5  # behind the null of alignment; one is mostly noise, and each is a backward pass


def alignment(table: Rows, name: str) -> None:
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
    measured, *chance = Alignment.of(inputs, labellings, halves, dealt)
    nulls = [one.whole() for one in chance]
    for (tower, block), value in measured.whole().items():
        left_out = np.array([measured.whole(without)[tower, block] for without in range(groups)])
        low, high = jackknife_interval(value, left_out)
        # A jackknife interval is symmetric and may leave the range of a cosine.
        interval = max(float(low), -1.0), min(float(high), 1.0)
        null = float(np.mean([one[tower, block] for one in nulls]))
        table.add(name, tower, str(block), value, interval, null, len(labels), "jackknife")


@dataclass(frozen=True)
class Alignment:
    """Gradients of two losses, (half, group, width), by tower and block."""

    gradients: Mapping[tuple[str, int], Array]

    @classmethod
    def of(
        cls,
        inputs: Inputs,
        labellings: NDArray[np.int64],
        halves: Sequence[NDArray[np.int64]],
        dealt: Sequence[Sequence[NDArray[np.int64]]],
    ) -> list[Alignment]:
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
    inputs: Inputs,
    images: Tensor,
    classes: NDArray[np.int64],
    truths: Tensor,
    places: Sequence[tuple[str, int]],
) -> list[tuple[Tensor, ...]]:
    """Return the gradient of the summed cross-entropy with respect to a shift at each block.

    For each of several truths, (truth, item): one forward pass, and a backward pass for each.
    """
    towers = inputs.model.towers
    with torch.enable_grad(), ExitStack() as stack:
        # All shifts are zero, so that one backward pass gives the gradients of every block.
        shifts = []
        for tower, block in places:
            width = towers[tower].widths[str(block)]
            shift = torch.zeros(width, device=images.device, requires_grad=True)
            stack.enter_context(changed(towers[tower], block, _shifted(shift)))
            shifts.append(shift)
        logits = _logits(inputs, images, inputs.batches["text"][0][torch.from_numpy(classes)])
        # A sum: gradients of groups add up, whatever their sizes.
        return _gradients_of(logits, truths, shifts, "sum")


def _logits(inputs: Inputs, images: Tensor, prompts: Tensor) -> Tensor:
    """Return zero-shot logits, (image, prompt), at the model's own scale."""
    towers = inputs.model.towers
    scale = getattr(inputs.model.clip, "logit_scale", None)
    unit = [
        nn.functional.normalize(towers[tower].run(batch).float(), dim=-1)
        for tower, batch in (("vision", images), ("text", prompts))
    ]
    return unit[0] @ unit[1].T * (100.0 if scale is None else scale.exp().float())


def _gradients_of(
    logits: Tensor, truths: Tensor, places: Sequence[Tensor], reduction: str
) -> list[tuple[Tensor, ...]]:
    """Return the gradients of the cross-entropy with each of several truths, (truth, item)."""
    last = len(truths) - 1
    return [
        torch.autograd.grad(
            nn.functional.cross_entropy(logits, truth.to(logits.device), reduction=reduction),
            places,
            retain_graph=number < last,
            materialize_grads=True,
        )
        for number, truth in enumerate(truths)
    ]


def _shifted(shift: Tensor) -> Change:
    return lambda x, out: out + shift.to(out.dtype)


def norms(table: Rows, name: str) -> None:
    """Add how large the gradient of the zero-shot loss is beside a block's own weights.

    As published it is a mean over batches, whose noise is part of it: the fewer images a batch
    has, the larger it is. The batches are ten, or as many as have two images each.
    """
    inputs, labels = table.inputs, table.inputs.labels
    if len(np.unique(labels)) < 2 or len(labels) < 4:
        raise UserError(f"{name} needs 2 classes and 4 images; {inputs.dataset} has fewer")
    blocks = {
        (tower, block): [one for one in module.parameters() if one.is_floating_point()]
        for tower in inputs.batches
        for block, module in enumerate(inputs.model.towers[tower].blocks, start=1)
    }
    if not all(blocks.values()):
        raise UserError(f"{name} is of a block's weights; one of {inputs.model.name} has none")
    if any(one.dtype == torch.float16 for own in blocks.values() for one in own):
        raise UserError(f"{name} does not fit float16, in which small gradients are 0; use float32")
    rng = np.random.default_rng([table.seed, BATCHES])
    groups = jackknife_groups(labels, min(_GROUPS, len(labels) // 2), rng)
    found = np.array(
        [
            _norms_of_batch(inputs, np.delete(np.arange(len(labels)), stay), blocks, rng)
            for stay in groups
        ]
    )  # (batch, own labels or shuffled, block)
    value, null = found.mean(axis=0)
    left_out = (found[:, 0].sum(axis=0) - found[:, 0]) / (len(found) - 1)
    low, high = jackknife_interval(value, left_out)
    for place, (tower, block) in enumerate(blocks):
        interval = max(float(low[place]), 0.0), float(high[place])
        table.add(
            name, tower, str(block), value[place], interval, null[place], len(labels), "jackknife"
        )


def _norms_of_batch(
    inputs: Inputs,
    rows: NDArray[np.int64],
    blocks: Mapping[tuple[str, int], list[nn.Parameter]],
    rng: np.random.Generator,
) -> Array:
    """Return the relative norm of each block, with the images' labels and shuffled, (2, block)."""
    own = inputs.labels[rows]
    # Inside the batch: both losses have the same classes as often.
    truths = torch.from_numpy(np.stack([own, rng.permutation(own)]))
    images = torch.cat(inputs.batches["vision"])[rows]
    weights = [one for group in blocks.values() for one in group]
    try:
        for one in weights:
            one.requires_grad_(True)
        with torch.enable_grad():
            logits = _logits(inputs, images, inputs.batches["text"][0])
            gradients = _gradients_of(logits, truths, weights, "mean")
    finally:
        for one in weights:
            one.requires_grad_(False)
    found = []
    for parts in gradients:
        left = iter(parts)
        found.append(
            [
                relative_gradient_norm(_lengths([next(left) for _ in group]), _lengths(group))
                for group in blocks.values()
            ]
        )
    return np.array(found)


def _lengths(parts: Sequence[Tensor]) -> Array:
    """Return the length of each tensor, (tensor,), which together have that of them all."""
    # On the device: a block's gradients are megabytes, their lengths a dozen numbers.
    found = [torch.linalg.vector_norm(one.detach(), dtype=torch.float64) for one in parts]
    return np.asarray(torch.stack(found).cpu().numpy())
