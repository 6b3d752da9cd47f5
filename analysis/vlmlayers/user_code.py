"""Code of the user's own, named as `path.py:name`: rules, methods."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from vlmlayers.errors import UserError, check_one_of


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
        raise UserError(f"{what} file {file} does not exist; give path.py:name")
    spec = importlib.util.spec_from_file_location(f"vlmlayers_{what}_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{what} file {file} cannot be loaded as Python")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{what} file {file} fails on import: {error}") from error
    found = [key for key, value in vars(module).items() if callable(value)]
    check_one_of(what, name, found, where=file)
    return getattr(module, name)
