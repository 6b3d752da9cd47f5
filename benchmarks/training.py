"""One training step of MMA: ours against a plain transcription of the public recipe.

    python benchmarks/training.py [--pairs N]

ViT-B/16 size with random weights, batch 16, the prompts of 50 classes of Caltech101. Both get the
same images, labels and adapter; the losses are compared. `ratio` is the median over pairs of wall
time public / ours, `cpu_ratio` the same in processor time, which other work on the machine
disturbs less. The public step of 5-12 has no cached row: it has no such option.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import open_clip
import torch
from common import machine, measure_pair, peak_mib, reset_peak, write_table
from public_recipe import PublicMMA
from torch.nn import functional as F

from vlmadapters.config import MMAConfig
from vlmadapters.fewshot import class_prompts
from vlmadapters.frozen import Backbone
from vlmadapters.mma import new_adapter
from vlmlayers.models.load import build_clip

BATCH, ARCHITECTURE, TEMPLATE = 16, "ViT-B-16-quickgelu", "a photo of a {}."
CASES = ((5, "fresh"), (9, "fresh"), (9, "cached"))
# The first 50 classes of Caltech101 by label, as its split file names them.
CLASSES = [
    "face", "leopard", "motorbike", "accordion", "airplane", "anchor", "ant", "barrel", "bass",
    "beaver", "binocular", "bonsai", "brain", "brontosaurus", "buddha", "butterfly", "camera",
    "cannon", "car_side", "ceiling_fan", "cellphone", "chair", "chandelier", "cougar_body",
    "cougar_face", "crab", "crayfish", "crocodile", "crocodile_head", "cup", "dalmatian",
    "dollar_bill", "dolphin", "dragonfly", "electric_guitar", "elephant", "emu", "euphonium",
    "ewer", "ferry", "flamingo", "flamingo_head", "garfield", "gerenuk", "gramophone",
    "grand_piano", "hawksbill", "headphone", "hedgehog", "helicopter",
]  # fmt: skip


def timed(step: Callable[[], float], cpu: list[float], losses: list[float]) -> Callable[[], None]:
    """Return the step with its processor time and loss recorded."""

    def run() -> None:
        start = time.process_time()
        losses.append(step())
        cpu.append(time.process_time() - start)

    return run


def stepper(logits: Callable[[], torch.Tensor], parameters: list[Any], labels: Any) -> Any:
    """Return one update: forward, backward, SGD of the published recipe."""
    optimizer = torch.optim.SGD(parameters, lr=0.0015, momentum=0.9, weight_decay=5e-4)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(logits().float(), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def peak(step: Callable[[], Any], device: str) -> float:
    """Return the peak memory of one run in MiB: allocated on a GPU, resident on a CPU."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() / 2**20
    reset_peak()
    step()
    return peak_mib()


def compare(first: int, views: str, precision: str, device: str, pairs: int) -> list[Any]:
    """Measure both sides of one case; return a row for each."""
    generator = torch.Generator().manual_seed(0)
    clip = build_clip(open_clip.get_model_config(ARCHITECTURE), device=device)
    images = torch.randn(BATCH, 3, 224, 224, generator=generator).to(device)
    labels = torch.randint(0, len(CLASSES), (BATCH,), generator=generator).to(device)
    tokens = open_clip.tokenize(class_prompts(CLASSES, TEMPLATE)).to(device)
    config = MMAConfig.span(first, 12)
    public, ours = PublicMMA(clip, config).to(device), new_adapter(clip, config)
    backbone = Backbone(clip)
    with torch.no_grad():
        for name, parameter in public.adapter_parameters().items():
            parameter.copy_(ours.official_state_dict()[name])
    cast: Any = nullcontext
    if precision != "fp32":
        cast = lambda: torch.autocast(device, dtype=torch.bfloat16)  # noqa: E731
    with cast():
        prompts = backbone.prompts(tokens, [first])[first]
        kept = backbone.images(images, [first])[first]

    def our_logits() -> torch.Tensor:
        with cast():
            state = kept if views == "cached" else backbone.images(images, [first])[first]
            return backbone.logits(state, prompts, ours)

    def public_logits() -> torch.Tensor:
        with cast():
            return public(images, tokens)

    sides = {
        "public recipe": stepper(public_logits, list(public.adapter_parameters().values()), labels),
        "ours": stepper(our_logits, list(ours.parameters()), labels),
    }
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    cpu: dict[str, list[float]] = {side: [] for side in sides}
    losses: dict[str, list[float]] = {side: [] for side in sides}
    runs = {side: timed(step, cpu[side], losses[side]) for side, step in sides.items()}
    pair = measure_pair(runs["ours"], runs["public recipe"], pairs=pairs, wait=wait)
    differ = max(abs(a - b) for a, b in zip(losses["ours"], losses["public recipe"]))
    cpu_ratio = statistics.median(a / b for a, b in zip(cpu["public recipe"], cpu["ours"]))
    low, high = pair.spread
    rows = []
    for side, seconds in (("public recipe", pair.other), ("ours", pair.ours)):
        middle = statistics.median(seconds)
        rows.append({
            "model": ARCHITECTURE, "placement": config.placement, "views": views, "side": side,
            "precision": precision, "batch": BATCH, "classes": len(CLASSES),
            "seconds": round(middle, 4), "images_per_second": round(BATCH / middle, 2),
            "peak_mib": round(peak(sides[side], device)),
            "ratio": round(1 / pair.ratio, 2) if side == "ours" else 1.0,
            "ratio_low": round(1 / high, 2) if side == "ours" else 1.0,
            "ratio_high": round(1 / low, 2) if side == "ours" else 1.0,
            "cpu_ratio": round(cpu_ratio, 2) if side == "ours" else 1.0,
            "largest_loss_difference": f"{differ:.1e}", "pairs": pairs, **machine(device),
        })  # fmt: skip
        print(
            {
                k: rows[-1][k]
                for k in (
                    "placement",
                    "views",
                    "side",
                    "precision",
                    "seconds",
                    "ratio",
                    "cpu_ratio",
                    "peak_mib",
                )
            },
            flush=True,
        )
    return rows


def main() -> None:
    """Measure every case on the CPU, and on the GPU where there is one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    pairs = parser.parse_args().pairs
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precisions = ("fp32", "bf16") if device == "cuda" else ("fp32",)
    rows = [row for precision in precisions for first, views in CASES
            for row in compare(first, views, precision, device, pairs)]  # fmt: skip
    write_table(f"training_{device}", rows)


if __name__ == "__main__":
    main()
