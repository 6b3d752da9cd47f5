"""Webdataset shards: an index over plain tar files for random access, and the writer.

A sample is the members that share a name up to its first dot: an image, `.cls` (a whole number
or a class name), `.txt` (captions, one a line); `Members` may name others. The files are read with
the standard library rather than with webdataset's iterator, because rows are written by item
index and a run resumes in the middle: both need access by number.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from vlmlayers.data.names import IMAGE_SUFFIXES, is_foreign, suffix_of
from vlmlayers.errors import UnreadableImage, UserError
from vlmlayers.files import atomically, file_stamp
from vlmlayers.options import Options, Several

LARGEST_TEXT = 1_000_000  # bytes of a .cls or .txt member


class Members(Options):
    """Endings of the members of a sample; of several the first that is there counts.

    Attributes:
        image: Such as `jpg` or `rgb.png`; where empty, the one image that the sample has.
        label: Of the member that holds the class.
        caption: Of the member that holds captions.
    """

    image: Several[str] = ()
    label: Several[str] = ("cls",)
    caption: Several[str] = ("txt",)


USUAL = Members()


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample of a shard.

    Attributes:
        image: Name of the image member; members of one name are told apart by `~2`, `~3`, ….
        offset: Where the image's bytes start in the tar file.
        size: Number of its bytes.
        target: Content of the label's member, or None.
        captions: Lines of the captions' member.
    """

    image: str
    offset: int
    size: int
    target: str | None
    captions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Member:
    name: str  # as in the tar file, but unique
    key: str
    ending: str
    offset: int
    size: int


_Parts = Mapping[str, _Member]  # members of one sample by their ending


def index_shard(path: Path, members: Members = USUAL) -> tuple[Sample, ...]:
    """List the samples of a shard in the order of their first member.

    Raises:
        UserError: The file is missing, compressed, no tar, truncated or without images; or a
            sample has a class but no image, or several images of which none is named.
    """
    return _index(*file_stamp(path), members)[0]


def other_members(path: Path, members: Members = USUAL) -> tuple[str, ...]:
    """List the members of a shard that belong to no sample, such as a README."""
    return _index(*file_stamp(path), members)[1]


# Kept by size and time of change, so that a shard that was replaced is read anew.
@lru_cache(maxsize=4096)
def _index(
    path: str, changed: int, size: int, members: Members
) -> tuple[tuple[Sample, ...], tuple[str, ...]]:
    try:
        # Only `r:`: in a compressed tar no member can be reached by its offset.
        with Path(path).open("rb") as handle, tarfile.open(fileobj=handle, mode="r:") as tar:
            found, others = _keyed(tar, path, size)
            samples = []
            for parts in _grouped(found):
                sample = _sample(parts, members, handle, path)
                if sample is None:
                    others += [member.name for member in parts.values()]
                else:
                    samples.append(sample)
    except (tarfile.TarError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as an uncompressed tar: {error}") from None
    if others and not samples:
        raise UserError(f"{path} holds no sample with an image among {sorted(others)[:3]}")
    return tuple(samples), tuple(others)


def _keyed(tar: tarfile.TarFile, path: str, size: int) -> tuple[list[_Member], list[str]]:
    """Return the members that have a key and an ending, and the names of the others."""
    found: dict[str, _Member] = {}
    others = []
    for member in tar:
        if not member.isreg():
            continue
        if member.offset_data + member.size > size:
            raise UserError(f"{path} is truncated in the member {member.name[:200]!r}")
        folder, slash, name = member.name.rpartition("/")
        stem, dot, ending = name.partition(".")
        if not dot or any(is_foreign(part) for part in member.name.split("/")):
            others.append(member.name)
            continue
        # A tar may hold one name several times; all are items, numbered in their order.
        key, own, number = folder + slash + stem, member.name, 1
        while own in found:
            number += 1
            own = f"{key}~{number}.{ending}"
        found[own] = _Member(own, key, ending.lower(), member.offset_data, member.size)
    return list(found.values()), others


def _grouped(members: Iterable[_Member]) -> list[_Parts]:
    """Return the members of each sample.

    A sample is a run of members of one key, and ends where an ending comes a second time: keys
    may repeat, as where the files of several folders were packed under their bare names. Runs of
    one key that share no ending are one sample whose members lie apart.
    """
    runs: dict[str, list[dict[str, _Member]]] = {}
    last = None
    for member in members:
        of_key = runs.setdefault(member.key, [])
        if member.key != last or member.ending in of_key[-1]:
            of_key.append({})
        of_key[-1][member.ending] = member
        last = member.key
    samples: list[dict[str, _Member]] = []
    for of_key in runs.values():
        whole = {ending: member for run in of_key for ending, member in run.items()}
        samples += [whole] if len(whole) == sum(map(len, of_key)) else of_key
    return sorted(samples, key=lambda parts: next(iter(parts.values())).offset)


def _sample(parts: _Parts, members: Members, handle: BinaryIO, path: str) -> Sample | None:
    """Return a sample, None where there is neither an image nor a class."""
    image = _image(parts, members, path)
    target = _text(parts, members.label, handle, path)
    if image is None:
        if target is None:
            return None
        key = next(iter(parts.values())).key
        raise UserError(f"{path}: the sample {key[:200]!r} has no image among {sorted(parts)}")
    captions = _text(parts, members.caption, handle, path)
    lines = tuple(line for line in (captions or "").split("\n") if line.strip())
    cls = None if target is None else target.strip()
    return Sample(image.name, image.offset, image.size, cls, lines)


def _image(parts: _Parts, members: Members, path: str) -> _Member | None:
    """Return the image of a sample: the one that is named, else the only one.

    An image whose ending is a bare format goes before those of more parts, such as `mask.png`.
    """
    if members.image:
        return _first(parts, members.image)
    images = [ending for ending in parts if suffix_of(ending) in IMAGE_SUFFIXES]
    images = [ending for ending in images if "." not in ending] or images
    if len(images) > 1:
        key = parts[images[0]].key
        raise UserError(
            f"{path}: the sample {key[:200]!r} has the images {', '.join(sorted(images))}; say in "
            f'the manifest which one counts, as in members = {{ image = "{images[0]}" }}'
        )
    return parts[images[0]] if images else None


def _first(parts: _Parts, endings: Sequence[str]) -> _Member | None:
    found = (parts.get(ending.lower().removeprefix(".")) for ending in endings)
    return next((member for member in found if member is not None), None)


def _text(parts: _Parts, endings: Sequence[str], handle: BinaryIO, path: str) -> str | None:
    member = _first(parts, endings)
    if member is None:
        return None
    if member.size > LARGEST_TEXT:
        raise UserError(f"{path}: the member {member.name[:200]!r} is too large for text")
    handle.seek(member.offset)
    try:
        return handle.read(member.size).decode()
    except UnicodeDecodeError:
        raise UserError(f"{path}: the member {member.name[:200]!r} is not UTF-8 text") from None


@lru_cache(maxsize=4096)
def _by_image(path: str, changed: int, size: int, members: Members) -> dict[str, Sample]:
    return {sample.image: sample for sample in _index(path, changed, size, members)[0]}


def read_member(path: Path, image: str, members: Members = USUAL) -> bytes:
    """Return the bytes of one image of a shard.

    Raises:
        UserError: The shard is missing or does not hold that image.
        UnreadableImage: The shard ends before the image does.
    """
    sample = _by_image(*file_stamp(path), members).get(image)
    if sample is None:
        raise UserError(f"{path} holds no image {image[:200]!r}")
    with path.open("rb") as handle:
        handle.seek(sample.offset)
        content = handle.read(sample.size)
    if len(content) != sample.size:
        raise UnreadableImage(f"{path}: the image {image[:200]!r} is cut off")
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
