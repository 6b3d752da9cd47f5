"""Extraction into sums instead of a store: disk and memory do not grow with the images.

Several processes under `torchrun` share the batches and merge by all-reduce. What a process has
summed is saved now and then, with the batches it is made of, so that an interruption costs the
batches since and none is counted twice.
"""

from __future__ import annotations

import io
import json
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlmlayers.arguments import Count, checked
from vlmlayers.errors import UserError
from vlmlayers.extraction import BOTH_TOWERS, check_streamable
from vlmlayers.features import LayerFeatures, TowerFeatures
from vlmlayers.features.store import DamagedStore, read_record, refuse_other_identity, write_record
from vlmlayers.files import atomically, take_lock, writing
from vlmlayers.identity import DATA, DataIdentity
from vlmlayers.metrics.moments import ClassMoments, CrossMoments, Moments
from vlmlayers.models.decoding import batches_of
from vlmlayers.models.extract import prepare, refuse_hooks
from vlmlayers.models.modes import in_turn, on_cpu
from vlmlayers.models.options import Dataset, ExtractOptions
from vlmlayers.models.processes import Processes
from vlmlayers.models.recording import Features
from vlmlayers.models.reduce import merge_over_processes, summed
from vlmlayers.models.vlm import LoadedModel
from vlmlayers.models.work import Texts, Work, refuse_not_finite
from vlmlayers.options import validated
from vlmlayers.progress import bar
from vlmlayers.scores.sums import DatasetSums, StreamingScores
from vlmlayers.words import counted

CHUNK = 1024  # images between two updates of the sums, whose cost does not depend on the images
_PARTS: dict[str, Any] = {"moments": Moments, "classes": ClassMoments, "cross": CrossMoments}


@on_cpu()
@checked
def stream(
    model: LoadedModel,
    manifest: Dataset,
    split: str,
    *,
    out: str | Path | None = None,
    sample: Count = 200,
    save_seconds: float = 120.0,
    **options: Any,
) -> StreamingScores:
    """Run the items of a split through both towers and keep sums and a small sample of them.

    Args:
        model: What `load_model` returns.
        manifest: The dataset, as `extract` takes it.
        split: `train`, `val` or `test`.
        out: Folder of the saved sums; a stopped run resumes there. None saves nothing.
        sample: Items kept as they are; see `StreamingScores`.
        save_seconds: Time between two savings.
        **options: All other keywords of `extract`; of several captions the first one counts.

    Returns:
        The sums over all processes, in every process; `streamed_scores` makes the table.

    Raises:
        UserError: As `extract`.
    """
    given = validated(ExtractOptions, options, "stream")
    check_streamable(given)
    if len(model.towers) < 2:
        raise UserError(BOTH_TOWERS)
    with in_turn(model.clip):
        work, header, identity = prepare(model, manifest, split, given)
        if "text" not in work.recorders:
            raise UserError(
                f"streaming sums both towers, and {work.manifest.name} has no names of classes for "
                "the text tower; give texts=, or extract the features, and score them"
            )
        if out is not None:
            refuse_hooks(model)
        run = _Stream(work, header, identity, StreamingScores(sample), save_seconds)
        return run.whole(None if out is None else Path(out))


@dataclass
class _Stream:
    """One process's share of a streamed extraction."""

    work: Work
    header: Mapping[str, Any]
    identity: Mapping[str, Any]
    sums: StreamingScores
    save_seconds: float
    processes: Processes = field(default_factory=Processes.current)
    done: set[int] = field(default_factory=set)  # batches in the sums of any process
    own: set[int] = field(default_factory=set)  # batches in the sums of this one
    bad: dict[int, str] = field(default_factory=dict)  # why, of the images of this start
    left_out: set[int] = field(default_factory=set)  # rows without an image in the batches in own
    prompts: TowerFeatures | None = None  # those of the classes; None where there are captions

    def whole(self, folder: Path | None) -> StreamingScores:
        """Sum what is left, merge over processes, and return the whole."""
        self.work.refuse_missing()
        self.prompts = self._class_prompts()
        # A process without a batch of its own still has to take part in the merge.
        self.sums.open(self._chunk([], {}))
        lock = self._lock(folder)
        try:
            if folder is not None:
                self._start(folder)
            saved = time.monotonic()
            for rows, features, batches in self._chunks():
                if len(rows):
                    self.sums.update(self._chunk(rows, features))
                self.own |= batches
                if folder is not None and time.monotonic() - saved > self.save_seconds:
                    self._save(folder)
                    saved = time.monotonic()
            if folder is not None:
                self._save(folder)
            self.work.settle(self._unread())
            self.work.tell_cut()
            name = str(self.header["dataset"])
            merged = merge_over_processes(self.sums.datasets[name], self._widths(), self.processes)
        finally:
            if lock is not None:
                lock.close()
        found = StreamingScores(self.sums.sample)
        found.datasets[name] = merged
        return found

    def _unread(self) -> dict[int, str]:
        """Return what every process could not read: all rows, and why where this one tried."""
        counts = np.zeros(len(self.work.items), np.int64)
        counts[sorted({*self.bad, *self.left_out})] = 1
        rows: list[int] = np.flatnonzero(summed(counts, self.processes)).tolist()
        return {row: self.bad.get(row, str(self.work.items[row].path)) for row in rows}

    def _lock(self, folder: Path | None) -> Any:
        """Return the lock of a folder, which the first process holds; None where there is none."""
        if folder is None or self.processes.rank != 0:
            return None
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            return take_lock(folder / "lock", folder)

    def _start(self, folder: Path) -> None:
        """Take up what earlier processes saved: the first one gets their sums, all the batches."""
        if self.processes.rank == 0:
            self._compare(folder)
            self._adopt(folder)
        self.processes.barrier()
        self.done = _batches_in(folder / "sums.0.npz")
        self.processes.barrier()  # nobody saves while another still reads

    def _compare(self, folder: Path) -> None:
        """Refuse sums of anything else; images may have been repaired that are in none of them.

        Raises:
            UserError: Says what changed.
        """
        file, data = folder / "identity.json", self.work.data
        # Features do not depend on the sample, but sums do.
        now = {**self.identity, "sample": self.sums.sample}
        if file.exists():
            there = read_record(file)["identity"]
            then = DataIdentity.read(folder / DATA)
            altered = None if then is None else data.altered(then)
            if altered is not None and not self._summed(folder, altered):
                there = {**there, "data": self.identity["data"]}
            refuse_other_identity(folder, there, now, data)
        data.save(folder / DATA)
        write_record(file, {"identity": now})

    def _summed(self, folder: Path, rows: Sequence[int]) -> bool:
        """Return whether any of some rows is in the saved sums."""
        size = self.work.options.batch_size
        files = folder.glob("sums.*.npz") if rows else ()
        return any({row // size for row in rows} & _batches_in(file) for file in files)

    def _adopt(self, folder: Path) -> None:
        files = {file: _batches_in(file) for file in folder.glob("sums.*.npz")}
        name = str(self.header["dataset"])
        # The largest first: what an interrupted start merged is then seen before its parts.
        for file, batches in sorted(files.items(), key=lambda pair: -len(pair[1])):
            if batches <= self.own:  # it was taken up before, by a start that was then killed
                continue
            if batches & self.own:
                raise DamagedStore(f"{file} counts batches twice; delete {folder} and start again")
            mine = self.sums.datasets[name]
            self.sums.datasets[name] = mine.merge(_load(file, mine))
            self.own |= batches
            self.left_out |= {int(row) for row in _read(file)["left_out"]}
        if self.left_out and not self.work.options.skip_unreadable:
            left = counted(len(self.left_out), "unreadable image")
            raise UserError(
                f"{folder} leaves out {left}; allow it with "
                "skip_unreadable=True (--skip-unreadable), or repair them and delete the folder"
            )
        self._save(folder)
        for file in files:
            # Their sums are saved among ours by now; a stop in between is what is seen above.
            if file.name != "sums.0.npz":
                file.unlink()

    def _chunks(self) -> Iterator[tuple[list[int], Features, set[int]]]:
        """Yield rows, vision features and the numbers of the batches they came from."""
        batches = batches_of(len(self.work.items), self.work.options.batch_size)
        share = self.processes.share(len(batches))
        left = [number for number in share if number not in self.done]
        recorder = self.work.recorders["vision"]
        rows: list[int] = []
        parts: list[Features] = []
        numbers: set[int] = set()
        with (
            self.work.recording(recorder),
            bar(
                total=sum(len(batches[b]) for b in share),
                initial=sum(len(batches[b]) for b in share if b in self.done),
                unit="image",
                description=f"{self.work.manifest.name} {self.work.split}",
                show=self.work.options.progress and self.processes.rank == 0,
            ) as shown,
        ):
            for batch, good, images, bad in self.work.images(batches, left):
                self.bad |= bad
                if bad and not self.work.options.skip_unreadable:
                    continue  # it is done again once its images are repaired
                numbers.add(batch)
                self.left_out |= set(bad)
                if images is not None:
                    features = self.work.record(recorder, images)
                    refuse_not_finite(features, good, recorder, self.work.items)
                    rows += good
                    parts.append(features)
                shown.update(len(batches[batch]))
                if len(rows) >= CHUNK or batch == left[-1]:
                    yield rows, _joined(parts), numbers
                    rows, parts, numbers = [], [], set()
        if numbers:
            yield rows, _joined(parts), numbers

    @property
    def _given_texts(self) -> Texts:
        assert self.work.texts is not None  # both towers are summed
        return self.work.texts

    def _class_prompts(self) -> TowerFeatures | None:
        """Return the class prompts, which every process computes; None for captions."""
        texts = self._given_texts
        if texts.pairs is not None:
            return None
        return self._texts(list(texts.texts), texts.labels)

    def _texts(self, texts: list[str], labels: Any, pairs: Any = None) -> TowerFeatures:
        recorder = self.work.recorders["text"]
        parts = []
        with self.work.recording(recorder):
            for rows in batches_of(len(texts), self.work.options.batch_size):
                ids = self.work.tokens([texts[row] for row in rows])
                parts.append(self.work.record(recorder, ids))
                refuse_not_finite(parts[-1], rows, recorder, texts)
        return self._tower("text", tuple(texts), labels, _joined(parts), pairs)

    def _chunk(self, rows: Sequence[int], features: Features) -> LayerFeatures:
        items = [self.work.items[row] for row in rows]
        labels = np.array([item.label for item in items], dtype=np.int64)
        ids = tuple(str(item.path) for item in items)
        text = self.prompts
        if text is None:
            captions = [self._first_caption(item) for item in items]
            text = self._texts(captions, labels, np.arange(len(rows), dtype=np.int64))
        return LayerFeatures(
            **self.header,
            vision=self._tower("vision", ids, labels, features, None),
            text=text,
            identity=self.identity,
        )

    def _first_caption(self, item: Any) -> str:
        if not item.captions:
            raise UserError(f"{self.header['dataset']}: {item.path} has no caption")
        return str(item.captions[0])

    def _tower(
        self, name: str, ids: tuple[str, ...], labels: Any, features: Features, pairs: Any
    ) -> TowerFeatures:
        recorder = self.work.recorders[name]
        arrays = features or {
            space: {position: np.empty((0, *shape), np.float32) for position, shape in by.items()}
            for space, by in recorder.shapes().items()
        }
        kind = "images" if name == "vision" else self._given_texts.kind
        return TowerFeatures(
            name,
            recorder.tower.depth,
            recorder.pooling,
            kind,
            ids,
            np.asarray(labels, np.int64),
            arrays,
            pairs,
            recorder.joint_pooling,
        )

    def _widths(self) -> dict[tuple[str, str, str], int]:
        """Return the widths of what is summed: class prompts are not."""
        return {
            (tower, space, position): shape[-1]
            for tower, recorder in self.work.recorders.items()
            if tower == "vision" or self.prompts is None
            for space, by in recorder.shapes().items()
            for position, shape in by.items()
        }

    def _save(self, folder: Path) -> None:
        name = str(self.header["dataset"])
        sums = self.sums.datasets.get(name)
        arrays = {} if sums is None else _arrays(sums)
        arrays["batches"] = np.array(sorted(self.own), np.int64)
        arrays["left_out"] = np.array(sorted(self.left_out), np.int64)
        # Through memory: numpy adds a suffix to the names of files that it writes itself.
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        file = folder / f"sums.{self.processes.rank}.npz"
        atomically(file, lambda part: part.write_bytes(buffer.getvalue()))


def _joined(parts: Sequence[Features]) -> Features:
    if not parts:
        return {}
    return {
        space: {p: np.concatenate([part[space][p] for part in parts]) for p in by}
        for space, by in parts[0].items()
    }


def _arrays(sums: DatasetSums) -> dict[str, Any]:
    """Return all that sums hold as arrays by name."""
    found: dict[str, Any] = {"hashes": sums.hashes, "labels": sums.labels}
    found |= {_name("sample", key): rows for key, rows in sums.sample.items()}
    for kind, made in _PARTS.items():
        for key, value in getattr(sums, kind).items():
            for part in made.__dataclass_fields__:
                found[_name(kind, key, part)] = np.asarray(getattr(value, part))
    return found


def _name(*parts: Any) -> str:
    return json.dumps([list(part) if isinstance(part, tuple) else part for part in parts])


def _load(file: Path, like: DatasetSums) -> DatasetSums:
    """Return saved sums.

    Raises:
        DamagedStore: The file is cut short or altered, or pairs other blocks.
    """
    arrays = _read(file)
    sums = DatasetSums(
        like.head, like.sample_size, arrays["hashes"], arrays["labels"], prompts=like.prompts
    )
    fields: dict[tuple[str, tuple[str, ...]], dict[str, Any]] = {}
    for name, array in arrays.items():
        if not name.startswith("["):
            continue
        kind, key, *part = json.loads(name)
        if key[0] == "text" and like.prompts is not None:
            continue  # earlier versions summed class prompts too
        if kind == "sample":
            sums.sample[tuple(key)] = array
        else:
            value = array.item() if array.ndim == 0 else array
            fields.setdefault((kind, tuple(key)), {})[part[0]] = value
    for (kind, key), values in fields.items():
        getattr(sums, kind)[key] = _PARTS[kind](**values)
    if sums.cross and sums.cross.keys() != set(sums.pairs()):
        raise DamagedStore(
            f"{file} pairs the blocks of the towers as an earlier version did; delete "
            f"{file.parent} and start again"
        )
    return sums


def _batches_in(file: Path) -> set[int]:
    return {int(number) for number in _read(file)["batches"]}


def _read(file: Path) -> dict[str, Any]:
    try:
        with np.load(file, allow_pickle=False) as archive:  # the zip's checksums are compared
            return {name: archive[name] for name in archive.files}
    except OSError as error:
        raise DamagedStore(f"{file} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DamagedStore(
            f"{file} is altered or cut short; delete {file.parent} and start again"
        ) from error
