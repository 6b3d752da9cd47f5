"""What a dataset is: one definition, for every cache of what was made of its items."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vlmlayers.files import atomically, checksum

DATA = "data.gz"  # name of the file that holds an identity, beside what was made of the items


@dataclass(frozen=True)
class DataIdentity:
    """Items of a dataset as they lay on the disk, and what tells them from others.

    Two are equal where class names, items, their order, labels, captions, and sizes and times of
    change of the files are. Where the folder lies does not count, nor what else a manifest says:
    a copy that preserves times is the same dataset.

    Attributes:
        classes: Class names by label.
        items: Path, label and mark of each item; the mark changes with file and captions.
    """

    classes: tuple[str, ...]
    items: tuple[tuple[str, int, str], ...]

    @cached_property
    def hash(self) -> str:
        """Sixteen hexadecimal digits that change with anything that counts."""
        return short_digest(self.text())

    @cached_property
    def listed(self) -> str:
        """Sixteen hexadecimal digits of the list alone, without files: the same anywhere."""
        # Without marks: a copy of the files has other times, and is the same list.
        rows = (f"{path}\t{label}" for path, label, _ in self.items)
        return short_digest("\n".join((json.dumps(self.classes), *rows)))

    def summary(self) -> dict[str, Any]:
        """Return hash and sizes as JSON values."""
        return {"hash": self.hash, "images": len(self.items), "classes": len(self.classes)}

    def text(self) -> str:
        """Return all of it as text: the class names, then an item a line."""
        rows = ("\t".join(map(str, item)) for item in self.items)  # paths hold no tab, no newline
        return "\n".join((json.dumps(self.classes), *rows))

    @classmethod
    def from_text(cls, text: str) -> DataIdentity:
        """Rebuild an identity from `text`.

        Raises:
            ValueError: It is not such a text.
        """
        head, *rows = text.split("\n")
        parts = (row.split("\t") for row in rows)
        return cls(
            tuple(json.loads(head)), tuple((p, int(label), mark) for p, label, mark in parts)
        )

    def packed(self) -> bytes:
        """Return the content of a file that `read` takes; the same bytes each time."""
        # Without a time, or equal contents would give files of different bytes.
        return gzip.compress(self.text().encode(), mtime=0)

    def save(self, file: Path) -> None:
        """Write a file that `read` takes, whole or not at all."""
        content = self.packed()
        atomically(file, lambda part: part.write_bytes(content))

    @classmethod
    def read(cls, file: Path) -> DataIdentity | None:
        """Return what a file says, None where there is no such file or it is damaged."""
        try:
            return cls.from_text(gzip.decompress(file.read_bytes()).decode())
        except (OSError, EOFError, ValueError, TypeError, zlib.error):
            return None

    def changes(self, then: DataIdentity) -> str:
        """Return in words what changed since: items added, removed and altered, and classes."""
        old, new = then._contents(), self._contents()
        kinds = {
            "added": [path for path in new if path not in old],
            "removed": [path for path in old if path not in new],
            "altered": [path for path in new if old.get(path, new[path]) != new[path]],
        }
        found = [
            f"{len(paths):,} {kind}, first {paths[0]!r}" for kind, paths in kinds.items() if paths
        ]
        if len(then.classes) != len(self.classes):
            found.append(f"classes {len(then.classes)} then, {len(self.classes)} now")
        elif then.classes != self.classes:
            label = next(i for i, name in enumerate(then.classes) if name != self.classes[i])
            found.append(f"class {label} {then.classes[label]!r} then, {self.classes[label]!r} now")
        counts = f"{len(then.items):,} images then, {len(self.items):,} now"
        return f"{counts}: {'; '.join(found) or 'in another order'}"

    def altered(self, then: DataIdentity) -> list[int] | None:
        """Return the rows that were altered since; None where the list itself is another."""
        if self.listed != then.listed:
            return None
        pairs = zip(self.items, then.items)
        return [row for row, (mine, theirs) in enumerate(pairs) if mine != theirs]

    def _contents(self) -> dict[str, tuple[str | int, str]]:
        """Return class name and mark by path: a class that is added moves labels, not images."""
        names: dict[int, str | int] = dict(enumerate(self.classes))
        return {path: (names.get(label, label), mark) for path, label, mark in self.items}


def short_digest(text: str) -> str:
    """Return sixteen hexadecimal digits of a text's SHA-256."""
    return checksum(text)[:16]


def texts_hash(texts: Sequence[str]) -> str:
    """Return the hash of texts in their order."""
    # Lines as such only where no text has several, which would be those of other texts.
    several = any("\n" in text for text in texts)
    return checksum(json.dumps(texts) if several else "\n".join(texts))
