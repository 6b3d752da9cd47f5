"""Methods that adapt a frozen CLIP: attach, train and evaluate them at any placement."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmadapters.methods import METHODS
from vlmadapters.methods.mma.config import MMAConfig

if TYPE_CHECKING:
    from vlmadapters.clip.logits import class_logits
    from vlmadapters.data.fewshot import few_shot
    from vlmadapters.methods.base import Method
    from vlmadapters.methods.mma.module import attach
    from vlmadapters.protocols.results import summarise
    from vlmadapters.protocols.train import base_to_novel, train
    from vlmadapters.training.recipes import load_recipe
    from vlmadapters.validation.search import search
    from vlmadapters.validation.validate import validate

    __version__: str

_HOMES = {
    "Method": "methods.base",
    "attach": "methods.mma.module",
    "base_to_novel": "protocols.train",
    "class_logits": "clip.logits",
    "few_shot": "data.fewshot",
    "load_recipe": "training.recipes",
    "search": "validation.search",
    "summarise": "protocols.results",
    "train": "protocols.train",
    "validate": "validation.validate",
}

__all__ = [
    "METHODS",
    "MMAConfig",
    "Method",
    "attach",
    "base_to_novel",
    "class_logits",
    "few_shot",
    "load_recipe",
    "search",
    "summarise",
    "train",
    "validate",
]


def __getattr__(name: str) -> object:
    """Import on first use, so that the command line starts without torch."""
    from importlib import import_module

    if name == "__version__":  # both packages are of one distribution
        return import_module("vlmlayers").__version__
    if name not in _HOMES:
        raise AttributeError(f"module 'vlmadapters' has no attribute {name!r}")
    return getattr(import_module(f"vlmadapters.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
