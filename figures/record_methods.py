"""Record the comparison of all methods on the miniature CLIP: run a study, keep its table.

    python figures/record_methods.py [--data-root DIR] [--study FILE] [--run DIR] [--out DIR]

A run that was stopped goes on where it was. Beside `methods_<model>.csv`, a results table, a page
says what ran, on what, and what came out. Tables 1 and 4 read it from the run folder where that is
named; by itself a small model has no place among published numbers.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
from _script import errors_in_one_line
from record_sweep import HERE, arguments, bracketed, facts_of

from vlmadapters.protocols.results import summarise
from vlmadapters.validation.methods import compare_methods, methods_verdict
from vlmlayers.files import read_csv
from vlmlayers.runs import Run
from vlmlayers.study import read_study, run_study
from vlmlayers.words import markdown_table

STUDY = HERE.parent / "data_manifests" / "studies" / "methods_mini.toml"
READ_AS = (
    "Read it as a test of the machinery: a small backbone whose pretraining knew most of these "
    "domains says nothing about the order of methods on a model of ordinary size. Draws, prompts "
    "and test images are the same for all methods; their rates were searched by one grid at four "
    "shots of two other domains (`tuning_mini_clip.md`), and several lie at an end of it."
)


def record(run: Run, out: Path, name: str, command: str) -> list[Path]:
    """Copy the table of a run to `out` under a model's name, with a page on how it was made."""
    out.mkdir(parents=True, exist_ok=True)
    table = Path(shutil.copy(run.folder / "results.csv", out / f"methods_{name}.csv"))
    page = out / f"methods_{name}.md"
    results = read_csv(table)
    page.write_text(_page(run, results, command), encoding="utf-8")
    return [table, page]


def _page(run: Run, results: pd.DataFrame, command: str) -> str:
    facts = [
        ("command", command),
        ("datasets", ", ".join(results["dataset"].unique())),
        ("seeds, shots", f"{_listed(results['seed'])}; {_listed(results['shots'])} shots"),
        ("test images", f"{results.groupby(['dataset', 'split_kind'])['n'].max().sum()} in all"),
        *facts_of(run.read_provenance()["train"]),
    ]
    trained = results[results["seconds"] > 0]
    hours = trained.drop_duplicates(["method", "source", "seed"])["seconds"].sum() / 3600
    return "\n".join([
        "# Methods on the miniature CLIP, recorded", "",
        "Written by `figures/record_methods.py`; nothing here is edited by hand.", "",
        methods_verdict(results), "", READ_AS, "",
        markdown_table(("what", "value"), facts), "",
        "## Averages over datasets", "",
        "Percent; the interval is that of the paired difference of harmonic means to the best, "
        "over datasets. Seconds are those of one training; all of them took "
        f"{hours:.1f} h. What is frozen is shared: features of images count for the first method "
        "that asked for them, so that the others seem faster than they are alone.", "",
        _averages(results), "",
        "## Harmonic mean by dataset", "", _by_dataset(results), "",
    ])  # fmt: skip


def _listed(column: Any) -> str:
    # zero-shot rows have the seed -1 and no shots
    return ", ".join(str(int(one)) for one in sorted(column.dropna().unique()) if one > 0)


def _averages(results: pd.DataFrame) -> str:
    """Return base, novel and harmonic mean of each method, the best first."""
    cost = results.groupby("method")[["parameters", "seconds"]].mean()
    rows = []
    for row in compare_methods(results).to_dict("records"):
        title = next(one for one in sorted(cost.index, key=len, reverse=True)
                     if str(row["method"]).startswith(one))  # fmt: skip
        rows.append([
            row["method"], *(f"{row[name]:.2f}" for name in ("base", "novel", "hm")),
            f"{row['difference']:.2f}{bracketed(row['difference_low'], row['difference_high'])}",
            f"{cost.parameters[title]:,.0f}", f"{cost.seconds[title]:.0f}",
        ])  # fmt: skip
    heads = ["method", "base", "novel", "hm", "difference", "parameters", "seconds"]
    return markdown_table(heads, rows)


def _by_dataset(results: pd.DataFrame) -> str:
    summary = summarise(results).query("metric == 'hm' and dataset != 'average'")
    wide = 100 * summary.pivot_table(index="method", columns="dataset", values="mean", sort=False)
    rows = [[method, *(f"{value:.1f}" for value in row)] for method, row in wide.iterrows()]
    return markdown_table(["method", *wide.columns], rows)


def main() -> None:
    """Run the study and record it."""
    asked = arguments(__doc__ or "", STUDY, "methods_mini")
    with errors_in_one_line():
        study = read_study(asked.study)
        run = run_study(
            study, asked.run, base=asked.study.parent, source=asked.study.read_text("utf-8"),
            data_root=asked.data_root, echo=print,
        )[0]  # fmt: skip
        name = study.models[0].title.replace("-", "_")
        other = "" if asked.study == STUDY else f" --study {asked.study.name}"
        command = f"python figures/record_methods.py{other}"
        print(*record(run, asked.out, name, command), sep="\n")


if __name__ == "__main__":
    main()
