"""Where the blocks, norms, pools and projections of two-tower models of transformers are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlmlayers.errors import UserError
from vlmlayers.models.tower import Apply, Tower, before_trailing_run, example_texts, same, until
from vlmlayers.models.trunks import part_of, pixels

_PACKED = 3  # columns behind the pixels of a SigLIP 2 patch: is it one, rows, columns of the image


def is_two_towers(model: nn.Module) -> bool:
    """Whether a model has the parts of transformers' CLIP: `vision_model` and `text_model`."""
    return hasattr(model, "vision_model") and hasattr(model, "text_model")


def find_vision(model: Any) -> Tower:
    """Find the vision tower of a `CLIPModel`, `SiglipModel`, `Siglip2Model` or their like.

    Raises:
        UserError: The module tree is another.
    """
    vision = model.vision_model
    settings = vision.config
    tower = Tower(
        name="vision",
        kind="blocks",
        family=f"transformers {settings.model_type}",
        blocks=list(_known(vision, "encoder.layers")),
        width=settings.hidden_size,
        pooling="cls",
        run=lambda images: _embedding(model.get_image_features(pixel_values=images)),
        example=pixels(vision, getattr(settings, "image_size", 0)),  # SigLIP 2 has one of its own
        # Spelled so in transformers.
        norm_in=getattr(vision, "pre_layrnorm", same),
        norm=_known(vision, "post_layernorm"),
        project=getattr(model, "visual_projection", same),
    )
    if hasattr(vision.embeddings, "class_embedding"):
        tower.prefix = 1
        return tower
    if getattr(vision, "head", None) is None:
        raise UserError(f"{type(model).__name__} has no pool over its patches: no joint embedding")
    tower.pooling, tower.pool_note = "model", "attention pool"
    if hasattr(settings, "num_patches"):
        _take_packed(tower, model)
    else:
        tower.attend = vision.head
    return tower


def find_text(model: Any) -> Tower:
    """Find the text tower of a `CLIPModel`, `SiglipModel`, `Siglip2Model` or their like.

    Raises:
        UserError: The module tree is another.
    """
    text = model.text_model
    settings = text.config
    ends = None if hasattr(text, "head") else _end_of_text(settings.eos_token_id)
    tower = Tower(
        name="text",
        kind="blocks",
        family=f"transformers {settings.model_type}",
        blocks=list(_known(text, "encoder.layers")),
        width=settings.hidden_size,
        pooling="model" if ends is None else "eot",
        pool_note="last token" if ends is None else "end of text",
        run=lambda ids: _embedding(model.get_text_features(input_ids=ids)),
        example=example_texts(text, settings.max_position_embeddings),
        causal=ends is not None,
        norm=_known(text, "final_layer_norm"),
        project=text.head if ends is None else model.text_projection,
        embed=text.embeddings.token_embedding,
        ends=ends,
        valid=before_trailing_run if ends is None else until(ends),
    )
    if ends is not None:  # what follows cannot be seen
        tower.cut = lambda ids: ids[:, : int(ends(ids).max()) + 1]
    return tower


def pack(inputs: Any) -> Tensor:
    """Return what SigLIP 2's processor makes of images as one tensor.

    Its images keep their aspect, so that each has patches of its own number, padded to one.

    Args:
        inputs: `pixel_values` (image, patch, pixel), `pixel_attention_mask` (image, patch) and
            `spatial_shapes` (image, 2).

    Returns:
        (image, patch, pixel + 3) float32.
    """
    patches = inputs["pixel_values"].float()
    shapes = inputs["spatial_shapes"][:, None].expand(-1, patches.shape[1], -1)
    return torch.cat([patches, inputs["pixel_attention_mask"][..., None], shapes], dim=-1)


def _take_packed(tower: Tower, model: Any) -> None:
    """Let a SigLIP 2 tower run on packed images; padding is neither attended to nor averaged."""
    vision = model.vision_model
    held: dict[str, Tensor] = {}  # the mask of the pass that the hooks are part of

    def valid(images: Tensor) -> Tensor:
        return images[..., -_PACKED] > 0

    def run(images: Tensor) -> Tensor:
        held["mask"] = valid(images).long()
        found = model.get_image_features(
            pixel_values=images[..., :-_PACKED],
            pixel_attention_mask=held["mask"],
            spatial_shapes=images[:, 0, -_PACKED + 1 :].round().long(),
        )
        return _embedding(found)

    side = int(vision.config.num_patches**0.5)

    def example(batch: int) -> Tensor:
        weight = vision.embeddings.patch_embedding.weight
        images = weight.new_zeros(batch, side * side, weight.shape[1] + _PACKED)
        # Every patch is there, and they lie in a square.
        images[..., -_PACKED:] = weight.new_tensor([1, side, side])
        return images

    tower.run, tower.example, tower.valid = run, example, valid
    tower.attend = lambda tokens: vision.head(tokens, held["mask"])
    tower.image_size = side * vision.config.patch_size


def _known(part: Any, name: str) -> Any:
    found = part_of(part, (name,))
    if found is None:
        raise UserError(
            f"{type(part).__name__} has no {name}: known are CLIPModel, SiglipModel, Siglip2Model "
            "and models with their parts"
        )
    return found


def _embedding(output: Any) -> Tensor:
    """Return the joint embedding; transformers before 5 gives it as it is."""
    return getattr(output, "pooler_output", output)


def _end_of_text(end: int) -> Apply:
    """Return transformers' rule; configurations from before its fix say 2 and mean the largest."""
    if end == 2:
        return lambda ids: ids.int().argmax(-1)
    return lambda ids: (ids == end).int().argmax(-1)
