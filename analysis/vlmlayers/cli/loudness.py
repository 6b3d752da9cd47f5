"""How much a verb says: `-q` and `-v`, which every verb takes, also before its name."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from shutil import get_terminal_size
from textwrap import fill
from typing import Annotated, Any

import typer

from vlmlayers.errors import UserError, printable
from vlmlayers.progress import hidden, timed
from vlmlayers.runs import is_first_process

PACKAGES = ("vlmlayers", "vlmadapters")
FORM = "%(asctime)s.%(msecs)03d %(levelname)-7s %(name)s: %(message)s"
GIVEN = "vlmlayers.loudness"  # what was asked for, among the notes of a command
LOG = logging.getLogger(__name__)


class Loudness:
    """What gives a command, or a group of commands, the options `-q` and `-v`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params: list[Any] = [*self.params, *_options()]


def _options() -> list[Any]:
    """Return the two options as typer makes them, fresh ones for each command."""
    made = typer.Typer(add_completion=False)
    made.command()(_asked)
    return [option for option in typer.main.get_command(made).params if option.name != "help"]


def _setting(long: str, mode: Callable[[], AbstractContextManager[None]], help: str) -> Any:
    def set_mode(context: typer.Context, given: bool) -> None:
        if not given:
            return
        # A group and its verb share the notes: an option before the verb counts like one after it.
        before = context.meta.get(GIVEN)
        if before not in (None, long):
            raise UserError(f"{before} and {long} contradict each other; give one")
        if before is None:
            context.meta[GIVEN] = long
            context.find_root().with_resource(mode())

    return typer.Option(long, long[1:3], callback=set_mode, expose_value=False, help=help)


def fitted(text: str) -> str:
    """Return text for standard error: one line, on a terminal wrapped there between words."""
    line = printable(text)
    if not sys.stderr.isatty():
        return line
    return fill(line, get_terminal_size().columns, break_long_words=False, break_on_hyphens=False)


class Lines(logging.Handler):
    """Writes each record on standard error, above a bar that is shown there."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        from tqdm import tqdm

        tqdm.write(fitted(self.format(record)), file=sys.stderr)


@contextmanager
def spoken() -> Iterator[None]:
    """Show all that the packages log on standard error; of several processes the first one does."""
    if not is_first_process():
        yield
        return
    lines = Lines()
    lines.setFormatter(logging.Formatter(FORM, "%H:%M:%S"))
    loggers = [logging.getLogger(name) for name in PACKAGES]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(lines)
        logger.setLevel(logging.DEBUG)
    try:
        with timed(LOG, "all"):
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.removeHandler(lines)
            logger.setLevel(level)


def _asked(
    quiet: Annotated[
        bool, _setting("--quiet", hidden, "Say results, warnings and errors alone.")
    ] = False,
    verbose: Annotated[
        bool, _setting("--verbose", spoken, "Log what is done, and how long it took.")
    ] = False,
) -> None:
    """Take the options; their callbacks do what they ask for."""
