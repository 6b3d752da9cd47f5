"""Recording every position against a bare encode, one pass per layer, and full-length text.

    python benchmarks/extraction.py [cpu|cuda] [--pairs N] [--batch N] [--model NAME]

ViT-B-32 at 224 px with random weights, on a GPU in fp32, fp16 and bf16. Tensors are made
beforehand, so that decoding is outside.
Writes benchmarks/results/extraction-<device>.csv. Memory is measured in processes of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from typing import Any

import torch
from common import Pair, machine, measure_pair, peak_mib, reset_peak, resident_mib, write_table

from vlmlayers.models import VLM, Recorder, load_model
from vlmlayers.models.recording import block_outputs
from vlmlayers.models.work import autocast

MODEL = "ViT-B-32"
SPACES = ("native", "joint")
# glibc then gives each tensor pages of its own and returns them at once, so that the resident set
# of a CPU run is what is alive and not what the heap holds back in gaps.
RETURN_PAGES = {"MALLOC_MMAP_THRESHOLD_": "32768", "MALLOC_TRIM_THRESHOLD_": "32768"}
NAMES = (
    "airplane",
    "brown bear",
    "castle",
    "digital watch",
    "espresso",
    "fountain pen",
    "grand piano",
    "hot air balloon",
)


def load(name: str, device: str) -> VLM:
    return load_model(name, random_weights=name != "mini-clip", device=device)


def images(model: VLM, batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    size = model.image_size
    return torch.randn(batch, 3, size, size, generator=generator).to(model.device)


def bare(model: VLM, batch: torch.Tensor) -> None:
    with torch.inference_mode():
        model.clip.encode_image(batch).cpu()  # type: ignore[operator]


def one_pass_per_layer(model: VLM, batch: torch.Tensor) -> None:
    """Record each block by a forward pass of its own, as one module name at a time is asked for."""
    tower = model.towers["vision"]
    for position in range(1, tower.depth + 1):
        kept: dict[str, torch.Tensor] = {}

        def look(where: str, x: torch.Tensor, wanted: str = str(position)) -> None:
            if where == wanted:
                kept[where] = x[:, 0].cpu()  # noqa: B023 called within the same pass

        with torch.inference_mode(), block_outputs(tower, look):
            tower.run(batch)


def row(
    work: str, against: str, pair: Pair, goal: str, direction: str, **more: Any
) -> dict[str, Any]:
    """Return one line; `ratio` reads as the goal does: cost, or how many times faster."""
    low, high = pair.spread
    ratio = pair.ratio
    if direction == "faster":
        ratio, low, high = 1 / ratio, 1 / high, 1 / low
    return {
        "work": work,
        "against": against,
        "quantity": "time",
        "ratio": round(ratio, 3),
        "ratio_q1": round(low, 3),
        "ratio_q3": round(high, 3),
        "goal": goal,
        "seconds": round(sorted(pair.ours)[len(pair.ours) // 2], 4),
        "seconds_against": round(sorted(pair.other)[len(pair.other) // 2], 4),
        "pairs": len(pair.ours),
        **more,
    }


def times(name: str, device: str, pairs: int, batch: int) -> list[dict[str, Any]]:
    """Compare times in every precision that suits the device."""
    model = load(name, device)
    rows = []
    for precision in ("fp32", "fp16", "bf16") if device == "cuda" else ("fp32",):
        with autocast(model.device, precision):
            made = times_of(model, device, pairs, batch)
        rows += [{**row, "precision": precision} for row in made]
    return rows


def times_of(model: VLM, device: str, pairs: int, batch: int) -> list[dict[str, Any]]:
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    x = images(model, batch)
    rows = []
    recorder = Recorder(model.towers["vision"], SPACES)

    def record() -> None:
        with recorder:
            recorder(x)

    found = measure_pair(record, lambda: bare(model, x), pairs=pairs, wait=wait)
    rows.append(
        row("all positions, one pass", "bare encode", found, "<= 1.05", "cost", batch=batch)
    )
    few = max(2, pairs // 4)
    found = measure_pair(record, lambda: one_pass_per_layer(model, x), pairs=few, wait=wait)
    rows.append(
        row("all positions, one pass", "one pass per block", found, ">= 10", "faster", batch=batch)
    )
    ids = model.tokenizer([f"a photo of a {name}." for name in NAMES] * (batch // len(NAMES)))
    ids = ids.to(device)
    tower = model.towers["text"]

    def short() -> None:
        with torch.inference_mode():
            tower.run(tower.cut(ids)).cpu()

    def full() -> None:
        with torch.inference_mode():
            model.clip.encode_text(ids).cpu()  # type: ignore[operator]

    found = measure_pair(short, full, pairs=pairs, wait=wait)
    rows.append(
        row(
            "short prompts, cut",
            "77 tokens",
            found,
            ">= 4",
            "faster",
            batch=len(ids),
            tokens=int(tower.cut(ids).shape[1]),
        )
    )
    texts = Recorder(tower, SPACES)

    def record_text() -> None:
        with texts:
            texts(ids)

    found = measure_pair(record_text, full, pairs=pairs, wait=wait)
    rows.append(
        row(
            "short prompts, cut, all positions",
            "77 tokens, bare",
            found,
            ">= 4",
            "faster",
            batch=len(ids),
            tokens=int(tower.cut(ids).shape[1]),
        )
    )
    return rows


def memory(name: str, device: str, batch: int) -> list[dict[str, Any]]:
    """Compare peaks: of the whole process, and of what is added to the loaded model."""
    found = {}
    for work in ("record", "bare"):
        command = [sys.executable, __file__, device, "--batch", str(batch), "--memory", work,
                   "--model", name]  # fmt: skip
        output = subprocess.run(
            command, check=True, capture_output=True, text=True, env={**os.environ, **RETURN_PAGES}
        ).stdout
        found[work] = json.loads(output.splitlines()[-1])
    return [
        {
            "work": "all positions, one pass",
            "against": "bare encode",
            "quantity": quantity,
            "ratio": round(found["record"][quantity] / found["bare"][quantity], 3),
            "goal": "<= 1.10",
            "mib": round(found["record"][quantity], 1),
            "mib_against": round(found["bare"][quantity], 1),
            "batch": batch,
            "precision": "fp32",
        }
        for quantity in ("peak memory", "peak memory above the model")
    ]


def peak_of(work: str, name: str, device: str, batch: int) -> None:
    """Print the peak memory of a few batches of one kind of work."""
    model = load(name, device)
    x = images(model, batch)
    recorder = Recorder(model.towers["vision"], SPACES)  # probes with two images

    def run() -> None:
        if work == "bare":
            bare(model, x)
        else:
            with recorder:
                recorder(x)

    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated() / 2**20
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            run()
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        reset_peak()
        before = resident_mib()
        for _ in range(3):
            run()
        peak = peak_mib()
    print(json.dumps({"peak memory": peak, "peak memory above the model": peak - before}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("device", nargs="?", default=default, choices=("cpu", "cuda"))
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--memory", choices=("record", "bare"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        peak_of(options.memory, options.model, options.device, options.batch)
        return
    given = options.model, options.device
    rows = times(*given, options.pairs, options.batch) + memory(*given, options.batch)
    place = machine(options.device)
    for line in rows:
        print(
            f"{line['work']} / {line['against']}, {line['quantity']}: {line['ratio']} "
            f"(to reach {line['goal']})"
        )
    write_table(
        f"extraction-{options.device}", [{"model": options.model, **line, **place} for line in rows]
    )


if __name__ == "__main__":
    main()
