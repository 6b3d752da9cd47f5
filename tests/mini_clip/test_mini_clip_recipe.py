"""The recipe of the miniature CLIP: two tiny steps, exact resume, and what the pieces promise."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from mini_recipe import tiny_recipe
from open_clip.tokenizer import default_bpe
from torch.nn import functional as F
from typer.testing import CliRunner

from mini_clip import __main__ as command
from mini_clip import card, data, loop
from mini_clip.data import Source, Views, load_source, sample_batch
from mini_clip.loop import (
    PatchDropout,
    Training,
    contrastive_loss,
    dropped,
    encode_tokens,
    inputs_from,
    load_recipe,
    optimizers,
    rate,
    train,
)  # fmt: skip
from vlmlayers.data import builtin
from vlmlayers.errors import UserError
from vlmlayers.models import load_model


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    folder = tmp_path_factory.mktemp("cache")
    return [load_source(name, 1.0, folder, None, 16, show=False) for name in ("flags", "digits")]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def steps(run: Training, sources: list[Source], count: int) -> list[float]:
    """Take steps; return their losses."""
    feed, images = run.feed(sources), torch.from_numpy(np.concatenate([s.images for s in sources]))
    return [float(run.train_step(images, feed[run.step])) for _ in range(count)]


def weights(run: Training) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


def test_two_runs_and_a_resumed_one_are_the_same_bit_for_bit(
    tmp_path: Path, sources: list[Source]
) -> None:
    straight, again = (
        Training(tiny_recipe(), tmp_path / "a"),
        Training(tiny_recipe(), tmp_path / "b"),
    )
    start = weights(straight).clone()
    losses = steps(straight, sources, 4)
    steps(again, sources, 2)
    again.save()
    torch.manual_seed(99)  # the global state is no part of the run
    resumed = Training(tiny_recipe(), tmp_path / "b")
    assert resumed.resume()
    assert resumed.step == 2
    assert steps(resumed, sources, 2) == losses[2:]
    assert torch.equal(weights(resumed), weights(straight))
    assert not torch.equal(start, weights(straight))


def test_training_leaves_global_random_state_alone(tmp_path: Path, sources: list[Source]) -> None:
    run = Training(tiny_recipe(), tmp_path)
    before = torch.get_rng_state()
    steps(run, sources, 1)
    assert torch.equal(before, torch.get_rng_state())


def test_train_logs_exports_and_the_export_loads(tmp_path: Path, sources: list[Source]) -> None:
    run = Training(tiny_recipe(steps=25, batch_size=6), tmp_path)
    train(run, sources, show=False)
    log = (tmp_path / "log.csv").read_text().splitlines()
    assert log[0].startswith("step,steps,loss,rate")
    assert log[1].startswith("25,25,")
    ours = load_model(str(tmp_path / "export"))
    plain, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'export'}")
    for key, value in plain.state_dict().items():
        assert torch.equal(value, ours.clip.state_dict()[key]), key
    texts = ["a photo of a red flag with a star.", "handwritten nine"]
    tokenizer = open_clip.get_tokenizer(
        f"local-dir:{tmp_path / 'export'}", bpe_path=str(tmp_path / "export" / "merges.txt.gz")
    )
    assert torch.equal(tokenizer(texts), ours.tokenizer(texts))
    average = run.average.state_dict()["visual.proj"].half().float()
    assert torch.equal(average, ours.clip.state_dict()["visual.proj"])


def test_minutes_set_the_number_of_steps_and_the_log_tells_it(
    tmp_path: Path, sources: list[Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "LOGGED", 2)
    run = Training(tiny_recipe(steps=10**6, batch_size=4), tmp_path)
    train(run, sources, minutes=0.01, show=False)
    log = pd.read_csv(tmp_path / "log.csv")
    assert run.step == run.recipe["steps"] == log["steps"].iloc[-1] < 10**4
    assert log["rate"].iloc[-1] < log["rate"].max()
    assert Training(tiny_recipe(steps=run.step, batch_size=4), tmp_path).resume()


def test_workers_prepare_the_same_inputs(tmp_path: Path, sources: list[Source]) -> None:
    feed = Training(tiny_recipe(), tmp_path).feed(sources)
    ahead = inputs_from(feed, 3, workers=2)
    for step in (3, 4, 5):
        here, there = feed[step], next(ahead)
        assert torch.equal(here.rows, there.rows)
        assert here.photographs == there.photographs
        assert all(torch.equal(a, b) for a, b in zip(here.tokens, there.tokens, strict=True))


def test_a_changed_recipe_is_refused_but_a_longer_one_goes_on(tmp_path: Path) -> None:
    Training(tiny_recipe(), tmp_path).save()
    assert Training(tiny_recipe(steps=9), tmp_path).resume()
    with pytest.raises(UserError, match=r"learning_rate = 0\.001, the recipe says 0\.5"):
        Training(tiny_recipe(learning_rate=0.5), tmp_path).resume()
    with pytest.raises(UserError, match="did you mean 'batch_size'"):
        load_recipe(batch_sizes=3)


def test_a_loss_that_is_not_finite_stops_and_the_last_checkpoint_stays(
    tmp_path: Path, sources: list[Source]
) -> None:
    run = Training(tiny_recipe(), tmp_path)
    run.save()
    with torch.no_grad():
        run.model.visual.proj.fill_(float("nan"))
    with pytest.raises(UserError, match="lower the rate"):
        train(run, sources, show=False)
    again = Training(tiny_recipe(), tmp_path)
    assert again.resume() and all(p.isfinite().all() for p in again.model.parameters())


def test_an_unknown_set_without_images_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cifar10"):
        load_source("cifar10", 1.0, tmp_path, tmp_path, None, show=False)


def test_loss_agrees_with_plain_clip_where_all_groups_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(7, 5, generator=generator), dim=-1) for _ in range(2))
    scale = torch.tensor(9.0)
    logits, labels = scale * image @ text.t(), torch.arange(7)
    plain = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2
    ours = contrastive_loss(image, text, torch.arange(7), scale)
    torch.testing.assert_close(ours, plain)


def test_members_of_a_group_do_not_repel() -> None:
    same = F.normalize(torch.ones(4, 3), dim=-1)
    cats = torch.zeros(4, dtype=torch.int64)
    loss = contrastive_loss(same, same, cats, torch.tensor(20.0))
    assert float(loss) == pytest.approx(np.log(4))  # uniform over positives: the least it can be
    tilted = same.clone()
    tilted[0] = torch.tensor([1.0, 0, 0])
    assert float(contrastive_loss(tilted, same, cats, torch.tensor(20.0))) >= np.log(4) - 1e-6


def test_texts_in_pieces_are_what_open_clip_encodes(tmp_path: Path) -> None:
    run = Training(tiny_recipe(), tmp_path)
    texts = ["a cat", "{}", "a photo of a red flag with a diagonal band in the wind.", "a cat", "x"]
    texts += [f"a long caption number {i} of a man beside the sea" for i in range(6)]
    with torch.no_grad():
        pieces, places = run.feed([]).tokens(texts)
        ours = encode_tokens(run.model, pieces)[places]
        plain = run.model.encode_text(run.tokenizer(texts), normalize=True)
    torch.testing.assert_close(ours, plain, atol=2e-6, rtol=0)
    assert sum(map(len, pieces)) == len(set(texts))
    assert max(p.shape[1] for p in pieces) == max(len(run.tokenizer.encode(t)) + 2 for t in texts)
    assert sum(p.numel() for p in pieces) < len(set(texts)) * max(p.shape[1] for p in pieces)
    one, places = run.feed([]).tokens(["a cat"] * 3)
    assert len(one) == 1
    assert places.tolist() == [0, 0, 0]


def test_schedule_is_a_trapezoid_and_sees_every_patch_at_the_end() -> None:
    recipe = load_recipe(steps=1000)
    rates = np.array([rate(step, recipe) for step in range(1000)])
    top = recipe["learning_rate"]
    begin = round(1000 * (1 - recipe["decay"]))
    assert rates[recipe["warmup"] : begin] == pytest.approx(top)
    assert (np.diff(rates[: recipe["warmup"]]) > 0).all()
    assert (np.diff(rates[begin:]) < 0).all()
    assert rates[-1] == pytest.approx(top / (1000 * recipe["decay"]))
    shares = [dropped(step, recipe) for step in range(1000)]
    assert set(shares) == {recipe["patch_dropout"], 0.0}
    assert (np.diff(shares) <= 0).all()
    assert 50 <= shares.count(0.0) <= 1000 * recipe["decay"]


def test_gpu_preset_is_bigger() -> None:
    small, big = load_recipe(), load_recipe(device="cuda")
    assert big["batch_size"] > small["batch_size"]
    assert "gpu" not in small
    assert small["model"] == big["model"]


def test_batches_are_a_function_of_seed_and_step(sources: list[Source]) -> None:
    templates = load_recipe()["templates"]
    first, again, later = (sample_batch(sources, 8, templates, 1, step) for step in (5, 5, 6))
    assert np.array_equal(first.rows, again.rows)
    assert first.texts == again.texts
    assert not np.array_equal(first.rows, later.rows)
    for text, group in zip(first.texts, first.groups):
        assert group in text


def test_a_batch_of_few_draws_has_few_sources_and_one_template_for_each(
    sources: list[Source],
) -> None:
    templates = load_recipe()["templates"]
    batch = sample_batch(sources, 12, templates, 1, 0, draws=1)
    prompts = {t.replace(g, "{}") for t, g in zip(batch.texts, batch.groups) if g in t}
    captions = {
        t for t in batch.texts if t in {c for s in sources for i in s.items for c in i.captions}
    }
    assert len({group.startswith("handwritten") for group in batch.groups}) == 1
    assert len(prompts - {c.replace(g, "{}") for c in captions for g in batch.groups}) == 1


def test_a_source_is_drawn_as_often_as_its_weight_says(sources: list[Source]) -> None:
    weighted = [replace(sources[0], weight=3.0), replace(sources[1], weight=1.0)]
    templates = load_recipe()["templates"]
    seen = np.concatenate(
        [
            [group.startswith("handwritten") for group in batch.groups]
            for batch in (sample_batch(weighted, 12, templates, 1, k, draws=4) for k in range(300))
        ]
    )
    assert seen.mean() == pytest.approx(0.25, abs=0.04)  # 3600 images of 1200 draws: sd 0.0125


def test_every_parameter_has_one_optimizer_and_muon_takes_the_matrices_of_blocks(
    tmp_path: Path,
) -> None:
    run = Training(tiny_recipe(), tmp_path)
    adam, muon = optimizers(run.model, run.recipe)
    held = [p for o in (adam, muon) for group in o.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(id(p) for p in run.model.parameters())
    names = {id(p): n for n, p in run.model.named_parameters()}
    matrices = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert len(matrices) == 4 * 4  # in, out, up and down of two blocks in two towers
    assert all("resblocks" in name for name in matrices)
    spared = {
        names[id(p)] for g in adam.param_groups if g["weight_decay"] == 0 for p in g["params"]
    }
    assert {"logit_scale", "token_embedding.weight", "positional_embedding"} <= spared
    assert not {"visual.proj", "text_projection"} & spared


def test_drawings_are_not_mirrored_and_photographs_are() -> None:
    ramp = torch.arange(80, dtype=torch.uint8).mul(3).expand(64, 3, 80, 80).contiguous()
    for photographs in (0, 64):
        views = Views(ramp, photographs, torch.Generator().manual_seed(0)).augmented(64)
        falls = (views[..., -8:].mean((1, 2, 3)) < views[..., :8].mean((1, 2, 3))).float().mean()
        assert 0.2 < float(falls) < 0.8 if photographs else float(falls) == 0


def test_no_strength_is_the_plain_resized_image() -> None:
    images = (torch.rand(2, 3, 80, 80, generator=torch.Generator().manual_seed(1)) * 255).byte()
    views = Views(images, 1, torch.Generator().manual_seed(0), strength=0.0).augmented(80)
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN)[:, None, None]
    std = torch.tensor(open_clip.OPENAI_DATASET_STD)[:, None, None]
    torch.testing.assert_close(views, (images.float() / 255 - mean) / std, atol=1e-3, rtol=0)


def test_the_same_crop_is_seen_at_any_size() -> None:
    generator = torch.Generator().manual_seed(2)
    coarse = torch.rand(8, 3, 5, 5, generator=generator) * 255
    images = F.interpolate(coarse, size=(80, 80), mode="bicubic").clamp(0, 255).byte()
    views = Views(images, 8, generator)
    small, big = views.crops(32), views.crops(128, slice(2, 5))
    torch.testing.assert_close(F.avg_pool2d(big, 4), small[2:5], atol=0.01, rtol=0)


def test_dropout_passes_the_class_token_and_the_patches_kept() -> None:
    tokens = torch.arange(2 * 5, dtype=torch.float32).reshape(2, 5, 1)
    dropout = PatchDropout()
    assert torch.equal(dropout(tokens), tokens)
    dropout.kept = torch.tensor([[3, 0], [1, 2]])
    assert dropout(tokens)[..., 0].tolist() == [[0, 4, 1], [5, 7, 8]]


def test_cache_is_drawn_once_and_holds_the_train_split(tmp_path: Path) -> None:
    source = load_source("signs", 1.0, tmp_path, None, 5, show=False)
    stamps = [path.stat().st_mtime_ns for path in tmp_path.iterdir()]
    load_source("signs", 1.0, tmp_path, None, 5, show=False)
    assert stamps == [path.stat().st_mtime_ns for path in tmp_path.iterdir()]
    drawn = np.asarray(builtin.get("signs").image("train", 3, 80)).transpose(2, 0, 1)
    assert np.array_equal(source.images[3], drawn)
    assert all(item.path.startswith("train/") for item in source.items)


def test_processes_decode_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = load_source("signs", 1.0, tmp_path / "one", None, 7, show=False)
    monkeypatch.setattr(data, "CHUNK", 3)
    many = load_source("signs", 1.0, tmp_path / "many", None, 7, show=False)
    assert np.array_equal(one.images, many.images)


def test_tokenizer_keeps_the_first_merges_of_open_clip(tmp_path: Path) -> None:
    run = Training(tiny_recipe(), tmp_path)
    ours = gzip.decompress((tmp_path / "merges.txt.gz").read_bytes()).decode().split("\n")
    theirs = gzip.decompress(Path(default_bpe()).read_bytes()).decode().split("\n")
    assert ours == theirs[:301]
    assert run.tokenizer.vocab_size == 512 + 300 + 2
    assert run.tokenizer.eot_token_id == run.tokenizer.vocab_size - 1


def test_command_trains_resumes_and_exports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(steps=2, batch_size=4, shares={}, drawn_items=2)
    monkeypatch.setattr(command, "load_recipe", lambda *_, **__: recipe)
    import typer

    app = typer.Typer()
    app.command()(command.main)
    for _ in range(2):
        result = CliRunner().invoke(
            app, ["--out", str(tmp_path), "--device", "cpu", "--quiet", "--threads", "1"]
        )
        assert result.exit_code == 0, result.output
        assert "2 steps" in result.output
    assert (tmp_path / "export" / "model.safetensors").exists()


def test_wilson_interval_matches_published_values() -> None:
    low, high = card.wilson(0.5, 10)  # Newcombe 1998: 0.2366 to 0.7634
    assert (low, high) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert card.wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


def test_card_measures_test_items_only_and_writes_its_tables(tmp_path: Path) -> None:
    run = Training(tiny_recipe(), tmp_path)
    run.export(tmp_path / "export")
    model = load_model(str(tmp_path / "export"))
    measure = card.Evaluation(model, None, limit=40, fit=40, show=False)
    rows, test = measure.classes("digits")
    assert {row["metric"] for row in rows} == {"zero_shot_accuracy", "linear_probe"}
    assert test.vision is not None
    assert all(name.startswith("test/") for name in test.vision.ids)
    assert list(np.bincount(test.vision.labels)) == [4] * 10
    for row in rows:
        assert row["low"] <= row["value"] <= row["high"]
        assert row["null"] == pytest.approx(0.1)
    table = card.classes_table(pd.DataFrame(rows))
    assert "| digits | 40 | 10.0 |" in table


def planted_card(**zero_shot: tuple[float, float, float]) -> pd.DataFrame:
    rows = [
        {"dataset": name, "metric": "zero_shot_accuracy", "tower": "vision", "position": "proj",
         "value": value, "low": low, "null": null}
        for name, (value, low, null) in zero_shot.items()
    ]  # fmt: skip
    rows += [
        {"dataset": "all", "metric": "dataset_accuracy", "tower": "vision", "position": position,
         "value": value, "null": 0.1}
        for position, value in (("embed", 0.1), ("6", 0.6), ("proj", 0.8))
    ]  # fmt: skip
    rows.append({"dataset": "flags", "metric": "centroid_gap", "tower": "vision",
                 "position": "proj", "value": 0.7, "null": 0.2})  # fmt: skip
    return pd.DataFrame(rows)


def test_card_says_what_was_reached_and_names_what_was_not() -> None:
    rows = planted_card(
        flags=(0.5, 0.45, 0.05), letters=(0.06, 0.03, 0.05), dtd=(0.3, 0.25, 0.1),
        cifar10=(0.2, 0.18, 0.1),
    )  # fmt: skip
    five, bar, chance, rise, gap = card.reached_list(rows).splitlines()
    assert five.endswith("1 of 2; not on letters (1.2 ×).")
    assert bar.endswith("1 of 2; not on cifar10.")
    assert chance.endswith("3 of 4; not on letters.")
    assert rise.endswith("10.0 % to 80.0 %.")
    assert gap.endswith("0.700 against 0.200 at `proj`.")
    assert card.reached_list(planted_card(flags=(0.5, 0.45, 0.05))).splitlines()[0].endswith("1.")
