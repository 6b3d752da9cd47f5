"""Cells of a sweep: one file each when done, one lock while they are trained.

Several processes may work on one folder. A cell is trained by the process that holds its lock; a
process that was killed holds nothing, so its cells are free again. The empty lock files stay:
removing one while another process waits for it would let two hold the same cell.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vlmadapters import parallel
from vlmadapters.checkpoints import atomically
from vlmlayers.errors import UserError
from vlmlayers.store import record_checksum

try:
    import fcntl
except ImportError:  # Windows: one process at a time, nothing to claim
    fcntl = None  # type: ignore[assignment]


def claim(path: Path, held: ExitStack, *, wait: bool = False) -> bool:
    """Take the lock of one cell until `held` closes.

    Args:
        path: The lock file, made where absent.
        held: Stack that frees the lock.
        wait: Whether to wait for the process that holds it; an interrupt ends the wait.

    Returns:
        Whether the lock was taken; always True with `wait`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as opened:
        stream = opened.enter_context(path.open("a"))
        if fcntl is not None:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                return False
        held.push(opened.pop_all())
    return True


def digest(identity: dict[str, Any]) -> str:
    """Return twelve hexadecimal digits of everything that a cell depends on."""
    text = json.dumps(identity, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_cell(path: Path | None) -> list[dict[str, Any]] | None:
    """Return the rows of a finished cell, None where it is not finished.

    Raises:
        UserError: The file is damaged.
    """
    if path is None or not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        expected = content.pop("checksum")
        rows: list[dict[str, Any]] = content["rows"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it to run the cell again") from error
    if record_checksum(content) != expected:
        raise UserError(f"{path} is altered: its checksum differs; remove it to run the cell again")
    return rows


def write_cell(path: Path | None, identity: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write a finished cell, whole or not at all; the first process of several writes."""
    rank, _ = parallel.rank_and_size()
    if path is None or rank:
        return
    content: dict[str, Any] = {"identity": identity, "rows": rows}
    content["checksum"] = record_checksum(json.loads(json.dumps(content)))
    atomically(path, lambda part: part.write_text(json.dumps(content, indent=1), encoding="utf-8"))
