"""Where a Multi-Modal Adapter sits, how wide it is, and how strongly it speaks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlmlayers.errors import UserError, check_one_of
from vlmlayers.placement import Placement


@dataclass(frozen=True)
class MMAConfig:
    """Placement and size of a Multi-Modal Adapter.

    Attributes:
        vision: Adapted vision blocks, counted from 1, rising.
        text: Adapted text blocks, counted from 1, rising.
        dim: Width of the adapter's inner space.
        scale: The factor α on the adapter's output; 0 is the plain backbone.
        pairs: (vision block, text block) pairs that share a projection. None pairs equal numbers.
            Blocks outside every pair have a projection of their own.

    Raises:
        UserError: A block is not a positive number or stands twice, both towers are empty, `dim` is
            below 1, `scale` is negative, or a pair names a block that is not adapted.
    """

    vision: tuple[int, ...]
    text: tuple[int, ...]
    dim: int = 32
    scale: float = 0.001
    pairs: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        placed = Placement(self.vision, self.text)
        object.__setattr__(self, "vision", placed.vision)
        object.__setattr__(self, "text", placed.text)
        if not placed:
            raise UserError("the adapter has no block in either tower; name at least one")
        if self.dim < 1:
            raise UserError(f"the adapter's dim is {self.dim}; it must be 1 or more")
        if not self.scale >= 0:
            raise UserError(f"the adapter's scale is {self.scale}; it must be 0 or more")
        if self.pairs is not None:
            object.__setattr__(self, "pairs", _pairs(self.pairs, self.vision, self.text))

    @classmethod
    def span(cls, first: int, last: int, **options: Any) -> MMAConfig:
        """Adapt blocks `first` to `last` of both towers; (5, 12) is the published placement."""
        return cls(*Placement.span(first, last), **options)

    @classmethod
    def from_choice(cls, choice: Any, **options: Any) -> MMAConfig:
        """Adapt the blocks of a layer choice.

        Args:
            choice: A `LayerChoice`, its dictionary, or the path of a `choice.json`.
            **options: Other fields, such as `scale`.
        """
        if isinstance(choice, (str, Path)):
            from vlmlayers.selection import LayerChoice

            choice = LayerChoice.load(choice)
        found = choice if isinstance(choice, Mapping) else vars(choice)
        if not {"vision", "text"} <= set(found):
            raise UserError("a layer choice needs the keys 'vision' and 'text'")
        return cls(vision=tuple(found["vision"]), text=tuple(found["text"]), **options)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MMAConfig:
        """Rebuild a configuration from `to_dict`."""
        for key in values:
            check_one_of("adapter setting", key, ("vision", "text", "dim", "scale", "pairs"))
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        pairs = None if self.pairs is None else [list(pair) for pair in self.pairs]
        return {
            "vision": list(self.vision),
            "text": list(self.text),
            "dim": self.dim,
            "scale": self.scale,
            "pairs": pairs,
        }

    @property
    def placement(self) -> str:
        """The placement in short: `v5-12,t5-12`; `v3+5-7,t-` for gaps and an empty tower."""
        return str(Placement(self.vision, self.text))

    def with_placement(self, vision: Iterable[int], text: Iterable[int]) -> MMAConfig:
        """Return the same adapter at other blocks, paired by number."""
        return replace(self, vision=tuple(vision), text=tuple(text), pairs=None)

    def shared_pairs(self) -> tuple[tuple[int, int], ...]:
        """Return the (vision, text) blocks that share a projection."""
        if self.pairs is not None:
            return self.pairs
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
