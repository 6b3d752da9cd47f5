"""Loading: names, tags, checkpoints, random weights, and every way in which they are wrong."""

from __future__ import annotations

import gzip
import json
import logging
import pickle
import random
from pathlib import Path

import numpy as np
import open_clip
import pytest
import tiny
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

from vlmlayers.architectures import MINIATURES, refuse_quickgelu_mismatch
from vlmlayers.errors import UserError
from vlmlayers.models import list_models, load, load_model, vlm, wrap_model
from vlmlayers.models.build import build_clip
from vlmlayers.models.tokenizers import HubTokenizer
from vlmlayers.models.vlm import hash_weights
from vlmlayers.progress import hidden

CONFIG = tiny.config(text={"vocab_size": 49408})  # as many as open_clip's tokenizer has
tiny.FAMILIES["loaded"] = CONFIG


def test_generators_of_gpus_are_left_as_they_are(monkeypatch):
    seeded, before = [], torch.get_rng_state()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)  # torch.manual_seed calls it
    load_model("mini-clip", random_weights=True)
    wrap_model(tiny.build("clip"), tiny.preprocess)
    assert seeded == [] and torch.equal(before, torch.get_rng_state())


@pytest.fixture
def folder(tmp_path):
    """A folder with configuration and weights of a tiny model."""
    (tmp_path / "open_clip_config.json").write_text(json.dumps(CONFIG))
    save_file(tiny.build("loaded").state_dict(), tmp_path / "model.safetensors")
    return tmp_path


def test_a_local_folder_loads_with_its_weights(folder):
    model = load_model(str(folder))
    reference = tiny.build("loaded")
    assert hash_weights(reference.state_dict()) == model.weights_hash
    x = tiny.images(reference)
    assert torch.allclose(model.clip.encode_image(x), reference.encode_image(x), atol=1e-5)
    assert (model.name, model.weights, model.random_weights) == (
        folder.name,
        "model.safetensors",
        False,
    )
    assert not any(p.requires_grad for p in model.clip.parameters())
    assert not model.clip.training
    assert (model.towers["vision"].depth, model.image_size) == (3, 32)
    assert "3 blocks of width 48" in repr(model)


def test_config_and_checkpoint_are_the_same_as_the_folder(folder):
    by_files = load_model(
        "local", config=folder / "open_clip_config.json", checkpoint=folder / "model.safetensors"
    )
    assert by_files.weights_hash == load_model(str(folder)).weights_hash


def test_half_precision_weights_load_into_float32(folder):
    state = {k: v.half() for k, v in tiny.build("loaded").state_dict().items()}
    save_file(state, folder / "model.safetensors")
    model = load_model(str(folder))
    assert model.clip.visual.conv1.weight.dtype == torch.float32
    assert torch.equal(model.clip.visual.conv1.weight.half(), state["visual.conv1.weight"])


def test_torch_files_with_tensors_alone_and_wrapped_prefixes_load(folder):
    state = {f"module.{k}": v for k, v in tiny.build("loaded").state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, folder / "own.pt")
    model = load_model(
        "local", config=folder / "open_clip_config.json", checkpoint=folder / "own.pt"
    )
    assert model.weights_hash == load_model(str(folder)).weights_hash


def test_a_state_dict_is_found_in_a_trainers_file(folder):
    state, config = tiny.build("loaded").state_dict(), folder / "open_clip_config.json"
    optimizer = {"state": {0: {"step": torch.zeros(1)}}, "param_groups": [{"lr": 0.1}]}
    file = folder / "own.pt"
    torch.save({"model": state, "optimizer": optimizer, "epoch": 3}, file)
    model = load_model("local", config=config, checkpoint=file)
    assert model.weights_hash == load_model(str(folder)).weights_hash
    torch.save({"model": state, "ema": state}, file)
    with pytest.raises(UserError, match="several state dicts, 'model', 'ema'; save one"):
        load_model("local", config=config, checkpoint=file)


def test_what_peft_saved_is_named(folder):
    peft = pytest.importorskip("peft", reason="needs the extra 'peft'")
    clip, config = tiny.build("loaded"), folder / "open_clip_config.json"
    adapted = peft.get_peft_model(clip, peft.LoraConfig(target_modules=["c_fc"]))
    adapted.save_pretrained(folder / "lora")
    torch.save(adapted.state_dict(), folder / "all.pt")
    for given in ("lora", "lora/adapter_model.safetensors", "all.pt"):
        with pytest.raises(UserError, match="holds what peft trained .*merge_and_unload"):
            load_model("local", config=config, checkpoint=folder / given)


def test_preprocessing_comes_from_the_configuration(folder):
    body = {"model_cfg": CONFIG, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(body))
    model = load_model(str(folder))
    from PIL import Image

    grey = model.preprocess(Image.new("RGB", (50, 40), (255, 255, 255)))
    assert grey.shape == (3, 32, 32)
    assert torch.allclose(grey, torch.full((3, 32, 32), 2.0))
    assert model.preprocess_config["mean"] == [0.5] * 3
    assert model.preprocess_train(Image.new("RGB", (50, 40))).shape == (3, 32, 32)


def test_default_tokenizer_is_open_clips_own(folder):
    ids = load_model(str(folder)).tokenizer(["a dog"])
    assert torch.equal(ids, open_clip.SimpleTokenizer(context_length=12)(["a dog"]))


def test_random_weights_are_the_same_each_time_and_leave_global_state_alone():
    torch.manual_seed(11)
    random.seed(11)
    np.random.seed(11)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    hashes = {hash_weights(build_clip(tiny.FAMILIES[f]).state_dict()) for f in ("coca", "coca")}
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert len(hashes) == 1
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert hash_weights(build_clip(tiny.FAMILIES["coca"], seed=1).state_dict()) not in hashes


def test_every_random_weight_is_finite():
    for family in ("clip", "coca", "resnet"):
        assert all(p.isfinite().all() for p in build_clip(tiny.FAMILIES[family]).parameters())


def test_random_weights_have_to_be_asked_for(folder):
    with pytest.raises(UserError, match="needs a pretrained tag, a file of weights, or random"):
        load_model("ViT-B-32")
    with pytest.raises(UserError, match="needs a file of weights or random_weights=True"):
        load_model("local", config=folder / "open_clip_config.json")
    model = load_model(str(folder), random_weights=True)
    assert (model.random_weights, model.weights) == (True, "random")


def test_hash_sees_names_types_shapes_and_single_bits():
    base = {"a": torch.zeros(4), "b": torch.ones(2, 2)}
    flipped = {"a": torch.zeros(4), "b": torch.ones(2, 2)}
    flipped["b"][1, 1] = float(np.nextafter(np.float32(1), np.float32(2)))
    others = [
        flipped,
        {"a": torch.zeros(4), "c": torch.ones(2, 2)},
        {"a": torch.zeros(2, 2), "b": torch.ones(4)},
        {"a": torch.zeros(4, dtype=torch.int32), "b": torch.ones(2, 2)},
    ]
    assert len({hash_weights(state) for state in [base, *others]}) == 5
    assert hash_weights(dict(reversed(base.items()))) == hash_weights(base)
    assert hash_weights({"x": torch.tensor(1.5)}) != hash_weights({"x": torch.tensor(1.25)})


def test_the_hash_of_a_model_is_kept_until_its_weights_change(monkeypatch):
    model, calls = tiny.model(), []
    real = vlm.hash_weights
    monkeypatch.setattr(vlm, "hash_weights", lambda state: calls.append(1) or real(state))
    first = model.weights_hash
    assert (model.weights_hash, len(calls)) == (first, 1)
    with torch.no_grad():
        model.clip.ln_final.bias[0] += 1
    changed = model.weights_hash
    assert changed != first
    model.clip.load_state_dict(tiny.build("clip").state_dict())
    assert model.weights_hash == first


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_weights_that_are_written_without_a_version_have_another_hash(mode):
    """As averages of weights are, by way of `data`; what the old ones had given was taken again."""
    with mode():
        model = tiny.model()
        model.clip.visual.proj = torch.nn.Parameter(torch.rand(8, 16).T)  # of columns
        for name in ("visual.proj", "logit_scale", "visual.conv1.weight"):
            before = model.weights_hash
            model.clip.get_parameter(name).data.mul_(0.9)
            assert model.weights_hash != before


def test_unknown_names_get_the_nearest():
    with pytest.raises(UserError, match="nowhere/model .* is not a folder with open_clip_config"):
        load_model("nowhere/model")
    with pytest.raises(UserError, match="unknown model 'vit-b-32'; did you mean 'ViT-B-32'"):
        load_model("vit-b-32")
    with pytest.raises(UserError, match="in model ViT-B-32; did you mean 'openai'"):
        load_model("ViT-B-32", "open-ai")
    with pytest.raises(UserError, match="unknown precision 'fp23'; did you mean 'fp32'"):
        load_model("ViT-B-32", random_weights=True, precision="fp23")
    assert {"mini-clip", "ViT-B-16"} <= set(list_models())


@pytest.mark.parametrize(
    ("name", "tag", "right"),
    [
        ("ViT-B-16", "openai", "ViT-B-16-quickgelu"),
        ("ViT-L-14", "metaclip_400m", "ViT-L-14-quickgelu"),
        ("ViT-B-32-quickgelu", "laion2b_s34b_b79k", "ViT-B-32"),
    ],
)
def test_quickgelu_mismatch_is_an_error(name, tag, right):
    config = open_clip.get_model_config(name)
    base = name.removesuffix("-quickgelu")
    tag_config = open_clip.get_pretrained_cfg(name, tag) or open_clip.get_pretrained_cfg(base, tag)
    with pytest.raises(UserError, match=f"QuickGELU mismatch.*use '{right}'"):
        refuse_quickgelu_mismatch(name, tag, config, tag_config)
    if tag in open_clip.list_pretrained_tags_by_model(name):
        with pytest.raises(UserError, match="QuickGELU mismatch"):
            load_model(name, tag)


def test_no_tag_that_fits_its_architecture_is_refused():
    """Of all (architecture, tag) pairs, refused are exactly those that open_clip warns about."""
    for name, tag in open_clip.list_pretrained():
        config, weights = open_clip.get_model_config(name), open_clip.get_pretrained_cfg(name, tag)
        differs = config.get("quick_gelu", False) != weights.get("quick_gelu", False)
        try:
            refuse_quickgelu_mismatch(name, tag, config, weights)
            refused = False
        except UserError:
            refused = True
        assert refused == differs


def test_weights_that_cannot_be_downloaded_say_what_to_do(monkeypatch):
    def offline(_config):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(load.open_clip, "download_pretrained", offline)
    with pytest.raises(UserError, match="be downloaded .no route to host.; give a local file"):
        load_model("ViT-B-32", "laion2b_s34b_b79k")


def test_that_weights_are_fetched_is_said_before_the_wait_unless_progress_is_hidden(
    monkeypatch, capsys
):
    said = []

    def offline(*_, local_files_only=False, **__):
        if local_files_only:
            raise LocalEntryNotFoundError("not in the cache")
        said.append(capsys.readouterr().err)
        raise ConnectionError("no route to host")

    monkeypatch.setattr(load.open_clip, "download_pretrained", offline)
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    names: tuple[tuple[str, ...], ...] = (("ViT-B-32", "laion2b_s34b_b79k"), ("hf-hub:some/where",))
    for name in names:
        with pytest.raises(UserError, match="no route to host"):
            load_model(*name)
    assert said == [
        "fetching weights 'laion2b_s34b_b79k' of ViT-B-32 from the cache or the hub\n",
        "fetching hf-hub:some/where\n",
    ]
    for name in names:
        with hidden(), pytest.raises(UserError, match="no route to host"):
            load_model(*name)
    assert said[2:] == ["", ""]


def test_a_failed_download_names_its_first_cause_and_no_retries(monkeypatch, caplog):
    """open_clip's own message is too long for a line, and says no cause."""
    hub = logging.getLogger("huggingface_hub.utils._http")

    def offline(_config):
        for retry in range(5):
            hub.warning("Retrying in %d s", retry)
        try:
            raise OSError("Name or service not known")
        except OSError as error:
            raise FileNotFoundError("Failed to download file " + 300 * "x") from error

    monkeypatch.setattr(load.open_clip, "download_pretrained", offline)
    with pytest.raises(UserError, match="be downloaded .Name or service not known.; give"):
        load_model("ViT-B-32", "laion2b_s34b_b79k")
    assert "Retrying" not in caplog.text
    hub.warning("Retrying with another")
    assert "Retrying with another" in caplog.text


def _error(folder, **options):
    with pytest.raises(UserError) as caught:
        load_model(
            "local",
            config=folder / "open_clip_config.json",
            checkpoint=folder / "bad.safetensors",
            **options,
        )
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_checkpoints_that_do_not_fit_name_the_first_keys(folder):
    state = tiny.build("loaded").state_dict()
    save_file({k: v for k, v in state.items() if "ln_final" not in k}, folder / "bad.safetensors")
    assert "2 missing (ln_final.weight, ln_final.bias)" in _error(folder)
    state["visual.proj"] = torch.zeros(3, 3)
    save_file(state, folder / "bad.safetensors")
    assert "visual.proj is (3, 3), the model has (48, 24)" in _error(folder)
    inside = {f"net.clip.{k}": v for k, v in tiny.build("loaded").state_dict().items()}
    save_file(inside | {"head.weight": torch.zeros(3)}, folder / "bad.safetensors")
    assert "names stand there behind 'net.clip': save that part by itself" in _error(folder)
    save_file({"other": torch.zeros(1)}, folder / "bad.safetensors")
    assert "does not fit" in _error(folder)
    assert "1 unexpected (other)" in _error(folder)


def test_missing_broken_and_cut_checkpoints(folder):
    assert "does not exist" in _error(folder)
    (folder / "bad.safetensors").write_bytes(b"")
    assert "not a whole safetensors file" in _error(folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "bad.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "not a whole safetensors file" in _error(folder)


class Payload:
    """Unpickling this would leave a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize(
    "writer",
    [
        lambda value, path: torch.save(value, path),
        lambda value, path: path.write_bytes(pickle.dumps(value)),
    ],
)
def test_a_pickle_is_refused_and_not_executed(folder, writer):
    trace = folder / "executed"
    for file in (folder / "evil.pt", folder / "bad.safetensors"):
        writer({"state_dict": Payload(trace)}, file)
        with pytest.raises(UserError, match="not unpickled|cannot be read|not a whole"):
            load_model("local", config=folder / "open_clip_config.json", checkpoint=file)
    assert not trace.exists()


@pytest.mark.parametrize("content", ["<!doctype html>", "version https://git-lfs.github.com/spec"])
def test_what_a_download_brought_in_place_of_weights_is_shown(folder, content):
    (folder / "page.pt").write_text(content)
    with pytest.raises(
        UserError, match=f"not written by torch.save: it begins with b'{content[:20]}"
    ):
        load_model("local", config=folder / "open_clip_config.json", checkpoint=folder / "page.pt")


def test_torch_files_without_a_state_dict(folder):
    for value in (torch.zeros(2), {"a": 1}, {}):
        torch.save(value, folder / "x.pt")
        with pytest.raises(UserError, match="holds no"):
            load_model("local", config=folder / "open_clip_config.json", checkpoint=folder / "x.pt")


def test_configurations_that_are_wrong(tmp_path):
    file = tmp_path / "open_clip_config.json"
    with pytest.raises(UserError, match="needs config="):
        load_model("local")
    with pytest.raises(UserError, match="cannot read model configuration"):
        load_model("local", config=file, random_weights=True)
    for text, expected in (
        ("{", "is not valid JSON"),
        ("[]", "must hold an object"),
        ("{}", "lacks embed_dim, vision_cfg, text_cfg"),
        (json.dumps({**CONFIG, "text_cfg": {"depth": 2}}), "unexpected keyword argument 'depth'"),
        (json.dumps({**CONFIG, "colour": 2}), "unexpected keyword argument 'colour'"),
        (json.dumps({**CONFIG, "vision_cfg": 3}), "vision_cfg is not a table"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=expected):
            load_model("local", config=file, random_weights=True)


def test_a_folder_without_weights_and_a_missing_mini_clip(folder, monkeypatch):
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    assert load_model(str(folder)).weights == "one.safetensors"
    (folder / "one.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights, none named .*--random-weights"):
        load_model(str(folder))
    monkeypatch.setitem(MINIATURES, "mini-clip", folder / "nowhere")
    with pytest.raises(UserError, match="mini-clip is not part of this installation"):
        load_model("mini-clip")


def test_tokenizers_of_a_local_configuration(folder):
    """A vocabulary beside the configuration is used; one that does not fit is refused."""
    file = folder / "open_clip_config.json"
    with gzip.open(open_clip.tokenizer.default_bpe()) as handle:
        words = handle.read().decode().split("\n")[:301]
    with gzip.open(folder / "own.txt.gz", "wb") as handle:
        handle.write("\n".join(words).encode())
    text = {"tokenizer_kwargs": {"bpe_path": "own.txt.gz"}, "vocab_size": 814}
    file.write_text(json.dumps(tiny.config(text=text)))
    model = load_model(str(folder), random_weights=True)
    ids = model.tokenizer(["a dog"])
    assert int(ids.max()) == 813
    assert model.clip.encode_text(ids).shape == (1, 24)
    for wrong, expected in (
        ({**text, "vocab_size": 700}, "vocab_size 700, its tokenizer has 814"),
        ({"tokenizer_kwargs": {"bpe_path": "no.gz"}}, "are wrong: .*no.gz"),
        ({"tokenizer_kwargs": {"speed": 1}}, "are wrong: .*speed"),
    ):
        file.write_text(json.dumps(tiny.config(text=wrong)))
        with pytest.raises(UserError, match=expected):
            load_model(str(folder), random_weights=True)


def test_a_hub_tokenizer_is_fetched_at_first_use_only(monkeypatch):
    def offline(*_args, **_kwargs):
        raise OSError("offline")

    monkeypatch.setattr(load.open_clip.tokenizer, "HFTokenizer", offline)
    tokenizer = HubTokenizer("timm/none", 64, None, {})
    with pytest.raises(UserError, match="tokenizer 'timm/none' cannot be loaded: offline"):
        tokenizer(["a dog"])


def test_unknown_device():
    with pytest.raises(UserError, match="cannot use device 'gpu'"):
        load_model("ViT-B-32", random_weights=True, device="gpu")
