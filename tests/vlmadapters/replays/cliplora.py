"""Replay of recorded runs of CLIP-LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from golden import Check, Recording
from replays.runs import MAIN, Run, runs_of
from torch import Tensor

from vlmadapters.data.task import Task
from vlmadapters.methods.cliplora import CLIPLoRA
from vlmadapters.methods.configs import CLIPLoRAConfig
from vlmadapters.training.recipes import TrainConfig

# Logits are a hundred times the cosines. In double precision the losses lie up to 1.3e-5 from the
# record, which is its own rounding, and a second implementation reached 2e-5 (the fact sheet).
TOLERATED = {"logits": 5e-5, "losses": 2e-5}


def replay(recording: Recording) -> Iterator[Check]:
    """Yield the checks of a file; names of what is trained tell blocks and matrices."""
    info = recording.info
    task = Task(tuple(info["classes"]), info["template"])
    for name, hyper, start in runs_of(recording):
        prefix = "" if name == MAIN else f"variant/{name}/"
        start = start if name == MAIN else recording.group("variant_init/")
        trained = {key: start[key] for key in recording.group(f"{prefix}grad/")}
        found = CLIPLoRA.config_of_official(trained, str(recording.path))
        assert isinstance(found, CLIPLoRAConfig)
        assert (found.rank, set(found.matrices)) == (hyper["r"], set(hyper["params"]))
        dropped = hyper["dropout_p_at_run"] == "module"
        config = replace(
            found,
            alpha=hyper["alpha"],
            dropout=hyper["dropout_rate"] if dropped else 0.0,
            as_published=not hyper["dropout_rate"],
        )
        train = TrainConfig(
            optimizer="adamw",
            lr=hyper["lr"],
            weight_decay=0.01,
            schedule="step",
            final_lr=1e-6,
            epochs=hyper["total_iters"],
        )
        kept = _kept(recording, f"{prefix}keep_mask/") if dropped else None
        draws = None if kept is None else lambda step, kept=kept: kept
        run = Run(recording, name, config, task, train, start, draws=draws, tolerances=TOLERATED)
        yield from run.checks()


def _kept(recording: Recording, prefix: str) -> Mapping[str, Tensor]:
    """Return which inputs of each map dropout kept, (token, item, width)."""
    return {
        name: torch.from_numpy(np.unpackbits(packed.numpy(), axis=-1)).bool()
        for name, packed in recording.group(prefix).items()
    }
