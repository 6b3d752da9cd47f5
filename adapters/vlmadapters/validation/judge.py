"""What folds say of two settings: the paired difference, its interval, and how well they agree.

Everything here reads a search table (one row per dataset, seed, fold and setting). Settings are
compared in the same folds only.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy

from vlmadapters.protocols.results import harmonic_means
from vlmadapters.validation.means import DIGITS
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.metrics.intervals import LEVEL

if TYPE_CHECKING:
    import pandas as pd

SEARCH_COLUMNS = (
    "stage", "dataset", "seed", "fold", "held_out", "setting",
    "base", "novel", "base_log_likelihood", "novel_log_likelihood", "steps", "seconds",
)  # fmt: skip


def _log_likelihood(table: pd.DataFrame) -> pd.Series:
    return table[["base_log_likelihood", "novel_log_likelihood"]].mean(axis=1)


def _accuracy(table: pd.DataFrame) -> pd.Series:
    base, novel = table["base"], table["novel"]
    # Folds without held-out classes have base accuracy alone.
    return harmonic_means(base, novel).where(novel.notna(), base)


CRITERIA: dict[str, tuple[Callable[[pd.DataFrame], pd.Series], str]] = {
    "log_likelihood": (_log_likelihood, "held-out log-likelihood, mean of inner base and novel"),
    "base_log_likelihood": (
        lambda table: table["base_log_likelihood"],
        "held-out log-likelihood of inner base classes",
    ),
    "accuracy": (_accuracy, "harmonic mean of inner base and novel accuracy, percent"),
}

# What is left of them where folds hold out no class whole.
_OF_BASE = {
    "log_likelihood": CRITERIA["base_log_likelihood"][1],
    "accuracy": "accuracy of inner base classes, percent",
}


def meaning(criterion: str, apart: bool) -> str:
    """Return a criterion in words.

    Args:
        criterion: A name of `CRITERIA`.
        apart: Whether any fold holds out whole classes as well.
    """
    plain = CRITERIA[criterion][1]
    return plain if apart else _OF_BASE.get(criterion, plain)


@dataclass(frozen=True)
class Difference:
    """The criterion of one setting minus that of another, paired by fold.

    Attributes:
        mean: Mean over datasets and seeds of the mean over folds.
        low, high: 95 % interval.
        wins: Folds in which the first setting is better.
        folds: (dataset, seed, fold, difference) of each fold.
        spread: Standard error of the mean.
        freedom: Its degrees of freedom.
    """

    mean: float
    low: float
    high: float
    wins: int
    folds: tuple[tuple[str, int, int, float], ...]
    spread: float = 0.0
    freedom: int = 1

    @property
    def decided(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0

    def among(self, count: int) -> tuple[float, float]:
        """Return the 95 % interval where this is the best of several: it holds for all at once.

        Reference: Dunn, Multiple comparisons among means, 1961 (Bonferroni's inequality).
        """
        half = _quantile(self.freedom, (1 - LEVEL) / count) * self.spread
        return self.mean - half, self.mean + half

    def to_dict(self) -> dict[str, Any]:
        """Return mean, interval, agreement and the folds as JSON values."""
        keys = ("dataset", "seed", "fold", "difference")
        rows = [dict(zip(keys, row)) for row in self.folds]
        head = {"mean": self.mean, "low": self.low, "high": self.high, "decided": self.decided}
        return {**head, "wins": self.wins, "folds": rows}


def values(table: pd.DataFrame, criterion: str) -> pd.DataFrame:
    """Return the criterion, one row per dataset, seed and fold, one column per setting.

    Raises:
        UserError: The criterion is unknown.
    """
    check_one_of("criterion", criterion, CRITERIA)
    found = table.assign(value=CRITERIA[criterion][0](table))
    found = found.drop_duplicates(["dataset", "seed", "fold", "setting"])
    return found.pivot(index=["dataset", "seed", "fold"], columns="setting", values="value")


def difference(table: pd.DataFrame, setting: str, other: str, criterion: str) -> Difference:
    """Return the paired difference of two settings in the folds that both ran in.

    The folds of one draw share training items, so their differences vary less than independent
    ones would: the variance of the mean over n folds is taken as s² · (1/n + h/(1 − h)), where h is
    the share of shots that a fold holds out. More folds shrink the first term alone, and give s²
    more degrees of freedom. Datasets and seeds are fixed; their variances add up. Where all folds
    differ alike nothing is known of the variance, and the interval reaches zero.

    Reference: Nadeau and Bengio, Inference for the generalization error, 2003.

    Args:
        table: Search table.
        setting: Label of a setting.
        other: Label of the one it is compared with.
        criterion: A name of `CRITERIA`; higher is better.

    Raises:
        UserError: A setting is not in the table, or the two share no two folds of one draw.
    """
    wide = values(table, criterion)
    for name in (setting, other):
        check_one_of("setting", name, list(map(str, wide.columns)), where="the search table")
    paired = (wide[setting] - wide[other]).dropna()
    held = table.groupby(["dataset", "seed"])["held_out"].first()
    draws = {key: part.to_numpy(np.float64) for key, part in paired.groupby(level=held.index.names)}
    # One fold has no variance, and a mean without one cannot be judged.
    groups = {key: part for key, part in draws.items() if len(part) > 1}
    if not groups:
        raise UserError(f"{setting} and {other} share no two folds of one draw; run more folds")
    mean = float(np.mean([part.mean() for part in groups.values()]))
    shared = {key: held[key] / (1 - held[key]) for key in groups}
    terms = [part.var(ddof=1) * (1 / len(part) + shared[key]) for key, part in groups.items()]
    spread = float(np.sqrt(np.sum(terms)) / len(groups))
    # Summed over draws, which is right where their variances are equal.
    freedom = sum(len(part) - 1 for part in groups.values())
    quantile = _quantile(freedom, 1 - LEVEL)
    # Accuracies of few items come in steps: that folds end alike is no certainty, and reaches 0.
    half = quantile * spread if spread > 10**-DIGITS else abs(mean)
    keys: list[Any] = list(paired.index)
    rows = tuple((str(d), int(s), int(f), float(v)) for (d, s, f), v in zip(keys, paired))
    wins = int((paired > 0).sum())
    return Difference(mean, mean - half, mean + half, wins, rows, half / quantile, freedom)


def _quantile(freedom: int, outside: float) -> float:
    """Return how far from 0 a t-distributed value lies at least in so large a share of cases."""
    return float(scipy.stats.t.isf(outside / 2, freedom))


def ranking(table: pd.DataFrame, default: str, criterion: str) -> dict[str, float]:
    """Return the mean paired difference of every setting to the default, best first.

    A setting that dropped out is compared in the folds it ran in.
    """
    wide = values(table, criterion)
    to_default = wide.sub(wide[default], axis=0).groupby(level=["dataset", "seed"]).mean().mean()
    found: dict[Hashable, float] = to_default.sort_values(ascending=False, kind="stable").to_dict()
    return {str(setting): float(value) for setting, value in found.items()}
