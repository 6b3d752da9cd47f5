"""The amount of each placement, tuned on training shots, so that only places are compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from vlmadapters.protocols.results import harmonic_means
from vlmadapters.training.recipes import Recipe
from vlmadapters.validation.candidates import tried_amounts
from vlmadapters.validation.judge import ranking
from vlmadapters.validation.race import Track, label
from vlmlayers.placement import ZERO_SHOT, Amount, Placement

AMOUNT_COLUMNS = ("placement", "amount", "times", "base", "novel", "hm", "n")


@dataclass(frozen=True, eq=False)
class Tuning:
    """What tuning found.

    Attributes:
        settings: Each placement at the amount that did best, in the order that was asked for.
        table: Held-out accuracy over amount, with the columns `AMOUNT_COLUMNS`: percent, mean over
            the n folds that the amount ran in. Those that dropped out ran in the first alone, so
            that rows of other n differ by their folds as well; what is picked is compared within
            folds. novel and hm are NaN where no class was held out whole; times is the amount in
            multiples of the recipe's.
        trainings: Cost in full trainings of one placement.
    """

    settings: tuple[Recipe, ...]
    table: pd.DataFrame
    trainings: float


def tune(
    track: Track,
    settings: Sequence[Recipe],
    amounts: Sequence[Amount] | None = None,
    also: Amount | None = None,
) -> Tuning:
    """Return each setting at the amount that does best on folds of training shots.

    By successive halving over folds, as a search does, but for each placement by itself, and the
    best mean is taken even where it cannot be told from the next: a comparison of places needs an
    amount that suits each, not one that is proved. One that diverges is left out.

    Args:
        track: Where settings run.
        settings: Placements at the recipe's amount.
        amounts: Amounts to try beside it; multiples of it where None.
        also: One more, such as that of a search.

    Raises:
        Diverged: A placement at the recipe's amount.
    """
    alive = {label(one): tried_amounts(one, amounts, also) for one in settings}
    tried = {name: [own, *rivals] for own, (name, rivals) in zip(settings, alive.items())}
    # All placements in one call for each fold, so that they train side by side.
    for number in range(1, track.rounds + 1):
        track.run("tuning", settings, (one for rest in alive.values() for one in rest), number)
        for name, rivals in alive.items():
            order = ranking(track.table, name, "log_likelihood")
            kept = [one for one in rivals if label(one) not in track.diverged]
            kept.sort(key=lambda one: -order[label(one)])
            alive[name] = kept[: math.ceil(len(kept) / 2)]
    picked = []
    for own, (name, rivals) in zip(settings, alive.items()):
        order = ranking(track.table, name, "log_likelihood")
        picked.append(max([own, *rivals], key=lambda one: order[label(one)]))
    table = _over_amount(track, tried)
    return Tuning(tuple(picked), table, track.cost)


def times(setting: Recipe, of: Recipe, steps: float) -> float:
    """Return an amount in multiples of another: of scale, of learning rate and of steps.

    Args:
        setting: The setting whose amount it is.
        of: The one whose amount is 1.
        steps: Steps of the one for each step of the other. Counted in trainings: a recipe may
            count its own by shot and an amount by epoch.
    """
    found = steps * setting.train.lr / of.train.lr
    scale, own = getattr(setting.method, "scale", None), getattr(of.method, "scale", None)
    # 0.3 / 0.1 is a little less than 3, and would be another amount than three times the epochs.
    return float(f"{found * (scale / own if scale and own else 1.0):.9g}")


def _over_amount(track: Track, tried: dict[str, list[Recipe]]) -> pd.DataFrame:
    table = track.table
    table = table.assign(hm=harmonic_means(table["base"], table["novel"]))
    means = table.groupby("setting")[["base", "novel", "hm"]].mean()
    count = table["setting"].value_counts()
    rows = [
        (name, str(one.amount) or "recipe",
         times(one, settings[0], track.steps(one) / track.steps(settings[0])),
         *means.loc[label(one)], int(count[label(one)]))
        for name, settings in tried.items() for one in settings if label(one) in count
    ]  # fmt: skip
    plain = means.loc[ZERO_SHOT] if ZERO_SHOT in means.index else None
    if plain is not None:
        rows += [(ZERO_SHOT, "none", 0.0, *plain, int(count[ZERO_SHOT]))]
    return pd.DataFrame(rows, columns=list(AMOUNT_COLUMNS))


def size_warning(placements: Sequence[str]) -> str:
    """Return what is wrong with comparing placements of different size at one amount, or nothing.

    Args:
        placements: Labels of placements, with their amounts where they differ.
    """
    sizes: dict[Amount, set[int]] = {}
    for one in map(Placement.parse, placements):
        if one:  # zero-shot is not a placement that an amount is for
            sizes.setdefault(one.amount, set()).add(one.size)
    compared = [f"{min(same)} to {max(same)}" for same in sizes.values() if len(same) > 1]
    if not compared:
        return ""
    # Those of another amount are compared among themselves.
    each = " each" if len(compared) > 1 else ""
    return (
        f"placements of {' and of '.join(dict.fromkeys(compared))} blocks are compared at one "
        f"amount{each}, which mostly compares amounts, not places"
    )
