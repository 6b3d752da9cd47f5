"""Replay of recorded runs of LASP."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from golden import Check, Recording
from replays.steps import Variant
from torch import Tensor

from vlmadapters.data.task import Task
from vlmadapters.methods.configs import LASPConfig

PARTS = {"cross_entropy": "ce", "text_to_text": "t2t"}
CLIPPED = 1.0  # norm of the gradients under amp, and there alone


def replay(recording: Recording) -> Iterator[Check]:
    """Yield the checks of a file."""
    depth = recording.info["model_cfg"]["vision_cfg"]["layers"]
    for name, variant in recording.info["variants"].items():
        hyper = variant["hyper"]
        words = hyper["CTX_INIT"] or ""
        config = LASPConfig(
            tuple(range(1, depth + 1)) if hyper["FINETUNE_VIT_LN"] else (),
            words=words,
            length=0 if words else hyper["N_CTX"],
            correction=hyper["ENABLE_CORRECTION"],
            weight=hyper["LASP_LOSS_WEIGHT"] if hyper["ENABLE"] else 0.0,
            templates=tuple(hyper["LASP_PROMPTS"]),
            other_names="virtual" if hyper["INCLUDE_ALL_CLASSES"] else "text",
            as_published=True,
        )
        tasks = (_task(variant, key) for key in ("classes", "novel_classes"))
        yield from Variant(
            recording,
            name,
            config,
            *tasks,
            PARTS,
            partial(_draws, recording, name),
            CLIPPED if hyper["PREC"] == "amp" else 0.0,
        ).checks()


def _task(variant: Mapping[str, Any], key: str) -> Task:
    own = tuple(variant[key])
    return Task(own, other_names=tuple(n for n in variant["all_classes"] if n not in own))


def _draws(recording: Recording, name: str, number: int) -> dict[str, Tensor]:
    """Return a step's noise, with the classes trained on before the others."""
    if not bool(recording.tensor(f"{name}/noise_applied")[number]):
        return {}
    variant = recording.info["variants"][name]
    task, recorded = _task(variant, "classes"), variant["all_classes"]
    order = [recorded.index(one) for one in (*task.class_names, *task.other_names)]
    return {"noise": recording.tensor(f"{name}/noise_unit")[number][:, torch.tensor(order)]}
