"""Successive halving over folds: settings race, the better half goes on to the next fold."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from vlmadapters.data.folds import Fold, folds
from vlmadapters.data.task import TaskData
from vlmadapters.protocols.experiment import Experiment
from vlmadapters.protocols.results import ZERO_SHOT_CLIP, ZERO_SHOT_OWN
from vlmadapters.training.recipes import Recipe
from vlmadapters.training.trainer import Diverged, count_steps
from vlmadapters.validation.judge import SEARCH_COLUMNS, Difference, difference, ranking
from vlmadapters.validation.options import SearchOptions, ValidateOptions
from vlmlayers.placement import ZERO_SHOT

LOG = logging.getLogger(__name__)
AS_IS = "recipe"  # a method without placement, by the amount of its recipe


def label(setting: Recipe) -> str:
    """Return a setting as search tables write it."""
    return setting.label or AS_IS


def _steps(setting: Recipe, dataset: str, fold: Fold) -> int:
    return count_steps(setting.train_for(dataset).of_share(fold.share), fold.trained)


class Track:
    """Trains settings on folds, each once, and keeps what came out and what it cost.

    Args:
        data: The datasets, each drawn from for every seed.
        recipe: The default setting: one full training of every draw by it is the unit of cost.
        model: The model.
        seeds: Seeds of the few-shot draws.
        options: How many folds of each draw, and how many settings are trained side by side.
        out: Folder of a run, whose cells of folds are under `folds`; None keeps all in memory.
        apart: Whether folds hold out whole classes as well; see `folds`.
        progress: Show bars.

    Attributes:
        draws: The folds of each dataset and seed.
        rounds: Number of folds of every draw.
        steps_of_one: Steps of one full training of every draw.
        diverged: Settings whose loss or answers were not finite in some fold, and what was said.
    """

    def __init__(
        self,
        data: Iterable[TaskData],
        recipe: Recipe,
        model: Any,
        seeds: Sequence[int],
        options: SearchOptions | ValidateOptions,
        out: str | Path | None,
        *,
        apart: bool = True,
        progress: bool = True,
    ) -> None:
        self.together = options.together
        self.draws = draws = {
            (one.manifest.name, seed): folds(
                one, recipe.train_for(one.manifest.name).shots, seed, options.folds, apart=apart
            )
            for one in data
            for seed in seeds
        }
        self.rounds = options.folds
        # Cost in steps, not seconds: a budget has to cut the same settings on every machine.
        self.steps_of_one = self.steps(recipe)
        self._known = {
            fold.manifest.name: (dataset, seed, number, fold.held_out)
            for (dataset, seed), parts in draws.items()
            for number, fold in enumerate(parts, 1)
        }
        # Folds with whole classes held out are tested on two halves, others on one.
        kinds = dict.fromkeys(fold.apart for parts in draws.values() for fold in parts)
        # One folder for search and tuning: what one has trained on a fold the other reads.
        cells = None if out is None else Path(out) / "folds"
        self._experiments = {
            apart: Experiment(
                "base-to-novel" if apart else "few-shot",
                model,
                recipe,
                cells,
                table=None,
                progress=progress,
            )
            for apart in kinds
        }
        self._rows: dict[tuple[str, str], dict[str, Any]] = {}
        self.diverged: dict[str, str] = {}

    @property
    def table(self) -> pd.DataFrame:
        """What came out, with the columns `SEARCH_COLUMNS`."""
        return pd.DataFrame(self._rows.values(), columns=list(SEARCH_COLUMNS))

    @property
    def logit_scale(self) -> float:
        """The backbone's factor of cosines."""
        clip: Any = next(iter(self._experiments.values())).backbone.clip
        return float(clip.logit_scale.detach().exp())

    @property
    def cost(self) -> float:
        """What has been trained, in full trainings."""
        return sum(row["steps"] for row in self._rows.values()) / self.steps_of_one

    def steps(self, setting: Recipe) -> int:
        """Return the steps of a setting's full trainings, one on each draw."""
        return sum(
            count_steps(setting.train_for(dataset), parts[0].drawn)
            for (dataset, _), parts in self.draws.items()
        )

    def price(self, setting: Recipe, number: int) -> float:
        """Return what a setting costs on one fold of every draw, 0 where it has run there."""
        missing = [
            (dataset, parts[number - 1])
            for (dataset, _), parts in self.draws.items()
            if (parts[number - 1].manifest.name, label(setting)) not in self._rows
        ]
        return sum(_steps(setting, *one) for one in missing) / self.steps_of_one

    def run(
        self, stage: str, needed: Sequence[Recipe], rivals: Iterable[Recipe], number: int
    ) -> None:
        """Train settings on the fold of a number of every draw, where they have not run yet.

        A rival that diverges is left out from there on, since what is tried may be too much.

        Args:
            stage: What they are trained for.
            needed: Settings that the rest is compared with.
            rivals: The rest.
            number: Of the fold, from 1.

        Raises:
            Diverged: One that is needed.
        """
        known = {label(one): one for one in [*needed, *rivals]}
        firm = {label(one) for one in needed}
        for (dataset, seed), parts in self.draws.items():
            fold = parts[number - 1]
            name = fold.manifest.name
            # Amounts and placements meet in some settings, and folds are resumed from their cells.
            new = {key: one for key, one in known.items() if (name, key) not in self._rows}
            while new := {key: one for key, one in new.items() if key not in self.diverged}:
                try:
                    found = self._experiments[fold.apart].run(
                        [fold], list(new.values()), [seed], together=self.together
                    )
                except Diverged as error:
                    gone = dict.fromkeys(map(label, error.settings), str(error))
                    if not gone or firm & gone.keys():
                        raise
                    self.diverged |= gone
                    LOG.warning("left out of the %s: %s; %s", stage, ", ".join(gone), error)
                    continue
                steps = {key: _steps(one, dataset, fold) for key, one in new.items()}
                self._keep(stage, name, found, steps | {ZERO_SHOT: 0})
                break

    def _keep(self, stage: str, name: str, found: pd.DataFrame, steps: Mapping[str, int]) -> None:
        dataset, seed, number, held_out = self._known[name]
        parts: dict[str, dict[str, Any]] = {}
        for row in found.to_dict("records"):
            if row["method"] == ZERO_SHOT_OWN:
                continue  # the recipe's template is what training competes with
            plain = row["method"] == ZERO_SHOT_CLIP
            setting = ZERO_SHOT if plain else row["placement"] or AS_IS
            parts.setdefault(setting, {})[row["split_kind"]] = row
        for setting, kinds in parts.items():
            base, novel = kinds.get("base", kinds.get("all")), kinds.get("novel")
            assert base is not None
            self._rows.setdefault(
                (name, setting),
                {
                    "stage": ZERO_SHOT if setting == ZERO_SHOT else stage,
                    "dataset": dataset,
                    "seed": seed,
                    "fold": number,
                    "held_out": held_out,
                    "setting": setting,
                    "base": 100 * base["accuracy"],
                    "novel": 100 * novel["accuracy"] if novel else math.nan,
                    "base_log_likelihood": base["log_likelihood"],
                    "novel_log_likelihood": novel["log_likelihood"] if novel else math.nan,
                    "steps": steps[setting],
                    "seconds": float(base["seconds"]),
                },
            )


@dataclass(frozen=True)
class Heat:
    """One race of settings against a default.

    Attributes:
        stage: `amount` or `placement`.
        default: Label of what was to beat.
        rivals: Labels of the settings that ran, but for those that diverged.
        best: Label of the best rival that ran in every fold.
        difference: Its difference to the default.
        pick: Label of the best rival where it is better beyond doubt, else of the default.
    """

    stage: str
    default: str
    rivals: tuple[str, ...]
    best: str
    difference: Difference
    pick: str

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        made = {"rivals": list(self.rivals), "difference": self.difference.to_dict()}
        return {**vars(self), **made}


@dataclass(eq=False)
class Race:
    """Heats on one track.

    Attributes:
        track: Where settings run.
        criterion: What decides.
        heats: Those that were run.
        skipped: Settings that a heat left out: stage, setting, why.
    """

    track: Track
    criterion: str
    heats: list[Heat] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)

    def skip(self, stage: str, setting: str, why: str) -> None:
        """Record a setting that is left out."""
        self.skipped.append({"stage": stage, "setting": setting, "why": why})

    @property
    def left_out(self) -> list[dict[str, str]]:
        """What no heat could follow, each setting once.

        An amount that one heat had no budget for may be a placement of the next, and run there.
        """
        ran = {rival for heat in self.heats for rival in heat.rivals}
        lost = [one for one in self.skipped if one["why"] != "budget" or one["setting"] not in ran]
        return list({one["setting"]: one for one in lost}.values())

    def price(self, default: Recipe, rivals: Sequence[Recipe]) -> float:
        """Return the most that a heat can cost: the costliest rivals stay in to the end."""
        total, left = 0.0, len(rivals)
        for number in range(1, self.track.rounds + 1):
            # Which half survives is not known yet: the costliest of all are the worst case. Not
            # those of the fold before, where one that an earlier heat has run costs nothing.
            prices = sorted((self.track.price(one, number) for one in rivals), reverse=True)
            total += self.track.price(default, number) + sum(prices[:left])
            left = _half(left)
        return total

    def run(
        self, stage: str, default: Recipe, rivals: Iterable[Recipe], budget: float = math.inf
    ) -> Recipe:
        """Run a heat and return the setting that it picks.

        Rivals that alone are beyond the budget, in full trainings, are left out, then others from
        the end until the heat fits it.
        """
        # A rival at the default's own setting would be compared with itself, and one that an
        # earlier heat has seen diverge would take budget from the rest.
        out = {label(default), *self.track.diverged}
        known = {label(one): one for one in rivals if label(one) not in out}
        # First what is too dear by itself, or it would take the rest with it.
        for one in [one for one in known if self._beyond(budget, default, [known[one]])]:
            self.skip(stage, one, "budget")
            del known[one]
        # The likeliest rivals come first.
        while self._beyond(budget, default, list(known.values())):
            self.skip(stage, known.popitem()[0], "budget")
        if not known:
            return default
        alive = list(known)
        for number in range(1, self.track.rounds + 1):
            self.track.run(stage, [default], (known[one] for one in alive), number)
            for one in [one for one in alive if one in self.track.diverged]:
                self.skip(stage, one, self.track.diverged[one])
                alive.remove(one)
            if not alive:
                return default
            if number < self.track.rounds:
                order = ranking(self.track.table, label(default), self.criterion)
                alive = sorted(alive, key=lambda one: -order[one])[: _half(len(alive))]
        order = ranking(self.track.table, label(default), self.criterion)
        best = max(alive, key=lambda one: order[one])
        found = difference(self.track.table, best, label(default), self.criterion)
        # In doubt the default stays; the interval is the rival's own, as searches were registered.
        pick = known[best] if found.low > 0 else default
        ran = tuple(one for one in known if one not in self.track.diverged)
        self.heats.append(Heat(stage, label(default), ran, best, found, label(pick)))
        return pick

    def _beyond(self, budget: float, default: Recipe, rivals: Sequence[Recipe]) -> bool:
        # A price barely above the budget is rounding.
        return bool(rivals) and self.price(default, rivals) > budget + 1e-9


def _half(rivals: int) -> int:
    return math.ceil(rivals / 2)
