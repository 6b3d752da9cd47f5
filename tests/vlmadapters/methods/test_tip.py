"""Tip-Adapter and Tip-Adapter-F against their formula, their records, and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbones import shared_backbone
from stepping import TASK, assert_same_step, first_step, trainer_of
from torch import Tensor
from torch.nn import functional as F

from vlmadapters.clip.frozen import Backbone
from vlmadapters.clip.savings import Savings
from vlmadapters.data.task import Task
from vlmadapters.files import load_method, save_method
from vlmadapters.methods.head_configs import TipConfig, TipFConfig
from vlmadapters.methods.tip import Tip, TipF
from vlmadapters.training.recipes import TrainConfig, load_recipe
from vlmadapters.training.trainer import Trainer

TRAIN = TrainConfig(optimizer="adamw", lr=0.01, epochs=3, batch_size=4, shots=2)
KEYS = F.normalize(torch.randn(7, 32, generator=torch.Generator().manual_seed(2)), dim=-1)
LABELS = torch.tensor([0, 0, 1, 1, 1, 2, 0])


def built(savings: Savings | None = None, kind: type[Tip] = TipF, **settings: Any) -> Any:
    model = shared_backbone()
    backbone = Backbone(model.clip, savings, model.tokenizer)
    method = kind.build(kind.Config(**settings), backbone, TASK)
    method.fill(KEYS.clone(), LABELS)
    return method, backbone


def plain_logits(images: Tensor, weights: Tensor, alpha: float, beta: float) -> Tensor:
    """The formula, one image, item and class after the other."""
    images, logits = F.normalize(images, dim=-1), torch.zeros(len(images), len(weights))
    for row, f in enumerate(images):
        for column, w in enumerate(weights):
            own = [k for k, label in zip(KEYS, LABELS) if label == column]
            cached = sum(float(torch.exp(-beta * (1 - f @ k))) for k in own)
            logits[row, column] = 100 * float(f @ w) + alpha * cached
    return logits


def some_features(count: int = 5) -> Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(4))


def unit_texts(backbone: Backbone, templates: tuple[str, ...], task: Task = TASK) -> Tensor:
    found = []
    for name in task.class_names:
        tokens = backbone.tokens([one.replace("{}", name.replace("_", " ")) for one in templates])
        with torch.no_grad():
            found.append(backbone.clip.encode_text(tokens, normalize=True).mean(0))
    return F.normalize(torch.stack(found), dim=-1)


@pytest.mark.parametrize("templates", [(), ("itap of a {}.", "art of the {}.")])
def test_logits_are_those_of_the_formula(templates: tuple[str, ...]) -> None:
    method, backbone = built(kind=Tip, alpha=2.0, beta=3.0, templates=templates)
    task = replace(TASK, own_template="{} texture.")
    texts = unit_texts(backbone, templates or (task.own_template,))
    images = some_features()
    found = method.logits(backbone, images, method.prepare(backbone, task))
    torch.testing.assert_close(found, plain_logits(images, texts, 2.0, 3.0), atol=1e-4, rtol=1e-5)


def test_classes_without_items_are_told_by_their_names_alone() -> None:
    method, backbone = built(kind=Tip)
    novel, mixed = Task(("sea lion", "tram")), Task(("tram", "bus"))
    images = some_features()
    zero, both = (
        100 * F.normalize(images, dim=-1) @ unit_texts(backbone, ("a photo of a {}.",), task).T
        for task in (novel, mixed)
    )
    found = method.logits(backbone, images, method.prepare(backbone, novel))
    torch.testing.assert_close(found, zero, atol=1e-4, rtol=1e-5)
    found = method.logits(backbone, images, method.prepare(backbone, mixed))
    torch.testing.assert_close(found[:, 0], both[:, 0], atol=1e-4, rtol=1e-5)
    assert bool((found[:, 1] > both[:, 1]).all())


def test_the_search_finds_the_best_pair_of_the_grid_the_first_one_of_equals() -> None:
    grid = {"alpha_end": 30.0, "beta_end": 5.0, "alpha_steps": 4, "beta_steps": 3}
    method, backbone = built(kind=Tip, **grid)
    images, labels = some_features(12), torch.arange(12) % 3
    classes = method.prepare(backbone, TASK)
    hits = method.search(images, labels, classes)
    expected = np.zeros((3, 4))
    for row, beta in enumerate(0.1 + 4.9 * np.arange(3) / 3):
        for column, alpha in enumerate(0.1 + 29.9 * np.arange(4) / 4):
            logits = plain_logits(images, classes.weights, alpha, beta)
            expected[row, column] = int((logits.argmax(1) == labels).sum())
    assert hits.tolist() == expected.tolist() and hits.max() > hits.min()
    row, column = np.argwhere(expected == expected.max())[0]
    assert float(method.beta) == pytest.approx(0.1 + 4.9 * row / 3)
    assert float(method.alpha) == pytest.approx(0.1 + 29.9 * column / 4)


def test_a_search_without_a_hit_leaves_the_cache_out() -> None:
    method, backbone = built(kind=Tip, alpha_steps=2, beta_steps=2)
    never = torch.full((5,), 7)
    assert not method.search(some_features(), never, method.prepare(backbone, TASK)).any()
    assert float(method.alpha) == float(method.beta) == 0


def test_savings_change_neither_loss_nor_gradients() -> None:
    saved, plain = (first_step(*built(savings)) for savings in (None, Savings.none()))
    assert_same_step(saved, plain)
    assert saved["keys"].any()


def test_the_cache_holds_the_mean_of_augmented_views() -> None:
    trainer = trainer_of(TipConfig(views=3, search=False), TRAIN)
    (result,) = trainer.fit()
    assert isinstance(result.method, Tip)
    items, augmentation = trainer.items, TRAIN.augmentation
    views = []
    for number in range(3):
        draws = augmentation.draws(len(items), 1, number)
        pixels = trainer.images.augmented(items, draws, augmentation)
        with torch.no_grad():
            views.append(trainer.model.clip.encode_image(pixels))
    mean = F.normalize(torch.stack(views).mean(0), dim=-1)
    torch.testing.assert_close(result.method.keys.detach(), mean, atol=1e-5, rtol=1e-4)
    assert result.method.labels.tolist() == [item.label for item in items]
    assert result.losses == []
    assert result.method.parameter_count() == 0
    assert float(result.method.alpha) == pytest.approx(1.17)


def test_keys_are_trained_from_the_cache_on_and_then_alpha_and_beta_chosen() -> None:
    settings = {"views": 2, "alpha_end": 40.0, "alpha_steps": 3, "beta_steps": 2}
    untrained = trainer_of(TipConfig(**settings), TRAIN).fit()[0].method
    trainer = trainer_of(TipFConfig(**settings), TRAIN)
    (result,) = trainer.fit()
    assert isinstance(result.method, TipF) and isinstance(untrained, Tip)
    assert result.method.parameter_count() == len(trainer.items) * 32
    assert np.mean(result.losses[-2:]) < np.mean(result.losses[:2])
    moved = (result.method.keys - untrained.keys).norm(dim=-1)
    assert 0 < float(moved.max()) < 1
    chosen = float(result.method.beta), float(result.method.alpha)
    images = torch.cat(list(trainer.images.batches(trainer.validation, 4)))
    with torch.no_grad():
        features = trainer.model.clip.encode_image(images)
    labels = torch.tensor([item.label for item in trainer.validation])
    classes = result.method.prepare(trainer.backbone, trainer.task)
    result.method.search(features, labels, classes)
    assert (float(result.method.beta), float(result.method.alpha)) == chosen


def test_alpha_and_beta_are_chosen_on_the_validation_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(Tip, "search", lambda method, *seen: given.extend(seen))
    trainer = trainer_of(TipConfig(views=1), TRAIN)
    trainer.fit()
    items = trainer.validation
    with torch.no_grad():
        features = trainer.model.clip.encode_image(torch.cat([*trainer.images.batches(items, 4)]))
    cosines = F.cosine_similarity(given[0], features)
    torch.testing.assert_close(cosines, torch.ones(len(items)))
    assert given[1].tolist() == [item.label for item in items]
    assert not {item.path for item in items} & {item.path for item in trainer.items}


def test_without_validation_items_alpha_and_beta_stay() -> None:
    (result,) = trainer_of(TipConfig(alpha=3.0, views=1), TRAIN, validation=()).fit()
    assert isinstance(result.method, Tip) and float(result.method.alpha) == 3.0


def test_a_stopped_training_goes_on_as_if_it_had_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TipFConfig(views=1, alpha_steps=2, beta_steps=2)
    train = replace(TRAIN, save_every=1)
    (whole,) = trainer_of(config, train).fit()
    calls: list[int] = []
    update = Trainer.update

    def stopping(self: Trainer, *arguments: Any) -> list[float]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return update(self, *arguments)

    monkeypatch.setattr(Trainer, "update", stopping)
    with pytest.raises(KeyboardInterrupt):
        trainer_of(config, train, folder=tmp_path).fit()
    (resumed,) = trainer_of(config, train, folder=tmp_path).fit()
    assert resumed.losses == whole.losses
    for name, value in whole.method.state_dict().items():
        assert torch.equal(resumed.method.state_dict()[name], value)


def test_a_file_brings_back_the_cache(tmp_path: Path) -> None:
    model, (method, _) = shared_backbone(), built(kind=Tip)
    method.alpha.fill_(0.7)
    path = save_method(tmp_path / "ours", method, model, TASK)
    found = load_method(path, model)
    assert isinstance(found, Tip) and found.config == method.config
    for name, value in method.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)


@pytest.mark.parametrize("method", ["tip", "tip-f"])
def test_recipes_follow_the_dataset(method: str) -> None:
    recipe = load_recipe("published", method)
    for dataset, alpha, ends in (
        ("oxford_flowers", 10.0, (50.0, 50.0)),
        ("oxford_pets", 1.17, (7.0, 3.0)),
        ("stanford_cars", 3.0, (20.0, 10.0)),
    ):
        config = recipe.method_for(dataset)
        assert isinstance(config, TipConfig)
        assert (config.alpha, (config.beta_end, config.alpha_end)) == (alpha, ends)
    assert len(recipe.method_for("imagenet").settings()["templates"]) == 7
    assert recipe.train_for("eurosat").epochs == (100 if method == "tip-f" else 5)
