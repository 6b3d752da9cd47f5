"""Built-in datasets: drawn by code, so there is nothing to read or to miss."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from vlmlayers.data import builtin
from vlmlayers.files import checksum
from vlmlayers.manifests.items import SPLITS, Item
from vlmlayers.manifests.layouts.base import Layout
from vlmlayers.manifests.place import Place


@cache
def code_hash() -> str:
    """Return sixteen hexadecimal digits that change with the code that draws."""
    files = sorted(Path(builtin.__file__).parent.glob("*.py"))
    return checksum(path.read_bytes() for path in files)[:16]


class BuiltInLayout(Layout):
    """Items are numbered; their path is `<split>/<index>`."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.dataset = builtin.get(place.name)

    def splits(self) -> tuple[str, ...]:
        """Return the splits that have items."""
        return tuple(split for split in SPLITS if self.dataset.sizes.get(split))

    def class_names(self) -> tuple[str, ...]:
        """Return the class names by label."""
        return tuple(self.dataset.class_names)

    def items(self, split: str) -> list[Item]:
        """Return the items of a split by index, each with its caption."""
        return list(_items(self.dataset.name, split))


@cache
def _items(name: str, split: str) -> tuple[Item, ...]:
    data = builtin.get(name)
    labels = [data.label(split, index) for index in range(data.sizes[split])]
    return tuple(
        Item(f"{split}/{i:06d}", label, data.class_names[label], (data.caption(split, i),))
        for i, label in enumerate(labels)
    )


def split_and_index(item: Item) -> tuple[str, int]:
    """Return the split and the number of a built-in item."""
    split, _, index = item.path.partition("/")
    return split, int(index)
