"""LASP against a CLIP whose own norms are tuned, its records, and what it refuses."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import stepping
import torch
from backbones import shared_backbone
from open_clip import OPENAI_IMAGENET_TEMPLATES
from stepping import TASK, assert_same_step, first_step, moved, step_of
from torch import Tensor
from torch.nn import functional as F

from vlmadapters.clip.frozen import Backbone
from vlmadapters.clip.savings import Savings
from vlmadapters.data.task import Task
from vlmadapters.files import load_official, save_official
from vlmadapters.methods.configs import LASPConfig
from vlmadapters.methods.lasp import LASP
from vlmadapters.methods.lasp import TEMPLATES as HAND_MADE
from vlmadapters.protocols.train import train
from vlmadapters.training.recipes import load_recipe
from vlmlayers.errors import UserError

TEMPLATES = ("a photo of a {}.", "itap of the {}.", "a photo of a {}.")
CONFIGS = [
    LASPConfig((1, 2, 3), templates=TEMPLATES),
    LASPConfig((2,), templates=TEMPLATES, other_names="virtual", weight=10.0),
    LASPConfig((1, 3), templates=TEMPLATES, other_names="none", words="", length=3),
    LASPConfig((), weight=0.0, correction=False, other_names="virtual"),
]
IDS = ["all blocks", "virtual classes", "base names", "context alone"]


def built(config: LASPConfig, savings: Savings | None = None, family: str = "clip") -> Any:
    method, backbone = stepping.built(config, savings, family)
    return moved(method, 0.1), backbone


def draws(config: LASPConfig) -> dict[str, Tensor]:
    names = 3 if config.other_names == "none" else 5
    shape = len(config.templates), names, 32
    return {"noise": torch.randn(shape, generator=torch.Generator().manual_seed(9))}


def plain_step(method: LASP, backbone: Backbone) -> dict[str, Tensor]:
    """A step by the sheet's rules, in a copy of the CLIP that has the method's norms."""
    clip, config = deepcopy(backbone.clip).requires_grad_(False), method.config
    leaves = {
        name: value.detach().clone().requires_grad_() for name, value in method.named_parameters()
    }
    for block in config.vision:
        module = clip.visual.transformer.resblocks[block - 1]
        for norm in ("ln_1", "ln_2"):
            for kind in ("weight", "bias"):
                leaf = torch.nn.Parameter(leaves[f"norms.{block}.{norm}.{kind}"].detach())
                setattr(getattr(module, norm), kind, leaf)
                leaves[f"norms.{block}.{norm}.{kind}"] = leaf
    names = [*TASK.class_names, *TASK.other_names]
    if config.other_names == "none":
        names = names[: len(TASK.class_names)]
    names = [name.replace("_", " ") for name in names]
    words = config.start_words
    tokens = backbone.tokens([f"{' '.join(words)} {name}." for name in names])
    x = clip.token_embedding(tokens)
    context = leaves["context.1"].expand(len(x), -1, -1)
    x = torch.cat([x[:, :1], context, x[:, 1 + len(words) :]], 1) + clip.positional_embedding
    x = clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask))
    texts = x[torch.arange(len(x)), tokens.argmax(1)] @ clip.text_projection
    texts = F.normalize(texts + leaves["w"] if config.correction else texts, dim=-1)
    shape = backbone.vision.tower.example(4).shape
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    logits = clip.logit_scale.exp() * clip.encode_image(images, normalize=True) @ texts.t()
    if config.other_names != "virtual":
        logits = logits[:, : len(TASK.class_names)]
    loss = F.cross_entropy(logits, torch.arange(4) % 3)
    for number, template in enumerate(config.templates if config.weight else ()):
        made = clip.encode_text(backbone.tokens([template.replace("{}", one) for one in names]))
        made = F.normalize(made, dim=-1) + 0.05 * draws(config)["noise"][number]
        part = F.cross_entropy(clip.logit_scale.exp() * made @ texts.t(), torch.arange(len(names)))
        loss = loss + config.weight / len(config.templates) * part
    loss.backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"loss": loss.detach(), **gradients}


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_loss_and_gradients_are_those_of_a_clip_with_these_norms(config: LASPConfig) -> None:
    method, backbone = built(config)
    found = first_step(method, backbone, draws=draws(config))
    assert_same_step(found, plain_step(method, backbone))


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_savings_change_neither_loss_nor_gradients(config: LASPConfig) -> None:
    saved, plain = (
        first_step(*built(config, savings), draws=draws(config))
        for savings in (None, Savings.none())
    )
    assert_same_step(saved, plain)


def test_training_starts_as_clip_whatever_was_drawn_before() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model = shared_backbone()
    backbone = Backbone(model.clip, tokenizer=model.tokenizer)
    method = LASP.build(LASPConfig((1, 2, 3)), backbone, TASK)
    assert torch.equal(before, torch.get_rng_state())
    step = step_of(method, backbone)
    end = backbone.text.tower.depth + 1
    plain = backbone.prompts(backbone.tokens(TASK.prompts()), [end])[end]
    with torch.no_grad():
        texts = method.class_features(backbone, step.classes)
        images = method.image_features(backbone, step.images)
    torch.testing.assert_close(texts, plain.x)
    torch.testing.assert_close(images, backbone.features("vision", step.images))
    assert method.parameter_count() == 4 * 32 + 32 + 3 * 4 * 64


def test_noise_comes_in_about_half_of_the_steps_from_their_generator() -> None:
    method, backbone = built(LASPConfig((), templates=TEMPLATES))
    step = step_of(method, backbone)

    def loss(seed: int) -> float:
        step.generator = torch.Generator().manual_seed(seed)
        return float(method.loss_parts(step)["text_to_text"].detach())

    found = [loss(seed) for seed in range(40)]
    assert found == [loss(seed) for seed in range(40)]
    without = max(set(found), key=found.count)
    assert 10 <= found.count(without) <= 30 and len(set(found)) == 41 - found.count(without)


def test_norms_learn_at_a_tenth_of_the_rate() -> None:
    method, _ = built(CONFIGS[0])
    norms, others = method.parameter_groups()
    assert (norms["rate"], others["rate"]) == (0.1, 1.0)
    assert [p.shape[-1] for p in norms["params"]] == [64] * 12
    assert {tuple(p.shape) for p in others["params"]} == {(4, 32), (1, 32)}


def test_other_names_compete_in_training_and_at_tests_as_published_only() -> None:
    for config, columns in ((CONFIGS[1], 3), (LASPConfig(other_names="virtual"), 3)):
        method, backbone = built(config)
        assert len(method.class_features(backbone, method.prepare(backbone, TASK))) == columns
    method, backbone = built(LASPConfig(other_names="virtual", as_published=True))
    assert len(method.class_features(backbone, method.prepare(backbone, TASK))) == 5


def test_recipe_follows_the_dataset() -> None:
    recipe = load_recipe("published", "lasp")
    assert recipe.method.settings()["weight"] == 5.0
    for dataset, weight, epochs, warmup in (
        ("dtd", 10.0, 50, 5),
        ("eurosat", 5.0, 300, 7),
        ("oxford_pets", 5.0, 25, 3),
    ):
        train, config = recipe.train_for(dataset), recipe.method_for(dataset)
        assert isinstance(config, LASPConfig) and config.vision == tuple(range(1, 13))
        assert (config.weight, train.epochs, train.warmup_epochs) == (weight, epochs, warmup)
    virtual = load_recipe("virtual", "lasp").method_for("caltech101")
    assert virtual.settings() | {"other_names": "virtual", "weight": 10.0} == virtual.settings()


def test_files_of_the_authors_may_hold_frozen_parts(tmp_path: Path) -> None:
    model, (method, _) = shared_backbone(), built(CONFIGS[0])
    theirs = save_official(tmp_path / "theirs.pth.tar", method)
    content = torch.load(theirs, weights_only=True)
    assert "image_encoder.transformer.resblocks.0.ln_1.weight" in content["state_dict"]
    content["state_dict"] |= {
        "prompt_learner.token_prefix": torch.zeros(3, 1, 32),
        "image_encoder.ln_post.weight": torch.zeros(64),
    }
    torch.save(content, theirs)
    found = load_official(theirs, model, method="lasp")
    assert found.config == LASPConfig((1, 2, 3), words="", length=4)


def test_norms_of_blocks_that_are_not_standard_are_refused() -> None:
    family = "layer scale, custom blocks"
    with pytest.raises(UserError, match="lasp tunes the norms of open_clip's standard blocks"):
        built(LASPConfig((2,)), family=family)
    method, backbone = built(LASPConfig(templates=TEMPLATES), family=family)
    assert first_step(method, backbone)["context.1"].any()


def test_a_task_without_other_names_uses_its_own() -> None:
    method, backbone = built(LASPConfig(templates=TEMPLATES, other_names="virtual"))
    step = step_of(method, backbone, Task(TASK.class_names))
    assert step.classes.references.shape == (3, 3, 32)
    assert method.loss(step).isfinite()


def test_the_hand_made_prompts_are_the_authors_of_which_one_stands_there_twice() -> None:
    assert (len(HAND_MADE), len(set(HAND_MADE))) == (35, 34)
    assert HAND_MADE.count("a bad photo of the {}.") == 2
    # The first ones are CoOp's for single datasets, all others OpenAI's for ImageNet.
    openai = {fill("{}") for fill in OPENAI_IMAGENET_TEMPLATES}
    assert [template not in openai for template in HAND_MADE] == [True] * 5 + [False] * 30


@pytest.mark.parametrize(
    ("protocol", "settings", "told"),
    [
        ("base-to-novel", {}, True),
        ("base-to-novel", {"other_names": "virtual", "weight": 0.0}, True),
        ("base-to-novel", {"other_names": "none"}, False),
        ("base-to-novel", {"weight": 0.0}, False),  # the loss that reads them is left out
        ("few-shot", {}, False),  # which has no untrained class
    ],
)
def test_rows_tell_where_training_saw_names_of_the_classes_it_is_tested_on(
    protocol: str, settings: dict[str, Any], told: bool
) -> None:
    recipe = load_recipe("mini", "lasp").changed({"shots": 1, "epochs": 1}, settings)
    found = train(
        shared_backbone(), "shapes_filled", recipe.changed({}, {"templates": TEMPLATES}),
        protocol=protocol, method="lasp", seeds=1, items=8, progress=False,
    )  # fmt: skip
    trained = found[found["method"] == "LASP"]
    assert trained["note"].str.contains("names of the untrained classes").tolist() == [
        told for _ in range(len(trained))
    ]
