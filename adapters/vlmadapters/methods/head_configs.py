"""Settings of the methods that act behind the towers, on final features; they import no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from vlmadapters.methods.config import MethodConfig
from vlmlayers.arguments import Count, NotNegative, Share, checked
from vlmlayers.errors import UserError
from vlmlayers.prompts import Template


@checked
@dataclass(frozen=True)
class TipConfig(MethodConfig):
    """Settings of Tip-Adapter.

    Attributes:
        alpha: Weight of the cache before the search, 0 or more.
        beta: Sharpness of the cache before the search, 0 or more.
        views: Augmented views of every item, of whose features the cache holds the mean.
        templates: Hand-made prompts, a `{}` in each, of whose features a class has the mean; empty
            takes the dataset's own.
        search: Choose alpha and beta on few-shot items of the validation split, where there is one.
        alpha_end: Upper end of the values tried for alpha, itself excluded.
        beta_end: The same for beta.
        alpha_steps: Number of values tried for alpha, from 0.1 on.
        beta_steps: The same for beta.
    """

    # The public code's values for ImageNet; the recipe holds those of other datasets.
    alpha: NotNegative = 1.17
    beta: NotNegative = 1.0
    views: Count = 10
    templates: tuple[Template, ...] = ()
    search: bool = True
    alpha_end: NotNegative = 3.0
    beta_end: NotNegative = 7.0
    alpha_steps: Count = 20
    beta_steps: Count = 200

    name: ClassVar[str] = "tip"
    title: ClassVar[str] = "Tip-Adapter"
    own_scale: ClassVar[float] = 100.0  # the authors' constant

    @property
    def in_steps(self) -> bool:
        """False: the cache is filled, and alpha and beta are searched."""
        return False

    @property
    def validates(self) -> bool:
        """Whether alpha and beta are searched."""
        return self.search


@checked
@dataclass(frozen=True)
class TipFConfig(TipConfig):
    """Settings of Tip-Adapter-F, whose keys are trained: those of `TipConfig`."""

    name: ClassVar[str] = "tip-f"
    title: ClassVar[str] = "Tip-Adapter-F"

    @property
    def in_steps(self) -> bool:
        """True: steps train the keys of the cache."""
        return True


@checked
@dataclass(frozen=True)
class LinearProbeConfig(MethodConfig):
    """Settings of the linear probe.

    Attributes:
        inverse_penalties: Values of scikit-learn's `C` tried; the one with the highest accuracy
            on few-shot items of the validation split is taken, the first of equals; without such
            items the middle one.
        iterations: Largest number of iterations of its solver.

    Raises:
        UserError: There is no value to try, or one is not above 0.
    """

    inverse_penalties: tuple[float, ...] = (1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3, 1e4)
    iterations: Count = 1000

    name: ClassVar[str] = "linear-probe"
    title: ClassVar[str] = "linear probe"

    @property
    def in_steps(self) -> bool:
        """False: a solver fits it."""
        return False

    @property
    def validates(self) -> bool:
        """Whether there is more than one penalty to choose from."""
        return len(self.inverse_penalties) > 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.inverse_penalties or not all(0 < c < math.inf for c in self.inverse_penalties):
            raise UserError(
                f"inverse_penalties is {list(self.inverse_penalties)}; name one value or more, all "
                "above 0"
            )


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
    unstored: ClassVar[tuple[str, ...]] = ("ratio", "text_ratio")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ratio and not self.text_ratio:
            raise UserError("ratio and text_ratio are both 0: nothing is adapted; raise one")
