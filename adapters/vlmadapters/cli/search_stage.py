"""The stage `search` of a study: amount and placement, from training shots alone."""

from __future__ import annotations

from typing import Any

from vlmadapters.cli.stages import MethodPart, MethodStage
from vlmadapters.validation.options import SearchOptions


class SearchPart(MethodPart, SearchOptions):
    """The table `[search]`."""


def _search(context: Any, part: SearchPart, given: dict[str, Any]) -> None:
    """Write `search.csv` and `search.json` into the run folder."""
    from vlmadapters.validation.search import search as library

    found = library(**given)
    context.echo(f"search   {found.statement}")


search = MethodStage("search", SearchPart, SearchOptions, _search)
