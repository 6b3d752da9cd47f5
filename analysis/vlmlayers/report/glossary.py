"""The words of a report, each in one sentence; a page shows them where the pointer rests."""

from __future__ import annotations

import re
from typing import Any

GLOSSARY = {
    "tower": "One of the two encoders of the model: vision or text.",
    "block": "One residual block of a tower, numbered from 1.",
    "position": "A place on a tower: the input of block 1 (embed), each block, the final norm "
    "(final), the joint embedding (proj).",
    "embed": "The input of block 1.",
    "proj": "The joint embedding as the model gives it, whatever pooling other positions have.",
    "pooling": "How the tokens of an item become one vector: cls, eot, mean, or the model's own, "
    "which proj always has.",
    "native": "Features as the block put them out, before any norm or projection.",
    "joint space": "Final norm and projection applied at every position, so that images and texts "
    "have the same width; of a mean over tokens each token is normed first.",
    "resamples": "Score tables drawn anew from seeds and intervals; the rule is run on each.",
    "firm": "Chosen, here and in at least three quarters of the resamples (and, where scores are "
    "of single datasets, of the choices without one), by a rule that sees no reason to doubt the "
    "tower.",
    "open": "The resamples, or the choices without one dataset, disagree with each other or with "
    "this choice, or the rule itself doubts the tower.",
    "default": "The paper's placement, 5–12 of 12 blocks, scaled to the depth of the tower.",
    "chance": "What the same measurement gives where there is nothing to find.",
    "linear probe": "A linear classifier fitted on frozen features, read on other items.",
    "modality gap": "The distance between images and texts in the joint space.",
    "CKA": "Centred kernel alignment: how alike two sets of features arrange the same items.",
    "placement": "The blocks of both towers that an adapter acts in.",
    "zero-shot": "The model without an adapter, its classes named by prompts.",
    "base classes": "The classes that the adapter is trained on.",
    "novel classes": "The classes of the same dataset that the adapter never saw.",
    "harmonic mean": "2·b·n / (b + n) of the accuracy on base and on novel classes.",
}
_LONGEST_FIRST = sorted(GLOSSARY, key=len, reverse=True)
_TERM = re.compile(rf"\b({'|'.join(map(re.escape, _LONGEST_FIRST))})(?=s?\b)", re.IGNORECASE)
_TERMS = {term.casefold(): meaning for term, meaning in GLOSSARY.items()}


def explained(text: str, told: list[str] | None = None) -> Any:
    """Return text as HTML in which the first use of each known word carries its meaning.

    Args:
        text: The text.
        told: Words explained before, as in other clauses of a fact; those of this one are added.
    """
    from markupsafe import Markup, escape

    seen = [] if told is None else told

    def explain(match: re.Match[str]) -> str:
        word = match.group(0)
        if word.casefold() in seen:
            return word
        seen.append(word.casefold())
        meaning = escape(_TERMS[word.casefold()])
        return f'<abbr tabindex="0" title="{meaning}">{word}</abbr>'

    return Markup(_TERM.sub(explain, str(escape(text))))
