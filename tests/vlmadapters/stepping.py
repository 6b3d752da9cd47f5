"""Training steps of a method on a small backbone: one alone, or all that a trainer makes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from backbones import shared_backbone
from torch import Tensor

from vlmadapters.clip.frozen import Backbone
from vlmadapters.clip.savings import Savings
from vlmadapters.data.fewshot import base_or_novel, few_shot
from vlmadapters.data.images import Images
from vlmadapters.data.task import Task
from vlmadapters.methods import METHODS
from vlmadapters.methods.base import Method, Step
from vlmadapters.methods.config import MethodConfig
from vlmadapters.training.recipes import TrainConfig
from vlmadapters.training.trainer import Trainer
from vlmlayers.manifests import Manifest

TASK = Task(("cat", "golden_retriever", "bus"), other_names=("sea_lion", "Boeing 747"))
MANIFEST = Manifest.load("shapes_filled")


def built(
    config: MethodConfig,
    savings: Savings | None = None,
    family: str = "clip",
    *,
    task: Task = TASK,
) -> tuple[Any, Backbone]:
    """Return a method and the small backbone that it is of."""
    model = shared_backbone(family)
    backbone = Backbone(model.clip, savings, model.tokenizer)
    return METHODS[config.name].build(config, backbone, task, seed=3), backbone


def moved(method: Any, by: float, seed: int = 1) -> Any:
    """Move all parameters away from their start, where some are 0, alike or CLIP's own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in method.parameters():
            value.add_(torch.randn(value.shape, generator=generator), alpha=by)
    return method


def step_of(
    method: Method,
    backbone: Backbone,
    task: Task = TASK,
    draws: Mapping[str, Tensor] | None = None,
    images: int = 4,
) -> Step:
    """Return what a step sees of a few random images."""
    generator = torch.Generator().manual_seed(0)
    shape = backbone.vision.tower.example(images).shape
    start = method.first(backbone, "vision")
    with torch.no_grad():
        state = backbone.images(torch.rand(shape, generator=generator), [start])[start]
        classes = method.prepare(backbone, task)
    labels = torch.arange(images) % len(task.class_names)
    return Step(backbone, state, labels, classes, generator, draws=draws)


def first_step(
    method: Method,
    backbone: Backbone,
    task: Task = TASK,
    draws: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return loss and gradients, by parameter, of a step."""
    backbone.clip.requires_grad_(False)
    loss = method.train().loss(step_of(method, backbone, task, draws))
    loss.backward()
    return {"loss": loss.detach()} | {
        name: parameter.grad.clone()
        for name, parameter in method.named_parameters()
        if parameter.grad is not None
    }


def assert_same_step(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Assert that loss and gradients agree, each relative to its largest entry."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        error = (found[key] - value).abs().max() / value.abs().max().clamp_min(1e-12)
        assert error < 1e-4, key


def trainer_of(config: MethodConfig, train: TrainConfig, seed: int = 1, **options: Any) -> Trainer:
    """Return the trainer of a method on base classes of drawn shapes, with validation items."""
    model = shared_backbone()
    count = range(len(MANIFEST.class_names()))
    drawn = {
        split: base_or_novel(few_shot(MANIFEST.items(split), train.shots, seed), "base", count)
        for split in ("train", "val")
    }
    names = MANIFEST.class_names()[: 1 + max(item.label for item in drawn["train"])]
    options = {"validation": drawn["val"], "progress": False} | options
    images = Images(model, MANIFEST)
    return Trainer(model, images, drawn["train"], Task(names), [config], train, seed, **options)
