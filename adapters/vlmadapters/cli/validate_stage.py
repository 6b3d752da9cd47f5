"""The stage `validate` of a study.

Each function takes the `StageContext` of the study; what is wrong in the table is a `UserError`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from vlmadapters.cli.method_part import MethodPart
from vlmlayers.manifests import Manifest
from vlmlayers.options import Several, validated
from vlmlayers.placement import Amount


class ValidatePart(MethodPart):
    """The table `[validate]`; what is not named is as in `vlmadapters.validate`.

    Attributes:
        kinds: Competitors.
        amount: `tuned`, each placement at its own amount, or `given`, all at the recipe's.
        amounts: Amounts that tuning tries beside the recipe's, such as `scale=0.3`.
        folds: Folds that amounts are tuned on.
        reference: Kind that the verdict compares with.
        random_count: Random placements of equal size.
        limit: Use at most so many test items of each dataset; 0 uses all.
    """

    kinds: Several[str] | None = None
    amount: Literal["tuned", "given"] | None = None
    amounts: Several[str] | None = None
    folds: int | None = Field(None, ge=2)
    reference: str | None = None
    random_count: int | None = Field(None, ge=0)
    limit: int | None = Field(None, ge=0)


def check(context: Any) -> None:
    """Check the table `[validate]`, its recipe and its datasets, before the study's first stage."""
    part = _part(context)
    for one in part.amounts or ():
        Amount.parse(one)
    part.read_recipe(context)
    datasets(context)


def datasets(context: Any) -> list[Manifest]:
    """Return the datasets to train on; the stage is run again where one of them has changed."""
    return _part(context).manifests(context)


def files(context: Any) -> list[Path]:
    """Return the file of the recipe; the stage is run again where it has changed."""
    return _part(context).files(context)


def validate(context: Any) -> None:
    """Train at the choice of a run and at its competitors; write `validation*` into its folder."""
    from vlmadapters.validation import validate as library

    part = _part(context)
    model = context.load_model()
    found = library.validate(
        model,
        context.choice,
        datasets(context),
        scores=context.scores,
        recipe=part.read_recipe(context, model.name),
        out=context.run.folder,
        root=context.data_root,
        seed=context.seed,
        progress=context.progress,
        notes={"chosen_on": _chosen_on(context)},
        **part.passed(context),
    )
    context.run.record(validate=part.model_dump(exclude_unset=True))
    cells = f"{found.table['placement'].nunique()} placements, {len(found.table)} cells"
    context.echo(f"validate {cells}: {found.verdict}")


def _part(context: Any) -> ValidatePart:
    return validated(ValidatePart, context.options, "[validate]")


def _chosen_on(context: Any) -> dict[str, str]:
    """Return the split that each dataset was analysed on: a choice made on test images says so."""
    return {data.manifest.name: str(data.options["split"]) for data in context.datasets}
