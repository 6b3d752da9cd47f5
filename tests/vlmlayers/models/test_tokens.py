"""Tokens by themselves: pooled by hand they are the features that are recorded pooled."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
import transformers_models
from PIL import Image

from vlmlayers.errors import UserError
from vlmlayers.features import LayerFeatures
from vlmlayers.models import Recorder, extract, find_towers, work, wrap_model
from vlmlayers.models.load import build_clip
from vlmlayers.scores import score
from vlmlayers.scores.projection import nearest, project

SPACES = ("native", "normed", "joint")
NORM_AFTER = ("norm after pool", "timm vit registers")  # the pool
FAMILIES = ["clip", "clipa", "norm after pool", "first", "custom text", "timm vit registers",
            "timm vit map", "timm eva"]  # fmt: skip


def _tokens(tower, batch, spaces=SPACES):
    with Recorder(tower, spaces, "tokens") as recorder:
        return recorder.without_padding(recorder(batch))


def _pooled(tower, batch, pooling, spaces=("native",)):
    with Recorder(tower, spaces, pooling) as recorder:
        return recorder(batch)


@pytest.mark.parametrize("family", FAMILIES)
def test_mean_and_picked_tokens_are_the_pooled_features(family):
    clip = tiny.build(family)
    for side, batch in (("vision", tiny.images(clip)), ("text", tiny.token_ids())):
        tower = find_towers(clip)[side]
        found = _tokens(tower, batch)
        mean = _pooled(tower, batch, "mean", SPACES)
        own = _pooled(tower, batch, None, SPACES)
        assert "proj" not in found["native"] and "proj" not in found["joint"]
        for space in SPACES:
            for position, values in found[space].items():
                normed = space != "native" or position == "final"
                if family in NORM_AFTER and side == "vision" and normed:
                    continue  # a norm of each token and of their mean are two things
                words = values[:, tower.prefix :]
                np.testing.assert_allclose(
                    np.nanmean(words, axis=1), mean[space][position], rtol=1e-3, atol=1e-4
                )
                if tower.pooling == "cls":
                    np.testing.assert_allclose(
                        values[:, 0], own[space][position], rtol=1e-3, atol=1e-4
                    )
                if tower.pooling == "eot":
                    last = np.isfinite(values[..., 0]).sum(1) - 1
                    np.testing.assert_allclose(
                        values[range(3), last], own[space][position], rtol=1e-3, atol=1e-4
                    )


def test_the_mean_of_a_text_leaves_out_the_class_token_behind_it():
    tower, lengths = find_towers(tiny.build("coca"))["text"], (3, 6, 4)
    seen = []
    handle = tower.blocks[0].register_forward_hook(lambda _m, _a, out: seen.append(out))
    mean = _pooled(tower, tiny.token_ids(lengths), "mean")["native"]["1"]
    handle.remove()
    assert seen[-1].shape[1] == 13  # of 12 words and a class token
    words = [text[:length].mean(0) for text, length in zip(seen[-1], lengths, strict=True)]
    np.testing.assert_allclose(torch.stack(words).detach(), mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", transformers_models.KINDS[:-1])
def test_towers_of_transformers_give_their_hidden_states(kind):
    model = transformers_models.build(kind)
    tower = find_towers(model)["vision"]
    found = _tokens(tower, transformers_models.images())["native"]
    with torch.inference_mode():
        states = model.vision_model(
            pixel_values=transformers_models.images(), output_hidden_states=True
        ).hidden_states
    for position, expected in zip(["embed", "1", "2", "3", "4"], states):
        np.testing.assert_allclose(found[position], expected.numpy(), atol=1e-4)
    text = find_towers(model)["text"]
    ids = transformers_models.token_ids(kind)
    kept = np.isfinite(_tokens(text, ids)["native"]["1"][..., 0]).sum(1)
    assert list(kept) == ([4, 5, 6, 7, 8] if text.ends else [3, 4, 5, 6, 7])  # with the end mark


def test_packed_images_have_nan_where_they_have_no_patch():
    model = transformers_models.build("Siglip2")
    from vlmlayers.models.transformers_towers import pack

    packed = pack(transformers_models.patches())
    found = _tokens(find_towers(model)["vision"], packed)["native"]["2"]
    assert list(np.isfinite(found[..., 0]).sum(1)) == [16, 10, 9]


def test_extraction_keeps_no_tokens_that_pad_images():
    """In batches of one, of which the next is under way while the last is written."""
    siglip = transformers_models.build("Siglip2")
    model = wrap_model(siglip, tokenizer=tiny.tokenizer, random_weights=True)
    images = [Image.new("RGB", (64, height), "red") for height in (20, 64, 100)]
    there = [model.towers["vision"].valid(model.preprocess(one)[None])[0] for one in images]
    options = {"pooling": "tokens", "tower": "vision", "batch_size": 1, "progress": False}
    for values in extract(model, images, **options).vision.arrays["native"].values():
        np.testing.assert_array_equal(np.isfinite(values[..., 0]), torch.stack(there))
    assert [int(one.sum()) for one in there][1] == 16 > int(there[0].sum())


def test_extraction_names_tokens_and_its_store_keeps_them(tmp_path):
    model = tiny.model()
    options = {"items": 6, "pooling": "tokens", "progress": False, "spaces": SPACES}
    made = extract(model, tiny.DrawnManifest(), "train", **options)
    stored = extract(model, tiny.DrawnManifest(), "train", out=tmp_path / "store", **options)
    again = LayerFeatures.load(tmp_path / "store")
    saved = LayerFeatures.load(made.save(tmp_path / "saved"))
    assert made.vision.tokens[:6] == (
        "cls", "patch 1,1", "patch 1,2", "patch 1,3", "patch 1,4", "patch 2,1",
    )  # fmt: skip
    assert made.text.tokens == tuple(f"token {n}" for n in range(1, 13))
    assert made.vision["2"].shape == (6, 17, 48)
    assert made.vision.to_numpy().shape == (4, 6, 17, 48)
    for other in (stored, again, saved):
        assert other.vision.tokens == made.vision.tokens
        for tower in ("vision", "text"):
            for position in made[tower].positions("joint"):
                np.testing.assert_array_equal(
                    other[tower].array(position, "joint"), made[tower].array(position, "joint")
                )
    frame = made.text.to_frame("1")
    ends = np.isfinite(made.text[1][..., 0]).sum(1)
    assert frame["token"].tolist() == [f"token {n + 1}" for end in ends for n in range(end)]
    assert frame["id"].tolist() == np.repeat(made.text.ids, ends).tolist()
    assert made.identity["pooling"] == {"vision": "tokens", "text": "tokens"}
    with pytest.raises(UserError, match="belongs to another extraction: pooling"):
        extract(model, tiny.DrawnManifest(), "train", out=tmp_path / "store",
                **{**options, "pooling": "mean"})  # fmt: skip


def test_patches_of_an_oblong_image_are_named_by_row_and_column():
    tower = find_towers(build_clip(tiny.config({"image_size": (32, 64)}), seed=0))["vision"]
    names = tower.token_names(1 + 4 * 8)
    assert names[1] == "patch 1,1" and names[8:10] == ("patch 1,8", "patch 2,1")
    assert names[-1] == "patch 4,8"


def test_tokens_are_named_by_what_they_are():
    for family, names in (
        ("timm vit registers", ("register 1", "patch 1,1")),
        ("timm vit token", ("cls", "patch 1,1")),
    ):
        tower = find_towers(tiny.build(family))["vision"]
        assert tower.token_names(100 + tower.prefix)[:2] == names
    text = find_towers(tiny.build("coca"))["text"]
    assert text.token_names(13)[-2:] == ("token 12", "cls")


def test_what_takes_one_vector_per_item_refuses_tokens():
    made = extract(tiny.model(), tiny.DrawnManifest(), "train", items=6, pooling="tokens",
                   progress=False)  # fmt: skip
    for call in (
        lambda: score(made, ["fisher_ratio"], progress=False),
        lambda: project(made, "1"),
        lambda: nearest(made, 0, count=2),
    ):
        with pytest.raises(UserError, match="are of tokens, .* extract with pooling='mean'"):
            call()


def test_tokens_of_too_many_items_and_of_stages_are_refused(monkeypatch):
    monkeypatch.setattr(work, "MOST_TOKEN_BYTES", 200_000)
    with pytest.raises(
        UserError, match=r"of 22 items of the vision tower .* at most \d+ with items"
    ):
        extract(tiny.model(), tiny.DrawnManifest(), "train", pooling="tokens", progress=False)
    for family in ("resnet", "timm convnext"):
        with pytest.raises(UserError, match="no 'tokens' pooling; it has"):
            Recorder(find_towers(tiny.build(family))["vision"], pooling="tokens")
    with pytest.raises(UserError, match="tokens have native space only"):
        Recorder(find_towers(tiny.build("coca"))["vision"], pooling="tokens")
    with pytest.raises(UserError, match="unknown pooling 'tokns'; did you mean 'tokens'"):
        extract(tiny.model(), tiny.DrawnManifest(), "train", pooling="tokns")


def test_an_image_that_cannot_be_read_is_left_out_of_tokens_too(tmp_path):
    manifest = tiny.DrawnManifest(broken={"train/003.png"})
    options = {"items": 22, "pooling": "tokens", "progress": False, "skip_unreadable": True}
    kept = extract(tiny.model(), manifest, "train", out=tmp_path / "store", **options)
    held = extract(tiny.model(), manifest, "train", **options)
    assert kept.vision["1"].shape == held.vision["1"].shape == (21, 17, 48)
    np.testing.assert_array_equal(kept.vision["1"], held.vision["1"])
