"""Towers of every family: found, run, and in agreement with the models' own encoders."""

from __future__ import annotations

import json

import open_clip
import pytest
import tiny
import torch
from torch import nn

from vlmlayers.errors import UserError
from vlmlayers.models import Recorder, find_towers
from vlmlayers.models.load import build_clip
from vlmlayers.models.recording import probe
from vlmlayers.positions import tower_positions

ALL = [*tiny.FAMILIES, *(pytest.param(f, marks=pytest.mark.slow) for f in tiny.SLOW_FAMILIES)]


def _encode(clip, x):
    if x.ndim == 4:
        return clip.encode_image(x, normalize=False).detach()
    return clip.encode_text(x, normalize=False).detach()


def _record(tower, x, spaces=("native", "normed", "joint"), pooling=None):
    with Recorder(tower, spaces, pooling) as recorder:
        return recorder(x)


def _close(a, b, scale=1e-5):
    b = b.numpy() if isinstance(b, torch.Tensor) else b
    return a.shape == b.shape and abs(a - b).max() <= scale * max(1.0, abs(b).max())


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("side", ["vision", "text"])
def test_last_block_through_the_head_is_what_the_model_encodes(family, side):
    clip = tiny.build(family)
    tower = find_towers(clip)[side]
    x = tiny.images(clip) if side == "vision" else tiny.token_ids()
    expected = _encode(clip, x)
    found = _record(tower, x)
    assert expected.std() > 1e-3  # a head that collapses would agree with anything
    assert _close(found["joint"][str(tower.depth)], expected)
    assert _close(found["joint"]["proj"], expected)
    assert _close(found["native"]["proj"], expected)


@pytest.mark.parametrize("family", [f for f in tiny.FAMILIES if "timm" not in f])
def test_text_blocks_agree_with_open_clip_forward_intermediates(family):
    clip = tiny.build(family)
    tower, ids = find_towers(clip)["text"], tiny.token_ids()
    if hasattr(clip, "text"):
        oracle = clip.text.forward_intermediates(ids, output_fmt="NLC", output_extra_tokens=True)
    else:
        oracle = clip.forward_intermediates(image=None, text=ids)
    native = _record(tower, ids)["native"]
    assert len(oracle["text_intermediates"]) == tower.depth > 1
    rows = torch.arange(len(ids))
    for block, tokens in enumerate(oracle["text_intermediates"], start=1):
        if tower.suffix:
            picked = oracle["text_intermediates_suffix"][block - 1][:, 0]
        elif tower.pooling == "eot":
            picked = tokens[rows, tower.ends(ids)]
        else:
            picked = tokens[:, 0] if tower.pooling == "cls" else tokens[:, -1]
        assert _close(native[str(block)], picked.detach())


@pytest.mark.parametrize("family", ["clip", "coca", "custom blocks", "norm after pool"])
def test_vision_blocks_agree_with_open_clip_forward_intermediates(family):
    clip = tiny.build(family)
    tower, x = find_towers(clip)["vision"], tiny.images(clip)
    oracle = clip.visual.forward_intermediates(x, output_fmt="NLC", output_extra_tokens=True)
    cls, mean = (_record(tower, x, ("native",), pooling)["native"] for pooling in ("cls", "mean"))
    assert len(oracle["image_intermediates"]) == tower.depth > 1
    for block in range(tower.depth):
        assert _close(
            cls[str(block + 1)], oracle["image_intermediates_prefix"][block][:, 0].detach()
        )
        assert _close(mean[str(block + 1)], oracle["image_intermediates"][block].mean(1).detach())


@pytest.mark.parametrize("family", [f for f in tiny.FAMILIES if f.startswith("timm")])
def test_timm_blocks_agree_with_timm_forward_intermediates(family):
    clip = tiny.build(family)
    tower, x = find_towers(clip)["vision"], tiny.images(clip)
    oracle = clip.visual.trunk.forward_intermediates(x, intermediates_only=True)
    maps = list(oracle)[-tower.depth :]  # some trunks list their stem first
    mean = _record(tower, x, ("native",), "mean")["native"]
    assert len(maps) == tower.depth > 1
    for block, expected in enumerate(maps, start=1):
        assert _close(mean[str(block)], expected.flatten(2).mean(2).detach())


def test_resnet_stages_agree_with_forward_intermediates():
    clip = tiny.build("resnet")
    tower, x = find_towers(clip)["vision"], tiny.images(clip)
    oracle = clip.visual.forward_intermediates(x, intermediates_only=True)["image_intermediates"]
    native = _record(tower, x, ("native",))["native"]
    for position, expected in zip(("embed", "1", "2", "3", "4"), oracle, strict=True):
        assert _close(native[position], expected.flatten(2).mean(2).detach())
    assert tower.kind == "stages"


def test_joint_of_every_block_is_the_head_applied_by_hand():
    clip = tiny.build("clip")
    visual, x = clip.visual, tiny.images(clip)
    found = _record(find_towers(clip)["vision"], x)
    stream = visual._embeds(x)
    for position in ("embed", "1", "2", "3"):
        if position != "embed":
            stream = visual.transformer.resblocks[int(position) - 1](stream)
        normed = visual.ln_post(stream)[:, 0]
        assert _close(found["native"][position], stream[:, 0].detach())
        assert _close(found["normed"][position], normed.detach())
        assert _close(found["joint"][position], (normed @ visual.proj).detach())
    assert _close(found["native"]["final"], normed.detach())
    assert _close(found["normed"]["final"], normed.detach())


def test_mean_pooling_in_joint_space_averages_normed_patches():
    clip = tiny.build("clip")
    x, visual = tiny.images(clip), clip.visual
    found = _record(find_towers(clip)["vision"], x, pooling="mean")
    tokens = visual.ln_post(visual.transformer(visual._embeds(x)))
    assert _close(found["joint"]["3"], (tokens[:, 1:].mean(1) @ visual.proj).detach())
    assert _close(found["joint"]["proj"], _encode(clip, x))  # proj stays the model's own embedding


@pytest.mark.parametrize(
    ("family", "pooling", "part"),
    [("coca", "mean", "final norm"), ("coca", "cls", "final norm"), ("coca mean", "mean", "final"),
     ("resnet", "mean", "projection")],
)  # fmt: skip
def test_another_pooling_than_the_one_that_projects_has_native_space_only(family, pooling, part):
    """CoCa's joint space would be of its own pool, a ResNet's of the width of its last stage."""
    clip = tiny.build(family)
    tower, x = find_towers(clip)["vision"], tiny.images(clip)
    for spaces in (("native", "joint"), ("joint",)):
        with pytest.raises(UserError, match=f"the {part}.* part of its attention pool, so that"):
            Recorder(tower, spaces, pooling)
    found = _record(tower, x, ("native",), pooling)["native"]["2"]
    seen = []
    hook = tower.blocks[1].register_forward_hook(lambda _m, _a, out: seen.append(out.detach()))
    _encode(clip, x)
    hook.remove()
    tokens = seen[0].flatten(2).mT if family == "resnet" else seen[0]
    if family == "resnet" or pooling == "cls":
        assert _close(found, tokens.mean(1) if pooling == "mean" else tokens[:, 0])
    else:
        assert _close(found, tokens[:, 1:].mean(1))


def test_attention_pool_is_applied_at_every_position():
    clip = tiny.build("timm vit map")
    trunk, x = clip.visual.trunk, tiny.images(clip)
    tower = find_towers(clip)["vision"]
    found = _record(tower, x)
    oracle = trunk.forward_intermediates(
        x, intermediates_only=True, output_fmt="NLC", return_prefix_tokens=True
    )
    for block, (patches, prefix) in enumerate(oracle, start=1):
        tokens = torch.cat([prefix, patches], 1) if prefix is not None else patches
        expected = trunk.forward_head(trunk.norm(tokens))
        assert _close(found["joint"][str(block)], expected.detach())
    assert (tower.pooling, tower.token_pooling) == ("model", "mean")


@pytest.mark.parametrize("family", ["resnet", "timm vit map", "coca", "timm convnext"])
def test_model_pooling_is_the_default(family):
    clip = tiny.build(family)
    tower, x = find_towers(clip)["vision"], tiny.images(clip)
    named, default = _record(tower, x, pooling="model"), _record(tower, x)
    for space, by_position in default.items():
        for position, values in by_position.items():
            assert (named[space][position] == values).all()


def test_text_mean_skips_padding_and_what_follows_the_end():
    clip = tiny.build("clip")
    ids = tiny.token_ids((3, 6, 4))
    other = ids.clone()
    other[:, 8:] = 9  # what follows end-of-text changes
    tower = find_towers(clip)["text"]
    first, second = (_record(tower, x, pooling="mean")["native"] for x in (ids, other))
    x = clip.token_embedding(ids) + clip.positional_embedding
    by_hand = torch.stack([row[:n].mean(0) for row, n in zip(x, (3, 6, 4))])
    assert _close(first["embed"], by_hand.detach())
    assert _close(second["3"], first["3"])


def test_bidirectional_text_mean_stops_before_the_padding_run():
    clip = tiny.build("clipa")
    ids = tiny.token_ids((3, 6, 4))
    x = clip.token_embedding(ids) + clip.positional_embedding
    by_hand = torch.stack([row[: n + 1].mean(0) for row, n in zip(x, (3, 6, 4))])
    found = _record(find_towers(clip)["text"], ids, ("native",), "mean")["native"]["embed"]
    assert _close(found, by_hand.detach())


@pytest.mark.parametrize("family", ["clip", "eos", "custom text", "quickgelu"])
def test_cut_text_equals_full_length_text(family):
    clip = tiny.build(family)
    tower, ids = find_towers(clip)["text"], tiny.token_ids((3, 6, 4))
    short = tower.cut(ids)
    assert short.shape[1] == (7 if family == "eos" else 6)
    assert _close(tower.run(short).detach().numpy(), _encode(clip, ids), 1e-6)


@pytest.mark.parametrize("family", ["clipa", "first", "coca"])
def test_text_is_not_cut_where_later_tokens_matter(family):
    tower = find_towers(tiny.build(family))["text"]
    ids = tiny.token_ids()
    assert tower.cut(ids) is ids


def test_a_later_token_does_not_change_a_causal_tower_but_does_change_the_others():
    """The premise of cutting, checked from outside: what follows end-of-text has no influence."""
    for family, unmoved in (("clip", True), ("clipa", False), ("coca", False)):
        clip, ids = tiny.build(family), tiny.token_ids()
        other = ids.clone()
        other[:, -3] = 7
        moved = (_encode(clip, ids) - _encode(clip, other)).abs().max()
        assert (moved == 0) == unmoved


def test_batch_axis_is_found_where_tokens_come_first():
    clip = tiny.build("clip")
    for part in (clip.visual.transformer, clip.transformer):
        part.batch_first = False
        for block in part.resblocks:
            block.attn.batch_first = False
    towers = find_towers(clip)
    x, ids = tiny.images(clip), tiny.token_ids()
    for side, batch in (("vision", x), ("text", ids)):
        found = _record(towers[side], batch)
        assert towers[side].batch_axis == 1
        assert _close(found["joint"]["3"], _encode(clip, batch))


def test_batch_axis_is_told_from_a_token_axis_of_the_same_size():
    clip = build_clip(tiny.config({"image_size": 8}))  # one patch and the class token: 2 tokens
    tower = find_towers(clip)["vision"]
    probe(tower)
    assert tower.batch_axis == 0


def test_positions_and_refusal_of_stages():
    tower = find_towers(tiny.build("resnet"))["vision"]
    probe(tower)
    assert tower.positions("joint") == ("4", "proj")
    assert tower.positions("native") == tower_positions(4)
    assert "last of the 4 stages" in tower.refusal("joint")
    assert find_towers(tiny.build("clip"))["vision"].refusal("joint") == ""


@pytest.mark.parametrize(
    ("family", "side", "pooling", "has"),
    [
        ("clip", "vision", "eot", "cls, mean, model"),
        ("clip", "text", "cls", "eot, mean, model"),
        ("timm convnext", "vision", "cls", "mean, model"),
        ("resnet", "vision", "cls", "model, mean"),
    ],
)
def test_a_pooling_that_the_tower_lacks_is_refused(family, side, pooling, has):
    tower = find_towers(tiny.build(family))[side]
    with pytest.raises(UserError, match="pooling; it has") as caught:
        Recorder(tower, pooling=pooling)
    assert has in str(caught.value)


def test_compiled_models_are_unwrapped_or_refused():
    whole = tiny.model("clip")
    clip = tiny.build("clip")
    wrapped = torch.compile(clip)
    again = type(whole)(wrapped, whole.preprocess, whole.preprocess, whole.tokenizer, "x", "y")
    assert again.clip is clip
    clip.visual.transformer.resblocks[1].compile()
    with pytest.raises(UserError, match=r"visual.transformer.resblocks.1 is compiled"):
        find_towers(clip)


def test_unknown_module_trees_are_refused():
    clip = tiny.build("clip")
    clip.visual = nn.Identity()
    with pytest.raises(UserError, match="`visual` is Identity"):
        find_towers(clip)
    with pytest.raises(UserError, match="no text tower is known in Linear"):
        find_towers_text(nn.Linear(2, 2))
    with pytest.raises(UserError, match="neither blocks nor stages"):
        find_towers(build_clip(tiny.timm("test_efficientnet", 160)))
    with pytest.raises(UserError, match="experimental in open_clip"):
        find_towers(
            build_clip(tiny.config({"attentional_pool": "parallel", "attn_pooler_heads": 2}))
        )
    with pytest.raises(UserError, match="pool_type 'none'"):
        find_towers(build_clip(tiny.config({"pool_type": "none"})))
    with pytest.raises(UserError, match="text tower has pool_type 'none'"):
        find_towers(build_clip(tiny.config(text={"pool_type": "none"})))


def find_towers_text(module):
    from vlmlayers.models.towers import find_text

    return find_text(module)


HF = {
    "roberta": {
        "model_type": "roberta",
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 20,
        "pad_token_id": 0,
        "type_vocab_size": 1,
    },
    "mt5": {
        "model_type": "mt5",
        "vocab_size": 64,
        "d_model": 32,
        "d_kv": 16,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 2,
        "pad_token_id": 0,
        "is_encoder_decoder": True,
    },
    "m2m_100": {
        "model_type": "m2m_100",
        "vocab_size": 64,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 20,
        "pad_token_id": 0,
        "is_encoder_decoder": True,
    },
    "bert": {
        "model_type": "bert",
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 20,
        "pad_token_id": 0,
    },
}


@pytest.mark.parametrize(
    ("kind", "pooler", "pooling"),
    [
        ("roberta", "mean_pooler", "mean"),
        ("mt5", "mean_pooler", "mean"),
        ("m2m_100", "cls_pooler", "cls"),
        ("roberta", "cls_pooler", "model"),
        ("bert", "cls_last_hidden_state_pooler", "cls"),
    ],
)
def test_hugging_face_text_towers(kind, pooler, pooling, tmp_path):
    pytest.importorskip("transformers", reason="needs the extra 'hf'")
    (tmp_path / "config.json").write_text(json.dumps(HF[kind]))
    clip = build_clip(
        tiny.config(
            text={
                "hf_model_name": str(tmp_path),
                "hf_proj_type": "linear",
                "hf_pooler_type": pooler,
            }
        )
    )
    tower, ids = find_towers(clip)["text"], tiny.token_ids()
    ids[ids == 2] = 0
    found = _record(tower, ids)
    assert (tower.family, tower.depth, tower.pooling) == (f"HF {kind}", 2, pooling)
    assert _close(found["joint"]["2"], _encode(clip, ids))
    assert _close(found["joint"]["proj"], _encode(clip, ids))
    hidden = clip.text.transformer(
        input_ids=ids, attention_mask=(ids != 0).long(), output_hidden_states=True
    ).hidden_states
    mean = _record(tower, ids, ("native",), "mean")["native"]
    mask = (ids != 0).float()[..., None]
    assert len(hidden) == 1 + tower.depth
    for position, state in zip(("embed", "1"), hidden):
        assert _close(mean[position], ((state * mask).sum(1) / mask.sum(1)).detach())


def test_open_clip_known_text_towers_build_offline():
    pytest.importorskip("transformers", reason="needs the extra 'hf'")
    names = {
        open_clip.get_model_config(n)["text_cfg"].get("hf_model_name")
        for n in open_clip.list_models()
    } - {None}
    from vlmlayers.models.hf_offline import KNOWN

    assert names <= set(KNOWN)
    with pytest.raises(UserError, match="'someone/else' are not known offline"):
        build_clip(tiny.config(text={"hf_model_name": "someone/else"}))


def test_what_is_no_clip_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match="a Linear has no encode_image: pass an open_clip CLIP"):
        find_towers(torch.nn.Linear(2, 2))
