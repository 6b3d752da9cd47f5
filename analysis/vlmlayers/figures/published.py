"""Published numbers, and a user's own results in the same shape."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import pandas as pd

from vlmlayers.figures.inputs import (
    Folders,
    MissingTable,
    as_folders,
    dataset_key,
    read_each,
    read_file,
    short,
)
from vlmlayers.figures.render import TableCell
from vlmlayers.files import read_toml, shipped
from vlmlayers.scores.summaries import harmonic_mean
from vlmlayers.words import counted

AVERAGE = "average"
RESULT_COLUMNS = (
    "protocol", "method", "model", "weights", "dataset", "source", "split_kind", "placement",
    "shots", "seed", "accuracy",
)  # fmt: skip
# What tables lack that were written before these were recorded.
ADDED = ("settings", "recipe", "template")
OWN_TEMPLATE = "dataset template"  # how the methods end that take each dataset's own
REMARK, BETWEEN = "with a remark", " · "  # the flag of an own cell, and between its remarks
Numbers = dict[tuple[str, str, str], TableCell]


def published(name: str, folders: Folders) -> pd.DataFrame:
    """Return a table of published numbers, one line per number.

    It is looked for in the folders, then among the tables that ship with the package.
    """
    places = [*as_folders(folders), shipped("figures/tables")]
    paths = [place / f"published_{name}.csv" for place in places]
    return read_file(next((path for path in paths if path.exists()), paths[-1]))


def as_numbers(table: pd.DataFrame) -> Numbers:
    """Return published numbers as (method, dataset, metric) → cell."""
    return {
        (row["method"], row["dataset"], row["metric"]): TableCell(
            float(row["value"]), flag=row["flag"], note=row["note"], source=row["source"]
        )
        for row in table.to_dict("records")
    }


def own_results(protocol: str, folders: Folders, source: str = "") -> pd.DataFrame:
    """Return the user's results of one protocol, with a column `setting` that names what was run.

    Of a transfer it names the dataset trained on where that is not the published `source`.

    The table is empty where no results*.csv exists. Accuracies become percent. Where two tables
    disagree on a cell of a model, its settings are those of each table: recipe, weights or images
    were others, so that their seeds belong to no common mean.
    """
    try:
        tables = read_each("results", folders, RESULT_COLUMNS)
    except MissingTable:
        return pd.DataFrame(columns=[*RESULT_COLUMNS, "setting"])
    cell, found = [*RESULT_COLUMNS[:-1], "settings", "recipe"], []
    for path, table in tables.items():
        rows = table[table.protocol.str.replace("-", "_") == protocol]
        rows = rows.assign(**{name: "" for name in ADDED if name not in rows})
        run = short(path.parent if path.name == "results" else path)
        # A training that was repeated stands twice: its last row counts.
        found.append(rows.drop_duplicates(cell, keep="last").assign(run=f", {run}"))
    kept = pd.concat(found, ignore_index=True)
    kept["accuracy"] = 100 * kept.accuracy.astype(float)
    disagree = kept.groupby(cell, dropna=False).accuracy.transform("nunique") > 1
    apart = disagree.groupby([kept.model, kept.weights]).transform("any")
    kept = kept.assign(run=kept.run.where(apart, "")).drop_duplicates([*cell, "run"])
    settings = [_setting(row, source) for row in kept.to_dict("records")]
    setting = pd.Series(settings, kept.index, dtype=str)
    # With a template of each dataset's own, several of them are one setting.
    chosen = kept.assign(template=kept.template.mask(kept.method.str.endswith(OWN_TEMPLATE), ""))
    for name in ADDED:
        several = chosen.groupby(["model", "weights", "method"])[name].transform("nunique") > 1
        words = ", "
        if name == "recipe":  # beside published numbers it always counts
            several, words = several | True, ", recipe "
        setting += (words + chosen[name]).where(several & (chosen[name] != ""), "")
    return kept.assign(setting=setting + kept["run"])


def _setting(row: dict[Any, Any], source: str) -> str:
    """Name a run in a heading: what was trained where, on which model, with how many shots."""
    weights = f" ({row['weights']})" if row["weights"] else ""
    placement = f" {row['placement']}" if row["placement"] else ""
    shots = f", {counted(int(float(row['shots'])), 'shot')}" if float(row["shots"] or 0) else ""
    other = source and row["source"] and dataset_key(row["source"]) != dataset_key(source)
    origin = f", from {row['source']}" if other else ""
    return f"own: {row['method']}{placement}, {row['model']}{weights}{shots}{origin}"


def source_column(dataset: str) -> str:
    """Return the heading of accuracies on the dataset trained on, which are none of a transfer."""
    return f"{dataset} (source)"


def own_base_to_novel(results: pd.DataFrame, datasets: Iterable[str]) -> Numbers:
    """Return base, novel and HM of own runs, mean and sd over seeds.

    HM is that of the mean accuracies. The average stands only where a seed has all `datasets`,
    and its HM is the HM of the averages.

    Args:
        results: From `own_results`.
        datasets: The published datasets, in their published spelling.
    """
    spelling = {dataset_key(name): name for name in datasets}
    titles = [spelling.get(dataset_key(name), name) for name in results.dataset]
    numbers: Numbers = {}
    for setting, runs in results.assign(dataset=titles).groupby("setting", sort=False):
        halves = _by_seed(runs, spelling.values(), ["split_kind"]).unstack("split_kind")
        if not {"base", "novel"} <= set(halves.columns):
            continue
        halves = halves[["base", "novel"]].dropna()
        halves["hm"] = [harmonic_mean(base, novel) for base, novel in halves.to_numpy()]
        remarks = _remarks(runs, spelling.values())
        for dataset, seeds in halves.groupby(level="dataset", sort=False):
            note = remarks.get(str(dataset), "")
            cells = {metric: _cell(seeds[metric], note) for metric in ("base", "novel", "hm")}
            means = harmonic_mean(seeds.base.mean(), seeds.novel.mean())
            cells["hm"] = replace(cells["hm"], value=means)
            numbers |= {(str(setting), str(dataset), key): cell for key, cell in cells.items()}
    return numbers


def own_accuracies(results: pd.DataFrame, targets: Iterable[str], source: str) -> Numbers:
    """Return accuracies of own runs on all classes, mean and sd over seeds, by setting and column.

    Args:
        results: From `own_results`.
        targets: The published targets, over which the average goes; `source` is not among them.
        source: The published source, where zero-shot CLIP stands too; empty where each is trained
            on itself. What a run was trained on has a column of its own and enters no average.
    """
    spelling = {dataset_key(name): name for name in targets}
    names, columns = spelling | {dataset_key(source): source}, []
    for dataset, trained in zip(results.dataset, results.source):
        name = names.get(dataset_key(dataset), dataset)
        within = source and dataset_key(trained or source) == dataset_key(dataset)
        columns.append(source_column(name) if within else name)
    numbers: Numbers = {}
    for setting, runs in results.assign(dataset=columns).groupby("setting", sort=False):
        remarks = _remarks(runs, spelling.values())
        for dataset, seeds in _by_seed(runs, spelling.values(), []).groupby(
            level="dataset", sort=False
        ):
            cell = _cell(seeds, remarks.get(str(dataset), ""))
            numbers[str(setting), str(dataset), "accuracy"] = cell
    return numbers


def _by_seed(runs: pd.DataFrame, averaged: Collection[str], extra: list[str]) -> pd.Series:
    """Return accuracy by (dataset, seed, *extra), with an average where all datasets are there."""
    values = runs.groupby(["dataset", "seed", *extra], sort=False).accuracy.mean()
    among = values[values.index.get_level_values("dataset").isin(averaged)]
    groups = among.groupby(level=["seed", *extra])
    complete = groups.mean()[groups.size() == len(averaged)]
    return pd.concat([values, pd.concat({AVERAGE: complete}, names=["dataset"])])


def _remarks(runs: pd.DataFrame, averaged: Iterable[str]) -> dict[str, str]:
    """Return what a reader must know of a setting's cells, by dataset and for the average.

    That they are of other test images than the published ones shows in their number: of a part, of
    another split, or of a folder that has a published dataset's name only.
    """
    sizes, remarks = _published_sizes(), dict[str, str]()
    for dataset, part in runs.groupby("dataset", sort=False):
        found = []
        published = sizes.get(dataset_key(str(dataset).removesuffix(source_column(""))))
        if published and "n" in part:
            tested = part.groupby(["seed", "source"]).n.sum(min_count=1).dropna()
            if other := sorted({int(n) for n in tested if n != published}):
                counts = " or ".join(f"{n:,}" for n in other)
                found.append(f"tested on {counts} images, the published split has {published:,}")
        if "note" in part:
            found += [note for note in dict.fromkeys(part.note) if note]
        if found:
            remarks[str(dataset)] = f"{dataset}: {', '.join(found)}"
    if among := [remarks[name] for name in averaged if name in remarks]:
        remarks[AVERAGE] = BETWEEN.join(among)
    return remarks


@cache
def _published_sizes() -> dict[str, int]:
    """Return how many test images the published split of each shipped dataset has."""
    found = [read_toml(path) for path in shipped("data_manifests").glob("*.toml")]
    return {
        dataset_key(one["title"]): one["counts"]["test"]
        for one in found if "test" in one.get("counts", {})
    }  # fmt: skip


def _cell(seeds: pd.Series, note: str) -> TableCell:
    spread = float(seeds.std(ddof=1)) if len(seeds) > 1 else None
    flag = REMARK if note else ""
    return TableCell(float(seeds.mean()), spread, len(seeds), flag, note, source="own runs")
