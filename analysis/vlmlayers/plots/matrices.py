"""Heat maps: agreement of the towers' positions, and a metric per dataset and position."""

from __future__ import annotations

from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.transforms import ScaledTranslation

from vlmlayers.arguments import checked
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.placement import runs
from vlmlayers.plots.depth import check_choice, on_tower
from vlmlayers.plots.style import (
    OPEN_ALPHA,
    SEQUENTIAL,
    TOWER_COLOURS,
    axes,
    axis_label,
    label_text,
    mark_random,
    short_names,
    sparse_labels,
    style,
)
from vlmlayers.positions import TOWERS, sort_key
from vlmlayers.scores.reading import Reading, is_random
from vlmlayers.scores.schema import Scores
from vlmlayers.scores.summaries import agreement, curves
from vlmlayers.selection import LayerChoice

LOW = 1.3  # inches: a colour bar below this is shorter than its label


@checked
def agreement_matrix(
    scores: Scores,
    metric: str = "cka_debiased",
    *,
    tower: str = "vision",
    other_tower: str = "text",
    dataset: str | None = None,
    choice: LayerChoice | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw agreement between every position of a tower and every position of another.

    Args:
        scores: Score table of one model.
        metric: A metric that relates two positions.
        tower: Tower on the vertical axis.
        other_tower: Tower on the horizontal axis; the same name for agreement within a tower.
        dataset: One dataset; None takes the pooled rows, or the mean over datasets.
        choice: Layers whose blocks are marked along both axes.
        ax: Axes to draw on.

    Raises:
        UserError: The metric is absent, or no pair of these towers was measured.
    """
    for name in (tower, other_tower):
        check_one_of("tower", name, TOWERS)
    frame = agreement(scores, metric, tower, other_tower, dataset)
    Reading(dataset=dataset).say_choice(scores, metric)
    if frame.empty:
        raise UserError(f"metric {metric!r} was not measured between {tower} and {other_tower}")
    if frame["position"].is_unique and len(frame) > 1:
        raise UserError(
            f"metric {metric!r} relates each position to its partner only, which is not a matrix; "
            "draw it with `layer_curves`"
        )
    rows, columns = _ordered(frame["position"]), _ordered(frame["other_position"])
    grid = frame.pivot(index="position", columns="other_position", values="value").reindex(
        index=rows, columns=columns
    )
    with style():
        ax = axes(ax, (3.35, 2.9))
        _image(ax, grid.to_numpy(float), axis_label(metric))
        ax.set_xticks(range(len(columns)), _labels(columns, 8), rotation=90)
        ax.set_yticks(range(len(rows)), _labels(rows, 13))
        ax.set_xlabel(f"{other_tower.capitalize()} position")
        ax.set_ylabel(f"{tower.capitalize()} position")
        if choice is not None:
            check_choice(choice, scores, (tower, other_tower))
            _mark(ax, choice, tower, rows, vertical=True)
            _mark(ax, choice, other_tower, columns, vertical=False)
        return mark_random(ax, is_random(scores))


@checked
def dataset_heatmap(
    scores: Scores,
    metric: str = "class_accuracy",
    *,
    tower: str = "vision",
    choice: LayerChoice | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw a metric for every dataset (rows) and position (columns) of one tower.

    Raises:
        UserError: The metric is not in the table, or not on this tower.
    """
    frame = on_tower(curves(scores, metric), metric, tower)
    Reading().say_choice(scores, metric)
    columns = _ordered(frame["position"])
    grid = frame.pivot(index="dataset", columns="position", values="value").reindex(
        index=list(dict.fromkeys(frame["dataset"])), columns=columns
    )
    with style():
        ax = axes(ax, (3.35, 1.0 + 0.2 * len(grid)))
        _image(ax, grid.to_numpy(float), fill(axis_label(metric), max(16, 6 + 3 * len(grid))))
        ax.set_xticks(range(len(columns)), _labels(columns, 8), rotation=90)
        ax.set_yticks(
            range(len(grid)),
            short_names(
                [label_text(str(n), grid.index) if n != "*" else "all datasets" for n in grid.index]
            ),
        )
        ax.set_xlabel(f"{tower.capitalize()} position")
        if choice is not None:
            check_choice(choice, scores, (tower,))
            _mark(ax, choice, tower, columns, vertical=False)
        return mark_random(ax, is_random(scores))


def _ordered(positions: Any) -> list[str]:
    return sorted({str(p) for p in positions}, key=sort_key)


def _labels(names: list[str], most: int) -> list[str]:
    """Return tick labels; where there is no room for all, the last has no neighbour."""
    labels = sparse_labels(names, most)
    return [*labels[:-2], "", labels[-1]] if "" in labels and labels[-1] else labels


def _image(ax: Axes, grid: np.ndarray, label: str) -> None:
    # Masked cells take no part in the range of colours; `nearest`, since matplotlib would blend
    # neighbouring cells wherever it shrinks an image.
    image = ax.imshow(
        np.ma.masked_invalid(grid), aspect="auto", cmap=SEQUENTIAL, interpolation="nearest"
    )
    ax.set_facecolor("#EFEFEF")
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    low = ax.get_window_extent().height / ax.figure.dpi < LOW
    bar = ax.figure.colorbar(image, ax=ax, fraction=0.05, pad=0.02, aspect=4 if low else 20)
    bar.outline.set_visible(False)
    if low:
        ax.set_title(label, loc="left")  # beside so low a bar the label would be cut off
        bar.set_ticks(sorted(set(image.get_clim())))  # of more, one would cover the next
        bar.ax.yaxis.set_major_formatter("{x:.2g}")
    else:
        bar.set_label(label)


def _mark(ax: Axes, choice: LayerChoice, tower: str, names: list[str], *, vertical: bool) -> None:
    """Mark blocks along an axis as `strip` does: chosen ones in full colour, open ones pale."""
    ax.tick_params(axis="y" if vertical else "x", pad=5, length=0)
    places = {int(name): i for i, name in enumerate(names) if name.isdecimal()}
    by_standing: dict[str, list[int]] = {}
    for block, how in enumerate(choice.standing(tower, max(places, default=0)), 1):
        if block in choice.blocks(tower) and block in places:
            by_standing.setdefault(how, []).append(block)
    spans = [(how, run[0], run[-1]) for how, blocks in by_standing.items() for run in runs(blocks)]
    for how, first, last in spans:
        ends = [places[first] - 0.5, places[last] + 0.5]
        line = ([0, 0], ends) if vertical else (ends, [0, 0])
        left, down = (-2.2 / 72, 0.0) if vertical else (0.0, -2.2 / 72)  # between axes and labels
        along = ax.get_yaxis_transform() if vertical else ax.get_xaxis_transform()
        transform = along + ScaledTranslation(left, down, ax.figure.dpi_scale_trans)
        ax.plot(
            *line,
            color=TOWER_COLOURS[tower],
            alpha=OPEN_ALPHA if how == "open" else 1.0,
            label=f"_{tower} {first}-{last} {how}",
            linewidth=2.5,
            transform=transform,
            clip_on=False,
            solid_capstyle="butt",
        )
