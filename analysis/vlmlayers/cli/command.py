"""The command `vlmlayers`: its verbs put together, and its exit codes."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import warnings
from importlib.metadata import version
from typing import Annotated, Any

import typer

from vlmlayers.cli.data import data_app
from vlmlayers.cli.extensions import Verb, Verbs
from vlmlayers.cli.loudness import Lines, fitted
from vlmlayers.cli.measure import extract, models, score, select
from vlmlayers.cli.show import figures, report
from vlmlayers.cli.whole import demo, init, study
from vlmlayers.errors import (
    DISK,
    RESUME,
    Terminated,
    UserError,
    disk_trouble,
    printable,
    stop_code,
)
from vlmlayers.runs import processes_launched

WRONG_USAGE: Any = typer.BadParameter.__bases__[0]  # click's, which typer brings along
# What typer says of a value that is not a number, in pydantic's words or its own, and in ours.
NUMBER = re.compile("(?:Input should be|'[^']*' is not) a valid (int|integer|number|float)\\b.*")
WHOLE = ("int", "integer")
HOME = re.compile(r"(--[a-z-]+=)(~.*)", re.DOTALL)  # shells expand it at the start of a word alone

app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Which layers of a vision-language model should be adapted? Measure every layer of both "
    "towers, choose, and test the choice by training.",
)
app.add_typer(data_app, name="data")
for verb in (demo, init, study, models, extract, score, select, report, figures):
    app.command(cls=Verb)(verb)


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"vlmlayers {version('vlm-layers')}")
        raise typer.Exit


@app.callback()
def before_the_verb(
    _: Annotated[
        bool,
        typer.Option("--version", callback=_say_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Read the options that stand before the verb."""


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Show a warning as errors are shown: one line, without the source that it came from."""
    typer.echo(fitted(f"Warning: {message}"), err=True)


def _usage(error: Any) -> str:
    """Return one line for a wrong command; the help where a group of verbs is called by itself."""
    message = error.format_message()
    if "\n" in message.strip():
        return str(message)
    verb = "vlmlayers" if error.ctx is None else error.ctx.command_path
    message += _as_setting(error)
    line = NUMBER.sub(
        lambda found: f"a {'whole ' * (found[1] in WHOLE)}number is needed", printable(message)
    )
    return fitted(f"Error: {line}{'' if line.endswith(('.', '?')) else '.'} See `{verb} --help`.")


def _as_setting(error: Any) -> str:
    """Return how an option that a verb lacks is given, if it is a value of a recipe or metric."""
    name = str(getattr(error, "option_name", ""))  # of an unknown option alone
    known = [o for one in error.ctx.command.params for o in one.opts] if name[:2] == "--" else ()
    setting = name.removeprefix("--").replace("-", "_")
    return f"; a setting is given as --set {setting}=…" if "--set" in known else ""


def _at_home(word: str) -> str:
    found = HOME.fullmatch(word)
    return found[1] + os.path.expanduser(found[2]) if found else word  # noqa: PTH111


def _terminate(*_: Any) -> None:
    # `timeout` and schedulers send it to a process and to its group: once is heard, and what has to
    # be put away then is put away in peace.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated


def main() -> None:
    """Run the command line: 0 done, 2 the user's input is wrong, 1 a fault, 130 or 143 stopped."""
    # Python's own last resort writes into the row of a bar, at whatever column that ended.
    logging.lastResort = Lines(logging.WARNING)
    if processes_launched() == 1:
        # torchrun sends it to those that wait for one that died, which would not see it.
        signal.signal(signal.SIGTERM, _terminate)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            # Otherwise click would print its own errors and exit before those below are reached.
            words = [_at_home(word) for word in sys.argv[1:]]
            sys.exit(app(args=words, standalone_mode=False, prog_name="vlmlayers") or 0)
    except typer.Abort:
        sys.exit(1)
    except WRONG_USAGE as error:
        typer.echo(_usage(error), err=True)
        sys.exit(2)
    except UserError as error:
        typer.echo(fitted(f"Error: {error}"), err=True)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        typer.echo(f"\n{RESUME}", err=True)
        sys.exit(stop_code(stop))
    except OSError as error:
        if error.errno not in DISK:
            raise
        typer.echo(fitted(f"Error: {disk_trouble(error)}"), err=True)
        sys.exit(2)
