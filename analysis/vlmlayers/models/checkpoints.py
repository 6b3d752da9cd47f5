"""Read checkpoints without running code from them, fit them to a model, and say what does not."""

from __future__ import annotations

import logging
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from open_clip.convert import convert_state_dict
from open_clip.model import (
    convert_to_custom_text_state_dict,
    resize_pos_embed,
    resize_text_pos_embed,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from vlmlayers.architectures import OF_PEFT
from vlmlayers.errors import UserError, no_file, one_line
from vlmlayers.models.archives import is_archive, read_archive

LOG = logging.getLogger(__name__)
OPENAI_SIZES = ("input_resolution", "context_length", "vocab_size")
_POSITIONS = (
    "visual.positional_embedding",
    "positional_embedding",
    "text.positional_embedding",
    "visual.trunk.pos_embed",
)
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
# How files of `torch.save` begin: a zip archive, or before torch 1.6 a pickle of protocol 2.
_BEGINNINGS = (b"PK", b"\x80")


def torch_content(path: Path) -> Any:
    """Return what a file of `torch.save` holds, if that is tensors and plain values alone.

    Raises:
        UserError: It is empty, a page of a website, a pointer to a large file, or whatever else
            `torch.save` did not write, of which torch says that it might run code.
        pickle.UnpicklingError: It holds more than tensors.
        Exception: It cannot be read or is damaged, by one of `BROKEN`.
    """
    with path.open("rb") as file:
        start = file.read(24)
    if not start:
        raise UserError(f"{path} is empty (0 bytes)")
    if not start.startswith(_BEGINNINGS):
        raise UserError(
            f"{path} was not written by torch.save: it begins with {start!r}; a download may have "
            "brought a page or a pointer in place of the file"
        )
    with warnings.catch_warnings():  # of an unusual pickle; what comes of it is told by the caller
        warnings.simplefilter("ignore", UserWarning)
        # Unpickling runs any code that a file names; tensors alone cannot.
        return torch.load(path, map_location="cpu", weights_only=True)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The tensors of a file by name.

    Attributes:
        path: The file.
        state: What it holds, without what wraps it.
    """

    path: Path
    state: dict[str, Tensor]

    @property
    def openai(self) -> bool:
        """Whether these are OpenAI's own weights, which alone carry their sizes as tensors."""
        return set(OPENAI_SIZES) <= set(self.state)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read safetensors, a torch file of tensors alone, or a TorchScript archive.

    Raises:
        UserError: The file is missing, broken, or would have to run code to be read.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {path} {no_file(path)}")
    LOG.debug("reading weights from %s", path)
    try:
        if path.suffix == ".safetensors":
            found = load_file(path)
        elif is_archive(path):
            found = read_archive(path)
        else:
            found = torch_content(path)
    except SafetensorError as error:
        raise UserError(f"checkpoint {path} is not a whole safetensors file: {error}") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"checkpoint {path} holds more than tensors and is not unpickled; save its state dict "
            "as safetensors"
        ) from error
    except (*BROKEN, zipfile.BadZipFile) as error:
        raise UserError(f"checkpoint {path} cannot be read: {one_line(error)}") from error
    state = _weights(found, path)
    if any(".lora_" in key for key in state):
        raise UserError(f"checkpoint {path} {OF_PEFT}")
    # `module.` is what a file has that was saved from inside DataParallel.
    return Checkpoint(path, {str(key).removeprefix("module."): v for key, v in state.items()})


def _weights(found: Any, path: Path) -> dict[str, Tensor]:
    """Return the state dict in a file, where it is alone or the only one."""
    if not isinstance(found, dict):
        raise UserError(f"checkpoint {path} holds no state dict of tensors")
    # Trainers keep epoch, optimizer and more beside it, under names of their own.
    inner = {name: held for name, held in found.items() if _is_state(held)}
    inner = {"state_dict": inner["state_dict"]} if "state_dict" in inner else inner
    if len(inner) > 1:
        names = ", ".join(map(repr, inner))
        raise UserError(
            f"checkpoint {path} holds several state dicts, {names}; save one in a file of its own"
        )
    state = next(iter(inner.values()), found)
    if not state:
        raise UserError(f"checkpoint {path} holds no tensors")
    if not _is_state(state):
        raise UserError(f"checkpoint {path} holds no state dict of tensors")
    return state


def _is_state(held: Any) -> bool:
    values = held.values() if isinstance(held, dict) else ()
    return bool(values) and all(isinstance(value, Tensor) for value in values)


def load_checkpoint(clip: nn.Module, checkpoint: Checkpoint) -> None:
    """Load weights into a model, the same way for every model.

    Other layouts (older, Apple, without a text tower of its own) are converted and position
    embeddings resized as open_clip does; then every key and shape has to fit.

    Raises:
        UserError: Names the first keys that are missing, unexpected or of another shape.
    """
    state = dict(checkpoint.state)
    try:
        state = _converted(clip, state)
        resized = _resize_positions(clip, state)
        # Strict: a tower left at its random values still gives features that look plausible.
        clip.load_state_dict(state, strict=True)
    except (RuntimeError, KeyError, AttributeError, TypeError, IndexError, AssertionError) as error:
        raise UserError(
            f"checkpoint {checkpoint.path} does not fit: {_misfit(clip, state, error)}"
        ) from error
    for key, (old, new) in resized.items():
        LOG.warning("%s: %s resized from %d to %d positions", checkpoint.path, key, old, new)


def _converted(clip: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state under the names of open_clip's current layout.

    Reference: `open_clip.factory.load_checkpoint`, whose steps these are.
    """
    state = convert_state_dict(clip, state)
    # Text weights at the top are of the layout in which the text tower was no module of its own.
    if "positional_embedding" in state and not hasattr(clip, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    for key in ("logit_scale", "logit_bias"):  # a number, or one number in a list
        if key in state and getattr(clip, key, None) is not None:
            state[key] = state[key].reshape(getattr(clip, key).shape)
    if getattr(clip, "logit_bias", None) is not None and "logit_bias" not in state:
        state["logit_bias"] = torch.zeros_like(clip.logit_bias)
    own = set(clip.state_dict())
    # Masks, tables of positions and sizes that some files hold and models make by themselves.
    made = {*OPENAI_SIZES, "text.transformer.embeddings.position_ids"}
    made |= {name for name, _ in clip.named_buffers()}
    return {
        key: value
        for key, value in state.items()
        if key in own or not (key in made or key.endswith("attn_mask"))
    }


def _resize_positions(clip: Any, state: dict[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Resize position embeddings in place; return old and new length of those that changed."""
    before = {key: state[key].shape[-2] for key in _POSITIONS if key in state}
    state |= {key: state[key].float() for key in before}  # half cannot be interpolated on a CPU
    resize_pos_embed(state, clip)
    resize_text_pos_embed(state, clip)
    timm = "visual.trunk.pos_embed"
    trunk: Any = getattr(clip.visual, "trunk", None)
    if timm in state and state[timm].shape != trunk.pos_embed.shape:
        grid = trunk.patch_embed.grid_size
        # Class and register tokens have positions of their own, which no grid contains.
        special = trunk.pos_embed.shape[1] - grid[0] * grid[1]
        state[timm] = resample_abs_pos_embed(state[timm], grid, num_prefix_tokens=special)
    after = {key: state[key].shape[-2] for key in before}
    return {key: (old, after[key]) for key, old in before.items() if old != after[key]}


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
    inside = [key for key in extra if missing and key.endswith(f".{missing[0]}")]
    part = min(inside, key=len)[: -len(missing[0]) - 1] if inside else ""
    # Of a model of the user's that holds this one beside other parts.
    if inside and all(f"{part}.{key}" in state for key in missing):
        parts.append(f"the model's names stand there behind {part!r}: save that part by itself")
    return "; ".join(parts) or one_line(error)
