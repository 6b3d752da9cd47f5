"""Build untrained open_clip models from configurations, without touching global state."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from open_clip.coca_model import CoCa
from open_clip.factory import _set_model_device_and_precision
from open_clip.model import CLIP, CustomTextCLIP, get_cast_dtype
from torch import nn

from vlmlayers.errors import UserError
from vlmlayers.models.hf_offline import text_config_offline

SEED = 0
_BUILD_ERRORS = (
    TypeError,
    ValueError,
    RuntimeError,
    AssertionError,
    KeyError,
    AttributeError,
    ZeroDivisionError,
    IndexError,
)


def read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return model and preprocessing parts of an open_clip configuration file.

    Raises:
        UserError: The file is missing, is not JSON, or lacks a required part.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read model configuration {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    model = found.get("model_cfg", found) if isinstance(found, dict) else {}
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in model]
    if missing:
        raise UserError(f"{path} is no open_clip configuration: it lacks {', '.join(missing)}")
    for part in ("vision_cfg", "text_cfg"):
        if not isinstance(model[part], dict):
            raise UserError(f"{path} is no open_clip configuration: {part} is not a table")
    return dict(model), dict(found.get("preprocess_cfg", {}))


def build_clip(
    config: Mapping[str, Any],
    *,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    seed: int = SEED,
) -> nn.Module:
    """Build an untrained model from an open_clip configuration.

    Values depend on `seed` only; the global random state is restored.

    Raises:
        UserError: The configuration has keys or values that open_clip does not take.
    """
    settings: dict[str, Any] = copy.deepcopy(dict(config))
    custom = settings.pop("custom_text", False)
    place = _device(device)
    with text_config_offline(settings) as hugging_face, _quiet():
        settings["vision_cfg"]["timm_model_pretrained"] = False
        kind: Any = CustomTextCLIP if custom or hugging_face else CLIP
        if "multimodal_cfg" in settings:
            kind = CoCa
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                clip = kind(**settings, cast_dtype=get_cast_dtype(precision))
                _fill_decoder(clip)
        except _BUILD_ERRORS as error:
            raise UserError(
                f"open_clip cannot build this configuration: {one_line(error)}"
            ) from error
    if place.type != "meta":
        timm = "timm_model_name" in settings["vision_cfg"]
        try:
            _set_model_device_and_precision(clip, place, precision, timm)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"cannot use device {str(device)!r}: {one_line(error)}") from error
    return clip.eval()


def _device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
        if found.type == "cuda" and found.index is None and "LOCAL_RANK" in os.environ:
            return torch.device("cuda", int(os.environ["LOCAL_RANK"]))  # one process per GPU
        return found
    except RuntimeError as error:
        raise UserError(f"cannot use device {str(device)!r}; use 'cpu' or 'cuda'") from error


def _fill_decoder(clip: nn.Module) -> None:
    """Give CoCa's captioning head, which open_clip leaves uninitialised, defined values."""
    head = getattr(getattr(clip, "text_decoder", None), "text_projection", None)
    if head is not None:
        nn.init.normal_(head, std=head.shape[0] ** -0.5)


def one_line(error: BaseException) -> str:
    """Return the message of an error on one line, shortened."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence open_clip's advice about weights on the root logger while a model is built."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
