"""Run a study: every stage that is wanted, in order, none that is already done."""

from __future__ import annotations

import logging
import os
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from vlmlayers.arguments import Takes, checked
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.files import write_json, write_text
from vlmlayers.manifests.place import DATA_VARIABLE
from vlmlayers.runs import (
    Run,
    file_mark,
    fingerprint,
    holds_anything,
    is_first_process,
    processes_launched,
    writing_alone,
)
from vlmlayers.study.context import StageContext, silent
from vlmlayers.study.preflight import check_before
from vlmlayers.study.schema import ModelPart, Study
from vlmlayers.study.stages import STAGES, Stage
from vlmlayers.words import UNTRAINED

LOG = logging.getLogger(__name__)
_UNWANTED = "the study has no table of that name"
# Stages that take long: a report of what is known so far is written before them.
LONG = ("search", "train", "validate")


@checked
def run_study(
    study: Annotated[Study, Takes("a study, as `read_study` reads it")],
    out: str | Path,
    *,
    base: str | Path = ".",
    source: str = "",
    data_root: str | Path | None = None,
    only: Sequence[str] = (),
    start: str | None = None,
    skip: Sequence[str] = (),
    force: bool = False,
    device: str | None = None,
    progress: bool = True,
    echo: Callable[[str], None] = silent,
) -> list[Run]:
    """Run a study and return its run folders, one per model.

    A stage whose inputs did not change since it last finished is not run again. A study that was
    stopped continues where it was.

    Args:
        study: What to run.
        out: The run folder; with several models, the folder of their run folders and of the
            comparison report.
        base: Folder that relative paths in the study start from.
        source: Text of the study file, kept in the run folder.
        data_root: Data root; None takes `VLMLAYERS_DATA`, then the study's.
        only: Names of stages; those of the study where empty.
        start: First stage to run; earlier ones must be done.
        skip: Stages to leave out; what they wrote before is used.
        force: Run the stages even where nothing changed.
        device: Device; None takes the study's.
        progress: Whether to show progress bars.
        echo: Says one line; what is longer than 80 columns is broken under its stage.

    Raises:
        UserError: A stage is unknown, needs an earlier one, or its input is wrong; or another
            process writes a run folder.
    """
    picked = stages_of(study, only, start, skip)
    if processes_launched() > 1 and picked != ["extract"]:
        raise UserError(
            "several processes share the stage 'extract' alone; run it by itself (--only extract), "
            "then start the same command without torchrun for the others"
        )
    root = _data_root(study, data_root, Path(base))
    many = len(study.models) > 1

    def say(line: str) -> None:
        hanging = " " * 9  # below what a stage says, beside its name
        # paths stay whole, to be copied
        echo(
            textwrap.fill(
                line, 80, subsequent_indent=hanging, break_long_words=False, break_on_hyphens=False
            )
        )

    def context_of(part: ModelPart) -> StageContext:
        run = Run(Path(out) / part.title if many else Path(out))
        return StageContext(run, study, part, Path(base), root, say, progress, device, force)

    contexts = [context_of(part) for part in study.models]
    for name in only or study.stages:
        if name in picked and not any(STAGES[name].wanted(one) for one in contexts):
            raise UserError(f"the stage {name!r} has nothing to do: {_UNWANTED}")
    check_before(contexts, picked)
    for context, name in product(contexts, picked):  # not after hours of those that come first
        if STAGES[name].wanted(context):
            _need_earlier(context, name, picked)
    runs = []
    # All at once: a folder that is in use is told before hours of work.
    with writing_alone(Path(out), *(context.run.folder for context in contexts)):
        for part in study.models:
            context = context_of(part)  # one at a time: it holds the loaded model
            if many:
                echo(f"{part.title}{' (RANDOM WEIGHTS)' if part.random_weights else ''}")
            elif part.random_weights:
                echo(f"{part.title}: {UNTRAINED}")
            run_stages(context, picked, source)
            runs.append(context.run)
        if many and "report" in picked:
            from vlmlayers.report import write_comparison

            echo(f"report   {write_comparison([run.folder for run in runs], out, study.title)}")
    return runs


def stages_of(
    study: Study, only: Sequence[str], start: str | None, skip: Sequence[str]
) -> list[str]:
    """Return the names of the stages that a study is to run, in order."""
    return pick_stages(only or (() if start else study.stages), start, skip)


def pick_stages(only: Sequence[str], start: str | None, skip: Sequence[str] = ()) -> list[str]:
    """Return the names of the stages to run, in order."""
    names = list(STAGES)
    for name in [*only, *skip, *([start] if start else [])]:
        check_one_of("stage", name, names)
    if only and start:
        raise UserError("give either --only or --from, not both")
    first = names.index(start) if start else 0
    wanted = only or names[first:]
    picked = [name for name in names if name in wanted and name not in skip]
    if not picked:
        raise UserError(f"no stage is left to run: {', '.join(wanted)} without {', '.join(skip)}")
    return picked


def run_stages(context: StageContext, picked: Sequence[str], source: str = "") -> None:
    """Run the picked stages of one model that are wanted and not up to date.

    The text of the study is kept in the run folder as soon as that holds anything else.
    """
    _keep_source(context, source)
    for name, stage in STAGES.items():
        if not stage.wanted(context):
            continue
        if name not in picked:
            if any(later in picked for later in list(STAGES)[list(STAGES).index(name) :]):
                _tell_outdated(context, stage)
            continue
        inputs = _marks(stage.inputs(context))
        if not (reason := _why(context, stage, inputs)):
            _keep_outdated(context, name)
            stage.unchanged(context)
            _keep_asked(context, name, source)
            context.doing(f"{name:8} unchanged")
            continue
        LOG.debug("%s runs: %s", name, reason)
        # Before it runs: a stage that is stopped must not count as done on its earlier inputs.
        _forget(context, name)
        shown = context.run.scores.exists() and context.run.choice.exists()
        if name in LONG and "report" in picked and shown:
            STAGES["report"].run(context)  # what is known so far; it is written again at the end
        began = time.monotonic()
        try:
            stage.run(context)
        # On Ctrl-C as well: the next run of the stage adds to this time.
        except BaseException:
            keep_time(context, name, time.monotonic() - began)
            raise
        finally:
            _keep_source(context, source)
        seconds = time.monotonic() - began
        LOG.debug("%s took %.2f s", name, seconds)
        # Inputs are taken again: a stage may refine what it depends on, such as provenance.
        _keep_outdated(context, name)
        _remember(context, name, _marks(stage.inputs(context)), seconds)
        _keep_asked(context, name, source)


def _keep_asked(context: StageContext, name: str, source: str) -> None:
    """Keep on which inputs the study whose text lies in the folder found a stage done, or did it.

    A verb has no text: what it does later is not what that study says.
    """
    ledger = context.ledger()
    done = ledger.get(name, {}).get("inputs")
    if source and is_first_process() and ledger.get("asked", {}).get(name) != done:
        ledger.setdefault("asked", {})[name] = done
        write_json(context.run.folder / "stages.json", ledger)


def _marks(inputs: Mapping[str, Any]) -> dict[str, str]:
    return {name: fingerprint(value) for name, value in inputs.items()}


def _why(context: StageContext, stage: Stage, inputs: Mapping[str, str]) -> str:
    """Return why a stage has to run; empty where it finished on these inputs."""
    if context.force:
        return "asked for with --force"
    entry = context.ledger().get(stage.name, {})
    if not isinstance(entry.get("inputs"), dict):
        return "has not finished before"
    if changed := _changed(context, stage, inputs):
        return f"changed since: {', '.join(changed)}"
    if missing := [str(path) for path in stage.outputs(context) if not path.exists()]:
        return f"not there: {', '.join(missing)}"
    # By a verb, such as `select` with another rule: what follows would go on from that.
    now = _output_marks(context, stage)
    other = [name for name, mark in entry.get("outputs", now).items() if now.get(name) != mark]
    return f"written by another command since: {', '.join(other)}" if other else ""


def _output_marks(context: StageContext, stage: Stage) -> dict[str, str]:
    """Return the mark of each file that a stage writes; stores know themselves what they are of."""
    return {path.name: file_mark(path) for path in stage.outputs(context) if path.is_file()}


def _need_earlier(context: StageContext, name: str, picked: Sequence[str]) -> None:
    for earlier in list(STAGES)[: list(STAGES).index(name)]:
        stage = STAGES[earlier]
        needed = earlier in ("score", "select") or (earlier == "extract" and name == "score")
        needed &= name not in ("search", "train")  # which need no scores to choose blocks
        needed |= earlier == "search" and name == "select" and stage.wanted(context)
        if earlier in picked or not needed:
            continue
        if missing := _missing(context, stage):
            raise UserError(
                f"stage {name!r} needs {missing[0]}, which stage {earlier!r} writes; "
                f"run with --from {earlier}"
            )


def _tell_outdated(context: StageContext, stage: Stage) -> None:
    """Say and keep that a stage which is not run again did not finish, or on other inputs than now.

    Nothing is known of what the single verbs made.
    """
    if not is_first_process():
        return
    name = stage.name
    try:
        if stopped := _was_stopped(context, stage):
            changed = []
        else:
            changed = _changed(context, stage, _marks(stage.inputs(context)))
    except UserError:  # its images or weights may be gone, which is why it is not run again
        return
    _keep_outdated(context, name, changed if stopped or changed else None)
    if stopped:
        context.echo(
            f"{name:8} did not finish on these inputs; what follows goes on from what lies there"
        )
    elif changed:
        context.echo(
            f"{name:8} not run again, though changed since: {', '.join(changed)}; "
            "what follows goes on from its earlier result"
        )


def _was_stopped(context: StageContext, stage: Stage) -> bool:
    """Whether a stage began, did not finish, and yet all it writes is there, of whatever inputs."""
    ledger = context.ledger()
    stopped = stage.name in ledger.get("unfinished", {}) and stage.name not in ledger
    return stopped and not _missing(context, stage)


def _missing(context: StageContext, stage: Stage) -> list[Path]:
    """Return what a stage writes and is not there, but for datasets that could not be extracted."""
    outputs = stage.outputs(context)
    return [path for path in outputs if not path.exists() and path.name not in context.left_out]


def _keep_outdated(context: StageContext, name: str, changed: Sequence[str] | None = None) -> None:
    """Keep which inputs a stage's result no longer is of, none of one that did not finish.

    With None nothing is kept: it ran again.
    """
    kept = context.run.read_provenance().get("outdated", {})
    now = {stage: parts for stage, parts in kept.items() if stage != name}
    if changed is not None:
        now[name] = list(changed)
    if now != kept:
        context.run.record(outdated=now)


def _changed(context: StageContext, stage: Stage, inputs: Mapping[str, str]) -> list[str]:
    """Return which inputs of a stage are others than those it finished on; none if it did not."""
    done = context.ledger().get(stage.name, {}).get("inputs")
    if not isinstance(done, dict):
        return []
    return [name for name in {**done, **inputs} if done.get(name) != inputs.get(name)]


def _keep_source(context: StageContext, source: str) -> None:
    # A folder with nothing but the study's text would pass for a run.
    if source and is_first_process() and holds_anything(context.run.folder):
        write_text(context.run.study, source)


def keep_time(context: StageContext, name: str, seconds: float) -> None:
    """Keep the time of a stage that did not finish: its next run adds to it."""
    if is_first_process() and holds_anything(context.run.folder):
        ledger = context.ledger()
        unfinished = ledger.setdefault("unfinished", {})
        unfinished[name] = round(unfinished.get(name, 0.0) + seconds, 2)
        write_json(context.run.folder / "stages.json", ledger)


def _remember(context: StageContext, name: str, inputs: Mapping[str, str], seconds: float) -> None:
    if not is_first_process():
        return
    ledger = context.ledger()
    unfinished = ledger.pop("unfinished", {})
    earlier = unfinished.pop(name, 0.0)
    if unfinished:
        ledger["unfinished"] = unfinished
    ledger[name] = {
        "inputs": dict(inputs),
        "outputs": _output_marks(context, STAGES[name]),
        "seconds": round(earlier + seconds, 2),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(context.run.folder / "stages.json", ledger)


def remember_streamed(context: StageContext, seconds: float) -> None:
    """Keep of the stage `extract` that it summed features: no store is what it made.

    Where stores of an earlier extraction are there, a study extracts anew, and says why.
    """
    _keep_outdated(context, "extract")
    inputs = {**STAGES["extract"].inputs(context), "streaming": True}
    _remember(context, "extract", _marks(inputs), seconds)


def _forget(context: StageContext, name: str) -> None:
    ledger: dict[str, Any] = context.ledger()
    if is_first_process() and ledger.pop(name, None) is not None:
        # Now, as a killed process says nothing: what lies there may be of either inputs.
        ledger.setdefault("unfinished", {}).setdefault(name, 0.0)
        write_json(context.run.folder / "stages.json", ledger)


def _data_root(study: Study, given: str | Path | None, base: Path) -> Path | None:
    if given is not None:
        return Path(given).expanduser()
    if os.environ.get(DATA_VARIABLE) or study.data_root is None:
        return None
    return base / Path(study.data_root).expanduser()
