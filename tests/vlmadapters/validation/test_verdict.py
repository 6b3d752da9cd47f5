from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import kendalltau

from vlmadapters.validation.ranking import holm, predictors, rank_correlation
from vlmadapters.validation.verdict import compare, interval, outcomes, regret, verdict
from vlmlayers.errors import UserError

PLACEMENTS = ("v5-12,t5-12", "v1-12,t1-12", "v9-12,t9-12", "v12,t12")
KINDS = ("chosen", "all", "start", "single")


def table(
    means: tuple[float, ...], noise: float = 0.5, datasets: int = 5, draw: int = 7
) -> pd.DataFrame:
    """Cells whose true means are known; dataset and seed shift every placement alike."""
    generator = np.random.default_rng(draw)
    rows = []
    for d in range(datasets):
        shift = generator.normal(0, 10)
        for seed in (1, 2, 3):
            for name, kind, mean in zip(PLACEMENTS, KINDS, means):
                value = mean + shift + generator.normal(0, noise)
                rows.append(
                    {
                        "dataset": f"d{d}",
                        "seed": seed,
                        "placement": name,
                        "kind": kind,
                        "parameters": 10,
                        "base": value,
                        "novel": value,
                        "hm": value,
                        "changed": True,
                    }
                )
    return pd.DataFrame(rows)


def test_paired_differences_recover_planted_effects_under_large_dataset_shifts() -> None:
    compared = compare(table((60, 58, 61, 50)), PLACEMENTS[0]).set_index("placement")
    for name, truth in zip(PLACEMENTS, (0, -2, 1, -10)):
        row = compared.loc[name]
        assert abs(row.difference - truth) < 0.5
        if name != PLACEMENTS[0]:  # which is no different from itself, and has no interval
            assert row.difference_low <= row.difference <= row.difference_high
            # the shift of a dataset is common to all placements and must not widen the difference
            assert row.difference_high - row.difference_low < 1.5
            assert row.novel_difference_low == pytest.approx(row.difference_low)
        assert row.hm_high - row.hm_low > 4
        assert row.base_difference == pytest.approx(row.difference)
    assert compared.index[0] == PLACEMENTS[2]
    assert compared["n"].eq(15).all()


def test_a_placement_without_any_value_leaves_no_cell() -> None:
    cells = table((60, 58, 63, 50))
    lost = cells.assign(hm=cells.hm.where(cells.placement != PLACEMENTS[3]))
    with pytest.raises(UserError, match="no dataset and seed of the validation table holds every"):
        outcomes(lost)


def test_regret_names_the_best_and_its_honest_form_is_not_larger() -> None:
    found = regret(table((60, 58, 63, 50)), PLACEMENTS[0])
    assert found.best == PLACEMENTS[2]
    assert found.value == pytest.approx(3, abs=0.5)
    assert found.honest_low <= found.honest <= min(found.value, found.honest_high) + 1e-9
    assert regret(table((60, 58, 59, 50)), PLACEMENTS[0]).value == 0


def cells_of(values: np.ndarray, datasets: list[str]) -> pd.DataFrame:
    """Return a table of (cell, placement) harmonic means, each cell a seed of its own."""
    rows = [
        (dataset, seed, name, kind, value)
        for seed, (dataset, row) in enumerate(zip(datasets, values))
        for name, kind, value in zip(PLACEMENTS, KINDS, row)
    ]
    return pd.DataFrame(rows, columns=["dataset", "seed", "placement", "kind", "hm"])


def test_a_best_that_every_resample_picks_leads_by_the_same_left_out() -> None:
    """It is 1, 3 and 5 points above the choice on datasets of 1, 2 and 9 seeds: 3 on average."""
    lead = np.repeat([1.0, 3, 5], (1, 2, 9))
    values = 50 + np.stack([0 * lead, lead, -1 - lead, -2 - lead], axis=1)
    cells = cells_of(values, list("abbccccccccc"))
    found = regret(cells, PLACEMENTS[0], draws=500)
    assert (found.value, found.best) == (3, PLACEMENTS[1])
    assert found.honest == pytest.approx(3)
    # Of each resample the mean over what it left out, where a dataset weighs as much as another.
    share, means = 1 / np.repeat([1, 2, 9], (1, 2, 9)), []
    for rows in outcomes(cells).resampled_cells(500, 0):
        left = np.setdiff1d(np.arange(12), np.concatenate(rows))
        means += [np.average(lead[left], weights=share[left])] if len(left) else []
    low, high = np.percentile(means, [2.5, 97.5])
    assert (found.honest_low, found.honest_high) == pytest.approx((low, high))


@pytest.mark.parametrize("seeds", [(3, 3, 3), (5, 5), (1, 10), (1, 1, 10), (1, 2, 9), (2, 2, 6, 6)])
def test_a_best_picked_on_other_runs_leads_by_no_more_than_with_hindsight(
    seeds: tuple[int, ...],
) -> None:
    """Both weigh cells alike, however many seeds each dataset has; else a large one flatters."""
    of, rng = np.repeat(np.arange(len(seeds)), seeds), np.random.default_rng(len(seeds))
    for _ in range(15):
        values = 50 + rng.normal(size=(len(of), 4)) + 2 * rng.normal(size=(len(seeds), 4))[of]
        found = regret(cells_of(values, [f"d{i}" for i in of]), PLACEMENTS[0], draws=200)
        assert found.honest <= found.value + 1e-6


def test_a_lead_that_is_noise_is_gone_where_the_best_is_picked_on_other_runs() -> None:
    """All placements are equal: the best of them leads by luck, and the verdict says so."""
    drawn = (table((60,) * 4, noise=3.0, draw=draw) for draw in range(20))
    leads = [regret(one, PLACEMENTS[0], draws=200) for one in drawn]
    assert np.mean([one.value for one in leads]) > 0.5
    assert abs(np.mean([one.honest for one in leads])) < 0.5
    assert np.mean([one.honest_low <= 0 <= one.honest_high for one in leads]) > 0.9
    said = verdict(table((60, 58, 63, 50)), PLACEMENTS[0], PLACEMENTS[1])
    assert "which flatters it: picked on other runs, the best leads by 3." in said
    one = table((60, 58, 63, 50)).query("dataset == 'd0' and seed == 1")
    assert regret(one, PLACEMENTS[0]).honest is None
    assert "it was picked on this one run" in verdict(one, PLACEMENTS[0], PLACEMENTS[1])


def test_one_run_has_no_interval_and_decides_nothing() -> None:
    one = table((60, 40, 63, 50)).query("dataset == 'd0' and seed == 1")
    compared = compare(one, PLACEMENTS[0])
    assert compared.filter(regex="_low$|_high$").isna().all(axis=None)
    said = verdict(one, PLACEMENTS[0], PLACEMENTS[1])
    assert (
        "cannot be told from the default" in said and "over one run, which has no interval" in said
    )
    assert "[" not in said and "nan" not in said
    assert regret(one, PLACEMENTS[0]).low is None


def test_rank_correlation_agrees_with_scipy_and_flags_chance() -> None:
    cells = table((60, 58, 63, 50))
    guess = {"right": (3, 2, 4, 1), "wrong": (2, 3, 1, 4), "ties": (1, 1, 2, 0), "flat": (1,) * 4}
    predicted = pd.DataFrame(
        [
            {"placement": p, "score": s, "predicted": float(v)}
            for s, values in guess.items()
            for p, v in zip(PLACEMENTS, values)
        ]
    )
    found = rank_correlation(cells, predicted).set_index("score")
    means = outcomes(cells).means
    for name in ("right", "wrong", "ties"):
        assert found.at[name, "tau"] == pytest.approx(kendalltau(guess[name], means).statistic)
    assert found.at["right", "tau"] == 1
    assert found.at["wrong", "tau"] == -1
    # Of four placements a random curve often has the very ranking of the outcome.
    assert found["p"].isna().all()
    assert "flat" not in found.index


def test_of_two_placements_no_ranking_is_told() -> None:
    """Any score ranks two as trained or in reverse, with the interval [1, 1] for a τ of 1."""
    rows = [
        {"dataset": "a", "seed": s, "placement": name, "kind": "start", "hm": value + s}
        for s in range(4)
        for name, value in zip(PLACEMENTS[:2], (50.0, 60.0))
    ]
    predicted = pd.DataFrame(
        {"placement": PLACEMENTS[:2], "score": "mean_accuracy", "predicted": [0.1, 0.2]}
    )
    found = rank_correlation(pd.DataFrame(rows), predicted)
    assert found.empty and "fewer than three placements" in predictors(found)


def test_a_score_that_lacks_a_placement_is_not_ranked_with_the_others() -> None:
    """Its τ would be that of other pairs."""
    rows = [(name, score, value) for score in ("whole", "part")
            for value, name in enumerate(PLACEMENTS)][:-1]  # fmt: skip
    predicted = pd.DataFrame(rows, columns=["placement", "score", "predicted"])
    found = rank_correlation(table((60, 57, 55, 50)), predicted, draws=20)
    assert found["score"].tolist() == ["whole"]


def test_holm_on_a_worked_example() -> None:
    """0.005 × 4, 0.01 × 3, 0.03 × 2, then not less than before: Holm 1979, by hand."""
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([0.9, 0.8])).tolist() == [1, 1]


def predicted_and_trained(noise: float) -> pd.DataFrame:
    """Return τ of scores of twelve placements that are a point apart, in no order of depth."""
    gain = np.array([3, 9, 0, 6, 11, 2, 8, 5, 10, 1, 7, 4.0])
    names = [f"v{i}-12,t{i}-12" for i in range(1, 13)]
    generator = np.random.default_rng(0)
    rows = [
        {"dataset": d, "seed": s, "placement": name, "kind": "start", "parameters": 1,
         "changed": True, **dict.fromkeys(("base", "novel", "hm"), hm + generator.normal(0, noise))}
        for d in "ab" for s in (1, 2) for name, hm in zip(names, gain)
    ]  # fmt: skip
    guess = {
        "mean_accuracy": gain,
        "metric:rmg": -gain,
        "mean_agreement": np.array([5, 1, 9, 2, 8, 3, 7, 4, 6, 0, 11, 10.0]),
        "relative_depth": np.arange(12.0) % 5,
    }
    predicted = pd.DataFrame(
        [
            {"placement": name, "score": score, "predicted": value}
            for score, values in guess.items()
            for name, value in zip(names, values)
        ]
    )
    return rank_correlation(pd.DataFrame(rows), predicted)


def test_the_statement_names_what_predicted_what_reversed_and_what_did_neither() -> None:
    found = predicted_and_trained(noise=1.5)
    tau = f"{found.set_index('score').at['mean_accuracy', 'tau']:.2f}"
    said = predictors(found)
    assert said.startswith("Of 3 scores that read a measurement, 1 predicted the trained harmonic")
    assert f"correction): mean_accuracy (τ {tau})." in said and tau != "1.00"
    assert f"1 ranked the placements in reverse: metric:rmg (τ −{tau})." in said
    assert "1 cannot be told from chance. Without any measurement: relative_depth (τ" in said
    assert (found["p_holm"] >= found["p"]).all()
    many = predictors(found.assign(p_holm=0.06))  # as of so many scores that none stands out
    assert "none predicted" in many and "3 cannot be told from chance" in many
    assert "none predicted" in predictors(found[found["score"] == "mean_agreement"])
    assert "No score could be compared" in predictors(found.iloc[:0])


def test_a_ranking_that_no_run_left_out_moves_has_no_interval_and_is_not_judged() -> None:
    found = predicted_and_trained(noise=0.05)
    rows = found.set_index("score").loc[["mean_accuracy", "metric:rmg"]]
    assert rows["tau"].tolist() == [1, -1] and (rows["p_holm"] < 0.05).all()
    assert rows[["low", "high"]].isna().all(axis=None)
    said = predictors(found)
    assert "none predicted" in said and "in reverse" not in said and "nan" not in said
    assert "leaving out one dataset or run shows no spread: mean_accuracy (τ 1.00)" in said


@pytest.mark.parametrize(
    ("means", "expected"),
    [
        ((60, 57, 55, 50), "did better than the default"),
        ((60, 63, 55, 50), "did worse than the default"),
        ((60, 60.0, 55, 50), "cannot be told from the default"),
    ],
)
def test_verdict_follows_from_the_numbers(means: tuple[float, ...], expected: str) -> None:
    assert expected in verdict(table(means, noise=1.0), PLACEMENTS[0], PLACEMENTS[1])


@pytest.mark.parametrize(
    ("plain", "said"),
    [
        (40, "zero-shot CLIP is 20.0 points below it"),
        (70, "zero-shot CLIP is 10.0 points above it"),
        (60.01, "zero-shot CLIP cannot be told from it (0.0 points"),
    ],
)
def test_zero_shot_is_compared_in_pairs(plain: float, said: str) -> None:
    cells = table((60, 57, 55, 50), noise=0.05)
    spread = 0.5 if plain == 60.01 else 0.01  # the same difference everywhere is no test
    noise = np.random.default_rng(1).normal(0, spread, len(cells))
    zero = cells.groupby(["dataset", "seed"])["hm"].transform("first") - 60 + plain + noise
    cells = cells.assign(zero_shot_base=zero, zero_shot_novel=zero)
    assert said in verdict(cells, PLACEMENTS[0], PLACEMENTS[1])
    row = compare(cells, PLACEMENTS[0]).set_index("placement").loc["zero-shot"]
    assert row.difference == pytest.approx(plain - 60, abs=0.3)
    assert (row.parameters, row.kind) == (0, "zero-shot")
    assert regret(cells, PLACEMENTS[0]).best == PLACEMENTS[0]


def test_verdict_says_when_the_rule_chose_the_default_and_when_nothing_was_learned() -> None:
    cells = table((60, 57, 62, 50))
    assert verdict(cells, PLACEMENTS[0], PLACEMENTS[0]).startswith("The rule chose the default")
    assert "VOID: training changed no prediction" in verdict(
        cells.assign(changed=False), PLACEMENTS[0], PLACEMENTS[1]
    )
    one = cells.assign(changed=np.arange(len(cells)) == 0)
    assert "VOID" not in verdict(one, PLACEMENTS[0], PLACEMENTS[1])


def test_incomplete_cells_are_left_out_and_an_empty_table_is_refused() -> None:
    cells = table((60, 57, 55, 50))
    part = cells.drop(index=cells.index[0])
    assert len(outcomes(part).values) == 14
    with pytest.raises(UserError, match="finish the sweep"):
        outcomes(cells[cells["placement"] == "none"])
    with pytest.raises(UserError, match="finish the sweep"):
        verdict(cells[:0], PLACEMENTS[0], PLACEMENTS[1])
    with pytest.raises(UserError, match="unknown placement"):
        compare(cells, "v5-12,t5-13")
    both = pd.concat([cells.assign(comparison=name) for name in ("tuned", "given")])
    with pytest.raises(UserError, match="twice on .*; keep the rows of one comparison, as tuned"):
        compare(both, PLACEMENTS[0])
    for chosen, reference in (("v5-12,t5-13", PLACEMENTS[1]), (PLACEMENTS[0], "v5-12,t5-13")):
        with pytest.raises(UserError, match="unknown placement 'v5-12,t5-13'"):
            verdict(cells, chosen, reference)


def test_intervals_of_accuracies_stay_among_accuracies() -> None:
    """Four datasets at an end and one far from it: t ± reaches beyond 0 and 100 percent."""
    cells = table((0, 0, 0, 0))
    far = np.where(cells["dataset"] == "d0", 20.0, 0.0)
    cells["hm"] = np.where(cells["placement"] == PLACEMENTS[0], 100 - far, far)
    compared = compare(cells, PLACEMENTS[0]).set_index("placement")
    assert compared.loc[PLACEMENTS[0], "hm_high"] == 100
    assert compared.loc[PLACEMENTS[1], "hm_low"] == 0
    assert compared.loc[PLACEMENTS[1], "difference_low"] < -100, "a difference has no such end"


def test_of_1001_draws_25_lie_beyond_either_end() -> None:
    draws = np.random.default_rng(0).permutation(1001).astype(float)
    assert interval(draws) == (25, 975)


@pytest.mark.parametrize(
    ("datasets", "said"),
    [
        (1, "3 runs of one dataset, which speak of their test images alone;"),
        (2, "6 runs of two datasets, which speak of their test images alone;"),
        (3, "9 runs of 3 datasets;"),
    ],
)
def test_three_datasets_are_a_sample_of_datasets(datasets: int, said: str) -> None:
    cells = table((60, 57, 55, 50), datasets=datasets)
    assert said in verdict(cells, PLACEMENTS[0], PLACEMENTS[1])


def test_a_tie_is_called_one() -> None:
    cells = table((60, 60, 57, 50), noise=0)
    said = verdict(cells, PLACEMENTS[0], PLACEMENTS[2])
    assert "no placement did better, and 1 came out equal" in said


def test_a_difference_that_is_the_same_everywhere_has_no_interval_and_is_said_so() -> None:
    cells = table((60, 57, 55, 50), noise=0)
    other = cells["placement"].eq(PLACEMENTS[2])
    cells.loc[other, "hm"] += np.random.default_rng(0).normal(size=other.sum())
    said = verdict(cells, PLACEMENTS[0], PLACEMENTS[1])
    expected = "by +3.0 points over 15 runs of 5 datasets, which give no interval;"
    assert "cannot be told from the default" in said and expected in said
    compared = compare(cells, PLACEMENTS[0]).set_index("placement")
    assert compared["difference_low"].notna().to_dict() == {
        name: name == PLACEMENTS[2] for name in PLACEMENTS
    }


def test_zero_shot_clip_above_every_training_is_no_tie() -> None:
    cells = table((60, 57, 55, 50), noise=0)
    best = cells.assign(zero_shot_base=70.0, zero_shot_novel=70.0)
    said = verdict(best, "zero-shot", PLACEMENTS[0])
    assert "no placement did better" in said and "came out equal" not in said


def test_equal_accuracies_stay_a_tie_however_their_mean_was_computed() -> None:
    """36 and 31 of 45 right everywhere: percent of shares, or shares in percent, is rounding."""
    base, novel = 36 / 45, 31 / 45
    cells = table((0, 0, 0, 0)).assign(
        base=100 * base,
        novel=100 * novel,
        hm=100 * (2 * base * novel / (base + novel)),
        zero_shot_base=100 * base,
        zero_shot_novel=100 * novel,
    )
    lower = cells["seed"].eq(1) & cells["placement"].ne(PLACEMENTS[0])
    cells.loc[lower, "hm"] -= 1
    compared = compare(cells, PLACEMENTS[0]).set_index("placement")
    plain = compared.loc["zero-shot"]
    assert plain.difference == compared["difference"].max() == 0
    assert compared.filter(regex="^difference_").isna().all(axis=None)
    said = verdict(cells, *PLACEMENTS[:2])
    assert "zero-shot CLIP cannot be told from it (0.0 points below);" not in said
    assert "zero-shot CLIP cannot be told from it (0.0 points below)." in said
