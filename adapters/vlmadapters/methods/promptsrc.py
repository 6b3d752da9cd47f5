"""PromptSRC: deep prompts held near the frozen CLIP, and averaged over the course of training.

Reference: Khattak et al., "Self-regulating Prompts: Foundational Model Adaptation without
Forgetting", ICCV 2023.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from open_clip import OPENAI_IMAGENET_TEMPLATES
from torch import Tensor, nn
from torch.nn import functional as F

from vlmadapters.clip.frozen import Backbone
from vlmadapters.clip.logits import scaled_cosines, single
from vlmadapters.data.task import Task
from vlmadapters.methods.base import Step
from vlmadapters.methods.deep_configs import PromptSRCConfig
from vlmadapters.methods.ivlp import IVLP
from vlmlayers.prompts import TEMPLATE

TEMPLATES = 60


def default_templates() -> tuple[str, ...]:
    """Return the published templates: 60 of OpenAI's for ImageNet, the common one first."""
    # The common template is among OpenAI's 80 and moves to the front; the last 20 are left out.
    known = dict.fromkeys((TEMPLATE, *(fill("{}") for fill in OPENAI_IMAGENET_TEMPLATES)))
    return tuple(known)[:TEMPLATES]


class Regulated:
    """The text side of some classes: prompts, and the frozen features to stay near.

    Args:
        prompts: Frozen state of the class prompts.
        backbone: The frozen CLIP.
        task: The classes.
        templates: Templates of the frozen features.
    """

    def __init__(
        self, prompts: Any, backbone: Backbone, task: Task, templates: tuple[str, ...]
    ) -> None:
        self.prompts = prompts
        self.backbone, self.task, self.templates = backbone, task, templates

    @cached_property
    def frozen(self) -> Tensor:
        """Mean over templates of the plain features, (class, joint); a test does not need it."""
        # Features are averaged as they are, and normalised in the loss: so the public code does.
        total = torch.zeros(())
        for template in self.templates:  # one at a time: all of ImageNet's would be 60,000 texts
            features = self.backbone.text_features(self.task.prompts(template))
            total = total.to(features.device) + features
        return total / len(self.templates)


class PromptSRC(IVLP):
    """IVLP's prompts with three losses against forgetting, and a Gaussian mean over epochs.

    With f and t the prompted unit features of images and classes, f0 and t0 the frozen ones, p and
    p0 the class probabilities of either pair:

        loss = cross-entropy(p) + text_weight · mean|t - t0| + image_weight · mean|f - f0|
               + mean(p0 · (log p0 - log p))

    The last mean is over images and classes. t0 is the mean of the features of many templates. What
    remains after epoch E is the mean of the prompts at the end of each epoch e, weighted in
    proportion to exp(-((e - centre) / spread)² / 2).

    Args:
        config: Blocks, numbers of prompts, words, weights.
        backbone: The frozen CLIP.
        task: The classes trained on; nothing of them is kept.
        seed: Seed of the initial values, as of IVLP.
    """

    Config = PromptSRCConfig
    config: PromptSRCConfig
    average: Tensor

    def __init__(
        self, config: PromptSRCConfig, backbone: Backbone, task: Task, seed: int = 0
    ) -> None:
        super().__init__(config, backbone, task, seed)
        self.loss_weights = {
            "cross_entropy": 1.0,
            "text": config.text_weight,
            "image": config.image_weight,
            "logits": 1.0,
        }
        # The mean so far, all prompts in a row; a buffer, so that a resumed training has it.
        self.register_buffer("average", torch.zeros(self.parameter_count()))

    def prepare(self, backbone: Backbone, task: Task) -> Regulated:
        """Return the state of the class prompts, and what gives the frozen features."""
        templates = self.config.templates or default_templates()
        return Regulated(super().prepare(backbone, task), backbone, task, templates)

    def class_features(self, backbone: Backbone, classes: Any) -> Tensor:
        """Return joint features of the prompted classes, (class, joint)."""
        return super().class_features(backbone, classes.prompts)

    def loss_parts(self, step: Step) -> dict[str, Tensor]:
        """Return cross-entropy and the three distances to the frozen CLIP."""
        backbone = step.backbone
        with torch.no_grad():
            # From the same state: what lies below the first prompt is computed once.
            frozen_images = backbone.features("vision", step.images)
            frozen_texts = step.classes.frozen
            zero_shot = scaled_cosines(backbone.clip, frozen_images, frozen_texts)
        images = self.image_features(backbone, step.images)
        texts = self.class_features(backbone, step.classes)
        logits = self.logits(backbone, images, texts)
        learned, plain = logits.log_softmax(-1), zero_shot.log_softmax(-1)
        return {
            "cross_entropy": F.cross_entropy(logits, step.labels),
            "text": _distance(texts, frozen_texts),
            "image": _distance(images, frozen_images),
            # Over all images × classes, as published; `batchmean` would divide by images alone.
            "logits": F.kl_div(learned, plain, reduction="none", log_target=True).mean(),
        }

    @classmethod
    def is_official_key(cls, key: str) -> bool:
        """Whether a key of the authors' checkpoints is a prompt; theirs hold a frozen tower too."""
        return super().is_official_key(key) and "ZS_image_encoder." not in key

    @torch.no_grad()
    def end_epoch(self, epoch: int, epochs: int) -> None:
        """Add the epoch's prompts to the mean; after the last one, put it in their place."""
        weight = epoch_weights(epochs, self.config.centre, self.config.spread)[epoch - 1]
        # Prompts alone: the public code averages frozen weights too, which only adds rounding.
        self.average += weight * nn.utils.parameters_to_vector(self.parameters())
        if epoch == epochs:
            sizes = [value.numel() for value in self.parameters()]
            for value, mean in zip(self.parameters(), self.average.split(sizes)):
                value.copy_(mean.view_as(value))
            self.touch()


def epoch_weights(epochs: int, centre: float, spread: float) -> list[float]:
    """Return the share of each epoch in the mean: a normal curve over epochs from 1 on."""
    number = torch.arange(1, epochs + 1, dtype=torch.float64)
    # The softmax of the exponents is the Gaussian with a sum of 1, and does not underflow.
    return (-(((number - centre) / spread) ** 2) / 2).softmax(0).tolist()


def _distance(found: Tensor, frozen: Tensor) -> Tensor:
    """Return the mean absolute difference of unit vectors, in single precision."""
    return F.l1_loss(F.normalize(single(found), dim=-1), F.normalize(single(frozen), dim=-1))
