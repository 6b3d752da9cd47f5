"""Adapters on disk: read back as written, refused where they do not fit, never executed."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import backbone, shared_backbone
from safetensors.torch import save_file

from vlmadapters.cli.train import _tell_precision
from vlmadapters.data.task import Task
from vlmadapters.files import (
    load_method,
    load_official,
    load_trained,
    read_info,
    save_method,
    save_official,
)
from vlmadapters.methods.mma.config import MMAConfig
from vlmadapters.methods.mma.module import new_adapter
from vlmlayers.errors import UserError
from vlmlayers.models import load_model

CONFIG = MMAConfig((1, 2), (2, 3), dim=4, scale=0.5)


def same(a: Any, b: Any) -> bool:
    left, right = a.official_state_dict(), b.official_state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_our_format_holds_the_adapter_and_what_it_belongs_to(tmp_path: Path) -> None:
    model = shared_backbone()
    adapter = new_adapter(model.clip, CONFIG, seed=5)
    task = Task(("cat", "dog"), descriptions=(("cat", ("has fur", "purrs")),))
    path = save_method(tmp_path / "a", adapter, model, task, {"seed": 5})
    assert same(load_method(path, model), adapter)
    info = read_info(path)
    assert (info.config, info.task, info.provenance) == (CONFIG, task, {"seed": 5})
    assert Task.from_dict({**task.to_dict(), "of a later version": 1}) == task
    assert json.loads(path.with_suffix(".json").read_text())["weights_hash"] == model.weights_hash


def test_equal_weights_with_another_activation_are_another_backbone(tmp_path: Path) -> None:
    model = shared_backbone()
    path = save_method(tmp_path / "a", new_adapter(model.clip, CONFIG, seed=5), model)
    other = copy.deepcopy(model)
    for block in other.clip.transformer.resblocks:
        block.mlp.gelu = torch.nn.Tanh()
    assert other.weights_hash == model.weights_hash
    with pytest.raises(UserError, match=r"transformer without weights \w*GELU then and Tanh now"):
        load_method(path, other)


def test_the_authors_layout_is_written_and_read(tmp_path: Path) -> None:
    model = shared_backbone()
    adapter = new_adapter(model.clip, MMAConfig.span(2, 3, dim=4), seed=5)
    path = save_official(tmp_path / "model.pth.tar-5", adapter, epoch=5)
    content = torch.load(path, weights_only=True)
    assert content["epoch"] == 5
    assert "text_adapter.2.down.0.weight" in content["state_dict"]
    read = load_official(path, model)
    assert same(read, adapter)
    assert read.config == MMAConfig.span(2, 3, dim=4, scale=0.001)
    wrapped = {"state_dict": {f"module.{k}": v for k, v in content["state_dict"].items()}}
    torch.save(wrapped, tmp_path / "wrapped.pth.tar")
    assert same(load_official(tmp_path / "wrapped.pth.tar", model), adapter)


def test_what_is_no_part_of_the_adapter_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "vlmadapters")
    model = shared_backbone()
    adapter = new_adapter(model.clip, MMAConfig.span(2, 3, dim=4), seed=5)
    state = {**adapter.official_state_dict(), "token_prefix": torch.zeros(2)}
    torch.save({"state_dict": state}, tmp_path / "more.pth.tar")
    assert same(load_official(tmp_path / "more.pth.tar", model), adapter)
    assert "1 entries are no part of the method: ['token_prefix']" in caplog.text


@pytest.mark.parametrize("pairs", [None, ((1, 2), (2, 3)), ((1, 3),), ()])
def test_pairs_are_read_from_the_keys(pairs: Any, tmp_path: Path) -> None:
    model = shared_backbone()
    config = replace(CONFIG, scale=0.001, pairs=pairs)
    adapter = new_adapter(model.clip, config, seed=5)
    path = save_official(tmp_path / "a.pth.tar", adapter)
    read = load_official(path, model)
    assert same(read, adapter)
    assert read.config.shared_pairs() == config.shared_pairs()
    other = replace(config, pairs=((2, 2),) if pairs else ((1, 3),))
    with pytest.raises(UserError, match=r"asked for is v1-2,t2-3 with dim 4"):
        load_official(path, model, other)


class Bomb:
    """Writes a file when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("through_torch", [True, False])
def test_a_pickle_in_disguise_is_refused_and_not_executed(
    through_torch: bool, tmp_path: Path
) -> None:
    path, target = tmp_path / "model.pth.tar", tmp_path / "executed"
    bomb = {"state_dict": {}, "extra": Bomb(target)}
    if through_torch:
        torch.save(bomb, path)
    else:
        path.write_bytes(pickle.dumps(bomb))
    with pytest.raises(UserError, match="more than tensors|cannot read"):
        load_official(path, shared_backbone())
    assert not target.exists()


def test_another_backbone_or_placement_is_refused_with_both_sides(tmp_path: Path) -> None:
    model = shared_backbone()
    adapter = new_adapter(model.clip, MMAConfig.span(2, 3, dim=4))
    ours = save_method(tmp_path / "a", adapter, model)
    other = backbone()
    with torch.no_grad():
        next(other.clip.parameters()).add_(1)
    other = replace(other, weights="other")
    with pytest.raises(UserError, match=r"weights random \(.*this is .* weights other \("):
        load_method(ours, other)
    theirs = save_official(tmp_path / "b.pth.tar", adapter)
    asked = MMAConfig.span(1, 3, dim=4)
    with pytest.raises(UserError, match=r"placement v2-3,t2-3 .* asked for is v1-3,t1-3"):
        load_official(theirs, model, asked)
    wide = shared_backbone("depths differ")
    with pytest.raises(UserError, match="has shape|blocks"):
        load_official(theirs, wide)


def test_images_prepared_otherwise_than_in_the_training_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The weights are the same; accuracy was ten points off, without a word."""
    model = replace(shared_backbone(), preprocess_config={"mean": [0, 0, 0], "std": [1, 1, 1]})
    adapter = new_adapter(model.clip, CONFIG)
    path = save_method(tmp_path / "a", adapter, model, provenance={"model": model.identity()})
    load_method(path, model)
    assert not caplog.messages
    load_method(path, replace(model, preprocess_config={**model.preprocess_config, "std": [1, 2]}))
    assert "prepared otherwise (std " in caplog.text and "[1, 2] now" in caplog.text
    load_method(path, replace(model, preprocess=lambda image: model.preprocess(image) / 2))
    assert "prepared otherwise (makes what it states then and " in caplog.text


@pytest.mark.parametrize("made", ["ViT-B-16", {"preprocessing": "mine"}, {10: "a", 9: "b"}])
def test_provenance_may_say_anything(made: Any, tmp_path: Path) -> None:
    """A name in place of a model's identity was a traceback, keys as numbers "altered"."""
    model = shared_backbone()
    adapter = new_adapter(model.clip, CONFIG)
    path = save_method(tmp_path / "a", adapter, model, provenance={"model": made})
    assert same(load_method(path, model), adapter)


def test_another_precision_than_in_the_training_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = shared_backbone()
    adapter = new_adapter(model.clip, CONFIG)
    path = save_method(tmp_path / "a", adapter, model, provenance={"precision": "bf16"})
    _tell_precision([path, tmp_path / "theirs.pth.tar"], "bf16")
    assert not caplog.messages
    _tell_precision([path], "fp32")
    assert "in bf16, and is tested in fp32 here; --precision bf16" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"not a checkpoint at all", "not written by torch.save: it begins with b'not a"),
        (b"\x00\x01", r"it begins with b'\\x00\\x01'"),
        (b"PK\x03\x04, cut off", "cannot read"),
        (None, "cannot read"),
    ],
)
def test_damaged_files_are_named(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "damaged"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_official(path, shared_backbone())
    with pytest.raises(UserError, match="cannot read the adapter"):
        load_method(path, shared_backbone())


def test_adapters_made_elsewhere_are_told_apart_from_damaged_ones(tmp_path: Path) -> None:
    model, theirs, of_peft = shared_backbone(), tmp_path / "theirs.pt", tmp_path / "p.safetensors"
    torch.save({"weights": {}}, theirs)
    with pytest.raises(UserError, match=r"theirs.pt: it is not \*.safetensors, as those of this"):
        load_method(theirs, model)
    save_file({"base_model.model.visual.lora_A.weight": torch.ones(2, 2)}, of_peft)
    with pytest.raises(UserError, match="p.safetensors holds what peft trained beside a model"):
        load_method(of_peft, model)


def test_weights_in_another_precision_are_said_to_be(tmp_path: Path) -> None:
    """The file and its name are the same."""
    model = load_model("mini-clip")
    path = save_method(tmp_path / "a", new_adapter(model.clip, CONFIG, seed=5), model)
    with pytest.raises(UserError, match=r"weights model.safetensors in bf16 \(\w+\); load"):
        load_method(path, load_model("mini-clip", precision="bf16"))


def test_a_checkpoint_of_a_training_that_diverged_is_refused(tmp_path: Path) -> None:
    """Its answers were not finite, for which the learning rate was blamed."""
    adapter = new_adapter(shared_backbone().clip, CONFIG)
    with torch.no_grad():
        next(adapter.parameters()).view(-1)[3] = torch.nan
    with pytest.raises(UserError, match="holds NaN or Inf in '.*': its training diverged"):
        load_official(save_official(tmp_path / "a.pth.tar", adapter), shared_backbone())


def test_files_that_hold_something_else_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.pth.tar"
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, path)
    with pytest.raises(UserError, match="holds no adapter"):
        load_official(path, shared_backbone())
    huge = torch.zeros(1).expand(1 << 40)  # one number on the disk
    for content, message in (
        ([torch.zeros(1)], "holds a list"),
        ({"state_dict": [torch.zeros(1)]}, "its state_dict is not a dictionary"),
        ({"state_dict": {"weight": torch.eye(2).to_sparse()}}, "no plain numbers in 'weight'"),
        ({"state_dict": {"weight": torch.ones(2, device="meta")}}, "no plain numbers in 'weight'"),
        ({"state_dict": {"weight": huge}}, "holds less data than the shape of 'weight' asks for"),
    ):
        torch.save(content, path)
        with pytest.raises(UserError, match=message):
            load_official(path, shared_backbone())
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, tmp_path / "y.safetensors")
    with pytest.raises(UserError, match="is not an adapter of this toolkit"):
        read_info(tmp_path / "y.safetensors")
    (tmp_path / "y.json").write_text("{}")
    with pytest.raises(UserError, match="only describes an adapter; give the .safetensors"):
        read_info(tmp_path / "y.json")
    with pytest.raises(UserError, match="only describes an adapter; give the .safetensors"):
        load_trained(tmp_path / "y.json", shared_backbone())


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    adapter = new_adapter(shared_backbone().clip, CONFIG)
    (tmp_path / "target").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        save_official(tmp_path / "target", adapter)
    assert [p.name for p in tmp_path.iterdir()] == ["target"]
