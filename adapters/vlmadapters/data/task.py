"""A task: the classes that a method learns or tells apart, and the dataset they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, Self

from vlmadapters.data.fewshot import base_or_novel, few_shot, kind_labels
from vlmadapters.data.images import Images
from vlmadapters.data.prompts import TEMPLATE, class_prompts
from vlmlayers.manifests import Item, Manifest


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
        workers: Threads that decode images.
        limit: Use at most so many test items, balanced over classes; 0 uses all.
        descriptions: Class name to descriptions, for methods that use them.
    """

    name: str | Manifest
    model: Any
    root: Any = None
    workers: int = 0
    limit: int = 0
    descriptions: Mapping[str, Sequence[str]] = field(default_factory=dict)
    manifest: Manifest = field(init=False)

    def __post_init__(self) -> None:
        given = self.name
        self.manifest = given if isinstance(given, Manifest) else Manifest.load(given)

    @cached_property
    def images(self) -> Images:
        """The images, decoded once."""
        return Images(self.model, self.manifest, self.root, workers=self.workers)

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
        described = {name: tuple(self.descriptions.get(name, ())) for name in self.class_names}
        return Task(
            names,
            template,
            self.manifest.name,
            self.manifest.zero_shot_template,
            tuple(name for name in self.class_names if name not in names),
            tuple((name, texts) for name, texts in described.items() if texts),
        )

    def _labels(self, kind: str) -> tuple[int, ...]:
        return kind_labels(kind, range(len(self.class_names)))

    def shots(self, shots: int, seed: int, kind: str, split: str = "train") -> list[Item]:
        """Return few-shot items of one half, relabelled from 0."""
        drawn = few_shot(self.manifest.items(split, root=self.root), shots, seed)
        return base_or_novel(drawn, kind, range(len(self.class_names)))

    def validation(self, shots: int, seed: int, kind: str) -> list[Item]:
        """Return few-shot items of the validation split, at most 4 a class; none without one."""
        if "val" not in self.manifest.splits(self.root):
            return []
        return self.shots(min(shots, 4), seed, kind, "val")

    def test(self, kind: str, split: str = "test") -> list[Item]:
        """Return the test items of one half, relabelled from 0."""
        if self.limit:
            items = self.manifest.sample(split, self.limit, 0, self.root)
        else:
            items = self.manifest.items(split, root=self.root)
        return base_or_novel(items, kind, range(len(self.class_names)))
