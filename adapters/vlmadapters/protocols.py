"""The protocols of the paper: what is trained on, what is tested on, in which table.

Every (source dataset, seed, placement) is one cell. A finished cell is one file, so that a run
that was stopped goes on where it was; placements of one seed that are still missing train side by
side. Processes that work on one folder claim cells, so that none is trained twice. Test data
decides nothing: the last epoch is evaluated, once.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import pandas as pd

from vlmadapters import parallel
from vlmadapters.cells import Cell, CellFolder, Rows
from vlmadapters.checkpoints import save_adapter
from vlmadapters.config import MMAConfig
from vlmadapters.evaluate import Case, Evaluator, Labels
from vlmadapters.frozen import Backbone
from vlmadapters.recipes import Recipe
from vlmadapters.results import COLUMNS, METHOD, UNMOVED, ZERO_SHOT, ZERO_SHOT_OWN
from vlmadapters.targets import Dataset, Target, result_row
from vlmadapters.train import Trainer, TrainResult
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.files import atomically
from vlmlayers.manifests import Item, Manifest
from vlmlayers.progress import bar

LOG = logging.getLogger("vlmlayers")
# Share of predictions that have to differ from zero-shot for training to count as having an effect.
EFFECT = 0.002


@dataclass(frozen=True)
class Protocol:
    """What a protocol trains on and tests.

    Attributes:
        name: As in the results table.
        train_kind: Classes that are trained: `base` or `all`.
        own_kinds: Halves of the source's own test set that are evaluated.
        transfer: Whether other datasets are tested, all classes of each.
    """

    name: str
    train_kind: str
    own_kinds: tuple[str, ...]
    transfer: bool = False


PROTOCOLS = {
    p.name: p
    for p in (
        Protocol("base-to-novel", "base", ("base", "novel")),
        Protocol("few-shot", "all", ("all",)),
        Protocol("cross-dataset", "all", ("all",), transfer=True),
        Protocol("domain-generalization", "all", ("all",), transfer=True),
    )
}


class Experiment:
    """One protocol with one model, recipe and output folder.

    Args:
        protocol: Name of a protocol.
        model: The model.
        recipe: Training values and adapter; `configs` of `run` name the placements.
        out: Folder of cells, adapters and tables; None keeps everything in memory.
        root: The data root.
        targets: Datasets tested by transfer.
        split: Split that is tested; `val` for tuning, never mixed with `test` in one folder.
        limit: Use at most so many test items of each dataset.
        workers: Threads that decode images.
        save_adapters: Write trained adapters beside the cells.
        table: Name of the table of all cells of the folder, written there.
        progress: Show bars.
    """

    def __init__(
        self,
        protocol: str,
        model: Any,
        recipe: Recipe,
        out: str | Path | None = None,
        *,
        root: Any = None,
        targets: Sequence[str] = (),
        split: str = "test",
        limit: int = 0,
        workers: int = 0,
        save_adapters: bool = False,
        table: str = "results.csv",
        progress: bool = True,
    ) -> None:
        self.protocol = PROTOCOLS[check_one_of("protocol", protocol, PROTOCOLS)]
        self.model, self.recipe, self.train = model, recipe, recipe.train
        self.out = Path(out) if out is not None else None
        self.root, self.split, self.limit, self.workers = root, split, limit, workers
        self.save_adapters, self.table, self.progress = save_adapters, table, progress
        self.cells = CellFolder(self.out)
        if self.protocol.transfer and not targets:
            raise UserError(f"the protocol {protocol} needs target datasets; name them")
        self.target_names = tuple(targets) if self.protocol.transfer else ()
        self.backbone = Backbone(model.clip, self.train.savings)
        self.evaluator = Evaluator(
            model, self.backbone, precision=self.train.precision, progress=progress
        )
        self._datasets: dict[str, Dataset] = {}
        self._zero: dict[tuple[str, str], list[Labels]] = {}

    def add(self, manifest: Manifest) -> str:
        """Make a dataset known that is loaded already; return the name to run it by."""
        self._datasets[manifest.name] = Dataset(
            manifest, self.model, self.root, self.workers, self.limit
        )
        return manifest.name

    def dataset(self, name: str) -> Dataset:
        """Return a dataset, its images shared by all cells."""
        if name not in self._datasets:
            self._datasets[name] = Dataset(name, self.model, self.root, self.workers, self.limit)
        return self._datasets[name]

    def targets(self, source: str) -> list[Target]:
        """Return what adapters trained on a source are tested on."""
        own = [Target(self.dataset(source), kind, self.split) for kind in self.protocol.own_kinds]
        return own + [Target(self.dataset(name), "all", self.split) for name in self.target_names]

    def run(
        self,
        sources: Iterable[str],
        configs: Sequence[MMAConfig] | None = None,
        seeds: Iterable[int] = (1, 2, 3),
        *,
        together: int = 12,
    ) -> pd.DataFrame:
        """Train and test every cell that has no file yet; return their results table.

        The table in the folder also holds what earlier runs with the same settings left there.

        Args:
            sources: Datasets trained on.
            configs: Placements; the recipe's own where None.
            seeds: Seeds of draw, initialisation, order and views.
            together: Placements trained side by side.

        Raises:
            UserError: A seed is negative, or `together` is below 1.
        """
        configs = list(configs) if configs is not None else [self.recipe.adapter]
        sources, seeds = list(sources), list(seeds)
        if any(seed < 0 for seed in seeds):
            raise UserError(f"seed {min(seeds)} is below 0; seeds count from 0")
        if together < 1:
            raise UserError(f"together is {together}; train at least 1 placement at a time")
        rank, _ = parallel.rank_and_size()
        total = len(sources) * len(seeds) * len(configs)
        with bar(
            description="cells", total=total, unit="cell", show=self.progress and rank == 0
        ) as shown:
            rows = [row for source in sources for row in self._zero_shot_rows(source)]
            found = {
                (source, seed): self._cells(source, seed, configs, together, shown)
                for source in sources
                for seed in seeds
            }
            for (source, seed), cells in found.items():
                if cells is None:
                    cells = self._cells(source, seed, configs, together, shown, wait=True)
                rows += cells or []
        table = _table(rows)
        if self.out is not None and not rank and rows:
            size = configs[0] if configs else self.recipe.adapter
            whole = _table(rows + self._earlier([self._cell(one, 0, size) for one in sources]))
            atomically(self.out / self.table, lambda part: whole.to_csv(part, index=False))
        return table

    def _earlier(self, cells: Sequence[Cell]) -> Rows:
        """Return the rows of the folder's cells that were made with the settings of some others."""
        targets = {name: mark for cell in cells for name, mark in cell.identity["targets"].items()}
        return self.cells.alike({**cells[0].identity, "targets": targets})

    def _cells(
        self,
        source: str,
        seed: int,
        configs: Sequence[MMAConfig],
        together: int,
        shown: Any,
        wait: bool = False,
    ) -> Rows | None:
        """Return the rows of one source and seed; None where other processes hold what is missing.

        With `wait` their cells are waited for, and trained here where those processes died.
        """
        cells = {config: self._cell(source, seed, config) for config in configs}
        done = {config: self.cells.read(cell) for config, cell in cells.items()}
        if not wait:
            shown.update(sum(rows is not None for rows in done.values()))
        while missing := [config for config, rows in done.items() if rows is None]:
            with ExitStack() as held:
                free = self.cells.claim([cells[one] for one in missing], together, held, wait)
                if not free:
                    return None
                group = [config for config in missing if cells[config] in free]
                done |= {config: self.cells.read(cells[config]) for config in group}
                group = [config for config in group if done[config] is None]
                trained = self._train_and_test(source, seed, group) if group else []
                for config, rows in zip(group, trained):
                    self.cells.write(cells[config], rows)
                    done[config] = rows
            shown.update(sum(done[config] is not None for config in missing))
        return [row for config in configs for row in done[config] or []]

    def _train_and_test(self, source: str, seed: int, configs: Sequence[MMAConfig]) -> list[Rows]:
        data = self.dataset(source)
        kind = self.protocol.train_kind
        items = data.shots(self.train.shots, seed, kind)
        folder = None
        if self.out is not None:
            key = "-".join(self._cell(source, seed, config).key for config in configs)
            folder = self.out / "unfinished" / hashlib.sha256(key.encode()).hexdigest()[:16]
        trainer = Trainer(
            self.model,
            data.images,
            items,
            data.names(kind),
            configs,
            self.train,
            seed,
            backbone=self.backbone,
            folder=folder,
            progress=self.progress,
        )
        trained = trainer.fit()
        rows = self._test(source, trained)
        rank, _ = parallel.rank_and_size()
        if folder is not None and not rank:
            rmtree(folder, ignore_errors=True)
        if self.save_adapters and self.out is not None and not rank:
            for result in trained:
                cell = self._cell(source, seed, result.config)
                save_adapter(
                    self.out / "adapters" / cell.key,
                    result.adapter,
                    self.model,
                    tuple(data.names(kind)),
                    cell.identity,
                )
        return rows

    def _test(self, source: str, trained: Sequence[TrainResult]) -> list[Rows]:
        rows: list[Rows] = [[] for _ in trained]
        differing = [0] * len(trained)
        total = 0
        cases = [Case(result.adapter, self.train.template) for result in trained]
        for target in self.targets(source):
            items, truth = self._items(target)
            plain = self._zero_shot(target)[0]
            names = target.dataset.names(target.kind)
            found = self.evaluator.predict(target.dataset.images, items, names, cases)
            total += len(items)
            for index, (result, labels) in enumerate(zip(trained, found)):
                differing[index] += int((labels != plain).sum())
                rows[index].append(
                    result_row(
                        self.protocol.name,
                        self.model,
                        target,
                        truth,
                        labels,
                        METHOD,
                        self.train.template,
                        source=source,
                        placement=result.config.placement,
                        shots=self.train.shots,
                        seed=result.seed,
                        parameters=result.adapter.parameter_count(),
                        seconds=result.seconds,
                    )
                )
        for index, result in enumerate(trained):
            share = differing[index] / max(total, 1)
            note = UNMOVED if share < EFFECT else ""
            if note:
                LOG.warning("%s, seed %d: %s", result.config.placement, result.seed, note)
            for row in rows[index]:
                row |= {"changed": share, "note": note}
        return rows

    def _items(self, target: Target) -> tuple[list[Item], Labels]:
        items = target.dataset.test(target.kind, target.split)
        return items, np.array([item.label for item in items], dtype=np.int64)

    def _zero_shot(self, target: Target) -> list[Labels]:
        """Return zero-shot predictions with the common and with the dataset's own template."""
        key = (target.dataset.manifest.name, target.kind)
        if key not in self._zero:
            own = target.dataset.manifest.zero_shot_template
            cases = [Case(None, self.train.template), Case(None, own)]
            self._zero[key] = self.evaluator.predict(
                target.dataset.images,
                self._items(target)[0],
                target.dataset.names(target.kind),
                cases,
            )
        return self._zero[key]

    def _zero_shot_rows(self, source: str) -> Rows:
        cell = Cell(f"{Path(source).stem}-zero-shot", self._zero_identity(source))
        rows = self.cells.read(cell)
        if rows is None:
            rows = self._new_zero_shot_rows(source)
            self.cells.write(cell, rows)
        return rows

    def _new_zero_shot_rows(self, source: str) -> Rows:
        rows = []
        for target in self.targets(source):
            _, truth = self._items(target)
            own = target.dataset.manifest.zero_shot_template
            named = ((ZERO_SHOT, self.train.template), (ZERO_SHOT_OWN, own))
            for labels, (method, template) in zip(self._zero_shot(target), named):
                rows.append(
                    result_row(
                        self.protocol.name, self.model, target, truth, labels, method, template
                    )
                )
        return rows

    def _zero_identity(self, source: str) -> dict[str, Any]:
        targets = {
            f"{t.dataset.manifest.name}/{t.kind}": t.dataset.manifest.hash
            for t in self.targets(source)
        }
        return {
            "protocol": self.protocol.name,
            "source": source,
            "split": self.split,
            "limit": self.limit,
            "template": self.train.template,
            "weights": self.model.weights_hash,
            "targets": targets,
        }

    def _cell(self, source: str, seed: int, config: MMAConfig) -> Cell:
        identity = {
            **self._zero_identity(source),
            "seed": seed,
            "adapter": config.to_dict(),
            "train": self.train.identity(),
        }
        return Cell(f"{Path(source).stem}-{config.placement}-s{seed}", identity)


def _table(rows: Rows) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return table.drop_duplicates(list(COLUMNS[:10]), ignore_index=True)


def base_to_novel(
    model: Any,
    datasets: Iterable[str],
    recipe: Recipe,
    out: str | Path | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Train on base classes, test on base and on novel classes of each dataset."""
    return _run("base-to-novel", model, datasets, recipe, out, **options)


def few_shot_all(
    model: Any,
    datasets: Iterable[str],
    recipe: Recipe,
    out: str | Path | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Train on all classes with k shots, test on all classes of each dataset."""
    return _run("few-shot", model, datasets, recipe, out, **options)


def cross_dataset(
    model: Any,
    source: str,
    targets: Sequence[str],
    recipe: Recipe,
    out: str | Path | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Train on all classes of the source, test on all classes of each target."""
    return _run("cross-dataset", model, [source], recipe, out, targets=targets, **options)


def domain_generalization(
    model: Any,
    source: str,
    targets: Sequence[str],
    recipe: Recipe,
    out: str | Path | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Train on the source, test on shifted test sets, each among its own classes."""
    return _run("domain-generalization", model, [source], recipe, out, targets=targets, **options)


def _run(
    protocol: str,
    model: Any,
    sources: Iterable[str],
    recipe: Recipe,
    out: Any,
    configs: Sequence[MMAConfig] | None = None,
    seeds: Iterable[int] = (1, 2, 3),
    together: int = 12,
    **options: Any,
) -> pd.DataFrame:
    experiment = Experiment(protocol, model, recipe, out, **options)
    return experiment.run(sources, configs, seeds, together=together)
