"""`select`: a rule by name, run on a score table, with its evidence."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pandas as pd

from vlmlayers.arguments import ENOUGH_DRAWS, Natural, Seed, checked
from vlmlayers.errors import UserError
from vlmlayers.placement import describe_blocks
from vlmlayers.positions import TOWERS
from vlmlayers.scores.reading import (
    POOLED,
    Reading,
    check_bounds,
    check_scores,
    depths,
    is_random,
    refuse_unknown_depth,
    values_mark,
)
from vlmlayers.scores.schema import Scores
from vlmlayers.scores.summaries import DATASET_ACCURACIES, dataset_readout
from vlmlayers.selection.choice import LayerChoice
from vlmlayers.selection.curves import BlockTable, NoValues
from vlmlayers.selection.making import OwnRule, make_rule
from vlmlayers.selection.per_block import is_scored
from vlmlayers.selection.resampling import RESAMPLES, UNSAMPLED, check_resampling, resampled
from vlmlayers.selection.rules import Pick, Picks, Searched
from vlmlayers.selection.stability import HOW, doubts, stability
from vlmlayers.words import UNTRAINED, percent

LOG = logging.getLogger(__name__)


@checked
def select(
    scores: Scores,
    rule: str | Callable[..., Any] = "threshold",
    *,
    resamples: Natural = RESAMPLES,
    seed: Seed = 0,
    **options: Any,
) -> LayerChoice:
    """Choose the layers to adapt from a score table.

    Args:
        scores: Score table of one model.
        rule: A name of `RULES`, of an installed `vlmlayers.rules` entry point, a function of your
            own or `path.py:function`. A function `f(scores, **options)` takes the table and returns
            a `LayerChoice`, a (vision, text) pair or a mapping with these keys; each holds blocks
            from 1, or text such as "5-12". It is called again on every resampled table, and the
            choice names the rule as its `def` does.
        resamples: Resampled tables on which the rule is run again; 0 skips that. Rules that read no
            score take none.
        seed: Seed of the resampling.
        **options: Fields of the rule, such as `accuracy=0.7` for `threshold`.

    Returns:
        The choice with its evidence.

    Raises:
        UserError: Rule or option is unknown, there is one resample, or resamples or their seed
            change nothing, or the table lacks what the rule needs.
    """
    table = check_scores(scores)
    chooser = make_rule(rule, options)
    name = rule if isinstance(rule, str) else chooser.name
    check_resampling(name, resamples, seed)
    blocks = depths(table)
    refuse_unknown_depth(table, blocks)
    refused = scores.attrs.get("refused", ())
    seen = BlockTable.of(_used(table, chooser.reads(blocks)), blocks, refused)
    check_bounds(seen.scores)
    _refuse_other_readout(chooser, seen)
    try:
        picks = chooser(seen)
    except NoValues as error:  # of the whole table: what was seen holds what the rule reads alone
        raise UserError(f"{error}; {_otherwise(BlockTable.of(table, blocks))}") from None
    if not any(pick.blocks for pick in picks.values()) and name == "explicit":
        raise UserError("rule 'explicit' names no block; give vision=5-12 or text=5-12")
    moves = resampled(name, resamples)
    if 0 < moves < ENOUGH_DRAWS:
        LOG.warning(
            "%d resamples say little of how often a block is chosen; take 20 or more", moves
        )
    found = stability(chooser, seen, moves, seed) if moves else {}
    same = isinstance(chooser, OwnRule) and all(one["same"] == 1 for one in found.values())
    fixed = moves and same and _reads_no_score(chooser, seen, picks, seed)
    if moves and not fixed:
        picks = {tower: _with_unmoved(pick, seen, tower) for tower, pick in picks.items()}
    evidence = _evidence(table, chooser, blocks, picks, found)
    if known := scores.attrs.get("weights_hash"):
        evidence["weights_hash"] = str(known)
    if name not in UNSAMPLED:
        evidence["chosen_on"] = _splits(table, chooser.reads(blocks))
    evidence["resamples"] = {"n": moves, "seed": seed, "how": HOW if moves else "none"}
    choice = LayerChoice(_blocks(picks, "vision"), _blocks(picks, "text"), name, evidence)
    # A search brings a statement of its own.
    statement = evidence.get("statement") or _statement(choice) + _unscored(choice, blocks)
    if fixed:  # that resamples agree says nothing of the data then
        statement = "Fixed by the rule, not by the measurements: it chooses the same of any."
    if evidence["random_weights"] and not statement.startswith(UNTRAINED):
        statement = f"{UNTRAINED}. {statement}"
    return replace(choice, evidence={**evidence, "statement": statement})


def _otherwise(table: BlockTable) -> str:
    """Return what else to choose by: the first metric with a value at every block."""
    names = (f"metric:{name}" for name in table.metric_names())
    name = next((name for name in names if is_scored(table, name)), "")
    found = f", as by the rule 'budget' with score={name!r} (--rule budget --set score={name})"
    return f"choose by another metric or rule{found if name else ''}"


def _reads_no_score(rule: OwnRule, table: BlockTable, picks: Picks, seed: int) -> bool:
    """Return whether a rule of the user's own chooses the same of random numbers."""
    generator = np.random.default_rng(seed)
    for scale in (0.01, 1.0, 100.0) * 2:
        value, low, high = scale * generator.standard_normal((3, len(table.scores)))
        drawn = replace(table, scores=table.scores.assign(low=low, high=high), values=value)
        try:
            if rule(drawn) != picks:
                return False
        except Exception:  # noqa: BLE001 of code of the user, which such numbers may surprise
            return False
    return True


def _refuse_other_readout(chooser: Any, table: BlockTable) -> None:
    """Refuse a rule that reads a dataset accuracy where the table has another one: say its option.

    As after streaming, whose sums do not suffice for the default. What a choice is made by is not
    changed without being asked for.
    """
    names = table.metric_names()
    lacking = [
        name
        for name in chooser.reads(table.blocks)
        if name in DATASET_ACCURACIES and name not in names and not table.reason(name)
    ]
    if lacking and (other := dataset_readout(names)):
        # The rule 'budget' reads a block score, which may be a metric by itself.
        key, value = (
            ("metric", other) if hasattr(chooser, "metric") else ("score", f"metric:{other}")
        )
        raise UserError(
            f"the score table has no {lacking[0]} but {other}; choose by that with {key}={value!r} "
            f"(--set {key}={value})"
        )


def _splits(scores: pd.DataFrame, names: Sequence[str] = ()) -> dict[str, str]:
    """Return of which split each dataset's scores are; `*` where pooled rows are all there is.

    Empty where the table says nothing of splits.

    Args:
        scores: Score table.
        names: The metrics that are read, each at one split of a dataset; all of it where empty.
    """
    if "split" not in scores:
        return {}
    if names and set(names) <= set(scores["metric"]):
        parts = [
            Reading().of_all_datasets(scores, name, tower) for name in names for tower in TOWERS
        ]
        read = pd.concat(parts)
        # Pooled rows do not say of which datasets they are: the rest of the table does.
        scores = scores if (read["dataset"] == POOLED).any() else read
    pairs = scores[["dataset", "split"]].astype(str).drop_duplicates()
    named = pairs[pairs["dataset"] != POOLED]
    found = (named if len(named) else pairs).groupby("dataset", sort=False)["split"]
    return {str(dataset): "/".join(splits) for dataset, splits in found}


def _used(scores: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Keep the rows that a rule reads, so that running it again on resamples is quick."""
    # Agreement within a tower says nothing of blocks, and its matrices are most of a table.
    rows = scores[scores["metric"].isin(names) & (scores["other_tower"] != scores["tower"])]
    if not names or not set(names) <= set(rows["metric"]):  # the rule itself says what is missing
        return scores
    for name in names:
        Reading().say_choice(scores, name)
    return pd.concat([Reading().rows(rows, name, tower) for name in names for tower in TOWERS])


def _with_unmoved(pick: Pick, table: BlockTable, tower: str) -> Pick:
    """Return a pick with a note for each metric that resamples leave as it is at some block.

    A value without interval is the same in every resample, whose agreement then says nothing.
    """
    blocks = table.scores["position"].astype(str).str.isdecimal()
    ours = (table.scores["tower"] == tower) | (table.scores["other_tower"] == tower)
    rows = table.scores[blocks & ours]
    still = rows[~np.isfinite((rows["high"] - rows["low"]).to_numpy(float))]
    notes = (
        f"{name} of the {tower} tower has no interval at {n} of its "
        f"{(rows['metric'] == name).sum()} values, which no resample moves"
        for name, n in still["metric"].astype(str).value_counts(sort=False).items()
    )
    return replace(pick, notes=(*pick.notes, *notes))


def _evidence(
    scores: pd.DataFrame,
    chooser: Any,
    blocks: dict[str, int],
    picks: Picks,
    found: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    reasons: dict[str, list[str]] = {}
    towers = {}
    for tower, depth in blocks.items():
        pick = picks.get(tower, Pick(()))
        towers[tower] = {
            "depth": depth,
            "values": pick.values,
            "notes": list(pick.notes),
            **pick.details,
            **found.get(tower, {}),
        }
        reasons[tower] = [*pick.notes]
        if tower in found:
            reasons[tower] += doubts(tower, depth, pick.blocks, found[tower])
    options = chooser.options if isinstance(chooser, OwnRule) else asdict(chooser)
    first = scores.iloc[0]
    return {
        "model": str(first["model"]),
        "weights": str(first["weights"]),
        "random_weights": is_random(scores),
        "options": {
            # Infinity and NaN as text: they are no JSON.
            name: value
            if isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
            else str(value)
            for name, value in options.items()
        },
        "towers": towers,
        "decided": not any(reasons.values()),
        "doubts": [reason for one in reasons.values() for reason in one],
        **(chooser.evidence() if isinstance(chooser, Searched) else {}),
        # What a rule of the user's own reads of the table only that rule knows.
        **({"scores": values_mark(scores)} if isinstance(chooser, OwnRule) else {}),
    }


def _statement(choice: LayerChoice) -> str:
    doubts = "; ".join(choice.evidence["doubts"])
    towers = choice.evidence["towers"]
    firm = " and ".join(
        _firm(tower, choice, found) for tower, found in towers.items() if choice.firm(tower)
    )
    if not doubts:
        if firm:
            return f"The data decide for {firm}."
        if not resampled(choice.rule, 1):
            return "Fixed by the rule, not by the measurements; nothing was resampled."
        return "Nothing was resampled: how far the data decide is not known."
    if firm:
        return f"The data decide for {firm}. They do not decide for the rest: {doubts}."
    return f"The data do not decide: {doubts}."


def _unscored(choice: LayerChoice, blocks: dict[str, int]) -> str:
    """Return that a tower is left out because nothing is known of it, not by what is."""
    lost = [one for one in TOWERS if one not in blocks and not choice.blocks(one)]
    if not lost or choice.rule == "explicit":
        return ""
    return f" No {lost[0]} block is chosen: the scores hold nothing of that tower."


def _firm(tower: str, choice: LayerChoice, found: dict[str, Any]) -> str:
    firm = f"{tower} {describe_blocks(choice.firm(tower))}"
    if choice.open(tower):
        return firm  # where the resamples start, and how often, is of the whole choice
    low, high = found["start"]["low"], found["start"]["high"]
    start = str(low) if low == high else f"{low}–{high}"
    return (
        f"{firm} (95 % of resamples start at {start}; {percent(found['same'])} choose exactly this)"
    )


def _blocks(picks: Picks, tower: str) -> tuple[int, ...]:
    return picks[tower].blocks if tower in picks else ()
