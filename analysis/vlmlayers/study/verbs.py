"""What the verbs `extract`, `score` and `select` do with what was typed."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vlmlayers.architectures import MINIATURES, architectures, is_model_folder
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.options import validated
from vlmlayers.prompts import EXAMINED
from vlmlayers.runs import Run, environment, score_table, writing_alone
from vlmlayers.selection.resampling import check_resampling
from vlmlayers.study.schema import DEFAULT_METRICS, ExtractPart, Study, check_study
from vlmlayers.user_code import is_user_code

LOG = logging.getLogger(__name__)


def study_of(
    model: str,
    datasets: Sequence[str],
    weights: Mapping[str, Any],
    *,
    adapter: Path | None,
    method: str | None,
    seed: int,
    extraction: ExtractPart,
) -> Study:
    """Return the study that the arguments of `vlmlayers extract` describe.

    Args:
        model: Architecture, or a folder with a model.
        datasets: Names, image folders, tables or TOML files.
        weights: Which weights it gets; keyword arguments of `load_model`.
        adapter: Trained adapter to attach.
        method: Its method, or `path.py:Class`, where it does not say.
        seed: Seed of the draw of items.
        extraction: The table `[extract]`.

    Raises:
        UserError: A seed without a draw, or what `check_study` refuses.
    """
    if seed and not extraction.items:
        raise UserError("--seed draws items; it needs a number of them (--items)")
    # A run of an architecture may lie in a folder of its name.
    known = model in MINIATURES or model in architectures()
    local = is_model_folder(model) or (Path(model).is_dir() and not known)
    part = {
        "path" if local else "name": str(Path(model).resolve()) if local else model,
        **weights,
        "adapter": str(adapter.resolve()) if adapter else "",
        "method": str(Path(method).resolve()) if method and is_user_code(method) else method or "",
    }
    content = {"models": [part], "datasets": datasets, "seed": seed}
    content["extract"] = extraction.model_dump()
    return check_study(content, "the command line")


def metrics_text(names: Sequence[str] | None = None) -> str:
    """Return what the METRICS table declares, as text of 80 columns.

    Raises:
        UserError: A name is unknown; the nearest one is named.
    """
    from vlmlayers.metrics import metric, table

    for name in names or ():
        metric(name)
    from vlmlayers.scores.streamed import STREAMED
    from vlmlayers.study.scoring import needs_model

    lines: list[str] = []
    for row in table(names or None).to_dict("records"):
        name = row["metric"]
        marks = "*" if name in DEFAULT_METRICS else "+" if needs_model(name) else " "
        marks += "~" if name in STREAMED else " "
        lines += _wrapped(f"{name} ({row['level']}): {row['axis label']}", marks + " ")
        lines += _wrapped(row["meaning"])
        facts = [f"larger: {row['larger means']}", f"range {row['bounds']}"]
        facts += [f"chance: {row['chance']}"] if row["chance"] else []
        facts += [f"n ≥ {row['smallest n']}"]
        facts += [f"unchanged by {row['invariant to']}"] if row["invariant to"] else []
        facts += [f"changed by {row['sensitive to']}"] if row["sensitive to"] else []
        lines += _wrapped("; ".join(facts))
        lines += _wrapped(f"{row['towers']}; {row['spaces']}; {row['reference']}")
    marks = "* scored by default    ~ can be streamed    + runs the model again"
    return "\n".join([*lines, "", marks, *([] if names else _options_lines())])


def _options_lines() -> list[str]:
    """Return what the options of scoring are, with their defaults."""
    from vlmlayers.scores import ScoreOptions

    lines = ["", "Options of scoring: --set KEY=VALUE, or `options` of [score] in a study"]
    for name, field in ScoreOptions.model_fields.items():
        given = field.default if isinstance(field.default, tuple) else (field.default,)
        default = "" if field.default is None else "=" + ",".join(map(str, given))
        lines += _wrapped(f"{name}{default}: {field.description}", "   ")
    return lines


def _wrapped(text: str, first: str = "     ") -> list[str]:
    return textwrap.wrap(text, 80, initial_indent=first, subsequent_indent="     ")


def score_run(
    folder: str | Path,
    metrics: Sequence[str] | None,
    options: dict[str, Any],
    *,
    streaming: bool = False,
    jobs: int | None = None,
    progress: bool = True,
) -> str:
    """Score the stored features of a run folder and write the table.

    Raises:
        UserError: No features, an unknown metric or option.
    """
    from vlmlayers.metrics import metric
    from vlmlayers.scores import ScoreOptions

    run = Run(Path(folder))
    stores = run.stores()
    for name, why in run.left_out.items():
        LOG.warning("%s is left out, as by its extraction: %s", name, why)
    _tell_others(run, [path.name for path in stores])
    asked = list(metrics or DEFAULT_METRICS)
    known = [metric(name) for name in asked if not is_user_code(name)]
    if streaming:
        for name in options:
            check_one_of("option of streamed scores", name, ("sample",))
        if jobs is not None:
            raise UserError("--jobs share the scoring of features; --streaming takes one process")
    else:
        given = validated(ScoreOptions, options, "--set")
        options = given.model_dump(exclude_unset=True)
        if len(known) == len(asked):
            given.refuse_unread(known)
    from vlmlayers.study.scoring import needs_model, recorded_context, scored, scores_of

    if any(map(needs_model, metrics or ())):
        context = recorded_context(run)
        for manifest in context.extracted_manifests:
            manifest.require_classes(EXAMINED, context.data_root)
    from vlmlayers.features.store import open_features
    from vlmlayers.scores import score_streaming, write_scores
    from vlmlayers.scores.run import chosen_metrics
    from vlmlayers.scores.streamed import STREAMED

    chosen_metrics([name for name in metrics or () if not needs_model(name)])
    if streaming:
        used = list(metrics or STREAMED)
        table = score_streaming(stores, used, **options)
    else:
        used = list(metrics or DEFAULT_METRICS)
        features = [open_features(path) for path in stores]
        recorded = partial(recorded_context, run, progress=progress)
        table = scores_of(features, used, recorded, jobs=jobs, progress=progress, **options)
    _, text = write_scores(table, run.folder)
    run.record(
        score={"metrics": used, "options": options, "streaming": streaming},
        environment=environment(),
    )
    run.settle("score")
    return scored(table, text)


def _tell_others(run: Run, stores: Sequence[str]) -> None:
    """Warn of stores that the run's last extraction did not write: their dataset may be dropped."""
    notes = run.read_provenance()
    if notes.get("extract", {}).get("streaming"):
        LOG.warning(
            "%s: %s of an extraction before the last one, which was streamed and which the report "
            "describes; extract again without --streaming, or into another folder",
            run.features,
            ", ".join(stores),
        )
        return
    recorded = notes.get("datasets", {})
    written = {f"{one.get('name', key)}-{one['split']}" for key, one in recorded.items()}
    if written and (others := [name for name in stores if name not in written]):
        LOG.warning(
            "%s: %s of an earlier extraction; scored with the others. To leave it out, delete it",
            run.features,
            ", ".join(others),
        )


def select_run(
    path: str | Path,
    rule: str,
    options: dict[str, Any],
    resamples: int,
    seed: int,
    out: str | Path | None = None,
) -> str:
    """Choose layers from a run folder or a score table and write `choice.json`."""
    from vlmlayers.selection import make_rule

    source = Path(path)
    folder = source if source.is_dir() else source.parent
    if rule == "search":
        options = {"file": str(Run(folder).search)} | options
    # Before the imports that take seconds: a misspelt name shows at once.
    make_rule(rule, options)
    check_resampling(rule, resamples, seed)
    score_table(source)
    from vlmlayers.scores import read_scores  # all that can be wrong by then takes a table
    from vlmlayers.scores.sources import other_features
    from vlmlayers.selection import select

    scores = read_scores(source)
    if of := other_features(Run(folder), scores.attrs):
        LOG.warning(
            "%s: the scores were not made from the features of %s that are here; score again",
            folder,
            of,
        )
    choice = select(scores, rule, resamples=resamples, seed=seed, **options)
    # The folder of a bare table is no run: nothing else is written there.
    alone = not out and Run(folder).provenance.is_file()
    with writing_alone(*((folder,) if alone else ())):
        written = choice.save(out or Run(folder).choice)
        if alone:
            Run(folder).settle("select")
    return "\n".join([f"adapt {choice}", *textwrap.wrap(choice.statement, 80), str(written)])
