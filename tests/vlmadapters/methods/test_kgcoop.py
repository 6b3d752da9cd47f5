"""KgCoOp: its distance to hand-made prompts by hand, what the public code ignores, its files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from backbones import shared_backbone
from stepping import TASK, assert_same_step, built, first_step, step_of
from torch.nn import functional as F

from vlmadapters.clip.savings import Savings
from vlmadapters.data.task import Task
from vlmadapters.files import load_official, save_official
from vlmadapters.methods.configs import CoOpConfig, KgCoOpConfig
from vlmadapters.methods.coop import CoOp
from vlmlayers.errors import UserError

PETS = replace(TASK, own_template="a photo of a {}, a type of pet.")


@pytest.mark.parametrize(
    ("task", "template"),
    [
        (TASK, "a photo of a {}."),
        (PETS, "a photo of a {}, a type of pet."),
        (replace(PETS, template="art of the {}."), "art of the {}."),
    ],
    ids=["common", "own", "recipe"],
)
def test_the_distance_is_that_to_the_prompts_of_the_named_template(
    task: Task, template: str
) -> None:
    method, backbone = built(KgCoOpConfig(words="", weight=3.0), task=task)
    step = step_of(method, backbone, task)
    with torch.no_grad():
        parts, loss = method.loss_parts(step), method.loss(step)
        learned = F.normalize(method.class_features(backbone, step.classes), dim=-1)
        texts = [template.replace("{}", name.replace("_", " ")) for name in task.class_names]
        tokens = shared_backbone().tokenizer(texts)
        hand_made = F.normalize(shared_backbone().clip.encode_text(tokens), dim=-1)
    # For unit vectors half of the squared distance, equation 4.
    expected = (learned - hand_made).square().sum(1).mean() / 2
    torch.testing.assert_close(parts["distance"], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, parts["cross_entropy"] + 3 * parts["distance"])


def test_without_weight_a_step_is_that_of_coop() -> None:
    method, backbone = built(KgCoOpConfig(weight=0.0))
    plain = CoOp.build(CoOpConfig(), backbone, TASK, seed=3)
    assert_same_step(first_step(method, backbone), first_step(plain, backbone))


def test_it_starts_at_no_distance_from_its_own_words() -> None:
    method, backbone = built(KgCoOpConfig())
    with torch.no_grad():
        assert method.loss_parts(step_of(method, backbone))["distance"].abs() < 1e-6


def test_savings_change_neither_loss_nor_gradients() -> None:
    config = KgCoOpConfig(words="", length=3)
    saved, plain = (first_step(*built(config, savings)) for savings in (None, Savings.none()))
    assert_same_step(saved, plain)


def test_as_published_ignores_what_the_public_code_does() -> None:
    asked = {"words": "art of the", "class_at": "front", "class_specific": True}
    config = KgCoOpConfig(**asked, as_published=True)
    assert (config.class_at, config.class_bound) == ("end", False)
    assert config.start_words == KgCoOpConfig().start_words
    assert KgCoOpConfig(**asked).class_at == "front"


def test_unused_values_of_the_public_code_are_left_out(tmp_path: Path) -> None:
    method, _ = built(KgCoOpConfig(words="", length=2))
    path = save_official(tmp_path / "a.pth.tar", method)
    content = torch.load(path, weights_only=True)
    unused = ("bias_vectors", "meta_net.linear1.weight", "meta_net.linear1.bias", "token_prefix")
    content["state_dict"] |= dict.fromkeys(unused, torch.zeros(1))
    torch.save(content, path)
    again = load_official(path, shared_backbone(), method="kgcoop", task=TASK)
    assert torch.equal(again.official_state_dict()["ctx"], method.official_state_dict()["ctx"])
    with pytest.raises(UserError, match=r"size 2 context words, asked for is 4 context words"):
        load_official(path, shared_backbone(), KgCoOpConfig(), task=TASK)
