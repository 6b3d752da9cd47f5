"""The results table as a terminal of 80 columns shows it."""

from __future__ import annotations

import textwrap
from typing import Any

import pandas as pd

from vlmadapters.protocols.results import ZERO_SHOT_METHODS, names
from vlmlayers.figures.published import source_column
from vlmlayers.words import WIDTH

LABEL, CELL = 38, 14  # of WIDTH
METRICS = {"base": "base", "novel": "novel", "hm": "HM", "all": "all classes"}
FLAG = "inconsistent as printed"  # of a published number that others of its table contradict
SHARED = (
    "seconds compare no methods: the first one decodes images that the others find, and what "
    "trains side by side shares them"
)
RANDOM = "The backbone has RANDOM weights: these numbers say nothing about a model."


def wrapped(text: str) -> str:
    """Return a statement in lines of the terminal's width; placements and paths stay whole."""
    return textwrap.fill(text, WIDTH, break_on_hyphens=False, break_long_words=False)


def labelled(numbers: pd.DataFrame, digits: int) -> str:
    """Return a table of numbers beside its index; below an entry that leaves them no room.

    A number that is missing is a dash.
    """
    shown = numbers.to_string(
        index=False, na_rep="–", float_format=lambda value: f"{value:.{digits}f}"
    )
    labels = [str(name) for name in (numbers.index.name or "", *numbers.index)]
    rows = shown.splitlines()
    width = min(max(map(len, labels)) + 1, WIDTH - len(rows[0]))
    return "\n".join(_padded(wrapped(one), row, width) for one, row in zip(labels, rows))


def results_text(summary: pd.DataFrame, random_weights: bool = False, *, noted: bool = True) -> str:
    """Return a summary as text: per dataset a line for each method, accuracies in percent.

    Args:
        summary: From `summarise` or `with_published`.
        random_weights: Whether the backbone has random weights, which is then said first.
        noted: Whether to say what the table notes of a method, as its verdict does too.
    """
    if "origin" not in summary:
        summary = summary.assign(origin="ours")
    summary = summary.assign(name=names(summary), trained=names(summary))
    sources = summary.groupby(["dataset", "name", "model"], sort=False)["source"]
    several = summary["name"] + ", from " + summary["source"].astype(str)
    summary["name"] = summary["name"].where(sources.transform("nunique") <= 1, several)
    ours = summary[summary["origin"] == "ours"].iloc[0]
    metrics = [metric for metric in METRICS if metric in set(summary["metric"])]
    backbone = " ".join(dict.fromkeys((ours["model"], ours["weights"])))
    head = f"{ours['protocol']}, {backbone}: accuracy in %"
    head += ", mean ± sd over seeds" if summary["sd"].notna().any() else ""
    lines = [RANDOM] if random_weights else []
    lines += [*textwrap.wrap(head, WIDTH), ""]
    columns = "".join(f"{METRICS[metric]:>6}".ljust(CELL) for metric in metrics)
    for dataset, part in summary.groupby("dataset", sort=False):
        # Of several sources each row names its own.
        within = set(part["source"].dropna()) - {""} == {dataset}
        lines.append(_padded(source_column(str(dataset)) if within else str(dataset), columns))
        for _, rows in part.groupby(["name", "source", "origin", "model"], sort=False):
            lines.append(_line(rows, metrics))
    own = summary["origin"] == "ours"
    # No second where nothing was trained: `evaluate` tests what there is.
    lines += _costs(summary[own & (summary["parameters"] > 0) & (summary["seconds"] > 0)])
    notes = summary[own & noted & summary["note"].astype(bool)]
    for (name, note), part in notes.groupby(["dataset", "note"], sort=False):
        about = f"{name}, {', '.join(dict.fromkeys(part['method']))}: {note}"
        lines += textwrap.wrap(about, WIDTH, subsequent_indent="  ")
    if not own.all():
        # What the backbone and shots of the first line are not.
        source = ", trained on ImageNet" * (ours["protocol"] != "base-to-novel")
        shown = f"published: ViT-B/16 of OpenAI, 16 shots{source}; 3 seeds, where sources name them"
        lines += textwrap.wrap(shown, WIDTH)
        flagged = summary[~own & summary["note"].str.startswith(FLAG)]
        for (where, method), part in flagged.groupby(["dataset", "method"], sort=False):
            cells = f"{method} (published), {where}, {', '.join(part['metric'])}: {FLAG}"
            lines += textwrap.wrap(cells, WIDTH, subsequent_indent="  ")
    return "\n".join(lines)


def images_text(results: pd.DataFrame) -> str:
    """Return how many images of each dataset were tested, in lines of the terminal's width."""
    found = []
    for dataset, part in results.groupby("dataset", sort=False):
        counts = part.groupby("split_kind", sort=False)["n"].max()
        kinds = (f"{n:,}{'' if kind == 'all' else f' {kind}'}" for kind, n in counts.items())
        found.append(f"{dataset} {', '.join(kinds)}")
    text = f"test images: {'; '.join(found)}"
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def _costs(trained: pd.DataFrame) -> list[str]:
    """Return parameters and seconds of a training, a line for each method that was trained."""
    if trained.empty:
        return []
    lines = ["", _padded("one training", f"{'parameters':>12}{'seconds':>12}")]
    # Transfers from several sources are one line: what is trained is the same.
    for name, rows in trained.groupby("trained", sort=False):
        cost = f"{int(rows['parameters'].iloc[0]):12,}{rows['seconds'].mean():12.1f}"
        lines.append(_padded(f"  {name}", cost))
    if len(lines) > 3:
        # Of a run as it was; `benchmarks/methods.py` times each by itself.
        lines += textwrap.wrap(SHARED, WIDTH)
    return lines


def _line(rows: pd.DataFrame, metrics: list[str]) -> str:
    first = rows.iloc[0]
    label = str(first["name"])
    if first["origin"] == "published":
        label += " (published)"
    elif first["method"] not in ZERO_SHOT_METHODS and rows["seeds"].max() > 1:
        # Of an unfinished run a column may have fewer than another.
        counts = dict.fromkeys((rows["seeds"].min(), rows["seeds"].max()))
        label += f", {'–'.join(map(str, counts))} seeds"
    label = f"  {label}"
    found = {row["metric"]: row for _, row in rows.iterrows()}
    return _padded(label, "".join(_cell(found.get(metric)).ljust(CELL) for metric in metrics))


def _padded(label: str, cells: str, width: int = LABEL) -> str:
    """Return label and cells on one line, or on two where the label is long."""
    gap = "\n" + " " * width if len(label) >= width else " " * (width - len(label))
    return f"{label}{gap}{cells}".rstrip()


def _cell(row: Any) -> str:
    if row is None:
        return ""
    # NaN, the deviation of a single seed, does not equal itself.
    spread = f" ±{100 * row['sd']:5.2f}" if row["sd"] == row["sd"] else ""
    return f"{100 * row['mean']:6.2f}{spread}"
