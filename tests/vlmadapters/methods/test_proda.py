"""ProDA: its bound and its overlap by plain sums, the places of names, groups, what it refuses."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from stepping import TASK, assert_same_step, built, first_step, step_of
from torch.nn import functional as F

from vlmadapters.clip.savings import Savings
from vlmadapters.methods.configs import CoOpConfig, ProDAConfig
from vlmadapters.methods.coop import CoOp
from vlmadapters.methods.proda import ProDA
from vlmlayers.errors import UserError

CONFIG = ProDAConfig(prompts=8, group=4, length=3)
GROUP = torch.tensor([0, 3, 5, 6])  # a name in front, one in the middle, two at the end


def test_a_quarter_of_the_names_stands_in_front_a_quarter_in_the_middle_and_half_at_the_end() -> (
    None
):
    """Each prompt gives the features of a CoOp with its context, the name in its place."""
    method, backbone = built(CONFIG)
    contexts = method.official_state_dict()["ctx"]
    places = ["front"] * 2 + ["middle"] * 2 + ["end"] * 4
    with torch.no_grad():
        texts = method.prepare(backbone, TASK)
        found = method.prompt_features(backbone, texts, torch.arange(8))
        for context, place, features in zip(contexts, places, found):
            plain = CoOp.build(CoOpConfig(words="", length=3, class_at=place), backbone, TASK)
            plain.load_official_state_dict({"ctx": context})
            expected = plain.class_features(backbone, plain.prepare(backbone, TASK))
            torch.testing.assert_close(features, F.normalize(expected, dim=-1))
        mean = method.class_features(backbone, texts)
    torch.testing.assert_close(mean, found.mean(0))


def test_logits_of_training_are_the_sums_of_the_formula() -> None:
    method, backbone = built(CONFIG)
    step = step_of(method, backbone, draws={"prompts": GROUP})
    with torch.no_grad():
        parts = method.loss_parts(step)
        f = F.normalize(method.image_features(backbone, step.images), dim=-1).double()
        t = method.prompt_features(backbone, step.classes, GROUP).double()
        bare = method.bare_features(backbone, step.classes).double()
    scale, mean = backbone.clip.logit_scale.exp().double(), t.mean(0)
    apart = t - mean
    logits = torch.zeros(len(f), len(mean), dtype=torch.double)
    for i, (image, y) in enumerate(zip(f, step.labels.tolist())):

        def q(a: int, b: int, squared: torch.Tensor = image**2) -> torch.Tensor:
            return (squared * (apart[:, a] * apart[:, b]).sum(0)).sum() / (len(t) + 1)

        for k in range(len(mean)):
            bound = q(y, y) + q(k, k) - 2 * q(y, k)
            logits[i, k] = scale * image @ mean[k] + scale**2 / 2 * bound
    expected = F.cross_entropy(logits, step.labels)
    torch.testing.assert_close(parts["cross_entropy"].double(), expected, atol=1e-4, rtol=1e-5)
    pairs = [abs(float(a @ b)) for (i, a), (j, b) in product(enumerate(bare), repeat=2) if i != j]
    assert float(parts["overlap"]) == pytest.approx(sum(pairs) / len(pairs), abs=1e-5)


@pytest.mark.parametrize("config", [CONFIG, ProDAConfig(prompts=1, group=1, length=2)])
def test_savings_change_neither_loss_nor_gradients(config: ProDAConfig) -> None:
    saved, plain = (first_step(*built(config, savings)) for savings in (None, Savings.none()))
    assert_same_step(saved, plain)


def test_a_pass_takes_every_prompt_once_and_the_next_or_another_seed_has_another_order() -> None:
    method, backbone = built(ProDAConfig(prompts=8, group=2, length=2))
    step = step_of(method, backbone)
    taken = []
    method.prompt_features = lambda backbone, texts, numbers: (
        taken.append(numbers) or ProDA.prompt_features(method, backbone, texts, numbers)
    )
    with torch.no_grad():
        for number in range(8):
            method.loss(replace(step, number=number))
        method.seed += 1
        for number in range(4):
            method.loss(replace(step, number=number))
    passes = [torch.cat(taken[start : start + 4]).tolist() for start in (0, 4, 8)]
    assert [sorted(one) for one in passes] == [list(range(8))] * 3
    assert len(set(map(tuple, passes))) == 3


def test_a_context_that_leaves_no_room_for_a_name_says_how_much_there_is() -> None:
    with pytest.raises(UserError, match="77 at most; use 72 context words"):
        method, backbone = built(ProDAConfig(length=73))
        method.prepare(backbone, TASK)
