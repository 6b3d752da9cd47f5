"""How an adapter is trained: every value in one frozen record, read from TOML."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from vlmadapters.config import MMAConfig
from vlmadapters.images import Augmentation
from vlmlayers.errors import UserError, check_one_of

SHIPPED = Path(__file__).with_name("recipes.toml")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
# Whether a number is whole, the least and the largest value.
RANGES: dict[str, tuple[bool, float, float]] = {
    "lr": (False, 0, math.inf),
    "momentum": (False, 0, 1),
    "weight_decay": (False, 0, math.inf),
    "epochs": (True, 1, math.inf),
    "batch_size": (True, 1, math.inf),
    "shots": (True, 1, math.inf),
    "flip": (False, 0, 1),
    "cached_views": (True, 0, math.inf),
    "save_every": (True, 0, math.inf),
}


@dataclass(frozen=True)
class Savings:
    """What is skipped because it changes nothing; each can be switched off.

    Attributes:
        cut_prompts: Prompts end at the longest end-of-text, not at 77 tokens (causal towers).
        text_prefix: Text activations below the first adapted block are computed once.
        image_prefix: Image activations below the first adapted block are computed without a
            graph, and once for all placements that are trained together.
        last_token: The last block computes the pooled token only, without other tokens' keys.
        fused: Standard blocks run with fewer passes over memory.
        onednn: Fused blocks multiply with oneDNN on a CPU in float32.
        text_features: Class features are kept between updates at evaluation.
    """

    cut_prompts: bool = True
    text_prefix: bool = True
    image_prefix: bool = True
    last_token: bool = True
    fused: bool = True
    onednn: bool = True
    text_features: bool = True

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, bool):
                raise UserError(f"the saving {name} is {value!r}; it must be true or false")

    @classmethod
    def none(cls) -> Savings:
        """Return the plain computation."""
        return cls(**dict.fromkeys((f.name for f in fields(cls)), False))


@dataclass(frozen=True)
class TrainConfig:
    """Training recipe; the defaults are the published ones.

    Attributes:
        lr: Learning rate of SGD at the first epoch; cosine to 0 over the epochs.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of SGD.
        epochs: Passes over the few-shot items.
        batch_size: Items per update, over all processes.
        shots: Items per class.
        template: Prompt around each class name.
        precision: `fp32`, autocast to `bf16` or `fp16` (with loss scaling), or `auto`: fp32 on
            CPU and bf16 on a GPU that has it.
        scale: Range of the random crop's share of the area.
        ratio: Range of its aspect ratio.
        flip: Chance of a horizontal flip.
        cached_views: 0 draws a fresh view at every epoch, as published. A positive number fixes
            that many views per image, whose frozen activations are then computed once.
        save_every: Steps between checkpoints; 0 saves after every epoch.
        savings: What is skipped.
    """

    lr: float = 0.0015
    momentum: float = 0.9
    weight_decay: float = 5e-4
    epochs: int = 5
    batch_size: int = 16
    shots: int = 16
    template: str = "a photo of a {}."
    precision: str = "auto"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    cached_views: int = 0
    save_every: int = 0
    savings: Savings = field(default_factory=Savings)

    def __post_init__(self) -> None:
        check_one_of("precision", self.precision, PRECISIONS)
        for name, (whole, low, high) in RANGES.items():
            _check_number(name, getattr(self, name), whole, low, high)
        if not self.lr > 0:
            raise UserError(f"lr is {self.lr}; it must be above 0")
        for name, limit in (("scale", 1.0), ("ratio", math.inf)):
            object.__setattr__(self, name, _range(name, getattr(self, name), limit))

    @property
    def augmentation(self) -> Augmentation:
        """The augmentation these values describe."""
        return Augmentation(scale=self.scale, ratio=self.ratio, flip=self.flip)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return {**asdict(self), "scale": list(self.scale), "ratio": list(self.ratio)}

    def identity(self) -> dict[str, Any]:
        """Return the values that a result depends on."""
        values = self.to_dict()
        for key in ("savings", "save_every"):
            values.pop(key)
        return values


def _check_number(name: str, value: Any, whole: bool, low: float, high: float) -> None:
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise UserError(f"{name} is {value!r}; it must be a {'whole ' if whole else ''}number")
    if not low <= value <= high:
        limits = f"{low:g} or more" if high == math.inf else f"from {low:g} to {high:g}"
        raise UserError(f"{name} is {value}; it must be {limits}")


def _range(name: str, values: Any, limit: float) -> tuple[float, float]:
    try:
        low, high = (float(value) for value in values)
    except (TypeError, ValueError):
        raise UserError(f"{name} is {values!r}; it must be two numbers, low and high") from None
    if not 0 < low <= high <= limit:
        top = "" if limit == math.inf else f" and {limit:g} at most"
        raise UserError(f"{name} is {low:g} to {high:g}; it must rise, above 0{top}")
    return low, high


@dataclass(frozen=True)
class Recipe:
    """A named training configuration with the adapter it is for."""

    name: str
    train: TrainConfig
    adapter: MMAConfig

    def changed(self, train: Mapping[str, Any], adapter: Mapping[str, Any]) -> Recipe:
        """Return the recipe with some values replaced; None keeps a value."""
        new_train = {key: value for key, value in train.items() if value is not None}
        new_adapter = {key: value for key, value in adapter.items() if value is not None}
        return replace(
            self,
            train=replace(self.train, **new_train),
            adapter=replace(self.adapter, **new_adapter),
        )


def load_recipe(name: str | Path) -> Recipe:
    """Return a recipe by name (`published`, `mini`, …) or from a TOML file.

    A file holds the keys of one recipe at its top level; `extends` names a shipped one.

    Raises:
        UserError: The name or a key is unknown (with the nearest), or a value is wrong.
    """
    shipped = tomllib.loads(SHIPPED.read_text(encoding="utf-8"))
    path = Path(name)
    if path.suffix == ".toml":
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"cannot read the recipe {path}: {error.strerror}") from error
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"{path} is not TOML: {error}") from error
        return _recipe(path.stem, values, shipped, str(path))
    check_one_of("recipe", str(name), shipped)
    return _recipe(str(name), shipped[str(name)], shipped, "recipes.toml")


def _recipe(name: str, values: Mapping[str, Any], shipped: Mapping[str, Any], where: str) -> Recipe:
    values = dict(values)
    base = values.pop("extends", None)
    if base is not None:
        check_one_of("recipe", base, shipped, where=where)
        parent = _recipe(base, shipped[base], shipped, where)
    else:
        parent = Recipe(name, TrainConfig(), MMAConfig.span(5, 12))
    adapter = {**parent.adapter.to_dict(), **values.pop("adapter", {})}
    savings = values.pop("savings", {})
    for key in values:
        check_one_of("key", key, [f.name for f in fields(TrainConfig)], where=where)
    for key in savings:
        check_one_of("saving", key, [f.name for f in fields(Savings)], where=where)
    try:
        train = replace(parent.train, **values, savings=replace(parent.train.savings, **savings))
        return Recipe(name, train, MMAConfig.from_dict(adapter))
    except TypeError as error:
        raise UserError(f"{where}: a value has the wrong type: {error}") from error
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
