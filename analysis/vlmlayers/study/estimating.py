"""What the extraction of a study will cost, before it is run."""

from __future__ import annotations

from pathlib import Path

from vlmlayers.errors import UserError
from vlmlayers.runs import Run
from vlmlayers.study.context import StageContext
from vlmlayers.study.preflight import check_before
from vlmlayers.study.schema import Study


def estimate_study(
    study: Study,
    out: str | Path,
    *,
    data_root: str | Path | None = None,
) -> str:
    """Measure one batch per model and dataset; return time, disk and memory as text.

    Nothing is recorded and no folder is made.

    Raises:
        UserError: The model or a dataset of the study is wrong.
    """
    tower = study.extract.tower
    if tower == "text":
        raise UserError(
            "--estimate measures images, and --tower text encodes none; leave one of them out"
        )
    root = None if data_root is None else Path(data_root)

    contexts = [StageContext(Run(Path(out)), study, part, Path(), root) for part in study.models]
    check_before(contexts, ["extract"])
    _ = contexts[0].datasets  # missing images are said before a model is loaded
    from vlmlayers.models import estimate

    parts = []
    while contexts:
        context, options = contexts.pop(0), study.extract
        parts.append(
            estimate(
                context.load_model(),  # in no variable, beside which the next one would be loaded
                [(data.manifest, data.items) for data in context.datasets],
                out=out,
                workers=options.workers,
                root=root,
                spaces=options.spaces,
                pooling=dict(options.pooling).get("vision"),
                batch_size=options.batch_size,
                precision=options.precision,
                decoding=options.decoding,
                tower=tower,
                captions=any(study.part(data)["text"] == "captions" for data in study.datasets),
            )
        )
    return "\n".join(parts)
