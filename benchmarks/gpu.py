"""All that wants a GPU, in one go: tests, benchmarks, and a small base-to-novel run.

    python benchmarks/gpu.py [--minutes 8] [--only tests,run,extraction,training,files]

The parts run in order of value, each in a process of its own, and what the time does not suffice
for is stopped and said. Tables go to benchmarks/results/, named by device; a short table is printed
last. Without a GPU the same parts run on the CPU, which rehearses them.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import product
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from threading import BrokenBarrierError
from typing import Any

import torch
from common import machine, read_table, write_table
from extraction import load, make_photographs
from training import RECORDED

HERE = Path(__file__).parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TABLES = {  # of each part, and the column that says what a row is of
    "extraction": (f"extraction-{DEVICE}", "work"),
    "training": (f"training_{DEVICE}", "side"),
    "files": (f"extraction_files-{DEVICE}", "work"),
}
SHOTS = 16  # images a class that MMA's published recipe trains on
TESTED = 25  # images a class of the base-to-novel run, whose datasets are of Caltech101's size
SAMPLE = ["--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--loop-ms=200"]


def commands(asked: argparse.Namespace) -> dict[str, list[str]]:
    """Return what each part runs, in order of value."""
    tests = ["-m", "pytest", "-n", "4", "-m", "gpu", *asked.tests.split(",")]
    batch = ["--batch", str(asked.batch)]
    return {
        "tests": tests,
        "run": [
            __file__, "--run", asked.architecture, "--datasets", str(asked.datasets),
            "--classes", str(asked.classes), "--seeds", str(asked.seeds),
            "--processes", asked.processes,
        ],
        "extraction": [
            str(HERE / "extraction.py"), DEVICE, "--model", asked.model, *batch,
            "--pairs", str(asked.rounds),
        ],
        "training": [
            str(HERE / "training.py"), "--architecture", asked.architecture,
            "--placements", "5,9", "--rounds", str(asked.rounds),
        ],
        "files": [
            str(HERE / "extraction.py"), DEVICE, "--model", asked.model, *batch,
            "--files", str(asked.files), "--rounds", "2",
        ],
    }  # fmt: skip


@contextmanager
def utilisation() -> Iterator[list[float]]:
    """Give the shares of time, in percent, that the GPU was busy; filled when the context ends."""
    busy: list[float] = []
    script = shutil.which("nvidia-smi")
    if script is None or DEVICE == "cpu":
        yield busy
        return
    with TemporaryFile("w+", encoding="utf-8") as file:
        sampler = subprocess.Popen([script, *SAMPLE], stdout=file)
        try:
            yield busy
        finally:
            sampler.terminate()
            sampler.wait()
            file.seek(0)
            busy += [float(line) for line in file if line.strip().isdecimal()]


def train_when_all_are_ready(
    name: str, data: list[str], out: Path, changed: dict[str, Any], seeds: int, ready: Barrier
) -> None:
    """Train in this process what no other one that shares the folder has claimed."""
    import vlmadapters as va

    model, recipe = load(name, DEVICE), va.load_recipe("published", "mma")
    recipe = recipe.changed(changed, {})
    ready.wait()  # imports and the making of the model are not what is measured
    try:
        # A bare number would be one seed of that value.
        va.train(model, data, recipe, out, seeds=range(1, seeds + 1), progress=False)
    except BaseException:
        ready.abort()
        raise
    ready.wait()  # nor is the end of the process


def base_to_novel(
    name: str, datasets: int, classes: int, seeds: int, processes: Sequence[int]
) -> None:
    """Train and test MMA base to novel on images made for it; print a line on each way.

    Cells are trained one after the other, or in several processes on the same device.
    """
    fast = {"device_crops": True, "cuda_graph": True} if DEVICE == "cuda" else {}
    ways: dict[str, tuple[dict[str, bool], int]] = {"as published": ({}, 1)}
    if fast:
        ways["crops and recorded step on the GPU"] = fast, 1
    ways |= {f"likewise, {count} processes": (fast, count) for count in processes}
    fresh = get_context("spawn")  # CUDA does not survive a fork
    with TemporaryDirectory() as there:
        data = [str(Path(there, f"photographs {number}")) for number in range(datasets)]
        for folder, number in product(data, range(classes)):
            make_photographs(Path(folder, "train", f"class {number}"), SHOTS)
            make_photographs(Path(folder, "test", f"class {number}"), TESTED)
        for way, (changed, count) in ways.items():
            out, ready = Path(there, way), fresh.Barrier(count + 1)
            work = [
                fresh.Process(
                    target=train_when_all_are_ready, args=(name, data, out, changed, seeds, ready)
                )
                for _ in range(count)
            ]
            for one in work:
                one.start()
            ready.wait(timeout=300)
            began = time.perf_counter()
            with utilisation() as busy:
                with suppress(BrokenBarrierError):  # of a process that failed
                    ready.wait()
                seconds = round(time.perf_counter() - began, 1)
            for one in work:
                one.join()
            if any(one.exitcode for one in work):
                sys.exit(f"{way}: a process failed")
            with (out / "results.csv").open(encoding="utf-8") as file:
                rows = len(list(csv.DictReader(file)))
            share = round(statistics.mean(busy)) if busy else None
            found = {"way": way, "cells": datasets * seeds, "seconds": seconds, "busy": share}
            print(json.dumps({**found, "rows": rows}), flush=True)


def summary(part: str, output: str) -> list[dict[str, Any]]:
    """Return the lines of the short table that a finished part gives."""
    if part == "tests":
        told = [line for line in output.splitlines() if line.strip()]
        return [
            {"what": "GPU tests", "value": told[-1].strip("= ") if told else "", "goal": "pass"}
        ]
    if part == "run":
        lines = []
        for one in map(json.loads, output.splitlines()):
            what = f"base to novel, {one['cells']} cells, {one['way']}"
            lines += [
                {"what": f"{what}, s", "value": one["seconds"], "goal": ""},
                {"what": f"{what}, GPU busy, %", "value": one["busy"], "goal": ">= 80"},
            ]
        return lines
    name, key = TABLES[part]
    here = machine(DEVICE)["hardware"]  # tables keep rows of other machines as well
    rows = [
        row
        for row in read_table(name)
        if row["hardware"] == here and row.get("quantity") in (None, "", "time")
    ]
    words = (key, "against", "placement", "views", "precision", "decoding")
    amp = [row for row in rows if row.get("side") == RECORDED and row["precision"] != "fp32"]
    return [
        {
            "what": ", ".join(row[k] for k in words if row.get(k)),
            "value": row["ratio"],
            "goal": row.get("goal") or (">= 2.5" if row in amp else ""),
        }
        for row in rows
    ]


def finished(command: list[str], seconds: float) -> tuple[int | None, str]:
    """Return the exit code of a command, None where its time ran out, and what it has printed."""
    process = subprocess.Popen(
        command, cwd=HERE.parent, text=True, stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=max(seconds, 0.0))
        return process.returncode, output
    except subprocess.TimeoutExpired as error:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
        process.wait()
        return None, (error.output or b"").decode()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def main() -> int:
    """Run the parts one after the other and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--only", default="tests,run,extraction,training,files")
    parser.add_argument("--tests", default="tests", help="files or folders with GPU tests")
    parser.add_argument("--model", default="ViT-B-16", help="of the extraction")
    parser.add_argument(
        "--architecture",
        default="ViT-B-16-quickgelu",
        help="of the training step and the base-to-novel run",
    )
    parser.add_argument("--batch", type=int, default=128, help="images of the extraction's batch")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--datasets", type=int, default=2, help="of the base-to-novel run")
    parser.add_argument("--classes", type=int, default=100, help="of each of these")
    parser.add_argument("--seeds", type=int, default=3, help="of the base-to-novel run")
    parser.add_argument(
        "--processes", default="3", help="that share its cells, such as 3,6; none where empty"
    )
    parser.add_argument("--files", type=int, default=2000, help="JPEGs made to be extracted")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.run:
        counts = [int(count) for count in asked.processes.split(",") if count]
        base_to_novel(asked.run, asked.datasets, asked.classes, asked.seeds, counts)
        return 0
    end, table, failed = time.monotonic() + 60 * asked.minutes, [], False
    ended = set()
    for part, command in commands(asked).items():
        if part not in asked.only.split(","):
            continue
        print(f"== {part}", flush=True)
        began = time.monotonic()
        code, output = finished([sys.executable, *command], end - began)
        print(output, flush=True)
        took = {"part": part, "seconds": round(time.monotonic() - began, 1)}
        failed |= bool(code)
        if code and part != "tests":
            table.append({"what": part, "value": "failed", "goal": "", **took})
        elif code is not None or part == "run":  # which says what is done so far
            table += [{**line, **took} for line in summary(part, output)]
        if code is None:
            table.append({"what": part, "value": "no time left", "goal": "", **took})
        else:
            ended.add(part)
    where, name = machine(DEVICE), f"gpu_session_{DEVICE}"
    rows = [{**line, **where} for line in table]
    # What an earlier session measured and this one was not asked to, or had no time for.
    here, old = where["hardware"], read_table(name)
    rows += [one for one in old if one["hardware"] != here or one["part"] not in ended]
    write_table(name, rows)
    print(f"\n{where['hardware']}, torch {where['torch']}")
    for line in table:
        print(f"{line['what']:60} {line['value']!s:>24}  {line['goal']}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
