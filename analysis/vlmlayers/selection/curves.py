"""From a tidy score table to arrays over blocks: what the rules and placement scores compute on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from vlmlayers.errors import UserError, check_one_of
from vlmlayers.metrics.checks import Array
from vlmlayers.positions import TOWERS
from vlmlayers.scores.reading import (
    Reading,
    bare,
    ceiling,
    check_metric,
    has_curve,
    metric_names,
    other_tower,
    partner_block,
    partnered,
)

if TYPE_CHECKING:
    import pandas as pd

Places = NDArray[np.int64]
T = TypeVar("T")
EXACT = 1e-9  # share by which rounding may part equal means, or a block from its threshold
NO_AGREEMENT = "choose with agreement_metric='none'"
WIDE = 2 * 1.959963984540054  # standard deviations that a 95 % interval spans


class NoValues(UserError):
    """A metric was not computed, or not at some block; another one may be."""


@dataclass(frozen=True, eq=False)
class BlockTable:
    """A score table, or a resample of it, as curves and matrices over blocks.

    Which rows make which block is looked up once, on the table as measured, and shared by all
    resamples: what is left for each of them is a mean.

    Attributes:
        scores: Score table of one model, rows numbered from 0.
        blocks: Depth by tower.
        rows: (drawn,) row numbers; one that was drawn twice stands here twice.
        values: (drawn,) value of each.
        found: What was looked up.
        refused: What was not computed, and why, as `refusals` has it.
    """

    scores: pd.DataFrame
    blocks: Mapping[str, int]
    rows: NDArray[np.int64]
    values: Array
    found: dict[tuple[str, ...], Any] = field(default_factory=dict, repr=False)
    refused: Sequence[Mapping[str, str]] = ()

    @classmethod
    def of(
        cls,
        scores: pd.DataFrame,
        blocks: Mapping[str, int],
        refused: Sequence[Mapping[str, str]] = (),
    ) -> BlockTable:
        """Return a table as it was measured."""
        # Row numbers index arrays from here on.
        table = bare(scores).reset_index(drop=True)
        values = table["value"].to_numpy(float)
        return cls(table, blocks, np.arange(len(table)), values, refused=refused)

    def frame(self) -> pd.DataFrame:
        """Return the rows as a score table."""
        return self.scores.iloc[self.rows].assign(value=self.values)

    def metric_names(self) -> list[str]:
        """Return the metrics of the table."""
        return self._once(("metrics",), lambda: metric_names(self.scores))

    def has_curve(self, metric: str, tower: str) -> bool:
        """Return whether a metric has values of its own at the blocks of a tower."""
        look = partial(has_curve, self.scores, metric, tower)
        return self._once(("has curve", metric, tower), look)

    def curve(self, metric: str, tower: str) -> Array:
        """Return a metric at every block of a tower, (block,), averaged over seeds and datasets.

        Raises:
            UserError: The metric is unknown, absent from this tower, or has no value at some block.
        """
        place = self._once(("curve", metric, tower), partial(self._block_of, metric, tower))
        curve, count = self._means(place, self.values, self.blocks[tower])
        what = f"{metric} of the {tower} tower"
        missing = [str(block + 1) for block in np.flatnonzero(count == 0)]
        if missing:
            why = self.reason(metric, tower) or self.reason(metric, tower, missing[0])
            text = (
                f"{what} has no value at block {', '.join(missing[:6])}"
                f"{', …' if len(missing) > 6 else ''}"
            )
            if why or len(missing) == self.blocks[tower]:
                raise NoValues(f"{text}: {why}" if why else text)
            raise UserError(f"{text}; score every block first")
        if not np.isfinite(curve).all():
            raise UserError(
                f"{what} is not finite at block "
                f"{int(np.flatnonzero(~np.isfinite(curve))[0]) + 1}; repair it, or leave its "
                "dataset out"
            )
        blocks = np.arange(self.blocks[tower])
        self._once(
            ("even", metric, tower),
            partial(self._refuse_uneven, what, place, blocks, lambda b: f"at block {b + 1}"),
        )
        return curve

    def _refuse_uneven(
        self, what: str, place: Places, cells: Places, where: Callable[[int], str]
    ) -> None:
        """Refuse a dataset that lacks a cell, or seeds: means of others there rank no blocks.

        Args:
            what: What the values are of.
            place: Cell of each row of the table, or −1.
            cells: The cells that each dataset has to have.
            where: Cell → where it is, in words.
        """
        if "seed" in self.scores:
            rows = self.scores[place >= 0]
            by_cell = [rows["dataset"].astype(str), place[place >= 0]]
            seeds = rows.groupby(by_cell)["seed"].nunique()
            ends = (int(seeds.argmax()), int(seeds.argmin()))
            (most, more), (fewest, less) = ((seeds.index[i], int(seeds.iloc[i])) for i in ends)
            if more > less:
                raise UserError(
                    f"{what} has {more} seeds of {most[0]} {where(most[1])} and {less} of "
                    f"{fewest[0]} {where(fewest[1])}, so that one would weigh more; score "
                    "them with the same seeds"
                )
        for name, cell in self._lacking(place, cells):
            raise UserError(_uneven(what, name, where(cell)))

    def _lacking(self, place: Places, cells: Places) -> Iterator[tuple[str, int]]:
        """Yield each dataset and cell of some that it has no row of."""
        used = place >= 0
        names, rows = np.unique(
            self.scores["dataset"].astype(str).to_numpy()[used], return_inverse=True
        )
        there = np.zeros((len(names), int(cells.max()) + 1), dtype=bool)  # (dataset, cell)
        there[rows, place[used]] = True
        for name, cell in zip(*np.nonzero(~there[:, cells])):
            yield str(names[name]), int(cells[cell])

    def ceiling(self, metric: str, tower: str) -> float:
        """Return the best value that a metric can have on a tower, below 1 with shared prompts."""
        return self._once(("ceiling", metric, tower), partial(ceiling, self.scores, metric, tower))

    def interval_widths(self, metric: str, tower: str) -> Array:
        """Return how wide the interval of a curve is, (block,); NaN where there is none.

        Of agreement it is of every pair of blocks, (vision block · text block). Datasets have items
        of their own, so that their mean is surer than each of them; seeds share theirs, and their
        mean is not.
        """
        ends = self.scores
        width = self._once(("widths",), lambda: (ends["high"] - ends["low"]).to_numpy(float))
        dataset, count = self._once(("datasets",), self._datasets)
        if self.has_curve(metric, tower):
            cells = self.blocks[tower]
            place = self._once(("curve", metric, tower), partial(self._block_of, metric, tower))
        else:
            shape = self.blocks.get("vision", 0), self.blocks.get("text", 0)
            cells = shape[0] * shape[1]
            place = self._once(("agreement", metric), partial(self._pair_of, metric, shape))
        cell = np.where(np.isnan(width) | (place < 0), -1, dataset * cells + place)
        means, found = self._means(cell, width[self.rows], count * cells)
        squares = np.where(found, np.square(means), 0.0).reshape(count, cells)  # (dataset, cell)
        with np.errstate(invalid="ignore"):
            widths: Array = np.sqrt(squares.sum(0)) / (found.reshape(count, cells) > 0).sum(0)
        return widths

    def _datasets(self) -> tuple[Places, int]:
        """Return the number of each row's dataset, and how many there are."""
        names, number = np.unique(self.scores["dataset"].astype(str), return_inverse=True)
        return number, len(names)

    def agreement(self, metric: str) -> Array:
        """Return agreement between every vision and every text block, (vision block, text block).

        Cells that were not measured are NaN.

        Raises:
            UserError: The table holds no value of this metric between the towers.
        """
        shape = self.blocks.get("vision", 0), self.blocks.get("text", 0)
        place = self._once(("agreement", metric), partial(self._pair_of, metric, shape))
        matrix, count = self._means(place, self.values, shape[0] * shape[1])
        if count.any():
            # A pair that no dataset has is for the reader of the matrix to miss.
            known = np.flatnonzero(np.bincount(place[place >= 0], minlength=count.size))
            where = partial(_between, shape[1])
            self._once(("even", metric), partial(self._refuse_uneven, metric, place, known, where))
        else:
            why = self.reason(metric)
            raise UserError(
                f"the score table has no {metric} between vision and text blocks"
                f"{f' ({why}); ' if why else '; score it with both towers, or '}{NO_AGREEMENT}"
            )
        return matrix.reshape(shape)

    def check(self, metric: str, instead: str = "") -> None:
        """Raise a UserError where the table has no such metric; says why, where that is known.

        `instead` is that of `check_metric`.
        """
        if metric not in self.metric_names() and (why := self.reason(metric)):
            raise NoValues(f"{metric} was not computed: {why}")
        check_metric(self.scores, metric, instead)

    def reason(self, metric: str, tower: str = "", position: str = "") -> str:
        """Return why a metric has no value in a tower, or in none; empty where nothing is known.

        Without a position only reasons count that are of the whole tower.
        """
        notes = (n for n in self.refused if (n["metric"], n["position"]) == (metric, position))
        reasons = (note["reason"] for note in notes if not tower or note["tower"] in ("", tower))
        return next(reasons, "")

    def _once(self, key: tuple[str, ...], look: Callable[[], T]) -> T:
        if key not in self.found:
            self.found[key] = look()
        found: T = self.found[key]
        return found

    def _means(self, place: Places, values: Array, cells: int) -> tuple[Array, Places]:
        """Return the mean and number of the values in each cell; NaN where there are none."""
        cell = place[self.rows]
        used = cell >= 0
        # By bincount and not by groupby: a rule runs on hundreds of resamples of the table.
        count = np.bincount(cell[used], minlength=cells)
        total = np.bincount(cell[used], values[used], minlength=cells)
        # 0 / 0 is how an empty cell becomes NaN.
        with np.errstate(invalid="ignore"):
            return total / count, count

    def _block_of(self, metric: str, tower: str) -> Places:
        """Return for each row of the table the block whose value it helps to make, or −1."""
        self.check(metric)
        depth = self.blocks[tower]
        # Agreement within a tower may be pooled where that of the towers is not, and is not read.
        scores = self.scores[self.scores["other_tower"].astype(str) != tower]
        rows = partnered(Reading().rows(scores, metric, tower), tower, self.blocks)
        place = np.full(len(self.scores), -1)
        place[rows.index] = [_block(name, depth) for name in rows["position"]]
        return place

    def _pair_of(self, metric: str, shape: tuple[int, int]) -> Places:
        """Return for each row of the table the pair of blocks that it relates, or −1."""
        self.check(metric, NO_AGREEMENT)
        place = np.full(len(self.scores), -1)
        for tower in TOWERS:
            across = self.scores["other_tower"].astype(str) == other_tower(tower)
            rows = Reading().rows(self.scores[across], metric, tower)
            columns = ("position", "other_position")
            for row, *names in zip(rows.index, *(rows[name] for name in columns)):
                vision, text = names if tower == "vision" else names[::-1]
                pair = _block(vision, shape[0]), _block(text, shape[1])
                if min(pair) >= 0:
                    place[row] = pair[0] * shape[1] + pair[1]
        return place


def _between(texts: int, pair: int) -> str:
    """Return which blocks a pair is of, in words; `texts` is the number of text blocks."""
    vision, text = divmod(pair, texts)
    return f"between vision block {vision + 1} and text block {text + 1}"


def _uneven(what: str, dataset: str, where: str) -> str:
    return (
        f"{what} has no value of {dataset} {where}, where it is a mean over other datasets than "
        f"elsewhere; score that too, or leave {dataset} out"
    )


def _block(position: object, depth: int) -> int:
    """Return the number of a block counted from 0, or −1 for what is not a block."""
    name = str(position)
    return int(name) - 1 if name.isdecimal() and 0 < int(name) <= depth else -1


def agreement_curve(
    matrix: Array,
    tower: str,
    partner: str = "depth",
    reason: Callable[[str, str], str] = lambda tower, block: "",
) -> Array:
    """Return the agreement of each block of a tower with the other tower, (block,).

    Args:
        matrix: (vision block, text block), as from `BlockTable.agreement`.
        tower: The tower whose blocks are asked about.
        partner: `depth` reads the block of equal relative depth, where MMA couples the towers;
            `max` takes the best block of the other tower, which is biased upwards.
        reason: Why a block of a tower has no value, where that is known.

    Raises:
        UserError: A block has no agreement with its partner, or with any block.
    """
    check_one_of("partner", partner, ("depth", "max"))
    cells = matrix if tower == "vision" else matrix.T
    own, other = cells.shape
    partners = [partner_block(b, own, other) for b in range(1, own + 1)]
    whom, advice = "any block of the other tower", "score every block pair"
    if partner == "depth":
        cells = cells[np.arange(own), np.array(partners) - 1, None]
        whom, advice = "its partner at equal depth", f"{advice} or choose with partner=max"
    lost = np.isnan(cells).all(axis=1)
    if lost.any():
        block = int(np.flatnonzero(lost)[0]) + 1
        why = reason(tower, str(block)) or reason(other_tower(tower), str(partners[block - 1]))
        raise UserError(
            f"agreement of {tower} block {block} with {whom} "
            + (f"has no value: {why}" if why else f"was not measured; {advice}")
        )
    best: Array = np.nanmax(cells, axis=1)
    return best


def curve_of(table: BlockTable, metric: str, tower: str) -> Array:
    """Return a metric at every block, (block,): its own, or that of agreement with the partner."""
    if table.has_curve(metric, tower):
        return table.curve(metric, tower)
    return agreement_curve(table.agreement(metric), tower, reason=partial(table.reason, metric))


def is_flat(curve: Array) -> bool:
    """Return whether all values are one, up to what rounding leaves of means."""
    return bool(np.ptp(curve) <= EXACT * np.abs(curve).max())


def normalise(curve: Array) -> Array:
    """Return (value − lowest) / (highest − lowest); all zero where the curve is flat."""
    if is_flat(curve):
        return np.zeros_like(curve)
    scaled: Array = (curve - curve.min()) / np.ptp(curve)
    return scaled
