"""A model at rest for the length of a pass, and afterwards as its owner left it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

_TURNS: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()


@contextmanager
def in_turn(model: nn.Module) -> Iterator[None]:
    """Let one thread at a time use a model: hooks of one would record the batches of another."""
    with _TURNS.setdefault(model, RLock()):
        yield


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Hold a model in eval mode, then give every module the mode back that it had."""
    before = {module: module.training for module in model.modules()}
    if any(before.values()):
        model.eval()
    try:
        with _merged(before):
            yield
    finally:
        if any(before.values()):
            model.train(before[model])  # as a whole, for modules that do more than keep the flag
        # One by one as well: a model in training may hold some of its parts in eval mode.
        for module, training in before.items():
            module.training = training


@contextmanager
def _merged(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Hold the adapters that peft puts into fused attention merged, then give the weights back.

    Such a layer else adds them to its weights in each pass and takes them off again, by rounding
    not to what they were, and after a pass without gradients no longer to be changed in place.
    """
    # By what they do, not by class: peft need not be installed.
    layers: list[Any] = [part for part in modules if hasattr(part, "_restore_weights")]
    held = []
    try:
        for layer in layers:
            if not (layer.merged or layer.disable_adapters):
                base, out = layer.get_base_layer(), layer.get_base_layer().out_proj
                own = out.get_base_layer()
                kept = [(base, "in_proj_weight", base.in_proj_weight), (own, "weight", own.weight)]
                held.append((layer, out, kept))
                with torch.no_grad():
                    layer.merge()
        yield
    finally:
        for layer, out, kept in held:
            for part, name, weight in kept:
                delattr(part, name)
                part.register_parameter(name, weight)
            layer.merged_adapters.clear()
            out.merged_adapters.clear()


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


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let the CPU's own generator draw as a seed says, then give its state back.

    Those of GPUs are left alone: to save their states would start CUDA where it may not be needed,
    and `torch.manual_seed` seeds them as well.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def in_float32() -> Iterator[None]:
    """Hold the type of new parameters, which the caller may have set to another, at float32."""
    own = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(own)


@contextmanager
def on_cpu() -> Iterator[None]:
    """Make tensors on the CPU where nothing says where; the caller may have set a GPU."""
    # Torch 2.6 does not name there what `with torch.device(…)` set.
    elsewhere = torch.get_default_device().type != "cpu" or torch.empty(0).device.type != "cpu"
    # Only then: torch sends each call by way of such a context.
    with torch.device("cpu") if elsewhere else nullcontext():
        yield
