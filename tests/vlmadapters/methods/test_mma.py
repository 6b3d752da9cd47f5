"""The adapter against numbers recorded from the authors' code, and against its own definition."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from backbones import FAMILIES, SIZE, backbone, config, shared_backbone, some_images, some_tokens
from torch.nn import functional as F

from vlmadapters.clip.frozen import Backbone
from vlmadapters.clip.logits import class_logits
from vlmadapters.clip.savings import Savings
from vlmadapters.methods.mma.config import MMAConfig
from vlmadapters.methods.mma.module import Adapter, attach, new_adapter
from vlmlayers.errors import UserError
from vlmlayers.models.load import build_clip


class Golden:
    """The recorded run: arrays by key, and the configuration."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "mma_tiny.json").read_text())
        self.arrays = np.load(folder / "mma_tiny.npz")

    def tensor(self, key: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[key])

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        keys = [key for key in self.arrays.files if key.startswith(prefix)]
        return {key.removeprefix(prefix): self.tensor(key) for key in keys}

    def clip(self) -> open_clip.CLIP:
        clip = open_clip.model.CLIP(**self.config["model_cfg"])
        clip.load_state_dict(self.group("state/"))
        return clip.eval()

    def adapter_config(self) -> MMAConfig:
        a = self.config["adapter"]
        return MMAConfig.span(a["start"], a["end"], dim=a["dim"], scale=a["scale"])


@pytest.fixture(scope="module")
def golden(repository: Path) -> Golden:
    return Golden(repository / "tests/golden")


def test_the_copy_of_the_recorded_run_is_the_record(golden: Golden, shared_golden: Path) -> None:
    record = Golden(shared_golden)
    assert golden.config == record.config
    for key in golden.arrays.files:
        assert np.array_equal(golden.arrays[key], record.arrays[key]), key


def test_plain_clip_agrees_before_anything_is_attached(golden: Golden) -> None:
    logits = class_logits(golden.clip(), golden.tensor("images")[0], golden.tensor("tokens"))
    torch.testing.assert_close(logits, golden.tensor("clip/logits"), atol=1e-5, rtol=1e-5)


def test_logits_and_first_gradients_agree_with_the_authors_code(golden: Golden) -> None:
    clip = golden.clip()
    with attach(clip, golden.adapter_config()) as mma:
        mma.load_official_state_dict(golden.group("adapter_init/"))
        logits = class_logits(clip, golden.tensor("images")[0], golden.tensor("tokens"))
        torch.testing.assert_close(logits, golden.tensor("mma/logits"), atol=1e-5, rtol=0)
        F.cross_entropy(logits, golden.tensor("labels")[0]).backward()
        assert mma.parameter_count() == golden.config["trainable_parameters"]
        for key, parameter in mma.named_official_parameters():
            expected = golden.tensor(f"grad/{key}")
            assert parameter.grad is not None
            error = (parameter.grad - expected).norm() / expected.norm()
            assert error < 1e-4, key


@pytest.mark.parametrize("savings", [None, Savings(), Savings(onednn=False)])
def test_five_steps_follow_the_authors_trajectory(golden: Golden, savings: Savings | None) -> None:
    """Attached by hooks, and by the walks that training uses, with what they save."""
    clip, tokens, losses = golden.clip(), golden.tensor("tokens"), []
    config, o = golden.adapter_config(), golden.config["optimizer"]
    mma = new_adapter(clip, config)
    mma.load_official_state_dict(golden.group("adapter_init/"))
    backbone = Backbone(clip, savings)
    prompts = backbone.prompts(tokens, [config.text[0]])[config.text[0]]

    def logits(images: torch.Tensor) -> torch.Tensor:
        if savings is None:
            with mma.attached(clip):
                return class_logits(clip, images, tokens)
        states = backbone.images(images, [config.vision[0]])
        return backbone.logits(states[config.vision[0]], prompts, mma)

    optimizer = torch.optim.SGD(
        mma.parameters(), lr=o["lr"], momentum=o["momentum"], weight_decay=o["weight_decay"]
    )
    clip.requires_grad_(False)
    for images, labels in zip(golden.tensor("images"), golden.tensor("labels")):
        loss = F.cross_entropy(logits(images), labels)
        optimizer.zero_grad()
        loss.backward()
        if not losses:
            for key, parameter in mma.named_official_parameters():
                expected = golden.tensor(f"grad/{key}")
                assert parameter.grad is not None
                assert (parameter.grad - expected).norm() / expected.norm() < 1e-4, key
        optimizer.step()
        losses.append(loss.item())
    np.testing.assert_allclose(losses, golden.arrays["losses"], atol=1e-5)
    final = logits(golden.tensor("images")[0])
    torch.testing.assert_close(final, golden.tensor("mma/final_logits"), atol=1e-5, rtol=0)
    for key, value in mma.official_state_dict().items():
        torch.testing.assert_close(
            value, golden.tensor(f"adapter_final/{key}"), atol=1e-6, rtol=1e-5
        )


def test_the_benchmarks_transcription_agrees_with_the_authors_code(
    golden: Golden, monkeypatch: pytest.MonkeyPatch, repository: Path
) -> None:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    from public_recipe import PublicMMA

    public = PublicMMA(golden.clip(), golden.adapter_config())
    initial = golden.group("adapter_init/")
    parameters = public.adapter_parameters()
    assert parameters.keys() == initial.keys()
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(initial[key])
    logits = public(golden.tensor("images")[0], golden.tensor("tokens"))
    torch.testing.assert_close(logits, golden.tensor("mma/logits"), atol=1e-5, rtol=0)
    F.cross_entropy(logits, golden.tensor("labels")[0]).backward()
    for key, parameter in parameters.items():
        expected = golden.tensor(f"grad/{key}")
        assert (parameter.grad - expected).norm() / expected.norm() < 1e-4, key


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_adapted_and_left_as_it_was(family: str) -> None:
    model = shared_backbone(family)
    images, tokens = some_images(model), some_tokens(model)
    hooks = [dict(m._forward_hooks) for m in model.clip.modules()]
    depth = min(tower.depth for tower in model.towers.values())
    with torch.no_grad():
        before = class_logits(model.clip, images, tokens)
        with attach(model.clip, MMAConfig.span(2, depth, scale=0.5)) as mma:
            adapted = class_logits(model.clip, images, tokens)
        after = class_logits(model.clip, images, tokens)
        with mma.attached(model.clip):
            again = class_logits(model.clip, images, tokens)
    assert (adapted - before).abs().max() > 1e-3
    assert torch.equal(before, after)
    assert torch.equal(adapted, again)
    assert [dict(m._forward_hooks) for m in model.clip.modules()] == hooks


def test_the_adapter_is_what_its_formula_says() -> None:
    model = backbone()
    images, seen = some_images(model), {}
    block = model.towers["vision"].blocks[1]
    config = MMAConfig(vision=(2,), text=(2,), scale=0.3)
    with torch.no_grad(), attach(model.clip, config, seed=3) as mma:
        handle = block.register_forward_hook(lambda m, a, out: seen.update(x=a[0], out=out))
        model.clip.encode_image(images)
        handle.remove()
    with torch.no_grad():
        plain = block(seen["x"])
        u = block.ln_1(seen["x"])
        s = mma.official_state_dict()
        p = "visual_adapter.2"
        h = F.relu(u @ s[f"{p}.down.0.weight"].T + s[f"{p}.down.0.bias"])
        h = F.relu(h @ s["shared_adapter.2.0.weight"].T + s["shared_adapter.2.0.bias"])
        y = h @ s[f"{p}.up.weight"].T + s[f"{p}.up.bias"]
    torch.testing.assert_close(seen["out"], plain + 0.3 * y, atol=1e-5, rtol=1e-5)


def test_parameters_see_a_gradient_as_if_scale_were_one_and_the_input_the_true_one() -> None:
    """Compared with finite differences of the loss: scale times ours is the true gradient."""
    model, scale = backbone(), 0.25
    model.clip.double()
    images, tokens = some_images(model).double(), some_tokens(model)
    labels = torch.tensor([0, 1])
    with attach(model.clip, MMAConfig.span(2, 3, scale=scale)) as mma:
        mma.double()

        def loss() -> torch.Tensor:
            return F.cross_entropy(class_logits(model.clip, images, tokens), labels)

        loss().backward()
        for key, parameter in mma.named_official_parameters():
            assert parameter.grad is not None
            flat = parameter.data.view(-1)
            index = int(parameter.grad.abs().argmax())
            step = 1e-5
            flat[index] += step
            high = loss().item()
            flat[index] -= 2 * step
            low = loss().item()
            flat[index] += step
            true = (high - low) / (2 * step)
            ours = parameter.grad.view(-1)[index].item() * scale
            assert ours == pytest.approx(true, rel=1e-3, abs=1e-7), key


def test_counts_are_the_published_ones() -> None:
    widths = {"vision": 768, "text": 512}
    assert Adapter(MMAConfig.span(5, 5), widths).parameter_count() == 84_320
    assert Adapter(MMAConfig.span(5, 12), widths).parameter_count() == 674_560
    # What a recipe says of itself without a model.
    for one in (MMAConfig.span(5, 12), MMAConfig((1, 2), (2, 3), dim=4), MMAConfig((3,), ())):
        assert one.parameters(widths) == Adapter(one, widths).parameter_count()


def test_weights_are_drawn_by_kaiming_from_a_private_generator() -> None:
    before = torch.get_rng_state()
    a, b, c = (Adapter(MMAConfig.span(1, 12), {"vision": 768, "text": 512}, s) for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    for (key, x), y, z in zip(a.named_parameters(), b.parameters(), c.parameters()):
        assert torch.equal(x, y)
        if x.ndim == 1:
            assert not x.any()
        else:
            assert not torch.equal(x, z)
            assert x.std().item() == pytest.approx((2 / x.shape[0]) ** 0.5, rel=0.12), key


def test_projections_are_shared_by_pairs_and_own_elsewhere() -> None:
    widths = {"vision": 64, "text": 32}
    keys = Adapter(MMAConfig(vision=(1, 2), text=(2, 3)), widths).official_state_dict()
    assert {k.split(".")[1] for k in keys if k.startswith("shared")} == {"v1", "2", "t3"}
    paired = MMAConfig(vision=(1, 2), text=(2, 3), pairs=((1, 2), (2, 3)))
    keys = Adapter(paired, widths).official_state_dict()
    assert {k.split(".")[1] for k in keys if k.startswith("shared")} == {"v1t2", "v2t3"}
    assert paired.with_placement((2, 3), (3,)) == MMAConfig((2, 3), (3,))


def test_hooks_leave_also_after_an_exception_and_twice_is_refused() -> None:
    model = backbone()
    images, tokens = some_images(model), some_tokens(model)
    model.clip.requires_grad_(True)
    before = class_logits(model.clip, images, tokens)
    with pytest.raises(KeyboardInterrupt), attach(model.clip, MMAConfig.span(1, 3)):
        assert not any(p.requires_grad for p in model.clip.parameters())
        with (
            pytest.raises(UserError, match="attached to this backbone"),
            attach(model.clip, MMAConfig.span(1, 3)),
        ):
            pass
        raise KeyboardInterrupt
    assert all(p.requires_grad for p in model.clip.parameters())
    assert torch.equal(before, class_logits(model.clip, images, tokens))


def test_a_tower_without_blocks_is_refused_with_its_reason() -> None:
    resnet = {"layers": [1, 1, 1, 1], "width": 16, "head_width": 16}
    clip = build_clip(config() | {"vision_cfg": {**resnet, "image_size": SIZE}})
    with pytest.raises(UserError, match="vision tower .* has stages, not transformer blocks"):
        new_adapter(clip, MMAConfig.span(1, 2))


def fresh(first: int, last: int, **options: int) -> Adapter:
    return new_adapter(shared_backbone().clip, MMAConfig.span(first, last, **options))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MMAConfig((0,), (1,)), "not a whole number from 1"),
        (lambda: MMAConfig((1, 1), ()), "twice"),
        (lambda: MMAConfig((), ()), "no block"),
        (lambda: MMAConfig((1,), (1,), dim=0), "dim takes a whole number from 1, not 0"),
        (lambda: MMAConfig((1,), (1,), scale=-1.0), "scale takes a number from 0, not -1.0"),
        (lambda: MMAConfig((1,), (1,), pairs=((1, 2),)), "not adapted"),
        (lambda: MMAConfig((1, 2), (1,), pairs=((1, 1), (2, 1))), "name a block twice"),
        (lambda: MMAConfig.span(3, 2), "range 3-2 is reversed; write 2-3"),
        (lambda: MMAConfig.from_choice({"vision": [1]}), "'vision' and 'text'"),
        (lambda: MMAConfig.from_dict({"scail": 1}), "did you mean 'scale'"),
        (lambda: new_adapter(shared_backbone().clip, MMAConfig.span(2, 9)), "tower has 3 blocks"),
        (
            lambda: (
                Adapter(MMAConfig.span(1, 1), {"vision": 8, "text": 8})
                .attached(shared_backbone().clip)
                .__enter__()
            ),
            "width 8, this backbone's",
        ),
        (
            lambda: new_adapter(
                shared_backbone().clip, MMAConfig.span(1, 2)
            ).load_official_state_dict(
                new_adapter(shared_backbone().clip, MMAConfig.span(2, 3)).official_state_dict()
            ),
            r"10 parameters are missing .* 10 are not known",
        ),
        (
            lambda: new_adapter(
                shared_backbone().clip, MMAConfig.span(1, 1)
            ).load_official_state_dict(
                new_adapter(
                    shared_backbone().clip, MMAConfig.span(1, 1, dim=4)
                ).official_state_dict()
            ),
            r"has shape \(.*\) in the checkpoint and",
        ),
    ],
)
def test_mistakes_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("default", ["device", "type"])
def test_a_callers_defaults_change_no_adapter(default: str) -> None:
    """As `torch.set_default_device` of a GPU, where the CPU's generator does not draw."""
    clip, config = backbone().clip, MMAConfig.span(2, 3)
    with attach(clip, config, seed=3) as mma:
        expected = mma.state_dict()
    torch.set_default_dtype(torch.float64 if default == "type" else torch.float32)
    with torch.device("meta") if default == "device" else nullcontext():
        try:
            with attach(clip, config, seed=3) as mma:
                found = mma.state_dict()
        finally:
            torch.set_default_dtype(torch.float32)
    for key, value in expected.items():
        assert found[key].dtype == torch.float32 and torch.equal(found[key], value)
