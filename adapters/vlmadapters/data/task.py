"""A task: the classes that a method learns or tells apart, and the dataset they come from."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache, cached_property
from typing import Any, Self

from vlmadapters.data.fewshot import base_or_novel, few_shot, few_shot_validation, kind_labels
from vlmadapters.data.images import Images
from vlmadapters.data.options import ReadOptions
from vlmlayers.data.unreadable import Unreadable
from vlmlayers.errors import UserError
from vlmlayers.identity import DataIdentity
from vlmlayers.manifests import Item, Manifest
from vlmlayers.manifests.items import balanced_sample, shared_paths
from vlmlayers.prompts import APART, TEMPLATE, class_prompts, numbered, spelled
from vlmlayers.words import counted

LOG = logging.getLogger(__name__)
Draw = tuple[int, int, str, str]  # shots, seed, kind, split


def places(names: Sequence[str], among: Sequence[str]) -> list[int]:
    """Return the index of each name among others, -1 where it is missing.

    Names of one prompt are one name, as `blue_circle` and `Blue circle` of two folders. Two classes
    may have the same name; they are told apart by their order.
    """
    own = {name: number for number, name in enumerate(numbered(map(spelled, among)))}
    return [own.get(name, -1) for name in numbered(map(spelled, names))]


def trained_places(
    names: Sequence[str], trained: Sequence[str], title: str, instead: str = "these"
) -> list[int]:
    """Return `places` among the classes that a method was trained on; warn where some are none.

    Args:
        names: The classes that are tested.
        trained: Those it was trained on.
        title: The method, for the warning.
        instead: Which classes it then scores as zero-shot CLIP does, in words.
    """
    found = places(names, trained)
    if missing := [name for name, place in zip(names, found) if place < 0]:
        _tell_untrained(title, len(missing), len(names), missing[0], instead)
    return found


@cache
def _tell_untrained(title: str, missing: int, count: int, first: str, instead: str) -> None:
    """Say it once, where every test of every seed prepares the same classes."""
    LOG.warning(
        "%s: %d of %s, such as %r, are none that it was trained on; it scores %s as zero-shot "
        "CLIP does", title, missing, counted(count, "class"), first, instead,
    )  # fmt: skip


@dataclass(frozen=True)
class Task:
    """The classes to tell apart, and what is known of them in words.

    Attributes:
        class_names: Class names by label.
        template: Prompt around each of them.
        dataset: Name of the dataset's manifest; empty where there is none.
        own_template: The dataset's own zero-shot template.
        other_names: Names of the dataset's remaining classes.
        descriptions: (class name, its descriptions) of each described class.
    """

    class_names: tuple[str, ...] = ()
    template: str = TEMPLATE
    dataset: str = ""
    own_template: str = TEMPLATE
    other_names: tuple[str, ...] = ()
    descriptions: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def hand_made(self) -> str:
        """The template of hand-made prompts: the dataset's own, or one that the recipe names."""
        return self.own_template if self.template == TEMPLATE else self.template

    def prompts(self, template: str | None = None) -> list[str]:
        """Return one prompt per class, underscores of names as spaces."""
        return class_prompts(self.class_names, template or self.template)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild a task from `to_dict`; fields of later versions are left out."""
        known = {f.name for f in fields(cls)}
        return cls(**{key: _tuples(value) for key, value in values.items() if key in known})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


@dataclass(eq=False)
class TaskData:
    """A dataset as the protocols use it: tasks, items and images of one model.

    Args:
        name: Name or path of a manifest, or the manifest.
        model: The model.
        root: The data root.
        options: How its images are read. The log names the first of those that are left out
            and their number; training images among them are replaced by others.
        limit: Use at most so many test items, balanced over classes; 0 uses all.

    Attributes:
        origin: Name of the dataset that the items are of, as recipes know it.
        drawn_by: How items were drawn that stand for no whole split, as text.
    """

    name: str | Manifest
    model: Any
    root: Any = None
    options: ReadOptions = field(default_factory=ReadOptions)
    limit: int = 0
    manifest: Manifest = field(init=False)
    origin: str = field(init=False)
    drawn_by: str = field(default="", init=False)
    _listed: dict[tuple[str, bool], list[Item]] = field(
        default_factory=dict, init=False, repr=False
    )
    _drawn: dict[Draw, list[Item]] = field(default_factory=dict, init=False, repr=False)
    _tested: dict[str, list[Item]] = field(default_factory=dict, init=False, repr=False)
    _identities: dict[str, DataIdentity] = field(default_factory=dict, init=False, repr=False)
    _told: set[object] = field(default_factory=set, init=False, repr=False)
    _shared: dict[str, str] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        given = self.name
        self.manifest = given if isinstance(given, Manifest) else Manifest.load(given)
        self.origin = self.manifest.name

    @property
    def share(self) -> float:
        """Share of the draw's items that is trained on: all of them, but in a fold."""
        return 1.0

    def identity(self, split: str) -> DataIdentity:
        """Return what a split is when it is first asked for; results belong to that."""
        if split not in self._identities:
            self._identities[split] = self.manifest.identity(self._items(split), self.root)
        return self._identities[split]

    @cached_property
    def images(self) -> Images:
        """The images, decoded once."""
        return Images(self.model, self.manifest, self.root, workers=self.options.workers)

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """All class names by label."""
        return self.manifest.class_names(self.root)

    def names(self, kind: str) -> list[str]:
        """Return class names of `all`, `base` or `novel` classes."""
        return [self.class_names[label] for label in self._labels(kind)]

    def task(self, kind: str, template: str = TEMPLATE) -> Task:
        """Return the task of telling `all`, `base` or `novel` classes apart."""
        names = tuple(self.names(kind))
        return Task(
            names,
            template,
            self.manifest.name,
            self.manifest.zero_shot_template,
            tuple(name for name in self.class_names if name not in names),
        )

    def _labels(self, kind: str) -> tuple[int, ...]:
        return kind_labels(kind, range(len(self.class_names)))

    def check(self, kind: str, split: str) -> None:
        """Refuse what cannot be trained or tested, before any of it is.

        Args:
            kind: `all`, `base` or `novel` classes.
            split: Where their images are to come from.

        Raises:
            UserError: There are no classes or one, or the split has no image of these classes.
        """
        name, names = self.manifest.name, self.class_names
        if not names:  # asked first: the manifest of a fold has no files to read
            self.manifest.require_classes(APART, self.root)
        if len(names) == 1:
            raise UserError(f"{name} has one class, {names[0]!r}; name data of two or more")
        labels, items = set(self._labels(kind)), self._items(split)
        of, used = f"split {split!r}", items
        if self.limit and split != "train":
            of, used = f"{counted(self.limit, 'item')} of {of}", self._sampled(split)
        absent = labels - {item.label for item in used}
        if absent == labels:
            half = "" if kind == "all" else f" of its {kind} classes"
            more = "" if used is items else "; take more (--items), or all"
            raise UserError(f"{name} has no image{half} in {of}{more}")
        without = [item.path for item in items if item.label < 0]
        if without and split not in self._told:
            self._told.add(split)
            LOG.warning(
                "%s: %d of %s in split %r have no class and are left out, first %s",
                name, len(without), counted(len(items), "image"), split, without[0],
            )  # fmt: skip
        # A fold holds images out, as it is meant to; the whole dataset says it.
        if absent and self.share == 1.0 and (kind, split) not in self._told:
            self._told.add((kind, split))
            LOG.warning(
                "%s: no image of %d of %d classes in %s, such as %r, which the others are told "
                "from all the same",
                name, len(absent), len(labels), of, names[min(absent)],
            )  # fmt: skip
        if len(labels) == 1:
            LOG.warning("%s has one %s class: every answer is right there", name, kind)

    def tell_of_shared(self, split: str = "test") -> str:
        """Warn, once, where images of a split are listed for training too, as published ones are.

        Returns:
            The warning; empty where there are none, and of a fold, which holds images out itself.
        """
        if split not in self._shared:
            self._shared[split] = told = self._shared_with_training(split)
            if told:
                LOG.warning("%s", told)
        return self._shared[split]

    def _shared_with_training(self, split: str) -> str:
        try:
            if self.share < 1 or not {"train", split} <= {*self.splits()}:
                return ""
            # Those that are not on the disk as well, which is said where they are wanted.
            items, others = (self._list(one, present_only=False) for one in (split, "train"))
        except UserError:  # a search needs no list of test images
            return ""
        if not (shared := shared_paths(items, others)):
            return ""
        return (
            f"{len(shared):,} of {counted(len(items), f'{split} image')} of {self.manifest.name} "
            f"are among its training images, first {shared[0]}"
        )

    def splits(self) -> tuple[str, ...]:
        """Return the names of the splits that exist."""
        return self.manifest.splits(self.root)

    def _items(self, split: str) -> list[Item]:
        return self._list(split, present_only=self.options.present_only)

    def _list(self, split: str, *, present_only: bool) -> list[Item]:
        """Return the items of a split as it was first listed: every cell asks, and is of them."""
        key = split, present_only
        if key not in self._listed:
            found = self.manifest.items(split, self.root, present_only=present_only)
            self._listed[key] = found
        return self._listed[key]

    def shots(
        self, shots: int, seed: int, kind: str, split: str = "train", *, readable: bool = True
    ) -> list[Item]:
        """Return few-shot items of one half, relabelled from 0; no other item is opened.

        Those of `val` are drawn as `few_shot_validation` does it. Unless items have to be
        `readable` none is opened, and nothing is left out or refused.
        """
        wanted, key = set(self._labels(kind)), (shots, seed, kind, split)

        # Over all classes first, then the half: the published draw does it in this order, and
        # drawing from base classes alone would pick other items.
        def draw(items: list[Item]) -> list[Item]:
            if split == "train":
                drawn = few_shot(items, shots, seed)
            else:
                drawn = few_shot_validation(items, self._items("train"), shots, seed)
            return [item for item in drawn if item.label in wanted]

        if key not in self._drawn:
            self._drawn[key] = draw(self._items(split))
        drawn = self._drawn[key]
        if readable and self.options.skip_unreadable:
            # Again without those that cannot be read, until a whole draw can: replacements may be
            # unreadable as well.
            items, faults = self._items(split), dict[Item, str]()
            while found := self.images.unreadable(drawn, tested=False).reasons:
                faults |= {drawn[row]: why for row, why in found.items()}
                items = [item for item in items if item not in faults]
                if not items:
                    break
                drawn = draw(items)
            unreadable = Unreadable(dict(enumerate(faults.values())))
            unreadable.settle(self.manifest.name, len({*drawn, *faults}), skip=True)
        elif readable:
            self.manifest.refuse_missing(drawn, self.root)
        if split == "train":
            self._tell_of_few(drawn, shots)
        return base_or_novel(drawn, kind, range(len(self.class_names)))

    def _tell_of_few(self, drawn: list[Item], shots: int) -> None:
        """Warn, once, where classes have fewer images than shots: tables name the shots."""
        sizes = Counter(item.label for item in drawn)
        few = sum(size < shots for size in sizes.values())
        if few and shots not in self._told:
            self._told.add(shots)
            LOG.warning(
                "%s: %d of %d classes trained on have fewer than %d images, the smallest %d; all "
                "of theirs are taken",
                self.manifest.name, few, len(sizes), shots, min(sizes.values()),
            )  # fmt: skip

    def validation(self, shots: int, seed: int, kind: str) -> list[Item]:
        """Return few-shot items of the validation split, at most 4 a class; none without one."""
        if "val" not in self.splits():
            return []
        return self.shots(shots, seed, kind, "val")

    def test(self, kind: str, split: str = "test", *, readable: bool = True) -> list[Item]:
        """Return the test items of one half, relabelled from 0; `readable` is as for `shots`."""
        # Sampled over all classes and then halved: base and novel items are the same whichever of
        # them is tested.
        found = self._tested.get(split)
        if found is None:
            found = self._sampled(split)
            if readable:
                found = self._tested[split] = self._readable(found)
        return base_or_novel(found, kind, range(len(self.class_names)))

    def _sampled(self, split: str) -> list[Item]:
        items = self._items(split)
        if not self.limit:
            return items
        return balanced_sample([item for item in items if item.label >= 0], self.limit, 0)

    def _readable(self, items: list[Item]) -> list[Item]:
        if not self.options.skip_unreadable:
            self.manifest.refuse_missing(items, self.root)
            return items
        found = self.images.unreadable(items, tested=True)
        found.settle(self.manifest.name, len(items), skip=True)
        return [item for row, item in enumerate(items) if row not in found.reasons]
