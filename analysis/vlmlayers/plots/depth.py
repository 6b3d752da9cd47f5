"""Figures over depth: curves with bands and chance, gap, and how often each block is chosen."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from textwrap import fill
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import is_color_like
from matplotlib.transforms import ScaledTranslation

from vlmlayers.arguments import checked
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.placement import describe_blocks
from vlmlayers.plots.layout import DepthAxis, tail_of
from vlmlayers.plots.style import (
    CATEGORY_DASHES,
    CHANCE_COLOUR,
    NAME,
    OPEN_ALPHA,
    TOWER_COLOURS,
    TOWER_MARKERS,
    axes,
    axis_label,
    category,
    colours_of,
    label_text,
    mark_random,
    short_names,
    style,
)
from vlmlayers.positions import TOWERS, sort_key
from vlmlayers.scores.reading import (
    POOLED,
    Reading,
    ceiling,
    depths,
    is_random,
    metric_names,
)
from vlmlayers.scores.schema import Scores
from vlmlayers.scores.summaries import (
    DATASET_ACCURACIES,
    curves,
    dataset_readout,
    metrics_by_shape,
    over_datasets,
)
from vlmlayers.selection import LayerChoice

LOG = logging.getLogger(__name__)
MANY = 9  # lines; the names of more take more room than a column has
ROW = 0.12  # inches that a row of names takes
LINE = 36  # characters of a name that fit into a column, where there are few


@checked
def layer_curves(
    scores: Scores,
    metric: str | None = None,
    *,
    hue: Literal["model", "pooling", "dataset"] | None = None,
    tower: str | None = None,
    label: str | None = None,
    color: str | None = None,
    palette: Any = None,
    choice: LayerChoice | None = None,
    dataset: str | None = None,
    space: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw a metric along the towers with bands, the chance line and the chosen blocks.

    A point is the mean over seeds, and over datasets where neither one is asked for nor pooled
    rows are there. Of several poolings, splits or spaces one is drawn, which a warning names.

    Args:
        scores: Score table; of one model, or of several with `hue="model"`.
        metric: Metric to draw; dataset accuracy where None, or the first that a table without one
            has, as that of a single dataset.
        hue: What gets a line and a colour each; None draws one line per tower.
        tower: `vision` or `text`; None draws both, with `hue` in different dashes.
        label: Name of the lines in the legend, for several calls on the same axes.
        color: Colour of the lines; several calls on the same axes need one each.
        palette: Colours of `hue`, as seaborn takes them: a name, a list, or a mapping.
        choice: Layers whose blocks are marked under the axis, open ones pale.
        dataset: One dataset; None takes the pooled rows, or the mean over datasets.
        space: Space to read; None takes the first present.
        ax: Axes to draw on; a new figure where None.

    Raises:
        UserError: The metric is not in the table, not on this tower or within towers alone, the
            table holds several models or scorings, or colours are wrong or do nothing.
    """
    if palette is not None and (hue is None or color is not None):
        raise UserError("palette colours the values of hue; name a hue, and no color beside it")
    if color is not None and not is_color_like(color):
        raise UserError(f"color is {color!r}, which is no colour; write it as 'red' or '#2F8FC4'")
    if metric is None:
        curved = metrics_by_shape(scores)["curve"] or metric_names(scores)
        metric = dataset_readout(curved) or next(iter(curved), DATASET_ACCURACIES[0])
    with style():
        parts = _parts(scores, metric, hue, dataset, space)
        if tower is not None:
            on_tower(pd.concat(parts.values()), metric, tower)  # refused where none has the tower
            parts = {name: rows for name, part in parts.items()
                     if len(rows := part[part["tower"] == tower])}  # fmt: skip
        if color is not None and len(parts) > 1:
            raise UserError(f"color would draw every {hue} alike; leave it out, or give a palette")
        frame = pd.concat(parts.values())
        if frame.empty:
            raise UserError(
                f"metric {metric!r} has no values along a tower; draw it with `agreement_matrix`"
            )
        if hue in (None, "dataset"):  # of models or poolings each has its own
            Reading(space=space).say_choice(scores, metric)
        axis = _shared_axis(scores, parts, hue)
        looks = _looks(parts, color, palette)
        ax = axes(ax)  # after what may be refused: a notebook would show them empty
        several = frame["tower"].nunique() > 1
        for name, part in parts.items():
            for side, rows in part.groupby("tower", sort=False):
                key = _key(str(side), name)
                _line(ax, axis, rows, key, **_look(str(side), name, label, looks, several))
        _chance(ax, axis, frame, hue)
        if hue is None:
            _ceilings(ax, scores, metric, frame)
        axis.draw(ax)
        if choice is not None:
            axis = _own_axis(axis, parts, choice) if hue == "model" else axis
            marked = [one for one in TOWERS if one in axis.blocks]
            check_choice(choice, scores, marked, axis.blocks)
            strip(ax, axis, choice, marked)
        ax.set_ylabel(axis_label(metric))
        legend(ax)
        return mark_random(ax, is_random(scores))


def _parts(
    scores: pd.DataFrame, metric: str, hue: str | None, dataset: str | None, space: str | None
) -> dict[str, pd.DataFrame]:
    """Return the curves of each line: one part, or one for each value of the hue."""
    if hue is None:
        return {"": over_datasets(curves(scores, metric, dataset, space))}
    if hue == "dataset":
        frame = curves(scores, metric, dataset, space)
        return {"all datasets" if name == POOLED else str(name): part
                for name, part in frame.groupby("dataset", sort=False)}  # fmt: skip
    names = scores[hue].astype(str)
    # One architecture with several weights is several models.
    if hue == "model" and scores.groupby("model")["weights"].nunique().max() > 1:
        names += " (" + scores["weights"].astype(str) + ")"
    rows = scores["metric"] == metric
    # Where no row is of this metric, `curves` is called all the same, for its refusal.
    return {
        str(name): over_datasets(curves(part, metric, dataset, space))
        for name, part in scores[rows].groupby(names[rows], sort=False)
    } or {"": over_datasets(curves(scores, metric, dataset, space))}


def _key(tower: str, name: str) -> str:
    """Return what the axis calls a tower: models of several depths have one each."""
    return f"{tower}|{name}" if name else tower


def _shared_axis(
    scores: pd.DataFrame, parts: dict[str, pd.DataFrame], hue: str | None
) -> DepthAxis:
    """Return the axis of all parts; relative depth where they differ in depth."""
    if hue != "model":
        whole = DepthAxis.of(pd.concat(parts.values()), depths(scores))
        named = {_key(t, name): d for name in parts for t, d in whole.blocks.items()}
        return DepthAxis({**whole.blocks, **named}, whole.tail)
    blocks: dict[str, int] = {}
    for name, part in parts.items():
        for tower, deep in depths(part).items():
            blocks[_key(tower, name)] = deep
            blocks.setdefault(tower, deep)
    return DepthAxis(blocks, tail_of(pd.concat(parts.values())))


def _looks(parts: dict[str, pd.DataFrame], color: str | None, palette: Any) -> dict[str, Any]:
    """Return the colour of each part; empty where towers are told apart by colour."""
    names = list(parts)
    if color is not None:
        return dict.fromkeys(names, color)
    if names == [""]:
        return {}
    if palette is None:
        return {name: category(number)["color"] for number, name in enumerate(names)}
    return colours_of(palette, names)


def _look(
    side: str, name: str, label: str | None, looks: dict[str, Any], several: bool
) -> dict[str, Any]:
    """Return colour, marker, dash and label of one line; `several`: of both towers."""
    # Of names that look alike where letters cannot be drawn each has a number.
    named = label_text(name, looks) if name else ""
    given = label_text(label) if label else ""
    words = [given, named] if named and given else [given or named or side.capitalize()]
    # Colours begin again after ten, and those of a named palette sooner or later; of one tower the
    # dash tells lines of one colour apart.
    before = list(looks.values())[: list(looks).index(name)] if looks and not several else []
    again = before.count(looks.get(name))
    dash = CATEGORY_DASHES[again % len(CATEGORY_DASHES)]
    if (name or label) and several:
        words.append(side)
    return {
        "color": looks.get(name, TOWER_COLOURS[side]),
        "marker": TOWER_MARKERS[side],
        "linestyle": "--" if looks and side == "text" and several else dash,
        "label": ", ".join(words),
    }


@checked
def gap_curves(
    scores: Scores,
    metric: str = "centroid_gap",
    *,
    tower: str = "vision",
    choice: LayerChoice | None = None,
    order: Sequence[str] = (),
    ax: Axes | None = None,
) -> Axes:
    """Draw a metric of the modality gap along depth, one line per dataset.

    See `dataset_curves` for the arguments.

    Raises:
        UserError: The metric is not in the table, or not on this tower.
    """
    return dataset_curves(scores, metric, tower=tower, choice=choice, order=order, ax=ax)


@checked
def dataset_curves(
    scores: Scores,
    metric: str,
    *,
    tower: str = "vision",
    choice: LayerChoice | None = None,
    order: Sequence[str] = (),
    ax: Axes | None = None,
) -> Axes:
    """Draw a metric along one tower, one line per dataset.

    Args:
        scores: Score table of one model.
        metric: Metric to draw.
        tower: `vision` or `text`.
        choice: Layers whose blocks are marked under the axis.
        order: Datasets in the order of their colours, for several axes that share a legend; those
            of the curves follow.
        ax: Axes to draw on; a new figure where None.

    Raises:
        UserError: The metric is not in the table, or not on this tower.
    """
    with style():
        frame = on_tower(curves(scores, metric), metric, tower)
        Reading().say_choice(scores, metric)
        ax = axes(ax)
        axis = DepthAxis.of(frame, depths(scores))
        ranks = list(dict.fromkeys([*order, *frame["dataset"]]))
        for name, part in frame.groupby("dataset", sort=False):
            label = "all datasets" if name == POOLED else label_text(str(name), ranks)
            look = category(ranks.index(name))
            _line(ax, axis, part, tower, label=label, **look)
        _chance(ax, axis, frame)
        axis.draw(ax)
        if choice is not None:
            check_choice(choice, scores, [tower])
            strip(ax, axis, choice, [tower])
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
    if not np.isfinite(rows["value"].to_numpy(float)).any():
        raise UserError(f"metric {metric!r} has no value on the {tower} tower")
    return rows


def legend(ax: Axes) -> None:
    """Name the lines: inside the axes where few hide nothing there, else above in columns."""
    handles, names = ax.get_legend_handles_labels()
    lines = len(names)
    names = short_names(names, NAME if lines > MANY else LINE)
    longest = max(map(len, names), default=0)
    if lines <= 3:
        ax.legend(handles, names, handlelength=1.6, loc="best", frameon=True, framealpha=0.9,
                  edgecolor="none")  # fmt: skip
        if not _hides(ax):
            return
    place: dict[str, Any] = {"ncols": 4, "fontsize": 6}
    if lines < 6:
        place = {"ncols": 2 if lines == 4 else 3, "fontsize": 7}
    place["ncols"] = max(1, min(place["ncols"], 60 // (longest + 6)))
    ax.legend(handles, names, loc="lower center", bbox_to_anchor=(0.5, 1.0), handlelength=1.6,
              columnspacing=1.2, **place)  # fmt: skip
    rows = lines / place["ncols"]
    if rows > 3 and ax.figure.axes == [ax]:  # else the rows would leave no room for the axes
        height = float(ax.figure.get_figheight())  # type: ignore[union-attr]
        ax.figure.set_figheight(height + ROW * (rows - 3))  # type: ignore[union-attr]


def _hides(ax: Axes) -> bool:
    """Whether the legend lies over a line or a band, of which matplotlib's `best` knows lines."""
    figure: Any = ax.figure
    # Extents are known after a layout only.
    figure.draw_without_rendering()
    made: Any = ax.get_legend()
    box = made.get_window_extent()
    drawn: list[Any] = [line.get_path().transformed(line.get_transform()) for line in ax.lines]
    for band in ax.collections:
        drawn += [path.transformed(band.get_transform()) for path in band.get_paths()]
    return any(path.intersects_bbox(box, filled=False) for path in drawn) or any(
        box.contains(*point) for path in drawn for point in path.vertices
    )


def _line(ax: Axes, axis: DepthAxis, part: pd.DataFrame, tower: str, **options: Any) -> None:
    x = [axis.x(tower, str(position)) for position in part["position"]]
    options.setdefault("marker", ".")
    ax.plot(x, part["value"].to_numpy(), markeredgecolor="none", **options)
    ax.fill_between(x, part["low"], part["high"], color=options["color"], alpha=0.16, linewidth=0)


def _chance(ax: Axes, axis: DepthAxis, frame: pd.DataFrame, hue: str | None = None) -> None:
    """Draw what chance gives at each position: one line, or one per tower where they differ.

    Where the curves of a tower have their own, as those of several datasets may, a band spans them.
    """
    known = frame.dropna(subset=["null"])
    # By position, not by place in a curve: of several models one may lack what another has.
    levels = [
        (str(tower), part.groupby("position").agg(low=("null", "min"), high=("null", "max"),
                                                  null=("null", "mean"))
                         .sort_index(key=lambda names: names.map(sort_key)).reset_index())
        for tower, part in known.groupby("tower", sort=False)
    ]  # fmt: skip
    seen = pd.concat([known["null"], frame["value"].dropna()])
    # What differs by less than a line is wide is drawn as one line.
    tolerance = 0.01 * float(seen.max() - seen.min())
    flat = known["null"].max() - known["null"].min() <= tolerance
    if not levels or (hue == "model" and not axis.equal and not flat):
        return  # chance along depths that differ is no one line
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


def _ceilings(ax: Axes, scores: pd.DataFrame, metric: str, frame: pd.DataFrame) -> None:
    """Draw the best value that each tower can have, where that is below 1."""
    for tower in frame["tower"].unique():
        if (most := ceiling(scores, metric, tower)) < 1:
            ax.axhline(
                most, color=TOWER_COLOURS[tower], linestyle=":", linewidth=0.9, marker="",
                label=f"Most possible, {tower}",
            )  # fmt: skip


def _alike(levels: list[tuple[str, pd.DataFrame]], tolerance: float) -> bool:
    """Return whether chance is the same for all towers at the positions that they share."""
    nulls = pd.concat([level.set_index("position")["null"] for _, level in levels], axis=1)
    both = nulls.dropna()
    return bool(((both.max(axis=1) - both.min(axis=1)) <= tolerance).all())


def check_choice(
    choice: LayerChoice, scores: Scores, towers: Sequence[str], blocks: Mapping[str, int] = {}
) -> None:
    """Hold a choice that is drawn to what is drawn of a model.

    Args:
        choice: The layers to mark.
        scores: What is drawn.
        towers: Those on which they are marked.
        blocks: How deep they are; what the scores say where absent.

    Raises:
        UserError: The choice is of deeper towers, as of another model.

    Warns:
        By the log: it was made from scores of another model.
    """
    for tower in towers:
        depth = (blocks or depths(scores))[tower]
        known = max(*choice.blocks(tower), len(choice.standing(tower)), 0)
        if known > depth:
            raise UserError(
                f"the choice is of {known} {tower} blocks or more, and {depth} are drawn; give the "
                "choice of this model"
            )
    drawn = scores[["model", "weights"]].drop_duplicates().astype(str)
    # Of several joined tables nothing tells of which a hash is.
    mark = str(scores.attrs.get("weights_hash", "")) if len(drawn) == 1 else ""
    others = [choice.of_another(m, w, mark) for m, w in drawn.itertuples(index=False, name=None)]
    if others and all(others):
        LOG.warning("the choice that is marked was made from scores %s", others[0])


def _own_axis(axis: DepthAxis, parts: Iterable[str], choice: LayerChoice) -> DepthAxis:
    """Return the axis with the depth of the one model, of several that are drawn, of a choice.

    Raises:
        UserError: The models differ in depth, and the choice is of none of them.
    """
    if axis.equal:
        return axis
    model, weights = (choice.evidence.get(key, "") for key in ("model", "weights"))
    own = next((one for one in parts if one in (model, f"{model} ({weights})")), None)
    if own is None:
        raise UserError(
            "the models that are drawn differ in depth and the choice is of none of them; draw "
            "the model that it is of by itself"
        )
    deep = {tower: axis.blocks[key] for tower in TOWERS if (key := _key(tower, own)) in axis.blocks}
    return replace(axis, blocks={**axis.blocks, **deep})


def strip(ax: Axes, axis: DepthAxis, choice: LayerChoice, towers: Sequence[str]) -> None:
    """Mark the chosen blocks under the axis: a strip per tower, open blocks pale."""
    height = 3.2  # points; the labels of the axis move down by as much
    ax.tick_params(axis="x", pad=2.5 + (height + 1) * len(towers))
    for lane, tower in enumerate(towers):
        standing = choice.standing(tower, axis.blocks[tower])
        # In points below the axes, which neither the data nor the size of the figure moves.
        down = ScaledTranslation(0, -(2 + (height + 1) * lane) / 72, ax.figure.dpi_scale_trans)
        for block, how in enumerate(standing, 1):
            if block in choice.blocks(tower):
                ax.plot(
                    # The underscore of the label keeps it out of the legend.
                    axis.span(tower, block), (0, 0), color=TOWER_COLOURS[tower], linewidth=height,
                    alpha=OPEN_ALPHA if how == "open" else 1.0,
                    solid_capstyle="butt", clip_on=False,
                    transform=ax.get_xaxis_transform() + down, label=f"_{tower} {block} {how}",
                )  # fmt: skip


@checked
def selection_frequency(choice: LayerChoice, ax: Axes | None = None) -> Axes:
    """Draw how often each block was chosen over resampled score tables.

    Firm blocks are in full colour, others pale; those chosen are outlined.

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
            bars = ax.bar(
                x,
                found["frequency"],
                width * 0.92,
                color=TOWER_COLOURS[tower],
                label=f"{tower.capitalize()} (firm: {describe_blocks(choice.firm(tower))})",
            )
            for bar, how in zip(bars, choice.standing(tower, found["depth"])):
                bar.set_facecolor((TOWER_COLOURS[tower], 1.0 if how == "firm" else OPEN_ALPHA))
            for block in choice.blocks(tower):
                bars[block - 1].set_edgecolor(TOWER_COLOURS[tower])
        axis.draw(ax)
        ax.set_xlim(0.3, axis.length + 0.7)
        ax.set_ylim(0, 1.02)
        ax.set_ylabel("Share of resamples")
        handles, names = ax.get_legend_handles_labels()
        names = [fill(name, 50) for name in names]  # a choice may be of many runs
        legend = ax.legend(handles, names, loc="lower center", bbox_to_anchor=(0.5, 1.0),
                           ncols=2 if max(map(len, names)) <= 22 else 1)  # fmt: skip
        for handle in legend.legend_handles:
            if handle is not None:
                handle.set_alpha(1.0)
        return mark_random(ax, bool(choice.evidence.get("random_weights")))
