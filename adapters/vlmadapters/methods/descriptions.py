"""Descriptions of classes, as some methods read them: a JSON file named by path and content."""

from __future__ import annotations

from pathlib import Path

from vlmlayers.errors import UserError
from vlmlayers.files import checksum, read_json
from vlmlayers.prompts import spelled


def with_hash(where: str) -> str:
    """Return the name of a file of descriptions with the hash of what it holds."""
    path, _, then = where.partition("#")
    # Of what is read, not of the bytes: layout and order of the file change no result.
    now = checksum(repr(sorted(read_descriptions(path).items())))[:12]
    if then not in ("", now):
        raise UserError(
            f"{path} has changed since it was used ({then} then, {now} now); restore it"
        )
    return f"{path}#{now}"


def described_in(where: str) -> Path:
    """Return the file of descriptions that a name stands for, without the hash that may follow."""
    return Path(where.partition("#")[0])


def read_descriptions(where: str) -> dict[str, tuple[str, ...]]:
    """Return descriptions by class name, as `spelled`.

    Args:
        where: A JSON file, class name to a list of texts; `#` and a hash may follow.

    Raises:
        UserError: The file cannot be read, or is no such JSON.
    """
    path = described_in(where)
    found = read_json(path, "the descriptions", "name a file of class names with lists of texts")
    right = all(
        isinstance(texts, list) and texts and all(isinstance(one, str) for one in texts)
        for texts in found.values()
    )
    if not right or not found:
        raise UserError(f"{path} must hold an object, each class name with a list of texts")
    return {spelled(name): tuple(texts) for name, texts in found.items()}
