"""Reading a score table: which rows a metric has, in which space, pooling and split."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmlayers.errors import UserError, check_one_of
from vlmlayers.files import checksum
from vlmlayers.positions import POOLINGS, SPACES, TOWERS

if TYPE_CHECKING:
    import pandas as pd

LOG = logging.getLogger(__name__)
POOLED = "*"
SPLITS = ("train", "val", "test")
# Where a value stands; of a metric one run gives one value there, per seed and what ROW_KEYS name.
PLACE = (
    "metric", "dataset", "tower", "position", "other_tower", "other_position", "space", "pooling",
    "split", "seed",
)  # fmt: skip
ROW_KEYS = ("predicted", "source", "family", "head")  # options that tell rows of one place apart
DEEPEST = 10_000  # blocks that no tower has
ROUNDING = 1e-3  # by which a computed value may miss the bounds of its metric
REQUIRED = (
    "model", "weights", "dataset", "tower", "position", "depth", "space", "pooling", "metric",
    "value", "low", "high", "null", "n", "seed",
)  # fmt: skip


def check_scores(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the table with the optional columns filled in.

    Raises:
        UserError: Columns are missing, the table is empty, a value is no number, an interval or a
            name is none, or it holds more than one model, or more than one scoring of the same
            features.
    """
    scores = bare(scores)
    check_columns(scores)
    if scores.empty:
        raise UserError("the score table is empty; there is nothing to read from it")
    import pandas as pd

    for name in ("value", "low", "high", "null", "depth"):
        values = scores[name]
        if values.dtype.kind in "fiu":
            continue
        wrong = values[pd.to_numeric(values, errors="coerce").isna() & values.notna()]
        if len(wrong):
            raise UserError(
                f"the score table holds {wrong.iloc[0]!r} in the column {name}, where a number is "
                "needed; write it with `vlmlayers score`"
            )
        scores = scores.assign(**{name: pd.to_numeric(values)})
    _refuse_wrong_rows(scores)
    scores = in_words(scores)
    _refuse_models(scores)
    _refuse_repeats(scores)
    return scores


def in_words(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the table with text where names and positions belong, as `read_scores` gives it.

    Of a file that pandas read itself, positions that are all blocks are numbers, and what is empty
    is NaN; names may be categories; optional columns are filled in.
    """
    # Categories of two columns cannot be compared, and those that no row has are counted as well.
    kinds = {name: object for name in scores if scores[name].dtype == "category"}
    scores = scores.astype(kinds) if kinds else scores
    made: dict[str, Any] = {}
    for name in ("position", "other_tower", "other_position", "options"):
        if name not in scores.columns:
            made |= {name: ""} if name != "position" else {}
        elif scores[name].dtype.kind in "fiu":
            made[name] = ["" if math.isnan(one) else f"{one:g}" for one in scores[name]]
        elif name != "position" and scores[name].isna().any():
            made[name] = scores[name].astype(object).fillna("")
    return scores.assign(**made) if made else scores


def _refuse_wrong_rows(scores: pd.DataFrame) -> None:
    """Refuse what an edited table may say and no scoring does: rows without a name, for one."""
    for name in ("metric", "dataset", "tower", "position"):
        if scores[name].isna().any():
            raise UserError(
                f"{int(scores[name].isna().sum())} rows of the score table name no {name}"
            )
    for tower in scores["tower"].unique():
        check_one_of("tower", str(tower), TOWERS, where="the score table")
    low, high = (scores[name].to_numpy(float) for name in ("low", "high"))
    if (crossed := low > high).any():
        first = scores[crossed].iloc[0]
        raise UserError(
            f"the score table has an interval from {first['low']} to {first['high']}, of "
            f"{first['metric']} at {first['tower']} {first['position']}; low must not exceed high"
        )


def check_bounds(scores: pd.DataFrame) -> None:
    """Refuse values that their metric cannot take, such as shares in percent.

    A value outside its own interval is none of these: all draws of a bootstrap may lie on one side.

    Raises:
        UserError: Names the first.
    """
    from vlmlayers.metrics.table import METRICS

    names = scores["metric"].astype(object)
    values = scores["value"].to_numpy(float)
    known = {name: METRICS[name].bounds for name in names.unique() if name in METRICS}
    low, high = (names.map({name: two[end] for name, two in known.items()}) for end in (0, 1))
    wrong = (values < low.astype(float) - ROUNDING) | (values > high.astype(float) + ROUNDING)
    if wrong.any():
        first = scores[wrong].iloc[0]
        least, most = known[first["metric"]]
        raise UserError(
            f"the score table has {first['value']:.6g} as {first['metric']} at {first['tower']} "
            f"{first['position']}, whose values lie from {least:g} to {most:g}"
        )


def check_columns(
    scores: pd.DataFrame, needed: Sequence[str] = REQUIRED, where: str = "the score table"
) -> None:
    """Refuse a table that lacks columns, such as those which reading it takes.

    Raises:
        UserError: Names them.
    """
    missing = [name for name in needed if name not in scores.columns]
    if missing:
        raise UserError(
            f"{where} lacks the columns {', '.join(missing)}; write it with `vlmlayers score`"
        )


def _refuse_models(scores: pd.DataFrame) -> None:
    """Refuse the scores of several models: no mean of them says anything."""
    models = scores[["model", "weights"]].drop_duplicates().sort_values(["model", "weights"])
    if len(models) > 1:
        column = "model" if models["model"].nunique() > 1 else "weights"
        named = ", ".join(f"{m} ({w})" for m, w in models.head(4).itertuples(index=False))
        raise UserError(
            f"the score table holds {len(models)} models ({named}); keep the rows of one, such as "
            f"scores[scores[{column!r}] == {models[column].iloc[0]!r}]"
        )


def _refuse_repeats(scores: pd.DataFrame) -> None:
    """Refuse several values of a metric at one place and seed: two scorings, joined."""
    place = [name for name in PLACE if name in scores.columns]
    twice = scores[scores.duplicated(place, keep=False)]
    if twice.empty:
        return
    # Options are text: only those of rows that look alike without them are parsed.
    keys = [";".join(w for w in str(o).split(";") if w.split("=")[0] in ROW_KEYS)
            for o in twice["options"]]  # fmt: skip
    again = twice[twice.assign(_key=keys).duplicated([*place, "_key"], keep=False)]
    if len(again):
        first = again.iloc[0]
        raise UserError(
            f"the score table has several values of {first['metric']} at {first['tower']} "
            f"{first['position']} of {first['dataset']}, seed {first['seed']}: scorings with "
            "other options, or of weights of one name, joined; name them apart by "
            "scores.assign(weights=…), keep the rows of one, or draw each in axes of its own"
        )


def ceiling(scores: pd.DataFrame, metric: str, tower: str) -> float:
    """Return the best value that a dataset accuracy can have on a tower.

    It is below 1 where datasets share prompts: no read-out tells from which of them one is. Of
    several poolings or splits it is that of the one which figures read.
    """
    if not metric.startswith("dataset_accuracy"):  # a recall or confusion may reach 1 all the same
        return 1.0
    found = ceilings(Reading().of_all_datasets(scores, metric, tower))
    return float(found.min()) if len(found) else 1.0


def ceilings(rows: pd.DataFrame) -> pd.Series:
    """Return the best values there can be that score rows note."""
    found = rows["options"].astype(str).str.extract(r"(?:^|;)ceiling=([^;]+)")[0]
    return found.dropna().astype(float)


def is_random(table: pd.DataFrame) -> bool:
    """Return whether a table of scores or results is of an untrained model, of any of several."""
    return "weights" in table and bool((table["weights"].astype(str) == "random").any())


def values_mark(scores: pd.DataFrame) -> str:
    """Return sixteen hexadecimal digits that change with any value of a table, not with its order.

    Of values as a CSV file gives them back, to eight digits.
    """
    columns = [name for name in PLACE if name in scores]
    places = scores[columns].astype(str).agg("\0".join, axis=1)
    return checksum(sorted(places + scores["value"].map("\0{:.8g}\n".format)))[:16]


def bare(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the table without its attributes, which pandas copies at every step."""
    if not scores.attrs:
        return scores
    table = scores.copy(deep=False)
    table.attrs = {}
    return table


def depths(scores: pd.DataFrame) -> dict[str, int]:
    """Return the number of blocks of each tower in the table, `vision` first.

    Of a table that leaves out the last blocks the column `depth` tells how many there are.
    """
    found = {}
    paired = {"other_tower", "other_position"} <= set(scores.columns)
    for tower in TOWERS:
        named = set(map(str, scores.loc[scores["tower"] == tower, "position"].unique()))
        if paired:
            partners = scores.loc[scores["other_tower"] == tower, "other_position"]
            named |= set(map(str, partners.unique()))
        blocks = [p for p in named if p.isdecimal()]
        # Depth becomes the length of arrays: a digit too many in a table must not fill the memory.
        absurd = [p for p in blocks if len(p) >= len(str(DEEPEST))]
        if absurd:
            raise UserError(
                f"the score table has a {tower} position {absurd[0][:40]}; no tower is that deep"
            )
        if blocks:
            found[tower] = max(*map(int, blocks), _whole_depth(scores, tower))
    if not found:
        raise UserError("the score table has no value at any block; score positions 1..L first")
    return found


def _whole_depth(scores: pd.DataFrame, tower: str) -> int:
    """Return of how many blocks those of a tower are by their relative depth; 0 where unsaid."""
    if "depth" not in scores.columns:
        return 0
    places = scores.loc[scores["tower"] == tower, ["position", "depth"]].drop_duplicates()
    places = places[places["position"].astype(str).str.isdecimal() & (places["depth"] > 0)]
    whole = places["position"].astype(float) / places["depth"].astype(float)
    # Block b of L is at depth b / L; what gives no whole number was not written by `score`.
    known = sorted(set(whole[(whole - whole.round()).abs() < 0.01].round().astype(int)))
    if len(known) > 1:
        raise UserError(
            f"the score table is of {tower} towers of {known[0]} and {known[-1]} blocks, by its "
            "column depth; keep the rows of one model"
        )
    return known[0] if known and known[0] < DEEPEST else 0


def refuse_unknown_depth(scores: pd.DataFrame, blocks: Mapping[str, int]) -> None:
    """Refuse to choose in a tower whose number of blocks a table does not say.

    Rows of one tower name blocks of the other as partners; where those rows end early, so may they.
    """
    own = set(scores["tower"])
    positions = scores["position"].astype(str)
    for tower, other in (TOWERS, TOWERS[::-1]):
        if tower in own or tower not in blocks:
            continue
        last = positions[positions.str.isdecimal()].astype(int).max()
        if last < blocks[other]:
            raise UserError(
                f"the scores end at {other} block {last} of {blocks[other]} and have none of the "
                f"{tower} tower, whose depth is not known then; score it as well, or all positions"
            )


@dataclass(frozen=True)
class Reading:
    """One way to read a metric's rows, where a table holds several.

    Attributes:
        space: `native`, `normed` or `joint`; None takes the first that is present.
        pooling: `model`, `cls`, `eot` or `mean`; None takes the first that is present.
        split: `train`, `val` or `test`; None takes the first that a dataset has.
        dataset: Name of a dataset; None takes the pooled rows, or else the mean over datasets.
    """

    space: str | None = None
    pooling: str | None = None
    split: str | None = None
    dataset: str | None = None

    def rows(self, scores: pd.DataFrame, metric: str, tower: str) -> pd.DataFrame:
        """Return the rows of one metric on one tower that this reading selects."""
        rows = self.of_all_datasets(scores, metric, tower)
        pooled = rows["dataset"] == POOLED
        return rows[pooled] if self.dataset is None and pooled.any() else rows

    def of_all_datasets(self, scores: pd.DataFrame, metric: str, tower: str) -> pd.DataFrame:
        """Return the same rows of every dataset, and the pooled ones."""
        rows = scores[(scores["metric"] == metric) & (scores["tower"] == tower)]
        if len(rows) and self.dataset is not None:
            check_one_of(
                "dataset", self.dataset, sorted(rows["dataset"].unique()), f"{metric} scores"
            )
            rows = rows[rows["dataset"] == self.dataset]
        for choice in self._choices(rows):
            rows = choice.kept(rows)
        return rows

    def say_choice(self, scores: pd.DataFrame, metric: str) -> None:
        """Say in a line each where this reading takes one space, pooling or split of several."""
        # Tables laid end to end repeat their row labels, by which rows left out are told below.
        scores = scores.reset_index(drop=True)
        lines: dict[str, None] = {}
        for tower in TOWERS:
            rows = scores[(scores["metric"] == metric) & (scores["tower"] == tower)]
            for choice in self._choices(rows):
                kept = choice.kept(rows)
                left_out = rows[~rows.index.isin(kept.index)]
                if choice.wanted is None and len(left_out):
                    column, other = choice.column, sorted(left_out[choice.column].unique())
                    if kept[column].nunique() > 1:  # of splits: each dataset has its own first one
                        other = [by_dataset(left_out, column, one_alone=False)]
                    lines[
                        f"{metric}: {column} {by_dataset(kept, column)} is read, not "
                        f"{' or '.join(other)}; for another keep its rows: "
                        f"scores[scores[{column!r}] == {left_out[column].iloc[0]!r}]"
                    ] = None
                rows = kept
        for line in lines:
            LOG.warning("%s", line)

    def _choices(self, rows: pd.DataFrame) -> list[_Choice]:
        found = [_Choice("space", self.space, SPACES), _Choice("pooling", self.pooling, POOLINGS)]
        return [*found, *[_Choice("split", self.split, SPLITS)] * ("split" in rows.columns)]


@dataclass(frozen=True)
class _Choice:
    """What is read of a column with several values: the one wanted, or the first in order."""

    column: str
    wanted: str | None
    order: Sequence[str]

    def kept(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Return the rows that are read; of splits each dataset's own first one."""
        present = rows[self.column].astype(str)
        names = set(present.unique())
        if self.wanted is not None and len(rows):
            check_one_of(self.column, self.wanted, sorted(names), where="the score table")
            return rows[present == self.wanted]
        if len(names) <= 1:
            return rows
        rank = present.map([*self.order, *sorted(names - set(self.order))].index)
        if self.column == "split":
            # A dataset without the first split is read at its own first one, not dropped.
            return rows[rank == rank.groupby(rows["dataset"]).transform("min")]
        return rows[rank == rank.min()]


def as_read(scores: pd.DataFrame, metric: str, *, every_space: bool = False) -> pd.DataFrame:
    """Return the rows of a metric that a figure reads: one split of a dataset, pooling and space.

    Args:
        scores: Score table of one or several models, each of which is read by itself.
        metric: A metric of it.
        every_space: Whether every space is read, for a page on which the reader picks one.
    """
    import pandas as pd

    rows = scores[scores["metric"] == metric]
    keys = ["model", "weights", "tower", *["space"] * every_space]
    parts = rows.groupby(keys, sort=False)
    read = [Reading().of_all_datasets(part, metric, str(key[2])) for key, part in parts]
    return pd.concat(read) if read else rows


def by_dataset(rows: pd.DataFrame, column: str, one_alone: bool = True) -> str:
    """Return the values of a column in words, each with its datasets.

    Where there is one value, it stands alone unless `one_alone` is False.
    """
    pairs = rows[[column, "dataset"]].astype(str).drop_duplicates()
    pairs = pairs.replace({"dataset": {POOLED: "all datasets"}})
    grouped = pairs.groupby(column, sort=False)["dataset"]
    found = {str(value): list(of) for value, of in grouped}
    if len(found) <= 1 and one_alone:
        return "".join(found)
    return " and ".join(f"{value} of {', '.join(of)}" for value, of in found.items())


def metric_names(scores: pd.DataFrame) -> list[str]:
    """Return the metrics of the table, in order of appearance."""
    return list(scores["metric"].unique())


def check_metric(scores: pd.DataFrame, metric: str, instead: str = "") -> None:
    """Refuse a metric that is not in the table: one that was not scored, or an unknown name.

    `instead` says what else to do; name another metric of the table where empty.
    """
    if metric in (names := metric_names(scores)):
        return
    # Late: the table of metrics brings scipy along, which drawing and reading do not need.
    from vlmlayers.metrics.declare import MODEL
    from vlmlayers.metrics.table import find_metric

    if (known := find_metric(metric)) is not None:
        more = "examine the model" if known.needs == MODEL else "score it as well"
        other = instead or f"name one of {', '.join(names)}"
        raise UserError(f"the score table has no {metric}: {more}, or {other}")
    check_one_of("metric", metric, names, where="the score table")


def has_curve(scores: pd.DataFrame, metric: str, tower: str) -> bool:
    """Return whether the metric has values of its own at the blocks of this tower.

    Values that relate every block to one and the same position count as its own. So do those
    beside a partner where the other tower has some too, as a retrieval is one either way.
    """
    rows = scores[(scores["metric"] == metric) & (scores["tower"] == tower)]
    if not (_relates_to_one(rows, tower) or _is_both_ways(scores, metric)):
        rows = rows[rows["other_tower"].astype(str) == ""]
    return bool(rows["position"].astype(str).str.isdecimal().any())


def _is_both_ways(scores: pd.DataFrame, metric: str) -> bool:
    """Return whether a metric relates the towers by rows of both, of which each asks the other."""
    rows = scores[scores["metric"] == metric]
    theirs = rows["other_tower"].astype(str)
    across = rows[(theirs != "") & (theirs != rows["tower"])]
    partners = across.groupby(["tower", "position"])["other_position"].nunique()
    return across["tower"].nunique() > 1 and bool((partners == 1).all())


def partnered(rows: pd.DataFrame, tower: str, blocks: Mapping[str, int]) -> pd.DataFrame:
    """Drop rows that relate a block to any but its partner at equal relative depth.

    `blocks` says how many each tower has, of which a table may hold a few. Where every position is
    related to one and the same, such as zero-shot accuracy to the other tower's `proj`, that one is
    the partner and all rows stay.
    """
    theirs = rows["other_tower"].astype(str)
    there = rows["other_position"].astype(str)
    if (theirs == "").all() or _relates_to_one(rows, tower):
        return rows
    here, across = rows["position"].astype(str), theirs == other_tower(tower)
    if (there[across].groupby(here[across]).nunique() == 1).all():
        return rows[(theirs == "") | across]  # gaps are scored at partners alone
    own, other = blocks.get(tower, 0), blocks.get(other_tower(tower), 0)
    partner = [str(partner_block(int(p), own, other)) if p.isdecimal() else p for p in here]
    return rows[(theirs == "") | (across & (there == np.asarray(partner, dtype=object)))]


def _relates_to_one(rows: pd.DataFrame, tower: str) -> bool:
    """Return whether all rows relate to one and the same position, which is not their own tower's.

    Where one position alone was scored, that of the tower itself is the only one there is.
    """
    own = (rows["other_tower"].astype(str) == tower).any()
    return not own and rows["other_position"].astype(str).nunique() <= 1


def partner_block(block: int, own: int, other: int) -> int:
    """Return the block of the other tower at the nearest relative depth.

    Args:
        block: Block of this tower, from 1.
        own: Number of blocks of this tower.
        other: Number of blocks of the other tower.
    """
    # round() takes halves to the even number, and steps between partners would be uneven.
    return min(max(int(np.floor(block * other / own + 0.5)), 1), other)


def other_tower(tower: str) -> str:
    """Return the name of the other tower."""
    return TOWERS[1 - TOWERS.index(tower)]
