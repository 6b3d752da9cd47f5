"""What the attention of each head does in a block, seen where PyTorch computes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from vlmlayers.errors import UserError
from vlmlayers.models.devices import placed
from vlmlayers.models.tower import Tower

_MULTI_HEAD = signature(functional.multi_head_attention_forward)


class AttentionWatch(TorchFunctionMode):
    """Hand the weights of every attention in its block to a function; results stay as they are.

    open_clip, timm and transformers have modules of their own, but all of them end in one of two
    functions of PyTorch. Weights that those do not give out are computed a second time.

    Args:
        look: Takes the weights, (item, head, query, key), and whether a query may see a key, of a
            shape that spreads to theirs.
    """

    def __init__(self, look: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self.look = look

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a function of PyTorch as it was called, and look where it is attention."""
        given = kwargs or {}
        if function is functional.scaled_dot_product_attention:
            self.look(*attention(*args, **given))
        elif function is functional.multi_head_attention_forward:
            asked = {**given, "need_weights": True, "average_attn_weights": False}
            # A second call: one that gives out weights takes another path, of other rounding.
            # Inside here the mode is off, so that the attention within is not seen twice.
            weights: Any = function(*args, **asked)[1]
            called = _MULTI_HEAD.bind(*args, **given).arguments
            self.look(weights, _seen_of_heads(weights, called))
        return function(*args, **given)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the weights inside PyTorch's `scaled_dot_product_attention`, of the same arguments.

    And whether a query may see a key, of a shape that spreads to theirs. That is not read off the
    weights: those of keys far behind the others round to 0, in half precision soon.
    """
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    found = (query @ key.transpose(-2, -1) * scale).float()  # (item, head, query, key)
    if attn_mask is None:
        attn_mask = torch.ones(found.shape[-2:], dtype=torch.bool, device=found.device)
        attn_mask = attn_mask.tril() if is_causal else attn_mask
    if attn_mask.dtype == torch.bool:
        return found.masked_fill(~attn_mask, -torch.inf).softmax(-1), attn_mask
    return (found + attn_mask).softmax(-1), _open(attn_mask)


def _seen_of_heads(weights: Tensor, called: Mapping[str, Any]) -> Tensor:
    """Return which keys a query may see by the arguments of `multi_head_attention_forward`."""
    seen = torch.ones_like(weights, dtype=torch.bool)
    mask, padding = called.get("attn_mask"), called.get("key_padding_mask")
    if mask is not None:  # where these are true they hide, unlike elsewhere
        shown = ~mask if mask.dtype == torch.bool else _open(mask)
        seen = seen & (shown.view(weights.shape) if shown.ndim == 3 else shown)
    if padding is not None:
        shown = ~padding if padding.dtype == torch.bool else _open(padding)
        seen = seen & shown[:, None, None]
    return seen


def _open(mask: Tensor) -> Tensor:
    """Return where a mask that is added hides nothing; some hide by the least finite number."""
    return mask > torch.finfo(mask.dtype).min / 2


def entropy_share(weights: Tensor, seen: Tensor, tower: Tower, counted: Tensor | None) -> Tensor:
    """Return the entropy of each head as a share of that of uniform attention, (item, head).

    Both are summed over the queries; uniform attention is over the keys that a query may see.

    Args:
        weights: Attention, (item, head, query, key).
        seen: Whether a query may see a key, of a shape that spreads to that of the weights.
        tower: The tower that it is of.
        counted: (item, token) tokens that are asked, all of them where None.
    """
    weights = weights.float()
    # xlogy is 0 at masked keys, where x · log x would be NaN.
    found = -torch.special.xlogy(weights, weights).sum(-1)  # (item, head, query)
    return _of_queries(found, seen.expand_as(weights).sum(-1).log(), counted)


def distance_share(weights: Tensor, seen: Tensor, tower: Tower, counted: Tensor | None) -> Tensor:
    """Return the distance that each head spans as a share of that of uniform attention.

    The distance from a token to where it attends is the mean of the distances to all keys, weighed
    by attention: between patches on their grid, between tokens of a text along it. Class tokens and
    registers stand nowhere and are left out. Arguments and result are those of `entropy_share`.
    """
    places = torch.tensor(tower.places(weights.shape[-1]), dtype=torch.float)
    places = placed(places, weights.device)  # once a block and batch: the host does not wait
    inside = slice(tower.prefix, tower.prefix + len(places))
    seen = seen.expand_as(weights).float()[..., inside, inside]
    weights = weights.float()[..., inside, inside]
    apart = torch.cdist(places, places)  # (query, key)
    if counted is not None:
        counted = counted[:, inside]
        weights, seen = (x * counted[:, None, None] for x in (weights, seen))
    found = _mean_distance(weights, apart)
    return _of_queries(found, _mean_distance(seen, apart), counted)


def _mean_distance(weights: Tensor, apart: Tensor) -> Tensor:
    """Return the mean distance of each query to its keys, (item, head, query)."""
    return (weights * apart).sum(-1) / weights.sum(-1).clamp_min(torch.finfo(torch.float).tiny)


def _of_queries(values: Tensor, uniform: Tensor, counted: Tensor | None) -> Tensor:
    """Return the sum of values over queries by that of uniform attention, (item, head)."""
    if counted is not None:
        values, uniform = (x * counted[:, None] for x in (values, uniform))
    return values.sum(-1) / uniform.sum(-1).clamp_min(torch.finfo(torch.float).tiny)


def refuse_unseen(seen: list[Any], tower: Tower, position: str) -> None:
    """Refuse a block whose attention was not seen, or that has several.

    Raises:
        UserError: Says what to do.
    """
    if len(seen) != 1:
        raise UserError(
            f"block {position} of the {tower.name} tower ({tower.family}) makes {len(seen)} "
            "attentions that PyTorch's own functions compute, where one is measured; a model of "
            "transformers shows it when loaded with attn_implementation='sdpa'"
        )


MEASURES = {"attention_entropy": entropy_share, "attention_distance": distance_share}
