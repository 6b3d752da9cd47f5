"""Placement, inner width and scale of a Multi-Modal Adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from vlmadapters.methods.deep_configs import TwoTowerConfig
from vlmlayers.arguments import Count, NotNegative, checked
from vlmlayers.errors import UserError
from vlmlayers.placement import Placement


@checked
@dataclass(frozen=True)
class MMAConfig(TwoTowerConfig):
    """Placement and size of a Multi-Modal Adapter.

    Attributes:
        vision: Adapted vision blocks, counted from 1, rising.
        text: Adapted text blocks, counted from 1, rising.
        dim: Inner width of the adapter.
        scale: The factor α on the adapter's output; 0 is the plain backbone.
        pairs: (vision block, text block) pairs that share a projection. None pairs equal numbers.
            Blocks outside every pair have a projection of their own.

    Raises:
        UserError: A block is not a positive number or stands twice, both towers are empty, `dim` is
            below 1, `scale` is negative, or a pair names a block that is not adapted.
    """

    dim: Count = 32
    scale: NotNegative = 0.001
    pairs: Any = None

    name: ClassVar[str] = "mma"
    title: ClassVar[str] = "MMA"
    unstored: ClassVar[tuple[str, ...]] = ("scale",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pairs is not None:
            object.__setattr__(self, "pairs", _pairs(self.pairs, self.vision, self.text))

    @classmethod
    def span(cls, first: int, last: int, **options: Any) -> MMAConfig:
        """Adapt blocks `first` to `last` of both towers; (5, 12) is the published placement."""
        return cls(*Placement.span(first, last), **options)

    @classmethod
    def published(cls, depths: Mapping[str, int], **options: Any) -> MMAConfig:
        """Adapt the upper two thirds of both towers: blocks 5 to 12 of 12, as published."""
        from vlmlayers.selection import paper_blocks

        return cls(paper_blocks(depths["vision"]), paper_blocks(depths["text"]), **options)

    def with_placement(self, vision: Iterable[int], text: Iterable[int]) -> MMAConfig:
        """Return the same adapter at other blocks, paired by number."""
        # Pairs name blocks, which the new placement may lack.
        return replace(self, vision=tuple(vision), text=tuple(text), pairs=None)

    def parameters(self, widths: Mapping[str, int]) -> int:
        """Return the trainable values at this placement: 84,320 a block of ViT-B/16.

        Args:
            widths: Width of the `vision` and the `text` tower.
        """
        own = sum(
            len(getattr(self, tower)) * (2 * width * self.dim + self.dim + width)
            for tower, width in widths.items()
        )
        return own + len(set(self.shared_names().values())) * (self.dim**2 + self.dim)

    def shared_pairs(self) -> tuple[tuple[int, int], ...]:
        """Return the (vision, text) blocks that share a projection."""
        if self.pairs is not None:
            return tuple((vision, text) for vision, text in self.pairs)
        return tuple((block, block) for block in self.vision if block in self.text)

    def shared_names(self) -> dict[tuple[str, int], str]:
        """Return the name of the inner projection each adapted block uses.

        A pair of equal numbers has the authors' name (`5`), a pair of different ones `v5t7`, and a
        block on its own `v5` or `t7`.
        """
        names = {("vision", b): f"v{b}" for b in self.vision}
        names |= {("text", b): f"t{b}" for b in self.text}
        for v, t in self.shared_pairs():
            names["vision", v] = names["text", t] = str(v) if v == t else f"v{v}t{t}"
        return names


def _pairs(
    pairs: Iterable[Iterable[int]], vision: tuple[int, ...], text: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    found = []
    for pair in pairs:
        if len(tuple(pair)) != 2:
            raise UserError(f"the pair {pair!r} is not a vision block and a text block")
        v, t = pair
        if v not in vision or t not in text:
            raise UserError(f"the pair (vision {v}, text {t}) names a block that is not adapted")
        found.append((v, t))
    if len({v for v, _ in found}) != len(found) or len({t for _, t in found}) != len(found):
        raise UserError(f"the pairs {found} name a block twice")
    return tuple(found)
