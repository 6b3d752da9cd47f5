"""Figures of trained placements: the sweep, prediction against outcome, and cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from vlmlayers.errors import UserError
from vlmlayers.plots.style import CATEGORY_COLOURS, axes, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OUTCOMES = {
    "base": ("Base accuracy", "#2F8FC4", "s"),
    "novel": ("Novel accuracy", "#B34700", "^"),
    "hm": ("Harmonic mean", "#222222", "o"),
}
CHOSEN_COLOUR, PUBLISHED_COLOUR = "#007E5D", "#7A3E9D"


def _need(frame: pd.DataFrame, *columns: str) -> None:
    missing = [name for name in columns if name not in frame.columns]
    if missing or frame.empty:
        raise UserError(
            f"the validation table lacks {', '.join(missing) or 'rows'}; "
            "write it with `vlmlayers validate`"
        )


def _flag(outcomes: pd.DataFrame, name: str) -> pd.Series:
    """Return a column of yes and no; no where it is not there."""
    if name not in outcomes.columns:
        return pd.Series(False, index=outcomes.index)
    return outcomes[name].astype(bool)


def placement_sweep(outcomes: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw base, novel and HM of each placement, in the order of the table.

    Args:
        outcomes: One row per placement: `placement`, `base`, `novel`, `hm`, and where known
            `hm_low`, `hm_high` and `chosen`.
        ax: Axes to draw on.

    Raises:
        UserError: A column is missing or there is no row.
    """
    _need(outcomes, "placement", "base", "novel", "hm")
    with style():
        ax = axes(ax, (3.35, 2.6))
        x = range(len(outcomes))
        for name, (label, colour, marker) in OUTCOMES.items():
            ax.plot(x, outcomes[name], marker=marker, color=colour, label=label)
        if {"hm_low", "hm_high"} <= set(outcomes.columns):
            ax.fill_between(
                x, outcomes["hm_low"], outcomes["hm_high"], color="#222222", alpha=0.14, linewidth=0
            )
        if "chosen" in outcomes.columns:
            for place, chosen in enumerate(outcomes["chosen"]):
                if chosen:
                    ax.axvspan(
                        place - 0.4, place + 0.4, color=CHOSEN_COLOUR, alpha=0.14, linewidth=0
                    )
        ax.set_xticks(
            x,
            [str(p) for p in outcomes["placement"]],
            rotation=60,
            ha="right",
            rotation_mode="anchor",
        )
        ax.set_ylabel("Accuracy")
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, columnspacing=1)
        return ax


def predicted_vs_trained(
    outcomes: pd.DataFrame, predicted: str = "predicted", ax: Axes | None = None
) -> Axes:
    """Draw a predicted placement score against the trained HM, one point per placement.

    Args:
        outcomes: One row per placement: `placement`, `hm`, the predicted score, and where known
            `chosen` and `published`.
        predicted: Column of the predicted score.
        ax: Axes to draw on.

    Raises:
        UserError: A column is missing or there is no row.
    """
    _need(outcomes, "placement", "hm", predicted)
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
        for _, row in outcomes.iterrows():
            ax.annotate(
                str(row["placement"]),
                (row[predicted], row["hm"]),
                fontsize=5.5,
                xytext=(3, 2),
                textcoords="offset points",
                color="#444444",
            )
        ax.set_xlabel(predicted.replace("_", " ").capitalize())
        ax.set_ylabel("Trained harmonic mean")
        ax.legend(loc="best")
        return ax


def cost(outcomes: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the trained HM against the trainable parameters, one point per placement.

    Raises:
        UserError: A column is missing or there is no row.
    """
    _need(outcomes, "placement", "hm", "parameters")
    with style():
        ax = predicted_vs_trained(outcomes, "parameters", ax)
        ax.set_xlabel("Trainable parameters")
        return ax
