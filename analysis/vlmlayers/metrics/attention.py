"""What the heads of a block attend to: how wide, and how far.

Extraction records both for each item and head, in the spaces `attention_entropy` and
`attention_distance`, as shares of what uniform attention over the same keys gives: towers of other
numbers of tokens compare, and 1 is what a head without a preference has.
"""

from __future__ import annotations

from vlmlayers.arguments import checked
from vlmlayers.metrics.checks import Array, Given, matrix


@checked
def attention_entropy(x: Given) -> Array:
    """Return how wide each head attends, as a share of uniform attention: 0 to 1, (head,).

    The entropy −Σ p log p of a query's weights, summed over the queries of an item and divided by
    the same sum for uniform attention over the keys that each may see; the mean over items. A text
    asks with its own tokens, not with what pads it.

    Args:
        x: (item, head), as recorded.

    Reference: Vig and Belinkov 2019.
    """
    return matrix(x).mean(axis=0)


@checked
def attention_distance(x: Given) -> Array:
    """Return how far each head attends, as a share of uniform attention, (head,).

    The mean of the distances from a query to its keys, weighed by attention: between patches on
    the image's grid, between tokens along a text, without class tokens and registers.
    Summed over the queries of an item and divided by the same sum for uniform attention over the
    keys that each may see; the mean over items.

    Args:
        x: (item, head), as recorded.

    Reference: Dosovitskiy et al. 2021, Fig. 7, there in pixels.
    """
    return matrix(x).mean(axis=0)
