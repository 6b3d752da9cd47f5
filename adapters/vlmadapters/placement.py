"""Competitors of a choice: the placements that a validation trains beside it."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from vlmadapters.config import MMAConfig
from vlmlayers.errors import UserError, check_one_of

Blocks = tuple[int, ...]
KINDS: dict[str, str] = {
    "paper": "upper two thirds of both towers (5–12 of 12, as published)",
    "all": "every block of both towers",
    "lower": "lower half of both towers",
    "upper": "upper half of both towers",
    "start": "every start block up to the last, both towers at equal relative depth",
    "single": "one block of each tower at equal relative depth",
    "random": "random blocks, as many in each tower as the choice has",
    "vision": "the chosen vision blocks only",
    "text": "the chosen text blocks only",
}
DEFAULT_KINDS = ("paper", "all", "lower", "upper", "start", "random", "vision", "text")


@dataclass(frozen=True)
class Competitor:
    """A placement and why it is trained.

    Attributes:
        kind: `chosen` or a name of `KINDS`; several joined by `+` where they coincide.
        vision: Adapted vision blocks.
        text: Adapted text blocks.
    """

    kind: str
    vision: Blocks
    text: Blocks

    @property
    def label(self) -> str:
        """The placement in short, such as `v5-12,t5-12`."""
        return MMAConfig(vision=self.vision, text=self.text).placement


def scaled_block(block: int, blocks: int, other: int) -> int:
    """Return the block of a tower with `other` blocks at the same relative depth."""
    return min(other, max(1, round(block * other / blocks)))


def scaled_start(start: int, blocks: int, other: int) -> int:
    """Return the start block that leaves the same share of blocks frozen."""
    return min(other, 1 + round((start - 1) * other / blocks))


def _span(start: int, last: int) -> Blocks:
    return tuple(range(start, last + 1))


def _random_blocks(
    generator: random.Random, chosen: Mapping[str, Sequence[int]], depths: Mapping[str, int]
) -> tuple[Blocks, Blocks]:
    """Draw as many blocks per tower as chosen; paired where the towers allow, for equal cost."""
    vision = tuple(sorted(generator.sample(range(1, depths["vision"] + 1), len(chosen["vision"]))))
    if depths["vision"] == depths["text"] and len(chosen["vision"]) == len(chosen["text"]):
        return vision, vision
    text = tuple(sorted(generator.sample(range(1, depths["text"] + 1), len(chosen["text"]))))
    return vision, text


def _placements(
    kind: str,
    chosen: Mapping[str, Sequence[int]],
    depths: Mapping[str, int],
    count: int,
    seed: int,
) -> Iterator[tuple[Blocks, Blocks]]:
    v, t = depths["vision"], depths["text"]
    if kind == "paper":
        yield _span(v - round(v * 2 / 3) + 1, v), _span(t - round(t * 2 / 3) + 1, t)
    elif kind == "all":
        yield _span(1, v), _span(1, t)
    elif kind == "lower":
        yield _span(1, v // 2), _span(1, t // 2)
    elif kind == "upper":
        yield _span(v // 2 + 1, v), _span(t // 2 + 1, t)
    elif kind == "start":
        for start in range(1, max(v, t) + 1):
            yield (
                _span(scaled_start(start, max(v, t), v), v),
                _span(scaled_start(start, max(v, t), t), t),
            )
    elif kind == "single":
        for block in range(1, max(v, t) + 1):
            yield (scaled_block(block, max(v, t), v),), (scaled_block(block, max(v, t), t),)
    elif kind == "random":
        generator = random.Random(seed)
        for _ in range(count):
            yield _random_blocks(generator, chosen, depths)
    elif kind == "vision":
        yield tuple(chosen["vision"]), ()
    else:
        yield (), tuple(chosen["text"])


def competitors(
    chosen: Mapping[str, Sequence[int]],
    depths: Mapping[str, int],
    kinds: Iterable[str] = DEFAULT_KINDS,
    *,
    random_count: int = 3,
    seed: int = 0,
) -> list[Competitor]:
    """Return the chosen placement and its competitors, each distinct placement once.

    Args:
        chosen: Adapted blocks, `vision` and `text`.
        depths: Number of blocks of each tower, `vision` and `text`.
        kinds: Names of `KINDS`.
        random_count: How many random placements the kind `random` adds.
        seed: Seed of those.

    Raises:
        UserError: A kind is unknown, or the choice names a block that a tower lacks.
    """
    for tower in ("vision", "text"):
        beyond = [b for b in chosen[tower] if not 1 <= b <= depths[tower]]
        if beyond:
            raise UserError(
                f"the choice names {tower} block {beyond[0]}, but the tower has blocks 1 to "
                f"{depths[tower]}; choose again on this model's scores"
            )
    found: dict[tuple[Blocks, Blocks], list[str]] = {
        (tuple(chosen["vision"]), tuple(chosen["text"])): ["chosen"]
    }
    for kind in kinds:
        check_one_of("kind of placement", kind, KINDS)
        for placed in _placements(kind, chosen, depths, random_count, seed):
            names = found.setdefault(placed, []) if any(placed) else []
            if kind not in names:
                names.append(kind)
    return [Competitor("+".join(names), *placed) for placed, names in found.items()]
