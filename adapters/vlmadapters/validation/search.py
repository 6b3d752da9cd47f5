"""Search where and how much to train, from the training shots of the base classes alone.

Folds hold out shots of inner base classes and whole inner novel classes. Amount comes first, at the
default placement; then placements at the amount found and at a larger one, since few blocks need
more of it. Both are successive halving over folds: the better half of the rivals goes on to the
next fold, the default always. A fold trains on about 0.4 of the items of one full training, so
trainings are short without a schedule of their own. Where the best rival's own interval reaches
zero, the default stays; the statement adds what it is as the best of all that were tried.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from vlmadapters.clip.products import timed_products
from vlmadapters.clip.towers import backbone_depths
from vlmadapters.data.task import TaskData
from vlmadapters.methods.config import MethodConfig
from vlmadapters.protocols.train import Datasets, Model, recipes_for
from vlmadapters.training import processes
from vlmadapters.training.recipes import IN_RECIPE, Recipe
from vlmadapters.validation.candidates import (
    check_searchable,
    crossed,
    tell_own_amounts,
    tried_amounts,
    tried_placements,
)
from vlmadapters.validation.judge import Difference, difference, meaning, ranking
from vlmadapters.validation.options import SearchOptions
from vlmadapters.validation.race import AS_IS, Race, Track, label
from vlmlayers.arguments import checked
from vlmlayers.errors import UserError
from vlmlayers.files import write_csv, write_json, writing
from vlmlayers.manifests import Manifest, distinct
from vlmlayers.options import takes, validated
from vlmlayers.placement import ZERO_SHOT, Placement
from vlmlayers.runs import environment
from vlmlayers.words import UNTRAINED, WIDTH, counted, interval

AMOUNT_SHARE = 0.6  # of the budget, where placements are searched as well


@dataclass(frozen=True, eq=False)
class Search:
    """What a search found.

    Attributes:
        table: One row per setting and fold it ran in, with the columns `SEARCH_COLUMNS`; a setting
            is a placement with its amount, accuracies in percent.
        summary: Pick, runner-up, differences, agreement, cost, what was skipped; JSON values.
    """

    table: pd.DataFrame
    summary: Mapping[str, Any]

    def __repr__(self) -> str:
        # The summary would fill screens; the statement sums it up.
        said = textwrap.wrap(self.statement, WIDTH)
        return "\n".join([f"Search(pick {self.summary['pick']})", *said])

    @property
    def placement(self) -> Placement:
        """The pick: blocks and amount; no block where training does not pay."""
        pick = str(self.summary["pick"])
        return Placement() if pick == AS_IS else Placement.parse(pick)

    @property
    def decided(self) -> bool:
        """Whether the pick's own interval, not that of the best of several, leaves zero out."""
        return bool(self.summary["decided"])

    @property
    def statement(self) -> str:
        """What to do and how certain that is, in a few sentences."""
        return str(self.summary["statement"])

    def write(self, folder: str | Path) -> None:
        """Write `search.csv` and `search.json`."""
        table = Path(folder) / "search.csv"
        summary = table.with_suffix(".json")
        # It goes first and comes last, since nothing is read without it: the pick of an earlier
        # search would stand beside the settings of this one.
        with writing(summary):
            summary.unlink(missing_ok=True)
        write_csv(table, self.table)
        write_json(summary, dict(self.summary))


@takes(SearchOptions, IN_RECIPE)
@checked
def search(
    model: Model,
    datasets: Datasets,
    method: str = "mma",
    *,
    recipe: str | Path | Recipe | None = None,
    out: str | Path | None = None,
    root: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> Search:
    """Choose how much and where a method is trained, from the base classes' training shots alone.

    The budget counts full trainings of every dataset and seed by the recipe, in steps; what does
    not fit is left out and named. Beyond four folds of a draw, inner classes and shots are drawn
    anew; each costs two short trainings. A setting is trained on what the search saw of a seed.

    Args:
        model: The model, as `load_model` returns it.
        datasets: Datasets, by name, path or manifest; one pick for all of them.
        method: Name of the method, where the recipe is given by name.
        recipe: Recipe or its name; `default_recipe` where None.
        out: Folder of `search.csv` and `search.json`, and of the cells under `folds`; None writes
            nothing. A stopped search resumes there.
        root: The data root.
        progress: Show bars.
        **options: Those of `SearchOptions`.

    Raises:
        UserError: A name is unknown, the budget allows no comparison, or the data are too few.
    """
    asked = validated(SearchOptions, options, "search")
    depths = backbone_depths(model.clip)
    (made,) = recipes_for(model, [method], () if recipe is None else [recipe])
    check_searchable(made.method)
    default = made.changed({"shots": asked.shots})
    rates = tried_amounts(default, asked.given_amounts)
    placements = tried_placements(default, depths, asked.placement)
    seeds = list(asked.seeds)
    manifests = [one if isinstance(one, Manifest) else Manifest.load(one) for one in datasets]
    if not manifests or not seeds:
        raise UserError(f"there is no {'seed' if manifests else 'dataset'} to search on; name one")
    if asked.given_amounts is None or not all(one.amount for one in placements):
        steps = asked.given_amounts is None  # placements are tried at multiples of the rate alone
        tell_own_amounts(default, [one.name for one in manifests], steps)
    # What is learned for each class cannot be tested on classes that were held out.
    apart = asked.novel and not default.method.class_bound
    data = [TaskData(one, model, root, asked) for one in distinct(manifests, root)]
    track = Track(data, default, model, seeds, asked, out, apart=apart, progress=progress)
    for one in data:
        one.tell_of_shared()
    race = Race(track, asked.criterion)
    limit = math.inf if asked.budget is None else asked.budget
    # Amount comes first: where the budget allows one comparison, it is one of amounts.
    prices = [race.price(default, [one]) for one in rates]
    least = next((min(one, limit) for one in prices if one <= limit + 1e-9), 0.0)
    share = max(limit * AMOUNT_SHARE, least) if placements else limit
    tuned = race.run("amount", default, rates, share)
    # What amounts left of the budget is spent on placements.
    race.run("placement", tuned, crossed(tuned, placements), limit - track.cost)
    if not race.heats:
        raise UserError(_nothing_compared(race, default, [*rates, *placements], asked.budget))
    found = Search(track.table, _summary(race, default, model, asked))
    if out is not None and processes.is_first():
        found.write(out)
    return found


def _nothing_compared(
    race: Race, default: Recipe, rivals: Sequence[Recipe], budget: float | None
) -> str:
    if not rivals:
        return f"{default.method.name}: there is nothing to try besides the default; name amounts"
    if race.track.diverged:
        name, why = next(iter(race.track.diverged.items()))
        return (
            f"{default.method.name}: nothing was trained to the end in every fold beside the "
            f"default; name smaller amounts. Of {name}, {why}"
        )
    # Rounded up, since a budget of what is named here has to do.
    least = math.ceil(10 * min(race.price(default, [one]) for one in rivals) - 1e-9) / 10
    fewer = ", or take fewer folds" if race.track.rounds > 2 else ""  # two are the fewest
    return (
        f"a budget of {budget:g} times a full training allows no comparison; one with the default "
        f"takes {least:.1f}; raise the budget{fewer}"
    )


def _summary(race: Race, default: Recipe, model: Any, asked: SearchOptions) -> dict[str, Any]:
    """Return the content of `search.json`."""
    track, answer = race.track, _answer(race, default)
    judged = answer["to_zero_shot"]["criterion"]
    untrained = f"{UNTRAINED}. " if model.random_weights else ""
    answer["statement"] = (
        f"{untrained}{answer['statement']}{_how(race, default, asked.novel, judged)}"
    )
    return {
        **answer,
        "criterion": {"name": race.criterion, "means": meaning(race.criterion, _apart(race))},
        **default.described(),
        "datasets": list(dict.fromkeys(name for name, _ in track.draws)),
        "seeds": list(dict.fromkeys(seed for _, seed in track.draws)),
        "folds": track.rounds,
        "novel_held_out": _apart(race),
        "cost": {
            "trainings": round(track.cost, 2),
            "budget": asked.budget,
            "steps": int(track.table["steps"].sum()),
            "steps_of_one": track.steps_of_one,
            "seconds": round(float(track.table["seconds"].sum()), 1),
        },
        "skipped": race.left_out,
        "towers": {name: tower.depth for name, tower in model.towers.items()},
        "model": model.name,
        "weights": model.weights,
        "weights_hash": model.weights_hash,
        "random_weights": bool(model.random_weights),
        "environment": {**environment(), "products": timed_products()},
    }


def _against_plain(race: Race, config: MethodConfig) -> str:
    """Return the criterion that compares settings with zero-shot CLIP.

    Likelihoods at two scales of the cosines compare how sure answers are, not how right: CLIP-LoRA
    with 100 beside a backbone's 19 lost 6 nats an item and yet named more images rightly.
    """
    scale = race.track.logit_scale
    same = math.isclose(config.own_scale or scale, scale, rel_tol=0.01)
    return race.criterion if same else "accuracy"


def _answer(race: Race, recipe: Recipe) -> dict[str, Any]:
    """Return what to train, how it compares, and whether to train at all."""
    table, criterion, default = race.track.table, race.criterion, label(recipe)
    pick = race.heats[-1].pick
    judged = _against_plain(race, recipe.method)
    order = ranking(table, default, criterion)
    if judged != criterion:
        del order[ZERO_SHOT]  # measured otherwise than the rest
    ran = table["setting"].value_counts()
    # What dropped out ran in few folds, and may have been lucky there.
    second = next(one for one in order if one not in (pick, ZERO_SHOT) and ran[one] == ran[default])
    plain = difference(table, pick, ZERO_SHOT, judged)
    adapt = "yes" if plain.low > 0 else "no" if plain.high < 0 else "unknown"
    gains = {
        one: difference(table, one, default, criterion) for one in (pick, second) if one != default
    }
    beside = {one: found.to_dict() for one, found in gains.items()}
    if pick in gains:
        low, high = gains[pick].among(count := _tried(race))
        beside[pick]["among"] = {"rivals": count, "low": low, "high": high}
    answer = {
        "default": default,
        "pick": ZERO_SHOT if adapt == "no" else pick,
        "decided": adapt == "no" or pick != default,
        "runner_up": second,
        "difference": beside.get(pick),
        "runner_up_difference": beside.get(second),
        "to_zero_shot": {"setting": pick, "adapt": adapt, "criterion": judged, **plain.to_dict()},
        "heats": [heat.to_dict() for heat in race.heats],
        "mean_differences": order,
    }
    return answer | {"statement": _statement(race, pick, default, gains.get(pick), plain)}


def _tried(race: Race) -> int:
    """Return how many settings a search compared with its defaults."""
    return len({rival for heat in race.heats for rival in heat.rivals})


def _apart(race: Race) -> bool:
    """Return whether any dataset has classes that its folds hold out whole."""
    return any(parts[0].apart for parts in race.track.draws.values())


def _how(race: Race, default: Recipe, novel: bool, judged: str) -> str:
    """Return what the numbers of a statement are of, and what was not tried."""
    apart = _apart(race)
    said = f" Compared by {meaning(race.criterion, apart)}."
    if judged != race.criterion:
        said += (
            f" With zero-shot CLIP by {meaning(judged, apart)}: {default.method.title} scales "
            f"cosines by {default.method.own_scale:g}, this backbone by "
            f"{race.track.logit_scale:.3g}, so that likelihoods would compare how sure the answers "
            "are."
        )
    if novel and default.method.class_bound:
        said += f" No class was held out whole: {default.method.name} learns each by itself."
    elif novel:
        draws = race.track.draws.items()
        few = dict.fromkeys(name for (name, _), folds in draws if not folds[0].apart)
        if few:
            said += f" {', '.join(few)}: too few base classes to hold any out whole."
    if _unmoved(race.track.table):
        said += (
            " No setting's accuracy is other than zero-shot CLIP's in any fold: raise lr, or the "
            "method's scale, for this backbone."
        )
    if lost := race.left_out:
        said += f" Left out: {counted(len(lost), 'setting')}."
    return said


def _unmoved(table: pd.DataFrame) -> bool:
    """Return whether no training moved an accuracy, which no difference of likelihoods shows."""
    found = table.groupby(["dataset", "seed", "fold"])[["base", "novel"]].nunique()
    return bool((found <= 1).all(axis=None))


def _statement(
    race: Race, pick: str, default: str, gain: Difference | None, plain: Difference
) -> str:
    over = f"over {len(plain.folds)} folds"
    if gain is not None:
        advice = (
            f"Train {pick}: {gain.mean:+z.3f} {interval(gain.low, gain.high)} against the "
            f"default {default}, better in {gain.wins} of {len(gain.folds)} folds."
        )
        if (tried := _tried(race)) > 1:  # the best of several looks good by chance as well
            low, high = gain.among(tried)
            advice += f" It is the best of {tried}; for all at once: {interval(low, high)}"
            advice += ", so that as such it cannot be told from the default." if low <= 0 else "."
    else:
        # Of several heats' best, one that may be as good comes before one that is worse by less.
        best = max(race.heats, key=lambda heat: (heat.difference.high >= 0, heat.difference.mean))
        found = best.difference
        advice = (
            f"Keep the default {default}: the best rival, {best.best}, cannot be told from it "
            f"({found.mean:+z.3f} {interval(found.low, found.high)} {over})."
            if found.high >= 0
            else f"Keep the default {default}: every rival that was followed is worse, the best by "
            f"{-found.mean:z.3f} {interval(-found.high, -found.low)} {over}."
        )
    numbers = f"{plain.mean:+z.3f} {interval(plain.low, plain.high)} against zero-shot CLIP"
    if plain.low > 0:
        return f"{advice} Training pays: {numbers}."
    if plain.high < 0:
        return f"Do not train: {pick} is worse than zero-shot CLIP, {numbers}."
    return f"{advice} Whether training pays cannot be told: {numbers}."
