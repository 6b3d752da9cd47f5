"""From a choice to fine-tuning: exactly the chosen blocks are adapted, in any family's names."""

from __future__ import annotations

import re
from importlib.util import find_spec

import peft
import pytest
import tiny
import torch
import transformers_models
from torch import nn

import vlmlayers as vl
from vlmlayers.models import find_towers, load_model

CHOICE = vl.LayerChoice((2, 3), (1,), "explicit")


def adapted(module):
    """Return the names of the modules directly under a list of blocks that have LoRA inside."""
    found = {n.partition(".lora_")[0] for n, w in module.named_parameters() if w.requires_grad}
    return {re.sub(r"(blocks|layers)\.(\d+)\..*", r"\1.\2", name) for name in found}


MODELS = {
    "open_clip": (
        lambda: tiny.build("clip"),
        ("visual.transformer.resblocks.{}", "transformer.resblocks.{}"),
    ),
    "timm": (
        lambda: tiny.build("timm vit token"),
        ("visual.trunk.blocks.{}", "transformer.resblocks.{}"),
    ),
    "transformers": (
        lambda: transformers_models.build("Siglip"),
        ("vision_model.encoder.layers.{}", "text_model.encoder.layers.{}"),
    ),
}


@pytest.mark.parametrize("family", MODELS)
def test_peft_adapts_the_chosen_blocks_and_nothing_else(family):
    build, (vision, text) = MODELS[family]
    clip = build()
    names = CHOICE.module_names(clip)
    assert names == {"vision": (vision.format(1), vision.format(2)), "text": (text.format(0),)}
    with_lora = peft.get_peft_model(clip, CHOICE.to_peft(clip, r=2))
    assert adapted(with_lora.get_base_model()) == {*names["vision"], *names["text"]}


def test_lora_in_fused_attention_and_linear_layers_moves_the_embedding_and_gets_gradients():
    clip, x = tiny.build("clip"), None
    x = tiny.images(clip)
    before = clip.encode_image(x)
    with_lora = peft.get_peft_model(clip, CHOICE.to_peft(clip, r=2)).get_base_model()
    torch.testing.assert_close(with_lora.encode_image(x), before)  # LoRA starts at zero
    (with_lora.encode_image(x).sum() + with_lora.encode_text(tiny.token_ids()).sum()).backward()
    last = {n: w.grad for n, w in with_lora.named_parameters() if "lora_B" in n}
    assert last and all(grad is not None and grad.abs().sum() > 0 for grad in last.values())


def test_lora_gets_a_gradient_where_attention_reads_its_weights_itself():
    """EVA with one bias for q, k and v multiplies by `qkv.weight`, past a LoRA on `qkv`."""
    clip, plain = tiny.build("timm eva"), tiny.build("timm eva")
    blocks = [block for one in (clip, plain) for block in find_towers(one)["vision"].blocks]
    for block in blocks:
        block.attn.q_bias = nn.Parameter(torch.zeros(block.attn.qkv.out_features // 3))
        block.attn.k_bias = torch.zeros_like(block.attn.q_bias)
        block.attn.v_bias = nn.Parameter(torch.zeros_like(block.attn.q_bias))
        block.attn.qkv_bias_separate = False
    choice = vl.LayerChoice((2,), (), "own")
    with_lora = peft.get_peft_model(clip, choice.to_peft(clip, r=2)).get_base_model()
    with_lora.encode_image(tiny.images(clip)).sum().backward()
    trained = {n: w.grad for n, w in with_lora.named_parameters() if "lora_B" in n}
    assert trained and all(grad is not None and grad.abs().sum() > 0 for grad in trained.values())
    with pytest.raises(vl.UserError, match="unknown layer 'qkv'"):
        choice.to_peft(plain, target_modules=["qkv"])


def test_blocks_that_lora_cannot_act_on_or_has_already_are_refused():
    clip = tiny.build("resnet")
    with pytest.raises(vl.UserError, match="the chosen vision blocks hold no linear layer and no"):
        vl.LayerChoice((2,), (1,), "own").to_peft(clip, r=2)
    assert vl.LayerChoice((), (1,), "own").to_peft(clip, r=2)
    clip = tiny.build("clip")
    peft.get_peft_model(clip, CHOICE.to_peft(clip, r=2))
    with pytest.raises(vl.UserError, match="the chosen vision blocks have LoRA already, which is"):
        CHOICE.to_peft(clip, r=2)
    trained = {n for n, w in clip.named_parameters() if w.requires_grad}
    with pytest.raises(vl.UserError, match="the chosen vision blocks have LoRA already, which is"):
        CHOICE.freeze(clip)
    assert {n for n, w in clip.named_parameters() if w.requires_grad} == trained


@pytest.mark.parametrize("rank", [0, -1, 2.5])
def test_a_rank_of_lora_that_is_none_is_refused(rank: float) -> None:
    with pytest.raises(vl.UserError, match=f"r is {rank}; the rank of LoRA is a whole number"):
        CHOICE.to_peft(transformers_models.build("CLIP"), r=rank)


def test_layers_of_a_block_can_be_named_as_in_lora_config():
    model = transformers_models.build("CLIP")
    config = CHOICE.to_peft(model, r=2, target_modules=["q_proj", "v_proj"])
    inside = peft.get_peft_model(model, config).get_base_model()
    hit = {n.partition(".lora_")[0] for n, w in inside.named_parameters() if w.requires_grad}
    blocks = [name for names in CHOICE.module_names(inside).values() for name in names]
    assert hit == {
        f"{block}.self_attn.{layer}" for block in blocks for layer in ("q_proj", "v_proj")
    }


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, lambda m: m, lambda m: (m, None)])
def test_names_are_those_of_what_was_given(wrap):
    given = wrap(tiny.build("clip"))
    module = given[0] if isinstance(given, tuple) else given
    blocks = dict(module.named_modules())
    found = [blocks[name] for names in CHOICE.module_names(given).values() for name in names]
    assert len(found) == 3
    assert all(type(block).__name__ == "ResidualAttentionBlock" for block in found)


@pytest.mark.parametrize("family", MODELS)
def test_freezing_leaves_the_chosen_blocks_and_groups_hold_each_weight_once(family):
    clip = MODELS[family][0]()
    count = CHOICE.freeze(clip)
    names = [name for several in CHOICE.module_names(clip).values() for name in several]
    expected = {
        n: w for n, w in clip.named_parameters() if n.startswith(tuple(f"{b}." for b in names))
    }
    assert {n for n, w in clip.named_parameters() if w.requires_grad} == set(expected)
    assert sum(count.values()) == sum(weight.numel() for weight in expected.values())
    groups = CHOICE.parameter_groups(clip, lr=1e-3, weight_decay=0.1)
    held = [id(weight) for group in groups for weight in group["params"]]
    assert sorted(held) == sorted(map(id, expected.values()))
    assert [g["name"] for g in groups] == ["vision", "vision 1d", "text", "text 1d"]
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0, 0.1, 0.0]
    optimiser = torch.optim.AdamW(groups)
    assert {group["lr"] for group in optimiser.param_groups} == {1e-3}


def test_a_loaded_model_is_handed_over_as_its_module():
    model = load_model("mini-clip")
    choice = vl.LayerChoice((12,), (), "explicit")
    assert choice.module_names(model) == choice.module_names(model.clip)
    assert choice.zero_based == {"vision": (11,), "text": ()}
    choice.freeze(model)
    assert [group["name"] for group in choice.parameter_groups(model)] == ["vision", "vision 1d"]
    model.clip.requires_grad_(False)
    with pytest.raises(vl.UserError, match=r"call choice\.freeze\(model\) first"):
        choice.parameter_groups(model)
    with pytest.raises(vl.UserError, match="gives each group its params; leave params out"):
        choice.parameter_groups(model, params=[])


def test_what_trains_outside_the_chosen_blocks_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """An optimiser of the groups would not move it, and nothing else would say so."""
    clip = tiny.build("clip")
    CHOICE.freeze(clip)
    CHOICE.parameter_groups(clip)
    assert not caplog.messages
    clip.logit_scale.requires_grad_(True)
    CHOICE.parameter_groups(clip)
    assert "1 parameter is outside the chosen blocks trainable" in caplog.text
    assert "as logit_scale" in caplog.text


def test_a_wrapper_is_not_taken_off_where_blocks_are_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It reads as if peft had been undone, and came twice with each call."""
    clip = tiny.build("clip")
    CHOICE.parameter_groups(peft.get_peft_model(clip, CHOICE.to_peft(clip, r=2)))
    assert not caplog.messages


def test_biases_of_all_blocks_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    peft = pytest.importorskip("peft")
    clip = tiny.build("clip")
    inside = peft.get_peft_model(clip, CHOICE.to_peft(clip, r=2, bias="all")).get_base_model()
    assert "bias='all' trains the biases of every block" in caplog.text
    CHOICE.parameter_groups(inside)
    assert "are outside the chosen blocks trainable" in caplog.text
    caplog.clear()
    CHOICE.to_peft(tiny.build("clip"), r=2, bias="lora_only")
    assert not caplog.messages


@pytest.mark.parametrize("depth", [2, 12])
def test_a_choice_among_another_number_of_blocks_is_refused(depth):
    """Its blocks are there, and lie at another depth: 3 of 12 is none of the last of 3."""
    clip = tiny.build("clip")
    towers = {"vision": {"depth": 3}, "text": {"depth": depth}}
    choice = vl.LayerChoice((2, 3), (1,), "threshold", {"towers": towers})
    for use in (choice.module_names, choice.to_peft, choice.freeze, choice.parameter_groups):
        with pytest.raises(vl.UserError, match=f"among {depth} text blocks, and .* has 3 blocks"):
            use(clip)
    assert all(weight.requires_grad for weight in clip.parameters())
    one = vl.LayerChoice((2, 3), (), "threshold", {"towers": towers})
    assert one.freeze(clip)["vision"], "of the text tower nothing is chosen"


def test_batch_norms_that_go_on_averaging_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """They change in training mode whatever is frozen, and with them what frozen blocks give."""
    clip = tiny.build("resnet")
    vl.LayerChoice((2,), (), "own").freeze(clip)
    told = int(re.search(r"freeze: (\d+) batch norms outside", caplog.text)[1])
    before = {name: value.clone() for name, value in clip.named_buffers()}
    clip.train().encode_image(tiny.images(clip))
    moved = {n for n, value in clip.named_buffers() if not torch.equal(value, before[n])}
    outside = {n.rpartition(".")[0] for n in moved if not n.startswith("visual.layer2.")}
    assert len(outside) == told
    caplog.clear()
    if find_spec("peft"):
        vl.LayerChoice((), (2,), "own").to_peft(clip, r=2)
        assert f"to_peft: {len({n.rpartition('.')[0] for n in moved})} batch norms" in caplog.text
    caplog.clear()
    CHOICE.freeze(tiny.build("clip"))
    assert not caplog.messages


def test_a_choice_of_no_block_freezes_nothing():
    clip, nothing = tiny.build("clip"), vl.LayerChoice((), (), "own")
    for use in (nothing.freeze, nothing.parameter_groups):
        with pytest.raises(vl.UserError, match="names no block; there is nothing to adapt"):
            use(clip)
    assert all(weight.requires_grad for weight in clip.parameters())


@pytest.mark.parametrize(
    ("choice", "options", "message"),
    [
        (vl.LayerChoice((9,), (), "own"), {}, "vision block 9, but the vision tower has 4 blocks"),
        (vl.LayerChoice((), (), "own"), {}, "names no block; there is nothing to adapt"),
        (CHOICE, {"target_modules": ["q_projj"]}, "unknown layer 'q_projj'.*did you mean 'q_proj'"),
        (CHOICE, {"target_modules": 3}, "to_peft: target_modules takes strings, not 3"),
        (CHOICE, {"layers_to_transform": [1]}, "unknown option 'layers_to_transform'"),
        (CHOICE, {"init_lora_weights": "loftq"}, "peft refuses these options of LoraConfig"),
    ],
)
def test_what_cannot_be_handed_over_is_said_in_a_line(choice, options, message):
    with pytest.raises(vl.UserError, match=message):
        peft.get_peft_model(
            tiny.build("clip"), choice.to_peft(transformers_models.build("CLIP"), **options)
        )
    with pytest.raises(vl.UserError, match="a module of open_clip or transformers, not a value of"):
        choice.module_names("clip")
