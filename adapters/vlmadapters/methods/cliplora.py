"""CLIP-LoRA: low-rank changes of the attention matrices of chosen blocks.

Reference: Zanella and Ben Ayed, "Low-Rank Few-Shot Adaptation of Vision-Language Models",
CVPR Workshops 2024.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import log, sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmadapters.clip.arithmetic import at, feed_forward, mix
from vlmadapters.clip.frozen import Backbone
from vlmadapters.clip.logits import single
from vlmadapters.clip.products import frozen_linear
from vlmadapters.clip.remembered import lowered
from vlmadapters.clip.walk import Inside
from vlmadapters.data.task import Task
from vlmadapters.methods.base import Method, Step
from vlmadapters.methods.config import MethodConfig
from vlmadapters.methods.deep_configs import CLIPLoRAConfig
from vlmadapters.methods.official import check_settings, matched_keys
from vlmlayers.errors import UserError

# In the order of the authors' files.
RESBLOCKS = {"text": "transformer.resblocks", "vision": "visual.transformer.resblocks"}
LINEARS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "proj"}
FACTORS = {"down": "w_lora_A", "up": "w_lora_B"}
ALPHA, CUSTOM = "metadata.alpha", "custom"
OFFICIAL = re.compile(
    r"(visual\.)?transformer\.resblocks\.(\d+)\.attn\.(q_proj|k_proj|v_proj|proj)\.w_lora_[AB]"
)
# Named positions of the authors' files, blocks from 0: of 12 blocks, and of ViT-L/14's 24.
POSITIONS = {
    12: {
        "bottom": range(4),
        "mid": range(4, 8),
        "up": range(8, 12),
        "half-bottom": range(6),
        "half-up": range(6, 12),
        "top3": range(9, 12),
        "all": range(12),
    },
    24: {"half-bottom": range(12), "half-up": range(12, 24), "all": range(24)},
}


@dataclass(frozen=True, eq=False)
class Dropping:
    """Where a training step's dropout comes from.

    Attributes:
        generator: Source of the draws, on the device.
        kept: Recorded draws that stand in for them: linear map to what it keeps of its input,
            (token, item, width).
    """

    generator: torch.Generator
    kept: Mapping[str, Tensor] | None = None


class Factors(nn.Module):
    """The two factors of a change: `down`, (rank, width), and `up`, (width, rank), which is 0."""

    def __init__(self, width: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        # What `kaiming_uniform_` with a = √5 comes to, which is how the public code draws A.
        bound = 1 / sqrt(width)
        drawn = torch.empty(rank, width).uniform_(-bound, bound, generator=generator)
        # B = 0 makes the start plain CLIP; the first gradient of A is therefore 0.
        self.down, self.up = nn.Parameter(drawn), nn.Parameter(torch.zeros(width, rank))


class CLIPLoRA(Method):
    """Low-rank changes W + s · B A of the query, key, value and output projections.

        y = W x + b + s · B A dropout(x),  s = alpha / √rank

    Each map has a dropout of its own, in training only. The logits are 100 · cosine, whatever the
    backbone's own scale.

    Args:
        config: Blocks, matrices, rank, alpha, dropout.
        backbone: The frozen CLIP.
        task: The classes trained on; nothing of them is kept.
        seed: Seed of the initial values: A uniform within 1/√width, B zero.
    """

    Config = CLIPLoRAConfig
    config: CLIPLoRAConfig

    def __init__(
        self, config: CLIPLoRAConfig, backbone: Backbone, task: Task, seed: int = 0
    ) -> None:
        super().__init__(config)
        generator = torch.Generator().manual_seed(seed)
        for tower, walk in backbone.walks.items():
            made = {
                str(block): nn.ModuleDict(
                    {
                        matrix: Factors(walk.tower.width, config.rank, generator)
                        for matrix in config.matrices
                    }
                )
                for block in getattr(config, tower)
            }
            setattr(self, tower, nn.ModuleDict(made))
        self.savings = backbone.savings
        self._dropping: Dropping | None = None

    def inside(self, tower: str, block: int) -> Inside | None:
        """Return what computes a chosen block with its changes."""
        return partial(self._run, tower, block) if block in getattr(self.config, tower) else None

    def _run(
        self, tower: str, number: int, block: Any, x: Tensor, mask: Tensor | None, rows: Any
    ) -> Tensor:
        changed = partial(self._changed, tower, number, rows=rows)
        linear = partial(frozen_linear, onednn=self.savings.onednn)
        attention, u = block.attn, block.ln_1(x)
        weight, bias = lowered(attention.in_proj_weight), attention.in_proj_bias
        width = u.shape[-1]
        if rows is None:
            asking = u
            q, k, v = linear(u, weight, bias).chunk(3, -1)
        else:
            x, asking = at(x, rows), at(u, rows)
            # (item, 1, 1, token): one query an item, alike for all heads.
            mask = None if mask is None else mask[rows][:, None, None]
            # One token is read after the last block: it alone needs a query.
            q = linear(asking, weight[:width], bias[:width])
            k, v = linear(u, weight[width:], bias[width:]).chunk(2, -1)
        q, k, v = changed("q", q, asking), changed("k", k, u), changed("v", v, u)
        out = mix(q, k, v, attention.num_heads, mask)
        leaving = linear(out, attention.out_proj.weight, attention.out_proj.bias)
        x = x + block.ls_1(changed("o", leaving, out))
        return feed_forward(block, x, self.savings.onednn, self.savings.fused)

    def _changed(
        self, tower: str, number: int, matrix: str, y: Tensor, x: Tensor, *, rows: Tensor | None
    ) -> Tensor:
        """Return the output y of a linear map of x with its change."""
        if matrix not in self.config.matrices:
            return y
        scale, dropout = self.config.alpha / sqrt(self.config.rank), self.config.dropout
        if self._dropping is not None and self.training and dropout:
            kept = _kept(self._dropping, _linear(tower, number, matrix), x, 1 - dropout, rows)
            # Inverted dropout: the factor 1 / (1 − p) is applied to the scale, which is one number.
            x, scale = x * kept, scale / (1 - dropout)
        elif self.config.as_published and not dropout:
            # Without dropout the public code merges the change into the weights and takes it out
            # again before the backward pass, so that no gradient reaches x through it.
            x = x.detach()
        factors = getattr(self, tower)[str(number)][matrix]
        return y + scale * F.linear(F.linear(x, factors.down), factors.up)

    def logits(self, backbone: Backbone, images: Tensor, classes: Tensor) -> Tensor:
        """Return 100 · cosine, (image, class), in single precision."""
        with torch.autocast(images.device.type, enabled=False):
            unit = [F.normalize(single(one), dim=-1) for one in (images, classes)]
            return self.config.own_scale * unit[0] @ unit[1].T

    def loss_parts(self, step: Step) -> dict[str, Tensor]:
        """Return the cross-entropy, with dropout in training."""
        # The step's generator is on the CPU, as everywhere; masks are drawn where they are used.
        seed = int(torch.randint(2**62, (), generator=step.generator))
        generator = torch.Generator(step.labels.device).manual_seed(seed)
        # An attribute, since the walk that calls `inside` knows nothing of the step.
        self._dropping = Dropping(generator, step.draws)
        try:
            return super().loss_parts(step)
        finally:
            self._dropping = None

    def merged(self, backbone: Backbone) -> dict[str, Tensor]:
        """Return W + s · B A of the changed maps, and the scale of the logits."""
        # By identity: a module does not know the name that it has in the whole model.
        names = {id(value): key for key, value in backbone.clip.named_parameters()}
        scale = self.config.alpha / sqrt(self.config.rank)
        found: dict[str, Tensor] = {}
        with torch.no_grad():
            for tower, walk in backbone.walks.items():
                for number in getattr(self.config, tower):
                    attention: Any = walk.tower.blocks[number - 1].attn
                    stacked, out = attention.in_proj_weight, attention.out_proj.weight
                    changed = {id(one): one.detach().float().clone() for one in (stacked, out)}
                    thirds = dict(zip("qkv", changed[id(stacked)].chunk(3)), o=changed[id(out)])
                    for matrix, factors in getattr(self, tower)[str(number)].items():
                        # In place: the thirds are views of the copy that is returned.
                        thirds[matrix] += scale * factors.up @ factors.down
                    found |= {names[key]: value for key, value in changed.items()}
        return found | {"logit_scale": torch.tensor(log(self.config.own_scale))}

    def official_names(self) -> dict[str, str]:
        """Return our parameter names to the authors'."""
        return {
            f"{tower}.{block}.{matrix}.{ours}": f"{_linear(tower, block, matrix)}.{theirs}"
            for tower in RESBLOCKS
            for block in getattr(self.config, tower)
            for matrix in self.config.matrices
            for ours, theirs in FACTORS.items()
        }

    def official_content(self, epoch: int = 0) -> dict[str, Any]:
        """Return what the authors' `.pt` files hold: changes by layer, text before vision.

        Their loader asks for the name of the position; where ours has none, `custom` stands there,
        and the blocks, from 1, are in `vision` and `text`.
        """
        config, state = self.config, self.official_state_dict()
        layers = [(tower, block) for tower in RESBLOCKS for block in getattr(config, tower)]
        weights = {}
        for number, (tower, block) in enumerate(layers):
            linears = {LINEARS[one]: _linear(tower, block, one) for one in config.matrices}
            weights[f"layer_{number}"] = {
                short: {part: state[f"{name}.{part}"].cpu() for part in FACTORS.values()}
                for short, name in linears.items()
            }
        towers = [tower for tower in RESBLOCKS if getattr(config, tower)]
        metadata = {
            "r": config.rank,
            "alpha": config.alpha,
            "encoder": "both" if len(towers) == 2 else towers[0],
            "params": list(config.matrices),
            "position": _position(config),
            "vision": list(config.vision),
            "text": list(config.text),
        }
        return {"weights": weights, "metadata": metadata}

    @classmethod
    def official_state(cls, content: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """Return changes by the names of their maps, and alpha, from an authors' `.pt` file."""
        if "weights" not in content:
            return super().official_state(content, where)
        try:
            weights, metadata = content["weights"], content["metadata"]
            layers = _layers(metadata, len(weights))
            found: dict[str, Any] = {ALPHA: torch.tensor(float(metadata["alpha"]))}
            for number, (tower, block) in enumerate(layers):
                for linear, parts in weights[f"layer_{number}"].items():
                    name = f"{RESBLOCKS[tower]}.{block - 1}.attn.{linear}"
                    found |= {f"{name}.{part}": value for part, value in parts.items()}
        except (LookupError, TypeError, ValueError, AttributeError, StopIteration) as error:
            raise UserError(
                f"{where} is not a CLIP-LoRA file whose layers are known ({error!r}); its metadata "
                "must name encoder, position and alpha"
            ) from error
        return found

    def load_official_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load changes by the names of their maps; alpha is a setting."""
        super().load_official_state_dict({k: v for k, v in state.items() if k != ALPHA})

    @classmethod
    def config_of_official(
        cls, state: Mapping[str, Tensor], where: str, config: MethodConfig | None = None
    ) -> MethodConfig:
        """Read blocks, matrices, rank and alpha; dropout is not in the file."""
        keys = [key for key in state if key != ALPHA]
        parts = matched_keys(keys, OFFICIAL, where, cls.Config.title).values()
        short = {name: matrix for matrix, name in LINEARS.items()}
        found: dict[str, Any] = {
            "vision": tuple(sorted({int(m[2]) + 1 for m in parts if m[1]})),
            "text": tuple(sorted({int(m[2]) + 1 for m in parts if not m[1]})),
            "matrices": cls.Config.ordered({short[m[3]] for m in parts}),
            # A is (rank, width), B is (width, rank).
            "rank": min(state[keys[0]].shape, default=1),
        }
        if ALPHA in state:
            found["alpha"] = float(state[ALPHA])
        return cls.Config(**found) if config is None else check_settings(config, found, where)


def _linear(tower: str, block: int, matrix: str) -> str:
    """Return the authors' name of a linear map."""
    return f"{RESBLOCKS[tower]}.{block - 1}.attn.{LINEARS[matrix]}"


def _kept(dropping: Dropping, linear: str, x: Tensor, share: float, rows: Tensor | None) -> Tensor:
    """Return which values of a linear map's input are kept, of the shape of x.

    Args:
        dropping: Where the draws come from.
        linear: The authors' name of the map.
        x: Its input, (item, token, width).
        share: Share that is kept.
        rows: Index of the token of each item that x holds, where it is one alone.
    """
    if dropping.kept is None:
        empty = torch.empty(x.shape, dtype=torch.bool, device=x.device)
        return empty.bernoulli_(share, generator=dropping.generator)
    kept = dropping.kept[linear].transpose(0, 1)[..., : x.shape[-1]]
    # Recorded for all 77 tokens, where the prompts here may be cut.
    return at(kept, rows) if x.shape[1] == 1 and rows is not None else kept[:, : x.shape[1]]


def _visions(position: str) -> list[tuple[int, ...]]:
    """Return the vision blocks, from 1, of a named position, by depths that know it."""
    known = [positions[position] for positions in POSITIONS.values() if position in positions]
    return [tuple(block + 1 for block in blocks) for blocks in known]


def _position(config: CLIPLoRAConfig) -> str:
    """Return the authors' name of a placement, or `custom`."""
    for name in POSITIONS[12]:
        visions = _visions(name)
        if config.text in ((), visions[0]) and config.vision in ((), *visions):
            return name
    return CUSTOM


def _layers(metadata: Mapping[str, Any], count: int) -> list[tuple[str, int]]:
    """Return tower and block, from 1, of each layer of an authors' file with so many layers."""
    if metadata["position"] == CUSTOM:
        blocks = {tower: metadata[tower] for tower in RESBLOCKS}
    else:
        visions, encoder = _visions(metadata["position"]), metadata["encoder"]
        text = visions[0] if encoder in ("both", "text") else ()
        # The file does not say how deep the vision tower is; the number of its layers does.
        fitting = (one for one in [(), *visions] if len(text) + len(one) == count)
        blocks = {"text": text, "vision": next(fitting)}
    return [(tower, int(block)) for tower in RESBLOCKS for block in blocks[tower]]
