"""Converting a dataset to webdataset shards with a manifest of their own."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlmlayers.arguments import Count, checked
from vlmlayers.data.names import IMAGE_SUFFIXES, suffix_of
from vlmlayers.data.shards import NewSample, index_shard, write_shard
from vlmlayers.errors import UserError
from vlmlayers.files import read_json, write_json, write_text
from vlmlayers.manifests.items import Item
from vlmlayers.manifests.manifest import Manifest
from vlmlayers.manifests.place import Root
from vlmlayers.progress import track
from vlmlayers.runs import fingerprint

NOTE = ".conversion.json"


@checked
def write_shards(
    manifest: Manifest,
    split: Sequence[str],
    folder: str | os.PathLike[str],
    per_shard: Count = 1000,
    root: Root = None,
    *,
    progress: bool = True,
) -> Path:
    """Write splits of a dataset as webdataset shards and return the manifest written beside them.

    Files are copied byte for byte, so features do not change; drawn images, and those without the
    ending of an image, become PNG. Each shard appears when it is complete, the manifest last. A
    conversion that was stopped goes on with the shards that are missing, and with those whose
    images were altered since.

    Args:
        manifest: The dataset to convert.
        split: One split or several; `all` for those that the dataset has.
        folder: Where to write: a folder of its own, made if need be.
        per_shard: Items in one tar file.
        root: The data root of the dataset.
        progress: Whether to show progress.

    Raises:
        UserError: An image cannot be read, or the folder holds something else.
    """
    target = Path(folder)
    parts = manifest.splits(root) if "all" in split else split
    listed = {part: manifest.items(part, root) for part in parts}
    data = {part: manifest.identity(items, root) for part, items in listed.items()}
    plan = fingerprint([manifest.hash, per_shard, {k: one.listed for k, one in data.items()}])
    done = _start(target, plan)
    shards: dict[str, list[str]] = {}
    counts: dict[str, int] = {}
    for part, items in listed.items():
        counts[part], shards[part] = len(items), []
        starts = range(0, len(items), per_shard)
        for number, start in enumerate(track(starts, part, unit="shard", show=progress)):
            name = f"{part}-{number:05d}.tar"
            batch = items[start : start + per_shard]
            state = replace(data[part], items=data[part].items[start : start + per_shard]).hash
            # The note alone does not do: a shard may have been deleted or cut since.
            if done.get(name) != state or not _whole(target / name, len(batch)):
                write_shard(target / name, _samples(manifest, batch, start, root))
                done[name] = state
                write_json(target / NOTE, {"plan": plan, "shards": done})
            shards[part].append(name)
    return write_text(target / "manifest.toml", _toml(manifest, shards, counts, root))


def _start(target: Path, plan: str) -> dict[str, str]:
    """Return the identity of what each finished shard of a conversion was made of.

    Raises:
        UserError: The folder holds something else.
    """
    note = target / NOTE
    found: dict[str, Any] = read_json(note) if note.exists() else {"plan": plan}
    if found.get("plan") != plan:
        raise UserError(f"{target} holds another conversion; choose another folder, or delete it")
    # A manifest among them would be replaced, and a folder of images read as its shards from then.
    others = [] if note.exists() else sorted(target.glob("[!.]*"))
    if others:
        raise UserError(
            f"{target} holds {others[0].name}, which is of no conversion; shards go into a folder "
            "of their own: choose another"
        )
    return dict(found.get("shards", {}))


def _whole(shard: Path, count: int) -> bool:
    try:
        return shard.exists() and len(index_shard(shard)) == count
    except UserError:  # it was cut
        return False


def _samples(
    manifest: Manifest, items: Sequence[Item], start: int, root: Root
) -> Iterator[tuple[int, NewSample]]:
    for number, item in enumerate(items, start=start):
        image, suffix = _encoded(manifest, item, root)
        yield number, NewSample(image, suffix, item.label, item.captions, item.path)


def _encoded(manifest: Manifest, item: Item, root: Root) -> tuple[bytes, str]:
    """Return an image's bytes as they are stored, or as PNG where there is no file."""
    suffix = suffix_of(item.path)
    # Drawn images have none. Of another, as a shard may have, the new manifest would not know.
    if suffix in IMAGE_SUFFIXES:
        source, _ = manifest.encoded(item, root)
        if isinstance(source, bytes):
            return source, suffix
        try:
            return source.read_bytes(), suffix
        except OSError as error:
            raise UserError(f"{source} cannot be read: {error.strerror}") from None
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
