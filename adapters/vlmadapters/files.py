"""Trained methods on disk: our own format, and the authors' layouts.

Nothing is unpickled: files load as safetensors or with `weights_only=True`.
"""

from __future__ import annotations

import io
import json
import logging
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vlmadapters.clip.frozen import Backbone
from vlmadapters.data.task import Task
from vlmadapters.device import own_modes
from vlmadapters.methods import METHODS
from vlmadapters.methods.base import Method
from vlmadapters.methods.config import OURS, MethodConfig
from vlmlayers.architectures import OF_PEFT
from vlmlayers.errors import UserError, one_line
from vlmlayers.files import atomically, checksum, write_text
from vlmlayers.models.checkpoints import BROKEN, torch_content
from vlmlayers.models.vlm import shared_structure

LOG = logging.getLogger(__name__)
FORMAT = "vlmadapters-3"


@dataclass(frozen=True)
class CheckpointInfo:
    """Metadata of a checkpoint of ours.

    Attributes:
        config: The method's settings; their class says which method.
        model: Architecture of the backbone.
        weights: Its weights' tag or file name.
        weights_hash: Hash of its weights.
        structure: Its activations, heads and norms, which weights do not show.
        task: The classes it was trained on.
        provenance: Recipe, seed, dataset, versions; anything JSON.
    """

    config: MethodConfig
    model: str = ""
    weights: str = ""
    weights_hash: str = ""
    structure: Mapping[str, list[str]] = field(default_factory=dict)
    task: Task = field(default_factory=Task)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes it was trained on."""
        return self.task.class_names


def save_method(
    path: str | Path,
    method: Method,
    model: Any,
    task: Task | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write a trained method as safetensors, with a JSON description in its header and beside it.

    Args:
        path: The file; `.safetensors` is added where it is missing.
        method: The method.
        model: The backbone it was trained on.
        task: The classes it was trained on.
        provenance: Recipe, seed, dataset, versions; anything JSON.
    """
    path = Path(path)
    if path.suffix != OURS:
        # Not `with_suffix`, which would take `.5` of a name such as `scale-0.5` for a suffix.
        path = path.with_name(f"{path.name}{OURS}")
    info = {
        "format": FORMAT,
        "method": method.config.name,
        "settings": method.config.to_dict(),
        "model": model.name,
        "weights": model.weights,
        "weights_hash": model.weights_hash,
        "structure": model.identity()["structure"],
        "task": (task or Task()).to_dict(),
        # As a reader will see it, where keys are text: the checksum sorts by them.
        "provenance": json.loads(json.dumps(dict(provenance or {}))),
    }
    state = {key: value.cpu() for key, value in method.state_dict().items()}
    text = json.dumps({**info, "checksum": _checksum(info, state)}, indent=1)
    # In the header as well: a file without the JSON beside it still says what it is.
    write_tensors(path, state, text)
    write_text(path.with_suffix(".json"), text)
    return path


def write_tensors(path: Path, state: Mapping[str, Tensor], description: str) -> None:
    """Write tensors as safetensors, with a description in the header; whole or not at all."""
    # safetensors refuses tensors that are not contiguous, as transposed ones are.
    whole = {key: value.contiguous() for key, value in state.items()}
    data = save(whole, metadata={"description": description})
    atomically(path, lambda part: part.write_bytes(data))


def read_info(path: str | Path) -> CheckpointInfo:
    """Return the metadata of a checkpoint of ours.

    Raises:
        UserError: It cannot be read, is not an adapter of ours, or was altered since.
    """
    return _read_ours(path)[0]


def _read_ours(path: str | Path) -> tuple[CheckpointInfo, dict[str, Tensor]]:
    if Path(path).suffix == ".json":
        raise UserError(f"{path} only describes an adapter; give the .safetensors beside it")
    try:
        with safe_open(path, framework="pt") as file:
            info = json.loads((file.metadata() or {}).get("description", "{}"))
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, RuntimeError, RecursionError) as error:
        why = one_line(error)
        if Path(path).suffix != OURS and Path(path).is_file():
            why = f"it is not *{OURS}, as those of this toolkit are"
        raise UserError(f"cannot read the adapter {path}: {why}") from error
    if any(".lora_A." in key for key in state):
        raise UserError(f"{path} {OF_PEFT} as weights, by --pretrained")
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        raise UserError(
            f"{path} is not an adapter of this toolkit (its header does not say {FORMAT})"
        )
    expected = info.pop("checksum", None)
    if _checksum(info, state) != expected:
        raise UserError(
            f"{path} is altered: its checksum differs; copy it again, or train it again"
        )
    if info["method"] not in METHODS:
        # Never by a path in the file: a file of weights must not say which code is run.
        raise UserError(
            f"{path} is of the method {info['method']!r}, which is not known here; install its "
            "package, or name its class (--method my_method.py:Mine, in Python "
            "METHODS['my_method.py:Mine'])"
        )
    found = CheckpointInfo(
        METHODS.config(info["method"]).from_dict(info["settings"]),
        info["model"],
        info["weights"],
        info["weights_hash"],
        info.get("structure", {}),  # which earlier files lack
        Task.from_dict(info["task"]),
        info["provenance"],
    )
    return found, state


def _checksum(info: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    return content_checksum([json.dumps(info, sort_keys=True), state])


@own_modes()
def load_method(path: str | Path, model: Any) -> Method:
    """Read a trained method of ours for a backbone, in evaluation mode.

    Raises:
        UserError: The file is not a trained method, is altered, or was made for another backbone.
    """
    info, state = _read_ours(path)
    if info.weights_hash != model.weights_hash:
        held = "" if model.precision == "fp32" else f" in {model.precision}"
        raise UserError(
            f"{path} was trained on {info.model} with weights {info.weights} "
            f"({info.weights_hash[:12]}), this is {model.name} with weights {model.weights}{held} "
            f"({model.weights_hash[:12]}); load the backbone it was trained on"
        )
    then, now = shared_structure(info.structure, model.identity()["structure"])
    if changed := [key for key in then if then[key] != now[key]]:
        told = "; ".join(
            f"{key} {', '.join(then[key])} then and {', '.join(now[key])} now" for key in changed
        )
        raise UserError(
            f"{path} was trained on a model of equal weights that computes otherwise ({told}); "
            "load it with the configuration of then"
        )
    backbone = Backbone(model.clip, tokenizer=model.tokenize)
    method = METHODS[info.config.name].build(info.config, backbone, info.task)
    try:
        method.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit {info.config.title}: {one_line(error)}") from error
    method.touch()
    _tell_other_images(path, info, model)
    return method.eval()


def _tell_other_images(path: str | Path, info: CheckpointInfo, model: Any) -> None:
    """Warn where images are prepared otherwise than in the training, which weights do not show."""
    # A caller's provenance may hold anything under these names.
    made, now = info.provenance.get("model"), model.preprocessing
    then = made.get("preprocessing") if isinstance(made, Mapping) else None
    if not isinstance(then, dict) or not then or not now:
        return
    as_stated = {"makes": "what it states"}  # where nothing was put in place of the model's own
    then, now = as_stated | then, as_stated | now
    changed = [key for key in then if then[key] != now.get(key)]
    if changed:
        told = ", ".join(f"{key} {then[key]} then and {now.get(key)} now" for key in changed)
        LOG.warning(
            "%s was trained on images prepared otherwise (%s); load the backbone with the same",
            path, told,
        )  # fmt: skip


def save_official(path: str | Path, method: Method, epoch: int = 0) -> Path:
    """Write a method in its authors' layout, for most a `.pth.tar` dictionary with the tensors."""
    path = Path(path)
    save_whole(path, method.official_content(epoch))
    return path


@own_modes()
def load_trained(
    path: str | Path,
    model: Any,
    *,
    method: str | None = None,
    settings: Mapping[str, Any] | None = None,
    task: Task | None = None,
) -> Method:
    """Read a trained method of either layout for a backbone, in evaluation mode.

    Args:
        path: `.safetensors` of ours, or the authors' file.
        model: The backbone with its tokenizer.
        method: Name of the method, or `path.py:Class`. A file of ours says which it is, but not
            where the class of a user's method is; the authors' file is of MMA where it is None.
        settings: As `load_official`; a file of ours holds them.
        task: As `load_official`; a file of ours holds it.

    Raises:
        UserError: As `load_method` and `load_official`, or the file is of another method.
    """
    name = None if method is None else METHODS.config(method).name  # a file's is known from here on
    if Path(path).suffix not in (OURS, ".json"):  # the text beside ours is refused as ours
        return load_official(path, model, method=name or "mma", settings=settings, task=task)
    made = load_method(path, model)
    if name not in (None, made.config.name):
        raise UserError(f"{path} is of {made.config.name}; --method says {method}")
    return made


def load_official(
    path: str | Path,
    model: Any,
    config: MethodConfig | None = None,
    *,
    method: str = "mma",
    settings: Mapping[str, Any] | None = None,
    task: Task | None = None,
) -> Method:
    """Read a method in its authors' layout for a backbone, in evaluation mode.

    Args:
        path: A file in their layout, or the bare state dictionary.
        model: The backbone with its tokenizer.
        config: Its settings. What the file does not hold, such as MMA's scale, has its published
            value where there is no configuration, and the placement is read from the keys.
        method: Name of the method, where no configuration says it.
        settings: Settings by name, over those of `config` or of the file.
        task: The classes it was trained on, for methods that keep something of each.

    Raises:
        UserError: The file holds more than tensors and is refused, is of another method, or does
            not fit.
    """
    kind = METHODS[config.name if config is not None else method]
    state, own = _official_states(path, kind)
    others = sorted(state.keys() - own.keys())
    if others:
        LOG.info("%s: %d entries are no part of the method: %.80s", path, len(others), others)
    backbone, classes = Backbone(model.clip, tokenizer=model.tokenize), task or Task()
    try:
        asked = kind.config_of_official(own, str(path), config)
        if settings:
            asked = asked.from_dict({**asked.to_dict(), **settings})
            # Again, so that what the file does hold is checked against what is asked for.
            asked = kind.config_of_official(own, str(path), asked)
        made = kind.build(asked, backbone, classes)
        made.load_official_state_dict(own)
    except UserError as error:
        # Looked for after a refusal only, as it builds every method there is.
        writers, title = _writers(state, backbone, classes, len(own)), kind.Config.title
        if not writers or title in writers:
            raise
        raise UserError(
            f"{path} is of another method than {title}: it holds {' or '.join(writers)}; name that"
        ) from error
    return made.eval()


def unstored_settings(path: str | Path, config: MethodConfig) -> dict[str, Any]:
    """Return what a file in the authors' layout does not tell of the settings it was written with.

    Args:
        path: The file.
        config: Those settings.

    Returns:
        The settings by name without which the file would be read as another method, as
        `load_official` takes them.
    """
    kind = METHODS[config.name]
    read = kind.config_of_official(_official_states(path, kind)[1], str(path)).to_dict()
    own = config.to_dict()
    return {name: own[name] for name in config.unstored if own[name] != read[name]}


def _official_states(
    path: str | Path, kind: type[Method]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return all tensors of a file in the authors' layout, and those that are the method's."""
    state = kind.official_state(read_tensors_only(path), str(path))
    if not isinstance(state, Mapping):
        raise UserError(f"{path} holds no trained method: its state_dict is not a dictionary")
    state = {
        # Whole models hold counters and names too; a parameter is a tensor.
        key.removeprefix("module."): value
        for key, value in state.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    for key, value in state.items():
        if value.layout != torch.strided or value.is_meta:
            raise UserError(f"{path} holds no plain numbers in {key[:80]!r}, as no method does")
        # A small file may claim a view larger than memory.
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise UserError(f"{path} holds less data than the shape of {key[:80]!r} asks for")
    own = {key: value for key, value in state.items() if kind.is_official_key(key)}
    for key, value in own.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"{path} holds NaN or Inf in {key[:80]!r}: its training diverged")
    return state, own


def _writers(state: Mapping[str, Tensor], backbone: Backbone, task: Task, least: int) -> list[str]:
    """Return the titles of the methods whose layout this is, of at least so many parameters."""
    found = []
    for name in METHODS:
        kind = METHODS[name]
        own = {key: value for key, value in state.items() if kind.is_official_key(key)}
        try:
            made = kind.build(kind.config_of_official(own, ""), backbone, task)
        except UserError:
            continue
        names = dict(made.named_official_parameters()).keys()
        if len(own) >= least and own.keys() == names:
            found.append(kind.Config.title)
    return found


def read_tensors_only(path: str | Path) -> dict[str, Any]:
    """Load a torch file that holds tensors and plain values; anything else is refused unread."""
    try:
        content = torch_content(Path(path))
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors and is not opened, as loading it would run code; ask "
            "its author for the state dictionary alone"
        ) from error
    except BROKEN as error:
        raise UserError(f"cannot read the checkpoint {path}: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def save_whole(path: Path, content: Any) -> None:
    """Write a torch file by way of memory: torch hides from its caller that a disk is full."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    atomically(path, lambda part: part.write_bytes(buffer.getvalue()))


def content_checksum(content: Any) -> str:
    """Return SHA-256 over nested dictionaries, lists, tensors, numbers and texts.

    Neither torch's zip files nor safetensors keep one that is compared on reading.
    """
    return checksum(_parts(content))


def _parts(content: Any) -> Iterator[str | memoryview]:
    if isinstance(content, Tensor):
        whole = content.detach().cpu().contiguous()
        yield f"tensor {whole.dtype} {tuple(whole.shape)}\n"
        # By way of bytes, since numpy has no bfloat16.
        yield whole.reshape(-1).view(torch.uint8).numpy().data
    elif isinstance(content, Mapping):
        yield f"mapping {len(content)}\n"
        # By repr: an optimizer's state has numbers and words as keys, which do not compare.
        for key in sorted(content, key=repr):
            yield from (*_parts(key), *_parts(content[key]))
    elif isinstance(content, (list, tuple)):
        yield f"list {len(content)}\n"
        for value in content:
            yield from _parts(value)
    else:
        # Lengths stand before contents, or two different nestings could give the same bytes.
        text = repr(content)
        yield f"value {len(text.encode('utf-8', 'surrogatepass'))}\n{text}\n"
