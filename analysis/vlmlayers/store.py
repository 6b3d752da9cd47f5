"""The feature store under the path that scripts written for 0.1.0 import it from."""

from vlmlayers.features.store import FeatureStore, open_features

__all__ = ["FeatureStore", "open_features"]
