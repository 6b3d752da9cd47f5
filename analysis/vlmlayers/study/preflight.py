"""What can be wrong in a study is said before hours of work, not after them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlmlayers.architectures import MINIATURES, architectures, check_model
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.manifests import Manifest
from vlmlayers.prompts import EXAMINED, PROMPTED, UNTOLD
from vlmlayers.study.context import StageContext, attacher
from vlmlayers.study.schema import check_reads
from vlmlayers.study.scoring import needs_model
from vlmlayers.study.stages import installed_stage
from vlmlayers.user_code import is_user_code

_MIXED = ("table", "huggingface", "shards")  # layouts that may lack classes or captions
_CLASSES = ("coop", "folder", "lists")  # layouts that never have captions


def check_before(contexts: Sequence[StageContext], picked: Sequence[str]) -> None:
    """Check datasets, models, rule and the tables of stages that train, without a model.

    Args:
        contexts: One per model.
        picked: Stages that will run.

    Raises:
        UserError: A dataset, a model or its file, the rule's file or a key of `validate` is wrong.
    """
    _ = contexts[0].manifests  # unknown ones and two of one name are refused
    for context in contexts:
        if "extract" in picked:
            check_model(**context.model_arguments())
            if adapted := context.adapter_arguments():
                attacher(adapted["adapter"]).check(adapted.get("method"))
            _check_texts(context)
    if "score" in picked or "select" in picked:
        _check_names(contexts[0], picked)
    study = contexts[0].study
    tables = {"search": study.search, "train": study.train or None, "validate": study.validate_}
    if "score" in picked and any(map(needs_model, study.score.metrics)):
        for manifest in captioned(contexts[0].manifests, contexts[0].data_root):
            manifest.require_classes(EXAMINED, contexts[0].data_root)
    for stage, table in tables.items():
        if stage in picked and table is not None:
            installed_stage(stage).check(contexts[0])


def captioned(manifests: Sequence[Manifest], root: Path | None) -> list[Manifest]:
    """Return the datasets that are known to have no classes before their images are looked for."""
    return [one for one in manifests if one.spec.classes == 0 or _has_no_classes(one, root)]


def _has_no_classes(manifest: Manifest, root: Path | None) -> bool:
    try:
        return manifest.layout not in _CLASSES and not manifest.class_names(root)
    except UserError:
        return False  # which is said where the items are read


def _has_no_captions(manifest: Manifest, split: str, root: Path | None) -> bool:
    try:
        return manifest.layout in _CLASSES or (
            manifest.layout in _MIXED
            and not any(item.captions for item in manifest.items(split, root))
        )
    except UserError:
        return False


def _check_texts(context: StageContext) -> None:
    """Check that there are classes where prompts are made of them, and captions where these are.

    The text tower of other models is known once they are loaded.
    """
    name, study = context.model_arguments()["name"], context.study
    if study.extract.tower == "vision" or name not in (*MINIATURES, *architectures()):
        return
    for manifest, part in zip(context.manifests, study.datasets):
        asked, root = study.part(part), context.data_root
        if asked["text"] == "prompts" and captioned([manifest], root):
            manifest.require_classes(PROMPTED, root)
        if asked["text"] == "captions" and _has_no_captions(manifest, asked["split"], root):
            raise UserError(f"{manifest.name} {UNTOLD}")


def _check_names(context: StageContext, picked: Sequence[str]) -> None:
    """Check files of the user's own and, of stages that run, that scored is what is read."""
    from vlmlayers.selection.making import make_rule

    own = [name for name in context.metrics if is_user_code(name)]
    scored = set(context.metrics) - set(own)
    if own:
        from vlmlayers.scores.run import chosen_metrics

        scored |= set(chosen_metrics(own))
    rule = make_rule(context.rule, context.study.select.options)
    if {"score", "select"} <= {*picked}:
        check_reads(context.study, rule, scored)
    if {"score", "report"} <= {*picked}:
        where = "[report], which draws what [score] has"
        for name in context.study.report.metrics:
            check_one_of("metric", name, sorted(scored), where)
