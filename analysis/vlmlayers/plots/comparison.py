"""Figures of several runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from vlmlayers.errors import UserError
from vlmlayers.plots.depth import legend
from vlmlayers.plots.style import axes, axis_label, category, label_text, style
from vlmlayers.positions import is_block
from vlmlayers.scores.summaries import over_datasets

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def run_curves(curves: pd.DataFrame, metric: str) -> Axes:
    """Draw one tower's curve of several runs over relative depth.

    Args:
        curves: Rows of `summaries.curves` with a column `run`.
        metric: Metric, for the axis label.

    Raises:
        UserError: There is no row.
    """
    if curves.empty:
        raise UserError(f"no run has {metric} on this tower")
    with style():
        ax = axes(None)
        for number, (name, rows) in enumerate(curves.groupby("run", sort=False)):
            part = over_datasets(rows)
            x = [
                depth if is_block(str(p)) or p == "embed" else 1.05 + 0.05 * (p == "proj")
                for p, depth in zip(part["position"], part["depth"])
            ]
            look = category(number)
            ax.plot(x, part["value"], marker=".", label=label_text(str(name)), **look)
            ax.fill_between(
                x, part["low"], part["high"], color=look["color"], alpha=0.15, linewidth=0
            )
        ax.set_xticks([0, 0.25, 0.5, 0.75, 1, 1.1], ["Embed", "0.25", "0.5", "0.75", "1", "Proj"])
        ax.set_xlabel(f"Relative depth of the {curves['tower'].iloc[0]} tower")
        ax.set_ylabel(axis_label(metric))
        legend(ax)
        return ax
