"""A study whose features are summed as they are made: no store, scores at once."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlmlayers.errors import UserError
from vlmlayers.extraction import check_streamable
from vlmlayers.runs import Run, environment, is_first_process
from vlmlayers.study.context import StageContext, StudyDataset, silent
from vlmlayers.study.preflight import check_before
from vlmlayers.study.runner import keep_time, remember_streamed
from vlmlayers.study.schema import Study
from vlmlayers.study.scoring import scored
from vlmlayers.study.stages import extract_each


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
    check_streamable(study.extract)
    root = None if data_root is None else Path(data_root)
    context = StageContext(
        Run(Path(out)), study, study.models[0], Path(base), root, echo, progress, device
    )
    check_before([context], ["extract"])  # before torch is imported
    from vlmlayers.models import stream
    from vlmlayers.scores import write_scores
    from vlmlayers.scores.streamed import STREAMED, check_streamed, streamed_scores
    from vlmlayers.scores.sums import StreamingScores

    check_streamed(metrics)
    total = StreamingScores()
    folder = context.run.folder / "streams"

    def stream_one(
        context: StageContext, model: Any, data: StudyDataset, saved: Path
    ) -> tuple[Any, int, int]:
        nonlocal total
        # Other processes read what is saved once the first one has looked at it.
        if force and is_first_process():
            shutil.rmtree(saved, ignore_errors=True)
        options = context.extract_options(data)
        found = stream(model, data.manifest, data.options["split"], out=saved, **options)
        total = total.merge(found)
        (sums,) = found.datasets.values()
        texts = sums.n if sums.prompts is None else len(sums.prompts)
        return sums.head, sums.n, texts

    began = time.monotonic()
    try:
        facts = extract_each(context, "stream", folder, stream_one)
    except BaseException:  # on Ctrl-C as well, as of a stage
        keep_time(context, "extract", time.monotonic() - began)
        raise
    seconds = time.monotonic() - began
    # Every process has the whole; one writes it.
    if not is_first_process():
        return ""
    table = streamed_scores(total, metrics or STREAMED)
    _, text = write_scores(table, context.run.folder)
    context.run.record(
        **facts | {"extract": {**facts["extract"], "streaming": True}},
        score={"metrics": sorted(set(table["metric"])), "options": {}, "streaming": True},
        environment=environment(),
    )
    # What stores there are is of an earlier extraction: a study must not go on from them.
    remember_streamed(context, seconds)
    context.run.settle("score")
    # Last: sums that are gone before the table is written would have to be made again.
    shutil.rmtree(folder, ignore_errors=True)
    return scored(table, text)
