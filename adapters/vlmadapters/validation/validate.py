"""Validation: train at the chosen placement and at its competitors, and say what came out.

Base-to-novel protocol. The cells of one dataset and seed share decoded images, few-shot draws,
views and frozen-prefix activations. Test images report; they select nothing: the recipe is fixed
before, and the last epoch is evaluated once.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from vlmadapters.clip.towers import backbone_depths
from vlmadapters.data.task import TaskData
from vlmadapters.methods.config import MethodConfig
from vlmadapters.protocols.experiment import Experiment
from vlmadapters.protocols.train import Datasets, Model, recipes_for, tell_of_choice
from vlmadapters.training import processes
from vlmadapters.training.recipes import IN_RECIPE, Recipe, shipped_recipes
from vlmadapters.validation.candidates import tell_own_amounts
from vlmadapters.validation.competitors import Competitor, chosen_placement, competitors
from vlmadapters.validation.options import ValidateOptions
from vlmadapters.validation.outcome import Validation, summarise, validation_table
from vlmadapters.validation.race import Track
from vlmadapters.validation.tuning import Tuning, tune
from vlmlayers.arguments import Seed, checked
from vlmlayers.errors import UserError
from vlmlayers.options import takes, validated
from vlmlayers.placement import Amount
from vlmlayers.scores.schema import Scores
from vlmlayers.selection import predict
from vlmlayers.selection.choice import not_of
from vlmlayers.words import UNTRAINED

LOG = logging.getLogger(__name__)


@takes(ValidateOptions, IN_RECIPE)
@checked
def validate(
    model: Model,
    choice: Any,
    datasets: Datasets,
    *,
    scores: Scores | None = None,
    recipe: str | Path | Recipe | None = None,
    out: str | Path | None = None,
    root: Any = None,
    seed: Seed = 0,
    progress: bool = True,
    notes: Mapping[str, Any] | None = None,
    method: str = "mma",
    **options: Any,
) -> Validation:
    """Train a method at the chosen placement and at its competitors, and test each.

    Amounts are tuned side by side, on folds of the base classes' training shots of the first seed;
    that of a search is tried at every placement. Competitors that the method cannot take are left
    out; the reference is always among them.

    Args:
        model: The backbone (`vlmlayers.models.load_model`).
        choice: A `LayerChoice` or anything with `vision` and `text` blocks, of which those in the
            method's towers count; or a placement such as `5-12`, which has to fit the method.
        datasets: Datasets, by name, path or manifest, each with two classes or more.
        scores: Score table to predict outcomes from; None leaves predictions out.
        recipe: Recipe or its name; `default_recipe` where None.
        out: Folder of `validation*` and of the cells under `cells`; None writes nothing. A stopped
            run resumes there, and several processes may work on it.
        root: The data root.
        seed: Seed of random placements and of the bootstrap.
        progress: Show bars.
        notes: What else `validation.json` should say.
        method: Name of the method, where the recipe is given by name.
        **options: Those of `ValidateOptions`.

    Raises:
        UserError: No dataset or seed is given, a name is unknown, a dataset has one class, or
            the choice does not fit the model, no placement is of the reference's kind, or the
            scores predict nothing.
    """
    asked = validated(ValidateOptions, options, "validate")
    (made,) = recipes_for(model, [method], () if recipe is None else [recipe])
    made = made.changed({"shots": asked.shots})
    placed = _competitors(model, made.method, choice, asked, seed)
    if asked.amount == "given" and (chosen := _amount(choice)):
        LOG.warning("amount=given trains at the recipe's amount, not at the choice's %s", chosen)
    seeds = list(asked.seeds)
    experiment = Experiment(
        "base-to-novel",
        model,
        made,
        out,
        root=root,
        options=asked,
        table="results_validation.csv",  # `results.csv` of the folder may be that of a training
        stop_unmoved=True,
        progress=progress,
    )
    # Each once, as `experiment` trains it: amounts would be tuned on one of them twice.
    data = list(dict.fromkeys(experiment.datasets.add(one) for one in datasets))
    if not data or not seeds:
        raise UserError(f"there is no {'seed' if data else 'dataset'} to validate on; name one")
    trained = [one for one in placed if one.placement]
    if scores is not None:
        _check_scores(scores, model, trained)
    told = [tell_of_choice(choice, model, [one.manifest for one in data])]
    told += [one.tell_of_shared() for one in data]
    settings = {"given": [made.at(one.placement) for one in trained]}
    tuning = None
    if asked.amount == "tuned":
        if asked.given_amounts is None:
            tell_own_amounts(made, [one.manifest.name for one in data])
        track = Track(data, made, model, seeds[:1], asked, out, progress=progress)
        tuning = tune(track, settings["given"], asked.given_amounts, _amount(choice))
        settings = {"tuned": list(tuning.settings), **settings}  # the first may be found void
    whole = [one for several in settings.values() for one in several]
    # Manifests alone: `Experiment` has the data of each already, with what was decoded.
    named = [one.manifest for one in data]
    # Where tuning kept the recipe's amount, both comparisons share the training.
    results = experiment.run(named, list(dict.fromkeys(whole)), seeds, together=asked.together)
    recorded = _recorded(experiment, made, data) | _of_choice(choice) | dict(notes or {})
    if tuning is not None:
        recorded["tuning"] = _tuned(tuning, trained, asked.folds, seeds[0])
    labels = {kind: [setting.label for setting in several] for kind, several in settings.items()}
    table = validation_table(results, trained, labels)
    if table["changed"].any():
        found = summarise(table, scores, reference=asked.reference, seed=seed, notes=recorded)
        found = replace(found, amounts=None if tuning is None else tuning.table)
    else:
        summary = {"verdict": _void(made, model, table), **recorded, "void": True}
        found = Validation(table, pd.DataFrame(), summary)
    seen = f"{UNTRAINED}. " if model.random_weights else ""
    if seen := seen + "".join(f"WARNING: {one}. " for one in told if one):
        found = replace(found, summary={**found.summary, "verdict": f"{seen}{found.verdict}"})
    if out is not None and processes.is_first():
        found.write(out)
    return found


def _check_scores(scores: pd.DataFrame, model: Model, trained: Sequence[Competitor]) -> None:
    """Refuse scores that predict nothing of placements, before these are trained for hours."""
    predict(scores, {one.placement.label: one.placement for one in trained})
    of = {**scores.attrs, **scores[["model", "weights"]].iloc[0]}
    if other := not_of(of, model.name, model.weights, model.weights_hash):
        LOG.warning("the scores that predict are %s, which is trained", other)


def _recorded(experiment: Experiment, recipe: Recipe, data: Sequence[TaskData]) -> dict[str, Any]:
    """Return what `validation.json` says of how placements were trained and tested, and on what."""
    return {
        **recipe.described(),
        "items": experiment.options.items,
        "device": str(experiment.model.device),
        "precision": experiment.evaluator.precision,
        "weights_hash": experiment.model.weights_hash,
        "data": {one.manifest.name: one.identity("test").summary() for one in data},
    }


def _tuned(tuning: Tuning, trained: Sequence[Competitor], folds: int, seed: int) -> dict[str, Any]:
    """Return the amount of each placement, and what finding them took."""
    return {
        "amounts": {
            str(one.placement): str(setting.amount) or "recipe"
            for one, setting in zip(trained, tuning.settings)
        },
        "folds": folds,
        "seed": seed,
        "trainings": round(tuning.trainings, 2),
    }


def _amount(choice: Any) -> Amount:
    """Return the amount that a search chose beside the blocks; empty where none did."""
    return getattr(getattr(choice, "placement", None), "amount", Amount())


def _of_choice(choice: Any) -> dict[str, Any]:
    """Return on which images the choice was made, or what a search said of its pick."""
    evidence = getattr(choice, "evidence", {})
    return {key: evidence[key] for key in ("search", "chosen_on") if evidence.get(key)}


def _void(recipe: Recipe, model: Any, table: pd.DataFrame) -> str:
    """Return what a run says in which training changed nothing, and what to try."""
    where = f"on {', '.join(dict.fromkeys(table['dataset']))}"
    train, scale = recipe.train, getattr(recipe.method, "scale", None)
    values = f"lr {train.lr:g}" + (f", scale {scale:g}" if scale is not None else "")
    tried = f"the recipe {recipe.name} ({values})"
    more = [f"--set lr={10 * train.lr:g}"] + ([f"--set scale={100 * scale:g}"] if scale else [])
    smaller = recipe.name != "mini" and "mini" in shipped_recipes(recipe.method.name)
    other = "--recipe mini, which is made for small backbones, or " if smaller else ""
    return (
        f"VOID: {tried} changed no prediction of {model.name} {where}, so nothing is shown "
        f"about the choice; try {other}{' '.join(more)}"
    )


def _competitors(
    model: Any, method: MethodConfig, choice: Any, asked: ValidateOptions, seed: int
) -> list[Competitor]:
    chosen = chosen_placement(method, choice)
    depths = backbone_depths(model.clip)
    # The verdict compares with the reference, so it is trained even where it is not asked for.
    wanted = dict.fromkeys([asked.reference, *asked.kinds])
    count = asked.random_count
    found = competitors(chosen, depths, wanted, method=method, random_count=count, seed=seed)
    if not any(asked.reference in one.kind.split("+") for one in found):
        raise UserError(
            f"the verdict compares with the kind {asked.reference}, of which {method.title} has no "
            f"placement beside the choice ({chosen}); name another reference (--reference)"
        )
    return found
