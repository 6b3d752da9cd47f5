"""Cells of a sweep: one file each when done, one lock while they are trained.

A cell holds the results of one set of settings: the rows of one source, seed and placement, or
those of zero-shot CLIP. Several processes may work on one folder. A cell is trained by the process
that holds its lock; a process that was killed holds nothing, so its cells are free again. The empty
lock files stay: removing one while another process waits for it would let two hold the same cell.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path
from shutil import rmtree
from typing import Any

from vlmadapters.clip.products import adopt_products, timed_products
from vlmadapters.methods.config import OURS
from vlmadapters.training import processes
from vlmlayers.errors import UserError
from vlmlayers.features.store import differing_field, record_checksum
from vlmlayers.files import checksum, lock, write_json, write_text
from vlmlayers.identity import DataIdentity
from vlmlayers.placement import Amount, Placement
from vlmlayers.positions import TOWERS
from vlmlayers.words import counted

LOG = logging.getLogger(__name__)
Rows = list[dict[str, Any]]
ADAPTERS = "adapters"  # folder of trained adapters, named like their cells
UNFINISHED = "unfinished"  # folder of the states of trainings, and name of its lock
MEMBERS = "cells.json"  # in the folder of an unfinished training: keys of its cells


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        name: What a person reads in the names of its files, such as `faces-v5-12,t5-12-s1`.
        identity: Everything that its rows depend on, as JSON values.
    """

    name: str
    identity: dict[str, Any]

    @property
    def key(self) -> str:
        """The name of its files: no two cells of different identities share one."""
        return f"{self.name}-{digest(self.identity)}"


@dataclass(frozen=True)
class Like:
    """What a trained cell has to be like to stand in one table with others, and its name there.

    Attributes:
        identity: Everything that its rows depend on, as JSON values.
        recipe: The title of its recipe.
        amount: The amount that its placement names, whose values are in the identity.
    """

    identity: dict[str, Any]
    recipe: str
    amount: Amount

    def placement(self, identity: dict[str, Any]) -> str:
        """Return how a placement is written whose blocks are those of an identity."""
        vision, text = (tuple(identity["settings"][tower]) for tower in TOWERS)
        placed = Placement(vision, text, self.amount)
        return str(placed) if placed or self.amount else ""


class CellFolder:
    """The cells of an output folder: read, written and claimed.

    Args:
        out: The folder; None keeps nothing, and every cell is free.
    """

    def __init__(self, out: Path | None) -> None:
        self.out = out

    def path(self, cell: Cell) -> Path | None:
        """Return the file of a finished cell."""
        return None if self.out is None else self._file(cell.key)

    def _file(self, key: str) -> Path:
        assert self.out is not None
        return self.out / "cells" / f"{key}.json"

    def read(self, cell: Cell) -> Rows | None:
        """Return the rows of a finished cell, None where it is not finished.

        Raises:
            UserError: The file is damaged.
        """
        path = self.path(cell)
        if path is None or not path.exists():
            return None
        content = _content(path)
        adopt_products(content.get("products", []))  # the cells that are missing round alike
        rows: Rows = content["rows"]
        LOG.debug("cell %s is taken from %s", cell.key, path)
        return rows

    def say_missing(self, cells: Sequence[Cell]) -> None:
        """Log why cells have to be made: there is none, or one of that name differs in a field."""
        if not LOG.isEnabledFor(logging.DEBUG):
            return  # others are read for it
        for cell in cells:
            LOG.debug("cell %s has to be made: %s", cell.key, self._why_missing(cell))

    def _why_missing(self, cell: Cell) -> str:
        path = self.path(cell)
        if path is None:
            return "nothing is kept on disk"
        here = json.loads(json.dumps(cell.identity))  # as it would be read back
        for other in sorted(path.parent.glob(f"{escape(cell.name)}-{'?' * 12}.json")):
            try:
                return f"in {other} {differing_field(_content(other)['identity'], here)}"
            except UserError as error:
                return str(error)
        return f"there is no {path}"

    def write(self, cell: Cell, rows: Rows) -> None:
        """Write a finished cell, whole or not at all; the first process of several writes."""
        path = self.path(cell)
        if path is None or not processes.is_first():
            return
        content: dict[str, Any] = {"identity": cell.identity, "rows": rows}
        # Recorded, but no part of the identity: libraries differ by rounding, and a cell must not
        # depend on which was faster that day.
        content["products"] = timed_products()
        # Of what a reader will see, where tuples are lists and keys are text.
        content["checksum"] = record_checksum(json.loads(json.dumps(content)))
        write_text(path, json.dumps(content, indent=1))

    def tell_unsaved(self, cells: Sequence[Cell]) -> None:
        """Warn of finished cells whose adapter is not there: they are not trained again for it."""
        if self.out is None:
            return
        folder = self.out / ADAPTERS
        known = {path.name for path in folder.glob(f"*{OURS}")}
        keys = dict.fromkeys(cell.key for cell in cells)
        if lacking := [key for key in keys if f"{key}{OURS}" not in known]:
            LOG.warning(
                "%s lacks %s: they were trained by a command that keeps none, or removed since; "
                "to train the first one again, remove %s",
                folder,
                counted(len(lacking), "adapter"),
                self._file(lacking[0]),
            )

    def begin(self, cells: Sequence[Cell]) -> Path | None:
        """Return the folder for the state of a training of some cells, which names them."""
        if self.out is None:
            return None
        keys = [cell.key for cell in cells]
        folder = self.out / UNFINISHED / checksum("-".join(keys))[:16]
        if processes.is_first():
            with ExitStack() as held:
                self._lock(UNFINISHED, held, wait=True)
                write_json(folder / MEMBERS, {"cells": keys})
        return folder

    def forget(self) -> None:
        """Remove the states of trainings whose cells are all finished, if in other groups.

        Those that name none as well: of a process that was killed as it named or removed them.

        Called once cells are written, not before: a process killed in between would train again.
        """
        if self.out is None or not processes.is_first():
            return
        folders = list((self.out / UNFINISHED).glob("*"))
        with ExitStack() as held:
            if folders:  # a finished run may lie where nothing can be written
                self._lock(UNFINISHED, held, wait=True)  # no other is naming the cells of one
            for folder in folders:
                with suppress(OSError, ValueError):
                    if all(self._file(key).exists() for key in _members(folder)):
                        rmtree(folder, ignore_errors=True)
            if folders:
                with suppress(OSError):  # it holds others
                    (self.out / UNFINISHED).rmdir()

    def claim(self, cells: Sequence[Cell], most: int, held: ExitStack, wait: bool) -> list[Cell]:
        """Return up to `most` cells that no other process holds, locked until `held` closes.

        With `wait` at least one: the first one is waited for.
        """
        _, size = processes.rank_and_size()
        # Processes of one torchrun train a cell together: none may lock it against the others.
        if self.out is None or size > 1:
            return list(cells[:most])
        group: list[Cell] = []
        for cell in cells:
            if len(group) < most and self._lock(cell.key, held):
                group.append(cell)
        if not group and wait:
            LOG.info("waiting for the process that trains %s", cells[0].name)
            self._lock(cells[0].key, held, wait=True)
            group = [cells[0]]
        return group

    def others_hold(self, cells: Sequence[Cell]) -> bool:
        """Return whether another process holds one of some cells at this moment."""
        _, size = processes.rank_and_size()
        if self.out is None or size > 1:
            return False
        for cell in cells:
            with ExitStack() as held:  # each for itself: another process may be about to claim them
                if not self._lock(cell.key, held):
                    return True
        return False

    def _lock(self, key: str, held: ExitStack, *, wait: bool = False) -> bool:
        """Lock a cell by its key until `held` closes; return if it was free, always with `wait`."""
        assert self.out is not None
        file = self.out / "locks" / f"{key}.lock"
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = lock(file, wait=wait)
        if handle is not None:
            held.enter_context(handle)
        return handle is not None

    def see(self, name: str, split: str, data: DataIdentity, drawn_by: str = "") -> None:
        """Record the identity of a split, and warn of what changed since an earlier command.

        Of items drawn in two ways under one name, as for folds, each draw has its own record.
        """
        # Every process of a torchrun sees the same data; one writes and warns.
        if self.out is None or not processes.is_first():
            return
        file = self._data_file("-".join(filter(None, (name, drawn_by))), split)
        then = DataIdentity.read(file)
        if then is not None and then != data:
            LOG.warning(
                "%s %s has changed since %s was written: %s; finished cells of what it was are "
                "neither used nor shown",
                name,
                split,
                self.out,
                data.changes(then),
            )
        if then != data:
            data.save(file)

    def _data_file(self, name: str, split: str) -> Path:
        assert self.out is not None
        return self.out / "data" / f"{name}-{split}.gz"

    def alike(self, like: Sequence[Like]) -> Rows:
        """Return the rows of all finished cells whose settings are those of one of some others.

        They are named as those others are, whatever an earlier command called the same values.

        Source, seed, blocks and protocol may differ: tables have columns for them. A table that
        also mixed recipes, settings, splits, backbones or precisions could not tell them apart;
        such cells are left out, and so are damaged ones and those of data that have changed. The
        log says how many.
        """
        if self.out is None:
            return []
        rows: Rows = []
        other = changed = 0
        # As read back.
        like = [replace(one, identity=json.loads(json.dumps(one.identity))) for one in like]
        now = {name: hashes for one in like for name, hashes in one.identity["data"].items()}
        known = {(name, split): mark for name, of in now.items() for split, mark in of.items()}
        for path in sorted((self.out / "cells").glob("*.json")):
            try:
                content = _content(path)
            except UserError as error:
                LOG.warning("%s", error)
                continue
            named = _named_as(like, content["identity"])
            if named is None:
                other += 1
            elif self._has_changed(content["identity"]["data"], known):
                changed += 1
            else:
                rows += [row | named for row in content["rows"]]
        if other:
            LOG.warning(
                "%s: the table leaves out %s of another recipe, method or code of it, setting, "
                "split, items, template, precision, device, backbone or version; give these a "
                "folder of their own",
                self.out,
                counted(other, "finished cell"),
            )
        if changed:
            LOG.warning(
                "%s: the table leaves out %s of data that have changed since",
                self.out,
                counted(changed, "finished cell"),
            )
        return rows

    def _has_changed(
        self, data: dict[str, dict[str, str]], known: dict[tuple[str, str], str | None]
    ) -> bool:
        """Whether a cell is of data that are no longer what they were when last seen here."""
        for name, hashes in data.items():
            for split, mark in hashes.items():
                if (name, split) not in known:
                    last = DataIdentity.read(self._data_file(name, split))
                    known[name, split] = None if last is None else last.hash
                if known[name, split] != mark:
                    return True
        return False


def _members(folder: Path) -> list[str]:
    """Return the keys of the cells of an unfinished training; none where it does not say."""
    file = folder / MEMBERS
    return json.loads(file.read_text(encoding="utf-8"))["cells"] if file.exists() else []


def _named_as(ours: Sequence[Like], theirs: dict[str, Any]) -> dict[str, str] | None:
    """Return recipe and placement of a cell's rows, None where it may not stand with others.

    Zero-shot cells have neither.
    """
    for key in ("split", "limit", "left_out", "template", "model", "precision"):
        if all(one.identity[key] != theirs.get(key) for one in ours):
            return None  # a cell of an earlier version lacks some of these
    known = {name: told for one in ours for name, told in one.identity["targets"].items()}
    if any(known.get(name, template) != template for name, template in theirs["targets"].items()):
        return None
    if "train" not in theirs:
        return {}
    alike = (one for one in ours if _setup(one.identity) == _setup(theirs))
    return next(({"recipe": o.recipe, "placement": o.placement(theirs)} for o in alike), None)


def _setup(identity: dict[str, Any]) -> Any:
    """Return recipe, method, its code and settings of a cell, without the blocks, as JSON.

    And what a test on the validation split left to choose values on, where that is told.
    """
    settings = identity.get("settings", {})
    left = {key: value for key, value in settings.items() if key not in ("vision", "text")}
    method = identity.get("method"), identity.get("code"), identity.get("validation")
    return json.loads(json.dumps([method, identity["train"], left]))


def digest(identity: dict[str, Any]) -> str:
    """Return twelve hexadecimal digits of everything that a cell depends on."""
    # Sorted, so that the order in which an identity was put together does not matter.
    return checksum(json.dumps(identity, sort_keys=True))[:12]


def _content(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        expected = content.pop("checksum")
        _ = content["rows"], content["identity"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it to run the cell again") from error
    # A hand-edited cell would enter every table from then on.
    if record_checksum(content) != expected:
        raise UserError(f"{path} is altered: its checksum differs; remove it to run the cell again")
    return content
