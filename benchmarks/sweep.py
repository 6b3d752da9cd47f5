"""A sweep of 12 placements × 3 seeds against 36 runs of their own, by processor time.

    python benchmarks/sweep.py [--separate N] [--data-root DIR] [--small] [MODEL [DATASET]]

Processor seconds of whole processes (user + system, one thread) are compared, since they hardly
depend on what else the machine does; wall seconds stand beside them. Of the 36 separate runs
`--separate` are measured, spread over the start blocks, and their mean is multiplied by 36; the
table says how many were measured. The published schedule runs in both. `--small` trains one epoch
of two shots to see that everything works, and records nothing.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import machine, write_table

PLACEMENTS, SEEDS = 12, (1, 2, 3)


def measured(command: list[str]) -> tuple[float, float]:
    """Return processor and wall seconds of a command."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return processor, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="mini-clip")
    parser.add_argument("dataset", nargs="?", default="shapes_filled")
    parser.add_argument("--separate", type=int, default=6)
    parser.add_argument("--data-root", default=None)
    parser.add_argument("--small", action="store_true")
    asked = parser.parse_args()
    script = Path(sys.executable).with_name("vlmlayers")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    root = ["--data-root", asked.data_root] if asked.data_root else []
    common = [asked.model, asked.dataset, "--recipe", "mini", "--device", device, "--quiet", *root]
    if asked.small:
        common += ["--set", "epochs=1", "--set", "shots=2", "--items", "40"]
    step = max(1, PLACEMENTS // asked.separate)
    starts = list(range(1, PLACEMENTS + 1, step))[: asked.separate]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        shared = ["validate", *common, "--placement", "5-12", "--kinds", "start"]
        shared += ["--seeds", ",".join(map(str, SEEDS)), "--out", f"{folder}/shared"]
        swept = measured([str(script), *shared])
        alone = []
        for start in starts:
            own = ["train", *common, "--placement", f"{start}-12", "--seeds", "1"]
            alone.append(measured([str(script), *own, "--out", f"{folder}/{start}"]))
    runs = PLACEMENTS * len(SEEDS)
    means = [runs * sum(pair[i] for pair in alone) / len(alone) for i in (0, 1)]
    where = {"model": asked.model, "dataset": asked.dataset, **machine(device)}
    for kind, (processor, wall), count in (
        ("one sweep", swept, 1),
        (f"{runs} runs, {len(alone)} measured and multiplied", means, len(alone)),
    ):
        rows.append(
            {
                "what": kind,
                "cells": runs,
                "processes_measured": count,
                "processor_seconds": round(processor, 1),
                "wall_seconds": round(wall, 1),
                "times_faster_processor": round(means[0] / processor, 2),
                **where,
            }
        )
    if not asked.small:
        write_table("sweep" if device == "cpu" else f"sweep_{device}", rows)
    print(f"processor time: {means[0] / swept[0]:.2f} times less than {runs} separate runs")


if __name__ == "__main__":
    main()
