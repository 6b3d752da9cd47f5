"""What every benchmark needs: pairs measured side by side, peak memory, and where it was run."""

from __future__ import annotations

import csv
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vlmlayers.runs import processor

# BENCH_RESULTS names another folder, for runs that are not to replace what is recorded.
RESULTS = Path(os.environ.get("BENCH_RESULTS", Path(__file__).parent / "results"))
VERSIONS = ("torch", "open_clip_torch", "timm", "numpy")


@dataclass(frozen=True)
class Pair:
    """Two pieces of work measured in turn.

    Attributes:
        ours: Seconds of each run of the first.
        other: Seconds of each run of the second.
    """

    ours: tuple[float, ...]
    other: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Median over pairs of first / second; a slow moment of the machine hits both sides."""
        return statistics.median(a / b for a, b in zip(self.ours, self.other))

    @property
    def spread(self) -> tuple[float, float]:
        """Quartiles of the ratio."""
        ratios = [a / b for a, b in zip(self.ours, self.other)]
        quartiles = statistics.quantiles(ratios, n=4)
        return quartiles[0], quartiles[2]


def measure_pair(
    ours: Callable[[], Any],
    other: Callable[[], Any],
    *,
    pairs: int,
    wait: Callable[[], None] = lambda: None,
) -> Pair:
    """Run two functions alternately, in changing order, after one run of each to warm up.

    Args:
        ours: The first function.
        other: The second one.
        pairs: How often.
        wait: Waits for the device, such as `torch.cuda.synchronize`.
    """
    ours(), other()
    wait()
    times: dict[int, list[float]] = {0: [], 1: []}
    for number in range(pairs):
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            start = time.perf_counter()
            (ours, other)[side]()
            wait()
            times[side].append(time.perf_counter() - start)
    return Pair(tuple(times[0]), tuple(times[1]))


def resident_mib() -> float:
    """Return the memory this process holds now."""
    return _status("VmRSS")


def reset_peak() -> None:
    """Start measuring peak memory anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak_mib() -> float:
    """Return the most memory that this process held since `reset_peak`."""
    return _status("VmHWM")


def _status(key: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def machine(device: str = "cpu") -> dict[str, Any]:
    """Return what a timing depends on: hardware, threads, load, versions."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    return {
        "device": device,
        "hardware": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{package: _version(package) for package in VERSIONS},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def read_table(name: str) -> list[dict[str, Any]]:
    """Return the rows of a table in benchmarks/results/; none where it is not there."""
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def replace_rows(name: str, rows: list[dict[str, Any]], by: Sequence[str] = ()) -> Path:
    """Write a table as `write_table`; rows of other hardware, or other `by`, stay below these."""
    keys = ("hardware", *by)
    here = {tuple(str(row[key]) for key in keys) for row in rows}
    others = [row for row in read_table(name) if tuple(row[key] for key in keys) not in here]
    return write_table(name, rows + others)


def write_table(name: str, rows: list[dict[str, Any]]) -> Path:
    """Write a tidy table to benchmarks/results/ and show it."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.csv"
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    print(f"{len(rows)} rows: {path}", flush=True)
    return path
