"""What checkpoints in the authors' layouts say, checked against what is asked for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from vlmadapters.methods.config import MethodConfig
from vlmlayers.errors import UserError


def is_prompt(key: str) -> bool:
    """Whether a parameter of a checkpoint is a learned prompt, not the backbone or its words.

    Those of any method count, so that another's checkpoint is refused.
    """
    # `token_prefix` and `token_suffix` are frozen embeddings of the words of trained classes.
    return (key.startswith("prompt_learner.") and "token_" not in key) or "VPT" in key


def matched_keys(
    keys: Iterable[str], known: re.Pattern[str], where: str, title: str
) -> dict[str, re.Match[str]]:
    """Return what a method's pattern finds in each parameter's name of a checkpoint.

    Args:
        keys: Names of its parameters, without the backbone's.
        known: Pattern of the method's own.
        where: The file, for messages.
        title: The method's name, for messages.

    Raises:
        UserError: One does not match, or there is none.
    """
    found = {}
    for key in keys:
        if (match := known.fullmatch(key)) is None:
            raise UserError(f"{where} is of another method than {title}: it holds {key}")
        found[key] = match
    if not found:
        raise UserError(f"{where} holds no parameter of {title}; name the method that wrote it")
    return found


def check_settings(config: MethodConfig, found: Mapping[str, Any], where: str) -> MethodConfig:
    """Return the settings asked for, which are those of a checkpoint as far as it tells them.

    Args:
        config: The settings asked for.
        found: Setting to its value in the checkpoint.
        where: The file, for messages.

    Raises:
        UserError: The checkpoint has others.
    """
    for name, value in found.items():
        asked = getattr(config, name)
        if asked != value:
            raise UserError(f"{where} has {name} {value}, asked for is {asked}; change one of them")
    return config
