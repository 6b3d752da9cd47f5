"""Features: arrays of every position in memory, and the store of them on disk."""

from __future__ import annotations

from vlmlayers.features.arrays import LayerFeatures, TowerFeatures
from vlmlayers.features.store import FeatureStore, open_features

__all__ = ["FeatureStore", "LayerFeatures", "TowerFeatures", "open_features"]
