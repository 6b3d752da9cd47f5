"""Write a feature store batch by batch, so that any interruption costs at most one batch."""

from __future__ import annotations

import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from vlmlayers.data.unreadable import Unreadable
from vlmlayers.errors import UserError
from vlmlayers.features.arrays import LayerFeatures
from vlmlayers.features.store import (
    ITEMS,
    SIDECAR,
    FeatureStore,
    array_file,
    partial_folder,
    read_record,
    read_sidecar,
    refuse_other_identity,
    write_record,
)
from vlmlayers.files import DRAFTS, file_checksum, take_lock, write_text, writing
from vlmlayers.identity import DATA, DataIdentity, short_digest, texts_hash
from vlmlayers.words import counted

Arrays = Mapping[str, Mapping[str, NDArray[np.floating]]]
Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]
LOG = logging.getLogger(__name__)
_HEADER = 128  # bytes before the rows of a version 1.0 .npy file with a short header


@dataclass(frozen=True)
class TowerPlan:
    """What one tower's part of a store will hold.

    Attributes:
        blocks: Number of blocks.
        pooling: Pooling of tokens.
        joint_pooling: Pooling in `joint` space.
        kind: `images`, `prompts` or `captions`.
        ids: (item,) ids.
        labels: (item,) labels.
        batches: Rows of each batch; a batch is the unit of work that is resumed.
        shapes: space → position → shape of an item's row, in order along the tower.
        pairs: (item,) rows of the images that captions describe, or None.
        tokens: Names of the tokens where they are kept by themselves.
    """

    blocks: int
    pooling: str
    joint_pooling: str
    kind: str
    ids: tuple[str, ...]
    labels: Sequence[int]
    batches: Sequence[Sequence[int]]
    shapes: Shapes
    pairs: Sequence[int] | None = None
    tokens: tuple[str, ...] = ()

    def batches_of(self, rows: Sequence[int]) -> set[int]:
        """Return the numbers of the batches that hold some rows."""
        wanted = set(rows)
        return {n for n, batch in enumerate(self.batches) if not wanted.isdisjoint(batch)}

    def places(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Yield space, position and shape of a row, in order."""
        for space, by_position in self.shapes.items():
            for position, shape in by_position.items():
                yield space, position, shape


@dataclass
class StoreWriter:
    """Writes one store, alone or as one of several processes that share the folder.

    Rows go to their place by item index and each batch is noted in a journal with a checksum, so
    the result does not depend on who wrote which batch, nor on interruptions.

    Args:
        folder: The store to make.
        header: Model, weights, dataset, split, class names, … for the sidecar.
        identity: All that the values depend on.
        towers: Plan of each tower.
        data: The items.
        rank: Number of this process; process 0 prepares and finishes.
        barrier: Waits for the other processes.
    """

    folder: Path
    header: Mapping[str, Any]
    identity: Mapping[str, Any]
    towers: Mapping[str, TowerPlan]
    data: DataIdentity
    rank: int = 0
    barrier: Callable[[], None] = lambda: None
    done: dict[str, set[int]] = field(default_factory=dict, init=False)
    _lock: IO[bytes] | None = field(default=None, init=False)

    @property
    def partial(self) -> Path:
        """Folder of the work in progress."""
        return partial_folder(self.folder)

    @property
    def rows(self) -> Path:
        """Folder of the arrays while they fill."""
        return self.partial / "rows"

    def start(self) -> None:
        """Prepare or resume.

        Raises:
            UserError: The folder holds something else, another identity, or another process
                writes it; or it cannot be written, or has too little space.
        """
        if self.rank == 0:
            self._prepare()
        self.barrier()
        self.done, bad = self._journal()
        for name, plan in self.towers.items():
            if plan.kind == "images":  # an image may have been repaired since
                self.redo(name, list(bad))
        self.barrier()  # nobody appends to a journal that another process still reads

    def _prepare(self) -> None:
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UserError(
                f"{self.folder} exists and is not a feature store; choose another folder"
            )
        identity_file = self.partial / "identity.json"
        with writing(self.partial):
            self.partial.mkdir(parents=True, exist_ok=True)
            # Before anything is read: what is read must not change meanwhile.
            self._lock = take_lock(self.partial / "lock", self.folder)
        if identity_file.exists():
            self._take_up(read_record(identity_file)["identity"])
        for name, plan in self.towers.items():
            for space, position, shape in plan.places():
                _allocate(array_file(self.rows, name, space, position), len(plan.ids), shape)
        self.data.save(self.partial / DATA)
        # Last, so that a folder with an identity has room for all its rows.
        write_record(identity_file, {"identity": dict(self.identity)})

    def _take_up(self, there: Mapping[str, Any]) -> None:
        """Go on with unfinished work; batches with images that were altered since are done again.

        Raises:
            UserError: It belongs to another identity, or to another list of items.
        """
        then = DataIdentity.read(self.partial / DATA)
        altered = None if then is None else self.data.altered(then)
        if altered is not None:
            there = {**there, "data": self.identity["data"]}
        refuse_other_identity(self.partial, there, self.identity, self.data)
        for name, plan in self.towers.items():
            if altered and plan.kind == "images":
                self._forget(name, altered)

    def _forget(self, tower: str, rows: Sequence[int]) -> None:
        """Take the batches of some rows out of the journals."""
        gone = self.towers[tower].batches_of(rows)
        for file in sorted(self.partial.glob("journal.*.jsonl")):
            kept = [
                json.dumps(line)
                for line in _lines(file)
                if line.get("tower") != tower or line.get("batch") not in gone
            ]
            write_text(file, "\n".join((*kept, "")))

    def put(
        self, tower: str, batch: int, rows: Sequence[int], features: Arrays, bad: Mapping[int, str]
    ) -> None:
        """Write one batch and note it in the journal.

        Args:
            tower: `vision` or `text`.
            batch: Number of the batch.
            rows: Rows that `features` holds; the others of the batch could not be read.
            features: space → position → (row, width).
            bad: Row → reason, for images that could not be read.

        Raises:
            UserError: The disk is full or not writable.
        """
        plan, check = self.towers[tower], 0
        with writing(self.partial):
            for space, position, shape in plan.places():
                values = _filled(plan.batches[batch], rows, features, space, position, shape)
                file = array_file(self.rows, tower, space, position)
                _write_rows(file, plan.batches[batch][0], values)
                # After a power cut a line may be there whose rows never reached the disk.
                check = zlib.crc32(values.tobytes(), check)
            line = {
                "tower": tower,
                "batch": batch,
                "crc": check,
                "bad": {str(row): reason for row, reason in bad.items()},
            }
            with (self.partial / f"journal.{self.rank}.jsonl").open("ab") as handle:
                handle.write(b"\n" + json.dumps(line).encode() + b"\n")  # after a cut line, too
        self.done[tower].add(batch)

    def _journal(self) -> tuple[dict[str, set[int]], dict[int, str]]:
        """Return finished batches whose rows are intact, and the images that were unreadable."""
        lines = [
            line for file in sorted(self.partial.glob("journal.*.jsonl")) for line in _lines(file)
        ]
        done: dict[str, set[int]] = {name: set() for name in self.towers}
        bad: dict[int, str] = {}
        # The last line of a batch counts: it was done again where an image was repaired.
        for line in reversed(lines):
            tower, batch = line.get("tower"), line.get("batch")
            if tower in done and batch not in done[tower] and self._intact(tower, batch, line):
                done[tower].add(batch)
                bad.update({int(row): reason for row, reason in line["bad"].items()})
        return done, bad

    def _intact(self, tower: str, batch: Any, line: Mapping[str, Any]) -> bool:
        plan, check = self.towers[tower], 0
        if not isinstance(batch, int) or not 0 <= batch < len(plan.batches):
            return False
        rows = plan.batches[batch]
        for space, position, shape in plan.places():
            file = array_file(self.rows, tower, space, position)
            check = zlib.crc32(_read_rows(file, rows[0], len(rows), shape), check)
        return bool(check == line.get("crc"))

    def unreadable(self) -> dict[int, str]:
        """Return row → reason of all images that could not be read, by any process."""
        return self._journal()[1]

    def redo(self, tower: str, rows: Sequence[int]) -> None:
        """Forget the batches of some rows, so that they are done again."""
        self.done[tower] -= self.towers[tower].batches_of(rows)

    def finish(self) -> LayerFeatures:
        """Turn the finished work into a store and return its features, memory-mapped.

        Raises:
            UserError: Every image was unreadable, or the disk is full.
            RuntimeError: A batch is missing, which is a fault.
        """
        self.barrier()
        if self.rank == 0:
            self._seal()
        self.barrier()
        # Checksums were made of these bytes a moment ago; to read a large store again takes long.
        return FeatureStore.open(self.folder, verify=False)

    def _seal(self) -> None:
        done, bad = self._journal()
        for name, plan in self.towers.items():
            missing = sorted(set(range(len(plan.batches))) - done[name])
            if missing:
                raise RuntimeError(f"batches {missing[:5]} of {name} are missing in {self.partial}")
        source = self.rows
        with writing(self.partial):
            if bad:
                source = self._without(bad)
            for draft in source.rglob(DRAFTS):  # of a process that was killed while it wrote
                draft.unlink()
            record = {name: self._part(source, name, bad) for name in self.towers}
            write_record(
                source / SIDECAR,
                {
                    **self.header,
                    "identity": dict(self.identity),
                    "towers": record,
                    "skipped": {str(row): bad[row] for row in sorted(bad)},
                },
            )
            self.data.save(source / DATA)
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            # The rename comes last: a folder of this name is whole, also after a power cut.
            _sync_folders(source)
            source.rename(self.folder)
            _sync(self.folder.parent)
            LOG.debug("wrote %s", self.folder)
        self.close()
        shutil.rmtree(self.partial, ignore_errors=True)

    def _without(self, bad: Mapping[int, str]) -> Path:
        """Copy the arrays, leaving out the rows of unreadable images."""
        kept = self.partial / "kept"
        # What an earlier, interrupted call may have left.
        shutil.rmtree(kept, ignore_errors=True)
        for name, plan in self.towers.items():
            for space, position, shape in plan.places():
                values = np.load(array_file(self.rows, name, space, position), mmap_mode="r")
                rows = _kept(plan, bad)
                file = array_file(kept, name, space, position)
                _allocate(file, len(rows), shape)
                _write_rows(file, 0, np.ascontiguousarray(values[rows]))
        return kept

    def _part(self, folder: Path, name: str, bad: Mapping[int, str]) -> dict[str, Any]:
        plan = self.towers[name]
        rows = _kept(plan, bad)
        pairs = plan.pairs
        items = {
            "ids": [plan.ids[row] for row in rows],
            "labels": [int(plan.labels[r]) for r in rows],
            "pairs": None if pairs is None else _renumber(pairs, rows, bad),
        }
        write_text(folder / name / ITEMS, json.dumps(items))
        arrays: dict[str, dict[str, Any]] = {}
        for space, position, shape in plan.places():
            file = array_file(folder, name, space, position)
            _sync(file)
            arrays.setdefault(space, {})[position] = {
                "shape": [len(rows), *shape],
                **_fingerprint(file),
            }
        return {
            "blocks": plan.blocks,
            "pooling": plan.pooling,
            "joint_pooling": plan.joint_pooling,
            "kind": plan.kind,
            "arrays": arrays,
            "items": _fingerprint(folder / name / ITEMS),
            "order": [[space, list(by_position)] for space, by_position in plan.shapes.items()],
            "tokens": list(plan.tokens),
        }

    def close(self) -> None:
        """Release the lock; what is done stays for the next start."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def write_features(folder: Path, features: LayerFeatures) -> None:
    """Write features that are in memory as a store; a store that holds just these stays as it is.

    Raises:
        UserError: There are none, or the folder holds something else or cannot be written.
    """
    if not all(map(len, features.towers)):
        raise UserError(f"features of no items of {features.dataset} cannot be stored; keep some")
    plans, header = _plans(features), _header(features)
    first = features.towers[0]
    rows = tuple((item, int(label), "") for item, label in zip(first.ids, first.labels))
    data = DataIdentity(features.class_names, rows)
    identity = {"data": data.summary(), **features.identity}
    # Some of the images that were extracted, or in another order: no extraction finds them for it.
    if features.vision and identity.get("items_hash", data.listed) != data.listed:
        identity["rows"] = data.listed
    elif _lacks_some(features):
        parts = [(tower.tower, tower.spaces, tower.ids) for tower in features.towers]
        identity["part"] = short_digest(json.dumps(parts))
    if FeatureStore.exists(folder):
        there = FeatureStore.open(folder)
        refuse_other_identity(folder, there.identity, identity, data)
        same = (_header(there), _plans(there)) == (header, plans)
        if not same or not _same_values(there, features):
            raise UserError(
                f"feature store {folder} holds other features; choose another folder, or delete "
                "this one"
            )
        return
    writer = StoreWriter(folder, header, identity, plans, data)
    try:
        writer.start()
        for tower in features.towers:
            writer.put(tower.tower, 0, range(len(tower)), tower.arrays, {})
        writer.finish()
    finally:
        writer.close()


def _lacks_some(features: LayerFeatures) -> bool:
    """Whether a tower, a space or a text of the extraction is not among its features any more."""
    identity, text = features.identity, features.text
    towers = {tower.tower for tower in features.towers}
    spaces = {space for tower in features.towers for space in tower.spaces}
    return (
        set(identity.get("pooling", towers)) != towers
        or set(identity.get("spaces", spaces)) != spaces
        or (text is not None and identity.get("texts_hash", "") not in ("", texts_hash(text.ids)))
    )


def _header(features: LayerFeatures) -> dict[str, Any]:
    names = ("model", "weights", "dataset", "split", "random_weights")
    header = {name: getattr(features, name) for name in names}
    return header | {"class_names": list(features.class_names)}


def _plans(features: LayerFeatures) -> dict[str, TowerPlan]:
    return {
        tower.tower: TowerPlan(
            tower.blocks,
            tower.pooling,
            tower.joint_pooling,
            tower.kind,
            tower.ids,
            tower.labels.tolist(),
            [range(len(tower))],
            {s: {p: tower.array(p, s).shape[1:] for p in tower.positions(s)} for s in tower.spaces},
            None if tower.pairs is None else tower.pairs.tolist(),
            tower.tokens,
        )
        for tower in features.towers
    }


def _same_values(stored: LayerFeatures, features: LayerFeatures) -> bool:
    """Return whether features of equal plans agree in every value, in the precision of stores."""
    return all(
        np.array_equal(stored[tower.tower][position, space], values.astype("<f4"), equal_nan=True)
        for tower in features.towers
        for space, by_position in tower.arrays.items()
        for position, values in by_position.items()
    )


def _lines(journal: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a journal; the batch of one that was cut by a crash is done again."""
    for text in journal.read_bytes().splitlines():
        with suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict):
                yield line


def reuse(
    folder: Path, identity: Mapping[str, Any], data: DataIdentity, skip_unreadable: bool
) -> LayerFeatures | None:
    """Return the features of a whole store of the same identity, or None where there is none.

    Raises:
        UserError: The store belongs to another identity, or leaves out images that are wanted.
        DamagedStore: A file is altered.
    """
    if not FeatureStore.exists(folder):
        return None
    record = read_sidecar(folder)
    refuse_other_identity(folder, record["identity"], identity, data)
    if record["skipped"] and not skip_unreadable:
        left = counted(len(record["skipped"]), "unreadable image")
        raise UserError(
            f"feature store {folder} leaves out {left}; allow it "
            "with skip_unreadable=True (--skip-unreadable), or repair them and delete the store"
        )
    shutil.rmtree(partial_folder(folder), ignore_errors=True)
    found = FeatureStore.open(folder)
    total = len(found.vision or ()) + len(record["skipped"])
    left_out = Unreadable({int(row): why for row, why in record["skipped"].items()})
    left_out.settle(record["dataset"], total, skip=True)
    return found


def _kept(plan: TowerPlan, bad: Mapping[int, str]) -> list[int]:
    """Return rows to keep: readable images; texts all, captions those of kept images."""
    total = range(len(plan.ids))
    if plan.kind == "images":
        return [row for row in total if row not in bad]
    if plan.pairs is None:
        return list(total)
    return [row for row in total if plan.pairs[row] not in bad]


def _renumber(pairs: Sequence[int], rows: Sequence[int], bad: Mapping[int, str]) -> list[int]:
    """Return the pairs of kept captions in terms of kept images."""
    gone = np.sort(np.fromiter(bad, dtype=np.int64, count=len(bad)))
    return [int(pairs[row] - np.searchsorted(gone, pairs[row])) for row in rows]


def _allocate(file: Path, rows: int, shape: tuple[int, ...]) -> None:
    """Make an .npy file of the right size; space is reserved, so that a full disk shows now."""
    # Written by hand and not by `np.lib.format.open_memmap`, which makes a sparse file: a disk that
    # fills up would then show as a signal in the middle of a write.
    size = _HEADER + 4 * rows * prod(shape)
    if file.exists() and file.stat().st_size == size:
        return
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as handle:
            np.lib.format.write_array_header_1_0(
                handle, {"descr": "<f4", "fortran_order": False, "shape": (rows, *shape)}
            )
            assert handle.tell() == _HEADER
            handle.flush()
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle.fileno(), 0, size)
            else:
                handle.truncate(size)


def _filled(
    batch: Sequence[int],
    rows: Sequence[int],
    features: Arrays,
    space: str,
    position: str,
    shape: tuple[int, ...],
) -> NDArray[np.float32]:
    """Return the values of a whole batch, zero where an image could not be read."""
    if len(rows) == len(batch):
        return np.ascontiguousarray(features[space][position], dtype="<f4")
    values = np.zeros((len(batch), *shape), dtype="<f4")
    if rows:
        values[[row - batch[0] for row in rows]] = features[space][position]
    return values


def _write_rows(file: Path, first: int, values: NDArray[np.float32]) -> None:
    with file.open("r+b") as handle:
        handle.seek(_HEADER + first * prod(values.shape[1:]) * 4)
        handle.write(values.tobytes())


def _read_rows(file: Path, first: int, count: int, shape: tuple[int, ...]) -> bytes:
    row = 4 * prod(shape)
    with file.open("rb") as handle:
        handle.seek(_HEADER + first * row)
        return handle.read(count * row)


def _fingerprint(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": file_checksum(file)}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_folders(folder: Path) -> None:
    # A rename may reach the disk before the entries of what it renames.
    for path in (folder, *(p for p in folder.rglob("*") if p.is_dir())):
        _sync(path)
