"""Panels, titles, legends and marks that the paper's figures share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any, Literal

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vlmlayers import plots
from vlmlayers.figures.captions import Caption, figure_latex
from vlmlayers.files import write_text
from vlmlayers.plots.depth import LINE, MANY, ROW
from vlmlayers.plots.outcomes import CHOSEN_COLOUR, OUTCOMES, PUBLISHED_COLOUR
from vlmlayers.plots.style import COLUMN_WIDTH, NAME, ink, short_names, sparse_labels

LONGEST_LABEL = 18


def panels(
    rows: int, columns: int, height: float, share: Literal["none", "row", "all"] = "none"
) -> tuple[Figure, list[Axes]]:
    """Return a figure of one column's width per column of panels, and its axes row by row.

    Args:
        rows: Rows of panels.
        columns: Columns of panels.
        height: Height of one panel in inches.
        share: Which panels share their vertical axis.
    """
    with plots.style():
        figure = Figure(figsize=(COLUMN_WIDTH * columns, height * rows), layout="constrained")
        FigureCanvasAgg(figure)
        return figure, list(figure.subplots(rows, columns, sharey=share, squeeze=False).ravel())


def finish(ax: Axes, title: str, *, last: bool = True, first: bool = True, pad: float = 6) -> None:
    """Write the title and name the outer axes.

    Args:
        ax: Axes with one panel drawn.
        title: Title of the panel.
        last: Whether the panel is in the last row, which names the horizontal axis.
        first: Whether the panel is in the first column, which names the vertical axis.
        pad: Points between title and axes.
    """
    width = ax.get_window_extent().width / ax.figure.dpi * 72
    title = "\n".join(fill(line, int(width / 5)) for line in title.split("\n"))
    if ax.get_title("right") and "\n" in title:  # which says that weights are random
        title += "\n "
    title = title.replace("$", r"\$")
    ax.set_title(title, fontsize=8, fontweight="bold", loc="left", pad=pad)
    ax.set_xlabel(ax.get_xlabel() if last else "")
    ax.set_ylabel(fill(ax.get_ylabel(), LONGEST_LABEL) if first else "")


def legend_of_choice(ax: Axes) -> None:
    """Name the strips of chosen blocks, which have the colours of the towers, in the legend."""
    # An empty band draws nothing and gives the legend its patch.
    ax.fill_between([], [], color="#8C8C8C", linewidth=0, label="Chosen blocks")


def shared_legend(figure: Figure, axes: Sequence[Axes], columns: int, title: str = "") -> None:
    """Write one legend below all panels, each label once, in place of those of the panels.

    Args:
        figure: The figure.
        axes: Its panels.
        columns: Columns of the legend, fewer where so many are wider than the figure.
        title: What stands above the legend.
    """
    handles: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels()):
            handles.setdefault(label, handle)
        legend = ax.get_legend()
        if legend is not None:
            legend.remove()
    if len(handles) < 2:
        return
    names = short_names(list(handles), NAME if len(handles) > MANY else LINE)
    for ncols in range(columns, 0, -1):
        with plots.style():
            legend = figure.legend(handles.values(), names, loc="outside lower center",
                                   ncols=ncols, title=title or None, title_fontsize=6.5,
                                   columnspacing=1.2, handlelength=1.8)  # fmt: skip
        if ncols == 1 or legend.get_window_extent().width <= figure.bbox.width:
            rows = len(names) / ncols
            if rows > 3:  # else the panels would have no room
                figure.set_figheight(figure.get_figheight() + ROW * (rows - 3))
            return
        legend.remove()


def mark_sweep(ax: Axes, means: pd.DataFrame) -> None:
    """Mark chosen and published placements of a sweep; one off the axis stands on its right.

    Args:
        ax: Axes on which the placements of the axis stand at 0, 1, …
        means: From `outcomes.sweep`.
    """
    places = [float(i) + (0.0 if on else 0.6) for i, on in enumerate(means.on_axis)]
    on_axis = [place for place, on in zip(places, means.on_axis) if on]
    for name, (_, colour, marker) in OUTCOMES.items():
        colour = ink(ax, colour) if name == "hm" else colour
        rows = means[~means.on_axis]
        ax.plot(places[len(on_axis):], rows[name], linestyle="", marker=marker, color=colour,
                markersize=4)  # fmt: skip
        if means[f"{name}_sd"].notna().any():
            low, high = means[name] - means[f"{name}_sd"], means[name] + means[f"{name}_sd"]
            ax.fill_between(on_axis, low[means.on_axis], high[means.on_axis], color=colour,
                            alpha=0.14, linewidth=0)  # fmt: skip
    for mark, colour, row in (("chosen", CHOSEN_COLOUR, 0), ("published", PUBLISHED_COLOUR, 1)):
        for place in (place for place, marked in zip(places, means[mark]) if marked):
            dots = (1.2 * row, (1.2, 1.2))  # both lines show where the placements coincide
            ax.axvline(place, color=colour, linewidth=1, linestyle=dots, zorder=0)
            # A line of its own for each word: neighbouring placements would share one.
            ax.annotate(mark, (place, 1.0), (0, 1 + 8 * row), color=colour, fontsize=6.5,
                        ha="center", va="bottom", xycoords=ax.get_xaxis_transform(),
                        textcoords="offset points")  # fmt: skip
    starts = means.label[means.on_axis]
    labels = [*sparse_labels(starts), *means.label[~means.on_axis]]
    ax.set_xticks(places, labels, rotation=0, ha="center", rotation_mode="default")
    ax.set_xlabel("First adapted block, up to the last")


def save(
    figure: Figure, out: Path, name: str, drawn: Sequence[pd.DataFrame], caption: Caption
) -> list[Path]:
    """Write the figure as PDF, SVG and PNG, the points drawn as CSV, and a LaTeX float."""
    paths = plots.save_figure(figure, out / name, pd.concat(drawn, ignore_index=True))
    wide = figure.get_figwidth() > 1.5 * COLUMN_WIDTH
    return [*paths, write_text(out / f"{name}.tex", figure_latex(name, caption, wide))]
