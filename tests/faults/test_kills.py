"""Killed at random moments, again and again: the next start completes, with the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

LAB = Path(__file__).with_name("lab.py")


def lab(work: str, folder: Path, *options: object) -> dict[str, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(LAB), work, str(folder), *map(str, options)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summary: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return summary


@pytest.mark.slow
@pytest.mark.parametrize("work", ["extract", "stream", "train", "validate", "search"])
def test_twenty_kills_lose_nothing(work: str, tmp_path: Path) -> None:
    found = lab(work, tmp_path, "--kills", 20, "--seed", 5)
    assert found["kills"] == 20
    assert found["finished"] >= 1
    assert found["midway"] >= 10  # most kills met work that had begun
    assert found["files"] >= 1


@pytest.mark.slow
@pytest.mark.parametrize("work", ["extract", "train"])
def test_interrupts_lose_nothing(work: str, tmp_path: Path) -> None:
    found = lab(work, tmp_path, "--kills", 6, "--signal", int(signal.SIGINT))
    assert found["kills"] == 6
