"""What the machine has left."""

from __future__ import annotations

import os
from pathlib import Path

import torch

CGROUP = Path("/sys/fs/cgroup")


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
