"""The identity of a dataset's items, by layout: what file sizes and times tell."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path

from vlmlayers.files import file_checksum
from vlmlayers.identity import DataIdentity, short_digest
from vlmlayers.manifests.items import Item
from vlmlayers.manifests.layouts.builtin import code_hash
from vlmlayers.manifests.layouts.huggingface import is_stored, stored_files
from vlmlayers.manifests.place import Place

ABSENT = "absent"


def identify(
    place: Place, classes: Sequence[str], items: Iterable[Item], *, content: bool = False
) -> DataIdentity:
    """Return the identity of some items of a dataset.

    It costs one stat of each file; none is read.

    Args:
        place: Where the dataset lies.
        classes: Class names by label.
        items: The items.
        content: Read the files and mark them by their content instead of size and time, so that
            the identity is that of any copy.
    """
    mark = _marks(place, content)
    rows = ((item.path, item.label, mark(item.path), item.captions) for item in items)
    return DataIdentity(
        tuple(classes),
        tuple(
            (path, label, f"{own} {short_digest(repr(texts))}" if texts else own)
            for path, label, own, texts in rows
        ),
    )


def _marks(place: Place, content: bool) -> Callable[[str], str]:
    """Return the function that gives the mark of an item's path."""
    mark, folder = partial(_mark, content), place.images
    # As text: of a million files, paths as objects take longer than looking at each.
    base = os.path.join(folder, "")  # noqa: PTH118
    if place.spec.layout == "builtin":
        drawn = f"drawn {code_hash()}"
        return lambda path: drawn
    if is_stored(place):
        files = stored_files(place)
        tables = short_digest(repr([(str(one.relative_to(folder)), mark(one)) for one in files]))
        columns = place.spec.columns
        # Rows have the same paths whichever of several columns of images is read.
        named = f" {columns.path!r}" if "path" in columns.model_fields_set else ""
        return lambda path: f"tables {tables}{named}"
    if place.spec.layout == "shards":
        known = cache(mark)  # thousands of items share a shard
        return lambda path: known(base + path.partition(".tar/")[0] + ".tar")

    def of_file(path: str) -> str:
        found = mark(base + path)
        return mark(place.inside(path)) if found == ABSENT and not path.isascii() else found

    return of_file


def _mark(content: bool, file: str | Path) -> str:
    try:
        if content:
            return file_checksum(Path(file))
        status = os.stat(file)  # noqa: PTH116
    except OSError:
        return ABSENT
    return f"{status.st_size} {status.st_mtime_ns}"
