"""Manifests: what is known of each dataset, and the way to its items and images."""

from __future__ import annotations

from vlmlayers.manifests.check import CheckResult
from vlmlayers.manifests.convert import write_shards
from vlmlayers.manifests.items import SPLITS, Item
from vlmlayers.manifests.manifest import Manifest, distinct
from vlmlayers.manifests.tables import check_table, exit_code, list_rows, list_table

__all__ = [
    "SPLITS",
    "CheckResult",
    "Item",
    "Manifest",
    "check_table",
    "distinct",
    "exit_code",
    "list_rows",
    "list_table",
    "write_shards",
]
