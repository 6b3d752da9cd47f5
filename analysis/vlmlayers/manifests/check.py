"""Compare what is on disk with what a manifest expects."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vlmlayers.errors import UserError
from vlmlayers.manifests.items import Item
from vlmlayers.manifests.place import AlteredData, MissingData
from vlmlayers.progress import track

if TYPE_CHECKING:
    from vlmlayers.manifests.manifest import Manifest

SHOWN = 3  # missing or unreadable files that are named


@dataclass(frozen=True)
class CheckResult:
    """State of one dataset on this machine.

    Attributes:
        name: Name of the manifest.
        state: `complete`, `incomplete`, `missing`, `altered` or `built-in`.
        expected: Number of items per split that the manifest expects; empty where it says nothing.
        listed: Number of items per split that the files list.
        found: Number of listed items whose image is on disk.
        missing: Number of items that are not on disk.
        first_missing: The first few of them.
        unreadable: What is wrong with each image that cannot be decoded (full check only).
        notes: What is odd, one line each.
        get: Where to get the dataset.
    """

    name: str
    state: str
    expected: Mapping[str, int] = field(default_factory=dict)
    listed: Mapping[str, int] = field(default_factory=dict)
    found: int = 0
    missing: int = 0
    first_missing: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    get: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether everything that the manifest expects is there, unaltered."""
        return self.state in ("complete", "built-in")

    def line(self) -> str:
        """Return the result as one line: what, how many, the first few, where to get them."""
        text = f"{self.name}: {self.state}"
        if self.state == "built-in":
            return f"{text}, {sum(self.listed.values()):,} items drawn by code"
        text += f", {self.found:,} of {self.found + self.missing:,} images here"
        if self.first_missing:
            more = ", …" if self.missing > len(self.first_missing) else ""
            text += f"; missing: {', '.join(self.first_missing)}{more}"
        if self.unreadable:
            text += f"; {len(self.unreadable)} unreadable: {'; '.join(self.unreadable[:SHOWN])}"
        if self.notes:
            text += f"; {'; '.join(self.notes)}"
        if not self.ok and self.get:
            text += f"; get it: {'; '.join(self.get)}"
        return text


def check(
    manifest: Manifest, root: str | os.PathLike[str] | None = None, full: bool = False
) -> CheckResult:
    """Compare what is on disk with what the manifest expects.

    Args:
        manifest: The dataset.
        root: The data root.
        full: Also decode every image that is there.
    """
    spec = manifest.spec
    expected = dict(spec.counts)
    if manifest.layout == "builtin":
        return CheckResult(manifest.name, "built-in", expected, expected, sum(expected.values()))
    try:
        by_split = {split: manifest.items(split, root) for split in manifest.splits(root)}
        classes = len(manifest.class_names(root))
    except (MissingData, AlteredData) as error:
        state = "missing" if isinstance(error, MissingData) else "altered"
        return CheckResult(
            manifest.name,
            state,
            expected,
            missing=sum(expected.values()),
            notes=(_first_part(manifest.name, error),),
            get=spec.get,
        )
    except UserError as error:
        fault = _first_part(manifest.name, error)
        return CheckResult(manifest.name, "altered", expected, notes=(fault,), get=spec.get)
    listed = {split: len(items) for split, items in by_split.items()}
    items = [item for part in by_split.values() for item in part]
    missing = manifest.missing(items, root)
    absent = set(missing)
    present = [item for item in items if item not in absent]
    short, notes = _compare(expected, listed, spec.classes, classes, manifest.layout)
    notes += _repeated(items)
    unreadable = _decode_all(manifest, present, root) if full else ()
    lost = len(missing) + short
    return CheckResult(
        manifest.name,
        _state(len(present), lost, bool(notes), bool(unreadable)),
        expected,
        listed,
        len(present),
        lost,
        tuple(item.path for item in missing[:SHOWN]),
        unreadable,
        notes,
        spec.get,
    )


def _state(found: int, missing: int, odd: bool, unreadable: bool) -> str:
    if found == 0:
        return "missing"
    if odd or unreadable:
        return "altered"
    return "incomplete" if missing else "complete"


def _compare(
    expected: Mapping[str, int],
    listed: Mapping[str, int],
    classes: int | None,
    found: int,
    layout: str,
) -> tuple[int, tuple[str, ...]]:
    """Return how many items fewer there are than expected, and what is odd."""
    notes, short = [], 0
    for split, count in expected.items():
        have = listed.get(split, 0)
        if have < count and layout in ("folder", "shards", "huggingface"):
            short += count - have  # these layouts list what is there
        elif have != count:
            notes.append(f"{split} lists {have:,} items where {count:,} are expected")
    if classes is not None and found != classes:
        notes.append(f"{found} classes where {classes} are expected")
    return short, tuple(notes)


def _repeated(items: list[Item]) -> tuple[str, ...]:
    extra = len(items) - len({item.path for item in items})
    return (f"{extra:,} paths are listed more than once",) if extra else ()


def _decode_all(
    manifest: Manifest, items: list[Item], root: str | os.PathLike[str] | None
) -> tuple[str, ...]:
    faults = []
    for item in track(items, f"checking {manifest.name}", unit="image"):
        try:
            manifest.open_image(item, root)
        except UserError as error:
            faults.append(str(error))
    return tuple(faults)


def _first_part(name: str, error: UserError) -> str:
    return str(error).removeprefix(f"{name}: ").split("; get it:")[0]
