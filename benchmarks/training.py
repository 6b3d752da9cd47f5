"""One training step of MMA: ours against a plain transcription of the public recipe.

    python benchmarks/training.py [--rounds N] [--architecture NAME] [--placements 5,9]

On a GPU in fp32, fp16 (with loss scaling, as published) and bf16, with our step also `recorded` as
a CUDA graph. The public recipe reads its loss at every step, ours does not.

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
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
from common import machine, peak_mib, replace_rows, reset_peak
from public_recipe import PublicMMA
from torch import Tensor
from torch.nn import functional as F

from vlmadapters.clip.frozen import Backbone
from vlmadapters.clip.savings import Savings
from vlmadapters.device import precision_of
from vlmadapters.methods.mma.config import MMAConfig
from vlmadapters.methods.mma.module import new_adapter
from vlmadapters.training.graphs import WARM_UP, StepGraph
from vlmadapters.training.optimization import new_optimizer
from vlmadapters.training.recipes import TrainConfig
from vlmlayers.models.load import build_clip
from vlmlayers.prompts import class_prompts

BATCH, ARCHITECTURE, TEMPLATE = 16, "ViT-B-16-quickgelu", "a photo of a {}."
PUBLIC, OURS, PLAIN = "public recipe", "ours", "ours, torch's products"
RECORDED = "ours, recorded"
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
    step: Callable[[], Any]
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    losses: list[Any] = field(default_factory=list)

    def run(self, wait: Callable[[], None]) -> None:
        """Make one update and note its time and loss."""
        wall, cpu = time.perf_counter(), time.process_time()
        loss = self.step()
        wait()
        self.seconds.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)
        self.losses.append(loss)

    def forget_times(self) -> None:
        """Drop the times measured so far, which warmed up; losses stay, to be compared."""
        self.seconds.clear()
        self.cpu.clear()


def stepper(
    logits: Callable[[], Tensor],
    parameters: list[Any],
    labels: Tensor,
    precision: str = "fp32",
    optimizer: torch.optim.Optimizer | None = None,
) -> Any:
    """Return one update: forward, backward, SGD; an optimizer of ours comes without reading."""
    reads = optimizer is None
    used = optimizer or torch.optim.SGD(parameters, lr=0.0015, momentum=0.9, weight_decay=5e-4)
    _, scaler = precision_of(precision, labels.device)

    def step() -> Any:
        used.zero_grad(set_to_none=True)
        loss = F.cross_entropy(logits().float(), labels)
        scaler.scale(loss).backward()
        scaler.step(used)
        scaler.update()
        return loss.item() if reads else loss.detach()

    return step


def public_side(clip: Any, config: MMAConfig, data: tuple[Tensor, ...], precision: str) -> Side:
    """Return the step of the public recipe, which knows no cached views."""
    cast, _ = precision_of(precision, data[0].device)
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

    return Side(PUBLIC, "fresh", stepper(logits, list(parameters.values()), labels, precision))


def our_side(
    name: str, views: str, clip: Any, config: MMAConfig, data: tuple[Tensor, ...], precision: str
) -> Side:
    """Return our step from the same initial adapter."""
    images, labels, tokens = data
    cast, _ = precision_of(precision, images.device)
    adapter, backbone = new_adapter(clip, config), Backbone(clip, Savings(onednn=name != PLAIN))
    first = config.vision[0]
    with cast():
        prompts = backbone.prompts(tokens, [first])[first]
        kept = backbone.images(images, [first])[first]

    def logits() -> Tensor:
        with cast():
            state = kept if views == "cached" else backbone.images(images, [first])[first]
            return backbone.logits(state, prompts, adapter)

    train = TrainConfig(precision=precision, cuda_graph=name == RECORDED)
    optimizer = new_optimizer(adapter.parameter_groups(), train)
    step = stepper(logits, [], labels, precision, optimizer)
    if name != RECORDED:
        return Side(name, views, step)
    graph = StepGraph()

    def replayed() -> Tensor:
        return graph.run(lambda _: [step()], labels)[0]

    return Side(name, views, replayed)


def architecture_of(name: str) -> dict[str, Any]:
    """Return an architecture of open_clip, or of a JSON file."""
    if name.endswith(".json"):
        found: dict[str, Any] = json.loads(Path(name).read_text(encoding="utf-8"))
        return found
    return dict(open_clip.get_model_config(name))


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
    clip.requires_grad_(False)
    given = clip, MMAConfig.span(first, 12), (images, labels, tokens), precision
    names = (OURS, PLAIN) if device == "cpu" else (OURS, RECORDED)
    ours = [our_side(name, views, *given) for name in names for views in ("fresh", "cached")]
    sides = [public_side(*given), *ours]
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    # Rounds that warm up: on a GPU those before a recording, and that of the recording.
    warm = WARM_UP + 1 if device == "cuda" else 1
    for number in range(-warm, rounds):
        for side in sides if number % 2 else reversed(sides):
            if not number:
                side.forget_times()
            side.run(wait)
    where = {
        "placement": given[1].placement, "precision": precision,
        "batch": BATCH, "classes": len(CLASSES), "rounds": rounds,
    }  # fmt: skip
    return [row(side, sides[0], device) | where | machine(device) for side in sides]


def row(side: Side, public: Side, device: str, batch: int = BATCH) -> dict[str, Any]:
    """Return what was measured of one side, beside the public recipe."""
    middle = statistics.median(side.seconds)
    ratios = [a / b for a, b in zip(public.seconds, side.seconds)]
    cpu = [a / b for a, b in zip(public.cpu, side.cpu)]
    difference = max(abs(float(a) - float(b)) for a, b in zip(side.losses, public.losses))
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
    precisions = ("fp32", "fp16", "bf16") if device == "cuda" else ("fp32",)
    architecture = architecture_of(asked.architecture)
    rows = [
        {"model": asked.architecture, **made}
        for precision in precisions
        for first in map(int, asked.placements.split(","))
        for made in compare(architecture, first, precision, device, asked.rounds)
    ]
    # What pays depends on the processor.
    replace_rows(f"training_{device}", rows, by=("model", "placement"))


if __name__ == "__main__":
    main()
