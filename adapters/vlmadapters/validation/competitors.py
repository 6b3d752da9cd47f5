"""Competitors of a choice: the placements that a validation trains beside it."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vlmadapters.methods.config import MethodConfig
from vlmadapters.validation.options import DEFAULT_KINDS, KINDS
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.placement import Placement
from vlmlayers.positions import TOWERS
from vlmlayers.scores.reading import partner_block
from vlmlayers.selection import paper_blocks

LOG = logging.getLogger(__name__)
Blocks = tuple[int, ...]


@dataclass(frozen=True)
class Competitor:
    """A placement and why it is trained.

    Attributes:
        kind: `chosen` or a name of `KINDS`; several joined by `+` where they coincide.
        placement: The blocks.
    """

    kind: str
    placement: Placement


def scaled_start(start: int, blocks: int, other: int) -> int:
    """Return the start block that leaves the same share of blocks frozen."""
    # round() takes halves to the even number: of 24 and 12 blocks some starts of the lower tower
    # would meet three of the deeper one, others one.
    return min(other, 1 + math.ceil((start - 1) * other / blocks - 0.5))


def _span(start: int, last: int) -> Blocks:
    return tuple(range(start, last + 1))


def _random_blocks(
    generator: random.Random, chosen: Placement, depths: Mapping[str, int]
) -> Placement:
    """Draw as many blocks per tower as chosen, as many of them in both towers as chosen."""
    # A block that is adapted in both towers shares parameters in MMA and in MaPLe, so equal counts
    # alone would not be an equal number of parameters.
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
    kind: str,
    chosen: Placement,
    depths: Mapping[str, int],
    method: MethodConfig | None,
    count: int,
    seed: int,
) -> Iterator[Placement]:
    v, t = depths["vision"], depths["text"]
    if kind == "paper" and method is not None:
        published = method.published(depths)
        yield Placement(published.vision, published.text)
    elif kind == "paper":
        yield Placement(paper_blocks(v), paper_blocks(t))
    elif kind == "all":
        yield Placement(_span(1, v), _span(1, t))
    elif kind == "lower":
        yield Placement(_span(1, v // 2), _span(1, t // 2))
    elif kind == "upper":
        yield Placement(_span(v // 2 + 1, v), _span(t // 2 + 1, t))
    elif kind == "last":
        yield Placement((v,), (t,))
    # Counted in the deeper tower, so that no start of it is left out.
    elif kind == "start":
        for start in range(1, max(v, t) + 1):
            yield Placement(
                _span(scaled_start(start, max(v, t), v), v),
                _span(scaled_start(start, max(v, t), t), t),
            )
    elif kind == "single":
        for block in range(1, max(v, t) + 1):
            vision, text = (partner_block(block, max(v, t), depth) for depth in (v, t))
            yield Placement((vision,), (text,))
    elif kind == "random":
        # Drawn in one sequence: more random placements leave the first ones as they were.
        generator = random.Random(seed)
        for _ in range(count):
            yield _random_blocks(generator, chosen, depths)
    elif kind == "vision":
        yield Placement(vision=chosen.vision)
    else:
        yield Placement(text=chosen.text)


def chosen_placement(method: MethodConfig, choice: Any) -> Placement:
    """Return where a method acts by a choice: in the towers that it can be placed in.

    Args:
        method: Settings of the method.
        choice: A `LayerChoice` or other value with `vision` and `text` blocks. A placement, as text
            or value, is meant for this method and has to fit it. A search may choose no block.

    Raises:
        UserError: It is none of these, names no block or an amount, or the method cannot act there.
    """
    if isinstance(choice, str):
        choice = Placement.parse(choice)
    if not hasattr(choice, "vision") or not hasattr(choice, "text"):
        raise UserError(
            "validate: choice takes a layer choice or a placement such as '5-12', not "
            f"{type(choice).__name__}"
        )
    if isinstance(choice, Placement) and choice.amount:
        raise UserError(
            f"validate trains every placement at the same amounts; leave @{choice.amount} out of "
            f"the placement and give --amounts {choice.amount}, which are tuned for each"
        )
    blocks = {"vision": tuple(choice.vision), "text": tuple(choice.text)}
    if not any(blocks.values()):
        if getattr(choice, "rule", "") == "search":
            return Placement()
        raise UserError("the choice adapts no block in either tower; there is nothing to train")
    if isinstance(choice, Placement):
        placed = method.with_placement(**blocks)
    else:
        placed = method.from_choice(blocks, **method.settings())
    return Placement(placed.vision, placed.text)


def competitors(
    chosen: Placement,
    depths: Mapping[str, int],
    kinds: Iterable[str] = DEFAULT_KINDS,
    *,
    method: MethodConfig | None = None,
    random_count: int = 3,
    seed: int = 0,
) -> list[Competitor]:
    """Return the chosen placement and its competitors, each distinct placement once.

    Args:
        chosen: The chosen placement.
        depths: Number of blocks of each tower, `vision` and `text`.
        kinds: Names of `KINDS`.
        method: Settings of the method that is placed: its published placement is the kind `paper`,
            and placements are those of its towers that it can take. Any of both towers where None.
        random_count: How many random placements the kind `random` adds.
        seed: Seed of those.

    Raises:
        UserError: A kind is unknown, or the choice names a block that a tower lacks.
    """
    # The choice stands first: a competitor at the same blocks adds its kind and is not trained
    # a second time.
    found = {chosen.check(depths, "the choice"): ["chosen"]}
    for kind in kinds:
        check_one_of("kind of placement", kind, KINDS)
        for any_tower in _placements(kind, chosen, depths, method, random_count, seed):
            placed = any_tower if method is None else _within(method, any_tower, kind)
            names = found.setdefault(placed, []) if placed else []
            if kind not in names:
                names.append(kind)
    return [Competitor("+".join(names), placed) for placed, names in found.items()]


def _within(method: MethodConfig, placed: Placement, kind: str) -> Placement:
    """Return the part of a placement that lies in a method's towers; none where it refuses it."""
    blocks = {tower: placed.blocks(tower) if tower in method.towers else () for tower in TOWERS}
    if not any(blocks.values()):
        return Placement()
    try:
        method.with_placement(**blocks)
    except UserError as error:
        LOG.info("no competitor %s: %s", kind, error)
        return Placement()
    return Placement(blocks["vision"], blocks["text"])
