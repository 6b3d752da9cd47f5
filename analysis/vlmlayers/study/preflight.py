"""What can be wrong in a study is said before hours of work, not after them."""

from __future__ import annotations

from collections.abc import Sequence

from vlmlayers.architectures import check_model
from vlmlayers.errors import UserError
from vlmlayers.positions import TOWERS
from vlmlayers.study.context import StageContext
from vlmlayers.study.schema import Study
from vlmlayers.study.stages import installed_stage
from vlmlayers.user_code import is_user_code

# What metrics need, of the keys of `vlmlayers.metrics.declare.NEEDS`.
OF_DATASETS = ("datasets", "dataset confusion", "styles", "style classes", "other datasets")
OF_TOWERS = ("pairs", "pair matrix", "prompts", "modalities", "queries")


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
    if "score" in picked or "select" in picked:
        _check_names(contexts[0], both={"score", "select"} <= set(picked))
    study = contexts[0].study
    tables = {"search": study.search, "train": study.train or None, "validate": study.validate_}
    for stage, table in tables.items():
        if stage in picked and table is not None:
            installed_stage(stage).check(contexts[0])


def _check_names(context: StageContext, *, both: bool) -> None:
    """Check files of the user's own and, where both stages run, that scored is what is read."""
    from vlmlayers.selection.making import make_rule

    own = [name for name in context.metrics if is_user_code(name)]
    scored = set(context.metrics) - set(own)
    if own:
        from vlmlayers.scores.run import chosen_metrics

        scored |= set(chosen_metrics(own))
    rule, tower = context.study.select, context.study.extract.tower
    read = make_rule(context.rule, rule.options).reads([tower] if tower else TOWERS)
    for name in read if both else ():
        if name not in scored:
            what = "which the study does not score; add it to the metrics of [score]"
        elif needed := _out_of_reach(name, context.study):
            what = f"which needs {needed}"
        else:
            continue
        raise UserError(
            f"the rule {rule.rule!r} reads {name}, {what}, or choose another in the options of "
            "[select]"
        )


def _out_of_reach(metric: str, study: Study) -> str:
    """Return what a metric needs and a study does not have, empty where it has it."""
    from vlmlayers.metrics import METRICS

    needs = METRICS[metric].needs if metric in METRICS else ""
    if needs in OF_DATASETS and len(study.datasets) < 2:
        return "at least two datasets, where the study has one; add one"
    if needs in OF_TOWERS and study.extract.tower:
        return f"both towers, where the study records the {study.extract.tower} tower; record both"
    return ""
