"""The host does not wait for the device inside a training step.

What makes it wait is reading a value: `item`, `bool`, `float`, `tolist`, `numpy`, a copy to the
CPU, or an operator whose result has a size that depends on values. All of these can be seen on a
CPU, by torch's dispatcher and by the methods of a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from stepping import MANIFEST, trainer_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from vlmadapters.methods.mma.config import MMAConfig
from vlmadapters.protocols.evaluate import Case, Evaluator
from vlmadapters.training import trainer as training
from vlmadapters.training.optimization import new_optimizer, set_rate
from vlmadapters.training.recipes import TrainConfig
from vlmadapters.training.trainer import Trainer
from vlmlayers.errors import UserError

TRAIN = TrainConfig(lr=0.05, epochs=2, batch_size=2, shots=2)
CONFIG = MMAConfig.span(2, 3, dim=4, scale=0.1)
READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__")
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique")


class Seen(TorchDispatchMode):
    """Notes the operators that the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        by_mask = name == "index" and any(
            one is not None and one.dtype == torch.bool for one in args[1]
        )
        if name in WAITING or by_mask:
            self.waits.append(name)
        return function(*args, **(kwargs or {}))


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    with Seen() as seen, monkeypatch.context() as patch:
        for name in READS:
            own = getattr(Tensor, name)

            def read(self: Tensor, *args: Any, name: str = name, own: Any = own) -> Any:
                seen.waits.append(name)
                return own(self, *args)

            patch.setattr(Tensor, name, read)
        yield seen.waits


def trainer(train: TrainConfig = TRAIN, config: Any = CONFIG) -> Trainer:
    return trainer_of(config, train)


@pytest.mark.parametrize("views", [0, 1])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_of_mma_reads_nothing(
    precision: str, views: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(replace(TRAIN, precision=precision, cached_views=views, max_norm=1.0))
    batch = made.batches(0)[0]
    made.update(batch)  # the first one fills the cache of views
    with watched(monkeypatch) as waits:
        made.update(batch)
    assert waits == []


def test_crops_on_the_device_read_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer()
    items, augmentation = made.items[:4], TRAIN.augmentation
    draws = augmentation.draws(len(items), 1, 0)
    made.images.uploaded(items)
    with watched(monkeypatch) as waits:
        made.images.augmented(items, draws, augmentation, on_device=True)
    assert waits == []


def test_reading_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watch itself can fail."""
    with watched(monkeypatch) as waits:
        x = torch.arange(3)
        bool(x[0] == 0), float(x[1]), x.tolist(), x[x > 0]
    assert {"_local_scalar_dense", "__bool__", "__float__", "tolist", "index"} <= set(waits)


@pytest.mark.parametrize("every", [1, 3, 100])
def test_losses_are_looked_at_now_and_then_and_are_the_same(
    every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = trainer().fit()[0].losses
    monkeypatch.setattr(training, "LOOK_EVERY", every)
    assert trainer().fit()[0].losses == expected


@pytest.mark.parametrize("every", [1, 100])
def test_the_step_whose_loss_is_no_number_is_named_however_late_it_is_seen(
    every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "LOOK_EVERY", every)
    made = trainer()
    method, calls = made.runs[0].method, []
    loss = method.loss

    def broken(step: Any) -> Tensor:
        calls.append(1)
        return loss(step) * (float("nan") if len(calls) == 5 else 1.0)

    method.loss = broken  # type: ignore[method-assign]
    epoch, step = divmod(4, made.steps_per_epoch)
    with pytest.raises(UserError, match=f"nan in epoch {epoch + 1}, step {step + 1};"):
        made.fit()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_optimizer_is_fused_on_a_gpu_alone(optimizer: str) -> None:
    train = replace(TRAIN, optimizer=optimizer)
    for device, fused in (("cpu", None), ("cuda", True)):
        with FakeTensorMode():
            parameter = torch.nn.Parameter(torch.zeros(2, device=device))
        made = new_optimizer([{"params": [parameter], "rate": 1.0}], train)
        assert made.param_groups[0]["fused"] is fused
        set_rate(made, 0.5, False)
        assert made.param_groups[0]["lr"] == 0.5


def test_momentum_is_there_before_a_step_that_loss_scaling_skips() -> None:
    """The fused kernel would leave it as uninitialised memory; here on the CPU's."""
    with FakeTensorMode():
        parameter = torch.nn.Parameter(torch.zeros(3, device="cuda"))
    state = new_optimizer([{"params": [parameter]}], TRAIN).state[parameter]
    assert set(state) == {"momentum_buffer"} and state["momentum_buffer"].shape == (3,)
    parameter = torch.nn.Parameter(torch.ones(3))
    sgd = torch.optim.SGD([parameter], lr=0.1, momentum=0.9, fused=True)
    sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for factor in (float("inf"), 1.0, 1.0):
        sgd.zero_grad()
        scaler.scale((parameter * factor).sum()).backward()
        scaler.step(sgd)
        scaler.update()
    # One step skipped, then two of gradient 1: momentum 1 and 1.9.
    torch.testing.assert_close(parameter.detach(), torch.full((3,), 1 - 0.1 - 0.19))


def test_a_test_batch_is_read_once_for_all_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer()
    cases = [Case(made.runs[0].method, made.task)] * 3
    evaluator = Evaluator(made.model, made.backbone, batch_size=10, progress=False)
    items = MANIFEST.items("test")[:30]
    items = [replace(item, label=item.label % len(made.task.class_names)) for item in items]
    evaluator.answers(made.images, items, cases)
    with watched(monkeypatch) as waits:
        found = evaluator.answers(made.images, items, cases)
    assert waits.count("cpu") == 3
    assert [len(one.labels) for one in found] == [30] * 3
    assert all(np.array_equal(one.labels, found[0].labels) for one in found)
