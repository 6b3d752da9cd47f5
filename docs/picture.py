"""Draw the picture of the README from a run folder: `python docs/picture.py runs/demo`."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import vlmlayers as vl


def main(run: Path, stem: Path) -> None:
    """Draw dataset accuracy and the modality gap along depth, chosen blocks shaded."""
    scores = vl.read_scores(run / "scores.parquet")
    choice = vl.LayerChoice.load(run / "choice.json")
    with vl.plots.style():
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
        vl.plots.layer_curves(scores, "dataset_accuracy", choice=choice, ax=left)
        vl.plots.dataset_curves(scores, "centroid_gap", choice=choice, ax=right)
        vl.plots.save_figure(figure, stem, formats=["png"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(__file__).parent / "images" / "layers")
