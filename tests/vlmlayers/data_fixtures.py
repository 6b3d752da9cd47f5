"""Small datasets on disk for the tests of manifests, readers and shards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from vlmlayers.manifests import Manifest


def picture(seed: int = 0, size: tuple[int, int] = (12, 8)) -> Image.Image:
    """Return a smooth coloured image that differs with the seed."""
    colours = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.BILINEAR)


def write_pictures(base: Path, paths: list[str]) -> None:
    """Write one image for each path."""
    for number, path in enumerate(paths):
        (base / path).parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(base / path)


def write_manifest(folder: Path, text: str, name: str = "sample") -> Path:
    """Write a TOML file; keys that it lacks are given plain values."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "" if "title" in text else 'title = "Sample"\n'
    path = folder / f"{name}.toml"
    path.write_text(lines + text, encoding="utf-8")
    return path


def coop_dataset(folder: Path, lists: object, extra: str = "") -> Manifest:
    """Return a dataset of CoOp's layout whose split file holds `lists`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = lists if isinstance(lists, str) else json.dumps(lists)
    (folder / "split.json").write_text(text, encoding="utf-8")
    path = write_manifest(
        folder, f'folder = "."\nlayout = "coop"\nsplit_file = "split.json"\n{extra}'
    )
    return Manifest.load(path)


def folder_dataset(folder: Path, paths: list[str], extra: str = "") -> Manifest:
    """Return a dataset of the folder layout with an image at each path."""
    write_pictures(folder, paths)
    path = write_manifest(folder, f'folder = "."\nlayout = "folder"\n{extra}')
    return Manifest.load(path)


def use(manifest: Manifest) -> None:
    """Do with a manifest what the toolkit does; every path must stay inside."""
    root = manifest.place().images
    for split in manifest.splits():
        for item in manifest.items(split):
            assert item.label < len(manifest.class_names())
            assert manifest.location(item).resolve().is_relative_to(root.resolve())
            manifest.prompt(item.class_name).encode()
    manifest.check().line().encode()
    assert "<script" not in manifest._repr_html_()
