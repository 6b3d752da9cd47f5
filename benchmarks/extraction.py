"""Recording every position against a bare encode, one pass per layer, and full-length text.

    python benchmarks/extraction.py [cpu|cuda] [--pairs N] [--batch N] [--model NAME]
    python benchmarks/extraction.py [cpu|cuda] --files 5000 [--data FOLDER] [--rounds N]

ViT-B-32 at 224 px with random weights, on a GPU in fp32, fp16 and bf16. Tensors are made
beforehand, so that decoding is outside.
Writes benchmarks/results/extraction-<device>.csv. Memory is measured in processes of their own.

With `--files` the whole way instead, from image files to a store on the disk, against decoding
alone and encoding alone, of the same images in turn: extraction_files-<device>.csv. The images are
those of a dataset, or photograph-sized JPEGs made for it. On a CPU both draw on the same cores, so
no overlap hides the smaller of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from common import Pair, machine, measure_pair, peak_mib, replace_rows, reset_peak, resident_mib
from PIL import Image

from vlmlayers.manifests import Item, Manifest
from vlmlayers.models import VLM, Recorder, extract, load_model
from vlmlayers.models.decoding import batches_of, decode, decoding_processes
from vlmlayers.models.devices import casts_kept
from vlmlayers.models.recording import block_outputs
from vlmlayers.models.work import autocast

MODEL = "ViT-B-32"
SPACES = ("native", "joint")
IN_A_ROW = 4  # batches that a GPU is given one after the other
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
    if name.endswith(".json"):  # an architecture, such as a reduced tower for a rehearsal
        return load_model("local", config=name, random_weights=True, device=device)
    return load_model(name, random_weights=name != "mini-clip", device=device)


def images(model: VLM, batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    size = model.image_size
    return torch.randn(batch, 3, size, size, generator=generator).to(model.device)


def bare(model: VLM, batch: torch.Tensor, times: int = 1) -> None:
    """Encode a batch some times; the host waits once, for all embeddings."""
    with torch.inference_mode():
        made = [model.clip.encode_image(batch) for _ in range(times)]  # type: ignore[operator]
        torch.stack(made).cpu()


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
        halved = precision in ("fp16", "bf16")
        # Casts of weights are kept by ours alone: in inference mode, as the others run, none are.
        kept = casts_kept(model.clip) if halved else nullcontext()
        with kept, autocast(model.device, precision, keep=halved):
            made = times_of(model, device, pairs, batch, halved)
        rows += [{**row, "precision": precision} for row in made]
    return rows


def times_of(model: VLM, device: str, pairs: int, batch: int, halved: bool) -> list[dict[str, Any]]:
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    x = images(model, batch)
    rows = []
    recorder = Recorder(model.towers["vision"], SPACES)

    # A GPU goes on with the next batch while features are copied, as in an extraction.
    batches = IN_A_ROW if device == "cuda" else 1

    def record_in_a_row() -> None:
        with recorder:
            made = recorder.start(x, keep_casts=halved)
            for _ in range(batches - 1):
                following = recorder.start(x, keep_casts=halved)
                made()
                made = following
            made()

    found = measure_pair(record_in_a_row, lambda: bare(model, x, batches), pairs=pairs, wait=wait)
    more = {"batch": batch, "batches": batches}
    rows.append(row("all positions, one pass", "bare encode", found, "<= 1.05", "cost", **more))
    few = max(2, pairs // 4)

    def per_layer() -> None:
        for _ in range(batches):
            one_pass_per_layer(model, x)

    found = measure_pair(record_in_a_row, per_layer, pairs=few, wait=wait)
    rows.append(
        row("all positions, one pass", "one pass per block", found, ">= 10", "faster", **more)
    )
    # A GPU takes as long for 10 as for 77 tokens of few prompts: it waits for launches.
    prompts = 1024 if device == "cuda" else batch
    ids = model.tokenize([f"a photo of a {name}." for name in NAMES] * (prompts // len(NAMES)))
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
            texts.start(ids, keep_casts=halved)()

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


def make_photographs(folder: Path, count: int, size: tuple[int, int] = (500, 375)) -> None:
    """Write smooth JPEGs of the usual size of a photograph on the web."""
    folder.mkdir(parents=True)
    small = np.random.default_rng(0).integers(0, 256, (count, 24, 32, 3), dtype=np.uint8)

    def write(number: int) -> None:
        image = Image.fromarray(small[number]).resize(size, Image.Resampling.BICUBIC)
        image.save(folder / f"{number}.jpg", quality=90)

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, range(count)))


def from_files(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare extraction from files with its two halves, each part of the images in turn."""
    model = load(options.model, options.device)
    wait = torch.cuda.synchronize if options.device == "cuda" else lambda: None
    with TemporaryDirectory() as there:
        made = Path(there, "photographs")
        if not options.data:
            make_photographs(made / "all", options.files)
        manifest = Manifest.load(options.data or str(made))
        items = [one for split in manifest.splits() for one in manifest.items(split)]
        items = items[: options.files]
        size = -(-len(items) // options.rounds)
        parts = [items[start : start + size] for start in range(0, len(items), size)]
        ways = ("full", "nvjpeg") if options.device == "cuda" else ("full",)
        return [files_row(model, manifest, parts, way, options, wait, there) for way in ways]


def files_row(
    model: VLM,
    manifest: Manifest,
    parts: list[list[Item]],
    decoding: str,
    options: argparse.Namespace,
    wait: Callable[[], None],
    there: str,
) -> dict[str, Any]:
    """Measure one way of decoding; the first batch of each side warms up."""
    x = images(model, options.batch)
    workers = decoding_processes(options.workers, len(parts[0]), model.device)

    def decode_alone(part: list[Item]) -> None:
        for _ in decode(
            manifest, part, batches_of(len(part), options.batch), preprocess=model.preprocess,
            root=None, size=model.image_size, workers=workers, decoding=decoding,
            device=model.device,
        ):  # fmt: skip
            pass

    def encode_alone(part: list[Item]) -> None:
        for rows in batches_of(len(part), options.batch):
            bare(model, x[: len(rows)])

    def whole(part: list[Item]) -> None:
        with TemporaryDirectory(dir=there) as store:
            extract(
                model, manifest, items=part, out=Path(store, "store"), batch_size=options.batch,
                workers=workers, decoding=decoding, tower="vision", progress=False,
            )  # fmt: skip

    sides = [decode_alone, encode_alone, whole]
    seconds: list[list[float]] = [[], [], []]
    for number, part in enumerate([parts[0][: options.batch], *parts]):
        for side in (0, 1, 2) if number % 2 else (2, 1, 0):
            start = time.perf_counter()
            sides[side](part)
            wait()
            if number:
                seconds[side].append(time.perf_counter() - start)
    decoded, encoded, wholes = seconds
    larger = [c / max(a, b) for a, b, c in zip(decoded, encoded, wholes)]
    both = [c / (a + b) for a, b, c in zip(decoded, encoded, wholes)]
    return {
        "work": "extraction from files", "against": "the larger of decoding and encoding alone",
        "ratio": round(statistics.median(larger), 3), "ratio_low": round(min(larger), 3),
        "ratio_high": round(max(larger), 3), "goal": "<= 1.1",
        "ratio_to_both": round(statistics.median(both), 3), "images": sum(map(len, parts)),
        "dataset": manifest.name, "rounds": len(parts), "batch": options.batch,
        "workers": workers, "decoding": decoding, "seconds": round(sum(wholes), 2),
        "seconds_decoding": round(sum(decoded), 2), "seconds_encoding": round(sum(encoded), 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("device", nargs="?", default=default, choices=("cpu", "cuda"))
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--memory", choices=("record", "bare"), help=argparse.SUPPRESS)
    parser.add_argument("--files", type=int, default=0, help="image files to extract")
    parser.add_argument("--data", help="dataset of them; made where absent")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, help="decoding processes; as `extract` where absent")
    options = parser.parse_args()
    if options.files:
        made = [{"model": options.model, **line} for line in from_files(options)]
        print(*made, sep="\n")
        place = machine(options.device)
        replace_rows(f"extraction_files-{options.device}", [{**line, **place} for line in made])
        return
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
    replace_rows(
        f"extraction-{options.device}", [{"model": options.model, **line, **place} for line in rows]
    )


if __name__ == "__main__":
    main()
