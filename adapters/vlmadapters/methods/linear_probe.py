"""The linear probe: logistic regression on final image features, the usual control."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F

from vlmadapters.clip.frozen import Backbone
from vlmadapters.clip.logits import scaled_cosines, single
from vlmadapters.data.task import Task, trained_places
from vlmadapters.methods.base import FitData, Method
from vlmadapters.methods.head_configs import LinearProbeConfig
from vlmlayers.errors import UserError


@dataclass(frozen=True, eq=False)
class ProbedClasses:
    """The text side of some classes.

    Attributes:
        features: Features of their hand-made prompts, (class, joint).
        rows: Number of each among the classes of the probe, -1 where it is none, (class,).
    """

    features: Tensor
    rows: Tensor


class LinearProbe(Method):
    """Logistic regression with an L2 penalty on unit image features.

    Where all classes of a task are among those it was fitted on, its logits are w · f + b of these.
    Where any is not, such as in a test on novel classes, all have zero-shot logits: the two kinds
    have no scale in common.

    Args:
        config: The penalties to choose from.
        backbone: The frozen CLIP, for its joint width.
        task: The classes fitted on.
        seed: Unused: the fit draws nothing.
    """

    Config = LinearProbeConfig
    varies = False
    config: LinearProbeConfig

    def __init__(
        self, config: LinearProbeConfig, backbone: Backbone, task: Task, seed: int = 0
    ) -> None:
        super().__init__(config)
        self.class_names = task.class_names
        count = len(task.class_names)
        # Parameters, so that they are saved and moved with the method; no optimizer gets them.
        self.weight = nn.Parameter(torch.zeros(count, backbone.joint), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(count), requires_grad=False)

    def prepare(self, backbone: Backbone, task: Task) -> ProbedClasses:
        """Return features of hand-made prompts, and which of the probe's classes these are."""
        features = backbone.text_features(task.prompts(task.hand_made))
        # Its logits have no scale in common with cosines that some classes could take instead.
        names, title = task.class_names, self.config.title
        rows = trained_places(names, self.class_names, title, instead="all classes")
        return ProbedClasses(features, torch.tensor(rows, device=features.device))

    def class_features(self, backbone: Backbone, classes: ProbedClasses) -> ProbedClasses:
        """Return the classes as they are: nothing of their texts is learned."""
        return classes

    def fit(self, data: FitData) -> None:
        """Fit on the first view, once for each penalty, and keep the best."""
        x, labels = _unit(data.view(0)), data.labels.cpu()
        self._check_labels(labels)
        if len(self.class_names) == 1:
            return  # it is every answer
        penalties = self.config.inverse_penalties
        fits = [self._fitted(c, x, labels) for c in penalties]
        best = len(fits) // 2
        if data.validation is not None and len(fits) > 1:
            features, truth = data.validation()
            held_out, truth = _unit(features), truth.cpu()
            hits = [int(((held_out @ w.T + b).argmax(1) == truth).sum()) for w, b in fits]
            best = hits.index(max(hits))
        with torch.no_grad():
            for own, fitted in zip((self.weight, self.bias), fits[best]):
                own.copy_(fitted)
        self.touch()

    def _check_labels(self, labels: Tensor) -> None:
        count = len(self.class_names)
        empty = [self.class_names[i] for i in sorted(set(range(count)) - set(labels.tolist()))]
        if empty:
            raise UserError(
                f"the linear probe needs items of every class, and {len(empty)} of {count} have "
                f"none, first {empty[0]!r}; name data with items of each"
            )

    def _fitted(self, c: float, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights and biases of every class at one penalty."""
        # Below scikit-learn's tolerance of 1e-4, at which weakly penalised fits end early.
        probe: Any = LogisticRegression(C=c, max_iter=self.config.iterations, tol=1e-6)
        with warnings.catch_warnings():  # a fit that is not at its end is judged by its hits
            warnings.simplefilter("ignore", ConvergenceWarning)
            # Of one shot labels are all unlike, as those of a regression are.
            warnings.filterwarnings("ignore", "The number of unique classes")
            probe.fit(x.numpy(), labels.numpy())
        weight, bias = torch.from_numpy(probe.coef_), torch.from_numpy(probe.intercept_)
        if len(weight) == 1:  # of two classes, scikit-learn gives the second one's alone
            weight, bias = (torch.cat([torch.zeros_like(one), one]) for one in (weight, bias))
        return weight, bias

    def logits(self, backbone: Backbone, images: Tensor, classes: ProbedClasses) -> Tensor:
        """Return the probe's logits where it knows all classes, else zero-shot ones."""
        if bool((classes.rows < 0).any()):
            return scaled_cosines(backbone.clip, images, classes.features)
        with torch.autocast(images.device.type, enabled=False):
            f = F.normalize(single(images), dim=-1)
            return F.linear(f, self.weight[classes.rows], self.bias[classes.rows])

    def parameter_count(self) -> int:
        """Return the number of fitted values."""
        return self.weight.numel() + self.bias.numel()


def _unit(features: Tensor) -> Tensor:
    # In double precision: the solver does not reach its tolerance in float32.
    return F.normalize(features.detach().double().cpu(), dim=-1)
