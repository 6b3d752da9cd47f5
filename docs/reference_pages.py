"""Pages of the site that are written from what the code declares: one per metric, the glossary."""

from __future__ import annotations

import shutil
from pathlib import Path

from vlmlayers.metrics import METRICS, table
from vlmlayers.report.glossary import GLOSSARY

COLUMNS = {
    "range": "bounds",
    "chance": "chance",
    "larger means": "larger means",
    "takes": "needs",
    "towers": "towers",
    "spaces": "spaces",
    "fewest": "smallest n",
    "unchanged by": "invariant to",
    "changed by": "sensitive to",
    "source": "reference",
}


def write_metrics(folder: Path) -> None:
    """Write `NAME.md` for every metric and an `index.md` that lists them by level."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    lines = ["# Metrics", "", "`vlmlayers score --list` prints the same table.", ""]
    for level, rows in table().groupby("level", sort=False):
        lines += [f"## {str(level).capitalize()} level", "", "| metric | value |", "|---|---|"]
        for row in rows.to_dict("records"):
            name = str(row["metric"])
            lines.append(f"| [`{name}`]({name}.md) | {_cell(row['meaning'])} |")
            (folder / f"{name}.md").write_text(_metric_page(name, row), encoding="utf-8")
        lines.append("")
    lines += ["```{toctree}", ":hidden:", *METRICS, "```", ""]
    (folder / "index.md").write_text("\n".join(lines), encoding="utf-8")


def _metric_page(name: str, row: dict[str, object]) -> str:
    function = METRICS[name].function
    home = f"{function.__module__}.{function.__qualname__}"
    label = str(row["axis label"])
    facts = [f"| {word} | {_cell(row[key])} |" for word, key in COLUMNS.items() if row[key]]
    return "\n".join([
        f"# `{name}`", "", f"{label[:1].upper()}{label[1:]}: {row['meaning']}", "",
        "| | |", "|---|---|", *facts, "",
        "```sh", f"vlmlayers score runs/demo --metric {name}", "```", "",
        "## The function", "",
        "```{eval-rst}", f".. autofunction:: {home}", "   :no-index:", "```", "",
    ])  # fmt: skip


def write_glossary(path: Path) -> None:
    """Write the words that reports explain."""
    terms = [f"{term}\n  {GLOSSARY[term]}\n" for term in sorted(GLOSSARY, key=str.casefold)]
    joined = "\n".join(terms)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# Glossary\n\n```{{glossary}}\n{joined}```\n", encoding="utf-8")


def _cell(words: object) -> str:
    return str(words).replace("|", "\\|")
