"""Cached views are those that were seen, and stay on a GPU that has room, else in main memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from backbones import shared_backbone, some_images

from vlmadapters.clip import frozen
from vlmadapters.clip.frozen import Backbone, ViewCache
from vlmadapters.clip.savings import Savings


class OnGPU(Backbone):
    """A backbone that says it is on a GPU; what it computes stays where it is."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda")


@pytest.mark.parametrize(("missing", "home"), [(0, "cuda"), (1, "cpu")])
def test_views_stay_on_a_gpu_with_room(
    missing: int, home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a quarter of what is free: of four views two inputs, of 17 tokens of 64 floats."""
    model, asked, free = shared_backbone(), [], 4 * (4 * 2 * 17 * 64 * 4) - missing
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


@pytest.mark.parametrize(
    "savings", [Savings(), Savings(image_prefix=False)], ids=["prefix", "none"]
)
@pytest.mark.parametrize("blocks", [(3, 1), (2, 4), (4,)])
@pytest.mark.parametrize("few", [False, True])
def test_cached_views_lead_to_the_features_of_their_images(
    savings: Savings, blocks: tuple[int, ...], few: bool
) -> None:
    """From every start, also where only the lowest has room, and each view is made once."""
    model, made = shared_backbone(), []
    backbone, images = Backbone(model.clip, savings), some_images(model, 5)
    assert backbone.vision.tower.depth == 3
    with torch.no_grad():
        expected = model.clip.encode_image(images)
        one = backbone.images(images[:1], blocks)
    whole = 5 * sum(state.x[0].numel() * state.x.element_size() for state in one.values())
    cache = ViewCache(backbone, blocks, rows=5, limit=whole - few)
    for rows in ([4, 2], [2, 0, 4], [0, 1, 2, 3, 4]):

        def load(missing: Any, rows: list[int] = rows) -> torch.Tensor:
            made.extend(rows[i] for i in missing)
            return images[[rows[i] for i in missing]]

        states = cache.states(np.array(rows), load)
        assert set(states) == set(blocks)
        for state in states.values():
            with torch.no_grad():
                found = backbone.features("vision", state)
            torch.testing.assert_close(found, expected[rows], atol=1e-5, rtol=1e-5)
    assert made == [4, 2, 0, 1, 3]
    assert set(cache.stored) == ({min(blocks)} if few else set(blocks))
    assert cache.form is not None and cache.form.inputs.untyped_storage().nbytes() == (
        images[0].nbytes
    )


def test_views_that_could_not_be_made_are_made_again() -> None:
    model = shared_backbone()
    images, cache = some_images(model, 2), ViewCache(Backbone(model.clip), [2], rows=2)

    def fails(missing: Any) -> torch.Tensor:
        raise OSError

    with pytest.raises(OSError):
        cache.states(np.array([0, 1]), fails)
    found = cache.states(np.array([0, 1]), lambda missing: images)[2]
    expected = Backbone(model.clip).images(images, [2])[2]
    assert torch.equal(found.x, expected.x)
    assert len(found.inputs) == 2


def test_plain_features_are_kept_for_what_was_asked_last(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = shared_backbone(), []
    backbone, images = Backbone(model.clip), some_images(model, 3)
    size = 3 * 4 * backbone.joint
    with torch.no_grad():
        expected = model.clip.encode_image(images)

    def features(key: str) -> torch.Tensor:
        return backbone.plain_features(key, lambda: made.append(key) or [images[:2], images[2:]])

    monkeypatch.setattr(frozen, "FEATURE_BYTES", 2 * size)
    for key in "abacabc":  # b goes first, since a was asked for again
        torch.testing.assert_close(features(key), expected, atol=1e-5, rtol=1e-5)
    assert made == ["a", "b", "c", "b", "c"]
    monkeypatch.setattr(frozen, "FEATURE_BYTES", 0)
    features("c")
    features("c")
    assert made == ["a", "b", "c", "b", "c"]  # the last one stays, however large
    features("b")
    assert made == ["a", "b", "c", "b", "c", "b"]
    assert backbone.plain_features("none", lambda: []).shape == (0, backbone.joint)
