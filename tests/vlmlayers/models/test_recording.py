"""Hooks: they look, they pool, they leave, and they say when they were not called."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import tiny
import torch

from vlmlayers.errors import UserError
from vlmlayers.models import Recorder, find_towers
from vlmlayers.models.recording import HookDidNotFire, probe


def _hooks(clip):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in clip.modules())


class Stop(BaseException):
    """Stands for Ctrl-C, which is no Exception either."""


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Stop])
def test_hooks_are_removed_on_every_way_out(error):
    clip = tiny.build("clip")
    tower = find_towers(clip)["vision"]
    with pytest.raises(error), Recorder(tower) as recorder:
        recorder(tiny.images(clip))
        assert _hooks(clip) == tower.depth + 1
        raise error
    assert _hooks(clip) == 0
    with Recorder(tower):
        pass
    assert _hooks(clip) == 0


def test_hooks_are_removed_when_the_forward_pass_fails():
    clip = tiny.build("clip")
    tower = find_towers(clip)["vision"]
    with pytest.raises(RuntimeError), Recorder(tower) as recorder:
        recorder(torch.zeros(2, 5, 32, 32))
    assert _hooks(clip) == 0


def test_hooks_are_removed_when_registering_fails(monkeypatch):
    clip = tiny.build("clip")
    tower = find_towers(clip)["vision"]
    probe(tower)

    def fail(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(tower.blocks[2], "register_forward_hook", fail)
    with pytest.raises(KeyboardInterrupt), Recorder(tower):
        pass
    assert _hooks(clip) == 0


def test_recording_does_not_change_the_forward_pass():
    clip = tiny.build("clip")
    x = tiny.images(clip)
    before = clip.encode_image(x)
    with Recorder(find_towers(clip)["vision"], ("native", "normed", "joint")) as recorder:
        recorder(x)
        during = clip.encode_image(x)
    assert torch.equal(before, during)


def test_a_hook_of_someone_else_that_replaces_the_output_is_seen_downstream():
    """Recording looks at the stream as it is, so an attached adapter shows in later blocks."""
    clip = tiny.build("clip")
    tower, x = find_towers(clip)["vision"], tiny.images(clip)
    with Recorder(tower, ("native",)) as recorder:
        plain = recorder(x)["native"]
    handle = tower.blocks[1].register_forward_hook(lambda _m, _a, out: out + 1)
    with Recorder(tower, ("native",)) as recorder:
        changed = recorder(x)["native"]
    handle.remove()
    assert (changed["1"] == plain["1"]).all()
    assert abs(changed["2"] - plain["2"] - 1).max() < 1e-5
    assert abs(changed["3"] - plain["3"]).max() > 1e-3


def test_a_block_that_is_never_called_is_an_error():
    clip = tiny.build("clip")
    tower = find_towers(clip)["vision"]
    tower.blocks = [*tower.blocks, torch.nn.Identity()]
    with pytest.raises(HookDidNotFire, match="did not fire at 4"):
        probe(tower)


def test_a_block_that_falls_silent_later_is_an_error():
    clip = tiny.build("clip")
    tower = find_towers(clip)["vision"]
    with pytest.raises(HookDidNotFire, match="did not fire at 2"), Recorder(tower) as recorder:
        recorder(tiny.images(clip))
        transformer = clip.visual.transformer
        transformer.resblocks = torch.nn.ModuleList(
            [transformer.resblocks[0], transformer.resblocks[2]]
        )
        recorder(tiny.images(clip))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_features_of_a_batch_are_its_own_when_the_next_ones_are_started(device):
    clip = tiny.build("clip").to(device)
    batches = [tiny.images(clip, 8, seed=seed).to(device) for seed in range(6)]
    with Recorder(find_towers(clip)["vision"]) as recorder:
        alone = [recorder(batch) for batch in batches]
        started = [recorder.start(batch) for batch in batches]
        together = [features() for features in reversed(started)][::-1]
    for first, second in zip(alone, together):
        for space, by_position in first.items():
            for position, values in by_position.items():
                np.testing.assert_allclose(second[space][position], values, rtol=1e-5, atol=1e-6)
    last = [by["native"]["3"] for by in together]
    assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(last, last[1:]))


def test_a_tower_that_mixes_items_is_refused():
    clip = tiny.build("clip")
    tower = find_towers(clip)["vision"]
    inner = tower.run
    tower.run = lambda x: inner(x[:1])
    with pytest.raises(UserError, match="mixes items"):
        probe(tower)


def test_recorder_refuses_use_outside_its_block_and_unknown_spaces():
    clip = tiny.build("clip")
    tower = find_towers(clip)["vision"]
    with pytest.raises(RuntimeError, match="inside its `with` block"):
        Recorder(tower)(tiny.images(clip))
    with pytest.raises(UserError, match="unknown space 'jiont'; did you mean 'joint'"):
        Recorder(tower, ("jiont",))


def test_shapes_are_known_before_recording():
    clip = tiny.build("clip")
    for tower in find_towers(clip).values():
        shapes = Recorder(tower, ("native", "normed", "joint")).shapes()
        native = (tower.width,)
        assert shapes["native"] == {
            "embed": native,
            "1": native,
            "2": native,
            "3": native,
            "final": native,
            "proj": (24,),
        }
        assert set(shapes["joint"].values()) == {(24,)}
        assert list(shapes["normed"]) == ["embed", "1", "2", "3", "final"]


def test_a_head_that_is_not_the_models_own_is_refused():
    clip = tiny.build("clip")
    tower = find_towers(clip)["vision"]
    Recorder(tower).shapes()
    tower.norm = torch.nn.Identity()
    with pytest.raises(UserError, match="is not the model's own embedding"):
        Recorder(tower).shapes()
    Recorder(tower, pooling="mean").shapes()  # there they differ by nature


@pytest.mark.parametrize("side", ["vision", "text"])
def test_blocks_that_are_one_module_are_refused(side):
    """As of tied weights: the hooks of both are called for each, and the later output would win."""
    clip = tiny.build("clip")
    part = clip.visual.transformer if side == "vision" else clip.transformer
    part.resblocks[2] = part.resblocks[1]
    with pytest.raises(UserError, match=f"blocks 2 and 3 of the {side} tower .* are one module"):
        Recorder(find_towers(clip)[side])


@pytest.mark.parametrize("family", ["clip", "custom text", "coca"])
@pytest.mark.parametrize("how", ["method", "hook"])
def test_an_encode_text_of_the_users_own_is_refused(family, how):
    """The text tower is run by its parts, so that what stands around them would be left out."""
    clip = tiny.build(family)
    Recorder(find_towers(clip)["text"]).shapes()
    if how == "method":
        old = clip.encode_text
        clip.encode_text = lambda ids, normalize=False: 2 * old(ids, normalize=normalize)
    elif family == "clip":
        pytest.skip("no module holds the text tower")
    else:
        scaled = (lambda _m, _a, out: (2 * out[0], out[1])) if family == "coca" else None
        clip.text.register_forward_hook(scaled or (lambda _m, _a, out: 2 * out))
    with pytest.raises(UserError, match=r"encode_text of \w+ is not open_clip's: .*tower='vision'"):
        Recorder(find_towers(clip)["text"]).shapes()
    Recorder(find_towers(clip)["vision"]).shapes()


def test_nothing_of_the_activations_is_kept():
    clip = tiny.build("clip")
    tower, outputs = find_towers(clip)["vision"], []
    for block in tower.blocks:
        block.register_forward_hook(lambda m, given, output: outputs.append(weakref.ref(output)))
    with Recorder(tower) as recorder:
        found = recorder(tiny.images(clip))
    kept = sum(a.nbytes for by in found.values() for a in by.values())
    assert kept == 4 * 3 * (5 * 48 + 24 + 5 * 24)
    assert outputs and all(output() is None for output in outputs)
    assert all(a.dtype == "float32" for by in found.values() for a in by.values())


@pytest.mark.parametrize("family", ["clip", "first", "clipa", "coca", "timm vit token"])
def test_what_a_hook_keeps_owns_its_memory(family, monkeypatch):
    """A view of one token would hold every block's whole activation until the pass ends."""
    clip = tiny.build(family)
    for side, batch in (("vision", tiny.images(clip)), ("text", tiny.token_ids())):
        kept = {}

        def assemble(self, output, kept=kept):
            kept.update(self._seen)
            return {}

        monkeypatch.setattr(Recorder, "_assemble", assemble)
        with Recorder(find_towers(clip)[side], ("native", "normed", "joint")) as recorder:
            recorder(batch)
        held = [value for found in kept.values() for value in found.values()]
        assert len(held) >= find_towers(clip)[side].depth + 1
        for value in held:
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


def test_final_is_normed_whatever_else_is_asked_for():
    clip = tiny.build("clip")
    for tower, batch in zip(find_towers(clip).values(), (tiny.images(clip), tiny.token_ids())):
        found = []
        for spaces in (("native",), ("native", "normed")):
            with Recorder(tower, spaces, "mean") as recorder:
                found.append(recorder(batch))
        last = str(tower.depth)
        np.testing.assert_array_equal(found[0]["native"]["final"], found[1]["normed"][last])
        assert not np.allclose(found[0]["native"]["final"], found[0]["native"][last])
