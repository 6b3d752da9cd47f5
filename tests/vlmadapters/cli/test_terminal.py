"""The results table as it is printed: complete, and within 80 columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vlmadapters.cli.terminal import images_text, results_text
from vlmadapters.cli.validate import _text as validation_text
from vlmadapters.protocols.published import with_published
from vlmadapters.protocols.results import UNMOVED, ZERO_SHOT_OWN, summarise
from vlmadapters.validation.outcome import Validation


def results(**columns: Any) -> pd.DataFrame:
    """Two seeds of one placement, and a baseline."""
    trained = {
        "method": "MMA",
        "split_kind": ["base", "novel"] * 2,
        "seed": [1, 1, 2, 2],
        "accuracy": [0.8, 1.0, 0.9, 1.0],
        "placement": "v5-12,t5-12",
        "source": "ucf101",
        "note": "",
        "parameters": 1280,
        "seconds": 2.5,
    } | columns
    plain = {"method": ZERO_SHOT_OWN, "split_kind": ["base", "novel"], "seed": -1, "accuracy": 0.5}
    plain |= {"placement": "", "source": "", "note": "", "parameters": 0, "seconds": 0.0}
    both = pd.concat([pd.DataFrame(plain), pd.DataFrame(trained)])
    fixed = {"protocol": "base-to-novel", "model": "m", "weights": "w", "dataset": "ucf101"}
    return both.assign(shots=16, **fixed)


def test_means_spreads_and_seeds_stand_in_one_line() -> None:
    lines = results_text(summarise(results())).splitlines()
    assert lines[0] == "base-to-novel, m w: accuracy in %, mean ± sd over seeds"
    assert lines[2].split() == ["ucf101", "base", "novel", "HM"]
    assert lines[3].split("template")[1].split() == ["50.00", "50.00", "50.00"]
    trained = "  MMA v5-12,t5-12, 2 seeds 85.00 ± 7.07 100.00 ± 0.00 91.89"
    assert " ".join(lines[4].split()).startswith(trained.strip())
    ends = {line[38:44].strip() for line in lines[2:5]}
    assert ends == {"base", "50.00", "85.00"}


def test_how_many_images_were_tested_stands_below_the_accuracies() -> None:
    mine = results().assign(n=7, dataset="of mine", split_kind="all")
    two = pd.concat([results().assign(n=1200), mine])
    assert images_text(two) == "test images: ucf101 1,200 base, 1,200 novel; of mine 7"
    many = pd.concat([results().assign(n=20, dataset=f"dataset-{one}") for one in range(9)])
    assert max(map(len, images_text(many).splitlines())) <= 80


def test_trainings_on_two_datasets_are_told_apart() -> None:
    both = [
        results(source=source, accuracy=share).assign(
            protocol="cross-dataset", dataset="target", split_kind="all"
        )
        for source, share in (("digits", 0.6), ("faces", 0.7))
    ]
    text = results_text(summarise(pd.concat(both).drop_duplicates()))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert any(line.startswith("MMA v5-12,t5-12, from digits") for line in lines)
    assert any(line.startswith("MMA v5-12,t5-12, from faces") for line in lines)
    assert max(map(len, text.splitlines())) <= 80


def test_one_seed_speaks_of_no_spread() -> None:
    lines = results_text(summarise(results().query("seed < 2"))).splitlines()
    assert lines[0] == "base-to-novel, m w: accuracy in %"


def test_long_placements_notes_and_published_rows_stay_within_80_columns() -> None:
    summary = summarise(results(placement="v1+3+5-8+10,t2+4+6-9+11", note=UNMOVED))
    text = results_text(with_published(summary, {"ucf101": "UCF101"}), random_weights=True)
    assert max(map(len, text.splitlines())) <= 80
    assert "RANDOM" in text.splitlines()[0]
    assert "MMA (published)" in text
    assert "training changed nothing" in text
    assert "published: ViT-B/16 of OpenAI, 16 shots; 3 seeds, where sources name them" in text
    assert "MMA (published), ucf101, novel: inconsistent as printed" in text
    assert " 1,280 " in text, "a count, although published rows have none"


def test_scattered_blocks_of_a_validation_stay_within_80_columns() -> None:
    """Numbers keep their columns, and stand below a placement that leaves them no room."""
    placements = pd.DataFrame(
        {
            "placement": ["v1+3+5+7+9+11,t2+4+6+8+10+12", "v5-12,t5-12"],
            "kind": ["chosen+random", "paper+start"],
            **dict.fromkeys(("base", "novel", "hm"), 85.5),
            "difference": [0.0, -1.25],
            "parameters": 1_234_567,
        }
    )
    found = Validation([0], placements, {"verdict": "Good."}, None)  # type: ignore[arg-type]
    lines = validation_text(found, Path("runs/mine")).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[2].split() == ["v1+3+5+7+9+11,t2+4+6+8+10+12", "(chosen+random)"]
    assert lines[3].split() == ["85.50", "85.50", "85.50", "0.00", "1234567"]
    assert lines[4].split()[:3] == ["v5-12,t5-12", "(paper+start)", "85.50"]
    assert {line.index("85.50") for line in lines[3:5]} == {lines[1].index(" base")}
    scores = pd.DataFrame({"score": [f"metric:{name}" for name in "abcdef"], "tau": 0.58,
                           "low": np.nan, "high": np.nan, "p": 0.01, "p_holm": 0.064})  # fmt: skip
    said = {"verdict": "Good.", "predictors": "Of 6 scores none predicted the harmonic mean."}
    found = Validation([0], placements, said, scores)  # type: ignore[arg-type]
    text = validation_text(found, Path("runs/mine"))
    assert max(map(len, text.splitlines())) <= 80
    assert "NaN" not in text and "0.06" in text and "0.01" not in text
    assert "the 5 highest of 6; p_holm: of all scores" in text
    assert "Of 6 scores none predicted the harmonic mean." in text
    # Of trainings at the recipe's amount beside tuned ones: what is wrong with comparing them too.
    for warning, end in (("placements differ in size", " WARNING: placements differ in size."),
                         ("", "")):  # fmt: skip
        both = said | {"untuned": {"verdict": "Level.", "warning": warning}}
        found = Validation([0], placements, both, None, untuned=placements)  # type: ignore[arg-type]
        lines = " ".join(validation_text(found, Path("runs/mine")).split())
        assert f"All at the recipe's amount: Level.{end} Of 6 scores" in lines


def test_a_note_names_the_methods_that_it_is_of() -> None:
    moved = results(method="CoOp", placement="t1")
    still = [results(method=name, note=UNMOVED) for name in ("MMA", "MaPLe")]
    text = " ".join(results_text(summarise(pd.concat([moved, *still]))).split())
    assert f"ucf101, MMA, MaPLe: {UNMOVED}" in text
    assert text.count(UNMOVED) == 1
    once = results(note=[UNMOVED, UNMOVED, "", ""])
    text = " ".join(results_text(summarise(once)).split())
    assert f"{UNMOVED} (in 1 of 2 runs)" in text
    assert UNMOVED not in results_text(summarise(pd.concat([moved, *still])), noted=False)


def test_the_cost_of_a_training_is_shown_where_there_was_one() -> None:
    trained = results_text(summarise(results()))
    assert "one training" in trained and "1,280         2.5" in trained
    assert "one training" not in results_text(summarise(results(seconds=0.0)))
    moved = pd.concat([results(source=name, protocol="cross-dataset") for name in "ab"])
    assert results_text(summarise(moved)).count("1,280") == 1, "one line for all sources"
