"""Ways in which datasets list their items."""

from __future__ import annotations

from vlmlayers.manifests.layouts.base import Layout
from vlmlayers.manifests.layouts.builtin import BuiltIn
from vlmlayers.manifests.layouts.captions import Captions
from vlmlayers.manifests.layouts.coop import CoOp
from vlmlayers.manifests.layouts.folder import Folder
from vlmlayers.manifests.layouts.huggingface import HuggingFace
from vlmlayers.manifests.layouts.lists import Lists
from vlmlayers.manifests.layouts.shards import Shards
from vlmlayers.manifests.layouts.table import Table
from vlmlayers.manifests.place import Place

_LAYOUTS: dict[str, type[Layout]] = {
    "coop": CoOp,
    "folder": Folder,
    "table": Table,
    "lists": Lists,
    "captions": Captions,
    "shards": Shards,
    "huggingface": HuggingFace,
    "builtin": BuiltIn,
}


def layout_of(place: Place) -> Layout:
    """Return the reader of a dataset's layout."""
    return _LAYOUTS[place.spec.layout](place)  # type: ignore[call-arg]
