"""Whether runs may be compared: what their datasets, items and options have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import pandas as pd

from vlmlayers.placement import how_trained
from vlmlayers.report.numbers import Answer, join
from vlmlayers.scores import ScoreOptions
from vlmlayers.scores.reading import POOLED
from vlmlayers.scores.summaries import dataset_names

ALIKE = "All runs saw the same items of the same datasets, scored and chosen with the same options."
# What tells trainings apart besides method, recipe and settings.
TRAINED_BY = ("datasets", "seeds", "shots", "comparison")
# Of an extraction, what each dataset may have of its own.
BY_DATASET = ("split", "text", "template", "present_only")
Extracted = dict[str, dict[str, dict[str, Any]]]  # dataset → split → record
# Options that change no number, or that have a row of their own among what differs.
ASIDE = {"batch_size", "workers", "device", "precision", "skip_unreadable", "present_only"}


def comparability(runs: Sequence[tuple[str, Answer]]) -> list[str]:
    """Return what speaks against comparing the numbers of runs; one sentence where nothing does.

    Args:
        runs: Name and answer of each run.

    Returns:
        Sentences. Empty where the runs do not say enough of how they were made.
    """
    found = [*_datasets(runs), *_items(runs), *_counts(runs)]
    found += [f"{one}." for one in (*_extractions(runs), *option_differences(runs))]
    found += _trainings(runs)
    records = [[*answer.provenance.get("datasets", {}).values()] for _, answer in runs]
    known = all(one and all(data.get("items_hash") for data in one) for one in records) and all(
        {"score", "select"} <= set(answer.stages) for _, answer in runs
    )
    return found or ([ALIKE] if known else [])


def _datasets(runs: Sequence[tuple[str, Answer]]) -> list[str]:
    # A table of pooled rows alone names none.
    sets = {name: {*dataset_names(answer.scores), *_extracted(answer)} for name, answer in runs}
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
    seen: dict[str, dict[tuple[str, str], set[str]]] = {"items_hash": {}, "data_hash": {}}
    for _, answer in runs:
        for dataset, splits in _extracted(answer).items():
            for split, record in splits.items():
                for key, marks in seen.items():
                    known = marks.setdefault((dataset, split), set())
                    known |= {str(record[key])} if record.get(key) else set()
    items, files = (
        {dataset for (dataset, _), marks in of.items() if len(marks) > 1} for of in seen.values()
    )
    words = {
        "The runs saw different items of {}.": items,
        "Of {} the runs saw files of the same names that differ or were copied.": files - items,
    }
    return [said.format(join(sorted(of))) for said, of in words.items() if of]


def _extracted(answer: Answer) -> Extracted:
    """Return what is recorded of the datasets of a run, by name and split."""
    found: Extracted = {}
    for key, one in answer.provenance.get("datasets", {}).items():
        found.setdefault(one.get("name", key), {})[one.get("split", "")] = one
    return found


def _counts(runs: Sequence[tuple[str, Answer]]) -> list[str]:
    """Return of which datasets the scores count other items, where no record tells which."""
    if all(answer.provenance.get("datasets") for _, answer in runs):
        return []
    counts = [a.scores.groupby(["dataset", "metric", "tower"])["n"].max() for _, a in runs]
    shared = pd.concat(counts, axis=1, join="inner")
    other = shared[shared.nunique(axis=1) > 1].index.unique("dataset")
    names = ["all datasets pooled" if name == POOLED else name for name in other]
    return [f"The scores are of different numbers of items of {join(names)}."] if names else []


def _trainings(runs: Sequence[tuple[str, Answer]]) -> list[str]:
    """Return how the trainings of runs differ, whose harmonic means stand side by side."""
    notes = {
        name: answer.run.read(answer.run.verdict.name)
        for name, answer in runs
        if answer.validation is not None
    }
    told = {name: _training(one) for name, one in notes.items()}
    # Other methods have other settings, and earlier versions recorded less.
    shared = [key for key in next(iter(told.values()), {}) if all(key in t for t in told.values())]
    parts = []
    for key in shared:
        values = {name: str(one[key]) for name, one in told.items()}
        if len(set(values.values())) > 1:
            parts.append(f"{key} {_listed(values)}")
    parts += _tested(notes)
    if not parts:
        return []
    return [f"Trained harmonic means do not compare: {'; '.join(parts)}."]


def _training(notes: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the accuracies of a validation depend on besides model, placement and data."""
    found = how_trained(notes) | {key: notes[key] for key in TRAINED_BY if key in notes}
    # In whatever order they were named.
    found |= {key: sorted(found[key]) for key in ("datasets", "seeds") if key in found}
    return found | ({"datasets": join(found["datasets"])} if "datasets" in found else {})


def _tested(notes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the datasets on whose images trainings were not all tested."""
    marks: dict[str, set[str]] = {}
    for one in notes.values():
        for dataset, data in one.get("data", {}).items():
            marks.setdefault(dataset, set()).update({data["hash"]} if data.get("hash") else ())
    other = sorted(dataset for dataset, seen in marks.items() if len(seen) > 1)
    return [f"test images of {join(other)}, which differ or were copied"] if other else []


def _listed(values: Mapping[str, str]) -> str:
    """Return `val in a, train in b`."""
    return ", ".join(f"{value} in {name}" for name, value in values.items())


def _extractions(runs: Sequence[tuple[str, Answer]]) -> list[str]:
    """Return `extract: template of textures …` for what datasets that all share have of their own.

    Datasets that differ alike are told together.
    """
    told = {name: _extracted(answer) for name, answer in runs}
    shared = [one for one in next(iter(told.values())) if all(one in of for of in told.values())]
    found: dict[tuple[str, str], list[str]] = {}
    for key, dataset in product(BY_DATASET, shared):
        values = {
            name: join(sorted({str(one[key]) for one in of[dataset].values() if key in one}))
            for name, of in told.items()
        }
        if all(values.values()) and len(set(values.values())) > 1:
            found.setdefault((key, _listed(values)), []).append(dataset)
    return [
        f"Stage extract, {key.replace('_', ' ')} of {join(of)}: {values}"
        for (key, values), of in found.items()
    ]


def option_differences(runs: Sequence[tuple[str, Answer]]) -> list[str]:
    """Return `extract: split val in a, train in b` for each option that differs."""
    found = []
    told = [one for _, a in runs for one in a.provenance.get("datasets", {}).values() or [{}]]
    aside = ASIDE | {key for key in BY_DATASET if all(key in one for one in told)}
    for stage in ("extract", "score", "select"):
        options = [(name, _options(answer, stage)) for name, answer in runs]
        options = [(name, one) for name, one in options if one]
        for key in dict.fromkeys(key for _, one in options for key in one):
            values = {name: str(one.get(key, "not given")) for name, one in options}
            if key not in aside and len(set(values.values())) > 1:
                found.append(f"Stage {stage}, {key.replace('_', ' ')}: {_listed(values)}")
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
