"""Where a position stands on the horizontal axis, for towers of equal or unequal depth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from vlmlayers.plots.style import sparse_labels
from vlmlayers.positions import FINAL, PROJ, is_block, sort_key

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def tail_of(frame: pd.DataFrame) -> tuple[str, ...]:
    """Return the positions after the last block that a frame of curves has, in order."""
    return tuple(p for p in (FINAL, PROJ) if p in set(frame["position"]))


@dataclass(frozen=True)
class DepthAxis:
    """The axis of depth: block numbers where both towers have as many, else relative depth.

    Attributes:
        blocks: Number of blocks by tower.
        tail: What comes after the last block, in order: of `final`, `proj`.
    """

    blocks: Mapping[str, int]
    tail: tuple[str, ...]

    @classmethod
    def of(cls, frame: pd.DataFrame, blocks: Mapping[str, int]) -> DepthAxis:
        """Return the axis for a frame of curves."""
        shown = {tower: depth for tower, depth in blocks.items() if tower in set(frame["tower"])}
        return cls(shown or dict(blocks), tail_of(frame))

    @property
    def equal(self) -> bool:
        """Whether the towers shown have the same number of blocks."""
        return len(set(self.blocks.values())) <= 1

    @property
    def length(self) -> int:
        """Blocks of the deepest tower."""
        return max(self.blocks.values())

    def x(self, tower: str, position: str) -> float:
        """Return where a position stands, in blocks of the deepest tower."""
        if is_block(position):
            return int(position) * self.length / self.blocks[tower]
        return self._start if position == "embed" else self._end(self.tail.index(position))

    @property
    def _unit(self) -> float:
        """Width of one step of a twelve-block axis, in blocks."""
        return max(1.0, self.length / 12)

    @property
    def _start(self) -> float:
        """Where `embed` stands: far enough from block 1 for both labels in one column."""
        return 1 - 1.35 * self._unit

    def _end(self, index: int) -> float:
        """Return where the index-th position after the last block stands."""
        return self.length + (1.3 + 1.6 * index) * self._unit

    def span(self, tower: str, block: int) -> tuple[float, float]:
        """Return the stretch of the axis that a block covers."""
        step = self.length / self.blocks[tower]
        return (block - 0.5) * step, (block + 0.5) * step

    def draw(self, ax: Axes) -> None:
        """Set ticks and label."""
        ends = {"embed": self._start, **{p: self._end(i) for i, p in enumerate(self.tail)}}
        if self.equal:
            names = sorted([*ends, *map(str, range(1, self.length + 1))], key=sort_key)
            ticks = [self.x(next(iter(self.blocks)), name) for name in names]
            # A user's axes may be of another size and have letters of another.
            size: Any = ax.xaxis.get_major_ticks(1)[0].label1.get_fontsize()
            width = ax.get_window_extent().width / ax.figure.dpi * 72
            labels = sparse_labels(names, max(2, min(14, int(width / (1.85 * size)))))
            ax.set_xlabel("Block")
        else:
            # Block numbers of towers of other depth would stand at the same place for other blocks.
            marks = (0.25, 0.5, 0.75, 1.0)
            ticks = [self._start, *(m * self.length for m in marks), *list(ends.values())[1:]]
            labels = ["Embed", *(f"{m:g}" for m in marks), *(p.capitalize() for p in self.tail)]
            ax.set_xlabel("Relative depth")
        ax.set_xticks(ticks, labels)
        last = self._end(len(self.tail) - 1) if self.tail else self.length
        ax.set_xlim(self._start - 0.4 * self._unit, last + 0.4 * self._unit)
