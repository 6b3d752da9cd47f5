"""ProDA: a Gaussian over class features, from many learned contexts.

Reference: Lu, Liu, Zhang, Liu, Tian, "Prompt Distribution Learning", CVPR 2022; its public
reimplementation ml-stat-Sustech/CLIP_Calibration, as the authors' code cannot be had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vlmadapters.clip.frozen import Backbone
from vlmadapters.clip.logits import scaled_products, single
from vlmadapters.clip.walk import State
from vlmadapters.data.task import Task
from vlmadapters.methods.base import Step
from vlmadapters.methods.configs import PLACEHOLDER, ProDAConfig
from vlmadapters.methods.context import (
    CLASS_AT,
    context_prompts,
    context_state,
    drawn_context,
    some_prompts,
)
from vlmadapters.methods.coop import LearnedContext
from vlmlayers.models.devices import placed

PASSES = 0x9D  # key of the order in which a pass takes the prompts


@dataclass(frozen=True, eq=False)
class ProDATexts:
    """The text side of some classes.

    Attributes:
        prompts: Frozen state of the class prompts, (place of the name × class) rows: all classes
            with the name at the end, then in the middle, then in front.
        bare: Frozen state of the prompt without a class, one row.
        classes: Number of classes.
    """

    prompts: State
    bare: State
    classes: int


class ProDA(LearnedContext):
    """Many contexts; the class features they give are treated as samples of a Gaussian.

    A step takes a group of B prompts. With μ their mean features and, for the squared image feature
    f², q[i, j] = Σ f² · covariance of the classes i and j, its logits for an image of class y are

        s f·μ[k] + ½ s² (q[y, y] + q[k, k] - 2 q[y, k]),    s = exp(logit scale)

    so that their cross-entropy bounds the expected one from above. A second loss, weighted, is the
    mean absolute cosine between all prompts without a class. A test takes s f·μ of all prompts.

    Args:
        config: Blocks, number and length of contexts, group, weight.
        backbone: The frozen CLIP, for its width.
        task: The classes trained on.
        seed: Seed of the contexts, and of the order in which prompts are taken.

    Reference: Lu et al., ProDA, CVPR 2022, equations 5 to 9.
    """

    Config = ProDAConfig
    config: ProDAConfig
    axes = (3,)

    def __init__(self, config: ProDAConfig, backbone: Backbone, task: Task, seed: int = 0) -> None:
        shape = config.prompts, config.length, backbone.text.tower.width
        super().__init__(config, drawn_context(config.text, *shape, seed=seed))
        self.seed = seed
        self.loss_weights = {"cross_entropy": 1.0, "overlap": config.weight}
        quarter = config.prompts // 4
        places = ["front"] * quarter + ["middle"] * quarter
        places += ["end"] * (config.prompts - len(places))
        self.places = torch.tensor([CLASS_AT.index(place) for place in places])

    def prepare(self, backbone: Backbone, task: Task) -> ProDATexts:
        """Return the frozen states of the prompts with and without a class."""
        words, first = [PLACEHOLDER] * self.config.length, self.first(backbone, "text")
        made = [
            context_prompts(
                backbone,
                task.class_names,
                words,
                class_at=place,
                underscores=self.config.as_published,
            )
            for place in CLASS_AT
        ]
        tokens, slots = (torch.cat(parts) for parts in zip(*made))
        bare = context_prompts(backbone, [""], words)
        return ProDATexts(
            context_state(backbone, tokens, slots, first),
            context_state(backbone, *bare, first),
            len(task.class_names),
        )

    def prompt_features(self, backbone: Backbone, texts: ProDATexts, numbers: Tensor) -> Tensor:
        """Return unit features of some prompts for every class, (prompt, class, joint).

        Args:
            backbone: The frozen CLIP.
            texts: The classes.
            numbers: Numbers of the prompts, from 0.
        """
        classes = torch.arange(texts.classes)
        rows = (self.places[numbers][:, None] * texts.classes + classes).flatten()
        which = numbers.repeat_interleave(texts.classes)
        some = some_prompts(texts.prompts, placed(rows, backbone.device))
        found = self._features(backbone, some, which)
        return found.view(len(numbers), texts.classes, -1)

    def bare_features(self, backbone: Backbone, texts: ProDATexts) -> Tensor:
        """Return unit features of all prompts without a class, (prompt, joint)."""
        # One text for all: prompts without a class differ in their context alone.
        rows = torch.zeros(self.config.prompts, dtype=torch.long, device=backbone.device)
        which = torch.arange(self.config.prompts)
        return self._features(backbone, some_prompts(texts.bare, rows), which)

    def _features(self, backbone: Backbone, state: State, which: Tensor) -> Tensor:
        note = replace(state.note, which=placed(which, backbone.device))
        found = backbone.features("text", replace(state, note=note), self)
        return F.normalize(single(found), dim=-1)

    def class_features(self, backbone: Backbone, classes: ProDATexts) -> Tensor:
        """Return the mean over all prompts of their unit features, (class, joint)."""
        total = torch.zeros((), device=backbone.device)
        # In the groups of training: all prompts of a thousand classes at once would not fit.
        for numbers in torch.arange(self.config.prompts).split(self.config.group):
            total = total + self.prompt_features(backbone, classes, numbers).sum(0)
        # Not normalised again, as published: where prompts disagree a class weighs less.
        return total / self.config.prompts

    def logits(self, backbone: Backbone, images: Tensor, classes: Tensor) -> Tensor:
        """Return scaled products of unit image features and mean class features, (image, class)."""
        return scaled_products(backbone.clip, images, classes)

    def bounded_logits(
        self, backbone: Backbone, images: Tensor, prompts: Tensor, labels: Tensor
    ) -> Tensor:
        """Return the logits of training, (image, class).

        Args:
            backbone: The frozen CLIP.
            images: (image, joint).
            prompts: Unit features of a group of prompts, (prompt, class, joint).
            labels: (image,) true classes.
        """
        clip: Any = backbone.clip
        # The quadratic term is multiplied by s²/2, about 5,000: half precision has no digits left.
        with torch.autocast(images.device.type, enabled=False):
            mean = prompts.mean(0)
            apart = (prompts - mean).transpose(0, 1)  # (class, prompt, joint)
            squared = F.normalize(single(images), dim=-1).square()
            # q from products of deviations: the covariances of all pairs of classes, (class, class,
            # joint), are never formed.
            own = squared[:, None] * apart[labels]  # (image, prompt, joint)
            across = own.flatten(1) @ apart.flatten(1).t()  # q[y, k], (image, class)
            alone = squared @ apart.square().sum(1).t()  # q[k, k], (image, class)
            spread = alone.gather(1, labels[:, None]) + alone - 2 * across
            scale = single(clip.logit_scale).exp()
            # B + 1, neither B nor B − 1: so it is in every public version of the code.
            added = scale.square() / 2 * spread / (len(prompts) + 1)
            return self.logits(backbone, images, mean) + added

    def loss_parts(self, step: Step) -> dict[str, Tensor]:
        """Return the cross-entropy of a group of prompts, and the overlap of all of them."""
        images = self.image_features(step.backbone, step.images)
        prompts = self.prompt_features(step.backbone, step.classes, self._group(step))
        logits = self.bounded_logits(step.backbone, images, prompts, step.labels)
        bare = self.bare_features(step.backbone, step.classes)
        return {"cross_entropy": F.cross_entropy(logits, step.labels), "overlap": _overlap(bare)}

    def _group(self, step: Step) -> Tensor:
        """Return the numbers of the prompts that a step takes: a pass takes all, each once."""
        count, group = self.config.prompts, self.config.group
        if group == count:
            return torch.arange(count)
        if step.draws is not None:
            return step.draws["prompts"]
        # A function of seed and pass, not of a generator's state: a resumed training goes on in it.
        number, place = divmod(step.number, count // group)
        key = np.random.SeedSequence([self.seed, number, PASSES]).generate_state(1)[0]
        order = torch.randperm(count, generator=torch.Generator().manual_seed(int(key)))
        return order[place * group : (place + 1) * group]

    @classmethod
    def settings_of(cls, shape: Sequence[int]) -> dict[str, Any]:
        """Return the settings that the shape of a context tells."""
        return {"prompts": shape[0], "group": min(shape[0], 4), "length": shape[1]}


def _overlap(features: Tensor) -> Tensor:
    """Return the mean |cosine| between different rows of unit features; 0 of a single one."""
    count = len(features)
    with torch.autocast(features.device.type, enabled=False):
        cosines = (features @ features.t()).abs()
    return (cosines.sum() - cosines.trace()) / max(count * (count - 1), 1)
