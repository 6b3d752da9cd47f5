"""RPO: pairs of read-only prompts, one in each tower.

Reference: Lee, Song, Suh, Choi, Lee, Kim, "Read-only Prompt Optimization for Vision-Language
Few-shot Learning", ICCV 2023.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmadapters.clip.arithmetic import attend_others, feed_forward, is_standard, keys_values
from vlmadapters.clip.frozen import Backbone
from vlmadapters.clip.logits import scaled_cosines
from vlmadapters.clip.walk import State
from vlmadapters.data.task import Task
from vlmadapters.methods.base import Method
from vlmadapters.methods.config import VIT_B_16, MethodConfig
from vlmadapters.methods.context import word_embedding
from vlmadapters.methods.deep_configs import RPOConfig
from vlmadapters.methods.official import check_settings, is_prompt, matched_keys
from vlmlayers.errors import UserError

# Length of each prompt's noise, not its size in a coordinate.
NOISE = 0.1
OFFICIAL = re.compile(r"prompt_learner\.(?:text|img)_prompt")
PARTS = {"vision": "img_prompt", "text": "text_prompt"}


@dataclass(frozen=True, eq=False)
class Frozen:
    """What prompts read: frozen tokens of some items.

    Attributes:
        blocks: Keys and values at each block read, as `keys_values` gives them; made as they are
            asked for where they are read once.
        items: Number of items.
        seen: Which tokens an item's prompts see, (item, token); None is all.
    """

    blocks: Iterable[tuple[Tensor, Tensor]]
    items: int
    seen: Tensor | None = None


class RPO(Method):
    """Pairs of prompts that attend to frozen tokens and are attended to by none.

    A prompt p at a chosen block, with the block's input x of the frozen tokens:

        p ← p + attention(query of p, keys and values of x)
        p ← p + mlp(p)

    so that prompts see neither each other nor themselves, and all other tokens are plain CLIP: they
    are computed without a graph, those of class prompts once. A text's prompts see its tokens up to
    end-of-text. Logits average the cosines of the pairs.

    Args:
        config: Blocks and number of pairs.
        backbone: The frozen CLIP.
        task: The classes trained on; nothing of them is kept.
        seed: Seed of the initial values: embedding of end-of-text and class embedding, each plus
            0.1 times a random direction.
    """

    Config = RPOConfig
    varies = False
    config: RPOConfig

    def __init__(self, config: RPOConfig, backbone: Backbone, task: Task, seed: int = 0) -> None:
        super().__init__(config)
        _check_backbone(config, backbone)
        generator = torch.Generator().manual_seed(seed)
        ids = backbone.tokens([""])
        end = word_embedding(backbone, ids[0, _ends(backbone, ids)[0]])
        class_embedding = backbone.vision.tower.class_embedding
        assert class_embedding is not None
        self.text_prompt = self._near(end, generator)
        self.img_prompt = self._near(class_embedding, generator)

    def _near(self, start: Tensor, generator: torch.Generator) -> nn.Parameter:
        drawn = torch.randn(self.config.pairs, len(start), generator=generator)
        return nn.Parameter(start.detach().float().cpu() + NOISE * F.normalize(drawn, dim=-1))

    def prepare(self, backbone: Backbone, task: Task) -> Frozen:
        """Return keys and values of the class prompts at the chosen text blocks."""
        texts = task.prompts()
        if self.config.as_published:
            texts = [task.template.replace("{}", name) for name in task.class_names]
        tokens = backbone.tokens(texts)
        ends = _ends(backbone, tokens)
        self._check_room(tokens.shape[1], ends, texts)
        state = backbone.prompts(tokens, [1])[1]
        seen = torch.arange(state.inputs.shape[1], device=ends.device) <= ends[:, None]
        # A list: every step reads the class prompts again, where those of images are read once.
        return Frozen(list(self._keys_values(backbone, "text", state)), len(texts), seen)

    def _check_room(self, limit: int, ends: Tensor, texts: list[str]) -> None:
        # Prompts take no tokens here. The authors' overwrite padding, and what would not fit there
        # is no setting of the method.
        longest = int(ends.argmax())
        room = limit - 1 - int(ends[longest])
        if self.config.pairs > room:
            raise UserError(
                f"{texts[longest]!r} leaves {room} of {limit} tokens behind end-of-text, where "
                f"rpo's {self.config.pairs} text prompts stand; use {room} pairs at most"
            )

    def _keys_values(
        self, backbone: Backbone, tower: str, state: State
    ) -> Iterator[tuple[Tensor, Tensor]]:
        walk = backbone.walks[tower]
        for block in getattr(self.config, tower):
            # Nothing that is trained comes in here: prompts read and are read by nothing.
            with torch.no_grad():
                state = walk.advance(state, block)
                assert state.x is not None
                made = keys_values(walk.tower.blocks[block - 1], state.x, walk.onednn)
            yield made

    def image_features(self, backbone: Backbone, state: State) -> Tensor:
        """Return joint features read at the image prompts, (image, pair, joint)."""
        assert state.x is not None
        frozen = Frozen(self._keys_values(backbone, "vision", state), len(state.x))
        return self._read(backbone, "vision", frozen)

    def class_features(self, backbone: Backbone, classes: Frozen) -> Tensor:
        """Return joint features read at the text prompts, (class, pair, joint)."""
        return self._read(backbone, "text", classes)

    def _read(self, backbone: Backbone, tower: str, frozen: Frozen) -> Tensor:
        walk, blocks = backbone.walks[tower], getattr(self.config, tower)
        prompts: Tensor = getattr(self, PARTS[tower])
        # Prompts of block 1 pass the input norm, as published; those that join later do not.
        if blocks[0] == 1:
            prompts = walk.tower.norm_in(prompts)
        x = prompts.expand(frozen.items, -1, -1)  # (item, pair, width)
        for block, (keys, values) in zip(blocks, frozen.blocks):
            module = walk.tower.blocks[block - 1]
            x = attend_others(module, x, keys, values, frozen.seen, walk.onednn)
            x = feed_forward(module, x, walk.onednn)
        each = x.flatten(0, 1)[:, None]  # (item · pair, 1, width)
        # Each prompt is a sequence of its own for the head, which reads one token of it.
        rows = torch.zeros(len(each), dtype=torch.long, device=each.device)
        return walk.head(each, rows).unflatten(0, (frozen.items, -1))

    def logits(self, backbone: Backbone, images: Tensor, classes: Tensor) -> Tensor:
        """Return exp(logit scale) · the mean cosine of the pairs, (image, class)."""
        # Unit vectors side by side: the cosine of two such rows is the mean over their pairs.
        pairs = (F.normalize(x, dim=-1).flatten(1) for x in (images, classes))
        return scaled_cosines(backbone.clip, *pairs)

    def official_names(self) -> dict[str, str]:
        """Return our parameter names to those of the authors' checkpoints."""
        return {name: f"prompt_learner.{name}" for name in PARTS.values()}

    @classmethod
    def is_official_key(cls, key: str) -> bool:
        """Whether a key of the authors' checkpoints is a prompt."""
        return is_prompt(key)

    @classmethod
    def config_of_official(
        cls, state: Mapping[str, Tensor], where: str, config: MethodConfig | None = None
    ) -> MethodConfig:
        """Read the number of pairs; blocks are not in the file, and are all of ViT-B/16's."""
        matched_keys(state, OFFICIAL, where, cls.Config.title)
        pairs = max(value.shape[0] if value.ndim else 1 for value in state.values())
        if config is None:
            return cls.Config.published(VIT_B_16, pairs=pairs)
        return check_settings(config, {"pairs": pairs}, where)


def _check_backbone(config: RPOConfig, backbone: Backbone) -> None:
    """Raise a UserError where prompts cannot read in a tower, start in it or be read out."""
    vision, text = backbone.vision.tower, backbone.text.tower
    starts = {"vision": vision.class_embedding, "text": text.ends and text.embed}
    for name, walk in backbone.walks.items():
        tower, blocks = walk.tower, [walk.tower.blocks[b - 1] for b in getattr(config, name)]
        standard = walk.steps and all(map(is_standard, blocks))
        if not standard or starts[name] is None or tower.attend is not None:
            raise UserError(
                f"rpo reads inside open_clip's standard blocks, from a class or end-of-text token, "
                f"which this {name} tower ({tower.family}) does not have; choose another backbone"
            )


def _ends(backbone: Backbone, tokens: Tensor) -> Tensor:
    ends = backbone.text.tower.ends
    assert ends is not None
    return ends(tokens)
