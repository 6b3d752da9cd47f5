"""How often do intervals of scores hold the truth? Fresh samples of populations made for it.

    python benchmarks/intervals.py [--samples 200]

Each sample scores three sets of new items, whose classes, offsets and texts stay those of the
population; the truth is the mean over samples of the same size. Writes
benchmarks/results/interval_coverage.csv: the share of intervals that hold it, with an interval
over samples, and how wide they are beside what the spread of values asks for (1: as wide as that).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from common import machine, write_table
from numpy.typing import NDArray

from vlmlayers.features import LayerFeatures, TowerFeatures
from vlmlayers.positions import tower_positions
from vlmlayers.scores import score
from vlmlayers.scores.streamed import score_streaming
from vlmlayers.scores.summaries import curves

SETS, WIDTH = 3, 12
SCALE = np.linspace(2.0, 0.3, WIDTH)
READOUTS = ("class_accuracy", "class_accuracy_ncm", "class_accuracy_knn")
PLACE = ("metric", "tower", "dataset", "space", "position", "other_tower", "other_position")


def sampled(number: int, sample: int, items: int, classes: int, captions: bool) -> LayerFeatures:
    """Return new items of one set, with captions that are as noisy, or with its class prompts."""
    fixed, drawn = np.random.default_rng(number), np.random.default_rng([number, sample, items])
    offset = 0.7 * fixed.normal(size=WIDTH)
    means = offset + 0.5 * fixed.normal(size=(classes, WIDTH))
    prompts = means + 0.5 * fixed.normal(size=means.shape) * SCALE
    modality = 0.6 * np.random.default_rng(99).normal(size=WIDTH)  # one for all sets
    labels = np.arange(items) % classes
    centre = means[labels] + drawn.normal(size=(items, WIDTH)) * SCALE

    def noisy() -> NDArray[np.float64]:
        return np.asarray(centre + drawn.normal(size=centre.shape) * SCALE)

    def arrays(make: Callable[[], NDArray[np.float64]]) -> dict[str, dict[str, Any]]:
        return {
            space: {p: make().astype(np.float32) for p in tower_positions(1, space)}
            for space in ("native", "joint")
        }

    names = tuple(f"thing {number} {one}" for one in range(classes))
    images = tuple(f"{sample}/{one}.jpg" for one in range(items))
    vision = TowerFeatures("vision", 1, "cls", "images", images, labels, arrays(noisy))
    if captions:
        texts = tuple(f"caption {sample} {one}" for one in range(items))
        made, of, pairs = arrays(lambda: noisy() + modality), labels, np.arange(items)
    else:
        texts = tuple(f"a photo of a {name}." for name in names)
        made, of, pairs = arrays(lambda: prompts + modality), np.arange(classes), None
    kind = "captions" if captions else "prompts"
    text = TowerFeatures("text", 1, "eot", kind, texts, of, made, pairs)
    return LayerFeatures("made", "random", f"set {number}", "train", names, vision, text, True)


def joined(features: list[LayerFeatures]) -> pd.DataFrame:
    """Return read-outs of a class, joined over three seeds as reports show them."""
    table = score(features, READOUTS, positions=["1"], seeds=[1, 2, 3], jobs=1, progress=False)
    return pd.concat([curves(table, metric) for metric in READOUTS])


def coverage(tables: list[pd.DataFrame]) -> list[dict[str, Any]]:
    """Return a row per metric and tower: how often intervals hold the mean over all samples."""
    table = pd.concat([one.assign(sample=number) for number, one in enumerate(tables)])
    place = [name for name in PLACE if name in table.columns]
    table = table.dropna(subset=["value", "low", "high"])
    whole = table.groupby(place)["value"]
    truth, needed = whole.transform("mean"), 2 * 1.96 * whole.transform("std")
    table = table.assign(
        moves=needed > 1e-9,  # else each sample has the same value, as texts against themselves
        held=(table["low"] <= truth) & (truth <= table["high"]),
        width=(table["high"] - table["low"]) / needed,
    ).query("moves")
    rows = []
    for (metric, tower), part in table.groupby(["metric", "tower"]):
        shares = part.groupby("sample")["held"].mean()  # sets of a sample may share a fit
        half = 1.96 * shares.std() / np.sqrt(len(shares))
        rows.append(
            {
                "metric": metric, "tower": tower, "held": round(shares.mean(), 3),
                "held_low": round(max(shares.mean() - half, 0.0), 3),
                "held_high": round(min(shares.mean() + half, 1.0), 3),
                "width": round(part["width"].median(), 2), "intervals": len(part),
                "samples": len(shares),
            }
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=200)
    asked = parser.parse_args()
    of_rows = partial(
        score, positions=["1"], seeds=[1], permutations=10, shuffles=3, k=5, jobs=1, progress=False
    )
    ways: tuple[tuple[str, Callable[..., pd.DataFrame], int, int], ...] = (
        ("rows of one seed", of_rows, 60, 6),
        ("joined over three seeds", joined, 60, 6),
        ("streamed, sample of 200", score_streaming, 1000, 20),
        ("streamed, sample of 200", score_streaming, 150, 10),
    )
    lines: list[dict[str, Any]] = []
    for how, work, items, classes in ways:
        for captions in (True, False):
            tables = [
                work([sampled(one, sample, items, classes, captions) for one in range(SETS)])
                for sample in range(asked.samples)
            ]
            about = {"how": how, "texts": "captions" if captions else "prompts"}
            size = {"items": items, "classes": classes, "sets": SETS}
            found = [{**about, **row, **size} for row in coverage(tables)]
            least = min(found, key=lambda row: row["held"])
            print(f"{how}, {items} items, {about['texts']}: least {least['held']} "
                  f"({least['metric']}, {least['tower']})", flush=True)  # fmt: skip
            lines += found
    write_table("interval_coverage", [{**line, **machine()} for line in lines])


if __name__ == "__main__":
    main()
