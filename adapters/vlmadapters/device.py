"""The device of a process, the precision it computes in, and the memory that is left."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from vlmlayers.errors import UserError

CGROUP = Path("/sys/fs/cgroup")


def local_device() -> str:
    """Return the device of this process: its own GPU, the only GPU, or the CPU."""
    if torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return "cpu"


def precision_of(
    precision: str, device: torch.device
) -> tuple[Callable[[], AbstractContextManager[Any]], Any]:
    """Return a function that opens the autocast context, and the gradient scaler."""
    kind = device.type
    if precision == "auto":
        precision = "fp32"
        if kind == "cuda":
            precision = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    if precision == "fp16" and kind == "cpu":
        raise UserError("precision fp16 needs a GPU; use fp32 or bf16 on a CPU")
    scaler = torch.amp.GradScaler(kind, enabled=precision == "fp16")
    if precision == "fp32":
        return nullcontext, scaler
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return lambda: torch.autocast(kind, dtype=dtype), scaler


def available_memory(device: torch.device) -> int:
    """Return the bytes that can still be taken on a device; huge where nothing says."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return min(_machine_memory(), _cgroup_memory())


def _machine_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line[:13] == "MemAvailable:")
    except (OSError, StopIteration):  # not Linux: what is free, without what caches could give
        if not hasattr(os, "sysconf") or "SC_AVPHYS_PAGES" not in os.sysconf_names:
            return 1 << 62
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _cgroup_memory() -> int:
    """Return what the container may still take: its limit less what it cannot give back."""
    try:
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 1 << 62  # no container, or one without a limit, whose file says "max"
    return limit - used + int(stat.get("inactive_file", 0))
