"""Settings of the methods that learn prompts of classes. Settings of methods import no torch, so
that a command line can check them at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from vlmadapters.methods.config import MethodConfig
from vlmlayers.arguments import Count, Natural, NotNegative, checked
from vlmlayers.errors import UserError
from vlmlayers.prompts import Template

# CoOp's. Any word of one token would do, since its embedding is overwritten.
PLACEHOLDER = "X"
ClassAt = Literal["end", "middle", "front"]


def split_words(text: str) -> list[str]:
    """Return the words that a context starts from, underscores as spaces."""
    return text.replace("_", " ").split()


def blocks_to(depth: int) -> tuple[int, ...]:
    """Return the blocks 1 to `depth`."""
    return tuple(range(1, depth + 1))


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
    length: Natural = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        # The public code ignores a length that disagrees; here that would hide a mistake.
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

    unstored: ClassVar[tuple[str, ...]] = ("words",)

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
    """Settings of CoOp, in addition to those of `ContextConfig`.

    Attributes:
        class_specific: Learn a context for each class instead of one for all.
        class_at: Where the class name stands in the prompt: `end`, `middle` or `front`.
        as_published: Do as the public code, which ignores `class_specific` where words are given.
    """

    class_specific: bool = False
    class_at: ClassAt = "end"
    as_published: bool = False

    name: ClassVar[str] = "coop"
    title: ClassVar[str] = "CoOp"
    unstored: ClassVar[tuple[str, ...]] = ("words", "class_at")

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
    """Settings of KgCoOp, in addition to those of `CoOpConfig`.

    Attributes:
        weight: Weight of the distance to the hand-made prompts, 0 or more.
        as_published: Do as the public code, which reads any words as "a photo of a", ignores
            `class_specific` where words are given, and always ignores `class_at`.
    """

    # λ = 4 in the paper: for unit vectors 1 − cos is half the squared distance used there.
    weight: NotNegative = 8.0

    name: ClassVar[str] = "kgcoop"
    title: ClassVar[str] = "KgCoOp"

    def __post_init__(self) -> None:
        # Before the parent's checks, which have to see the words that really count.
        if self.as_published:
            object.__setattr__(self, "class_at", "end")
            if split_words(self.words):
                object.__setattr__(self, "words", ContextConfig.words)
        super().__post_init__()


OtherNames = Literal["none", "text", "virtual"]


@checked
@dataclass(frozen=True)
class LASPConfig(WordsConfig):
    """Settings of LASP, in addition to those of `WordsConfig`.

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
    """

    correction: bool = True
    weight: NotNegative = 5.0
    templates: tuple[Template, ...] = ()
    other_names: OtherNames = "text"
    as_published: bool = False

    name: ClassVar[str] = "lasp"
    title: ClassVar[str] = "LASP"
    towers: ClassVar[tuple[str, ...]] = ("vision",)
    unstored: ClassVar[tuple[str, ...]] = ("words", "other_names", "as_published")

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
        weight: Weight of the overlap of the prompts without a class, 0 or more.
        as_published: Do as the public code does, which leaves underscores in class names and
            places context as if they were spaces.

    Raises:
        UserError: The contexts do not fall into quarters, or not into groups.
    """

    prompts: Count = 32
    group: Count = 4
    length: Count = 16
    weight: NotNegative = 0.1
    as_published: bool = False

    name: ClassVar[str] = "proda"
    title: ClassVar[str] = "ProDA"
    unstored: ClassVar[tuple[str, ...]] = ("as_published",)

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
