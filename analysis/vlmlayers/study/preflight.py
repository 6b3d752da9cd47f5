"""What can be wrong in a study is said before hours of work, not after them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from vlmlayers.errors import UserError, check_one_of
from vlmlayers.files import WEIGHT_SUFFIXES
from vlmlayers.study.context import StageContext
from vlmlayers.study.stages import stage_entry
from vlmlayers.user_code import is_user_code


def check_before(contexts: Sequence[StageContext], picked: Sequence[str]) -> None:
    """Check datasets, models, rule and the tables of stages that train, without a model.

    A package that offers one of these stages may have a function `check` beside it, which gets
    the context.

    Args:
        contexts: One per model.
        picked: Stages that will run.

    Raises:
        UserError: A dataset, a model or its file, the rule's file or a key of `validate` is wrong.
    """
    _ = contexts[0].manifests  # unknown ones and two of one name are refused
    for context in contexts:
        if "extract" in picked:
            _check_model(context)
    if "score" in picked or "select" in picked:
        _check_own_code(contexts[0])
    if "search" in picked and contexts[0].study.search is not None:
        _check_stage(contexts[0], "search")
    if "train" in picked and contexts[0].study.train:
        _check_stage(contexts[0], "train")
    if "validate" in picked and contexts[0].study.validate_ is not None:
        _check_stage(contexts[0], "validate")


def _check_model(context: StageContext) -> None:
    arguments, name = context.model_arguments(), context.part.name
    if name and not Path(name).is_dir():
        check_one_of("model", name, _known())
    for key in ("config", "checkpoint"):
        if key in arguments and not Path(arguments[key]).is_file():
            raise UserError(f"{key} {arguments[key]} of model {context.part.title} does not exist")
    weights = Path(arguments.get("pretrained", "."))
    if (weights.suffix in WEIGHT_SUFFIXES or len(weights.parts) > 1) and not weights.is_file():
        raise UserError(f"pretrained {weights} of model {context.part.title} does not exist")


def _known() -> list[str]:
    if "open_clip" in sys.modules:  # it may have been given more architectures at run time
        from vlmlayers.models import list_models

        return [*list_models(), "local"]
    from vlmlayers.study.catalogue import names

    return [*names(), "mini-clip", "local"]


def _check_own_code(context: StageContext) -> None:
    own = [name for name in context.metrics if is_user_code(name)]
    if own:
        from vlmlayers.scores.run import chosen_metrics

        chosen_metrics(own)
    if is_user_code(context.rule):
        from vlmlayers.selection.chooser import make_rule

        make_rule(context.rule, context.study.select.options)


def _check_stage(context: StageContext, stage: str) -> None:
    check = getattr(import_module(stage_entry(stage).module), "check", None)
    if check is not None:
        check(context)
