"""What is computed once for a frozen tensor: copies, and whether a mask is causal.

Under autocast torch keeps casts of trained weights only and casts a frozen one at every use; and
to read whether a mask is causal, the host has to wait for the device. All of it is kept here for as
long as the tensor lives and is not changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")
# torch's own dictionary compares keys by identity; one of the standard library would call `==`,
# which compares tensors element by element.
_CASTS, _SCALED, _CAUSAL = (WeakTensorKeyDictionary() for _ in range(3))


def lowered(weight: Tensor) -> Tensor:
    """Return a frozen float32 weight as autocast would cast it; any other tensor as it is."""
    kind = weight.device.type
    frozen = weight.dtype == torch.float32 and not weight.requires_grad
    if not frozen or not torch.is_autocast_enabled(kind):
        return weight
    dtype = torch.get_autocast_dtype(kind)

    return _once(_CASTS, weight, dtype, lambda: _usable(weight.to, dtype))


def scaled(weight: Tensor, factor: float) -> Tensor:
    """Return a frozen tensor times a number."""
    if factor == 1.0:
        return weight
    return _once(_SCALED, weight, factor, lambda: _usable(weight.detach().mul, factor))


def _usable(make: Callable[[Any], Tensor], of: Any) -> Tensor:
    with torch.inference_mode(False):  # else training could not use what a test made
        return make(of)


def forget_written(weights: Iterable[Tensor]) -> None:
    """Drop the copies of weights that are no copies any more.

    Neither version nor storage tells of what is written by way of `weight.data`, as averages of
    weights are. Compared where a backbone is taken apart, not at every use, for which the host
    would have to wait.
    """
    for weight in weights:
        for kept in (_CASTS, _SCALED):
            found: tuple[Any, Tensor] | None = kept.get(weight)
            if found is None:
                continue
            (_, _, how), made = found
            now = weight.detach().to(how) if kept is _CASTS else weight.detach().mul(how)
            if made.device != now.device or not torch.equal(made, now):
                del kept[weight]


def is_causal(mask: Tensor) -> bool:
    """Return whether an additive mask hides from each token those after it, and nothing else."""
    size = mask.shape[-1]
    if mask.shape != (size, size) or not mask.is_floating_point():
        return False

    def look() -> bool:
        return torch.equal(mask, torch.full_like(mask, -math.inf).triu(1))

    return _once(_CAUSAL, mask, None, look)


def _once(kept: WeakTensorKeyDictionary, tensor: Tensor, how: Any, make: Callable[[], T]) -> T:
    # A write in place raises the tensor's version; a tensor made under inference mode keeps none.
    version = 0 if tensor.is_inference() else tensor._version
    # Replacing `data`, as `module.to` may, leaves the version and changes the storage.
    state = version, tensor.untyped_storage(), how
    found: tuple[Any, T] | None = kept.get(tensor)
    if found is None or found[0] != state:
        found = kept[tensor] = state, make()
    return found[1]
