"""Built-in datasets: drawn by code, so there is nothing to read or to miss."""

from __future__ import annotations

from typing import Any

from vlmlayers.manifests.items import SPLITS, Item
from vlmlayers.manifests.place import Place


def dataset(name: str) -> Any:
    """Return a built-in dataset by name."""
    from vlmlayers.data import builtin

    return builtin.get(name)


def names() -> list[str]:
    """Return the names of the built-in datasets."""
    from vlmlayers.data import builtin

    return list(getattr(builtin, "names", list)())


class BuiltIn:
    """Items are numbered; their path is `<split>/<index>`."""

    def __init__(self, place: Place) -> None:
        self.dataset = dataset(place.name)

    def splits(self) -> tuple[str, ...]:
        """Return the splits that have items."""
        return tuple(split for split in SPLITS if self.dataset.sizes.get(split))

    def class_names(self) -> tuple[str, ...]:
        """Return the class names by label."""
        return tuple(self.dataset.class_names)

    def items(self, split: str) -> list[Item]:
        """Return the items of a split by index, each with its caption."""
        names, data = self.class_names(), self.dataset
        labels = [data.label(split, index) for index in range(data.sizes[split])]
        return [
            Item(f"{split}/{i:06d}", label, names[label], (data.caption(split, i),))
            for i, label in enumerate(labels)
        ]


def split_and_index(item: Item) -> tuple[str, int]:
    """Return the split and the number of a built-in item."""
    split, _, index = item.path.partition("/")
    return split, int(index)
