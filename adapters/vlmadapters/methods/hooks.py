"""Methods attached to a backbone by hooks on its blocks, for models that run their own forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vlmadapters.clip.towers import backbone_towers, first_norm
from vlmlayers.errors import UserError
from vlmlayers.models.modes import frozen
from vlmlayers.models.towers import Tower


@contextmanager
def attached(method: Any, clip: nn.Module) -> Iterator[Any]:
    """Attach a method to a backbone for the length of the context; its weights stay frozen.

    Raises:
        UserError: The backbone has fewer blocks, or a method is attached to it already.
    """
    towers = backbone_towers(clip)
    method.config.check_depths({name: tower.depth for name, tower in towers.items()})
    if any(_is_adapted(block) for tower in towers.values() for block in tower.blocks):
        raise UserError("a method is attached to this backbone; leave its context first")
    with ExitStack() as stack:
        stack.enter_context(frozen(clip))
        for name, tower in towers.items():
            first = tower.blocks[0].register_forward_pre_hook(_single, with_kwargs=True)
            stack.callback(first.remove)
            for block in getattr(method.config, name):
                stack.callback(_BlockHooks(method, tower, block).remove)
        yield method


def _single(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Keep the residual stream in single precision under autocast, as the walks do."""
    x = args[0] if args else None
    if x is None or x.dtype == torch.float32 or not torch.is_autocast_enabled(x.device.type):
        return None
    return (x.float(), *args[1:]), kwargs


class _BlockHooks:
    """Hooks on one block and on its first norm, whose output the method reuses."""

    def __init__(self, method: Any, where: Tower, block: int) -> None:
        module = where.blocks[block - 1]
        self.method, self.tower, self.block = method, where.name, block
        self.inside = method.inside(where.name, block)
        self.norm = first_norm(module, where)
        self.seen: tuple[Tensor, Tensor] | None = None
        self.handles = [
            self.norm.register_forward_hook(self._keep),
            module.register_forward_hook(self._act, with_kwargs=True),
        ]

    def _keep(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.seen = args[0], output

    def _act(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        # Taken and dropped at once: a kept activation would keep its graph until the next step.
        seen, self.seen = self.seen, None
        if self.inside is not None:
            # The block has run in vain: a hook can replace its output, not its forward.
            output = self.inside(module, x, kwargs.get("attn_mask"), None)
            # Calling the norm has set this again, through the norm's own hook.
            self.seen = None
        if not self.method.reads_norm(self.tower, self.block):
            return output
        # A post-norm block calls its norm on something else; the method still reads norm(x).
        u = seen[1] if seen is not None and seen[0] is x else self._norm(x)
        return self.method.beside(output, u, self.tower, self.block)

    def _norm(self, x: Tensor) -> Tensor:
        u = self.norm(x)
        self.seen = None
        return u

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.seen = None


def _is_adapted(block: nn.Module) -> bool:
    # By their owner: hooks that a user registered are no method.
    hooks = block._forward_hooks.values()
    return any(isinstance(getattr(hook, "__self__", None), _BlockHooks) for hook in hooks)
