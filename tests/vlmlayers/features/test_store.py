"""The store: whole or absent, resumed byte for byte, and silent about nothing."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import peft
import pytest
import tiny
import torch
from starts import content, remount
from torch import nn

from vlmlayers.errors import UserError
from vlmlayers.features.store import (
    DamagedStore,
    FeatureStore,
    differing_field,
    open_features,
    partial_folder,
    read_sidecar,
    write_record,
)
from vlmlayers.features.writer import StoreWriter
from vlmlayers.files import atomically
from vlmlayers.models import VLM, extract, stream, wrap_model
from vlmlayers.models.companions import described
from vlmlayers.models.load import build_clip
from vlmlayers.scores import score

MODEL = tiny.model()
HERE = Path(__file__).parent


def run(out, manifest=None, model=MODEL, split="train", **options):
    options = {"batch_size": 4, "progress": False, "text": "captions", **options}
    return extract(model, manifest or tiny.DrawnManifest(), split, out=out, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "store"
    run(folder)
    return folder


@pytest.fixture
def store(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "store"))


class Interrupted(tiny.DrawnManifest):
    """Fails for good after some images, as Ctrl-C or a crash would."""

    stop_after = 9
    error: type[BaseException] = KeyboardInterrupt

    def open_image(self, item, root=None, size=None):
        if len(self.opened) >= self.stop_after:
            raise self.error
        return super().open_image(item, root, size)


class Redrawn(tiny.DrawnManifest):
    """Image 2 is another one, with another mark."""

    def identity(self, items, root=None):
        then = super().identity(items)
        rows = [(path, n, f"{mark} new" if "002" in path else mark) for path, n, mark in then.items]
        return replace(then, items=tuple(rows))

    def open_image(self, item, root=None, size=None):
        image = super().open_image(item, root, size)
        return image.rotate(90) if "002" in item.path else image


def test_the_store_holds_what_memory_holds(whole):
    stored, memory = open_features(whole), run(None)
    assert stored.identity == json.loads(json.dumps(memory.identity))
    assert stored.class_names == memory.class_names
    for tower in ("vision", "text"):
        a, b = stored.tower(tower), memory.tower(tower)
        assert (a.ids, a.pooling, a.kind, a.blocks) == (b.ids, b.pooling, b.kind, b.blocks)
        assert a.labels.tolist() == b.labels.tolist()
        for space in b.spaces:
            assert a.positions(space) == b.positions(space)
            for position in b.positions(space):
                assert isinstance(a.array(position, space), np.memmap)
                assert (a.array(position, space) == b.array(position, space)).all()
    assert stored.text.pairs.tolist() == memory.text.pairs.tolist()


def test_tokens_of_several_batches_are_stored_as_memory_holds_them(tmp_path):
    options = {"items": 6, "pooling": "tokens", "spaces": "native", "batch_size": 2}
    stored, held = (run(out, **options) for out in (tmp_path / "s", None))
    for tower in ("vision", "text"):
        for position in held[tower].positions():
            np.testing.assert_array_equal(stored[tower][position], held[tower][position])
    assert np.isnan(held.text["1"]).any()  # where a text has ended
    for _ in range(2):  # the same again, NaN and all
        held.save(tmp_path / "t")


def test_arrays_are_plain_npy_files(whole):
    array = np.load(whole / "vision" / "native" / "embed.npy")
    assert (array.shape, array.dtype) == ((22, 48), np.float32)


def test_two_runs_give_the_same_bytes(whole, tmp_path):
    run(tmp_path / "again")
    assert content(tmp_path / "again") == content(whole)
    assert not partial_folder(tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("stop_after", "error"),
    [
        (0, KeyboardInterrupt),
        (4, MemoryError),
        (9, KeyboardInterrupt),
        (21, KeyboardInterrupt),
    ],
)
def test_an_interrupted_extraction_resumes_at_the_last_full_batch(
    whole, tmp_path, stop_after, error
):
    manifest = Interrupted()
    manifest.stop_after, manifest.error = stop_after, error
    with pytest.raises(error):
        run(tmp_path / "s", manifest)
    with pytest.raises(UserError, match="is not finished; run the extraction again to resume"):
        open_features(tmp_path / "s")
    rest = tiny.DrawnManifest()
    run(tmp_path / "s", rest)
    assert len(rest.opened) == 22 - stop_after // 4 * 4
    assert content(tmp_path / "s") == content(whole)


def test_a_whole_store_is_reused_without_opening_an_image(store):
    manifest = tiny.DrawnManifest()
    found = run(store, manifest)
    assert manifest.opened == []
    assert isinstance(found.vision.array("1"), np.memmap)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model": tiny.model(seed=2)}, "weights is 'seed 0' there, 'seed 2' here"),
        ({"precision": "bf16"}, "precision is 'fp32' there, 'bf16' here"),
        ({"batch_size": 5}, "batch_size is 4 there, 5 here"),
        (
            {"manifest": tiny.DrawnManifest(hash="9")},
            "of other data: 22 images then, 22 now: 22 altered, first 'train/000.png'",
        ),
        ({"pooling": "mean"}, "pooling.vision is 'cls' there, 'mean' here"),
        ({"items": 7}, "22 images then, 7 now: 15 removed, first 'train/007.png'"),
        ({"text": "prompts"}, "text is 'captions' there, 'prompts' here"),
        ({"spaces": ("native",)}, "spaces is"),
        ({"manifest": tiny.DrawnManifest(name="b")}, "dataset is 'drawn' there, 'b' here"),
        ({"split": "test", "items": tiny.DrawnManifest().items("train")}, "split is 'train' there"),
        ({"model": replace(MODEL, name="a")}, "model is 'tiny clip' there, 'a' here"),
    ],
)
def test_a_store_of_another_identity_is_refused_and_left_alone(store, change, field):
    before = content(store)
    with pytest.raises(UserError, match="belongs to another extraction") as caught:
        run(store, **change)
    assert field in str(caught.value)
    assert content(store) == before


def test_a_store_that_does_not_say_its_data_is_refused(store):
    record = read_sidecar(store)
    del record["identity"]["data"]
    write_record(store / "store.json", record)
    (store / "data.gz").unlink()
    with pytest.raises(UserError, match="an earlier version made it, which kept no sizes"):
        run(store)


def test_without_its_list_a_store_still_says_how_many(store):
    (store / "data.gz").write_bytes(b"damaged")
    assert len(run(store).vision) == 22
    with pytest.raises(UserError, match="of other data: 22 images then, 7 now; choose"):
        run(store, items=7)


def test_unfinished_work_does_images_again_that_were_altered_since(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "s", Interrupted())
    altered = Redrawn()
    run(tmp_path / "s", altered)
    assert altered.opened == [f"train/{i:03d}.png" for i in (0, 1, 2, 3, *range(8, 22))]
    run(tmp_path / "calm", Redrawn())
    assert content(tmp_path / "s") == content(tmp_path / "calm")


def test_what_goes_into_joint_space_is_told_apart(tmp_path):
    """By the model's own attention pool or by a mean: native space is the same mean in both."""
    model = tiny.model("timm vit map")
    model.preprocess = lambda image: tiny.preprocess(image.resize((160, 160)))
    images = {"tower": "vision", "text": "prompts", "items": 4}
    found = run(tmp_path / "s", model=model, **images).vision
    assert (found.pooling_in("native"), found.pooling_in("joint")) == ("mean", "model")
    with pytest.raises(UserError, match=r"joint_pooling.vision is 'model' there, 'mean' here"):
        run(tmp_path / "s", model=model, pooling="mean", **images)


def test_what_a_gpu_computed_is_told_apart(store, monkeypatch):
    """Without a GPU here: the identity is compared before the model runs."""
    monkeypatch.setattr(VLM, "device", torch.device("cuda"))
    with pytest.raises(UserError, match="device is 'cpu' there, 'cuda' here"):
        run(store)


def test_another_version_of_a_library_is_told_apart(store, monkeypatch):
    module = sys.modules[extract.__module__]
    monkeypatch.setattr(module, "version", lambda package: f"{package} 0")
    with pytest.raises(UserError, match="versions.open_clip is .* 'open_clip_torch 0' here"):
        run(store)


def test_other_weights_of_the_same_name_are_told_apart(store):
    other = tiny.model(seed=2)
    other.weights = MODEL.weights
    with pytest.raises(UserError, match="weights_hash is '[0-9a-f]{18}…"):
        run(store, model=other)


def _other_end(clip):
    clip.text_pool_type, clip.text_eos_id = "eos", 7


def _seen_both_ways(clip):
    clip.attn_mask = None


def _other_activation(clip):
    for block in clip.visual.transformer.resblocks:
        block.mlp.gelu = nn.Tanh()


def _fewer_heads(clip):
    for block in clip.visual.transformer.resblocks:
        block.attn.num_heads, block.attn.head_dim = 1, block.attn.embed_dim


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (_other_activation, "visual without weights.*Tanh"),
        (_fewer_heads, "visual num_heads"),
        (_other_end, "end is absent there, .*7.* here"),
        (_seen_both_ways, "causal is absent there, .*False.* here"),
    ],
)
def test_equal_weights_that_compute_otherwise_are_told_apart(change, what, store):
    """As of two configurations of one file of weights."""
    other = tiny.model()
    change(other.clip)
    assert other.weights_hash == MODEL.weights_hash
    with pytest.raises(UserError, match=rf"structure.{what}"):
        run(store, model=other)


def test_a_text_tower_of_its_own_that_sees_what_follows_is_told_apart(tmp_path):
    model, other = tiny.model("custom text"), tiny.model("custom text")
    run(tmp_path / "store", model=model)
    other.clip.text.attn_mask = None
    assert other.weights_hash == model.weights_hash
    with pytest.raises(UserError, match="structure.text causal is absent there, .*False.* here"):
        run(tmp_path / "store", model=other)


def test_other_preprocessing_is_told_apart(store):
    other = tiny.model()
    other.preprocess_config = {"mean": 0.4}
    with pytest.raises(UserError, match="preprocessing.mean is absent there, 0.4 here"):
        run(store, model=other)


def test_a_transform_in_place_of_the_models_own_is_told_apart(store):
    """What the model's configuration says of its own is then not what is done."""

    def own(image):
        return tiny.preprocess(image)

    def darker(image):
        return tiny.preprocess(image) - 0.5

    assigned = tiny.model()
    assigned.preprocess = darker
    for other in (assigned, replace(tiny.model(), preprocess=darker)):
        with pytest.raises(UserError, match=r"preprocessing.makes is '[0-9a-f]{16}' there, "):
            run(store, model=other)
    assert len(run(store, model=replace(tiny.model(), preprocess=own)).vision) == 22


def test_functions_of_one_name_that_prepare_otherwise_are_told_apart(tmp_path):
    """As of a cell of a notebook that was changed and run again."""

    def prepared(scale):
        def prepare(image):
            return tiny.preprocess(image) * scale

        return wrap_model(tiny.build("clip"), prepare, tiny.tokenizer)

    run(tmp_path / "s", model=prepared(1.0))
    assert len(run(tmp_path / "s", model=prepared(1.0)).vision) == 22
    with pytest.raises(UserError, match=r"preprocessing.makes is '[0-9a-f]{16}' there"):
        run(tmp_path / "s", model=prepared(0.5))


@pytest.mark.parametrize(
    "draw",
    [
        lambda: int(torch.randint(2, ())),
        lambda: random.randint(0, 1),
        lambda: np.random.randint(2),
    ],
)
def test_a_transform_that_draws_is_refused_and_nothing_moves(draw):
    """As that of a training, which `create_model_and_transforms` returns before the other."""

    def flip(image):
        return tiny.preprocess(image).flip(-1) if draw() else tiny.preprocess(image)

    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    with pytest.raises(UserError, match="something else of the same image each time.*the last"):
        described(flip)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()
    assert described(lambda image: image["pixels"])["makes"] == ""


def test_another_tokenizer_of_the_same_texts_is_told_apart(tmp_path):
    model, other = tiny.model(), tiny.model()
    other.tokenizer = lambda texts: tiny.tokenizer([text.swapcase() for text in texts])
    run(tmp_path / "s", model=model)
    with pytest.raises(UserError, match="tokens is '[0-9a-f]{16}' there"):
        run(tmp_path / "s", model=other)
    for one in (model, other):  # where texts play no part
        run(tmp_path / "v", model=one, tower="vision", text="prompts")


def test_a_tokenizer_that_cuts_texts_off_sooner_is_told_apart(tmp_path):
    """Of one vocabulary: its ids alone say nothing of where texts end."""
    clip = build_clip(tiny.config(text={"vocab_size": 49408}), seed=0)
    read = open_clip.SimpleTokenizer()
    whole, cut = (
        wrap_model(clip, tiny.preprocess, partial(read, context_length=length), name="one")
        for length in (12, 8)
    )
    texts = {"text": "prompts", "tower": "text", "template": "a photo of one very old and big {}"}
    made = run(tmp_path / "s", model=whole, **texts)
    assert not np.array_equal(run(None, model=cut, **texts).text["proj"], made.text["proj"])
    with pytest.raises(UserError, match="tokens is absent there"):
        run(tmp_path / "s", model=cut, **texts)
    for model in (whole, cut):  # short texts are the same
        run(tmp_path / "short", model=model, tower="text", text="prompts", texts=["a", "b", "c"])


def test_texts_of_several_lines_are_those_of_their_images(tmp_path):
    """One after the other, two lists of texts may be the same lines."""
    model = tiny.model()
    model.tokenizer = open_clip.SimpleTokenizer(context_length=12)  # whose tokens are not told
    model.tokenize = lambda texts: tiny.tokenizer(texts)
    images = [np.zeros((32, 32, 3), np.uint8)] * 2
    given = {"text": "captions", "progress": False, "out": tmp_path / "s"}
    extract(model, images, texts=["a\nb", "c"], **given)
    with pytest.raises(UserError, match="texts_hash is "):
        extract(model, images, texts=["a", "b\nc"], **given)


def test_weights_that_change_through_data_are_told_apart(store):
    """As averages and merges of weights do, which PyTorch does not count as changes in place."""
    model = tiny.model()
    before = model.weights_hash
    assert before == MODEL.weights_hash
    weight = model.clip.visual.transformer.resblocks[0].mlp.c_fc.weight
    for change in (lambda w: w.mul_(1.5), lambda w: w.copy_(w.flip(0)), lambda w: w[3, 5].add_(1)):
        change(weight.data)
        assert model.weights_hash not in (before, MODEL.weights_hash)
        before = model.weights_hash
    with pytest.raises(UserError, match="weights_hash is "):
        run(store, model=model)


def _lora(alpha, **more):
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=2, lora_alpha=alpha, init_lora_weights=False,
        target_modules=r"visual.*resblocks\.1\.mlp\.c_fc", **more,
    )  # fmt: skip
    return peft.get_peft_model(tiny.build("clip"), config)


def test_adapters_of_peft_are_told_apart_by_factor_and_by_which_act(tmp_path):
    """None of it is a weight."""

    def features(module, out=tmp_path / "s"):
        model = wrap_model(module, tiny.preprocess, tiny.tokenizer)
        return run(out, model=model).vision.array("3")

    module = _lora(4)
    first = features(module)
    np.testing.assert_array_equal(features(_lora(4)), first)
    with pytest.raises(UserError, match=r"structure.visual adapters is .*default × 2"):
        features(_lora(16))
    assert abs(features(_lora(16), None) - first).max() > 1e-3
    with module.disable_adapter(), pytest.raises(UserError, match="structure.visual adapters"):
        features(module)
    two = _lora(4)
    torch.manual_seed(1)
    two.add_adapter("second", two.peft_config["default"])
    known = wrap_model(two, tiny.preprocess, tiny.tokenizer).identity()
    two.set_adapter("second")
    now = wrap_model(two, tiny.preprocess, tiny.tokenizer).identity()
    assert now["weights_hash"] == known["weights_hash"] and now != known


def test_a_model_with_an_adapter_attached_is_not_stored(tmp_path):
    model = tiny.model()
    handle = model.clip.visual.ln_post.register_forward_hook(lambda *_: None)
    with pytest.raises(UserError, match=r"visual.ln_post has a hook .an attached adapter"):
        run(tmp_path / "s", model=model)
    assert len(run(None, model=model).vision) == 22
    summed = partial(stream, model, tiny.DrawnManifest(), "train", batch_size=8, progress=False)
    with pytest.raises(UserError, match=r"visual.ln_post has a hook .an attached adapter"):
        summed(out=tmp_path / "sums")
    assert summed().datasets["drawn"].n == 22
    handle.remove()
    assert summed(out=tmp_path / "sums").datasets["drawn"].n == 22
    assert len(run(tmp_path / "s", model=model).vision) == 22


def test_unfinished_work_of_another_identity_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "s", Interrupted())
    with pytest.raises(UserError, match=r"s.partial belongs to another extraction: precision"):
        run(tmp_path / "s", precision="bf16")


def test_identities_are_compared_field_by_field():
    one = {"a": 1, "b": {"c": 2, "d": 3}}
    assert differing_field(one, {"b": {"d": 3, "c": 2}, "a": 1}) is None
    assert differing_field(one, {"a": 1, "b": {"c": 2, "d": 4}}) == "b.d is 3 there, 4 here"
    assert differing_field(one, {"a": 1, "b": {"c": 2}}) == "b.d is 3 there, absent here"


FILES = ["store.json", "vision/items.json", "vision/native/embed.npy", "text/joint/3.npy"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0.01, 0.9])
def test_a_flipped_byte_is_detected_and_the_file_named(store, name, where):
    file = store / name
    data = bytearray(file.read_bytes())
    data[int(where * (len(data) - 1))] ^= 0x01
    file.write_bytes(data)
    for attempt in (lambda: open_features(store), lambda: run(store)):
        with pytest.raises(DamagedStore) as caught:
            attempt()
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0.0, 0.999])
def test_a_truncated_file_is_detected_without_reading_checksums(store, name, keep):
    file = store / name
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(DamagedStore, match="bytes, expected|is damaged") as caught:
        open_features(store, verify=False)
    assert str(file) in str(caught.value)


def test_a_missing_array_a_missing_store_and_another_format(store):
    (store / "vision" / "native" / "2.npy").unlink()
    with pytest.raises(DamagedStore, match=r"2.npy is missing from the store; delete"):
        open_features(store)
    with pytest.raises(UserError, match="nowhere is not there; run `vlmlayers extract` first"):
        open_features(store.parent / "nowhere")
    assert not FeatureStore.exists(store.parent / "nowhere")
    from vlmlayers.features.store import record_checksum

    record = json.loads((store / "store.json").read_text())
    record.pop("checksum")
    record["format"] = 99
    record["checksum"] = record_checksum(record)
    (store / "store.json").write_text(json.dumps(record))
    with pytest.raises(DamagedStore, match="has format 99, expected 1"):
        open_features(store)


def _interrupted(folder):
    with pytest.raises(KeyboardInterrupt):
        run(folder, Interrupted())  # two batches of four are done
    return partial_folder(folder)


@pytest.mark.parametrize(
    "damage",
    ["flip", "truncate", "remove", "journal cut", "journal junk", "journal gone", "stale sidecar"],
)
def test_unfinished_work_that_is_damaged_is_done_again(whole, tmp_path, damage):
    partial = _interrupted(tmp_path / "s")
    array, journal = partial / "rows/vision/native/2.npy", partial / "journal.0.jsonl"
    if damage == "flip":
        data = bytearray(array.read_bytes())
        data[128 + 3] ^= 0x10
        array.write_bytes(data)
    elif damage == "truncate":
        array.write_bytes(array.read_bytes()[:300])
    elif damage == "remove":
        array.unlink()
    elif damage == "journal cut":
        journal.write_bytes(journal.read_bytes()[:-7])
    elif damage == "journal junk":
        journal.write_bytes(b'\xff\x00{"tower"\n[1]\n{"batch": 1}\n' + journal.read_bytes())
    elif damage == "journal gone":
        journal.unlink()
    else:
        (partial / "rows" / "store.json").write_text("{}")
    run(tmp_path / "s")
    assert content(tmp_path / "s") == content(whole)


def test_a_damaged_identity_of_unfinished_work_is_named(tmp_path):
    partial = _interrupted(tmp_path / "s")
    (partial / "identity.json").write_text("{")
    with pytest.raises(DamagedStore, match=r"identity.json is damaged"):
        run(tmp_path / "s")


def test_unreadable_images_keep_the_work_and_are_tried_again(whole, tmp_path):
    broken = {"train/005.png"}
    with pytest.raises(UserError, match="1 of 22 images of drawn cannot be read"):
        run(tmp_path / "s", tiny.DrawnManifest(broken=broken))
    repaired = tiny.DrawnManifest()
    run(tmp_path / "s", repaired)
    assert repaired.opened == [f"train/{i:03d}.png" for i in (4, 5, 6, 7)]
    assert content(tmp_path / "s") == content(whole)


def test_captions_stay_with_their_images_where_others_are_left_out(tmp_path):
    broken = {f"train/{row:03d}.png" for row in (0, 5, 6)}
    found = run(tmp_path / "s", tiny.DrawnManifest(broken=broken), skip_unreadable=True)
    images = [int(Path(one).stem) for one in found.vision.ids]
    assert images == [row for row in range(22) if row not in (0, 5, 6)]
    told = [int(caption.split()[1]) for caption in found.text.ids]  # "first 7" is of image 7
    assert len(told) == 2 * 19 and [images[row] for row in found.text.pairs] == told


def test_many_stores_hold_few_files_open(whole, tmp_path):
    """A store of 12 + 12 blocks has 58 arrays; a system often allows 256 open files, or 1024."""
    stores = [Path(shutil.copytree(whole, tmp_path / f"{number}")) for number in range(20)]
    arrays = sum(1 for store in stores for _ in store.rglob("*.npy"))
    most = len(list(Path("/proc/self/fd").iterdir())) + 80
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert arrays > 2 * most
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, allowed[1]))
    try:
        features = [replace(open_features(store), dataset=store.name) for store in stores]
        total = 0.0
        for member in features:
            for tower in member.towers:
                for space in tower.spaces:
                    total += sum(tower.array(p, space).sum() for p in tower.positions(space))
        scored = score(features, ["class_accuracy_ncm"], jobs=1, bootstrap=20, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, allowed)
    assert np.isfinite(total) and len(scored)


def test_a_store_that_is_deleted_under_its_features_is_named(store):
    features = open_features(store)
    shutil.rmtree(store)
    with pytest.raises(DamagedStore, match=r"1\.npy cannot be read any more"):
        features.vision.array("1")


def test_a_store_without_unreadable_images_says_so(tmp_path, caplog):
    broken = {"train/001.png", "train/010.png"}
    manifest = tiny.DrawnManifest(broken=broken)
    stored = run(tmp_path / "s", manifest, skip_unreadable=True)
    memory = run(None, manifest, skip_unreadable=True)
    assert stored.vision.ids == memory.vision.ids
    assert stored.text.pairs.tolist() == memory.text.pairs.tolist()
    assert (stored.vision.array("3") == memory.vision.array("3")).all()
    assert (stored.text.array("3", "joint") == memory.text.array("3", "joint")).all()
    caplog.clear()
    assert len(run(tmp_path / "s", manifest, skip_unreadable=True).vision) == 20
    assert "2 of 22 images of drawn cannot be read and are left out, first train/001" in caplog.text
    with pytest.raises(UserError, match="leaves out 2 unreadable images; allow it with skip"):
        run(tmp_path / "s", manifest)


def test_a_folder_with_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not a feature store; choose another"):
        run(tmp_path)
    with pytest.raises(UserError, match="exists and is not a feature store"):
        run(tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not partial_folder(tmp_path).exists()
    (tmp_path / "empty").mkdir()
    assert len(run(tmp_path / "empty").vision) == 22


def test_two_processes_on_one_store_are_told_apart(tmp_path):
    class Second(tiny.DrawnManifest):
        def open_image(self, item, root=None, size=None):
            if not self.opened:
                with pytest.raises(UserError, match="another process is writing"):
                    run(tmp_path / "s", tiny.DrawnManifest(), model=tiny.model())
            return super().open_image(item, root, size)

    assert len(run(tmp_path / "s", Second()).vision) == 22


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_failing_disk_gives_one_line_and_keeps_the_work(whole, tmp_path, monkeypatch, number):
    real, calls = Path.open, []

    def fail(path, mode="r", *args, **options):
        if mode == "r+b":
            calls.append(path)
            if len(calls) > 40:
                raise OSError(number, os.strerror(number))
        return real(path, mode, *args, **options)

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(UserError, match="cannot write .*start again, what is done") as caught:
        run(tmp_path / "s")
    assert os.strerror(number) in str(caught.value)
    assert ("free space" in str(caught.value)) == (number == errno.ENOSPC)
    monkeypatch.setattr(Path, "open", real)
    rest = tiny.DrawnManifest()
    run(tmp_path / "s", rest)
    assert 0 < len(rest.opened) < 22
    assert content(tmp_path / "s") == content(whole)


def test_too_little_space_shows_before_the_first_image(tmp_path, monkeypatch):
    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    manifest = tiny.DrawnManifest()
    with pytest.raises(UserError, match="No space left on device; free space"):
        run(tmp_path / "s", manifest)
    assert manifest.opened == []


def test_a_real_small_file_system_that_fills_up(small_disk, tmp_path):
    with pytest.raises(UserError, match="free space and start again"):
        run(small_disk / "s")
    remount(small_disk, "size=4m")
    assert len(run(small_disk / "s").vision) == 22
    remount(small_disk, "ro")
    assert len(run(small_disk / "s").vision) == 22  # a whole store needs no writing
    with pytest.raises(UserError, match="Read-only file system; choose a folder that can"):
        run(small_disk / "t")


def test_an_atomic_write_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    file = tmp_path / "x.json"
    atomically(file, lambda part: part.write_bytes(b"old"))

    def fail(_descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match="cannot write .*x.json: Input/output error"):
        atomically(file, lambda part: part.write_bytes(b"new"))
    assert file.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_lost_batch_is_a_fault_and_no_store(tmp_path, monkeypatch):
    real = StoreWriter.put
    monkeypatch.setattr(
        StoreWriter,
        "put",
        lambda self, tower, batch, *rest: None if batch == 2 else real(self, tower, batch, *rest),
    )
    with pytest.raises(RuntimeError, match=r"batches .2. of vision are missing"):
        run(tmp_path / "s")
    assert not FeatureStore.exists(tmp_path / "s")


def test_a_data_root_that_disappears_loses_nothing(whole, tmp_path):
    class Gone(tiny.DrawnManifest):
        def open_image(self, item, root=None, size=None):
            if len(self.opened) >= 8:
                raise FileNotFoundError(2, "No such file or directory", item.path)
            return super().open_image(item, root, size)

    with pytest.raises(UserError, match="14 of 22 images of drawn cannot be read"):
        run(tmp_path / "s", Gone())
    rest = tiny.DrawnManifest()
    run(tmp_path / "s", rest)
    assert len(rest.opened) == 14
    assert content(tmp_path / "s") == content(whole)


# Processes of their own


def start(*arguments, processes=1):
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(HERE),
    }
    command = [sys.executable]
    if processes > 1:
        command += [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(processes),
        ]
    return subprocess.Popen(
        [*command, str(HERE.parent / "extract_process.py"), *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(process, timeout=500):
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output.decode(errors="replace")


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single") / "store"
    code, output = finish(start(folder))
    assert code == 0, output
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_give_the_same_bytes(single, tmp_path, processes):
    code, output = finish(start(tmp_path / "s", processes=processes))
    assert code == 0, output
    assert content(tmp_path / "s") == content(single)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(3, 3), (3, 2), (2, 1)])
def test_one_of_several_processes_is_killed_and_the_run_resumes(single, tmp_path, first, then):
    code, output = finish(start(tmp_path / "s", 43, 6, processes=first))
    assert code != 0
    assert "SIGKILL" in output or "Signal 9" in output
    assert not FeatureStore.exists(tmp_path / "s")
    assert list(partial_folder(tmp_path / "s").glob("journal.*.jsonl"))
    code, output = finish(start(tmp_path / "s", processes=then))
    assert code == 0, output
    assert content(tmp_path / "s") == content(single)


@pytest.mark.slow
def test_twenty_kills_at_random_moments_lose_nothing(single, tmp_path):
    """SIGKILL after a random time, twenty times in a row, then a start that is left to finish."""
    rng, kills = random.Random(7), 0
    began = time.monotonic()
    finish(start(tmp_path / "t", 4))
    took = time.monotonic() - began + 3.0  # imports and model, then 43 images
    while kills < 20:
        began = time.monotonic()
        process = start(tmp_path / "s", 43, 0, 0.08)
        try:
            # Half of it is imports, and a kill before their end is a kill of nothing.
            process.communicate(timeout=took * rng.uniform(0.5, 1.1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
        else:  # it finished: start over, by the pace of a machine that may be less busy now
            assert content(tmp_path / "s") == content(single)
            shutil.rmtree(tmp_path / "s")
            took = time.monotonic() - began
    code, output = finish(start(tmp_path / "s"))
    assert code == 0, output
    assert content(tmp_path / "s") == content(single)


@pytest.mark.parametrize("part", ["tower", "space", "texts"])
def test_a_saved_part_of_an_extraction_does_not_pass_for_the_whole(part, tmp_path):
    whole = run(tmp_path / "whole")
    native = {
        tower.tower: replace(tower, arrays={"native": tower.arrays["native"]})
        for tower in whole.towers
    }
    less = {
        "tower": replace(whole, vision=None),
        "space": replace(whole, **native),
        "texts": replace(whole, text=whole.text.take([0, 2])),
    }[part]
    less.save(tmp_path / "part")
    assert less.save(tmp_path / "part"), "the same again"
    with pytest.raises(UserError, match="belongs to another extraction: part is"):
        run(tmp_path / "part")
    assert whole.save(tmp_path / "copy") and len(run(tmp_path / "copy").text) == len(whole.text)
