"""Record the sweep behind figures 4 to 6: run a study, keep its tables and how they were made.

    python figures/record_sweep.py [--data-root DIR] [--study FILE] [--run DIR] [--out DIR]

A sweep that was stopped goes on where it was. The tables are those of the run folder under the
names that the figures look for; the page beside them says what ran, on what, and what came out.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from _script import errors_in_one_line

from vlmlayers.files import read_csv, read_json
from vlmlayers.runs import Run
from vlmlayers.study import read_study, run_study
from vlmlayers.words import markdown_table

HERE = Path(__file__).resolve().parent
STUDY = HERE.parent / "data_manifests" / "studies" / "placement_sweep.toml"
Words = Sequence[str]
KEPT = (
    "scores.parquet", "choice.json", "validation.csv", "validation_placements.csv",
    "validation_correlations.csv",
)  # fmt: skip


def record(run: Run, out: Path, name: str, command: str) -> list[Path]:
    """Copy the tables of a run to `out` under a model's name, with a page on how they were made."""
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for file in KEPT:
        stem, _, rest = Path(file).stem.partition("_")
        named = "_".join(filter(None, (stem, name, rest))) + Path(file).suffix
        written.append(Path(shutil.copy(run.folder / file, out / named)))
    page = out / f"sweep_{name}.md"
    page.write_text(_page(run, command), encoding="utf-8")
    return [*written, page]


def _page(run: Run, command: str) -> str:
    notes = read_json(run.folder / "validation.json")
    placements = read_csv(run.folder / "validation_placements.csv")
    correlations = read_csv(run.folder / "validation_correlations.csv")
    ledger = read_json(run.folder / "stages.json")
    seconds = {stage: done["seconds"] for stage, done in ledger.items() if "seconds" in done}
    # What cells took, in this run and in those that were stopped before.
    seconds["training"] = notes["training_seconds"]
    facts = [
        ("command", command),
        ("recipe", ", ".join(f"{key} {value}" for key, value in notes["recipe"].items())),
        ("settings", ", ".join(f"{key} {value}" for key, value in notes["settings"].items())),
        ("datasets", ", ".join(notes["datasets"])),
        ("seeds, shots", f"{', '.join(map(str, notes['seeds']))}; {notes['shots']} shots"),
        ("test images", f"{notes['items']} of each dataset, balanced" if notes["items"] else "all"),
        ("layers chosen on", ", ".join(f"{k} {v}" for k, v in notes["chosen_on"].items())),
        *facts_of({**run.read_provenance(), "environment": notes["environment"]}),
        ("seconds", ", ".join(f"{stage} {value:.0f}" for stage, value in seconds.items())),
    ]
    return "\n".join([
        "# A recorded sweep over placements", "",
        "Written by `figures/record_sweep.py`; nothing here is edited by hand.", "",
        notes["verdict"], "", notes.get("predictors", ""), "",
        markdown_table(("what", "value"), facts), "",
        "## Placements", "", "Percent, with 95 % intervals over datasets; the difference "
        "is that of the harmonic mean to the chosen placement, in pairs.", "",
        _rows(placements, ["placement", "kind"], ["base", "novel", "hm", "difference"]), "",
        "## Rank correlation of placement scores with the trained harmonic mean", "",
        _rows(correlations, ["score"], ["tau"], ["p", "p_holm"]), "",
    ])  # fmt: skip


def facts_of(made: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what a provenance says of the model and of what made the run, and when."""
    model, place = made["model"], made["environment"]
    return [
        ("model", f"{model['name']}, weights {model['weights']}, {model['weights_hash'][:16]}"),
        ("machine", f"{place['cpus']} CPUs, Python {place['python']}"),
        ("versions", ", ".join(f"{key} {value}" for key, value in place["versions"].items())),
        ("commit", place.get("commit") or "unknown"),
        ("finished", place["written"]),
    ]


def bracketed(low: float, high: float) -> str:
    """Return an interval after a blank; nothing where there is none."""
    return f" [{low:.2f}, {high:.2f}]" if low < high else ""


def arguments(description: str, study: Path, run: str) -> argparse.Namespace:
    """Read the command line of a script that records a study."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data-root", type=Path, default=None)
    parser.add_argument("--study", type=Path, default=study)
    parser.add_argument("--run", type=Path, default=HERE.parent / "runs" / run)
    parser.add_argument("--out", type=Path, default=HERE / "tables")
    return parser.parse_args()


def _rows(table: pd.DataFrame, words: Words, spans: Words, plain: Words = ()) -> str:
    """Return a Markdown table; a span is `value [low, high]`."""

    def span(row: Any, name: str) -> str:
        low, high = (f"{name}_{end}" if f"{name}_{end}" in row else end for end in ("low", "high"))
        return f"{row[name]:.2f}{bracketed(row[low], row[high])}"

    rows = [
        [*(str(row[name]) for name in words), *(span(row, name) for name in spans),
         *(f"{row[name]:.3f}" if pd.notna(row[name]) else "–" for name in plain)]
        for row in table.to_dict("records")
    ]  # fmt: skip
    return markdown_table([*words, *spans, *plain], rows)


def main() -> None:
    """Run the study and record it."""
    asked = arguments(__doc__ or "", STUDY, "placement_sweep")
    with errors_in_one_line():
        study = read_study(asked.study)
        source = {"base": asked.study.parent, "source": asked.study.read_text("utf-8")}
        run = run_study(study, asked.run, data_root=asked.data_root, echo=print, **source)[0]
        name = study.models[0].title.replace("-", "_")
        other = "" if asked.study == STUDY else f" --study {asked.study.name}"
        command = f"python figures/record_sweep.py{other}"
        print(*record(run, asked.out, name, command), sep="\n")


if __name__ == "__main__":
    main()
