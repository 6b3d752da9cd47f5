"""What was asked for and not computed: said in one line, or refused where nothing came out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence

from vlmlayers.errors import UserError
from vlmlayers.metrics.table import Metric
from vlmlayers.scores.options import ScoreOptions
from vlmlayers.scores.scoring import POOLED, Collector

_SHOWN = 4  # gaps that are named
_CALLER = 5  # frames up to the line that called `score`, over two that check its arguments


class NothingScored(UserError):
    """Nothing came of what was asked for.

    Attributes:
        refused: What was not computed, and why, as `attrs["refused"]` of a table.
        gaps: The same in one line, for a warning; empty where the log has said it.
    """

    def __init__(self, reason: str, refused: Sequence[dict[str, str]], gaps: str = "") -> None:
        super().__init__(reason)
        self.refused, self.gaps = refused, gaps


def say_missing(
    out: Collector, metrics: Mapping[str, Metric], options: ScoreOptions, *, asked: bool
) -> None:
    """Warn of what was asked for and has no score: metrics, their datasets, positions, spaces.

    Args:
        out: What was computed and what was refused.
        metrics: The metrics that were tried.
        options: The options; positions and spaces count as asked for where they are named.
        asked: Whether the metrics were named; of all metrics some always do not apply.

    Raises:
        NothingScored: There is no score at all.
    """
    gaps = [f"{what} ({why})" for what, why in _gaps(out, metrics, options)]
    more = f"; and {len(gaps) - _SHOWN} more" if len(gaps) > _SHOWN else ""
    line = "; ".join(gaps[:_SHOWN]) + more
    if not out.rows:
        raise NothingScored(f"nothing was scored: {line}", out.refused, line)
    if gaps and asked:
        # Read on a terminal as well, where a function alone would lead nowhere.
        line += "; the report and `vlmlayers.scores.refusals` list all" if more else ""
        warnings.warn(f"not computed: {line}", UserWarning, stacklevel=_CALLER)


def _gaps(
    out: Collector, metrics: Mapping[str, Metric], options: ScoreOptions
) -> Iterator[tuple[str, str]]:
    """Yield what has no score, and why."""
    for name, metric in metrics.items():
        rows = [row for row in out.rows if row["metric"] == name]
        refused = [note for note in out.refused if note["metric"] in (name, metric.base)]
        if not rows:
            yield name, refused[0]["reason"] if refused else _undefined(metric, options)
            continue
        scored = {row["dataset"] for row in rows}
        # Reversed, so that of several reasons the first one stays.
        missed = {note["dataset"]: note["reason"] for note in reversed(refused)}
        # Of single datasets a tower often has nothing by its nature, as prompts have one per class.
        pooled = [note for note in refused if note["dataset"] == POOLED]
        reason_of = {note["tower"]: note["reason"] for note in reversed(pooled)}
        lost = set(reason_of) - {row["tower"] for row in rows} - {""}
        if pooled and lost == set(reason_of):  # a tower has nothing: more than its pooled rows
            del missed[POOLED]
        for dataset in sorted(set(missed) - scored):
            yield f"{name} of {dataset.replace('*', 'all datasets')}", missed[dataset]
        for tower in sorted(lost):
            yield f"{name} of the {tower} tower", reason_of[tower]
        where = {row["position"] for row in rows} | {row["other_position"] for row in rows}
        reasons = {note["position"]: note["reason"] for note in reversed(refused)}
        if name != f"{metric.base}_max":  # which is scored at the closest pair of positions alone
            for position in options.positions or ():
                if position not in where:
                    yield f"{name} at {position}", reasons.get(position, "it has no value there")
        for space in options.spaces_of(metric) if options.spaces else ():
            if space not in {row["space"] for row in rows}:
                yield f"{name} in {space} space", reasons.get("", "it has no value there")


def _undefined(metric: Metric, options: ScoreOptions) -> str:
    if not options.spaces_of(metric):
        return f"it is defined in {', '.join(metric.spaces)} space only"
    return "it has no value on these towers and positions"
