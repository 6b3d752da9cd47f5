"""Plain lists: one text file per split, each line an image's stem and the name of its class."""

from __future__ import annotations

from vlmlayers.errors import UserError
from vlmlayers.manifests.items import SPLITS, Item, listed_path
from vlmlayers.manifests.layouts.base import Layout, declared_names
from vlmlayers.manifests.layouts.classes import class_word
from vlmlayers.manifests.place import MissingData, read_text


class ListsLayout(Layout):
    """FGVC Aircraft's own layout: `1025794 707-320` stands for `1025794.jpg`."""

    def splits(self) -> tuple[str, ...]:
        """Return the splits that have a list."""
        return tuple(split for split in SPLITS if split in self.place.spec.split_files)

    def class_names(self) -> tuple[str, ...]:
        """Return the declared names, in the order of their file."""
        return declared_names(self.place)

    def items(self, split: str) -> list[Item]:
        """Return the items of a split in the order of its list."""
        path = self.place.folder / self.place.spec.split_files[split]
        if not path.is_file():
            raise MissingData(f"{self.place.name}: no list {path}; {self.place.hint}")
        names = self.class_names()
        labels = {class_word(name): label for label, name in enumerate(names)}
        items = []
        for number, line in enumerate(read_text(path).split("\n"), start=1):
            stem, _, written = line.strip().partition(" ")
            name = class_word(written)
            where = f"line {number} of {path}"
            if not stem:
                continue
            if name not in labels:
                raise UserError(f"{where} names the class {name[:80]!r}, which is not declared")
            file = stem if "." in stem else f"{stem}.jpg"
            listed = listed_path(file, where, self.place.images, path.parent)
            items.append(Item(listed, labels[name], names[labels[name]]))
        return items
