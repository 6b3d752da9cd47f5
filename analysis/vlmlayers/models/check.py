"""Check that the towers of every open_clip architecture are found, without allocating weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import open_clip
import pandas as pd
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vlmlayers.arguments import checked
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.models.build import build_clip
from vlmlayers.models.recording import probe
from vlmlayers.models.towers import Tower, find_text, find_vision
from vlmlayers.progress import track


@dataclass(frozen=True)
class Check:
    """What was found in one architecture; `status` is `found` or `refused` with a reason."""

    model: str
    vision_family: str = ""
    vision_kind: str = ""
    vision_blocks: int = 0
    vision_width: int = 0
    vision_pooling: str = ""
    text_family: str = ""
    text_blocks: int = 0
    text_width: int = 0
    text_pooling: str = ""
    joint_positions: str = ""
    status: str = "found"
    reason: str = ""


@checked
def models_check(names: Sequence[str] | None = None, *, progress: bool = False) -> pd.DataFrame:
    """Build architectures on the meta device, find both towers and run them on shapes alone.

    Each tower passes a small batch through its hooks, so a block that is never called, a wrong
    batch axis or a wrong width shows.

    Args:
        names: Architectures; all that open_clip knows where None.
        progress: Show a progress bar.

    Returns:
        One row per architecture; see `Check`. `summary` turns it into "N of M".

    Raises:
        UserError: A name is unknown.
    """
    known = open_clip.list_models()
    chosen = known if names is None else [check_one_of("model", name, known) for name in names]
    rows = [
        asdict(check_model(name))
        for name in track(chosen, "architectures", unit="model", show=progress)
    ]
    return pd.DataFrame(rows, columns=list(Check.__dataclass_fields__))


@checked
def summary(table: pd.DataFrame) -> str:
    """Return "N of M architectures: both towers found"."""
    found = int((table["status"] == "found").sum())
    return f"{found} of {len(table)} architectures: both towers found"


def check_model(name: str) -> Check:
    """Check one architecture."""
    try:
        # Shapes alone: the largest architectures have gigabytes of weights, and none is needed.
        with torch.device("meta"), _NoValues():
            clip = build_clip(open_clip.get_model_config(name), device="meta")
            vision, text = find_vision(clip), find_text(clip)
            probe(vision)
            probe(text)
    except UserError as error:
        return Check(name, status="refused", reason=str(error))
    return Check(
        name,
        vision.family,
        vision.kind,
        vision.depth,
        vision.width,
        _pooling(vision),
        text.family,
        text.depth,
        text.width,
        _pooling(text),
        "last stage" if vision.refusal("joint") else "all",
    )


_READS_ONE_VALUE = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.item.default,
    torch.ops.aten.is_nonzero.default,
)


class _NoValues(TorchDispatchMode):
    """Answer "all true" where code asks a tensor without values what its mask holds."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS_ONE_VALUE and args[0].is_meta:
            return True
        # How many rows a mask picks depends on its values: take all of them.
        if func is torch.ops.aten.index.Tensor and args[0].is_meta:
            args = (args[0], [_all_of(index) for index in args[1]])
        return func(*args, **(kwargs or {}))


def _all_of(index: Any) -> Any:
    if index is None or index.dtype is not torch.bool or index.ndim != 1:
        return index
    return torch.arange(len(index), device="meta")


def _pooling(tower: Tower) -> str:
    return f"model ({tower.pool_note})" if tower.pooling == "model" else tower.pooling
