"""The command `vlmlayers`: its verbs put together, and its exit codes."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import typer

from vlmlayers.cli.data import data_app
from vlmlayers.cli.extensions import RESUME, Verbs
from vlmlayers.cli.measure import extract, models, score, select
from vlmlayers.cli.show import figures, report
from vlmlayers.cli.whole import demo, study
from vlmlayers.errors import DISK, UserError, disk_trouble, printable

app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Which layers of a vision-language model should be adapted? Measure every layer of both "
    "towers, choose, and prove the choice by training.",
)
app.add_typer(data_app, name="data")
for verb in (demo, study, models, extract, score, select, report, figures):
    app.command()(verb)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Show a warning as errors are shown: one line, without the source that it came from."""
    typer.echo(f"Warning: {printable(str(message))}", err=True)


def main() -> None:
    """Run the command line: 0 done, 2 the user's input is wrong, 1 a fault, 130 stopped."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            app()
    except UserError as error:
        typer.echo(f"Error: {printable(str(error))}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo(f"\n{RESUME}", err=True)
        sys.exit(130)
    except OSError as error:
        if error.errno not in DISK:
            raise
        typer.echo(f"Error: {printable(disk_trouble(error))}", err=True)
        sys.exit(2)
