"""The options of an extraction, handed on as one value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmlayers.arguments import PRECISIONS
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.positions import TOWERS

TEXTS = ("prompts", "captions")


@dataclass(frozen=True)
class ExtractOptions:
    """The keyword arguments that `extract` and `stream` share; `extract` says what each means.

    Raises:
        UserError: A precision, kind of text, batch size or tower is none.
    """

    items: int | Sequence[Any] | None = None
    root: str | Path | None = None
    spaces: Sequence[str] = ("native", "joint")
    pooling: str | Mapping[str, str] | None = None
    batch_size: int = 64
    workers: int = 0
    precision: str = "fp32"
    text: str = "prompts"
    template: str | None = None
    seed: int = 0
    present_only: bool = False
    skip_unreadable: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        check_one_of("precision", self.precision, PRECISIONS)
        check_one_of("text", self.text, TEXTS)
        if self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}; it has to be at least 1")
        if isinstance(self.pooling, Mapping):
            for name in self.pooling:
                check_one_of("tower", name, TOWERS, where="pooling")

    @property
    def place(self) -> Path | None:
        """The data root as a path."""
        return None if self.root is None else Path(self.root)

    def pooling_of(self, tower: str) -> str | None:
        """Return the pooling asked for one tower, None for the tower's own."""
        if self.pooling is None or isinstance(self.pooling, str):
            return self.pooling
        return self.pooling.get(tower)
