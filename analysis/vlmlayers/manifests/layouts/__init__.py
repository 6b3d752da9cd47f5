"""Ways in which datasets list their items."""

from __future__ import annotations

from vlmlayers.manifests.layouts.base import Layout
from vlmlayers.manifests.layouts.builtin import BuiltInLayout
from vlmlayers.manifests.layouts.captions import CaptionsLayout
from vlmlayers.manifests.layouts.coop import CoOpLayout
from vlmlayers.manifests.layouts.folder import FolderLayout
from vlmlayers.manifests.layouts.huggingface import HuggingFaceLayout
from vlmlayers.manifests.layouts.lists import ListsLayout
from vlmlayers.manifests.layouts.shards import ShardsLayout
from vlmlayers.manifests.layouts.table import TableLayout
from vlmlayers.manifests.place import Place

_LAYOUTS: dict[str, type[Layout]] = {
    "coop": CoOpLayout,
    "folder": FolderLayout,
    "table": TableLayout,
    "lists": ListsLayout,
    "captions": CaptionsLayout,
    "shards": ShardsLayout,
    "huggingface": HuggingFaceLayout,
    "builtin": BuiltInLayout,
}


def layout_of(place: Place) -> Layout:
    """Return the reader of a dataset's layout."""
    return _LAYOUTS[place.spec.layout](place)
