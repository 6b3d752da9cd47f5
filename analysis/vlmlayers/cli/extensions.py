"""The verbs that installed packages add, and the order in which help shows all of them."""

from __future__ import annotations

import re
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from vlmlayers.cli.loudness import Loudness
from vlmlayers.errors import RESUME, UserError, check_one_of, stop_code
from vlmlayers.user_code import packaged

LIST = re.compile(r"<list\[(\w+)\]>")  # how typer shows the type of several
VERBS = "vlmlayers.verbs"
ORDER = (
    "demo",
    "init",
    "study",
    "data",
    "models",
    "extract",
    "score",
    "search",
    "select",
    "train",
    "evaluate",
    "validate",
    "export",
    "report",
    "figures",
)


class Verb(Loudness, TyperCommand):
    """A verb whose help says what an argument takes without the words of Python."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments; an empty one is refused, which as a path is the current folder."""
        if any(not arg.strip() or (arg.startswith("--") and arg.endswith("=")) for arg in args):
            raise typer.BadParameter(
                "an argument is empty, as a shell variable that is not set", ctx
            )
        return super().parse_args(ctx, args)

    def get_help(self, ctx: Any) -> str:
        """Return the help, with `<str>` and `<path>` for arguments that may be several."""
        text = super().get_help(ctx)
        # Padded, so that the columns of the help stay where they are.
        lines = LIST.sub(lambda one: f"<{one[1].lower()}>".ljust(len(one[0])), text).split("\n")
        return "\n".join(map(str.rstrip, lines))


class VerbGroup(Loudness, TyperGroup):
    """Verbs under a common word."""


class Verbs(VerbGroup):
    """The verbs of this package and, loaded when asked for, those of installed extensions."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the verbs in the order in which they are used."""
        names = {*super().list_commands(ctx), *packaged(VERBS)}
        return sorted(names, key=lambda n: (ORDER.index(n) if n in ORDER else len(ORDER), n))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a verb."""
        own = super().get_command(ctx, cmd_name)
        return own if own is not None else _extension(cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the verb that is named; typer would look for a near one among our own alone."""
        if not args[0].startswith("-"):
            check_one_of("verb", args[0], self.list_commands(ctx))
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run a verb; Ctrl-C and SIGTERM end it in one line."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            typer.echo(f"\n{RESUME}", err=True)
            raise typer.Exit(stop_code(stop)) from None


def _extension(name: str) -> Any:
    point = packaged(VERBS).get(name)
    if point is None:
        return None
    made = typer.Typer(add_completion=False, rich_markup_mode=None)
    try:
        function = point.load()
    except (ImportError, AttributeError) as error:
        reason = str(error)

        # A verb all the same: a broken extension must not take the help of the others with it.
        def function() -> None:
            raise UserError(
                f"the verb {name!r} cannot be loaded: {reason}; "
                "install the package that offers it again"
            )

        function.__doc__ = "Not available in this installation."
    if isinstance(function, typer.Typer):
        command = typer.main.get_command(function)
    else:
        made.command(name, cls=Verb)(function)
        command = typer.main.get_command(made)
    command.name = name
    return command
