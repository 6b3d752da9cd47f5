"""Whether runs may be compared: what their datasets, items and options have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlmlayers.report.numbers import Answer, join
from vlmlayers.scores import ScoreOptions
from vlmlayers.scores.summaries import dataset_names

ALIKE = "All runs saw the same items of the same datasets, scored and chosen with the same options."
# What tells trainings apart: of a recipe what is set most, and what stands beside it.
TRAINED_BY = ("method", "datasets", "seeds", "shots", "limit", "comparison")
RECIPE = ("lr", "epochs", "batch_size")
# Options that change no number, or that have a row of their own among what differs.
ASIDE = {"batch_size", "workers", "device", "precision", "skip_unreadable", "present_only"}


def comparability(runs: Sequence[tuple[str, Answer]]) -> list[str]:
    """Return what speaks against comparing the numbers of runs; one sentence where nothing does.

    Args:
        runs: Name and answer of each run.

    Returns:
        Sentences. Empty where the runs do not say enough of how they were made.
    """
    found = [*_datasets(runs), *_items(runs), *(f"{one}." for one in option_differences(runs))]
    found += _trainings(runs)
    known = all(
        {"score", "select"} <= set(answer.stages) and answer.provenance.get("datasets")
        for _, answer in runs
    )
    return found or ([ALIKE] if known else [])


def _datasets(runs: Sequence[tuple[str, Answer]]) -> list[str]:
    sets = {name: set(dataset_names(answer.scores)) for name, answer in runs}
    common = set.intersection(*sets.values())
    extra = {name: sorted(found - common) for name, found in sets.items() if found - common}
    if not extra:
        return []
    parts = [f"{name} has {join(some)}" for name, some in extra.items()]
    return [
        f"The datasets differ: beside what all share, {'; '.join(parts)}. Dataset accuracy and "
        "what is pooled over datasets, the choice included, do not compare."
    ]


def _items(runs: Sequence[tuple[str, Answer]]) -> list[str]:
    hashes: dict[str, set[str]] = {}
    for _, answer in runs:
        for dataset, one in answer.provenance.get("datasets", {}).items():
            if one.get("items_hash"):
                hashes.setdefault(dataset, set()).add(str(one["items_hash"]))
    other = sorted(dataset for dataset, seen in hashes.items() if len(seen) > 1)
    return [f"The runs saw different items of {join(other)}."] if other else []


def _trainings(runs: Sequence[tuple[str, Answer]]) -> list[str]:
    """Return how the trainings of runs differ, whose harmonic means stand side by side."""
    told = {
        name: _training(answer.run.read("validation.json"))
        for name, answer in runs
        if answer.validation is not None
    }
    parts = []
    for key in dict.fromkeys(key for one in told.values() for key in one):
        values = {name: str(one.get(key, "not given")) for name, one in told.items()}
        if len(set(values.values())) > 1:
            parts.append(f"{key} {', '.join(f'{value} in {one}' for one, value in values.items())}")
    if not parts:
        return []
    return [f"Trained harmonic means do not compare: {'; '.join(parts)}."]


def _training(notes: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the accuracies of a validation depend on besides model and placement."""
    found = {key: notes[key] for key in TRAINED_BY if key in notes}
    if isinstance(found.get("datasets"), list):
        found["datasets"] = join(found["datasets"])
    recipe = notes.get("recipe", {})
    return found | {key: recipe[key] for key in RECIPE if key in recipe}


def option_differences(runs: Sequence[tuple[str, Answer]]) -> list[str]:
    """Return `extract: split val in a, train in b` for each option that differs."""
    found = []
    for stage in ("extract", "score", "select"):
        options = [(name, _options(answer, stage)) for name, answer in runs]
        options = [(name, one) for name, one in options if one]
        for key in dict.fromkeys(key for _, one in options for key in one):
            values = {name: str(one.get(key, "not given")) for name, one in options}
            if key not in ASIDE and len(set(values.values())) > 1:
                words = ", ".join(f"{value} in {name}" for name, value in values.items())
                found.append(f"Stage {stage}, {key.replace('_', ' ')}: {words}")
    return found


def _options(answer: Answer, stage: str) -> dict[str, Any]:
    """Return the options of a stage with what was left at its default; empty where unknown.

    Metrics are left out: they only add to a table.
    """
    recorded = answer.stages.get(stage)
    if recorded is None:
        return {}
    own = {key: value for key, value in recorded.items() if key not in ("options", "metrics")}
    given = recorded.get("options") or {}
    if stage == "score":
        own = {"streaming": False} | own  # as before it was recorded
        given = ScoreOptions().model_dump() | given
    plain = {key: list(one) if isinstance(one, tuple) else one for key, one in given.items()}
    return {**own, **plain}
