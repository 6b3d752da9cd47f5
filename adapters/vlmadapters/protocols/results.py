"""The results table: its columns and its summary."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from vlmlayers.arguments import Takes, checked
from vlmlayers.errors import UserError
from vlmlayers.metrics.intervals import wilson
from vlmlayers.scores.summaries import harmonic_mean

if TYPE_CHECKING:
    from vlmadapters.methods.base import Method

KEY = (
    "protocol", "method", "model", "weights", "dataset", "source", "split_kind", "placement",
    "settings", "recipe", "shots", "seed",
)  # fmt: skip
COLUMNS = (
    *KEY,  # what identifies a row; the rest are results
    "accuracy", "n", "low", "high", "log_likelihood", "first_half", "second_half", "template",
    "parameters", "changed", "seconds", "device", "precision", "random_weights", "note",
)  # fmt: skip
CELL = ("dataset", "split_kind", "seed")  # what identifies a row of one training
ZERO_SHOT_CLIP, ZERO_SHOT_OWN = "zero-shot CLIP", "zero-shot CLIP, dataset template"
ZERO_SHOT_METHODS = (ZERO_SHOT_CLIP, ZERO_SHOT_OWN)
UNMOVED = "training changed nothing: raise lr, or the method's scale, for this backbone"
UNMOVED_FIT = "the fit changed nothing: its answers are those of zero-shot CLIP"
UNMOVED_TEST = "its answers are those of zero-shot CLIP"
GROUP = [
    "protocol", "method", "model", "weights", "source", "placement", "settings", "recipe", "shots",
]  # fmt: skip
ADDED: dict[str, Any] = {"settings": "", "recipe": "", "parameters": 0, "seconds": 0.0}
# What tells trainings of one method apart beside the placement.
OFTEN_ALIKE = ("settings", "recipe", "shots")
WORDS = [key for key in (*GROUP, "note") if key != "shots"]  # empty where a file has no value
# What a summary reads.
READ = [*(k for k in GROUP if k not in ADDED), "dataset", "split_kind", "seed", "accuracy", "note"]
Results = Annotated[pd.DataFrame, Takes("a results table, as `train` returns it", "such tables")]


def method_fields(method: Method, varied: Container[str] = ()) -> dict[str, Any]:
    """Return method, placement, settings and parameters as fields of a row.

    Args:
        method: The method.
        varied: Settings to leave out, as the recipe has a value of its own for each dataset: what
            is averaged over datasets is of equal settings.
    """
    config = method.config
    shown = {k: v for k, v in config.settings().items() if v is not None and k not in varied}
    # A file by its name and, as `#hash`, its content: the same wherever it lies.
    inside = {str(file): file.name for file in config.files}
    for key, value in shown.items():
        path, mark, then = str(value).partition("#")
        if (path := str(Path(path))) in inside:
            shown[key] = f"{inside[path]}{mark}{then}"
    settings = [f"{key}={value}" for key, value in shown.items()]
    return {
        "method": config.title,
        "placement": config.placement,
        "settings": " ".join(settings),
        "parameters": method.parameter_count(),
    }


def names(results: pd.DataFrame) -> pd.Series:
    """Return what each row was trained as, such as `MaPLe v1-9,t1-9`.

    Settings, recipe and shots are named where the table has several of the method.

    Args:
        results: A results table or a summary of one.
    """
    table = worded(results, ["model", "method", "placement", *OFTEN_ALIKE]).astype(str)
    found = (table["method"] + " " + table["placement"]).str.strip()
    kinds = table.groupby(["model", "method"], sort=False)
    for column in OFTEN_ALIKE:
        words = ", " + table[column] + (" shots" if column == "shots" else "")
        named = (kinds[column].transform("nunique") > 1) & (table[column] != "")
        found += words.where(named, "")
    return found


def worded(results: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """Return columns with empty words where a table, as one read from a file, has no value."""
    table = results.reindex(columns=columns).astype(object)
    return table.where(table.notna(), "")


def half_fields(truth: NDArray[np.int64], correct: NDArray[np.bool_]) -> dict[str, float]:
    """Return accuracy on two halves of the test items, as fields of a row.

    The items of each class go to the halves in turn, so that both have the same classes.

    Args:
        truth: (item,) labels.
        correct: (item,) whether the answer is right.
    """
    # The number of an item within its class decides the half: even ones go to the first.
    turn = pd.Series(truth).groupby(truth).cumcount().to_numpy() % 2
    halves = (correct[turn == half] for half in (0, 1))
    values = [float(one.mean()) if len(one) else float("nan") for one in halves]
    return dict(zip(("first_half", "second_half"), values))


def accuracy_fields(correct: int, n: int) -> dict[str, Any]:
    """Return accuracy as a share with its Wilson interval, as fields of a row."""
    if not n:
        return {"accuracy": float("nan"), "n": 0, "low": 0.0, "high": 1.0}
    low, high = wilson(correct / n, n)
    return {"accuracy": correct / n, "n": n, "low": float(low), "high": float(high)}


@checked
def summarise(results: Results) -> pd.DataFrame:
    """Return mean and sd over seeds per dataset, harmonic means, and averages over datasets.

    The harmonic mean of a dataset is that of its mean base and novel accuracy over the seeds that
    have both, its sd that of the seeds' harmonic means. The row `average` holds means over
    datasets of the seeds that have every accuracy of all of them, and is left out where none has;
    its harmonic mean is that of the averages. Datasets
    that any row of the protocol was trained on are left out of averages over targets. Where
    averages of a protocol are over unlike datasets, as of joined tables, each notes which.

    Args:
        results: A results table.

    Returns:
        Columns protocol, method, model, weights, source, placement, settings, recipe, shots,
        dataset, metric (`base`, `novel`, `hm`, `all`), mean, sd, seeds (those that have the
        metric), note, parameters, and seconds of one training on average.

    Raises:
        UserError: The table is empty, lacks a column, its accuracies are no numbers, or it has two
            for one cell.
    """
    if missing := [name for name in READ if name not in results.columns]:
        raise UserError(f"the results table lacks {', '.join(missing)}; is it one of `train`?")
    if results.empty:
        raise UserError("the results table is empty; run `vlmlayers evaluate` first")
    if not pd.api.types.is_numeric_dtype(results["accuracy"]):
        raise UserError("the results table holds text in the column accuracy; read it as numbers")
    if results["accuracy"].isna().all():
        raise UserError("the results table has no accuracy in any row; run the training again")
    rows: list[dict[str, Any]] = []
    table = results.assign(source=_comparable_source(results))
    # What tables lack that were written before there were several methods.
    table = table.assign(**{key: value for key, value in ADDED.items() if key not in table})
    table[WORDS] = worded(table, WORDS)
    refuse_conflicts(table, [*GROUP, *CELL])
    # Of any source: averages that stand side by side are of the same datasets.
    of_protocol = table.groupby("protocol")["source"]
    trained = {str(name): set(sources) for name, sources in of_protocol}
    for key, part in table.groupby(GROUP, sort=False, dropna=False):
        head = dict(zip(GROUP, key))
        # A training has a row for each half that it is tested on.
        seconds = part.drop_duplicates(["dataset", "seed"])["seconds"].mean()
        cost = {"parameters": int(part["parameters"].max()), "seconds": seconds}
        rows += [head | row | cost for row in _datasets(part, trained[str(head["protocol"])])]
    summary = pd.DataFrame(rows)
    averages = summary.loc[summary["dataset"] == "average"]
    alike = averages.groupby("protocol")["note"].transform("nunique") == 1
    summary.loc[alike.index[alike], "note"] = ""
    return summary


def harmonic_means(base: pd.Series, novel: pd.Series) -> pd.Series:
    """Return the harmonic mean of each pair, 0 where both are 0 and NaN where one is."""
    both = base + novel
    return (2 * base * novel / both).where(both != 0, 0.0)


def refuse_conflicts(results: pd.DataFrame, keys: list[str]) -> None:
    """Raise a UserError where rows of equal keys differ in accuracy: their mean is no training's.

    Args:
        results: A results table.
        keys: Columns that identify a cell, those of `CELL` among them.
    """
    cells = worded(results, keys).assign(accuracy=results["accuracy"])
    several = cells.groupby(keys, sort=False)["accuracy"].transform("nunique") > 1
    if several.any():
        named, one = names(results[several]).iloc[0], results[several].iloc[0]
        raise UserError(
            f"the results hold {named} twice on {one['dataset']} ({one['split_kind']}), seed "
            f"{one['seed']}, with different accuracies; keep the rows of one run"
        )


def _comparable_source(results: pd.DataFrame) -> pd.Series:
    """Return the source, blank where each dataset is its own, so that these average together."""
    own = (results["source"] == results["dataset"]) & results["split_kind"].isin(["base", "novel"])
    within = results["protocol"].isin(["base-to-novel", "few-shot"])
    return results["source"].where(~(own | within), "")


def _datasets(part: pd.DataFrame, trained: set[str]) -> list[dict[str, Any]]:
    """Return rows of each dataset, and of the average over those that were not trained on."""
    rows: list[dict[str, Any]] = []
    seeds = part.pivot_table(
        index=["dataset", "seed"],
        columns="split_kind",
        values="accuracy",
        aggfunc="first",  # repeated rows are equal
        sort=False,
    )
    if {"base", "novel"} <= set(seeds.columns):
        seeds["hm"] = harmonic_means(seeds["base"], seeds["novel"])
    noted = set(part["dataset"][part["note"] != ""])
    for dataset, block in seeds.groupby(level="dataset", sort=False):
        notes = _notes(part[part["dataset"] == dataset]) if dataset in noted else []
        rows += _metrics(str(dataset), block, "; ".join(notes))
    targets = [d for d in seeds.index.unique("dataset") if d not in trained]
    if len(targets) > 1:
        over = f"average of {', '.join(map(str, sorted(targets)))}"
        rows += _metrics("average", _average(seeds.loc[targets]), over)
    return rows


def _notes(rows: pd.DataFrame) -> list[str]:
    """Return each note of a setting's rows on a dataset, and of what part of them if not of all."""
    written = rows[rows["note"] != ""]
    kinds, seeds = rows["split_kind"].nunique(), rows["seed"].nunique()
    found = []
    for note, part in written.groupby("note", sort=False):
        parts = list(part["split_kind"].unique()) if part["split_kind"].nunique() < kinds else []
        if (count := part["seed"].nunique()) < seeds:
            parts.append(f"in {count} of {seeds} runs")
        found.append(f"{note} ({', '.join(parts)})" if parts else str(note))
    return found


def _average(seeds: pd.DataFrame) -> pd.DataFrame:
    """Return the mean over datasets for every seed that all of them have; empty without one."""
    # A seed that misses a dataset, or one half of it, would average over easier or harder ones
    # than the others do.
    plain = seeds.drop(columns="hm", errors="ignore").dropna(axis="columns", how="all")
    whole = plain.dropna()
    complete = whole.groupby(level="seed").filter(
        lambda block: len(block) == plain.index.get_level_values("dataset").nunique()
    )
    mean = complete.groupby(level="seed").mean()
    if {"base", "novel"} <= set(mean.columns):
        mean["hm"] = harmonic_means(mean["base"], mean["novel"])
    return mean


def _metrics(dataset: str, block: pd.DataFrame, note: str) -> list[dict[str, Any]]:
    means, spreads, counts = block.mean(), block.std(ddof=1), block.count()
    # Papers print the harmonic mean of the printed means, which is not the mean of the seeds' ones.
    if "hm" in block.columns:
        paired = block[block["hm"].notna()].mean()
        means["hm"] = harmonic_mean(paired["base"], paired["novel"])
    order = [m for m in ("base", "novel", "hm", "all") if m in block.columns]
    return [
        {
            "dataset": dataset,
            "metric": metric,
            "mean": means[metric],
            "sd": spreads[metric],
            "seeds": int(counts[metric]),
            "note": note,
        }
        for metric in order
        if pd.notna(means[metric])
    ]
