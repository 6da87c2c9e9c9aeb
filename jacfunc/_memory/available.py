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
        return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) // 2
    lines = meminfo.read_text().splitlines()
    (available,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return min(1024 * int(available), _free_in_container(cgroup))


def all_bytes(device: torch.device, cgroup: Path = CGROUP) -> int:
    """Bytes of the device's memory, or up to the limit of the container, used or not."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    limit = cgroup / "memory.max"
    told = limit.read_text().strip() if limit.exists() else "max"
    machine = int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return machine if told == "max" else min(machine, int(told))


def _free_in_container(cgroup: Path) -> int:
    """Bytes up to the limit of the container; without a limit, the largest number."""
    limit, used = cgroup / "memory.max", cgroup / "memory.current"
    if not limit.exists() or limit.read_text().strip() == "max":
        return sys.maxsize
    return max(int(limit.read_text()) - int(used.read_text()), 0)
