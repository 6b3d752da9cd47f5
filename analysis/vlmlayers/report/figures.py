"""The publication figures of a run: drawn, saved beside their tables, and ready to embed."""

from __future__ import annotations

import base64
import io
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from vlmlayers import plots
from vlmlayers.arguments import checked
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.metrics.table import SHIPPED
from vlmlayers.plots.outcomes import drop_overlapping_texts
from vlmlayers.plots.saving import slug, with_source
from vlmlayers.plots.style import mark_random
from vlmlayers.report.numbers import Answer, read_answer
from vlmlayers.report.payload import metric_entry
from vlmlayers.scores.reading import POOLED, has_curve
from vlmlayers.scores.summaries import (
    DATASET_ACCURACIES,
    agreement,
    agreement_rows,
    curves,
    dataset_names,
    metrics_by_shape,
    over_datasets,
)
from vlmlayers.words import counted

MIME = {"svg": "image/svg+xml", "png": "image/png", "pdf": "application/pdf", "csv": "text/csv"}
CURVES = (
    *DATASET_ACCURACIES,
    "class_accuracy",
    "class_accuracy_ncm",
    "zero_shot_accuracy",
    "fisher_ratio",
)
GAPS = ("centroid_gap", "rmg")
# Files of the figures below: those that a report does not draw anew show what was there before.
OURS = re.compile(
    r"((curves|gap|agreement|datasets)-.+|selection-frequency|placement-sweep|amount|cost|"
    r"predicted-trained)\.(svg|png|pdf|csv)"
)
LINES = 9  # datasets that can be told apart as lines; more are drawn as a heat map
MEAN = "mean over datasets"  # beside those of each, where that is what is drawn
HEATMAPS = ("class_accuracy", "class_accuracy_ncm")


@dataclass(frozen=True)
class Plan:
    """A figure to draw.

    Attributes:
        name: Name of its files.
        caption: What it shows.
        draw: Returns the axes.
        data: Returns the table that is drawn.
    """

    name: str
    caption: str
    draw: Callable[[], Any]
    data: Callable[[], pd.DataFrame]


@dataclass(frozen=True)
class Drawn:
    """A saved figure; `uris` hold its files as data URIs."""

    name: str
    caption: str
    files: tuple[Path, ...]

    @property
    def alt(self) -> str:
        """Text for those who cannot see it."""
        return f"{self.caption} The CSV beside it holds the values."

    @property
    def uris(self) -> dict[str, str]:
        """Each file as a data URI, by kind."""
        return {
            path.suffix[1:]: data_uri(path.read_bytes(), MIME[path.suffix[1:]])
            for path in self.files
        }

    @property
    def shown(self) -> str:
        """The kind that a page shows."""
        return "svg" if any(path.suffix == ".svg" for path in self.files) else "png"


def zipped(figures: Sequence[Drawn]) -> bytes:
    """Return the files of figures as a zip archive; the same files give the same bytes."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in (path for figure in figures for path in figure.files):
            # Without the time of the file: a report written again is the same to the byte.
            archive.writestr(zipfile.ZipInfo(path.name), path.read_bytes(), zipfile.ZIP_DEFLATED)
    return content.getvalue()


def data_uri(content: bytes, mime: str) -> str:
    """Return content as a data URI."""
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


@checked
def write_figures(
    run: str | Path | Answer, formats: Sequence[str] = ("svg", "png"), metrics: Sequence[str] = ()
) -> list[Path]:
    """Draw the figures of a run into its folder `figures`.

    Args:
        run: Run folder.
        formats: Any of `svg`, `png`, `pdf`.
        metrics: Metrics to draw along depth besides the usual ones.

    Returns:
        The files written.
    """
    answer = run if isinstance(run, Answer) else read_answer(run)
    files = [path for figure in _drawn(answer, formats, metrics) for path in figure.files]
    _remove_older(answer)
    return files


def draw_figures(
    answer: Answer,
    formats: Sequence[str],
    metrics: Sequence[str] = (),
) -> list[Drawn]:
    """Draw, save and return the figures of a run, for a page that shows them.

    Raises:
        UserError: A format is unknown, or a page can show none of them.
    """
    check_shown(formats)
    drawn = list(_drawn(answer, formats, metrics))
    _remove_older(answer)
    return drawn


def _remove_older(answer: Answer) -> None:
    """Remove figures that are older than what is drawn; of other formats, made since, none."""
    run = answer.run
    made = (run.scores, run.choice, run.validation)
    newest = max(path.stat().st_mtime_ns for path in made if path.exists())
    for path in run.figures.glob("*.*"):
        if OURS.fullmatch(path.name) and path.stat().st_mtime_ns < newest:
            path.unlink()


def check_shown(formats: Sequence[str]) -> None:
    """Raise a UserError where a format is unknown, or a page can show none of them."""
    for name in formats:
        check_one_of("figure format", name, plots.FORMATS)
    if not {"svg", "png"} & set(formats):
        raise UserError("the report shows figures as svg or png; name one of them")


def _drawn(answer: Answer, formats: Sequence[str], metrics: Sequence[str]) -> Iterator[Drawn]:
    for plan in plans(answer, metrics):
        stem = answer.run.figures / plan.name
        with plots.unseen():
            data = with_source(plan.data(), answer.model, answer.weights)
            # Tables of outcomes do not say it of themselves, as scores do.
            drawn = mark_random(plan.draw(), answer.random_weights)
            files = plots.save_figure(drawn, stem, data, formats)
        yield Drawn(plan.name, plan.caption, tuple(files))


def plans(answer: Answer, metrics: Sequence[str] = ()) -> Iterator[Plan]:
    """Yield what there is to draw for a run."""
    scores, choice = answer.scores, answer.choice
    shapes = metrics_by_shape(scores)
    for name in metrics:
        check_one_of("metric", name, shapes["curve"], where="the score table")
    # A metric of the user's own is in the table because it was asked for.
    own = [name for name in shapes["curve"] if name not in SHIPPED]
    for metric in dict.fromkeys((*answer.chosen_by, *CURVES, *own, *metrics)):
        if metric in shapes["curve"]:
            yield Plan(
                f"curves-{slug(metric)}",
                _caption(answer, metric, "along depth"),
                partial(plots.layer_curves, scores, metric, choice=choice),
                partial(_drawn_curves, answer, metric),
            )
    few = len(dataset_names(scores)) <= LINES
    for metric in GAPS:
        of_vision = (scores["metric"] == metric) & (scores["tower"] == "vision")
        if metric in shapes["curve"] and of_vision.any():
            yield Plan(
                f"gap-{slug(metric)}",
                _caption(answer, metric, "per dataset along depth"),
                partial(
                    plots.gap_curves if few else plots.dataset_heatmap,
                    scores,
                    metric,
                    choice=choice,
                ),
                partial(answer.curves, metric),
            )
    for metric in shapes["matrix"][:2]:
        if len(rows := agreement_rows(scores, metric)):
            yield Plan(
                f"agreement-{slug(metric)}",
                _caption(answer, metric, "of every vision and text position", rows),
                partial(plots.agreement_matrix, scores, metric, choice=choice),
                partial(agreement, scores, metric),
            )
    for metric in HEATMAPS:
        for tower in answer.depths:
            if metric in shapes["curve"] and has_curve(scores, metric, tower):
                one = scores[scores["tower"] == tower]
                yield Plan(
                    f"datasets-{slug(metric)}-{tower}",
                    _caption(answer, metric, f"per dataset and {tower} position"),
                    partial(plots.dataset_heatmap, one, metric, tower=tower, choice=choice),
                    partial(curves, one, metric),
                )
    if any("frequency" in found for found in choice.evidence.get("towers", {}).values()):
        yield Plan(
            "selection-frequency",
            f"How often each block is chosen, {_source(answer)}.",
            partial(plots.selection_frequency, choice),
            partial(frequency_table, answer),
        )
    yield from _outcome_plans(answer)


def _outcome_plans(answer: Answer) -> Iterator[Plan]:
    if answer.validation is None:
        return
    frame, validation = answer.validation.outcomes(), answer.validation
    warning = f" Warning: {validation.warning}." if validation.warning else ""
    # Too few runs have no interval, and no line stands for one.
    known = "hm_low" in frame and bool(frame["hm_low"].notna().any())
    lines = " Lines: 95 % interval of the harmonic mean." if known else ""
    marks = {
        "Joined: the sweep of the first adapted block.": frame["sweep"].any(),
        "Shaded: the chosen placement.": frame["chosen"].any(),
        "Lines and bands: 95 % interval of the harmonic mean, wide where datasets differ; "
        "differences to the chosen placement stand in the table.": known,
    }
    said = " ".join(words for words, drawn in marks.items() if drawn)
    yield Plan(
        "placement-sweep",
        f"Trained accuracy at each placement, {_source(answer)}. Means over datasets and seeds. "
        f"{said}{warning}",
        partial(plots.placement_sweep, frame),
        lambda: frame,
    )
    if len(validation.amounts):
        yield Plan(
            "amount",
            f"Base, novel and harmonic mean over amount, {_source(answer)}. A line per placement; "
            "held-out training shots of base classes, inner base and inner novel; mean over the "
            "folds that each ran in. Amounts that dropped out ran in the first alone: how hard "
            "these are is part of their height, and picks compare amounts within folds.",
            lambda: plots.amount_curves(validation.amounts)[-1],
            lambda: validation.amounts,
        )
    if "parameters" in frame.columns:
        yield Plan(
            "cost",
            f"Trained harmonic mean against trainable parameters, {_source(answer)}.{lines}"
            f"{warning}",
            lambda: drop_overlapping_texts(plots.cost(frame)),
            lambda: frame,
        )
    if len(validation.predicted) and len(validation.correlations):
        first, several = validation.correlations.iloc[0], len(validation.correlations) > 1
        best = str(first["score"])
        picked = (
            f"Of {counted(len(validation.correlations), 'score')} the one with the largest "
            f"Kendall's τ, {first['tau']:z.2f}, which flatters it. "
        )
        values = validation.predicted[validation.predicted["score"] == best]
        merged = frame.merge(values[["placement", "predicted"]], on="placement").rename(
            columns={"predicted": best}
        )
        if len(merged):
            yield Plan(
                "predicted-trained",
                f"Placement score {best} against the trained harmonic mean, {_source(answer)}. "
                f"{picked if several else ''}One point per placement.{lines}{warning}",
                lambda: drop_overlapping_texts(plots.predicted_vs_trained(merged, best)),
                lambda: merged,
            )


def frequency_table(answer: Answer) -> pd.DataFrame:
    """Return the selection frequency as a tidy table."""
    rows = [
        {
            "tower": tower,
            "block": block + 1,
            "frequency": share,
            "chosen": block + 1 in answer.choice.blocks(tower),
        }
        for tower, found in answer.choice.evidence.get("towers", {}).items()
        for block, share in enumerate(found.get("frequency", ()))
    ]
    return pd.DataFrame(rows, columns=["tower", "block", "frequency", "chosen"])


def _drawn_curves(answer: Answer, metric: str) -> pd.DataFrame:
    """Return a metric's curves, and the mean over datasets where that is what is drawn."""
    found = answer.curves(metric)
    if (found["dataset"] == POOLED).any() or found["dataset"].nunique() <= 1:
        return found
    return pd.concat([found, over_datasets(found).assign(dataset=MEAN)], ignore_index=True)


def _caption(answer: Answer, metric: str, where: str, drawn: pd.DataFrame | None = None) -> str:
    entry = metric_entry(metric, answer.scores if drawn is None else drawn, answer.scores)
    return f"{entry['label']} {where}, {_source(answer)}. {entry['caption']}".strip()


def _source(answer: Answer) -> str:
    random = ", RANDOM WEIGHTS" if answer.random_weights else ""
    return f"{answer.model} ({answer.weights}){random}"
