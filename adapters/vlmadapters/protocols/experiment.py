"""The protocols of the paper: what is trained on, what is tested on, in which table.

Every (source dataset, seed, method at a placement) is one cell. A finished cell is one file, so
that a stopped run resumes where it was; those of one seed that are still missing train
side by side. Processes that work on one folder claim cells, so that none is trained twice. Test
data decides nothing: the last epoch is evaluated, once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain, product
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import pandas as pd

from vlmadapters.clip.frozen import Backbone
from vlmadapters.data.images import as_first_seen
from vlmadapters.data.options import DataOptions
from vlmadapters.data.task import Task, TaskData
from vlmadapters.device import own_modes
from vlmadapters.files import save_method
from vlmadapters.methods.config import MethodConfig
from vlmadapters.protocols.cells import ADAPTERS, Cell, CellFolder, Rows
from vlmadapters.protocols.datasets import Datasets
from vlmadapters.protocols.evaluate import Case, Evaluator
from vlmadapters.protocols.identities import Identities
from vlmadapters.protocols.results import COLUMNS, KEY, UNMOVED, UNMOVED_FIT, method_fields
from vlmadapters.protocols.table import protocol_of
from vlmadapters.protocols.trained import result_row
from vlmadapters.protocols.zero_shot import ZeroShot
from vlmadapters.training import processes
from vlmadapters.training.recipes import Recipe, TrainConfig
from vlmadapters.training.titles import title
from vlmadapters.training.trainer import Diverged, Trainer, TrainResult, resolved
from vlmlayers.errors import UserError
from vlmlayers.files import write_csv
from vlmlayers.manifests import Manifest
from vlmlayers.progress import bar, timed
from vlmlayers.words import counted

LOG = logging.getLogger(__name__)
# Share of predictions that have to differ from zero-shot for training to count as having an effect.
EFFECT = 0.002


class Experiment:
    """One protocol with one model and output folder, for one or several methods.

    Args:
        protocol: Name of a protocol.
        model: The model.
        recipe: Training values and method; several for methods that are compared on the same
            draws, images and zero-shot predictions. `settings` of `run` name placements and
            amounts.
        out: Folder of cells, adapters and tables; None keeps everything in memory.
        root: The data root.
        targets: Datasets tested by transfer.
        split: Split that is tested; `val` for tuning, never mixed with `test` in one folder.
        options: How images are read, and how many are tested.
        save_adapters: Write trained adapters beside the cells.
        table: Name of the table of all cells of the folder, written there; None writes none.
        stop_unmoved: Train no further seed where training changed nothing by the first one, at
            any placement on any dataset: one dataset may leave nothing to change.
        progress: Show bars.
    """

    def __init__(
        self,
        protocol: str,
        model: Any,
        recipe: Recipe | Sequence[Recipe],
        out: str | Path | None = None,
        *,
        root: Any = None,
        targets: Iterable[str | Path | Manifest] = (),
        split: str = "test",
        options: DataOptions = DataOptions(),  # noqa: B008
        save_adapters: bool = False,
        table: str | None = "results.csv",
        stop_unmoved: bool = False,
        progress: bool = True,
    ) -> None:
        self.stop_unmoved = stop_unmoved
        targets = list(targets)
        self.protocol = protocol_of(protocol, targets)
        recipes = [recipe] if isinstance(recipe, Recipe) else list(recipe)
        self.recipes = {one.method.name: one for one in recipes}
        if not recipes or len(self.recipes) < len(recipes):
            raise UserError("give one recipe of each method; there are none, or two of one method")
        # Zero-shot rows, precision and savings of evaluation are those of the first.
        self.model, self.train = model, resolved(recipes[0].train, model.device)
        self.out = Path(out) if out is not None else None
        self.options, self.progress = options, progress
        self.save_adapters, self.table = save_adapters, table
        self.cells = CellFolder(self.out)
        with own_modes():
            self.backbone = Backbone(model.clip, self.train.savings, model.tokenize)
        self.evaluator = Evaluator(
            model, self.backbone, precision=self.train.precision, progress=progress
        )
        self.datasets = Datasets(self.protocol, model, targets, root, split, options)
        self.identities = Identities(
            model, self.datasets, self.train.template, self.evaluator.precision, options
        )
        self._zero_shot = ZeroShot(self.protocol.name, self.evaluator, self.train.template)
        self._next: tuple[str, int] | None = None  # what comes then, whose images are decoded early
        self._said: set[str] = set()  # methods that changed nothing
        self._differing: set[str] = set()  # what differs from zero-shot CLIP's, as was said

    @own_modes()
    def run(
        self,
        datasets: Iterable[str | Path | Manifest | TaskData],
        settings: Sequence[MethodConfig | Recipe] | None = None,
        seeds: Iterable[int] = (1, 2, 3),
        *,
        together: int = 12,
    ) -> pd.DataFrame:
        """Train and test every cell that has no file yet; return their results table.

        The table in the folder also holds what earlier runs with the same settings left there.

        Args:
            datasets: Datasets trained on, by name, path or manifest.
            settings: Placements as settings of a method, or with their amounts as recipes; the
                recipe's own where None.
            seeds: Seeds of draw, initialisation, order and views.
            together: Placements trained side by side.

        Raises:
            UserError: `together` is below 1, two datasets have one name, or one cannot be trained
                or tested on.
        """
        asked = list(self.recipes.values() if settings is None else settings)
        recipes = [self._recipe_of(one) for one in asked]
        sources = list(dict.fromkeys(self.datasets.add(one).manifest.name for one in datasets))
        seeds = list(seeds)
        if together < 1:
            raise UserError(f"together is {together}; train at least 1 placement at a time")
        self._check(sources, recipes)
        found = self._all_cells(sources, seeds, recipes, together)
        first = processes.is_first()
        if self.save_adapters and first:
            finished = [self.identities.cell(*one) for one in product(sources, seeds, recipes)]
            self.cells.tell_unsaved(finished)
        rows = [row for source in sources for row in self._zero_shot_rows(source)]
        rows += [row for pair in product(sources, seeds) for row in found.get(pair) or []]
        if self.out is not None and self.table is not None and first and rows:
            like = [self.identities.like(*pair) for pair in product(sources, recipes)]
            write_csv(self.out / self.table, _table(rows + self.cells.alike(like)))
        return _table(rows)

    def _check(self, sources: Sequence[str], recipes: Sequence[Recipe]) -> None:
        """Look for all that can be wrong, and note what the data are.

        Before the first training: an error in the last dataset would otherwise show after hours.
        """
        self._check_configs(recipes, sources)
        self._tell_differing(recipes, sources)
        self.datasets.check(sources)
        for name, split in {pair: None for one in sources for pair in self.datasets.read(one)}:
            data = self.datasets[name]
            self.cells.see(name, split, data.identity(split), data.drawn_by)

    def _all_cells(
        self, sources: Sequence[str], seeds: Sequence[int], recipes: Sequence[Recipe], together: int
    ) -> dict[tuple[str, int], Rows | None]:
        """Return the rows of all cells by source and seed: read, trained here, or waited for."""
        total = len(sources) * len(seeds) * len(recipes)
        show = self.progress and processes.is_first()
        found: dict[tuple[str, int], Rows | None] = {}
        with bar(description="cells", total=total, unit="cell", show=show) as shown:
            for source, seed in self._in_turn(sources, seeds, recipes, found):
                wait = (source, seed) in found
                found[source, seed] = self._cells(source, seed, recipes, together, shown, wait=wait)
                if found[source, seed] is not None:
                    # Behind a training, which refuses at once classes that a method cannot take;
                    # not later, or other processes would test the source as well.
                    self._zero_shot_rows(source)
                # Not those of targets, which every further source is tested on.
                if seed == seeds[-1] and source not in self.datasets.targets:
                    self.datasets[source].images.rest()
            # First all that is free; then what others held at that time, who may have died since.
            for (source, seed), cells in found.items():
                if cells is None:
                    found[source, seed] = self._cells(
                        source, seed, recipes, together, shown, wait=True
                    )
        return found

    def _in_turn(
        self,
        sources: Sequence[str],
        seeds: Sequence[int],
        settings: Sequence[Recipe],
        found: Mapping[tuple[str, int], Rows | None],
    ) -> Iterator[tuple[str, int]]:
        """Yield sources and seeds; last the sources that other processes work on when it is time.

        Each process then decodes and tests the images of as few as possible. Where a run is to
        stop if nothing moves, the first seed of each source comes first, until something moved;
        those that other processes hold come a second time, to be waited for. `found` holds what
        came of those that were yielded.
        """

        def cells(pairs: Iterable[tuple[str, int]]) -> list[Cell]:
            return [self.identities.cell(*pair, one) for pair, one in product(pairs, settings)]

        def untrained(pair: tuple[str, int]) -> bool:
            missing = any(self.cells.read(cell) is None for cell in cells([pair]))
            return missing and not self.cells.others_hold(cells([pair]))

        def with_next(number: int, place: int) -> tuple[str, int]:
            later = chain(
                product([sources[number]], seeds[place + 1 :]),
                product(sources[number + 1 :], seeds),
            )
            self._next = next(filter(untrained, later), None)
            return sources[number], seeds[place]

        if self.stop_unmoved:
            first = [(source, seeds[0]) for source in sources]
            for number, pair in enumerate(first):
                yield with_next(number, 0)
                if _moved(found[pair]):
                    break
            else:
                self._next = None
                for pair in [pair for pair in first if found[pair] is None]:
                    yield pair
                if not any(_moved(found[pair]) for pair in first):
                    return
        busy = []
        for number, source in enumerate(sources):
            if self.cells.others_hold(cells(product([source], seeds))):
                busy.append(source)
                continue
            for place, seed in enumerate(seeds):
                if (source, seed) not in found:
                    yield with_next(number, place)
        self._next = None
        yield from (pair for pair in product(busy, seeds) if pair not in found)

    def _recipe_of(self, setting: MethodConfig | Recipe) -> Recipe:
        config = setting if isinstance(setting, MethodConfig) else setting.method
        if config.name not in self.recipes:
            raise UserError(f"there is no recipe for {config.name}; give one")
        if isinstance(setting, Recipe):
            return setting
        return self.recipes[config.name].with_method(config)

    def _check_configs(self, recipes: Sequence[Recipe], sources: Sequence[str]) -> None:
        depths = {name: walk.tower.depth for name, walk in self.backbone.walks.items()}
        other_classes = self.protocol.transfer or "novel" in self.protocol.own_kinds
        for recipe, source in product(recipes, sources):
            config = recipe.method_for(self.datasets[source].origin)
            config.check_depths(depths)
            if config.class_bound and other_classes:
                raise UserError(
                    f"{config.name} as set here learns something of each class and cannot be "
                    f"tested on others; use the protocol few-shot, not {self.protocol.name}"
                )
            train = self.identities.train_of(recipe, source)
            # The trainer refuses it too, but only after the datasets before it were trained.
            short = not train.steps_per_shot and train.epochs <= train.warmup_epochs
            if config.in_steps and short:
                raise UserError(
                    f"{config.name} would train {counted(train.epochs, 'epoch')} on {source}, all "
                    f"of them warm-up; train {train.warmup_epochs + 1} epochs or more there or set "
                    "warmup_epochs=0"
                )

    def _tell_differing(self, recipes: Sequence[Recipe], sources: Sequence[str]) -> None:
        """Say once where a training has another template or precision than zero-shot CLIP."""
        # Recipes that ship differ in precision on a GPU, which is no fault of the user's.
        for key, what, level in (
            ("template", "zero-shot CLIP has", logging.WARNING),
            ("precision", "all are tested in", logging.INFO),
        ):
            first = getattr(self.train, key)
            for recipe, source in product(recipes, sources):
                own = getattr(self.identities.train_of(recipe, source), key)
                if own != first and key not in self._differing:
                    self._differing.add(key)
                    LOG.log(
                        level,
                        "recipes differ in %s (%s on %s: %r); %s that of the first, %r",
                        key, recipe.method.name, source, own, what, first,
                    )  # fmt: skip

    def _cells(
        self,
        source: str,
        seed: int,
        settings: Sequence[Recipe],
        together: int,
        shown: Any,
        wait: bool = False,
    ) -> Rows | None:
        """Return the rows of one source and seed; None where other processes hold what is missing.

        With `wait` their cells are waited for, and trained here where those processes died.
        """
        cells = {one: self.identities.cell(source, seed, one) for one in settings}
        done = {one: self.cells.read(cell) for one, cell in cells.items()}
        if not wait:
            # On the second visit they have been counted.
            shown.update(sum(rows is not None for rows in done.values()))
            self.cells.say_missing([cells[one] for one, rows in done.items() if rows is None])
        while missing := [one for one, rows in done.items() if rows is None]:
            with ExitStack() as held:
                free = self.cells.claim([cells[one] for one in missing], together, held, wait)
                if not free:
                    return None
                group = [one for one in missing if cells[one] in free]
                # Between the look before and the lock another process may have finished them.
                done |= {one: self.cells.read(cells[one]) for one in group}
                group = [one for one in group if done[one] is None]
                group = [one for one in group if self._trains_with(group[0], one, source)]
                names = ", ".join(cells[one].name for one in group)
                with timed(LOG, f"training and testing {names or 'nothing'}"):
                    trained = self.train_and_test(source, seed, group) if group else []
                for one, rows in zip(group, trained):
                    self.cells.write(cells[one], rows)
                    done[one] = rows
            shown.update(sum(done[one] is not None for one in missing))
        self.cells.forget()
        # One cell serves settings of equal values that are named differently.
        return [
            row | {"placement": one.label, "recipe": title(one)}
            for one in settings
            for row in done[one] or []
        ]

    def _trains_with(self, first: Recipe, other: Recipe, source: str) -> bool:
        """Whether two settings can train side by side: one method, by the same values."""
        same = first.method.name == other.method.name
        one, another = (self.identities.train_of(each, source) for each in (first, other))
        return same and one == another

    def train_and_test(self, source: str, seed: int, settings: Sequence[Recipe]) -> list[Rows]:
        """Train settings of one method side by side and test them; return the rows of each.

        Args:
            source: Name of the dataset trained on.
            seed: Seed of draw, initialisation, order and views.
            settings: Recipes that differ in their method's settings alone.

        Raises:
            Diverged: Names those whose loss or answers are not finite; none of all is kept.
        """
        data = self.datasets[source]
        kind = self.protocol.train_kind
        train = self.identities.train_of(settings[0], source)
        task = data.task(kind, train.template)
        shots = data.shots(train.shots, seed, kind)
        then = []
        if self._next is not None:
            shots_then = self.identities.train_of(settings[0], self._next[0]).shots
            then = [self.datasets.images(*self._next, shots_then)]
        # Beside the training, which leaves a machine with a GPU its cores.
        tested = self.datasets.own_test(source)
        with data.images.arriving(as_first_seen(shots, seed), tested, then=then):
            folder = self.cells.begin([self.identities.cell(source, seed, one) for one in settings])
            trainer = Trainer(
                self.model,
                data.images,
                shots,
                task,
                [one.method_for(data.origin) for one in settings],
                train,
                seed,
                validation=data.validation(train.shots, seed, kind) if self.identities.fits else (),
                backbone=self.backbone,
                folder=folder,
                progress=self.progress,
            )
            try:
                with _named(settings):
                    trained = trainer.fit()
                rows = self._test(source, settings, trained, train, task)
            except Diverged:
                # It would again, and without what diverged the rest is another training.
                if folder is not None and processes.is_first():
                    rmtree(folder, ignore_errors=True)
                raise
        if self.save_adapters and self.out is not None and processes.is_first():
            for one, result in zip(settings, trained):
                cell = self.identities.cell(source, seed, one)
                save_method(
                    self.out / ADAPTERS / cell.key,
                    result.method,
                    self.model,
                    task,
                    cell.identity,  # nothing timed: a resumed run leaves the same file
                )
        return rows

    def _test(
        self,
        source: str,
        settings: Sequence[Recipe],
        trained: Sequence[TrainResult],
        train: TrainConfig,
        task: Task,
    ) -> list[Rows]:
        rows: list[Rows] = [[] for _ in trained]
        # From zero-shot CLIP in its template, and in that of the training: a method may start from
        # either, and other words alone are no change.
        differing = np.zeros((len(trained), 2), dtype=int)
        total = 0
        for target in self.datasets.tested(source):
            items, truth = target.items(), target.truth()
            plain = [self._zero_shot.answers(target)[0].labels]
            plain.append(self._zero_shot.labels_in(target, train.template))
            tested = target.dataset.task(target.kind, train.template)
            cases = [Case(result.method, tested) for result in trained]
            with _named(settings):
                found = self.evaluator.answers(target.dataset.images, items, cases)
            total += len(items)
            own = target.dataset is self.datasets[source]
            shared = target.dataset.tell_of_shared(target.split) if own else ""
            for index, (result, answers) in enumerate(zip(trained, found)):
                differing[index] += [(answers.labels != one).sum() for one in plain]
                rows[index].append(
                    result_row(
                        self.protocol.name,
                        self.evaluator,
                        target,
                        truth,
                        answers,
                        result.config.title,
                        train.template,
                        source=source,
                        shots=train.shots,
                        seed=result.seed,
                        seconds=result.seconds,
                    )
                    | method_fields(result.method, settings[index].varied)
                    | {"placement": settings[index].label, "note": shared}
                )
        for index, result in enumerate(trained):
            # By predictions, not accuracy: changes both ways may leave accuracy as it was.
            share = float(differing[index].min() / max(total, 1))
            unmoved = self._unmoved(source, result) if share < EFFECT else ""
            advantage = result.config.advantage if task.other_names else ""
            for row in rows[index]:
                noted = "; ".join(filter(None, (unmoved, advantage, row["note"])))
                row |= {"changed": share, "note": noted}
        return rows

    def _unmoved(self, source: str, result: TrainResult) -> str:
        """Return the note of a training that changed nothing, and warn once for each method."""
        in_steps = any(group["params"] for group in result.method.parameter_groups())
        note = UNMOVED if in_steps else UNMOVED_FIT
        # A fold has too few items to tell by their classes: its log-likelihood does.
        if self.datasets[source].share < 1:
            return note
        title = result.config.title
        level = logging.INFO if title in self._said else logging.WARNING
        self._said.add(title)
        where = f"{title} {result.config.placement}".strip()  # some methods have no placement
        LOG.log(level, "%s, seed %d: %s", where, result.seed, note)
        return note

    def _zero_shot_rows(self, source: str) -> Rows:
        cell = self.identities.zero_shot(source)
        rows = self.cells.read(cell)
        if rows is None:
            tested = self.datasets.tested(source)
            rows = [row for one in tested for row in self._zero_shot.rows(one)]
            self.cells.write(cell, rows)
        return rows


@contextmanager
def _named(settings: Sequence[Recipe]) -> Iterator[None]:
    """Name the recipes of what diverges within."""
    try:
        yield
    except Diverged as error:
        error.settings = tuple(settings[number] for number in error.numbers)
        raise


def _moved(rows: Rows | None) -> bool:
    """Return whether a training changed anything, as far as is known; None is another's."""
    return any(not row["note"].startswith((UNMOVED, UNMOVED_FIT)) for row in rows or [])


def _table(rows: Rows) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return table.drop_duplicates(KEY, ignore_index=True)
