"""Names and tags of models, told without torch, are those of open_clip."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP

from vlmlayers.architectures import (
    CONFIG_FILE,
    check_model,
    known_depths,
    refuse_image_model,
)
from vlmlayers.errors import UserError
from vlmlayers.models import find_towers


def test_names_and_tags_without_torch_are_those_of_open_clip() -> None:
    code = (
        "import json, sys; from vlmlayers.architectures import architectures, tags_of\n"
        "found = {name: tags_of(name) for name in architectures()}\n"
        "assert 'torch' not in sys.modules\nprint(json.dumps(found))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = open_clip.list_models()
    expected = {name: open_clip.list_pretrained_tags_by_model(name) for name in names}
    assert json.loads(done.stdout) == expected
    assert sum(map(len, expected.values())) > 100


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-L-14", "RN50", "ViT-B-16-SigLIP", "ViTamin-S"])
def test_the_depths_that_configurations_tell_are_those_of_the_towers(name: str) -> None:
    told = known_depths(name)
    config = open_clip.get_model_config(name)
    made = CustomTextCLIP if config.pop("custom_text", False) else CLIP
    with torch.device("meta"):
        towers = find_towers(made(**config))
    assert told == {tower: towers[tower].depth for tower in told}
    assert set(told) == ({"vision", "text"} if name in ("ViT-B-32", "ViT-L-14") else {"text"})


def test_depths_are_told_of_folders_and_not_of_what_is_unknown(tmp_path: Path) -> None:
    assert known_depths("mini-clip") == {"vision": 12, "text": 12}
    assert known_depths("hf-hub:some/where") == known_depths("nosuch") == {}
    file = tmp_path / CONFIG_FILE
    file.write_text(json.dumps({"model_cfg": {"vision_cfg": {"layers": 7}, "text_cfg": {}}}))
    assert known_depths(str(tmp_path)) == {"vision": 7, "text": 12}
    for damaged in ("{", "[]", '{"model_cfg": {"vision_cfg": 3}}'):
        file.write_text(damaged)
        assert known_depths(str(tmp_path)) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": ""}, "the model has no name"),
        ({"name": "ViT-B-61"}, "did you mean 'ViT-B-16'"),
        ({"name": "ViT-B-16"}, "needs a pretrained tag, a file of weights, or random_weights"),
        ({"name": "ViT-B-16", "pretrained": "opnai"}, "did you mean 'openai'"),
        ({"name": "ViT-B-16", "pretrained": "openai", "random_weights": True}, "and not both"),
        ({"name": "ViT-B-16", "pretrained": "openai"}, "QuickGELU.*use 'ViT-B-16-quickgelu'"),
        ({"name": "ViT-B-16", "checkpoint": __file__, "like": "openai"}, "QuickGELU mismatch"),
        ({"name": "ViT-B-16", "checkpoint": "no.pt"}, "no.pt does not exist .looked for /"),
        ({"name": "local", "checkpoint": "no.pt"}, "needs config="),
        ({"name": "local", "config": "no.json"}, "config no.json does not exist .looked for /"),
        ({"name": "some/where"}, "is not a folder with open_clip_config.json.*hf-hub:some/where"),
        ({"name": "/some/where/else"}, "is not a folder .* hf-hub:organisation/name"),
        ({"name": "ViT-B/16"}, "did you mean 'ViT-B-16'"),
        ({"name": "ViT-L/14@336px"}, "did you mean 'ViT-L-14-336'"),
        ({"name": "local-dir:some/where"}, "name the folder alone, some/where$"),
        ({"name": "mini-clip", "pretrained": "openai"}, "mini-clip has no tags"),
    ],
)
def test_what_is_wrong_with_a_model_is_told_by_its_names(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_model(**arguments)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "is not a configuration of transformers or timm: "),
        ('{"a": 1}', "is not a configuration of transformers or timm: 'model_type'"),
        ('{"model_type": "bert", "vocab_size": 9}', ".bert. takes no images; choose a CLIP"),
        (
            '{"model_type": "llava", "image_token_index": 3, "vision_config": {}}',
            ".llava. is a language model that reads images among its words; choose a CLIP",
        ),
        ('{"model_type": "clip"}', "holds no weights"),
    ],
)
def test_what_is_wrong_with_a_model_of_transformers_is_told_by_its_configuration(
    config: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=message):
        check_model(str(tmp_path))


@pytest.mark.parametrize("config", [{"architecture": "vit_tiny"}, {"model_type": "dinov2"}])
def test_an_image_model_is_refused_where_classes_are_told_by_texts(
    config: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**config, "image_size": 32}))
    with pytest.raises(UserError, match="has no text tower; choose a CLIP"):
        refuse_image_model(str(tmp_path))
    file.write_text(json.dumps({"model_type": "clip", "text_config": {}}))
    for name in (str(tmp_path), "mini-clip", "ViT-B-16", "hf-hub:someone/something"):
        refuse_image_model(name)


def _refusal(name: str, pretrained: str | None = None) -> str:
    """Return what is said against a model, nothing where it passes."""
    try:
        check_model(name, pretrained=pretrained)
    except UserError as error:
        return str(error)
    return ""


def test_models_that_are_there_pass(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    (tmp_path / "model.safetensors").touch()
    assert _refusal("mini-clip") == ""
    assert _refusal("ViT-B-16", "laion400m_e32") == ""
    assert _refusal("ViT-B-16-quickgelu", "openai") == ""
    assert _refusal("hf-hub:someone/something") == ""
    assert _refusal(str(tmp_path)) == ""
    assert "is not a folder" in _refusal(str(tmp_path / "absent"))
    (tmp_path / "epoch_3.pt").write_bytes(b"")
    assert "epoch_3.pt is a file of weights, which goes" in _refusal(str(tmp_path / "epoch_3.pt"))
