"""Rules that choose layers: each a small dataclass whose call takes a table of blocks.

A rule returns a `Pick` per tower: the blocks, and the numbers that led to them. `select` adds how
stable the pick is. High dataset accuracy marks blocks whose features are specific to a dataset;
high agreement marks blocks where the towers represent the same content. MMA adapts blocks that are
both and leaves the general lower blocks frozen; the rules `threshold`, `knee` and `budget` state
that in three ways.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from vlmlayers.arguments import Count, Natural, Share, checked
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.files import read_json
from vlmlayers.placement import Placement, parse_blocks
from vlmlayers.positions import TOWERS
from vlmlayers.runs import Run
from vlmlayers.selection.curves import (
    EXACT,
    WIDE,
    Array,
    BlockTable,
    agreement_curve,
    curve_of,
    is_flat,
    normalise,
)
from vlmlayers.selection.knee import fit_knee
from vlmlayers.selection.per_block import metrics_of, score_blocks

# What larger values of some metrics mean.
DISTANCES = ("less alike", "wider gap")


@dataclass(frozen=True)
class Pick:
    """Blocks of one tower and the numbers that led to them.

    Attributes:
        blocks: Chosen blocks, from 1, ascending.
        values: metric → {`value`: per block, and `normalised`, `threshold`, … where used}.
        notes: Reasons to doubt the pick that the rule itself can see.
        details: What else the rule found, such as the fit of a curve.
    """

    blocks: tuple[int, ...]
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)


Picks = dict[str, Pick]


class Rule:
    """What all rules have; each is called with a table of blocks."""

    def reads(self, towers: Collection[str]) -> tuple[str, ...]:
        """Return the metrics without which the rule fails on these towers, as far as it says."""
        return ()


@cache
def _range_quantile(n: int) -> float:
    """Return the 95 % quantile of the range of n independent standard normal values, by bisection.

    The range is at most q with probability n ∫ φ(z) (Φ(z + q) − Φ(z))ⁿ⁻¹ dz.
    """
    # Not by scipy.stats, whose import takes a third of all that `select` takes.
    z = np.linspace(-8.0, 8.0, 401)
    density = n * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])

    def below(points: Array) -> Array:
        return np.array([math.erf(point / math.sqrt(2)) for point in points]) / 2

    low, high = 0.0, 20.0
    while high - low > 1e-9:
        q = (low + high) / 2
        probability = density @ (below(z + q) - below(z)) ** (n - 1)
        low, high = (q, high) if probability < 0.95 else (low, q)
    return low


def _doubts_of(table: BlockTable, metric: str, tower: str, curve: Array) -> list[str]:
    """Return why a curve ranks no blocks: it is flat, or varies no more than noise may make it.

    That is the 95 % quantile of the range of so many values of one mean, whose errors are as wide
    as the intervals say: the studentized range. Errors that blocks share make it too large, as
    items that are hard for all of them do, so that a curve is doubted rather than trusted.

    Reference: Tukey, The problem of multiple comparisons, 1953.
    """
    if is_flat(curve):
        return [f"{metric} is the same at every {tower} block"]
    widths = table.interval_widths(metric, tower)
    widths, span = widths[~np.isnan(widths)], float(np.ptp(curve))
    # The median: a single wide interval says little of the curve.
    width = float(np.median(widths)) if len(widths) else 0.0
    limit = width / WIDE * _range_quantile(len(curve))
    if span >= limit:
        return []
    most = table.ceiling(metric, tower)
    bound = f"; at most {most:.2g} can be reached, as datasets share prompts" if most < 1 else ""
    return [
        f"{metric} of the {tower} tower varies by {span:.2g} over its blocks, where equal "
        f"ones vary by up to {limit:.2g} with 95 % intervals {width:.2g} wide{bound}"
    ]


def _refuse_distance(agreement_metric: str) -> None:
    """Refuse a metric that grows where towers agree less: the rule would choose those blocks."""
    if agreement_metric in ("none", Threshold.agreement_metric):
        return
    # Late: metrics bring scipy, and a wrong option is said before that.
    from vlmlayers.metrics.table import METRICS

    found = METRICS.get(agreement_metric)
    if found and found.direction in DISTANCES:
        raise UserError(
            f"a larger {agreement_metric} means {found.direction}, and agreement_metric takes what "
            f"is larger where towers agree, such as {Threshold.agreement_metric}"
        )


def _passing(mask: Array) -> tuple[int, ...]:
    return tuple(int(b) + 1 for b in np.flatnonzero(mask))


@checked
@dataclass(frozen=True)
class Threshold(Rule):
    """Blocks whose discriminability, and agreement where it counts, pass a share of their range.

    The range of each curve is that of the tower's blocks 1..L, since `embed` cannot be adapted and
    is at chance by construction under `cls`.

    Attributes:
        accuracy: Share of the range of `metric` that a block must reach.
        agreement: Share of the range of `agreement_metric` that a block must reach.
        metric: Metric of discriminability.
        agreement_metric: Metric between the towers, larger where they agree; `none` leaves
            agreement out.
        partner: `depth` or `max`, see `agreement_curve`.
        fill: Whether blocks between chosen ones are chosen as well.
    """

    accuracy: Share = 0.5
    agreement: Share = 0.5
    metric: str = "dataset_accuracy"
    agreement_metric: str = "cka_debiased"
    partner: str = "depth"
    fill: bool = False

    def __post_init__(self) -> None:
        check_one_of("partner", self.partner, ("depth", "max"))
        _refuse_distance(self.agreement_metric)
        self.reads(TOWERS)

    def reads(self, towers: Collection[str]) -> tuple[str, ...]:
        """Return both metrics, or the first alone where there is nothing to agree with.

        Raises:
            UserError: There is nothing to agree with, and an option of the agreement is set.
        """
        if self.agreement_metric != "none" and len(towers) > 1:
            return self.metric, self.agreement_metric
        why = "agreement_metric is none" if len(towers) > 1 else "there is one tower alone"
        for name in ("agreement", "partner"):
            if getattr(self, name) != getattr(type(self), name):
                raise UserError(f"{name} is of agreement between towers, and {why}; leave it out")
        return (self.metric,)

    def __call__(self, table: BlockTable) -> Picks:
        """Return the pick of each tower."""
        agree = self.reads(table.blocks)[1:]
        matrix = table.agreement(self.agreement_metric) if agree else None
        return {tower: self._pick(table, tower, matrix) for tower in table.blocks}

    def _pick(self, table: BlockTable, tower: str, matrix: Array | None) -> Pick:
        curves = {self.metric: (table.curve(self.metric, tower), self.accuracy)}
        if matrix is not None:
            why = partial(table.reason, self.agreement_metric)
            curve = agreement_curve(matrix, tower, self.partner, why)
            curves[self.agreement_metric] = (curve, self.agreement)
        values, notes = {}, []
        passes = np.ones(table.blocks[tower], dtype=bool)
        for name, (curve, share) in curves.items():
            scaled = normalise(curve)
            passes &= scaled >= share - EXACT
            cut = float(curve.min() + share * (curve.max() - curve.min()))
            values[name] = {
                "value": curve.tolist(),
                "normalised": scaled.tolist(),
                "share": share,
                "threshold": cut,
            }
            notes += _doubts_of(table, name, tower, curve)
        chosen = _passing(passes)
        if self.fill and chosen:
            chosen = tuple(range(chosen[0], chosen[-1] + 1))
        if not chosen:
            together = " together" if len(curves) > 1 else ""
            notes.append(f"no {tower} block passes {' and '.join(curves)}{together}")
        return Pick(chosen, values, tuple(notes))


@checked
@dataclass(frozen=True)
class Knee(Rule):
    """Blocks from the change point of a curve on, by two joined straight lines.

    A tower is in doubt where one straight line fits as well, see `fit_knee`; so it is with a jump
    between two levels, which two joined lines do not fit either.

    Attributes:
        metric: Curve to fit.
    """

    metric: str = "dataset_accuracy"

    def reads(self, towers: Collection[str]) -> tuple[str, ...]:
        """Return the metric of the curve."""
        return (self.metric,)

    def __call__(self, table: BlockTable) -> Picks:
        """Return the pick of each tower."""
        picks = {}
        for tower, depth in table.blocks.items():
            curve = table.curve(self.metric, tower)
            fit = fit_knee(curve)
            notes = _doubts_of(table, self.metric, tower, curve)
            if not fit["better_than_line"]:
                notes.append(
                    f"one straight line fits {self.metric} of the {tower} tower as well as two "
                    f"(p = {fit['p']:.2g})"
                )
            picks[tower] = Pick(
                tuple(range(fit["knee"], depth + 1)),
                {self.metric: {"value": curve.tolist(), "fit": fit["fitted"]}},
                tuple(notes),
                {"knee": fit},
            )
        return picks


@checked
@dataclass(frozen=True)
class Budget(Rule):
    """The best `n` blocks of each tower, or its best span of `n` blocks, by a block score.

    Attributes:
        n: Blocks per tower; 0 takes half of each tower.
        span: True keeps the blocks together.
        score: Name of a block score, see `vlmlayers.selection.BLOCK_SCORES`, or `metric:NAME`,
            whose largest values are the best.
    """

    n: Natural = 0
    span: bool = True
    score: str = "accuracy_x_agreement"

    def reads(self, towers: Collection[str]) -> tuple[str, ...]:
        """Return the metrics of the block score."""
        return metrics_of(self.score)

    def __call__(self, table: BlockTable) -> Picks:
        """Return the pick of each tower."""
        by_tower = score_blocks(table, self.score)
        picks = {}
        for tower, depth in table.blocks.items():
            n = self.n or max(1, depth // 2)
            if n > depth:
                raise UserError(f"a budget of {n} blocks exceeds the {depth} {tower} blocks")
            values = by_tower[tower]
            # Of equal blocks or spans the lower ones, on every machine and in any order of rows:
            # means and sums of equal values differ by rounding.
            even = np.round(values / (np.abs(values).max() or 1.0) / EXACT)
            if self.span:
                # The sum over every span of n blocks.
                first = int(np.argmax(np.convolve(even, np.ones(n), mode="valid"))) + 1
                chosen = tuple(range(first, first + n))
            else:
                chosen = tuple(sorted(int(b) + 1 for b in np.argsort(-even, kind="stable")[:n]))
            notes = [
                note
                for metric in self.reads(table.blocks)
                for note in _doubts_of(table, metric, tower, curve_of(table, metric, tower))
            ]
            picks[tower] = Pick(
                chosen, {self.score: {"value": values.tolist()}}, tuple(notes), {"budget": n}
            )
        return picks


@dataclass(frozen=True)
class Paper(Rule):
    """The upper two thirds of each tower: 5–12 of 12, as MMA hard-codes, scaled to any depth."""

    def __call__(self, table: BlockTable) -> Picks:
        """Return the pick of each tower."""
        return {tower: Pick(paper_blocks(depth)) for tower, depth in table.blocks.items()}


@checked
def paper_blocks(depth: Count) -> tuple[int, ...]:
    """Return the paper's placement scaled to `depth` blocks: 5–12 of 12, 9–24 of 24."""
    return tuple(range(depth // 3 + 1, depth + 1))


@dataclass(frozen=True)
class All(Rule):
    """Every block."""

    def __call__(self, table: BlockTable) -> Picks:
        """Return the pick of each tower."""
        return {tower: Pick(tuple(range(1, depth + 1))) for tower, depth in table.blocks.items()}


@dataclass(frozen=True)
class Explicit(Rule):
    """Blocks named by the user.

    Attributes:
        vision: Blocks such as `5-12` or `3,5-7`, or a sequence of numbers.
        text: The same for the text tower.
    """

    vision: Any = "none"
    text: Any = "none"

    def __call__(self, table: BlockTable) -> Picks:
        """Return the pick of each tower."""
        placed = Placement(parse_blocks(self.vision), parse_blocks(self.text))
        placed.check(table.blocks, "rule 'explicit'")
        return {"vision": Pick(placed.vision), "text": Pick(placed.text)}


@checked
@dataclass(frozen=True)
class Searched(Rule):
    """The placement that a search on training shots picked, or none where training does not pay.

    `vlmlayers search` finds it, and says whether it can be told from the default; see there.

    Attributes:
        file: The `search.json` to read; that of the run where a verb or a study selects.
    """

    file: str = "search.json"

    def __call__(self, table: BlockTable) -> Picks:
        """Return the pick of each tower.

        Raises:
            UserError: There is no search, or it is of another model or other weights (by name, or
                by the hash that its run folder records), or of a method that acts at no block.
        """
        found = self._read()
        ours = {key: str(table.scores[key].iloc[0]) for key in ("model", "weights")}
        # Searches of earlier versions do not say of which weights they are.
        theirs = {key: str(found.get(key, one)) for key, one in ours.items()}
        if theirs != ours:
            named = (f"{one['model']} ({one['weights']})" for one in (theirs, ours))
            raise UserError(
                f"{self.file} is of {', the scores of '.join(named)}; search again on the model "
                "of the scores"
            )
        run = Run(Path(self.file).parent)
        if of := run.other_weights(found):
            raise UserError(
                f"{self.file} is of {of}, the features beside it of other weights of that name; "
                "search again on the model of the scores"
            )
        pick = str(found["pick"])
        if pick == "recipe" or pick.startswith("@"):
            raise UserError(
                f"{self.file} is a search of the amount of {found['method']} alone, which acts at "
                "no block; there is nothing to choose"
            )
        # The scores may be of one tower alone, where the search placed blocks in both.
        depths = {**found.get("towers", {}), **table.blocks}
        placed = Placement.parse(pick).check(depths, self.file)
        return {tower: Pick(placed.blocks(tower)) for tower in depths}

    def evidence(self) -> dict[str, Any]:
        """Return how sure the pick is, its amount, and what the search found."""
        found = self._read()
        doubts = []
        if not found["decided"]:
            doubts.append("the search cannot tell its best setting from the default")
        among = (found.get("difference") or {}).get("among", {})
        if among and among["low"] <= 0 < found["difference"]["low"]:
            doubts.append(
                f"as the best of {among['rivals']} settings, the one that the search picked cannot "
                "be told from the default"
            )
        if found["to_zero_shot"]["adapt"] == "unknown":
            doubts.append("whether training pays at all cannot be told")
        amount = str(Placement.parse(str(found["pick"])).amount)
        kept = {key: value for key, value in found.items() if key not in ("environment", "heats")}
        return {
            "decided": not doubts,
            "doubts": doubts,
            "statement": found["statement"],
            **({"amount": amount} if amount else {}),
            "search": kept,
        }

    def _read(self) -> dict[str, Any]:
        path = Path(self.file)
        if not path.is_file():
            raise UserError(
                f"rule 'search' reads {path}, which does not exist; run `vlmlayers search` with "
                "this run folder as --out, or name another with file="
            )
        found = read_json(path, "the search", "run `vlmlayers search` again")
        missing = {"pick", "decided", "statement", "to_zero_shot", "method"} - set(found)
        if missing:
            lacks = ", ".join(sorted(missing))
            raise UserError(f"{path} lacks {lacks}; run `vlmlayers search` again")
        return found


RULES: dict[str, type[Any]] = {
    "threshold": Threshold,
    "knee": Knee,
    "budget": Budget,
    "paper": Paper,
    "all": All,
    "explicit": Explicit,
    "search": Searched,
}
