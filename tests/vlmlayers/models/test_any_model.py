"""Models from the hub's cache, from folders and in memory: loaded offline, measured as they are."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import huggingface_hub
import numpy as np
import open_clip
import peft
import pytest
import timm
import tiny
import torch
import transformers
import transformers_models
from safetensors.torch import save_model
from torch import nn

import vlmlayers as vl
from vlmlayers.models import load_model, wrap_model

DRAWN = tiny.DrawnManifest(count=6, captioned=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return transformers_models.clip_folder(tmp_path_factory.mktemp("clip") / "tiny-clip")


def test_a_folder_of_transformers_loads_whole_and_is_what_transformers_makes_of_it(folder):
    model = load_model(folder)
    assert (model.name, model.weights) == ("tiny-clip", "model.safetensors")
    assert not any(weight.requires_grad for weight in model.clip.parameters())
    texts = ["a photo of a cat", "an owl, at night"]
    ids = open_clip.SimpleTokenizer()(texts)
    ours = model.tokenizer(texts)
    ends = ids.argmax(1)  # padded by 0 there, by the end itself here
    for row, end in enumerate(ends):
        assert torch.equal(ours[row, : end + 1], ids[row, : end + 1])
    features = vl.extract(model, DRAWN, "train", progress=False)
    oracle = transformers.CLIPModel.from_pretrained(folder).eval()
    processor = transformers.CLIPImageProcessor.from_pretrained(folder)
    images = [DRAWN.open_image(item) for item in DRAWN.items("train")]
    with torch.inference_mode():
        pixels = processor(images=images, return_tensors="pt")["pixel_values"]
        expected = oracle.get_image_features(pixel_values=pixels).pooler_output.numpy()
    np.testing.assert_allclose(features.vision.array("proj", "joint"), expected, atol=1e-5)
    assert "transformers" in features.identity["versions"]


def test_the_hubs_cache_is_read_offline(folder, tmp_path, monkeypatch):
    cached = tmp_path / "models--someone--tiny-clip"
    commit = "0" * 40
    (cached / "snapshots").mkdir(parents=True)
    (cached / "snapshots" / commit).symlink_to(folder, target_is_directory=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for module in (huggingface_hub._snapshot_download, huggingface_hub.file_download):
        monkeypatch.setattr(module.constants, "HF_HUB_CACHE", str(tmp_path))
    model = load_model("hf-hub:someone/tiny-clip")
    assert model.name == "someone/tiny-clip"
    assert model.weights_hash == load_model(folder).weights_hash
    with pytest.raises(vl.UserError, match="hf-hub:someone/else is not in the local cache"):
        load_model("hf-hub:someone/else")
    with pytest.raises(vl.UserError, match="is not a repository; write hf-hub:organisation/name"):
        load_model("hf-hub:a/b/c")


def test_weights_that_lack_something_are_refused(folder, tmp_path):
    part = tmp_path / "part"
    part.mkdir()
    for file in folder.iterdir():
        (part / file.name).write_bytes(file.read_bytes())
    settings = json.loads((part / "config.json").read_text())
    settings["vision_config"]["num_hidden_layers"] = 3
    (part / "config.json").write_text(json.dumps(settings))
    with pytest.raises(vl.UserError, match=r"part do not fit its configuration: \d+ missing or of"):
        load_model(part)
    (part / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(vl.UserError, match="part cannot be loaded"):
        load_model(part)
    (part / "config.json").write_text("{}")
    with pytest.raises(vl.UserError, match="is not a configuration of transformers or timm"):
        load_model(part)


def test_the_code_of_a_folder_is_neither_run_nor_asked_about(folder, tmp_path, monkeypatch):
    """At a terminal transformers asks whether to run it, and runs it on "y"."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    code = {"AutoConfig": "own.Config", "AutoModel": "own.Model"}
    settings = {"model_type": "own", "image_size": 32, "auto_map": code}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "own.py").write_text("raise RuntimeError('run')")
    with pytest.raises(vl.UserError, match="cannot be loaded: .*custom code"):
        load_model(tmp_path, random_weights=True)


def test_options_that_a_folder_or_a_model_does_not_take_are_refused(folder):
    with pytest.raises(vl.UserError, match="mean does not apply, tiny-clip says itself how"):
        load_model(folder, mean=0.5)
    with pytest.raises(vl.UserError, match="pretrained does not apply, a model in memory is taken"):
        load_model(transformers_models.build("CLIP"), pretrained="openai")


def test_a_tokenizer_with_more_words_than_the_model_is_refused(folder):
    model = transformers_models.build("CLIP")
    model.name_or_path = str(folder)
    with pytest.raises(vl.UserError, match="has 49408 words, the model 60"):
        wrap_model(model)


def test_random_weights_of_a_folder_are_the_same_every_time(folder):
    state = torch.random.get_rng_state()
    first, second = (load_model(folder, random_weights=True) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.weights == "random" and first.weights_hash == second.weights_hash


@pytest.mark.parametrize("kind", ["CLIP", "Siglip", "Siglip2"])
def test_a_model_in_memory_needs_no_more_than_itself_for_its_images(kind, caplog):
    model = load_model(transformers_models.build(kind))
    assert "came without an image processor" in caplog.text
    features = vl.extract(model, DRAWN, "train", tower="vision", progress=False)
    assert features.text is None and len(features.vision) == 6
    with pytest.raises(vl.UserError, match="no tokenizer is known for"):
        vl.extract(model, DRAWN, "train", progress=False)


@pytest.mark.parametrize("kind", ["CLIP", "Siglip2"])
def test_a_folder_without_a_vocabulary_has_no_tokenizer(kind, tmp_path):
    """transformers makes one of special tokens alone, to which all texts are the same."""
    transformers_models.build(kind).save_pretrained(tmp_path / "bare")
    model = load_model(tmp_path / "bare")
    assert vl.extract(model, DRAWN, "train", tower="vision", progress=False).text is None
    with pytest.raises(vl.UserError, match="no tokenizer is known for bare"):
        vl.extract(model, DRAWN, "train", progress=False)


def test_what_open_clips_factory_returns_is_a_model():
    made = open_clip.create_model_and_transforms("ViT-S-32-alt", pretrained=None)
    model = wrap_model(made, name="ViT-S-32-alt")
    assert model.clip is made[0] and model.preprocess is made[2]
    assert model.preprocess_train is made[1]
    texts = ["a cat"]
    assert torch.equal(model.tokenizer(texts), open_clip.get_tokenizer("ViT-S-32-alt")(texts))
    with pytest.raises(vl.UserError, match="as a training transform does; give the evaluation"):
        wrap_model(made[0], made[1])
    tokenizer = open_clip.SimpleTokenizer(context_length=9)
    with_tokenizer = load_model((made[0], made[2], tokenizer))
    assert with_tokenizer.preprocess is made[2] and with_tokenizer.tokenizer is tokenizer
    with pytest.raises(vl.UserError, match=r"this is \(Compose, CLIP\)"):
        wrap_model((made[2], made[0]))
    # Or scores, figures and reports, which go by the name of the weights, would not say so.
    with pytest.raises(vl.UserError, match="random_weights=True that they are untrained"):
        wrap_model(made, weights="seed 3", random_weights=True)


def test_images_are_prepared_in_the_size_that_a_timm_model_was_built_for():
    """Its configuration is of the weights, here of 160 pixels."""
    small = timm.create_model("test_vit", img_size=32)
    features = vl.extract(load_model(small), DRAWN, "train", items=4, progress=False)
    assert features["vision"]["final"].shape[0] == 4


@pytest.mark.parametrize("kind", ["open_clip", "transformers", "timm", "timm with batch norms"])
def test_a_model_that_nobody_trained_is_called_so_wherever_it_goes(kind, caplog):
    """`create_model_and_transforms` without `pretrained` loads nothing, and does not fail."""
    made = {
        "open_clip": lambda: open_clip.create_model_and_transforms("ViT-S-32-alt"),
        "transformers": lambda: type(built := transformers_models.build("CLIP"))(built.config),
        "timm": lambda: timm.create_model("test_vit"),
        "timm with batch norms": lambda: timm.create_model("test_resnet"),
    }[kind]()
    model = wrap_model(made)
    assert model.random_weights and model.weights == "random"
    caplog.clear()
    assert not wrap_model(made, weights="step 0").random_weights
    assert "untrained" not in caplog.text
    for left, tower in reversed([*enumerate(model.towers.values())]):
        own = (part for block in tower.blocks for part in block.modules())
        norm = next(part for part in own if "Norm" in type(part).__name__)
        with torch.no_grad():
            norm.weight.mul_(1.01)
        caplog.clear()
        assert wrap_model(made).random_weights is (left > 0)
        told = "counts as untrained: all norms in the blocks of its vision tower are as they were"
        assert (told in caplog.text) is (left > 0)


def test_a_file_of_weights_that_nobody_trained_is_told(tmp_path, caplog):
    """As a checkpoint of step 0, or one that was saved before the weights were loaded."""
    folder = transformers_models.clip_folder(tmp_path / "clip")
    loaded = load_model(folder)
    assert not loaded.random_weights
    told = "of its vision and its text tower are as they were initialised, so model.safetensors"
    assert told in caplog.text
    for tower in loaded.towers.values():
        norm = next(p for p in tower.blocks[1].modules() if isinstance(p, nn.LayerNorm))
        norm.bias.data[0] = 0.01
    loaded.clip.save_pretrained(folder)
    caplog.clear()
    load_model(folder)
    assert "initialised" not in caplog.text


def _compiled(module):
    return torch.compile(module)


def _adapted(module):
    return peft.get_peft_model(module, vl.LayerChoice((2,), (), "own").to_peft(module, r=2))


@pytest.mark.parametrize(
    ("wrap", "said"),
    [(nn.DataParallel, "DataParallel"), (_compiled, "torch.compile"), (_adapted, "PeftModel"),
     (lambda m: nn.DataParallel(_compiled(m)), "DataParallel, torch.compile")],
)  # fmt: skip
def test_wrappers_are_taken_off_and_said(wrap, said, caplog):
    caplog.set_level(logging.WARNING)
    plain = wrap_model(tiny.build("clip"), tiny.preprocess, tiny.tokenizer)
    model = wrap_model(wrap(tiny.build("clip")), tiny.preprocess, tiny.tokenizer)
    assert f"took CLIP out of {said}" in caplog.text
    found, expected = (vl.extract(m, DRAWN, "train", progress=False) for m in (model, plain))
    np.testing.assert_allclose(  # LoRA starts at zero
        found.vision.array("3"), expected.vision.array("3"), atol=1e-5
    )


def test_processor_and_tokenizer_of_transformers_are_taken_as_they_are(folder):
    clip = transformers.CLIPModel.from_pretrained(folder)
    own = {
        "preprocess": transformers.AutoImageProcessor.from_pretrained(folder),
        "tokenizer": transformers.AutoTokenizer.from_pretrained(folder),
    }
    found, expected = (
        vl.extract(m, DRAWN, "train", progress=False)
        for m in (wrap_model(clip, **own), wrap_model(clip))
    )
    for tower in ("vision", "text"):
        np.testing.assert_array_equal(found[tower]["proj"], expected[tower]["proj"])
    assert wrap_model(clip, **own).identity() == wrap_model(clip).identity()


def _padded_left(texts):
    ids = tiny.tokenizer(texts)
    return torch.stack([torch.cat([row[row == 63], row[row != 63]]) for row in ids])


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (lambda t: tiny.tokenizer(t).tolist(), "makes a list of 2 texts; it is to make a tensor"),
        (lambda t: tiny.tokenizer(t[:1]), r"makes a Tensor of torch.int64, \(1, 12\), of 2 texts"),
        (lambda t: tiny.tokenizer(t).float(), r"Tensor of torch.float32, \(2, 12\), of 2 texts"),
        (lambda t: transformers.BatchEncoding({"input_ids": tiny.tokenizer(t)}), ": its input_ids"),
        (lambda t: tiny.tokenizer(t) + 90, "knows tokens 0 to 63, and these run from 90 to 153"),
        (
            _padded_left,
            "no end of text is behind the first token of 'a dog', .* on the right",
        ),
    ],
)
def test_what_a_tokenizer_makes_is_looked_at(tokenizer, message):
    """Of one text for two, both rows of features would be its own."""
    model = wrap_model(tiny.build("clip"), tiny.preprocess, tokenizer)
    with pytest.raises(vl.UserError, match=message):
        model.tokenize(["a dog", "a cat"])


@pytest.mark.parametrize(
    ("preprocess", "message"),
    [
        (
            lambda image: np.asarray(image),
            "preprocess makes a ndarray of an image; the model",
        ),
        (lambda _: torch.zeros(3, 32, 32, dtype=torch.uint8), "preprocess makes torch.uint8 of"),
        (
            lambda _: torch.zeros(1, 3, 32, 32),
            r"\(item, 3, 32, 32\) of float32 on cpu, not \(6, 1",
        ),
        (lambda _: torch.zeros(3, 16, 16), r"as \(item, 3, 32, 32\) .*, not \(6, 3, 16, 16\)"),
    ],
)
def test_what_a_preparation_makes_is_looked_at(preprocess, message):
    model = wrap_model(tiny.build("clip"), preprocess, tiny.tokenizer)
    for more in ({}, {"skip_unreadable": True}):
        with pytest.raises(vl.UserError, match=message):
            vl.extract(model, DRAWN, "train", progress=False, **more)


def test_adapters_in_fused_attention_leave_weights_as_they_were(tmp_path):
    """peft adds them to the weights in each pass and takes them off again, but for rounding."""
    torch.manual_seed(0)
    clip = tiny.build("clip")
    config = vl.LayerChoice((1, 2), (3,), "own").to_peft(clip, r=2, init_lora_weights=False)
    module = peft.get_peft_model(clip, config)
    model = wrap_model(module, tiny.preprocess, tiny.tokenizer)
    images = torch.stack([model.preprocess(DRAWN.open_image(i)) for i in DRAWN.items("train")])
    with torch.no_grad():
        expected = clip.eval().encode_image(images).numpy()
    before = {name: value.clone() for name, value in clip.state_dict().items()}
    kept = dict(clip.named_parameters())
    found = [
        vl.extract(model, DRAWN, "train", out=tmp_path / "s", progress=False) for _ in range(2)
    ]
    vl.models.examine(model, DRAWN, metrics=["skip_joint_change"], items=4, progress=False)
    np.testing.assert_allclose(found[1].vision.array("proj"), expected, atol=1e-5)
    after = clip.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(weight.is_inference() for weight in after.values())
    trained = [name for name, weight in kept.items() if weight.requires_grad]
    assert trained == [n for n, w in clip.named_parameters() if w.requires_grad]
    module.train()
    clip.encode_image(images).sum().backward()
    assert all(dict(clip.named_parameters())[name].grad is not None for name in trained[:4])
    merged = module.merge_and_unload()
    with torch.no_grad():
        np.testing.assert_allclose(merged.eval().encode_image(images), expected, atol=1e-5)


def test_a_folder_of_timm_is_an_image_model_with_its_own_preprocessing(tmp_path):
    import timm

    made = timm.create_model("test_vit")
    prepared = {"input_size": [3, 160, 160], "mean": [0.1, 0.2, 0.3]}
    settings = {"architecture": "test_vit", "num_classes": 1000, "pretrained_cfg": prepared}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    save_model(made, str(tmp_path / "model.safetensors"))
    model = load_model(tmp_path)
    assert list(model.towers) == ["vision"] and "text" not in repr(model)
    assert "0.1, 0.2, 0.3" in model.preprocess_config["mean"]
    features = vl.extract(model, DRAWN, "train", progress=False)
    assert features.text is None
    assert features.vision.positions() == ("embed", *map(str, range(1, 7)), "final")


def test_an_image_model_alone_goes_from_features_to_a_choice(tmp_path):
    model = wrap_model(tiny.build("clip"), tiny.preprocess, tiny.tokenizer)
    features = [
        vl.extract(model, tiny.DrawnManifest(name=name, count=40), "train", tower="vision",
                   out=tmp_path / name, progress=False)
        for name in ("one", "two")
    ]  # fmt: skip
    again = vl.extract(model, tiny.DrawnManifest(name="one", count=40), "train", tower="vision",
                       out=tmp_path / "one", progress=False)  # fmt: skip
    np.testing.assert_array_equal(again.vision.array("1"), features[0].vision.array("1"))
    scores = vl.score(features, ["dataset_accuracy", "fisher_ratio"], bootstrap=20, shuffles=2)
    assert set(scores["tower"]) == {"vision"} and set(scores["metric"]) >= {"fisher_ratio"}
    choice = vl.select(scores, "threshold", agreement_metric="none", resamples=20)
    assert choice.vision and choice.text == ()
