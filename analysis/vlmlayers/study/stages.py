"""The stages of a study: what each reads, what it writes, and on what its result depends."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from os.path import isfile
from pathlib import Path
from typing import Any, Protocol

from vlmlayers.errors import DataFault, OtherExtraction, UserError
from vlmlayers.features.store import partial_folder
from vlmlayers.manifests import Manifest
from vlmlayers.placement import is_choice
from vlmlayers.positions import TOWERS
from vlmlayers.runs import PARTIAL, environment, file_mark, fingerprint, is_first_process
from vlmlayers.study.context import StageContext, StudyDataset
from vlmlayers.user_code import code_file, is_user_code, packaged
from vlmlayers.words import counted

GROUP = "vlmlayers.stages"


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: Verb of the command line.
        inputs: All that the result depends on, by name, as JSON values; cheap to compute.
        run: Does the work.
        outputs: Files that exist when it is done.
        wanted: Whether the study asks for it.
        unchanged: Does what is left to do where nothing changed.
    """

    name: str
    inputs: Callable[[StageContext], dict[str, Any]]
    run: Callable[[StageContext], None]
    outputs: Callable[[StageContext], list[Path]]
    wanted: Callable[[StageContext], bool] = lambda context: True
    unchanged: Callable[[StageContext], None] = lambda context: None


def _extract_inputs(context: StageContext) -> dict[str, Any]:
    # Decoding processes do not change values; the rest is in the options of each dataset.
    common = context.study.extract.model_dump(exclude={"workers", "device", "items", "split"})
    return {
        "model": context.model_fingerprint(),
        "options": common,
        "device": context.device_kind,
        "datasets": {
            data.folder: {"options": data.options, "data": data.identity.hash}
            for data in context.datasets
        },
    }


def _extract(context: StageContext) -> None:
    facts = extract_each(context, "extract", context.run.features, _extract_one)
    context.run.record(**facts, environment=environment())


def extract_each(
    context: StageContext,
    verb: str,
    place: Path,
    work: Callable[[StageContext, Any, StudyDataset, Path], tuple[Any, int, int]],
) -> dict[str, Any]:
    """Extract each dataset, leave out those whose files fail, and return what is recorded of all.

    Args:
        context: Model and datasets.
        verb: What is done, for the user.
        place: Folder of what is kept of each dataset while or after it is extracted.
        work: Extracts one dataset by a model into its folder; returns features, of which class
            names and identity are read, and the numbers of images and texts.

    Raises:
        UserError: No dataset can be extracted, or an error of `work` that is not of its files.
    """
    from vlmlayers.models.extract import refuse_textless

    _refuse_missing(context, place)
    model = context.load_model()
    for data in context.datasets:
        refuse_textless(model, data.manifest, **context.extract_options(data))
    options = context.study.extract
    known = context.run.read_provenance().get("datasets", {})
    record, left_out = {}, {}
    for data in context.datasets:
        context.doing(
            f"{verb:8} {data.manifest.name}: {counted(len(data.items), 'item')} ({data.folder})"
        )
        # How long a stopped extraction worked on what it left is not known.
        fresh = context.force or not any(
            (place / f"{data.folder}{end}").exists() for end in ("", PARTIAL)
        )
        began = time.monotonic()
        try:
            features, images, texts = work(context, model, data, place / data.folder)
        except DataFault as error:  # a full disk or a held lock would fail the next one too
            if len(context.datasets) == 1:
                raise
            left_out[data.folder] = str(error)
            context.echo(f"         {data.manifest.name} is left out: {error}")
            continue
        several = sum(one.manifest.name == data.manifest.name for one in context.datasets) > 1
        key = data.folder if several else data.manifest.name
        seconds = time.monotonic() - began if fresh else known.get(key, {}).get("seconds")
        record[key] = {
            **({"name": data.manifest.name} if several else {}),  # of two splits of one
            "title": data.manifest.title,
            "split": data.options["split"],
            "items": images,
            "asked": len(data.items),
            "classes": len(features.class_names),
            "texts": texts,
            **({"seconds": round(seconds, 2)} if seconds else {}),
            "text": data.options["text"],
            "template": data.options["template"],
            "present_only": data.options["present_only"],
            "manifest_hash": data.manifest.hash,
            "items_hash": features.identity.get("items_hash", ""),
            "data_hash": features.identity.get("data", {}).get("hash", ""),
        }
    if not record:
        raise UserError(f"no dataset could be extracted; the last one: {[*left_out.values()][-1]}")
    return {
        "model": model_record(model),
        "datasets": record,
        "left_out": left_out,
        "given": _given(context),
        "extract": {**options.model_dump(mode="json"), "device": str(model.device)},
        "seed": context.seed,
    }


def _given(context: StageContext) -> dict[str, Any]:
    """Return model, datasets and data root as the command line takes them, for the next command.

    `leaving_out` has what training leaves out as extraction did, by which cells are found again.

    `places` has those of paths by name, of earlier extractions too, whose scores may still stand.
    `from_run` says where those of relative paths lie from the run folder, as both may be moved.
    """
    names = [manifest.name for manifest in context.manifests]
    known = context.run.read_provenance().get("given", {}).get("places", {})
    earlier = {name: place for name, place in known.items() if name not in names}
    datasets = [context.dataset_name(part.name) for part in context.study.datasets]
    root = None if context.data_root is None else str(context.data_root)
    paths = [one for one in (*datasets, root) if one and one not in Manifest.names()]
    return {
        "model": context.model_arguments(),
        "datasets": datasets,
        "data_root": root,
        "leaving_out": {key: True for key, left in context.leaving_out.items() if left},
        "places": earlier | {n: one for n, one in zip(names, datasets) if n != one},
        "from_run": {one: seen for one in paths if (seen := context.run.path_to(one))},
        **context.adapter_arguments(),
    }


def _keep_given(context: StageContext) -> None:
    """Keep how the command line takes model and data now: they may have been moved."""
    known = context.run.read_provenance().get("given")
    if known and fingerprint(now := _given(context)) != fingerprint(known):
        context.run.record(given=now)


def _refuse_missing(context: StageContext, place: Path) -> None:
    """Name the missing images of every dataset before those of the first are encoded.

    A dataset of which anything is kept is left to its own check: its images may have been deleted.
    """
    # Texts come from names and captions, which the manifest holds.
    if context.study.extract.skip_unreadable or context.study.extract.tower == "text":
        return
    for data in context.datasets:
        if not (place / data.folder).exists():
            data.manifest.refuse_missing(data.items, context.data_root)


def _extract_one(
    context: StageContext, model: Any, data: StudyDataset, store: Path
) -> tuple[Any, int, int]:
    from vlmlayers.models import extract

    options = context.extract_options(data)
    # A whole store of the same identity would otherwise be taken as it is, unfinished work resumed.
    if context.force:
        shutil.rmtree(store, ignore_errors=True)
        if is_first_process():  # which may have begun anew before the others come here
            shutil.rmtree(partial_folder(store), ignore_errors=True)
    try:
        found = extract(model, data.manifest, data.options["split"], out=store, **options)
    except OtherExtraction as error:
        raise OtherExtraction(f"{error}, or extract again with --force") from None
    return found, len(found.vision or ()), len(found.text or ())


def model_record(model: Any) -> dict[str, Any]:
    """Return what a run keeps of a model: name, weights with their hash, towers, parameters."""
    from vlmlayers.models.handover import block_names, layers_of

    names = block_names(model)
    parameters = sum(p.numel() for p in model.clip.parameters())
    known = model.identity()
    return {
        "name": known.pop("model"),
        **known,
        "random_weights": bool(model.random_weights),
        **({"adapter_hash": model.adapter_hash} if model.adapter_hash else {}),
        "parameters": int(parameters),
        "towers": {
            name: {
                "blocks": tower.depth,
                "width": tower.width,
                "kind": tower.kind,
                "modules": list(names[name]),
                "layers": layers_of(tower.blocks),
            }
            for name, tower in model.towers.items()
        },
    }


def _score_inputs(context: StageContext) -> dict[str, Any]:
    from vlmlayers.study.scoring import needs_model

    # Metrics of the model draw images of their own among those that were extracted.
    drawn = {"seed": context.seed} if any(map(needs_model, context.study.score.metrics)) else {}
    return {
        **drawn,
        "extract": context.ledger().get("extract", {}).get("inputs"),
        "left_out": sorted(context.left_out),
        "metrics": context.study.score.metrics,
        "options": context.study.score.options,
        "own_metrics": [_metric_mark(name) for name in context.metrics],
        # Another version may compute other values from the same features.
        "version": version("vlm-layers"),
    }


def _score(context: StageContext) -> None:
    from vlmlayers.scores import write_scores
    from vlmlayers.study.scoring import scores_of

    features = list(context.features())
    part = context.study.score
    sizes = counted(len(part.metrics), "metric"), counted(len(features), "dataset")
    context.doing(f"score    {sizes[0]} on {sizes[1]}")
    scores = scores_of(
        features, context.metrics, lambda: context, progress=context.progress, **part.options
    )
    write_scores(scores, context.run.folder)
    context.run.record(score=part.model_dump(mode="json"), environment=environment())


def _metric_mark(name: str) -> str:
    """Return the mark of the file of a metric that does not ship, as one of a package."""
    from vlmlayers.metrics import metric

    return _mark(code_file(name, None if is_user_code(name) else metric(name).function))


def _rule_mark(rule: str) -> str:
    """Return the mark of the file of a rule that does not ship, as one of a package."""
    from vlmlayers.selection import RULES, make_rule

    own = rule not in RULES and not is_user_code(rule)
    return _mark(code_file(rule, make_rule(rule, {}).function if own else None))


def _mark(file: Path | None) -> str:
    return "" if file is None else file_mark(file)


def _select_inputs(context: StageContext) -> dict[str, Any]:
    part, given = context.study.select, context.rule_options
    # By key, as a run may be moved. Path.is_file fails on texts that no path can be.
    texts = {key: one for key, one in given.items() if isinstance(one, str)}
    named = {key: Path(one) for key, one in texts.items() if isfile(one)}  # noqa: PTH113
    files = {key: file_mark(one) for key, one in named.items() if part.rule != "search"}
    return {
        "scores": file_mark(context.run.scores),
        "select": part.model_dump(),
        "seed": context.seed,
        "own_rule": _rule_mark(context.rule),
        "search": file_mark(Path(given["file"])) if part.rule == "search" else "",
        **({"files": files} if files else {}),
        "version": version("vlm-layers"),
    }


def _select(context: StageContext) -> None:
    from vlmlayers.selection import select
    from vlmlayers.selection.resampling import resampled

    part = context.study.select
    choice = select(
        context.scores,
        context.rule,
        resamples=part.resamples,
        # The study's seed draws items as well; `select` refuses one that draws nothing.
        seed=context.seed if resampled(context.rule, part.resamples) else 0,
        **context.rule_options,
    )
    choice.save(context.run.choice)
    context.echo(f"select   {choice}")
    if not choice.decided:
        reasons = counted(len(choice.evidence.get("doubts", ())), "doubt")
        most = " all of it" if any(map(choice.firm, TOWERS)) else ""
        context.echo(f"         the data do not decide{most}: {reasons}, listed in the report")


def _search_inputs(context: StageContext) -> dict[str, Any]:
    return {
        "search": context.study.search,
        "left_out": context.leaving_out,
        **_trained_on(context, "search"),
    }


def _validate_inputs(context: StageContext) -> dict[str, Any]:
    return {
        "choice": file_mark(context.run.choice),
        "options": {**context.leaving_out, **context.table("validate")},
        "scores": file_mark(context.run.scores),
        "seed": context.seed,  # of random placements
        **_trained_on(context, "validate"),
    }


def _train_inputs(context: StageContext) -> dict[str, Any]:
    places = [one for part in context.study.train for one in part.get("placements", ())]
    return {
        "train": context.study.train,
        "left_out": context.leaving_out,
        "choice": file_mark(context.run.choice) if any(map(is_choice, places)) else "",
        **_trained_on(context, "train"),
    }


def file_marks(files: Iterable[Path]) -> dict[str, str]:
    """Return the marks of files by name, as a run may be moved; those of one name are numbered."""
    found: dict[str, str] = {}
    for number, path in enumerate(dict.fromkeys(files), 1):
        found[path.name if path.name not in found else f"{path.name} {number}"] = file_mark(path)
    return found


def _trained_on(context: StageContext, stage: str) -> dict[str, Any]:
    """Return what a stage that trains depends on beside its table: data and files, as it says."""
    work = installed_stage(stage)
    data, files = work.datasets(context), work.files(context)
    return {
        "model": context.model_fingerprint(),
        "device": context.device_kind,
        "data": {one.name: context.whole_identity(one).hash for one in data},
        "templates": {one.name: one.zero_shot_template for one in data},
        "files": file_marks(files),
        "version": version("vlm-layers"),
    }


def _installed(stage: str, line: str = "") -> Callable[[StageContext], None]:
    """Return what runs a stage of an installed package, after a line that says so."""

    def run(context: StageContext) -> None:
        work = installed_stage(stage)
        if line:
            context.doing(line)
        work(context)

    return run


class InstalledStage(Protocol):
    """A stage of another package, offered by its name among the entry points of `GROUP`."""

    def check(self, context: StageContext) -> None:
        """Check all that it is told before the study's first stage."""

    def datasets(self, context: StageContext) -> list[Manifest]:
        """Return the datasets that its result depends on."""

    def files(self, context: StageContext) -> list[Path]:
        """Return the files that its result depends on."""

    def __call__(self, context: StageContext) -> None:
        """Do the work."""


def installed_stage(stage: str) -> InstalledStage:
    """Return the stage `search`, `train` or `validate` that an installed package offers.

    Raises:
        UserError: No package does.
    """
    found = packaged(GROUP)
    if stage not in found:
        raise UserError(
            f"no package offers the stage {stage!r}; install vlmadapters, or drop the "
            f"table [{stage}] from the study"
        )
    made: InstalledStage = found[stage].load()
    return made


def _report_inputs(context: StageContext) -> dict[str, Any]:
    run = context.run
    files = [
        run.scores,
        run.choice,
        run.search,
        run.validation,
        run.provenance,
        run.study,  # which is shown
        *sorted(run.folder.glob("validation*.csv")),
    ]
    return {
        "files": {path.name: file_mark(path) for path in files},
        "report": context.study.report.model_dump(),
        "title": context.study.title,
        # The report tells results that the study no longer asks for.
        "asked": [context.study.search is not None, context.study.validate_ is not None],
        "version": version("vlm-layers"),
    }


def _report(context: StageContext) -> None:
    from vlmlayers.report import write_report

    part = context.study.report
    title = part.title or context.study.title
    context.run.record(report={"title": title, "note": part.note})
    path = write_report(
        context.run.folder,
        title=title,
        note=part.note,
        formats=part.formats,
        metrics=part.metrics,
    )
    context.echo(f"report   {path}")


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            "extract",
            _extract_inputs,
            _extract,
            lambda c: [c.run.features / data.folder for data in c.datasets],
            unchanged=_keep_given,
        ),
        Stage("score", _score_inputs, _score, lambda c: [c.run.scores]),
        Stage(
            "search",
            _search_inputs,
            _installed("search"),
            lambda c: [c.run.search],
            # The backbone is what is adapted; an adapted model is there to be measured.
            wanted=lambda c: c.study.search is not None and not c.part.adapter,
        ),
        Stage("select", _select_inputs, _select, lambda c: [c.run.choice]),
        Stage(
            "train",
            _train_inputs,
            _installed("train"),
            lambda c: [c.run.results],
            wanted=lambda c: bool(c.study.train) and not c.part.adapter,
        ),
        Stage(
            "validate",
            _validate_inputs,
            _installed("validate", "validate training at the chosen placement and its competitors"),
            lambda c: [c.run.validation],
            wanted=lambda c: c.study.validate_ is not None and not c.part.adapter,
        ),
        Stage(
            "report", _report_inputs, _report, lambda c: [c.run.report, c.run.folder / "report.md"]
        ),
    )
}
