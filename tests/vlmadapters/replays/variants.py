"""Recorded runs of IVLP, LASP, MaPLe and RPO, whose files hold variants with settings of their own.

They are replayed in double precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from golden import Check, Recording
from replays.runs import Run, sgd
from torch import Tensor

from vlmadapters.data.task import Task
from vlmadapters.methods.config import MethodConfig
from vlmadapters.methods.configs import LASPConfig, blocks_to
from vlmadapters.methods.deep_configs import IVLPConfig, MaPLeConfig, RPOConfig

Hyper = Mapping[str, Any]
PARTS = {"cross_entropy": "ce", "text_to_text": "t2t"}


def replay(recording: Recording) -> Iterator[Check]:
    """Yield the checks of a file."""
    method = recording.info["method"].lower()
    for name, variant in recording.info["variants"].items():
        hyper = variant["hyper"]
        # LASP clips the norm of gradients under amp, and there alone.
        max_norm = 1.0 if hyper["PREC"] == "amp" else 0.0
        recorded = recording.group(f"{name}/loss_parts/")
        yield from Run(
            recording,
            name,
            f"{name}/",
            SETTINGS[method](hyper, recording.info["model_cfg"]),
            _task(variant, "classes"),
            sgd(variant["optimizer"], schedule="constant", max_norm=max_norm),
            recording.group(f"{name}/init/"),
            _task(variant, "novel_classes"),
            {own: f"loss_parts/{key}" for own, key in PARTS.items() if key in recorded},
            partial(_draws, recording, name),
            precision=torch.float64,
        ).checks()


def ivlp(hyper: Hyper, towers: Any) -> IVLPConfig:
    """Return the settings of a variant of IVLP or of one of its controls."""
    length = hyper.get("N_CTX_TEXT", 0)
    return IVLPConfig(
        blocks_to(hyper["PROMPT_DEPTH_VISION"]),
        blocks_to(hyper.get("PROMPT_DEPTH_TEXT", 0)),
        vision_length=hyper["N_CTX_VISION"] or 1,
        text_length=length or 1,
        words=hyper["CTX_INIT"] if length <= 4 else "",
    )


def lasp(hyper: Hyper, towers: Any) -> LASPConfig:
    """Return the settings of a variant of LASP."""
    words = hyper["CTX_INIT"] or ""
    return LASPConfig(
        blocks_to(towers["vision_cfg"]["layers"]) if hyper["FINETUNE_VIT_LN"] else (),
        words=words,
        length=0 if words else hyper["N_CTX"],
        correction=hyper["ENABLE_CORRECTION"],
        weight=hyper["LASP_LOSS_WEIGHT"] if hyper["ENABLE"] else 0.0,
        templates=tuple(hyper["LASP_PROMPTS"]),
        other_names="virtual" if hyper["INCLUDE_ALL_CLASSES"] else "text",
        as_published=True,
    )


def maple(hyper: Hyper, towers: Any) -> MaPLeConfig:
    """Return the settings of a variant of MaPLe."""
    blocks, length = blocks_to(hyper["PROMPT_DEPTH"]), hyper["N_CTX"]
    return MaPLeConfig(blocks, blocks, length=length, words=hyper["CTX_INIT"] * (length <= 4))


def rpo(hyper: Hyper, towers: Any) -> RPOConfig:
    """Return the settings of a variant of RPO."""
    depths = {name: towers[f"{name}_cfg"]["layers"] for name in ("vision", "text")}
    return RPOConfig.published(depths, pairs=hyper["K"], as_published=True)


SETTINGS: dict[str, Callable[[Hyper, Any], MethodConfig]] = {
    "ivlp": ivlp,
    "lasp": lasp,
    "maple": maple,
    "rpo": rpo,
}


def _task(variant: Mapping[str, Any], key: str) -> Task:
    own = tuple(variant[key])
    names = variant.get("all_classes", [*variant["classes"], *variant["novel_classes"]])
    template = variant["hyper"].get("PROMPT", "a photo of a _.").replace("_", "{}")
    return Task(own, template, other_names=tuple(name for name in names if name not in own))


def _draws(recording: Recording, name: str, number: int) -> dict[str, Tensor]:
    """Return LASP's noise of a step, with the classes trained on before the others."""
    key = f"{name}/noise_applied"
    if key not in recording or not bool(recording.tensor(key)[number]):
        return {}
    variant = recording.info["variants"][name]
    task, recorded = _task(variant, "classes"), variant["all_classes"]
    order = [recorded.index(one) for one in (*task.class_names, *task.other_names)]
    return {"noise": recording.tensor(f"{name}/noise_unit")[number][:, torch.tensor(order)]}
