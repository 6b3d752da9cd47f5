"""Run the benchmarks in turn, each in a process of its own so that peak memory is its own.

    python benchmarks/run.py [NAME …]

Each script writes tidy tables with machine and versions to benchmarks/results/. Started by
themselves: `methods.py`, which takes long, `peers.py`, `gpu.py` and `registered_search.py`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
BENCHMARKS = (
    "startup",
    "drawing",
    "extraction",
    "metrics",
    "training",
    "sweep",
    "cost",
    "intervals",
)


def main(names: list[str]) -> int:
    unknown = sorted(set(names) - set(BENCHMARKS))
    if unknown:
        print(f"unknown benchmark {unknown[0]!r}; valid: {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    failed = []
    for name in names or BENCHMARKS:
        print(f"== {name}", flush=True)
        if subprocess.run([sys.executable, HERE / f"{name}.py"], check=False).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
