"""What every script of this folder does: read the arguments, draw, say what was written."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlmlayers.errors import UserError
from vlmlayers.figures import Drawing

HERE = Path(__file__).resolve().parent
RECORDED = (HERE / "tables", HERE.parent / "benchmarks" / "results")


def folders(description: str) -> tuple[list[Path], Path]:
    """Read the folders with tables and the one to write to from the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("tables", nargs="*", type=Path, default=RECORDED,
                        help="folders with tables, such as run folders")  # fmt: skip
    parser.add_argument("--out", type=Path, default=HERE.parent / "runs" / "figures",
                        help="folder to write to")  # fmt: skip
    arguments = parser.parse_args()
    return list(arguments.tables), arguments.out


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Leave with code 2 and one line where the input is wrong or something is missing."""
    try:
        yield
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def main(draw: Drawing) -> None:
    """Draw one figure or table."""
    tables, out = folders(draw.__doc__ or "")
    with errors_in_one_line():
        paths = draw(tables, out)
    print(*paths, sep="\n")
