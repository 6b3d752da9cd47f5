"""Options that several verbs share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from os.path import exists
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from vlmlayers.options import Cli, Options, validated


def several(help: str, *names: str) -> Any:
    """Return an option that takes several words: with commas in between, or repeated."""
    return typer.Option(*names, metavar="<A,B>", help=f"{help} Several: with commas, or repeated.",
                        callback=_words, show_default=False)  # fmt: skip


def named(help: str) -> Any:
    """Return the argument of a verb that takes several names: one after another, or with commas."""
    return typer.Argument(help=help, callback=_words, show_default=False)


def repeated(help: str, *names: str, metavar: str) -> Any:
    """Return an option that is repeated for several, since one value may have commas inside."""
    return typer.Option(*names, metavar=f"<{metavar}>", help=f"{help} Several: repeated.",
                        show_default=False)  # fmt: skip


def key_values(help: str) -> Any:
    """Return the option `--set`, of which each one sets a value."""
    return repeated(help, "--set", "-s", metavar="KEY=VALUE")


def _words(given: list[str] | None) -> list[str] | None:
    """Return the words of an option that may hold several at once; None where it is absent.

    A path that is there stays whole, commas and all.
    """
    if given is None:
        return None
    # Not `Path.exists`, which raises where a list is too long to be the name of a file.
    parts = [[text] if exists(text) else text.split(",") for text in given]  # noqa: PTH110
    words = [word for some in parts for part in some if (word := part.strip())]
    if given and not words:
        raise typer.BadParameter("nothing is named")
    return words


Model = Annotated[
    str,
    typer.Argument(
        help="Architecture, mini-clip, hf-hub:organisation/name, or a folder of open_clip, "
        "transformers or timm with configuration and weights."
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, …")]
DataRoot = Annotated[
    Path | None,
    typer.Option(
        "--data-root", help="Folder that the datasets lie in; else VLMLAYERS_DATA, else ./data."
    ),
]


def with_options(verb: Callable[..., None]) -> Callable[..., None]:
    """Give a verb the fields of each of its parameters that is a set of options, in its place.

    Type, default and help are those of the field. What is absent is left to its default; what is
    wrong is said before the verb runs.
    """
    signature = inspect.signature(verb, eval_str=True)
    parameters, sets = [], {}
    for parameter in signature.parameters.values():
        kind = parameter.annotation
        if isinstance(kind, type) and issubclass(kind, Options):
            sets[parameter.name] = kind
            parameters += [_typed(name, kind.model_fields[name]) for name in _own_first(kind)]
        else:
            # By name alone, or one without a default could not stand behind one that has some.
            parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY))

    @wraps(verb)
    def run(**given: Any) -> None:
        for name, kind in sets.items():
            own = {key: given.pop(key) for key in kind.model_fields}
            # typer hands on None where nothing was typed; the default is the options' own.
            told = {key: value for key, value in own.items() if value is not None}
            given[name] = validated(kind, told, verb.__name__, words=True)
        verb(**given)

    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _own_first(kind: type[Options]) -> list[str]:
    """Return the fields of a set of options; what it shares with others comes after its own."""
    stated = (name for one in kind.__mro__ for name in inspect.get_annotations(one))
    return [name for name in dict.fromkeys(stated) if name in kind.model_fields]


def _typed(name: str, field: FieldInfo) -> inspect.Parameter:
    """Return a field of a set of options as the parameter of a verb."""
    cli = next((mark for mark in field.metadata if isinstance(mark, Cli)), Cli())
    help, default, kind = field.description or "", field.default, _plain(field.annotation)
    flag = f"--{name.replace('_', '-')}"
    if cli.repeated:
        kind, default = list[str], None
        option = repeated(help, flag, metavar=cli.repeated)
    elif kind is list:
        kind, default = list[str], None  # help names what stands for those that are absent
        option = several(help, flag)
    else:
        # One name alone: typer would add `--no-…`, which says nothing of what is off by default.
        option = typer.Option(*(() if default is True else (flag,)), help=help)
    taken: Any = kind if default is not None else kind | None
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[taken, option]
    )


def _plain(annotation: Any) -> Any:
    """Return what typer reads for an annotation; text where pydantic does the reading."""
    parts = [part for part in get_args(annotation) if part is not type(None)]
    if get_origin(annotation) in (Union, UnionType):
        return _plain(parts[0])
    if get_origin(annotation) in (tuple, dict):
        return list
    return annotation if annotation in (bool, int, float, Path) else str
