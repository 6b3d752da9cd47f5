"""The Multi-Modal Adapter: small trainable branches beside frozen blocks, coupled across towers.

Reference: Yang, Zhang, Wang, Xie, "MMA: Multi-Modal Adapter for Vision-Language Models", CVPR 2024.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmadapters.backbone import backbone_towers, first_norm, frozen
from vlmadapters.branch import add_branch
from vlmadapters.config import MMAConfig
from vlmlayers.errors import UserError
from vlmlayers.models.towers import Tower
from vlmlayers.placement import Placement

PREFIX = {"vision": "visual_adapter", "text": "text_adapter"}


def _linear(width_in: int, width_out: int) -> nn.Linear:
    # skip_init leaves torch's global random state alone; the adapter draws its own weights.
    return torch.nn.utils.skip_init(nn.Linear, width_in, width_out)


class _Branch(nn.Module):
    """Down and up projection of one adapted block, named as in the authors' checkpoints."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.down = nn.Sequential(_linear(width, dim), nn.ReLU())
        self.up = _linear(dim, width)


class Adapter(nn.Module):
    """The trainable part of MMA, for a backbone of given widths; attached to it by hooks.

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

    def __init__(self, config: MMAConfig, widths: Mapping[str, int], seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.widths = dict(widths)
        self.visual_adapter = nn.ModuleDict(
            {str(b): _Branch(widths["vision"], config.dim) for b in config.vision}
        )
        self.text_adapter = nn.ModuleDict(
            {str(b): _Branch(widths["text"], config.dim) for b in config.text}
        )
        self._shared_names = config.shared_names()
        self.shared_adapter = nn.ModuleDict(
            {
                name: nn.Sequential(_linear(config.dim, config.dim), nn.ReLU())
                for name in dict.fromkeys(self._shared_names.values())
            }
        )
        self.version = 0
        self.reset_parameters(seed)

    def reset_parameters(self, seed: int) -> None:
        """Draw all weights anew from a private generator."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            if parameter.ndim == 1:
                nn.init.zeros_(parameter)
                continue
            fresh = torch.empty(parameter.shape)
            nn.init.kaiming_normal_(fresh, mode="fan_out", nonlinearity="relu", generator=generator)
            with torch.no_grad():
                parameter.copy_(fresh)
        self.touch()

    def touch(self) -> None:
        """Say that the parameters changed, so that text features computed before are stale."""
        self.version += 1

    def add_to(self, out: Tensor, u: Tensor, tower: str, block: int) -> Tensor:
        """Return a block's output with the adapter's contribution.

        Args:
            out: Output of the block, (item, token, width).
            u: The block's input after its first norm, same shape.
            tower: `vision` or `text`.
            block: Number of the block.
        """
        branch = getattr(self, PREFIX[tower])[str(block)]
        shared: Any = self.shared_adapter[self._shared_names[tower, block]]
        linears = (branch.down[0], shared[0], branch.up)
        parameters = [part for linear in linears for part in (linear.weight, linear.bias)]
        return add_branch(out, u, self.config.scale, *parameters)

    @contextmanager
    def attached(self, clip: nn.Module) -> Iterator[Adapter]:
        """Attach to a backbone for the length of the context; the backbone's weights stay frozen.

        Raises:
            UserError: The backbone has other widths or fewer blocks, or is adapted already.
        """
        towers = backbone_towers(clip)
        check_fits(self.config, towers, self.widths)
        if any(_is_adapted(block) for tower in towers.values() for block in tower.blocks):
            raise UserError("an adapter is attached to this backbone; leave its context first")
        with ExitStack() as stack:
            stack.enter_context(frozen(clip))
            for name, tower in towers.items():
                for block in getattr(self.config, name):
                    hooks = _BlockHooks(self, tower, block)
                    stack.callback(hooks.remove)
            yield self

    def named_official_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield parameters under the authors' names, such as `text_adapter.5.down.0.weight`."""
        yield from self.named_parameters()

    def official_state_dict(self) -> dict[str, Tensor]:
        """Return a copy of the parameters under the authors' names."""
        return {key: value.detach().clone() for key, value in self.named_parameters()}

    def load_official_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load parameters stored under the authors' names.

        Raises:
            UserError: Keys or shapes belong to another placement, width or backbone.
        """
        state = {key.removeprefix("module."): value for key, value in state.items()}
        own = dict(self.named_parameters())
        missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or extra:
            raise UserError(
                f"the checkpoint does not fit the placement {self.config.placement}: "
                f"{len(missing)} parameters are missing ({_few(missing)}), "
                f"{len(extra)} are not known ({_few(extra)})"
            )
        for key, parameter in own.items():
            if state[key].shape != parameter.shape:
                raise UserError(
                    f"{key} has shape {tuple(state[key].shape)} in the checkpoint and "
                    f"{tuple(parameter.shape)} for this backbone; load the backbone it was made for"
                )
        with torch.no_grad():
            for key, parameter in own.items():
                parameter.copy_(state[key])
        self.touch()

    def parameter_count(self) -> int:
        """Return the number of trainable values."""
        return sum(parameter.numel() for parameter in self.parameters())


class _BlockHooks:
    """Hooks on one block and on its first norm, whose output the adapter reuses."""

    def __init__(self, adapter: Adapter, where: Tower, block: int) -> None:
        module = where.blocks[block - 1]
        self.adapter, self.tower, self.block = adapter, where.name, block
        self.norm = first_norm(module, where)
        self.seen: tuple[Tensor, Tensor] | None = None
        self.handles = [
            self.norm.register_forward_hook(self._keep),
            module.register_forward_hook(self._add, with_kwargs=True),
        ]

    def _keep(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.seen = args[0], output

    def _add(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        seen, self.seen = self.seen, None
        # A post-norm block calls its norm on something else; the adapter still reads norm(x).
        u = seen[1] if seen is not None and seen[0] is x else self._norm(x)
        return self.adapter.add_to(output, u, self.tower, self.block)

    def _norm(self, x: Tensor) -> Tensor:
        u = self.norm(x)
        self.seen = None
        return u

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.seen = None


def _is_adapted(block: nn.Module) -> bool:
    hooks = block._forward_hooks.values()
    return any(isinstance(getattr(hook, "__self__", None), _BlockHooks) for hook in hooks)


@contextmanager
def attach(clip: nn.Module, config: MMAConfig, seed: int = 0) -> Iterator[Adapter]:
    """Attach a freshly initialised adapter to a CLIP for the length of the context.

    The backbone's code and weights are untouched; on every exit, also by an exception, the hooks
    are gone and outputs are bit-identical to before. The adapter outlives the context and can be
    attached again with `adapter.attached(clip)`.

    Args:
        clip: A transformer CLIP of open_clip.
        config: Placement, inner width, α.
        seed: Seed of the initialisation.
    """
    with new_adapter(clip, config, seed).attached(clip) as adapter:
        yield adapter


def new_adapter(clip: nn.Module, config: MMAConfig, seed: int = 0) -> Adapter:
    """Return a freshly initialised adapter for a backbone, on its device, not attached."""
    towers = backbone_towers(clip)
    widths = {name: tower.width for name, tower in towers.items()}
    check_fits(config, towers, widths)
    return Adapter(config, widths, seed).to(next(clip.parameters()).device)


def check_fits(config: MMAConfig, towers: Mapping[str, Any], widths: Mapping[str, int]) -> None:
    """Raise a UserError unless a backbone has the adapter's widths and blocks."""
    depths = {name: tower.depth for name, tower in towers.items()}
    Placement(config.vision, config.text).check(depths)
    for name, tower in towers.items():
        if getattr(config, name) and widths[name] != tower.width:
            raise UserError(
                f"the adapter was made for a {name} tower of width {widths[name]}, this backbone's "
                f"has width {tower.width}; load the backbone it was made for"
            )


def scaled_cosines(clip: Any, image_features: Tensor, text_features: Tensor) -> Tensor:
    """Return exp(logit scale) · cosine, (image, class), with the model's logit bias if any."""
    images = F.normalize(image_features, dim=-1)
    texts = F.normalize(text_features, dim=-1)
    logits = clip.logit_scale.exp() * images @ texts.t()
    bias = getattr(clip, "logit_bias", None)
    return logits if bias is None else logits + bias


def class_logits(clip: Any, images: Tensor, tokens: Tensor) -> Tensor:
    """Return exp(logit scale) · cosine between images and class prompts, differentiable.

    Args:
        clip: The backbone, with or without an attached adapter.
        images: (image, 3, height, width), preprocessed.
        tokens: (class, token) of the class prompts, full length.

    Returns:
        (image, class).
    """
    return scaled_cosines(clip, clip.encode_image(images), clip.encode_text(tokens))


def _few(keys: list[str]) -> str:
    return ", ".join(keys[:2]) + (", …" if len(keys) > 2 else "") if keys else "none"
