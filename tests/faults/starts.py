"""Starting the command line as a process of its own, alone or under torchrun, and hurting it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tiny
from PIL import Image

NAMES = ("red", "green", "blue", "gray")


def model_folder(folder: Path) -> Path:
    """Write the configuration of a tiny model, to be used with --random-weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny.config(text={"vocab_size": 49408, "context_length": 77})
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


def images(folder: Path, each: int = 60) -> Path:
    """Draw an image folder of four classes, train and test."""
    random = np.random.default_rng(0)
    for split, count in (("train", each), ("test", max(4, each // 10))):
        for label, name in enumerate(NAMES):
            place = folder / split / name
            place.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                noise = random.integers(0, 120, (32, 32, 3)).astype(np.uint8)
                if label < 3:
                    noise[..., label] = 255
                Image.fromarray(noise).save(place / f"{number:03d}.png")
    return folder


def start(*arguments: object, processes: int = 1) -> subprocess.Popen[str]:
    """Start a verb of the command line in a session of its own."""
    module = "vlmlayers"
    launch = (
        [sys.executable, "-m", module]
        if processes == 1
        else [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc-per-node", str(processes), "-m", module,
        ]
    )  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [*launch, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 500) -> tuple[int, str]:
    """Return exit code and output."""
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def done(*arguments: object, processes: int = 1) -> str:
    """Run a verb to its end; return what it said."""
    code, output = finish(start(*arguments, processes=processes))
    assert code == 0, output
    return output


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait for something that a process does."""
    end = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.01)


def kill_worker(process: subprocess.Popen[str], rank: int) -> None:
    """SIGKILL one of the processes that torchrun started."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent == process.pid and f"RANK={rank}".encode() in environment:
            os.kill(int(entry.name), signal.SIGKILL)
            return
    raise AssertionError(f"torchrun has no process of rank {rank}")


def content(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder with its bytes."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def remount(mount: Path, options: str) -> None:
    """Change a file system: `ro`, `rw`, `size=4m`."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(mount)], check=True)
