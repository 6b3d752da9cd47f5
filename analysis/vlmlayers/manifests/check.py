"""Compare what is on disk with what a manifest expects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from vlmlayers.errors import UserError
from vlmlayers.manifests.items import Item, shared_paths
from vlmlayers.manifests.place import AlteredData, MissingData, Place
from vlmlayers.manifests.schema import Spec
from vlmlayers.words import counted

SHOWN = 3  # missing or unreadable files that are named


@dataclass(frozen=True)
class CheckResult:
    """State of one dataset on this machine.

    Attributes:
        name: Name of the manifest.
        state: `complete`, `incomplete`, `missing`, `altered`, `unusable` (its lists cannot be
            read as they stand) or `built-in`.
        expected: Number of items per split that the manifest expects; empty where it says nothing.
        listed: Number of items per split that the files list.
        found: Number of listed items whose image is on disk.
        missing: Number of items that are not on disk.
        first_missing: The first few of them.
        unreadable: What is wrong with each image that cannot be decoded (full check only).
        notes: What is odd, one line each.
        remarks: What reading leaves out, or takes otherwise than it is written; images that are
            copies of others (full check only).
        get: Where to get the dataset.
        content: Hash of all lists and files, the same for every copy (full check only).
        folder: Where the images were looked for.
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
    remarks: tuple[str, ...] = ()
    get: tuple[str, ...] = ()
    content: str = ""
    folder: str = ""

    @property
    def ok(self) -> bool:
        """Whether everything that the manifest expects is there, unaltered."""
        return self.state in ("complete", "built-in")

    def line(self) -> str:
        """Return the result as one line: what, how many, the first few, where to get them."""
        text = f"{self.name}: {self.state}"
        if self.state == "built-in":
            return f"{text}, {sum(self.listed.values()):,} items drawn by code"
        if self.folder:  # else the lists could not be read, and no image was looked for
            text += f", {self.found:,} of {self.found + self.missing:,} images here"
        if self.first_missing:
            more = ", …" if self.missing > len(self.first_missing) else ""
            text += f"; not in {self.folder}: {', '.join(self.first_missing)}{more}"
        if self.unreadable:
            text += f"; {len(self.unreadable)} unreadable: {'; '.join(self.unreadable[:SHOWN])}"
        if self.notes or self.remarks:
            text += f"; {'; '.join((*self.notes, *self.remarks))}"
        if self.content:
            text += f"; content {self.content}"
        if not self.ok and self.get:
            text += f"; get it: {'; '.join(self.get)}"
        return text


def built_in(name: str, spec: Spec) -> CheckResult:
    """Return the state of a dataset that is drawn by code."""
    counts = dict(spec.counts)
    return CheckResult(name, "built-in", counts, counts, sum(counts.values()))


def not_listed(name: str, spec: Spec, error: UserError) -> CheckResult:
    """Return the state of a dataset whose items could not be listed."""
    # Without the advice, which `line` adds for every state.
    note = str(error).removeprefix(f"{name}: ").split("; get it:")[0]
    states = {MissingData: "missing", AlteredData: "altered"}
    state = states.get(type(error), "unusable")
    known = type(error) in states
    expected = dict(spec.counts)
    lost = sum(expected.values()) if known else 0
    return CheckResult(name, state, expected, missing=lost, notes=(note,), get=spec.get)


def compare(
    place: Place,
    by_split: Mapping[str, Sequence[Item]],
    classes: int,
    missing: Sequence[Item],
    unreadable: Sequence[str] = (),
    remarks: tuple[str, ...] = (),
    content: str = "",
) -> CheckResult:
    """Compare what is on disk with what a manifest expects.

    Args:
        place: Where the dataset lies, and the content of its manifest.
        by_split: The items that the files list.
        classes: Number of classes that the files list.
        missing: The items whose image is not on disk.
        unreadable: What is wrong with each image that cannot be decoded.
        remarks: What reading leaves out, or takes otherwise than it is written.
        content: Hash of lists and files, where they were read.
    """
    spec, expected = place.spec, dict(place.spec.counts)
    listed = {split: len(items) for split, items in by_split.items()}
    items = [item for part in by_split.values() for item in part]
    fewer = {}
    if spec.layout in ("folder", "shards", "huggingface"):  # these list what is there
        fewer = {split: n - listed.get(split, 0) for split, n in expected.items()}
        fewer = {split: lack for split, lack in fewer.items() if lack > 0}
    others = {split: listed.get(split, 0) for split in expected if split not in fewer}
    notes = unexpected(spec, others, classes) + _repeated(by_split)
    if fewer and len(expected) > 1:
        parts = (f"{split} {listed.get(split, 0):,} of {expected[split]:,}" for split in fewer)
        remarks = (", ".join(parts), *remarks)
    present, lost = len(items) - len(missing), len(missing) + sum(fewer.values())
    return CheckResult(
        place.name,
        _state(present, lost, bool(notes), bool(unreadable)),
        expected,
        listed,
        present,
        lost,
        tuple(item.path for item in missing[:SHOWN]),
        tuple(unreadable),
        notes,
        remarks,
        spec.get,
        content,
        str(place.images),
    )


def copies(by_split: Mapping[str, Sequence[Item]], marks: Mapping[str, str]) -> tuple[str, ...]:
    """Return a remark on images whose files have the same content, if any.

    Args:
        by_split: The items that the files list.
        marks: Mark of the content of each path; images without one are not looked at.
    """
    first: dict[str, tuple[str, str]] = {}
    within, across, shown = 0, 0, ""
    for split, items in by_split.items():
        for item in items:
            mark = marks.get(item.path, "")
            if not mark:
                continue
            other, path = first.setdefault(mark, (split, item.path))
            if path == item.path:
                continue
            within += other == split
            across += other != split
            if not shown or (other != split and across == 1):  # a leak is the better example
                shown = f"{path} ({other}) and {item.path} ({split})"
    if not within + across:
        return ()
    leaks = f", {across:,} of another split" if across else ""
    return (f"{counted(within + across, 'image')} copied from others{leaks}, as {shown}",)


def _state(found: int, missing: int, odd: bool, unreadable: bool) -> str:
    # First: where no image is here, lists that differ are not worth a word.
    if found == 0:
        return "missing"
    if odd or unreadable:
        return "altered"
    return "incomplete" if missing else "complete"


def unexpected(spec: Spec, listed: Mapping[str, int], classes: int) -> tuple[str, ...]:
    """Return where classes and listed items differ from what a manifest expects, one line each."""
    notes = [
        f"{split} lists {have:,} items where {spec.counts[split]:,} are expected"
        for split, have in listed.items()
        if have != spec.counts.get(split, have)
    ]
    if spec.classes is not None and classes != spec.classes:
        notes.append(f"{counted(classes, 'class')} where {spec.classes} are expected")
    return tuple(notes)


def _repeated(by_split: Mapping[str, Sequence[Item]]) -> tuple[str, ...]:
    """Return which splits list images of each other, and how many paths a split repeats."""
    notes = []
    extra = sum(len(items) - len({item.path for item in items}) for items in by_split.values())
    if extra:
        notes.append(f"{extra:,} {'path is' if extra == 1 else 'paths are'} listed more than once")
    for one, other in combinations(by_split, 2):
        if shared := shared_paths(by_split[other], by_split[one]):
            are = "is" if len(shared) == 1 else "are"
            notes.append(
                f"{counted(len(shared), 'image')} {are} in {one} and {other} (first: {shared[0]})"
            )
    return tuple(notes)
