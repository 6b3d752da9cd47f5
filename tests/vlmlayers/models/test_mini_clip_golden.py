"""The shipped miniature CLIPs: ten pinned items, plain open_clip, size, and what its card says.

`python tests/vlmlayers/models/test_mini_clip_golden.py` writes the pinned values again; do so only
with new weights. The ten images are eight surface textures and two digits: numpy makes them, so
that no release of Pillow's polygon code can move them. Tolerances: cosine at least 0.99999 at every
pinned position, and 0.001 per component of unit rows. Another thread count changes a cosine by
2e-7; QuickGELU in place of GELU moves components by 0.003, bilinear resizing by 0.03 (controls
below).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from vlmlayers.architectures import MINIATURES
from vlmlayers.data import builtin
from vlmlayers.manifests import Manifest
from vlmlayers.models import extract, load_model
from vlmlayers.models.load import VLM

GOLDEN = Path(__file__).parents[2] / "golden"
POSITIONS = ("1", "6", "12", "proj")
NAMES = (
    "shapes_filled", "shapes_outline", "textures", "letters", "charts", "flags", "signs", "aerial",
    "faces", "digits",
)  # fmt: skip
IMAGES = [("textures", index) for index in range(8)] + [("digits", 3), ("digits", 8)]
SIZE = 96  # larger than the model's 64, so that resizing is pinned too
COSINE, COMPONENT = 0.99999, 0.001


@pytest.fixture(scope="module", params=list(MINIATURES))
def model(request: pytest.FixtureRequest) -> VLM:
    return load_model(request.param)


def golden_of(name: str) -> Path:
    return GOLDEN / f"{MINIATURES[name].name}.npz"


def encode(model: VLM) -> dict[str, NDArray[np.float32]]:
    """Return unit features of ten images and ten texts, through hooks of our own."""
    images = torch.stack(
        [model.preprocess(builtin.get(name).image("test", i, SIZE)) for name, i in IMAGES]
    )
    texts = [f"a photo of a {builtin.get(name).class_names[3]}." for name in NAMES]
    tokens = model.tokenizer(texts)
    clip = model.clip
    found: dict[str, torch.Tensor] = {}
    handles = []
    for tower, blocks in (
        ("vision", clip.visual.transformer.resblocks),
        ("text", clip.transformer.resblocks),
    ):
        for position in POSITIONS[:-1]:
            key = f"{tower}.{position}"
            handles.append(
                blocks[int(position) - 1].register_forward_hook(
                    lambda _m, _i, out, key=key: found.__setitem__(key, out)
                )
            )
    with torch.no_grad():
        found["vision.proj"], found["text.proj"] = (
            clip.encode_image(images), clip.encode_text(tokens),
        )  # fmt: skip
    for handle in handles:
        handle.remove()
    rows = torch.arange(len(NAMES))
    unit = {}
    for key, value in found.items():
        if value.ndim == 3:
            value = value[:, 0] if key.startswith("vision") else value[rows, tokens.argmax(1)]
        unit[key] = torch.nn.functional.normalize(value, dim=-1).numpy()
    return unit


def close(first: NDArray[np.float32], second: NDArray[np.float32]) -> bool:
    same = (first * second).sum(1).min() >= COSINE
    return bool(same and np.abs(first - second).max() <= COMPONENT)


def test_ten_items_have_the_pinned_features(model: VLM) -> None:
    found = encode(model)
    with np.load(golden_of(model.name), allow_pickle=False) as golden:
        assert sorted(golden.files) == sorted(found)
        moved = [key for key in found if not close(found[key], golden[key])]
    assert moved == []


def test_another_preprocessing_is_seen() -> None:
    model = load_model("mini-clip")
    steps = model.preprocess.transforms
    bilinear = Image.Resampling.BILINEAR
    model.preprocess = lambda image: steps[-1](steps[-2](image.resize((64, 64), bilinear)))
    with np.load(golden_of(model.name), allow_pickle=False) as golden:
        assert not close(encode(model)["vision.proj"], golden["vision.proj"])


def test_another_activation_is_seen() -> None:
    model = load_model("mini-clip")
    for block in model.clip.visual.transformer.resblocks:
        block.mlp.gelu = open_clip.transformer.QuickGELU()
    found = encode(model)
    with np.load(golden_of(model.name), allow_pickle=False) as golden:
        assert not close(found["vision.proj"], golden["vision.proj"])
        assert close(found["text.proj"], golden["text.proj"])


def test_extract_gives_the_pinned_features(model: VLM) -> None:
    """The second route: the package's own recording, per dataset, at its own drawing size."""
    name = "digits"  # its drawing size does not matter much: both enlarge the same scan
    manifest = Manifest.load(name)
    items = [item for item in manifest.items("test")[:4]]
    features = extract(model, manifest, "test", items=items, progress=False)
    assert features.text is not None
    row = features.text.ids.index("a photo of a handwritten three.")
    vector = features.text.array("proj", "joint")[row]
    with np.load(golden_of(model.name), allow_pickle=False) as golden:
        pinned = golden["text.proj"][NAMES.index(name)]
    assert float(vector @ pinned) / np.linalg.norm(vector) > COSINE


def test_plain_open_clip_loads_the_shipped_folder(model: VLM) -> None:
    folder = MINIATURES[model.name]
    plain, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(
        f"local-dir:{folder}", bpe_path=str(folder / "merges.txt.gz")
    )
    text = "a photo of a red flag with a star."
    assert torch.equal(tokenizer([text]), model.tokenizer([text]))
    image = builtin.get("flags").image("test", 0, 80)
    assert torch.equal(preprocess(image), model.preprocess(image))
    with torch.no_grad():
        ours = model.clip.encode_image(preprocess(image)[None])
        torch.testing.assert_close(plain.eval().encode_image(preprocess(image)[None]), ours)


def test_towers_and_size_are_what_the_issue_asks(model: VLM) -> None:
    assert {name: tower.depth for name, tower in model.towers.items()} == {"vision": 12, "text": 12}
    assert model.towers["vision"].width != model.towers["text"].width
    assert sum(path.stat().st_size for path in MINIATURES[model.name].iterdir()) <= 12e6
    config = json.loads((MINIATURES[model.name] / "open_clip_config.json").read_text())["model_cfg"]
    assert config["text_cfg"]["vocab_size"] == model.tokenizer.vocab_size
    assert model.tokenizer.eot_token_id == model.tokenizer.vocab_size - 1


@pytest.mark.parametrize("name", builtin.names())
def test_zero_shot_is_at_least_five_times_chance(model: VLM, name: str) -> None:
    data = builtin.get(name)
    count = len(data.class_names)
    items = Manifest.load(name).items("test")[: 6 * count]
    images = torch.stack([model.preprocess(data.image("test", i)) for i in range(len(items))])
    prompts = model.tokenizer([f"a photo of a {word}." for word in data.class_names])
    with torch.no_grad():
        image = model.clip.encode_image(images, normalize=True)
        text = model.clip.encode_text(prompts, normalize=True)
    right = (image @ text.t()).argmax(1) == torch.tensor([item.label for item in items])
    assert float(right.float().mean()) >= 5 / count


if __name__ == "__main__":
    for shipped in MINIATURES:
        np.savez_compressed(golden_of(shipped), **encode(load_model(shipped)))
