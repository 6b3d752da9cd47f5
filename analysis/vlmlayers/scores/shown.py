"""How a score table shows itself in Jupyter."""

from __future__ import annotations

from html import escape

import pandas as pd


class ScoreTable(pd.DataFrame):
    """A score table that shows itself in Jupyter as positions against metrics.

    Rows, selections and everything else computed from it are ordinary data frames and show
    themselves as such.
    """

    @classmethod
    def of(cls, frame: pd.DataFrame) -> ScoreTable:
        """Return the table of a data frame, with its attributes."""
        made = cls(frame)
        made.attrs.update(frame.attrs)
        return made

    def _repr_html_(self) -> str:
        from vlmlayers.summaries import overview

        plain = pd.DataFrame(self)
        if plain.empty:
            return plain.to_html()
        metrics = plain["metric"].nunique()
        parts = [
            f"<p>{len(plain):,} scores of {metrics} metric{'s' * (metrics > 1)}, as a data frame. "
            "Below: means over datasets and seeds, each block beside its partner.</p>"
        ]
        for (model, weights), part in plain.groupby(["model", "weights"], sort=False):
            table = overview(part).to_html(float_format="{:.3f}".format, na_rep="")
            parts.append(f"<p>{escape(f'{model} [{weights}]')}</p>{table}")
        return "".join(parts)
