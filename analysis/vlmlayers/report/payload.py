"""What the interactive charts of a report draw, as JSON that is safe inside HTML."""

from __future__ import annotations

import json
import math
from functools import lru_cache
from typing import Any

import pandas as pd

from vlmlayers.plots.style import axis_label
from vlmlayers.positions import TOWERS
from vlmlayers.report.numbers import Answer
from vlmlayers.report.validation import RecordedValidation
from vlmlayers.scores.reading import POOLED, as_read, ceiling
from vlmlayers.scores.schema import grid_of
from vlmlayers.scores.summaries import curves, dataset_names, how_made, metrics_by_shape

# More than a chart can show, and far fewer than a float has, for the size of the page.
DIGITS = 5
OUTCOMES = ("base", "novel", "hm", "difference", "parameters")  # and their intervals


def script_json(content: Any) -> str:
    """Return JSON that can stand in a script element: no markup in it can end the element."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # U+2028 and U+2029 ended a line of JavaScript even inside a string, before 2019.
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def payload(answer: Answer) -> dict[str, Any]:
    """Return all that the charts of one run draw."""
    shapes = metrics_by_shape(answer.scores)
    content = {
        "title": f"{answer.model} ({answer.weights})",
        "model": answer.model,
        "weights": answer.weights,
        "random": answer.random_weights,
        "depth": answer.depths,
        "standing": {tower: answer.standing(tower) for tower in answer.depths},
        "chosen": {tower: answer.choice.blocks(tower) for tower in answer.depths},
        "datasets": dataset_names(answer.scores),
        "metrics": metric_entries(answer),
        "curves": curve_entries(answer, shapes["curve"]),
        "matrices": [
            entry for name in shapes["matrix"] for entry in matrix_entries(answer.scores, name)
        ],
        "fits": {
            tower: {
                name: rounded(values["fit"])
                for name, values in found["values"].items()
                if "fit" in values
            }
            for tower, found in answer.choice.evidence.get("towers", {}).items()
            if isinstance(found.get("values"), dict)
        },
        "frequency": {
            tower: rounded(found["frequency"])
            for tower, found in answer.choice.evidence.get("towers", {}).items()
            if "frequency" in found
        },
    }
    if answer.validation is not None:
        content["validation"] = validation_entry(answer.validation)
    return content


@lru_cache(maxsize=1)  # charts and definitions both show it
def metric_entries(answer: Answer) -> dict[str, dict[str, Any]]:
    """Return what `metric_entry` says of every metric of a run."""
    shapes = metrics_by_shape(answer.scores)
    return {name: metric_entry(name, answer.scores) for names in shapes.values() for name in names}


def metric_entry(
    name: str, scores: pd.DataFrame | None = None, beside: pd.DataFrame | None = None
) -> dict[str, Any]:
    """Return what the METRICS table says of a metric, for labels and captions.

    Args:
        name: Name of the metric.
        scores: Score table; the caption then says how its values were made.
        beside: The table that `scores` is a part of, if it is one; see `how_made`.
    """
    from vlmlayers.metrics.table import find_metric

    known = find_metric(name)
    made = ""
    if scores is not None and (scores["metric"] == name).any():
        made = f"How: {how_made(scores, name, every_space=True, beside=beside)}."
    label = axis_label(name)
    if known is None:
        return {"label": label, "level": "other", "caption": made}
    chance = f" Chance: {known.null_text}." if known.null_text else ""
    meaning = known.summary.removeprefix("Return ")
    name_first = meaning.startswith("tr ")  # a formula, not a word: Tr would be another symbol
    meaning = (meaning if name_first else meaning[:1].upper() + meaning[1:]).rstrip(".")
    caption = f"{meaning}. Larger means {known.direction}.{chance} {known.reference}."
    if known.level == "gap":
        caption += (
            " Taken in joint space: final norm and projection are applied at every "
            "position, a definition of this toolkit."
        )
    caption += f" {made}" if made else ""
    entry: dict[str, Any] = {"label": label, "level": known.level, "caption": caption}
    if scores is not None:
        entry["ceiling"] = {tower: ceiling(scores, name, tower) for tower in TOWERS}
    return entry


def curve_entries(answer: Answer, metrics: list[str]) -> list[dict[str, Any]]:
    """Return every curve: metric, dataset, tower, space and its points."""
    entries = []
    scores = answer.scores
    for metric in metrics:
        spaces = scores.loc[scores["metric"] == metric, "space"].unique()
        for space in spaces:
            if len(spaces) == 1:
                frame = answer.curves(metric)
            else:
                of_space = (scores["metric"] != metric) | (scores["space"] == space)
                frame = curves(scores[of_space], metric)
            for (dataset, tower), curve in frame.groupby(["dataset", "tower"], sort=False):
                entries.append(
                    {
                        "metric": metric,
                        "dataset": dataset,
                        "tower": tower,
                        "space": space,
                        "points": [
                            [p, *rounded([v, low, high, null]), int(n), int(seeds)]
                            for p, v, low, high, null, n, seeds in zip(
                                curve["position"],
                                curve["value"],
                                curve["low"],
                                curve["high"],
                                curve["null"],
                                curve["n"].fillna(0),
                                curve["seeds"],
                            )
                        ],
                    }
                )
    return entries


def matrix_entries(scores: pd.DataFrame, metric: str) -> list[dict[str, Any]]:
    """Return every matrix of a metric; agreement within a tower is filled symmetrically.

    Of several poolings or splits one is read, as in the figures: a mean of them is neither.
    """
    rows = as_read(scores, metric, every_space=True)
    rows = rows[rows["other_position"].astype(str) != ""]
    entries = []
    keys = ["dataset", "tower", "other_tower", "space"]
    for (dataset, tower, other, space), part in rows.groupby(keys, sort=False):
        grid = grid_of(part, tower == other)
        entries.append(
            {
                "metric": metric,
                "dataset": dataset,
                "tower": tower,
                "other": other,
                "space": space,
                "rows": list(grid.index),
                "columns": list(grid.columns),
                "null": rounded([part["null"].mean()])[0],
                "n": int(part["n"].max()),
                "values": [rounded(values) for values in grid.to_numpy(float).tolist()],
            }
        )
    return sorted(entries, key=lambda e: (e["dataset"] != POOLED, e["tower"] == e["other"]))


def validation_entry(validation: RecordedValidation) -> dict[str, Any]:
    """Return the sweep and the predicted values of a validation."""
    frame = validation.outcomes()
    points = [
        {
            "chosen": bool(row["chosen"]),
            # What a chart calls it; of others nothing.
            "reference": ("paper" if validation.published else "reference")
            if str(row["placement"]) == validation.reference
            else "",
            "sweep": bool(row["sweep"]),
            "kind": validation.kind(str(row["placement"])),
            **_outcome_entry(row),
        }
        for _, row in frame.iterrows()
    ]
    plain = [_outcome_entry(row) for _, row in validation.zero_shot.iterrows()]
    predicted: dict[str, dict[str, Any]] = {}
    for _, row in validation.predicted.iterrows():
        predicted.setdefault(str(row["score"]), {})[str(row["placement"])] = rounded(
            [row["predicted"]]
        )[0]
    tau = {
        str(row["score"]): rounded([row["tau"], row["low"], row["high"], row["p"]])
        for _, row in validation.correlations.iterrows()
    }
    return {
        "points": points,
        "zero_shot": plain[0] if plain else None,
        "predicted": predicted,
        "tau": tau,
        "chosen": validation.chosen,
    }


def _outcome_entry(row: pd.Series) -> dict[str, Any]:
    keys = [name for name in row.index if name.partition("_")[0] in OUTCOMES]
    return {
        "placement": str(row["placement"]),
        **dict(zip(keys, rounded([row[name] for name in keys]))),
    }


def rounded(values: Any) -> list[float | None]:
    """Return numbers to five significant digits; None where there is no finite number."""
    return [
        float(f"{float(v):.{DIGITS}g}") if v is not None and math.isfinite(float(v)) else None
        for v in values
    ]
