"""Attention of each head: against weights that the model gives out, and by hand."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import tiny
import torch
import transformers
import transformers_models

from vlmlayers.errors import UserError
from vlmlayers.metrics import attention_distance, attention_entropy
from vlmlayers.models import Recorder, extract, find_towers
from vlmlayers.models.attention import AttentionWatch, attention, entropy_share
from vlmlayers.plots import layer_curves
from vlmlayers.scores import read_scores, score, write_scores
from vlmlayers.scores.summaries import curves

BOTH = ("attention_entropy", "attention_distance")


def _recorded(tower, batch, spaces=BOTH):
    with Recorder(tower, spaces) as recorder:
        return recorder(batch)


def _by_hand(weights, places, words, inside):
    """Return entropy and distance of one item, (head,), from (head, query, key), loop by loop."""
    entropy, distance = [], []
    for head in weights:
        found = uniform = far = far_uniform = 0.0
        for q in words:
            p = head[q]
            seen = np.flatnonzero(p > 0)
            found += -(p[seen] * np.log(p[seen])).sum()
            uniform += np.log(len(seen))
        for q in (q for q in words if q in inside):
            keys = [k for k in inside if head[q, k] > 0 and k in words]
            apart = [np.hypot(*(np.subtract(places[q], places[k]))) for k in keys]
            p = head[q, keys]
            far += (p * apart).sum() / p.sum()
            far_uniform += np.mean(apart)
        entropy.append(found / uniform)
        distance.append(far / far_uniform)
    return entropy, distance


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_heads_of_transformers_are_those_of_the_weights_it_gives_out(kind):
    model = transformers_models.build(kind)
    tower = find_towers(model)["vision"]
    images = transformers_models.images()
    found = _recorded(tower, images)
    eager = (
        getattr(transformers, type(model).__name__)
        ._from_config(model.config, attn_implementation="eager")
        .eval()
    )
    eager.load_state_dict(model.state_dict())
    with torch.inference_mode():
        weights = eager.vision_model(pixel_values=images, output_attentions=True).attentions
    if weights is None or weights[0] is None:
        pytest.skip("this version of transformers gives out no weights")
    grid = [(row, column) for row in range(4) for column in range(4)]
    places = [None] * tower.prefix + grid
    inside = range(tower.prefix, tower.prefix + 16)
    for block, each in enumerate(weights, start=1):
        for item, one in enumerate(each.numpy()):
            entropy, distance = _by_hand(one, places, range(len(places)), inside)
            assert found[BOTH[0]][str(block)][item] == pytest.approx(entropy, rel=1e-4)
            assert found[BOTH[1]][str(block)][item] == pytest.approx(distance, rel=1e-4)


def test_heads_of_open_clip_by_hand_in_a_causal_text():
    clip = tiny.build("clip")
    tower, ids = find_towers(clip)["text"], tiny.token_ids()
    found = _recorded(tower, ids)
    block = tower.blocks[1]
    inputs = []
    handle = block.register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    with torch.inference_mode():
        clip.encode_text(ids)
        handle.remove()
        x = block.ln_1(inputs[0])
        q, k, _ = (x @ block.attn.in_proj_weight.T + block.attn.in_proj_bias).chunk(3, -1)
        heads = [t.unflatten(-1, (2, 16)).transpose(1, 2) for t in (q, k)]
        raw = heads[0] @ heads[1].transpose(-1, -2) / 4.0
        raw = raw.masked_fill(torch.ones(12, 12).triu(1).bool(), -torch.inf)
        weights = raw.softmax(-1).numpy()
    places = [(0, n) for n in range(12)]
    for item, length in enumerate((3, 6, 4)):
        entropy, distance = _by_hand(weights[item], places, range(length), range(12))
        assert found[BOTH[0]]["2"][item] == pytest.approx(entropy, rel=1e-4)
        assert found[BOTH[1]]["2"][item] == pytest.approx(distance, rel=1e-4)


@pytest.mark.parametrize(
    "family", ["clip", "clipa", "custom text", "coca", "timm vit registers", "timm vit map",
               "timm eva"]
)  # fmt: skip
def test_every_family_with_blocks_shows_its_heads_and_keeps_its_features(family):
    clip = tiny.build(family)
    for side, batch in (("vision", tiny.images(clip)), ("text", tiny.token_ids())):
        tower = find_towers(clip)[side]
        found = _recorded(tower, batch, ("native", *BOTH))
        plain = _recorded(tower, batch, ("native",))["native"]
        for position, values in found["native"].items():
            np.testing.assert_allclose(values, plain[position], atol=1e-4)
        for space in BOTH:
            assert list(found[space]) == [str(b) for b in range(1, tower.depth + 1)]
            values = np.stack(list(found[space].values()))
            assert values.ndim == 3 and np.isfinite(values).all() and values.min() > 0
        assert np.stack(list(found[BOTH[0]].values())).max() <= 1 + 1e-6


def test_uniform_attention_is_1_and_attention_to_oneself_is_0():
    clip = tiny.build("clip")
    tower = find_towers(clip)["vision"]
    with torch.no_grad():
        for block in tower.blocks:  # queries of zero
            block.attn.in_proj_weight[:48] = 0
            block.attn.in_proj_bias[:48] = 0
    found = _recorded(tower, tiny.images(clip))
    for space in BOTH:
        np.testing.assert_allclose(found[space]["2"], 1.0, rtol=1e-5)
    with torch.no_grad():  # queries that are their own keys, made long
        for block in tower.blocks:
            block.attn.in_proj_weight[:48] = block.attn.in_proj_weight[48:96] * 300
            block.attn.in_proj_weight[48:96] *= 300
    sharp = _recorded(tower, tiny.images(clip))
    assert sharp["attention_entropy"]["1"].max() < 0.2


@pytest.mark.parametrize("masked", ["causal", "boolean", "added", "none", "grouped"])
def test_weights_reproduce_what_pytorch_makes_of_the_same_arguments(masked):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 5, 8, generator=generator) for _ in range(3))
    options = {
        "causal": {"is_causal": True},
        "boolean": {"attn_mask": torch.ones(5, 5).tril(1).bool()},
        "added": {"attn_mask": torch.randn(5, 5, generator=generator), "scale": 0.3},
        "grouped": {"enable_gqa": True},
        "none": {},
    }[masked]
    if masked == "grouped":
        k, v = k[:, :2], v[:, :2]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)
    values = v.repeat_interleave(2, 1) if masked == "grouped" else v
    torch.testing.assert_close(attention(q, k, v, **options)[0] @ values, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("masked", ["causal", "boolean", "added", "least", "none"])
def test_keys_whose_weights_round_to_nothing_are_seen(masked, dtype):
    """How far uniform attention reaches is a matter of the mask; weights of 0 are no mask."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 8, generator=draw).to(dtype) for _ in range(3))
    q[..., -1, :] *= 300
    tril = torch.ones(5, 5).tril().bool()
    hidden = torch.finfo(dtype).min if masked == "least" else -torch.inf
    added = torch.zeros(5, 5, dtype=dtype).masked_fill(~tril, hidden)
    options = {"causal": {"is_causal": True}, "boolean": {"attn_mask": tril}, "none": {}}.get(
        masked, {"attn_mask": added}
    )
    found = []
    with AttentionWatch(lambda weights, seen: found.append((weights, seen))):
        torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)
    ((weights, seen),) = found
    truth = tril if masked != "none" else torch.ones(5, 5).bool()
    assert (weights[..., truth] == 0).any()
    assert torch.equal(seen.expand_as(weights), truth.expand_as(weights))
    share = entropy_share(weights, seen, None, None)
    w = weights.double().numpy()
    entropy = -np.where(w > 0, w * np.log(np.where(w > 0, w, 1)), 0).sum((2, 3))
    np.testing.assert_allclose(share, entropy / np.log(truth.sum(1).numpy()).sum(), rtol=1e-4)


@pytest.mark.parametrize("masked", ["boolean", "added", "of heads", "padding", "padding added"])
def test_keys_that_multi_head_attention_hides_are_told_by_its_masks(masked):
    draw = torch.Generator().manual_seed(0)
    module = torch.nn.MultiheadAttention(24, 3, batch_first=True).eval()
    with torch.no_grad():
        module.in_proj_weight.copy_(torch.randn(72, 24, generator=draw))
    x = 5 * torch.randn(2, 5, 24, generator=draw)
    tril = torch.ones(5, 5).tril().bool()
    added = torch.zeros(5, 5).masked_fill(~tril, -torch.inf)
    short = torch.tensor([[False] * 5, [False, False, False, True, True]])
    options, truth = {
        "boolean": ({"attn_mask": ~tril}, tril),
        "added": ({"attn_mask": added}, tril),
        "of heads": ({"attn_mask": added.repeat(6, 1, 1)}, tril),
        "padding": ({"key_padding_mask": short}, ~short[:, None, None]),
        "padding added": (
            {"key_padding_mask": torch.zeros(2, 5).masked_fill(short, -torch.inf)},
            ~short[:, None, None],
        ),
    }[masked]
    found = []
    with torch.inference_mode(), AttentionWatch(lambda *one: found.append(one)):
        module(x, x, x, need_weights=False, **options)
    ((weights, seen),) = found
    assert (weights[truth.expand_as(weights)] == 0).any()
    assert torch.equal(seen.expand_as(weights), truth.expand_as(weights))


def test_scores_are_rows_of_heads_with_intervals_and_curves_their_mean(tmp_path):
    features = extract(
        tiny.model(), tiny.DrawnManifest(), "train", spaces=("native", *BOTH), progress=False
    )
    scores = score(features, list(BOTH), bootstrap=50, progress=False)
    x = features.vision.array("2", "attention_entropy")
    rows = scores[(scores["metric"] == BOTH[0]) & (scores["tower"] == "vision")
                  & (scores["position"] == "2")]  # fmt: skip
    heads = [int(o.split("head=")[1].split(";")[0]) for o in rows["options"]]
    assert heads == [1, 2, 3] and len(x) == 22
    np.testing.assert_allclose(rows["value"], x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(attention_entropy(x), x.mean(0), rtol=1e-6)
    assert (rows["low"] < rows["value"]).all() and (rows["value"] < rows["high"]).all()
    assert set(scores["null"]) == {1.0} and set(scores["n"]) == {22, 3}
    drawn = curves(scores, "attention_entropy").set_index(["tower", "position"])
    row = drawn.loc[("vision", "2")]
    assert row["value"] == pytest.approx(x.mean()) and row["low"] == pytest.approx(
        rows["low"].mean()
    )
    write_scores(scores, tmp_path)
    layer_curves(read_scores(tmp_path), metric="attention_distance")
    far = features.text.array("1", "attention_distance")
    np.testing.assert_allclose(attention_distance(far), far.mean(0), rtol=1e-6)


def test_attention_that_cannot_be_seen_or_is_not_there_is_refused():
    features = extract(tiny.model(), tiny.DrawnManifest(), "train", progress=False)
    with pytest.raises(UserError, match="no attention_entropy features were extracted"):
        score(features, ["attention_entropy"], progress=False)
    with pytest.raises(UserError, match="has stages, not blocks"):
        Recorder(find_towers(tiny.build("resnet"))["vision"], BOTH)
    model = transformers_models.build("CLIP")
    model.set_attn_implementation("eager")
    with pytest.raises(UserError, match="makes 0 attentions .* attn_implementation='sdpa'"):
        _recorded(find_towers(model)["vision"], transformers_models.images())
    packed = find_towers(transformers_models.build("Siglip2"))["vision"]
    with pytest.raises(UserError, match="grids of their own"):
        Recorder(packed, BOTH)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Recorder(packed, BOTH[:1]).shapes()[BOTH[0]]["1"] == (4,)
