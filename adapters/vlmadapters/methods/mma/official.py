"""The layout of the authors' checkpoints of MMA: what its keys tell."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from vlmadapters.methods.mma.config import MMAConfig
from vlmlayers.errors import UserError

PARTS = ("visual_adapter", "text_adapter", "shared_adapter")


def agreed(config: MMAConfig | None, found: MMAConfig, where: str) -> MMAConfig:
    """Return the configuration asked for, or the one found where none is.

    Raises:
        UserError: They differ in placement, pairs or inner width.
    """
    config = config or found
    if _described(config) != _described(found):
        raise UserError(
            f"{where} holds the placement {_described(found)}; asked for is {_described(config)}; "
            "change one of them"
        )
    return config


def placement_of(state: Mapping[str, Tensor], where: str) -> MMAConfig:
    """Read placement and inner width from the keys of an adapter's state.

    Raises:
        UserError: No key is an adapter's.
    """
    blocks: dict[str, set[int]] = {part: set() for part in PARTS}
    pairs, dim = set(), 0
    for key, value in state.items():
        # Padded, since a key of another file may have fewer parts.
        part, number, rest = (key.split(".", 2) + ["", ""])[:3]
        if part not in PARTS or not rest:
            continue
        if number.isdecimal():
            blocks[part].add(int(number))
        if part != "shared_adapter" and rest.startswith("down") and value.ndim == 2:
            dim = value.shape[0]
        paired = re.fullmatch(r"v(\d+)t(\d+)", number)
        if part == "shared_adapter" and paired:
            pairs.add((int(paired[1]), int(paired[2])))
    if not dim:
        raise UserError(f"{where} holds no adapter: no key such as text_adapter.5.down.0.weight")
    vision, text = (tuple(sorted(blocks[part])) for part in ("visual_adapter", "text_adapter"))
    pairs |= {(block, block) for block in blocks["shared_adapter"]}
    config = MMAConfig(vision, text, dim)
    # None where they follow from the blocks, so that settings read equal those written.
    if pairs != set(config.shared_pairs()):
        return replace(config, pairs=tuple(sorted(pairs)))
    return config


def _described(config: MMAConfig) -> str:
    pairs = sorted(config.shared_pairs())
    equal = pairs == [(block, block) for block in config.vision if block in config.text]
    paired = "" if equal else f" and the pairs {', '.join(f'{v}:{t}' for v, t in pairs) or 'none'}"
    return f"{config.placement} with dim {config.dim}{paired}"
