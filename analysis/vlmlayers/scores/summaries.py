"""Tidy summaries of score tables: one row per point that a figure or table shows."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable

import numpy as np
import pandas as pd

from vlmlayers.arguments import checked
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.positions import TOWERS, sort_key
from vlmlayers.scores.reading import (
    PLACE,
    POOLED,
    ROW_KEYS,
    Reading,
    as_read,
    bare,
    by_dataset,
    ceiling,
    ceilings,
    check_metric,
    check_scores,
    depths,
    metric_names,
    partnered,
)
from vlmlayers.scores.schema import Scores

LOG = logging.getLogger(__name__)
CURVE_COLUMNS = [
    "metric", "dataset", "tower", "position", "depth", "order", "value", "low", "high", "null", "n",
    "seeds", "space", "pooling",
]  # fmt: skip
# Read-outs of the dataset that an item comes from; where one is shown, the first that is there.
DATASET_ACCURACIES = (
    "dataset_accuracy",
    "dataset_accuracy_ncm",
    "dataset_accuracy_knn",
    "dataset_accuracy_lda",
)
ROW_OPTIONS = (*ROW_KEYS, "p", "raw", "ceiling", "floor")  # differ by row, not by run
# What of a place is averaged in a curve, in words, by the option of ROW_KEYS that tells it apart.
AVERAGED = {"predicted": "predicted datasets", "source": "sources", "family": "families",
            "head": "heads"}  # fmt: skip
# The normal quantile of 97.5 %, written out: reading a table should not import scipy.
_Z = 1.959963984540054


def curves(
    scores: pd.DataFrame, metric: str, dataset: str | None = None, space: str | None = None
) -> pd.DataFrame:
    """Return a metric along both towers: one row per dataset, tower and position.

    `value` is the mean over seeds; n, null and seeds are of the rows that have one. `low` and
    `high` join the mean interval of one seed with 1.96 standard deviations over seeds, as a root
    of squares on each side, within the metric's range and not above what is possible where
    datasets share prompts.
    A metric that relates two positions is read at the partner of equal relative depth.

    Args:
        scores: Score table of one model.
        metric: Name of the metric.
        dataset: One dataset; None keeps all, `*` the pooled rows.
        space: Space to read; None takes the first present.

    Raises:
        UserError: The metric or dataset is not in the table or has no number there, or the table
            holds several models or scorings.
    """
    whole, scores = scores, of_metric(scores, metric)
    blocks = depths(bare(whole))  # after several models have been refused, which may differ in it
    if dataset is not None:
        check_one_of("dataset", dataset, sorted(set(scores["dataset"])), f"the {metric} scores")
        scores = scores[scores["dataset"] == dataset]
    parts = []
    for tower in TOWERS:
        rows = Reading(space=space).of_all_datasets(scores, metric, tower)
        for _, part in rows.groupby("dataset", sort=False):
            parts.append(partnered(part, tower, blocks))
    # Agreement within one tower has no partner to be read at.
    joined = _summary(pd.concat(parts)) if any(map(len, parts)) else pd.DataFrame()
    # No rows have no columns either; what reads the curve counts on these.
    joined = joined.reindex(columns=CURVE_COLUMNS)
    if len(joined):
        refuse_empty(joined["value"], metric)
    least, most = _bounds(metric)
    possible = {tower: ceiling(scores, metric, tower) for tower in TOWERS}
    # Not below the value itself: splits of other seeds may have a lower ceiling.
    reached = joined["tower"].map(possible).astype(float).combine(joined["value"], max)
    high = joined["high"].clip(upper=most)
    high = high.combine(reached, min) if min(possible.values()) < 1 else high
    return joined.assign(low=joined["low"].clip(lower=least), high=high)


def of_metric(scores: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return the rows of a metric, of one model and one scoring.

    Raises:
        UserError: The table lacks the metric or columns, or holds several models or scorings.
    """
    if "metric" in scores.columns and len(scores):
        check_metric(scores, metric)
        scores = bare(scores)[scores["metric"] == metric]
    return check_scores(scores)


def refuse_empty(values: pd.Series, metric: str) -> None:
    """Raise a UserError where a metric has rows and no number in any of them."""
    if not np.isfinite(values.to_numpy(float)).any():
        raise UserError(f"every value of {metric!r} in the score table is missing or infinite")


def _bounds(metric: str) -> tuple[float, float]:
    """Return the range that a metric declares: no band reaches beyond it."""
    # Late: the table of metrics brings scipy along, which drawing and reading do not need.
    from vlmlayers.metrics.table import METRICS

    return METRICS[metric].bounds if metric in METRICS else (-np.inf, np.inf)


def _summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row per dataset, tower and position, seeds joined, in order along each tower."""
    rows = measured(rows)
    groups = rows.groupby(["tower", "dataset", "position"], sort=False)
    made = groups[["metric", "depth", "n", "space", "pooling"]].first()
    mean = groups[["value", "low", "high", "null"]].mean()
    # Rows of one seed, such as one per head, are no draws of each other: their mean is one.
    of_seeds = rows.groupby(["tower", "dataset", "position", "seed"], sort=False)["value"].mean()
    apart = of_seeds.groupby(["tower", "dataset", "position"], sort=False)
    spread = (_Z * apart.std(ddof=1)).where(apart.count() > 1, 0.0)
    made = made.join(mean).assign(
        low=mean["value"] - np.hypot(mean["value"] - mean["low"], spread),
        high=mean["value"] + np.hypot(mean["high"] - mean["value"], spread),
        n=made["n"].fillna(0).astype(int),
        seeds=groups["drawn"].nunique(),
    )
    made = made.reset_index()
    keys = [sort_key(str(position)) for position in made["position"]]
    # Numbered over all curves: one that lacks a position must not shift against the others.
    place = {key: number for number, key in enumerate(sorted(set(keys)))}
    curve = made.groupby(["tower", "dataset"], sort=False).ngroup()
    made = made.assign(order=[place[key] for key in keys], _curve=curve)
    return made.sort_values(["_curve", "order"], ignore_index=True)


def measured(rows: pd.DataFrame) -> pd.DataFrame:
    """Return score rows where one without a value counts in nothing; its seed is in `drawn`."""
    known = rows["value"].notna()
    kept = rows[["n", "null", "low", "high"]].where(known)
    return rows.assign(**kept, drawn=rows["seed"].where(known & (rows["seed"] >= 0)))


def over_datasets(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the pooled rows, or the mean of value, interval and null over datasets.

    A position where a dataset has no value, beside others where it has one, is warned of. There is
    no interval where a dataset has a value without one.
    """
    pooled = frame[frame["dataset"] == POOLED]
    if len(pooled) or frame["dataset"].nunique() <= 1:
        return pooled if len(pooled) else frame
    for (metric, tower), part in frame.dropna(subset="value").groupby(["metric", "tower"]):
        there = pd.crosstab(part["position"], part["dataset"])
        for row, column in np.argwhere(there.to_numpy() == 0)[:1]:
            LOG.warning(
                "%s of the %s tower at %s is a mean without %s, which has no value there: it does "
                "not compare with the other positions",
                metric,
                tower,
                there.index[row],
                there.columns[column],
            )
    keys = ["metric", "tower", "position", "order", "depth"]
    groups = frame.assign(
        _bare=frame["value"].notna() & frame[["low", "high"]].isna().any(axis=1)
    ).groupby(keys, sort=False)
    means = groups[["value", "low", "high", "null"]].mean()
    # A mean of the other datasets' intervals would lie about another value.
    means.loc[groups["_bare"].any(), ["low", "high"]] = np.nan
    means = means.reset_index()
    towers = means["tower"].map(TOWERS.index)
    return means.assign(_tower=towers).sort_values(["_tower", "order"]).drop(columns="_tower")


@checked
def overview(scores: Scores) -> pd.DataFrame:
    """Return all metrics, mean over seeds: a row per position, columns metric and tower.

    All datasets are pooled where a metric is scored so; elsewhere it is the mean over datasets.

    Args:
        scores: Score table of one model.

    Raises:
        UserError: No metric has values along a tower, as agreement within one has none.
    """
    made = [over_datasets(curves(scores, metric)) for metric in metric_names(bare(scores))]
    if not any(map(len, made)):
        raise UserError("no metric of the score table has values along a tower; score others")
    shown = pd.concat([part for part in made if len(part)], ignore_index=True)
    keys = list(dict.fromkeys(zip(shown["metric"], shown["tower"])))
    wide = shown.pivot_table(
        index="position", columns=["metric", "tower"], values="value", dropna=False
    )  # a tower without a number keeps its column
    return wide.loc[sorted(wide.index, key=sort_key), keys]


def agreement(
    scores: pd.DataFrame,
    metric: str = "cka_debiased",
    tower: str = "vision",
    other_tower: str = "text",
    dataset: str | None = None,
) -> pd.DataFrame:
    """Return agreement of two towers' positions: position, other_position, value, null.

    Args:
        scores: Score table of one model.
        metric: A metric that relates two positions.
        tower: Tower of the rows.
        other_tower: Tower of the columns; the same name gives agreement within a tower.
        dataset: One dataset; None takes the pooled rows or the mean over datasets.

    Raises:
        UserError: The metric is not in the table.
    """
    rows = agreement_rows(of_metric(scores, metric), metric, tower, other_tower, dataset)
    pair = ["position", "other_position"]
    # By dataset first, so that one with more seeds does not weigh more.
    each = rows.groupby(["dataset", *pair], sort=False)[["value", "null"]].mean()
    frame = each.groupby(pair, sort=False).mean().reset_index()
    if len(frame):
        refuse_empty(frame["value"], metric)
    keys = [tuple(map(sort_key, map(str, pair))) for pair in zip(*(frame[name] for name in pair))]
    return frame.iloc[sorted(range(len(frame)), key=keys.__getitem__)].reset_index(drop=True)


def agreement_rows(
    scores: pd.DataFrame,
    metric: str,
    tower: str = "vision",
    other_tower: str = "text",
    dataset: str | None = None,
) -> pd.DataFrame:
    """Return the rows that `agreement` is of, for what is said of them."""
    pairs = scores[scores["other_position"].astype(str) != ""]
    rows = Reading(dataset=dataset).of_all_datasets(pairs, metric, tower)
    rows = rows[rows["other_tower"] == other_tower]
    # Of these towers: those of another pair may be pooled where these are not.
    pooled = rows["dataset"] == POOLED
    return rows[pooled] if dataset is None and pooled.any() else rows


def metrics_by_shape(scores: pd.DataFrame) -> dict[str, list[str]]:
    """Return the metrics that draw a curve (`curve`) and those that draw a matrix (`matrix`)."""
    scores = bare(scores)
    found: dict[str, list[str]] = {"curve": [], "matrix": []}
    for metric in metric_names(scores):
        rows = scores[scores["metric"] == metric]
        crossed = rows[rows["other_tower"].astype(str) != ""]
        # Of one model, split and pooling: the closest pairs of two may share a position by chance.
        keys = ("model", "weights", *PLACE)
        place = [name for name in keys if name in rows.columns and name != "other_position"]
        many = crossed.groupby(place, dropna=False)["other_position"].nunique()
        found["matrix" if len(many) and many.max() > 1 else "curve"].append(metric)
    return found


def dataset_readout(names: Container[str]) -> str:
    """Return the first of `DATASET_ACCURACIES` among metrics; empty where there is none."""
    return next((name for name in DATASET_ACCURACIES if name in names), "")


def dataset_names(scores: pd.DataFrame) -> list[str]:
    """Return the datasets of the table without the pooled one, in order of appearance."""
    return [name for name in dict.fromkeys(scores["dataset"]) if name != POOLED]


def how_made(
    scores: pd.DataFrame,
    metric: str,
    intervals: bool = True,
    *,
    every_space: bool = False,
    beside: pd.DataFrame | None = None,
) -> str:
    """Return split, space, pooling, n, options and seeds of a metric, in words for a caption.

    Args:
        scores: Score table.
        metric: A metric of it.
        intervals: Whether to say how the intervals were made.
        every_space: Whether the caption is of all spaces, or of the one that figures read.
        beside: The table that `scores` is a part of, if it is one: a row between towers holds the
            pooling of its first, and that of the other may stand in rows of other metrics.
    """
    rows = as_read(scores, metric, every_space=every_space)
    theirs = scores if beside is None else beside
    theirs = theirs[theirs["model"].isin(rows["model"]) & theirs["weights"].isin(rows["weights"])]
    pooling, counts = [], []
    for tower in TOWERS:
        part = rows[rows["tower"] == tower]
        related = tower in set(rows["other_tower"])
        pooled = part if len(part) or not related else theirs[theirs["tower"] == tower]
        if len(pooled):
            pooling.append(f"{_names(pooled['pooling'])} ({tower})")
        if len(part):
            ends = dict.fromkeys((f"{part['n'].min():,.0f}", f"{part['n'].max():,.0f}"))
            counts.append(f"{'–'.join(ends)} ({tower})")
    stated = stated_options(rows, metric).split("; ")
    options = [one for one in stated if one and (intervals or not one.startswith("interval "))]
    facts = [
        f"split {by_dataset(rows, 'split')}",
        f"{_names(rows['space'])} space",
        f"pooling {' and '.join(pooling)}",
        f"n = {' and '.join(counts)}",
        *_mean_over(rows),
        *options,
        *(
            f"at most {most:.2g} ({tower}), as datasets share prompts"
            for tower in TOWERS
            if (most := ceiling(rows, metric, tower)) < 1
        ),
        *_most_by_dataset(rows, metric),
    ]
    return "; ".join(facts)


def _mean_over(rows: pd.DataFrame) -> list[str]:
    """Return in words over what a curve is a mean besides seeds, such as the heads of a block."""
    place = [name for name in PLACE if name in rows.columns]
    several = rows[rows.duplicated(place, keep=False)]
    said = []
    for key, words in AVERAGED.items():
        values = several["options"].astype(str).str.extract(rf"(?:^|;){key}=([^;]+)")[0]
        counts = values.groupby([several[name] for name in place]).nunique()
        if len(counts) and counts.max() > 1:
            ends = dict.fromkeys(f"{end}" for end in (counts.min(), counts.max()))
            said.append(f"{'–'.join(ends)} {words}")
    return [f"mean over {' and '.join(said)}"] if said else []


def _most_by_dataset(rows: pd.DataFrame, metric: str) -> list[str]:
    """Return in words how high a metric can be whose classes are small, a range over datasets."""
    if metric in DATASET_ACCURACIES:  # of all datasets together, and for another reason
        return []
    said = []
    for tower in TOWERS:
        found = ceilings(rows[rows["tower"] == tower])
        if len(found):
            ends = dict.fromkeys(f"{end:.2g}" for end in (found.min(), found.max()))
            said.append(f"at most {'–'.join(ends)} ({tower}), as classes are small")
    return said


@checked
def stated_options(scores: Scores, metric: str) -> str:
    """Return the options behind a metric's rows and their seeds, in words for a caption.

    What differs from row to row, such as a p value or the predicted dataset, is left out.
    """
    rows = scores[scores["metric"] == metric]
    found: dict[str, dict[str, dict[str, None]]] = {}  # option → value → towers
    for tower, text in dict.fromkeys(zip(rows["tower"], rows["options"])):
        for key, equals, value in (word.partition("=") for word in text.split(";")):
            if equals and key not in ROW_OPTIONS:
                found.setdefault(key, {}).setdefault(value, {})[str(tower)] = None
    words = [
        f"{key.replace('_', ' ')} {_by_tower(values).replace('_', ' ')}"
        for key, values in found.items()
        if len(values) <= 2
    ]
    seeds = sorted({int(seed) for seed in rows["seed"]} - {-1})
    words += [f"seeds {', '.join(map(str, seeds))}"] if seeds else []
    return "; ".join(words)


def _by_tower(values: dict[str, dict[str, None]]) -> str:
    """Return values of an option in words, each with its towers where they differ by tower."""
    if len({tuple(towers) for towers in values.values()}) == 1:
        return " and ".join(values)
    return " and ".join(f"{value} ({', '.join(towers)})" for value, towers in values.items())


def _names(values: Iterable[object]) -> str:
    return "/".join(dict.fromkeys(map(str, values)))


def harmonic_mean(base: float, novel: float) -> float:
    """Return 2·b·n / (b + n) of base and novel accuracy, 0 where both are 0."""
    return 2 * base * novel / (base + novel) if base + novel else 0.0
