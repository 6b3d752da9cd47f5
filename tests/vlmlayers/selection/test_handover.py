"""From a choice to fine-tuning: exactly the chosen blocks are adapted, in any family's names."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
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


def test_weights_that_blocks_share_count_once_and_change_blocks_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clip = tiny.build("clip")
    first, second, third = clip.visual.transformer.resblocks
    third.mlp.c_fc.weight = second.mlp.c_fc.weight
    count = CHOICE.freeze(clip)
    assert sum(count.values()) == sum(w.numel() for w in clip.parameters() if w.requires_grad)
    held = [id(weight) for group in CHOICE.parameter_groups(clip) for weight in group["params"]]
    assert len(held) == len(set(held)) and not caplog.messages
    first.ln_1.weight = second.ln_1.weight
    CHOICE.freeze(clip)
    told = "the chosen blocks share weights with 1 block left out, as vision block 1, which changes"
    assert f"freeze: {told}" in caplog.text
    caplog.clear()
    assert CHOICE.to_peft(clip, r=2) and not caplog.messages, "LoRA is beside a norm, not in it"
    model = transformers_models.build("CLIP")
    model.vision_model.encoder.layers[3] = model.vision_model.encoder.layers[1]
    config = vl.LayerChoice((4,), (), "own").to_peft(model, r=2)
    assert "to_peft: the chosen blocks share weights with 1 block left out, as vision block 2" in (
        caplog.text
    )
    # peft knows a module by its first name alone.
    inside = peft.get_peft_model(model, config).get_base_model()
    assert adapted(inside) == {"vision_model.encoder.layers.1"}


@pytest.mark.parametrize("add", ["add_adapter", "get_peft_model"])
def test_a_second_adapter_goes_to_other_blocks(add: str) -> None:
    model = transformers_models.build("CLIP")
    first = vl.LayerChoice((1,), (), "own")
    with_lora = peft.get_peft_model(model, first.to_peft(model, r=2))
    config = CHOICE.to_peft(with_lora, r=2)
    if add == "add_adapter":
        with_lora.add_adapter("second", config)
        with_lora.set_adapter("second")
    else:
        peft.get_peft_model(with_lora, config, adapter_name="second")
    second = {n for n, w in model.named_parameters() if w.requires_grad and "second" in n}
    blocks = [name for names in CHOICE.module_names(model).values() for name in names]
    assert len(second) == 2 * 6 * len(blocks)
    assert all(name.startswith(tuple(f"{block}." for block in blocks)) for name in second)


def test_what_peft_cannot_do_in_fused_attention_is_told(caplog: pytest.LogCaptureFixture) -> None:
    clip = tiny.build("clip")
    for options, told in (
        ({"use_dora": True}, "peft has no use_dora for fused attention, which is left out"),
        ({"init_lora_weights": "pissa"}, "peft has no init_lora_weights='pissa' for fused"),
    ):
        config = CHOICE.to_peft(clip, r=2, **options)
        assert told in caplog.text and "attn" not in config.target_modules
        assert peft.get_peft_model(tiny.build("clip"), config)
        caplog.clear()
        CHOICE.to_peft(transformers_models.build("CLIP"), r=2, **options)
        assert not caplog.messages


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_frozen_weights_that_rounding_moves_are_told(
    kind: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    """An adapter that is read beside the weights as they were would compute something else."""
    torch.manual_seed(0)
    clip = tiny.build("clip").to(kind)
    attention = clip.visual.transformer.resblocks[1].attn
    before = attention.in_proj_weight.detach().clone()
    config = CHOICE.to_peft(clip, r=2, init_lora_weights=False)
    peft.get_peft_model(clip, config)
    for _ in range(10):
        clip.encode_image(tiny.images(clip).to(kind))
    drift = (attention.in_proj_weight - before).abs().max() / before.abs().max()
    told = "rounding to bfloat16 moves them each time; train in float32, under autocast" in (
        caplog.text
    )
    assert told == bool(drift > 1e-4) == (kind is torch.bfloat16)
    caplog.clear()
    CHOICE.to_peft(tiny.build("clip").to(kind), r=2, target_modules=["c_fc"])
    assert not caplog.messages


def test_an_adapter_of_a_numpy_rank_is_written(tmp_path: Path) -> None:
    clip = tiny.build("clip")
    with_lora = peft.get_peft_model(clip, CHOICE.to_peft(clip, r=np.int64(2)))
    with_lora.save_pretrained(tmp_path)
    assert (
        peft.PeftModel.from_pretrained(tiny.build("clip"), tmp_path).peft_config["default"].r == 2
    )


def test_a_model_that_was_loaded_in_inference_mode_can_be_trained() -> None:
    with torch.inference_mode():
        model = load_model("mini-clip")
    choice = vl.LayerChoice((12,), (), "own")
    choice.freeze(model)
    model.clip.encode_image(model.towers["vision"].example(1)).sum().backward()
    assert all(weight.grad is not None for weight in model.towers["vision"].blocks[11].parameters())


@pytest.mark.parametrize("rank", [0, -1, 2.5, True])
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
