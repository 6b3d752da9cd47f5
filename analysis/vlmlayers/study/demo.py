"""The embedded default: the miniature CLIP on built-in datasets, end to end."""

from __future__ import annotations

import textwrap
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from vlmlayers.positions import block_number, is_block
from vlmlayers.report.numbers import Answer, read_answer
from vlmlayers.runs import Run
from vlmlayers.scores.summaries import curves
from vlmlayers.study.context import silent
from vlmlayers.study.runner import run_study
from vlmlayers.study.schema import Study, check_study
from vlmlayers.words import clauses, text_table

FILE = Path(__file__).parent / "demo.toml"
MEASURES = (("dataset_accuracy", "dataset"), ("class_accuracy_ncm", "class"))


def demo_study(random_weights: bool = False) -> Study:
    """Return the demo's study."""
    return check_study(tomllib.loads(demo_source(random_weights)), "the demo")


def demo_source(random_weights: bool = False) -> str:
    """Return the demo's study file as it is run: `vlmlayers study` runs it as well."""
    source = FILE.read_text(encoding="utf-8")
    # In the text, so that the study file kept in the run is the one that ran.
    trained = '{ name = "mini-clip" }'
    return source.replace(trained, '{ name = "mini-clip", random_weights = true }', random_weights)


def run_demo(
    out: str | Path = "runs/demo",
    *,
    random_weights: bool = False,
    force: bool = False,
    echo: Callable[[str], None] = silent,
) -> list[str]:
    """Run the demo and return the lines that sum it up.

    Raises:
        UserError: The shipped weights are missing and random ones were not asked for.
    """
    study = demo_study(random_weights)
    source = demo_source(random_weights)
    run = run_study(study, out, base=FILE.parent, source=source, force=force, echo=echo)[0]
    return summary(run)


def summary(run: Run) -> list[str]:
    """Return the demo's table, the answer and the path of the report."""
    answer = read_answer(run)
    lines = ["", text_table(position_table(answer).to_dict("records")), ""]
    if answer.random_weights:
        lines.append("RANDOM WEIGHTS: this says nothing about a trained model.")
    lines += [*textwrap.wrap(answer.headline, 80), *textwrap.wrap(answer.lead, 80)]
    lines += _listed(answer.doubts)
    if answer.validation is not None:
        proof = dict(answer.facts())["Tested by training"]
        lines += ["Tested by training:", *_listed(clauses(proof))]
    return [*lines, f"Report: {run.report}"]


def _listed(parts: Iterable[str]) -> list[str]:
    return [line for one in parts for line in textwrap.wrap(f"- {one}", 80, subsequent_indent="  ")]


def position_table(answer: Answer) -> pd.DataFrame:
    """Return per position: dataset and class accuracy of both towers, gap, and whether chosen."""
    scores, choice = answer.scores, answer.choice
    columns: dict[str, dict[Any, float]] = {}
    for metric, short in MEASURES:
        if metric not in set(scores["metric"]):
            continue
        frame = curves(scores, metric)
        for tower, part in frame.groupby("tower", sort=False):
            columns[f"{short} {tower}"] = part.groupby("position")["value"].mean().to_dict()
    if "centroid_gap" in set(scores["metric"]):
        gap = curves(scores, "centroid_gap")
        columns["gap"] = gap.groupby("position")["value"].mean().to_dict()
    depth = max(answer.depths.values())
    positions = ["embed", *map(str, range(1, depth + 1)), "proj"]
    rows = [
        {
            "position": position,
            **{name: _rounded(values.get(position)) for name, values in columns.items()},
            "chosen": _chosen(position, choice.vision, choice.text),
        }
        for position in positions
    ]
    return pd.DataFrame(rows)


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _chosen(position: str, vision: tuple[int, ...], text: tuple[int, ...]) -> str:
    if not is_block(position):
        return ""
    block = block_number(position)
    return " ".join(
        name for name, blocks in (("vision", vision), ("text", text)) if block in blocks
    )
