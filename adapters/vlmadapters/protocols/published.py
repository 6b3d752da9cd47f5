"""Published numbers beside a summary of one's own results."""

from __future__ import annotations

from pathlib import Path

import pandas as pd


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
                    # All published tables that ship are of this backbone and three seeds.
                    "model": "ViT-B/16",
                    "weights": "openai",
                    "source": "",
                    "placement": "",
                    "settings": "",
                    "recipe": "",
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
