"""LASP: learned context that is held to hand-made prompts by a loss between texts.

Reference: Bulat, Tzimiropoulos, "LASP: Text-to-Text Optimization for Language-Aware Soft Prompting
of Vision & Language Models", CVPR 2023.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmadapters.clip.arithmetic import at, attend, attend_one, feed_normed, is_standard
from vlmadapters.clip.frozen import Backbone
from vlmadapters.clip.logits import scaled_products, single
from vlmadapters.clip.walk import Inside, State
from vlmadapters.data.task import Task
from vlmadapters.methods.base import Step
from vlmadapters.methods.config import MethodConfig
from vlmadapters.methods.configs import LASPConfig, split_words
from vlmadapters.methods.context import (
    context_prompts,
    context_state,
    random_vectors,
    some_prompts,
    word_vectors,
)
from vlmadapters.methods.coop import LearnedContext
from vlmadapters.methods.official import check_settings, is_prompt, matched_keys
from vlmlayers.errors import UserError
from vlmlayers.models.devices import placed

# The authors' hand-made prompts; one of them stands there twice.
TEMPLATES = (
    "a photo of a {}, a type of flower.",
    "a photo of a person doing {}.",
    "a centered satellite photo of {}.",
    "a photo of a {}, a type of aircraft.",
    "{} texture.",
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
    "a photo of a {}.",
    "a photo of many {}.",
    "a photo of the hard to see {}.",
    "a low resolution photo of the {}.",
    "a rendering of a {}.",
    "a bad photo of the {}.",
    "a cropped photo of the {}.",
    "a pixelated photo of the {}.",
    "a bright photo of the {}.",
    "a cropped photo of a {}.",
    "a photo of the {}.",
    "a good photo of the {}.",
    "a rendering of the {}.",
    "a close-up photo of the {}.",
    "a low resolution photo of a {}.",
    "a rendition of the {}.",
    "a photo of the clean {}.",
    "a photo of a large {}.",
    "a blurry photo of a {}.",
    "a pixelated photo of a {}.",
    "itap of the {}.",
    "a jpeg corrupted photo of the {}.",
    "a good photo of a {}.",
)
NOISE = 0.05
NORM_RATE = 0.1  # of the learning rate
PREFIX = "prompt_learner."
NORM = re.compile(r"image_encoder\.transformer\.resblocks\.(\d+)\.(ln_[12]\.(?:weight|bias))")
OFFICIAL = re.compile(rf"prompt_learner\.(?:ctx|w)|{NORM.pattern}")


@dataclass(eq=False)
class LASPTexts:
    """The text side of some classes.

    Attributes:
        prompts: Frozen state of the class prompts: those of the classes, then of all others used.
        count: Number of the classes.
        make: Makes `references`.
    """

    prompts: State
    count: int
    make: Callable[[], Tensor]

    @cached_property
    def references(self) -> Tensor:
        """Unit features of the hand-made prompts, (template, class, joint), with the others.

        Made when the loss first asks: no test does.
        """
        return self.make()


class LASP(LearnedContext):
    """Context held to hand-made prompts, a vector added to class features, tuned vision norms.

        t    = text feature + w, normalised
        loss = cross-entropy(s · f · t) + weight · L
        L    = mean over templates k and classes i of
               cross-entropy(s · r[k, i] · t[j] over classes j; i),       s = exp(logit scale)

    r[k, i] is the unit feature of hand-made prompt k of class i: the learned texts have to classify
    it. In every other step, at random, 0.05 times normal noise is added to it. The context stands
    before the first text block; of each chosen vision block both norms are tuned, at a tenth of the
    learning rate. The paper's groups of prompts are in no public code and are left out here.

    Args:
        config: Vision blocks, context, weight and templates, which names are used.
        backbone: The frozen CLIP, for widths and initial values.
        task: The classes trained on; nothing of them is kept.
        seed: Seed of random context.

    Reference: Bulat and Tzimiropoulos, LASP, CVPR 2023, sections 3.2 to 3.4.
    """

    Config = LASPConfig
    config: LASPConfig

    def __init__(self, config: LASPConfig, backbone: Backbone, task: Task, seed: int = 0) -> None:
        words, width = config.start_words, backbone.text.tower.width
        random = not split_words(config.words)
        drawn = random_vectors(len(words), width, seed=seed) if random else None
        super().__init__(config, {1: word_vectors(backbone, words) if drawn is None else drawn})
        self.onednn = backbone.savings.onednn
        if config.correction:
            self.w = nn.Parameter(torch.zeros(1, backbone.joint))
        self.norms = nn.ModuleDict({str(b): _norms(backbone, b) for b in config.vision})
        if config.weight:
            self.loss_weights = {"cross_entropy": 1.0, "text_to_text": config.weight}

    def start(self, tower: str, depth: int) -> int:
        """Return the first block whose input is changed: of the text, the first of all."""
        return 1 if tower == "text" else super().start(tower, depth)

    def inside(self, tower: str, block: int) -> Inside | None:
        """Return what computes a vision block with tuned norms."""
        if tower != "vision" or block not in self.config.vision:
            return None
        norms: Any = self.norms[str(block)]

        def tuned(module: Any, x: Tensor, mask: Tensor | None, rows: Tensor | None) -> Tensor:
            u = norms.ln_1(x)
            if rows is None:
                x = attend(module, x, u, mask, self.onednn)
            else:
                x = attend_one(module, at(x, rows), u, rows, mask, self.onednn)
            # Not `feed_forward`: its fused form has no gradient for the norm's weights.
            return feed_normed(module, x, norms.ln_2(x), self.onednn)

        return tuned

    def prepare(self, backbone: Backbone, task: Task) -> LASPTexts:
        """Return the frozen state of the class prompts, those of other names behind them."""
        others = () if self.config.other_names == "none" else task.other_names
        names = (*task.class_names, *others)
        tokens, slots = context_prompts(backbone, names, self.config.start_words)
        state = context_state(backbone, tokens, slots, 1)

        # A function, since a test never needs them and the encoding of 35 templates takes long.
        def references() -> Tensor:
            asked = replace(task, class_names=names)
            texts = (asked.prompts(one) for one in self.config.templates or TEMPLATES)
            made = torch.stack([backbone.text_features(each) for each in texts])
            return F.normalize(single(made), dim=-1)

        return LASPTexts(state, len(task.class_names), references)

    def class_features(self, backbone: Backbone, classes: LASPTexts) -> Tensor:
        """Return corrected features, (class, joint), of the classes that compete at a test."""
        state = classes.prompts
        if not (self.config.as_published and self.config.other_names == "virtual"):
            rows = torch.arange(classes.count, device=backbone.device)
            state = some_prompts(state, rows)
        return self._corrected(backbone, state)

    def _corrected(self, backbone: Backbone, state: State) -> Tensor:
        features = backbone.features("text", state, self)
        return features + self.w if self.config.correction else features

    def loss_parts(self, step: Step) -> dict[str, Tensor]:
        """Return the cross-entropy and, where it is weighed, the text-to-text loss."""
        backbone, texts = step.backbone, self._corrected(step.backbone, step.classes.prompts)
        images = self.image_features(backbone, step.images)
        virtual = self.config.other_names == "virtual"
        logits = self.logits(backbone, images, texts if virtual else texts[: step.classes.count])
        parts = {"cross_entropy": F.cross_entropy(logits, step.labels)}
        if self.config.weight:
            # Texts take the place of images, since only those are normalised there: references
            # with noise are not normalised again, as published.
            logits = scaled_products(backbone.clip, texts, self._references(step))
            own = torch.arange(logits.shape[1], device=logits.device).expand(len(logits), -1)
            # (template, learned class, class): the softmax runs over the learned classes, by which
            # references are classified.
            parts["text_to_text"] = F.cross_entropy(logits, own)
        return parts

    def _references(self, step: Step) -> Tensor:
        """Return the references of a step: in every other one, at random, with noise."""
        references: Tensor = step.classes.references
        if step.draws is not None:
            drawn = step.draws.get("noise")
        elif torch.rand((), generator=step.generator) < 0.5:
            # On the CPU, so that a seed gives the same noise on every device.
            drawn = torch.randn(references.shape, generator=step.generator)
        else:
            drawn = None
        if drawn is None:
            return references
        return references + NOISE * placed(drawn, references.device).to(references.dtype)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's groups: norms at a tenth of the rate, and the rest."""
        norms = list(self.norms.parameters())
        others = [value for name, value in self.named_parameters() if not name.startswith("norms.")]
        return [{"params": norms, "rate": NORM_RATE}, {"params": others, "rate": 1.0}]

    def official_names(self) -> dict[str, str]:
        """Return our parameter names to the authors'; they count blocks from 0."""
        found = {}
        for name, theirs in super().official_names().items():
            found[name] = PREFIX + theirs
            if name.startswith("norms."):
                _, block, rest = name.split(".", 2)
                found[name] = f"image_encoder.transformer.resblocks.{int(block) - 1}.{rest}"
        return found

    @classmethod
    def is_official_key(cls, key: str) -> bool:
        """Whether a key of the authors' checkpoints is a prompt, the correction or a norm."""
        return is_prompt(key) or NORM.fullmatch(key) is not None

    @classmethod
    def config_of_official(
        cls, state: Mapping[str, Tensor], where: str, config: Any = None
    ) -> MethodConfig:
        """Read blocks, length and correction; words and losses are not in the file."""
        title = cls.Config.title
        parts = matched_keys(state, OFFICIAL, where, title).values()
        context = state.get(f"{PREFIX}ctx")
        if context is None or context.ndim != 2:
            raise UserError(f"{where} holds no {title}: it has no {PREFIX}ctx of words")
        blocks = {int(part[1]) + 1 for part in parts if part[1]}
        found: dict[str, Any] = {"vision": tuple(sorted(blocks))}
        found["correction"] = f"{PREFIX}w" in state
        if config is None:
            return cls.Config(**found, words="", length=len(context))
        check_settings(config, found, where)
        words = len(config.start_words)
        if words != len(context):
            raise UserError(
                f"{where} has {len(context)} context words, asked for are {words}; set words or "
                "length to that"
            )
        return config


def _norms(backbone: Backbone, block: int) -> nn.ModuleDict:
    """Return copies of a vision block's norms, to be tuned."""
    tower = backbone.vision.tower
    module: Any = tower.blocks[block - 1]
    if not (backbone.steps and is_standard(module)):
        raise UserError(
            f"lasp tunes the norms of open_clip's standard blocks, and vision block {block} of "
            f"{tower.family} is not one; name no vision block, or choose another backbone"
        )
    # Copies: other methods are trained beside this one on the same backbone.
    norms = {name: deepcopy(getattr(module, name)) for name in ("ln_1", "ln_2")}
    return nn.ModuleDict(norms).requires_grad_(True)
