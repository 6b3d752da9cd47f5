"""Adapters on disk: the authors' layout, our own, and the state of an unfinished training.

Nothing is unpickled: files load as safetensors or with `weights_only=True`.
"""

from __future__ import annotations

import io
import json
import logging
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vlmadapters.checksums import content_checksum
from vlmadapters.config import MMAConfig
from vlmadapters.mma import Adapter, new_adapter
from vlmlayers.errors import UserError
from vlmlayers.files import atomically
from vlmlayers.models.checkpoints import BROKEN

LOG = logging.getLogger("vlmlayers")
FORMAT = "vlmadapters-2"
PARTS = ("visual_adapter", "text_adapter", "shared_adapter")
STATE_FILE = "training.pt"


@dataclass(frozen=True)
class CheckpointInfo:
    """What our own checkpoints say about themselves.

    Attributes:
        config: Placement and size.
        model: Architecture of the backbone.
        weights: Its weights' tag or file name.
        weights_hash: Hash of its weights.
        class_names: Classes it was trained on.
        provenance: Recipe, seed, dataset, versions; anything JSON.
    """

    config: MMAConfig
    model: str = ""
    weights: str = ""
    weights_hash: str = ""
    class_names: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)


def save_adapter(
    path: str | Path,
    adapter: Adapter,
    model: Any,
    class_names: tuple[str, ...] = (),
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write an adapter as safetensors, with a JSON description in its header and beside it."""
    path = Path(path)
    if path.suffix != ".safetensors":
        path = path.with_name(f"{path.name}.safetensors")
    info = {
        "format": FORMAT,
        "adapter": adapter.config.to_dict(),
        "model": model.name,
        "weights": model.weights,
        "weights_hash": model.weights_hash,
        "class_names": list(class_names),
        "provenance": dict(provenance or {}),
    }
    state = {key: value.cpu().contiguous() for key, value in adapter.official_state_dict().items()}
    text = json.dumps({**info, "checksum": _checksum(info, state)}, indent=1)
    data = save(state, metadata={"description": text})
    atomically(path, lambda part: part.write_bytes(data))
    atomically(path.with_suffix(".json"), lambda part: part.write_text(text, encoding="utf-8"))
    return path


def read_info(path: str | Path) -> CheckpointInfo:
    """Return what a checkpoint of ours says about itself.

    Raises:
        UserError: It cannot be read, is no adapter of ours, or was altered since it was written.
    """
    return _read_ours(path)[0]


def _read_ours(path: str | Path) -> tuple[CheckpointInfo, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            info = json.loads((file.metadata() or {}).get("description", "{}"))
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, RuntimeError, RecursionError) as error:
        raise UserError(f"cannot read the adapter {path}: {_line(error)}") from error
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        raise UserError(f"{path} is no adapter of this toolkit (its header does not say {FORMAT})")
    expected = info.pop("checksum", None)
    if _checksum(info, state) != expected:
        raise UserError(
            f"{path} is altered: its checksum differs; copy it again, or train it again"
        )
    found = CheckpointInfo(
        MMAConfig.from_dict(info["adapter"]),
        info["model"],
        info["weights"],
        info["weights_hash"],
        tuple(info["class_names"]),
        info["provenance"],
    )
    return found, state


def _checksum(info: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    return content_checksum([json.dumps(info, sort_keys=True), state])


def load_adapter(path: str | Path, model: Any) -> Adapter:
    """Read an adapter of ours for a backbone.

    Raises:
        UserError: The file is no adapter, is altered, or was made for another backbone.
    """
    info, state = _read_ours(path)
    if info.weights_hash != model.weights_hash:
        raise UserError(
            f"{path} was trained on {info.model} with weights {info.weights} "
            f"({info.weights_hash[:12]}), this is {model.name} with weights {model.weights} "
            f"({model.weights_hash[:12]}); load the backbone it was trained on"
        )
    adapter = new_adapter(model.clip, info.config)
    adapter.load_official_state_dict(state)
    return adapter


def save_official(path: str | Path, adapter: Adapter, epoch: int = 0) -> Path:
    """Write an adapter in the authors' layout: a `.pth.tar` dictionary with `state_dict`."""
    state = {key: value.cpu() for key, value in adapter.official_state_dict().items()}
    content = {
        "state_dict": state,
        "epoch": epoch,
        "optimizer": None,
        "scheduler": None,
        "val_result": None,
    }
    path = Path(path)
    _save_whole(path, content)
    return path


def load_official(path: str | Path, clip: Any, config: MMAConfig | None = None) -> Adapter:
    """Read an adapter in the authors' layout for a backbone.

    Args:
        path: A `.pth.tar` file, or the bare state dictionary.
        clip: The backbone.
        config: Its placement and scale. The file holds no scale; without a configuration the
            published 0.001 is taken and the placement is read from the keys.

    Raises:
        UserError: The file holds more than tensors and is refused, or does not fit.
    """
    content = read_tensors_only(path)
    state = content.get("state_dict", content)
    if not isinstance(state, Mapping):
        raise UserError(f"{path} holds no adapter: its state_dict is a {type(state).__name__}")
    state = {
        key.removeprefix("module."): value
        for key, value in state.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    for key, value in state.items():  # a small file may claim a view larger than memory
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise UserError(f"{path} holds less data than the shape of {key[:80]!a} asks for")
    others = sorted(key for key in state if key.partition(".")[0] not in PARTS)
    if others:
        LOG.info("%s: %d entries are no part of the adapter: %.80s", path, len(others), others)
        state = {key: value for key, value in state.items() if key not in others}
    found = placement_of(state, str(path))
    config = config or found
    if _described(config) != _described(found):
        raise UserError(
            f"{path} holds the placement {_described(found)}; asked for is {_described(config)}; "
            "change one of them"
        )
    adapter = new_adapter(clip, config)
    adapter.load_official_state_dict(state)
    return adapter


def placement_of(state: Mapping[str, Tensor], where: str) -> MMAConfig:
    """Read placement and inner width from the keys of an adapter's state."""
    blocks: dict[str, set[int]] = {part: set() for part in PARTS}
    pairs, dim = set(), 0
    for key, value in state.items():
        part, number, rest = (key.split(".", 2) + ["", ""])[:3]
        if part not in PARTS or not rest:
            continue
        if number.isdecimal():
            blocks[part].add(int(number))
        if part != "shared_adapter" and rest.startswith("down") and value.ndim == 2:
            dim = value.shape[0]
        paired = re.fullmatch(r"v(\d+)t(\d+)", number)
        if part == "shared_adapter" and paired:
            pairs.add((int(paired[1]), int(paired[2])))
    if not dim:
        raise UserError(f"{where} holds no adapter: no key such as text_adapter.5.down.0.weight")
    vision, text = (tuple(sorted(blocks[part])) for part in ("visual_adapter", "text_adapter"))
    pairs |= {(block, block) for block in blocks["shared_adapter"]}
    config = MMAConfig(vision, text, dim)
    if pairs != set(config.shared_pairs()):
        return replace(config, pairs=tuple(sorted(pairs)))
    return config


def _described(config: MMAConfig) -> str:
    pairs = sorted(config.shared_pairs())
    equal = pairs == [(block, block) for block in config.vision if block in config.text]
    paired = "" if equal else f" and the pairs {', '.join(f'{v}:{t}' for v, t in pairs) or 'none'}"
    return f"{config.placement} with dim {config.dim}{paired}"


def read_tensors_only(path: str | Path) -> dict[str, Any]:
    """Load a torch file that holds tensors and plain values; anything else is refused unread."""
    try:
        with warnings.catch_warnings():  # of a damaged header; what comes of it is said below
            warnings.simplefilter("ignore", UserWarning)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path} holds more than tensors and is not opened, as loading it would run code "
            f"({reason[:80]}); ask its author for the state dictionary alone"
        ) from error
    except BROKEN as error:
        raise UserError(f"cannot read the checkpoint {path}: {_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def save_training_state(folder: Path, identity: Mapping[str, Any], state: Any) -> None:
    """Write the state of an unfinished training, whole or not at all."""
    content = {"identity": json.dumps(identity, sort_keys=True), **state}
    content["checksum"] = content_checksum(content)
    _save_whole(folder / STATE_FILE, content)


def load_training_state(folder: Path, identity: Mapping[str, Any]) -> Any:
    """Return the state of an unfinished training, or None where there is none.

    Raises:
        UserError: The state in the folder is damaged, or belongs to another run.
    """
    path = folder / STATE_FILE
    if not path.exists():
        return None
    content = read_tensors_only(path)
    expected = content.pop("checksum", None)
    if content_checksum(content) != expected:
        raise UserError(
            f"{path} is altered: its checksum differs; remove it to train this group again"
        )
    theirs = json.loads(content["identity"])
    ours = json.loads(json.dumps(identity, sort_keys=True))
    differing = [key for key in ours if ours[key] != theirs.get(key)]
    if differing:
        raise UserError(
            f"{path} belongs to a run with other {', '.join(differing)}; choose another output "
            "folder, or remove the file to start again"
        )
    return content


def _save_whole(path: Path, content: Any) -> None:
    """Write a torch file by way of memory: torch hides from its caller that a disk is full."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    atomically(path, lambda part: part.write_bytes(buffer.getvalue()))


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
