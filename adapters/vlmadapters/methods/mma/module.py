"""The Multi-Modal Adapter: small trainable branches beside frozen blocks, coupled across towers.

Reference: Yang, Zhang, Wang, Xie, "MMA: Multi-Modal Adapter for Vision-Language Models", CVPR 2024.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from vlmadapters.clip.frozen import Backbone
from vlmadapters.clip.towers import Clip, backbone_towers
from vlmadapters.data.task import Task
from vlmadapters.methods.base import Method
from vlmadapters.methods.linear import new_linear
from vlmadapters.methods.mma.branch import add_branch
from vlmadapters.methods.mma.config import MMAConfig
from vlmadapters.methods.mma.official import PARTS, agreed, placement_of
from vlmlayers.arguments import checked
from vlmlayers.errors import UserError
from vlmlayers.models.modes import in_float32, on_cpu

PREFIX = {"vision": "visual_adapter", "text": "text_adapter"}


class _Projections(nn.Module):
    """Down and up projection of one adapted block, named as in the authors' checkpoints."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.down = nn.Sequential(new_linear(width, dim), nn.ReLU())
        self.up = new_linear(dim, width)


class Adapter(Method):
    """The trainable part of MMA, for a backbone of given widths.

    At an adapted block b, on every token, beside the whole block:

        y   = up(relu(shared(relu(down(norm1(x))))))
        out = block(x) + α · y

    The parameters receive the gradient as if α were 1; the input x receives the true one.

    Args:
        config: Placement, inner width, α.
        widths: Width of the `vision` and the `text` tower.
        seed: Seed of the initialisation (Kaiming normal, fan-out, for every weight; biases 0).

    Reference: Yang et al., MMA, CVPR 2024, equations 4 to 7.
    """

    Config = MMAConfig
    varies = False
    config: MMAConfig

    def __init__(self, config: MMAConfig, widths: Mapping[str, int], seed: int = 0) -> None:
        super().__init__(config)
        self.widths = dict(widths)
        self.visual_adapter = nn.ModuleDict(
            {str(b): _Projections(widths["vision"], config.dim) for b in config.vision}
        )
        self.text_adapter = nn.ModuleDict(
            {str(b): _Projections(widths["text"], config.dim) for b in config.text}
        )
        # Both blocks of a pair have one name here, so that their projection is made once.
        self._shared_names = config.shared_names()
        self.shared_adapter = nn.ModuleDict(
            {
                name: nn.Sequential(new_linear(config.dim, config.dim), nn.ReLU())
                for name in dict.fromkeys(self._shared_names.values())
            }
        )
        self.reset_parameters(seed)

    @classmethod
    def build(
        cls, config: Any, backbone: Backbone, task: Task | None = None, seed: int = 0
    ) -> Self:
        """Return a freshly initialised adapter for a backbone; it is bound to no classes."""
        return cls._for(
            config, {k: w.tower for k, w in backbone.walks.items()}, backbone.device, seed
        )

    @classmethod
    def _for(
        cls, config: MMAConfig, towers: Mapping[str, Any], device: torch.device, seed: int
    ) -> Self:
        config.check_depths({name: tower.depth for name, tower in towers.items()})
        return cls(config, {name: tower.width for name, tower in towers.items()}, seed).to(device)

    def reset_parameters(self, seed: int) -> None:
        """Draw all weights anew from a private generator."""
        generator = torch.Generator().manual_seed(seed)
        # In the order of registration, which decides who gets which draw. `up` is drawn as well and
        # not 0 as in LoRA: at the start α alone keeps the branch small, as published.
        for parameter in self.parameters():
            if parameter.ndim == 1:
                nn.init.zeros_(parameter)
                continue
            # On the CPU, so that a seed gives the same weights on every device.
            fresh = torch.empty(parameter.shape)
            nn.init.kaiming_normal_(fresh, mode="fan_out", nonlinearity="relu", generator=generator)
            with torch.no_grad():
                parameter.copy_(fresh)
        self.touch()

    def reads_norm(self, tower: str, block: int) -> bool:
        """Whether a block is adapted."""
        return block in getattr(self.config, tower)

    def beside(self, out: Tensor, u: Tensor, tower: str, block: int) -> Tensor:
        """Return a block's output with the adapter's contribution."""
        branch = getattr(self, PREFIX[tower])[str(block)]
        shared: Any = self.shared_adapter[self._shared_names[tower, block]]
        linears = (branch.down[0], shared[0], branch.up)
        parameters = [part for linear in linears for part in (linear.weight, linear.bias)]
        return add_branch(out, u, self.config.scale, *parameters)

    def attached(self, clip: nn.Module) -> AbstractContextManager[Self]:
        """Attach to a backbone for the length of the context; the backbone's weights stay frozen.

        Raises:
            UserError: The backbone has other widths or fewer blocks, or is adapted already.
        """
        for name, tower in backbone_towers(clip).items():
            if getattr(self.config, name) and self.widths[name] != tower.width:
                raise UserError(
                    f"the adapter was made for a {name} tower of width {self.widths[name]}, this "
                    f"backbone's has width {tower.width}; load the backbone it was made for"
                )
        return super().attached(clip)

    @classmethod
    def is_official_key(cls, key: str) -> bool:
        """Whether a key of the authors' checkpoints belongs to the adapter."""
        return key.partition(".")[0] in PARTS

    @classmethod
    def config_of_official(
        cls, state: Mapping[str, Tensor], where: str, config: Any = None
    ) -> MMAConfig:
        """Read placement, pairs and inner width from the keys; the scale is not in them."""
        return agreed(config, placement_of(state, where), where)


@contextmanager
@checked
def attach(clip: Clip, config: MMAConfig, seed: int = 0) -> Iterator[Adapter]:
    """Attach a freshly initialised adapter to a CLIP for the length of the context.

    The backbone's code and weights are untouched; on every exit, also by an exception, the hooks
    are gone and outputs are bit-identical to before. The adapter outlives the context and can be
    attached again with `adapter.attached(clip)`.

    Args:
        clip: A transformer CLIP of open_clip.
        config: Placement, inner width, α.
        seed: Seed of the initialisation.

    Raises:
        UserError: The backbone has fewer blocks, or a method is attached to it already.
    """
    with new_adapter(clip, config, seed).attached(clip) as adapter:
        yield adapter


def new_adapter(clip: nn.Module, config: MMAConfig, seed: int = 0) -> Adapter:
    """Return a freshly initialised adapter for a backbone, on its device, not attached."""
    device = next(clip.parameters()).device
    with in_float32(), on_cpu():  # the caller may have set other defaults
        return Adapter._for(config, backbone_towers(clip), device, seed)
