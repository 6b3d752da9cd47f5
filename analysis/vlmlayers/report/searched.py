"""What a search on training shots found, as the report says it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmlayers.report.numbers import Answer
from vlmlayers.report.tables import Table, tabular
from vlmlayers.words import interval

SHOWN = 12  # settings listed in the report; search.csv holds all


def search_tables(answer: Answer) -> list[Table]:
    """Return what a search says of its pick, and how all its settings compare; none without one."""
    found = answer.search
    if not found:
        return []
    criterion = found["criterion"]["means"]
    headings = ["What", "Setting", "Difference [95 %]", "Better in", "Null"]
    rows = [
        [what, setting, _difference(one), _wins(one), "0"] for what, setting, one in _pairs(found)
    ]
    cost = found["cost"]
    spent = f"{cost['trainings']:g} full trainings, {cost['seconds']:.0f} s"
    if cost["budget"] is not None:
        spent += f" (budget {cost['budget']:g})"
    order = list(found["mean_differences"].items())
    listed = [[setting, float(value)] for setting, value in order[:SHOWN]]
    return [
        tabular(f"Search on training shots, {criterion}; cost {spent}", headings, rows),
        tabular(
            f"Settings of the search, mean difference to the default in the folds that both ran in"
            f"{f', the best {SHOWN} of {len(order)}' if len(order) > SHOWN else ''}",
            ["Setting", "Difference to the default"],
            listed,
        ),
    ]


def _pairs(found: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Return what is compared with what: label, setting and difference."""
    plain = found["to_zero_shot"]
    pairs = [
        (f"Best of the {heat['stage']} search against {heat['default']}", heat["best"],
         heat["difference"])
        for heat in found["heats"]
    ]  # fmt: skip
    for label, key in (("Pick", "difference"), ("Runner-up", "runner_up_difference")):
        if found.get(key):
            # Not the answer `pick`, which is zero-shot CLIP where training does not pay.
            setting = plain["setting"] if key == "difference" else found["runner_up"]
            pairs.append((f"{label} against the default", setting, found[key]))
    whether = "Against zero-shot CLIP: whether to adapt"
    # Searches of earlier versions judged everything by one criterion and named it once.
    if plain.get("criterion", own := found["criterion"]["name"]) != own:
        whether += f", by {plain['criterion']}"
    return [*pairs, (whether, plain["setting"], plain)]


def _difference(one: Mapping[str, Any]) -> str:
    return f"{one['mean']:+z.3f} {interval(one['low'], one['high'])}"


def _wins(one: Mapping[str, Any]) -> str:
    return f"{one['wins']} of {len(one['folds'])} folds"
