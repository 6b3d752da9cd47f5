"""Build untrained open_clip models from configurations, without touching global state."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from open_clip.coca_model import CoCa
from open_clip.factory import _set_model_device_and_precision
from open_clip.model import CLIP, CustomTextCLIP, get_cast_dtype
from timm.layers import to_2tuple
from torch import nn

from vlmlayers.errors import UserError, one_line
from vlmlayers.files import read_json
from vlmlayers.models.devices import memory_errors, resolve_device
from vlmlayers.models.hf_offline import text_config_offline
from vlmlayers.models.modes import in_float32, seeded

ImageSize = int | tuple[int, int]
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
    found = read_json(path, "model configuration", "name a configuration file of open_clip")
    model = found.get("model_cfg", found)
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in model]
    if missing:
        raise UserError(f"{path} is not an open_clip configuration: it lacks {', '.join(missing)}")
    for part in ("vision_cfg", "text_cfg"):
        if not isinstance(model[part], dict):
            raise UserError(f"{path} is not an open_clip configuration: {part} is not a table")
    return dict(model), dict(found.get("preprocess_cfg", {}))


def build_clip(
    config: Mapping[str, Any],
    *,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    image_size: ImageSize | None = None,
    seed: int = SEED,
) -> nn.Module:
    """Build an untrained model from an open_clip configuration.

    Values depend on `seed` only; the global random state is restored.

    Args:
        config: The configuration.
        precision: Data type of the weights.
        device: Where the model goes; see `resolve_device`.
        image_size: Side, or height and width, of its images; the configuration's where None.
        seed: Seed of the values.

    Raises:
        UserError: The configuration has keys or values that open_clip does not take, or the
            device is none or has not enough memory.
    """
    # A copy: keys are taken out and put in below, and the caller may build from it again.
    settings: dict[str, Any] = copy.deepcopy(dict(config))
    custom = settings.pop("custom_text", False)
    place = resolve_device(device)
    if image_size is not None:
        settings["vision_cfg"]["image_size"] = image_size
    with text_config_offline(settings) as hugging_face, quiet():
        # timm would download weights of the trunk, which are overwritten in any case.
        settings["vision_cfg"]["timm_model_pretrained"] = False
        kind: Any = CustomTextCLIP if custom or hugging_face else CLIP
        if "multimodal_cfg" in settings:
            kind = CoCa
        try:
            with seeded(seed), in_float32():
                clip = kind(**settings, cast_dtype=get_cast_dtype(precision))
                _fill_decoder(clip)
                _size_trunk(clip.visual)
        except _BUILD_ERRORS as error:
            raise UserError(
                f"open_clip cannot build this configuration: {one_line(error)}"
            ) from error
    if place.type != "meta":
        timm = "timm_model_name" in settings["vision_cfg"]
        with memory_errors(place, "the weights do not fit; use another device or a smaller model"):
            try:
                # open_clip's own step: in half precision it leaves norms in float32.
                _set_model_device_and_precision(clip, place, precision, timm)
            # A RuntimeError as well, but for `memory_errors` around it to word.
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, AssertionError) as error:
                raise UserError(f"cannot use device {str(device)!r}: {one_line(error)}") from error
            except AttributeError as error:  # a projection with a bias, which open_clip forgets
                raise UserError(
                    f"open_clip cannot keep this model in {precision}; load it in fp32: extraction "
                    "and training have a precision of their own"
                ) from error
    return clip.eval()


def _size_trunk(visual: Any) -> None:
    """Give a timm trunk the image size of its configuration, which open_clip leaves at timm's."""
    embed = getattr(getattr(visual, "trunk", None), "patch_embed", None)
    own = getattr(embed, "img_size", None)
    if own is not None and tuple(own) != to_2tuple(visual.image_size):
        visual.set_input_size(visual.image_size)


def _fill_decoder(clip: nn.Module) -> None:
    """Give CoCa's captioning head, which open_clip leaves uninitialised, defined values."""
    head = getattr(getattr(clip, "text_decoder", None), "text_projection", None)
    if head is not None:
        nn.init.normal_(head, std=head.shape[0] ** -0.5)


@contextmanager
def quiet(name: str | None = None) -> Iterator[None]:
    """Silence a library, or what logs at the root, but for its errors."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
