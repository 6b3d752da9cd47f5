"""Augmented views of the training items, and what the frozen part of a backbone makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmadapters.clip.frozen import Backbone, ViewCache
from vlmadapters.clip.walk import State
from vlmadapters.data.images import Images
from vlmadapters.training import processes
from vlmadapters.training.recipes import TrainConfig
from vlmlayers.manifests import Item
from vlmlayers.models.devices import placed

BATCH = 32  # views whose frozen features are computed at a time


class Views:
    """The views of one training, each drawn by seed, epoch and item alone.

    Args:
        images: Images of the dataset.
        items: The training items.
        train: The recipe.
        seed: Seed of the views.
        backbone: The backbone.
        starts: Blocks whose inputs the methods need.
        autocast: Makes the context that the backbone runs in.

    Attributes:
        plain: Whether the whole vision tower is frozen, so that joint features are all of a view
            that is needed.
        cache: The frozen states of cached views; None before the first.
    """

    def __init__(
        self,
        images: Images,
        items: Sequence[Item],
        train: TrainConfig,
        seed: int,
        backbone: Backbone,
        starts: Sequence[int],
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.images, self.items, self.train, self.seed = images, items, train, seed
        self.backbone, self.starts, self.autocast = backbone, starts, autocast
        # Several processes each see a share of the images: none needs the features of all.
        self.plain = backbone.is_plain(starts) and processes.rank_and_size()[1] == 1
        self.cache: ViewCache | None = None
        self._drawn: tuple[int, NDArray[np.float64]] | None = None

    @property
    def kept(self) -> bool:
        """Whether views or their features are kept, so that most steps make none."""
        return bool(self.train.cached_views) or self.plain

    def number(self, epoch: int) -> int:
        """Return the number of the view that an epoch sees of every image."""
        views = self.train.cached_views
        return epoch % views if views else epoch

    def images_of(self, batch: NDArray[np.int64], epoch: int) -> Tensor:
        """Return what an epoch sees of some items, by index, (item, 3, height, width)."""
        return self._augmented(batch, self.number(epoch))

    def states(self, batch: NDArray[np.int64], epoch: int) -> dict[int, State]:
        """Return frozen states that are kept: of cached views, or of images that end frozen.

        By the block that they enter; none where nothing is kept.
        """
        view = self.number(epoch)
        if self.plain:
            features = self.features(view)
            own = features[placed(torch.from_numpy(batch), features.device)]
            return {self.starts[0]: self.backbone.plain_state(own)}
        views = self.train.cached_views
        if not views or not self.backbone.steps:
            return {}
        if self.cache is None:
            self.cache = ViewCache(self.backbone, self.starts, views * len(self.items))
        rows = view * len(self.items) + batch
        with self.autocast():
            return self.cache.states(rows, lambda missing: self._augmented(batch[missing], view))

    def features(self, view: int) -> Tensor:
        """Return joint features of the plain backbone of a view of all items, (item, joint)."""
        # In batches of one size, so that they are to the bit the same for every method.
        drawn = self.seed, view, self.train.augmentation, self.train.device_crops
        batches = np.split(np.arange(len(self.items)), range(BATCH, len(self.items), BATCH))

        def make() -> Iterator[Tensor]:
            return self.images.ahead(lambda rows: self._augmented(rows, view), batches)

        with self.autocast():
            return self.backbone.plain_features((*self._key(self.items), *drawn), make)

    def features_unchanged(self, items: Sequence[Item]) -> Tensor:
        """Return joint features of items as they are tested, not augmented, (item, joint)."""
        with self.autocast():
            return self.backbone.plain_features(
                self._key(items), partial(self.images.batches, items, BATCH)
            )

    def _key(self, items: Sequence[Item]) -> tuple[Any, ...]:
        """Return what features of some images depend on besides their augmentation."""
        return self.images, tuple(item.path for item in items), self.train.precision

    def _augmented(self, batch: NDArray[np.int64], view: int) -> Tensor:
        items = [self.items[i] for i in batch]
        given = items, self._draws(view)[batch], self.train.augmentation
        return self.images.augmented(*given, on_device=self.train.device_crops)

    def _draws(self, view: int) -> NDArray[np.float64]:
        """Return the random numbers of a view of all items, (item, numbers)."""
        # Of all items at once: an item's crop does not depend on its batch. Kept for the view's
        # other batches, which most steps ask for.
        if self._drawn is None or self._drawn[0] != view:
            made = self.train.augmentation.draws(len(self.items), self.seed, view)
            self._drawn = view, made
        return self._drawn[1]
