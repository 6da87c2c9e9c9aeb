"""Strategies that won: in memory for the process, and in a file where one is named."""

from __future__ import annotations

import json
import os
import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch

from jacfunc._forecasting import Swept
from jacfunc._remembered import Recent
from jacfunc.strategies import Forward, Looped, Reverse, Structured

KINDS: dict[str, type[Swept]] = {
    kind.__name__: kind for kind in (Reverse, Forward, Looped, Structured)
}

MOST_ENTRIES = 1000
"""Winners that are kept in memory."""


class Winners:
    """Strategies by what they were measured on, on this machine with these versions."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._found: Recent[Swept] = Recent(MOST_ENTRIES)

    def get(self, device: torch.device, key: str) -> Swept | None:
        """The strategy that won before."""
        where = _where(device)
        found = self._found.get((where, key))
        if found is None:
            kept = self._read().get(where, {}).get(key)
            if kept is None:
                return None
            found = KINDS[kept["strategy"]](**kept["options"])
            self._found.put((where, key), found)
        return found

    def put(self, device: torch.device, key: str, strategy: Swept, seconds: float) -> None:
        """Remember a strategy; a file keeps what others have written to it meanwhile."""
        where = _where(device)
        self._found.put((where, key), strategy)
        if self._path is None:
            return
        everything = self._read()
        everything.setdefault(where, {})[key] = {
            "strategy": type(strategy).__name__,
            "options": vars(strategy),
            "seconds": seconds,
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        fresh.write_text(json.dumps(everything, indent=1), encoding="utf-8")
        fresh.replace(self._path)  # at once: no reader sees half of it

    def _read(self) -> dict[str, dict[str, Any]]:
        if self._path is None or not self._path.exists():
            return {}
        try:
            everything: dict[str, dict[str, Any]] = json.loads(self._path.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(
                f"Autotune: cache must be a file that Autotune has written, got {self._path}, "
                f"which is no JSON ({error}). Delete it, or name another."
            ) from error
        return everything


@cache
def winners(path: Path | None) -> Winners:
    """The one for a file, or for this process alone."""
    return Winners(path)


def _where(device: torch.device) -> str:
    """What a time depends on beside the function."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{platform.machine()} {platform.processor()}, {torch.get_num_threads()} threads"
    return f"{hardware}, torch {torch.__version__}, Python {platform.python_version()}"
