"""Validation: train at the chosen placement and at its competitors, and say what came out.

Base-to-novel protocol. The cells of one dataset and seed share decoded images, few-shot draws,
views and frozen-prefix activations. Test images report; they select nothing: the recipe is fixed
before, and the last epoch is evaluated once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pandas as pd

from vlmadapters.clip.products import timed_products
from vlmadapters.data.folds import folds as folds_of
from vlmadapters.methods.config import MethodConfig
from vlmadapters.protocols.experiment import EFFECT, Experiment
from vlmadapters.protocols.results import ZERO_SHOT_CLIP, ZERO_SHOT_METHODS
from vlmadapters.protocols.train import Datasets, Model
from vlmadapters.training import processes
from vlmadapters.training.recipes import Recipe, default_recipe, load_recipe
from vlmadapters.validation.competitors import (
    Competitor,
    chosen_placement,
    competitors,
)
from vlmadapters.validation.options import Comparison, ValidateOptions
from vlmadapters.validation.predicting import judge_predictors, predictors_statement
from vlmadapters.validation.race import CELLS, Track
from vlmadapters.validation.ranking import predicted_outcomes, predictors, rank_correlation
from vlmadapters.validation.repeatability import repeatability
from vlmadapters.validation.tuning import size_warning, tune
from vlmadapters.validation.verdict import VALIDATION_COLUMNS, compare, regret, verdict
from vlmlayers.arguments import checked
from vlmlayers.errors import UserError
from vlmlayers.files import write_csv
from vlmlayers.options import takes, validated
from vlmlayers.placement import ZERO_SHOT, Amount, Placement
from vlmlayers.runs import environment, write_json
from vlmlayers.scores.summaries import harmonic_mean
from vlmlayers.selection import predict

COMPARISONS: tuple[str, ...] = get_args(Comparison)


@dataclass(frozen=True, eq=False)
class Validation:
    """What training at the chosen placement and at its competitors gave.

    Attributes:
        table: One row per dataset, seed, placement and comparison, with the columns
            `VALIDATION_COLUMNS`; accuracies in percent. Comparison is `tuned`, each placement at
            its own amount, or `given`, all at the recipe's. `changed` says whether training changed
            at least one in 500 test predictions.
        placements: Means, intervals and differences to the chosen placement.
        summary: Verdict, regret and how it was made; JSON values.
        correlations: Rank correlation of each score's prediction with the outcome.
        predicted: Each prediction beside its outcome.
        judged: Scores and free baselines as predictors in single cells, beside the ceiling.
        untuned: `placements` of the comparison at the recipe's amount, where the other is tuned.
        amounts: Held-out accuracy of each placement over amount (`tuning.AMOUNT_COLUMNS`).
    """

    table: pd.DataFrame
    placements: pd.DataFrame
    summary: Mapping[str, Any]
    correlations: pd.DataFrame | None = None
    predicted: pd.DataFrame | None = None
    judged: pd.DataFrame | None = None
    untuned: pd.DataFrame | None = None
    amounts: pd.DataFrame | None = None

    @property
    def void(self) -> bool:
        """Whether training changed nothing, so that nothing is shown."""
        return bool(self.summary.get("void"))

    @property
    def verdict(self) -> str:
        """What the comparison says, in one sentence."""
        return str(self.summary["verdict"])

    def write(self, folder: str | Path) -> None:
        """Write `validation*.csv` and `validation.json`, which a report reads."""
        tables = {
            "validation": self.table,
            "validation_placements": self.placements,
            "validation_correlations": self.correlations,
            "validation_predicted": self.predicted,
            "validation_predictors": self.judged,
            "validation_untuned": self.untuned,
            "validation_amounts": self.amounts,
        }
        for name, table in tables.items():
            path = Path(folder) / f"{name}.csv"
            if table is not None and len(table.columns):
                write_csv(path, table)
            else:  # that of an earlier run says something else
                path.unlink(missing_ok=True)
        write_json(Path(folder) / "validation.json", dict(self.summary))


@takes(ValidateOptions)
@checked
def validate(
    model: Model,
    choice: Any,
    datasets: Datasets,
    *,
    scores: pd.DataFrame | None = None,
    recipe: str | Path | Recipe | None = None,
    out: str | Path | None = None,
    root: Any = None,
    seed: int = 0,
    progress: bool = True,
    notes: Mapping[str, Any] | None = None,
    method: str = "mma",
    **options: Any,
) -> Validation:
    """Train a method at the chosen placement and at its competitors, and test each.

    Amounts of scale alone are tuned side by side, on folds of the base classes' training shots of
    the first seed. Competitors that the method cannot take are left out; the reference is always
    among them.

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
            the choice does not fit the model.
    """
    asked = validated(ValidateOptions, options, "validate")
    made = _recipe(model, recipe, asked.shots, method)
    placed = _competitors(model, made.method, choice, asked, seed)
    seeds = list(dict.fromkeys(asked.seeds))
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
    data = [experiment.add(one) for one in datasets]
    if not data or not seeds:
        raise UserError(f"there is no {'seed' if data else 'dataset'} to validate on; name one")
    trained = [one for one in placed if one.placement]
    settings = {"given": [made.at(one.placement) for one in trained]}
    tuning = None
    if asked.amount == "tuned":
        draws = {
            (one.manifest.name, seeds[0]): folds_of(
                one, made.train_for(one.manifest.name).shots, seeds[0], asked.folds
            )
            for one in data
        }
        cells = None if out is None else Path(out) / CELLS
        track = Track(draws, made, model, cells, together=asked.together, progress=progress)
        tried = None if asked.amounts is None else list(map(Amount.parse, asked.amounts))
        tuning = tune(track, settings["given"], tried)
        settings = {"tuned": list(tuning.settings), **settings}  # the first may be found void
    whole = [one for several in settings.values() for one in several]
    # Manifests alone: `Experiment` has the data of each already, with what was decoded.
    named = [one.manifest for one in data]
    # Where tuning kept the recipe's amount, both comparisons share the training.
    results = experiment.run(named, list(dict.fromkeys(whole)), seeds, together=asked.together)
    recorded = {
        "method": made.method.name,
        "recipe": {"name": made.name, **made.train.identity()},
        "settings": made.method.settings(),
        "limit": asked.limit,
        "device": str(model.device),
        "precision": experiment.evaluator.precision,
        "weights_hash": model.weights_hash,
        "data": {one.manifest.name: one.identity("test").summary() for one in data},
        **_searched(choice),
        **(notes or {}),
    }
    if tuning is not None:
        recorded["tuning"] = {
            "amounts": {str(one.placement): str(setting.amount) or "recipe"
                        for one, setting in zip(trained, tuning.settings)},
            "folds": asked.folds, "seed": seeds[0], "trainings": round(tuning.trainings, 2),
        }  # fmt: skip
    labels = {kind: [setting.label for setting in several] for kind, several in settings.items()}
    table = validation_table(results, trained, labels)
    if not table["changed"].any():
        recorded["void"] = True
        advice = _void(made, model)
        found = Validation(table, pd.DataFrame(), {"verdict": advice, **recorded})
        if out is not None and not processes.rank_and_size()[0]:
            found.write(out)
        return found
    found = summarise(table, scores, reference=asked.reference, seed=seed, notes=recorded)
    found = replace(found, amounts=None if tuning is None else tuning.table)
    if out is not None and not processes.rank_and_size()[0]:
        found.write(out)
    return found


def _searched(choice: Any) -> dict[str, Any]:
    """Return what a search said of its pick, where the choice is one; what `summarise` records."""
    found = getattr(choice, "evidence", {}).get("search")
    return {"search": found} if found else {}


def _void(recipe: Recipe, model: Any) -> str:
    """Return what a run says in which training changed nothing, and what to try."""
    train, scale = recipe.train, getattr(recipe.method, "scale", None)
    values = f"lr {train.lr:g}" + (f", scale {scale:g}" if scale is not None else "")
    tried = f"the recipe {recipe.name} ({values})"
    more = [f"--set lr={10 * train.lr:g}"] + ([f"--set scale={100 * scale:g}"] if scale else [])
    other = "--recipe mini, which is made for small backbones, or " if recipe.name != "mini" else ""
    return (
        f"VOID: {tried} changed no prediction of {model.name} at any placement, so nothing is "
        f"shown about the choice; try {other}{' '.join(more)}"
    )


def _recipe(
    model: Any, recipe: str | Path | Recipe | None, shots: int | None, method: str
) -> Recipe:
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe or default_recipe(model.name, method), method)
    return recipe.changed({"shots": shots}, {})


def _competitors(
    model: Any,
    method: MethodConfig,
    choice: Any,
    asked: ValidateOptions,
    seed: int,
) -> list[Competitor]:
    chosen = chosen_placement(method, choice)
    depths = {name: tower.depth for name, tower in model.towers.items()}
    wanted = dict.fromkeys([asked.reference, *asked.kinds])
    count = asked.random_count
    return competitors(chosen, depths, wanted, method=method, random_count=count, seed=seed)


def validation_table(
    results: pd.DataFrame,
    placed: Sequence[Competitor],
    labels: Mapping[str, Sequence[str]] | None = None,
) -> pd.DataFrame:
    """Return the validation table of base-to-novel results, in the order of the competitors.

    Args:
        results: Results table.
        placed: The competitors.
        labels: Comparison (`tuned`, `given`) to the placement of each competitor as results write
            it, with its amount; `given` at the recipe's where None.
    """
    labels = labels or {"given": [str(one.placement) for one in placed]}
    warning = size_warning([str(one.placement) for one in placed])
    plain = results[results["method"] == ZERO_SHOT_CLIP].set_index(["dataset", "split_kind"])[
        "accuracy"
    ]
    trained = {
        (row["dataset"], row["seed"], row["placement"], row["split_kind"]): row
        for row in results[~results["method"].isin(ZERO_SHOT_METHODS)].to_dict("records")
    }
    rows = []
    cells = dict.fromkeys(key[:2] for key in trained)
    for comparison, (dataset, seed) in product(labels, cells):
        for one, label in zip(placed, labels[comparison]):
            if (dataset, seed, label, "base") not in trained:
                continue  # a run that stopped early
            base, novel = (trained[dataset, seed, label, kind] for kind in ("base", "novel"))
            rows.append(
                {
                    "model": base["model"],
                    "weights": base["weights"],
                    "dataset": dataset,
                    "shots": int(base["shots"]),
                    "seed": int(seed),
                    "placement": str(one.placement),
                    "kind": one.kind,
                    "comparison": comparison,
                    "amount": str(Placement.parse(label).amount),
                    "vision": " ".join(map(str, one.placement.vision)),
                    "text": " ".join(map(str, one.placement.text)),
                    "parameters": int(base["parameters"]),
                    "base": 100 * base["accuracy"],
                    "novel": 100 * novel["accuracy"],
                    "hm": 100 * harmonic_mean(base["accuracy"], novel["accuracy"]),
                    "zero_shot_base": 100 * plain[dataset, "base"],
                    "zero_shot_novel": 100 * plain[dataset, "novel"],
                    "n_base": int(base["n"]),
                    "n_novel": int(novel["n"]),
                    **{
                        f"hm_{half}": 100 * harmonic_mean(base[half], novel[half])
                        for half in ("first_half", "second_half")
                    },
                    "changed": base["changed"] >= EFFECT,
                    "seconds": float(base["seconds"]),
                    "warning": warning if comparison == "given" else "",
                }
            )
    return pd.DataFrame(rows, columns=list(VALIDATION_COLUMNS))


def label_of(table: pd.DataFrame, kind: str) -> str:
    """Return the label of the first placement of a kind, such as `chosen` or `paper`.

    Where nothing chosen was trained, the choice is zero-shot CLIP.

    Raises:
        UserError: No placement of the table is of that kind.
    """
    rows = table[[kind in str(one).split("+") for one in table["kind"]]]
    if rows.empty and kind == "chosen":
        return ZERO_SHOT
    if rows.empty:
        raise UserError(f"the validation table has no placement of kind {kind!r}; train one")
    return str(rows["placement"].iloc[0])


def summarise(
    table: pd.DataFrame,
    scores: pd.DataFrame | None = None,
    *,
    reference: str = "paper",
    seed: int = 0,
    notes: Mapping[str, Any] | None = None,
) -> Validation:
    """Return what a validation table says.

    Args:
        table: Validation table.
        scores: Score table to predict from.
        reference: Kind of placement that the verdict compares with.
        seed: Seed of the bootstrap.
        notes: What else to record; the verdict ends with the statement of a `search` among it.
    """
    whole, parts = table, compared_parts(table)
    comparison, table = next(iter(parts.items()))
    warning = size_warning(list(table["placement"])) if comparison == "given" else ""
    chosen, other = label_of(table, "chosen"), label_of(table, reference)
    correlations = outcomes = None
    said: dict[str, str] = {}
    predicted = None
    if scores is not None:
        labels = dict.fromkeys(table["placement"])
        predicted = predict(scores, {label: Placement.parse(label) for label in labels})
        correlations = rank_correlation(table, predicted, seed=seed)
        outcomes = predicted_outcomes(predicted, table)
        said["predictors"] = predictors(correlations)
    repeats = repeatability(table, seed=seed)
    judged = judge_predictors(table, predicted, other, seed=seed)
    against = predictors_statement(judged, other)
    said["predictors"] = " ".join(filter(None, [said.get("predictors"), against]))
    left = regret(table, chosen, seed=seed)
    search = (notes or {}).get("search")
    advised = f" The search on training shots had said: {search['statement']}" if search else ""
    summary = {
        "verdict": f"{_how(comparison, warning)}{verdict(table, chosen, other, seed=seed)} "
        f"{repeats['statement']}{advised}",
        "comparison": comparison,
        **({"warning": warning} if warning else {}),
        "repeatability": repeats,
        "chosen": chosen,
        "reference": other,
        **said,
        "best": left.best,
        "regret": asdict(left),
        "datasets": list(dict.fromkeys(table["dataset"])),
        "seeds": [int(one) for one in dict.fromkeys(table["seed"])],
        "shots": int(table["shots"].iloc[0]),
        "training_seconds": round(float(table["seconds"].sum()), 1),
        **(notes or {}),
        "environment": {**environment(), "products": timed_products()},
    }
    placements = compare(table, chosen, seed=seed).assign(warning=warning)
    untuned = None
    if comparison == "tuned" and "given" in parts:
        given = parts["given"]
        beside = size_warning(list(given["placement"]))
        untuned = compare(given, chosen, seed=seed).assign(warning=beside)
        told = verdict(given, chosen, other, seed=seed)
        summary["untuned"] = {"verdict": told, "warning": beside}
    return Validation(whole, placements, summary, correlations, outcomes, judged, untuned)


def compared_parts(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the comparisons of a validation table, the tuned one first; older ones are given."""
    if "comparison" not in table.columns:
        return {"given": table}
    found = {name: table[table["comparison"] == name] for name in COMPARISONS}
    return {name: part.reset_index(drop=True) for name, part in found.items() if len(part)}


def _how(comparison: str, warning: str) -> str:
    """Return what the amounts of a comparison were, before its verdict."""
    if comparison == "tuned":
        return "Each placement at its own amount, tuned on training shots: "
    return f"WARNING: {warning}. " if warning else ""
