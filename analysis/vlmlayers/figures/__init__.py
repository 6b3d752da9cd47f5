"""The figures and tables of a paper, drawn from tidy tables; without torch.

Each drawing reads the tables it needs from one or more folders (`figures/tables` of the repository,
or anyone's run folders) and writes into another one: figures as PDF, SVG, PNG and the CSV drawn;
tables as CSV, Markdown and LaTeX.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import fill

from vlmlayers.arguments import checked
from vlmlayers.errors import UserError, WriteFault, check_one_of
from vlmlayers.figures.inputs import Folders, MissingTable, as_folders
from vlmlayers.figures.paper_figures import FIGURES
from vlmlayers.figures.paper_tables import TABLES, draw_table

Drawing = Callable[[Folders, Path], list[Path]]
DRAWINGS: dict[str, Drawing] = {**FIGURES, **{name: partial(draw_table, name) for name in TABLES}}

__all__ = ["DRAWINGS", "Drawing", "MissingTable", "Outcome", "draw_all"]


@dataclass(frozen=True)
class Outcome:
    """What became of one figure or table.

    Attributes:
        name: A key of `DRAWINGS`.
        paths: The files written; none where it was skipped.
        reason: Why it was skipped.
    """

    name: str
    paths: tuple[Path, ...] = ()
    reason: str = ""

    @property
    def words(self) -> str:
        """What was written, or why not."""
        if not self.paths:
            return f"skipped: {self.reason}"
        return " ".join(path.suffix.removeprefix(".") for path in self.paths)

    @property
    def line(self) -> str:
        """Name and words for a terminal of 80 columns."""
        return fill(f"{self.name:28} {self.words}", 80, subsequent_indent=" " * 29)


@checked
def draw_all(tables: Folders, out: Path, names: Sequence[str] | None = None) -> list[Outcome]:
    """Draw every figure and table that the folders hold the tables for; what is refused is skipped.

    Args:
        tables: One folder, or several, with tables: `figures/tables` or run folders.
        out: Folder to write to.
        names: Keys of `DRAWINGS`; all where None.

    Raises:
        UserError: A name is unknown, a folder is not there, or `out` cannot be written.
    """
    for folder in as_folders(tables):
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder; name run folders or folders of tables")
    found = []
    for name in names if names is not None else DRAWINGS:
        check_one_of("figure", name, DRAWINGS)
        try:
            found.append(Outcome(name, tuple(DRAWINGS[name](tables, out))))
        except WriteFault:
            raise
        except UserError as error:
            joined = len(as_folders(tables)) > 1 and not isinstance(error, MissingTable)
            why = "the tables of all folders are drawn as one, and " if joined else ""
            found.append(Outcome(name, reason=f"{why}{error}"))
    return found
