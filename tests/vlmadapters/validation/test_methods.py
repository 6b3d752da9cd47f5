"""Methods beside each other: paired differences and one sentence."""

from __future__ import annotations

import math
import re

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from vlmadapters.protocols.results import ZERO_SHOT_CLIP
from vlmadapters.validation.methods import compare_methods, methods_verdict
from vlmlayers.errors import UserError

GAINS = {"MMA": 6.0, "MaPLe": 6.0, "CoOp": 2.0, ZERO_SHOT_CLIP: 0.0}
PLACES = {"MMA": "v5-12,t5-12", "MaPLe": "v1-9,t1-9", "CoOp": "v-,t1", ZERO_SHOT_CLIP: ""}


def results(noise: float = 0.5) -> pd.DataFrame:
    """Six datasets and two seeds, with known gains over zero-shot CLIP on both halves."""
    generator = np.random.default_rng(5)
    rows = []
    for dataset in range(6):
        plain = generator.uniform(40, 80)
        for method, gain in GAINS.items():
            for seed in (-1,) if method == ZERO_SHOT_CLIP else (1, 2):
                value = plain + gain + (noise * generator.normal() if gain else 0)
                rows += [
                    {
                        "method": method, "placement": PLACES[method], "dataset": f"d{dataset}",
                        "seed": seed, "split_kind": kind, "accuracy": value / 100,
                        "parameters": int(100 * gain),
                    }
                    for kind in ("base", "novel")
                ]  # fmt: skip
    return pd.DataFrame(rows)


def test_planted_gains_are_found_in_pairs() -> None:
    found = compare_methods(results()).set_index("method")
    assert {"MMA v5-12,t5-12", "MaPLe v1-9,t1-9"} == set(found.index[:2])
    assert list(found.index[2:]) == ["CoOp v-,t1", ZERO_SHOT_CLIP]
    gaps = [found.difference[name] for name in found.index[2:]]
    assert gaps == pytest.approx([-4, -6], abs=0.8)
    assert (found.n == 12).all() and found.parameters["CoOp v-,t1"] == 200
    truth = results(0).groupby("method").accuracy.mean() * 100
    exact = compare_methods(results(0)).set_index("method")
    assert exact.hm["CoOp v-,t1"] == pytest.approx(truth["CoOp"])


def test_the_verdict_says_who_did_best_and_who_cannot_be_told_from_it() -> None:
    said = methods_verdict(results())
    first, second, third, last = said.split("; ")
    assert " is ahead (harmonic mean " in first  # a tie is no best
    assert first.endswith("over 12 runs of 6 datasets)")
    assert " cannot be told from it (" in second and "CoOp v-,t1 did worse (-" in third
    assert last.startswith("zero-shot CLIP did worse (-")
    alone = results()[lambda rows: rows["method"] != "MaPLe"]
    assert " did best (harmonic mean " in methods_verdict(alone)


def test_of_equal_methods_none_is_said_to_do_worse() -> None:
    """By its own interval against the best of six, one did in a third of such tables."""
    generator, worse, alone = np.random.default_rng(0), 0, 0
    base = [
        {"method": method, "placement": "", "dataset": f"d{dataset}", "seed": seed,
         "split_kind": kind, "parameters": 1}
        for dataset in range(6)
        for method, seeds in ((ZERO_SHOT_CLIP, (-1,)), *((f"M{i}", (1, 2)) for i in range(5)))
        for seed in seeds for kind in ("base", "novel")
    ]  # fmt: skip
    for _ in range(60):
        table = pd.DataFrame(base).assign(accuracy=0.6 + 0.02 * generator.normal(size=len(base)))
        said = methods_verdict(table)
        worse += " did worse (" in said
        alone += " did worse by its own interval alone (" in said
        assert ("does not for all 5 at once." in said) == (" alone (" in said)
    assert worse <= 6 and alone >= 10


def test_of_two_differences_each_takes_half_of_the_level() -> None:
    """Six datasets give the second method a p of 0.02 against the best, zero-shot CLIP far less."""
    noise = np.array([1.0, -1, 2, -2, 0.5, -0.5])
    error = noise.std(ddof=1) / math.sqrt(6)
    apart = noise / error / stats.t.isf(0.01, 5) - 1  # mean −1, at t of a two-sided 0.02
    assert stats.ttest_1samp(apart, 0).pvalue == pytest.approx(0.02)
    moved = {"A": np.zeros(6), "B": apart, ZERO_SHOT_CLIP: np.full(6, -20) + noise / 10}
    table = pd.DataFrame([
        {"method": method, "placement": "", "dataset": f"d{dataset}", "split_kind": kind,
         "seed": -1 if method == ZERO_SHOT_CLIP else 1, "parameters": 1,
         "accuracy": (60 + 3 * dataset + by[dataset]) / 100}
        for method, by in moved.items() for dataset in range(6) for kind in ("base", "novel")
    ])  # fmt: skip
    said = methods_verdict(table)
    assert said.startswith("A did best") and "B did worse (-1.0" in said


def test_methods_of_one_best_mean_are_named_together_whichever_stands_first() -> None:
    exact = results(0)
    for table in (exact, exact[::-1]):
        first, second, _ = methods_verdict(table).split("; ")
        assert " share the best mean (harmonic mean " in first and "ahead" not in first
        assert set(first.partition(" share")[0].split(" and ")) == {
            "MMA v5-12,t5-12",
            "MaPLe v1-9,t1-9",
        }
        named = first.partition(" and ")[0]  # of which the difference is
        assert second == f"CoOp v-,t1 cannot be told from {named} (-4.0)"
    plain = exact.copy()  # nothing trained moved anything
    plain["accuracy"] = plain.groupby("dataset")["accuracy"].transform("min")
    (alone,) = methods_verdict(plain).split("; ")
    for name in ("MMA v5-12,t5-12", "MaPLe v1-9,t1-9", "CoOp v-,t1", ZERO_SHOT_CLIP):
        assert name in alone.partition(" share the best mean")[0]


def test_runs_of_one_dataset_are_said_to_speak_of_its_test_images_alone() -> None:
    table = results()
    said = methods_verdict(table[table.dataset == "d0"])
    assert "2 runs of one dataset, which speak of their test images alone" in said
    assert "test images alone" not in methods_verdict(table)


def test_of_one_run_nothing_is_said_to_be_worse() -> None:
    table = results()
    said = methods_verdict(table[(table.dataset == "d0") & table.seed.isin([1, -1])])
    assert "over one run, which has no interval" in said and "did worse" not in said
    assert said.count("cannot be told from it (-") == 3 and "[" not in said


def test_a_note_of_some_runs_is_not_said_of_all() -> None:
    table = results().assign(note="")
    of = (table.method == "CoOp") & table.dataset.isin(["d0", "d1"])
    table.loc[of, "note"] = "nothing"
    assert methods_verdict(table).endswith(". CoOp on d0, d1: nothing.")
    table.loc[of & (table.dataset == "d0") & (table.seed == 1), "note"] = ""
    assert methods_verdict(table).endswith(". CoOp on d0, d1 in 3 of 4 runs: nothing.")


def test_one_method_has_nothing_to_be_compared_with() -> None:
    table = results()
    assert methods_verdict(table[table.method.isin(["MMA", ZERO_SHOT_CLIP])]) == ""
    assert methods_verdict(table.assign(split_kind="all")) == ""
    with pytest.raises(UserError, match="no training tested on base and novel"):
        compare_methods(table[table.method == ZERO_SHOT_CLIP])


def test_placements_of_different_size_at_one_amount_are_warned_of() -> None:
    table = results()
    ours = table[table.method == "MMA"]
    said = methods_verdict(pd.concat([table, ours.assign(placement="v12,t12")]))
    assert said.startswith("WARNING: MMA: placements of 2 to 16 blocks are compared at one amount")
    own = ours.assign(placement="v12,t12@scale=1")
    assert "WARNING" not in methods_verdict(pd.concat([table, own]))


def test_what_no_mean_joins_is_refused() -> None:
    table = results()
    one = table.assign(model="m", weights="w")
    for name, value, named in (("model", "m2", "m2 (w)"), ("weights", "w2", "m (w2)")):
        two = pd.concat([one, one.assign(**{name: value})])
        for read in (compare_methods, methods_verdict):
            with pytest.raises(UserError, match=re.escape(f"are of m (w) and {named}; compare")):
                read(two)
    again = table[(table.method == "MMA") & (table.dataset == "d0") & (table.seed == 1)]
    with pytest.raises(UserError, match="MMA v5-12,t5-12 twice on d0"):
        methods_verdict(pd.concat([table, again.assign(accuracy=0.1)]))
    assert methods_verdict(pd.concat([table, again])) == methods_verdict(table)
    for absent in (table.dataset == "d0", table.dataset != ""):
        plain = (table.method == ZERO_SHOT_CLIP) & absent
        with pytest.raises(UserError, match="lack base and novel accuracies of zero-shot CLIP on"):
            compare_methods(table[~plain])
