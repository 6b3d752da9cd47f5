"""Draw the picture of the README from a run folder: `python docs/picture.py runs/demo [STEM]`."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import vlmlayers as vl


def main(run: Path, stem: Path) -> None:
    """Draw dataset accuracy and the modality gap along depth, chosen blocks shaded."""
    scores = vl.read_scores(run)
    choice = vl.LayerChoice.load(run / "choice.json")
    with vl.plots.style():
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
        vl.plots.layer_curves(scores, "dataset_accuracy", choice=choice, ax=left)
        vl.plots.gap_curves(scores, "centroid_gap", choice=choice, ax=right)
        right.get_legend().remove()
        figure.legend(*right.get_legend_handles_labels(), loc="outside right center", fontsize=7)
        vl.plots.save_figure(figure, stem, formats=["png"])


if __name__ == "__main__":
    given = sys.argv[2] if len(sys.argv) > 2 else Path(__file__).parent / "images" / "layers"
    main(Path(sys.argv[1]), Path(given))
