"""The results table: its columns, its summary, and published numbers beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from vlmlayers.errors import UserError
from vlmlayers.metrics.intervals import wilson
from vlmlayers.scores.summaries import harmonic_mean

COLUMNS = (
    "protocol",
    "method",
    "model",
    "weights",
    "dataset",
    "source",
    "split_kind",
    "placement",
    "shots",
    "seed",
    "accuracy",
    "n",
    "low",
    "high",
    "template",
    "parameters",
    "changed",
    "seconds",
    "random_weights",
    "note",
)
ZERO_SHOT, ZERO_SHOT_OWN = "zero-shot CLIP", "zero-shot CLIP, dataset template"
METHOD = "MMA"
UNMOVED = "training changed nothing: raise lr or the adapter's scale for this backbone"
GROUP = ["protocol", "method", "model", "weights", "source", "placement", "shots"]


def accuracy_fields(correct: int, n: int) -> dict[str, Any]:
    """Return accuracy as a share with its Wilson interval, as fields of a row."""
    if not n:
        return {"accuracy": float("nan"), "n": 0, "low": 0.0, "high": 1.0}
    low, high = wilson(correct / n, n)
    return {"accuracy": correct / n, "n": n, "low": float(low), "high": float(high)}


def summarise(results: pd.DataFrame) -> pd.DataFrame:
    """Return mean and sd over seeds per dataset, harmonic means, and averages over datasets.

    The harmonic mean of a dataset is that of its mean base and novel accuracy, its sd that of the
    seeds' harmonic means; the row `average` holds means over datasets, and its harmonic mean is
    that of the averages. Datasets trained on are left out of an average over targets.

    Args:
        results: A results table.

    Returns:
        Columns protocol, method, model, weights, source, placement, shots, dataset, metric (`base`,
        `novel`, `hm`, `all`), mean, sd, seeds, note.
    """
    if results.empty:
        raise UserError("the results table is empty; run `vlmlayers evaluate` first")
    rows: list[dict[str, Any]] = []
    table = results.assign(source=_comparable_source(results))
    for key, part in table.groupby(GROUP, sort=False, dropna=False):
        head = dict(zip(GROUP, key))
        rows += [head | row for row in _datasets(part)]
    return pd.DataFrame(rows)


def _comparable_source(results: pd.DataFrame) -> pd.Series:
    """Return the source, blank where each dataset is its own, so that these average together."""
    own = (results["source"] == results["dataset"]) & results["split_kind"].isin(["base", "novel"])
    within = results["protocol"].isin(["base-to-novel", "few-shot"])
    return results["source"].where(~(own | within), "")


def _datasets(part: pd.DataFrame) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    seeds = part.pivot_table(
        index=["dataset", "seed"], columns="split_kind", values="accuracy", sort=False
    )
    if {"base", "novel"} <= set(seeds.columns):
        seeds["hm"] = [harmonic_mean(b, n) for b, n in zip(seeds["base"], seeds["novel"])]
    for dataset, block in seeds.groupby(level="dataset", sort=False):
        notes = part.loc[part["dataset"] == dataset, "note"]
        rows += _metrics(str(dataset), block, "; ".join(dict.fromkeys(filter(None, notes))))
    source = set(part["source"])
    targets = [d for d in seeds.index.unique("dataset") if d not in source]
    if len(targets) > 1:
        rows += _metrics("average", _average(seeds.loc[targets]), "")
    return rows


def _average(seeds: pd.DataFrame) -> pd.DataFrame:
    """Return the mean over datasets for every seed that all of them have."""
    plain = seeds.drop(columns="hm", errors="ignore")
    complete = plain.groupby(level="seed").filter(
        lambda block: len(block) == plain.index.get_level_values("dataset").nunique()
    )
    mean = (complete if len(complete) else plain).groupby(level="seed").mean()
    if {"base", "novel"} <= set(mean.columns):
        mean["hm"] = [harmonic_mean(b, n) for b, n in zip(mean["base"], mean["novel"])]
    return mean


def _metrics(dataset: str, block: pd.DataFrame, note: str) -> list[dict[str, Any]]:
    means = block.mean()
    if {"base", "novel"} <= set(block.columns):
        means["hm"] = harmonic_mean(means["base"], means["novel"])
    order = [m for m in ("base", "novel", "hm", "all") if m in block.columns]
    return [
        {
            "dataset": dataset,
            "metric": metric,
            "mean": means[metric],
            "sd": block[metric].std(ddof=1) if len(block) > 1 else float("nan"),
            "seeds": len(block),
            "note": note,
        }
        for metric in order
        if pd.notna(means[metric])
    ]


def with_published(
    summary: pd.DataFrame, titles: dict[str, str], folder: str | Path | None = None
) -> pd.DataFrame:
    """Return a summary with published numbers of the same datasets and protocol below ours.

    Args:
        summary: From `summarise`.
        titles: Our dataset names to the published spelling, such as `caltech101` → `Caltech101`.
        folder: Folder of `published_*.csv`; the repository's `figures/tables` by default.

    Returns:
        The rows of the summary with a column `origin` (`ours` or `published`). Published values
        stand as printed, as shares of 1, with the flag of an inconsistent one in `note`.
    """
    from vlmlayers.figures.published import published

    spelling = {title: name for name, title in titles.items()} | {"average": "average"}
    added = []
    for protocol in dict.fromkeys(summary["protocol"]):
        name = str(protocol).replace("-", "_")
        if name not in ("base_to_novel", "cross_dataset", "domain_generalization"):
            continue
        table = published(name, Path(folder) if folder else Path("figures/tables"))
        table = table[table["dataset"].isin(spelling)]
        for row in table.to_dict("records"):
            metric = "all" if row["metric"] == "accuracy" else row["metric"]
            note = "; ".join(filter(None, (str(row["flag"] or ""), str(row["source"]))))
            added.append(
                {
                    "protocol": protocol,
                    "method": row["method"],
                    "model": "ViT-B/16",
                    "weights": "openai",
                    "source": "",
                    "placement": "",
                    "shots": 16,
                    "dataset": spelling[row["dataset"]],
                    "metric": metric,
                    "mean": float(row["value"]) / 100,
                    "sd": float("nan"),
                    "seeds": 3,
                    "note": note,
                    "origin": "published",
                }
            )
    return pd.concat([summary.assign(origin="ours"), pd.DataFrame(added)], ignore_index=True)
