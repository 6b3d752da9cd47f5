"""From validation tables to the points that the figures of trained placements show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from vlmlayers.errors import UserError
from vlmlayers.figures.inputs import Folders, MissingTable, Seen, read_each, refuse_unlike
from vlmlayers.files import read_json
from vlmlayers.placement import Placement, complete_cells, how_trained, of_kind, untrained
from vlmlayers.selection import LayerChoice, available_scores, predict
from vlmlayers.selection.prediction import PLACEMENT_SCORES

OUTCOMES = ("base", "novel", "hm")
NEEDS = ("model", "weights", "dataset", "seed", "placement", "kind", *OUTCOMES)
DEFAULT_SCORE = "contrast_accuracy_x_agreement"
DIGITS = 9  # of means


def read_validations(tables: Folders, scored: Seen | None = None) -> pd.DataFrame:
    """Read every validation table of the folders as one.

    Args:
        tables: Where they lie.
        scored: How the scores were made that they are compared with, from `read_scores`; of which
            weights the validations are is added.

    Raises:
        MissingTable: There is none.
        UserError: Two trained one model differently, by what stands beside them, or one trained
            other weights than the scores of that name are of.
    """
    found = read_each("validation", tables, NEEDS)
    seen = Seen()
    for path, table in found.items():
        how = _trained(path.with_name(f"{path.name}.json"))
        # Tables of earlier versions, which do not say, compare at the recipe's amount.
        tuned = "comparison" in table and (table.comparison == "tuned").any()
        how["comparison"] = "tuned" if tuned else "given"
        for model, weights in set(zip(table.model, table.weights)):
            refuse_unlike(seen, path, f"trained {model}", (model, weights), how)
            if scored is not None and "weights_hash" in how:
                mark = {"weights_hash": how["weights_hash"][:12]}
                do = "score the weights that were trained"
                refuse_unlike(scored, path, f"trained {model}", (model, weights), mark, do)
    return pd.concat(found.values(), ignore_index=True)


def _trained(record: Path) -> dict[str, Any]:
    """Return how the cells of a validation were trained; empty where nothing is recorded."""
    told = read_json(record) if record.exists() else {}
    return how_trained(told) | {key: told[key] for key in ("weights_hash",) if key in told}


def compared_cells(validation: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the datasets and seeds that hold every placement of one model.

    Raises:
        MissingTable: No dataset and seed holds every placement.
        UserError: A placement was trained twice on one dataset and seed, as in two runs.
    """
    twice = validation[validation.duplicated(["dataset", "seed", "placement"])]
    if len(twice):
        dataset, seed, placement = twice[["dataset", "seed", "placement"]].iloc[0]
        raise UserError(
            f"the validations hold several trainings of {placement} on {dataset}, seed {seed}; "
            "draw each run by itself"
        )
    kept: pd.DataFrame = complete_cells(validation)
    if kept.empty:
        raise MissingTable("no dataset and seed of the validation table holds every placement; "
                           "finish the sweep to draw it")  # fmt: skip
    return kept


def placement_means(validation: pd.DataFrame) -> pd.DataFrame:
    """Return one row per placement of one model: means over datasets, spread over seeds.

    Only `compared_cells` count, so that all placements are judged on the same runs. As in the
    verdict, a mean is that over datasets of the mean over seeds, and `hm` that of the runs'
    harmonic means.

    Returns:
        Columns placement, kind, start, chosen, published; base, novel, hm with `_sd` (over the
        seeds that all datasets have, of the mean over datasets; NaN for fewer than two);
        parameters, seconds where recorded; runs.

    Raises:
        MissingTable: No dataset and seed holds every placement.
        UserError: A placement was trained twice on one dataset and seed, as in two runs.
    """
    kept = compared_cells(validation)
    first = kept.drop_duplicates("placement").set_index("placement")
    averaged = [*OUTCOMES, *(name for name in ("parameters", "seconds") if name in kept.columns)]
    per_dataset = kept.groupby(["placement", "dataset"], sort=False)[averaged].mean()
    # Rounded as in the verdict: the same values in another order differ, and a tie has to be one.
    frame = per_dataset.groupby(level="placement", sort=False).mean().round(DIGITS)
    # A seed that misses a dataset differs from the others by how hard that dataset is.
    whole = kept.groupby("seed").dataset.transform("nunique") == kept.dataset.nunique()
    per_seed = kept[whole].groupby(["placement", "seed"], sort=False)[list(OUTCOMES)].mean()
    spread = per_seed.groupby(level="placement", sort=False).std(ddof=1)
    frame = frame.join(spread.add_suffix("_sd")).assign(
        kind=first.kind,
        start=[start_block(name) for name in frame.index],
        chosen=of_kind(first, "chosen"),
        published=of_kind(first, "paper"),
        runs=kept.groupby("placement", sort=False).size(),
    )
    return frame.reset_index()


def marked(
    means: pd.DataFrame, choice: LayerChoice | None, unlike: str = ""
) -> tuple[pd.DataFrame, str]:
    """Return the means, only the choice of now marked as chosen, and why another is not.

    Args:
        means: From `placement_means`.
        choice: The choice, None where none is recorded or runs chose otherwise.
        unlike: What runs chose otherwise.
    """
    if unlike:
        return means.assign(chosen=False), unlike
    if choice is None:
        return means, ""
    why = {
        then: untrained(choice.placement, then, means.placement)
        for then in means.placement[means.chosen]
    }
    chosen = [then for then, said in why.items() if not said]
    return means.assign(chosen=means.placement.isin(chosen)), next(filter(None, why.values()), "")


def start_block(placement: str) -> int:
    """Return the first adapted block of a placement such as `v5-12,t5-12`.

    Raises:
        UserError: The placement names no block.
    """
    placed = Placement.parse(placement)
    if not placed:
        raise UserError(f"placement {placement!r} names no block; write it as v5-12,t5-12")
    return (placed.vision or placed.text)[0]


def sweep(means: pd.DataFrame) -> pd.DataFrame:
    """Return the placements of the start sweep in order, then chosen and published ones beside it.

    Added columns: label, and on_axis (False for a placement that is not a span up to the last
    block).

    Raises:
        MissingTable: No placement of the kind `start` was trained.
    """
    spans = means[of_kind(means, "start")].sort_values("start")
    if spans.empty:
        raise MissingTable("the validation holds no sweep of the start block; validate with the "
                           "kind 'start' to draw it")  # fmt: skip
    rest = means[(means.chosen | means.published) & ~means.placement.isin(spans.placement)]
    labels = [*spans.start.astype(str), *rest.placement.str.replace(",", "\n")]
    on_axis = [True] * len(spans) + [False] * len(rest)
    return pd.concat([spans, rest], ignore_index=True).assign(label=labels, on_axis=on_axis)


def predicted_means(scores: pd.DataFrame, means: pd.DataFrame) -> pd.DataFrame:
    """Return predicted quality beside trained HM, and Kendall's τ between them.

    By the default placement score, or the first that the table supports.

    Args:
        scores: Score table of one model.
        means: From `placement_means`, of the same model.

    Returns:
        The rows of `means` that a score says something of, with score, predicted, Kendall's τ-b
        (NaN where all are equal, predicted or trained) and a short label; chosen and published
        placements first.

    Raises:
        MissingTable: The scores say nothing of any placement.
    """
    supported = [name for name in available_scores(scores) if name in PLACEMENT_SCORES]
    score = DEFAULT_SCORE if DEFAULT_SCORE in supported else supported[0]
    placements = {name: Placement.parse(name) for name in means.placement}
    predicted = predict(scores, placements, [score])[["placement", "score", "predicted"]]
    joined = predicted.dropna(subset="predicted").merge(means, on="placement")
    if joined.empty:
        raise MissingTable("the scores say nothing of a tower that was trained; score that tower")
    # Without a p: placements share blocks, which scipy's does not know; `validate` tells chance.
    from scipy.stats import kendalltau  # half a second to import: only where it is needed

    tau = float(kendalltau(joined.predicted, joined.hm).statistic)
    joined = joined.sort_values(["chosen", "published", "start"], ascending=[False, False, True])
    return joined.assign(tau=tau, short=[placements[one].label for one in joined.placement])
