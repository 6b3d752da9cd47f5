"""The datasets of an experiment: what is trained on, what tested on, and what identifies both."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlmadapters.data.images import Images, as_first_seen
from vlmadapters.data.options import DataOptions
from vlmadapters.data.task import TaskData, places
from vlmadapters.protocols.table import Protocol
from vlmadapters.protocols.trained import Target
from vlmadapters.training import processes
from vlmlayers.manifests import Item, Manifest, distinct

LOG = logging.getLogger(__name__)


class Datasets:
    """The datasets of an experiment, the images of each shared by all cells.

    Args:
        protocol: The protocol.
        model: The model.
        targets: Datasets tested by transfer.
        root: The data root.
        split: Split that is tested.
        options: How images are read, and how many are tested.
    """

    def __init__(
        self,
        protocol: Protocol,
        model: Any,
        targets: Iterable[str | Path | Manifest],
        root: Any,
        split: str,
        options: DataOptions,
    ) -> None:
        self.protocol, self.split = protocol, split
        self._model, self._root, self._options = model, root, options
        self._known: dict[str, TaskData] = {}
        self.targets = tuple(self.add(one).manifest.name for one in targets)

    def __getitem__(self, name: str) -> TaskData:
        return self._known[name]

    def add(self, dataset: str | Path | Manifest | TaskData) -> TaskData:
        """Return a dataset, its images shared by all cells.

        Raises:
            UserError: It is unknown, or another one has its name.
        """
        if isinstance(dataset, TaskData):
            return self._known.setdefault(dataset.manifest.name, dataset)
        manifest = dataset if isinstance(dataset, Manifest) else Manifest.load(dataset)
        distinct([*(one.manifest for one in self._known.values()), manifest], self._root)
        made = TaskData(manifest, self._model, self._root, self._options, self._options.items)
        return self._known.setdefault(manifest.name, made)

    def tested(self, source: str) -> list[Target]:
        """Return what adapters trained on a source are tested on."""
        own = [Target(self[source], kind, self.split) for kind in self.protocol.own_kinds]
        # A source among the targets is tested once: transfers test all of its classes anyway.
        return own + [Target(self[one], "all", self.split) for one in self.targets if one != source]

    def check(self, sources: Iterable[str]) -> None:
        """Raise a UserError where a source cannot be trained on, or what it is tested on."""
        for source in sources:
            self[source].check(self.protocol.train_kind, "train")
            for target in self.tested(source):
                target.dataset.check(target.kind, target.split)
                if target.dataset is self[source]:
                    target.dataset.tell_of_shared(target.split)
                if self.protocol.same_classes:
                    self._tell_other_classes(self[source], target.dataset)

    def _tell_other_classes(self, source: TaskData, target: TaskData) -> None:
        """Warn of classes of a shifted test set that the source has not."""
        found = places(target.class_names, source.class_names)
        if others := [name for name, place in zip(target.class_names, found) if place < 0]:
            LOG.warning(
                "%d of the %d classes of %s, such as %r, are none of %s, whose shift it is to be; "
                "use cross-dataset for other classes", len(others), len(found),
                target.manifest.name, others[0], source.manifest.name,
            )  # fmt: skip

    def own_test(self, source: str, *, readable: bool = True) -> list[Item]:
        """Return what a training on a source is tested on there, of several processes this one's.

        `readable` is as for `TaskData.shots`.
        """
        own = [one for one in self.tested(source) if one.dataset is self[source]]
        return [i for one in own for i in processes.share(one.items(readable=readable))]

    def images(self, source: str, seed: int, shots: int) -> tuple[Images, list[Item], list[Item]]:
        """Return the images of a source, what a training will see of them, and its test on them.

        Nothing is opened: what cannot be read is found when it is its turn.
        """
        drawn = self[source].shots(shots, seed, self.protocol.train_kind, readable=False)
        tested = self.own_test(source, readable=False)
        return self[source].images, as_first_seen(drawn, seed), tested

    def read(self, source: str) -> list[tuple[str, str]]:
        """Return dataset and split of all that cells of a source train and test on."""
        drawn = {"train", "val"} & {"train", *self[source].splits()}
        own = [(source, split) for split in sorted({*drawn, self.split})]
        return own + [(name, self.split) for name in self.targets if name != source]

    def hashes(self, parts: Iterable[tuple[str, str]]) -> dict[str, dict[str, str]]:
        """Return what identifies some splits, by dataset and split."""
        found: dict[str, dict[str, str]] = {}
        for name, split in parts:
            found.setdefault(name, {})[split] = self[name].identity(split).hash
        return found
