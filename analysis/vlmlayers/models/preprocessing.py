"""How images are prepared, and where that is known from: a tag, a configuration, or the user.

Weights do not say how the images were prepared that they were trained on, nor with which
activation. The tags that open_clip lists for an architecture do: where all agree, a file of weights
is taken to be like them; where they differ, the user has to say.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import open_clip
from open_clip.transform import PreprocessCfg, merge_preprocess_dict

from vlmlayers.architectures import refuse_quickgelu_mismatch, tags_of
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.models.checkpoints import Checkpoint

LOG = logging.getLogger(__name__)
KEYS = ("mean", "std", "interpolation", "resize_mode")
STATED = frozenset(KEYS[:3])  # who states these knows how the weights were trained
INTERPOLATIONS = ("bicubic", "bilinear", "random")
RESIZE_MODES = ("shortest", "longest", "squash")
_SHOWN = 4


def check_settings(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return settings of preprocessing in one form, those that are None left out.

    Args:
        settings: `mean` and `std` (one number or three), `interpolation`, `resize_mode`, and what
            else open_clip reads.
        where: Where they come from, for the message.

    Raises:
        UserError: A value is not valid.
    """
    found = {key: value for key, value in settings.items() if value is not None}
    for key in ("mean", "std"):
        if key in found:
            found[key] = _three(key, found[key], where)
    for key, valid in (
        ("interpolation", INTERPOLATIONS),
        ("resize_mode", RESIZE_MODES),
        ("mode", ("RGB",)),
    ):
        if key in found:
            check_one_of(key, found[key], valid, where=where)
    return found


def _three(key: str, value: Any, where: str) -> tuple[float, ...]:
    numbers = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    numbers = numbers * 3 if len(numbers) == 1 else numbers
    try:
        found = tuple(float(number) for number in numbers)
    except (TypeError, ValueError):
        found = ()
    if len(found) != 3 or not all(map(math.isfinite, found)) or (key == "std" and min(found) <= 0):
        raise UserError(
            f"{key} {value!r} of {where} is not three numbers (red, green, blue)"
            + (" above 0" if key == "std" else "")
        )
    return found


def of_tag(name: str, tag: str) -> dict[str, Any]:
    """Return preprocessing and activation (`quick_gelu`) that a tag was trained with.

    Raises:
        UserError: The architecture has no such tag.
    """
    check_one_of("pretrained tag", tag, tags_of(name), where=f"model {name}")
    stated = dict(open_clip.get_pretrained_cfg(name, tag))
    # Tags state what differs from open_clip's defaults; compared are whole settings.
    whole = merge_preprocess_dict(asdict(PreprocessCfg()), stated)
    return {
        **{key: tuple(v) if isinstance(v := whole[key], list) else v for key in whole},
        "quick_gelu": bool(stated.get("quick_gelu")),
    }


def of_file(
    name: str, config: Mapping[str, Any], weights: Checkpoint, like: str | None, stated: set[str]
) -> dict[str, Any]:
    """Return preprocessing for a file of weights of an architecture, and say where it is from.

    Args:
        name: Architecture.
        config: Its configuration.
        weights: The file.
        like: Tag that the weights were trained like; OpenAI's own need none.
        stated: Settings that the user states.

    Raises:
        UserError: The tags of the architecture differ and the user does not say which holds, or
            the weights were trained with the other activation.
    """
    tags, file = tags_of(name), weights.path.name
    # OpenAI's own files are known by the sizes that they store as tensors.
    if like is None and weights.openai and "openai" in tags:
        like = "openai"
    if like is not None:
        found = of_tag(name, like)
        refuse_quickgelu_mismatch(name, like, config, found)
        LOG.warning("%s: prepared like %s of %s", file, like, name)
        return found
    if not tags:
        if not stated >= STATED:
            LOG.warning("%s: no weights of %s are known; prepared as open_clip does", file, name)
        return {}
    known = {tag: of_tag(name, tag) for tag in tags}
    first = known[tags[0]]
    settings = (*KEYS, "quick_gelu")
    differ = [key for key in settings if any(one[key] != first[key] for one in known.values())]
    open_ = [key for key in differ if key not in stated]
    if stated >= STATED:  # the activation is then that of the architecture
        open_ = [key for key in open_ if key != "quick_gelu"]
    elif "quick_gelu" not in differ:
        _refuse_common_mismatch(name, file, config, first)
    if open_:
        raise UserError(_question(name, file, known, open_))
    if not stated >= STATED:
        LOG.warning("%s: prepared like all weights of %s (%s)", file, name, _few(tags))
    return first


def _refuse_common_mismatch(
    name: str, file: str, config: Mapping[str, Any], trained: Mapping[str, Any]
) -> None:
    try:
        refuse_quickgelu_mismatch(name, file, config, trained)
    except UserError as error:
        raise UserError(
            f"{error}, or, where yours are not like all known weights of {name}, state mean, std "
            "and interpolation"
        ) from error


def _question(
    name: str, file: str, known: Mapping[str, Mapping[str, Any]], keys: Sequence[str]
) -> str:
    kinds: dict[str, list[str]] = {}
    for tag, settings in known.items():
        kinds.setdefault("; ".join(_words(key, settings[key]) for key in keys), []).append(tag)
    ways = ", or ".join(f"{words} ({_few(tags)})" for words, tags in kinds.items())
    return (
        f"the weights of {name} were trained in different ways: {ways}; say which tag {file} is "
        "like with --like TAG (like=), or state mean, std and interpolation"
        + (" and resize_mode" if "resize_mode" in keys else "")
    )


def _words(key: str, value: Any) -> str:
    if key == "quick_gelu":
        return "QuickGELU" if value else "GELU"
    if isinstance(value, tuple):
        value = " ".join(f"{number:.3g}" for number in value)
    return f"{key} {value}"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
