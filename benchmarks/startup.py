"""What a user waits for before and after the work: one-line errors, lists, help, reports.

    python benchmarks/startup.py

Each command runs as a user types it, in a process of its own, once to warm up (Python's bytecode,
the disk) and then `ROUNDS` times; the table has the median of its CPU seconds, which other work on
the machine disturbs little. Reports are of score tables as `benchmarks/metrics.py tables` has them.
Writes benchmarks/results/startup.csv.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import machine, write_table
from metrics import TABLE_METRICS, TEST_HELPERS, WHOLE_TABLE

ROUNDS = 5
SMALL_DATASETS = 3
COMMAND = Path(sys.executable).with_name("vlmlayers")
ERRORS = (
    "score nosuch",
    "select nosuch",
    "report nosuch",
    "extract nosuch digits --out {run}",
    "extract mini-clip nosuch --out {run}",
    "train mini-clip nosuch --out {run}",
    "train mini-clip digits --method nosuch --out {run}",
    "validate mini-clip digits --placement 5- --out {run}",
    "score {run} --metrics nosuch",
    "select {run} --rule nosuch",
    "study nosuch.toml",
    "nosuch",
)
LISTS = ("data list", "select --help", "--help", "--version")


def cpu_seconds(command: str) -> tuple[float, int]:
    """Return the CPU seconds of one command, its children's included, and its exit status."""
    # Python writes bytecode the first time only; where that is forbidden every start compiles.
    allowed = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    child = subprocess.Popen(
        [COMMAND, *command.split()], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=allowed,
    )  # fmt: skip
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return used.ru_utime + used.ru_stime, child.returncode


def timed(
    kind: str, command: str, goal: float, rounds: int = ROUNDS, **names: Any
) -> dict[str, Any]:
    """Return one row: the median over rounds, after a first that nobody counts."""
    runs = [cpu_seconds(command.format(**names)) for _ in range(rounds + 1)]
    found = {
        "kind": kind,
        "command": command.format(**dict.fromkeys(names, "RUN")),
        "exit": runs[-1][1],
        "cpu_seconds": round(statistics.median(seconds for seconds, _ in runs[1:]), 2),
        "goal": f"<= {goal:g}",
    }
    print(found, flush=True)
    return found


def run_of(folder: Path, datasets: int) -> Path:
    """Write a run with scores and a choice."""
    sys.path.insert(0, str(TEST_HELPERS))
    from synthetic import many

    from vlmlayers.runs import Run
    from vlmlayers.scores import score, write_scores
    from vlmlayers.selection import select

    folder.mkdir()
    features = many(datasets, items=60, blocks=WHOLE_TABLE["blocks"])
    table = score(features, list(TABLE_METRICS), bootstrap=WHOLE_TABLE["resamples"])
    write_scores(table, folder)
    select(table).save(Run(folder).choice)
    return folder


def main() -> int:
    with tempfile.TemporaryDirectory() as there:
        small = run_of(Path(there, "small"), SMALL_DATASETS)
        whole = run_of(Path(there, "whole"), WHOLE_TABLE["datasets"])
        rows = [timed("error", command, 1, run=small) for command in ERRORS]
        rows += [timed("list or help", command, 1, run=small) for command in LISTS]
        for run, goal in ((small, 5), (whole, 30)):
            found = timed("report", "report {run}", goal, rounds=3, run=run)
            size = Path(run, "report.html").stat().st_size / 2**20
            rows.append({**found, "mib": round(size, 2)})
        rows[-2]["datasets"], rows[-1]["datasets"] = SMALL_DATASETS, WHOLE_TABLE["datasets"]
    write_table("startup", [{**row, **machine()} for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
