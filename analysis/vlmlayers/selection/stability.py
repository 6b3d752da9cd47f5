"""How stable a choice is: the rule run again on resampled score tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vlmlayers.errors import UserError
from vlmlayers.placement import describe_blocks
from vlmlayers.scores.reading import POOLED
from vlmlayers.selection.choice import OFTEN, SELDOM, borne
from vlmlayers.selection.curves import WIDE, BlockTable
from vlmlayers.selection.rules import Picks, Rule
from vlmlayers.words import percent

HOW = (
    "seeds drawn with replacement; each value moved by a normal draw whose deviation is that of "
    "its interval: one draw for all seeds, which share their items, and one for each position, "
    "which is cautious, since positions share them too"
)
SHOWN = 3  # choices without a dataset that are named
# Columns that tell what a value is of, all but the seed.
_PLACE = ("metric", "dataset", "split", "tower", "position", "space", "pooling", "other_tower",
          "other_position")  # fmt: skip


@dataclass(frozen=True)
class Resampler:
    """Draws score tables that could have come out instead of this one.

    Attributes:
        table: The table as measured.
        unseeded: Row numbers of what was computed without a seed, which is part of every draw.
        seeded: Seed → row numbers, for all metrics of datasets that have the same seeds.
        places: (row,) number of what the value is of, the same for all its seeds.
        deviation: (row,) standard deviation read off the interval; 0 where there is none.
    """

    table: BlockTable
    unseeded: np.ndarray
    seeded: Sequence[Mapping[int, np.ndarray]]
    places: np.ndarray
    deviation: np.ndarray

    @classmethod
    def of(cls, table: BlockTable) -> Resampler:
        """Prepare a table for resampling."""
        low, high = (table.scores[name].to_numpy(float) for name in ("low", "high"))
        # A 95 % interval read as that of a normal value.
        width = (high - low) / WIDE
        seeds = table.scores["seed"].to_numpy(int)
        # Numbered by what they are called, so that the order of rows changes no draw.
        named = [name for name in _PLACE if name in table.scores]
        places = table.scores[named].astype(str).groupby(named, sort=True).ngroup().to_numpy()
        return cls(
            table,
            np.flatnonzero(seeds < 0),
            _by_seeds(table, seeds),
            places,
            np.where(np.isfinite(width), width, 0.0),
        )

    def draw(self, generator: np.random.Generator) -> BlockTable:
        """Return one resampled table."""
        picked = [self.unseeded]
        for by_seed in self.seeded:
            drawn = generator.choice(list(by_seed), size=len(by_seed))
            picked += [by_seed[int(seed)] for seed in drawn]
        rows = np.concatenate(picked)
        # Seeds split the same items anew: their mean is as uncertain as each of them is.
        noise = generator.standard_normal(int(self.places.max(initial=-1)) + 1)
        values = self.table.values[rows] + noise[self.places[rows]] * self.deviation[rows]
        return replace(self.table, rows=rows, values=values)


def _by_seeds(table: BlockTable, seeds: np.ndarray) -> list[dict[int, np.ndarray]]:
    """Return the row numbers of each seed, once for all metrics of datasets with the same seeds.

    A draw among the seeds of all would leave out what has none of those drawn.
    """
    names = ["metric", "dataset"]
    of = table.scores[names].astype(str).groupby(names).ngroup().to_numpy()
    alike: dict[tuple[int, ...], list[int]] = {}
    for one in np.unique(of[seeds >= 0]):
        own = tuple(np.unique(seeds[(of == one) & (seeds >= 0)]).tolist())
        alike.setdefault(own, []).append(one)
    return [
        {seed: np.flatnonzero((seeds == seed) & np.isin(of, alike[own])) for seed in own}
        for own in sorted(alike)
    ]


def stability(
    rule: Callable[[BlockTable], Picks], table: BlockTable, resamples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Return, per tower, how often each block is chosen and where the choice starts.

    Which rows a shipped rule reads is settled on the table as measured.

    Returns:
        tower → `frequency` (block,), `start` with `low` and `high` (95 % interval over the
        resamples that chose anything; None where none did), `same` (share of resamples with
        exactly this choice), `empty` (share that chose nothing) and `without` (the blocks that a
        shipped rule chooses without a dataset, for each that leaves others).
    """
    resampler = Resampler.of(table)
    generator = np.random.default_rng(seed)
    # Before any draw: it settles which rows are read, and all draws read the same.
    base = rule(table)
    draws = [rule(resampler.draw(generator)) for _ in range(resamples)]
    # Code of the user's own may need a dataset, and would fail here after it has served.
    shipped = isinstance(rule, Rule)
    without = {}
    for name, part in (_without_each(table) if shipped else {}).items():
        with suppress(UserError):  # the rule reads something that this dataset alone has
            without[name] = rule(part)
    found = {}
    for tower, depth in table.blocks.items():
        chosen = [draw[tower].blocks for draw in draws]
        starts = [picked[0] for picked in chosen if picked]
        counts = np.zeros(depth)
        for picked in chosen:
            counts[np.asarray(picked, dtype=int) - 1] += 1
        # A block that was drawn, not a number between two blocks.
        low, high = np.quantile(starts, (0.025, 0.975), method="inverted_cdf") if starts else (0, 0)
        found[tower] = {
            "frequency": (counts / max(1, resamples)).tolist(),
            "start": {
                "value": base[tower].blocks[0] if base[tower].blocks else None,
                "low": int(low) or None,
                "high": int(high) or None,
            },
            "same": float(np.mean([picked == base[tower].blocks for picked in chosen])),
            "empty": float(np.mean([not picked for picked in chosen])),
            "without": {name: list(picks[tower].blocks) for name, picks in without.items()},
        }
    return found


def _without_each(table: BlockTable) -> dict[str, BlockTable]:
    """Return the table without each dataset in turn; none where that leaves no dataset."""
    datasets = table.scores["dataset"].astype(str).to_numpy()
    names = [str(name) for name in np.unique(datasets) if name != POOLED]
    if len(names) < 2:
        return {}
    kept = {name: np.flatnonzero(datasets != name) for name in names}
    return {
        name: replace(table, rows=rows, values=table.values[rows]) for name, rows in kept.items()
    }


def doubts(tower: str, depth: int, chosen: tuple[int, ...], found: Mapping[str, Any]) -> list[str]:
    """Return the reasons, if any, why resampling does not support the choice in a tower.

    Args:
        tower: Its name.
        depth: Its number of blocks.
        chosen: The blocks chosen on the scores as measured.
        found: What `stability` found for it.
    """
    share = {block: float(one) for block, one in enumerate(found["frequency"], 1)}
    unsure = [block for block, one in share.items() if SELDOM < one < OFTEN]
    seldom = [block for block in chosen if share[block] <= SELDOM]
    often = [block for block, one in share.items() if one >= OFTEN and block not in chosen]
    reasons = []
    for blocks, words in (
        (unsure, "could be chosen or not (chosen in {} of the resamples)"),
        (seldom, "chosen here, but in only {} of the resamples"),
        (often, "left out here, but chosen in {} of the resamples"),
    ):
        if blocks:
            shares = percent(*(share[block] for block in blocks))
            noun = "blocks" if len(blocks) > 1 else "block"
            reasons.append(f"{tower} {noun} {describe_blocks(blocks)} {words.format(shares)}")
    reasons += _of_one_dataset(tower, depth, chosen, found["without"])
    start = found["start"]
    if start["low"] is not None and start["high"] - start["low"] > depth / 3:
        reasons.append(f"the {tower} start lies anywhere in {start['low']}–{start['high']}")
    value = start["value"]
    if None not in (value, start["low"]) and not start["low"] <= value <= start["high"]:
        at = "–".join(map(str, dict.fromkeys((start["low"], start["high"]))))
        reasons.append(
            f"95 % of the resamples that choose any {tower} block start at {at}, "
            f"not at {value} as here"
        )
    if chosen and found["empty"] > 0.05:
        reasons.append(f"{percent(found['empty'])} of the resamples choose no {tower} block")
    if not chosen and found["empty"] < 0.95:
        some = percent(1 - found["empty"])
        reasons.append(f"{some} of the resamples choose a {tower} block, and here none is chosen")
    return reasons


def _of_one_dataset(
    tower: str, depth: int, chosen: tuple[int, ...], without: Mapping[str, Sequence[int]]
) -> list[str]:
    """Return that blocks are chosen or left out because of single datasets, where they are."""
    hang = [b for b in range(1, depth + 1) if not borne(b, b in chosen, without)]
    if not hang:
        return []
    others = [
        f"without {name} the rule chooses {describe_blocks(blocks)}"
        for name, blocks in without.items()
        if any((b in blocks) != (b in chosen) for b in hang)
    ]
    more = ", …" if len(others) > SHOWN else ""
    noun, verb = ("blocks", "hang") if len(hang) > 1 else ("block", "hangs")
    return [
        f"{tower} {noun} {describe_blocks(hang)} {verb} on single datasets: "
        f"{', '.join(others[:SHOWN])}{more}"
    ]
