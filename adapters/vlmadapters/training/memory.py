"""How much memory a training step takes, measured on a small one before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from vlmadapters.clip.frozen import Backbone
from vlmadapters.data.task import Task
from vlmadapters.methods.base import Method, Step
from vlmadapters.training.optimization import own_draws
from vlmlayers.errors import UserError
from vlmlayers.models.devices import available_memory

# What autograd keeps is measured; what a step needs besides and frees at once is not:
# gradients on their way down, and the hidden layer of the block that is being computed.
TRANSIENT = 1.5
# Trainings that differ in their seed or data alone take as much: measured once for a backbone.
_MEASURED: WeakKeyDictionary[Backbone, dict[Any, int]] = WeakKeyDictionary()


def kept_bytes(backbone: Backbone, method: Method, task: Task, images: int, classes: int) -> int:
    """Return the bytes that autograd keeps of one step's forward pass; the method stays as it was.

    Args:
        backbone: The backbone.
        method: The method.
        task: Classes to take the step's from.
        images: How many images the step sees.
        classes: How many classes.
    """
    # A step may count itself, or keep running means; a user's method may hold the backbone.
    method = deepcopy(method, {id(one): one for one in (backbone, backbone.clip)})
    some = replace(task, class_names=task.class_names[:classes])
    start = method.first(backbone, "vision")
    example = backbone.vision.tower.example(images)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        # By storage: views of one tensor are saved many times and held once.
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        # Alive until all are counted, so that no place is taken twice; but not with its own graph,
        # which a tensor that an operation saves of its result would keep alive for ever.
        return tensor.detach()

    with torch.no_grad():
        prepared = method.prepare(backbone, some)
    labels = torch.zeros(images, dtype=torch.long, device=backbone.device)
    state = backbone.images(example, [start])[start]
    step = Step(backbone, state, labels, prepared, torch.Generator().manual_seed(0))
    # Autograd saves weights as well, which are in memory whether or not a step runs.
    frozen = {p.untyped_storage().data_ptr() for p in backbone.clip.parameters()}
    draws = own_draws(method.config.name, 0, backbone.device)
    with draws, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        method.loss(step)
    return sum(size for place, size in kept.items() if place not in frozen)


def step_bytes(backbone: Backbone, method: Method, task: Task, batch_size: int) -> int:
    """Return about how many bytes one training step takes at its peak.

    What is kept grows with images, with classes, and with both where the text depends on the
    image: four small steps tell the four coefficients.
    """
    known = _MEASURED.setdefault(backbone, {})
    key = type(method), method.config, task, batch_size
    if key not in known:
        known[key] = _measured(backbone, method, task, batch_size)
    return known[key]


def _measured(backbone: Backbone, method: Method, task: Task, batch_size: int) -> int:
    classes = len(task.class_names)
    # Two at least where there will be: a step may compare images or classes, or normalise batches.
    few = min(2, batch_size)
    if classes < 4:  # too few to extrapolate from two and three
        return round(
            TRANSIENT * batch_size / few * kept_bytes(backbone, method, task, few, classes)
        )
    sizes = {
        (i, j): kept_bytes(backbone, method, task, few + i, 2 + j) for i in (0, 1) for j in (0, 1)
    }
    both = sizes[1, 1] - sizes[1, 0] - sizes[0, 1] + sizes[0, 0]
    per_image, per_class = sizes[1, 0] - sizes[0, 0], sizes[0, 1] - sizes[0, 0]
    more, further = batch_size - few, method.classes_of_step(batch_size, classes) - 2
    kept = sizes[0, 0] + per_image * more + per_class * further + both * more * further
    return round(TRANSIENT * kept)


def view_bytes(backbone: Backbone, views: int, starts: Sequence[int]) -> int:
    """Return the bytes that the frozen activations of some views take at the blocks named."""
    example = backbone.vision.tower.example(1)
    states = backbone.images(example, starts)
    sizes = [s.x.nbytes for s in states.values() if s.x is not None]
    return views * sum(sizes)


def check_memory(
    backbone: Backbone, methods: Sequence[Method], task: Task, batch_size: int, kept: int = 0
) -> None:
    """Raise a UserError where a training step would not fit into memory.

    Methods are updated one after the other, so the one that takes most counts.

    Args:
        backbone: The backbone.
        methods: The methods.
        task: The classes trained on.
        batch_size: Images per step and process.
        kept: Bytes of frozen activations that will be kept in main memory.
    """
    device = backbone.device
    step = max(step_bytes(backbone, method, task, batch_size) for method in methods)
    free = available_memory(device)
    needed = step + (kept if device.type == "cpu" else 0)
    if needed > free:
        cache = f", {kept / 1e9:.1f} GB of it for cached views" if kept else ""
        raise UserError(
            f"training needs about {needed / 1e9:.1f} GB{cache}, and {device} has "
            f"{free / 1e9:.1f} GB free; lower batch_size ({batch_size}), adapt later blocks, use "
            "fewer classes or fewer cached_views"
        )
