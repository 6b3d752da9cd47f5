"""`python -m mini_clip.card`: measure a trained miniature CLIP on held-out images.

Writes `evaluation.csv` (tidy score rows) and the figures that the model card shows. Zero-shot,
positions and retrieval come from `vlmlayers.score`; the linear probe fits on the training split
and is read on the test split, which training never sees.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from vlmlayers.data import builtin
from vlmlayers.errors import UserError
from vlmlayers.features import LayerFeatures
from vlmlayers.manifests import Item, Manifest
from vlmlayers.metrics.intervals import wilson
from vlmlayers.models import extract, load_model
from vlmlayers.models.load import VLM
from vlmlayers.progress import track
from vlmlayers.scores import score

REAL = ("caltech101", "scenes15", "dtd", "cifar10", "tiny_imagenet")
CAPTIONED = "flickr8k"
ONE_PROMPT = "a photo of a {}."
# Zero-shot accuracy of a miniature trained earlier on more TinyImageNet images, for one hour on
# two idle cores, same prompt and same test images.
BAR = {"tiny_imagenet": 0.108, "cifar10": 0.399, "caltech101": 0.302, "scenes15": 0.318,
       "dtd": 0.250}  # fmt: skip
ACCURACIES = ("dataset_accuracy", "class_accuracy_ncm")
GAPS = ("centroid_gap", "pair_distance", "rmg", "modality_auc")
PER_DATASET = 100  # images behind the curves; classes alike


class Evaluation:
    """Held-out measurements of one model.

    Args:
        model: What `load_model` returns.
        root: Data root of the real images; sets that are not there are left out and said.
        limit: Test images per built-in dataset, balanced over classes; None for all.
        fit: Training images per dataset behind the linear probe.
        show: Whether to show progress.
    """

    def __init__(
        self, model: VLM, root: Path | None, limit: int | None, fit: int, show: bool = True
    ) -> None:
        self.model, self.root, self.limit, self.fit, self.show = model, root, limit, fit, show

    def features(self, name: str, split: str, n: int | None, **options: Any) -> LayerFeatures:
        """Extract a split with the one prompt that all figures use, or with captions."""
        if options.get("text") != "captions":
            options["template"] = ONE_PROMPT
        return extract(
            self.model, Manifest.load(name), split, items=self._present(name, split, n),
            root=self.root, spaces=("native", "joint"), batch_size=128, progress=False, **options,
        )  # fmt: skip

    def _present(self, name: str, split: str, n: int | None) -> list[Item]:
        """Return up to `n` items of a split that are on disk, dealt over its classes in turn."""
        items = Manifest.load(name).items(split, self.root, present_only=True)
        if n is None or n >= len(items):
            return items
        order = np.random.default_rng(0).permutation(len(items))
        seen: dict[int, int] = {}
        rounds = []
        for i in order:
            seen[items[i].label] = seen.get(items[i].label, 0) + 1
            rounds.append((seen[items[i].label], int(i)))
        return [items[i] for i in sorted(i for _, i in sorted(rounds)[:n])]

    def classes(self, name: str) -> tuple[list[dict[str, object]], LayerFeatures]:
        """Return zero-shot and linear-probe rows of a dataset, and its test features."""
        drawn = (
            name in builtin.names()
        )  # real test sets are read whole: their classes differ in size
        test = self.features(name, "test", self.limit if drawn else None)
        train = self.features(name, "train", self.fit)
        assert test.vision is not None and test.text is not None and train.vision is not None
        images, labels = test.vision.array("proj", "joint"), test.vision.labels
        prompts = test.text.array("proj", "joint")
        present = np.unique(labels)  # DTD's other classes have no image here
        near = _unit(images) @ _unit(prompts[present]).T
        hits = {"zero_shot_accuracy": present[near.argmax(1)] == labels}
        scaler = StandardScaler().fit(train.vision.array("proj", "joint"))
        reader = LogisticRegression(C=0.1, max_iter=300)
        reader.fit(scaler.transform(train.vision.array("proj", "joint")), train.vision.labels)
        hits["linear_probe"] = reader.predict(scaler.transform(images)) == labels
        return [self._row(name, metric, hit, len(present)) for metric, hit in hits.items()], test

    def _row(self, name: str, metric: str, hit: np.ndarray, classes: int) -> dict[str, object]:
        value = float(hit.mean())
        low, high = wilson(value, len(hit))
        return {
            "dataset": name, "split": "test", "tower": "vision", "position": "proj",
            "metric": metric, "value": value, "low": float(low), "high": float(high),
            "null": 1 / classes, "n": len(hit),
        }  # fmt: skip

    def retrieval(self) -> pd.DataFrame:
        """Return R@1 and R@5 of held-out captioned images, both ways."""
        found = self.features(CAPTIONED, "test", None, text="captions")
        return score([found], ["retrieval_r1", "retrieval_r5"], positions=["proj"], seeds=(1,))

    def run(self, names: Sequence[str]) -> pd.DataFrame:
        """Return all rows: classes, positions, retrieval."""
        rows: list[dict[str, object]] = []
        kept = []
        for name in track(names, "evaluate", unit="dataset", show=self.show):
            found, test = self.classes(name)
            rows += found
            kept.append(_thin(test, PER_DATASET))
        fast: dict[str, Any] = {"seeds": (1,), "bootstrap": 100, "progress": self.show}
        curves = score(kept, list(ACCURACIES), spaces=["native"], **fast)
        gaps = score(kept, list(GAPS), positions=["proj"], spaces=["joint"], **fast)
        parts = [pd.DataFrame(rows), curves, gaps]
        if set(names) & set(REAL):
            parts.append(self.retrieval())
        return pd.concat(parts, ignore_index=True)


def _thin(features: LayerFeatures, n: int) -> LayerFeatures:
    """Return features of at most `n` images, every class alike."""
    vision = features.vision
    assert vision is not None
    order = np.random.default_rng(0).permutation(len(vision))
    seen: dict[int, int] = {}
    ranked = []
    for i in order.tolist():
        label = int(vision.labels[i])
        seen[label] = seen.get(label, 0) + 1
        ranked.append((seen[label], i))
    return replace(features, vision=vision.take(sorted(i for _, i in sorted(ranked)[:n])))


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def classes_table(rows: pd.DataFrame, bar: Mapping[str, float] = BAR) -> str:
    """Return the Markdown table of zero-shot and linear probe per dataset, in per cent."""
    lines = [
        "| dataset | test images | chance | zero-shot (95 %) | times chance | bar | linear probe |",
        "|---|---|---|---|---|---|---|",
    ]
    probes = rows[rows.metric == "linear_probe"].set_index("dataset")["value"]
    zero_shot: list[Any] = list(rows[rows.metric == "zero_shot_accuracy"].itertuples())
    for row in zero_shot:
        goal = f"{100 * bar[row.dataset]:.1f}" if row.dataset in bar else "5 × chance"
        lines.append(
            f"| {row.dataset} | {row.n} | {100 * row.null:.1f} | {100 * row.value:.1f} "
            f"({100 * row.low:.1f}–{100 * row.high:.1f}) | {row.value / row.null:.1f} | {goal} | "
            f"{100 * probes[row.dataset]:.1f} |"
        )
    return "\n".join(lines)


def positions_table(rows: pd.DataFrame) -> str:
    """Return the Markdown table of dataset and class accuracy per position and tower."""
    table = rows[rows.metric.isin(ACCURACIES)]
    wide = table.groupby(["tower", "metric", "position"])["value"].mean()
    order = ["embed", *map(str, range(1, 13)), "final", "proj"]
    columns = [key for key in dict.fromkeys((t, m) for t, m, _ in wide.index)]
    lines = ["| position | " + " | ".join(f"{t} {m.replace('_', ' ')}" for t, m in columns) + " |",
             "|---" * (len(columns) + 1) + "|"]  # fmt: skip
    for position in order:
        cells = [wide.get((t, m, position), np.nan) for t, m in columns]
        if not np.isnan(cells).all():
            shown = ("–" if np.isnan(cell) else f"{100 * cell:.1f}" for cell in cells)
            lines.append(f"| {position} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def other_table(rows: pd.DataFrame) -> str:
    """Return the Markdown table of gaps and retrieval at `proj`, with nulls."""
    chosen = rows[(rows.position == "proj") & ~rows.metric.isin(
        ["zero_shot_accuracy", "linear_probe", *ACCURACIES])]  # fmt: skip
    means = chosen.groupby(["metric", "tower"], sort=False)[["value", "null"]].mean().reset_index()
    lines = ["| metric at proj | tower | value | null |", "|---|---|---|---|"]
    lines += [
        f"| {row.metric} | {row.tower} | {row.value:.3f} | {row.null:.3f} |"
        for row in means.itertuples()
    ]
    return "\n".join(lines)


def reached_list(rows: pd.DataFrame, bar: Mapping[str, float] = BAR) -> str:
    """Return the Markdown list of what the model was to reach and what it did, from the rows."""
    shown = rows[rows.metric == "zero_shot_accuracy"].set_index("dataset")
    drawn = shown[~shown.index.isin(list(bar))]
    real = shown[shown.index.isin(list(bar))]
    times = drawn.value / drawn.null
    short = [f"{name} ({ratio:.1f} ×)" for name, ratio in times[times < 5].items()]
    above = [name for name in real.index if real.value[name] >= bar[name]]
    below = [name for name in real.index if name not in above]
    level = list(shown.index[shown.low <= shown.null])
    seen = rows[(rows.metric == "dataset_accuracy") & (rows.tower == "vision")]
    curve = seen.groupby("position")["value"].mean()
    gap = rows[(rows.metric == "centroid_gap") & (rows.position == "proj")]

    def but(names: Sequence[object]) -> str:
        return f"; not on {', '.join(map(str, names))}" if names else ""

    return "\n".join(
        [
            f"- Zero-shot at least 5 × chance on each built-in dataset: {len(drawn) - len(short)} "
            f"of {len(drawn)}{but(short)}.",
            f"- Zero-shot at least the bar on three of five real sets: {len(above)} of {len(real)}"
            f"{but(below)}.",
            f"- Clearly above chance (interval above it) on all: {len(shown) - len(level)} of "
            f"{len(shown)}{but(level)}.",
            "- Dataset accuracy rises from `embed` to `proj` in the vision tower: "
            f"{100 * curve['embed']:.1f} % to {100 * curve['proj']:.1f} %.",
            f"- Modality gap above its null: centroid gap {gap['value'].mean():.3f} against "
            f"{gap['null'].mean():.3f} at `proj`.",
        ]
    )


def main(
    model: Annotated[str, typer.Argument(help="Model name or folder.")] = "mini-clip",
    out: Annotated[Path, typer.Option(help="Folder for evaluation.csv and evaluation.md.")] = Path(
        "runs/mini-clip"
    ),
    data_root: Annotated[Path | None, typer.Option(help="Folder of the real images.")] = None,
    limit: Annotated[int, typer.Option(help="Test images per built-in dataset; 0 takes all.")] = 0,
    fit: Annotated[int, typer.Option(help="Training images per linear probe.")] = 1500,
    drawn_only: Annotated[bool, typer.Option(help="Leave the real images out.")] = False,
) -> None:
    """Measure a model and write the tables of its card."""
    names = [*builtin.names(), *(() if drawn_only else REAL)]
    rows = Evaluation(load_model(model), data_root, limit or None, fit).run(names)
    out.mkdir(parents=True, exist_ok=True)
    rows.to_csv(out / "evaluation.csv", index=False, float_format="%.5f")
    tables = (classes_table(rows), positions_table(rows), other_table(rows), reached_list(rows))
    text = "\n\n".join(tables) + "\n"
    (out / "evaluation.md").write_text(text)
    typer.echo(text)


if __name__ == "__main__":
    try:
        typer.run(main)
    except UserError as error:
        typer.echo(str(error), err=True)
        sys.exit(2)
