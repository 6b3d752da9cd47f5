"""Published numbers beside a summary of one's own results."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from vlmadapters.protocols.table import PROTOCOLS
from vlmlayers.errors import UserError

SOURCE = "ImageNet"  # what every published transfer was trained on
COMPARED = ("base-to-novel", "cross-dataset", "domain-generalization")


def published_titles(
    protocol: str, datasets: Iterable[str], targets: Iterable[str] = ()
) -> dict[str, str]:
    """Return the published spelling of those datasets that have published numbers.

    Args:
        protocol: A protocol of `COMPARED`.
        datasets: Names, folders or files that are trained on; those of the user's own have no
            published number, whatever their name.
        targets: The same of those that are tested by transfer.

    Raises:
        UserError: None of them has one under this protocol.
    """
    from vlmlayers.manifests import Manifest

    if protocol not in COMPARED:
        raise UserError(
            f"no published numbers of {protocol} stand beside ours, only of {', '.join(COMPARED)}; "
            "leave --published out"
        )
    given = [(Manifest.load(one), True) for one in datasets]
    given += [(Manifest.load(one), False) for one in targets]
    names = dict.fromkeys(one.name for one, _ in given)
    shipped = {name: Manifest.load(name) for name in Manifest.names()}
    there = set(_table(protocol)["dataset"])
    found = {
        one.name: one.title
        for one, trained_on in given
        if one.name in shipped
        and one.hash == shipped[one.name].hash
        and one.title in there
        # Of a transfer the numbers of its source are of the source, all others of a transfer.
        and (not PROTOCOLS[protocol].transfer or trained_on == (one.title == SOURCE))
    }
    if not found:
        raise UserError(
            f"no number of {', '.join(names)} is published for {protocol}; leave --published out"
        )
    return found


def _table(protocol: str) -> pd.DataFrame:
    from vlmlayers.figures.published import published

    return published(protocol.replace("-", "_"), Path("figures/tables"))


def with_published(summary: pd.DataFrame, titles: dict[str, str]) -> pd.DataFrame:
    """Return a summary with published numbers of the same datasets and protocol below ours.

    Of a transfer, one on the source stands only beside ours on what was trained on, and one on a
    target only beside ours of a transfer. Averages stand only beside ours over the same datasets.

    Args:
        summary: From `summarise`.
        titles: Our dataset names to the published spelling, such as `caltech101` → `Caltech101`.

    Returns:
        The rows of the summary with a column `origin` (`ours` or `published`). Published values
        stand as printed, as shares of 1, with the flag of an inconsistent one in `note`.
    """
    spelling = {title: name for name, title in titles.items()} | {"average": "average"}
    added = []
    for protocol in dict.fromkeys(summary["protocol"]):
        if protocol not in COMPARED:
            continue
        table, transfer = _table(protocol), PROTOCOLS[protocol].transfer
        averaged = set(table["dataset"]) - {"average"} - ({SOURCE} if transfer else set())
        table = table[table["dataset"].isin(spelling)]
        ours = summary[summary["protocol"] == protocol]
        tested = set(ours["dataset"]) - {"average"}
        if transfer:
            ours = ours[ours["source"] != ""]
            kinds = set(zip(ours["dataset"], ours["dataset"] == ours["source"]))
            table = table[[(spelling[one], one == SOURCE) in kinds for one in table["dataset"]]]
            tested -= set(ours["source"])
        if tested != {spelling.get(one) for one in averaged}:
            table = table[table["dataset"] != "average"]
        for row in table.to_dict("records"):
            metric = "all" if row["metric"] == "accuracy" else row["metric"]
            note = "; ".join(filter(None, (str(row["flag"] or ""), str(row["source"]))))
            added.append(
                {
                    "protocol": protocol,
                    "method": row["method"],
                    # All published tables that ship are of this backbone; some name no seeds.
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
