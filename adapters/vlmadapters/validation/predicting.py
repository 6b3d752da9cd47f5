"""Predictors of the best placement, against free baselines and against what can be predicted.

A predictor is judged in every cell: how its ranking agrees with the cell's, and what the placement
that it ranks first gains there over the reference. The ceiling is the ranking by all other cells,
which no predictor can know. Baselines cost nothing: they read no measurement.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from vlmadapters.validation.chance import by_chance, deepest
from vlmadapters.validation.means import DIGITS, Mean, mean_correlation, no_interval
from vlmadapters.validation.ranking import LEAST_RANKED, UNTESTABLE, guesses, holm
from vlmadapters.validation.repeatability import ROUNDING, Cells, signs
from vlmadapters.validation.verdict import SIGNIFICANCE, Array, bracketed, outcomes, with_zero_shot
from vlmlayers.placement import ZERO_SHOT, Placement, of_kind
from vlmlayers.positions import TOWERS
from vlmlayers.words import counted

PREDICTOR_COLUMNS = (
    "predictor", "kind", "tau", "low", "high", "p", "p_holm",
    "pick", "gain", "gain_low", "gain_high", "gain_p_holm", "n",
)  # fmt: skip
FIXED = {"paper": "the published placement", "all": "all blocks", "last": "last block"}
FREE = ("relative_depth", "blocks_adapted", "fewest_blocks")  # which read no measurement


def judge_predictors(
    table: pd.DataFrame,
    predicted: pd.DataFrame | None,
    reference: str,
    *,
    draws: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Return how well scores and baselines rank placements and pick one, in single cells.

    Args:
        table: Validation table of one comparison.
        predicted: Columns placement, score, predicted; None judges baselines alone.
        reference: Label of the placement that picks are compared with.
        draws: Draws of chance.
        seed: Seed of the private generators.

    Returns:
        The columns `PREDICTOR_COLUMNS`: kind is `ceiling`, `baseline` or `score`; tau the mean over
        cells of Kendall's τ-b, with interval for these placements, two-sided p against random
        curves (`by_chance`; whether a score predicts is its to say, not the interval's), for the
        ceiling one-sided by reversing rankings (`Cells.reversals`), and p corrected by Holm's
        method; pick the placement ranked first, `2 tied` where it is not one; gain its harmonic
        mean minus the reference's, in points, with interval, and p corrected; n cells. A baseline
        that names one placement has no τ, and of fewer than three placements nothing has: any score
        ranks two as trained or in reverse.
    """
    found = outcomes(with_zero_shot(table), "hm")
    trained = [i for i, name in enumerate(found.placements) if name != ZERO_SHOT]
    values, names = found.values[:, trained], [found.placements[i] for i in trained]
    cells = Cells(found.datasets, draws, seed)
    anchor = found.values[:, [found.column(reference)]]
    ranked = len(names) >= LEAST_RANKED
    ceiling = _others(values, cells) if ranked else None
    rows: list[dict[str, Any]] = []
    if ceiling is not None:
        ranks = _ranks_of_others(values, ceiling, cells)
        best = np.take_along_axis(values, ceiling.argmax(1)[:, None], 1)
        apart = (best - anchor)[:, 0]
        gain = _gain(apart, found.datasets, _stretch(cells))
        rows.append(
            {"predictor": "other cells", "kind": "ceiling", **ranks, "pick": "by cell", **gain}
        )
    for name, (kind, guess) in _guesses(names, predicted).items():
        if np.ptp(guess) > 0:
            first = guess == guess.max()
            pick = names[int(np.argmax(guess))] if first.sum() == 1 else f"{first.sum()} tied"
            gain = _gain((values[:, first] - anchor).mean(1), found.datasets)
            ranks = _ranks(values, guess, cells) if ranked else {}
            rows.append({"predictor": name, "kind": kind, **ranks, "pick": pick, **gain})
    for name, label in _fixed(table, found.placements).items():
        apart = found.values[:, found.column(label)] - anchor[:, 0]
        gain = _gain(apart, found.datasets)
        rows.append({"predictor": name, "kind": "baseline", "pick": label, **gain})
    judged = pd.DataFrame(rows, columns=list(PREDICTOR_COLUMNS)).assign(n=len(values))
    scored = judged["tau"].notna() & (judged["kind"] != "ceiling")
    taus = dict(zip(judged.loc[scored, "predictor"], judged.loc[scored, "tau"]))
    of_cells = cells.mean(signs(values).T)  # (pair,): its product with a ranking is the mean τ
    judged.loc[scored, "p"] = by_chance(taus, names, of_cells, draws=draws, seed=seed)
    for column, corrected in (("p", "p_holm"), ("gain_p_holm", "gain_p_holm")):
        tested = judged[column].notna() & (judged["kind"] != "ceiling")
        p = judged.loc[tested, column].to_numpy(np.float64)
        # The ceiling is no candidate: it takes no share of the correction.
        judged.loc[judged["kind"] == "ceiling", corrected] = judged[column]
        judged.loc[tested, corrected] = holm(p)
    return judged


def predictors_statement(judged: pd.DataFrame, reference: str) -> str:
    """Return in words what is known of predictors, against the ceiling and the reference."""
    parts = []
    ceiling = judged[judged["kind"] == "ceiling"]
    if len(ceiling):
        parts.append(
            f"Ranking a cell by all others, which no score can, has a mean τ of {_tau(ceiling)} "
            "with it: the ceiling."
        )
    scores = judged[judged["kind"] == "score"]
    ranked = (scores if len(scores) else judged[judged["kind"] == "baseline"]).dropna(subset="tau")
    if len(ranked):
        best = ranked[ranked["tau"] >= ranked["tau"].max() - ROUNDING]
        kind, p = best["kind"].iloc[0], best["p_holm"].min()
        of = f" of {counted(len(ranked), kind)}" if len(ranked) > 1 else f" {kind}"
        # The interval is of these placements; that a score is the best of many it does not know.
        parts.append(
            f"The best{of} ({', '.join(best['predictor'])}) has a τ of {_tau(best)} on these "
            f"placements ({UNTESTABLE if math.isnan(p) else f'p = {p:.2g}, corrected'})."
        )
    sure = judged[(judged["gain_p_holm"] < SIGNIFICANCE) & (judged["kind"] != "ceiling")]
    better, worse = (_picks(part) for part in (sure[sure["gain"] > 0], sure[sure["gain"] < 0]))
    count = f"(n = {counted(int(judged['n'].iloc[0]), 'cell')})"
    if judged["gain_p_holm"].isna().all():
        parts.append(f"Whether any picks better than {reference} cannot be tested {count}.")
    else:
        parts.append(
            f"After correction {better or 'no pick'} did better than {reference}"
            + (f"; {worse} worse" if worse else "")
            + f" {count}."
        )
    return " ".join(parts)


def _picks(rows: pd.DataFrame) -> str:
    """Return the placements that are ranked first, with their gain and by whom."""
    # A placement did better, whatever named it: noise names one as well.
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows.to_dict("records"):
        found.setdefault((row["pick"], f"{row['gain']:+.1f}"), []).append(row["predictor"])
    return ", ".join(
        f"{pick} ({gain}; named by {', '.join(names)})" for (pick, gain), names in found.items()
    )


def _tau(rows: pd.DataFrame) -> str:
    row = rows.iloc[0]
    known = bracketed(row["low"], row["high"], 2) or f" (no interval: {no_interval(int(row['n']))})"
    return f"{row['tau']:z.2f}{known}".replace("-", "−")


def _guesses(names: list[str], predicted: pd.DataFrame | None) -> dict[str, tuple[str, Array]]:
    """Return what each predictor says of each placement, (placement,), higher being better."""
    placed = [Placement.parse(name) for name in names]
    blocks = [[*one.vision, *one.text] for one in placed]
    ends = deepest(placed)
    depths = [[b / ends[tower] for tower in TOWERS for b in one.blocks(tower)] for one in placed]
    found = {
        "relative_depth": ("baseline", np.array([np.mean(one) for one in depths]).round(DIGITS)),
        "fewest_blocks": ("baseline", -np.array([len(one) for one in blocks], dtype=np.float64)),
    }
    for name, guess in guesses(predicted, names).items() if predicted is not None else ():
        found[name] = ("baseline" if name in FREE else "score", guess)
    return found


def _fixed(table: pd.DataFrame, placements: tuple[str, ...]) -> Mapping[str, str]:
    """Return the placement of each baseline that names one, where it was trained."""
    found = {}
    for kind, words in FIXED.items():
        rows = table[of_kind(table, kind)]
        if len(rows):
            found[words] = str(rows["placement"].iloc[0])
    return found | ({ZERO_SHOT: ZERO_SHOT} if ZERO_SHOT in placements else {})


def _others(values: Array, cells: Cells) -> Array | None:
    """Return for each cell the mean of those of other datasets, or else of its other seeds.

    Args:
        values: (…, cell, placement).
        cells: What the cells are of.
    """
    pairs = cells.others if cells.count > 1 else cells.seeds
    weight = pairs.sum(1, keepdims=True)
    known = len(pairs) > 1 and (weight > 0).all()
    # As outcomes are: sums in another order would rank placements that are equal.
    return ((pairs @ values) / weight).round(DIGITS) if known else None


def _taus(values: Array, guess: Array) -> Array:
    """Return τ of a guess with each cell's ranking, (…, cell); both (…, cell or 1, placement)."""
    return (signs(values) * signs(guess)).sum(-1)


def _ranks(values: Array, guess: Array, cells: Cells) -> dict[str, float]:
    """Return the mean τ of a guess, (placement,), with every cell's ranking."""
    tau = mean_correlation(_taus(values, guess), cells.of)
    return {"tau": tau.value, "low": tau.low, "high": tau.high}


def _ranks_of_others(values: Array, others: Array, cells: Cells) -> dict[str, float]:
    """Return the mean τ of every cell's ranking with that of the others, (cell, placement)."""
    tau = mean_correlation(_taus(values, others), cells.of, stretch=_stretch(cells))
    # Chance reverses the cells before they are averaged: each is among the others of all the rest.
    turned = cells.reversals(whole=cells.count > 1)[..., None]
    drawn = turned * (values - values.mean(1, keepdims=True))
    by_others = _others(drawn, cells)
    assert by_others is not None  # as `others` is
    means = cells.mean(_taus(drawn, by_others))
    # What ties with what was found counts against it, also where rounding differs.
    p = (1 + np.sum(means >= tau.value - ROUNDING)) / (len(means) + 1)
    return {"tau": tau.value, "low": tau.low, "high": tau.high, "p": float(p)}


def _stretch(cells: Cells) -> float:
    """Return how much larger the error of what the others say of each cell is than of a guess.

    Each cell is among the others of all the rest, so that they rise and fall together, as the folds
    of a leave-one-out cross-validation do.

    Reference: Nadeau and Bengio, Inference for the generalization error, 2003.
    """
    units = cells.count if cells.count > 1 else len(cells.of)
    return math.sqrt(1 + units / (units - 1))


def _gain(differences: Array, datasets: NDArray[Any], stretch: float = 1.0) -> dict[str, float]:
    """Return a mean difference with interval and p."""
    gain = Mean.of(differences, datasets, stretch=stretch)
    return {"gain": gain.value, "gain_low": gain.low, "gain_high": gain.high, "gain_p_holm": gain.p}
