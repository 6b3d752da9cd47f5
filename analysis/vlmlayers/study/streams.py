"""A study whose features are summed as they are made: no store, scores at once."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from vlmlayers.errors import UserError
from vlmlayers.runs import Run, environment
from vlmlayers.study.context import StageContext, silent
from vlmlayers.study.preflight import check_before
from vlmlayers.study.schema import Study
from vlmlayers.study.scoring import scored
from vlmlayers.words import counted


def stream_study(
    study: Study,
    out: str | Path,
    *,
    metrics: Sequence[str] | None = None,
    base: str | Path = ".",
    data_root: str | Path | None = None,
    device: str | None = None,
    force: bool = False,
    progress: bool = True,
    echo: Callable[[str], None] = silent,
) -> str:
    """Run every image through the towers, keep sums, and write the score table of the run.

    Saved sums lie in `streams/` of the run folder until the table is written; a stopped run goes
    on from them. Under `torchrun` the processes share the images.

    Args:
        study: One model, and datasets.
        out: The run folder.
        metrics: Those that sums suffice for; all of them where None.
        base: Folder that relative paths in the study start from.
        data_root: Data root.
        device: Device; None takes the study's.
        force: Start anew where sums are saved, whatever they are of.
        progress: Whether to show progress bars.
        echo: Says one line.

    Raises:
        UserError: The study has several models, a metric needs the features themselves, or
            anything that `vlmlayers.models.stream` refuses.
    """
    if len(study.models) > 1:
        raise UserError("streaming takes one model at a time; name one")
    root = None if data_root is None else Path(data_root)
    context = StageContext(
        Run(Path(out)), study, study.models[0], Path(base), root, echo, progress, device
    )
    check_before([context], ["extract"])  # before torch is imported
    from vlmlayers.models import stream
    from vlmlayers.models.processes import Processes
    from vlmlayers.scores import write_scores
    from vlmlayers.scores.streamed import STREAMED, check_streamed, streamed_scores
    from vlmlayers.scores.sums import StreamingScores

    check_streamed(metrics)
    model, total = context.load_model(), StreamingScores()
    folder = context.run.folder / "streams"
    for data in context.datasets:
        context.doing(
            f"stream   {data.manifest.name}: {counted(len(data.items), 'item')} ({data.folder})"
        )
        # Other processes read what is saved once the first one has looked at it.
        if force and not Processes.current().rank:
            shutil.rmtree(folder / data.folder, ignore_errors=True)
        found = stream(
            model,
            data.manifest,
            data.options["split"],
            out=folder / data.folder,
            **context.extract_options(data),
        )
        total = total.merge(found)
    # Every process has the whole; one writes it.
    if Processes.current().rank:
        return ""
    table = streamed_scores(total, metrics or STREAMED)
    _, text = write_scores(table, context.run.folder)
    context.run.record(
        extract={**study.extract.model_dump(mode="json"), "streaming": True},
        score={"metrics": sorted(set(table["metric"])), "options": {}},
        seed=context.seed,
        environment=environment(),
    )
    # Last: sums that are gone before the table is written would have to be made again.
    shutil.rmtree(folder, ignore_errors=True)
    return scored(table, text)
