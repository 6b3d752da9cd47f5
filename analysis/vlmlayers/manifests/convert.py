"""Converting a dataset to webdataset shards with a manifest of their own."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from vlmlayers.data.shards import IMAGE_SUFFIXES, NewSample, read_member, write_shard
from vlmlayers.errors import UserError
from vlmlayers.manifests.items import Item
from vlmlayers.manifests.manifest import Manifest
from vlmlayers.progress import track

Root = str | os.PathLike[str] | None


def write_shards(
    manifest: Manifest,
    split: str | Sequence[str],
    folder: str | os.PathLike[str],
    per_shard: int = 1000,
    root: Root = None,
    *,
    progress: bool = True,
) -> Path:
    """Write splits of a dataset as webdataset shards and return the manifest written beside them.

    Files are copied byte for byte, so features do not change; drawn images become PNG. Each
    shard appears when it is complete, the manifest last.

    Args:
        manifest: The dataset to convert.
        split: One split or several.
        folder: Where to write; it is made if need be.
        per_shard: Items in one tar file.
        root: The data root of the dataset.
        progress: Whether to show progress.

    Raises:
        UserError: `per_shard` is not positive, or an image cannot be read.
    """
    if per_shard < 1:
        raise UserError(f"per_shard is {per_shard}; a shard holds 1 item or more")
    target = Path(folder)
    splits = [split] if isinstance(split, str) else list(split)
    shards: dict[str, list[str]] = {}
    counts: dict[str, int] = {}
    for part in splits:
        items = manifest.items(part, root)
        target.mkdir(parents=True, exist_ok=True)
        counts[part], shards[part] = len(items), []
        starts = range(0, len(items), per_shard)
        for number, start in enumerate(track(starts, part, unit="shard", show=progress)):
            name = f"{part}-{number:05d}.tar"
            batch = items[start : start + per_shard]
            write_shard(target / name, _samples(manifest, batch, start, root))
            shards[part].append(name)
    path = target / "manifest.toml"
    temporary = target / f".manifest.toml.{os.getpid()}.part"
    temporary.write_text(_toml(manifest, shards, counts, root), encoding="utf-8")
    temporary.replace(path)
    return path


def _samples(
    manifest: Manifest, items: Sequence[Item], start: int, root: Root
) -> Iterator[tuple[int, NewSample]]:
    for number, item in enumerate(items, start=start):
        image, suffix = _encoded(manifest, item, root)
        yield number, NewSample(image, suffix, item.label, item.captions, item.path)


def _encoded(manifest: Manifest, item: Item, root: Root) -> tuple[bytes, str]:
    """Return an image's bytes as they are stored, or as PNG where there is no file."""
    suffix = item.path.rpartition(".")[2].lower()
    if manifest.layout == "shards":
        return read_member(manifest.location(item, root), item.path.partition(".tar/")[2]), suffix
    if manifest.layout != "builtin" and suffix in IMAGE_SUFFIXES:
        path = manifest.location(item, root)
        try:
            return path.read_bytes(), suffix
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
    buffer = io.BytesIO()
    manifest.open_image(item, root).save(buffer, "PNG")
    return buffer.getvalue(), "png"


def _toml(
    manifest: Manifest, shards: dict[str, list[str]], counts: dict[str, int], root: Root
) -> str:
    spec = manifest.spec
    names = manifest.class_names(root)
    content: dict[str, object] = {
        "title": spec.title,
        "kind": spec.kind,
        "folder": ".",
        "layout": "shards",
        "classes": len(names),
        "class_names": list(names),
        "template": spec.template,
        "zero_shot_template": spec.zero_shot_template,
        "licence": spec.licence,
        "citation": spec.citation,
        "note": f"written from the manifest {manifest.name}",
    }
    lines = [f"{key} = {_value(value)}" for key, value in content.items() if value is not None]
    lines += ["", "[counts]", *(f"{split} = {count}" for split, count in counts.items())]
    lines += ["", "[shards]", *(f"{split} = {_value(names)}" for split, names in shards.items())]
    return "\n".join(lines) + "\n"


def _value(value: object) -> str:
    # JSON's strings and lists of strings are TOML's too, but for DEL, which TOML escapes.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
