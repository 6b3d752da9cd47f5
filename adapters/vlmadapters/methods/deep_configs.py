"""Settings of the methods that act inside blocks of both towers; they import no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from vlmadapters.methods.config import MethodConfig
from vlmadapters.methods.configs import blocks_to
from vlmadapters.methods.descriptions import described_in, with_hash
from vlmlayers.arguments import Count, NotNegative, Positive, Share, Takes, checked
from vlmlayers.errors import UserError
from vlmlayers.prompts import Template

Matrix = Literal["q", "k", "v", "o"]


@dataclass(frozen=True)
class TwoTowerConfig(MethodConfig):
    """What methods that act in both towers have in common: they need a block in one of them.

    Raises:
        UserError: There is no block in either tower.
    """

    towers: ClassVar[tuple[str, ...]] = ("vision", "text")
    depth_share: ClassVar[float] = 1.0  # share of each tower's blocks in the published placement

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.vision and not self.text:
            raise UserError(f"{self.name} has no block in either tower; name at least one")

    @classmethod
    def published(cls, depths: Mapping[str, int], **options: Any) -> Self:
        """Act in the blocks of both towers from 1 on, to the published share of their depths."""
        placed = cls.placed_in(depths)
        vision, text = (
            blocks_to(max(1, round(cls.depth_share * placed[tower]))) for tower in cls.towers
        )
        return cls(vision, text, **options)


@checked
@dataclass(frozen=True)
class IVLPConfig(TwoTowerConfig):
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
    unstored: ClassVar[tuple[str, ...]] = ("words",)


@checked
@dataclass(frozen=True)
class PromptSRCConfig(IVLPConfig):
    """Settings of PromptSRC, in addition to those of `IVLPConfig`.

    Attributes:
        vision_length: Prompts per vision block.
        text_length: Prompts per text block.
        text_weight: Weight of the distance of class features to the frozen ones.
        image_weight: Weight of the distance of image features to the frozen ones.
        templates: Templates over which frozen class features are averaged; empty takes the 60
            published ones.
        centre: Epoch that weighs most in the mean of the prompts, counted from 1; an amount with
            other epochs leaves it where it is, so that epochs long after it weigh nothing.
        spread: Standard deviation of the weights, in epochs.
    """

    vision_length: Count = 4
    text_length: Count = 4
    text_weight: NotNegative = 25.0
    image_weight: NotNegative = 10.0
    templates: tuple[Template, ...] = ()
    centre: float = 15.0
    spread: Positive = 1.0

    name: ClassVar[str] = "promptsrc"
    title: ClassVar[str] = "PromptSRC"
    depth_share: ClassVar[float] = 0.75  # 9 blocks of 12


@checked
@dataclass(frozen=True)
class MaPLeConfig(TwoTowerConfig):
    """Settings of MaPLe: text prompts at blocks, from which vision prompts are projected.

    Attributes:
        vision: Vision blocks that get new prompts, counted from 1, rising. Each is projected from
            the text prompts of the same number.
        text: Text blocks that get new prompts, counted from 1, rising.
        length: Prompts per block.
        words: Words before the class name, whose first `length` tokens the prompts replace and
            those of block 1 start from; empty for random ones.
    """

    length: Count = 2
    words: str = "a photo of a"

    name: ClassVar[str] = "maple"
    title: ClassVar[str] = "MaPLe"
    depth_share: ClassVar[float] = 0.75  # 9 blocks of 12
    unstored: ClassVar[tuple[str, ...]] = ("text", "words")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.vision:
            raise UserError(
                "maple projects text prompts into the vision tower; name vision blocks, or take "
                "ivlp for prompts in the text tower alone"
            )

    @classmethod
    def placed_in(cls, depths: Mapping[str, int]) -> Mapping[str, int]:
        """Return the depth of the shallower tower for both."""
        # A vision prompt is projected from its block's text prompt.
        return dict.fromkeys(depths, min(depths.values()))


@checked
@dataclass(frozen=True)
class CLIPLoRAConfig(TwoTowerConfig):
    """Settings of CLIP-LoRA.

    Attributes:
        vision: Vision blocks whose attention is changed, counted from 1, rising.
        text: Text blocks whose attention is changed, counted from 1, rising.
        rank: Rank of a change.
        alpha: A change is scaled by alpha / √rank.
        dropout: Dropout probability on the input of a change, in training.
        matrices: Projections that are changed: queries `q`, keys `k`, values `v`, output `o`.
        as_published: Do as the public code at a dropout of 0, which passes no gradient down
            through the changes, so that the gradients of lower blocks are wrong.

    Raises:
        UserError: There is no block or no matrix, a matrix stands twice, or all is dropped.
    """

    rank: Count = 2
    alpha: Positive = 1.0
    dropout: Share = 0.25
    matrices: tuple[Matrix, ...] = ("q", "k", "v")
    as_published: bool = False

    name: ClassVar[str] = "cliplora"
    title: ClassVar[str] = "CLIP-LoRA"
    # A constant of the public code. OpenAI's models have exp(logit scale) = 100 too, others not.
    own_scale: ClassVar[float] = 100.0
    mergeable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.matrices or len(set(self.matrices)) < len(self.matrices):
            raise UserError(
                f"matrices is {', '.join(self.matrices) or 'empty'}; name some of "
                f"{', '.join(get_args(Matrix))}, each once"
            )
        # In one order: initial values are drawn in it, so that equal sets start equal.
        object.__setattr__(self, "matrices", self.ordered(self.matrices))
        if self.dropout == 1:
            raise UserError("dropout is 1, which drops all that is learned; lower it")

    @staticmethod
    def ordered(matrices: Collection[str]) -> tuple[str, ...]:
        """Return matrices in the order q, k, v, o."""
        return tuple(one for one in get_args(Matrix) if one in matrices)


@checked
@dataclass(frozen=True)
class LwEIBConfig(TwoTowerConfig):
    """Settings of LwEIB.

    Attributes:
        vision: Vision blocks with convolutions, counted from 1, rising.
        text: Text blocks with convolutions, counted from 1, rising.
        alpha: Weight of a convolution's output beside its input.
        factor: Factor on alpha in a fast block.
        slow: Probability that a block is slow in a step.
        negatives: Other classes in a step, for each class of its images; -1 takes all.
        descriptions: JSON file, class name to descriptions, both as people write them; empty has
            some general sentences for every class. What the file held is kept as `FILE#hash`.

    Raises:
        UserError: There is no block, or the file cannot be read, is no such JSON, or has changed.
    """

    alpha: Positive = 0.025
    factor: Positive = 2.5
    slow: Share = 0.8
    negatives: Annotated[int, Takes(least=-1)] = 7
    descriptions: str = ""

    name: ClassVar[str] = "lweib"
    title: ClassVar[str] = "LwEIB"
    unstored: ClassVar[tuple[str, ...]] = ("alpha", "descriptions")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.descriptions:
            object.__setattr__(self, "descriptions", with_hash(self.descriptions))

    @property
    def files(self) -> tuple[Path, ...]:
        """The file of descriptions, where there is one."""
        return (described_in(self.descriptions),) if self.descriptions else ()


@checked
@dataclass(frozen=True)
class RPOConfig(TwoTowerConfig):
    """Settings of RPO: prompts that read the frozen tokens of both towers and change none.

    Attributes:
        vision: Vision blocks at which the prompts read, counted from 1, rising.
        text: Text blocks at which they read, counted from 1, rising.
        pairs: Pairs of an image and a text prompt.
        as_published: Keep underscores of class names, as the public code does.
    """

    pairs: Count = 24
    as_published: bool = False

    name: ClassVar[str] = "rpo"
    title: ClassVar[str] = "RPO"
    unstored: ClassVar[tuple[str, ...]] = ("vision", "text", "as_published")

    def __post_init__(self) -> None:
        super().__post_init__()
        for tower in self.towers:
            if not getattr(self, tower):
                raise UserError(
                    f"rpo has no {tower} block; its prompts read in both towers: name one in each"
                )
