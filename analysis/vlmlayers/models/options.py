"""The options of an extraction, handed on as one value."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from vlmlayers.arguments import Count, Takes, taken
from vlmlayers.extraction import RecordOptions
from vlmlayers.manifests import Item, Manifest
from vlmlayers.models.own_data import own_data
from vlmlayers.prompts import Template


def dataset_of(given: Any) -> Any:
    """Return the manifest of a name or path; a manifest, or what does as much, as it is.

    Other data in memory become what does as much; see `own_data`.
    """
    if isinstance(given, str | os.PathLike):
        return Manifest.load(given)
    return given if is_manifest(given) else own_data(given)


def is_manifest(given: Any) -> bool:
    """Whether data are a manifest, or do what one does."""
    return hasattr(given, "class_names") and hasattr(given, "open_image")


def _items(given: Any) -> Any:
    return taken("extract", "items", Items | None, given)


Items = Count | Sequence[Annotated[Item, Takes("an item", "items of the dataset")]]
Dataset = Annotated[Any, Takes("a dataset's name, path or Manifest", convert=dataset_of)]


class ExtractOptions(RecordOptions):
    """The keyword arguments that `extract` and `stream` share; `extract` says what each means.

    Raises:
        UserError: An option does not apply to the others.
    """

    items: Annotated[Any, BeforeValidator(_items)] = None
    root: Path | None = None
    template: Template | None = None
    seed: int = Field(default=0, ge=0)
    texts: Sequence[str] | None = None
    progress: bool = True

    def idle(self) -> Iterator[tuple[str, str]]:
        """Yield what makes prompts where there are none, and a seed without a draw."""
        yield from super().idle()
        if self.tower == "vision":
            yield "template", "makes prompts; tower='vision' records no texts"
            yield "texts", "are for the text tower; tower='vision' records no texts"
        if self.text == "captions":
            yield "template", "makes prompts of class names; text='captions' has none"
        if self.texts is not None:
            yield "template", "makes prompts of class names; texts are given as they are"
        if not isinstance(self.items, int):
            yield "seed", "draws items; it needs items as a number (--items)"
