"""On a GPU: train, evaluate and resume, in three precisions, against the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbones import backbone

import vlmadapters as va
from vlmadapters.data.fewshot import base_or_novel, few_shot
from vlmadapters.data.images import Images
from vlmadapters.data.task import Task
from vlmadapters.methods.base import MethodConfig
from vlmadapters.protocols.evaluate import Case, Evaluator
from vlmadapters.training.recipes import TrainConfig
from vlmadapters.training.trainer import Trainer, TrainResult
from vlmlayers.manifests import Manifest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CONFIG = va.MMAConfig.span(2, 3, dim=4, scale=0.1)
TRAIN = TrainConfig(lr=0.05, epochs=2, batch_size=4, shots=2, precision="fp32")
MANIFEST = Manifest.load("shapes_filled")
LABELS = range(len(MANIFEST.class_names()))


def model_on(device: str) -> Any:
    torch.manual_seed(0)
    model = backbone()
    model.clip.to(device)
    return model


def trainer(
    model: Any, train: TrainConfig, configs: Sequence[MethodConfig] = (CONFIG,), **options: Any
) -> Trainer:
    items = base_or_novel(few_shot(MANIFEST.items("train"), train.shots, 1), "base", LABELS)
    names = MANIFEST.class_names()[: max(item.label for item in items) + 1]
    images = Images(model, MANIFEST)
    return Trainer(model, images, items, names, configs, train, progress=False, **options)


def state(result: TrainResult) -> dict[str, torch.Tensor]:
    return {key: value.cpu() for key, value in result.method.official_state_dict().items()}


def test_single_precision_trains_and_predicts_as_on_the_cpu() -> None:
    losses, states, labels = [], [], []
    for device in ("cpu", "cuda"):
        model = model_on(device)
        found = trainer(model, TRAIN).fit()[0]
        losses.append(found.losses)
        states.append(state(found))
        case = Case(found.method, Task(MANIFEST.class_names()))
        evaluator = Evaluator(model, precision="fp32", progress=False)
        items = MANIFEST.items("test")[:60]
        labels.append(evaluator.answers(Images(model, MANIFEST), items, [case])[0].labels)
    np.testing.assert_allclose(losses[1], losses[0], atol=1e-3)
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, atol=1e-3, rtol=1e-3)
    assert (labels[0] == labels[1]).mean() > 0.98


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_trains_close_to_single(precision: str) -> None:
    model = model_on("cuda")
    single = trainer(model, TRAIN).fit()[0].losses
    made = trainer(model, replace(TRAIN, precision=precision))
    for run in made.runs:
        # From torch's first scale on, 65536, steps are skipped until it suits the gradients.
        run.scaler = torch.amp.GradScaler(init_scale=64.0, enabled=precision == "fp16")
    np.testing.assert_allclose(made.fit()[0].losses, single, rtol=0.05)


@pytest.mark.parametrize("recorded", [False, True])
def test_steps_that_loss_scaling_skips_change_nothing(recorded: bool) -> None:
    made = trainer(model_on("cuda"), replace(TRAIN, precision="fp16", cuda_graph=recorded))
    (run,) = made.runs
    run.scaler = torch.amp.GradScaler(init_scale=2.0**40)  # no gradient of a step is finite
    before = {key: one.clone() for key, one in run.method.official_state_dict().items()}
    made.fit()
    for key, one in run.method.official_state_dict().items():
        assert torch.equal(one, before[key])
    assert run.scaler.get_scale() < 2.0**40


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("views", [0, 1])
def test_a_recorded_step_trains_as_the_step_itself(
    precision: str, optimizer: str, views: int
) -> None:
    train = replace(
        TRAIN, precision=precision, optimizer=optimizer, cached_views=views, epochs=6, lr=0.005
    )
    model = model_on("cuda")
    expected = trainer(model, replace(train, cuda_graph=False)).fit()[0]
    found = trainer(model, replace(train, cuda_graph=True)).fit()[0]
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-3, atol=1e-3)
    for key, value in state(expected).items():
        torch.testing.assert_close(state(found)[key], value, atol=1e-3, rtol=1e-2)


def test_crops_of_the_gpu_are_those_of_the_same_function_on_the_cpu() -> None:
    augmentation, items = TRAIN.augmentation, MANIFEST.items("train")[:8]
    draws = augmentation.draws(len(items), 1, 0)
    images = {device: Images(model_on(device), MANIFEST) for device in ("cpu", "cuda")}
    cpu, cuda = (
        images[device].augmented(items, draws, augmentation, on_device=True) for device in images
    )
    assert cuda.device.type == "cuda"
    level = 255 * images["cpu"].std
    assert ((cuda.cpu() - cpu).abs() * level).max() <= 1.01
    # The CPU's own rounds and clamps between columns and rows too, which shows at sharp edges.
    host = images["cpu"].augmented(items, draws, augmentation)
    assert ((cuda.cpu() - host).abs() * level).mean() < 0.5
    found = trainer(model_on("cuda"), replace(TRAIN, device_crops=True)).fit()[0]
    assert np.isfinite(found.losses).all()


def test_tf32_trains_close_to_single_precision() -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs a GPU with TF32")
    model = model_on("cuda")
    single = trainer(model, TRAIN).fit()[0].losses
    tf32 = trainer(model, replace(TRAIN, precision="tf32")).fit()[0].losses
    np.testing.assert_allclose(tf32, single, rtol=0.02)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_stopped_training_goes_on_where_it_was(precision: str, tmp_path: Path) -> None:
    model = model_on("cuda")
    train = replace(TRAIN, precision=precision, save_every=1)
    whole = trainer(model, train).fit()[0]
    stopped = trainer(model, train, folder=tmp_path)
    update, calls = stopped.update, []

    def stop(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return update(*arguments)

    stopped.update = stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        stopped.fit()
    resumed = trainer(model, train, folder=tmp_path).fit()[0]
    np.testing.assert_allclose(resumed.losses, whole.losses, atol=1e-4)


def small_recipe(method: str) -> Any:
    recipe = va.load_recipe("published", method)
    short = {"epochs": 1, "warmup_epochs": 0, "shots": 2, "batch_size": 4, "steps_per_shot": 0}
    recipe = recipe.replaced(short, {})  # methods that are fitted do not read all of it
    config = type(recipe.method).published({"vision": 3, "text": 3}, **recipe.method.settings())
    return replace(recipe, method=config)


@pytest.mark.parametrize("method", sorted(set(va.METHODS) - {"zero-shot", "tip", "linear-probe"}))
def test_a_step_does_not_wait_for_the_gpu(method: str) -> None:
    """Torch itself refuses what would wait."""
    recipe = small_recipe(method)
    train = replace(recipe.train, precision="fp16", cuda_graph=False)
    made = trainer(model_on("cuda"), train, configs=[recipe.method])
    batches = made.batches(0)
    (run,) = made.runs
    run.method.train()
    made.update(batches[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in (1, 2, 3, 4):  # of the draws of some not every step makes use
            made.step = step
            made.update(batches[step % len(batches)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    updates = sum(map(len, run.unread))
    assert updates == 5 * recipe.train.updates_per_batch  # taken, and not read yet


FIXED = sorted(name for name, method in va.METHODS.items() if not method.varies)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("method", FIXED)
def test_steps_are_recorded_by_themselves_where_none_varies(method: str, precision: str) -> None:
    recipe = small_recipe(method)
    results = []
    for recorded in (False, None):
        train = replace(recipe.train, precision=precision, cuda_graph=recorded)
        made = trainer(model_on("cuda"), train, configs=[recipe.method])
        results.append(made.fit()[0])
        assert (made.graph is None) == (recorded is False)
        if made.graph is not None and made.runs[0].optimizer is not None:
            assert made.graph.outputs  # of the recording
    np.testing.assert_allclose(results[1].losses, results[0].losses, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("method", sorted(set(va.METHODS) - {"zero-shot"}))
def test_every_method_trains_and_predicts_on_the_gpu(method: str) -> None:
    recipe = small_recipe(method)
    found = va.train(
        model_on("cuda"), "shapes_filled", recipe, protocol="few-shot",
        seeds=1, items=40, progress=False,
    )  # fmt: skip
    assert found["accuracy"].between(0, 1).all() and len(found) == 3


@pytest.mark.parametrize("device_crops", [False, True])
def test_processes_that_decode_beside_a_training_change_nothing(
    device_crops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are forked from a process that computes on the GPU meanwhile."""
    monkeypatch.setattr("vlmadapters.data.images.WORTH_STARTING", 16)
    recipe = small_recipe("mma").changed({"device_crops": device_crops}, {})
    found = [
        va.train(
            model_on("cuda"), "shapes_filled", recipe,
            seeds=(1, 2), items=40, progress=False, workers=workers,
        )
        for workers in (0, 2)
    ]  # fmt: skip
    assert len(found[0]) == len(found[1]) == 8
    np.testing.assert_allclose(found[1]["accuracy"], found[0]["accuracy"], atol=0.05)
