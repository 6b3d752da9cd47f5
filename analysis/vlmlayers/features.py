"""Features of every position: what extraction hands to the metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmlayers.errors import UserError, check_one_of
from vlmlayers.positions import relative_depth, sort_key


@dataclass(frozen=True, eq=False)
class TowerFeatures:
    """Pooled activations of one tower over one set of items, by space and position.

    Attributes:
        tower: `vision` or `text`.
        blocks: Number of blocks L of the tower.
        pooling: How tokens became one vector: `cls`, `eot`, `mean` or `model`.
        kind: What an item is: `images`, `prompts` (one per class) or `captions`.
        ids: (item,) relative image path, or the text itself.
        labels: (item,) index into the class names.
        arrays: space → position → (item, width), float32, memory-mapped where stored.
        pairs: (item,) for captions, the row of the image each one describes; else None.
    """

    tower: str
    blocks: int
    pooling: str
    kind: str
    ids: tuple[str, ...]
    labels: NDArray[np.int64]
    arrays: Mapping[str, Mapping[str, NDArray[np.floating]]]
    pairs: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        n = len(self.ids)
        if len(self.labels) != n:
            raise UserError(f"{self.tower} features have {n} ids but {len(self.labels)} labels")
        for space, by_position in self.arrays.items():
            for position, array in by_position.items():
                if array.ndim != 2 or len(array) != n:
                    raise UserError(
                        f"{self.tower} features at {position} ({space}) have shape "
                        f"{array.shape}; expected ({n}, width)"
                    )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def spaces(self) -> tuple[str, ...]:
        """Spaces that are recorded."""
        return tuple(self.arrays)

    def positions(self, space: str = "native") -> tuple[str, ...]:
        """Return the recorded positions of a space, in order along the tower."""
        check_one_of("space", space, self.arrays, where=f"{self.tower} features")
        return tuple(sorted(self.arrays[space], key=sort_key))

    def array(self, position: str, space: str = "native") -> NDArray[np.floating]:
        """Return the features at one position, (item, width)."""
        check_one_of("space", space, self.arrays, where=f"{self.tower} features")
        check_one_of("position", position, self.positions(space), where=f"{self.tower} {space}")
        return self.arrays[space][position]

    def depth(self, position: str) -> float:
        """Return the relative depth of a position, 0 to 1."""
        return relative_depth(position, self.blocks)

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> TowerFeatures:
        """Return the same features for some items, in the order given."""
        index = np.asarray(rows, dtype=np.int64)
        arrays = {s: {p: a[index] for p, a in by.items()} for s, by in self.arrays.items()}
        return replace(
            self, ids=tuple(self.ids[i] for i in index), labels=self.labels[index], arrays=arrays,
            pairs=None if self.pairs is None else self.pairs[index],
        )


@dataclass(frozen=True, eq=False)
class LayerFeatures:
    """Features of both towers at every position for one model and one split of one dataset.

    Attributes:
        model: Name of the architecture.
        weights: Tag, file name or `random`.
        dataset: Name of the manifest.
        split: `train`, `val` or `test`.
        class_names: Class names by label.
        vision: Features of the images, or None.
        text: Features of class prompts or captions, or None.
        random_weights: Whether the backbone is untrained; every output says so.
        identity: All that the values depend on (hashes, precision, template, versions).
    """

    model: str
    weights: str
    dataset: str
    split: str
    class_names: tuple[str, ...]
    vision: TowerFeatures | None = None
    text: TowerFeatures | None = None
    random_weights: bool = False
    identity: Mapping[str, Any] = field(default_factory=dict)

    def tower(self, name: str) -> TowerFeatures:
        """Return one tower's features.

        Raises:
            UserError: The name is unknown or the tower was not extracted.
        """
        check_one_of("tower", name, ("vision", "text"))
        found = self.vision if name == "vision" else self.text
        if found is None:
            raise UserError(f"{self.dataset}: no {name} features were extracted")
        return found

    @property
    def towers(self) -> tuple[TowerFeatures, ...]:
        """The towers that were extracted."""
        return tuple(tower for tower in (self.vision, self.text) if tower is not None)
