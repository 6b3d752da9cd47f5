"""Where batches of features go: a store on disk, or arrays in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlmlayers.features import LayerFeatures, TowerFeatures
from vlmlayers.features.writer import StoreWriter, TowerPlan
from vlmlayers.models.recording import Features


class MemorySink:
    """Arrays of both towers in memory, filled batch by batch."""

    def __init__(self, plans: Mapping[str, TowerPlan]) -> None:
        self.plans = plans
        self.done: dict[str, set[int]] = {name: set() for name in plans}
        self.bad: dict[int, str] = {}
        self.arrays = {
            name: {
                space: {p: np.empty((len(plan.ids), *s), np.float32) for p, s in shapes.items()}
                for space, shapes in plan.shapes.items()
            }
            for name, plan in plans.items()
        }

    def put(
        self,
        tower: str,
        batch: int,
        rows: Sequence[int],
        features: Features,
        bad: Mapping[int, str],
    ) -> None:
        """Take the features of one batch."""
        for space, by_position in features.items():
            for position, values in by_position.items():
                self.arrays[tower][space][position][rows] = values
        self.bad.update(bad)
        self.done[tower].add(batch)

    def features(self, **head: Any) -> LayerFeatures:
        """Return the features without the rows of unreadable images.

        Args:
            **head: Model, weights, dataset and what else `LayerFeatures` says of itself.
        """
        towers = {
            name: TowerFeatures(
                name,
                plan.blocks,
                plan.pooling,
                plan.kind,
                plan.ids,
                np.asarray(plan.labels, dtype=np.int64),
                self.arrays[name],
                None if plan.pairs is None else np.asarray(plan.pairs, dtype=np.int64),
                plan.joint_pooling,
                plan.tokens,
            )
            for name, plan in self.plans.items()
        }
        found = LayerFeatures(**head, vision=towers.get("vision"), text=towers.get("text"))
        if not self.bad:
            return found
        total = len(found.tower("vision"))
        return found.take_images([row for row in range(total) if row not in self.bad])


Sink = MemorySink | StoreWriter
