"""Images that are copies of others, which raise what is read from neighbours or held-out items."""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from vlmlayers.features import LayerFeatures
from vlmlayers.positions import ATTENTION, sort_key
from vlmlayers.words import counted

LOG = logging.getLogger(__name__)
Rows = Mapping[bytes, Sequence[int]]  # digest of an image's features → its rows


def tell_copies(features: Iterable[LayerFeatures]) -> None:
    """Warn of images with exactly the features of others, in one dataset or in two.

    Of exact copies an image in the test part has its like in the part that was fitted, and its
    nearest neighbour is itself; those of two datasets are in both. Near copies are not looked for.
    A dataset that is recorded several times, as by two poolings, is looked at once.
    """
    known: dict[str, Rows] = {}
    for one in features:
        name = f"{one.dataset} ({one.split})"
        rows = {} if name in known else _rows(one)
        if len(rows) <= 1:  # none to look at, or all the same, which metrics refuse
            continue
        ids = one.vision.ids if one.vision is not None else ()
        if again := [found for found in rows.values() if len(found) > 1]:
            count, (first, second) = sum(len(found) - 1 for found in again), again[0][:2]
            LOG.warning(
                "%s: %d of %s %s exactly the features of another, such as %s and %s: copies raise "
                "accuracies of held-out images and overlaps of neighbours",
                one.dataset,
                count,
                counted(len(ids), "image"),
                "has" if count == 1 else "have",
                ids[first],
                ids[second],
            )
        for other, theirs in known.items():
            if shared := len(rows.keys() & theirs.keys()):
                LOG.warning(
                    "%s and %s share %s: nothing tells of which dataset one is",
                    other,
                    name,
                    counted(shared, "image"),
                )
        known[name] = rows


def _rows(one: LayerFeatures) -> Rows:
    """Return the rows of each image at the deepest position, by a digest of its features."""
    found: dict[bytes, list[int]] = defaultdict(list)
    for space, by_position in one.vision.arrays.items() if one.vision is not None else ():
        if space in ATTENTION or not by_position:
            continue
        array = by_position[max(by_position, key=sort_key)]
        for index, row in enumerate(array):
            plain = np.ascontiguousarray(row)
            found[hashlib.blake2b(plain.tobytes(), digest_size=16).digest()].append(index)
        break
    return found
