"""Figures over depth: curves with bands and chance, gap, and how often each block is chosen."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from vlmlayers.arguments import checked
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.placement import describe_blocks
from vlmlayers.plots.layout import DepthAxis, runs
from vlmlayers.plots.style import (
    CHANCE_COLOUR,
    TOWER_COLOURS,
    TOWER_MARKERS,
    axes,
    axis_label,
    category,
    mark_random,
    style,
)
from vlmlayers.positions import TOWERS
from vlmlayers.scores.reading import POOLED, Reading, Scores, depths
from vlmlayers.scores.summaries import curves, over_datasets
from vlmlayers.selection import LayerChoice


def is_random(scores: pd.DataFrame) -> bool:
    """Return whether the table comes from an untrained backbone."""
    return bool((scores["weights"].astype(str) == "random").any())


@checked
def layer_curves(
    scores: Scores,
    metric: str = "dataset_accuracy",
    *,
    choice: LayerChoice | None = None,
    dataset: str | None = None,
    space: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw a metric along both towers with bands, the chance line and the chosen blocks.

    A point is the mean over seeds, and over datasets where neither one is asked for nor pooled
    rows are there. Of several poolings, splits or spaces one is drawn, which a warning names.

    Args:
        scores: Score table of one model.
        metric: Metric to draw.
        choice: Layers whose blocks are shaded, vision below and text above.
        dataset: One dataset; None takes the pooled rows, or the mean over datasets.
        space: Space to read; None takes the first present.
        ax: Axes to draw on; a new figure where None.

    Raises:
        UserError: The metric is not in the table, or the table holds several models or scorings.
    """
    with style():
        frame = over_datasets(curves(scores, metric, dataset, space))
        Reading(space=space).say_choice(scores, metric)
        ax = axes(ax)
        axis = DepthAxis.of(frame, depths(scores))
        for tower, part in frame.groupby("tower", sort=False):
            _line(
                ax,
                axis,
                part,
                str(tower),
                label=str(tower).capitalize(),
                color=TOWER_COLOURS[str(tower)],
                marker=TOWER_MARKERS[str(tower)],
            )
        _chance(ax, axis, frame)
        axis.draw(ax)
        if choice is not None:
            shade(ax, axis, choice)
        ax.set_ylabel(axis_label(metric))
        legend(ax)
        return mark_random(ax, is_random(scores))


@checked
def gap_curves(
    scores: Scores,
    metric: str = "centroid_gap",
    *,
    tower: str = "vision",
    choice: LayerChoice | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw a metric of the modality gap along depth, one line per dataset.

    Raises:
        UserError: The metric is not in the table, or not on this tower.
    """
    return dataset_curves(scores, metric, tower=tower, choice=choice, ax=ax)


@checked
def dataset_curves(
    scores: Scores,
    metric: str,
    *,
    tower: str = "vision",
    choice: LayerChoice | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw a metric along one tower, one line per dataset.

    Raises:
        UserError: The metric is not in the table, or not on this tower.
    """
    with style():
        frame = on_tower(curves(scores, metric), metric, tower)
        Reading().say_choice(scores, metric)
        ax = axes(ax)
        axis = DepthAxis.of(frame, depths(scores))
        for number, (name, part) in enumerate(frame.groupby("dataset", sort=False)):
            label = "all datasets" if name == POOLED else str(name)
            _line(ax, axis, part, tower, label=_plain(label), **category(number))
        _chance(ax, axis, frame)
        axis.draw(ax)
        if choice is not None:
            shade(ax, axis, choice, towers=(tower,))
        ax.set_ylabel(axis_label(metric))
        legend(ax)
        return mark_random(ax, is_random(scores))


def on_tower(frame: pd.DataFrame, metric: str, tower: str) -> pd.DataFrame:
    """Return the rows of one tower.

    Raises:
        UserError: There is no such tower, or the metric has no value on it.
    """
    check_one_of("tower", tower, TOWERS)
    rows = frame[frame["tower"] == tower]
    if rows.empty:
        raise UserError(f"metric {metric!r} has no value on the {tower} tower")
    return rows


def legend(ax: Axes) -> None:
    """Name the lines: inside the axes where there are few, else above them in columns."""
    lines = len(ax.get_legend_handles_labels()[1])
    place: dict[str, Any] = {"loc": "best", "frameon": True, "framealpha": 0.9, "edgecolor": "none"}
    if lines > 3:  # a larger one would hide curves
        place = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 4, "fontsize": 6}
        if lines < 6:
            place |= {"ncols": 2 if lines == 4 else 3, "fontsize": 7}
    ax.legend(handlelength=1.6, columnspacing=1.2, **place)


def _line(ax: Axes, axis: DepthAxis, part: pd.DataFrame, tower: str, **options: Any) -> None:
    x = [axis.x(tower, str(position)) for position in part["position"]]
    options.setdefault("marker", ".")
    ax.plot(x, part["value"], **options)
    ax.fill_between(x, part["low"], part["high"], color=options["color"], alpha=0.16, linewidth=0)


def _chance(ax: Axes, axis: DepthAxis, frame: pd.DataFrame) -> None:
    """Draw what chance gives at each position: one line, or one per tower where they differ.

    Where the curves of a tower have their own, as those of several datasets may, a band spans them.
    """
    known = frame.dropna(subset=["null"])
    levels = [
        (str(tower), part.groupby("order").agg(position=("position", "first"), low=("null", "min"),
                                               high=("null", "max"), null=("null", "mean")))
        for tower, part in known.groupby("tower", sort=False)
    ]  # fmt: skip
    if not levels:
        return
    seen = pd.concat([known["null"], frame["value"].dropna()])
    tolerance = 0.01 * float(seen.max() - seen.min())
    shared = _alike(levels, tolerance)
    for tower, level in [max(levels, key=lambda one: len(one[1]))] if shared else levels:
        colour = CHANCE_COLOUR if shared else TOWER_COLOURS[tower]
        look: dict[str, Any] = {
            "color": colour,
            "linestyle": (0, (4, 2)),
            "linewidth": 0.9,
            "marker": "",
        }
        label = "Chance" if shared else f"Chance, {tower}"
        if level["null"].max() - level["null"].min() <= tolerance:
            ax.axhline(float(level["null"].min() + level["null"].max()) / 2, label=label, **look)
            if (level["high"] - level["low"]).max() > tolerance:
                band = float(level["low"].min()), float(level["high"].max())
                ax.axhspan(*band, color=colour, alpha=0.12, linewidth=0)
        else:
            x = [axis.x(tower, str(position)) for position in level["position"]]
            ax.plot(x, level["null"], label=label, **look)
            ax.fill_between(x, level["low"], level["high"], color=colour, alpha=0.12, linewidth=0)


def _alike(levels: list[tuple[str, pd.DataFrame]], tolerance: float) -> bool:
    """Return whether chance is the same for all towers at the positions that they share."""
    nulls = pd.concat([level.set_index("position")["null"] for _, level in levels], axis=1)
    both = nulls.dropna()
    return bool(((both.max(axis=1) - both.min(axis=1)) <= tolerance).all())


def shade(
    ax: Axes, axis: DepthAxis, choice: LayerChoice, towers: tuple[str, ...] = ("vision", "text")
) -> None:
    """Shade the chosen blocks: the lower half of the axes for vision, the upper for text.

    Where the axes show one tower only, its blocks take the whole height.
    """
    towers = tuple(tower for tower in towers if tower in axis.blocks)
    for tower in towers:
        low, high = (
            (0.0, 1.0) if len(towers) == 1 else (0.0, 0.5) if tower == "vision" else (0.5, 1.0)
        )
        for first, last in runs(choice.blocks(tower)):
            ax.axvspan(
                axis.span(tower, first)[0],
                axis.span(tower, last)[1],
                low,
                high,
                color=TOWER_COLOURS[tower],
                alpha=0.09,
                linewidth=0,
                zorder=0,
            )


@checked
def selection_frequency(choice: LayerChoice, ax: Axes | None = None) -> Axes:
    """Draw how often each block was chosen over resampled score tables.

    Raises:
        UserError: The choice was made without resampling.
    """
    towers = {
        tower: found
        for tower, found in choice.evidence.get("towers", {}).items()
        if "frequency" in found
    }
    if not towers:
        raise UserError("the choice holds no selection frequency; select with resamples above 0")
    with style():
        ax = axes(ax, (3.35, 2.0))
        axis = DepthAxis({tower: found["depth"] for tower, found in towers.items()}, ())
        width = 0.8 / len(towers)  # of the deeper tower, so that no bar covers another
        for number, (tower, found) in enumerate(towers.items()):
            shift = (number - (len(towers) - 1) / 2) * width
            x = [axis.x(tower, str(b + 1)) + shift for b in range(found["depth"])]
            chosen = [b + 1 in choice.blocks(tower) for b in range(found["depth"])]
            bars = ax.bar(
                x,
                found["frequency"],
                width * 0.92,
                color=TOWER_COLOURS[tower],
                label=f"{tower.capitalize()} ({describe_blocks(choice.blocks(tower))})",
            )
            for bar, kept in zip(bars, chosen):
                bar.set_alpha(1.0 if kept else 0.35)
        axis.draw(ax)
        ax.set_xlim(0.3, axis.length + 0.7)
        ax.set_ylim(0, 1.02)
        ax.set_ylabel("Share of resamples")
        legend = ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        for handle in legend.legend_handles:
            if handle is not None:
                handle.set_alpha(1.0)
        return mark_random(ax, bool(choice.evidence.get("random_weights")))


def _plain(text: str) -> str:
    """Return text that matplotlib does not read as mathematics or as a hidden label."""
    return text.replace("$", r"\$").lstrip("_")
