"""What holds for every method: savings change nothing, files of others are refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import shared_backbone
from stepping import TASK, first_step, moved
from stepping import built as built_of

from vlmadapters.clip.frozen import Backbone
from vlmadapters.clip.savings import Savings
from vlmadapters.data.task import Task
from vlmadapters.files import load_method, load_official, save_method, save_official
from vlmadapters.methods import BUILT_IN, METHODS
from vlmadapters.methods.config import MethodConfig
from vlmadapters.methods.configs import CoCoOpConfig, CoOpConfig, LASPConfig, ProDAConfig
from vlmadapters.methods.deep_configs import (
    CLIPLoRAConfig,
    IVLPConfig,
    LwEIBConfig,
    MaPLeConfig,
    PromptSRCConfig,
    RPOConfig,
)
from vlmadapters.methods.head_configs import CLIPAdapterConfig
from vlmadapters.methods.mma.config import MMAConfig
from vlmadapters.protocols.evaluate import Evaluator
from vlmlayers.errors import UserError

# What keeps two steps alike: no dropout, whose draws follow the shapes that savings cut.
ALIKE = {"cliplora": {"dropout": 0.0}}
NAMES = [name for name in BUILT_IN if name != "zero-shot"]
WITHOUT_LAYOUT = {"tip", "tip-f", "linear-probe"}
# RPO's files do not say at which blocks it reads: those of ViT-B/16, whose depth this one has not.
# CLIP-LoRA's have a form of their own.
WITH_LAYOUT = [name for name in NAMES if name not in WITHOUT_LAYOUT | {"rpo", "cliplora"}]
STEPPING = [name for name in NAMES if name not in WITHOUT_LAYOUT]
# Layouts that are one: the same names; ProDA's contexts could be those of as many classes.
SAME = [{"coop", "kgcoop", "proda"}, {"ivlp", "promptsrc"}]


def built(
    name: str, savings: Savings | None = None, seed: int = 1, **settings: Any
) -> tuple[Any, Backbone]:
    """Return a method at its published placement on a small backbone."""
    model = shared_backbone()
    backbone = Backbone(model.clip, savings, model.tokenizer)
    depths = {tower: walk.tower.depth for tower, walk in backbone.walks.items()}
    config = METHODS.config(name).published(depths, **ALIKE.get(name, {}), **settings)
    return METHODS[name].build(config, backbone, TASK, seed=seed), backbone


@pytest.mark.parametrize("name", STEPPING)
def test_savings_change_neither_loss_nor_gradients_at_the_published_placement(name: str) -> None:
    saved, plain = (first_step(*built(name, one)) for one in (Savings(), Savings.none()))
    assert saved.keys() == plain.keys()
    for key, value in plain.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(saved[key], value, atol=1e-4 * max(scale, 1e-2), rtol=1e-4)


# Methods whose start is drawn; others start from words or from nothing.
DRAWN = ["mma", "cocoop", "proda", "maple", "ivlp", "promptsrc", "cliplora", "lweib", "rpo",
         "clipadapter"]  # fmt: skip
WITHOUT_WORDS = ["coop", "kgcoop", "lasp"]  # whose start is drawn where no words are given


@pytest.mark.parametrize("name", [*DRAWN, *WITHOUT_WORDS])
def test_the_seed_alone_decides_where_a_method_starts(name: str) -> None:
    before = torch.get_rng_state()
    settings = {"words": ""} if name in WITHOUT_WORDS else {}
    first, again, other = (built(name, seed=seed, **settings)[0].state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert not all(torch.equal(value, other[key]) for key, value in first.items())


def test_class_features_are_made_anew_of_parameters_that_were_read() -> None:
    method, backbone = built("ivlp")
    evaluator = Evaluator(shared_backbone(), backbone, progress=False)
    before = evaluator.class_features(method, TASK)
    method.load_official_state_dict(built("ivlp", seed=2)[0].official_state_dict())
    assert not torch.equal(evaluator.class_features(method, TASK), before)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_ours_brings_back_every_parameter_and_the_classes(
    name: str, tmp_path: Path
) -> None:
    model, (method, _) = shared_backbone(), built(name, seed=7)
    path = save_method(tmp_path / name, method, model, TASK)
    again = load_method(path, model)
    assert again.config == method.config
    for key, value in method.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_the_methods_are_listed_where_a_notebook_shows_them() -> None:
    assert repr(METHODS).startswith("Methods(zero-shot, mma, ") and "tip-f" in repr(METHODS)


@pytest.mark.parametrize("name", sorted(WITHOUT_LAYOUT))
def test_no_file_is_written_in_a_layout_that_does_not_exist(name: str, tmp_path: Path) -> None:
    path = tmp_path / "file.pth.tar"
    with pytest.raises(UserError, match=f"{name} has no layout of its authors to write"):
        save_official(path, built(name)[0])
    assert not path.exists()


@pytest.mark.parametrize("name", WITH_LAYOUT)
def test_a_file_of_the_authors_layout_is_read_by_its_method_alone(
    name: str, tmp_path: Path
) -> None:
    model, (method, _) = shared_backbone(), built(name, seed=7)
    path = save_official(tmp_path / "file.pth.tar", method)
    if name != "lasp":  # whose words are not in its files
        again = load_official(path, model, method.config, task=TASK)
        for key, value in method.official_state_dict().items():
            assert torch.equal(again.official_state_dict()[key], value), key
    alike = next((one for one in SAME if name in one), {name})
    for other in [one for one in NAMES if one not in alike]:
        title = METHODS.config(other).title
        with pytest.raises(UserError, match=f"another method than {title}: it holds") as refused:
            load_official(path, model, method=other, task=TASK)
        assert METHODS.config(name).title in str(refused.value)


# Settings of which a file of the authors' layout tells what the second part names.
TOLD: list[tuple[MethodConfig, tuple[str, ...]]] = [
    (CLIPAdapterConfig(), ("placement", "ratio", "text_ratio")),
    (CLIPAdapterConfig(ratio=0.6, text_ratio=0.3, reduction=2), ("placement",)),
    (CLIPLoRAConfig((1, 2, 3), (1, 2, 3)), ("placement", "alpha")),
    (CLIPLoRAConfig((2,), (3,), matrices=("o", "q"), rank=3, alpha=2.0), ("placement", "alpha")),
    (CLIPLoRAConfig((1, 3), (), matrices=("v",)), ("placement", "alpha")),
    (CLIPLoRAConfig((), (2, 3), matrices=("k", "v", "o")), ("placement", "alpha")),
    (CoCoOpConfig(), ("placement",)),
    (IVLPConfig((1, 2, 3), (1, 2, 3)), ("placement", "vision_length", "text_length")),
    (LwEIBConfig((2,), (1, 3)), ("placement",)),
    (LwEIBConfig((1, 3), ()), ("placement",)),
    (LwEIBConfig((), (2,)), ("placement",)),
    (MaPLeConfig((1, 2, 3), (1, 2, 3)), ("placement", "length")),
    (MaPLeConfig((1,), (1,), length=3), ("placement", "length")),
    (ProDAConfig(prompts=8, group=4, length=3), ("placement", "prompts", "length")),
    (PromptSRCConfig((1, 2), (1, 2), templates=("a photo of a {}.",)), ("placement",)),
]
# Of these a file does not tell all that it is read by: words, depth, or blocks without vectors.
UNTOLD: list[MethodConfig] = [
    LASPConfig((1, 2, 3), templates=("a photo of a {}.", "itap of the {}.")),
    MaPLeConfig((2, 3), (1, 3), length=5, words=""),
    RPOConfig((1, 2, 3), (1, 2, 3), pairs=3),
]
DESCRIBED = tuple((name, (f"It is a {name}.",)) for name in TASK.class_names)


@pytest.mark.parametrize(
    ("config", "told"),
    [*TOLD, *((config, ()) for config in UNTOLD)],
    ids=lambda one: f"{one.name} {one.placement}" if isinstance(one, MethodConfig) else "",
)
def test_files_of_both_layouts_bring_back_the_method(
    config: MethodConfig, told: tuple[str, ...], tmp_path: Path
) -> None:
    task = Task(TASK.class_names, descriptions=DESCRIBED)
    model, method = shared_backbone(), moved(built_of(config, task=task)[0], 1.0)
    ours = load_method(save_method(tmp_path / "ours", method, model, task), model)
    assert ours.config == config
    path = save_official(tmp_path / "theirs.pth.tar", method)
    found = [ours, load_official(path, model, config)]
    if told:
        found.append(load_official(path, model, method=config.name))
        for name in told:
            assert getattr(found[-1].config, name) == getattr(config, name)
    for one in found:
        for name, value in method.named_parameters():
            assert torch.equal(one.get_parameter(name), value)


BOTH = (1, 2, 3), (1, 2, 3)
LORA = CLIPLoRAConfig((2,), (3,), matrices=("o", "q"), rank=3, alpha=2.0)
# What a file was saved with, what is asked for, and how the refusal names both.
UNLIKE: list[tuple[MethodConfig, MethodConfig, str]] = [
    (CLIPAdapterConfig(), CLIPAdapterConfig(reduction=2),
     "inner width of 8, asked for is 16; change reduction"),
    (CLIPAdapterConfig(), CLIPAdapterConfig(text_ratio=0.1), "fc, asked for is fc and text_fc"),
    (LORA, CLIPLoRAConfig(*BOTH), r"has vision \(2,\), asked for is \(1, 2, 3\)"),
    (LORA, replace(LORA, rank=2), "has rank 3, asked for is 2"),
    (LORA, replace(LORA, matrices=("q",)), "has matrices .*asked for is"),
    (LORA, replace(LORA, alpha=1), "has alpha 2.0, asked for is 1"),
    (CoOpConfig(), CoOpConfig((), (1, 2)), r"has text \(1,\), asked for is \(1, 2\)"),
    (CoOpConfig(), CoOpConfig(words=""), "size 4 context words, asked for is 16 context words"),
    (IVLPConfig(*BOTH), IVLPConfig((1, 2), (1, 2)), r"vision \(1, 2, 3\), asked for is \(1, 2\)"),
    (IVLPConfig(*BOTH), IVLPConfig(*BOTH, vision_length=4), "vision_length 2, asked for is 4"),
    (IVLPConfig(*BOTH), MMAConfig((1,), (1,)), "another method than MMA: it holds IVLP"),
    (LASPConfig((1, 2, 3)), LASPConfig((1, 2)), r"vision \(1, 2, 3\), asked for is \(1, 2\)"),
    (LASPConfig((1, 2, 3)), LASPConfig((1, 2, 3), correction=False),
     "has correction True, asked for is False"),
    (LASPConfig((1, 2, 3)), LASPConfig((1, 2, 3), words="a photo"),
     "has 4 context words, asked for are 2"),
    (LwEIBConfig(*BOTH), LwEIBConfig((2,), (1, 3)), r"text \(1, 2, 3\), asked for is \(1, 3\)"),
    (MaPLeConfig(*BOTH), MaPLeConfig((1, 2), (1, 2)), r"vision \(1, 2, 3\), asked for is \(1, 2\)"),
    (MaPLeConfig(*BOTH), MaPLeConfig(*BOTH, length=4), "length 2, asked for is 4"),
    (RPOConfig(*BOTH, pairs=3), RPOConfig((1,), (1,), pairs=5), "has pairs 3, asked for is 5"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("saved", "asked", "message"), UNLIKE, ids=lambda one: getattr(one, "name", "")
)
def test_a_file_of_other_settings_is_refused_with_both_sides_named(
    saved: MethodConfig, asked: MethodConfig, message: str, tmp_path: Path
) -> None:
    path = save_official(tmp_path / "file.pth.tar", built_of(saved)[0])
    with pytest.raises(UserError, match=message):
        load_official(path, shared_backbone(), asked)


# What a file holds, by shape, that a method does not take for its own.
FOREIGN: list[tuple[str, dict[str, tuple[int, ...]], str]] = [
    ("clipadapter", {"prompt_learner.ctx": (4, 32)}, "another method than CLIP-Adapter: .*LASP"),
    ("cliplora", {"prompt_learner.ctx": (4, 32)}, "another method than CLIP-LoRA: .*LASP"),
    ("coop", {"ctx": (4, 96)}, r"shape \(4, 96\) in the checkpoint and \(4, 32\)"),
    ("coop", {"ctx": (4, 32), "meta_net.linear1.bias": (2,)},
     "another method than CoOp: it holds meta_net"),
    ("coop", {"ctx": (4,)}, r"holds no CoOp: its ctx has the shape \(4,\)"),
    ("ivlp", {"prompt_learner.text_prompt": (2, 32)},
     "another method than IVLP: .*prompt_learner.text_prompt"),
    ("ivlp", {"image_encoder.conv1.weight": (2, 32)}, "holds no parameter of IVLP"),
    ("lasp", {"prompt_learner.text_prompt": (2, 32)}, "another method than LASP: .*text_prompt"),
    ("lasp", {"prompt_learner.w": (1, 32)}, "no LASP: it has no prompt_learner.ctx"),
    ("lweib", {"text_adapter.1.down.0.weight": (4, 32)}, "another method than LwEIB"),
    ("maple", {"prompt_learner.ctx": (2, 32)}, "another method than MaPLe: it holds IVLP"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "shapes", "message"), FOREIGN)
def test_a_file_of_something_else_is_refused(
    name: str, shapes: dict[str, tuple[int, ...]], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "file.pth.tar"
    torch.save({key: torch.zeros(shape) for key, shape in shapes.items()}, path)
    with pytest.raises(UserError, match=message):
        load_official(path, shared_backbone(), method=name)
