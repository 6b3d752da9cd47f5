"""Weights given as files: how images are prepared, which activation, which layout, which size."""

from __future__ import annotations

import json
import shutil
import warnings
import zipfile
from pathlib import Path

import open_clip
import pytest
import tiny
import torch
from open_clip.factory import load_checkpoint as open_clip_load
from open_clip.pretrained import _PRETRAINED
from safetensors.torch import save_file
from torch import nn

from vlmlayers.architectures import MINIATURES
from vlmlayers.errors import UserError
from vlmlayers.models import load_model
from vlmlayers.models.archives import read_archive
from vlmlayers.models.build import build_clip
from vlmlayers.models.checkpoints import Checkpoint, load_checkpoint, read_checkpoint
from vlmlayers.models.preprocessing import of_file
from vlmlayers.models.vlm import hash_weights

WORDS = {"vocab_size": 49408, "context_length": 12}
CONFIG = tiny.config(text=WORDS)
QUICK = tiny.config(text=WORDS, quick_gelu=True)
GREY = {"mean": (0.5,) * 3, "std": (0.5,) * 3}


@pytest.fixture(scope="module")
def state():
    """Weights of a tiny model; every value differs from what a fresh model has."""
    clip = build_clip(CONFIG, seed=4)
    return {key: value + 0.01 for key, value in clip.state_dict().items()}


@pytest.fixture
def file(tmp_path, state):
    save_file(state, tmp_path / "own.safetensors")
    return tmp_path / "own.safetensors"


@pytest.fixture
def architecture(monkeypatch):
    """Make open_clip know a tiny architecture with tags."""

    def make(tags, name="tiny-arch", config=CONFIG):
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, config)
        monkeypatch.setitem(_PRETRAINED, name, {tag: {"url": "", **v} for tag, v in tags.items()})
        return name

    return make


def written(folder, config, name="open_clip_config.json"):
    (folder / name).write_text(json.dumps(config))
    return folder / name


def prepared(model):
    return {key: model.preprocess_config[key] for key in ("mean", "std", "resize_mode")}


# Preprocessing and activation


def test_a_file_is_prepared_as_all_tags_of_its_architecture_are(architecture, file, caplog):
    squashed = {**GREY, "resize_mode": "squash"}
    name = architecture({"a": squashed, "b": squashed})
    model = load_model(name, file)
    assert prepared(model) == {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    assert "own.safetensors: prepared like all weights of tiny-arch (a, b)" in caplog.text
    assert load_model(name, checkpoint=file).preprocess_config == model.preprocess_config


def test_where_tags_differ_the_user_is_asked(architecture, file):
    name = architecture({"a": GREY, "b": {"resize_mode": "squash"}})
    asked = (
        r"different ways: mean 0.5 0.5 0.5; std 0.5 0.5 0.5; resize_mode shortest \(a\), or mean "
        r"0.481 .* squash \(b\); say which tag own.safetensors is like with --like TAG"
    )
    with pytest.raises(UserError, match=asked):
        load_model(name, file)
    assert prepared(load_model(name, file, like="a"))["mean"] == [0.5] * 3
    assert prepared(load_model(name, file, like="b"))["resize_mode"] == "squash"
    with pytest.raises(UserError, match="unknown pretrained tag 'c'"):
        load_model(name, file, like="c")
    three = {"mean": 0.25, "std": (0.1, 0.2, 0.3), "interpolation": "bilinear"}
    with pytest.raises(UserError, match="resize_mode shortest .a., or resize_mode squash .b."):
        load_model(name, file, **three)
    model = load_model(name, file, **three, resize_mode="longest")
    assert model.preprocess_config["mean"] == [0.25] * 3
    assert model.preprocess_config["std"] == [0.1, 0.2, 0.3]
    assert model.preprocess_config["interpolation"] == "bilinear"


def test_where_only_activations_differ_the_user_is_asked_for_them(architecture, file):
    name = architecture({"a": {"quick_gelu": True}, "b": {}})
    with pytest.raises(UserError, match=r"different ways: QuickGELU .a., or GELU .b.; say which"):
        load_model(name, file)
    load_model(name, file, like="b")
    with pytest.raises(UserError, match="QuickGELU mismatch: weights 'a'"):
        load_model(name, file, like="a")
    load_model(name, file, mean=0.5, std=0.5, interpolation="bicubic")  # knows what it is


def test_an_activation_that_no_tag_has_is_refused(architecture, file):
    name = architecture({"a": {"quick_gelu": True}})
    with pytest.raises(UserError, match="mismatch: weights 'own.safetensors'.*or, where yours"):
        load_model(name, file)
    load_model(name, file, mean=0.5, std=0.5, interpolation="bicubic")


def test_without_tags_open_clips_own_preprocessing_is_taken_and_said(architecture, file, caplog):
    model = load_model(architecture({}), file)
    assert model.preprocess_config["mean"][0] == pytest.approx(0.48145466)
    assert "no weights of tiny-arch are known; prepared as open_clip does" in caplog.text


@pytest.mark.parametrize("name", open_clip.list_models())
def test_every_architecture_takes_what_its_tags_agree_on_or_asks(name):
    tags = open_clip.list_pretrained_tags_by_model(name)
    known = [open_clip.get_pretrained_cfg(name, tag) for tag in tags]
    keys = ("mean", "std", "interpolation", "resize_mode", "quick_gelu")
    default = {"interpolation": "bicubic", "resize_mode": "shortest", "quick_gelu": False}
    whole = [{key: str(one.get(key) or default.get(key)) for key in keys} for one in known]
    config, plain = open_clip.get_model_config(name), Checkpoint(Path("x.pt"), {})
    activation = str(config.get("quick_gelu", False))
    if not known:
        assert of_file(name, config, plain, None, set()) == {}
    elif all(one == whole[0] for one in whole) and whole[0]["quick_gelu"] == activation:
        found = of_file(name, config, plain, None, set())
        assert all(str(found[key]) == whole[0][key] for key in keys)
    else:
        with pytest.raises(UserError, match="--like TAG|QuickGELU mismatch"):
            of_file(name, config, plain, None, set())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"mean": (0.5, 0.5)}, "mean .* of the model is not three numbers"),
        ({"mean": "grey"}, "mean takes .*, not 'grey'"),
        ({"mean": [0.5, 0.5, float("inf")]}, "mean .* is not three numbers"),
        ({"std": 0}, r"std 0 of the model is not three numbers .* above 0"),
        ({"interpolation": "bicubik"}, "unknown interpolation 'bicubik'.*did you mean 'bicubic'"),
        ({"resize_mode": "stretch"}, "unknown resize_mode 'stretch'"),
        ({"image_size": 0}, "image_size takes .*, not 0"),
        ({"image_size": (64, 64, 3)}, "image_size .* is not one side, or height and width"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, expected):
    with pytest.raises(UserError, match=expected):
        load_model("mini-clip", **settings)


def test_a_configuration_file_is_held_to_the_same(tmp_path, file):
    for settings, expected in (
        ({"mean": [1]}, None),
        ({"interpolation": "cubic"}, "unknown interpolation 'cubic' in .*config.json"),
        ({"mode": "BGR"}, "unknown mode 'BGR'"),
    ):
        config = written(tmp_path, {"model_cfg": CONFIG, "preprocess_cfg": settings})
        if expected is None:
            load_model("local", file, config=config)
            continue
        with pytest.raises(UserError, match=expected):
            load_model("local", file, config=config)


# Which weights


def test_a_file_beside_a_folder_or_the_miniature_is_honoured(tmp_path):
    shutil.copytree(MINIATURES["mini-clip"], tmp_path / "mine")
    whole = read_checkpoint(tmp_path / "mine" / "model.safetensors").state
    other = tmp_path / "epoch_9.pt"
    torch.save({"state_dict": {f"module.{k}": v * 1.1 for k, v in whole.items()}}, other)
    shipped = load_model(tmp_path / "mine")
    for name in (tmp_path / "mine", "mini-clip"):
        by_name, by_file = load_model(name, other), load_model(name, checkpoint=other)
        assert by_name.weights == by_file.weights == "epoch_9.pt"
        assert by_name.weights_hash == by_file.weights_hash != shipped.weights_hash


@pytest.mark.parametrize("name", ["mini-clip", "folder", "local"])
def test_weights_and_options_that_do_not_apply_are_refused(tmp_path, file, name):
    config = written(tmp_path, CONFIG)
    more = {"config": config} if name == "local" else {}
    name = str(tmp_path) if name == "folder" else name
    with pytest.raises(UserError, match="checkpoint /not/there.pt does not exist; .* no tags"):
        load_model(name, "/not/there.pt", **more)
    with pytest.raises(
        UserError, match="checkpoint nonsense does not exist .looked for .* no tags"
    ):
        load_model(name, "nonsense", **more)
    with pytest.raises(UserError, match="both pretrained=.* and checkpoint="):
        load_model(name, file, checkpoint=file, **more)
    with pytest.raises(UserError, match="random_weights=True .* not both"):
        load_model(name, file, random_weights=True, **more)
    with pytest.raises(UserError, match="like='openai' .* has no tags"):
        load_model(name, file, like="openai", **more)
    if name != "local":
        with pytest.raises(UserError, match="config=.* goes with model 'local' only"):
            load_model(name, config=config)


def test_like_beside_a_tag_or_random_weights_is_refused():
    for more in ({"pretrained": "openai"}, {"random_weights": True}):
        with pytest.raises(UserError, match="like='openai' .* this is not a file"):
            load_model("ViT-B-32", like="openai", **more)
    with pytest.raises(UserError, match="config=.* goes with model 'local' only"):
        load_model("ViT-B-32", "openai", config="x.json")
    with pytest.raises(UserError, match="checkpoint nowhere/x.pt does not exist .looked for "):
        load_model("ViT-B-32", "nowhere/x.pt")


def test_folders_of_every_way_of_saving(tmp_path, state):
    written(tmp_path, CONFIG)
    own = hash_weights(state)
    for name in ("x.pth", "pytorch_model.bin", "open_clip_pytorch_model.bin"):
        torch.save(state, tmp_path / name)
        model = load_model(tmp_path)
        assert (model.weights, model.weights_hash) == (name, own)
    (tmp_path / "model.safetensors").write_bytes(b"weights in the layout of another library")
    assert load_model(tmp_path).weights == "open_clip_pytorch_model.bin"
    for name in ("open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin"):
        (tmp_path / name).unlink()
    torch.save(state, tmp_path / "y.pth")
    with pytest.raises(UserError, match=r"several weights \(x.pth, y.pth, …\).*--pretrained FILE"):
        load_model(tmp_path)


# TorchScript archives


class Tree(nn.Module):
    """Nothing but parameters and buffers under dotted names, to be scripted."""

    def __init__(self, state, buffers=()):
        super().__init__()
        parts = {}
        for key, value in state.items():
            head, _, rest = key.partition(".")
            if rest:
                parts.setdefault(head, {})[rest] = value
            elif key in buffers:
                self.register_buffer(key, value)
            else:
                self.register_parameter(key, nn.Parameter(value))
        for head, inner in parts.items():
            self.add_module(head, Tree(inner, buffers))


SIZES = {"input_resolution": 32, "context_length": 12, "vocab_size": 49408}


def scripted(module, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(module).save(str(path))
        return torch.jit.load(str(path)).state_dict()


def openai_archive(path, state):
    """Write weights as OpenAI does: half precision, its names, and three sizes as buffers."""
    halves = {key: value.half() for key, value in state.items()}
    sizes = {key: torch.tensor(value) for key, value in SIZES.items()}
    return scripted(Tree({**halves, **sizes}, buffers=SIZES), path)


def test_an_archive_holds_what_torch_reads_from_it(tmp_path, state):
    path = tmp_path / "ViT-B-16.pt"
    expected = openai_archive(path, state)
    found = read_archive(path)
    assert set(found) == set(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert found["visual.conv1.weight"].dtype == torch.float16
    clip = build_clip(CONFIG)
    expected = scripted(clip, path)
    found = read_archive(path)
    assert all(torch.equal(found[key], expected[key]) for key in clip.state_dict())


def test_openais_archive_loads_and_its_activation_is_compared(tmp_path, state, architecture):
    path = tmp_path / "ViT-B-16.pt"
    openai_archive(path, state)
    model = load_model("local", path, config=written(tmp_path, QUICK))
    assert torch.equal(model.clip.ln_final.bias, state["ln_final.bias"].half().float())
    with pytest.raises(
        UserError, match="'ViT-B-16.pt' were trained with QuickGELU.*set quick_gelu"
    ):
        load_model("local", path, config=written(tmp_path, CONFIG))
    tags = {"openai": {"quick_gelu": True}, "other": GREY}
    quick = architecture(tags, "tiny-arch-quickgelu", QUICK)
    model = load_model(quick, path)
    assert model.preprocess_config["mean"][0] == pytest.approx(0.48145466)
    plain = architecture(tags)
    with pytest.raises(UserError, match="'ViT-B-16.pt' were .*use 'tiny-arch-quickgelu'"):
        load_model(plain, path)
    with pytest.raises(UserError, match="'ViT-B-16.pt' were .*use 'tiny-arch-quickgelu'"):
        load_model(plain, path, like="other")


def test_openais_state_without_the_archive_is_known_as_well(tmp_path, state):
    sizes = {key: torch.tensor(value) for key, value in SIZES.items()}
    torch.save({**state, **sizes}, tmp_path / "clip.pt")
    assert load_model("local", tmp_path / "clip.pt", config=written(tmp_path, QUICK))
    with pytest.raises(UserError, match="QuickGELU mismatch"):
        load_model("local", tmp_path / "clip.pt", config=written(tmp_path, CONFIG))


def rewritten(source, target, change):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = change(name, old.read(name))
            if content is not None:
                new.writestr(name, content)


def test_no_code_of_an_archive_is_run(tmp_path, state):
    whole, bad, trace = tmp_path / "whole.pt", tmp_path / "bad.pt", tmp_path / "executed"
    openai_archive(whole, state)
    call = f"cposix\nsystem\n(S'touch {trace}'\ntR.".encode()
    rewritten(whole, bad, lambda name, old: call if name.endswith("data.pkl") else old)
    config = written(tmp_path, QUICK)
    with pytest.raises(UserError, match="holds more than tensors and is not unpickled"):
        load_model("local", bad, config=config)
    assert not trace.exists()
    # What is in its code does not matter, even that it is no code.
    rewritten(whole, bad, lambda name, old: b"import os" if "/code/" in name else old)
    load_model("local", bad, config=config)


@pytest.mark.parametrize("fault", ["no tensor", "short tensor", "no tree", "cut"])
def test_damaged_archives_are_refused_in_one_line(tmp_path, state, fault):
    whole, bad = tmp_path / "whole.pt", tmp_path / "bad.pt"
    openai_archive(whole, state)
    changes = {
        "no tensor": lambda name, old: None if name.endswith("data/3") else old,
        "short tensor": lambda name, old: old[:-8] if name.endswith("data/3") else old,
        "no tree": lambda name, old: None if name.endswith("data.pkl") else old,
        "cut": lambda name, old: old[: len(old) // 2] if name.endswith("data.pkl") else old,
    }
    rewritten(whole, bad, changes[fault])
    with pytest.raises(UserError, match="checkpoint .*bad.pt (cannot be read|holds more than)"):
        load_model("local", bad, config=written(tmp_path, QUICK))


# Sizes


@pytest.mark.parametrize("family", ["clip", "custom text", "coca", "clipa"])
@pytest.mark.parametrize(("size", "length"), [(64, 12), (24, 12), (32, 20), (40, 7)])
def test_positions_are_resized_as_open_clip_does(tmp_path, family, size, length, caplog):
    whole = tiny.FAMILIES[family]
    torch.save(build_clip(whole, seed=3).state_dict(), tmp_path / "w.pt")
    config = {
        **whole,
        "vision_cfg": {**whole["vision_cfg"], "image_size": size},
        "text_cfg": {**whole["text_cfg"], "context_length": length},
    }
    ours, theirs = build_clip(config), build_clip(config, seed=1)
    try:
        open_clip_load(theirs, str(tmp_path / "w.pt"))
    except (RuntimeError, AssertionError):  # it cannot resize a text with a class token
        with pytest.raises(UserError, match="does not fit"):
            load_checkpoint(ours, read_checkpoint(tmp_path / "w.pt"))
        return
    load_checkpoint(ours, read_checkpoint(tmp_path / "w.pt"))
    expected = theirs.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in ours.state_dict().items())
    assert ("positional_embedding resized from 17 to" in caplog.text) == (size != 32)


@pytest.mark.parametrize("name", ["native", "timm"])
def test_another_image_size_is_that_of_open_clip(tmp_path, architecture, state, name):
    timm = tiny.timm("test_vit", 160, "token", None) | {"text_cfg": {**tiny.TEXT, **WORDS}}
    config = CONFIG if name == "native" else timm
    whole, size = build_clip(config, seed=3), {"native": 48, "timm": 96}[name]
    path = tmp_path / "w.pt"
    torch.save(whole.state_dict(), path)
    arch = architecture({}, config=config)
    theirs = open_clip.create_model(arch, pretrained=str(path), force_image_size=size).eval()
    ours = load_model(arch, path, image_size=size)
    assert ours.image_size == size
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    found, expected = ours.clip.encode_image(images), theirs.encode_image(images)
    assert torch.allclose(found, expected, atol=1e-5)
    again = tmp_path / "again.pt"  # resized weights load at their own size and at the first one
    torch.save(ours.clip.state_dict(), again)
    assert load_model(arch, again, image_size=size).weights_hash == ours.weights_hash
    assert load_model(arch, again).image_size == {"native": 32, "timm": 160}[name]


def test_image_sizes_of_folders_and_the_miniature(tmp_path):
    model = load_model("mini-clip", image_size=96)
    assert model.image_size == 96
    from PIL import Image

    assert model.preprocess(Image.new("RGB", (50, 40))).shape == (3, 96, 96)
    with pytest.raises(UserError, match="image_size=4|does not fit"):
        load_model("mini-clip", image_size=4)
    with pytest.raises(UserError, match="image_size"):
        load_model("mini-clip", random_weights=True, image_size=2)


def test_a_misfit_beyond_positions_is_still_refused(tmp_path, state):
    torch.save({**state, "visual.proj": torch.zeros(48, 23)}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"visual.proj is \(48, 23\), the model has \(48, 24\)"):
        load_model("local", tmp_path / "w.pt", config=written(tmp_path, CONFIG))
