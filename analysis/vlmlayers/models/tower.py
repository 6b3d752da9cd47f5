"""One vocabulary for the towers of every family: blocks, tokens, final norm, pooling, head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

import torch
from torch import Tensor, nn

from vlmlayers.errors import UserError
from vlmlayers.positions import ATTENTION, EMBED, JOINT, PROJ, TOKENS, tower_positions

Apply = Callable[[Tensor], Tensor]


def same(x: Tensor) -> Tensor:
    """Return what was given: the norm or projection of a tower that has none."""
    return x


def until(ends: Apply) -> Apply:
    """Return the rule that finds the tokens up to the end of a text."""

    def valid(ids: Tensor) -> Tensor:
        return torch.arange(ids.shape[1], device=ids.device) <= ends(ids)[:, None]

    return valid


def before_trailing_run(ids: Tensor) -> Tensor:
    """Return the mask of tokens before the run of equal ids that pads a text on the right."""
    # By the run itself: which id pads depends on the tokenizer, which a tower does not know.
    differs = ids != ids[:, -1:]
    # Of a text of one id alone none differs: 0 from the end, so that all of it counts.
    last = ids.shape[1] - 1 - differs.flip(1).int().argmax(1)
    return torch.arange(ids.shape[1], device=ids.device) <= last[:, None]


def example_texts(module: nn.Module, columns: int, token: int = 2) -> Callable[[int], Tensor]:
    """Return what makes a batch of texts of one token, on the device of a module."""

    def example(batch: int) -> Tensor:
        device = next(module.parameters()).device
        return torch.full((batch, columns), token, dtype=torch.long, device=device)

    return example


@dataclass(eq=False, repr=False)
class Tower:
    """One tower of a vision-language model, in one vocabulary for every family.

    Attributes:
        name: `vision` or `text`.
        kind: `blocks`, or `stages` where a convolutional or hierarchical trunk has no residual
            stream of constant width; each stage counts as one block there.
        family: Name of the module tree, for tables: "open_clip ViT", "timm Eva", "HF roberta", …
        blocks: Modules; block b is `blocks[b - 1]`.
        width: Channels where final norm and projection apply (the last block's).
        pooling: The model's own pooling: `cls`, `eot`, `mean` or `model` (attention pool, last
            token).
        pool_note: What `model` pooling is, in words.
        run: Model input to joint embedding, (item, joint); the model's own forward.
        whole: The model's own forward of whole inputs, where `run` is another that takes parts.
        prefix: Special tokens before the others (class token, registers).
        class_token: Whether the first of these is a class token.
        suffix: Special tokens after the others (CoCa's text class token).
        causal: Whether attention is masked to what came before.
        class_embedding: Vision only: the class token before positions, (width,), if there is one.
        norm_in: Norm on the tokens that enter block 1, where the model has one.
        norm: Final norm on tokens, before pooling.
        norm_after: Norm on the pooled vector, where the model has it there.
        project: Pooled, normed vector to joint embedding.
        attend: The model's own pool where it is more than picking or averaging tokens.
        attend_raw: `attend` takes the raw block output (a map), not tokens.
        attend_norms: `attend` includes the final norm; `normed` space then goes through it.
        layout: Order of axes of a block's output: `tokens`, or that of a map, `nchw` or `nhwc`.
        embed: Text only: token ids to their embeddings, (item, token, width), where the input of
            block 1 is these plus positions.
        ends: Text only: token ids to the index of the pooled end-of-text token, (item,).
        valid: Model input to the mask of tokens that `mean` covers, (item, token); all of them
            but prefix and suffix where None.
        cut: Text only: drops columns that no pooled token can see.
        example: Batch size to a model input of that size.
        joint: Whether the tower ends in an embedding that another tower shares; one that does not
            has no position `proj`, and its `run` gives the model's own pooled feature.
        image_size: Vision only: longer side of an image in pixels, where the input is not pixels
            by row and column.
        model: The model that the tower is part of.
        batch_axis: Axis of a block's output that counts items; found by probing.
        widths: Position to width, found by probing.
    """

    name: str
    kind: str
    family: str
    blocks: Sequence[nn.Module]
    width: int
    pooling: str
    run: Apply
    example: Callable[[int], Tensor]
    whole: Apply | None = None
    pool_note: str = ""
    prefix: int = 0
    class_token: bool = True
    suffix: int = 0
    causal: bool = False
    class_embedding: Tensor | None = None
    norm_in: Apply = same
    norm: Apply = same
    norm_after: Apply = same
    project: Apply = same
    attend: Apply | None = None
    attend_raw: bool = False
    attend_norms: bool = False
    layout: str = "tokens"
    embed: Apply | None = None
    ends: Apply | None = None
    valid: Apply | None = None
    cut: Apply = same
    joint: bool = True
    image_size: int = 0
    batch_axis: int | None = None
    widths: dict[str, int] = field(default_factory=dict)
    model: nn.Module = field(init=False, repr=False)

    def __repr__(self) -> str:
        pooling = self.pool_note or self.pooling
        return (
            f"Tower({self.name}, {self.family}: {self.depth} {self.kind} of width {self.width}, "
            f"pooling {pooling})"
        )

    @property
    def depth(self) -> int:
        """Number of blocks L."""
        return len(self.blocks)

    @property
    def token_pooling(self) -> str:
        """Pooling of `native` and `normed` space by default: `mean` where `model` is attention."""
        return "mean" if self.attend is not None else self.pooling

    @property
    def poolings(self) -> tuple[str, ...]:
        """Poolings that this tower can do, its own first."""
        found = [self.pooling, "mean"]
        if self.prefix or self.suffix:
            found.append("cls")
        if self.ends is not None:
            found.append("eot")
        return tuple(dict.fromkeys([*found, "model"]))

    def resolve_pooling(self, pooling: str | None) -> str:
        """Return the pooling to use for tokens; None and `model` stand for the tower's own.

        Raises:
            UserError: The tower has no such token. Says which poolings it has.
        """
        if pooling in (None, "model"):
            return self.token_pooling
        if pooling == TOKENS and self.kind == "blocks":
            return TOKENS
        if pooling not in self.poolings:
            raise UserError(
                f"the {self.name} tower ({self.family}) has no {pooling!r} pooling; it has "
                f"{', '.join(self.poolings)}; give each tower its own, as in "
                f"pooling={{'{self.name}': '{self.token_pooling}'}}"
            )
        return pooling

    def picks_token(self, pooling: str) -> bool:
        """Whether the pooling picks one token, so that a per-token norm commutes with it."""
        return pooling in ("cls", "eot") or (pooling == "model" and self.attend is None)

    def refuse_misfit(self, batch: Tensor) -> None:
        """Say what is wrong with a batch that the tower failed on, where that can be told.

        Not for other batches: some towers take images of other sizes too.

        Raises:
            UserError: The batch is empty, differs in shape, type or device from those that fit, or
                holds tokens beyond the vocabulary.
        """
        self.refuse_unknown_tokens(batch)
        fits = self.example(1)
        needed = _described(["item", *fits.shape[1:]], fits)
        if not batch.numel() or _described(["item", *batch.shape[1:]], batch) != needed:
            raise UserError(
                f"the {self.name} tower takes one item or more as {needed}, not "
                f"{_described(batch.shape, batch)}"
            )

    def refuse_unknown_tokens(self, ids: Tensor) -> None:
        """Refuse tokens that the text tower has no embedding of.

        Raises:
            UserError: Says which it has.
        """
        if ids.numel() and isinstance(self.embed, nn.Embedding):
            low, high, known = ids.min().item(), ids.max().item(), self.embed.num_embeddings
            if low < 0 or high >= known:
                raise UserError(
                    f"the {self.name} tower knows tokens 0 to {known - 1}, and these run from "
                    f"{low} to {high}; take the tokenizer of the model"
                )

    def places(self, tokens: int) -> list[tuple[int, ...]]:
        """Return where each token stands that is no class token or register, from 1.

        Row and column of a patch on the grid of the image; the number alone of a token of a text,
        or of a patch where every image has a grid of its own.

        Args:
            tokens: Number of all tokens.
        """
        count = tokens - self.prefix - self.suffix
        shape = self.example(1).shape
        if self.name == "vision" and len(shape) == 4:
            # Patches are square, so that their grid has the aspect of the image.
            rows = round((count * shape[2] / shape[3]) ** 0.5)
            if rows and count % rows == 0:
                return [(1 + i // (count // rows), 1 + i % (count // rows)) for i in range(count)]
        return [(1 + i,) for i in range(count)]

    def token_names(self, tokens: int) -> tuple[str, ...]:
        """Return the names of tokens: `cls`, `register 1`, `patch 2,3`, `token 4`."""
        kind = "patch" if self.name == "vision" else "token"
        body = [f"{kind} {','.join(map(str, place))}" for place in self.places(tokens)]
        classes = min(self.prefix, int(self.class_token))
        registers = [f"register {i + 1}" for i in range(self.prefix - classes)]
        return (*["cls"] * classes, *registers, *body, *["cls"] * self.suffix)

    def tokens(self, x: Tensor) -> Tensor:
        """Return a block's output as (item, token, width)."""
        if self.layout != "tokens":
            if x.ndim == 3:  # of some trunks stages, or the last ones, give tokens
                return x
            return x.flatten(2).transpose(1, 2) if self.layout == "nchw" else x.flatten(1, 2)
        return x if self.batch_axis in (None, 0) else x.transpose(0, 1)

    def channels(self, x: Tensor) -> int:
        """Return the width of a block's output."""
        return int(x.shape[1] if self.layout == "nchw" and x.ndim > 3 else x.shape[-1])

    def positions(self, space: str) -> tuple[str, ...]:
        """Return the positions at which a space is defined for this tower.

        Where widths change along the tower, final norm and projection fit the last stage only.
        """
        found = tower_positions(self.depth, space)
        if space in ATTENTION:
            return found
        if not self.joint:
            found = () if space == JOINT else tuple(p for p in found if p != PROJ)
        if space == "native" or not self.widths:
            return found
        inside = (EMBED, *map(str, range(1, self.depth + 1)))
        fits = {p for p in inside if self.widths[p] == self.width}
        if self.attend_raw:
            fits = {str(self.depth)}
        return tuple(p for p in found if p in fits or p not in inside)

    def refusal(self, space: str) -> str:
        """Return why a space lacks positions, or an empty string."""
        if space == JOINT and not self.joint:
            return f"the {self.name} tower ({self.family}) has no joint embedding"
        missing = [p for p in tower_positions(self.depth, space) if p not in self.positions(space)]
        if not missing:
            return ""
        return (
            f"{space} space is defined at the last of the {self.depth} stages only: final norm "
            f"and projection take {self.width} channels, the earlier stages have fewer"
        )


def _described(shape: Iterable[object], batch: Tensor) -> str:
    words = ", ".join(map(str, shape))
    return f"({words}) of {str(batch.dtype).removeprefix('torch.')} on {batch.device}"


class Towers(dict[str, Tower]):
    """The towers of a model by name, `vision` first; one on a line, and a table in Jupyter."""

    def __repr__(self) -> str:
        return "\n".join(map(repr, self.values()))

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th scope='row'>{name}</th><td>{escape(tower.family)}</td>"
            f"<td>{tower.depth} {tower.kind}</td><td>width {tower.width}</td>"
            f"<td>{escape(tower.pool_note or tower.pooling)}</td></tr>"
            for name, tower in self.items()
        )
        return f"<table>{rows}</table>"
