"""How many bytes of memory are free."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
"""Where Linux says how much memory is free, and how much a container may take."""


def free_bytes(device: torch.device, meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> int:
    """Bytes that can be allocated before the system swaps, or a container meets its limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if not meminfo.exists():  # not Linux: half of all memory, as nothing says how much is free
        return _machine_bytes() // 2
    lines = meminfo.read_text().splitlines()
    (available,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    free, limit = 1024 * int(available), _limit(cgroup)
    used = 0 if limit == sys.maxsize else int((cgroup / "memory.current").read_text())
    return min(free, max(limit - used, 0))


def all_bytes(device: torch.device, cgroup: Path = CGROUP) -> int:
    """Bytes of the device's memory, or up to the limit of the container, used or not."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return min(_machine_bytes(), _limit(cgroup))


def _machine_bytes() -> int:
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _limit(cgroup: Path) -> int:
    """How many bytes a container may take; without a limit, the largest number."""
    limit = cgroup / "memory.max"
    told = limit.read_text().strip() if limit.exists() else "max"
    return sys.maxsize if told == "max" else int(told)
