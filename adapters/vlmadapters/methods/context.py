"""Class prompts with learned context: token ids, slots of the context, and what is written there.

Words stand in the token ids where the learned context will be. At the input of a block the tokens
in these slots are overwritten; at block 1 positional embeddings are added, as to any word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from vlmadapters.clip.frozen import Backbone, climb
from vlmadapters.clip.walk import State
from vlmadapters.methods.configs import PLACEHOLDER, ClassAt, ContextConfig, split_words
from vlmlayers.errors import UserError, check_one_of

CLASS_AT: tuple[str, ...] = get_args(ClassAt)


@dataclass(frozen=True, eq=False)
class Slots:
    """Where the context of each prompt stands; the `note` of the prompts' state.

    Attributes:
        index: Index of the tokens, (prompt, word).
        positional: Positional embeddings there, (prompt, word, width).
        which: Number of the context that each prompt takes where there are several, (prompt,).
        shift: What is added to every context word of a prompt, (prompt, width), or None.
    """

    index: Tensor
    positional: Tensor
    which: Tensor | None = None
    shift: Tensor | None = None

    def write(self, x: Tensor, context: Tensor, block: int) -> Tensor:
        """Return the input of a block with the context in the slots.

        Args:
            x: (prompt, token, width).
            context: (word, width), or (context, word, width) where there are several.
            block: Number of the block; 1 adds the positional embeddings to the context.
        """
        if self.which is not None:
            context = context[self.which]
        if self.shift is not None:
            context = context + self.shift[:, None]
        if block == 1:
            context = context + self.positional
        context = context.to(x.dtype).expand_as(self.positional)
        # Not in place: x may be the frozen state, which every later step starts from again.
        return x.scatter(1, self.index[..., None].expand_as(context), context)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Return some tokens of each prompt, (prompt, word, width).

    Args:
        x: (prompt, token, width).
        index: (prompt, word).
    """
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def context_prompts(
    backbone: Backbone,
    names: Sequence[str],
    words: Sequence[str],
    length: int | None = None,
    class_at: str = "end",
    *,
    underscores: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the token ids of class prompts, (class, token), and their slots, (class, word).

    The prompt of a class is the words, its name and a full stop. Its slots are its first tokens;
    tokens of words beyond them stay as they are.

    Args:
        backbone: The frozen CLIP with its tokenizer.
        names: Class names; their underscores become spaces. An empty one gives a prompt without.
        words: Words before the name, `PLACEHOLDER` where there are none.
        length: Number of slots; None takes one for each word.
        class_at: Where the name stands: at the `end`, in the `middle` after the first half of the
            slots (rounded down), or in `front` of them.
        underscores: Keep underscores in the text, and count the tokens of the name without.

    Raises:
        UserError: The words have fewer tokens than there are slots, or a prompt has more than the
            text tower reads; says the limit.
    """
    check_one_of("class_at", class_at, CLASS_AT)
    slots, before = len(words) if length is None else length, " ".join(words)
    first, special = _special(backbone)
    spaced = [name.replace("_", " ") for name in names]
    written = list(names) if underscores else spaced
    tokens = backbone.tokens([f"{before} {name}." if name else f"{before}." for name in written])
    _check_room(backbone, written, before, slots, tokens.shape[1])
    # Counted without the full stop, which stays behind context and name in any order.
    ends = first + _counts(backbone, [f"{before} {name}" for name in spaced]) - special
    head = {"end": slots, "middle": slots // 2, "front": 0}[class_at]
    # By moving tokens: text put together anew might be split into other tokens.
    order = torch.arange(tokens.shape[1]).repeat(len(names), 1)  # (class, token)
    for row, end in zip(order, ends.tolist()):
        context, name = row[first : first + slots], row[first + slots : end]
        # `cat` copies: context and name are views of the row that is written.
        row[first:end] = torch.cat([context[:head], name, context[head:]])
    order = order.to(tokens.device)
    # The argsort of a permutation is its inverse: it tells where the context's tokens went.
    return tokens.gather(1, order), order.argsort(1)[:, first : first + slots]


def _check_room(
    backbone: Backbone, names: Sequence[str], before: str, slots: int, limit: int
) -> None:
    # Name and context are counted apart: tokenizers cut a text that is too long without a word,
    # and a prompt counted whole would always seem to fit.
    whole = int(_counts(backbone, [before]))
    context = whole - _special(backbone)[1]
    if context < slots and whole < limit:
        raise UserError(f"{before!r} has {context} tokens, too few for a context of {slots}")
    context = max(context, slots)  # of words that were cut, as many as there are to be
    for name, own in zip(names, _counts(backbone, [f"{name}." for name in names]).tolist()):
        if own + context > limit:
            fits = limit - own
            advice = f"use {fits} context words at most" if fits > 0 else "shorten the name"
            raise UserError(
                f"the class name {name!r} takes {own} tokens with start, full stop and end, and "
                f"the context {context}; the text tower reads {limit} at most; {advice}"
            )


def _counts(backbone: Backbone, texts: Sequence[str]) -> Tensor:
    """Return the number of tokens of texts, start and end included, (text,)."""
    valid = backbone.text.tower.valid
    assert valid is not None
    return valid(backbone.tokens(texts)).sum(1).cpu()


def _special(backbone: Backbone) -> tuple[int, int]:
    """Return how many tokens stand before a text, and how many before and after it."""
    one, two = backbone.tokens([PLACEHOLDER, f"{PLACEHOLDER} {PLACEHOLDER}"])
    # Up to the first difference the ids are the start and the one word that both texts have.
    alike = int((one == two).int().cumprod(0).sum())
    return alike - 1, int(_counts(backbone, [PLACEHOLDER])) - 1


def context_state(backbone: Backbone, tokens: Tensor, slots: Tensor, block: int) -> State:
    """Return the frozen state of prompts at a block, with `Slots` as its note.

    Args:
        backbone: The frozen CLIP.
        tokens: (prompt, token), as `context_prompts` gives them.
        slots: (prompt, word), likewise.
        block: Number of the block.

    Raises:
        UserError: The text tower does not add positions to words and go on block by block.
    """
    states = backbone.prompts(tokens, [1, block])
    x, ids = states[1].x, states[1].inputs
    if x is None or not states[1].length:
        raise UserError(_no_place(backbone))
    # By difference: towers keep their positions in places and shapes of their own.
    positional = x[:, : ids.shape[1]] - word_embedding(backbone, ids)
    return replace(states[block], note=Slots(slots, take(positional, slots)))


def some_prompts(state: State, rows: Tensor) -> State:
    """Return the state of some of the prompts, in an order and as often as asked for.

    Args:
        state: The state of prompts, their `Slots` as its note.
        rows: Numbers of prompts, (row,).
    """
    assert state.x is not None
    note = replace(state.note, index=state.note.index[rows], positional=state.note.positional[rows])
    return replace(state, inputs=state.inputs[rows], x=state.x[rows], note=note)


def starting_context(
    config: ContextConfig,
    backbone: Backbone,
    names: Sequence[str],
    count: int | None = None,
    seed: int = 0,
) -> dict[int, Tensor]:
    """Return the context that training starts from at each of the method's text blocks.

    Random context is drawn. Context from words is what the frozen words are there: their embeddings
    at block 1, the mean over classes of their activations at a later block (they differ between
    classes where the name does not stand at the end).

    Args:
        config: Blocks, words and length.
        backbone: The frozen CLIP with its tokenizer.
        names: Class names.
        count: Number of contexts, one for each class; None has one for all of them.
        seed: Seed of what is drawn.

    Returns:
        Block to (word, width), or (class, word, width) where there is one for each.
    """
    words, width = config.start_words, backbone.text.tower.width
    if not split_words(config.words):
        shape = (len(words), width) if count is None else (count, len(words), width)
        return drawn_context(config.text, *shape, seed=seed)
    tokens, slots = context_prompts(backbone, names or [""], words, class_at=config.class_at)
    states = climb(backbone.text, backbone.text.enter, tokens, config.text)
    found = {}
    for block in config.text:
        x = word_embedding(backbone, tokens) if block == 1 else states[block].x
        assert x is not None
        at_slots = take(x, slots)  # (class, word, width)
        # In double precision, where the mean of equal rows is that row to the bit.
        found[block] = at_slots if count is not None else at_slots.double().mean(0).to(x.dtype)
    return found


def drawn_context(blocks: Sequence[int], *shape: int, seed: int) -> dict[int, Tensor]:
    """Return random context of a shape for each of some blocks."""
    drawn = random_vectors(len(blocks), *shape, seed=seed)
    # Cloned: torch writes whole storages, and a view of `drawn` would be saved with all of it.
    return {block: one.clone() for block, one in zip(blocks, drawn)}


def word_vectors(backbone: Backbone, words: Sequence[str], length: int | None = None) -> Tensor:
    """Return the frozen embeddings of the first tokens of some words, (word, width).

    Args:
        backbone: The frozen CLIP with its tokenizer.
        words: The words.
        length: Number of tokens; None takes one for each word.
    """
    first, size = _special(backbone)[0], len(words) if length is None else length
    ids = backbone.tokens([" ".join(words)])[0, first : first + size]
    return word_embedding(backbone, ids).float().clone()


@torch.no_grad()
def word_embedding(backbone: Backbone, ids: Tensor) -> Tensor:
    """Return the frozen embeddings of token ids, (…, width), without positions.

    Raises:
        UserError: This text tower does not add positions to words.
    """
    tower = backbone.text.tower
    if tower.embed is None:
        raise UserError(_no_place(backbone))
    return tower.embed(ids)


def _no_place(backbone: Backbone) -> str:
    return (
        f"learned context has no place in this text tower ({backbone.text.tower.family}): its "
        "blocks cannot be run one by one from words plus positions; choose an open_clip text tower"
    )


def random_vectors(*shape: int, seed: int) -> Tensor:
    """Draw context from a normal distribution, by a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(shape).normal_(0, 0.02, generator=generator)
