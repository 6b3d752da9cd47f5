"""The tables of the paper: published numbers, and beside them the user's own runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from vlmlayers.figures.inputs import Folders
from vlmlayers.figures.published import (
    AVERAGE,
    BETWEEN,
    Numbers,
    as_numbers,
    own_accuracies,
    own_base_to_novel,
    own_results,
    published,
    source_column,
)
from vlmlayers.figures.render import DAGGER, PaperTable

METRIC_NAMES = {"base": "Base", "novel": "Novel", "hm": "HM"}
OWN_NOTE = (
    "Own runs: mean ± standard deviation over seeds ({}); their average stands only where every "
    "dataset was run."
)


def base_to_novel(folders: Folders) -> PaperTable:
    """Return table 1: base, novel and HM on the eleven datasets and their average."""
    numbers = as_numbers(published("base_to_novel", folders))
    datasets = _unique(dataset for _, dataset, _ in numbers if dataset != AVERAGE)
    methods = _unique(method for method, dataset, _ in numbers if dataset != AVERAGE)
    own = own_base_to_novel(own_results("base_to_novel", folders), datasets)
    extra = _unique(name for _, name, _ in own if name not in (*datasets, AVERAGE))
    shown = [*datasets, AVERAGE, *extra]
    return PaperTable(
        name="table1_base_to_novel",
        title="Base-to-novel generalization: top-1 accuracy on base and novel classes and their "
        "harmonic mean (HM), in percent; at the average, HM is that of the averages.",
        stub=("Dataset", "Metric"),
        rows=[(_title(name), label) for name in shown for label in METRIC_NAMES.values()],
        columns=[*methods, *_unique(setting for setting, _, _ in own)],
        cells={
            ((_title(dataset), METRIC_NAMES[metric]), method): cell
            for (method, dataset, metric), cell in (numbers | own).items()
        },
        rules=frozenset(range(3, 3 * len(shown), 3)),
        notes=_notes(own),
    )


def cross_dataset(folders: Folders) -> PaperTable:
    """Return table 2: ImageNet, or the source of an own run, to ten other datasets."""
    return _accuracies(
        folders, "cross_dataset", "table2_cross_dataset",
        "Cross-dataset transfer: trained on ImageNet unless a row names another source, tested on "
        "all classes of other datasets; top-1 accuracy in percent.",
    )  # fmt: skip


def domain_generalization(folders: Folders) -> PaperTable:
    """Return table 3: ImageNet, or the source of an own run, to ImageNet's shifted test sets."""
    return _accuracies(
        folders, "domain_generalization", "table3_domain_generalization",
        "Domain generalization: trained on ImageNet unless a row names another source, tested on "
        "shifted test sets; top-1 accuracy in percent.",
    )  # fmt: skip


def averages(folders: Folders) -> PaperTable:
    """Return table 4: averages over the eleven datasets, first of the methods the paper compares.

    Below them stand the averages that other sources print.
    """
    numbers = as_numbers(published("base_to_novel_average", folders))
    several = published("three_benchmarks", folders).query("benchmark == 'base_to_novel'")
    for table in (published("base_to_novel", folders), several):
        printed = as_numbers(table[table.dataset == AVERAGE])
        # The paper's own numbers stay; other sources fill in what it does not print.
        numbers |= {key: cell for key, cell in printed.items() if key not in numbers}
    datasets = _unique(published("base_to_novel", folders).dataset)
    datasets.remove(AVERAGE)
    own = own_base_to_novel(own_results("base_to_novel", folders), datasets)
    own = {key: cell for key, cell in own.items() if key[1] == AVERAGE}
    methods = _unique(method for method, _, _ in numbers)
    settings = _unique(setting for setting, _, _ in own)
    return PaperTable(
        name="table4_averages",
        title="Averages over the eleven datasets of base-to-novel generalization, in percent; HM "
        "is that of the averages.",
        stub=("Method",),
        rows=[(method,) for method in (*methods, *settings)],
        columns=list(METRIC_NAMES.values()),
        cells={
            ((method,), METRIC_NAMES[metric]): cell
            for (method, _, metric), cell in (numbers | own).items()
        },
        rules=frozenset({len(methods)} if settings else ()),
        notes=_notes(own),
    )


def few_shot(folders: Folders) -> PaperTable:
    """Return table 5: all classes of the eleven datasets from a few items of each.

    For methods whose authors print no base-to-novel numbers; backbone and shots stand beside them.
    """
    return _accuracies(
        folders, "few_shot", "table5_few_shot",
        "Few-shot classification of all classes; top-1 accuracy in percent. What differs in "
        "backbone or shots cannot be compared.",
        source="",
    )  # fmt: skip


TABLES = {
    "table1_base_to_novel": base_to_novel,
    "table2_cross_dataset": cross_dataset,
    "table3_domain_generalization": domain_generalization,
    "table4_averages": averages,
    "table5_few_shot": few_shot,
}


def draw_table(name: str, tables: Folders, out: Path) -> list[Path]:
    """Write one table of `TABLES` as CSV, Markdown and LaTeX; return the paths."""
    return TABLES[name](tables).write(out)


def _accuracies(
    folders: Folders, protocol: str, name: str, title: str, source: str = "ImageNet"
) -> PaperTable:
    """Return a table of one accuracy per dataset; their average leaves out the source."""
    table, first = published(protocol, folders), [source_column(source)] if source else []
    targets = [name for name in _unique(table.dataset) if name not in (source, AVERAGE)]
    numbers = as_numbers(table.replace({"dataset": dict(zip([source], first))}))
    own = own_accuracies(own_results(protocol, folders, source), targets, source)
    extra = _unique(dataset for _, dataset, _ in own)
    extra = [dataset for dataset in extra if dataset not in (*first, *targets, AVERAGE)]
    methods = _unique(method for method, _, _ in numbers)
    settings = _unique(setting for setting, _, _ in own)
    return PaperTable(
        name=name,
        title=title,
        stub=("Method",),
        rows=[(method,) for method in (*methods, *settings)],
        columns=[*first, *targets, "Average", *extra],
        cells={
            ((method,), _title(dataset)): cell
            for (method, dataset, _), cell in (numbers | own).items()
        },
        rules=frozenset({len(methods)} if settings else ()),
        notes=_notes(own),
    )


def _title(dataset: str) -> str:
    return "Average" if dataset == AVERAGE else dataset


def _notes(own: Numbers) -> tuple[str, ...]:
    """Return what stands under a table with own runs: of each setting all remarks in one line."""
    if not own:
        return ()
    remarks: dict[str, list[str]] = {}
    for (setting, _, _), cell in own.items():
        remarks.setdefault(setting, []).extend(filter(None, cell.note.split(BETWEEN)))
    marked = (
        f"{DAGGER} {setting}: {BETWEEN.join(_unique(found))}."
        for setting, found in remarks.items() if found
    )  # fmt: skip
    counts = dict.fromkeys(f([cell.seeds for cell in own.values()]) for f in (min, max))
    return (OWN_NOTE.format(f"{' to '.join(map(str, counts))} in a cell"), *marked)


def _unique(names: Iterable[str]) -> list[str]:
    """Return the names in order of first appearance."""
    return list(dict.fromkeys(names))
