"""The tables of a comparison of several runs."""

from __future__ import annotations

from collections.abc import Sequence

from vlmlayers.placement import describe_blocks
from vlmlayers.plots.style import axis_label
from vlmlayers.positions import EMBED
from vlmlayers.report.made import model_table, scored_beside
from vlmlayers.report.numbers import Answer, join
from vlmlayers.report.tables import Table, tabular, words
from vlmlayers.scores.summaries import DATASET_ACCURACIES, dataset_readout
from vlmlayers.words import inside


def summary_table(answers: Sequence[tuple[str, Answer]]) -> Table:
    """Return one row per run of a comparison."""
    metric = dataset_readout(_in_all(answers)) or DATASET_ACCURACIES[0]
    rows = [
        [
            name,
            describe_blocks(answer.choice.vision),
            describe_blocks(answer.choice.text),
            answer.choice.decided,
            join(f"{tower} {depth}" for tower, depth in answer.depths.items()),
            answer.weights + (" (UNTRAINED)" if answer.random_weights else ""),
            answer.parameters,
            *_ends(answer, metric),
            _ends(answer, "centroid_gap")[1],
            _best(answer),
        ]
        for name, answer in answers
    ]
    headings = [
        "Run", "Adapt vision", "Adapt text", "Decided", "Blocks", "Weights", "Parameters",
        "Vision accuracy, embed", "Vision accuracy, last position", "Gap, last position",
        "Trained HM",
    ]  # fmt: skip
    return tabular(f"The answers, accuracy being {inside(axis_label(metric))}", headings, rows)


def _in_all(answers: Sequence[tuple[str, Answer]]) -> set[str]:
    """Return the metrics that every run has, so that a column never mixes two read-outs."""
    return set.intersection(*(set(answer.scores["metric"]) for _, answer in answers))


def _ends(answer: Answer, metric: str) -> tuple[float | None, float | None]:
    if metric not in set(answer.scores["metric"]):
        return None, None
    frame = answer.curves(metric)
    frame = frame[frame["tower"] == "vision"]
    if frame.empty:
        return None, None
    by_position = frame.groupby(["order", "position"])["value"].mean().droplevel("order")
    return by_position.get(EMBED), float(by_position.iloc[-1])


def _best(answer: Answer) -> str | None:
    validation = None if answer.unproved else answer.validation
    if validation is None or validation.chosen not in set(validation.placements["placement"]):
        return None
    frame = validation.placements.set_index("placement")["hm"]
    return f"{frame[validation.chosen]:.1f} (best {frame.max():.1f})"


def differences(answers: Sequence[tuple[str, Answer]]) -> Table:
    """Return what the runs were made of, one column per run, rows that differ first."""
    facts: dict[str, list[str]] = {}
    for index, (_, answer) in enumerate(answers):
        for what, value in model_table(answer).rows:
            facts.setdefault(what, ["–"] * len(answers))[index] = value
        beside = (name for name, _ in scored_beside(answer))
        names = words(sorted({*answer.provenance.get("datasets", {}), *beside}))
        facts.setdefault("Datasets", ["–"] * len(answers))[index] = names
    ordered = sorted(facts.items(), key=lambda item: len(set(item[1])) == 1)
    return tabular(
        "", ["What", *(name for name, _ in answers)], [[what, *values] for what, values in ordered]
    )
