"""The training benchmark compares like with like; its timings are no business of a test."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from backbones import config

METHODS = (
    "coop", "cocoop", "kgcoop", "proda", "maple", "ivlp", "promptsrc", "rpo", "lasp",
    "clipadapter", "cliplora", "lweib", "tip-f",
)  # fmt: skip


def test_all_sides_of_the_training_benchmark_take_the_same_steps(
    monkeypatch: pytest.MonkeyPatch, repository: Path
) -> None:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    import training

    small = config({"layers": 12, "width": 32, "head_width": 16}, {"layers": 12})
    monkeypatch.setattr(training, "CLASSES", training.CLASSES[:6])
    rows = training.compare(small, 9, "fp32", "cpu", rounds=2)
    assert [(row["side"], row["views"]) for row in rows] == [
        ("public recipe", "fresh"),
        ("ours", "fresh"),
        ("ours", "cached"),
        ("ours, torch's products", "fresh"),
        ("ours, torch's products", "cached"),
    ]
    assert all(float(row["largest_loss_difference"]) < 1e-4 for row in rows)
    assert all(row["seconds"] > 0 and row["peak_mib"] > 0 for row in rows)
    assert rows[0]["ratio"] == 1


@pytest.mark.parametrize("name", METHODS)
def test_both_sides_of_the_benchmark_of_methods_take_the_same_steps(
    name: str, monkeypatch: pytest.MonkeyPatch, repository: Path
) -> None:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    import methods
    import public_methods

    small = config(
        {"layers": 3, "width": 32, "head_width": 16}, {"layers": 3, "context_length": 77}
    )
    assert set(public_methods.PUBLIC) == set(METHODS)
    monkeypatch.setattr(methods, "CLASSES", methods.CLASSES[:4])
    rows = methods.compare(name, small, "cpu", rounds=2)
    assert rows[0]["gigaflop_ratio"] == 1
    assert all(row["gigaflop_ratio"] > 0 for row in rows)
    assert [(row["side"], row["views"]) for row in rows] == [
        ("public recipe", "fresh"), ("ours", "fresh"), ("ours", "cached"),
    ]  # fmt: skip
    assert all(float(row["largest_loss_difference"]) < 1e-4 for row in rows)


@pytest.mark.slow
def test_the_session_on_a_gpu_is_rehearsed_on_a_cpu(tmp_path: Path, repository: Path) -> None:
    """Every part runs, and a part for which there is no time left is said to have had none."""
    small = config({"layers": 12, "width": 32, "head_width": 16}, {"layers": 12})
    architecture = tmp_path / "small.json"
    architecture.write_text(json.dumps(small))
    script = [sys.executable, str(repository / "benchmarks" / "gpu.py"), "--rounds", "2"]
    script += ["--model", "mini-clip", "--architecture", str(architecture), "--batch", "8"]
    script += ["--tests", "tests/vlmadapters/test_gpu.py"]
    script += ["--files", "8", "--minutes", "30"]  # whatever else the machine does
    environment = {**os.environ, "BENCH_RESULTS": str(tmp_path / "results")}

    def lines(*more: str) -> str:
        done = subprocess.run(
            [*script, *more], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.rpartition("torch ")[2]

    told = lines("--only", "tests,extraction,training,files")
    assert "GPU tests" in told and "skipped" in told
    assert "all positions, one pass, bare encode, fp32" in told
    assert "public recipe, v5-12,t5-12, fresh, fp32" in told
    assert "the larger of decoding and encoding alone, full" in told
    assert "no time left" in lines("--only", "run", "--minutes", "0")
    with (tmp_path / "results" / "gpu_session_cpu.csv").open() as file:
        parts = Counter(row["part"] for row in csv.DictReader(file))
    assert parts.keys() == {"tests", "run", "extraction", "training", "files"}
    assert parts["tests"] == parts["run"] == 1, "what was measured before is kept"
    tables = {path.name for path in (tmp_path / "results").iterdir()}
    assert tables == {
        "extraction-cpu.csv", "training_cpu.csv", "extraction_files-cpu.csv", "gpu_session_cpu.csv",
    }  # fmt: skip


def test_what_a_part_has_said_before_its_time_ran_out_is_kept(
    monkeypatch: pytest.MonkeyPatch, repository: Path
) -> None:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    import gpu

    said = json.dumps({"way": "as published", "cells": 6, "seconds": 20.1, "busy": 31})
    sleeps = f"import time; print({said!r}, flush=True); time.sleep(600)"
    code, output = gpu.finished([sys.executable, "-c", sleeps], 5.0)
    assert code is None
    assert [line["value"] for line in gpu.summary("run", output)] == [20.1, 31]
    assert gpu.finished([sys.executable, "-c", "print(1); exit(3)"], 60.0) == (3, "1\n")


@pytest.mark.slow
def test_the_run_of_the_session_says_what_it_took(tmp_path: Path, repository: Path) -> None:
    architecture = tmp_path / "small.json"
    architecture.write_text(
        json.dumps(config({"layers": 12, "width": 32, "head_width": 16}, {"layers": 12}))
    )
    script = str(repository / "benchmarks" / "gpu.py")
    command = [sys.executable, script, "--run", str(architecture), "--datasets", "2"]
    command += ["--classes", "4", "--seeds", "2", "--processes", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    alone, shared = map(json.loads, done.stdout.splitlines())
    assert shared["way"] == "likewise, 2 processes"
    assert alone["seconds"] > 0 and alone["busy"] is None
    # Base and novel of each: zero-shot CLIP by two templates, and MMA by two seeds.
    assert shared["rows"] == alone["rows"] == 2 * 2 * (2 + 2)
