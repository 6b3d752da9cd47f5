"""Extraction: rows in order, texts, precision, unreadable images, and wrong arguments."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from threading import Thread

import numpy as np
import open_clip
import pytest
import tiny
import torch
from data_fixtures import coop_dataset, picture
from PIL import Image
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import get_worker_info

from vlmlayers.errors import UserError
from vlmlayers.features import LayerFeatures
from vlmlayers.manifests import Manifest
from vlmlayers.models import Recorder, examine, extract, load_model, stream
from vlmlayers.models.decoding import FORKS, batches_of, decode, decoding_processes
from vlmlayers.models.tokenizers import HubTokenizer, tokens_mark
from vlmlayers.models.work import autocast
from vlmlayers.runs import cores
from vlmlayers.scores import score

MODEL = tiny.model()


def run(manifest=None, model=MODEL, split="train", **options):
    options = {"batch_size": 8, "progress": False, **options}
    return extract(model, manifest or tiny.DrawnManifest(), split, **options)


def _encode(items, manifest):
    batch = torch.stack([tiny.preprocess(manifest.open_image(item)) for item in items])
    with torch.inference_mode():
        return MODEL.clip.encode_image(batch).numpy()


def test_rows_follow_the_items_and_end_at_the_models_embedding():
    manifest = tiny.DrawnManifest()
    found = run(manifest)
    items = manifest.items("train")
    assert found.vision.ids == tuple(item.path for item in items)
    assert found.vision.labels.tolist() == [item.label for item in items]
    for position in ("proj", "3"):
        assert np.allclose(
            found.vision.array(position, "joint"), _encode(items, manifest), atol=1e-5
        )


def test_a_tokenizer_that_cannot_be_fetched_is_said_before_an_image_is_opened():
    """SigLIP's comes from the hub: that it had not was said after the last image."""
    model, manifest = tiny.model(), tiny.DrawnManifest()
    model.tokenizer = HubTokenizer("timm/none", 64, None, {})
    with pytest.raises(UserError, match="tokenizer 'timm/none' cannot be loaded"):
        run(manifest, model)
    assert not manifest.opened
    assert len(run(manifest, model, tower="vision").vision) == manifest.count


def test_prompts_are_one_per_class_with_the_template_around_the_name():
    found = run(template="see {}!")
    assert found.text.ids == ("see cat!", "see tree frog!", "see a {brace} <b>!")
    assert found.text.labels.tolist() == [0, 1, 2]
    assert found.text.kind == "prompts"
    with torch.inference_mode():
        expected = MODEL.clip.encode_text(tiny.tokenizer(list(found.text.ids))).numpy()
    assert np.allclose(found.text.array("3", "joint"), expected, atol=1e-5)


def test_captions_are_all_of_each_image_with_their_pairs():
    found = run(text="captions", items=5)
    assert found.text.ids[:3] == ("first 0", "second 0", "first 1")
    assert found.text.pairs.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert found.text.labels.tolist() == [0, 0, 1, 1, 2, 2, 0, 0, 1, 1]


def test_captioned_images_without_classes_are_recorded_and_scored(tmp_path):
    (tmp_path / "images").mkdir()
    lines = []
    for number in range(12):
        name = f"{number}.png"
        Image.new("RGB", (32, 32), (20 * number, 90, 200)).save(tmp_path / "images" / name)
        lines += [f"{name}\tcaption {number} {word}" for word in ("a", "b")]
    (tmp_path / "captions.tsv").write_text("\n".join(lines) + "\n")
    (tmp_path / "set.toml").write_text(
        'title = "Mine"\nfolder = "."\nimages = "images"\nlayout = "captions"\n'
        'split_file = "captions.tsv"\nclasses = 0\n'
    )
    found = run(Manifest.load(tmp_path / "set.toml"), text="captions")
    assert found.vision.labels.tolist() == [-1] * 12 and len(found.text) == 24
    table = score(found, ["matched_cosine"], positions=["proj"], bootstrap=20)
    assert set(table["n"]) == {24}
    with pytest.raises(UserError, match="class_accuracy_ncm"):
        score(found, ["class_accuracy_ncm"], bootstrap=20)
    # The advice to record captions, which they are, would lead nowhere.
    with pytest.raises(UserError, match="set has no classes, by prompts of which.*marks with"):
        examine(load_model("mini-clip"), tmp_path / "set.toml", items=4, progress=False)


@pytest.mark.parametrize(
    ("quota", "usable"), [("max 100000", 6), ("250000 100000", 2), ("50000 100000", 1), (None, 6)]
)
def test_workers_default_to_what_the_machine_has(monkeypatch, tmp_path, quota, usable):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setattr("vlmlayers.runs.QUOTA", tmp_path / "cpu.max")
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota)
    assert cores() == usable
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert decoding_processes(None, 10_000, gpu) == max(usable - 1, 1)
    assert decoding_processes(None, 10_000, cpu) == decoding_processes(None, 20, gpu) == 0
    assert decoding_processes(3, 20, cpu) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_and_workers_change_nothing_but_rounding(workers):
    whole = run(batch_size=64)
    parts = run(batch_size=5, workers=workers)
    for tower in ("vision", "text"):
        for position in whole.tower(tower).positions():
            a, b = (f.tower(tower).array(position) for f in (whole, parts))
            assert np.allclose(a, b, atol=1e-5)


def test_workers_give_the_same_bytes():
    here, there = run(workers=0), run(workers=2)
    for position in here.vision.positions():
        assert (here.vision.array(position) == there.vision.array(position)).all()


def test_every_worker_decodes_the_first_batch():
    """Not one of them all of it, while the model waits."""

    class Told(tiny.DrawnManifest):
        def open_image(self, item, root=None, size=None):
            if item.path[-7:] in ("005.png", "020.png"):  # within what is handed over at once
                worker = get_worker_info()
                raise UserError(f"by {'none' if worker is None else worker.id}")
            return super().open_image(item, root, size)

    items = Told(count=40).items("train")
    prepared = {"preprocess": tiny.preprocess, "root": None, "size": 16}
    here, there = (
        list(decode(Told(), items, batches_of(40, 35), workers=workers, **prepared))
        for workers in (0, 2)
    )
    whole = [row for row in range(35) if row not in (5, 20)], [*range(35, 40)]
    assert [rows for rows, *_ in here] == [rows for rows, *_ in there] == [*whole]
    assert all(torch.equal(a[1], b[1]) for a, b in zip(here, there))
    assert [why[-6:] for _, _, bad in there for why in bad.values()] == ["(by 0)", "(by 1)"]


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
def test_what_an_image_raises_in_a_worker_is_raised_as_itself(kind, caplog):
    """Not said to be a lack of memory first, nor wrapped in what torch makes of it."""

    class Raises(tiny.DrawnManifest):
        def open_image(self, item, root=None, size=None):
            if item.path.endswith("013.png"):
                raise kind("no colours in 013")
            return super().open_image(item, root, size)

    with pytest.raises(kind, match=r"^no colours in 013$"):
        run(Raises(), workers=2)
    assert not caplog.text


def test_what_fails_in_workers_alone_is_decoded_here_and_named(caplog):
    """Such as tensors on a GPU, which a forked process cannot read."""

    class Elsewhere(tiny.DrawnManifest):
        def open_image(self, item, root=None, size=None):
            if get_worker_info() is not None:
                raise RuntimeError("Cannot re-initialize CUDA")
            return super().open_image(item, root, size)

    assert len(run(Elsewhere(), workers=2).vision.ids) == 22
    assert "(RuntimeError: Cannot re-initialize CUDA); the rest is decoded without" in caplog.text


@pytest.mark.skipif(not FORKS, reason="this system does not fork")
def test_workers_are_forked_however_python_would_start_them():
    """Started anew, each imports everything: ten seconds instead of one in a spawned process."""

    class Local(tiny.DrawnManifest):  # of this process alone: it cannot be sent to another
        pass

    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    try:
        assert len(run(Local(), workers=2).vision.ids) == len(run(workers=0).vision.ids)
    finally:
        multiprocessing.set_start_method(before, force=True)


def test_workers_do_without_shared_memory(monkeypatch):
    """Where a container had little of it, extraction waited for ever."""

    def full(storage):
        raise RuntimeError("No space left on device (28)")

    monkeypatch.setattr("torch.UntypedStorage._share_fd_cpu_", full)
    found = []
    asking = Thread(target=lambda: found.append(run(workers=2)), daemon=True)
    asking.start()
    asking.join(60)
    assert np.array_equal(found[0].vision.array("proj"), run().vision.array("proj"))


def test_a_process_that_may_not_have_children_decodes_itself(monkeypatch):
    """As in a pool of processes, where workers are the default beside a GPU."""
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    assert np.array_equal(run(workers=2).vision.array("proj"), run().vision.array("proj"))


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    run(workers=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_items_may_be_a_number_or_a_list():
    manifest = tiny.DrawnManifest()
    chosen = manifest.items("train")[3:7]
    assert run(manifest, items=4).vision.ids == tuple(i.path for i in manifest.items("train")[:4])
    found = run(manifest, items=chosen)
    assert np.allclose(found.vision.array("proj"), _encode(chosen, manifest), atol=1e-5)


def test_autocast_is_close_and_features_stay_float32():
    full, half = run(), run(precision="bf16")
    a, b = full.vision.array("2"), half.vision.array("2")
    assert b.dtype == np.float32
    assert 1e-4 < abs(a - b).max() < 0.2 * abs(a).max()
    assert half.identity["precision"] == "bf16"
    for precision, there in (("fp32", False), ("bf16", True)):
        with autocast(torch.device("cpu"), precision):
            assert torch.is_autocast_enabled("cpu") is there


@pytest.mark.parametrize("frozen", [True, False])
def test_autocast_casts_weights_once_for_all_batches(frozen):
    model = tiny.model()
    model.clip.requires_grad_(not frozen)

    def casts(batches):
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            asked = {"precision": "bf16", "tower": "vision"}
            run(model=model, items=2 * batches, batch_size=2, **asked)
        return sum(one.count for one in seen.key_averages() if one.key == "aten::_to_copy")

    one, two, three = map(casts, (1, 2, 3))
    weights = sum(w.ndim > 1 for w in model.clip.visual.transformer.parameters())
    assert two - one == three - two <= one - weights


def test_kept_casts_change_no_bit_and_are_of_the_weights_of_now():
    model, manifest = tiny.model(seed=3), tiny.DrawnManifest()
    model.clip.requires_grad_(False)
    trained = model.clip.visual.transformer.resblocks[0].mlp.c_fc.weight
    trained.requires_grad_()

    def apart(items):
        batch = torch.stack([tiny.preprocess(manifest.open_image(item)) for item in items])
        recorder = Recorder(model.towers["vision"], ("native", "joint"))
        with recorder, autocast(torch.device("cpu"), "bf16"):
            return recorder(batch)

    with torch.autocast("cpu", dtype=torch.bfloat16):  # as around a caller's training
        for _ in range(2):
            made = run(manifest, model, precision="bf16", items=6, batch_size=3)
            items = manifest.sample("train", 6)
            for part in (slice(3), slice(3, 6)):
                for space, positions in apart(items[part]).items():
                    for position, values in positions.items():
                        assert np.array_equal(made.vision.array(position, space)[part], values)
            model.clip.encode_image(torch.rand(2, 3, 32, 32)).sum().backward()
            assert trained.grad.abs().max() > 0, "a cast made without gradients would have none"
            with torch.no_grad():
                trained.mul_(1.5)
    flags = {w: w.requires_grad for w in model.clip.parameters()}
    assert [w for w, wants in flags.items() if wants] == [trained]
    with pytest.raises(UserError):
        run(tiny.DrawnManifest(broken={"train/003.png"}), model, precision="bf16")
    assert {w: w.requires_grad for w in model.clip.parameters()} == flags


def test_autocast_of_the_caller_is_not_that_of_the_features():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run()
        assert torch.is_autocast_enabled("cpu")
    assert found.identity["precision"] == "fp32"
    for position, values in run().vision.arrays["native"].items():
        np.testing.assert_array_equal(found.vision.array(position), values)


def test_pooling_may_differ_between_towers():
    found = run(pooling={"vision": "mean"})
    assert (found.vision.pooling, found.text.pooling) == ("mean", "eot")
    assert found.vision.pooling_in("joint") == "mean"
    attention = run(model=tiny.model("coca"))
    assert (attention.vision.pooling, attention.vision.pooling_in("joint")) == ("mean", "model")


def test_unreadable_images_are_counted_listed_and_stop_the_run():
    broken = {f"train/{i:03d}.png" for i in (1, 5, 6, 7, 9, 20, 21)}
    with pytest.raises(UserError) as caught:
        run(tiny.DrawnManifest(broken=broken))
    message = str(caught.value)
    assert message.startswith("7 of 22 images of drawn cannot be read: train/001.png")
    assert message.count("train/") == 2 * 5  # the first five, each with its reason
    assert "--skip-unreadable" in message


def test_unreadable_images_can_be_left_out(caplog):
    broken = {"train/001.png", "train/010.png"}
    found = run(tiny.DrawnManifest(broken=broken), skip_unreadable=True, text="captions")
    assert "2 of 22 images of drawn cannot be read and are left out, first train/001.png" in (
        caplog.text
    )
    clean = run(text="captions", batch_size=8)
    kept = [i for i in range(22) if i not in (1, 10)]
    assert found.vision.ids == tuple(f"train/{i:03d}.png" for i in kept)
    assert np.allclose(found.vision.array("3"), clean.vision.array("3")[kept], atol=1e-5)
    assert found.text.ids[:4] == ("first 0", "second 0", "first 2", "second 2")
    assert found.text.pairs.tolist() == [row for row in range(20) for _ in (0, 1)]


def test_missing_images_are_told_before_the_first_is_opened(tmp_path, caplog):
    rows = [[f"a/{i}.png", 0, "a"] for i in range(6)]
    manifest = coop_dataset(tmp_path / "d", {"train": rows}, 'get = "https://example.org"')
    store, (first, second) = tmp_path / "store", (tmp_path / "d/a/0.png", tmp_path / "d/a/1.png")
    for here, without in ((0, False), (2, True)):
        if here:
            first.parent.mkdir()
            picture(0, (32, 32)).save(first)
            picture(1, (32, 32)).save(second)
        for out in (None, store):
            with pytest.raises(UserError) as caught:
                run(manifest, out=out)
            message = str(caught.value)
            assert f"{6 - here} of 6 images are not in {tmp_path / 'd'}: a/{here}.png, " in message
            assert f"a/{here + 2}.png, …; get it: https://example.org" in message
            assert ("--present-only" in message) == without
    assert not store.exists() and not store.with_name("store.partial").exists()
    found = run(manifest, present_only=True, out=store)
    assert found.vision.ids == ("a/0.png", "a/1.png")
    assert "4 of 6 items are not on disk and are left out, first a/2.png" in caplog.text
    assert run(manifest, items=manifest.items("train"), present_only=True).vision.ids == (
        found.vision.ids
    )
    assert run(manifest, skip_unreadable=True).vision.ids == found.vision.ids


@pytest.mark.parametrize("work", [extract, stream])
def test_missing_images_are_told_before_any_is_opened_unless_they_may_be_left_out(work):
    class Missing(tiny.DrawnManifest):
        def refuse_missing(self, items, root=None):
            raise UserError(f"put {len(items)} images there")

    manifest = Missing()
    with pytest.raises(UserError, match="^put 22 images there$"):
        work(tiny.model(), manifest, "train", progress=False)
    assert manifest.opened == []
    work(tiny.model(), manifest, "train", skip_unreadable=True, progress=False)
    assert len(manifest.opened) == 22


def test_a_dataset_without_a_single_readable_image_stops_in_each_case():
    broken = {f"train/{i:03d}.png" for i in range(22)}
    with pytest.raises(UserError, match="22 of 22 images"):
        run(tiny.DrawnManifest(broken=broken), skip_unreadable=True)


def test_a_dataset_that_mostly_fails_stops_early():
    manifest = tiny.DrawnManifest(count=600, broken={f"train/{i:03d}.png" for i in range(600)})
    with pytest.raises(UserError, match="104 of 104 images"):
        run(manifest)
    assert len(manifest.opened) < 130


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_stop_the_run(value):
    model = tiny.model()
    with torch.no_grad():
        model.clip.visual.transformer.resblocks[1].mlp.c_fc.weight[0, 0] = value
    told = "NaN or Inf in vision features at 2 .native., 8 of 8 items.*first 'train/000.png'"
    with pytest.raises(UserError, match=told):
        run(model=model)
    with pytest.raises(UserError, match=told):
        stream(model, tiny.DrawnManifest(), "train", batch_size=8, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp8"}, "unknown precision 'fp8'"),
        ({"text": "prompt"}, "unknown text 'prompt'; did you mean 'prompts'"),
        ({"spaces": ("joined",)}, "unknown space 'joined'; did you mean 'joint'"),
        ({"decoding": "half"}, "unknown decoding 'half'; valid: 'full', 'reduced' or 'nvjpeg'"),
        ({"decoding": "reduced"}, "decoding reduced is for datasets on disk"),
        ({"batch_size": 0}, "batch_size is 0; at least 1 is needed"),
        ({"template": "a photo"}, "must hold '{}' exactly once"),
        ({"template": "{} or {}"}, "must hold '{}' exactly once"),
        ({"items": []}, "drawn has no items in split 'train'"),
        (
            {"pooling": {"visual": "cls"}},
            "unknown tower 'visual'; did you mean 'vision'",
        ),
        ({"pooling": "cls"}, "the text tower .open_clip text. has no 'cls' pooling; it has eot"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(UserError, match=message):
        run(**options)


def test_texts_that_are_not_there_are_named():
    with pytest.raises(UserError, match="has no captions; use text='prompts'"):
        run(tiny.DrawnManifest(captioned=False), text="captions")
    with pytest.raises(UserError, match="has no classes to make prompts of"):
        run(tiny.DrawnManifest(names=()))
    manifest = tiny.DrawnManifest()
    items = [*manifest.items("train")[:3], replace(manifest.items("train")[3], captions=())]
    with pytest.raises(UserError, match="^drawn: train/003.png has no caption$"):
        stream(tiny.model(), manifest, "train", items=items, text="captions", progress=False)


def test_identity_tells_apart_what_values_depend_on():
    base = run().identity
    assert base == run().identity
    others = [
        run(batch_size=4),
        run(precision="bf16"),
        run(template="{}"),
        run(items=5),
        run(split="test"),
        run(spaces=("native",)),
        run(pooling="mean"),
        run(tiny.DrawnManifest(hash="9")),
        run(model=tiny.model(seed=3)),
    ]
    assert all(other.identity != base for other in others)


def test_items_that_count_other_classes_are_refused(tmp_path):
    """Features of the second half of the classes were read by prompts of the first."""
    rows = [[f"{name}.png", label, name] for label, name in enumerate("abcd")]
    manifest = coop_dataset(tmp_path, {"train": rows, "val": rows[:1]})
    for name in "abcd":
        picture(size=(32, 32)).save(tmp_path / f"{name}.png")
    items = manifest.items("train")
    assert run(manifest, items=items[::-1]).vision.labels.tolist() == [3, 2, 1, 0]
    half = [replace(item, label=item.label - 2) for item in items[2:]]
    with pytest.raises(UserError, match="c.png of 'c' has the label 0, which is 'a' there"):
        run(manifest, items=half)
    beyond = [replace(items[0], label=7)]
    with pytest.raises(UserError, match="a.png of 'a' has the label 7, which is 'none' there"):
        run(manifest, items=beyond)
    assert len(run(manifest, items=[replace(items[0], class_name="")]).vision) == 1


def test_a_store_of_another_vocabulary_is_refused(tmp_path):
    def other_words(texts):
        ids = MODEL.tokenizer(texts)
        return torch.where(ids > 0, (ids + 1) % ids.max(), ids)

    other = replace(MODEL, tokenizer=other_words)
    run(out=tmp_path)
    with pytest.raises(UserError, match="belongs to another extraction: tokens is"):
        run(model=other, out=tmp_path)
    images = run(out=tmp_path / "images", tower="vision")
    assert run(model=other, out=tmp_path / "images", tower="vision").identity == images.identity
    own = open_clip.SimpleTokenizer()
    texts = [f"word number {i}" for i in range(3)]
    for length in (9, 77):
        assert tokens_mark(partial(own, context_length=length), texts, 12) == ""
    cut = {length: tokens_mark(partial(own, context_length=length), texts, 4) for length in (4, 3)}
    assert cut[4] == "" != cut[3]
    marks = {tokens_mark(other_words, part, 12) for part in (texts, texts[:2])}
    assert len(marks) == 2 and "" not in marks


def test_reduced_decoding_is_near_the_full_one_and_part_of_the_identity(tmp_path):
    generator = np.random.default_rng(0)
    side = MODEL.image_size
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(3):
            small = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            smooth = Image.fromarray(small).resize((9 * side, 8 * side), Image.Resampling.BICUBIC)
            smooth.save(tmp_path / name / f"{number}.jpg", quality=95)
    model = tiny.model()
    model.preprocess = lambda image: tiny.preprocess(image.resize((side, side)))
    full, reduced = (run(str(tmp_path), model, decoding=how) for how in ("full", "reduced"))
    assert reduced.identity == full.identity | {"decoding": "reduced"}
    a, b = (one.vision.array("proj", "joint") for one in (full, reduced))
    assert 0 < np.abs(a - b).max() < 0.1 * np.abs(a).max()
    run(str(tmp_path), model, out=tmp_path.with_name("store"))
    with pytest.raises(UserError, match="decoding"):
        run(str(tmp_path), model, out=tmp_path.with_name("store"), decoding="reduced")


def test_batches_partition_the_rows():
    for rows, size in ((0, 4), (1, 4), (8, 4), (9, 4)):
        batches = batches_of(rows, size)
        assert [row for batch in batches for row in batch] == list(range(rows))
        assert all(0 < len(batch) <= size for batch in batches)


def test_summary_and_representations_say_what_is_there():
    found = run(spaces=("native",))
    table = found.summary()
    assert table[["tower", "items", "positions", "widths"]].to_numpy().tolist() == [
        ["vision", 22, 6, "48/24"],
        ["text", 3, 6, "32/24"],
    ]
    assert "22 images × 6 positions" in repr(found)
    assert repr(found.vision) == "TowerFeatures(vision, 22 images, cls; native: 6 positions)"
    one = LayerFeatures.from_arrays({"1": np.ones((1, 3))})
    assert "1 image × 1 position)" in repr(one)
    assert "tiny clip" in found._repr_html_()


def test_captions_follow_their_images_into_another_order():
    images, words = np.arange(6.0).reshape(3, 2), np.arange(8.0).reshape(4, 2)
    pairs = [0, 2, 2, 1]
    found = LayerFeatures.from_arrays({"1": images}, {"1": words}, pairs=pairs, labels=[0, 1, 2])
    taken = found.take_images([2, 0])
    np.testing.assert_array_equal(taken.vision["1"], images[[2, 0]])
    assert taken.vision.labels.tolist() == [2, 0]
    np.testing.assert_array_equal(taken.text["1"], words[[0, 1, 2]])
    assert taken.text.pairs.tolist() == [1, 0, 0] and taken.text.labels.tolist() == [0, 2, 2]


def test_own_arrays_become_features():
    rng = np.random.default_rng(0)
    images = {p: rng.normal(size=(6, 4)) for p in ("embed", "1", "2", "proj")}
    texts = {p: rng.normal(size=(2, 3)) for p in ("1", "2")}
    found = LayerFeatures.from_arrays(
        images, texts, labels=[0, 1] * 3, class_names=["a", "b"], dataset="mine"
    )
    assert found.vision.blocks == found.text.blocks == 2
    assert found.vision.positions() == ("embed", "1", "2", "proj")
    assert found.text.labels.tolist() == [0, 1]
    paired = LayerFeatures.from_arrays(images, texts, labels=[0, 1] * 3, pairs=[3, 2])
    assert paired.text.labels.tolist() == [1, 0]
    assert paired.class_names == ("class 0", "class 1")


@pytest.mark.parametrize(
    ("vision", "options", "message"),
    [
        ({}, {}, "needs arrays of at least one tower"),
        (
            {"1": np.zeros((2, 2)), "3": np.zeros((2, 2))},
            {},
            "blocks .1, 3.; they have to be 1 to L",
        ),
        (
            {"fianl": np.zeros((2, 2))},
            {},
            "unknown position 'fianl' in vision arrays; did you mean",
        ),
        ({"1": np.full((2, 2), np.nan)}, {}, "NaN or Inf in vision array at 1"),
        ({"1": np.zeros((2, 2))}, {"labels": [0]}, "2 ids but 1 labels"),
        ({"1": np.zeros((2, 2)), "2": np.zeros((3, 2))}, {}, "expected .2, width."),
        ({"1": np.zeros((2, 2))}, {"space": "raw"}, "unknown space 'raw'"),
    ],
)
def test_wrong_own_arrays_are_named(vision, options, message):
    with pytest.raises(UserError, match=message):
        LayerFeatures.from_arrays(vision, **options)


@pytest.mark.gpu
def test_a_gpu_gives_what_the_cpu_gives():
    here, there = tiny.model(), tiny.model()
    there.clip.to("cuda")
    a, b = run(model=here), run(model=there)
    for tower in ("vision", "text"):
        for position in a.tower(tower).positions("joint"):
            x, y = (f.tower(tower).array(position, "joint") for f in (a, b))
            assert np.allclose(x, y, atol=1e-3 * max(1.0, abs(x).max()))
    assert b.identity["device"] == "cuda"


@pytest.mark.gpu
def test_a_gpu_gets_the_bytes_that_are_decoded_here():
    """Pinned memory is used again while copies run: no image may be another's."""
    items = tiny.DrawnManifest(count=200).items("train")
    prepared = {"preprocess": tiny.preprocess, "root": None, "size": 16}
    here, there = (
        list(
            decode(
                tiny.DrawnManifest(), items, batches_of(200, 64),
                workers=workers, device=torch.device(device), **prepared,
            )
        )
        for workers, device in ((0, "cpu"), (2, "cuda"))
    )  # fmt: skip
    assert all(one.is_cuda for _, one, _ in there)
    assert all(torch.equal(a, b.cpu()) for (_, a, _), (_, b, _) in zip(here, there))


def test_threads_that_share_a_model_record_their_own_items():
    """Hooks of one thread recorded the batches of the other, and both were returned."""
    model, datasets = tiny.model(), ("faces", "signs")

    def features(name):
        return run(name, model, "val", items=16, batch_size=2, workers=0)

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(features, datasets * 2))
    for found, expected in zip(together, 2 * [features(name) for name in datasets]):
        np.testing.assert_array_equal(found["vision"][3], expected["vision"][3])
        np.testing.assert_array_equal(found["text"][3], expected["text"][3])


def test_threads_that_share_a_model_stream_their_own_items():
    model, datasets = tiny.model(), ("faces", "signs")

    def sample(name):
        manifest = tiny.DrawnManifest(name, 48)
        found = stream(model, manifest, "train", batch_size=2, sample=48, progress=False)
        return found.datasets[name].sample["vision", "native", "3"]

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(sample, datasets))
    for found, name in zip(together, datasets):
        np.testing.assert_array_equal(found, sample(name))


def test_a_folder_of_sums_that_was_refused_is_not_locked(tmp_path):
    def again(sample):
        stream(MODEL, tiny.DrawnManifest(), "train", out=tmp_path, sample=sample, progress=False)

    again(20)
    with pytest.raises(UserError, match="sample is 20 there, 21 here") as held:
        again(21)
    again(20)
    del held  # a notebook holds the last error, and with it what was open
