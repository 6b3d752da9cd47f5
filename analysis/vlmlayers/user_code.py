"""Code of the user's own, named as `path.py:name`, and of packages: rules, metrics, methods."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
import zlib
from collections.abc import Callable, Collection
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from vlmlayers.errors import UserError, check_one_of, no_file


def packaged(group: str) -> dict[str, EntryPoint]:
    """Return what installed packages offer in a group of entry points, by name."""
    # Read at every use: a package may be installed while a notebook is open.
    return {point.name: point for point in entry_points(group=group)}


def is_user_code(where: str) -> bool:
    """Whether a name is that of something in a Python file."""
    return ".py:" in where


def load_user_code(where: str, what: str) -> Any:
    """Return what a Python file defines under a name.

    Args:
        where: `path.py:name`.
        what: What it is, for messages: "rule", "method".

    Raises:
        UserError: The file is not there, fails, or defines no such name.
    """
    file, _, name = where.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise UserError(f"{what} file {file} {no_file(file)}; give path.py:name")
    # Under a name of its own: a file `rules.py` must not replace a package, nor one of that name
    # in another folder. It is the same at every reading.
    unique = f"vlmlayers_{what}_{path.stem}_{zlib.crc32(bytes(path.resolve())):08x}"
    spec = importlib.util.spec_from_file_location(unique, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{what} file {file} cannot be loaded as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[unique] = module  # where dataclasses look up annotations that are text
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        lines = [
            one.lineno
            for one in traceback.extract_tb(error.__traceback__)
            if one.filename == spec.origin
        ]
        at = f" (line {lines[-1]})" if lines else ""
        raise UserError(
            f"{what} file {file} fails on import{at}: {type(error).__name__}: {error}"
        ) from error
    if what != "method":
        # A metric goes to other processes by its code, not by the name of a module unknown there.
        del sys.modules[unique]
    found = [key for key, value in vars(module).items() if callable(value)]
    check_one_of(what, name, found, where=file)
    return getattr(module, name)


def code_file(where: str, function: Callable[..., Any] | None) -> Path | None:
    """Return the file whose code a name stands for; None for this toolkit's, which has a version.

    Args:
        where: The name, or `path.py:name`.
        function: What a name stands for.
    """
    if is_user_code(where):
        return Path(where.rpartition(":")[0])
    try:
        file = Path(inspect.getfile(inspect.unwrap(function)))  # type: ignore[arg-type]
    except TypeError:  # written in C, or none
        return None
    return file if file.is_file() and Path(__file__).parent not in file.parents else None


def name_of(function: Callable[..., Any], what: str, taken: Collection[str]) -> str:
    """Return the name that a function of the user's goes by in tables: that of its `def`.

    Args:
        function: The function.
        what: What it is, for messages: "rule", "metric".
        taken: Names that it may not have.

    Raises:
        UserError: It has no name, as a lambda, or one that is taken.
    """
    name = str(getattr(function, "__name__", type(function).__name__))
    if not name.isidentifier() or not hasattr(function, "__name__"):
        raise UserError(f"a {what} needs a name for the tables; write {name} as a `def`")
    if name in taken:
        raise UserError(f"there is a {what} {name!r} already; give the function another name")
    return name
