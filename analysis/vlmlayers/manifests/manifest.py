"""A dataset as the rest of the toolkit sees it: names, items, images."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from vlmlayers.arguments import Count, Seed, checked
from vlmlayers.data import builtin
from vlmlayers.errors import NotJPEG, UserError, check_one_of
from vlmlayers.identity import DataIdentity
from vlmlayers.manifests import catalogue
from vlmlayers.manifests.check import (
    SHOWN,
    CheckResult,
    built_in,
    compare,
    copies,
    not_listed,
    unexpected,
)
from vlmlayers.manifests.html import manifest_html
from vlmlayers.manifests.identify import identify
from vlmlayers.manifests.items import SPLITS, Item, balanced_sample, stratified_split
from vlmlayers.manifests.layouts import Layout, layout_of
from vlmlayers.manifests.layouts.builtin import split_and_index
from vlmlayers.manifests.layouts.huggingface import is_stored, stored_image
from vlmlayers.manifests.layouts.table import READERS
from vlmlayers.manifests.place import MissingData, Place, Root, data_root
from vlmlayers.manifests.schema import Spec
from vlmlayers.progress import track
from vlmlayers.prompts import class_prompts, remarks_on
from vlmlayers.runs import is_first_process

if TYPE_CHECKING:
    from PIL import Image

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Manifest:
    """What is known of a dataset, and the way to its items.

    Every method that reads files takes `root`, the data root: by default the environment
    variable `VLMLAYERS_DATA`, else the folder `data` in the current one. `split` is `train`,
    `val`, `test`, or `all` for the three one after the other.

    Attributes:
        name: Short name, as in score tables.
        spec: Content of the manifest.
        source: The TOML file, folder or table it came from; None for built-in datasets.
    """

    name: str
    spec: Spec
    source: Path | None = None

    def __hash__(self) -> int:
        # A spec holds dictionaries, which have no hash; that of its content stands for it.
        return hash((self.name, self.spec.hash, self.source))

    @classmethod
    @checked
    def load(cls, name: str | os.PathLike[str]) -> Manifest:
        """Return the manifest of a name, a TOML file, a folder of images, or a table of them.

        A folder is taken as an image folder: its `train`, `val` and `test` folders are the
        splits where there are any. A `manifest.toml` or `metadata.*` in it is respected. A table
        (`.csv`, `.tsv`, `.jsonl`, `.parquet`) has the columns `path`, seen from its folder, `label`
        and, where known, `class_name`, `split` and `caption`; it goes by its own name, `items.csv`
        by that of its folder.

        Raises:
            UserError: The name is empty or unknown (with the nearest), or the manifest is not
                valid.
        """
        made = cls(*catalogue.find(name))
        if made.layout == "builtin" and Path(name).is_dir():
            _say_once(
                f"{made.name} is a dataset that is drawn by code; ./{made.name} is the folder "
                "of that name"
            )
        return made

    @staticmethod
    def names() -> list[str]:
        """Return the names that can be loaded: shipped manifests, then built-in datasets."""
        return catalogue.names()

    @property
    def title(self) -> str:
        """Name of the dataset as people write it."""
        return self.spec.title

    @property
    def kind(self) -> str:
        """What is in the images."""
        return self.spec.kind

    @property
    def layout(self) -> str:
        """How the items are listed."""
        return self.spec.layout

    @property
    def template(self) -> str:
        """The common prompt template."""
        return self.spec.template

    @property
    def zero_shot_template(self) -> str:
        """The template of the literature's zero-shot rows; the common one where none is known."""
        return self.spec.zero_shot_template or self.spec.template

    @property
    def hash(self) -> str:
        """Sixteen hexadecimal digits that change with anything the manifest says."""
        return self.spec.hash

    def place(self, root: Root = None) -> Place:
        """Return where the dataset lies under a data root."""
        beside = self.source
        if beside is not None and not beside.is_dir():
            # A folder of images that has disappeared since is still that folder.
            is_file = beside.is_file() or beside.suffix.lower() in (".toml", *READERS)
            beside = beside.parent if is_file else beside
        return Place(self.name, self.spec, data_root(root), beside)

    @checked
    def splits(self, root: Root = None) -> tuple[str, ...]:
        """Return the splits the dataset has, a declared carve-out included."""
        return self._splits(layout_of(self.place(root)))

    def _splits(self, layout: Layout) -> tuple[str, ...]:
        found = {*layout.splits(), *self.spec.carve}
        return tuple(split for split in SPLITS if split in found)

    @checked
    def class_names(self, root: Root = None) -> tuple[str, ...]:
        """Return the class names by label, after renames and filters; () without classes."""
        return self._kept_names(layout_of(self.place(root)))

    def _kept_names(self, layout: Layout) -> tuple[str, ...]:
        return tuple(name for name in self._names(layout) if name is not None)

    def require_classes(self, purpose: str, root: Root = None) -> None:
        """Refuse captioned images without classes.

        Args:
            purpose: What the classes are for, after "no classes".
            root: Data root.

        Raises:
            UserError: There are none.
        """
        if not self.class_names(root):
            why = "; ".join(("", *self.remarks(root)))
            raise UserError(f"{self.name} has no classes{purpose}{why}")

    def _names(self, layout: Layout) -> list[str | None]:
        """Return the final name of every class of the files, None for one that is left out."""
        spec = self.spec
        raw = layout.class_names()
        final: list[str | None] = []
        for name in raw:
            new = spec.renames.get(name, name)
            dropped = bool({name, new} & set(spec.drop_classes))
            missed = bool(spec.only_classes) and not {name, new} & set(spec.only_classes)
            final.append(None if dropped or missed else new)
        # Names may be given as the files have them or as they are renamed.
        known = {*raw, *(name for name in final if name is not None)}
        for name in spec.only_classes:
            check_one_of("class", name, sorted(known), where=f"only_classes of {self.name}")
        return final

    @checked
    def prompts(self, root: Root = None, template: str | None = None) -> tuple[str, ...]:
        """Return one prompt per class: the template around the name, underscores as spaces."""
        return tuple(self.prompt(name, template) for name in self.class_names(root))

    def prompt(self, class_name: str, template: str | None = None) -> str:
        """Return the prompt of one class. Braces in the name stay as they are."""
        return class_prompts([class_name], template or self.template)[0]

    @checked
    def items(self, split: str, root: Root = None, *, present_only: bool = False) -> list[Item]:
        """Return the items of a split, in the order of its file (or sorted, for folders).

        No image is opened, and none needs to exist where a file lists them.

        Args:
            split: `train`, `val`, `test` or `all`.
            root: The data root.
            present_only: Leave out the items whose image is not on disk; see `present`.

        Raises:
            UserError: The dataset has no such split, or the files that list it are missing,
                altered or wrong.
        """
        check_one_of("split", split, (*SPLITS, "all"))
        if split == "all":
            parts = [self.items(part, root) for part in self.splits(root)]
            items = [item for part in parts for item in part]
        else:
            items = self._split_items(split, root)
        return self.present(items, root, split) if present_only else items

    def _split_items(self, split: str, root: Root) -> list[Item]:
        layout = layout_of(self.place(root))
        items = self._listed(split, layout)
        differ = unexpected(self.spec, {split: len(items)}, len(self._kept_names(layout)))
        for remark in (*differ, *self._remarks(layout)):
            _say_once(f"{self.name}: {remark}")
        return items

    def _listed(self, split: str, layout: Layout) -> list[Item]:
        found = layout.splits()
        carve = self.spec.carve if "val" not in found and "train" in found else {}
        if split not in found and split not in carve:
            have = ", ".join(self._splits(layout)) or "none on this machine"
            raise UserError(
                f"{self.name} has no split {split!r}; it has: {have}"
                + ("; `carve` in a manifest makes a val of train" if split == "val" else "")
            )
        if carve and split in ("train", "val"):
            shares = {"val": carve["val"], "train": 1 - carve["val"]}
            return stratified_split(self._named(layout.items("train"), layout), shares)[split]
        return self._named(layout.items(split), layout)

    def remarks(self, root: Root = None) -> tuple[str, ...]:
        """Return what reading leaves out or takes otherwise than written, and classes alike."""
        layout = layout_of(self.place(root))
        for split in layout.splits():
            layout.items(split)
        return self._remarks(layout)

    def _remarks(self, layout: Layout) -> tuple[str, ...]:
        return (*layout.remarks(), *remarks_on(self._kept_names(layout)))

    def _named(self, items: list[Item], layout: Layout) -> list[Item]:
        """Apply renames and filters; labels close up where classes are left out."""
        spec = self.spec
        if not (spec.renames or spec.drop_classes or spec.only_classes):
            return items
        names = self._names(layout)
        kept = [label for label, name in enumerate(names) if name is not None]
        labels = {label: new for new, label in enumerate(kept)}
        return [
            Item(item.path, labels[item.label], names[item.label] or "", item.captions)
            for item in items
            if item.label in labels
        ]

    def present(self, items: Sequence[Item], root: Root = None, split: str = "") -> list[Item]:
        """Return the items whose image is on disk; the log says how many are not, and the first."""
        missing = self.missing(items, root)
        if missing and is_first_process():
            LOG.warning(
                "%s: %d of %d items are not on disk and are left out, first %s",
                f"{self.name} {split}".strip(),
                len(missing),
                len(items),
                missing[0].path,
            )
        absent = set(missing)
        return [item for item in items if item not in absent]

    def missing(self, items: Sequence[Item], root: Root = None) -> list[Item]:
        """Return the items whose image is not on disk."""
        if self.layout in ("builtin", "shards") or self.is_stored(root):
            return []  # listed from what is there; of a folder, a link may lead nowhere
        # One listing per folder in place of a stat per image: of a million images on a network disk
        # the one takes seconds, the other an hour.
        place, listing = self.place(root), {}
        absent = []
        for item in items:
            folder, _, name = item.path.rpartition("/")
            if folder not in listing:
                listing[folder] = _files_in(place.images / folder)
            # Accented names may be stored in the other Unicode form, which `inside` tries too.
            if name not in listing[folder] and not (
                not item.path.isascii() and place.inside(item.path).is_file()
            ):
                absent.append(item)
        return absent

    def refuse_missing(self, items: Sequence[Item], root: Root = None) -> None:
        """Refuse items whose image is not on disk, before any of them is opened.

        Raises:
            MissingData: Says how many, the first few, where to get them and how to go without.
        """
        absent = self.missing(items, root)
        if absent:
            shown = ", ".join(item.path for item in absent[:SHOWN])
            more = ", …" if len(absent) > SHOWN else ""
            without = (
                ", or leave them out with present_only (--present-only)"
                if len(absent) < len(items)
                else ""
            )
            raise MissingData(
                f"{self.name}: {len(absent):,} of {len(items):,} images are not in "
                f"{self.place(root).images}: {shown}{more}; {self.place(root).hint}{without}"
            )

    @checked
    def sample(
        self, split: str, n: Count, seed: Seed = 0, root: Root = None, *, present_only: bool = False
    ) -> list[Item]:
        """Return up to `n` items of a split, balanced over classes, in the split's order.

        The draw depends on the items, `n` and `seed` alone; a smaller draw is part of a larger.
        """
        return balanced_sample(self.items(split, root, present_only=present_only), n, seed)

    def identity(
        self, items: Sequence[Item], root: Root = None, *, content: bool = False
    ) -> DataIdentity:
        """Return what some items are at this moment, for every cache of what is made of them.

        Args:
            items: Some of `items`.
            root: The data root.
            content: Read the files, instead of looking at their sizes and times of change.
        """
        return identify(self.place(root), self.class_names(root), items, content=content)

    def is_stored(self, root: Root = None) -> bool:
        """Return whether the images lie in Arrow or Parquet files of a Hugging Face dataset."""
        return is_stored(self.place(root))

    def location(self, item: Item, root: Root = None) -> Path:
        """Return the file that holds an item's image (for shards, the tar file).

        Where a Hugging Face dataset holds its images in tables it is the dataset's folder.

        Raises:
            UserError: The path leaves the dataset's folder, or the dataset is drawn by code.
        """
        if self.layout == "builtin":
            raise UserError(f"{self.name} is drawn by code; its items have no files")
        place = self.place(root)
        if self.is_stored(root):
            return place.images
        path = item.path.partition(".tar/")[0] + ".tar" if self.layout == "shards" else item.path
        return place.inside(path)

    @checked
    def open_image(
        self, item: Item, root: Root = None, size: int | None = None, *, reduced: bool = False
    ) -> Image.Image:
        """Return an item's image, upright and RGB.

        Args:
            item: One of `items`.
            root: The data root.
            size: Side in pixels for datasets that are drawn; files ignore it unless `reduced`.
            reduced: Decode a JPEG at the smallest scale whose sides have `size` pixels.

        Raises:
            UserError: The file is missing or outside the dataset's folder.
            UnreadableImage: It cannot be decoded.
        """
        from vlmlayers.data.readers import note_range, open_image

        if self.layout == "builtin":
            drawn, (split, index) = builtin.get(self.name), split_and_index(item)
            return drawn.image(split, index, **({} if size is None else {"size": size}))
        image = open_image(*self.encoded(item, root), at_least=size if reduced else None)
        note_range(self.name, image, item.path)
        return image

    def read_jpeg(self, item: Item, root: Root = None) -> tuple[bytes, int]:
        """Return the JPEG of an item as it is, and its EXIF orientation (1 to 8).

        Raises:
            UserError: The file is missing or outside the dataset's folder.
            NotJPEG: The image is of another format, or drawn by code.
            UnreadableImage: Its header cannot be read.
        """
        from vlmlayers.data.readers import read_jpeg

        if self.layout == "builtin":
            raise NotJPEG(
                f"decoding nvjpeg takes JPEG files, and {self.name} is drawn by code; leave it out"
            )
        return read_jpeg(*self.encoded(item, root))

    def encoded(self, item: Item, root: Root = None) -> tuple[Path | bytes, str | None]:
        """Return the file of an item's image, or its bytes, and what to call it in messages."""
        from vlmlayers.data.shards import read_member

        path = self.location(item, root)
        if self.is_stored(root):
            return stored_image(self.place(root), item.path), item.path
        if self.layout == "shards":
            member = item.path.partition(".tar/")[2]
            return read_member(path, member, self.spec.members), f"{path}/{member}"
        return path, None

    @checked
    def check(self, root: Root = None, full: bool = False) -> CheckResult:
        """Compare what is on disk with what the manifest expects.

        Args:
            root: The data root.
            full: Decode every image, tell the content of all, which any copy shares, and which
                images are copies of others.
        """
        if self.layout == "builtin":
            return built_in(self.name, self.spec)
        try:
            # One layout, which lists a million files once. The result has the remarks, which the
            # log would say a second time.
            layout = layout_of(self.place(root))
            by_split = {split: self._listed(split, layout) for split in self._splits(layout)}
            classes, remarks = len(self._kept_names(layout)), self._remarks(layout)
        except UserError as error:
            return not_listed(self.name, self.spec, error)
        items = [item for part in by_split.values() for item in part]
        missing = self.missing(items, root)
        if not full:
            return compare(self.place(root), by_split, classes, missing, remarks=remarks)
        unreadable = self._unreadable(items, set(missing), root)
        identity = self.identity(items, root, content=True)
        if self.layout != "shards" and not self.is_stored(root):  # a file is one image there
            absent = {item.path for item in missing}
            # Behind the mark of the file stands that of its captions.
            marks = {path: mark.split()[0] for path, _, mark in identity.items}
            marks = {path: mark for path, mark in marks.items() if path not in absent}
            remarks += copies(by_split, marks)
        return compare(
            self.place(root), by_split, classes, missing, unreadable, remarks, identity.hash
        )

    def _unreadable(self, items: list[Item], missing: set[Item], root: Root) -> list[str]:
        faults = []
        present = [item for item in items if item not in missing]
        for item in track(present, f"checking {self.name}", unit="image"):
            try:
                self.open_image(item, root)
            except UserError as error:
                faults.append(str(error))
        return faults

    def __repr__(self) -> str:
        facts = [self.spec.title, self.spec.kind]
        if self.spec.classes:
            facts.append(f"{self.spec.classes} classes")
        facts += [f"{count:,} {split}" for split, count in self.spec.counts.items()]
        return f"Manifest({self.name}: {', '.join(filter(None, facts))})"

    def _repr_html_(self) -> str:
        classes, counts = self.spec.classes, dict(self.spec.counts)
        if not counts and self.layout == "folder":  # nobody declared them: look
            with suppress(UserError):  # the folder is not here
                counts = {split: len(self.items(split)) for split in self.splits()}
                classes = len(self.class_names())
        return manifest_html(self.name, self.spec, classes, counts)


def distinct(manifests: Iterable[Manifest], root: Root = None) -> list[Manifest]:
    """Return the datasets of one run, each once; tables and caches tell them apart by name.

    Raises:
        UserError: Two different ones have one name.
    """
    found: dict[str, Manifest] = {}
    for manifest in manifests:
        other = found.setdefault(manifest.name, manifest)
        mine, theirs = (os.path.realpath(one.place(root).images) for one in (manifest, other))
        if (manifest.spec, mine) != (other.spec, theirs):
            raise UserError(
                f"two datasets are called {manifest.name!r}: {other.source or theirs} and "
                f"{manifest.source or mine}; rename one, or write a manifest of another name"
            )
    return list(found.values())


@cache
def _say_once(remark: str) -> None:
    if is_first_process():
        LOG.warning("%s", remark)


def _files_in(folder: Path) -> frozenset[str]:
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries if entry.is_file())
    except OSError:
        return frozenset()
