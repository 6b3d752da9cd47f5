"""Precision, device, memory, and the mode of a model that belongs to somebody else."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import tiny
import torch

from vlmlayers import runs
from vlmlayers.errors import UserError
from vlmlayers.models import Recorder, estimate, extract, load_model, stream, wrap_model
from vlmlayers.models.devices import (
    available_memory,
    memory_errors,
    placed,
    products_in,
    resolve_device,
    resolve_precision,
)
from vlmlayers.models.modes import at_rest

DATA = tiny.DrawnManifest(count=6)
WORDS = {"vocab_size": 49408, "eos_id": 49407}
CPU = torch.device("cpu")


def wrapped(clip, name="mine"):
    return wrap_model(clip, tiny.preprocess, tiny.tokenizer, name=name, weights="step 100")


def proj(features):
    return [tower.arrays["joint"]["proj"] for tower in (features.vision, features.text)]


# A model that is wrapped stays its owner's


def in_training(family):
    clip = tiny.build(family).train()
    clip.visual.eval()
    next(clip.visual.children()).train()
    for number, parameter in enumerate(clip.parameters()):
        parameter.requires_grad_(number % 3 > 0)
    return clip


def looks(clip):
    modes = [module.training for module in clip.modules()]
    grads = [parameter.requires_grad for parameter in clip.parameters()]
    return modes, grads, [buffer.clone().tolist() for buffer in clip.buffers()]


@pytest.mark.parametrize("family", ["clip", "resnet", "timm convnext"])
def test_a_wrapped_model_stays_as_it_was(family):
    clip = in_training(family)
    before = looks(clip)
    model = wrapped(clip)
    assert looks(clip) == before
    if family == "resnet":  # 64 pixels
        model.preprocess = lambda image: tiny.preprocess(image.resize((64, 64)))
    if family == "timm convnext":
        model.preprocess = lambda image: tiny.preprocess(image.resize((160, 160)))
    features = extract(model, DATA, "train", progress=False)
    assert looks(clip) == before
    stream(model, DATA, "train", progress=False)
    assert looks(clip) == before
    estimate(model, [(DATA, DATA.items("train"))])
    assert looks(clip) == before
    expected = tiny.model(family)
    expected.preprocess = model.preprocess
    for found, right in zip(proj(features), proj(extract(expected, DATA, "train", progress=False))):
        np.testing.assert_allclose(found, right, atol=1e-5)


def test_dropout_does_not_reach_the_features():
    clip = tiny.build("clip").train()
    clip.visual.patch_dropout = torch.nn.Dropout(0.5)
    model = wrapped(clip)
    first, second = (extract(model, DATA, "train", progress=False) for _ in "ab")
    np.testing.assert_array_equal(proj(first)[0], proj(second)[0])
    assert clip.visual.patch_dropout.training


def test_modes_come_back_after_an_error():
    clip = tiny.build("clip").train()
    with pytest.raises(KeyboardInterrupt), Recorder(wrapped(clip).towers["vision"]):
        assert not clip.training
        raise KeyboardInterrupt
    assert all(module.training for module in clip.modules())
    with pytest.raises(ValueError), at_rest(clip):
        assert not any(parameter.requires_grad for parameter in clip.parameters())
        raise ValueError
    assert clip.training and all(parameter.requires_grad for parameter in clip.parameters())


def test_a_loaded_model_is_frozen_and_in_eval_mode():
    model = load_model("mini-clip", random_weights=True)
    assert not any(module.training for module in model.clip.modules())
    assert not any(parameter.requires_grad for parameter in model.clip.parameters())


# Half precision


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("family", ["clip", "eos", "resnet", "timm vit map", "timm eva"])
def test_half_precision_weights_are_extracted_on_a_cpu(tmp_path, family, precision):
    config = tiny.FAMILIES[family]
    config = {**config, "text_cfg": {**config["text_cfg"], **WORDS}}
    (tmp_path / "c.json").write_text(json.dumps(config))
    asked = {"config": tmp_path / "c.json", "random_weights": True}
    full = load_model("local", **asked)
    half = load_model("local", **asked, precision=precision)
    assert half.precision == precision
    assert half.input_dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert wrapped(half.clip).precision == precision
    pairs = zip(*(proj(extract(m, DATA, "train", progress=False)) for m in (half, full)))
    for found, right in pairs:
        assert found.dtype == np.float32
        assert np.abs(found - right).max() < {"bf16": 0.05, "fp16": 0.005}[precision] * 4


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("custom text", "open_clip cannot keep this model in bf16; load it in fp32"),
        ("coca", "cannot compute in bf16 on cpu .*; load it in fp32"),
    ],
)
def test_models_that_cannot_be_halved_are_refused(tmp_path, family, expected):
    config = tiny.FAMILIES[family]
    config = {**config, "text_cfg": {**config["text_cfg"], **WORDS}}
    (tmp_path / "c.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=expected):
        load_model("local", config=tmp_path / "c.json", random_weights=True, precision="bf16")


# Devices


def test_auto_is_resolved_once_and_recorded(monkeypatch):
    features = extract(tiny.model(), DATA, "train", precision="auto", progress=False)
    assert features.identity["precision"] == "fp32"
    assert resolve_device("auto").type in ("cpu", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda", 3)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    assert chosen[-1] == torch.device("cuda", 1)
    assert resolve_precision("auto", torch.device("cuda", 0)) == "fp16"
    assert resolve_precision("fp16", CPU) == "fp16"


def test_a_study_takes_auto_for_what_the_model_will_take_it(monkeypatch):
    """Without torch: a GPU that the driver lists is of no use to a build for the CPU."""

    class Driver:
        def cuInit(self, flags):
            return 0

        def cuDeviceGetCount(self, count):
            count._obj.value = 1
            return 0

    monkeypatch.setattr(runs.ctypes, "CDLL", lambda name: Driver())
    monkeypatch.setattr(runs, "_gpus", runs._gpus.__wrapped__)  # asks anew
    for built, kind in (("2.15.0", "cuda"), ("2.11.0+cu128", "cuda"), ("2.15.0+cpu", "cpu")):
        monkeypatch.setattr(runs, "version", lambda package, built=built: built)
        assert runs.device_kind("auto") == kind
    assert runs.device_kind("cuda:1") == "cuda"


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    def missing(device):
        raise RuntimeError("invalid device ordinal")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", missing)
    with pytest.raises(UserError, match="cannot use device 'cuda:9' .invalid device ordinal.; use"):
        resolve_device("cuda:9")
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun says it
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="'cuda' .*; start no more processes than the machine has"):
        resolve_device("auto")


def test_what_torch_keeps_for_later_counts_as_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 << 30, 8 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5 << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1 << 30)
    assert available_memory(torch.device("cuda", 0)) == 6 << 30


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 12 bytes"),
        MemoryError(),
    ],
)
@pytest.mark.parametrize("run", [extract, stream])
def test_out_of_memory_is_one_line_that_names_the_batch_size(error, run):
    model = tiny.model()
    handle = []

    def full(*_):
        raise error

    def grow(image):
        if image.size == (32, 32):  # not the one that transforms are told apart by
            handle.append(model.clip.visual.transformer.register_forward_pre_hook(full))
        return tiny.preprocess(image)

    model.preprocess = grow  # the first batch is decoded after the model was probed
    with pytest.raises(UserError, match=r"cpu ran out of memory .*; lower batch_size \(5; --batch"):
        run(model, DATA, "train", batch_size=5, progress=False)


def test_a_model_that_leaves_no_memory_is_not_told_to_compute_in_fp32(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch.nn.Conv2d, "forward", full)
    with pytest.raises(UserError, match="cpu ran out of memory .*; the model leaves too little"):
        load_model("mini-clip", precision="bf16", device="cpu")


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="something else"), memory_errors(CPU, "…"):
        raise RuntimeError("something else")


def test_tf32_is_for_gpus_that_have_it(monkeypatch):
    with pytest.raises(UserError, match="tf32 needs a GPU .*, and cpu has none; use fp32"):
        resolve_precision("tf32", CPU)
    for capability in ((7, 5), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d, c=capability: c)
        if capability < (8, 0):
            with pytest.raises(UserError, match="cuda has none"):
                resolve_precision("tf32", torch.device("cuda"))
        else:
            assert resolve_precision("tf32", torch.device("cuda")) == "tf32"


@pytest.mark.parametrize(("precision", "on"), [("fp32", False), ("tf32", True), ("fp16", False)])
def test_products_are_held_at_a_precision_and_given_back(precision, on):
    cudnn, matmul = torch.backends.cudnn, torch.get_float32_matmul_precision
    before = cudnn.allow_tf32, matmul()
    with products_in(precision):
        assert (cudnn.allow_tf32, matmul()) == (on, "high" if on else "highest")
    assert (cudnn.allow_tf32, matmul()) == before


BACKENDS = torch.backends
NEWER = {
    "all": BACKENDS,
    "products": BACKENDS.cuda.matmul,
    "cudnn": BACKENDS.cudnn,
    "convolutions": getattr(BACKENDS.cudnn, "conv", None),
}


def settings_of_products():
    """Return all that says how products are taken, as far as torch lets it be read."""
    cudnn, matmul = BACKENDS.cudnn, BACKENDS.cuda.matmul
    found = []
    for read in (
        torch.get_float32_matmul_precision,
        lambda: cudnn.allow_tf32,
        lambda: matmul.allow_tf32,
        *(
            partial(getattr, part, "fp32_precision")
            for part in (matmul, cudnn.conv, cudnn.rnn, BACKENDS.mkldnn.matmul, BACKENDS)
        ),
    ):
        try:
            found.append(read())
        except RuntimeError:
            found.append("mixed")
    return found


@pytest.mark.skipif(not hasattr(BACKENDS, "fp32_precision"), reason="torch has them since 2.9")
@pytest.mark.parametrize("value", ["tf32", "ieee"])
@pytest.mark.parametrize("place", NEWER)
def test_the_newer_settings_of_tf32_are_set_aside_and_given_back(place, value):
    """Torch raises where the older way, which knows no such settings, is read beside them."""
    untouched, cudnn = settings_of_products(), BACKENDS.cudnn
    parts = [BACKENDS, cudnn, BACKENDS.cuda.matmul, cudnn.conv, cudnn.rnn, BACKENDS.mkldnn.matmul]
    own = [part.fp32_precision for part in parts]
    try:
        NEWER[place].fp32_precision = value
        before = settings_of_products()
        for precision, held in (("fp32", "ieee"), ("tf32", "tf32")):
            with products_in(precision):
                within = settings_of_products()
                assert set(within[3:7]) == {held} and "mixed" not in within
            assert settings_of_products() == before
    finally:
        for part, one in zip(parts, own):
            part.fp32_precision = one
    assert settings_of_products() == untouched


def test_a_copy_to_a_gpu_goes_through_pinned_memory(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: asked.append("pin") or self)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, *a, **k: asked.append(k.get("non_blocking")) or self
    )
    placed(torch.zeros(2), torch.device("cuda"))
    assert asked == ["pin", True]
    asked.clear()
    placed(torch.zeros(2), CPU)
    assert asked == [None]
