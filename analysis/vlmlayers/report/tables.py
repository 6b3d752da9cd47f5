"""The tables of a report: the answer by block, and what training found."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import floor, isfinite, log10
from typing import Any

import pandas as pd

from vlmlayers.placement import SAMPLE
from vlmlayers.plots.saving import slug
from vlmlayers.plots.style import axis_label
from vlmlayers.report.numbers import Answer, join
from vlmlayers.report.validation import RecordedValidation
from vlmlayers.scores.reading import POOLED
from vlmlayers.scores.summaries import metrics_by_shape
from vlmlayers.selection import PLACEMENT_SCORES
from vlmlayers.words import counted, inside, percent

NUMBER = re.compile(r"–|[+-]?[\d.,]+( %)?( \[[^\]]*\])?")


@dataclass(frozen=True)
class Table:
    """A table of words: caption, headings, rows of cells, and the name of its download."""

    caption: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    name: str = "table"

    @property
    def numeric(self) -> set[int]:
        """Numbers of the columns after the first that hold numbers, with interval or percent."""
        return {
            place
            for place in range(1, len(self.headings))
            if any(row[place] != "–" for row in self.rows)
            and all(NUMBER.fullmatch(row[place]) for row in self.rows)
        }

    def bare(self) -> Table:
        """Return the table without its caption, for where a heading says it."""
        return replace(self, caption="")


def tabular(caption: str, headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """Return a table with every cell as text; numbers of a column have the same decimals."""
    columns = [_column([row[place] for row in rows]) for place in range(len(headings))]
    cells = tuple(zip(*columns)) if rows else ()
    return Table(caption, tuple(headings), cells, slug(caption.partition(",")[0]) or "table")


def _column(values: Sequence[Any]) -> list[str]:
    """Return the cells of a column: three significant digits of its largest number."""
    numbers = [value for value in values if isinstance(value, float) and isfinite(value)]
    alike = all(value is None or isinstance(value, float) for value in values)
    largest = max(map(abs, numbers), default=0.0)
    if not alike or len(numbers) < 2 or not 1e-4 <= largest < 1e5:
        return [words(value) for value in values]
    # From the largest number: a column of one precision can be compared at a glance.
    decimals = max(0, 2 - floor(log10(largest)))
    shown = [None if value is None or not isfinite(value) else value for value in values]
    return [words(None) if value is None else f"{value:z.{decimals}f}" for value in shown]


def words(value: Any) -> str:
    """Return a value as a table shows it."""
    if value is None or (isinstance(value, float) and value != value):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "–"
    if isinstance(value, dict):
        return ", ".join(f"{key} {words(one)}" for key, one in value.items()) or "–"
    return str(value)


@lru_cache(maxsize=1)  # the page and the Markdown both show them
def answer_tables(answer: Answer) -> list[Table]:
    """Return one table per tower: each block, the values behind it, chosen or not."""
    return [_tower_table(answer, tower) for tower in answer.depths] + [position_table(answer)]


def _tower_table(answer: Answer, tower: str) -> Table:
    found = answer.choice.evidence.get("towers", {}).get(tower, {})
    values = found.get("values", {})
    headings = ["Block"]
    for name, column in values.items():
        scaled = name.startswith("metric:")  # a block score: the metric, scaled
        label = axis_label(name.removeprefix("metric:"))
        headings.append(f"{label}, share of range" if scaled else label)
        if "normalised" in column:
            headings.append(f"share of range (from {percent(column.get('share', 0))})")
    frequency = found.get("frequency", [])
    headings += ["Chosen", *(["Chosen in resamples"] if frequency else [])]
    rows = []
    for block in range(1, answer.depths[tower] + 1):
        row: list[Any] = [str(block)]
        for column in values.values():
            row.append(float(column["value"][block - 1]))
            if "normalised" in column:
                row.append(percent(column["normalised"][block - 1]))
        row.append(block in answer.choice.blocks(tower))
        rows.append([*row, *([percent(frequency[block - 1])] if frequency else [])])
    return tabular(f"{tower.capitalize()} tower, block by block", headings, rows)


def position_table(answer: Answer) -> Table:
    """Return every metric that has a curve at every position, datasets pooled or their mean."""
    rows: dict[tuple[str, str], dict[str, float]] = {}
    shown = metrics_by_shape(answer.scores)["curve"]
    for metric in shown:
        frame = answer.curves(metric)
        pooled = frame[frame["dataset"] == POOLED]
        # Of the whole column, as `overview` reads it: the closest pairs of single datasets lie
        # elsewhere than that of all, and would stand in one column with it.
        frame = pooled if len(pooled) else frame
        for (tower, position), part in frame.groupby(["tower", "position"], sort=False):
            value = part["value"].mean()
            rows.setdefault((str(tower), str(position)), {})[metric] = float(value)
    headings = ["Position", *map(axis_label, shown)]
    return tabular(
        "Every position and metric, all datasets pooled where scored so, else their mean; mean "
        "over seeds",
        headings,
        [
            [f"{tower} {position}", *(values.get(name) for name in shown)]
            for (tower, position), values in rows.items()
        ],
    )


def comparison_table(validation: RecordedValidation | None) -> Table | None:
    """Return the chosen placement beside the paper's, the best and zero-shot CLIP.

    Others follow, best first, where there are no more than `FEW` in all.
    """
    if validation is None:
        return None
    frame = validation.placements.drop_duplicates("placement")
    named: dict[str, list[str]] = {}
    for label, placement in (
        ("chosen", validation.chosen),
        (validation.reference_words, validation.reference),
        (validation.best_words, validation.best),
    ):
        if placement in set(frame["placement"]):
            named.setdefault(placement, []).append(label)
    if len(frame) <= FEW:
        for placement in frame.sort_values("hm", ascending=False)["placement"]:
            named.setdefault(placement, [])
    beside = validation.untuned
    untuned = {} if beside.empty else beside.set_index("placement").to_dict("index")
    amounts = _amounts(validation.cells)
    shown = [
        (row, join(named[name]) or _why(validation, name))
        for name in named
        for _, row in frame[frame["placement"] == name].iterrows()
    ]
    shown += [(row, "no adapter") for _, row in validation.zero_shot.iterrows()]
    rows = []
    for row, why in shown:
        amount = amounts.get(row["placement"]) if untuned else None
        cells = _outcome_row(row, ", ".join(filter(None, [why, amount])), validation.chosen)
        if untuned:
            plain = pd.Series(untuned.get(row["placement"], {}), dtype=object)
            cells.insert(-1, _interval(plain, "hm"))
        rows.append(cells)
    headings = list(OUTCOME_HEADINGS)
    if untuned:
        headings.insert(-1, UNTUNED_HEADING)
    count = validation.compared.groupby("dataset")["seed"].nunique()
    known = any(pd.notna(row.get("hm_low")) for row, _ in shown)
    units = "datasets" if len(count) >= SAMPLE else "runs of these datasets alone"
    how = "each placement at its own tuned amount, beside all at the recipe's, " if untuned else ""
    caption = (
        f"Test accuracy in percent, {how}mean of {counted(len(count), 'dataset')} and "
        f"{'' if count.min() == count.max() else f'{count.min()} to '}"
        f"{counted(int(count.max()), 'seed')}, "
        + (f"95 % intervals over {units}" if known else "without intervals: runs too few or alike")
        + (f". Warning: {validation.warning}" if validation.warning else "")
    )
    return tabular(caption, ["Placement", *headings], rows)


def _amounts(cells: pd.DataFrame) -> dict[str, str]:
    """Return the amount that each placement was trained by, in words."""
    if "amount" not in cells:
        return {}
    given = cells.set_index("placement")["amount"].astype(object).fillna("").astype(str).to_dict()
    return {str(name): f"by {one or 'the recipe’s amount'}" for name, one in given.items()}


UNTUNED_HEADING = "Harmonic mean, untuned"
FEW = 6  # placements that the answer shows one and all
OUTCOME_HEADINGS = (
    "Base classes", "Novel classes", "Harmonic mean", "HM against the chosen", "Parameters",
)  # fmt: skip


def _outcome_row(row: pd.Series, words_: str, chosen: str) -> list[Any]:
    name = f"{row['placement']}" + (f" ({words_})" if words_ else "")
    cells = [_interval(row, key) for key in ("base", "novel", "hm")]
    apart = "–" if row["placement"] == chosen else _interval(row, "difference")
    return [name, *cells, apart, _whole(row.get("parameters"))]


def validation_tables(validation: RecordedValidation | None) -> list[Table]:
    """Return the placements by outcome, and how well each score predicted them."""
    if validation is None:
        return []
    frame = pd.concat([validation.placements, validation.zero_shot], ignore_index=True)

    def outcomes(caption: str, frame: pd.DataFrame) -> Table:
        rows = [
            _outcome_row(row, _why(validation, str(row["placement"])), validation.chosen)
            for _, row in frame.iterrows()
        ]
        return tabular(caption, ["Placement", *OUTCOME_HEADINGS], rows)

    best_first = frame.sort_values("hm", ascending=False)
    tables = [
        # First: a ranking that does not repeat is not worth reading.
        *_repeatability_tables(validation.repeatability),
        outcomes("Placements, best first, with 95 % intervals", best_first),
    ]
    if len(validation.untuned):
        caption = "All at the recipe's amount, beside the tuned comparison. "
        tables.append(outcomes(caption + validation.untuned_words, validation.untuned))
    if len(validation.judged):
        tables.append(_predictors_table(validation.judged, validation.reference_words))
    if len(validation.correlations):
        names = {k: v for k, v in CORRELATION_HEADINGS.items() if k in validation.correlations}
        rows = [
            [str(r["score"]), *(float(r[key]) for key in names), _meaning(str(r["score"]))]
            for _, r in validation.correlations.iterrows()
        ]
        caption = "How well each placement score predicted the trained harmonic mean"
        tables.append(tabular(caption, ["Placement score", *names.values(), "Meaning"], rows))
    return tables


def _repeatability_tables(found: dict[str, Any]) -> list[Table]:
    """Return how far the ranking of placements repeats, before any ranking is shown."""
    rows = [
        [f"Kendall's τ {words}", _bracketed(one, "tau", "low", "high", 2),
         "0", f"{one['p']:.3f}", f"{one['n']} pairs"]
        for key, words in REPEATS.items() if (one := found.get(key))
    ]  # fmt: skip
    if variance := found.get("variance"):
        percent = {key: 100 * variance[key] for key in ("placement", "low", "high")}
        cells = f"{variance['n']} cells"
        alone = variance["placement_by_dataset"]
        rows += [
            ["Variance within a cell that placement explains, %",
             _bracketed(percent, "placement", "low", "high", 0), "0", "–", cells],
            ["… that placement explains on single datasets only, %",
             "cannot be told" if alone is None else f"{100 * alone:.0f}", "–", "–", cells],
        ]  # fmt: skip
    if needed := found.get("cells_for_one_point"):
        value = _bracketed(needed, "cells", "low", "high", 0)
        rows.append(["Independent cells to see 1 point between two placements", value, "–", "–",
                     f"{needed['n']} cells"])  # fmt: skip
    headings = ["What repeats", "Value [95 %]", "Null", "p", "n"]
    return [tabular("Does the ranking repeat? What no rule can do better than", headings, rows)] * (
        len(rows) > 0
    )


REPEATS = {
    "between_seeds": "between seeds of a dataset",
    "between_halves": "between halves of the test items",
    "between_datasets": "between datasets",
}


def _predictors_table(judged: pd.DataFrame, reference: str) -> Table:
    """Return scores and free baselines as predictors, beside the ceiling, against a reference."""
    rows = [
        [str(row["predictor"]), str(row["kind"]), _bracketed(row, "tau", "low", "high", 2),
         row["p_holm"], str(row["pick"]), _bracketed(row, "gain", "gain_low", "gain_high", 1),
         row["gain_p_holm"]]
        for row in judged.to_dict("records")
    ]  # fmt: skip
    headings = ["Predictor", "Kind", "Mean τ in a cell [95 %]", "p, corrected", "Picks",
                f"HM against {reference} [95 %]", "p of that, corrected"]  # fmt: skip
    count = int(judged["n"].iloc[0])
    return tabular(
        f"Predictors against the ceiling and free baselines, {count} cells; null 0", headings, rows
    )


def _bracketed(row: Any, key: str, low: str, high: str, digits: int) -> str:
    if row[key] != row[key]:
        return "–"
    # Too few runs have no interval, nor has what did not vary.
    known = pd.notna(row[low]) and row[low] < row[high]
    tail = f" [{row[low]:z.{digits}f}, {row[high]:z.{digits}f}]" if known else ""
    return f"{row[key]:z.{digits}f}{tail}"


CORRELATION_HEADINGS = {
    "tau": "Kendall's τ",
    "low": "low",
    "high": "high",
    "p": "p",
    "p_holm": "p, corrected",
}


def _why(validation: RecordedValidation, placement: str) -> str:
    """Return in words why a placement was trained."""
    kinds = [one for one in validation.kind(placement).split("+") if one not in ("start", "chosen")]
    chosen = ["chosen"] if placement == validation.chosen else []
    return join([*chosen, *(KINDS.get(one, one) for one in kinds if one)])


KINDS = {
    "paper": "the paper's",
    "all": "all blocks",
    "lower": "lower half",
    "upper": "upper half",
    "last": "last block",
    "single": "one block",
    "vision": "vision only",
    "text": "text only",
}


def _meaning(score: str) -> str:
    known = PLACEMENT_SCORES.get(score)
    if known is not None:
        return known.meaning
    metric = inside(axis_label(score.removeprefix("metric:")))
    return f"mean over adapted blocks of {metric}, scaled to its range"


def _interval(row: pd.Series, key: str) -> str:
    value = row.get(key)
    if value is None or value != value:
        return "–"
    low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
    tail = f" [{low:z.1f}, {high:z.1f}]" if low is not None and low == low else ""
    return f"{value:+z.1f}{tail}" if key == "difference" else f"{value:.1f}{tail}"


def _whole(value: Any) -> str:
    return "–" if value is None or value != value else f"{int(value):,}"
