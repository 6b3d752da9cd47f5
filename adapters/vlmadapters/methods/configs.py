"""Settings of the methods that ship, beside MMA's; they import no torch, so that a command line can
check them at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from vlmadapters.methods.config import MethodConfig
from vlmlayers.arguments import Count, checked
from vlmlayers.errors import UserError


def blocks_to(depth: int) -> tuple[int, ...]:
    """Return the blocks from 1 on."""
    return tuple(range(1, depth + 1))


@checked
@dataclass(frozen=True)
class IVLPConfig(MethodConfig):
    """Settings of IVLP: free prompts at blocks of either tower.

    Without text blocks it is the vision-only control of the same authors (VPT), without vision
    blocks their text-only one.

    Attributes:
        vision: Vision blocks that get new prompts, counted from 1, rising.
        text: Text blocks that get new prompts, counted from 1, rising.
        vision_length: Prompts per vision block.
        text_length: Prompts per text block.
        words: Words before the class name, whose first `text_length` tokens the prompts replace
            and those of block 1 start from; empty for random ones.
    """

    vision_length: Count = 2
    text_length: Count = 2
    words: str = "a photo of a"

    name: ClassVar[str] = "ivlp"
    title: ClassVar[str] = "IVLP"
    towers: ClassVar[tuple[str, ...]] = ("vision", "text")
    extensions: ClassVar[str] = (
        "sets that leave out block 1 or have gaps; published are blocks 1 to a depth of each tower"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.vision and not self.text:
            raise UserError(f"{self.name} has no block in either tower; name at least one")

    @classmethod
    def published(cls, depths: Mapping[str, int], **options: Any) -> Self:
        """Put prompts into every block of both towers, as published."""
        return cls(blocks_to(depths["vision"]), blocks_to(depths["text"]), **options)
