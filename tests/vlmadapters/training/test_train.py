"""Training: what is saved changes no loss, what is resumed goes on exactly, what fails says why."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from backbones import shared_backbone
from stepping import trainer_of
from torch import nn

import vlmadapters as va
from vlmadapters.clip import products
from vlmadapters.clip.frozen import Backbone
from vlmadapters.clip.products import TimedProduct, has_onednn
from vlmadapters.clip.savings import Savings
from vlmadapters.data.fewshot import base_or_novel, few_shot
from vlmadapters.data.images import Images
from vlmadapters.data.task import Task
from vlmadapters.device import own_modes
from vlmadapters.methods import METHODS
from vlmadapters.methods.base import Method, Step
from vlmadapters.methods.configs import CoOpConfig, KgCoOpConfig
from vlmadapters.methods.deep_configs import PromptSRCConfig
from vlmadapters.methods.mma.config import MMAConfig
from vlmadapters.methods.mma.module import Adapter
from vlmadapters.methods.promptsrc import PromptSRC
from vlmadapters.protocols.evaluate import Case, Evaluator
from vlmadapters.training.memory import kept_bytes, step_bytes
from vlmadapters.training.recipes import TrainConfig
from vlmadapters.training.state import STATE_FILE
from vlmadapters.training.trainer import Trainer, TrainResult, count_steps
from vlmlayers.errors import UserError
from vlmlayers.manifests import Manifest
from vlmlayers.models.devices import available_memory

CONFIG = MMAConfig.span(2, 3, dim=4, scale=0.1)
TRAIN = TrainConfig(lr=0.05, epochs=2, batch_size=4, shots=2)
MANIFEST = Manifest.load("shapes_filled")
LABELS = range(len(MANIFEST.class_names()))


def trainer(
    train: TrainConfig = TRAIN, configs: tuple[MMAConfig, ...] = (CONFIG,), **options: Any
) -> Trainer:
    model = shared_backbone(options.pop("family", "clip"))
    items = base_or_novel(few_shot(MANIFEST.items("train"), train.shots, 1), "base", LABELS)
    names = MANIFEST.class_names()[: max(item.label for item in items) + 1]
    names = options.pop("names", names)
    return Trainer(
        model, Images(model, MANIFEST), items, names, configs, train, progress=False, **options
    )


def fit(*arguments: Any, **options: Any) -> TrainResult:
    return trainer(*arguments, **options).fit()[0]


@pytest.fixture(scope="module")
def plain() -> TrainResult:
    return fit(replace(TRAIN, savings=Savings.none()))


ALL = {"all": Savings(), "all but oneDNN": Savings(onednn=False)}


@pytest.mark.parametrize("on", [*Savings.__dataclass_fields__, *ALL])
def test_no_saving_changes_a_loss(on: str, plain: TrainResult) -> None:
    savings = ALL[on] if on in ALL else replace(Savings.none(), **{on: True})
    result = fit(replace(TRAIN, savings=savings))
    np.testing.assert_allclose(result.losses, plain.losses, atol=2e-5)
    for key, value in result.method.official_state_dict().items():
        torch.testing.assert_close(
            value, plain.method.official_state_dict()[key], atol=1e-5, rtol=1e-3
        )


def test_training_lowers_the_loss() -> None:
    longer = fit(replace(TRAIN, epochs=8, lr=0.3, crop_scale=(0.9, 1.0)))
    assert np.mean(longer.losses[-3:]) < np.mean(longer.losses[:3]) - 0.05


def test_cached_views_repeat_the_first_epochs_views() -> None:
    """With one epoch there is nothing to repeat, so losses are those of fresh views."""
    once = replace(TRAIN, epochs=1)
    fresh = fit(once)
    for savings in (Savings(), Savings(image_prefix=False)):
        cached = fit(replace(once, cached_views=1, savings=savings))
        np.testing.assert_allclose(cached.losses, fresh.losses, atol=1e-5)
    made = trainer(replace(TRAIN, epochs=3, cached_views=1))
    calls: list[int] = []
    original = made.images.augmented
    made.images.augmented = lambda items, *a, **k: (
        calls.append(len(items)) or original(items, *a, **k)
    )
    made.fit()
    kept = made.batches(0)[0].size * len(made.batches(0))
    assert sum(calls) <= len(made.items)
    assert sum(calls) >= kept


@pytest.mark.parametrize("views", [0, 1])
def test_placements_trained_together_are_those_trained_alone(views: int) -> None:
    configs = (CONFIG, MMAConfig.span(1, 3, dim=4, scale=0.1), MMAConfig((3,), (), 4, 0.1))
    train = replace(TRAIN, cached_views=views)
    together = trainer(train, configs).fit()
    for config, result in zip(configs, together):
        alone = fit(train, (config,))
        np.testing.assert_allclose(result.losses, alone.losses, atol=1e-5)


def test_a_small_view_cache_keeps_the_lowest_block_only(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = (CONFIG, MMAConfig.span(1, 3, dim=4, scale=0.1))
    train = replace(TRAIN, cached_views=1)
    expected = [result.losses for result in trainer(train, configs).fit()]
    monkeypatch.setattr("vlmadapters.clip.frozen.VIEW_BYTES", 0)
    made = trainer(train, configs)
    losses = [result.losses for result in made.fit()]
    assert made.views.cache is not None
    assert list(made.views.cache.stored) == [1]
    np.testing.assert_allclose(losses, expected, atol=1e-5)


def test_images_prepared_ahead_by_threads_give_the_same_losses(plain: TrainResult) -> None:
    made = trainer()
    made.images = Images(made.model, MANIFEST, workers=2)
    np.testing.assert_allclose(made.fit()[0].losses, plain.losses, atol=2e-5)


def test_the_same_seed_gives_the_same_losses_and_global_state_is_left_alone() -> None:
    torch.manual_seed(7)
    np.random.seed(7)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    first = fit().losses
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == np.random.get_state()[1].tolist()
    assert fit().losses == first
    assert fit(seed=2).losses != first


class Stop(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize(("at", "save_every"), [(3, 1), (5, 2), (7, 0)])
def test_a_stopped_training_goes_on_exactly(
    at: int, save_every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlmadapters.training.trainer.SAVE_SECONDS", 0.0)
    train = replace(TRAIN, epochs=3, save_every=save_every)
    whole = fit(train)
    first = trainer(train, folder=tmp_path)
    update, calls = first.update, []

    def failing(*arguments: Any) -> list[float]:
        calls.append(1)
        if len(calls) > at:
            raise Stop
        return update(*arguments)

    first.update = failing
    with pytest.raises(Stop):
        first.fit()
    second, again = trainer(train, folder=tmp_path), []
    update = second.update
    second.update = lambda *arguments: again.append(1) or update(*arguments)
    resumed = second.fit()[0]
    assert 0 < len(again) < len(whole.losses) == len(resumed.losses)
    assert resumed.losses == whole.losses
    for key, value in resumed.method.official_state_dict().items():
        assert torch.equal(value, whole.method.official_state_dict()[key])


def test_no_state_is_saved_between_the_last_step_of_an_epoch_and_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training killed there would pass for done, without the mean of PromptSRC's epochs."""
    train = replace(TRAIN, save_every=1)
    prompts: Any = PromptSRCConfig((2,), (2,), centre=1.0)
    whole = fit(train, (prompts,))
    with monkeypatch.context() as patched:
        end_epoch, left = PromptSRC.end_epoch, [train.epochs]

        def failing(*arguments: Any) -> None:
            left[0] -= 1
            if not left[0]:
                raise Stop
            end_epoch(*arguments)

        patched.setattr(PromptSRC, "end_epoch", failing)
        with pytest.raises(Stop):
            fit(train, (prompts,), folder=tmp_path)
    resumed = fit(train, (prompts,), folder=tmp_path)
    assert resumed.losses == whole.losses
    for key, value in resumed.method.state_dict().items():
        assert torch.equal(value, whole.method.state_dict()[key]), key


@pytest.mark.parametrize(("seconds", "saved"), [(0.0, [1, 2, 3]), (1e9, [3])])
def test_epochs_of_a_moment_are_saved_now_and_then(
    seconds: float, saved: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saving each took a fifth of a GPU's epoch."""
    found: list[int] = []
    monkeypatch.setattr("vlmadapters.training.trainer.SAVE_SECONDS", seconds)
    monkeypatch.setattr(
        "vlmadapters.training.trainer.save_training_state",
        lambda folder, identity, state: found.append(state["epoch"]),
    )
    trainer(replace(TRAIN, epochs=3), folder=tmp_path).fit()
    assert found == saved


@pytest.mark.skipif(not has_onednn(), reason="this torch brings no oneDNN")
def test_a_training_that_goes_on_multiplies_by_the_library_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the process that goes on the other library would win the timing."""
    faster, multiply = ["onednn"], products.onednn_linear
    # Rounding alone shows on some processors only.
    monkeypatch.setattr(products, "onednn_linear", lambda *of: multiply(*of) * (1 + 1e-5))
    monkeypatch.setattr(products, "LEAST", 0)
    monkeypatch.setattr(products, "_time", lambda shape: TimedProduct(1.0, 1.0, faster[0]))
    products.forget_products()
    try:
        train = replace(TRAIN, save_every=1)
        whole = fit(train)
        first = trainer(train, folder=tmp_path)
        update, left = first.update, [2]

        def failing(*arguments: Any) -> list[float]:
            left[0] -= 1
            if left[0] < 0:
                raise Stop
            return update(*arguments)

        first.update = failing
        with pytest.raises(Stop):
            first.fit()
        products.forget_products()
        faster[0] = "torch"
        assert fit(train, folder=tmp_path).losses == whole.losses
        assert {one["library"] for one in products.timed_products()} == {"onednn"}
    finally:
        products.forget_products()


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"train": replace(TRAIN, lr=0.5)}, r"train\.lr"),
        ({"seed": 2}, "seed"),
        ({"configs": (replace(CONFIG, scale=0.2),)}, "methods"),
        ({"names": [f"class {label}" for label in LABELS]}, "task"),
        ({"family": "custom text"}, "model"),
        ({"validation": MANIFEST.items("val")[:1]}, "of other images"),
    ],
)
def test_a_folder_of_another_run_is_refused(
    other: dict[str, Any], named: str, tmp_path: Path
) -> None:
    fit(folder=tmp_path)
    assert (tmp_path / STATE_FILE).exists()
    with pytest.raises(UserError, match=f"belongs to another run: .*{named}"):
        fit(folder=tmp_path, **other)


def test_a_loss_that_is_no_number_stops_with_what_to_do() -> None:
    with pytest.raises(UserError, match=r"became (nan|inf) in epoch \d+, step \d+; lower lr"):
        fit(replace(TRAIN, lr=1e30, epochs=8))


def test_a_step_that_would_not_fit_is_refused_before_it_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vlmadapters.training.memory.available_memory", lambda device: 1000)
    with pytest.raises(UserError, match=r"needs about .* GB, and cpu has .* GB free; lower batch"):
        trainer()
    with pytest.raises(UserError, match=r"GB of it for cached views.* fewer cached_views"):
        trainer(replace(TRAIN, cached_views=2))


def test_a_containers_limit_counts_as_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("vlmlayers.models.devices.CGROUP", tmp_path)
    cpu = torch.device("cpu")
    free = available_memory(cpu)
    assert 1 << 20 < free < 1 << 50
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("4000\n")
    (tmp_path / "memory.stat").write_text("anon 3000\ninactive_file 500\n")
    assert available_memory(cpu) == 1500
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(cpu) > 1 << 20


def test_the_memory_estimate_is_near_what_the_graph_keeps() -> None:
    """Counted by a second route: bytes of the tensors autograd saves."""
    model = shared_backbone()
    made = trainer(replace(TRAIN, batch_size=8, shots=8, savings=Savings.none()))
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_leaf or tensor.requires_grad is False:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()

    weights = {p.untyped_storage().data_ptr() for p in model.clip.parameters()}
    method, task = made.runs[0].method, made.task
    backbone = Backbone(model.clip, Savings.none(), model.tokenizer)
    classes = method.prepare(backbone, task)
    images = backbone.images(model.towers["vision"].example(8), [2])[2]
    labels = torch.zeros(8, dtype=torch.long)
    step = Step(backbone, images, labels, classes, torch.Generator())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        method.loss(step)
    measured = sum(size for pointer, size in saved.items() if pointer not in weights)
    assert 0.9 * measured < step_bytes(backbone, method, task, 8) < 3 * measured


def test_measuring_a_step_leaves_nothing_behind() -> None:
    """A sweep measures one step for each training; their graphs once stayed until its end."""
    model = shared_backbone()
    made = trainer()
    method, task = made.runs[0].method, made.task
    backbone = Backbone(model.clip, Savings.none(), model.tokenizer)

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(one, torch.Tensor) for one in gc.get_objects())

    step_bytes(backbone, method, task, 8)  # what is kept once for a backbone
    before = tensors()
    step_bytes(backbone, method, task, 9)
    assert tensors() <= before


def test_a_step_is_measured_once_for_all_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[Any, ...]] = []

    def count(*given: Any) -> int:
        measured.append(given)
        return kept_bytes(*given)

    monkeypatch.setattr("vlmadapters.training.memory.kept_bytes", count)
    model = shared_backbone()
    backbone = Backbone(model.clip, Savings(), model.tokenizer)

    def measures(train: TrainConfig = TRAIN, config: MMAConfig = CONFIG, seed: int = 1) -> bool:
        measured.clear()
        trainer(train, (config,), seed=seed, backbone=backbone)
        return bool(measured)

    assert measures() and not measures(seed=2)
    assert measures(replace(TRAIN, batch_size=2))
    assert measures(config=replace(CONFIG, dim=8))
    assert measures(replace(TRAIN, template="a photo of my {}"))
    assert not measures(replace(TRAIN, lr=0.01, epochs=3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: trainer(replace(TRAIN, precision="fp16")), "fp16 needs a GPU"),
        (lambda: TrainConfig(precision="fp8"), "did you mean"),
        (lambda: TrainConfig(epochs=0), "epochs takes a whole number from 1, not 0"),
        (lambda: TrainConfig(lr=0.0), "lr takes a number above 0, not 0.0"),
        (lambda: TrainConfig(cached_views=-1), "cached_views takes a whole number from 0, not -1"),
        (
            lambda: Trainer(
                shared_backbone(), Images(shared_backbone(), MANIFEST), [], ["a"], [CONFIG]
            ),
            "no training items",
        ),
        (
            lambda: Trainer(
                shared_backbone(),
                Images(shared_backbone(), MANIFEST),
                MANIFEST.items("train")[:9],
                ["a"],
                [CONFIG],
            ),
            "training labels go up to",
        ),
    ],
)
def test_mistakes_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_bf16_autocast_trains_close_to_fp32() -> None:
    low = fit(replace(TRAIN, precision="bf16"))
    np.testing.assert_allclose(low.losses, fit().losses, rtol=0.05)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"zero-shot"}))
def test_half_precision_within_a_callers_autocast_is_that_without(name: str) -> None:
    """Torch forgets the weights it has cast where the outermost autocast ends: after all steps."""
    recipe = va.load_recipe("published", name)
    config = type(recipe.method).published({"vision": 3, "text": 3}, **recipe.method.settings())
    train = TrainConfig(lr=0.1, epochs=2, batch_size=4, shots=2, precision="bf16")
    alone = trainer_of(config, train).fit()[0]
    with torch.autocast("cpu", dtype=torch.bfloat16), own_modes():
        within = trainer_of(config, train).fit()[0]
    np.testing.assert_array_equal(within.losses, alone.losses)
    for key, value in alone.method.state_dict().items():
        torch.testing.assert_close(within.method.state_dict()[key], value, atol=0, rtol=0)


def test_evaluation_after_an_update_is_fresh() -> None:
    """Evaluate, train, evaluate: text features kept from before are dropped."""
    made = trainer(replace(TRAIN, lr=0.5, epochs=4))
    model, adapter = shared_backbone(), made.runs[0].method
    evaluator = Evaluator(model, made.backbone, progress=False)
    task = Task(("circle", "star"))
    before = evaluator.class_features(adapter, task)
    assert evaluator.class_features(adapter, task) is before
    made.fit()
    after = evaluator.class_features(adapter, task)
    fresh = Evaluator(model, progress=False).class_features(adapter, task)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, fresh)


def test_text_features_go_with_their_adapter() -> None:
    """A sweep keeps neither the adapters of finished cells nor what they made of prompts."""
    model = shared_backbone()
    evaluator = Evaluator(model, progress=False)
    adapter = Adapter(CONFIG, {name: tower.width for name, tower in model.towers.items()})
    task = Task(("star",))
    features, gone = evaluator.class_features(adapter, task), weakref.ref(adapter)
    assert evaluator.class_features(adapter, task) is features
    del adapter
    gc.collect()
    assert gone() is None


def test_cases_together_predict_what_each_does_alone() -> None:
    made = trainer(replace(TRAIN, lr=0.5, epochs=4))
    adapter = made.fit()[0].method
    items, task = MANIFEST.items("test")[:30], Task(MANIFEST.class_names())
    model, plain = shared_backbone(), Method()
    cases = [Case(plain, task), Case(adapter, task), Case(plain, replace(task, template="a {}"))]
    images = Images(model, MANIFEST)
    found = Evaluator(model, progress=False).answers(images, items, cases)
    together = [answers.labels for answers in found]
    backbone = Backbone(model.clip, Savings.none(), model.tokenizer)
    for case, labels in zip(cases, together):
        alone = Evaluator(model, backbone, batch_size=7, progress=False)
        assert np.array_equal(alone.answers(images, items, [case])[0].labels, labels)
    assert not np.array_equal(together[0], together[1])


SCRIPT = """
import sys, torch
sys.path[:0] = sys.argv[2:]
torch.set_num_threads(1)
from test_train import TRAIN, predictions, trainer
from vlmadapters.training import processes
with processes.process_group() as (rank, size):
    made = trainer(TRAIN)
    result, labels = made.fit()[0], predictions(made)
    if rank == 0:
        torch.save({"state": result.method.official_state_dict(), "losses": result.losses,
                    "size": size, "labels": labels.tolist()}, sys.argv[1])
"""


def predictions(made: Trainer) -> np.ndarray[Any, Any]:
    """Return labels of 31 test items, a number that two processes do not divide evenly."""
    evaluator = Evaluator(made.model, made.backbone, batch_size=5, progress=False)
    case = Case(made.runs[0].method, Task(MANIFEST.class_names(), made.train.template))
    return evaluator.answers(made.images, MANIFEST.items("test")[:31], [case])[0].labels


def test_two_processes_give_the_parameters_and_predictions_of_one(tmp_path: Path) -> None:
    script, out = tmp_path / "run.py", tmp_path / "out.pt"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    here = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    subprocess.run(
        [*command, str(script), str(out), *here], check=True, capture_output=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    found = torch.load(out, weights_only=True)
    assert found["size"] == 2
    made = trainer()
    one = made.fit()[0]
    assert found["labels"] == predictions(made).tolist()
    np.testing.assert_allclose(found["losses"], one.losses, atol=1e-5)
    for key, value in one.method.official_state_dict().items():
        torch.testing.assert_close(found["state"][key], value, atol=1e-6, rtol=1e-4)


def test_a_batch_that_does_not_divide_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmadapters.training.processes.rank_and_size", lambda: (0, 3))
    with pytest.raises(UserError, match="does not divide over 3 processes"):
        trainer()


def test_nor_may_the_last_batch_of_an_epoch_leave_one_process_more_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The means of shares of two images and one would count the same."""
    size = len(trainer().items) - 2  # 2 images are left for the last batch
    whole = replace(TRAIN, batch_size=size, drop_last=False)
    monkeypatch.setattr("vlmadapters.training.processes.rank_and_size", lambda: (0, size))
    with pytest.raises(UserError, match="last batch of an epoch, of 2 images, does not divide"):
        trainer(whole)
    trainer(replace(whole, drop_last=True))


def test_steps_are_those_of_the_batches_that_are_kept() -> None:
    plain = replace(TRAIN, batch_size=4, epochs=3, steps_per_shot=0)
    for items, drop_last, steps in ((10, True, 6), (10, False, 9), (8, False, 6), (3, True, 3)):
        assert count_steps(replace(plain, drop_last=drop_last), items) == steps
    assert count_steps(replace(plain, steps_per_shot=5, shots=2), 10) == 10


@pytest.mark.parametrize(("epochs", "warmup"), [(1, 1), (2, 3)])
def test_a_training_that_would_end_in_its_warm_up_says_how_many_epochs_it_takes(
    epochs: int, warmup: int
) -> None:
    asked = replace(TRAIN, epochs=epochs, warmup_epochs=warmup)
    with pytest.raises(UserError, match=f"all of them warm-up .* train {warmup + 1} epochs or"):
        trainer(asked)
    trainer(replace(asked, epochs=warmup + 1))


@pytest.mark.parametrize("schedule", ["epoch", "step"])
def test_the_cosine_starts_at_the_full_rate_behind_the_warm_up(schedule: str) -> None:
    train = replace(TRAIN, epochs=4, warmup_epochs=2, warmup_lr=1e-3, schedule=schedule)
    made, rates = trainer(train), []
    update = made.update

    def noting(*arguments: Any) -> None:
        rates.append(made.runs[0].optimizer.param_groups[0]["lr"])
        update(*arguments)

    made.update = noting
    made.fit()
    warm = 2 * made.steps_per_epoch
    assert set(rates[:warm]) == {train.warmup_lr}
    assert rates[warm] == train.lr
    assert rates[-1] < train.lr


@pytest.mark.parametrize("batch_size", [32, 128])
def test_fewer_items_than_a_batch_make_one_batch_of_all(batch_size: int) -> None:
    """So that published batches train at few shots, and dropping the last one drops nothing."""
    result = fit(replace(TRAIN, batch_size=batch_size, epochs=3))
    assert len(result.losses) == 3
    assert len(set(result.losses)) > 1


def test_methods_on_one_backbone_share_the_features_of_frozen_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of two methods and batch sizes: losses of each alone, from images that were seen once."""
    model = shared_backbone()
    images = Images(model, MANIFEST)
    items = base_or_novel(few_shot(MANIFEST.items("train"), 2, 1), "base", LABELS)
    task = Task(MANIFEST.class_names()[: max(item.label for item in items) + 1])
    made: list[int] = []
    normalised = images._normalised
    monkeypatch.setattr(images, "_normalised", lambda x: (made.append(len(x)), normalised(x))[1])

    def fitted(backbone: Backbone, config: Any, batch_size: int) -> tuple[list[float], Any, int]:
        made.clear()
        train = replace(TRAIN, batch_size=batch_size)
        trained = Trainer(
            model, images, items, task, [config], train, backbone=backbone, progress=False
        ).fit()[0]
        evaluator = Evaluator(model, backbone, progress=False)
        answers = evaluator.answers(images, items, [Case(trained.method, task)])[0]
        return trained.losses, answers.log_likelihoods, sum(made)

    def new() -> Backbone:
        return Backbone(model.clip, tokenizer=model.tokenizer)

    asked = [(CoOpConfig(text=(1,)), 4), (KgCoOpConfig(text=(1,)), 5)]
    shared = new()
    for (config, size), seen in zip(asked, (3 * len(items), 0)):
        losses, answers, count = fitted(shared, config, size)
        alone = fitted(new(), config, size)
        assert (count, alone[2]) == (seen, 3 * len(items))
        assert losses == alone[0]
        np.testing.assert_array_equal(answers, alone[1])
    plain = new()
    plain.savings = Savings.none()
    np.testing.assert_allclose(fitted(plain, *asked[1])[0], losses, atol=1e-5)


def test_frozen_features_are_kept_apart_by_precision_seed_and_augmentation() -> None:
    """Of methods that train and are tested on one backbone by recipes that differ in these."""
    model = shared_backbone()
    shared = Backbone(model.clip, tokenizer=model.tokenizer)
    images, task = Images(model, MANIFEST), Task(MANIFEST.class_names())
    config, items = CoOpConfig(text=(1,)), MANIFEST.items("test")[:20]
    first = replace(TRAIN, epochs=1)

    def outcome(backbone: Backbone, train: TrainConfig, seed: int) -> tuple[list[float], Any]:
        made = trainer(train, (config,), backbone=backbone, seed=seed)  # type: ignore[arg-type]
        made.images = made.views.images = images  # as an experiment shares them
        evaluator = Evaluator(model, backbone, precision=train.precision, progress=False)
        (answers,) = evaluator.answers(images, items, [Case(Method(), task)])
        return made.fit()[0].losses, answers.log_likelihoods

    found = []
    for train, seed in (
        (first, 1),
        (first, 2),
        (replace(first, crop_scale=(0.5, 1.0)), 1),
        (replace(first, flip=0.0), 1),
        (replace(first, precision="bf16"), 1),
    ):
        losses, answers = outcome(shared, train, seed)
        alone = outcome(Backbone(model.clip, tokenizer=model.tokenizer), train, seed)
        assert losses == alone[0]
        np.testing.assert_array_equal(answers, alone[1])
        found.append((losses, answers))
    assert len({tuple(losses) for losses, _ in found}) == len(found)
    assert not np.array_equal(found[0][1], found[-1][1])


def test_every_update_is_numbered_and_has_draws_of_its_own() -> None:
    """The same dropout or noise at every step would be no dropout and no noise."""
    train = replace(TRAIN, updates_per_batch=2)

    def updates(seed: int) -> list[tuple[int, int, tuple[float, ...]]]:
        made, seen = trainer(train, seed=seed), []
        loss = made.runs[0].method.loss

        def noting(step: Step) -> torch.Tensor:
            drawn = torch.rand(3, generator=step.generator).tolist()
            seen.append((step.number, step.repeat, tuple(drawn)))
            return loss(step)

        made.runs[0].method.loss = noting
        assert len(made.fit()[0].losses) == len(seen) == 2 * made.total_steps
        return seen

    first, second = updates(1), updates(2)
    assert [(number, repeat) for number, repeat, _ in first] == [
        (number, number % 2) for number in range(len(first))
    ]
    draws = [drawn for _, _, drawn in first + second]
    assert len(set(draws)) == len(draws)
    assert updates(1) == first


def test_gradients_are_clipped_to_a_norm_over_all_parameters() -> None:
    """One step of plain SGD goes as far as the rate times the norm, in the direction it had."""
    one = replace(TRAIN, epochs=1, batch_size=128, momentum=0.0, weight_decay=0.0)

    def moved(max_norm: float) -> torch.Tensor:
        made = trainer(replace(one, max_norm=max_norm))
        before = nn.utils.parameters_to_vector(made.runs[0].method.parameters()).detach().double()
        method = made.fit()[0].method
        return nn.utils.parameters_to_vector(method.parameters()).detach().double() - before

    free, clipped = moved(0.0), moved(0.1)
    assert free.norm() > 2 * clipped.norm()
    assert clipped.norm().item() == pytest.approx(0.1 * one.lr, rel=1e-3)
    assert torch.cosine_similarity(free, clipped, dim=0) > 0.999
    torch.testing.assert_close(moved(1e6), free)


@pytest.mark.parametrize("config", [CONFIG, CoOpConfig(text=(1,))], ids=["blocks", "plain"])
def test_cached_views_come_round_in_turn(config: Any) -> None:
    """At a rate of next to nothing the loss of all items at once tells the views apart."""
    still = replace(TRAIN, epochs=5, batch_size=128, lr=1e-12)
    fresh = fit(still, (config,)).losses
    turning = fit(replace(still, cached_views=2), (config,)).losses
    assert len(set(np.round(fresh, 4))) == 5
    np.testing.assert_allclose(turning, [*fresh[:2], *fresh[:2], fresh[0]], atol=1e-5)


def test_a_training_counted_in_steps_ends_within_an_epoch_that_counts_as_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ends: list[tuple[int, int]] = []
    end_epoch = PromptSRC.end_epoch

    def noting(self: PromptSRC, epoch: int, epochs: int) -> None:
        ends.append((epoch, epochs))
        end_epoch(self, epoch, epochs)

    monkeypatch.setattr(PromptSRC, "end_epoch", noting)
    made = trainer(replace(TRAIN, steps_per_shot=3), (PromptSRCConfig((2,), (2,), centre=1.0),))  # type: ignore[arg-type]
    assert made.steps_per_epoch == 4
    assert len(made.fit()[0].losses) == 3 * TRAIN.shots == 6
    assert ends == [(1, 2), (2, 2)]


def test_seconds_are_shared_evenly_and_count_what_was_spent_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = count()
    clock = SimpleNamespace(perf_counter=lambda: float(next(ticks)))
    monkeypatch.setattr("vlmadapters.training.trainer.time", clock)
    both = (CONFIG, replace(CONFIG, dim=8))
    first = trainer(configs=both, folder=tmp_path).fit()
    passed = next(ticks)
    assert first[0].seconds == first[1].seconds > 1
    assert first[0].seconds + first[1].seconds <= passed
    again = trainer(configs=both, folder=tmp_path).fit()  # there is nothing left to do
    assert again[0].seconds >= first[0].seconds - 1


def test_a_loss_that_is_no_number_is_placed_in_its_epoch_and_step() -> None:
    made = trainer(replace(TRAIN, updates_per_batch=2))
    loss, at = made.runs[0].method.loss, 2 * (made.steps_per_epoch + 1) + 1
    made.runs[0].method.loss = lambda step: loss(step) * (np.nan if step.number == at else 1)
    with pytest.raises(UserError, match="became nan in epoch 2, step 2;"):
        made.fit()
