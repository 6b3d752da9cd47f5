"""LwEIB against a plain forward pass, its draws, its records, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import backbones
import pytest
import stepping
import torch
from backbones import shared_backbone, some_images
from stepping import TASK, assert_same_step, first_step, step_of
from torch import Tensor
from torch.nn import functional as F

from vlmadapters.clip.frozen import Backbone
from vlmadapters.clip.savings import Savings
from vlmadapters.data.task import Task
from vlmadapters.methods.base import Step
from vlmadapters.methods.deep_configs import LwEIBConfig
from vlmadapters.methods.lweib import LwEIB
from vlmadapters.protocols.results import method_fields
from vlmadapters.training.memory import TRANSIENT, step_bytes
from vlmadapters.training.recipes import load_recipe
from vlmlayers.errors import UserError
from vlmlayers.models.load import build_clip

DESCRIBED = (
    ("cat", ("It has whiskers.", "It says meow, and has a long tail.")),
    ("Golden Retriever", ("Its fur is gold.",)),
    ("bus", ("A large vehicle.", "Red, with two floors.", "On a road.")),
)
SOME = Task(TASK.class_names, descriptions=DESCRIBED)
built = partial(stepping.built, task=SOME)
CONFIGS = [
    LwEIBConfig((1, 2, 3), (1, 2, 3), alpha=0.3),
    LwEIBConfig((2,), (1, 3), alpha=0.1),
    LwEIBConfig((1, 3), (), alpha=0.1),
    LwEIBConfig((), (2,), alpha=0.2),
]
# Two columns are of one class's other descriptions; blocks of both towers are fast and slow.
DRAWS = {
    "classes": torch.tensor([0, 2, 1]),
    "description": torch.tensor([1, 2, 0]),
    "relabelled": torch.tensor([0, 2, 1, 0]),
    "text_fast": torch.tensor([True, False, True]),
    "vision_fast": torch.tensor([False, True, True]),
}


def convolved(method: LwEIB, tower: str, number: int, place: str, u: Tensor, alpha: float) -> Any:
    """u + alpha · conv(u), by torch's own convolutions along tokens or over patches."""
    weight = getattr(method, tower)[str(number)][place]
    if tower == "text":
        made = F.conv1d(u.transpose(1, 2), weight, padding=1, groups=len(weight))
        return u + alpha * made.transpose(1, 2)
    patches = u[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    made = F.conv2d(patches, weight, padding=1, groups=len(weight)).flatten(2).transpose(1, 2)
    return torch.cat([u[:, :1], u[:, 1:] + alpha * made], 1)


def through(method: LwEIB, tower: str, blocks: Any, x: Tensor, fast: Any, mask: Any = None) -> Any:
    """All blocks of a tower by open_clip's own modules."""
    config = method.config
    for number, block in enumerate(blocks, 1):
        if number not in getattr(config, tower):
            x = block(x, attn_mask=mask)
            continue
        alpha = config.alpha * (config.factor if fast is not None and fast[number - 1] else 1)
        u = convolved(method, tower, number, "att", block.ln_1(x), alpha)
        x = x + block.attn(u, u, u, need_weights=False, attn_mask=mask)[0]
        h = block.mlp.c_fc(block.ln_2(x))
        h = convolved(method, tower, number, "mlp", h, alpha)
        x = x + block.mlp.c_proj(block.mlp.gelu(h))
    return x


def plain_texts(method: LwEIB, clip: Any, tokens: Tensor, fast: Any = None) -> Tensor:
    x = clip.token_embedding(tokens) + clip.positional_embedding
    x = through(method, "text", clip.transformer.resblocks, x, fast, clip.attn_mask)
    x = clip.ln_final(x)[torch.arange(len(x)), tokens.argmax(1)] @ clip.text_projection
    return F.normalize(x, dim=-1)


def plain_images(method: LwEIB, clip: Any, images: Tensor, fast: Any = None) -> Tensor:
    visual = clip.visual
    x = visual.conv1(images).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1)
    x = visual.ln_pre(x + visual.positional_embedding)
    x = through(method, "vision", visual.transformer.resblocks, x, fast)
    return F.normalize(visual.ln_post(x[:, 0]) @ visual.proj, dim=-1)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.placement)
@torch.no_grad()
def test_a_test_takes_the_mean_of_a_class_over_uncut_prompts(config: LwEIBConfig) -> None:
    method, backbone = built(config)
    clip, images = backbone.clip, some_images(shared_backbone())
    texts = []
    for name, (_, described) in zip(("cat", "golden retriever", "bus"), DESCRIBED):
        tokens = backbone.tokens([f"a photo of a {name}, {one}" for one in described])
        texts.append(F.normalize(plain_texts(method, clip, tokens).mean(0), dim=-1))
    expected = clip.logit_scale.exp() * plain_images(method, clip, images) @ torch.stack(texts).T
    start = method.first(backbone, "vision")
    found = method.logits(
        backbone,
        method.image_features(backbone, backbone.images(images, [start])[start]),
        method.class_features(backbone, method.prepare(backbone, SOME)),
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_step_reads_no_label_from_the_device() -> None:
    method, backbone = built(CONFIGS[0])
    steps = [step_of(method, backbone, SOME) for _ in range(2)]
    steps[1].known, steps[1].labels = steps[1].labels, steps[1].labels.to("meta")  # has no values
    losses = [method.train().loss(step).item() for step in steps]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.placement)
def test_a_step_has_the_loss_of_its_draws_and_gradients_as_if_alpha_were_one(
    config: LwEIBConfig,
) -> None:
    method, backbone = built(config)
    found = first_step(method, backbone, SOME, DRAWS)
    clip = backbone.clip
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    prompts = ["cat, It says meow, and has a long tail.", "bus, On a road."]
    prompts += ["golden retriever, Its fur is gold."]
    tokens = backbone.tokens([f"a photo of a {one}" for one in prompts])
    texts = plain_texts(method, clip, tokens, DRAWS["text_fast"])
    seen = plain_images(method, clip, images, DRAWS["vision_fast"])
    logits = clip.logit_scale.exp() * seen @ texts.T
    loss = F.cross_entropy(logits, DRAWS["relabelled"])
    torch.testing.assert_close(found["loss"], loss.detach(), atol=1e-5, rtol=1e-5)
    method.zero_grad()
    loss.backward()
    for name, value in method.named_parameters():
        tower, block, _ = name.split(".")
        fast = DRAWS[f"{tower}_fast"][int(block) - 1]
        alpha = config.alpha * (config.factor if fast else 1)
        expected = value.grad / alpha
        size = expected.abs().max()
        assert (found[name] - expected).abs().max() <= 1e-4 * size + 1e-9, name


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.placement)
def test_savings_change_neither_loss_nor_gradients(config: LwEIBConfig) -> None:
    saved, plain = (
        first_step(*built(config, savings), SOME, DRAWS) for savings in (None, Savings.none())
    )
    assert_same_step(saved, plain)


def test_what_no_class_token_sees_has_a_gradient_of_zero() -> None:
    step = first_step(*built(CONFIGS[0]), SOME, DRAWS)
    assert {name for name, value in step.items() if not value.any()} == {"vision.3.mlp"}


@pytest.mark.parametrize("family", ["gelu, average pool", "no causal mask, last token"])
def test_other_families_learn_in_both_towers(family: str) -> None:
    step = first_step(*built(CONFIGS[1], family=family), SOME)
    assert all(bool(value.any()) for value in step.values())


def test_blocks_of_another_kind_are_refused_in_one_line() -> None:
    with pytest.raises(UserError, match="not open_clip's standard"):
        first_step(*built(CONFIGS[2], family="layer scale, custom blocks"), SOME)
    with pytest.raises(UserError, match="lweib .*choose"):
        built(CONFIGS[2], family="timm ViT, average pool")


class Seen(LwEIB):
    """Keeps the logits of a step, to see what was drawn."""

    def logits(self, backbone: Backbone, images: Tensor, classes: Tensor) -> Tensor:
        self.seen = super().logits(backbone, images, classes)
        return self.seen


@pytest.mark.parametrize(
    ("negatives", "classes", "columns"),
    [(-1, 6, 6), (0, 6, 2), (1, 6, 4), (7, 6, 6), (0, 4, 4), (0, 3, 3)],
)
def test_the_columns_of_a_step_are_its_classes_and_some_others(
    negatives: int, classes: int, columns: int
) -> None:
    model = shared_backbone()
    backbone = Backbone(model.clip, None, model.tokenizer)
    task = Task(("cat", "dog", "bus", "oak", "sea lion", "car")[:classes])
    config = LwEIBConfig((1,), (2,), alpha=1e-6, negatives=negatives)
    method = Seen.build(config, backbone, task)
    step = step_of(method, backbone, task)
    step.labels = torch.tensor([2, 1, 1, 2]) if classes > 3 else step.labels
    losses = set()
    for _ in range(8):
        loss = float(method.loss(step))
        losses.add(round(loss, 3))  # α is next to nothing, and so is what fast blocks change
        assert method.seen.shape == (4, columns)
    assert len(losses) > 1  # other descriptions, and other classes


def test_blocks_are_fast_as_often_as_asked_and_never_at_a_test() -> None:
    config = LwEIBConfig((1,), (), alpha=0.05, factor=8.0, slow=0.7, negatives=-1)
    model = shared_backbone()
    backbone = Backbone(model.clip, None, model.tokenizer)
    task = Task(("cat", "bus"), descriptions=(("cat", ("One.",)), ("bus", ("Two.",))))
    method = LwEIB.build(config, backbone, task, seed=1)
    step, before = step_of(method, backbone, task), torch.get_rng_state()
    with torch.no_grad():
        losses = [float(method.loss(step)) for _ in range(300)]
        at_test = {float(method.eval().loss(step)) for _ in range(20)}
    assert torch.equal(before, torch.get_rng_state())
    slow = max(set(losses), key=losses.count)
    assert len(set(losses)) == 2
    assert at_test == {slow}
    assert 0.6 < losses.count(slow) / 300 < 0.8


def test_every_description_of_a_class_is_drawn_and_none_of_another() -> None:
    method, backbone = built(CONFIGS[0])
    step = step_of(method, backbone, SOME)
    drawn = [method._draws(step) for _ in range(60)]
    for label, (_, described) in enumerate(DESCRIBED):
        seen = {int(one["description"][one["classes"] == label]) for one in drawn}
        assert seen == set(range(len(described)))


def test_patches_lie_in_the_rows_and_columns_of_the_image() -> None:
    """32 high and 48 wide, in patches of 8."""
    clip = build_clip(backbones.config({"image_size": (32, 48)}))
    backbone = Backbone(clip, None, shared_backbone().tokenizer)
    assert LwEIB.build(LwEIBConfig((1,), ()), backbone, TASK).grid == (4, 6)


def test_weights_start_as_torch_draws_them() -> None:
    (method, _), (again, _) = built(CONFIGS[0]), built(CONFIGS[0])
    for name, value in method.named_parameters():
        assert torch.equal(value, again.get_parameter(name))
        bound = 3**-0.5 if name.startswith("text") else 1 / 3
        assert 0.8 * bound < float(value.detach().abs().max()) <= bound


def test_recipes_have_the_published_size_and_values() -> None:
    config: Any = load_recipe("published", "lweib").method
    assert 15 * 512 * len(config.text) + 45 * 768 * len(config.vision) == 506_880
    assert built(CONFIGS[0])[0].parameter_count() == 3 * (15 * 32 + 45 * 64)
    transfer = load_recipe("transfer", "lweib")
    assert (transfer.train.lr, transfer.method.alpha, transfer.method.negatives) == (
        0.15,
        0.075,
        -1,
    )


def test_descriptions_of_a_file_are_found_by_name_and_are_part_of_the_settings(
    tmp_path: Path,
) -> None:
    path = tmp_path / "said.json"
    path.write_text(json.dumps({"Cat": ["It has whiskers."], "GOLDEN_retriever": ["Gold."]}))
    config = LwEIBConfig((1,), (1,), descriptions=str(path))
    assert config.descriptions.startswith(f"{path}#")
    assert LwEIBConfig.from_dict(config.to_dict()) == config
    method, backbone = built(config)
    said = f"descriptions=said.json#{config.descriptions.partition('#')[2]}"
    assert said in method_fields(method)["settings"], "the same method wherever the file lies"
    classes = method.prepare(backbone, Task(("cat", "golden_retriever")))
    assert classes.counts.tolist() == [1, 1]
    expected = backbone.tokens(["a photo of a cat, It has whiskers."])
    length = classes.prompts.inputs.shape[1]
    assert torch.equal(classes.prompts.inputs[:1], expected[:, :length])
    with pytest.raises(UserError, match="2 classes have no description: oak, sea_lion; add"):
        method.prepare(backbone, Task(("oak", "cat", "sea_lion")))
    path.write_text(json.dumps({"cat": ["It has a tail."]}))
    with pytest.raises(UserError, match="said.json has changed since it was used"):
        LwEIBConfig.from_dict(config.to_dict())
    path.unlink()
    with pytest.raises(UserError, match="cannot read the descriptions"):
        LwEIBConfig.from_dict(config.to_dict())


def test_without_descriptions_every_class_has_the_same_twenty() -> None:
    method, backbone = built(LwEIBConfig((1,), (1,)))
    assert method.prepare(backbone, Task(("cat", "oak"))).counts.tolist() == [20, 20]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"cat": "one"}', '{"cat": []}', '{"cat": [1]}'])
def test_a_file_of_another_kind_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "said.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"said.json (is not valid JSON|must hold an object)"):
        LwEIBConfig((1,), (1,), descriptions=str(path))


def test_memory_is_that_of_the_classes_a_step_draws() -> None:
    """Of 40 classes, four images and two negatives of each class draw twelve."""
    _, backbone = built(CONFIGS[0])
    task = Task(tuple(f"thing {number}" for number in range(40)))
    method = LwEIB.build(replace(CONFIGS[0], negatives=2), backbone, task, seed=3)
    start = method.first(backbone, "vision")
    images = backbone.images(backbone.vision.tower.example(4), [start])[start]
    labels = torch.tensor([3, 11, 25, 38])
    step = Step(backbone, images, labels, method.prepare(backbone, task), torch.Generator())
    frozen = {p.untyped_storage().data_ptr() for p in backbone.clip.parameters()}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        method.loss(step)
    kept = sum(x.untyped_storage().nbytes() for at, x in saved.items() if at not in frozen)
    assert step_bytes(backbone, method, task, 4) / TRANSIENT == pytest.approx(kept, rel=0.15)
