"""Items: what a dataset consists of, and which paths an item may have."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path, PurePosixPath
from random import Random

from vlmlayers.errors import UserError
from vlmlayers.files import checksum

SPLITS = ("train", "val", "test")
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}  # what people call a split, in small letters
_DRIVE = re.compile(r"^[A-Za-z]:")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a dataset.

    Attributes:
        path: Relative, posix, as the split file writes it.
        label: Index into the class names; -1 where the dataset has no classes.
        class_name: Name of the class as CoOp writes it (underscores kept), or "".
        captions: Texts that describe the image.
    """

    path: str
    label: int
    class_name: str
    captions: tuple[str, ...] = ()


def shared_paths(items: Sequence[Item], others: Sequence[Item]) -> list[str]:
    """Return the paths that both lists name, each once, in the order of the first."""
    known = {item.path for item in items}.intersection(item.path for item in others)
    return [path for path in dict.fromkeys(item.path for item in items) if path in known]


def checked_path(path: str, where: str, advice: str = "") -> str:
    """Return a path that stays inside the folder it is relative to.

    Raises:
        UserError: It is empty, absolute, holds `..`, control characters or half a surrogate pair.
    """
    # Both separators and drive letters count on every system: a split file travels between them.
    parts = re.split(r"[/\\]", path)
    if not path or path[0] in "/\\" or _DRIVE.match(path) or ".." in parts:
        raise UserError(
            f"{where} names {path[:200]!r}, which leaves the dataset's folder; refused{advice}"
        )
    if _CONTROL.search(path) or not is_text(path):
        raise UserError(f"{where} names {path[:200]!r}, which is not a usable file name; refused")
    return path


def listed_path(text: str, where: str, images: Path, beside: Path) -> str:
    """Return an item's path, relative and posix, from the way in which a list writes it.

    Backslashes separate, as where the list was made on Windows. An absolute path, and one that
    starts with `..` and is thus meant from where the list lies, count where they lead into the
    folder of the images. Blanks around a path belong to it only where such a file exists.

    Args:
        text: What the list says.
        where: File and line, for messages.
        images: Folder to which items' paths are relative.
        beside: Folder of the list.

    Raises:
        UserError: The path leaves the folder, by its words: links are followed.
    """
    path = text.replace("\\", "/")
    if path != path.strip() and not is_there(images / path):
        path = path.strip()
    if path.startswith(("/", "../")) or _DRIVE.match(path):
        path = _relative(path, images, beside) or path
    path = checked_path(path, where, f"; paths are to be relative to {images}")
    return PurePosixPath(path).as_posix() if "./" in path or "//" in path else path


def _relative(path: str, images: Path, beside: Path) -> str | None:
    """Return a path that is not relative to the images as one that is, None where it leads out."""
    inner = path
    while inner.startswith("../"):
        inner = inner.removeprefix("../")
    if ".." in inner.split("/"):
        return None
    whole = Path(os.path.normpath(beside.absolute() / path))
    # As the folder is named, and as it really lies: a list may have been made by way of a link.
    for base in (Path(os.path.normpath(images.absolute())), Path(os.path.realpath(images))):
        if whole.is_relative_to(base) and whole != base:
            return whole.relative_to(base).as_posix()
    return None


def is_there(path: Path) -> bool:
    """Return whether a path exists; one that cannot be a path does not."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def is_text(value: object) -> bool:
    """Return whether the value is a string that can be written as UTF-8."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def stratified_split(
    items: Sequence[Item], fractions: Mapping[str, float]
) -> dict[str, list[Item]]:
    """Divide items into splits, class by class, by the hash of their paths.

    Within a class the items are ranked by SHA-256 of the path, and the ranks are cut at the
    cumulative fractions, rounded; `train`, or the first split where there is none of that name, has
    one of each class at least. No random state enters, so every machine gets the same split, and a
    file that is added moves few others. The order of the items is kept.
    """
    ranked: dict[int, list[int]] = {}
    for index, item in enumerate(items):
        ranked.setdefault(item.label, []).append(index)
    split_of = [""] * len(items)
    names = list(fractions)
    # The last edge is 1 by name: 0.7 + 0.1 + 0.2 is a little less, and would drop an item.
    edges = [*list(accumulate(fractions.values()))[:-1], 1.0]
    kept = names.index("train") if "train" in names else 0
    for members in ranked.values():
        members.sort(key=lambda i: checksum(items[i].path))
        ends = [max(1, round(edge * len(members))) for edge in edges]
        # A class of one image would be tested, and trained on by none.
        ends[:kept] = [min(end, len(members) - 1) for end in ends[:kept]]
        ends[kept] = max([ends[kept], *(end + 1 for end in ends[:kept])])
        ends = list(accumulate(ends, max))
        for name, start, end in zip(names, [0, *ends], ends):
            for index in members[start:end]:
                split_of[index] = name
    return {name: [item for item, own in zip(items, split_of) if own == name] for name in names}


def balanced_sample(items: Sequence[Item], n: int, seed: int) -> list[Item]:
    """Draw `n` items, the classes as equal as their sizes allow, in the order given.

    Every class is shuffled once and the classes are visited in turn, so a smaller draw with the
    same seed is part of a larger one.

    Raises:
        UserError: `n` is not positive.
    """
    if n < 1:
        raise UserError(f"cannot sample {n} items; ask for 1 or more")
    random = Random(seed)
    by_class: dict[int, list[int]] = {}
    for index, item in enumerate(items):
        by_class.setdefault(item.label, []).append(index)
    turns: list[tuple[int, int, int]] = []
    for turn, label in enumerate(random.sample(sorted(by_class), len(by_class))):
        members = by_class[label]
        drawn = random.sample(members, len(members))
        turns.extend((rank, turn, index) for rank, index in enumerate(drawn))
    # Sorted by rank, then by the turn of the class: every class gives its first before any gives
    # its second, and a smaller n cuts the same list earlier.
    chosen = sorted(index for _, _, index in sorted(turns)[:n])
    return [items[index] for index in chosen]
