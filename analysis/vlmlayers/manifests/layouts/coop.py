"""CoOp's split files: `[path, label, class name]` lists under train, val and test."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from vlmlayers.errors import UserError
from vlmlayers.files import file_stamp
from vlmlayers.manifests.items import SPLITS, Item, listed_path
from vlmlayers.manifests.layouts.base import Layout, checked_name, expect_hash, names_by_label
from vlmlayers.manifests.place import read_text

Lists = dict[str, tuple[Item, ...]]


class CoOpLayout(Layout):
    """One JSON file lists everything, so no image is needed to know the items."""

    def _read(self) -> tuple[Lists, tuple[str, ...]]:
        path = self.place.find(self.place.spec.split_file, "the split file")
        expect_hash(self.place, path)
        return _parse(file_stamp(path), self.place.images)

    def splits(self) -> tuple[str, ...]:
        """Return the splits of the file."""
        return tuple(self._read()[0])

    def class_names(self) -> tuple[str, ...]:
        """Return the class names that the file gives to each label."""
        return self._read()[1]

    def items(self, split: str) -> list[Item]:
        """Return the items in the order of the file."""
        return list(self._read()[0][split])


@lru_cache(maxsize=16)
def _parse(stamp: tuple[str, int, int], images: Path) -> tuple[Lists, tuple[str, ...]]:
    path = Path(stamp[0])
    try:
        content = json.loads(read_text(path))
    except RecursionError:
        raise UserError(f"{path} is not a split file: nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(content, dict) or not set(content) & set(SPLITS):
        raise UserError(f"{path} is not a split file: no 'train', 'val' or 'test' at its top")
    lists = {s: _items(content[s], path, s, images) for s in SPLITS if content.get(s)}
    pairs = ((item.label, item.class_name) for part in lists.values() for item in part)
    return lists, names_by_label(pairs, str(path))


def _items(entries: Any, path: Path, split: str, images: Path) -> tuple[Item, ...]:
    where = f"{path} [{split}]"
    if not isinstance(entries, list):
        raise UserError(f"{where} is not a list of [path, label, class name]")
    places = (f"{where} entry {i}" for i in range(len(entries)))
    return tuple(_item(entry, where, images, path.parent) for entry, where in zip(entries, places))


def _item(entry: Any, where: str, images: Path, beside: Path) -> Item:
    if not isinstance(entry, list) or len(entry) != 3:
        raise UserError(f"{where} is {str(entry)[:80]!r}; expected [path, label, class name]")
    path, label, name = entry
    if not isinstance(path, str):
        raise UserError(f"{where} has {str(path)[:80]!r} where a path is expected")
    if type(label) is not int or label < 0:
        raise UserError(f"{where} has label {str(label)[:80]!r}; labels are whole numbers from 0")
    listed = listed_path(path, where, images, beside)
    return Item(listed, label, checked_name(name, where))
