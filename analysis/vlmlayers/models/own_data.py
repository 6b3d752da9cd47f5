"""Data that is already in memory, as extraction takes a dataset: any common holder of images."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
    default_convert,
)

from vlmlayers.data.readers import (
    eight_bit,
    faults_named,
    forget_ranges,
    is_negative,
    note_range,
    open_image,
    upright,
)
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.identity import DataIdentity
from vlmlayers.manifests import Manifest
from vlmlayers.manifests.items import Item, balanced_sample
from vlmlayers.progress import track
from vlmlayers.prompts import TEMPLATE, class_prompts
from vlmlayers.words import counted

LOG = logging.getLogger(__name__)
NAME = "own data"
_IMAGES = ("image", "img", "pixel_values", "jpg", "png")
_LABELS = ("label", "labels", "target", "fine_label", "cls")
_CAPTIONS = ("caption", "captions", "text")
TWICE = 8  # rows; a flip of every second image escapes 8 of them once in 256 times
_SEVERAL = ", ".join(("PIL images", "arrays", "(image, label) pairs"))


@dataclass(frozen=True, eq=False)
class OwnData:
    """Images with labels that some object in memory holds; what extraction asks of a manifest.

    Attributes:
        name: Name for tables.
        listed: An item per image; its path is its number, or that of its file.
        marks: What tells the content of each image from any other.
        names: Class names by label; made up where they were not given.
        named: Whether names of the classes were given, so that prompts can be made of them.
        image: Row → PIL image, or a tensor that is prepared already.
        template: Prompt of a class.
    """

    name: str
    listed: tuple[Item, ...]
    marks: tuple[str, ...]
    names: tuple[str, ...]
    named: bool
    image: Callable[[int], Any]
    template: str = TEMPLATE

    @cached_property
    def rows(self) -> dict[str, int]:
        """Row of each item by its path."""
        return {item.path: row for row, item in enumerate(self.listed)}

    def class_names(self, root: Any = None) -> tuple[str, ...]:
        """Return the class names by label."""
        return self.names

    def prompt(self, class_name: str, template: str | None = None) -> str:
        """Return the prompt of one class."""
        return class_prompts([class_name], template or self.template)[0]

    def items(self, split: str, root: Any = None, present_only: bool = False) -> list[Item]:
        """Return all items: the split is but a name here."""
        return list(self.listed)

    def sample(
        self, split: str, n: int, seed: int = 0, root: Any = None, present_only: bool = False
    ) -> list[Item]:
        """Return up to `n` items, balanced over classes."""
        return balanced_sample(self.listed, n, seed)

    def present(self, items: Sequence[Item], root: Any = None, split: str = "") -> list[Item]:
        """Return the items: all are there."""
        return list(items)

    def refuse_missing(self, items: Sequence[Item], root: Any = None) -> None:
        """Refuse nothing: what is in memory is there."""

    def refuse_others(self, items: Sequence[Item]) -> None:
        """Refuse items of other data.

        Raises:
            UserError: Names the first.
        """
        for item in items:
            if item.path not in self.rows:
                raise UserError(
                    f"{self.name} has no item {item.path!r}; name items of these data: in memory "
                    f"each is its number, from 0 to {len(self.listed) - 1}, or its file"
                )

    def identity(self, items: Sequence[Item], root: Any = None) -> DataIdentity:
        """Return what the items are, by their content."""
        return DataIdentity(
            self.names,
            tuple((item.path, item.label, self.marks[self.rows[item.path]]) for item in items),
        )

    def open_image(self, item: Item, root: Any = None, size: int | None = None) -> Any:
        """Return an item's image, upright and RGB, or the tensor that it is."""
        image = self.image(self.rows[item.path])
        note_range(self.name, image, item.path)
        return image


def own_data(
    data: Any,
    labels: Collection[Any] | None = None,
    class_names: Sequence[str] | None = None,
    name: str | None = None,
    captions: Collection[Any] | None = None,
    progress: bool = False,
    captioned: bool = False,
) -> OwnData:
    """Return any common holder of images as extraction takes a dataset.

    Args:
        data: A list of PIL images, paths, arrays (height, width[, channel]), or (image, label)
            pairs; an array (image, height, width, channel); a torch `Dataset` or the `DataLoader`
            of one; torchvision's `ImageFolder`; a `datasets.Dataset` of Hugging Face. Floating
            tensors count as prepared for the model; all else is prepared as the model wants it.
        labels: (image,) classes: numbers from 0, or names.
        class_names: Names by label; where None those that the data know, if the labels are theirs.
        name: Name for tables; what the data call themselves, or "own data".
        captions: (image,) a text, or several, for each image.
        progress: Whether to show a bar while a dataset is read for labels and identity.
        captioned: Whether words in place of labels are captions where there are no others.

    Raises:
        UserError: The object holds no images, labels or captions are not one for each, or there are
            names of classes and no labels.
    """
    held = _held(data, progress)
    untold = captioned and captions is None and held.captions is None
    if untold and held.labels and all(map(_worded, held.labels)):
        captions, held.labels = held.labels, None
    if labels is not None:
        own = held.labels
        held.labels = list(labels.tolist() if hasattr(labels, "tolist") else labels)
        worded = all(isinstance(label, str) for label in held.labels)  # which say their names
        if not (own is None or worded or list(map(str, own)) == list(map(str, held.labels))):
            held.names = ()  # those are of the data's own labels, such as finer ones
    count = len(held.marks)
    if not count:
        raise UserError("the data hold no images")
    if held.labels is None and held.unread:
        LOG.warning(
            "the images have no classes: none of the other columns (%s) is a ClassLabel or is "
            "called %s; rename the one that counts, or give labels=data[column]",
            ", ".join(held.unread), " or ".join(_LABELS),
        )  # fmt: skip
    given = held.labels if held.labels is not None else [0] * count
    for what, several in (("labels", given), ("captions", captions)):
        if several is not None and len(several) != count:
            raise UserError(
                f"{counted(count, 'image')}, but {len(several)} {what}; one for each is needed"
            )
    if class_names is not None and held.labels is None:
        raise UserError("class_names are of labels, and the images have none; give labels as well")
    # A class of several names goes by the first, as torchvision has those of ImageNet in tuples.
    of_data = (one[0] if isinstance(one, tuple) and one else one for one in held.names)
    names = tuple(class_names or of_data)
    numbers, names = _numbered(given, names, held.labels is not None)
    named = bool(names)
    names = names or tuple(f"class {i}" for i in range(max(numbers) + 1))
    texts = held.captions
    if captions is not None:
        texts = _all_texts(captions)
    ids = held.ids or list(map(str, range(count)))
    listed = tuple(
        Item(ids[row], label, names[label], texts[row] if texts else ())
        for row, label in enumerate(numbers)
    )
    name = name or held.name or NAME
    forget_ranges(name)  # of other data that had no name either
    return OwnData(name, listed, held.marks, names, named, held.image)


@dataclass
class _Held:
    """What is taken from a holder of images: images by row, their marks, labels and names.

    `unread` names the columns of a table that are taken for nothing.
    """

    image: Callable[[int], Any]
    marks: tuple[str, ...]
    labels: list[Any] | None = None
    names: Sequence[str] = ()
    name: str = ""
    captions: list[tuple[str, ...]] | None = None
    ids: list[str] | None = None
    unread: Sequence[str] = ()


def _held(data: Any, progress: bool) -> _Held:
    if isinstance(data, Mapping):
        first = next(iter(data), "train")
        raise UserError(
            f"the data are several parts by name; give one of them, such as data[{first!r}]: "
            f"{', '.join(map(str, data))}"
        )
    # By what they can do, not by class: none of these libraries has to be installed.
    if hasattr(data, "column_names") and hasattr(data, "features"):
        return _hugging_face(data)
    if hasattr(data, "samples") and hasattr(data, "class_to_idx"):
        return _image_folder(data)
    if hasattr(data, "dataset") and hasattr(data, "batch_sampler"):
        _refuse_part(data)
        return _held(data.dataset, progress)  # in its own order: extraction makes its own batches
    if hasattr(data, "columns") and hasattr(data, "to_csv"):
        raise UserError(
            "a table in memory is no dataset; write it with to_csv('items.csv', index=False) and "
            "give that path, or give its images as a list and labels="
        )
    shape = tuple(getattr(data, "shape", ()))
    # Of three axes it may be grey images; with channels among them it is one image in colour.
    channels = {*shape[-1:], *(shape[:1] if isinstance(data, Tensor) else ())}
    if len(shape) == 3 and channels & {3, 4}:
        raise UserError(f"{_what(data)} is one image, not several; give a list of images")
    indexed = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    if not indexed and isinstance(data, Iterable):
        data, indexed = list(data), True
    if not indexed:
        raise UserError(
            f"data takes a dataset's name, path or Manifest, a list of {_SEVERAL}, a torch "
            "Dataset or DataLoader, ImageFolder, or a datasets.Dataset, not a value of type "
            f"{type(data).__name__}"
        )
    return _sequence(data, progress)


def _refuse_part(loader: Any) -> None:
    """Refuse a DataLoader that does not draw each image of its dataset once, as it is.

    Raises:
        UserError: Says how to hand over a part.
    """
    batches, dataset = loader.batch_sampler, loader.dataset
    if loader.collate_fn not in (default_collate, default_convert):
        raise UserError(
            "the DataLoader has a collate_fn of its own, which extraction does not run; give its "
            "dataset, whose images are prepared as the model wants them"
        )
    if batches is not None and type(batches) is not BatchSampler:
        drawn = f"by a {type(batches).__name__} of its own"  # whose rows nothing tells beforehand
    elif isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        drawn = "whole batches alone (drop_last=True)" if loader.drop_last else ""
    else:
        # A batch sampler of the user's own has a sampler of its own, which the loader ignores.
        drawn = _other_rows(loader.sampler if batches is None else batches.sampler, len(dataset))
        left = len(dataset) % batches.batch_size if batches is not None and batches.drop_last else 0
        if left and not drawn:
            drawn = f"all but the last {left} of {len(dataset):,} images (drop_last=True)"
    if drawn:
        raise UserError(
            f"the DataLoader draws {drawn}, which extraction does not follow; give its dataset, or "
            "a part of it, such as torch.utils.data.Subset(dataset, indices)"
        )


def _other_rows(sampler: Any, count: int) -> str:
    """Return what a sampler draws; empty where that is each row of a dataset once."""
    # Of these two, in order or shuffled, the rows are known without drawing any.
    known = type(sampler) in (SequentialSampler, RandomSampler)
    if getattr(sampler, "replacement", False):
        return f"with replacement, by a {type(sampler).__name__}"
    if known and len(sampler) == count:
        return ""
    size = f" ({len(sampler):,} of {count:,} images)" if hasattr(sampler, "__len__") else ""
    return f"by a {type(sampler).__name__}{size}"


def _sequence(data: Any, progress: bool) -> _Held:
    """Read a list or torch dataset once, for its labels and for what tells its content."""
    marks: list[str] = []
    labels: list[Any] = []
    captions: list[Any] = []
    for row in track(range(len(data)), "reading labels", unit="image", show=progress):
        image, label, caption = _parts(data[row], row)
        if isinstance(image, str | Path) and (image in Manifest.names() or Path(image).is_dir()):
            raise UserError(f"{image} is a dataset, not an image; give one dataset at a time")
        marks.append(_mark(image, row))
        labels.append(label)
        captions.append(caption)
    known = [label is not None for label in labels]
    if any(known) and not all(known):
        raise UserError(f"image {known.index(False)} has no label, others have")
    _tell_random(lambda row: _parts(data[row], row)[0], marks[:TWICE])
    inner = getattr(data, "dataset", data)
    return _Held(
        partial(_of_sequence, data),
        tuple(marks),
        labels if known and all(known) else None,
        getattr(data, "classes", None) or getattr(inner, "classes", None) or (),
        captions=_all_texts(captions) if any(captions) else None,
    )


def _tell_random(read: Callable[[int], Any], marks: Sequence[str]) -> None:
    """Warn where images read again are others, as behind a transform that augments."""
    differ = [row for row, mark in enumerate(marks) if _mark(read(row), row) != mark]
    if differ:
        LOG.warning(
            "image %d is another one each time it is read, as a transform that augments makes it; "
            "features are then of what was drawn, and no store of them is found again: give the "
            "data without it",
            differ[0],
        )


def _parts(sample: Any, row: int) -> tuple[Any, Any, Any]:
    """Return image, label (None where there is none) and captions of one sample."""
    if isinstance(sample, Mapping):
        key = next((key for key in _IMAGES if key in sample), None)
        if key is None:
            raise UserError(f"sample {row} has keys {', '.join(map(str, sample))} but no 'image'")
        label = next((sample[key] for key in _LABELS if key in sample), None)
        beside = (sample[key] for key in _CAPTIONS if key in sample)
        return sample[key], _plain(label), next(filter(_worded, beside), ())
    if isinstance(sample, tuple | list):
        return sample[0], _plain(sample[1]) if len(sample) > 1 else None, ()
    return sample, None, ()


def _worded(captions: Any) -> bool:
    """Return whether these are a text or several; under their names may be numbers of tokens."""
    several = captions if isinstance(captions, tuple | list) else (captions,)
    return bool(several) and all(isinstance(one, str) for one in several)


def _plain(label: Any) -> Any:
    # Not `np.size`, which takes that of a tensor for a number.
    return label.item() if hasattr(label, "item") and np.prod(label.shape) == 1 else label


def _image_folder(data: Any) -> _Held:
    """Read torchvision's folder by its files: the model's own preparation is what is wanted."""
    files = [str(path) for path, _ in data.samples]
    return _Held(
        partial(_of_files, files),
        tuple(map(_mark, files)),
        [label for _, label in data.samples],
        data.classes,
        Path(data.root).name,
        ids=[Path(os.path.relpath(file, data.root)).as_posix() for file in files],
    )


def _hugging_face(data: Any) -> _Held:
    if not hasattr(data, "__len__"):
        raise UserError(
            "the data are streamed, and items are drawn by number; load them with streaming=False, "
            "or give datasets.Dataset.from_list(list(data.take(1000)), features=data.features)"
        )
    kinds = {key: type(kind).__name__ for key, kind in data.features.items()}
    pictures = [key for key, kind in kinds.items() if kind == "Image"]
    if not pictures:
        raise UserError(f"no column of the data holds images; it has {', '.join(kinds)}")
    image = pictures[0]
    # By its usual name first: another column of classes may be of domains, or of coarser ones.
    label = next((key for key in _LABELS if key in kinds), None)
    classes = [key for key, kind in kinds.items() if kind == "ClassLabel"]
    if label is None and len(classes) > 1:
        raise UserError(
            f"the data have several columns of classes, {', '.join(classes)}; rename the one that "
            "counts to 'label' (data.rename_column), or remove the others"
        )
    label = label or next(iter(classes), None)
    captions = next((key for key in _CAPTIONS if key in kinds), None)
    if len(data) and data.format["type"] == "custom":  # a transform, such as one of a training
        if image not in data[0]:
            raise UserError(
                f"the transform of the data leaves no column {image!r}; give data.with_format(None)"
            )
        first = [_mark(data[row][image], row) for row in range(min(TWICE, len(data)))]
        _tell_random(lambda row: data[row][image], first)
    plain = data.with_format(None)  # a transform would run on every image for its label alone
    names = getattr(data.features[label], "names", ()) if label else ()
    told: Sequence[Any] = plain[captions] if captions else ()
    return _Held(
        partial(_of_table, data, image),
        # A fingerprint of content and transforms, which spares reading all images.
        tuple(f"{data._fingerprint} {row}" for row in range(len(data))),
        list(plain[label]) if label else None,
        names,
        str(getattr(data.info, "dataset_name", "") or ""),
        # Under these names may be numbers of tokens as well; some images may have none.
        _all_texts(one or () for one in told) if any(map(_worded, told)) else None,
        unread=[key for key in kinds if key not in (image, label, captions)],
    )


# Functions of the module, so that decoding processes can be handed them.
def _of_sequence(data: Any, row: int) -> Any:
    return _picture(_parts(data[row], row)[0], row)


def _of_files(files: Sequence[str], row: int) -> Any:
    return open_image(files[row])


def _of_table(data: Any, column: str, row: int) -> Any:
    return _picture(data[row][column], row)


def _all_texts(captions: Iterable[Any]) -> list[tuple[str, ...]]:
    return [_texts_of(one, row) for row, one in enumerate(captions)]


def _texts_of(one: Any, row: int) -> tuple[str, ...]:
    ordered = isinstance(one, Iterable) and not isinstance(one, str | Mapping | Set)
    several = tuple(one) if ordered else (one,)
    for text in several:
        if not isinstance(text, str):
            raise UserError(
                f"{_what(text)} is no caption of image {row}; give a text, or several in a list"
            )
    return tuple(map(str, several))


def _numbered(
    labels: Sequence[Any], names: tuple[str, ...], given: bool
) -> tuple[list[int], tuple[str, ...]]:
    """Return labels as numbers, and the class names that go with them; none where unknown."""
    if not given:
        return [0] * len(labels), ()
    if all(isinstance(label, str) for label in labels):
        known = names or tuple(sorted(set(labels)))
        rows = {name: row for row, name in enumerate(known)}
        for label in labels:
            check_one_of("class", label, known, where="labels")
        return [rows[label] for label in labels], known
    for row, label in enumerate(labels):
        plain = np.ndim(label) == 0
        if not plain or isinstance(label, bool) or not hasattr(label, "__index__") or label < 0:
            # Of a pair (images, labels) the second image stands where the first one's label does.
            raise UserError(
                f"label {label if plain else _what(label)} of image {row} is not a class: a number "
                f"from 0, or a name{'' if plain else '; a list of them goes by labels='}"
            )
        if names and int(label) >= len(names):
            raise UserError(f"label {label} of image {row}, but there are {len(names)} class names")
    return [int(label) for label in labels], names


def _picture(image: Any, row: int) -> Any:
    """Return an image as PIL image, upright and RGB; a floating tensor as it is."""
    where = f"image {row}"
    if isinstance(image, Tensor):
        image = _here(image)
        if image.is_floating_point():
            return image
        image = image.numpy()
        # Channels stand first in tensors of images and last in arrays.
        image = np.moveaxis(image, 0, -1) if image.ndim == 3 and len(image) in (1, 3, 4) else image
    if isinstance(image, str | Path):
        return open_image(image)
    if isinstance(image, Image.Image):
        return upright(image, where)
    array = np.asarray(image)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.dtype.kind not in "uif" or array.ndim not in (2, 3) or array.shape[2:] not in (
        (), (3,), (4,)
    ):  # fmt: skip
        raise UserError(
            f"{where} is {_what(image)}; an image is a PIL image, a path, or an array of (height, "
            "width) or (height, width, 3)"
        )
    wide = array.dtype != np.uint8
    return upright(eight_bit(array, where) if wide else Image.fromarray(array), where)


def _here(image: Tensor) -> Tensor:
    """Return a tensor as numpy can read it: in memory, without gradient, bfloat16 widened."""
    image = image.detach().cpu()
    return image.float() if image.dtype == torch.bfloat16 else image


def _what(image: Any) -> str:
    shape = getattr(image, "shape", None)
    kind = f" of {image.dtype}" if getattr(image, "dtype", None) in (bool, object) else ""
    return f"a {type(image).__name__}{kind}" + (
        "" if shape is None else f" of shape {tuple(shape)}"
    )


def _mark(image: Any, row: int = 0) -> str:
    """Return what tells an image from others: its content, or size and time of its file."""
    if isinstance(image, str | Path):
        try:
            status = Path(image).stat()
        except OSError as error:
            raise UserError(f"image {image} cannot be read: {error.strerror}") from None
        # Not the content: to read every file would cost as much as the extraction.
        return f"{image} {status.st_size} {status.st_mtime_ns}"
    if isinstance(image, Image.Image):
        with faults_named(f"image {row}"):  # its file may be cut short
            try:
                image.load()
            except AssertionError:  # of Pillow, after a `with` around the opening
                raise ValueError("its file was closed before it was read") from None
            content, head = image.tobytes(), f"{image.mode} {image.size}"
        # What turns or colours the same bytes in another way; most images have none of it.
        turned = image.getexif().get(ExifTags.Base.Orientation)
        beside = (turned, image.getpalette(), image.info.get("transparency"))
        head += f" {beside}" if any(one is not None for one in beside) else ""
        head += " negative" if is_negative(image) else ""
    else:
        array = np.ascontiguousarray(_here(image).numpy() if isinstance(image, Tensor) else image)
        content, head = array.tobytes(), f"{array.dtype} {array.shape}"
    return f"{head} {hashlib.sha256(content).hexdigest()[:16]}"
