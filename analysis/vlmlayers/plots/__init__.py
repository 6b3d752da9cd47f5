"""Figures: functions that take a tidy table and `ax`, and return `ax`. They compute nothing."""

from __future__ import annotations

from vlmlayers.plots.depth import dataset_curves, gap_curves, layer_curves, selection_frequency
from vlmlayers.plots.features import neighbours, scatter
from vlmlayers.plots.matrices import agreement_matrix, dataset_heatmap
from vlmlayers.plots.outcomes import amount_curves, cost, placement_sweep, predicted_vs_trained
from vlmlayers.plots.saving import FORMATS, save_figure
from vlmlayers.plots.style import axis_label, style, unseen

__all__ = [
    "FORMATS",
    "agreement_matrix",
    "amount_curves",
    "axis_label",
    "cost",
    "dataset_curves",
    "dataset_heatmap",
    "gap_curves",
    "layer_curves",
    "neighbours",
    "placement_sweep",
    "predicted_vs_trained",
    "save_figure",
    "scatter",
    "selection_frequency",
    "style",
    "unseen",
]
