"""The registered study of search: its analysis on planted cells, and draws of other classes."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_1samp

from vlmlayers.manifests import Manifest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "registered_search.py"


@pytest.fixture(scope="module")
def script() -> dict:
    return runpy.run_path(str(SCRIPT))


def cells(gain: float) -> pd.DataFrame:
    """Return cells in which search is better than all its rivals by a gain, on average."""
    generator = np.random.default_rng(0)
    rows = [
        {"method": method, "dataset": f"d{dataset}", "model": model, "seed": seed,
         "search": 50 + gain + generator.normal(), "paper": 50.0, "all": 50.0, "last": np.nan,
         "zero_shot": 50.0, "decided": False, "seconds": 1.0}
        for method in ("mma", "coop") for dataset in range(6) for model in "ab" for seed in (1, 2)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_the_analysis_is_a_t_test_over_units_corrected_by_holm(script: dict) -> None:
    planted = cells(3.0)
    found = script["analyse"](planted).set_index(["method", "against"])
    part = planted[planted["method"] == "mma"]
    units = (part["search"] - part["paper"]).groupby([part["dataset"], part["model"]]).mean()
    row = found.loc[("mma", "published placement")]
    assert row["p"] == pytest.approx(ttest_1samp(units, 0).pvalue)
    assert (row["units"], row["cells"]) == (12, 24)
    assert ("mma", "last block") not in found.index, "no rival, no comparison"
    assert found["survives"].all() and not script["analyse"](cells(0.0))["survives"].any()
    assert (found["p_holm"] >= found["p"]).all()


def test_a_seed_draws_other_classes_of_any_folder(script: dict, tmp_path: Path) -> None:
    drawn = [script["redraw"](Manifest.load("letters"), seed, tmp_path, None, 6) for seed in (1, 2)]
    names = [one.class_names() for one in drawn]
    assert all(len(some) == 6 for some in names) and set(names[0]) != set(names[1])
    items = {split: drawn[0].items(split) for split in ("train", "test")}
    assert all(drawn[0].location(one).is_file() for some in items.values() for one in some)
    assert {len(some) for some in items.values()} == {6 * script["TRAIN"], 6 * script["TEST"]}
    again = script["redraw"](Manifest.load("letters"), 1, tmp_path, None, 6)
    assert again.class_names() == names[0]


@pytest.mark.parametrize(
    ("table", "method"),
    [
        ("registered_search", None),
        ("registered_search_taught", "mma"),
        ("registered_search_taught", "cliplora"),
    ],
)
def test_the_outcome_is_what_the_recorded_cells_say(
    script: dict, table: str, method: str | None
) -> None:
    folder = SCRIPT.parent
    said = script["report"](folder / "results" / f"{table}.csv", method)
    assert said in (folder / "registered_search.md").read_text("utf-8")


def test_the_readme_shows_what_the_recorded_cells_say(script: dict) -> None:
    readme = (SCRIPT.parents[1] / "README.md").read_text("utf-8").replace("*", "").replace("−", "-")

    def cell(row: pd.Series) -> str:
        points = f"{row['difference']:+.1f} [{row['low']:.1f}, {row['high']:.1f}]"
        return points + ", claimed" * bool(row["survives"])

    for table, together in (("registered_search", True), ("registered_search_taught", False)):
        cells = pd.read_csv(SCRIPT.parent / "results" / f"{table}.csv")
        families = [cells] if together else [part for _, part in cells.groupby("method")]
        for found in map(script["analyse"], families):
            for _, rows in found.set_index("against").groupby("method"):
                said = rows.apply(cell, axis=1)
                assert f"| {said['published placement']} | {said['zero-shot CLIP']} |" in readme
