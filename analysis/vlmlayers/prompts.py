"""Prompts of classes: a template around the name of each."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterable
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator

from vlmlayers.arguments import Takes, checked
from vlmlayers.words import counted

K = TypeVar("K", bound=Hashable)
TEMPLATE = "a photo of a {}."
# What classes are for, after "has no classes".
PROMPTED = (
    " to make prompts of; use text='captions' (--text captions), or of images alone "
    "tower='vision' (--tower vision)"
)
APART = " to tell apart"
UNTOLD = "has no captions; use text='prompts' (--text prompts)"
UNGIVEN = "has no captions; give texts=, one or several per image, or leave text='captions' out"
EXAMINED = (
    ", by prompts of which a model is examined; leave out the metrics that "
    "`vlmlayers score --list` marks with +"
)


def _one_place(text: Any) -> Any:
    # Other braces are left from a formatting language that is not spoken here: `{0}`, `{name}`.
    if isinstance(text, str) and (text.count("{}") != 1 or set("{}") & set(text.replace("{}", ""))):
        raise ValueError(f"{text!r} must hold '{{}}' exactly once and no other brace")
    return text


_NO_WORDS = {
    "a code": (
        re.compile(r"^(n\d{8}|\d+)$"),
        "which says little to a text tower unless images show it; name them in words by "
        "class_names, in the order of the codes",
    ),
    "words that run together": (
        re.compile(r"[a-z][A-Z][a-z]"),
        "which a tokenizer reads as one; part them by blanks or underscores, or by class_names",
    ),
}
_SHOWN = 5  # groups of classes with one prompt that are named
_WORDS = "holding '{}' exactly once and no other brace"
# One type for both: `Takes` is read where calls are checked, the validator where documents are.
Template = Annotated[
    str,
    Takes(f"a template {_WORDS}", f"templates {_WORDS}", convert=_one_place),
    AfterValidator(_one_place),
]


@checked
def class_prompts(class_names: Iterable[str], template: Template = TEMPLATE) -> list[str]:
    """Fill a template with class names; underscores become spaces.

    Raises:
        UserError: The template does not hold `{}` exactly once, or holds another brace.
    """
    # Not `format`, which would read braces in a class name.
    return [template.replace("{}", name.replace("_", " ")) for name in class_names]


def spelled(name: str) -> str:
    """Return a class name as its prompt reads it: lower case, single blanks for what parts words.

    Tokenizers of CLIP and SigLIP lower the case of words and join blanks.
    """
    return " ".join(name.replace("_", " ").lower().split())


def numbered(names: Iterable[K]) -> list[tuple[K, int]]:
    """Return each name with how many of the same are before it, which tells repeated ones apart."""
    seen: Counter[K] = Counter()
    found = []
    for name in names:
        found.append((name, seen[name]))
        seen[name] += 1
    return found


def alike(class_names: Iterable[str]) -> tuple[str, ...]:
    """Return a remark on classes that have one prompt, of which lists of ImageNet have some."""
    groups: dict[str, list[str]] = {}
    for name in class_names:
        groups.setdefault(spelled(name), []).append(name)
    several = [names for names in groups.values() if len(names) > 1]
    shown = [", ".join(repr(name[:80]) for name in names) for names in several[:_SHOWN]]
    listed = "; ".join([*shown, *(["…"] if len(several) > _SHOWN else [])])
    return (f"classes with one prompt, which text cannot tell apart: {listed}",) if several else ()


def remarks_on(class_names: Iterable[str]) -> tuple[str, ...]:
    """Return remarks on classes that have one prompt, and on names that are no words.

    Folders of ImageNet and its parts are named by ids of WordNet, those of others by numbers or,
    as EuroSAT's, by words that run together. Told where most names are such.
    """
    names = list(class_names)
    found = list(alike(names))
    for kind, (pattern, why) in _NO_WORDS.items():
        such = [name for name in names if pattern.search(name)]
        if 2 * len(such) > len(names):
            count = f"{len(such)} of {counted(len(names), 'class')}"
            found.append(f"{count} are named by {kind}, such as {such[0]!r}, {why}")
    return tuple(found)
