"""Optimizers and rates against the formulas that define them."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from vlmadapters.methods import Methods
from vlmadapters.training.optimization import learning_rate, new_optimizer, own_draws, set_rate
from vlmadapters.training.recipes import TrainConfig

GPU = torch.device("cuda", 1)
GRADIENTS = (1.0, -2.0, 0.5, 0.25)


def walked(train: TrainConfig, start: float) -> float:
    """Return where steps of known gradients lead a single parameter."""
    parameter = nn.Parameter(torch.tensor([start], dtype=torch.float64))
    optimizer = new_optimizer([{"params": [parameter]}], train)
    for gradient in GRADIENTS:
        parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
    return parameter.item()


def test_sgd_follows_its_formula_at_every_value_of_the_recipe() -> None:
    train = TrainConfig(lr=0.1, momentum=0.7, weight_decay=0.2)
    x, velocity = 3.0, 0.0
    for gradient in GRADIENTS:
        velocity = 0.7 * velocity + gradient + 0.2 * x
        x -= 0.1 * velocity
    assert walked(train, 3.0) == pytest.approx(x, rel=1e-12)


def test_adamw_follows_its_formula_at_every_value_of_the_recipe() -> None:
    """Loshchilov and Hutter, 2019, algorithm 2; `momentum` is the first decay rate."""
    train = TrainConfig(
        optimizer="adamw", lr=0.1, momentum=0.7, beta2=0.9, eps=0.05, weight_decay=0.2
    )
    x, first, second = 3.0, 0.0, 0.0
    for step, gradient in enumerate(GRADIENTS, 1):
        first = 0.7 * first + 0.3 * gradient
        second = 0.9 * second + 0.1 * gradient**2
        mean, square = first / (1 - 0.7**step), second / (1 - 0.9**step)
        x -= 0.1 * (mean / (math.sqrt(square) + 0.05) + 0.2 * x)
    assert walked(train, 3.0) == pytest.approx(x, rel=1e-12)


def test_a_rate_falls_by_half_a_cosine_to_its_end_or_stays() -> None:
    train = TrainConfig(lr=1.0, final_lr=0.2, epochs=4)
    steps, per_epoch = 12, 3
    # cos 0, 45, 90 and 135 degrees; every step of an epoch has the epoch's.
    root = math.sqrt(0.5)
    epochs = [0.2 + 0.8 * (1 + cosine) / 2 for cosine in (1.0, root, 0.0, -root)]
    found = [learning_rate(train, step, steps, per_epoch) for step in range(steps)]
    assert found == pytest.approx([rate for rate in epochs for _ in range(per_epoch)])
    # Ten steps begin a fourth epoch, which counts as a whole one.
    assert learning_rate(train, 9, 10, per_epoch) == pytest.approx(epochs[3])
    # Behind a warm-up it starts anew, and falls as slowly: its last epoch is not reached.
    for schedule, steps_of in (("epoch", [3, 3, 3]), ("step", [1] * 9)):
        warm = replace(train, final_lr=0.0, schedule=schedule, warmup_epochs=1, warmup_lr=0.05)
        found = [learning_rate(warm, step, steps, per_epoch) for step in range(steps)]
        starts = np.cumsum([0, *steps_of[:-1]])
        falling = np.repeat((1 + np.cos(np.pi * starts / steps)) / 2, steps_of)
        assert found == pytest.approx([0.05] * 3 + falling.tolist())
    constant = replace(train, schedule="constant", warmup_epochs=1, warmup_lr=0.05)
    found = [learning_rate(constant, step, steps, per_epoch) for step in range(steps)]
    assert found == [0.05] * 3 + [1.0] * 9


def test_groups_have_their_share_of_the_rate_but_in_the_warm_up() -> None:
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": [one], "rate": rate} for one, rate in zip(parameters, (0.1, 1.0))]
    optimizer = new_optimizer(groups, TrainConfig())
    for warming_up, expected in ((True, [0.5, 0.5]), (False, [0.05, 0.5])):
        set_rate(optimizer, 0.5, warming_up)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("device", "asked"),
    [
        (torch.device("cpu"), []),
        (GPU, ["state", GPU, "on", GPU, "seed", 3, "back", GPU]),
    ],
)
def test_a_users_method_seeds_the_gpu_that_it_is_on_and_no_other(
    device: torch.device, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def note(word: str, given: Any = None) -> Any:
        return lambda *arguments: seen.extend([word, arguments[-1]]) or given

    monkeypatch.setattr(Methods, "code", lambda self, name: "of a user")
    monkeypatch.setattr(torch.cuda, "manual_seed_all", note("all"))
    monkeypatch.setattr(torch.cuda, "manual_seed", note("seed"))
    monkeypatch.setattr(torch.cuda, "get_rng_state", note("state"))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda _, device: note("back")(device))
    monkeypatch.setattr(torch.cuda, "device", note("on", nullcontext()))
    before = torch.get_rng_state()
    drawn = []
    for _ in range(2):
        with own_draws("mine", 3, device):
            drawn.append(torch.rand(2))
    assert torch.equal(*drawn) and torch.equal(before, torch.get_rng_state())
    assert seen == 2 * asked
    with own_draws("mine", 4, device):
        assert not torch.equal(torch.rand(2), drawn[0])
