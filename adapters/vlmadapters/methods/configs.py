"""Settings of the methods that ship, beside MMA's; they import no torch, so that a command line can
check them at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from vlmadapters.data.prompts import class_prompts
from vlmadapters.methods.config import MethodConfig
from vlmlayers.arguments import Count, Takes, checked
from vlmlayers.errors import UserError
from vlmlayers.files import checksum

PLACEHOLDER = "X"
Weight = Annotated[float, Takes(least=0)]
ClassAt = Literal["end", "middle", "front"]
Matrix = Literal["q", "k", "v", "o"]


def split_words(text: str) -> list[str]:
    """Return the words that a context starts from, underscores as spaces."""
    return text.replace("_", " ").split()


def blocks_to(depth: int) -> tuple[int, ...]:
    """Return the blocks from 1 on."""
    return tuple(range(1, depth + 1))


def check_templates(templates: tuple[str, ...]) -> None:
    """Raise a UserError where a template has no `{}`."""
    for template in templates:
        class_prompts([], template)


@dataclass(frozen=True)
class TextConfig(MethodConfig):
    """What methods that learn context for class prompts have in common: where they put it.

    Attributes:
        vision: No block.
        text: Text blocks at whose input the context is put, counted from 1, rising.

    Raises:
        UserError: A vision block is named, or no text block.
    """

    text: tuple[int, ...] = (1,)

    towers: ClassVar[tuple[str, ...]] = ("text",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.text:
            raise UserError(f"{self.name} has no text block to put context at; name at least one")

    @property
    def size(self) -> str:
        """How much is learned at a block, in words."""
        raise NotImplementedError


@dataclass(frozen=True)
class WordsConfig(MethodConfig):
    """Settings of context that may start from words.

    Attributes:
        words: Words that the context starts from, underscores as spaces; empty for a random start.
        length: Number of context words; 0 takes one for each of `words`, and 16 without words.

    Raises:
        UserError: `length` is another than the number of words.
    """

    words: str = "a photo of a"
    length: Annotated[int, Takes(least=0)] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        count = len(split_words(self.words))
        if count and self.length not in (0, count):
            raise UserError(
                f"the context starts from {count} words ({self.words!r}), and length is "
                f"{self.length}; leave length out, or set words to nothing for a random start"
            )

    @property
    def start_words(self) -> list[str]:
        """The words that stand in the token ids where the context will be."""
        return split_words(self.words) or [PLACEHOLDER] * (self.length or 16)


@dataclass(frozen=True)
class ContextConfig(TextConfig, WordsConfig):
    """Settings of context at text blocks that may start from words: both of their fields."""

    @property
    def class_at(self) -> str:
        """Where the class name stands in the prompt."""
        return "end"

    @property
    def size(self) -> str:
        """How much is learned at a block, in words."""
        each = " for each class" if self.class_bound else ""
        return f"{len(self.start_words)} context words{each}"


@checked
@dataclass(frozen=True)
class CoOpConfig(ContextConfig):
    """Settings of CoOp, beside those of `ContextConfig`.

    Attributes:
        class_specific: Learn a context for each class instead of one for all.
        class_at: Where the class name stands in the prompt: `end`, `middle` or `front`.
        as_published: Do as the public code does, which ignores `class_specific` beside words.
    """

    class_specific: bool = False
    class_at: ClassAt = "end"
    as_published: bool = False

    name: ClassVar[str] = "coop"
    title: ClassVar[str] = "CoOp"

    def __post_init__(self) -> None:
        super().__post_init__()
        # The public code loads the one set of words for all classes and never looks at the option.
        if self.as_published and split_words(self.words):
            object.__setattr__(self, "class_specific", False)

    @property
    def class_bound(self) -> bool:
        """Whether a context is learned for each class."""
        return self.class_specific


@checked
@dataclass(frozen=True)
class CoCoOpConfig(ContextConfig):
    """Settings of CoCoOp: those of `ContextConfig`."""

    name: ClassVar[str] = "cocoop"
    title: ClassVar[str] = "CoCoOp"


@checked
@dataclass(frozen=True)
class KgCoOpConfig(CoOpConfig):
    """Settings of KgCoOp, beside those of `CoOpConfig`.

    Attributes:
        weight: Weight of the distance to the hand-made prompts.
        as_published: Do as the public code does, which reads every choice of words as "a photo of
            a", ignores `class_specific` beside words, and `class_at`.
    """

    weight: Weight = 8.0

    name: ClassVar[str] = "kgcoop"
    title: ClassVar[str] = "KgCoOp"

    def __post_init__(self) -> None:
        if self.as_published:
            object.__setattr__(self, "class_at", "end")
            if split_words(self.words):
                object.__setattr__(self, "words", ContextConfig.words)
        super().__post_init__()


OtherNames = Literal["none", "text", "virtual"]


@checked
@dataclass(frozen=True)
class LASPConfig(WordsConfig):
    """Settings of LASP, beside those of `WordsConfig`.

    Attributes:
        vision: Vision blocks whose two norms are tuned, counted from 1, rising.
        text: No block: the context stands before the first.
        correction: Learn a vector that is added to the features of all classes.
        weight: Weight of the text-to-text loss; 0 leaves it out.
        templates: Hand-made prompts of that loss, a `{}` in each; empty takes the 35 published.
        other_names: Where names of the dataset's other classes are used: nowhere, in the
            text-to-text loss, or as virtual classes in the cross-entropy too (LASP-V).
        as_published: With virtual classes, let them compete at tests as well, as the public code
            does; no other method is tested so.

    Raises:
        UserError: A template has no `{}`.
    """

    correction: bool = True
    weight: Weight = 5.0
    templates: tuple[str, ...] = ()
    other_names: OtherNames = "text"
    as_published: bool = False

    name: ClassVar[str] = "lasp"
    title: ClassVar[str] = "LASP"
    towers: ClassVar[tuple[str, ...]] = ("vision",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_templates(self.templates)

    @property
    def advantage(self) -> str:
        """Names of other classes of the dataset, unless these are used nowhere."""
        used = self.other_names == "virtual" or (self.other_names == "text" and self.weight)
        return "training sees the names of the untrained classes, as published" if used else ""

    @classmethod
    def published(cls, depths: Mapping[str, int], **options: Any) -> Self:
        """Tune the norms of every vision block, as published."""
        return cls(blocks_to(depths["vision"]), **options)


@checked
@dataclass(frozen=True)
class ProDAConfig(TextConfig):
    """Settings of ProDA.

    Attributes:
        vision: No block.
        text: Text blocks at whose input the contexts are put, counted from 1, rising.
        prompts: Contexts that are learned: a quarter of them behind the class name, a quarter
            around it, half before it. A multiple of 4, or 1.
        group: Contexts that a step uses for the classes; it divides `prompts`.
        length: Words of a context.
        weight: Weight of the overlap of the prompts without a class.
        as_published: Do as the public code does, which leaves underscores in class names and
            places context as if they were spaces.

    Raises:
        UserError: The contexts do not fall into quarters, or not into groups.
    """

    prompts: Annotated[int, Takes(least=1)] = 32
    group: Annotated[int, Takes(least=1)] = 4
    length: Annotated[int, Takes(least=1)] = 16
    weight: Weight = 0.1
    as_published: bool = False

    name: ClassVar[str] = "proda"
    title: ClassVar[str] = "ProDA"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompts > 1 and self.prompts % 4:
            raise UserError(
                f"prompts is {self.prompts}; a quarter of them stands behind the class name, so "
                "that it must be a multiple of 4, or 1"
            )
        if self.prompts % self.group:
            raise UserError(
                f"group is {self.group}, which does not divide prompts ({self.prompts}); a pass "
                "over all prompts takes whole groups"
            )

    @property
    def size(self) -> str:
        """How much is learned at a block, in words."""
        return f"{self.prompts} contexts of {self.length} words"


Share = Annotated[float, Takes(least=0, most=1)]


@checked
@dataclass(frozen=True)
class TipConfig(MethodConfig):
    """Settings of Tip-Adapter.

    Attributes:
        alpha: Weight of the cache before the search.
        beta: Sharpness of the cache before the search.
        views: Augmented views of every item, of whose features the cache holds the mean.
        templates: Hand-made prompts, a `{}` in each, of whose features a class has the mean; empty
            takes the dataset's own one.
        search: Choose alpha and beta on few-shot items of the validation split, where there is one.
        alpha_end: End of the values tried for alpha, which is not reached.
        beta_end: The same for beta.
        alpha_steps: Number of values tried for alpha, from 0.1 on.
        beta_steps: The same for beta.

    Raises:
        UserError: A template has no `{}`.
    """

    alpha: Weight = 1.17
    beta: Weight = 1.0
    views: Count = 10
    templates: tuple[str, ...] = ()
    search: bool = True
    alpha_end: Weight = 3.0
    beta_end: Weight = 7.0
    alpha_steps: Count = 20
    beta_steps: Count = 200

    name: ClassVar[str] = "tip"
    title: ClassVar[str] = "Tip-Adapter"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_templates(self.templates)


@checked
@dataclass(frozen=True)
class TipFConfig(TipConfig):
    """Settings of Tip-Adapter-F, whose keys are trained: those of `TipConfig`."""

    name: ClassVar[str] = "tip-f"
    title: ClassVar[str] = "Tip-Adapter-F"


@checked
@dataclass(frozen=True)
class LinearProbeConfig(MethodConfig):
    """Settings of the linear probe.

    Attributes:
        inverse_penalties: Values of scikit-learn's `C` tried; the one with most hits on few-shot
            items of the validation split is taken, the first of equals, and the middle one where
            there are no such items.
        iterations: Iterations of its solver at most.

    Raises:
        UserError: There is no value to try, or one is not above 0.
    """

    inverse_penalties: tuple[float, ...] = (1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3, 1e4)
    iterations: Count = 1000

    name: ClassVar[str] = "linear-probe"
    title: ClassVar[str] = "linear probe"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.inverse_penalties or not all(0 < c < math.inf for c in self.inverse_penalties):
            raise UserError(
                f"inverse_penalties is {list(self.inverse_penalties)}; name one value or more, all "
                "above 0"
            )


@dataclass(frozen=True)
class TwoTowerConfig(MethodConfig):
    """What methods that act in both towers have in common: a block, and blocks from 1 on.

    Raises:
        UserError: There is no block in either tower.
    """

    towers: ClassVar[tuple[str, ...]] = ("vision", "text")
    depth_share: ClassVar[float] = 1.0  # how far down each tower the published placement goes

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.vision and not self.text:
            raise UserError(f"{self.name} has no block in either tower; name at least one")

    @classmethod
    def published(cls, depths: Mapping[str, int], **options: Any) -> Self:
        """Act in the blocks of both towers from 1 on, to the published share of their depths."""
        vision, text = (
            blocks_to(max(1, round(cls.depth_share * depths[tower]))) for tower in cls.towers
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


@checked
@dataclass(frozen=True)
class PromptSRCConfig(IVLPConfig):
    """Settings of PromptSRC, beside those of `IVLPConfig`.

    Attributes:
        vision_length: Prompts per vision block.
        text_length: Prompts per text block.
        text_weight: Weight of the distance of class features to the frozen ones.
        image_weight: Weight of the distance of image features to the frozen ones.
        templates: Templates over which frozen class features are averaged; empty takes the 60
            published ones.
        centre: Epoch that weighs most in the mean of the prompts, counted from 1.
        spread: Standard deviation of the weights, in epochs.
    """

    vision_length: Count = 4
    text_length: Count = 4
    text_weight: Weight = 25.0
    image_weight: Weight = 10.0
    templates: tuple[str, ...] = ()
    centre: float = 15.0
    spread: Annotated[float, Takes(above=0)] = 1.0

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

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.vision:
            raise UserError(
                "maple projects text prompts into the vision tower; name vision blocks, or take "
                "ivlp for prompts in the text tower alone"
            )

    @classmethod
    def published(cls, depths: Mapping[str, int], **options: Any) -> Self:
        """Put prompts into the first three quarters of the shallower tower: 9 blocks of 12."""
        blocks = blocks_to(max(1, round(0.75 * min(depths.values()))))
        return cls(blocks, blocks, **options)


@checked
@dataclass(frozen=True)
class CLIPLoRAConfig(TwoTowerConfig):
    """Settings of CLIP-LoRA.

    Attributes:
        vision: Vision blocks whose attention is changed, counted from 1, rising.
        text: Text blocks whose attention is changed, counted from 1, rising.
        rank: Rank of a change.
        alpha: A change is scaled by alpha / √rank.
        dropout: Chance that an input of a change is dropped in training.
        matrices: What is changed: maps to queries `q`, keys `k` and values `v`, and that of what
            they give, `o`.
        as_published: Do as the public code does at a dropout of 0: it hands no gradient down
            through the changes, so that those of lower blocks are wrong.

    Raises:
        UserError: There is no block or no matrix, a matrix stands twice, or all is dropped.
    """

    rank: Count = 2
    alpha: Annotated[float, Takes(above=0)] = 1.0
    dropout: Share = 0.25
    matrices: tuple[Matrix, ...] = ("q", "k", "v")
    as_published: bool = False

    name: ClassVar[str] = "cliplora"
    title: ClassVar[str] = "CLIP-LoRA"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.matrices or len(set(self.matrices)) < len(self.matrices):
            raise UserError(
                f"matrices is {', '.join(self.matrices) or 'empty'}; name some of "
                f"{', '.join(get_args(Matrix))}, each once"
            )
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
        alpha: Share of a convolution in what it acts on.
        factor: What multiplies alpha in a fast block.
        slow: Chance that a block is slow in a step.
        negatives: Other classes in a step, for each class of its images; -1 takes all.
        descriptions: JSON file, class name to descriptions, both as people write them; empty has
            some general sentences for every class. What the file held is kept as `FILE#hash`.

    Raises:
        UserError: There is no block, or the file cannot be read, is no such JSON, or has changed.
    """

    alpha: Annotated[float, Takes(above=0)] = 0.025
    factor: Annotated[float, Takes(above=0)] = 2.5
    slow: Share = 0.8
    negatives: Annotated[int, Takes(least=-1)] = 7
    descriptions: str = ""

    name: ClassVar[str] = "lweib"
    title: ClassVar[str] = "LwEIB"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.descriptions:
            object.__setattr__(self, "descriptions", _with_hash(self.descriptions))


def _with_hash(where: str) -> str:
    """Return the name of a file of descriptions with the hash of what it holds."""
    path, _, then = where.partition("#")
    now = checksum(repr(sorted(read_descriptions(path).items())))[:12]
    if then not in ("", now):
        raise UserError(
            f"{path} has changed since it was used ({then} then, {now} now); restore it"
        )
    return f"{path}#{now}"


def spelled(name: str) -> str:
    """Return a class name as descriptions are looked up by: lower case, underscores as spaces."""
    return name.replace("_", " ").lower()


def read_descriptions(where: str) -> dict[str, tuple[str, ...]]:
    """Return descriptions by class name, as `spelled`.

    Args:
        where: A JSON file, class name to a list of texts; `#` and a hash may follow.

    Raises:
        UserError: The file cannot be read, or is no such JSON.
    """
    path = Path(where.partition("#")[0])
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the descriptions {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    right = isinstance(found, dict) and all(
        isinstance(texts, list) and texts and all(isinstance(one, str) for one in texts)
        for texts in found.values()
    )
    if not right or not found:
        raise UserError(f"{path} must hold an object, each class name with a list of texts")
    return {spelled(name): tuple(texts) for name, texts in found.items()}


@checked
@dataclass(frozen=True)
class CLIPAdapterConfig(MethodConfig):
    """Settings of CLIP-Adapter.

    Attributes:
        ratio: Share of the adapter in the image feature; 0 leaves image features as they are.
        text_ratio: The same for the class features.
        reduction: The adapter's inner width is the joint width divided by this.

    Raises:
        UserError: Both ratios are 0.
    """

    ratio: Share = 0.2
    text_ratio: Share = 0.0
    reduction: Count = 4

    name: ClassVar[str] = "clipadapter"
    title: ClassVar[str] = "CLIP-Adapter"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ratio and not self.text_ratio:
            raise UserError("ratio and text_ratio are both 0: nothing is adapted; raise one")


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

    def __post_init__(self) -> None:
        super().__post_init__()
        for tower in self.towers:
            if not getattr(self, tower):
                raise UserError(
                    f"rpo has no {tower} block; its prompts read in both towers: name one in each"
                )
