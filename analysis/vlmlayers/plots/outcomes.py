"""Figures of trained placements: the sweep, prediction against outcome, and cost."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.ticker import LogLocator, NullLocator

from vlmlayers.arguments import Takes, checked
from vlmlayers.errors import UserError
from vlmlayers.placement import ZERO_SHOT, Placement, of_kind, sweep_first
from vlmlayers.plots.style import (
    CATEGORY_COLOURS,
    axes,
    axis_label,
    category,
    ink,
    mark_random,
    new_grid,
    short_names,
    style,
)
from vlmlayers.scores.reading import is_random

Outcomes = Annotated[pd.DataFrame, Takes("a table of trained placements", "such tables")]
OUTCOMES = {
    "base": ("Base classes", "#2F8FC4", "s"),
    "novel": ("Novel classes", "#B34700", "^"),
    "hm": ("Harmonic mean", "#222222", "o"),
}
# Where the label of a point may stand: its offset in points, and its edges there.
PLACES: tuple[tuple[tuple[float, float], str, str], ...] = (
    ((3, 2), "left", "baseline"),
    ((-3, 2), "right", "baseline"),
    ((0, 5), "center", "bottom"),
    ((0, -5), "center", "top"),
    ((4, -2), "left", "top"),
    ((-4, -2), "right", "top"),
)
KIND_OF = {"chosen": "chosen", "published": "paper", "sweep": "start"}  # in a validation's tables
MOST_LABELS = 18  # of a sweep
LONGEST = 24  # characters of the label of a point
KEPT = 4  # order of drawing of labels that stay in any crowd, above all others
CHOSEN_COLOUR, PUBLISHED_COLOUR = "#007E5D", "#7A3E9D"


def _need(frame: pd.DataFrame, *columns: str) -> None:
    missing = [name for name in ("placement", *columns) if name not in frame.columns]
    if missing or frame.empty:
        raise UserError(
            f"the validation table lacks {', '.join(missing) or 'rows'}; "
            "write it with `vlmlayers validate`"
        )
    if not frame["placement"].is_unique:
        raise UserError(
            "the table has several rows per placement; give their means, such as "
            "validation_placements.csv of the run"
        )


def _refuse_empty(frame: pd.DataFrame, *columns: str) -> None:
    """Refuse a table that has no number in any of these columns."""
    if not np.isfinite(frame[list(columns)].to_numpy(float)).any():
        raise UserError(f"no row of the table has a number in {' or '.join(columns)}")


def _flag(outcomes: pd.DataFrame, name: str) -> pd.Series:
    """Return a column of yes and no, or what the column `kind` says of it; no where neither is."""
    if name in outcomes.columns:
        return outcomes[name].eq(True)  # no where a row of another table says nothing
    if "kind" in outcomes.columns:
        return pd.Series(of_kind(outcomes, KIND_OF[name]))
    return pd.Series(False, index=outcomes.index)


def _intervals(ax: Axes, x: Any, low: Any, high: Any) -> None:
    ax.vlines(x, low, high, color=ink(ax, "#222222"), alpha=0.4, linewidth=0.8)


def _label_axis(ax: Axes, words: str, outcomes: pd.DataFrame) -> None:
    """Label the horizontal axis; under it stands what is wrong with the comparison, if anything.

    Figures travel without their captions.
    """
    said: Any = outcomes["warning"].dropna().unique() if "warning" in outcomes.columns else []
    lines = [line for one in said if one for line in textwrap.wrap(f"Warning: {one}", 48)]
    ax.set_xlabel("\n".join(filter(None, [words, *lines])))


@checked
def placement_sweep(outcomes: Outcomes, ax: Axes | None = None) -> Axes:
    """Draw base, novel and HM of each placement; zero-shot CLIP, which is none, is left out.

    A line joins the placements of the sweep of the start block, by first block; others stand apart
    after them. Where the table does not say which those are, it joins all, in the table's order.

    Args:
        outcomes: One row per placement: `placement`, `base`, `novel`, `hm`, and where known
            `hm_low`, `hm_high`, `chosen`, `warning`, and `sweep` or `kind`.
        ax: Axes to draw on.

    Raises:
        UserError: A column is missing or empty, there is no row, or a placement has several.
    """
    _need(outcomes, "base", "novel", "hm")
    _refuse_empty(outcomes, "base", "novel", "hm")
    outcomes = outcomes[outcomes["placement"] != ZERO_SHOT].reset_index(drop=True)
    if {"sweep", "kind"} & set(outcomes.columns):
        outcomes = sweep_first(outcomes.assign(sweep=_flag(outcomes, "sweep")))
    swept = outcomes.get("sweep", pd.Series(True, index=outcomes.index))
    with style():
        labels = short_names([Placement.parse(p).label for p in outcomes["placement"]])
        # Slanted labels of many blocks would leave no room for the curves.
        ax = axes(ax, (3.35, 2.6 + 0.05 * max([0, *(len(label) - 6 for label in labels)])))
        x = pd.Series(range(len(outcomes)), index=outcomes.index)
        for name, (label, colour, marker) in OUTCOMES.items():
            colour = ink(ax, colour) if name == "hm" else colour
            dots: dict[str, Any] = {"linestyle": "", "marker": marker, "color": colour}
            joined: dict[str, Any] = dots | {"linestyle": "-"}
            if swept.any():
                ax.plot(x[swept], outcomes.loc[swept, name], label=label, **joined)
            rest: dict[str, Any] = {} if swept.any() else {"label": label}
            if not swept.all():
                ax.plot(x[~swept], outcomes.loc[~swept, name], markersize=4.5, **dots, **rest)
        if {"hm_low", "hm_high"} <= set(outcomes.columns):
            low, high = outcomes["hm_low"], outcomes["hm_high"]
            ax.fill_between(x[swept], low[swept], high[swept], color=ink(ax, "#222222"),
                            alpha=0.14, linewidth=0)  # fmt: skip
            _intervals(ax, x[~swept], low[~swept], high[~swept])
        chosen = _flag(outcomes, "chosen")
        for place in x[chosen]:
            ax.axvspan(place - 0.4, place + 0.4, color=CHOSEN_COLOUR, alpha=0.14, linewidth=0)
        fits = sum(map(len, labels)) <= 36
        slanted: dict[str, Any] = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
        # Of a long sweep every second label or less, since they would cover each other.
        step = max(1, -(-int(swept.sum()) // MOST_LABELS))
        near = np.abs(x.to_numpy()[:, None] - x[chosen].to_numpy()).min(axis=1, initial=step) < step
        hidden = swept & ~chosen & ((x % step > 0) | near)
        labels = ["" if one else label for label, one in zip(labels, hidden)]
        ax.set_xticks(x, labels, **({} if fits else slanted))
        ax.set_ylabel("Accuracy (%)")
        _label_axis(ax, "", outcomes)
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, columnspacing=1)
        return mark_random(ax, is_random(outcomes))


@checked
def amount_curves(amounts: Outcomes, axs: Sequence[Axes] | None = None) -> list[Axes]:
    """Draw base, novel and HM over amount, one line per placement.

    Args:
        amounts: One row per placement and amount: `placement`, `times` (the amount in multiples of
            the recipe's; 0 for zero-shot, which is drawn across), `base`, `novel`, `hm`. Rows of
            one amount by different means are averaged.
        axs: Three axes to draw on.

    Returns:
        The axes of base, novel and harmonic mean.

    Raises:
        UserError: A column is missing, or there is no row or no number.
    """
    missing = [name for name in ("placement", "times", *OUTCOMES) if name not in amounts.columns]
    if missing or amounts.empty:
        raise UserError(f"the table of amounts lacks {', '.join(missing) or 'rows'}")
    _refuse_empty(amounts, *OUTCOMES)
    if axs is not None and len(axs) != len(OUTCOMES):
        raise UserError(f"axs takes {len(OUTCOMES)} axes, not {len(axs)}")
    with style():
        if axs is None:
            axs = list(new_grid(len(OUTCOMES), 2.0))
        trained = amounts["times"][amounts["times"] > 0]
        for ax, (outcome, (title, _, _)) in zip(axs, OUTCOMES.items()):
            for number, (name, part) in enumerate(amounts.groupby("placement", sort=False)):
                line = part.groupby("times")[outcome].mean()
                if (line.index == 0).all():
                    ax.axhline(line.iloc[0], color="#666666", linestyle=":", label=str(name))
                    continue
                ax.plot(line.index, line, marker="os^Dv<>P"[number % 8], markersize=3,
                        label=Placement.parse(str(name)).label, **category(number))  # fmt: skip
            if len(trained):
                ax.set_xscale("log")
                ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
                ax.xaxis.set_major_formatter("{x:g}")
                ax.xaxis.set_minor_locator(NullLocator())
                # By hand: an outcome that no row has, as novel classes may lack, sets no limits
                ax.set_xlim(trained.min() / 1.2, trained.max() * 1.2)
            if amounts[outcome].isna().all():
                ax.set_yticks([])
                ax.text(0.5, 0.5, "None was held out", transform=ax.transAxes, ha="center")
            ax.set_title(title)
            ax.set_xlabel("Amount, times the recipe's")
        axs[0].set_ylabel("Held-out accuracy (%)")
        axs[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=5.5)
        return list(axs)


@checked
def predicted_vs_trained(
    outcomes: Outcomes, predicted: str = "predicted", ax: Axes | None = None
) -> Axes:
    """Draw a predicted placement score against the trained HM, one point per placement.

    Args:
        outcomes: One row per placement: `placement`, `hm`, the predicted score, and where known
            `hm_low`, `hm_high`, `chosen`, `published` and `warning`.
        predicted: Column of the predicted score, `metric:NAME` for the mean of a metric.
        ax: Axes to draw on.

    Raises:
        UserError: A column is missing or empty, there is no row, or a placement has several.
    """
    _need(outcomes, "hm", predicted)
    for column in ("hm", predicted):
        _refuse_empty(outcomes, column)
    with style():
        ax = axes(ax)
        published, chosen = _flag(outcomes, "published"), _flag(outcomes, "chosen")
        for rows, label, colour, marker, size in (
            (~published & ~chosen, "Placement", CATEGORY_COLOURS[0], "o", 22),
            (published, "Published", PUBLISHED_COLOUR, "D", 30),
            (chosen, "Chosen", CHOSEN_COLOUR, "*", 60),
        ):
            part = outcomes[rows]
            if len(part):
                ax.scatter(part[predicted], part["hm"], s=size, label=label, color=colour,
                           marker=marker, zorder=3)  # fmt: skip
        if {"hm_low", "hm_high"} <= set(outcomes.columns):
            _intervals(ax, outcomes[predicted], outcomes["hm_low"], outcomes["hm_high"])
        labels = short_names([Placement.parse(p).label for p in outcomes["placement"]], LONGEST)
        for must, label, (_, row) in zip(chosen | outcomes["hm"].eq(outcomes["hm"].max()), labels,
                                         outcomes.iterrows()):  # fmt: skip
            ax.annotate(
                label,
                (row[predicted], row["hm"]),
                fontsize=5.5,
                xytext=PLACES[0][0],
                textcoords="offset points",
                color=ink(ax, "#444444"),
                zorder=KEPT if must else None,
            )
        _, of_metric, name = predicted.rpartition("metric:")
        _label_axis(ax, axis_label(name) + (", mean of blocks" if of_metric else ""), outcomes)
        ax.set_ylabel("Trained harmonic mean (%)")
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, columnspacing=1)
        return mark_random(ax, is_random(outcomes))


@checked
def cost(outcomes: Outcomes, ax: Axes | None = None) -> Axes:
    """Draw the trained HM against the trainable parameters, one point per placement.

    Raises:
        UserError: A column is missing or empty, there is no row, or a placement has several.
    """
    _need(outcomes, "hm", "parameters")
    with style():
        ax = predicted_vs_trained(outcomes, "parameters", ax)
        _label_axis(ax, "Trainable parameters (thousands)", outcomes)
        ax.xaxis.set_major_formatter(lambda value, place: f"{value / 1000:g}")
        return ax


def drop_overlapping_texts(ax: Axes) -> Axes:
    """Put labels of points where they cover no other point's marker, no label and no edge.

    Each stands to the right of its point, or else to the left; what fits at neither is removed.
    Labels of the order `KEPT` choose first, may stand elsewhere around their point, and stay.
    """
    figure: Any = ax.figure
    for text in ax.texts:
        text.set_in_layout(False)  # a long one would narrow the axes before it finds its place
    # Extents are known after a layout only.
    figure.draw_without_rendering()
    frame = ax.get_window_extent()
    markers = [
        (at, radius)
        for drawn in ax.collections
        if isinstance(drawn, PathCollection)
        for at, radius in _circles(ax, drawn)
    ]
    kept: list[Any] = []
    for text in sorted(ax.texts, key=lambda one: -one.get_zorder()):
        own = ax.transData.transform(text.xy)  # type: ignore[attr-defined]
        others = [(at, radius) for at, radius in markers if not np.allclose(at, own)]
        must = text.get_zorder() == KEPT
        found = []
        for place in PLACES if must else PLACES[:2]:
            _put(text, *place)
            box = text.get_window_extent()
            wrong = (
                box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1,
                any(box.overlaps(other) for other in kept),
                any(_covers(box, at, radius) for at, radius in others),
            )
            found.append((wrong, place, box))
        wrong, place, box = min(found, key=lambda one: one[0])  # the first of equals
        if any(wrong) and not must:
            text.remove()
        else:
            _put(text, *place)
            kept.append(box)
    return ax


def _put(text: Any, offset: tuple[float, float], ha: str, va: str) -> None:
    text.set(position=offset, ha=ha, va=va)


def _circles(ax: Axes, drawn: PathCollection) -> list[tuple[Any, float]]:
    """Return centre and radius of each marker in pixels."""
    figure: Any = ax.figure
    centres = ax.transData.transform(drawn.get_offsets())
    # Sizes are squares of diameters in points; one may be that of all.
    radii = np.sqrt(np.resize(drawn.get_sizes(), len(centres))) / 2 * figure.dpi / 72
    return list(zip(centres, radii))


def _covers(box: Any, at: Any, radius: float) -> bool:
    nearest = np.clip(at, (box.x0, box.y0), (box.x1, box.y1))
    return bool(np.hypot(*(at - nearest)) < radius)
