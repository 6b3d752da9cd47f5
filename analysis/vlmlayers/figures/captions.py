"""Captions of the paper's figures: what is drawn, and behind it how, which can be dropped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import pandas as pd

from vlmlayers.figures.render import escape_latex
from vlmlayers.plots.style import axis_label
from vlmlayers.scores.reading import POOLED, is_random
from vlmlayers.scores.summaries import how_made
from vlmlayers.words import counted

Caption = tuple[str, str]
JOINT = (
    "Joint space: final norm and projection are applied at every position, a definition of "
    "vlm-layers"
)


def scored(
    opening: str,
    scores: pd.DataFrame,
    metrics: Sequence[str],
    intervals: bool = False,
    more: str = "",
    beside: pd.DataFrame | None = None,
) -> Caption:
    """Return the caption of a figure of scores.

    Args:
        opening: Sentences that say what is drawn.
        scores: Score table of the models drawn.
        metrics: The metrics drawn; those made alike are described together.
        intervals: Whether the figure shows the intervals of the table.
        more: What the rest of the caption says first.
        beside: The tables that `scores` is of, for the pooling of the tower that a row is not of.
    """
    alike: dict[str, list[str]] = {}
    for metric in metrics:
        facts = how_made(scores, metric, intervals, beside=beside)
        alike.setdefault(facts, []).append(axis_label(metric))
    made = [f"{', '.join(labels)}: {facts}" for facts, labels in alike.items()]
    return _caption(opening, scores, [more, *made])


def trained(
    opening: str, validation: pd.DataFrame, doubts: Mapping[str, str] = MappingProxyType({})
) -> Caption:
    """Return the caption of a figure of trained placements.

    Args:
        opening: Sentences that say what is drawn.
        validation: The cells drawn, one row per dataset, seed and placement.
        doubts: What is wrong with a model's part of the figure, by its name; empty if nothing.
    """
    runs: dict[str, list[str]] = {}
    for model, part in validation.groupby(["model", "weights"], sort=False):
        runs.setdefault(_trained_on(part) + _amounts(part), []).append(
            " ".join(filter(None, map(str, model)))
        )
    said = [f"{' and '.join(of)} on {on}" for on, of in runs.items()]
    where = f"Trained: {'; '.join(said)}" if len(runs) > 1 else f"Trained on {next(iter(runs))}"
    return _caption(". ".join([opening, *doubted(doubts)]), validation, [where])


def doubted(doubts: Mapping[str, str]) -> list[str]:
    """Return what is wrong with each model's part of a figure, one clause each."""
    return [f"Of {name} {why}" for name, why in doubts.items() if why]


def _trained_on(cells: pd.DataFrame) -> str:
    """Return in words the datasets and seeds of cells, seeds by dataset where they differ."""
    seeds = {
        str(dataset): f"seed{'s' * (part.nunique() > 1)} {', '.join(map(str, sorted(set(part))))}"
        for dataset, part in cells.groupby("dataset", sort=False)["seed"]
    }
    several = counted(len(seeds), "dataset")
    if len(set(seeds.values())) == 1:
        return f"{several} ({', '.join(seeds)}), {next(iter(seeds.values()))}"
    return f"{several} ({'; '.join(f'{name}, {of}' for name, of in seeds.items())})"


def _amounts(cells: pd.DataFrame) -> str:
    """Return that placements were trained at amounts of their own, where they were."""
    tuned = "comparison" in cells.columns and (cells["comparison"] == "tuned").any()
    return ", each placement at its own tuned amount" if tuned else ""


def clauses(opening: str, drawn: Mapping[str, bool]) -> str:
    """Return an opening and behind it what is said of each mark that is drawn."""
    return ". ".join([opening, *(said for said, there in drawn.items() if there)])


def mean_over(panels: Iterable[pd.DataFrame], *names: str) -> str:
    """Return `, mean over datasets and seeds` of the columns in which any panel has several."""
    found = list(panels)
    several = [f"{name}s" for name in names if any(one[name].nunique() > 1 for one in found)]
    return f", mean over {' and '.join(several)}" if several else ""


def joined(panels: Iterable[pd.DataFrame]) -> str:
    """Return in words how datasets become one in panels: as pooled rows, or as a mean of theirs."""
    # One kernel over the rows of all datasets is another quantity than the mean of theirs.
    names = [set(panel["dataset"]) for panel in panels]
    return " or ".join(dict.fromkeys(
        "all datasets pooled" if POOLED in found else f"mean over {counted(len(found), 'dataset')}"
        for found in names
    ))  # fmt: skip


def _caption(opening: str, table: pd.DataFrame, rest: Sequence[str]) -> Caption:
    """Return what a caption has to say, untrained weights included, and the rest."""
    models, random = _models(table), is_random(table)
    said = [opening, models] if random else [opening]
    return _sentences(said), _sentences([*([] if random else [models]), *rest])


def figure_latex(name: str, caption: Caption, wide: bool) -> str:
    """Return a LaTeX float that includes a figure; the preamble needs `graphicx`.

    Args:
        name: Stem of the figure's files.
        caption: Its caption, as plain text: what it says, and the rest, on a line of its own.
        wide: Whether the figure spans two columns.
    """
    place = "figure*" if wide else "figure"
    return "\n".join([
        r"% needs \usepackage{graphicx}", rf"\begin{{{place}}}[t]", r"\centering",
        rf"\includegraphics[width=\linewidth]{{{name}}}",
        rf"\caption{{{escape_latex(caption[0])}",
        *([f"% the next line can be dropped\n{escape_latex(caption[1])}"] if caption[1] else []),
        "}",
        rf"\label{{fig:{name.replace('_', '-')}}}", rf"\end{{{place}}}", "",
    ])  # fmt: skip


def _models(table: pd.DataFrame) -> str:
    if "weights" not in table.columns:
        table = table.assign(weights="")
    names = {
        f"{model} ({weights})" if weights else str(model): str(weights) == "random"
        for model, weights in table[["model", "weights"]].drop_duplicates().to_numpy()
    }
    untrained = [name for name, random in names.items() if random]
    whose = f"; {' and '.join(untrained)}" if len(untrained) < len(names) else ""
    warning = f"{whose}: RANDOM WEIGHTS, which says nothing about a trained model"
    return " and ".join(names) + (warning if untrained else "")


def _sentences(parts: Iterable[str]) -> str:
    return " ".join(f"{part.rstrip('.')}." for part in parts if part)
