"""Search the learning rate of every recipe `mini`: one grid, on data that are not reported.

    python figures/tune_methods.py [--data-root DIR] [--run DIR] [--out DIR] [--methods A,B]
                                   [--datasets A,B] [--seeds 1] [--shots N] [--items N] [--write]

Each method is trained at the same multiples of its recipe's rate, base to novel, and tested on
validation images of drawn domains that no recorded table reports and that zero-shot CLIP leaves
room in. Of each method the rate of the highest harmonic mean is picked, the mean over datasets and
seeds; `--write` puts it into the recipe. MMA's stays: it was tuned at 16 shots, and recorded sweeps
stand on it; `methods_mini.toml` names the rate found here. A search that was stopped goes on where
it was. Methods without steps have no rate: they choose what they have on validation shots.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
from _script import errors_in_one_line
from record_sweep import HERE, facts_of

import vlmlayers as vl
from vlmadapters.data.options import DataOptions
from vlmadapters.methods import BUILT_IN
from vlmadapters.protocols.experiment import Experiment
from vlmadapters.protocols.results import ZERO_SHOT_METHODS
from vlmadapters.training.recipes import load_recipe
from vlmlayers.models.vlm import VLM
from vlmlayers.runs import environment
from vlmlayers.scores.summaries import harmonic_mean
from vlmlayers.study.stages import model_record
from vlmlayers.words import markdown_table

DATASETS = "shapes_outline,doodles_pen"
FACTORS = (1 / 4, 1.0, 4.0, 16.0)
RECIPES = HERE.parent / "adapters" / "vlmadapters" / "training" / "recipe_files"


def trained_methods() -> list[str]:
    """Return the methods that ship and train in steps, all of which have a recipe `mini`."""
    fitted = {"zero-shot", "tip", "linear-probe"}
    return [name for name in BUILT_IN if name not in fitted]


def search(asked: argparse.Namespace, model: VLM) -> pd.DataFrame:
    """Return base, novel and harmonic mean of every trial, in percent, by dataset and seed."""
    recipes = []
    for method in asked.methods.split(","):
        recipe = load_recipe("mini", method)
        recipes.append(replace(recipe, train=replace(recipe.train, shots=asked.shots)))
    trials = [one.at(f"@lr={one.train.lr * by:.2g}") for one in recipes for by in FACTORS]
    # By title and label, the columns of the results table.
    rates = {(one.method.title, one.label): (one.method.name, one.train.lr) for one in trials}
    experiment = Experiment(
        "base-to-novel", model, recipes, asked.run, root=asked.data_root, split="val",
        options=DataOptions(items=asked.items),
    )  # fmt: skip
    seeds = [int(seed) for seed in asked.seeds.split(",")]
    table = experiment.run(asked.datasets.split(","), trials, seeds)
    table = table[~table["method"].isin(ZERO_SHOT_METHODS)]
    found = [rates[pair] for pair in zip(table["method"], table["placement"])]
    table = table.assign(method=[name for name, _ in found], lr=[rate for _, rate in found])
    keys = ["method", "lr", "dataset", "seed", "seconds"]
    wide = 100 * table.pivot_table(index=keys, columns="split_kind", values="accuracy")
    means = [harmonic_mean(base, novel) for base, novel in zip(wide["base"], wide["novel"])]
    return wide.assign(hm=means).reset_index()


def averages(found: pd.DataFrame) -> pd.DataFrame:
    """Return the means over datasets and seeds, with the best of each method marked as picked."""
    columns = ["base", "novel", "hm", "seconds"]
    means = found.groupby(["method", "lr"], as_index=False)[columns].mean()
    best = means.groupby("method")["hm"].idxmax()
    return means.assign(picked=means.index.isin(best))


def write_rate(path: Path, rate: float) -> None:
    """Put a rate into the table `[mini]` of a recipe file."""
    text = path.read_text("utf-8")
    start = text.index("[mini]\n")
    end = text.find("\n[", start)
    table = text[start:] if end < 0 else text[start:end]
    line = f"lr = {rate:g}\n"
    changed, count = re.subn(r"(?m)^lr = .*\n", line, table)
    if not count:
        changed = table.replace('extends = "published"\n', f'extends = "published"\n{line}')
    path.write_text(text.replace(table, changed), "utf-8")


def page(means: pd.DataFrame, model: VLM, asked: argparse.Namespace) -> str:
    """Return the page that says what was searched, on what, and what was picked."""
    made = {"model": model_record(model), "environment": environment()}
    facts = [
        ("datasets", asked.datasets.replace(",", ", ")),
        ("seeds, shots", f"{asked.seeds.replace(',', ', ')}; {asked.shots} shots"),
        ("validation images", f"{asked.items} of each dataset, balanced"),
        ("grid", "the recipe's rate times 1/4, 1, 4, 16"),
        *facts_of(made),
    ]
    rows = [
        [row["method"], f"{row['lr']:g}", *(f"{row[one]:.2f}" for one in ("base", "novel", "hm")),
         f"{row['seconds']:.0f}", "picked" if row["picked"] else ""]
        for row in means.to_dict("records")
    ]  # fmt: skip
    heads = ["method", "rate", "base", "novel", "hm", "seconds", ""]
    return "\n".join([
        "# The search behind the recipes `mini`", "",
        "Written by `figures/tune_methods.py`; nothing here is edited by hand. Every method had "
        "the same grid and the same draws, and no test image was seen.",
        "", markdown_table(("what", "value"), facts), "", markdown_table(heads, rows), "",
    ])  # fmt: skip


def main() -> None:
    """Search, record, and with `--write` change the recipes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", type=Path, default=None)
    parser.add_argument("--run", type=Path, default=HERE.parent / "runs" / "tune_methods")
    parser.add_argument("--out", type=Path, default=HERE / "tables")
    parser.add_argument("--methods", default=",".join(trained_methods()))
    parser.add_argument("--datasets", default=DATASETS)
    parser.add_argument("--seeds", default="1")
    parser.add_argument("--shots", type=int, default=4)
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    with errors_in_one_line():
        model = vl.load_model("mini-clip")
        means = averages(search(asked, model))
    asked.out.mkdir(parents=True, exist_ok=True)
    means.to_csv(asked.out / "tuning_mini_clip.csv", index=False)
    (asked.out / "tuning_mini_clip.md").write_text(page(means, model, asked), "utf-8")
    for row in means[means["picked"]].to_dict("records"):
        print(f"{row['method']}: {row['lr']:g}")
        if asked.write and row["method"] != "mma":
            write_rate(RECIPES / f"{row['method']}.toml", row["lr"])


if __name__ == "__main__":
    main()
