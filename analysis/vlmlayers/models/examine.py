"""What each block does in its model: taken out, as a part of the embedding, and by gradients.

Scores of features say what a block holds; these say what the model makes of it. Each is a forward
or backward pass over a few hundred images and the class prompts, and a row of the score table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

from vlmlayers.arguments import Count, Seed, checked
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.metrics.model_level import (
    accuracy_drops,
    chance_margin,
    contribution_shares,
    joint_changes,
    zero_shot_margins,
)
from vlmlayers.models import gradients
from vlmlayers.models.examined import Inputs, Rows
from vlmlayers.models.modes import at_rest, in_float32, in_turn, on_cpu
from vlmlayers.models.options import Dataset, ExtractOptions, Items
from vlmlayers.models.residual import BIAS, contributions
from vlmlayers.models.vlm import LoadedModel
from vlmlayers.models.work import autocast
from vlmlayers.positions import PROJ
from vlmlayers.progress import bar
from vlmlayers.scores.missing import NothingScored
from vlmlayers.scores.schema import score_frame

if TYPE_CHECKING:
    import pandas as pd


@on_cpu()
@checked
def examine(
    model: LoadedModel,
    data: Dataset,
    split: str = "train",
    metrics: Sequence[str] | None = None,
    *,
    items: Items = 200,
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
        seed: Seed of the draw of items, of the split of classes of `gradient_alignment` and of the
            batches of `relative_gradient_norm`.
        bootstrap: Draws of each interval.
        progress: Show a progress bar.

    Returns:
        A table with `SCORE_COLUMNS`. `n` counts images, or prompts where a value is of prompts
        alone. The null is what a block gives that does nothing: 0; of `gradient_alignment` it is
        the mean over five shuffles of the labels inside each half of the classes, of
        `relative_gradient_norm` that with the labels of each batch shuffled, and of
        `zero_shot_margin`, which has one row per dataset, the mean over all ways to shuffle them.
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
    with (
        in_turn(model.clip),
        torch.inference_mode(False),
        autocast(model.device, "fp32"),
        in_float32(),
    ):
        inputs = Inputs.of(
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
            table = Rows(inputs, split, seed, bootstrap)
            for name in bar(names, "examining", unit="metric", show=progress):
                try:
                    _MEASURES[name](table, name)
                except UserError as error:
                    table.refuse(name, str(error))
    if not table.rows:
        raise NothingScored(table.refused[0]["reason"], table.refused)
    protocol = {"items": len(inputs.labels), "seed": seed, "bootstrap": bootstrap}
    return score_frame(table.rows, refused=table.refused, protocol=protocol)


def _intervene(table: Rows, name: str) -> None:
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


def _contribution(table: Rows, name: str) -> None:
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


def _margin(table: Rows, name: str) -> None:
    """Add how clearly images match their class: how near the dataset is to the pretraining."""
    given = table.base["vision"], table.base["text"], table.inputs.labels
    table.add_mean(name, "vision", PROJ, zero_shot_margins(*given), chance_margin(*given))


_MEASURES: Mapping[str, Callable[[Rows, str], None]] = MappingProxyType(
    {
        "skip_accuracy_drop": _intervene,
        "skip_joint_change": _intervene,
        "mean_accuracy_drop": _intervene,
        "mean_joint_change": _intervene,
        "contribution": _contribution,
        "gradient_alignment": gradients.alignment,
        "relative_gradient_norm": gradients.norms,
        "zero_shot_margin": _margin,
    }
)
