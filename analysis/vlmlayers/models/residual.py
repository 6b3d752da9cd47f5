"""A tower's residual stream taken apart, and changed: what each block adds to the embedding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vlmlayers.arguments import checked
from vlmlayers.errors import UserError
from vlmlayers.models.recording import block_outputs, probe
from vlmlayers.models.tower import Apply, Tower, same
from vlmlayers.positions import EMBED

BIAS = "bias"  # what norm and projection add by themselves
# Of the largest value of the embedding: rounding stays below, another head does not.
_EXACT, _ROUNDED = 1e-3, 8  # the second in units of what the stream is rounded to
Change = Callable[[Tensor, Tensor], Tensor]


@checked
def contributions(tower: Tower, batch: Tensor) -> dict[str, Tensor]:
    """Return what each part of a tower adds to the joint embedding: position → (item, joint).

    The residual stream that the final norm sees is `embed` plus what each block adds; the norm's
    division by the recorded scale, pooling and projection are linear. The parts, `bias` (of norm
    and projection) among them, sum to the embedding.

    Args:
        tower: Tower of a model that is in eval mode.
        batch: Its input.

    Raises:
        UserError: The tower has stages, an attention pool, or a head that is not linear; or the
            batch is empty, or of another shape, type or device than the tower takes.

    Reference: Elhage et al. 2021; Gandelsman et al. 2024.
    """
    require_stream(tower)
    if tower.attend is not None:
        raise UserError(
            f"the {tower.name} tower ({tower.family}) ends in an attention pool, which is not "
            "linear; leave `contribution` out"
        )
    try:
        return _parts(tower, batch)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError):
        tower.refuse_misfit(batch)
        raise


def _parts(tower: Tower, batch: Tensor) -> dict[str, Tensor]:
    stream: dict[str, Tensor] = {}
    with torch.inference_mode(), block_outputs(tower, stream.__setitem__):
        output = tower.run(batch).float()
        tokens = {position: tower.tokens(x).float() for position, x in stream.items()}
        order = [EMBED, *(str(block) for block in range(1, tower.depth + 1))]
        last, kind = tokens[order[-1]], stream[order[-1]].dtype
        parts = {EMBED: tokens[EMBED]} | {
            here: tokens[here] - tokens[before] for before, here in zip(order, order[1:])
        }
        weights = _pool_weights(tower, batch, last)
        normed, shift = _linear_norm(tower, tower.norm, last)
        pooled = {p: torch.einsum("nt,ntd->nd", weights, normed(x)) for p, x in parts.items()}
        whole = torch.stack([*pooled.values()]).sum(0) + shift
        after, more = _linear_norm(tower, tower.norm_after, whole)
        # A projection with a bias is affine; less its value at zero it is linear. As a matrix: in
        # half precision each part would be rounded by itself, however much they cancel.
        unit = torch.eye(last.shape[-1], device=last.device, dtype=kind)
        zero = tower.project(torch.zeros_like(unit[:1])).float()
        matrix = tower.project(unit).float() - zero  # (width, joint)
        found = {position: after(x) @ matrix for position, x in pooled.items()}
        bias = after(torch.zeros_like(last[:, 0]) + shift) + more
        found[BIAS] = bias @ matrix + zero
    exact = max(_EXACT, _ROUNDED * torch.finfo(kind).eps)
    if (sum(found.values()) - output).abs().max() > exact * output.abs().max():
        raise UserError(
            f"the head of the {tower.name} tower ({tower.family}) is not linear: its embedding is "
            "no sum of what the blocks add; leave `contribution` out"
        )
    return found


def _linear_norm(tower: Tower, norm: Apply, x: Tensor) -> tuple[Apply, Tensor | float]:
    """Return a layer norm as a linear map, with its scale recorded on x, and its shift."""
    if norm is same or isinstance(norm, nn.Identity):
        return same, 0.0
    if not isinstance(norm, nn.LayerNorm):
        raise UserError(
            f"the {tower.name} tower ({tower.family}) ends in {type(norm).__name__}; only a layer "
            "norm is taken apart; leave `contribution` out"
        )
    # Biased, as a layer norm computes it. With the scale of the whole stream held, parts add up.
    scale = (x.var(-1, unbiased=False, keepdim=True) + norm.eps).rsqrt()
    gain = 1.0 if norm.weight is None else norm.weight.float()
    shift = 0.0 if norm.bias is None else norm.bias.float()
    return (lambda part: (part - part.mean(-1, keepdim=True)) * scale * gain), shift


def _pool_weights(tower: Tower, batch: Tensor, tokens: Tensor) -> Tensor:
    """Return the weight of each token in the tower's own pooling, (item, token)."""
    weights = tokens.new_zeros(tokens.shape[:2])
    rows = torch.arange(len(tokens), device=tokens.device)
    if tower.pooling == "mean" and tower.valid is not None:
        mask = tower.valid(batch).float()
        weights[:, : mask.shape[1]] = mask / mask.sum(1, keepdim=True)
    elif tower.pooling == "mean":
        weights[:, tower.prefix :] = 1.0 / (weights.shape[1] - tower.prefix)
    elif tower.pooling == "eot" and tower.ends is not None:
        weights[rows, tower.ends(batch)] = 1.0
    else:
        weights[:, 0 if tower.pooling == "cls" and not tower.suffix else -1] = 1.0
    return weights


def require_stream(tower: Tower) -> None:
    """Probe a tower and refuse one without a residual stream that ends in a linear head."""
    if tower.kind != "blocks" or tower.layout != "tokens":
        raise UserError(
            f"the {tower.name} tower ({tower.family}) has stages, not residual blocks: none can "
            "be skipped or taken as a part of the embedding"
        )
    probe(tower)


@contextmanager
def changed(tower: Tower, block: int, change: Change) -> Iterator[None]:
    """Replace a block's output by `change(input, output)`; the hook leaves on every way out."""

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
        # A hook that returns a value replaces the output, which recording must never do.
        if isinstance(output, tuple):
            return (change(x, output[0]), *output[1:])
        return change(x, output)

    handle = tower.blocks[block - 1].register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
