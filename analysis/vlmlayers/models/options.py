"""The options of an extraction, handed on as one value."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from vlmlayers.arguments import PRECISIONS, Count, Natural, Takes, checked
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.manifests import Item, Manifest
from vlmlayers.models.decoding import DECODINGS
from vlmlayers.models.own_data import own_data
from vlmlayers.positions import POOLINGS, TOKENS, TOWERS

TEXTS = ("prompts", "captions")


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


Dataset = Annotated[Any, Takes("a dataset's name, path or Manifest", convert=dataset_of)]


@checked
@dataclass(frozen=True)
class ExtractOptions:
    """The keyword arguments that `extract` and `stream` share; `extract` says what each means.

    Raises:
        UserError: A precision, kind of text, batch size or tower is none, or an option does not
            apply to the others.
    """

    items: Count | Sequence[Item] | None = None
    root: str | Path | None = None
    spaces: Sequence[str] = ("native", "joint")
    pooling: str | Mapping[str, str] | None = None
    batch_size: Count = 64
    workers: Natural | None = None
    precision: str = "fp32"
    decoding: str = "full"
    text: str = "prompts"
    template: str | None = None
    seed: Natural = 0
    tower: str | None = None
    texts: Sequence[str] | None = None
    present_only: bool = False
    skip_unreadable: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        check_one_of("precision", self.precision, PRECISIONS)
        check_one_of("decoding", self.decoding, DECODINGS)
        check_one_of("text", self.text, TEXTS)
        if self.tower is not None:
            check_one_of("tower", self.tower, TOWERS)
        if self.template is not None and self.text == "captions":
            raise UserError("template makes prompts of class names; text='captions' has none")
        if self.seed and not isinstance(self.items, int):
            raise UserError("seed draws items; it needs items as a number (--items)")
        if self.texts is not None and self.template is not None:
            raise UserError("template makes prompts of class names; texts are given as they are")
        if isinstance(self.pooling, Mapping):
            for name in self.pooling:
                check_one_of("tower", name, TOWERS, where="pooling")
        for pooling in filter(None, map(self.pooling_of, TOWERS)):
            check_one_of("pooling", pooling, (*POOLINGS, TOKENS))

    @property
    def place(self) -> Path | None:
        """The data root as a path."""
        return None if self.root is None else Path(self.root)

    def pooling_of(self, tower: str) -> str | None:
        """Return the pooling asked for one tower, None for the tower's own."""
        if self.pooling is None or isinstance(self.pooling, str):
            return self.pooling
        return self.pooling.get(tower)
