"""A comparison report: several runs side by side (models, weights, before and after)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from vlmlayers.arguments import checked
from vlmlayers.errors import UserError
from vlmlayers.files import write_text
from vlmlayers.plots import save_figure, unseen
from vlmlayers.plots.comparison import run_curves
from vlmlayers.plots.saving import slug, with_source
from vlmlayers.plots.style import axis_label
from vlmlayers.positions import TOWERS
from vlmlayers.report.comparable import comparability
from vlmlayers.report.figures import Drawn, check_shown
from vlmlayers.report.numbers import Answer, read_answer
from vlmlayers.report.page import RANDOM, render
from vlmlayers.report.payload import curve_entries, metric_entry
from vlmlayers.report.ribbon import ribbon
from vlmlayers.report.several import differences, summary_table
from vlmlayers.scores.summaries import DATASET_ACCURACIES, dataset_readout, metrics_by_shape
from vlmlayers.words import escape_markdown, markdown_table

DRAWN = (*DATASET_ACCURACIES, "class_accuracy", "centroid_gap")


@dataclass(frozen=True)
class Compared:
    """One run of a comparison."""

    name: str
    answer: Answer
    link: str
    ribbon: Any


@checked
def write_comparison(
    folders: Sequence[str | Path],
    out: str | Path,
    title: str = "Comparison",
    formats: Sequence[str] = ("svg", "png"),
) -> Path:
    """Write a comparison of several run folders.

    Args:
        folders: Two or more run folders.
        out: Folder of `report.html`, `report.md` and `figures/`.
        title: Heading.
        formats: Formats of the saved figures.

    Returns:
        Path of `report.html`.

    Raises:
        UserError: Fewer than two runs, one of them named twice, incomplete or the folder to write
            to, or no metric in common.
    """
    if len(folders) < 2:
        raise UserError("a comparison needs at least two run folders")
    check_shown(formats)
    out = Path(out)
    places = [Path(folder).resolve() for folder in folders]
    for place, folder in zip(places, folders):
        if places.count(place) > 1:
            raise UserError(f"{folder} is named twice; a comparison is of different runs")
        if place == out.resolve():
            raise UserError(
                f"{folder} is one of the runs, whose own report would be replaced; give the "
                "comparison another folder (--out)"
            )
    runs = [_run(name, Path(folder), out) for name, folder in zip(_names(folders), folders)]
    shared = _shared(runs)
    figures = list(_figures(runs, shared, out, formats))
    pairs = [(run.name, run.answer) for run in runs]
    random = [run.name for run in runs if run.answer.random_weights]
    banner = f"{RANDOM} Runs: {', '.join(random)}." if random else ""
    html = render(
        "comparison.html.j2",
        title,
        _payload(runs, shared),
        {
            "runs": runs,
            "summary": summary_table(pairs),
            "comparability": comparability(pairs),
            "undecided": not all(run.answer.choice.decided for run in runs),
            "differences": differences(pairs),
            "random": banner,
            "figures": figures,
            "curve_metrics": [(name, axis_label(name)) for name in shared],
        },
    )
    write_text(out / "report.md", _markdown(runs, title, banner, figures))
    return write_text(out / "report.html", html)


def _names(folders: Sequence[str | Path]) -> list[str]:
    paths = [Path(folder).resolve() for folder in folders]
    for parts in range(1, max(len(path.parts) for path in paths)):
        names = [Path(*path.parts[-parts:]).as_posix() for path in paths]
        if len(set(names)) == len(names):
            return names
    return [path.as_posix() for path in paths]


def _run(name: str, folder: Path, out: Path) -> Compared:
    answer = read_answer(folder)
    # Relative, so that a folder of runs can be moved or sent as a whole.
    link = Path(os.path.relpath(answer.run.report.resolve(), out.resolve())).as_posix()
    return Compared(name, answer, link, Markup(ribbon(answer)))


def _shared(runs: Sequence[Compared]) -> list[str]:
    found = [metrics_by_shape(run.answer.scores)["curve"] for run in runs]
    shared = [name for name in found[0] if all(name in other for other in found[1:])]
    if not shared:
        raise UserError("these runs have no metric with a curve in common; score the same metrics")
    # False sorts before True: the read-out of the dataset comes first.
    return sorted(shared, key=lambda name: name != dataset_readout(shared))


def _payload(runs: Sequence[Compared], shared: list[str]) -> dict[str, Any]:
    return {
        "random": False,
        "metrics": {name: metric_entry(name) for name in shared},
        "runs": [
            {
                "name": run.name + (" (random)" if run.answer.random_weights else ""),
                "model": run.answer.model,
                "weights": run.answer.weights,
                "depth": run.answer.depths,
                "curves": curve_entries(run.answer, shared),
            }
            for run in runs
        ],
    }


def _figures(
    runs: Sequence[Compared],
    shared: list[str],
    out: Path,
    formats: Sequence[str],
) -> Any:
    legend = [f"{run.name}{', RANDOM WEIGHTS' * run.answer.random_weights}" for run in runs]
    for metric, tower in product([name for name in DRAWN if name in shared], TOWERS):
        parts = []
        for run in runs:
            frame = run.answer.curves(metric)
            label = run.name + " (random)" * run.answer.random_weights
            named = with_source(
                frame[frame["tower"] == tower], run.answer.model, run.answer.weights
            )
            parts.append(named.assign(run=label))
        table = pd.concat(parts, ignore_index=True)
        if table["value"].isna().all():
            continue
        name = f"runs-{slug(metric)}{'-text' * (tower == 'text')}"
        with unseen():
            files = save_figure(run_curves(table, metric), out / "figures" / name, table, formats)
        caption = (
            f"{axis_label(metric)} of the {tower} tower: {'; '.join(legend)}. Bands: 95 % interval."
        )
        yield Drawn(name, caption, tuple(files))


def _markdown(runs: Sequence[Compared], title: str, banner: str, figures: Sequence[Drawn]) -> str:
    pairs = [(run.name, run.answer) for run in runs]
    summary, other = summary_table(pairs), differences(pairs)
    parts = [
        f"# {escape_markdown(title)}",
        "",
        *([f"> **{escape_markdown(banner)}**", ""] if banner else []),
        markdown_table(summary.headings, summary.rows),
        "",
        *(f"- {escape_markdown(sentence)}" for sentence in comparability(pairs)),
        "",
    ]
    for run in runs:
        answer = run.answer
        head = f"{answer.headline} {answer.lead}"
        parts += [f"- {escape_markdown(run.name)}: {escape_markdown(head)}"]
        parts += [f"  - {escape_markdown(doubt)}" for doubt in answer.doubts]
    for figure in figures:
        shown = next(path for path in figure.files if path.suffix[1:] == figure.shown)
        parts += ["", f"![{escape_markdown(figure.caption)}](figures/{shown.name})"]
    parts += ["", "## What differs", "", markdown_table(other.headings, other.rows)]
    return "\n".join(parts) + "\n"
