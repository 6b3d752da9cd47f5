"""CoCoOp against texts that are encoded image by image, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from backbones import shared_backbone
from stepping import TASK, assert_same_step, built, first_step, step_of
from torch.nn import functional as F

from vlmadapters.clip.savings import Savings
from vlmadapters.data.task import Task
from vlmadapters.files import load_official
from vlmadapters.methods import cocoop
from vlmadapters.methods.cocoop import CoCoOp
from vlmadapters.methods.configs import CoCoOpConfig, CoOpConfig
from vlmadapters.methods.coop import CoOp
from vlmlayers.errors import UserError

CONFIGS = [CoCoOpConfig(), CoCoOpConfig(words="", length=3)]
NOVEL = Task(("sea lion", "Boeing 747-400"))


def shifted(method: CoCoOp, feature: torch.Tensor) -> torch.Tensor:
    """Return the context of one image: every word moved by W2 · relu(W1 · feature + c1) + c2."""
    names = method.official_state_dict()
    first, second = ([names[f"meta_net.linear{i}.{kind}"] for kind in ("weight", "bias")]
                     for i in (1, 2))  # fmt: skip
    hidden = (first[0] @ feature + first[1]).clamp(min=0)
    return names["ctx"] + second[0] @ hidden + second[1]


@pytest.mark.parametrize("task", [TASK, NOVEL], ids=["trained", "novel"])
@pytest.mark.parametrize("config", CONFIGS, ids=["words", "drawn"])
def test_each_image_is_compared_with_texts_of_its_own(config: CoCoOpConfig, task: Task) -> None:
    """A plain CoOp whose context is that of one image gives the logits of that image."""
    method, backbone = built(config)
    step = step_of(method, backbone, task)
    plain = CoOp.build(CoOpConfig(**config.to_dict()), backbone, task, seed=3)
    with torch.no_grad():
        features = method.image_features(backbone, step.images)
        found = method.logits(backbone, features, step.classes)
        for row, feature in zip(found, F.normalize(features, dim=-1)):
            plain.load_official_state_dict({"ctx": shifted(method, feature)})
            texts = plain.class_features(backbone, plain.prepare(backbone, task))
            expected = backbone.clip.logit_scale.exp() * feature @ F.normalize(texts, dim=-1).t()
            torch.testing.assert_close(row, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=["words", "drawn"])
def test_savings_change_neither_loss_nor_gradients(config: CoCoOpConfig) -> None:
    saved, plain = (first_step(*built(config, savings)) for savings in (None, Savings.none()))
    assert_same_step(saved, plain)


def test_images_go_through_in_parts_where_all_their_texts_would_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = first_step(*built(CONFIGS[0]))
    monkeypatch.setattr(cocoop, "TEXTS", 2 * len(TASK.class_names))  # two of four images
    assert_same_step(first_step(*built(CONFIGS[0])), whole)


def test_the_network_narrows_to_a_sixteenth() -> None:
    method, backbone = built(CONFIGS[0])
    joint, width = backbone.joint, backbone.text.tower.width
    hidden = joint // 16
    shapes = {key: tuple(value.shape) for key, value in method.official_state_dict().items()}
    assert shapes == {
        "ctx": (4, width),
        "meta_net.linear1.weight": (hidden, joint),
        "meta_net.linear1.bias": (hidden,),
        "meta_net.linear2.weight": (width, hidden),
        "meta_net.linear2.bias": (width,),
    }


def test_what_does_not_fit_is_one_line(tmp_path: Path) -> None:
    model, path = shared_backbone(), tmp_path / "a.pth.tar"
    with pytest.raises(UserError, match="class_specific"):
        CoCoOpConfig(class_specific=True)  # type: ignore[call-arg]
    torch.save({"ctx": torch.zeros(4, 32)}, path)
    with pytest.raises(UserError, match="another method than CoCoOp: it holds CoOp"):
        load_official(path, model, method="cocoop")
    torch.save({"ctx": torch.zeros(3, 4, 32)}, path)
    with pytest.raises(UserError, match=r"holds no CoCoOp: its ctx has the shape \(3, 4, 32\)"):
        load_official(path, model, method="cocoop")


def test_weights_and_biases_of_the_small_network_start_as_torch_draws_linear_layers() -> None:
    """Uniform within 1/√(width in), the biases too: the shift of an image is not 0 at the start."""
    method, _ = built(CONFIGS[0])
    for linear in (method.meta_net.linear1, method.meta_net.linear2):
        bound = linear.in_features**-0.5
        for values in (linear.weight.detach(), linear.bias.detach()):
            assert 0 < values.abs().max() <= bound
    # Of many values the mean square is a third of the bound's.
    weights = method.meta_net.linear2.weight.detach()
    assert weights.square().mean().item() == pytest.approx(bound**2 / 3, rel=0.3)
