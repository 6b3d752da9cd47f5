"""Optimizers and learning-rate schedules that the published recipes use."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from vlmadapters.methods import METHODS
from vlmadapters.training.recipes import TrainConfig


def new_optimizer(groups: Sequence[dict[str, Any]], train: TrainConfig) -> torch.optim.Optimizer:
    """Return the recipe's optimizer over a method's parameter groups.

    On a GPU it is the fused one: one launch for all parameters, and it looks itself whether loss
    scaling found a gradient that is not finite, where others make the host wait for that.
    """
    # Copies, since rates are written into them. A method may have a group without parameters.
    made = [dict(group) for group in groups if group["params"]]
    device = made[0]["params"][0].device
    # None, not False: with False torch does not use its `foreach` kernels either.
    fused = device.type == "cuda" or None
    if train.cuda_graph:  # a recorded step reads its rate from the device
        for group in made:
            group["lr"] = torch.tensor(train.lr, device=device)
    if train.optimizer == "adamw":
        return torch.optim.AdamW(
            made,
            lr=train.lr,
            betas=(train.momentum, train.beta2),
            eps=train.eps,
            weight_decay=train.weight_decay,
            fused=fused,
            capturable=bool(train.cuda_graph),
        )
    sgd = torch.optim.SGD(
        made, lr=train.lr, momentum=train.momentum, weight_decay=train.weight_decay, fused=fused
    )
    if fused and train.momentum:
        # The fused kernel makes them uninitialised, and leaves them so where it skips the first
        # step for a gradient that is not finite, as loss scaling has it do: NaN from then on.
        for parameter in (one for group in sgd.param_groups for one in group["params"]):
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def learning_rate(train: TrainConfig, step: int, steps: int, per_epoch: int) -> float:
    """Return the learning rate of one step.

    Warm-up epochs run at a constant `warmup_lr`. Then the cosine falls from `lr` towards
    `final_lr`, counted anew from the end of the warm-up over all epochs, so that with a warm-up
    its end is not reached (Dassl's schedule, which most published recipes use).

    Args:
        train: The recipe.
        step: Steps done before this step.
        steps: Steps in all.
        per_epoch: Steps of a whole epoch.
    """
    epoch = step // per_epoch
    if epoch < train.warmup_epochs:
        return train.warmup_lr
    if train.schedule == "constant":
        return train.lr
    if train.schedule == "step":
        share = (step - train.warmup_epochs * per_epoch) / steps
    else:
        # An epoch that training ends in counts as a whole one.
        share = (epoch - train.warmup_epochs) / math.ceil(steps / per_epoch)
    return train.final_lr + (train.lr - train.final_lr) * (1 + math.cos(math.pi * share)) / 2


def set_rate(optimizer: torch.optim.Optimizer, rate: float, warming_up: bool) -> None:
    """Set the rate of all groups: each its share of it, except in the warm-up."""
    # The public warm-up sets one constant for every group, whatever its own rate.
    for group in optimizer.param_groups:
        value = rate if warming_up else rate * group.get("rate", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


@contextmanager
def own_draws(method: str, seed: int, device: torch.device) -> Iterator[None]:
    """Let a user's method draw from torch's own generators as a seed says, which stay as they were.

    What ships draws from generators of its own, and is left alone.
    """
    if not METHODS.code(method):
        yield
        return
    gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if gpu else []):
        # Not `torch.manual_seed`: it seeds all GPUs, and others are not given their states back.
        torch.default_generator.manual_seed(seed)
        with torch.cuda.device(device) if gpu else nullcontext():
            if gpu:
                torch.cuda.manual_seed(seed)
        yield
