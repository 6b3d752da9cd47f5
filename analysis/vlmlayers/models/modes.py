"""A model at rest for the length of a pass, and afterwards as its owner left it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Hold a model in eval mode, then give every module the mode back that it had."""
    before = {module: module.training for module in model.modules()}
    if any(before.values()):
        model.eval()
    try:
        yield
    finally:
        if any(before.values()):
            model.train(before[model])  # as a whole, for modules that do more than keep the flag
        # One by one as well: a model in training may hold some of its parts in eval mode.
        for module, training in before.items():
            module.training = training


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Hold every parameter's `requires_grad` at False, then give it back where it was True."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Hold a model in eval mode and without gradients, then give both back as they were."""
    with eval_mode(model), frozen(model):
        yield
