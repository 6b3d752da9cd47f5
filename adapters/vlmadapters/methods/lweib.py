"""LwEIB: depthwise convolutions inside attention and perceptron, and described classes.

Reference: Yang, Zhang, Chen, Xie, "Learning with Enriched Inductive Biases for Vision-Language
Models", IJCV 2025.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmadapters.clip.arithmetic import at, attend, attend_one, feed_forward
from vlmadapters.clip.frozen import Backbone
from vlmadapters.clip.logits import single
from vlmadapters.clip.products import frozen_linear
from vlmadapters.clip.walk import Inside, State
from vlmadapters.data.task import Task
from vlmadapters.methods.base import Method, Step
from vlmadapters.methods.config import MethodConfig
from vlmadapters.methods.deep_configs import LwEIBConfig
from vlmadapters.methods.descriptions import read_descriptions
from vlmadapters.methods.official import check_settings, is_prompt, matched_keys
from vlmlayers.errors import UserError
from vlmlayers.models.devices import placed
from vlmlayers.prompts import class_prompts, spelled

LOG = logging.getLogger(__name__)
ADAPTERS = {"text": "text_adapter", "vision": "visual_adapter"}
OFFICIAL = re.compile(r"(text|visual)_adapter\.(\d+)\.(?:att|mlp)_conv\.conv\.weight")
KERNELS = {"text": (3,), "vision": (3, 3)}
GROUP = 512  # prompts encoded at once at a test
# Where nothing describes the classes: what may be said of any of them.
# Twenty, as many as a class has in the published tables.
GENERIC = (
    "Seen from close by.",
    "Seen from far away.",
    "Seen from the side.",
    "Seen from above.",
    "Seen from below.",
    "In bright daylight.",
    "In the dark.",
    "In the fog.",
    "With strong shadows.",
    "In front of a plain background.",
    "In front of a crowded background.",
    "In the middle of the picture.",
    "At the edge of the picture.",
    "Partly hidden by something else.",
    "Only a part of it is in the picture.",
    "A small one.",
    "A large one.",
    "There are several of them.",
    "Taken with a cheap camera.",
    "Taken by a professional.",
)


@dataclass(frozen=True, eq=False)
class Described:
    """The text side of some classes: several prompts of each.

    Attributes:
        prompts: Frozen state of all prompts, class by class.
        counts: Number of prompts of each class, (class,), on the CPU, where prompts are drawn.
    """

    prompts: State
    counts: Tensor

    def some(self, rows: Tensor) -> State:
        """Return the state of some prompts."""
        x = self.prompts.x
        rows = placed(rows, self.prompts.inputs.device)
        return replace(
            self.prompts, inputs=self.prompts.inputs[rows], x=None if x is None else x[rows]
        )

    def rows(self, classes: Tensor, description: Tensor) -> Tensor:
        """Return the row of each class's prompt with the description of the given number."""
        return (self.counts.cumsum(0) - self.counts)[classes] + description


class LwEIB(Method):
    """Two convolutions at every chosen block, each over neighbouring tokens, channel by channel.

        A(u) = u + α · conv(u)
        x ← x + attention(A(norm1(x)))
        x ← x + c_proj(gelu(A(c_fc(norm2(x)))))

    Text is convolved along the prompt, so that a token sees one to its right; an image along rows
    and columns of its patches, the class token left out. The weights receive the gradient as if α
    were 1, activations the true one.

    In a training step a block is fast by chance, by a draw of its own: α is then multiplied by
    `factor`. The step classifies among the classes of its images and some others, each in one of
    its descriptions, drawn anew. A test takes the mean of all of a class's unit features.

    Args:
        config: Blocks, α, what is drawn.
        backbone: The frozen CLIP.
        task: The classes trained on; nothing of them is kept.
        seed: Seed of the initial weights: uniform within 1/√(size of the kernel).
    """

    Config = LwEIBConfig
    config: LwEIBConfig

    def __init__(self, config: LwEIBConfig, backbone: Backbone, task: Task, seed: int = 0) -> None:
        super().__init__(config)
        generator = torch.Generator().manual_seed(seed)
        for tower in ADAPTERS:
            walk, blocks = backbone.walks[tower], getattr(config, tower)
            made = nn.ModuleDict()
            for block in blocks:
                widths = {"att": walk.tower.width, "mlp": _hidden(walk.tower.blocks[block - 1])}
                made[str(block)] = nn.ParameterDict(
                    {
                        place: _drawn(width, KERNELS[tower], generator)
                        for place, width in widths.items()
                    }
                )
            setattr(self, tower, made)
        vision = backbone.vision.tower
        self.special = vision.prefix, vision.suffix
        self.grid = _grid(backbone) if config.vision else (0, 0)
        self.onednn = backbone.savings.onednn
        self._fast: Mapping[str, Tensor] = {}

    # Inside a block

    def inside(self, tower: str, block: int) -> Inside | None:
        """Return what computes a chosen block with its convolutions."""
        return partial(self._run, tower, block) if block in getattr(self.config, tower) else None

    def _run(
        self, tower: str, number: int, block: Any, x: Tensor, mask: Tensor | None, rows: Any
    ) -> Tensor:
        kernels = getattr(self, tower)[str(number)]
        adapted = partial(self._adapted, tower, self._alpha(tower, number))
        u = adapted(block.ln_1(x), kernels["att"])
        if rows is not None and tower == "vision":
            # A class token is no patch: its hidden layer passes the convolution by, whose gradient
            # is 0 and not missing, so that weight decay still acts on it.
            x = attend_one(block, at(x, rows), u, rows, mask, self.onednn)
            return feed_forward(block, x, self.onednn) + 0 * kernels["mlp"].sum()
        # Text takes all tokens to the last block's end, where the convolution of the hidden layer
        # still mixes end-of-text with its neighbours.
        x = attend(block, x, u, mask, self.onednn)
        mlp, linear = block.mlp, partial(frozen_linear, onednn=self.onednn)
        hidden = adapted(linear(block.ln_2(x), mlp.c_fc.weight, mlp.c_fc.bias), kernels["mlp"])
        x = x + block.ls_2(linear(mlp.gelu(hidden), mlp.c_proj.weight, mlp.c_proj.bias))
        return x if rows is None else at(x, rows)

    def _alpha(self, tower: str, number: int) -> float:
        fast = self._fast.get(f"{tower}_fast")
        is_fast = fast is not None and bool(fast[number - 1])
        return self.config.alpha * (self.config.factor if is_fast else 1.0)

    def _adapted(self, tower: str, alpha: float, u: Tensor, kernel: Tensor) -> Tensor:
        """Return u + α · conv(u), (item, token, width)."""
        # The same value; its gradient is divided by α.
        kernel = kernel.detach() + (kernel - kernel.detach()) / alpha
        if tower == "text":
            return u + alpha * _convolved(u, kernel[:, :, None], (1, u.shape[1]))
        before, after = self.special
        ends = before, u.shape[1] - after
        patches = u[:, ends[0] : ends[1]]
        patches = patches + alpha * _convolved(patches, kernel, self.grid)
        return torch.cat([u[:, : ends[0]], patches, u[:, ends[1] :]], 1)

    # Classes

    def prepare(self, backbone: Backbone, task: Task) -> Described:
        """Return the frozen state of every class in each of its descriptions.

        Behind the longest prompt two tokens are kept for each chosen block, as far as its two
        convolutions see.
        """
        texts = self._descriptions(task)
        names, start = class_prompts(task.class_names, task.template), self.first(backbone, "text")
        # Without the template's full stop, behind which the description would start a new sentence.
        prompts = [
            f"{name.removesuffix('.')}, {text}"
            for name, described in zip(names, texts)
            for text in described
        ]
        margin = 2 * len(self.config.text)
        state = backbone.prompts(backbone.tokens(prompts), [start], margin)[start]
        return Described(state, torch.tensor([len(one) for one in texts]))

    def _descriptions(self, task: Task) -> list[tuple[str, ...]]:
        known = {spelled(name): texts for name, texts in task.descriptions}
        if not known and self.config.descriptions:
            known = read_descriptions(self.config.descriptions)
        if not known:
            LOG.info("lweib: nothing describes the classes; each has the same general sentences")
            return [GENERIC] * len(task.class_names)
        missing = [name for name in task.class_names if not known.get(spelled(name))]
        if missing:
            more = f" and {len(missing) - 20} more" if len(missing) > 20 else ""
            raise UserError(
                f"{len(missing)} classes have no description: {', '.join(missing[:20])}{more}; "
                "add them to the file of descriptions"
            )
        return [known[spelled(name)] for name in task.class_names]

    def class_features(self, backbone: Backbone, classes: Described) -> Tensor:
        """Return the mean unit feature of each class's prompts, (class, joint)."""
        counts = classes.counts
        owner = torch.arange(len(counts)).repeat_interleave(counts)
        made = [
            F.normalize(single(backbone.features("text", classes.some(rows), self)), dim=-1)
            for rows in torch.arange(len(owner)).split(GROUP)
        ]
        units = torch.cat(made)
        owner, counts = placed(owner, units.device), placed(counts, units.device)
        total = units.new_zeros(len(counts), units.shape[-1]).index_add(0, owner, units)
        # The mean of unit vectors is shorter than 1; `logits` normalises it.
        return total / counts[:, None]

    # Training

    def loss_parts(self, step: Step) -> dict[str, Tensor]:
        """Return the cross-entropy among the classes drawn, in descriptions drawn."""
        backbone = step.backbone
        draws = self._draws(step) if step.draws is None else step.draws
        self._fast = draws if self.training else {}
        try:
            images = self.image_features(backbone, step.images)
            rows = step.classes.rows(draws["classes"], draws["description"])
            prompts = step.classes.some(rows)
            texts = backbone.features("text", prompts, self)
        finally:
            self._fast = {}
        logits = self.logits(backbone, images, texts)
        targets = placed(draws["relabelled"], logits.device)
        return {"cross_entropy": F.cross_entropy(logits, targets)}

    def classes_of_step(self, images: int, classes: int) -> int:
        """Return the classes of the batch, each with its negatives, where these are drawn."""
        negatives = self.config.negatives
        drawn = negatives >= 0 and classes > images
        return min(classes, images * (1 + negatives)) if drawn else classes

    def _draws(self, step: Step) -> dict[str, Tensor]:
        """Draw columns of the logits, a description of each, and which blocks are fast."""
        # In the public code's order: classes, descriptions, text blocks, vision blocks. All blocks
        # draw, with or without convolutions: a placement does not change another block's draw.
        labels, counts = step.labels_on_cpu, step.classes.counts
        columns, negatives = torch.arange(len(counts)), self.config.negatives
        if negatives >= 0 and len(counts) > len(labels):
            # Classes of the batch stand first: their labels then are the numbers of their columns.
            positive, labels = labels.unique(return_inverse=True)
            others = columns[~torch.isin(columns, positive)]
            order = torch.randperm(len(others), generator=step.generator)
            columns = torch.cat([positive, others[order[: negatives * len(positive)]]])
        # One number a class however many descriptions it has, so that later draws do not shift.
        drawn = torch.rand(len(columns), generator=step.generator) * counts[columns]
        fast = {
            f"{tower}_fast": torch.rand(
                step.backbone.walks[tower].tower.depth, generator=step.generator
            )
            > self.config.slow
            for tower in ADAPTERS
        }
        return {"classes": columns, "description": drawn.long(), "relabelled": labels, **fast}

    # Files

    def official_names(self) -> dict[str, str]:
        """Return our parameter names to those of the authors' checkpoints."""
        return {
            f"{tower}.{block}.{place}": f"{adapter}.{block}.{place}_conv.conv.weight"
            for tower, adapter in ADAPTERS.items()
            for block in getattr(self.config, tower)
            for place in ("att", "mlp")
        }

    @classmethod
    def is_official_key(cls, key: str) -> bool:
        """Whether a key of the authors' checkpoints is no part of the backbone."""
        return key.startswith(tuple(ADAPTERS.values())) or is_prompt(key)

    @classmethod
    def config_of_official(
        cls, state: Mapping[str, Tensor], where: str, config: MethodConfig | None = None
    ) -> MethodConfig:
        """Read the blocks from the keys; α and what is drawn are not in the file."""
        parts = matched_keys(state, OFFICIAL, where, cls.Config.title).values()
        found: dict[str, Any] = {
            tower: tuple(sorted({int(m[2]) for m in parts if ADAPTERS[tower].startswith(m[1])}))
            for tower in ADAPTERS
        }
        return cls.Config(**found) if config is None else check_settings(config, found, where)


def _hidden(block: Any) -> int:
    """Return the width of a block's hidden layer."""
    try:
        return int(block.mlp.c_fc.out_features)
    except AttributeError:
        raise UserError(
            f"lweib works inside open_clip's standard blocks, and {type(block).__name__} is not "
            "one; choose another backbone, or a method that acts beside blocks"
        ) from None


def _drawn(width: int, kernel: tuple[int, ...], generator: torch.Generator) -> nn.Parameter:
    """Return a kernel for each channel, (width, 1, …), as torch draws them."""
    bound = 1 / sqrt(prod(kernel))
    return nn.Parameter(torch.empty(width, 1, *kernel).uniform_(-bound, bound, generator=generator))


@torch.no_grad()
def _grid(backbone: Backbone) -> tuple[int, int]:
    """Return how many rows and columns of patches an image has."""
    tower = backbone.vision.tower
    image = tower.example(1)
    patches = backbone.vision.enter(image).length - tower.prefix - tower.suffix
    rows = round(sqrt(patches * image.shape[-2] / image.shape[-1])) if patches > 0 else 0
    if rows < 1 or patches % rows:
        raise UserError(
            f"lweib convolves patches in rows and columns, which this vision tower "
            f"({tower.family}) does not have; choose an open_clip vision tower"
        )
    return rows, patches // rows


def _convolved(u: Tensor, kernel: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return tokens convolved channel by channel over a grid, with zeros around it.

    Args:
        u: (item, token, width).
        kernel: (width, 1, height, width of the kernel), both odd.
        grid: Rows and columns of the tokens.
    """
    # Channels last in memory, as the tokens lie: nothing is copied.
    image = u.unflatten(1, grid).permute(0, 3, 1, 2)
    padding = [size // 2 for size in kernel.shape[2:]]
    made = F.conv2d(image, kernel, padding=padding, groups=len(kernel))
    return made.permute(0, 2, 3, 1).flatten(1, 2)
