"""Competitors of a choice: the placements that a validation trains beside it."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from vlmlayers.errors import check_one_of
from vlmlayers.placement import Placement
from vlmlayers.selection import paper_blocks

Blocks = tuple[int, ...]
KINDS: dict[str, str] = {
    "paper": "upper two thirds of both towers (5–12 of 12, as published)",
    "all": "every block of both towers",
    "lower": "lower half of both towers",
    "upper": "upper half of both towers",
    "start": "every start block up to the last, both towers at equal relative depth",
    "single": "one block of each tower at equal relative depth",
    "random": "random blocks at the cost of the choice: as many in each tower, as many shared",
    "vision": "the chosen vision blocks only",
    "text": "the chosen text blocks only",
}
DEFAULT_KINDS = ("paper", "all", "lower", "upper", "start", "random", "vision", "text")


@dataclass(frozen=True)
class Competitor:
    """A placement and why it is trained.

    Attributes:
        kind: `chosen` or a name of `KINDS`; several joined by `+` where they coincide.
        placement: The blocks.
    """

    kind: str
    placement: Placement


def scaled_block(block: int, blocks: int, other: int) -> int:
    """Return the block of a tower with `other` blocks at the same relative depth."""
    return min(other, max(1, round(block * other / blocks)))


def scaled_start(start: int, blocks: int, other: int) -> int:
    """Return the start block that leaves the same share of blocks frozen."""
    return min(other, 1 + round((start - 1) * other / blocks))


def _span(start: int, last: int) -> Blocks:
    return tuple(range(start, last + 1))


def _random_blocks(
    generator: random.Random, chosen: Placement, depths: Mapping[str, int]
) -> Placement:
    """Draw as many blocks per tower as chosen, as many of them in both towers as chosen.

    A block that is adapted in both towers shares its middle layer, so equal counts alone would not
    be an equal number of parameters.
    """
    shallow, deep = sorted(depths, key=lambda tower: depths[tower])
    both = set(chosen.vision) & set(chosen.text)
    common = range(1, depths[shallow] + 1)
    shared = set(generator.sample(common, len(both)))
    free = [b for b in common if b not in shared]
    alone = {shallow: set(generator.sample(free, len(chosen.blocks(shallow)) - len(both)))}
    free = [b for b in range(1, depths[deep] + 1) if b not in shared | alone[shallow]]
    alone[deep] = set(generator.sample(free, len(chosen.blocks(deep)) - len(both)))
    vision, text = (tuple(sorted(shared | alone[tower])) for tower in ("vision", "text"))
    return Placement(vision, text)


def _placements(
    kind: str, chosen: Placement, depths: Mapping[str, int], count: int, seed: int
) -> Iterator[Placement]:
    v, t = depths["vision"], depths["text"]
    if kind == "paper":
        yield Placement(paper_blocks(v), paper_blocks(t))
    elif kind == "all":
        yield Placement(_span(1, v), _span(1, t))
    elif kind == "lower":
        yield Placement(_span(1, v // 2), _span(1, t // 2))
    elif kind == "upper":
        yield Placement(_span(v // 2 + 1, v), _span(t // 2 + 1, t))
    elif kind == "start":
        for start in range(1, max(v, t) + 1):
            yield Placement(
                _span(scaled_start(start, max(v, t), v), v),
                _span(scaled_start(start, max(v, t), t), t),
            )
    elif kind == "single":
        for block in range(1, max(v, t) + 1):
            yield Placement(
                (scaled_block(block, max(v, t), v),), (scaled_block(block, max(v, t), t),)
            )
    elif kind == "random":
        generator = random.Random(seed)
        for _ in range(count):
            yield _random_blocks(generator, chosen, depths)
    elif kind == "vision":
        yield Placement(vision=chosen.vision)
    else:
        yield Placement(text=chosen.text)


def competitors(
    chosen: Placement,
    depths: Mapping[str, int],
    kinds: Iterable[str] = DEFAULT_KINDS,
    *,
    random_count: int = 3,
    seed: int = 0,
) -> list[Competitor]:
    """Return the chosen placement and its competitors, each distinct placement once.

    Args:
        chosen: The chosen placement.
        depths: Number of blocks of each tower, `vision` and `text`.
        kinds: Names of `KINDS`.
        random_count: How many random placements the kind `random` adds.
        seed: Seed of those.

    Raises:
        UserError: A kind is unknown, or the choice names a block that a tower lacks.
    """
    found = {chosen.check(depths, "the choice"): ["chosen"]}
    for kind in kinds:
        check_one_of("kind of placement", kind, KINDS)
        for placed in _placements(kind, chosen, depths, random_count, seed):
            names = found.setdefault(placed, []) if placed else []
            if kind not in names:
                names.append(kind)
    return [Competitor("+".join(names), placed) for placed, names in found.items()]
