"""The stage `search` of a study: amount and placement, from training shots alone.

Each function takes the `StageContext` of the study; what is wrong in the table is a `UserError`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from vlmadapters.cli.method_part import MethodPart
from vlmlayers.errors import check_one_of
from vlmlayers.manifests import Manifest
from vlmlayers.options import Several, validated
from vlmlayers.placement import Amount, Placement


class SearchPart(MethodPart):
    """The table `[search]`; what is not named is as in `vlmadapters.search`.

    Attributes:
        budget: Largest cost, in multiples of one full training; all where absent.
        placement: Placements to try beside the default.
        amounts: Amounts to try, such as `scale=0.3,epochs=15`.
        criterion: What decides, of what is held out.
        folds: Folds of each draw.
        novel: Hold out half of the base classes whole as well.
    """

    budget: float | None = Field(None, gt=0)
    placement: Several[str] | None = None
    amounts: Several[str] | None = None
    criterion: str | None = None
    folds: int | None = Field(None, ge=2)
    novel: bool | None = None


def check(context: Any) -> None:
    """Check the table `[search]`, its recipe and its datasets, before the study's first stage."""
    from vlmadapters.validation.judge import CRITERIA

    part = _part(context)
    if part.criterion is not None:
        check_one_of("criterion", part.criterion, CRITERIA, where="[search]")
    for one in part.placement or ():
        Placement.parse(one)
    for one in part.amounts or ():
        Amount.parse(one)
    part.read_recipe(context)
    datasets(context)


def datasets(context: Any) -> list[Manifest]:
    """Return the datasets to search on; the stage is run again where one of them has changed."""
    return _part(context).manifests(context)


def files(context: Any) -> list[Path]:
    """Return the file of the recipe; the stage is run again where it has changed."""
    return _part(context).files(context)


def search(context: Any) -> None:
    """Search amount and placement; write `search.csv` and `search.json` into the run folder."""
    from vlmadapters.validation import search as library
    from vlmadapters.validation.candidates import scaled

    part = _part(context)
    model = context.load_model()
    depths = {name: tower.depth for name, tower in model.towers.items()}
    found = library.search(
        model,
        datasets(context),
        recipe=scaled(part.read_recipe(context, model.name), depths),
        out=context.run.folder,
        root=context.data_root,
        progress=context.progress,
        **part.passed(context),
    )
    context.echo(f"search   {found.statement}")


def _part(context: Any) -> SearchPart:
    return validated(SearchPart, context.study.search or {}, "[search]")
