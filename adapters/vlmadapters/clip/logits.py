"""Class logits: scaled cosines between joint features of images and classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmadapters.clip.towers import Clip
from vlmlayers.arguments import checked
from vlmlayers.models.towers import find_towers
from vlmlayers.models.wrappers import unwrapped


def scaled_cosines(clip: Any, image_features: Tensor, text_features: Tensor) -> Tensor:
    """Return exp(logit scale) · cosine, (image, class), with the model's logit bias if any."""
    return scaled_products(clip, image_features, F.normalize(single(text_features), dim=-1))


def scaled_products(clip: Any, image_features: Tensor, texts: Tensor) -> Tensor:
    """Return the same of class vectors that are not normalised, such as a mean of unit vectors.

    In single precision also under autocast: a hundred cosines in bfloat16 come in steps of half a
    unit, and predictions change with them.

    Args:
        clip: The backbone.
        image_features: (…, image, joint).
        texts: (…, class, joint).
    """
    with torch.autocast(image_features.device.type, enabled=False):
        images = F.normalize(single(image_features), dim=-1)
        # `.mT`, not `.T`: texts may differ by image and then have an axis before their two.
        logits = single(clip.logit_scale).exp() * images @ single(texts).mT
        # Models trained with a sigmoid loss (SigLIP) have one; in others it is None or missing.
        bias = getattr(clip, "logit_bias", None)
        return logits if bias is None else logits + single(bias)


def single(x: Tensor) -> Tensor:
    """Return a tensor in single precision, or in its own where that is higher."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@checked
def class_logits(clip: Clip, images: Tensor, tokens: Tensor) -> Tensor:
    """Return exp(logit scale) · cosine between images and class prompts, differentiable.

    Args:
        clip: The backbone, with or without an attached method.
        images: (image, 3, height, width), preprocessed.
        tokens: (class, token) of the class prompts, full length.

    Returns:
        (image, class).

    Raises:
        UserError: Images or tokens are none, or of another shape, type or device than the backbone
            takes.
    """
    return scaled_cosines(clip, _encoded(clip, "vision", images), _encoded(clip, "text", tokens))


def _encoded(clip: Any, tower: str, batch: Tensor) -> Tensor:
    try:
        return clip.encode_image(batch) if tower == "vision" else clip.encode_text(batch)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError):
        find_towers(unwrapped(clip))[tower].refuse_misfit(batch)
        raise
