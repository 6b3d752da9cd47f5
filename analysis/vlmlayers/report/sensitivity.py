"""What the choice would be under other thresholds, poolings, rules and on each dataset alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import pandas as pd

from vlmlayers.errors import UserError
from vlmlayers.metrics import METRICS
from vlmlayers.metrics.declare import MODEL
from vlmlayers.placement import describe_blocks
from vlmlayers.plots.style import axis_label
from vlmlayers.positions import TOWERS
from vlmlayers.report.numbers import Answer, join
from vlmlayers.report.tables import Table, tabular
from vlmlayers.scores.reading import POOLED, Reading, has_curve
from vlmlayers.scores.summaries import DATASET_ACCURACIES, dataset_readout
from vlmlayers.selection import select
from vlmlayers.words import counted, inside

SHARES = (0.3, 0.4, 0.5, 0.6, 0.7)
READING_RULES = ("threshold", "knee", "budget")  # those that read the measurements
AGREEMENT = "cka_debiased"
CLASSES = ("class_accuracy", "class_accuracy_ncm", "class_accuracy_knn")
MOST, SHOWN = 6, 4  # answers of single datasets listed one by one; datasets named in one row


@lru_cache(maxsize=1)  # the page and the Markdown both show it
def sensitivity_table(answer: Answer) -> Table | None:
    """Return what other settings would choose; None where the scores allow no rule that reads them.

    Each row is the rule run once, without resampling; of a choice by threshold all that the row
    does not name stays as it was chosen with. Blocks of single datasets are chosen by class
    accuracy, since one dataset alone cannot be told from others.
    """
    metric = _own(answer).get("metric") or dataset_readout(set(answer.scores["metric"]))
    if not metric:
        return None
    rows = [
        *_thresholds(answer, metric),
        *_poolings(answer, metric),
        *_rules(answer, metric),
        *_datasets(answer),
    ]
    headings = ["What is changed", *(f"Adapt {tower}" for tower in answer.depths)]
    return tabular("Other settings, other answers", headings, rows) if rows else None


def _thresholds(answer: Answer, metric: str) -> Iterator[list[str]]:
    table = _read(answer.scores, (metric, _agreement(answer)))
    for share in SHARES:
        options = _threshold(answer, table, metric) | {"accuracy": share}
        if options["agreement_metric"] != "none":
            options["agreement"] = share
        yield from _row(answer, f"threshold at {share:g} of the range", table, "threshold", options)


def _poolings(answer: Answer, metric: str) -> Iterator[list[str]]:
    found = answer.scores.loc[answer.scores["metric"] == metric, ["tower", "pooling"]]
    names = list(dict.fromkeys(found["pooling"].astype(str)))
    several = found.groupby("tower")["pooling"].transform("nunique") > 1
    if not several.any():
        yield [f"pooling other than {join(names)}", *("not scored" for _ in answer.depths)]
        return
    # The one pooling of a tower is no setting that is changed.
    for name in dict.fromkeys(found.loc[several, "pooling"].astype(str)):
        own = {tower: set(part["pooling"]) for tower, part in found.groupby("tower")}
        kept = {tower: name if name in own.get(tower, ()) else None for tower in TOWERS}
        table = _read(answer.scores, (metric, _agreement(answer)), kept)
        options = _threshold(answer, table, metric)
        yield from _row(answer, f"pooling {name}", table, "threshold", options)


def _rules(answer: Answer, metric: str) -> Iterator[list[str]]:
    table = _read(answer.scores, (metric, _agreement(answer)))
    for rule in READING_RULES:
        if rule == answer.choice.rule:
            continue
        options = {
            "threshold": _threshold(answer, table, metric),
            "knee": {"metric": metric},
        }.get(rule, {} if metric == DATASET_ACCURACIES[0] else {"score": f"metric:{metric}"})
        yield from _row(answer, f"rule {rule}", table, rule, options)
    scored = set(answer.scores["metric"])
    for name in (name for name, entry in METRICS.items() if entry.needs == MODEL):
        if name in scored:
            words = f"rule budget by {axis_label(name).lower()}"
            by = {"score": f"metric:{name}"}
            yield from _row(answer, words, _read(answer.scores, (name,)), "budget", by)
    paper = [describe_blocks(answer.paper.blocks(tower)) for tower in answer.depths]
    yield ["rule paper, the default", *paper]


def _datasets(answer: Answer) -> Iterator[list[str]]:
    """Yield the answer of each dataset alone; datasets with the same answer share a row.

    Each tower by itself: with one prompt per class, texts have no class accuracy.
    """
    metric = next((m for m in CLASSES if has_curve(answer.scores, m, "vision")), None)
    if metric is None:
        return
    table = _read(answer.scores, (metric,))
    kept = {key: value for key, value in _own(answer).items() if key in ("accuracy", "fill")}
    options = kept | {"metric": metric, "agreement_metric": "none"}
    answers: dict[tuple[str, ...], list[str]] = {}
    for name, rows in table[table["dataset"] != POOLED].groupby("dataset", sort=False):
        parts = dict(iter(rows.groupby("tower")))
        blocks = tuple(_chosen(parts.get(tower), tower, options) for tower in answer.depths)
        answers.setdefault(blocks, []).append(str(name))
    ordered = sorted(answers.items(), key=lambda pair: -len(pair[1]))
    by = axis_label(metric)
    for chosen, same in ordered[:MOST]:
        yield [f"{_some(same)} alone, by {inside(by)}", *chosen]
    if others := ordered[MOST:]:
        count = sum(len(same) for _, same in others)
        yield [
            f"{counted(count, 'more dataset')} alone",
            *(counted(len(others), "more answer") for _ in answer.depths),
        ]


def _some(names: list[str]) -> str:
    more = len(names) - SHOWN
    return join(names) if more <= 1 else join([*names[:SHOWN], f"{more} more"])


def _own(answer: Answer) -> dict[str, Any]:
    """Return the options that the choice was made with, if by threshold."""
    options = answer.choice.evidence.get("options", {})
    return dict(options) if answer.choice.rule == "threshold" else {}


def _agreement(answer: Answer) -> str:
    return str(_own(answer).get("agreement_metric", AGREEMENT))


def _threshold(answer: Answer, table: pd.DataFrame, metric: str) -> dict[str, Any]:
    """Return options of the rule `threshold`, the choice's own where the table allows them."""
    agreement, own = _agreement(answer), _own(answer) | {"metric": metric}
    between = table[(table["metric"] == agreement) & (table["other_tower"] != table["tower"])]
    if len(between):
        return own | {"agreement_metric": agreement}
    alone = {key: value for key, value in own.items() if key not in ("agreement", "partner")}
    return alone | {"agreement_metric": "none"}


def _row(
    answer: Answer, words: str, table: pd.DataFrame, rule: str, options: dict[str, Any]
) -> Iterator[list[str]]:
    """Yield one row, or none where the rule cannot be run on the table."""
    try:
        chosen = select(table, rule, resamples=0, **options)
    except UserError:  # such as a tower without this metric; the row would say nothing
        return
    yield [words, *(describe_blocks(chosen.blocks(tower)) for tower in answer.depths)]


def _chosen(rows: pd.DataFrame | None, tower: str, options: dict[str, Any]) -> str:
    if rows is None:
        return "not scored"
    try:
        return describe_blocks(select(rows, resamples=0, **options).blocks(tower))
    except UserError:  # such as a block without a value, which other rules need not read
        return "not at every block"


def _read(
    scores: pd.DataFrame, metrics: Sequence[str], pooling: dict[str, str | None] | None = None
) -> pd.DataFrame:
    """Return the rows of metrics that a rule would read, so that it has nothing left to pick."""
    parts = [
        Reading(pooling=(pooling or {}).get(tower)).of_all_datasets(scores, metric, tower)
        for metric in metrics
        for tower in TOWERS
    ]
    return pd.concat(parts, ignore_index=True)
