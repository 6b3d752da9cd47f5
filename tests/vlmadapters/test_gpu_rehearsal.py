"""The GPU path rehearsed without a GPU.

Fake CUDA tensors have a device and a dtype and no values: what mixes devices, or has a dtype that
an operator does not take, fails as on a GPU, under CUDA's own autocast rules. They have no backward
pass on a machine without a driver; meta tensors have one. Values are looked at under the CPU's
autocast.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import pytest
import tiny
import torch
import torch.cuda.amp.common
from backbones import FAMILIES, backbone, shared_backbone, some_images
from open_clip.model import CLIP
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vlmadapters.clip import arithmetic, frozen, walk
from vlmadapters.clip.frozen import Backbone
from vlmadapters.clip.logits import class_logits
from vlmadapters.clip.savings import Savings
from vlmadapters.data.task import Task
from vlmadapters.device import precision_of
from vlmadapters.methods import METHODS
from vlmadapters.methods.base import Method, Step
from vlmadapters.methods.mma import module as mma
from vlmadapters.methods.mma.config import MMAConfig
from vlmadapters.methods.mma.module import Adapter
from vlmadapters.training import processes
from vlmlayers.errors import UserError
from vlmlayers.models.devices import available_memory, memory_errors, resolve_precision
from vlmlayers.models.towers import find_towers

CONFIG = MMAConfig.span(2, 3, dim=4, scale=0.1)
LOW = ["bf16", "fp16"]
PRECISIONS = ["fp32", *LOW]
SAVINGS = {"all savings": Savings(), "none": Savings.none()}


@contextmanager
def pretended(monkeypatch: pytest.MonkeyPatch, device: str) -> Iterator[None]:
    """Make tensors on a device that is not there, and let torch believe in it."""
    if device == "cuda":
        tiny.skip_without_fake_gpus()
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(walk.Walk, "agrees", lambda self: True)  # compares values
    monkeypatch.setattr(arithmetic, "is_causal", lambda mask: mask.ndim == 2)  # likewise
    monkeypatch.setattr(mma, "new_linear", nn.Linear)  # skip_init swaps tensors, fake ones cannot
    monkeypatch.setattr(Adapter, "reset_parameters", lambda self, seed: self.touch())
    found = frozen.backbone_towers

    def towers(clip: nn.Module) -> Any:
        made = found(clip)
        made["text"].cut = lambda ids: ids[:, :9]  # its length is a value: one sync, once a run
        return made

    monkeypatch.setattr(frozen, "backbone_towers", towers)
    if device == "meta":  # a device that autocast does not know of
        on, auto = torch.is_autocast_enabled, torch.autocast
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda *k: k != ("meta",) and on(*k))
        monkeypatch.setattr(
            torch, "autocast", lambda k, **o: nullcontext() if k == "meta" else auto(k, **o)
        )
    with FakeTensorMode() if device == "cuda" else nullcontext(), torch.device(device):
        yield


def step(device: str, precision: str, savings: Savings) -> tuple[Adapter, Any, torch.Tensor]:
    """Return adapter, frozen states of the images, and logits of one training step."""
    clip = CLIP(**deepcopy(FAMILIES["clip"])).eval().requires_grad_(False)
    adapter = Adapter(CONFIG, {"vision": 64, "text": 32})
    taken = Backbone(clip, savings)
    images, tokens = taken.vision.tower.example(2), taken.text.tower.example(3)
    autocast, _ = precision_of(precision, torch.device(device))
    with autocast():
        states, prompts = taken.images(images, [2])[2], taken.prompts(tokens, [2])[2]
        return adapter, states, taken.logits(states, prompts, adapter)


@pytest.mark.parametrize("savings", SAVINGS.values(), ids=SAVINGS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_stays_on_the_device_with_a_stream_and_logits_in_single_precision(
    precision: str, savings: Savings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pretended(monkeypatch, "cuda"):
        adapter, states, logits = step("cuda", precision, savings)
        assert {p.device.type for p in adapter.parameters()} == {"cuda"}
        assert states.x.device.type == logits.device.type == "cuda"
        assert (states.x.dtype, logits.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("savings", SAVINGS.values(), ids=SAVINGS)
def test_every_parameter_gets_a_gradient_on_the_device(
    savings: Savings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pretended(monkeypatch, "meta"):
        adapter, _, logits = step("meta", "fp32", savings)
        nn.functional.cross_entropy(logits, torch.zeros(2, dtype=torch.long)).backward()
        assert {p.grad.device.type for p in adapter.parameters() if p.grad is not None} == {"meta"}
        assert all(p.grad is not None for p in adapter.parameters())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_zero_shot_evaluation_stays_on_the_device(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pretended(monkeypatch, "cuda"):
        clip = CLIP(**deepcopy(FAMILIES["clip"])).eval().requires_grad_(False)
        taken, plain = Backbone(clip), Method()
        images, tokens = taken.vision.tower.example(2), taken.text.tower.example(3)
        autocast, _ = precision_of(precision, torch.device("cuda"))
        with torch.no_grad(), autocast():
            end = plain.first(taken, "vision")
            features = plain.image_features(taken, taken.images(images, [end])[end])
            texts = taken.features("text", taken.prompts(tokens, [end])[end])
            logits = plain.logits(taken, features, texts)
        assert (logits.device.type, logits.dtype) == ("cuda", torch.float32)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_path_by_hooks_stays_on_the_device(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pretended(monkeypatch, "cuda"):
        clip = CLIP(**deepcopy(FAMILIES["clip"])).eval().requires_grad_(False)
        adapter = Adapter(CONFIG, {"vision": 64, "text": 32})
        autocast, _ = precision_of(precision, torch.device("cuda"))
        entered: list[torch.dtype] = []
        vision, text = (find_towers(clip)[name] for name in ("vision", "text"))
        with adapter.attached(clip), autocast():
            vision.blocks[1].register_forward_pre_hook(lambda m, a: entered.append(a[0].dtype))
            logits = class_logits(clip, vision.example(2), text.example(3))
        assert (logits.device.type, logits.dtype) == ("cuda", torch.float32)
        assert entered == [torch.float32]


def test_a_mixed_device_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rehearsal itself can fail."""
    with pretended(monkeypatch, "cuda"), pytest.raises(RuntimeError, match="same device"):
        torch.ones(2) + torch.ones(2, device="cpu")


@pytest.mark.parametrize("way", ["walk", "hooks"])
@pytest.mark.parametrize("precision", ["auto", *LOW])
def test_what_the_adapter_does_survives_half_precision(precision: str, way: str) -> None:
    """At the published scale; with a stream in bf16 the cosine is 0.3 or less."""
    found = resolve_precision("auto", torch.device("cuda")) if precision == "auto" else precision
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[found]
    model = backbone()
    adapter = mma.new_adapter(model.clip, MMAConfig.span(2, 3, scale=0.001), 1)
    taken, images = Backbone(model.clip), some_images(model, 256)
    tower = model.towers["vision"]
    moved = []
    for low in (False, True):
        with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=low):
            if way == "walk":
                state = taken.images(images, [2])[2]
                plain, adapted = (taken.features("vision", state, one) for one in (None, adapter))
            else:
                # Bits of the stream are what is lost; both runs keep it by the same hook.
                with mma.new_adapter(model.clip, MMAConfig.span(2, 3, scale=0.0)).attached(
                    model.clip
                ):
                    plain = tower.run(images)
                with adapter.attached(model.clip):
                    adapted = tower.run(images)
        moved.append((adapted.float() - plain.float()).flatten())
    cosine = nn.functional.cosine_similarity(*moved, dim=0)
    # In bf16 a hooked model's own head rounds the embedding once more; a walk's does not.
    assert cosine > (0.9 if dtype == torch.float16 else 0.6 if way == "walk" else 0.33)


def test_half_precision_changes_no_prediction_by_its_logits() -> None:
    """Logits are multiplied in single precision: equal features give equal predictions."""
    model = shared_backbone()
    features = torch.randn(400, 32, generator=torch.Generator().manual_seed(0))
    texts = torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    method, taken = Method(), Backbone(model.clip)
    expected = method.logits(taken, features, texts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = method.logits(taken, features, texts)
    assert torch.equal(found, expected)


def test_auto_is_what_the_recipes_were_published_in() -> None:
    assert resolve_precision("auto", torch.device("cuda")) == "fp16"
    assert resolve_precision("auto", torch.device("cpu")) == "fp32"


def test_emulated_bf16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some old GPU")
    with pytest.raises(UserError, match="Some old GPU only emulates bf16"):
        resolve_precision("bf16", torch.device("cuda"))


def test_running_out_of_memory_is_one_line_and_takes_no_slow_road(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with (
        pytest.raises(UserError, match=r"cpu ran out of memory .*; lower batch_size"),
        memory_errors(torch.device("cpu"), "lower batch_size (16)"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(walk.Walk, "finish", full)
    with pytest.raises(torch.OutOfMemoryError):
        Backbone(shared_backbone().clip)


def test_free_memory_counts_what_torch_keeps_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("mem_get_info", (1000, 9000)),
        ("memory_reserved", 500),
        ("memory_allocated", 200),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert available_memory(torch.device("cuda")) == 1300


def test_processes_speak_for_tensors_on_either_device_and_use_their_own_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    monkeypatch.setattr(processes.dist, "init_process_group", asked.append)
    monkeypatch.setattr(processes.dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(processes.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(processes.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with processes.process_group():
        assert asked == [torch.device("cuda:1"), "cpu:gloo,cuda:nccl"]
    asked.clear()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # with --device cpu
    with processes.process_group():
        assert asked == ["gloo"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_trains_in_single(dtype: torch.dtype) -> None:
    model = backbone()
    model.clip.to(dtype)
    taken = Backbone(model.clip, tokenizer=model.tokenizer)
    task = Task(("cat", "dog"))
    method = METHODS["mma"].build(CONFIG, taken, task, 1)
    classes = method.prepare(taken, task)
    images = taken.images(some_images(model, 2).float(), [2])[2]
    made = Step(taken, images, torch.tensor([0, 1]), classes, torch.Generator())
    method.loss(made).backward()
    assert all(torch.isfinite(p.grad).all() for p in method.parameters() if p.grad is not None)
    assert next(model.clip.parameters()).dtype == dtype  # the caller's model is as it was
