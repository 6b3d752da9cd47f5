"""KgCoOp: learned context whose class features stay near those of hand-made prompts.

Reference: Yao, Zhang, Xu, "Visual-Language Prompt Tuning with Knowledge-guided Context
Optimization", CVPR 2023.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from vlmadapters.clip.frozen import Backbone
from vlmadapters.clip.logits import single
from vlmadapters.clip.walk import State
from vlmadapters.data.task import Task
from vlmadapters.methods.base import Step
from vlmadapters.methods.configs import KgCoOpConfig
from vlmadapters.methods.coop import CoOp


@dataclass(frozen=True, eq=False)
class Guided:
    """The text side of some classes: prompts with context, and hand-made ones.

    Attributes:
        prompts: Frozen state of the prompts with context.
        hand_made: Features of the hand-made prompts, (class, joint).
    """

    prompts: State
    hand_made: Tensor


class KgCoOp(CoOp):
    """CoOp with the mean distance 1 - cos between learned and hand-made class features as a loss.

        loss = cross-entropy + weight · (1 - mean over classes of cos(learned, hand-made))

    The hand-made prompt is the recipe's template where it is another than the common one, and else
    the dataset's own. It plays no part at a test.

    Reference: Yao et al., KgCoOp, CVPR 2023, equations 4 and 5; for unit vectors the distance is
    half of the squared one there.
    """

    Config = KgCoOpConfig
    # Beside CoOp's: what the authors' module holds and never uses.
    left_out = (*CoOp.left_out, "bias_vectors", "meta_net.linear1.weight", "meta_net.linear1.bias")

    def __init__(self, config: KgCoOpConfig, backbone: Backbone, task: Task, seed: int = 0) -> None:
        super().__init__(config, backbone, task, seed)
        self.loss_weights = {"cross_entropy": 1.0, "distance": config.weight}

    def prepare(self, backbone: Backbone, task: Task) -> Guided:
        """Return the frozen state of the class prompts, and hand-made features."""
        hand_made = backbone.text_features(task.prompts(task.hand_made))
        return Guided(super().prepare(backbone, task), hand_made)

    def class_features(self, backbone: Backbone, classes: Any) -> Tensor:
        """Return joint features of the prompts with context, (class, joint)."""
        return super().class_features(backbone, classes.prompts)

    def loss_parts(self, step: Step) -> dict[str, Tensor]:
        """Return cross-entropy and the mean distance to the hand-made features."""
        images = self.image_features(step.backbone, step.images)
        classes = self.class_features(step.backbone, step.classes)
        logits = self.logits(step.backbone, images, classes)
        hand_made = step.classes.hand_made
        # Over all classes of the run at every step, not over those of the batch; eps as published.
        cosines = F.cosine_similarity(single(classes), single(hand_made), eps=1e-7)
        return {
            "cross_entropy": F.cross_entropy(logits, step.labels),
            "distance": 1 - cosines.mean(),
        }
