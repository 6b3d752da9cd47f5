"""The scores of a run: of its stored features, and of the model itself where a metric needs it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmlayers.architectures import is_model_folder
from vlmlayers.errors import UserError
from vlmlayers.features.store import changed_data, differing_field
from vlmlayers.manifests import Manifest
from vlmlayers.metrics import METRICS
from vlmlayers.metrics.declare import MODEL
from vlmlayers.options import validated
from vlmlayers.runs import Run
from vlmlayers.scores.reading import is_random
from vlmlayers.study.context import StageContext, StudyDataset
from vlmlayers.study.schema import check_study
from vlmlayers.words import UNTRAINED, counted

if TYPE_CHECKING:
    import pandas as pd

# Of a model's identity: what scores depend on; its name and device may be others.
_OF_MODEL = ("weights_hash", "structure", "preprocessing")
EXAMINED = 200  # images of a dataset that the model runs on once per block and change


def needs_model(metric: str) -> bool:
    """Return whether a metric is of the model itself, not of stored features."""
    return metric in METRICS and METRICS[metric].needs == MODEL


def scored(table: pd.DataFrame, file: Path) -> str:
    """Return what a verb says of the scores that it wrote."""
    line = f"{len(table)} scores of {counted(table['metric'].nunique(), 'metric')}: {file}"
    return f"{line}\n{UNTRAINED}" if is_random(table) else line


def scores_of(
    features: Sequence[Any],
    metrics: Sequence[str],
    context: Callable[[], StageContext],
    *,
    jobs: int | None = None,
    progress: bool = True,
    **options: Any,
) -> pd.DataFrame:
    """Return the score table of some metrics, whatever they need.

    Args:
        features: Features of one dataset or of several.
        metrics: Names of metrics.
        context: Returns model and datasets; called where a metric needs the model.
        jobs: Processes that share the work on features.
        progress: Show progress bars.
        **options: Those of `vlmlayers.scores.ScoreOptions`.

    Raises:
        UserError: As `vlmlayers.score`, nothing could be scored, or model or images are not those
            that were extracted.
    """
    import pandas as pd

    from vlmlayers.scores import score
    from vlmlayers.scores.missing import NothingScored
    from vlmlayers.scores.sources import source_marks

    of_features = [name for name in metrics if not needs_model(name)]
    inside = [name for name in metrics if needs_model(name)]
    # First, as features may take hours to score.
    ready = _as_extracted(context()) if inside else None
    parts: list[Callable[[], pd.DataFrame]] = []
    if of_features:
        given = {"jobs": jobs, "progress": progress, **options}
        parts.append(partial(score, features, of_features, **given))
    if ready is not None:
        parts += _examinations(ready, inside, options)
    tables, empty = [], []
    for part in parts:
        try:
            tables.append(part())
        except NothingScored as error:
            empty.append(error)
    if not tables:
        raise UserError("; ".join(dict.fromkeys(map(str, empty))))
    for gaps in filter(None, (error.gaps for error in empty)):
        warnings.warn(f"not computed: {gaps}", UserWarning, stacklevel=2)
    whole = pd.concat(tables, ignore_index=True)
    # concat keeps attributes only where those of all parts are equal. What the features were is
    # known of metrics of the model too, which ran on the same images and weights.
    whole.attrs.update(tables[0].attrs | source_marks(features))
    refused = [one for table in tables for one in table.attrs.get("refused", ())]
    whole.attrs["refused"] = refused + [one for error in empty for one in error.refused]
    return whole


def _as_extracted(context: StageContext) -> StageContext:
    """Return a context whose model and images are those that its run was extracted from.

    A table must not mix scores of stored features with those of anything else. Images are told
    apart as `extract` does it, where it finds a store: by list, sizes and times of change.

    Raises:
        UserError: They are others; names what differs.
    """
    notes = context.run.read_provenance()
    for data in context.datasets:
        if data.folder not in context.left_out:
            recorded = _recorded(notes, data.manifest.name)
            split = data.options["split"]
            record = next((one for one in recorded if one.get("split") == split), {})
            _refuse_other_images(context, data, record)
    known = {key: notes["model"][key] for key in _OF_MODEL if key in notes.get("model", {})}
    now = json.loads(json.dumps(context.load_model().identity()))  # where tuples become lists
    if "structure" in known:
        from vlmlayers.models.vlm import shared_structure

        found = shared_structure(known["structure"], now["structure"])
        known["structure"], now["structure"] = found
    if difference := differing_field(known, {key: now[key] for key in known}):
        raise UserError(
            f"{context.run.folder} was extracted by another model than its files give now: "
            f"{difference}; put the earlier files back, or extract again with --force"
        )
    return context


def _refuse_other_images(
    context: StageContext, data: StudyDataset, record: Mapping[str, Any]
) -> None:
    then = record.get("data_hash")
    if not then or then == data.identity.hash:
        return
    manifest, root = data.manifest, context.data_root
    if not context.study.extract.skip_unreadable:
        manifest.refuse_missing(data.items, root)  # which names the folder to put them into
    store = context.run.features / data.folder
    changed = changed_data(store, {"data": {"images": record["items"]}}, data.identity)
    drawn = manifest.layout == "builtin"
    where = "are drawn now" if drawn else f"lie in {manifest.place(root).images.resolve()}"
    back = "" if drawn else "put the earlier ones back with their times of change (cp -p), or "
    raise UserError(
        f"{context.run.folder} was extracted from other images of {manifest.name} than {where}: "
        f"{changed}; {back}extract again with --force"
    )


def _examinations(
    context: StageContext, metrics: Sequence[str], options: dict[str, Any]
) -> list[Callable[[], pd.DataFrame]]:
    """Return what runs the model on each dataset that was extracted."""
    from vlmlayers.manifests.items import balanced_sample
    from vlmlayers.models import examine
    from vlmlayers.scores import ScoreOptions

    settled = validated(ScoreOptions, options)
    model = context.load_model()
    return [
        partial(
            examine,
            model,
            data.manifest,
            data.options["split"],
            metrics,
            items=balanced_sample(data.items, min(EXAMINED, len(data.items)), context.seed),
            root=context.data_root,
            template=data.options["template"],
            seed=settled.seeds[0],
            bootstrap=settled.bootstrap,
            progress=context.progress,
        )
        for data in context.datasets
        if data.folder not in context.left_out
    ]


def _recorded(notes: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """Return what a run recorded of a dataset, once for each of its splits."""
    return [one for key, one in notes.get("datasets", {}).items() if one.get("name", key) == name]


def _kept(notes: Mapping[str, Any], tower: str | None) -> dict[str, Any]:
    """Return what a study of a tower, or both, says of a dataset, of what a run recorded of it."""
    keys = ["split", "text", "present_only"]
    # Captions have no template, nor have images, whatever stood in the study for other datasets.
    keys += ["template"] * (notes["text"] == "prompts" and tower != "vision")
    # As many as were drawn of this dataset, which may have had a number of its own.
    return {**{key: notes[key] for key in keys}, "items": notes["asked"]}


def _found(run: Run, name: str, given: Mapping[str, Any]) -> str:
    """Return a recorded dataset as it can be opened now: a known name, or where it lies.

    Raises:
        UserError: It is not where it was; says where it was looked for.
    """
    if name in Manifest.names():
        return name
    places = run.places(name, given.get("from_run", {}).get(name, ""))
    if place := next((one for one in places if one.exists()), None):
        return str(place)
    raise UserError(
        f"{run.folder} was extracted from {name}, which does not exist; tried "
        f"{', '.join(map(str, places))}; put it there, go to the folder it was extracted in, or "
        "start its study or extraction again, which looks it up anew"
    )


def recorded_context(run: Run, **options: Any) -> StageContext:
    """Return the model and datasets that a run was extracted from, as its provenance names them.

    Args:
        run: The run folder.
        **options: `echo` and `progress`.

    Raises:
        UserError: The run does not say, as one of an earlier version, or they are gone.
    """
    notes = run.read_provenance()
    given = notes.get("given")
    if not given:
        raise UserError(
            f"{run.folder} does not say which model and data it is of, which metrics of the model "
            "need; extract again, or leave these metrics out"
        )
    model = dict(given["model"])
    name = model.pop("name")
    kind = "path" if is_model_folder(name) else "name"
    adapted = {key: given[key] for key in ("adapter", "method") if key in given}
    names = [_found(run, one, given) for one in given["datasets"]]
    own = ("split", "device", "streaming")  # split stands with each dataset; devices differ
    study = check_study(
        {
            "models": [{kind: name, **model, **adapted}],
            "datasets": [
                {"name": one, **_kept(record, notes["extract"].get("tower"))}
                for one in dict.fromkeys(names)
                for record in _recorded(notes, Manifest.load(one).name)
            ],
            "extract": {key: v for key, v in notes["extract"].items() if key not in own},
            "seed": notes["seed"],
        },
        f"{run.provenance}",
    )
    place = None
    if root := given.get("data_root"):
        places = run.places(root, given.get("from_run", {}).get(root, ""))
        place = next((one for one in places if one.exists()), Path(root))
    return StageContext(run, study, study.models[0], Path(), place, **options)
