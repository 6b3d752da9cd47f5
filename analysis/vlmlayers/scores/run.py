"""`score`: which protocol serves which metric, and the table that comes out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from joblib import Parallel, delayed
from threadpoolctl import threadpool_limits

from vlmlayers.arguments import ENOUGH_DRAWS, checked
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.features import LayerFeatures
from vlmlayers.metrics.declare import MODEL
from vlmlayers.metrics.own import own_metric
from vlmlayers.metrics.table import METRICS, Metric, metric
from vlmlayers.options import takes, validated
from vlmlayers.positions import TOWERS, sort_key
from vlmlayers.progress import bar
from vlmlayers.runs import cores
from vlmlayers.scores.copies import tell_copies
from vlmlayers.scores.gaps import run_modalities, run_queries
from vlmlayers.scores.items import run_features, run_heads, run_labels, run_prompts
from vlmlayers.scores.missing import say_missing
from vlmlayers.scores.options import ScoreOptions
from vlmlayers.scores.pairs import run_pairs
from vlmlayers.scores.readouts import (
    run_classes,
    run_datasets,
    tell_classes_left_out,
    tell_unlike_passes,
    tell_unlike_texts,
)
from vlmlayers.scores.scoring import Collector, Group, Runner, Scoring, make_groups
from vlmlayers.scores.sources import source_marks
from vlmlayers.scores.transfers import run_left_out, run_novel, run_style_classes, run_styles
from vlmlayers.user_code import is_user_code, load_user_code

if TYPE_CHECKING:
    import pandas as pd

LOG = logging.getLogger(__name__)
# What a metric needs decides the protocol; no metric is known here by name.
RUNNERS: Mapping[tuple[str, ...], Runner] = {
    ("datasets", "dataset confusion"): run_datasets,
    ("styles",): run_styles,
    ("style classes",): run_style_classes,
    ("novel classes",): run_novel,
    ("other datasets",): run_left_out,
    ("class parts",): run_classes,
    ("prompts",): run_prompts,
    ("labels",): run_labels,
    ("pairs", "pair matrix"): run_pairs,
    ("modalities",): run_modalities,
    ("queries",): run_queries,
    ("features",): run_features,
    ("heads",): run_heads,
}
# Protocols that look at all datasets of a group together; the others take one at a time.
TOGETHER = frozenset({run_datasets, run_styles, run_style_classes, run_left_out, run_pairs})
# Those of them in which texts of several datasets stand beside each other.
POOL_TEXTS = frozenset({run_datasets, run_styles, run_pairs})
# Items × positions × metrics; each costs about 25 µs, so this many take ten seconds. Processes that
# start for less bring little.
WORTH_SHARING = 400_000
MOST_JOBS = 8


@dataclass(frozen=True)
class ScoreTask:
    """A part of the scores that needs nothing of the others: one protocol on some features."""

    runner: Runner
    group: Group
    metrics: Mapping[str, Metric]

    def run(self, options: ScoreOptions) -> Collector:
        """Return what this part gives.

        Matrices here are small: a second thread of the linear algebra library costs more than it
        brings, so tasks take one each and run side by side instead.
        """
        out = Collector()
        with threadpool_limits(1, user_api="blas"):
            self.runner(Scoring(self.group, self.metrics, options, out))
        return out


@takes(ScoreOptions)
@checked
def score(
    features: LayerFeatures | Sequence[LayerFeatures],
    metrics: Sequence[str | Callable[..., Any]] | None = None,
    *,
    jobs: int | None = None,
    progress: bool = True,
    **options: Any,
) -> pd.DataFrame:
    """Score every position of both towers; each value comes with interval, null and n.

    Args:
        features: Features of one dataset or of several.
        metrics: Names from `vlmlayers.metrics.METRICS` or of an installed package (entry points of
            the group `vlmlayers.metrics`), functions of your own, or `path.py:function`; None for
            all that have a name here and that features suffice for. A function `f(x)` takes the
            features of one dataset at one position, (item, width) in float64, a function
            `f(x, labels)` the class ids (item,) as well; it returns a number. Its name is that of
            its `def`, its interval a jackknife over items (NaN where it fails on a part of them),
            its null what it gives on shuffled labels, or with each column of x shuffled by itself.
        jobs: Processes that share the work; the table does not depend on it. None takes one per
            core, at most eight, where the work is worth starting them.
        progress: Show a progress bar.
        **options: Those of `ScoreOptions`.

    Returns:
        A table with `SCORE_COLUMNS`. `attrs` holds `cost` (seconds by metric), `refused` (what
        was not computed, and why), `protocol` (the options) and `features` (marks of what was
        scored, where it was extracted).

    Raises:
        UserError: Unknown metric, space or position, NaN or Inf features, or nothing that could be
            scored, with the reasons.

    Warns:
        UserWarning: Of the metrics, positions and spaces that are named some were not computed;
            names them, with the reasons.
        By the log: Images are exact copies of others, in one dataset or in two; some classes have
            too few items for class metrics.
    """
    settled = validated(ScoreOptions, options)
    chosen = chosen_metrics(metrics)
    if not chosen:
        raise UserError("no metric is named; leave metrics out to score all of them")
    settled.refuse_unread(chosen.values())
    if settled.bootstrap < ENOUGH_DRAWS:
        LOG.warning(
            "bootstrap is %d: an interval is what so few draws span; take 20 or more",
            settled.bootstrap,
        )
    given = [features] if isinstance(features, LayerFeatures) else list(features)
    groups = make_groups(given, settled)
    _check_positions(given, settled)
    tell_copies(given)
    tasks = make_tasks(groups, chosen)
    _tell_unshared(tasks, settled)
    for group in groups:
        pooling = (task for task in tasks if task.group is group and task.runner in POOL_TEXTS)
        pooled = [name for task in pooling for name in task.metrics]
        tell_unlike_texts(group, pooled)
        tell_unlike_passes(group, pooled)
    for task in tasks:
        if task.runner is run_classes:  # here, as what a process logs is lost
            tell_classes_left_out(Scoring(task.group, task.metrics, settled, Collector()))
    parts = results_of(tasks, settled, job_count(jobs, groups, chosen))
    out = Collector()
    for part in bar(parts, "scoring", total=len(tasks), unit="part", show=progress):
        out.take(part)
    for name, seconds in out.cost.items():
        LOG.debug("%s took %.2f s", name, seconds)
    say_missing(out, chosen, settled, asked=metrics is not None)
    table = out.table(settled)
    table.attrs.update(source_marks(given))
    return table


def make_tasks(groups: Iterable[Group], metrics: Mapping[str, Metric]) -> list[ScoreTask]:
    """Return the parts of the work in the order of their rows.

    Metrics of one dataset stay together, because they share what they make of its items; metrics
    of several datasets are apart, but what derives from another metric goes with it.
    """
    tasks = []
    for group in groups:
        for needs, runner in RUNNERS.items():
            wanted = {name: metric for name, metric in metrics.items() if metric.needs in needs}
            if runner in TOGETHER:
                families: dict[str, dict[str, Metric]] = {}
                for name, metric in wanted.items():
                    families.setdefault(metric.base or name, {})[name] = metric
                tasks += [ScoreTask(runner, group, family) for family in families.values()]
            elif wanted:
                alone = (replace(group, members=(member,)) for member in group.members)
                tasks += [ScoreTask(runner, one, wanted) for one in alone]
    return tasks


def results_of(tasks: list[ScoreTask], options: ScoreOptions, jobs: int) -> Iterator[Collector]:
    """Yield the result of each task, in order."""
    if jobs == 1:
        return (task.run(options) for task in tasks)
    table = dict(METRICS)
    # In the order of the tasks: which process is quicker must not show in the table.
    done: Iterator[Collector] = Parallel(n_jobs=jobs, return_as="generator")(
        delayed(_run_elsewhere)(task, options, table) for task in tasks
    )
    return done


def _run_elsewhere(
    task: ScoreTask, options: ScoreOptions, table: Mapping[str, Metric]
) -> Collector:
    """Run a task in another process, which knows metrics that a notebook added by this table."""
    METRICS.update(table)
    return task.run(options)


def job_count(jobs: int | None, groups: Iterable[Group], metrics: Mapping[str, Metric]) -> int:
    """Return the number of processes: the one asked for, or what the work is worth."""
    if jobs is not None:
        if jobs < 1:
            raise UserError(f"jobs is {jobs}; at least 1 is needed")
        return jobs
    rows = sum(
        len(tower) * len(positions)
        for group in groups
        for member in group.members
        for tower in member.towers
        for positions in tower.arrays.values()
    )
    return min(cores(), MOST_JOBS) if rows * len(metrics) >= WORTH_SHARING else 1


@checked
def chosen_metrics(
    metrics: Sequence[str | Callable[..., Any]] | None,
) -> dict[str, Metric]:
    """Return the entries of metrics by name, or of all that features suffice for.

    Args:
        metrics: Names, of installed packages' metrics too, and functions of the user's own.

    Raises:
        UserError: A name is unknown, with the nearest one, or needs the model; a function cannot
            serve as a metric.
    """
    chosen: dict[str, Metric] = {}
    if metrics is None:
        metrics = [name for name, entry in METRICS.items() if entry.needs != MODEL]
    for given in metrics:
        if isinstance(given, str) and not is_user_code(given):
            chosen[given] = metric(given)
            if chosen[given].needs == MODEL:
                raise UserError(
                    f"{given} needs the model, not features alone: `vlmlayers.models.examine` "
                    "takes both model and data"
                )
        else:
            own = load_user_code(given, "metric") if isinstance(given, str) else given
            name, entry = own_metric(own, {*METRICS, *chosen})
            chosen[name] = entry
    return chosen


def _check_positions(features: list[LayerFeatures], options: ScoreOptions) -> None:
    recorded = {
        position
        for member in features
        for tower in member.towers
        for by_position in tower.arrays.values()
        for position in by_position
    }
    if not recorded:
        raise UserError("the features hold no position; extract again")
    for position in options.positions or ():
        check_one_of("position", position, sorted(recorded, key=sort_key), where="the features")


def _tell_unshared(tasks: Iterable[ScoreTask], options: ScoreOptions) -> None:
    """Warn of positions that a dataset lacks: metrics of several together have no value there."""
    told = set()
    for task in tasks:
        if task.runner not in TOGETHER:
            continue
        spaces = {space for metric in task.metrics.values() for space in options.spaces_of(metric)}
        for tower, space in product(TOWERS, sorted(spaces)):
            for member, features in (sources := task.group.sources(tower)):
                every = {position for _, one in sources for position in one.arrays.get(space, ())}
                asked = every & set(options.positions or every)
                if lacking := asked - set(features.arrays.get(space, ())):
                    positions = ", ".join(sorted(lacking, key=sort_key))
                    told.add((member.dataset, tower, positions))
    for dataset, tower, positions in sorted(told):
        LOG.warning(
            "%s lacks %s of the %s tower, where other datasets have it; there is no value of all "
            "datasets together there",
            dataset,
            positions,
            tower,
        )
