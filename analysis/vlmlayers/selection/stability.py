"""How stable a choice is: the rule run again on resampled score tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vlmlayers.placement import describe_blocks
from vlmlayers.selection.choice import OFTEN, SELDOM
from vlmlayers.selection.curves import BlockTable
from vlmlayers.selection.rules import Picks
from vlmlayers.words import percent

HOW = (
    "seeds drawn with replacement; each value moved by a normal draw whose deviation is that of "
    "its interval, independently per row: cautious, since positions share their items"
)
_Z = 1.959963984540054


@dataclass(frozen=True)
class Resampler:
    """Draws score tables that could have come out instead of this one.

    Attributes:
        table: The table as measured.
        rows_by_seed: Row numbers of each seed; seed −1 is always kept.
        deviation: (row,) standard deviation read off the interval; 0 where there is none.
    """

    table: BlockTable
    rows_by_seed: Mapping[int, np.ndarray]
    deviation: np.ndarray

    @classmethod
    def of(cls, table: BlockTable) -> Resampler:
        """Prepare a table for resampling."""
        low, high = (table.scores[name].to_numpy(float) for name in ("low", "high"))
        # A 95 % interval read as that of a normal value.
        width = (high - low) / (2 * _Z)
        seeds = table.scores["seed"].to_numpy(int)
        rows = {int(seed): np.flatnonzero(seeds == seed) for seed in np.unique(seeds)}
        return cls(table, rows, np.where(np.isfinite(width), width, 0.0))

    @property
    def seeds(self) -> list[int]:
        """Seeds that the scores were computed with."""
        return [seed for seed in self.rows_by_seed if seed >= 0]

    def draw(self, generator: np.random.Generator) -> BlockTable:
        """Return one resampled table."""
        # Rows of seed -1 were computed without one and are part of every draw.
        picked = [self.rows_by_seed[-1]] if -1 in self.rows_by_seed else []
        if self.seeds:
            picked += [
                self.rows_by_seed[int(seed)]
                for seed in generator.choice(self.seeds, size=len(self.seeds))
            ]
        rows = np.concatenate(picked)
        noise = generator.standard_normal(len(rows)) * self.deviation[rows]
        return replace(self.table, rows=rows, values=self.table.values[rows] + noise)


def stability(
    rule: Callable[[BlockTable], Picks], table: BlockTable, resamples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Return, per tower, how often each block is chosen and where the choice starts.

    Which rows a shipped rule reads is settled on the table as measured.

    Returns:
        tower → `frequency` (block,), `start` with `low` and `high` (95 % interval over the
        resamples that chose anything; None where none did), `same` (share of resamples with
        exactly this choice) and `empty` (share that chose nothing).
    """
    resampler = Resampler.of(table)
    generator = np.random.default_rng(seed)
    # Before any draw: it settles which rows are read, and all draws read the same.
    base = rule(table)
    draws = [rule(resampler.draw(generator)) for _ in range(resamples)]
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
        }
    return found


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
