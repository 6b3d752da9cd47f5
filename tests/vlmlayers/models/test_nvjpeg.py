"""JPEGs decoded on the device, by libjpeg where there is no GPU, against Pillow's images."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from data_fixtures import folder_dataset, picture
from open_clip.transform import image_transform
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from vlmlayers.errors import NotJPEG, UserError
from vlmlayers.manifests import Manifest
from vlmlayers.models import extract, nvjpeg
from vlmlayers.models.decoding import decode
from vlmlayers.models.nvjpeg import refuse_nvjpeg

SIDE = 32
PREPARE = image_transform(SIDE, is_train=False, mean=(0.5,) * 3, std=(0.25,) * 3)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROUNDING = 5 / 255 / 0.25  # of the decoders and of the two resamplings, in normalised values


def jpegs(folder: Path, pictures: list[Image.Image], **options: Any) -> Manifest:
    """Return a dataset of JPEGs, one class."""
    made = folder_dataset(folder, [], '[split_folders]\ntrain = "train"')
    (folder / "train" / "a").mkdir(parents=True)
    for number, image in enumerate(pictures):
        image.save(folder / "train" / "a" / f"{number}.jpg", quality=95, **options)
    return made


def decoded(manifest: Manifest, decoding: str, workers: int = 0) -> Any:
    items = manifest.items("train")
    batches = [[0, 1], list(range(2, len(items)))]
    return list(
        decode(
            manifest, items, batches[: 1 + (len(items) > 2)], preprocess=PREPARE, root=None,
            size=SIDE, workers=workers, decoding=decoding, device=CPU,
        )
    )  # fmt: skip


@pytest.mark.parametrize("workers", [0, 1])
def test_images_are_pillows_in_order_but_for_rounding(tmp_path: Path, workers: int) -> None:
    sizes = [(60, 40), (40, 90), (32, 32), (20, 20)]
    pictures = [picture(seed, size) for seed, size in enumerate(sizes)]
    manifest = jpegs(tmp_path, [*pictures, picture(9, (50, 50)).convert("L")])
    found, expected = decoded(manifest, "nvjpeg", workers), decoded(manifest, "full")
    assert [(rows, bad) for rows, _, bad in found] == [([0, 1], {}), ([2, 3, 4], {})]
    for (_, ours, _), (_, pillows, _) in zip(found, expected):
        torch.testing.assert_close(ours, pillows, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    manifest = jpegs(tmp_path, [picture(1, (48, 36)), picture(2, (48, 36))], exif=exif)
    (_, ours, _), (_, pillows, _) = (decoded(manifest, how)[0] for how in ("nvjpeg", "full"))
    torch.testing.assert_close(ours, pillows, atol=ROUNDING, rtol=0)


def test_a_broken_file_costs_itself_alone(tmp_path: Path) -> None:
    manifest = jpegs(tmp_path, [picture(seed, (40, 40)) for seed in range(4)])
    broken = tmp_path / "train" / "a" / "2.jpg"
    content = broken.read_bytes()
    broken.write_bytes(content[:-100])  # a whole header
    (tmp_path / "train" / "a" / "3.jpg").write_bytes(b"")
    _, (rows, images, bad) = decoded(manifest, "nvjpeg")
    assert (rows, images) == ([], None)
    assert bad[2].startswith("train/a/2.jpg (cannot be decoded") and "empty" in bad[3]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("kind", "mode"), [("PNG", "RGB"), ("JPEG", "CMYK")])
def test_another_image_is_refused_in_one_line(
    tmp_path: Path, kind: str, mode: str, workers: int
) -> None:
    manifest = jpegs(tmp_path, [picture(0, (40, 40)), picture(1, (40, 40))])
    picture().convert(mode).save(tmp_path / "train" / "a" / "1.jpg", kind)  # content decides
    with pytest.raises(NotJPEG, match=f"a/1.jpg is {kind} in {mode}; take decoding full") as told:
        decoded(manifest, "nvjpeg", workers)
    assert "\n" not in str(pickle.loads(pickle.dumps(told.value)))


def test_what_cannot_be_done_is_refused_before_anything_is_decoded(tmp_path: Path) -> None:
    manifest = jpegs(tmp_path, [picture(0, (40, 40))])
    with pytest.raises(UserError, match="decodes on a CUDA device, and the model is on cpu"):
        extract(tiny.model(), manifest, decoding="nvjpeg", progress=False)
    tiny.skip_without_fake_gpus()
    model: Any = SimpleNamespace(device=CUDA, preprocess=PREPARE, image_size=SIDE)
    with FakeTensorMode():
        refuse_nvjpeg(model, manifest, manifest.items("train"))
        drawn = Manifest.load("textures")
        with pytest.raises(NotJPEG, match="textures is drawn by code"):
            refuse_nvjpeg(model, drawn, drawn.items("test"))
        model.preprocess = tiny.preprocess
        with pytest.raises(UserError, match="this model's own preprocessing cannot"):
            refuse_nvjpeg(model, manifest, manifest.items("train"))


def decoded_on_a_gpu_in_trouble(
    monkeypatch: pytest.MonkeyPatch, manifest: Manifest, trouble: RuntimeError
) -> Any:
    own = nvjpeg.decode_jpeg

    def decode_jpeg(*args: Any, device: torch.device, **options: Any) -> Any:
        if device == CUDA:
            raise trouble
        return own(*args, device=device, **options)

    monkeypatch.setattr(nvjpeg, "decode_jpeg", decode_jpeg)
    items = manifest.items("train")
    files = nvjpeg.JPEGFiles(manifest, items, None)
    samples = [files[row] for row in range(len(items))]
    return nvjpeg.decoded(samples, items, lambda pixels: pixels, CUDA)


def test_a_device_that_cannot_decode_is_no_fault_of_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = jpegs(tmp_path, [picture(0, (40, 40))])
    with pytest.raises(UserError, match="0.jpg, which is whole: nvjpeg: 6; take decoding full"):
        decoded_on_a_gpu_in_trouble(monkeypatch, manifest, RuntimeError("nvjpeg: 6"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 0))
    with pytest.raises(UserError, match="cuda ran out of memory .*; lower batch_size"):
        decoded_on_a_gpu_in_trouble(monkeypatch, manifest, torch.OutOfMemoryError("full"))
    file = tmp_path / "train" / "a" / "0.jpg"
    file.write_bytes(file.read_bytes()[:-100])  # which no decoder reads
    ((_, bad),) = decoded_on_a_gpu_in_trouble(monkeypatch, manifest, RuntimeError("nvjpeg: 6"))
    assert bad == "train/a/0.jpg (cannot be decoded: nvjpeg: 6)"


def near(ours: Any, full: Any) -> bool:
    a, b = (one.vision.array("proj", "joint") for one in (ours, full))
    return 0 < np.abs(a - b).max() < 0.1 * np.abs(b).max()


def test_features_are_near_and_a_store_knows_who_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extraction = sys.modules["vlmlayers.models.extract"]  # whose name in the package is a function
    monkeypatch.setattr(extraction, "refuse_nvjpeg", lambda *_: None)
    manifest = jpegs(tmp_path / "data", [picture(seed, (60, 50)) for seed in range(5)])
    model = tiny.model()
    model.preprocess = image_transform(model.image_size, is_train=False)
    options: dict[str, Any] = {"tower": "vision", "batch_size": 2, "progress": False}
    full = extract(model, manifest, out=tmp_path / "store", **options)
    ours = extract(model, manifest, decoding="nvjpeg", **options)
    assert ours.identity == full.identity | {"decoding": "nvjpeg"} and near(ours, full)
    with pytest.raises(UserError, match="decoding"):
        extract(model, manifest, out=tmp_path / "store", decoding="nvjpeg", **options)


@pytest.mark.gpu
def test_a_gpu_decodes_what_pillow_does(tmp_path: Path) -> None:
    manifest = jpegs(tmp_path, [picture(seed, (90, 70)) for seed in range(5)])
    model = tiny.model()
    model.clip.to(CUDA)
    model.preprocess = image_transform(model.image_size, is_train=False)
    options: dict[str, Any] = {"tower": "vision", "batch_size": 2, "progress": False}
    ours, full = (extract(model, manifest, decoding=how, **options) for how in ("nvjpeg", "full"))
    assert near(ours, full)
