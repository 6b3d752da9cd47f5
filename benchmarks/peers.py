"""The same work by libraries beside this one: features of all blocks, and CKA of all layers.

    make peers
    python benchmarks/peers.py thingsvision "pytorch-cka, two towers"

The second form runs some peers alone, and the rows of the others stay as they were recorded.
Each side runs in an environment of its own (neither is a dependency of the project), in turn, on
the same shapes of random weights and inputs, one thread each. `faster` is the median over rounds
of CPU seconds theirs / ours, on which other work on the machine weighs little; above 1 we are
ahead. `note` has the reason where we are not. Rows go to benchmarks/results/peers.csv.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MODEL, TIMM_MODEL, BATCH, BLOCKS = "ViT-B-32", "vit_base_patch32_clip_224", 16, 12
ITEMS, WIDTH = 1_000, 768
ROUNDS = 5
Work = Callable[[], Any]


def images() -> Any:
    import torch

    return torch.randn(BATCH, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def ours_features(timms: bool = False) -> Work:
    """Record a model of open_clip, or that of timm, whose blocks are other code."""
    import timm

    from vlmlayers.models import Recorder, load_model, wrap_model

    model = (
        wrap_model(timm.create_model(TIMM_MODEL), random_weights=True)
        if timms
        else load_model(MODEL, random_weights=True)
    )
    recorder, batch = Recorder(model.towers["vision"]), images()

    def work() -> None:
        with recorder:
            recorder(batch)

    return work


def open_clip_features() -> Work:
    import open_clip
    import torch

    model, batch = open_clip.create_model(MODEL).eval(), images()

    def work() -> None:
        with torch.inference_mode():
            model.forward_intermediates(batch, image_indices=list(range(BLOCKS)))

    return work


def timm_features() -> Work:
    import timm
    import torch

    model: Any = timm.create_model(TIMM_MODEL).eval()
    batch = images()

    def work() -> None:
        with torch.inference_mode():
            model.forward_intermediates(batch, indices=list(range(BLOCKS)))

    return work


def thingsvision_features() -> Work:
    import open_clip
    from thingsvision import get_extractor_from_model

    vision, batch = open_clip.create_model(MODEL).visual.eval(), images()
    extractor = get_extractor_from_model(model=vision, device="cpu", backend="pt")
    names = [f"transformer.resblocks.{block}" for block in range(BLOCKS)]
    return lambda: extractor.extract_features(batches=[batch], module_names=names)


def towers(count: int) -> Any:
    """Return the layers of both towers: the same arrays where there is one tower."""
    import numpy as np

    rng = np.random.default_rng(0)

    def normal() -> Any:
        return rng.standard_normal((ITEMS, WIDTH), dtype=np.float32)

    shared = normal()
    found = [[shared + normal() for _ in range(BLOCKS)] for _ in range(count)]
    return found[0], found[-1]


def ours_cka(count: int) -> Work:
    from vlmlayers.metrics import cka_matrix

    xs, ys = towers(count)
    return lambda: cka_matrix(xs, ys)


def pytorch_cka(count: int) -> Work:
    import torch
    from cka import cka_from_features

    xs, ys = (torch.stack([torch.from_numpy(x) for x in side]) for side in towers(count))
    return lambda: cka_from_features(xs, ys)


SIDES: dict[str, Callable[[], Work]] = {
    "ours_features": ours_features,
    "ours_timm_features": partial(ours_features, timms=True),
    "open_clip": open_clip_features,
    "timm": timm_features,
    "thingsvision": thingsvision_features,
    "ours_cka_one": partial(ours_cka, 1),
    "ours_cka_two": partial(ours_cka, 2),
    "pytorch-cka, one tower": partial(pytorch_cka, 1),
    "pytorch-cka, two towers": partial(pytorch_cka, 2),
}


@dataclass(frozen=True)
class Peer:
    """A library that does the same work.

    Attributes:
        package: Its distribution.
        ours: The side of ours that does this work.
        environment: Folder of the virtual environment that has it.
        behind: Why it may be ahead of us.
    """

    package: str
    ours: str = "ours_features"
    environment: str = ".venv-peers"
    behind: str = ""


ONE_PASS = "the same single pass; ours pools each block and applies the last norm as well"
FLOAT64 = "float32; ours is float64"
PEERS = {
    "thingsvision": Peer("thingsvision", environment=".venv-thingsvision", behind=ONE_PASS),
    "open_clip": Peer("open_clip_torch", behind=ONE_PASS),
    "timm": Peer("timm", "ours_timm_features", behind=ONE_PASS),
    "pytorch-cka, one tower": Peer("pytorch-cka", "ours_cka_one", behind=FLOAT64),
    "pytorch-cka, two towers": Peer("pytorch-cka", "ours_cka_two", behind=FLOAT64),
}
FEATURES, CKA = f"{BATCH} images, {MODEL}", f"{ITEMS} × {WIDTH}"
WORK = {
    "ours_features": ("features of all blocks", FEATURES),
    "ours_timm_features": ("features of all blocks", f"{BATCH} images, timm's {MODEL}"),
    "ours_cka_one": ("layer × layer debiased CKA, one tower", CKA),
    "ours_cka_two": ("layer × layer debiased CKA, two towers", CKA),
}


def side(name: str, package: str) -> dict[str, Any]:
    """Return CPU seconds of one run of a side, after one that nobody counts."""
    work = SIDES[name]()
    work()
    start = time.process_time()
    work()
    seconds = time.process_time() - start
    return {"seconds": seconds, "version": version(package), "torch": version("torch")}


def alone(python: Path, name: str, package: str) -> dict[str, Any]:
    """Run a side in its environment; `failed` says why it did not run."""
    if not python.exists():
        return {"failed": f"not run: no {python.relative_to(ROOT)}"}
    done = subprocess.run(
        [python, __file__, "--side", name, package], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        return {"failed": "not run: " + (done.stderr.strip().splitlines() or [""])[-1][:200]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(name: str) -> dict[str, Any]:
    """Return one row: how many times faster we are than a peer."""
    peer = PEERS[name]
    work, size = WORK[peer.ours]
    called = name.partition(",")[0]
    row = {"work": work, "size": size, "layers": BLOCKS, "peer": called, "rounds": ROUNDS}
    ratios, seconds = [], []
    for _ in range(ROUNDS):
        theirs = alone(ROOT / peer.environment / "bin" / "python", name, peer.package)
        mine = (
            theirs if "failed" in theirs else alone(Path(sys.executable), peer.ours, "vlm-layers")
        )
        if "failed" in mine:
            left = dict.fromkeys(("version", "their_torch", "faster", "seconds"), "")
            return {**row, **left, "note": mine["failed"]}
        ratios.append(theirs["seconds"] / mine["seconds"])
        seconds.append(mine["seconds"])
    faster = round(statistics.median(ratios), 2)
    return {
        **row,
        "version": theirs["version"],
        "their_torch": theirs["torch"],
        "faster": faster,
        "faster_low": round(min(ratios), 2),
        "faster_high": round(max(ratios), 2),
        "seconds": round(statistics.median(seconds), 3),
        "note": peer.behind if faster < 1 else "",
    }


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--side"]:
        print(json.dumps(side(*arguments[1:])))
        return 0
    from common import machine, read_table, write_table

    rows = []
    for name in arguments or PEERS:
        # Each side runs with one thread; machine() tells what this process would take.
        rows.append({**compare(name), **machine(), "threads": 1})
        print(rows[-1], flush=True)
    again = {(row["work"], row["peer"]) for row in rows}
    kept = [row for row in read_table("peers") if (row["work"], row["peer"]) not in again]
    write_table("peers", kept + rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
