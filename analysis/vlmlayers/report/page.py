"""Write the report of one run: `report.html`, `report.md` and the figures."""

from __future__ import annotations

import base64
import gzip
import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from vlmlayers.arguments import checked
from vlmlayers.files import write_text
from vlmlayers.plots.style import axis_label
from vlmlayers.report.figures import data_uri, draw_figures, zipped
from vlmlayers.report.glossary import explained
from vlmlayers.report.made import made_tables, remarks
from vlmlayers.report.markdown import report_markdown
from vlmlayers.report.next_steps import next_steps
from vlmlayers.report.numbers import Answer, read_answer
from vlmlayers.report.payload import payload, script_json
from vlmlayers.report.ribbon import ribbon
from vlmlayers.report.searched import search_tables
from vlmlayers.report.sensitivity import sensitivity_table
from vlmlayers.report.tables import (
    answer_tables,
    comparison_table,
    validation_tables,
)
from vlmlayers.scores.summaries import DATASET_ACCURACIES, dataset_names, metrics_by_shape
from vlmlayers.words import clauses

TEMPLATES = Path(__file__).parent / "templates"
RANDOM = (
    "RANDOM WEIGHTS: this backbone is untrained. The numbers show that the tools work; they "
    "say nothing about a trained model."
)
WHY = (
    "Why telling datasets apart matters: a block whose features say which dataset an item is from "
    "holds what is specific to it, which is what an adapter has to learn; blocks below hold what "
    "all datasets share and are better left frozen (Yang et al., MMA: Multi-Modal Adapter for "
    "Vision-Language Models, CVPR 2024)."
)
TAG = r"<[^>]*>"  # whose attributes stay as they are
# Of a placement, as `Placement` writes it.
PART = re.compile(rf"{TAG}|\b[vt]?\d+-\d+\b|\bzero-shot\b")
BETWEEN_PARTS = re.compile(r",(?=(<span[^>]*>)?[vt][\d-])")
FIRST = (*DATASET_ACCURACIES, "class_accuracy", "zero_shot_accuracy")


@checked
def write_report(
    folder: str | Path,
    *,
    title: str = "",
    note: str = "",
    formats: Sequence[str] = ("svg", "png", "pdf"),
    metrics: Sequence[str] = (),
) -> Path:
    """Write the report of a run folder.

    Args:
        folder: Run folder with scores and a choice.
        title: Heading; that of the run's study where empty, else model and weights.
        note: A paragraph under the answer; that of the run's study where empty.
        formats: Formats of the saved figures.
        metrics: Metrics to draw a figure of besides the usual ones.

    Returns:
        Path of `report.html`.

    Raises:
        UserError: The folder holds no scores or no choice, or a metric or format is unknown.
    """
    answer = read_answer(folder)
    kept = answer.provenance.get("report", {})
    note = note or str(kept.get("note", ""))
    heading = title or kept.get("title") or f"Layers to adapt: {answer.model} ({answer.weights})"
    figures = draw_figures(answer, formats, metrics)
    html = render(
        "report.html.j2",
        heading,
        payload(answer),
        {
            "answer": answer,
            "note": note,
            "figures": figures,
            "archive": data_uri(zipped(figures), "application/zip"),
            "remarks": remarks(answer),
            "steps": next_steps(answer),
            "sensitivity": sensitivity_table(answer),
            "search_tables": search_tables(answer),
            "ribbon": Markup(ribbon(answer)),
            "random": RANDOM if answer.random_weights else "",
            **_evidence(answer),
            "validation": answer.validation,
            "comparison": comparison_table(answer.validation),
            "predictors": _predictors(answer),
            "validation_tables": validation_tables(answer.validation),
            "answer_tables": answer_tables(answer),
            "made_tables": made_tables(answer),
            "downloads": _downloads(answer),
            "study": _study(answer),
            "written": answer.provenance.get("environment", {}).get("written", ""),
        },
    )
    write_text(answer.run.folder / "report.md", report_markdown(answer, heading, note, figures))
    return write_text(answer.run.report, html)


def render(template: str, title: str, data: Any, values: dict[str, Any]) -> str:
    """Return a page: everything is escaped, except the package's own script, style and SVG."""
    script = (TEMPLATES / "charts.js").read_text(encoding="utf-8")
    # The page's security policy allows this one script by its hash, and none that data could bring.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    css = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    return _environment().get_template(template).render(
        title=title, data=Markup(script_json(data)), script=Markup(script), css=Markup(css),
        script_hash=f"sha256-{digest}", version=version("vlm-layers"), **values,
    )  # fmt: skip


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        # A name that a template misspells fails here instead of leaving a gap in the page.
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["explained"] = explained
    made.filters["unbroken"] = _unbroken
    made.filters["clauses"] = clauses
    return made


def _unbroken(text: str) -> Any:
    """Return text as HTML whose lines break between the parts of a placement, not inside one."""

    def whole(match: re.Match[str]) -> str:
        part = match.group(0)
        return part if part.startswith("<") else f'<span class="whole">{part}</span>'

    words = PART.sub(whole, str(escape(text)))
    return Markup(BETWEEN_PARTS.sub(",<wbr>", words))


def _evidence(answer: Answer) -> dict[str, Any]:
    shapes = metrics_by_shape(answer.scores)
    first = list(dict.fromkeys((*answer.chosen_by, *FIRST)))
    ordered = sorted(shapes["curve"], key=lambda n: first.index(n) if n in first else len(first))
    per_dataset = [
        name
        for name in sorted(ordered, key=lambda n: n != "centroid_gap")
        if dataset_names(answer.scores[answer.scores["metric"] == name])
    ]
    gap = "centroid_gap" if "centroid_gap" in ordered else ""
    return {
        "curve_metrics": [(name, axis_label(name)) for name in ordered],
        "matrix_metrics": [(name, axis_label(name)) for name in shapes["matrix"]],
        "gap_metrics": [(name, axis_label(name)) for name in per_dataset],
        "why": WHY if ordered and ordered[0] in DATASET_ACCURACIES else "",
        "lead": f"{axis_label(ordered[0])}. {answer.reading(ordered[0])}" if ordered else "",
        "gap_lead": f"{axis_label(gap)}. {answer.reading(gap)}" if gap else "",
        "datasets": sorted(dataset_names(answer.scores)),
        "frequency": any(
            "frequency" in found for found in answer.choice.evidence.get("towers", {}).values()
        ),
    }


def _predictors(answer: Answer) -> list[tuple[str, str]]:
    if answer.validation is None:
        return []
    correlated = [str(name) for name in answer.validation.correlations.get("score", ())]
    known = dict.fromkeys(map(str, answer.validation.predicted.get("score", ())))
    names = [name for name in [*correlated, *known] if name in known]
    if "parameters" in answer.validation.placements.columns:
        names.append("parameters")
    return [
        (name, f"{axis_label(metric)}, mean of blocks" if of_metric else name.replace("_", " "))
        for name in dict.fromkeys(names)
        for _, of_metric, metric in [name.rpartition("metric:")]
    ]


def _downloads(answer: Answer) -> list[tuple[str, str]]:
    table = answer.scores.to_csv(index=False).encode()
    found = [
        # Without a time, so that a report written again is the same to the byte.
        ("scores.csv.gz", data_uri(gzip.compress(table, mtime=0), "application/gzip")),
        ("choice.json", data_uri(answer.run.choice.read_bytes(), "application/json")),
    ]
    validation = sorted(answer.run.folder.glob("validation*.*")) if answer.validation else []
    searched = [answer.run.search, answer.run.search.with_suffix(".csv")] if answer.search else []
    for path in (answer.run.provenance, *searched, *validation, answer.run.study):
        if path.exists():
            mime = {".json": "application/json", ".csv": "text/csv"}.get(path.suffix, "text/plain")
            found.append((path.name, data_uri(path.read_bytes(), mime)))
    return found


def _study(answer: Answer) -> str:
    return answer.run.study.read_text(encoding="utf-8") if answer.run.study.exists() else ""
