"""The tables that say how a run was made."""

from __future__ import annotations

from typing import Any

import pandas as pd

from vlmlayers.files import read_toml
from vlmlayers.report.numbers import Answer
from vlmlayers.report.payload import metric_entries
from vlmlayers.report.tables import Table, tabular
from vlmlayers.runs import file_mark
from vlmlayers.scores import refusals, score_cost

# Headings of the datasets' table, and the keys of `provenance.json` below them.
DATASET_HEADINGS = {
    "Title": "title",
    "Split": "split",
    "Images": "items",
    "Classes": "classes",
    "Texts": "texts",
    "Text": "text",
    "Template": "template",
    "Present only": "present_only",
    "Manifest": "manifest_hash",
}


def made_tables(answer: Answer) -> list[Table]:
    """Return how the run was made: model, datasets, options, cost, refusals, definitions."""
    return [
        model_table(answer),
        *_dataset_tables(answer),
        *_option_tables(answer),
        *_cost_tables(answer),
        *_refusal_tables(answer),
        _definitions(answer),
    ]


def remarks(answer: Answer) -> list[str]:
    """Return what the run's scores and choice lack or no longer are, a sentence or two each."""
    left_out = answer.provenance.get("left_out", {})
    said = [f"Left out: {name}. {reason}" for name, reason in left_out.items()]
    if of := answer.foreign_search:
        said.append(f"Left out: the search in search.json, which is of {of}.")
    if of := answer.foreign_validation:
        said.append(f"Left out: the training in validation.csv, which is {of}.")
    if of := answer.foreign_extraction:
        said.append(
            "How the scored features were extracted is not known: provenance.json is of a later "
            f"extraction, by {of}."
        )
    for stage, parts in {**_stopped(answer), **answer.provenance.get("outdated", {})}.items():
        said.append(
            f"The study file shown is not what stage {stage} ran on: when the study was last run, "
            f"without that stage, these had changed: {', '.join(parts)}."
            if parts
            else f"Stage {stage} did not finish on the study file shown; what follows is of what "
            "lay there."
        )
    for stage in _beside_study(answer):
        said.append(
            f"What {stage} found is not of the study file shown, which has no table [{stage}]."
        )
    for name in _rewritten(answer):
        said.append(
            f"{name} was written anew by a verb since the study shown was run; how stands here, "
            "not in the study file."
        )
    return said


def _beside_study(answer: Answer) -> list[str]:
    """Return the stages whose results are shown and that the run's study does not ask for."""
    if not answer.run.study.exists():
        return []
    asked = read_toml(answer.run.study)
    shown = {"search": answer.search, "validate": answer.validation}
    return [stage for stage, found in shown.items() if found and stage not in asked]


def _stopped(answer: Answer) -> dict[str, list[str]]:
    """Return the stages that were stopped since they last finished and whose results are shown."""
    always = dict.fromkeys(("extract", "score", "select"), True)
    shown = {**always, "search": answer.search, "validate": answer.validation}
    ledger = answer.run.read("stages.json") if answer.run.study.exists() else {}
    return {
        stage: []
        for stage in ledger.get("unfinished", {})
        if stage not in ledger and shown.get(stage)
    }


def _rewritten(answer: Answer) -> list[str]:
    """Return the files of a study's stages that are others than those its stages wrote."""
    run, ledger = answer.run, answer.run.read("stages.json")
    extracted = ledger.get("extract", {}).get("inputs")
    other = run.study.exists() and extracted and ledger.get("asked", {}).get("extract", extracted)
    stages = ("score", "search", "select", "validate") if run.study.exists() else ()
    marks = [ledger.get(stage, {}).get("outputs", {}) for stage in stages]
    return [
        *(["The folder features"] if other and other != extracted else []),
        *(
            name
            for of in marks
            for name, mark in of.items()
            if file_mark(run.folder / name) not in ("", mark)
        ),
    ]


def _dataset_tables(answer: Answer) -> list[Table]:
    datasets = answer.provenance.get("datasets")
    if not datasets:
        return []
    rows = [
        [name, *(one.get(key) for key in DATASET_HEADINGS.values())]
        for name, one in datasets.items()
    ]
    for name, split in scored_beside(answer):
        known = {"title": "scored, of an earlier extraction", "split": split}
        rows.append([name, *map(known.get, DATASET_HEADINGS.values())])
    return [tabular("Datasets", ["Dataset", *DATASET_HEADINGS], rows)]


def scored_beside(answer: Answer) -> list[tuple[str, str]]:
    """Return datasets and splits that were scored and are not of the run's last extraction.

    Provenance is of that one alone, and features of those before it stay where they are.
    """
    recorded = [
        (one.get("name", name), one.get("split"))
        for name, one in answer.provenance.get("datasets", {}).items()
    ]
    scored = answer.attributes.get("features", {}) if recorded else {}
    parts = (one.removesuffix(")").rpartition(" (") for one in scored)
    # None: of a run that did not say of which split its datasets are.
    return [(n, split) for n, _, split in parts if not {(n, split), (n, None)} & {*recorded}]


def _option_tables(answer: Answer) -> list[Table]:
    options = {**answer.stages, "protocol": answer.attributes.get("protocol")}
    rows = [
        [stage, key, value]
        for stage, one in options.items()
        if isinstance(one, dict)
        for key, value in one.items()
    ]
    return [tabular("Options", ["Stage", "Option", "Value"], rows)] if rows else []


def _cost_tables(answer: Answer) -> list[Table]:
    rows = [
        [str(row["metric"]), float(row["seconds"]), int(row["rows"])]
        for _, row in score_cost(_with(answer)).iterrows()
    ]
    headings = ["Metric", "Seconds", "Values"]
    return [tabular("What each metric cost", headings, rows)] if rows else []


def _definitions(answer: Answer) -> Table:
    rows = [[name, entry["caption"]] for name, entry in metric_entries(answer).items()]
    return tabular("What the metrics mean", ["Metric", "Definition"], rows)


def model_table(answer: Answer) -> Table:
    """Return what the run knows of its model and of the machine it was made on."""
    source = answer.provenance
    model, place = source.get("model", {}), source.get("environment", {})
    rows: list[list[Any]] = [
        ["Model", answer.model],
        ["Weights", answer.weights + (" (UNTRAINED)" if answer.random_weights else "")],
        # As scored: features of an extraction since may be of other weights.
        ["Weights hash", answer.attributes.get("weights_hash") or model.get("weights_hash")],
        ["Parameters", model.get("parameters")],
    ]
    for name, tower in model.get("towers", {}).items():
        rows.append(
            [
                f"{name.capitalize()} tower",
                f"{tower.get('blocks')} {tower.get('kind')} of width {tower.get('width')}",
            ]
        )
    rows += [
        ["Seed", source.get("seed")],
        ["Device", source.get("extract", {}).get("device")],
        ["Precision", source.get("extract", {}).get("precision")],
        ["Machine", place.get("platform")],
        ["Python", place.get("python")],
        ["Versions", place.get("versions")],
        ["Commit", place.get("commit") or None],
        ["Scored", place.get("written")],
    ]
    return tabular("Model and machine", ["What", "Value"], [r for r in rows if r[1] is not None])


def _with(answer: Answer) -> pd.DataFrame:
    table = answer.scores.copy(deep=False)
    table.attrs.update(answer.attributes)
    return table


def _refusal_tables(answer: Answer) -> list[Table]:
    refused = refusals(_with(answer))
    if refused.empty:
        return []
    grouped = refused.groupby(["metric", "reason"], sort=False)
    rows = [
        [metric, reason, ", ".join(dict.fromkeys(map(str, part["dataset"])))[:200], len(part)]
        for (metric, reason), part in grouped
    ]
    return [tabular("Asked for and not computed", ["Metric", "Reason", "Datasets", "Times"], rows)]
