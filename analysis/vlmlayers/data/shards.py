"""Webdataset shards: an index over plain tar files for random access, and the writer.

A sample is the members that share a name up to its first dot: an image, `.cls` (a whole number
or a class name), `.txt` (captions, one a line), `.json` (kept, not read). The files are read with
the standard library rather than with webdataset's iterator, because rows are written by item
index and a run resumes in the middle: both need access by number.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from vlmlayers.errors import UnreadableImage, UserError
from vlmlayers.files import atomically

IMAGE_SUFFIXES = frozenset(["jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm"])
LARGEST_TEXT = 1_000_000  # bytes of a .cls or .txt member


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample of a shard.

    Attributes:
        image: Name of the image member.
        offset: Where the image's bytes start in the tar file.
        size: Number of its bytes.
        target: Content of `.cls`, or None.
        captions: Lines of `.txt`.
    """

    image: str
    offset: int
    size: int
    target: str | None
    captions: tuple[str, ...]


def index_shard(path: Path) -> tuple[Sample, ...]:
    """List the samples of a shard in the order of their first member.

    Raises:
        UserError: The file is missing, compressed, no tar, truncated, or a sample lacks an image.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    return _index(str(path), status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=4096)
def _index(path: str, changed: int, size: int) -> tuple[Sample, ...]:
    parts: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with Path(path).open("rb") as handle, tarfile.open(fileobj=handle, mode="r:") as tar:
            for member in tar:
                if not member.isreg():
                    continue
                if member.offset_data + member.size > size:
                    raise UserError(f"{path} is truncated in the member {member.name[:200]!a}")
                folder, slash, name = member.name.rpartition("/")
                key, _, suffix = name.partition(".")
                parts.setdefault(folder + slash + key, {})[suffix.lower()] = member
            return tuple(_sample(key, by, handle, path) for key, by in parts.items())
    except (tarfile.TarError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as an uncompressed tar: {error}") from None


def _sample(key: str, members: dict[str, tarfile.TarInfo], handle: BinaryIO, path: str) -> Sample:
    image = next((m for suffix, m in members.items() if suffix in IMAGE_SUFFIXES), None)
    if image is None:
        raise UserError(f"{path}: the sample {key[:200]!a} has no image among {sorted(members)}")
    target = _text(members.get("cls"), handle, path)
    captions = _text(members.get("txt"), handle, path)
    lines = tuple(line for line in (captions or "").split("\n") if line.strip())
    cls = None if target is None else target.strip()
    return Sample(image.name, image.offset_data, image.size, cls, lines)


def _text(member: tarfile.TarInfo | None, handle: BinaryIO, path: str) -> str | None:
    if member is None:
        return None
    if member.size > LARGEST_TEXT:
        raise UserError(f"{path}: the member {member.name[:200]!a} is too large for text")
    handle.seek(member.offset_data)
    try:
        return handle.read(member.size).decode()
    except UnicodeDecodeError:
        raise UserError(f"{path}: the member {member.name[:200]!a} is not UTF-8 text") from None


@lru_cache(maxsize=4096)
def _by_image(path: str, changed: int, size: int) -> dict[str, Sample]:
    return {sample.image: sample for sample in _index(path, changed, size)}


def read_member(path: Path, image: str) -> bytes:
    """Return the bytes of one image of a shard.

    Raises:
        UserError: The shard is missing or does not hold that image.
        UnreadableImage: The shard ends before the image does.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    sample = _by_image(str(path), status.st_mtime_ns, status.st_size).get(image)
    if sample is None:
        raise UserError(f"{path} holds no image {image[:200]!a}")
    with path.open("rb") as handle:
        handle.seek(sample.offset)
        content = handle.read(sample.size)
    if len(content) != sample.size:
        raise UnreadableImage(f"{path}: the image {image[:200]!a} is cut off")
    return content


@dataclass(frozen=True)
class NewSample:
    """What a writer needs of one sample.

    Attributes:
        image: Encoded bytes.
        suffix: Suffix of the image's format, without a dot.
        label: Number of the class; negative for none.
        captions: Texts; a newline inside becomes a space.
        origin: Path in the dataset that it came from.
    """

    image: bytes
    suffix: str
    label: int
    captions: tuple[str, ...]
    origin: str


def write_shard(path: Path, samples: Iterable[tuple[int, NewSample]]) -> None:
    """Write numbered samples into one tar file, which appears only when it is complete.

    Equal samples give equal bytes: times and owners are fixed.

    Raises:
        UserError: The package webdataset is not installed, or the disk is full or not writable.
    """
    try:
        from webdataset.writer import TarWriter
    except ImportError as error:
        raise UserError(
            "writing shards needs the package webdataset; install it with "
            "`pip install 'vlm-layers[shards]'`"
        ) from error

    def write(part: Path) -> None:
        with part.open("wb") as stream, TarWriter(stream, encoder=False, mtime=0) as tar:
            for number, sample in samples:
                tar.write({"__key__": f"{number:08d}", **_members(sample)})

    atomically(path, write)


def _members(sample: NewSample) -> dict[str, bytes]:
    members = {sample.suffix: sample.image}
    if sample.label >= 0:
        members["cls"] = str(sample.label).encode()
    if sample.captions:
        lines = (" ".join(text.split()) for text in sample.captions)
        members["txt"] = "\n".join(lines).encode()
    members["json"] = json.dumps({"path": sample.origin}, ensure_ascii=False).encode()
    return members
