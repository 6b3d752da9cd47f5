"""One training step of MMA: ours against a plain transcription of the public recipe.

    python benchmarks/training.py [--rounds N] [--architecture NAME] [--placements 5,9]

ViT-B/16 size with random weights, batch 16, the prompts of 50 classes of Caltech101. All sides get
the same images, labels and adapter and take turns; their losses are compared. Decoding and
augmenting are not in the step: they are the same for every side. Views: `fresh` computes the
frozen blocks of the vision tower at every step, `cached` has their activations from an earlier
epoch. `ours, torch's products` switches off the saving `onednn`, whose worth depends on the
processor. `ratio` is the median over rounds of wall time public / ours, `cpu_ratio` the same in
processor time, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import open_clip
import torch
from common import machine, peak_mib, reset_peak, write_table
from public_recipe import PublicMMA
from torch import Tensor
from torch.nn import functional as F

from vlmadapters.clip.frozen import Backbone
from vlmadapters.clip.savings import Savings
from vlmadapters.data.prompts import class_prompts
from vlmadapters.methods.mma.config import MMAConfig
from vlmadapters.methods.mma.module import new_adapter
from vlmlayers.models.load import build_clip

BATCH, ARCHITECTURE, TEMPLATE = 16, "ViT-B-16-quickgelu", "a photo of a {}."
PUBLIC, OURS, PLAIN = "public recipe", "ours", "ours, torch's products"
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


@dataclass
class Side:
    """One of the steps compared, and what was measured of it."""

    name: str
    views: str
    step: Callable[[], float]
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def run(self, wait: Callable[[], None]) -> None:
        """Make one update and note its time and loss."""
        wall, cpu = time.perf_counter(), time.process_time()
        loss = self.step()
        wait()
        self.seconds.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)
        self.losses.append(loss)


def stepper(logits: Callable[[], Tensor], parameters: list[Any], labels: Tensor) -> Any:
    """Return one update: forward, backward, SGD of the published recipe."""
    optimizer = torch.optim.SGD(parameters, lr=0.0015, momentum=0.9, weight_decay=5e-4)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(logits().float(), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def public_side(clip: Any, config: MMAConfig, data: tuple[Tensor, ...], cast: Any) -> Side:
    """Return the step of the public recipe, which knows no cached views."""
    images, labels, tokens = data
    public, start = PublicMMA(clip, config).to(images.device), new_adapter(clip, config)
    parameters = public.adapter_parameters()
    with torch.no_grad():
        for name, value in start.official_state_dict().items():
            parameters[name].copy_(value)

    def logits() -> Tensor:
        with cast():
            found: Tensor = public(images, tokens)
        return found

    return Side(PUBLIC, "fresh", stepper(logits, list(parameters.values()), labels))


def our_side(
    name: str, views: str, clip: Any, config: MMAConfig, data: tuple[Tensor, ...], cast: Any
) -> Side:
    """Return our step from the same initial adapter."""
    images, labels, tokens = data
    adapter, backbone = new_adapter(clip, config), Backbone(clip, Savings(onednn=name != PLAIN))
    first = config.vision[0]
    with cast():
        prompts = backbone.prompts(tokens, [first])[first]
        kept = backbone.images(images, [first])[first]

    def logits() -> Tensor:
        with cast():
            state = kept if views == "cached" else backbone.images(images, [first])[first]
            return backbone.logits(state, prompts, adapter)

    return Side(name, views, stepper(logits, list(adapter.parameters()), labels))


def peak(step: Callable[[], Any], device: str) -> float:
    """Return the peak memory of one run in MiB: allocated on a GPU, resident on a CPU."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() / 2**20
    reset_peak()
    step()
    return peak_mib()


def compare(
    architecture: dict[str, Any], first: int, precision: str, device: str, rounds: int
) -> list[dict[str, Any]]:
    """Measure every side of one placement in turn; return a row for each."""
    generator = torch.Generator().manual_seed(0)
    clip: Any = build_clip(architecture, device=device)
    size = clip.visual.image_size
    images = torch.randn(BATCH, 3, *size, generator=generator).to(device)
    labels = torch.randint(0, len(CLASSES), (BATCH,), generator=generator).to(device)
    tokens = open_clip.tokenize(class_prompts(CLASSES, TEMPLATE)).to(device)
    cast: Any = nullcontext
    if precision != "fp32":
        cast = lambda: torch.autocast(device, dtype=torch.bfloat16)  # noqa: E731
    given = clip, MMAConfig.span(first, 12), (images, labels, tokens), cast
    names = (OURS, PLAIN) if device == "cpu" else (OURS,)
    ours = [our_side(name, views, *given) for name in names for views in ("fresh", "cached")]
    sides = [public_side(*given), *ours]
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for number in range(rounds + 1):  # the first round warms up
        for side in sides if number % 2 else reversed(sides):
            side.run(wait)
    where = {
        "placement": given[1].placement, "precision": precision,
        "batch": BATCH, "classes": len(CLASSES), "rounds": rounds,
    }  # fmt: skip
    return [row(side, sides[0], device) | where | machine(device) for side in sides]


def row(side: Side, public: Side, device: str, batch: int = BATCH) -> dict[str, Any]:
    """Return what was measured of one side, beside the public recipe."""
    middle = statistics.median(side.seconds[1:])
    ratios = [a / b for a, b in zip(public.seconds[1:], side.seconds[1:])]
    cpu = [a / b for a, b in zip(public.cpu[1:], side.cpu[1:])]
    difference = max(abs(a - b) for a, b in zip(side.losses, public.losses))
    made = {
        "side": side.name, "views": side.views, "seconds": round(middle, 4),
        "images_per_second": round(batch / middle, 2),
        "ratio": round(statistics.median(ratios), 2), "ratio_low": round(min(ratios), 2),
        "ratio_high": round(max(ratios), 2), "cpu_ratio": round(statistics.median(cpu), 2),
        "peak_mib": round(peak(side.step, device)),
        "largest_loss_difference": f"{difference:.1e}",
    }  # fmt: skip
    print(made, flush=True)
    return made


def main() -> None:
    """Measure on the GPU where there is one, else on the CPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--architecture", default=ARCHITECTURE)
    parser.add_argument("--placements", default="5,9", help="first adapted blocks; up to 12")
    asked = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precisions = ("fp32", "bf16") if device == "cuda" else ("fp32",)
    architecture = open_clip.get_model_config(asked.architecture)
    rows = [
        {"model": asked.architecture, **made}
        for precision in precisions
        for first in map(int, asked.placements.split(","))
        for made in compare(architecture, first, precision, device, asked.rounds)
    ]
    write_table(f"training_{device}", rows)


if __name__ == "__main__":
    main()
