"""A table of numbers for a paper, written as CSV, Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from vlmlayers.files import write_csv, write_text
from vlmlayers.words import escape_markdown

DAGGER = "†"
EMPTY = "–"
LONGEST_HEADING = 20
LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$",
    "→": r"$\rightarrow$", "–": "--", "…": r"\ldots{}", "†": r"\textsuperscript{\dag}",
    "τ": r"$\tau$", "·": r"$\cdot$", "×": r"$\times$",
}  # fmt: skip


def escape_latex(text: str) -> str:
    """Return `text` with every character that LaTeX would interpret written out."""
    return "".join(LATEX.get(character, character) for character in text)


@dataclass(frozen=True)
class TableCell:
    """One number, in percent.

    Attributes:
        value: The number, or None where nothing was published or run.
        sd: Standard deviation over seeds of an own run.
        seeds: Number of seeds behind `value`; 0 for a published number.
        flag: What is wrong with the number; the cell carries a dagger.
        note: The words under the table that explain the flag; `notes` has those of own runs.
        source: Where the number was read.
    """

    value: float | None = None
    sd: float | None = None
    seeds: int = 0
    flag: str = ""
    note: str = ""
    source: str = ""

    def __str__(self) -> str:
        if self.value is None:
            return EMPTY
        spread = f" ± {self.sd:.2f}" if self.sd is not None else ""
        return f"{self.value:.2f}{spread}{DAGGER if self.flag else ''}"


@dataclass(frozen=True)
class PaperTable:
    """Cells by row and column.

    Attributes:
        name: Stem of the files to write.
        title: Caption, one sentence.
        stub: Names of the row headings, such as ("Dataset", "Metric").
        rows: Row headings, one tuple per row, as long as `stub`.
        columns: Column headings.
        cells: (row, column) → cell; absent ones are empty.
        rules: Numbers of the rows that a thin rule precedes.
        notes: Sentences under the table, beside those of flagged cells.
    """

    name: str
    title: str
    stub: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    columns: Sequence[str]
    cells: dict[tuple[tuple[str, ...], str], TableCell]
    rules: frozenset[int] = field(default_factory=frozenset)
    notes: tuple[str, ...] = ()

    def cell(self, row: tuple[str, ...], column: str) -> TableCell:
        """Return the cell, an empty one where there is none."""
        return self.cells.get((row, column), TableCell())

    def footnotes(self) -> list[str]:
        """Return the words under the table; those of flagged published cells name their place."""
        flagged = [
            f"{DAGGER} {', '.join([*row, column])}: "
            f"{cell.flag}. {cell.note}."
            for row in self.rows for column in self.columns
            if (cell := self.cell(row, column)).flag and not cell.seeds
        ]  # fmt: skip
        return flagged + list(self.notes)

    def tidy(self) -> pd.DataFrame:
        """Return one line per filled cell: row headings, column, then the fields of `TableCell`."""
        names = [name.lower() for name in self.stub]
        lines = [
            {**dict(zip(names, row)), "column": column, **vars(self.cell(row, column))}
            for row in self.rows for column in self.columns
            if self.cell(row, column).value is not None
        ]  # fmt: skip
        return pd.DataFrame(lines)

    def markdown(self) -> str:
        """Return the table in Markdown, with its caption and footnotes."""
        lines = [
            _markdown_line([*self.stub, *self.columns]),
            "|" + "---|" * len(self.stub) + "---:|" * len(self.columns),
            *(_markdown_line(texts) for texts in self._texts()),
        ]
        notes = [f"- {escape_markdown(note)}" for note in self.footnotes()]
        return "\n".join([f"**{escape_markdown(self.title)}**", "", *lines, "", *notes, ""])

    def latex(self) -> str:
        """Return the table for LaTeX; the preamble needs `booktabs` and `graphicx`."""
        body: list[str] = []
        for number, texts in enumerate(self._texts()):
            if number in self.rules:
                body.append(r"\midrule")
            body.append(_latex_line(texts))
        notes = [rf"\par\footnotesize {escape_latex(note)}" for note in self.footnotes()]
        return "\n".join([
            "% needs \\usepackage{booktabs,graphicx}",
            r"\begin{table*}[t]", r"\centering\small\setlength{\tabcolsep}{3pt}",
            rf"\caption{{{escape_latex(self.title)}}}",
            rf"\label{{tab:{self.name.replace('_', '-')}}}",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{{'l' * len(self.stub)}{'r' * len(self.columns)}}}",
            r"\toprule", " & ".join(map(_heading, [*self.stub, *self.columns])) + r" \\",
            r"\midrule",
            *body, r"\bottomrule", r"\end{tabular}}", *notes, r"\end{table*}", "",
        ])  # fmt: skip

    def write(self, out: Path) -> list[Path]:
        """Write `name`.csv (tidy), .md and .tex into the folder `out`."""
        return [
            write_csv(out / f"{self.name}.csv", self.tidy()),
            write_text(out / f"{self.name}.md", self.markdown()),
            write_text(out / f"{self.name}.tex", self.latex()),
        ]

    def _texts(self) -> Iterator[list[str]]:
        """Yield the texts of each row; a first heading is not repeated below itself."""
        previous = ""
        for row in self.rows:
            first = row[0] if len(row) == 1 or row[0] != previous else ""
            previous = row[0]
            yield [first, *row[1:], *(str(self.cell(row, column)) for column in self.columns)]


def _markdown_line(texts: Iterable[str]) -> str:
    return "| " + " | ".join(escape_markdown(text) for text in texts) + " |"


def _heading(text: str) -> str:
    """Return a column heading; a long one, such as an own run's, is stacked to stay narrow."""
    if len(text) <= LONGEST_HEADING:
        return escape_latex(text)
    stacked = r"\\".join(map(escape_latex, text.split(", ")))
    return rf"\shortstack[r]{{{stacked}}}"


def _latex_line(texts: Iterable[str]) -> str:
    return " & ".join(escape_latex(text) for text in texts) + r" \\"
