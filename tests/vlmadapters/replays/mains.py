"""Recorded runs of CLIP-Adapter, CLIP-LoRA, LwEIB and PromptSRC: a main run, some with variants."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from golden import Check, Recording
from replays.runs import Run, runs_of, sgd

from vlmadapters.data.task import Task
from vlmadapters.methods.cliplora import CLIPLoRA
from vlmadapters.methods.configs import blocks_to
from vlmadapters.methods.deep_configs import LwEIBConfig, PromptSRCConfig
from vlmadapters.methods.head_configs import CLIPAdapterConfig
from vlmadapters.training.recipes import TrainConfig

# Logits are a hundred times the cosines. In double precision the losses lie up to 1.3e-5 from the
# record, which is its own rounding, and a second implementation reached 2e-5 (the fact sheet).
LORA_TOLERANCES = {"logits": 5e-5, "training logits": 5e-5, "losses": 2e-5}
PROMPTSRC_PARTS = {name: name for name in ("cross_entropy", "text", "image", "logits")}
Hyper = Mapping[str, Any]


def replay(recording: Recording) -> Iterator[Check]:
    """Yield the checks of a file."""
    info = recording.info
    method = info["method"].lower().replace("-", "").replace("_", "")
    for name, prefix, hyper, start in runs_of(recording):
        task = Task(tuple(info["classes"]))
        made = {"name": name, "prefix": prefix, "task": task, "start": start}
        made |= MAKERS[method](recording, prefix, hyper)
        yield from Run(recording, **made).checks()


def clipadapter(recording: Recording, prefix: str, hyper: Hyper) -> dict[str, Any]:
    """Return what is known of CLIP-Adapter's run."""
    info = recording.info
    return {
        "config": CLIPAdapterConfig(ratio=hyper["ratio"], reduction=hyper["reduction"]),
        "task": Task(tuple(info["classes"]), own_template=info["template"]),
        "train": sgd(hyper, epochs=hyper["max_epoch"]),
    }


def cliplora(recording: Recording, prefix: str, hyper: Hyper) -> dict[str, Any]:
    """Return what is known of a run of CLIP-LoRA; names of what is trained tell blocks and maps."""
    info = recording.info
    start = recording.group("variant_init/" if prefix else "init/")
    trained = {key: start[key] for key in recording.group(f"{prefix}grad/")}
    found: Any = CLIPLoRA.config_of_official(trained, str(recording.path))
    assert (found.rank, set(found.matrices)) == (hyper["r"], set(hyper["params"]))
    dropped = hyper["dropout_p_at_run"] == "module"
    kept = {  # which inputs of each map dropout kept, (token, item, width)
        name: torch.from_numpy(np.unpackbits(packed.numpy(), axis=-1)).bool()
        for name, packed in recording.group(f"{prefix}keep_mask/").items()
    }
    return {
        "config": replace(
            found,
            alpha=hyper["alpha"],
            dropout=hyper["dropout_rate"] if dropped else 0.0,
            as_published=not hyper["dropout_rate"],
        ),
        "task": Task(tuple(info["classes"]), info["template"]),
        "train": TrainConfig(
            optimizer="adamw",
            lr=hyper["lr"],
            weight_decay=0.01,
            schedule="step",
            final_lr=1e-6,
            epochs=hyper["total_iters"],
        ),
        "start": start,
        "draws": lambda step: kept if dropped else None,
        "tolerances": LORA_TOLERANCES,
    }


def lweib(recording: Recording, prefix: str, hyper: Hyper) -> dict[str, Any]:
    """Return what is known of a run of LwEIB."""
    info = recording.info
    blocks = tuple(range(hyper["adapter_start"], hyper["adapter_end"] + 1))
    described = tuple((name, tuple(texts)) for name, texts in info["descriptions"].items())
    template = f"{hyper['text_ctx_init']} {{}}."
    return {
        "config": LwEIBConfig(
            blocks,
            blocks,
            alpha=hyper["adapter_scale"],
            factor=hyper["adapter_scale_factor"],
            negatives=max(hyper["neg_sampling_ratio"], -1),
        ),
        "task": Task(tuple(info["classes"]), template=template, descriptions=described),
        "train": sgd(hyper, epochs=hyper["max_epoch"]),
        "draws": lambda step: recording.group(f"{prefix}draws/{step}/"),
    }


def promptsrc(recording: Recording, prefix: str, hyper: Hyper) -> dict[str, Any]:
    """Return what is known of a run of PromptSRC."""
    length = hyper["n_ctx_text"]
    return {
        "config": PromptSRCConfig(
            blocks_to(hyper["depth_vision"]),
            blocks_to(hyper["depth_text"]),
            vision_length=hyper["n_ctx_vision"] or 1,
            text_length=length,
            words=hyper["ctx_init"] if length <= 4 else "",
            text_weight=hyper["text_loss_weight"],
            image_weight=hyper["image_loss_weight"],
            templates=tuple(recording.info["templates"]),
            centre=hyper["gpa_mean"],
            spread=hyper["gpa_std"],
        ),
        "train": sgd(
            hyper,
            epochs=hyper["max_epoch"],
            warmup_epochs=hyper["warmup_epoch"],
            warmup_lr=hyper["warmup_lr"],
        ),
        "steps_per_epoch": recording.info["steps_per_epoch"],
        "parts": PROMPTSRC_PARTS,
    }


MAKERS = {
    "clipadapter": clipadapter,
    "cliplora": cliplora,
    "lweib": lweib,
    "promptsrc": promptsrc,
}
