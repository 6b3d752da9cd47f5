"""The interface of a method: where it reaches into the frozen CLIP, what it minimises, its files.

A method is a module that holds its trainable part and nothing of the backbone. The defaults change
nothing: `Method` itself is zero-shot CLIP. A method overrides only where it acts:

    settings            `Config`
    class prompts       `prepare`             token ids, context slots, descriptions, templates
    tokens of a block   `before`              deep prompts, context
    inside a block      `inside`              low-rank terms, convolutions, tuned norms
    output of a block   `beside`              parallel adapters
    final features      `image_features`, `class_features`
    logits              `logits`              caches, several read-outs, image-conditioned text
    the loss            `loss_parts`, `loss_weights`
    around the steps    `fit`, `end_epoch`, `finish`
    files               `official_names`, `config_of_official`

Only `inside` is bound to open_clip's standard block; everything else runs on any tower that can be
walked through block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmadapters.clip.frozen import Backbone
from vlmadapters.clip.logits import scaled_cosines
from vlmadapters.clip.walk import Inside, State
from vlmadapters.data.task import Task
from vlmadapters.methods.config import MethodConfig
from vlmadapters.methods.hooks import attached
from vlmlayers.errors import UserError

# Points at which a method changes what the model computes; hooks on blocks reach `beside` alone.
_ACTS = (
    "before",
    "inside",
    "beside",
    "prepare",
    "image_features",
    "class_features",
    "logits",
)


@dataclass(eq=False)
class Step:
    """What one training step sees.

    Attributes:
        backbone: The frozen CLIP.
        images: Frozen state of the images at the method's first vision block.
        labels: (image,) index of each image's class.
        classes: What the method's `prepare` returned for the classes trained on.
        generator: Source of the step's random draws: a function of seed and step, on the CPU.
        repeat: Updates made on this batch of images before this one.
        number: Updates made before this one in all.
        draws: Recorded draws that stand in for random ones, by the method's own names.
        known: `labels` on the CPU, which the trainer knows without waiting for the device.
    """

    backbone: Backbone
    images: State
    labels: Tensor
    classes: Any
    generator: torch.Generator
    repeat: int = 0
    number: int = 0
    draws: Mapping[str, Tensor] | None = None
    known: Tensor | None = None

    @property
    def labels_on_cpu(self) -> Tensor:
        """The labels, for methods whose draws depend on them."""
        return self.labels.cpu() if self.known is None else self.known


@dataclass(eq=False)
class FitData:
    """What a closed-form fit sees: final features of the plain backbone.

    Attributes:
        backbone: The frozen CLIP.
        classes: What the method's `prepare` returned.
        labels: (item,) classes of the few-shot items.
        view: Number of a view to joint features of all items in it, (item, joint), not normalised.
        validation: Makes joint features, (item, joint), not normalised, and labels, (item,), of
            few-shot items of the validation split; None where the dataset has none, or is tested on
            that split. Test data are never here.
    """

    backbone: Backbone
    classes: Any
    labels: Tensor
    view: Callable[[int], Tensor]
    validation: Callable[[], tuple[Tensor, Tensor]] | None = None


class Method(nn.Module):
    """A way to adapt a frozen CLIP from few shots; this base changes nothing: zero-shot CLIP.

    Args:
        config: Its settings.
        backbone: The frozen CLIP, for widths and initial values; it is not kept.
        task: The classes trained on.
        seed: Seed of the initialisation.
    """

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    loss_weights: Mapping[str, float] = {"cross_entropy": 1.0}
    # Whether a step may depend on its number or on random draws besides parameters, images and
    # labels. A method says that none does: then its steps are recorded on a GPU and replayed.
    varies: ClassVar[bool] = True

    def __init__(
        self,
        config: MethodConfig | None = None,
        backbone: Backbone | None = None,
        task: Task | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config = config or self.Config()
        self.version = 0

    @classmethod
    def build(cls, config: Any, backbone: Backbone, task: Task, seed: int = 0) -> Self:
        """Return the method for a backbone and classes, on the backbone's device.

        Raises:
            UserError: It does not fit the backbone or the classes.
        """
        # Before the constructor, where a missing block would be a bare IndexError.
        config.check_depths({name: walk.tower.depth for name, walk in backbone.walks.items()})
        return cls(config, backbone, task, seed).to(backbone.device)

    def touch(self) -> None:
        """Say that the parameters changed, so that class features computed before are stale."""
        self.version += 1

    # Where it acts

    def start(self, tower: str, depth: int) -> int:
        """Return the first block whose input the method may change; depth + 1 where there is none.

        Activations up to there are frozen: computed without a graph, once for all placements.
        """
        blocks: tuple[int, ...] = getattr(self.config, tower)
        return blocks[0] if blocks else depth + 1

    def before(self, x: Tensor, tower: str, block: int, state: State) -> Tensor:
        """Return the tokens that enter a block, (item, token, width); their number may grow."""
        return x

    def inside(self, tower: str, block: int) -> Inside | None:
        """Return the function that computes a block in place of the block itself, or None."""
        return None

    def reads_norm(self, tower: str, block: int) -> bool:
        """Whether `beside` acts at a block and reads its normed input."""
        return False

    def beside(self, out: Tensor, u: Tensor, tower: str, block: int) -> Tensor:
        """Return a block's output with the method's contribution; called where `reads_norm`.

        Args:
            out: Output of the block, (item, token, width).
            u: The block's input after its first norm, same shape.
            tower: `vision` or `text`.
            block: Number of the block.
        """
        return out

    # Features and logits

    def prepare(self, backbone: Backbone, task: Task) -> Any:
        """Return the frozen text side of some classes; it does not depend on the parameters.

        By default the state of the class prompts at the method's first text block.
        """
        start = self.first(backbone, "text")
        return backbone.prompts(backbone.tokens(task.prompts()), [start])[start]

    def first(self, backbone: Backbone, tower: str) -> int:
        """Return `start` for the tower of a backbone."""
        return self.start(tower, backbone.walks[tower].tower.depth)

    def image_features(self, backbone: Backbone, state: State) -> Tensor:
        """Return joint features of images from their frozen state on, (image, joint)."""
        return backbone.features("vision", state, self)

    def class_features(self, backbone: Backbone, classes: Any) -> Any:
        """Return what `logits` needs of the classes, by default joint features, (class, joint).

        At a test it is computed once and kept until `touch`.
        """
        return backbone.features("text", classes, self)

    def logits(self, backbone: Backbone, images: Tensor, classes: Any) -> Tensor:
        """Return class logits, (image, class), of image and class features."""
        return scaled_cosines(backbone.clip, images, classes)

    # Training

    def loss_parts(self, step: Step) -> dict[str, Tensor]:
        """Return the parts of a step's loss by name, unweighted; `loss_weights` weighs them."""
        images = self.image_features(step.backbone, step.images)
        classes = self.class_features(step.backbone, step.classes)
        logits = self.logits(step.backbone, images, classes)
        # A user's own method may return logits in half precision, too coarse for a log-softmax.
        return {"cross_entropy": F.cross_entropy(logits.float(), step.labels)}

    def classes_of_step(self, images: int, classes: int) -> int:
        """Return how many of all classes a step of some images compares at most."""
        return classes

    def loss(self, step: Step) -> Tensor:
        """Return a step's loss, the weighted sum of its parts."""
        parts = self.loss_parts(step)
        return torch.stack([self.loss_weights[name] * part for name, part in parts.items()]).sum()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's groups; `rate` is a group's share of the learning rate."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "rate": 1.0}]

    def fit(self, data: FitData) -> None:
        """Fit in closed form before the first step; parameters may be replaced by others."""

    def end_epoch(self, epoch: int, epochs: int) -> None:
        """Act at the end of an epoch, counted from 1."""

    def finish(self, data: FitData) -> None:
        """Act after the last step, on what `fit` saw; after `fit` where there is no step."""

    # Attached to the backbone by hooks

    def attached(self, clip: nn.Module) -> AbstractContextManager[Self]:
        """Attach to a backbone for the length of a context, where the method acts `beside` blocks.

        Raises:
            UserError: The method changes more than the outputs of blocks, which hooks cannot.
        """
        own = [name for name in _ACTS if getattr(type(self), name) is not getattr(Method, name)]
        if own == ["beside"]:
            return attached(self, clip)
        raise UserError(
            f"{self.config.title} changes more than the blocks of a tower and cannot be attached "
            "by hooks; "
            + (
                "`vlmlayers export` merges it into weights, which --pretrained takes"
                if self.config.mergeable
                else "train or evaluate it with `vlmlayers train` and `evaluate`"
            )
        )

    def merged(self, backbone: Backbone) -> dict[str, Tensor]:
        """Return the backbone's weights that change where the method is merged into them.

        By their names in the state dict; none where the method computes what no weights give.
        """
        return {}

    # Parameters under the authors' names

    def official_names(self) -> dict[str, str]:
        """Return our parameter names to those of the authors' checkpoints."""
        return {name: name for name, _ in self.named_parameters()}

    def named_official_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield parameters under the authors' names."""
        names = self.official_names()
        yield from ((names[name], value) for name, value in self.named_parameters())

    def official_state_dict(self) -> dict[str, Tensor]:
        """Return a copy of the parameters under the authors' names."""
        return {key: value.detach().clone() for key, value in self.named_official_parameters()}

    def load_official_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load parameters stored under the authors' names.

        Raises:
            UserError: Keys or shapes belong to another method, placement, width or backbone.
        """
        # DataParallel, in which some authors wrap their models, puts `module.` before every key.
        state = {key.removeprefix("module."): value for key, value in state.items()}
        own = dict(self.named_official_parameters())
        missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or extra:
            raise UserError(
                f"the checkpoint does not fit {self._described()}: "
                f"{len(missing)} parameters are missing ({_few(missing)}), "
                f"{len(extra)} are not known ({_few(extra)})"
            )
        for key, parameter in own.items():
            if state[key].shape != parameter.shape:
                raise UserError(
                    f"{key} has shape {tuple(state[key].shape)} in the checkpoint and "
                    f"{tuple(parameter.shape)} for this backbone; load the backbone it was made for"
                )
        # After all checks, so that a refused checkpoint leaves the method as it was.
        with torch.no_grad():
            for key, parameter in own.items():
                parameter.copy_(state[key])
        self.touch()

    def _described(self) -> str:
        placement = self.config.placement
        return f"{self.config.title} at {placement}" if placement else self.config.title

    @classmethod
    def has_official_layout(cls) -> bool:
        """Return whether files in a layout of its authors can be read, and so written."""
        own: Any = cls.config_of_official
        base: Any = Method.config_of_official
        return own.__func__ is not base.__func__

    def official_content(self, epoch: int = 0) -> dict[str, Any]:
        """Return what a file in the authors' layout holds: the tensors, under state_dict.

        Raises:
            UserError: There is no such layout: `config_of_official` could not read the file.
        """
        if not self.has_official_layout():
            raise UserError(
                f"{self.config.name} has no layout of its authors to write; keep the "
                ".safetensors of `vlmlayers train`, or use save_method"
            )
        state = {key: value.cpu() for key, value in self.official_state_dict().items()}
        # Dassl's files have these entries too; there is no training to resume, so they are None.
        rest = dict.fromkeys(("optimizer", "scheduler", "val_result"))
        return {"state_dict": state, "epoch": epoch, **rest}

    @classmethod
    def official_state(cls, content: Mapping[str, Any], where: str) -> Any:
        """Return parameters under the authors' names of what a file in their layout holds.

        Args:
            content: What the file holds; it may be the bare state dictionary.
            where: The file, for messages.

        Raises:
            UserError: The content has the layout in part only.
        """
        return content.get("state_dict", content)

    @classmethod
    def is_official_key(cls, key: str) -> bool:
        """Whether a key of the authors' checkpoints is a parameter; others are left out."""
        return True

    @classmethod
    def config_of_official(
        cls, state: Mapping[str, Tensor], where: str, config: MethodConfig | None = None
    ) -> MethodConfig:
        """Return the settings of the authors' checkpoint: those asked for, checked against it.

        Args:
            state: Parameters under the authors' names.
            where: The file, for messages.
            config: Settings asked for; None reads from keys and shapes what they tell.

        Raises:
            UserError: The state is not this method's, or of other settings.
        """
        raise UserError(f"{cls.Config.name} has no layout of its authors that could be read")

    def parameter_count(self) -> int:
        """Return the number of trainable values."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


def _few(keys: Sequence[str]) -> str:
    return ", ".join(keys[:2]) + (", …" if len(keys) > 2 else "") if keys else "none"
