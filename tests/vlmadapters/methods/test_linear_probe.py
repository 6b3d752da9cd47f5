"""The linear probe against its optimum, zero-shot CLIP, and what it refuses."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import shared_backbone, some_images
from stepping import TASK, trainer_of
from torch import Tensor
from torch.nn import functional as F

from vlmadapters.clip.frozen import Backbone
from vlmadapters.data.task import Task, places
from vlmadapters.files import load_method, save_method
from vlmadapters.methods.base import FitData
from vlmadapters.methods.head_configs import LinearProbeConfig
from vlmadapters.methods.linear_probe import LinearProbe
from vlmadapters.training.recipes import load_recipe
from vlmlayers.errors import UserError

LABELS = torch.arange(12) % 3
NOVEL = Task(("sea lion", "cat"), own_template="{} texture.")


def features(seed: int = 0, spread: float = 0.5) -> Tensor:
    """Features in three heaps, one for each class, before they are normalised."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, 32, generator=torch.Generator().manual_seed(7))
    return 3 * (centres[LABELS] + spread * torch.randn(12, 32, generator=generator))


def fitted(task: Task = TASK, labels: Tensor = LABELS, validation: Any = None, **settings: Any):
    model = shared_backbone()
    backbone = Backbone(model.clip, tokenizer=model.tokenizer)
    method = LinearProbe.build(LinearProbeConfig(**settings), backbone, task)
    classes = method.prepare(backbone, task)
    seen = features()[: len(labels)]
    method.fit(FitData(backbone, classes, labels, lambda view: seen, validation))
    return method, backbone, classes


@pytest.mark.parametrize("count", [2, 3])
def test_the_fit_is_the_optimum_of_penalised_cross_entropy(count: int) -> None:
    """Its gradient vanishes: C times the summed cross-entropy, plus half the squared weights."""
    task, kept = Task(TASK.class_names[:count]), count
    labels = LABELS % kept
    method, backbone, classes = fitted(task, labels, inverse_penalties=(10.0,))
    weight = method.weight.detach().double().requires_grad_()
    bias = method.bias.detach().double().requires_grad_()
    x = F.normalize(features().double(), dim=-1)
    entropy = 10.0 * F.cross_entropy(x @ weight.T + bias, labels, reduction="sum")
    # Of two classes scikit-learn fits one vector, the difference.
    (entropy + (weight[-1:] if count == 2 else weight).square().sum() / 2).backward()
    assert weight.grad is not None and bias.grad is not None
    rows = slice(1, None) if count == 2 else slice(None)
    assert float(weight.grad[rows].abs().max()) < 5e-3
    assert float(bias.grad[rows].abs().max()) < 5e-3
    assert method.parameter_count() == count * 33
    found = method.logits(backbone, features(), classes)
    torch.testing.assert_close(found, (x @ weight.T + bias).float().detach(), atol=1e-4, rtol=1e-4)


def test_one_shot_of_many_classes_is_fitted_without_a_warning() -> None:
    """scikit-learn warns that labels which are all unlike may be those of a regression."""
    model = shared_backbone()
    backbone = Backbone(model.clip, tokenizer=model.tokenizer)
    task = Task(tuple(f"kind {number}" for number in range(24)))
    method = LinearProbe.build(LinearProbeConfig(inverse_penalties=(1e3,)), backbone, task)
    seen = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
    classes, labels = method.prepare(backbone, task), torch.arange(24)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method.fit(FitData(backbone, classes, labels, lambda view: seen))
    assert torch.equal(method.logits(backbone, seen, classes).argmax(1), labels)


def test_the_penalty_with_most_validation_hits_is_taken() -> None:
    held_out, penalties = features(1, spread=3.0), (1e-3, 1.0, 1e3)
    alone = [fitted(inverse_penalties=(c,)) for c in penalties]
    with torch.no_grad():
        guesses = [m.logits(b, held_out, c).argmax(1) for m, b, c in alone]
    for wanted, truth in enumerate(guesses):
        first = next(n for n, guess in enumerate(guesses) if torch.equal(guess, truth))
        method, *_ = fitted(inverse_penalties=penalties, validation=lambda t=truth: (held_out, t))
        assert torch.equal(method.weight, alone[first][0].weight), wanted
    method, *_ = fitted(inverse_penalties=penalties)
    assert torch.equal(method.weight, alone[1][0].weight)


def test_some_of_the_classes_keep_their_logits_in_any_order() -> None:
    method, backbone, classes = fitted()
    some = method.prepare(backbone, Task(("bus", "cat")))
    whole = method.logits(backbone, features(), classes)
    found = method.logits(backbone, features(), some)
    torch.testing.assert_close(found, whole[:, [2, 0]])


def test_classes_of_one_prompt_are_one_class(caplog: pytest.LogCaptureFixture) -> None:
    """A shifted set whose folders have underscores was answered as by zero-shot CLIP, unsaid."""
    method, backbone, _ = fitted()
    here = [name.upper().replace(" ", "_") for name in TASK.class_names]
    assert method.prepare(backbone, Task(tuple(here))).rows.tolist() == list(range(len(here)))
    assert not caplog.messages
    others = ("walrus", TASK.class_names[0])
    for _ in range(2):
        assert method.prepare(backbone, Task(others)).rows.tolist() == [-1, 0]
    (told,) = caplog.messages
    assert "linear probe: 1 of 2 classes, such as 'walrus', are none that it was trained" in told
    assert "it scores all classes as zero-shot CLIP does" in told
    assert places(["Crane", "crane", "crane"], ["crane", "crane"]) == [0, 1, -1]


def test_a_task_with_another_class_is_told_by_zero_shot_clip() -> None:
    method, backbone, _ = fitted()
    images = some_images(shared_backbone())
    with torch.no_grad():
        seen = backbone.clip.encode_image(images)
        found = method.logits(backbone, seen, method.prepare(backbone, NOVEL))
        texts = backbone.clip.encode_text(
            backbone.tokens(["sea lion texture.", "cat texture."]), normalize=True
        )
        expected = backbone.clip.logit_scale.exp() * F.normalize(seen, dim=-1) @ texts.T
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_training_fits_it_on_images_as_they_are_tested() -> None:
    recipe = load_recipe("published", "linear-probe")
    trainer = trainer_of(
        recipe.method,
        recipe.train.__class__(shots=2, crop_scale=(1, 1), crop_ratio=(1, 1), flip=0.0),
        validation=(),
    )
    (result,) = trainer.fit()
    assert result.losses == []
    pixels = torch.cat(list(trainer.images.batches(trainer.items, 4)))
    with torch.no_grad():
        x = trainer.model.clip.encode_image(pixels)
    labels = torch.tensor([item.label for item in trainer.items])
    backbone, task = trainer.backbone, trainer.task
    again = LinearProbe.build(recipe.method, backbone, task)
    again.fit(FitData(backbone, again.prepare(backbone, task), labels, lambda view: x))
    torch.testing.assert_close(
        again.weight, result.method.get_parameter("weight"), atol=1e-3, rtol=1e-2
    )


def test_a_file_brings_back_the_probe(tmp_path: Path) -> None:
    method, *_ = fitted()
    path = save_method(tmp_path / "ours", method, shared_backbone(), TASK)
    found = load_method(path, shared_backbone())
    assert isinstance(found, LinearProbe) and found.config == method.config
    assert torch.equal(found.weight, method.weight) and torch.equal(found.bias, method.bias)


def test_a_class_without_items_is_refused() -> None:
    with pytest.raises(UserError, match=r"1 of 3 have none, first 'bus'"):
        fitted(labels=LABELS % 2)


def test_a_single_class_is_every_answer() -> None:
    method, backbone, classes = fitted(Task(("cat",)), LABELS * 0)
    assert method.logits(backbone, features(), classes).argmax(1).tolist() == [0] * 12
