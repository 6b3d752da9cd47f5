"""Where a Multi-Modal Adapter sits, how wide it is, and how strongly it speaks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlmlayers.errors import UserError, check_one_of


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
        for tower in ("vision", "text"):
            object.__setattr__(self, tower, _blocks(tower, getattr(self, tower)))
        if not self.vision and not self.text:
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
        blocks = tuple(range(first, last + 1))
        if not blocks:
            raise UserError(f"the span {first} to {last} holds no block; give the lower one first")
        return cls(vision=blocks, text=blocks, **options)

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
        return f"v{_ranges(self.vision)},t{_ranges(self.text)}"

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


def parse_placement(text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Read a placement such as `v5-12,t5-12`, or `5-12` for both towers.

    Returns:
        Vision blocks and text blocks.
    """
    parts = text.replace(" ", "").split(",")
    try:
        if len(parts) == 1 and not parts[0].startswith(("v", "t")):
            both = _parse_ranges(parts[0])
            return both, both
        by_tower = {part[:1]: _parse_ranges(part[1:]) for part in parts}
        if len(by_tower) != len(parts) or not set(by_tower) <= {"v", "t"}:
            raise ValueError
    except ValueError:
        raise UserError(
            f"cannot read the placement {text[:80]!r}; write 5-12, or v5-12,t7-12, or v1+3+5-8,t-"
        ) from None
    return by_tower.get("v", ()), by_tower.get("t", ())


def _parse_ranges(text: str) -> tuple[int, ...]:
    if text in ("", "-"):
        return ()
    blocks: list[int] = []
    for part in text.split("+"):
        first, _, last = part.partition("-")
        if max(len(first), len(last)) > 4:  # no tower is that deep, and the range would fill memory
            raise ValueError
        blocks.extend(range(int(first), int(last or first) + 1))
    return tuple(blocks)


def _ranges(blocks: tuple[int, ...]) -> str:
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    return "+".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs) or "-"


def _blocks(tower: str, blocks: Iterable[int]) -> tuple[int, ...]:
    found = tuple(blocks)
    for block in found:
        if isinstance(block, bool) or not isinstance(block, int) or block < 1:
            raise UserError(f"{tower} block {block!r} is not a block number; blocks count from 1")
    if len(set(found)) != len(found):
        raise UserError(f"{tower} blocks {list(found)} name a block twice")
    return tuple(sorted(found))


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
