"""What each placement costs: parameters, time and memory of one training step per start block.

    python benchmarks/cost.py [--model NAME …] [--starts 1,5,9] [--steps N]

Spans from a start block to the last block of both towers, our trainer's step, the recipe's batch of
16. Every placement is measured in a process of its own, whose peak memory holds weights, frozen
activations and the step. The architectures have random weights: cost does not depend on them.
Figure 6 reads the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import open_clip
import torch
from common import machine, write_table
from training import BATCH, CLASSES, TEMPLATE, peak, stepper

from vlmadapters.clip.frozen import Backbone
from vlmadapters.methods.mma.config import MMAConfig
from vlmadapters.methods.mma.module import new_adapter
from vlmlayers.models.load import build_clip, load_model
from vlmlayers.prompts import class_prompts

MODELS = ("mini-clip", "ViT-B-16-quickgelu")


def build(name: str, device: str) -> tuple[Any, Any, int, str]:
    """Return the model, its tokenizer, the side of its images, and what its weights are."""
    if name == "mini-clip":
        loaded = load_model(name, device=device)
        return loaded.clip, loaded.tokenizer, loaded.image_size, loaded.weights
    clip = build_clip(open_clip.get_model_config(name), device=device)
    return clip, open_clip.tokenize, 224, "random"


def measure(name: str, start: int, steps: int) -> dict[str, Any]:
    """Return the cost of the span from `start` to the last block, median over `steps`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    clip, tokenizer, side, weights = build(name, device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, side, side, generator=generator).to(device)
    labels = torch.randint(0, len(CLASSES), (BATCH,), generator=generator).to(device)
    backbone = Backbone(clip)
    config = MMAConfig.span(start, 12)
    adapter = new_adapter(clip, config)
    tokens = tokenizer(class_prompts(CLASSES, TEMPLATE)).to(device)
    prompts = backbone.prompts(tokens, [start])[start]

    def logits() -> torch.Tensor:
        return backbone.logits(backbone.images(images, [start])[start], prompts, adapter)

    step = stepper(logits, list(adapter.parameters()), labels)
    step()
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    return {
        "model": name, "weights": weights, "placement": config.placement,
        "parameters": adapter.parameter_count(),
        "step_ms": round(1000 * statistics.median(seconds), 1),
        "memory_mib": round(peak(step, device)), "batch": BATCH, "classes": len(CLASSES),
        "steps": steps, **machine(device),
    }  # fmt: skip


def main() -> None:
    """Measure every placement of every model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="+", default=list(MODELS))
    parser.add_argument("--starts", default="1,2,3,4,5,6,7,8,9,10,11,12")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    starts = [int(start) for start in given.starts.split(",")]
    if given.one:
        print(json.dumps(measure(given.model[0], starts[0], given.steps)))
        return
    rows = []
    for model in given.model:
        for start in starts:
            command = [sys.executable, __file__, "--one", "--model", model,
                       "--starts", str(start), "--steps", str(given.steps)]  # fmt: skip
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(*(rows[-1][key] for key in ("model", "placement", "step_ms", "memory_mib")),
                  flush=True)  # fmt: skip
    write_table(f"cost_{rows[0]['device']}", rows)


if __name__ == "__main__":
    main()
