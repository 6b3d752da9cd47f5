"""Where the blocks and norms of image models are, inside open_clip's models or by themselves."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

from torch import Tensor, nn

from vlmlayers.errors import UserError
from vlmlayers.models.tower import Apply, Tower, same

Example = Callable[[int], Tensor]
# Where image models of transformers keep their blocks and the norm after them.
_BLOCKS = ("encoder.layer", "encoder.layers", "layer", "layers", "model.layer", "model.layers")
_NORMS = ("layernorm", "post_layernorm", "norm")


def is_trunk(model: Any) -> bool:
    """Whether a model is an image model alone: one of timm, of transformers, or a DINO."""
    if hasattr(model, "visual") or hasattr(model, "text_model"):
        return False
    return hasattr(model, "forward_head") or _is_dino(model) or _is_transformers(model)


def find_trunk(model: Any) -> Tower:
    """Find the tower of an image model alone; it has no joint embedding.

    Raises:
        UserError: The module tree is unknown.
    """
    if hasattr(model, "forward_head"):

        def run(images: Tensor) -> Tensor:
            return model.forward_head(model.forward_features(images), pre_logits=True)

        tower = timm_trunk(model, run, pixels(model, _timm_size(model)), same)
    elif _is_dino(model):
        tower = _dino(model)
    else:
        tower = _transformers(model)
    tower.joint = False
    tower.project = same
    return tower


def timm_trunk(trunk: Any, run: Apply, example: Example, head: Apply) -> Tower:
    """Find the tower of timm's trunk under a head that projects what the trunk pools."""
    blocks = getattr(trunk, "blocks", None)
    if isinstance(blocks, nn.ModuleList | nn.Sequential) and hasattr(trunk, "norm"):
        return _timm_blocks(trunk, run, example, head)
    return _timm_stages(trunk, run, example, head)


def _timm_blocks(trunk: Any, run: Apply, example: Example, head: Apply) -> Tower:
    pooling = {"token": "cls", "avg": "mean"}.get(trunk.global_pool, "model")
    if pooling == "mean" and getattr(trunk, "pool_include_prefix", False):
        pooling = "model"  # a mean with the class token and registers, which ours leaves out
    tower = Tower(
        name="vision",
        kind="blocks",
        family=f"timm {type(trunk).__name__}",
        run=run,
        blocks=list(trunk.blocks),
        width=trunk.num_features,
        pooling=pooling,
        prefix=getattr(trunk, "num_prefix_tokens", 0),
        class_token=getattr(trunk, "cls_token", None) is not None,
        norm_in=getattr(trunk, "norm_pre", same),
        norm=trunk.norm,
        norm_after=getattr(trunk, "fc_norm", same),
        project=lambda x: head(trunk.head(x)),
        example=example,
    )
    if tower.pooling == "model":
        if not hasattr(trunk, "pool"):
            raise UserError(
                f"timm model {type(trunk).__name__} has a {trunk.global_pool} pool that is not "
                "known; build it with global_pool='avg' or 'token'"
            )
        tower.attend = trunk.pool
        attention = trunk.global_pool == "map"
        tower.pool_note = "attention pool" if attention else f"{trunk.global_pool} pool"
    return tower


def _timm_stages(trunk: Any, run: Apply, example: Example, head: Apply) -> Tower:
    stages = getattr(trunk, "stages", None) or getattr(trunk, "layers", None)
    if stages is None and hasattr(trunk, "layer4"):
        stages = [trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4]
    if stages is None:
        raise UserError(
            f"timm model {type(trunk).__name__} has neither blocks nor stages that are known"
        )
    after = [getattr(trunk, part, None) for part in ("norm_pre", "final_conv", "norm")]

    def attend(x: Tensor) -> Tensor:
        for part in after:
            x = x if part is None else part(x)
        return trunk.forward_head(x, pre_logits=True)

    return Tower(
        name="vision",
        kind="stages",
        family=f"timm {type(trunk).__name__}",
        blocks=list(stages),
        width=trunk.num_features,
        pooling="mean",
        run=run,
        attend=attend,
        attend_raw=True,
        attend_norms=True,
        pool_note="the trunk's own head",
        project=lambda x: head(trunk.get_classifier()(x)),
        layout="nhwc" if getattr(trunk, "output_fmt", "NCHW") == "NHWC" else "nchw",
        example=example,
    )


def _is_dino(model: Any) -> bool:
    parts = ("blocks", "norm", "patch_embed", "cls_token")
    return all(hasattr(model, part) for part in parts)


def _dino(model: Any) -> Tower:
    """Find the tower of a DINO as its authors publish it: a class token, then registers."""
    return Tower(
        name="vision",
        kind="blocks",
        family=f"DINO {type(model).__name__}",
        run=model,
        blocks=list(model.blocks),
        width=model.embed_dim,
        pooling="cls",
        prefix=1 + (getattr(model, "num_register_tokens", 0) or 0),
        norm=model.norm,
        example=pixels(model, model.patch_embed.img_size),
    )


def _is_transformers(model: Any) -> bool:
    named = getattr(getattr(model, "config", None), "model_type", "") != ""
    return named and part_of(model, _BLOCKS) is not None and part_of(model, _NORMS) is not None


def _transformers(model: Any) -> Tower:
    """Find the tower of an image model of transformers: of its class token, or of its patches."""
    settings, norm = model.config, part_of(model, _NORMS)
    if getattr(settings, "mask_ratio", 0):
        raise UserError(
            f"{type(model).__name__} leaves a random part of the patches out of each pass; set its "
            "config.mask_ratio to 0"
        )
    if hasattr(settings, "num_patches") and not hasattr(settings, "image_size"):
        raise UserError(
            f"images of {type(model).__name__} are patches of any number; give the whole "
            "Siglip2Model, and look at its images alone: tower='vision'"
        )
    token = any(hasattr(model.embeddings, name) for name in ("cls_token", "class_embedding"))
    registers = getattr(settings, "num_register_tokens", 0) or 0

    def run(images: Tensor) -> Tensor:
        found = model(pixel_values=images)
        if not token:
            return found.last_hidden_state.mean(1)
        # A pooler of the classification that a model was made for is no part of its features.
        learned = getattr(model, "pooler", None) is not None
        pooled: Tensor | None = None if learned else getattr(found, "pooler_output", None)
        return found.last_hidden_state[:, 0] if pooled is None else pooled

    return Tower(
        name="vision",
        kind="blocks",
        family=f"transformers {settings.model_type}",
        run=run,
        blocks=list(part_of(model, _BLOCKS)),
        width=settings.hidden_size,
        pooling="cls" if token else "mean",
        prefix=1 + registers if token else 0,
        norm_in=getattr(model, "pre_layrnorm", same),
        norm=norm,
        example=pixels(model, settings.image_size),
    )


def part_of(model: Any, names: tuple[str, ...]) -> Any:
    """Return the first of some dotted parts that a model has, or None."""
    for name in names:
        found = reduce(lambda part, step: getattr(part, step, None), name.split("."), model)
        if isinstance(found, nn.Module):
            return found
    return None


def _timm_size(model: Any) -> Any:
    patches = getattr(model, "patch_embed", None)
    return getattr(patches, "img_size", None) or model.default_cfg["input_size"][1:]


def pixels(model: Any, size: Any) -> Example:
    """Return what makes a batch of black images of one side, or of height and width."""
    height, width = (size, size) if isinstance(size, int) else tuple(size)

    def example(batch: int) -> Tensor:
        # In half precision norms stay float32; images meet a product first.
        first = next(m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
        return first.new_zeros(batch, 3, height, width)

    return example
