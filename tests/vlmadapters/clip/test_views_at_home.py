"""Cached views stay on a GPU that has room, else in main memory that is pinned for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from backbones import shared_backbone, some_images

from vlmadapters.clip import frozen
from vlmadapters.clip.frozen import Backbone, ViewCache


class OnGPU(Backbone):
    """A backbone that says it is on a GPU; what it computes stays where it is."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda")


@pytest.mark.parametrize(("free", "home"), [(1 << 40, "cuda"), (0, "cpu")])
def test_views_stay_on_a_gpu_with_room(
    free: int, home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked = shared_backbone(), []
    monkeypatch.setattr(frozen, "available_memory", lambda device: free)
    monkeypatch.setattr(frozen, "placed", lambda tensor, device: tensor)
    empty = torch.empty

    def noted(*shape: Any, **options: Any) -> torch.Tensor:
        asked.append((options.pop("device").type, options.pop("pin_memory", False)))
        return empty(*shape, **options)

    cache = ViewCache(OnGPU(model.clip), [2, 3], rows=4)
    images = some_images(model, 2)
    monkeypatch.setattr(torch, "empty", noted)
    found = cache.states(np.array([3, 1]), lambda rows: images)
    monkeypatch.undo()
    assert asked == [(home, home == "cpu")] * 2
    expected = Backbone(model.clip).images(images, [2, 3])
    for block, state in expected.items():
        assert torch.equal(found[block].x, state.x)
