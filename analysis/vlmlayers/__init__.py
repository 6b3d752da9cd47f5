"""Which layers of a vision-language model should be adapted?

Measure every layer of both towers, choose layers from the measurements, prove the choice by
training. Importing this package does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmlayers import metrics as metrics
    from vlmlayers import models as models
    from vlmlayers import plots as plots
    from vlmlayers.errors import UserError as UserError
    from vlmlayers.features import LayerFeatures as LayerFeatures
    from vlmlayers.manifests import Manifest as Manifest
    from vlmlayers.models import extract as extract
    from vlmlayers.models import load_model as load_model
    from vlmlayers.placement import Placement as Placement
    from vlmlayers.plots.explore import explore as explore
    from vlmlayers.report import write_report as write_report
    from vlmlayers.scores import read_scores as read_scores
    from vlmlayers.scores import score as score
    from vlmlayers.scores import write_scores as write_scores
    from vlmlayers.selection import LayerChoice as LayerChoice
    from vlmlayers.selection import predict as predict
    from vlmlayers.selection import select as select
    from vlmlayers.study import open_run as open_run
    from vlmlayers.study import read_study as read_study
    from vlmlayers.study import run_study as run_study

_HOMES = {
    "LayerChoice": "selection",
    "LayerFeatures": "features",
    "Manifest": "manifests",
    "Placement": "placement",
    "UserError": "errors",
    "explore": "plots.explore",
    "extract": "models",
    "load_model": "models",
    "open_run": "study",
    "predict": "selection",
    "read_scores": "scores",
    "read_study": "study",
    "run_study": "study",
    "score": "scores",
    "select": "selection",
    "write_report": "report",
    "write_scores": "scores",
    "metrics": "",
    "models": "",
    "plots": "",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'vlmlayers' has no attribute {name!r}")
    home = _HOMES[name]
    module = import_module(f"vlmlayers.{home or name}")
    value = getattr(module, name) if home else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
