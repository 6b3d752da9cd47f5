"""The stage `validate` of a study: training at its choice and elsewhere."""

from __future__ import annotations

from typing import Any

from vlmadapters.cli.stages import MethodPart, MethodStage
from vlmadapters.validation.options import ValidateOptions
from vlmlayers.words import counted


class ValidatePart(MethodPart, ValidateOptions):
    """The table `[validate]`."""


def _validate(context: Any, part: ValidatePart, given: dict[str, Any]) -> None:
    """Write `validation*` into the run folder."""
    from vlmadapters.validation.validate import validate as library

    found = library(choice=context.choice, scores=context.scores, seed=context.seed, **given)
    asked = part.model_dump(exclude_unset=True)
    if part.datasets is not None:  # a verb does not look for them under the data root
        asked["datasets"] = [context.dataset_name(name) for name in part.datasets]
    # That of the extraction, by which items were drawn, may have been another.
    context.run.record(validate={**asked, "seed": context.seed})
    placements = counted(found.table["placement"].nunique(), "placement")
    cells = f"{placements}, {counted(len(found.table), 'cell')}"
    context.echo(f"validate {cells}: {found.verdict}")


validate = MethodStage("validate", ValidatePart, ValidateOptions, _validate)
