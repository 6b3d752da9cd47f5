"""What a validation says: its table, the verdict and what else is read from the table."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pandas as pd

from vlmadapters.clip.products import timed_products
from vlmadapters.protocols.experiment import EFFECT
from vlmadapters.protocols.results import ZERO_SHOT_CLIP, ZERO_SHOT_METHODS
from vlmadapters.validation.competitors import Competitor
from vlmadapters.validation.options import Comparison
from vlmadapters.validation.predicting import judge_predictors, predictors_statement
from vlmadapters.validation.ranking import predicted_outcomes, predictors, rank_correlation
from vlmadapters.validation.repeatability import repeatability
from vlmadapters.validation.tuning import size_warning
from vlmadapters.validation.verdict import VALIDATION_COLUMNS, compare, regret, verdict
from vlmlayers.errors import UserError
from vlmlayers.files import write_csv, write_json, writing
from vlmlayers.placement import ZERO_SHOT, Placement, complete_cells, of_kind
from vlmlayers.runs import environment
from vlmlayers.scores.summaries import harmonic_mean
from vlmlayers.selection import predict
from vlmlayers.words import WIDTH, counted

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

    def __repr__(self) -> str:
        # A notebook would show all tables, and in the summary each option and timing.
        said = textwrap.wrap(self.verdict, WIDTH)
        return "\n".join([f"Validation({counted(len(self.table), 'cell')})", *said])

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
        cells = Path(folder) / "validation.csv"
        tables = {
            "placements": self.placements,
            "correlations": self.correlations,
            "predicted": self.predicted,
            "predictors": self.judged,
            "untuned": self.untuned,
            "amounts": self.amounts,
        }
        # The cells go first and come last, since nothing is read without them: beside files of an
        # earlier run they would take its verdict for theirs.
        with writing(cells):
            cells.unlink(missing_ok=True)
        for name, table in tables.items():
            path = cells.with_name(f"validation_{name}.csv")
            if table is not None and len(table.columns):
                write_csv(path, table)
            else:  # that of an earlier run says something else
                path.unlink(missing_ok=True)
        write_json(cells.with_suffix(".json"), dict(self.summary))
        write_csv(cells, self.table)


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
    # In the order of training, where a set would reorder the table from run to run.
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
    rows = table[of_kind(table, kind)]
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

    Raises:
        UserError: The table is empty, no placement is of the reference's kind, or no dataset and
            seed holds all.
    """
    whole, parts = table, compared_parts(table)
    # A placement whose tuned amount is the recipe's was trained once for both comparisons.
    keys = ("dataset", "seed", "placement", "amount")
    cells = whole.drop_duplicates([key for key in keys if key in whole])
    comparison, table = next(iter(parts.items()))
    warning = size_warning(list(table["placement"])) if comparison == "given" else ""
    chosen, other = label_of(table, "chosen"), label_of(table, reference)
    predicted = correlations = outcomes = None
    said = []
    if scores is not None:
        labels = dict.fromkeys(table["placement"])
        predicted = predict(scores, {label: Placement.parse(label) for label in labels})
        correlations = rank_correlation(table, predicted, seed=seed)
        outcomes = predicted_outcomes(predicted, table)
        said.append(predictors(correlations))
    judged = judge_predictors(table, predicted, other, seed=seed)
    said.append(predictors_statement(judged, other))
    repeats = repeatability(table, seed=seed)
    left = regret(table, chosen, seed=seed)
    compared = complete_cells(table)  # what all of these are of
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
        "predictors": " ".join(filter(None, said)),
        "best": left.best,
        "regret": asdict(left),
        "datasets": list(dict.fromkeys(compared["dataset"])),
        "seeds": [int(one) for one in dict.fromkeys(compared["seed"])],
        "shots": int(table["shots"].iloc[0]),
        "training_seconds": round(float(cells["seconds"].sum()), 1),
        **(notes or {}),
        "environment": {**environment(), "products": timed_products()},
    }
    placements = compare(table, chosen).assign(warning=warning)
    untuned = None
    if comparison == "tuned" and "given" in parts:
        given = parts["given"]
        beside = size_warning(list(given["placement"]))
        untuned = compare(given, chosen).assign(warning=beside)
        told = verdict(given, chosen, other, seed=seed)
        summary["untuned"] = {"verdict": told, "warning": beside}
    return Validation(whole, placements, summary, correlations, outcomes, judged, untuned)


def compared_parts(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the comparisons of a validation table, the tuned one first; older ones are given.

    Raises:
        UserError: There is none, since the table is empty or its comparisons have other names.
    """
    # Written before amounts were tuned.
    if "comparison" not in table.columns:
        return {"given": table}
    found = {name: table[table["comparison"] == name] for name in COMPARISONS}
    parts = {name: part.reset_index(drop=True) for name, part in found.items() if len(part)}
    if not parts:
        raise UserError(
            f"the validation table has no row of a comparison ({', '.join(COMPARISONS)}); finish "
            "the sweep (start `vlmlayers validate` again, it resumes)"
        )
    return parts


def _how(comparison: str, warning: str) -> str:
    """Return what the amounts of a comparison were, before its verdict."""
    if comparison == "tuned":
        return "Each placement at its own amount, tuned on training shots: "
    return f"WARNING: {warning}. " if warning else ""
