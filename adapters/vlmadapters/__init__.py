"""The Multi-Modal Adapter (MMA, CVPR 2024): attach, train and evaluate at any placement."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmadapters.config import MMAConfig

if TYPE_CHECKING:
    from vlmadapters.fewshot import few_shot
    from vlmadapters.mma import Adapter, attach, class_logits
    from vlmadapters.protocols import base_to_novel, cross_dataset, few_shot_all
    from vlmadapters.recipes import load_recipe
    from vlmadapters.results import summarise
    from vlmadapters.train import Trainer

_HOMES = {
    "Adapter": "mma",
    "attach": "mma",
    "class_logits": "mma",
    "few_shot": "fewshot",
    "Trainer": "train",
    "load_recipe": "recipes",
    "base_to_novel": "protocols",
    "cross_dataset": "protocols",
    "few_shot_all": "protocols",
    "summarise": "results",
}

__all__ = [
    "Adapter",
    "MMAConfig",
    "Trainer",
    "attach",
    "base_to_novel",
    "class_logits",
    "cross_dataset",
    "few_shot",
    "few_shot_all",
    "load_recipe",
    "summarise",
]


def __getattr__(name: str) -> object:
    """Import on first use, so that the command line starts without torch."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'vlmadapters' has no attribute {name!r}")
    return getattr(import_module(f"vlmadapters.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
