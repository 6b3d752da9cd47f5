"""Where the blocks, norms, pools and projections of open_clip models are.

With `transformers_towers` and `trunks` the only file that knows foreign module trees. It turns them
into `Tower` objects with one vocabulary: blocks 1..L, tokens of shape (item, token, width), final
norm, pooling, projection.
"""

from __future__ import annotations

from typing import Any

import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from vlmlayers.arguments import checked
from vlmlayers.errors import UserError
from vlmlayers.models import transformers_towers
from vlmlayers.models.tower import Apply, Tower, before_trailing_run, example_texts, same, until
from vlmlayers.models.trunks import find_trunk, is_trunk, part_of, pixels, timm_trunk

OTHERS = "; features that you recorded of another model: vlmlayers.LayerFeatures.from_arrays"


@checked
def find_towers(clip: nn.Module) -> dict[str, Tower]:
    """Find the towers of a model of open_clip or transformers, or of an image model alone.

    Args:
        clip: open_clip's `CLIP`, `CustomTextCLIP` or `CoCa`; a `CLIPModel`, `SiglipModel`,
            `Siglip2Model` or what has their parts; or an image model of timm, transformers or DINO.
            Not compiled.

    Returns:
        The towers by name, `vision` and `text`; an image model alone has no text tower.

    Raises:
        UserError: The model is compiled or its module tree is unknown; says which part.
    """
    if is_trunk(clip):
        return {"vision": find_vision(clip)}
    return {"vision": find_vision(clip), "text": find_text(clip)}


def find_vision(clip: nn.Module) -> Tower:
    """Find the vision tower of a model."""
    refuse_compiled(clip)
    if is_trunk(clip):
        tower = find_trunk(clip)
    elif transformers_towers.is_two_towers(clip):
        tower = transformers_towers.find_vision(clip)
    else:
        tower = _vision(clip)
    tower.model = clip
    return tower


def _vision(clip: nn.Module) -> Tower:
    visual = getattr(clip, "visual", None)
    run = _encoder(clip, "encode_image")
    if isinstance(visual, VisionTransformer):
        return _open_clip_vit(visual, run)
    if isinstance(visual, ModifiedResNet):
        return _modified_resnet(visual, run)
    if isinstance(visual, TimmModel):
        return timm_trunk(visual.trunk, run, pixels(visual, visual.image_size), visual.head)
    raise UserError(
        f"no vision tower is known in {type(clip).__name__}: `visual` is "
        f"{type(visual).__name__}; expected an open_clip or timm image model{OTHERS}"
    )


def find_text(clip: nn.Module) -> Tower:
    """Find the text tower of a model."""
    refuse_compiled(clip)
    found = transformers_towers.is_two_towers(clip)
    tower = transformers_towers.find_text(clip) if found else _text(clip)
    tower.model = clip
    return tower


def _text(clip: nn.Module) -> Tower:
    text = getattr(clip, "text", None)
    if isinstance(text, HFTextEncoder):
        return _hugging_face(text, _encoder(clip, "encode_text"))
    text = clip if text is None else text
    if hasattr(text, "token_embedding") and hasattr(text, "ln_final"):
        return _open_clip_text(text, _encoder(clip, "encode_text"))
    raise UserError(
        f"no text tower is known in {type(clip).__name__}: `text` is {type(text).__name__}; "
        "expected an open_clip text transformer or a Hugging Face encoder"
    )


def refuse_compiled(clip: nn.Module) -> None:
    """Refuse a model of which a part is compiled, as its hooks would be ignored.

    Raises:
        UserError: Names the compiled part.
    """
    for name, module in clip.named_modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None):
            raise UserError(
                f"{name or 'the model'} is compiled with torch.compile, which ignores hooks; "
                "pass the model as it was before compiling"
            )


def _encoder(clip: nn.Module, method: str) -> Apply:
    encode = getattr(clip, method, None)
    if encode is None:
        raise UserError(
            f"a {type(clip).__name__} has no {method}: pass an open_clip CLIP, CustomTextCLIP or "
            "CoCa, a CLIPModel, SiglipModel or Siglip2Model of transformers, or an image model of "
            f"timm, transformers or DINO{OTHERS}"
        )

    def run(batch: Tensor) -> Tensor:
        return encode(batch, normalize=False)  # CoCa normalises unless told not to

    return run


def _matrix(weight: Any) -> Apply:
    """Return the projection held as a matrix, a linear layer, or not at all."""
    if weight is None:
        return same
    return weight if isinstance(weight, nn.Module) else lambda x: x @ weight


def _open_clip_vit(visual: VisionTransformer, run: Apply) -> Tower:
    tower = Tower(
        name="vision",
        kind="blocks",
        family="open_clip ViT",
        run=run,
        prefix=1,
        blocks=list(visual.transformer.resblocks),
        width=visual.transformer.width,
        pooling={"tok": "cls", "avg": "mean"}.get(visual.pool_type, "model"),
        example=pixels(visual, visual.image_size),
        class_embedding=visual.class_embedding,
        norm_in=visual.ln_pre,
        project=_matrix(visual.proj),
    )
    if visual.attn_pool is None:
        if visual.pool_type == "none":
            raise UserError("the vision tower has pool_type 'none': it has no joint embedding")
        where = "norm_after" if visual.final_ln_after_pool else "norm"
        setattr(tower, where, visual.ln_post)
        return tower
    if visual.attn_pool_contrastive is not None:
        raise UserError(
            f"attentional_pool={visual.attn_pool_type!r} is experimental in open_clip and gives no "
            "vector per image; use attentional_pool=true"
        )
    tower.attend, tower.attend_norms, tower.pooling = _coca_pool(visual), True, "model"
    tower.pool_note = f"attention pool, {visual.attn_pool.query.shape[0]} queries"
    return tower


def _coca_pool(visual: VisionTransformer) -> Apply:
    """Return CoCa's attention pool with the norm that follows it.

    Queries are independent, so only those in use are asked.
    """
    pool = visual.attn_pool
    average = visual.pool_type == "avg"

    def attend(x: Tensor) -> Tensor:
        keys = pool.ln_k(x)
        query = pool.ln_q(pool.query if average else pool.query[:1])
        queries = query.unsqueeze(0).expand(len(x), -1, -1)  # (item, query, joint)
        # The first query is what contrast is trained on; the others are for captions.
        found = visual.ln_post(pool.attn(queries, keys, keys, need_weights=False)[0])
        return found[:, 1:].mean(1) if average else found[:, 0]

    return attend


def _modified_resnet(visual: ModifiedResNet, run: Apply) -> Tower:
    stages = [visual.layer1, visual.layer2, visual.layer3, visual.layer4]
    return Tower(
        name="vision",
        kind="stages",
        family="open_clip ResNet",
        blocks=stages,
        run=run,
        width=visual.attnpool.q_proj.in_features,
        pooling="model",
        layout="nchw",
        attend=visual.attnpool,
        attend_raw=True,
        pool_note="attention pool",
        example=pixels(visual, visual.image_size),
    )


def _open_clip_text(text: nn.Module, whole: Apply) -> Tower:
    module: Any = text
    pool = getattr(module, "text_pool_type", None) or module.pool_type
    class_token = getattr(module, "cls_emb", None) is not None
    causal = module.attn_mask is not None
    ends = _end_of_text(module, pool)
    tower = Tower(
        name="text",
        kind="blocks",
        family="open_clip text",
        run=same,
        whole=whole,
        embed=module.token_embedding,
        ends=ends,
        blocks=list(module.transformer.resblocks),
        width=module.ln_final.normalized_shape[0],
        pooling="cls" if class_token else {"argmax": "eot", "eos": "eot"}.get(pool, "model"),
        pool_note=f"{pool} token",
        suffix=int(class_token),
        causal=causal,
        norm=module.ln_final,
        project=_matrix(module.text_projection),
        example=example_texts(module, module.context_length),
        valid=until(ends) if ends else before_trailing_run,
    )
    if pool == "none" and not class_token:
        raise UserError("the text tower has pool_type 'none': it has no joint embedding")
    if pool == "first":
        tower.pooling, tower.pool_note = "cls", "first token"
    if causal and not class_token and ends is not None:
        # No token sees those behind it, and features are read at the end of text: the rest is idle.
        tower.cut = lambda ids: ids[:, : int(ends(ids).max()) + 1]
    tower.run = _text_run(module, tower, pool)
    return tower


def _text_run(module: Any, tower: Tower, pool: str) -> Apply:
    """Return the text forward for any number of columns that fits the positions learned."""

    def run(ids: Tensor) -> Tensor:
        if tower.suffix:
            x, mask = module._embeds(ids)
        else:
            # Not `encode_text`, which in CLIP adds the positions of the full context.
            kind = module.transformer.get_cast_dtype()
            columns = ids.shape[1]
            x = module.token_embedding(ids).to(kind)
            x = x + module.positional_embedding[:columns].to(kind)  # (item, token, width)
            mask = module.attn_mask
            mask = None if mask is None else mask[:columns, :columns]
        x = module.transformer(x, attn_mask=mask)
        if tower.pooling == "eot" and tower.ends is not None:
            picked = x[torch.arange(len(x), device=x.device), tower.ends(ids)]
        else:
            picked = x[:, 0] if pool == "first" and not tower.suffix else x[:, -1]
        return tower.project(module.ln_final(picked))

    return run


def _end_of_text(module: Any, pool: str) -> Apply | None:
    """Return the rule that finds the end-of-text token, or None where there is no such token."""
    if pool == "argmax":
        return lambda ids: ids.argmax(-1)
    if pool == "eos":
        end = module.text_eos_id if hasattr(module, "text_eos_id") else module.eos_id
        return lambda ids: (ids == end).int().argmax(-1)
    return None


def _hugging_face(text: HFTextEncoder, run: Apply) -> Tower:
    encoder: Any = text.transformer
    pooler = type(text.pooler).__name__
    blocks = part_of(encoder, ("encoder.layer", "block", "layers"))  # of BERT, T5, M2M-100
    if blocks is None:
        raise UserError(f"no blocks are known in Hugging Face model {type(encoder).__name__}")
    config = text.config
    norm = getattr(encoder, "final_layer_norm", None) or getattr(encoder, "layer_norm", None)

    def valid(ids: Tensor) -> Tensor:
        return ids != config.pad_token_id

    tower = Tower(
        name="text",
        kind="blocks",
        family=f"HF {config.model_type}",
        blocks=list(blocks),
        run=run,
        width=getattr(config, "hidden_size", None) or config.d_model,
        # Any token but that of padding, which no pool would look at.
        example=example_texts(encoder, 7, token=5),
        pooling={"MeanPooler": "mean", "MaxPooler": "model"}.get(pooler, "cls"),
        prefix=1,
        norm=norm or same,
        project=getattr(text, "proj", same),
        valid=valid,
        ends=lambda ids: valid(ids).int().cumsum(1).argmax(1),
    )
    if pooler == "ClsPooler" and getattr(encoder, "pooler", None) is not None:
        tower.pooling, tower.attend, tower.pool_note = "model", encoder.pooler, "tanh pooler"
    if pooler == "MaxPooler":
        raise UserError("Hugging Face text towers with max pooling are not supported")
    return tower
