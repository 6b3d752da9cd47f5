"""Read checkpoints without running code from them, and say what does not fit."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from open_clip.factory import load_checkpoint as _open_clip_load
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vlmlayers.errors import UserError
from vlmlayers.models.build import one_line

_SHOWN = 3
# What torch's reader raises on damaged files, as found by damaging some.
BROKEN = (
    OSError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    AssertionError,
    ArithmeticError,
    MemoryError,
)


def read_state(path: Path) -> dict[str, Tensor]:
    """Read tensors from safetensors, or from a torch file that holds nothing but tensors.

    Raises:
        UserError: The file is missing, broken, or would have to run code to be read.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise UserError(f"checkpoint {path} is not a whole safetensors file: {error}") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"checkpoint {path} holds more than tensors and is not unpickled; save its state dict "
            "as safetensors"
        ) from error
    except BROKEN as error:
        raise UserError(f"checkpoint {path} cannot be read: {one_line(error)}") from error
    state = found.get("state_dict", found) if isinstance(found, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"checkpoint {path} holds no state dict of tensors")
    if not state:
        raise UserError(f"checkpoint {path} holds no tensors")
    return state


def load_checkpoint(clip: nn.Module, path: Path) -> None:
    """Load weights into a model; every key and shape has to fit.

    Raises:
        UserError: Names the first keys that are missing, unexpected or of another shape.
    """
    state = read_state(path)
    state = {key.removeprefix("module."): value for key, value in state.items()}
    try:
        if set(state) == set(clip.state_dict()):
            clip.load_state_dict(state, strict=True)
        else:  # other layouts (older, timm, Apple, big_vision) are converted by open_clip
            _open_clip_load(clip, str(path), strict=True, weights_only=True)
    except (RuntimeError, KeyError, AttributeError, TypeError, IndexError) as error:
        raise UserError(f"checkpoint {path} does not fit: {_misfit(clip, state, error)}") from error


def _misfit(clip: nn.Module, state: Mapping[str, Tensor], error: Exception) -> str:
    own: dict[str, Any] = clip.state_dict()
    shapes = [
        f"{key} is {tuple(state[key].shape)}, the model has {tuple(own[key].shape)}"
        for key in own
        if key in state and own[key].shape != state[key].shape
    ]
    missing = [key for key in own if key not in state]
    extra = [key for key in state if key not in own]
    parts = [
        f"{len(found)} {what} ({', '.join(found[:_SHOWN])}{', …' if len(found) > _SHOWN else ''})"
        for what, found in (
            ("of another shape", shapes),
            ("missing", missing),
            ("unexpected", extra),
        )
        if found
    ]
    return "; ".join(parts) or one_line(error)
