"""Datasets drawn by code: nothing to download, any number of items, any resolution.

`names()` lists them, `get(name)` returns one. Every image depends on (dataset, split, index)
alone; the same item at two resolutions shows the same drawing. The drawn datasets come in ten
kinds that differ in more than colour. One of them (`shapes_*`) comes in four styles with the same
classes, one (`doodles_*`) by two hands that are hard to tell apart, and was kept out of the
pretraining of the miniature CLIP; `digits` are scikit-learn's real handwritten ones.
"""

from __future__ import annotations

from functools import cache

from vlmlayers.data.builtin.base import BuiltinDataset
from vlmlayers.errors import check_one_of

__all__ = ["BuiltinDataset", "get", "names"]


@cache
def _all() -> dict[str, BuiltinDataset]:
    from vlmlayers.data.builtin import (
        aerial,
        charts,
        digits,
        doodles,
        faces,
        flags,
        letters,
        scenes,
        shapes,
        signs,
        textures,
    )

    families = (
        shapes,
        textures,
        letters,
        charts,
        flags,
        signs,
        aerial,
        faces,
        scenes,
        digits,
        doodles,
    )
    return {data.name: data for family in families for data in family.datasets()}


def names() -> list[str]:
    """Return the names of the built-in datasets, drawn ones first."""
    return list(_all())


def get(name: str) -> BuiltinDataset:
    """Return a built-in dataset.

    Raises:
        UserError: The name is unknown; names the nearest.
    """
    return _all()[check_one_of("built-in dataset", name, _all())]
