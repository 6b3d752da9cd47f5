"""CoOp against a plain forward pass, its records, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import shared_backbone
from stepping import TASK, assert_same_step, built, first_step
from torch import Tensor

from vlmadapters.clip.frozen import Backbone
from vlmadapters.clip.savings import Savings
from vlmadapters.data.task import Task
from vlmadapters.files import load_method, load_official, save_method, save_official
from vlmadapters.methods.configs import CoOpConfig
from vlmadapters.methods.coop import CoOp
from vlmadapters.training.recipes import load_recipe
from vlmlayers.errors import UserError

NOVEL = Task(("sea lion", "Boeing 747-400"))
CONFIGS = [
    CoOpConfig(),
    CoOpConfig(words="", length=5, class_at="middle"),
    CoOpConfig(words="", length=3, class_at="front", class_specific=True),
    CoOpConfig((), (1, 3)),
    CoOpConfig((), (2, 3), words="a_blurry_photo_of_the", class_at="middle", class_specific=True),
    CoOpConfig((), (2,), words="", length=2),
]
IDS = [f"{one.placement} {one.class_at} {one.size}" for one in CONFIGS]


def sequence(context: Tensor, name: Tensor, class_at: str) -> Tensor:
    """Return context and name tokens in their order."""
    head = {"end": len(context), "middle": len(context) // 2, "front": 0}[class_at]
    return torch.cat([context[:head], name, context[head:]])


@torch.no_grad()
def plain_features(method: CoOp, clip: Any, backbone: Backbone, names: tuple[str, ...]) -> Tensor:
    """Text features by the sheet's rules, one class after the other, all tokens of it."""
    config, found = method.config, []
    for index, name in enumerate(names):
        ids = backbone.tokens([f"{name.replace('_', ' ')}."])[0]
        end, words = int(ids.argmax()), config.start_words
        embedded, frozen = (
            clip.token_embedding(ids),
            clip.token_embedding(backbone.tokens([" ".join(words)])[0, 1 : 1 + len(words)]),
        )
        contexts = {
            int(block): value[index] if value.ndim == 3 else value
            for block, value in method.context.items()
        }
        # Marked, the context is found again after it was put around the name.
        marks = sequence(torch.ones(len(words)), torch.zeros(end - 2), config.class_at).bool()
        slots = torch.cat([torch.zeros(1).bool(), marks])
        slots = torch.cat([slots, torch.zeros(77 - len(slots)).bool()])
        inner = sequence(contexts.get(1, frozen), embedded[1 : end - 1], config.class_at)
        x = torch.cat([embedded[:1], inner, embedded[end - 1 :]])[:77] + clip.positional_embedding
        x = x[None]
        for block, module in enumerate(clip.transformer.resblocks, 1):
            if block > 1 and block in contexts:
                x[0, slots] = contexts[block]
            x = module(x, attn_mask=clip.attn_mask)
        found.append(clip.ln_final(x[0, end + len(words)]) @ clip.text_projection)
    return torch.stack(found)


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_features_are_those_of_a_plain_forward_pass(config: CoOpConfig) -> None:
    method, backbone = built(config)
    for name, value in method.named_parameters():
        value.data += 0.1 * torch.randn(
            value.shape, generator=torch.Generator().manual_seed(len(name))
        )
    task = TASK if config.class_specific else NOVEL
    with torch.no_grad():
        found = method.class_features(backbone, method.prepare(backbone, task))
    expected = plain_features(method, backbone.clip, backbone, task.class_names)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_savings_change_neither_loss_nor_gradients(config: CoOpConfig) -> None:
    saved, plain = (first_step(*built(config, savings)) for savings in (None, Savings.none()))
    assert_same_step(saved, plain)


@pytest.mark.parametrize("class_at", ["end", "middle", "front"])
@pytest.mark.parametrize("each", [False, True])
def test_context_from_words_starts_as_clip_with_these_words(class_at: str, each: bool) -> None:
    """At later blocks too, where it is the same for every class: at the end, or one for each."""
    blocks = (1, 2, 3) if each or class_at == "end" else (1,)
    config = CoOpConfig((), blocks, class_at=class_at, class_specific=each)
    (method, backbone), front = built(config), built(CoOpConfig(class_at=class_at))[0]
    with torch.no_grad():
        found, plain = (
            one.class_features(backbone, one.prepare(backbone, TASK)) for one in (method, front)
        )
    torch.testing.assert_close(found, plain)
    if class_at == "end":
        tokens = backbone.tokens(TASK.prompts())
        end = backbone.text.tower.depth + 1
        prompts = backbone.prompts(tokens, [end])[end]
        torch.testing.assert_close(plain, backbone.features("text", prompts))


@pytest.mark.parametrize("class_at", ["middle", "front"])
def test_context_of_all_classes_starts_at_the_mean_of_what_it_is_for_each(class_at: str) -> None:
    """At a later block, where words behind the name differ between classes."""
    config = CoOpConfig((), (2,), class_at=class_at)
    one = built(config)[0].context["2"]
    each = built(replace(config, class_specific=True))[0].context["2"]
    torch.testing.assert_close(one, each.mean(0))
    assert not torch.allclose(each[0], each[1])


def test_the_start_is_drawn_from_the_seed_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    config = CoOpConfig((), (1, 2), words="")
    one, two = (built(config)[0] for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    for name, value in one.named_parameters():
        assert value.shape == (16, 32)
        assert torch.equal(value, two.get_parameter(name))
    assert not torch.equal(one.context["1"], one.context["2"])


def test_contexts_of_classes_follow_their_names() -> None:
    config = CoOpConfig(words="", length=2, class_specific=True)
    task = Task(("crane", "cat", "crane"))
    method, backbone = built(config, task=task)

    def features(*names: str) -> Tensor:
        return method.class_features(backbone, method.prepare(backbone, Task(names)))

    with torch.no_grad():
        crane, cat, other = features("crane", "cat", "crane")
        assert not torch.equal(crane, other)
        torch.testing.assert_close(features("cat", "crane"), torch.stack([cat, crane]))
        with pytest.raises(UserError, match=r"each of 3 classes \(crane, cat, .*'dog' is none"):
            features("cat", "dog")


def test_published_settings_and_parameters() -> None:
    for recipe, words, epochs in (
        ("published", 4, 200),
        ("few-shot", 16, 200),
        ("transfer", 4, 50),
    ):
        made = load_recipe(recipe, "coop")
        assert isinstance(made.method, CoOpConfig)
        assert made.method.text == (1,)
        assert len(made.method.start_words) == words
        assert made.train.epochs == epochs
    assert load_recipe("few-shot", "coop").train_for("imagenet").epochs == 50


def test_as_published_words_leave_one_context() -> None:
    assert CoOpConfig(class_specific=True).class_bound
    assert not CoOpConfig(class_specific=True, as_published=True).class_bound
    assert CoOpConfig(words="", class_specific=True, as_published=True).class_bound


@pytest.mark.parametrize("config", CONFIGS[:4], ids=IDS[:4])
def test_files_of_both_layouts_bring_back_the_method(config: CoOpConfig, tmp_path: Path) -> None:
    model, (method, backbone) = shared_backbone(), built(config)
    path = save_method(tmp_path / "ours", method, model, TASK)
    theirs = save_official(tmp_path / "theirs.pth.tar", method)
    content = torch.load(theirs, weights_only=True)
    assert next(iter(content["state_dict"])) == "ctx"
    content["state_dict"] |= {
        "token_prefix": torch.zeros(3, 1, 32),
        "token_suffix": torch.zeros(3, 72, 32),
    }
    torch.save(content, theirs)
    read = [load_method(path, model), load_official(theirs, model, config, task=TASK)]
    if config.class_at == "end":
        read.append(load_official(theirs, model, method="coop", task=TASK))
    with torch.no_grad():
        expected = method.class_features(backbone, method.prepare(backbone, TASK))
        for one in read:
            found = one.class_features(backbone, one.prepare(backbone, TASK))
            torch.testing.assert_close(found, expected)


def test_contexts_of_classes_are_of_those_of_the_task(tmp_path: Path) -> None:
    model, path = shared_backbone(), tmp_path / "a.pth.tar"
    torch.save({"ctx": torch.zeros(5, 4, 32)}, path)
    with pytest.raises(UserError, match="contexts of 5 classes, and the task has 3"):
        load_official(path, model, method="coop", task=TASK)
    with pytest.raises(UserError, match="name the classes"):
        load_official(path, model, method="coop")


def test_bad_fits_are_one_line() -> None:
    with pytest.raises(UserError, match="block 4"):
        built(CoOpConfig((), (4,)))
    method, backbone = built(CoOpConfig(words="", length=72))
    method.prepare(backbone, Task(("cat",)))
    with pytest.raises(UserError, match=r"'golden retriever' takes 5 .* 77 at most; use 72"):
        method, backbone = built(CoOpConfig(words="", length=73))
        method.prepare(backbone, TASK)
