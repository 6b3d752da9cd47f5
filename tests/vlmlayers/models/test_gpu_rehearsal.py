"""Extraction rehearsed without a GPU: fake CUDA tensors, under CUDA's own autocast rules.

They have a device, a dtype and no values: what mixes devices, or has a dtype that an operator does
not take, fails as on a GPU. Values are looked at under the CPU's autocast.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
import torch.cuda.amp.common
from tests.vlmlayers import tiny
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vlmlayers.models import recording
from vlmlayers.models.devices import casts_kept
from vlmlayers.models.recording import Recorder
from vlmlayers.models.tower import Tower
from vlmlayers.models.towers import find_towers
from vlmlayers.models.work import autocast
from vlmlayers.positions import SPACES

FAMILIES = ["clip", "coca", "timm vit map"]
PRECISIONS = ["fp32", "bf16", "fp16"]
CUDA = torch.device("cuda")


@contextmanager
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make tensors on a GPU that is not there, and let torch believe in it."""
    tiny.skip_without_fake_gpus()
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(  # what leaves the device is its shape
        torch.Tensor, "numpy", lambda self, **_: np.zeros(self.shape, str(self.dtype)[6:])
    )
    monkeypatch.setattr(  # there is no stream to copy on
        recording, "copied", lambda made: ([one.cpu() for one in made], lambda: None)
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def moved(clip: nn.Module) -> dict[str, Tower]:
    """Return both towers of a model moved to the device.

    Fake tensors cannot take the place of real ones by `to`. The text is cut at a fixed length:
    the right one is a value, which a fake tensor does not have.
    """
    for module in clip.modules():
        for kind in (module._parameters, module._buffers):
            for name, tensor in kind.items():
                kind[name] = None if tensor is None else torch.empty_like(tensor, device=CUDA)
    found = find_towers(clip)
    found["text"].cut = lambda ids: ids[:, :9]
    return found


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["vision", "text"])
@pytest.mark.parametrize("family", FAMILIES)
def test_recording_stays_on_the_device_and_leaves_it_in_single_precision(
    family: str, name: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, devices = tiny.build(family), set()
    with pretended(monkeypatch):
        tower = moved(clip)[name]
        for block in tower.blocks:
            block.register_forward_hook(lambda m, i, out: devices.add(tower.tokens(out).device))
        keep = precision != "fp32"
        kept = casts_kept(clip) if keep else nullcontext()
        with Recorder(tower, SPACES) as recorder, kept, autocast(CUDA, precision, keep=keep):
            for _ in range(2):  # the second with the casts of the first
                found = recorder.start(tower.example(3), keep_casts=keep)()
    assert {device.type for device in devices} == {"cuda"}
    for space in SPACES:
        for position in tower.positions(space):
            array = found[space][position]
            assert (len(array), array.dtype) == (3, np.float32), (space, position)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_keeps_the_directions_of_features(family: str, precision: str) -> None:
    clip = tiny.build(family)
    tower = find_towers(clip)["vision"]
    images = tiny.images(clip, 8)
    found = []
    for kind in ("fp32", precision):
        with Recorder(tower, SPACES) as recorder, autocast(torch.device("cpu"), kind):
            found.append(recorder(images))
    for space, arrays in found[0].items():
        for position, exact in arrays.items():
            low = found[1][space][position]
            products = (exact * low).sum(1)
            cosine = products / np.linalg.norm(exact, axis=1) / np.linalg.norm(low, axis=1)
            assert cosine.min() > 0.999, (space, position)


def test_a_mixed_device_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rehearsal itself can fail."""
    with pretended(monkeypatch), pytest.raises(RuntimeError, match="same device"):
        torch.ones(2, device=CUDA) + torch.ones(2)
