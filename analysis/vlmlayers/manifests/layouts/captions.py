"""Images with captions: a file of tab-separated image name and caption, no classes."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from vlmlayers.errors import UserError
from vlmlayers.files import file_stamp
from vlmlayers.manifests.items import SPLITS, Item, listed_path
from vlmlayers.manifests.layouts.base import Layout, expect_hash
from vlmlayers.manifests.place import read_text


class CaptionsLayout(Layout):
    """Lines that repeat an image add captions to it; `tail` says which last images are test."""

    def _read(self) -> dict[str, list[Item]]:
        path = self.place.find(self.place.spec.split_file, "the file of captions")
        expect_hash(self.place, path)
        rest = list(_parse(file_stamp(path), self.place.images))
        splits = {}
        for split in ("test", "val"):
            count = min(self.place.spec.tail.get(split, 0), len(rest))
            splits[split] = rest[len(rest) - count :]
            rest = rest[: len(rest) - count]
        return {"train": rest, "val": splits["val"], "test": splits["test"]}

    def splits(self) -> tuple[str, ...]:
        """Return the splits that have items."""
        content = self._read()
        return tuple(split for split in SPLITS if content[split])

    def class_names(self) -> tuple[str, ...]:
        """Return (): captioned images have no classes here."""
        return ()

    def items(self, split: str) -> list[Item]:
        """Return the images of a split in the order of their first caption."""
        return self._read()[split]


@lru_cache(maxsize=8)
def _parse(stamp: tuple[str, int, int], images: Path) -> tuple[Item, ...]:
    path = Path(stamp[0])
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        name, tab, caption = line.partition("\t")
        if not tab or not caption.strip():
            raise UserError(f"line {number} of {path} is not: file name, tab, caption")
        image = listed_path(name, f"line {number} of {path}", images, path.parent)
        captions.setdefault(image, []).append(caption.strip())
    return tuple(Item(image, -1, "", tuple(texts)) for image, texts in captions.items())
