"""Open_clip models: load them, find their towers, record every position.

This is the only part of `vlmlayers` that imports torch.
"""

from __future__ import annotations

from vlmlayers.models.check import models_check, summary
from vlmlayers.models.estimate import estimate
from vlmlayers.models.examine import examine
from vlmlayers.models.extract import extract
from vlmlayers.models.load import list_models, load_model, wrap_model
from vlmlayers.models.recording import Recorder
from vlmlayers.models.residual import contributions
from vlmlayers.models.stream import stream
from vlmlayers.models.towers import Tower, find_towers
from vlmlayers.models.vlm import VLM

__all__ = [
    "VLM",
    "Recorder",
    "Tower",
    "contributions",
    "estimate",
    "examine",
    "extract",
    "find_towers",
    "list_models",
    "load_model",
    "models_check",
    "stream",
    "summary",
    "wrap_model",
]
