"""Tip-Adapter: a cache of few-shot features beside zero-shot CLIP; Tip-Adapter-F trains its keys.

Reference: Zhang et al., "Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification",
ECCV 2022.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from vlmadapters.clip.frozen import Backbone
from vlmadapters.clip.logits import single
from vlmadapters.data.task import Task, trained_places
from vlmadapters.methods.base import FitData, Method
from vlmadapters.methods.head_configs import TipConfig, TipFConfig

LOG = logging.getLogger(__name__)
LEAST = 0.1  # of the values tried for α and β


@dataclass(frozen=True, eq=False)
class CachedClasses:
    """The text side of some classes.

    Attributes:
        weights: Unit features, (class, joint).
        columns: Number of each among the classes of the cache, -1 where it is none, (class,).
    """

    weights: Tensor
    columns: Tensor


class Tip(Method):
    """Zero-shot logits plus a cache that compares an image with the few-shot images of each class.

        logits = 100 · f W + α · exp(-β (1 - f Kᵀ)) V

    f is the unit feature of an image, K those of all few-shot items (the mean of several augmented
    views, normalised afterwards), V their classes as one-hot rows, W unit class features. Classes
    of which the cache holds no item have zero-shot logits. α and β are the first of a grid with the
    most hits on few-shot items of the validation split, never on test data.

    Args:
        config: α and β, views, templates, the grid.
        backbone: The frozen CLIP, for its joint width.
        task: The classes of the cache.
        seed: Unused: nothing is drawn.

    Reference: Zhang et al., Tip-Adapter, ECCV 2022, equations 4 to 8.
    """

    Config: ClassVar[type[TipConfig]] = TipConfig
    varies = False
    config: TipConfig
    trained: ClassVar[bool] = False
    labels: Tensor
    alpha: Tensor
    beta: Tensor

    def __init__(self, config: TipConfig, backbone: Backbone, task: Task, seed: int = 0) -> None:
        super().__init__(config)
        self.class_names = task.class_names
        self.keys = nn.Parameter(torch.zeros(0, backbone.joint), requires_grad=self.trained)
        self.register_buffer("labels", torch.zeros(0, dtype=torch.long))
        self.register_buffer("alpha", torch.tensor(float(config.alpha)))
        self.register_buffer("beta", torch.tensor(float(config.beta)))

    def prepare(self, backbone: Backbone, task: Task) -> CachedClasses:
        """Return unit features of the classes, and which of the cache's they are."""
        templates = self.config.templates or (task.hand_made,)
        made = torch.stack([backbone.text_features(task.prompts(one)) for one in templates])
        weights = F.normalize(F.normalize(single(made), dim=-1).mean(0), dim=-1)
        columns = trained_places(task.class_names, self.class_names, self.config.title)
        return CachedClasses(weights, torch.tensor(columns, device=weights.device))

    def class_features(self, backbone: Backbone, classes: CachedClasses) -> CachedClasses:
        """Return the classes as they are: nothing of them is learned."""
        return classes

    def fit(self, data: FitData) -> None:
        """Fill the cache with the few-shot items."""
        views = torch.stack([single(data.view(number)) for number in range(self.config.views)])
        # Views are averaged before they are normalised: so the public code does.
        self.fill(F.normalize(views.mean(0), dim=-1), data.labels)

    def fill(self, keys: Tensor, labels: Tensor) -> None:
        """Put items into the cache, in place of those there.

        Args:
            keys: Their unit features, (item, joint).
            labels: Their classes, (item,).
        """
        self.keys, self.labels = nn.Parameter(keys, requires_grad=self.trained), labels
        self.touch()

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load parameters and buffers; the cache takes as many items as they have."""
        if "labels" in state_dict:
            items = state_dict["labels"].numel()
            # A new method has an empty cache, into whose shape no stored one would load.
            self.fill(self.keys.new_zeros(items, self.keys.shape[1]), self.labels.new_zeros(items))
        return super().load_state_dict(state_dict, strict, assign)

    def finish(self, data: FitData) -> None:
        """Choose α and β on the validation items, where there are any."""
        if not self.config.search:
            return
        if data.validation is None:
            LOG.info("%s keeps alpha and beta: no validation items", self.config.title)
            return
        self.search(*data.validation(), data.classes)

    @torch.no_grad()
    def search(self, images: Tensor, labels: Tensor, classes: CachedClasses) -> NDArray[np.int64]:
        """Choose α and β on labelled images; return the hits of each pair, (β, α).

        The first pair, β before α, with more hits than all before it is chosen; both are 0 where
        there is no hit at all.

        Args:
            images: Their joint features, (image, joint).
            labels: Their classes, (image,).
            classes: What `prepare` returned of these classes.
        """
        config, found = self.config, []
        alphas = _grid(config.alpha_end, config.alpha_steps)
        betas = _grid(config.beta_end, config.beta_steps)
        f = F.normalize(single(images), dim=-1)
        plain, affinity = config.own_scale * f @ classes.weights.T, f @ self.keys.T
        for beta in betas:
            cached = self._cached(affinity, beta, classes)
            hits = [((plain + alpha * cached).argmax(1) == labels).sum() for alpha in alphas]
            found.append(torch.stack(hits))
        table = torch.stack(found).cpu().numpy()
        # argmax takes the first of equals, as a search that only replaces on more hits does.
        row, column = np.unravel_index(table.argmax(), table.shape)
        # As the public code, whose best pair starts at 0 and is replaced on hits alone.
        hit = float(table.max() > 0)
        self.alpha.fill_(hit * alphas[column])
        self.beta.fill_(hit * betas[row])
        self.touch()
        return table

    def logits(self, backbone: Backbone, images: Tensor, classes: CachedClasses) -> Tensor:
        """Return zero-shot logits plus those of the cache, (image, class)."""
        with torch.autocast(images.device.type, enabled=False):
            f = F.normalize(single(images), dim=-1)
            cached = self._cached(f @ self.keys.T, self.beta, classes)
            return self.config.own_scale * f @ classes.weights.T + self.alpha * cached

    def _cached(self, affinity: Tensor, beta: Tensor | float, classes: CachedClasses) -> Tensor:
        """Return the cache's votes, (image, class), from cosines to its items, (image, item)."""
        # One-hot by comparison: a class that the cache lacks has column -1, which no item equals.
        values = (self.labels[:, None] == classes.columns).to(affinity)
        # β is the sharpness and α the weight; early versions of paper and code have them swapped.
        return torch.exp(-beta * (1 - affinity)) @ values


class TipF(Tip):
    """Tip-Adapter whose keys are trained by cross-entropy, at the α and β of the settings.

    Keys are not normalised again. α and β are chosen once, after the last step: the public code
    also chooses the epoch, and by test accuracy.

    Reference: Zhang et al., Tip-Adapter, ECCV 2022, section 3.2.
    """

    Config = TipFConfig
    trained = True


def _grid(end: float, steps: int) -> list[float]:
    return [LEAST + i * (end - LEAST) / steps for i in range(steps)]
