"""Positions on a tower's axis: `embed`, blocks `1`..`L`, `final`, `proj`.

This module owns the numbering. Blocks count from 1 everywhere, as in the MMA paper.
"""

from __future__ import annotations

from vlmlayers.errors import UserError, check_one_of

EMBED, FINAL, PROJ = "embed", "final", "proj"
TOWERS = ("vision", "text")
JOINT = "joint"
SPACES = ("native", "normed", JOINT)
# Not coordinates of features: what attention does in a block, one column per head.
ATTENTION = ("attention_entropy", "attention_distance")
POOLINGS = ("model", "cls", "eot", "mean")
TOKENS = "tokens"  # in place of a pooling: every token by itself


def check_space(name: str) -> str:
    """Return a space, or what attention does, where it is one.

    Raises:
        UserError: It is none; the nearest one is named.
    """
    return check_one_of("space", name, SPACES + ATTENTION)


def unextracted(space: str) -> str:
    """Return, for a message, that features lack a space, and what adds it."""
    return f"no {space} features were extracted, as by --spaces {space}"


def tower_positions(blocks: int, space: str = "native") -> tuple[str, ...]:
    """Return the positions of a tower with `blocks` blocks, in order, for one space.

    In `joint` space every position already went through final norm and projection, so `final`
    does not exist there and `proj` repeats the last block, as long as the pooling is the model's
    own: `proj` is the embedding that the model gives, and other poolings do not change it. In
    `normed` space `final` repeats the last block and `proj` does not exist. Attention is in the
    blocks alone.
    """
    check_space(space)
    body = (EMBED, *(str(block) for block in range(1, blocks + 1)))
    if space in ATTENTION:
        return body[1:]
    if space == "joint":
        return (*body, PROJ)
    return (*body, FINAL, PROJ) if space == "native" else (*body, FINAL)


def relative_depth(position: str, blocks: int) -> float:
    """Return depth in [0, 1]: `embed` 0, block b is b/L, `final` and `proj` 1."""
    if position == EMBED:
        return 0.0
    if position in (FINAL, PROJ):
        return 1.0
    return block_number(position) / blocks


def is_block(position: str) -> bool:
    """Return whether the position is a block number."""
    return position.isdecimal()


def block_number(position: str) -> int:
    """Return the number of a block position.

    Raises:
        UserError: The position is not a block.
    """
    if not is_block(position):
        raise UserError(f"position {position!r} is not a block; blocks are '1', '2', …")
    return int(position)


def sort_key(position: str) -> tuple[int, int]:
    """Return a key that sorts positions along the tower."""
    if position == EMBED:
        return (0, 0)
    if is_block(position):
        return (1, int(position))
    return (2, (FINAL, PROJ).index(check_one_of("position", position, (EMBED, FINAL, PROJ))))
