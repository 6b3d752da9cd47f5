"""Fixtures shared by all tests. What needs ../shared skips with a reason where it is absent."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A shell's background jobs ignore Ctrl-C, and so would the commands that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
NEW_MOUNTS = 0x20000  # CLONE_NEWNS of Linux
REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("VLMLAYERS_SHARED", REPOSITORY.parent / "shared"))


def _shared(part: str) -> Path:
    path = SHARED / part
    if not path.exists():
        pytest.skip(f"needs {part} of the shared development data, which is not on this machine")
    return path


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    return _shared("data")


@pytest.fixture(scope="session")
def shared_weights() -> Path:
    return _shared("weights")


@pytest.fixture(scope="session")
def shared_golden() -> Path:
    return _shared("golden")


@pytest.fixture(scope="session")
def shared_paper() -> Path:
    return _shared("paper")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 KB, to be filled or made read-only."""
    mount = tmp_path / "small"
    mount.mkdir()
    made = ["-t", "tmpfs", "-o", "size=40k", "tmpfs", str(mount)]
    # In a namespace of this thread's own: a test that is killed leaves no file system behind.
    may = sys.platform == "linux" and ctypes.CDLL(None).unshare(NEW_MOUNTS) == 0
    for options in (["--make-rprivate", "/"], made):
        command = ["mount", *options]
        may = may and subprocess.run(command, capture_output=True, check=False).returncode == 0
    if not may:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        yield mount
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests where there is none; torch is imported only if such a test was collected."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
