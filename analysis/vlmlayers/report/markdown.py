"""`report.md`: the report for repositories and reviews."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vlmlayers.report.made import made_tables, remarks
from vlmlayers.report.next_steps import next_steps
from vlmlayers.report.searched import search_tables
from vlmlayers.report.sensitivity import sensitivity_table
from vlmlayers.report.tables import (
    Table,
    answer_tables,
    comparison_table,
    validation_tables,
)
from vlmlayers.words import clauses, markdown_table
from vlmlayers.words import escape_markdown as esc

if TYPE_CHECKING:
    from vlmlayers.report.figures import Drawn
    from vlmlayers.report.numbers import Answer


def report_markdown(answer: Answer, title: str, note: str, figures: Sequence[Drawn]) -> str:
    """Return the report as Markdown; figures are linked from the folder `figures`."""
    parts = [f"# {esc(title)}", ""]
    if answer.random_weights:
        parts += [
            "> **RANDOM WEIGHTS**: this backbone is untrained; nothing here says anything "
            "about a trained model.",
            "",
        ]
    answered = "".join(f"**{words}**" if firm else words for words, firm in answer.headline_parts)
    parts += [answered, ""]
    if (comparison := comparison_table(answer.validation)) is not None:
        parts += [esc(comparison.caption) + ":", ""]
        parts += [markdown_table(comparison.headings, comparison.rows), ""]
    parts += [esc(answer.lead), ""]
    if answer.doubts:
        parts += [*(f"- {esc(doubt)}" for doubt in answer.doubts), ""]
    parts += [markdown_table(("What", "Answer"), answer.facts())]
    if note:
        parts += ["", esc(note)]
    for remark in remarks(answer):
        parts += ["", esc(remark)]
    parts += ["", "## Evidence", ""]
    if (sensitivity := sensitivity_table(answer)) is not None:
        parts += _tables([sensitivity])
    parts += _tables(search_tables(answer))
    for figure in figures:
        shown = next(path for path in figure.files if path.suffix[1:] == figure.shown)
        parts += [f"![{esc(figure.caption)}](figures/{shown.name})", "", esc(figure.caption), ""]
    if answer.validation is not None:
        parts += ["## Test by training", ""]
        parts += _told(answer.validation.verdict)
        if answer.validation.warning not in answer.validation.verdict:
            parts += [f"> Warning: {esc(answer.validation.warning)}.", ""]
        parts += _told(answer.validation.predictors)
        parts += _tables(validation_tables(answer.validation))
    parts += ["## Tables", "", *_tables(answer_tables(answer))]
    parts += ["## How it was made", "", *_tables(made_tables(answer))]
    parts += ["## What to do next", ""]
    for step in next_steps(answer):
        parts += [f"### {step.title}", "", esc(step.text), "", "```", step.code, "```", ""]
    return "\n".join(parts).rstrip() + "\n"


def _told(text: str) -> list[str]:
    """Return a text, a long one as a list of its clauses, and an empty line; nothing of none."""
    parts = [esc(one) for one in clauses(text)]  # the marks of escapes are no ends of clauses
    listed = [f"- {one}" for one in parts] if len(parts) > 1 else parts
    return [*listed, ""] if text else []


def _tables(tables: Sequence[Table]) -> list[str]:
    return [
        part
        for table in tables
        for part in (
            f"### {esc(table.caption)}",
            "",
            markdown_table(table.headings, table.rows),
            "",
        )
    ]
