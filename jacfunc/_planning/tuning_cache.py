"""The strategies that were fastest: in memory, and in a file where the user names one."""

from __future__ import annotations

import json
import os
import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch

from jacfunc._remembered import Recent
from jacfunc.strategies import Forward, Looped, Reverse, Structured, Sweeping

KINDS: dict[str, type[Sweeping]] = {
    kind.__name__: kind for kind in (Reverse, Forward, Looped, Structured)
}

MOST_ENTRIES = 1000
"""Strategies that are kept in memory, for each file."""


class Winners:
    """The fastest strategies by key of a function and call, on this machine with these versions."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._strategies: Recent[Sweeping] = Recent(MOST_ENTRIES)

    def get(self, device: torch.device, key: str) -> Sweeping | None:
        """The strategy that was the fastest, if it is known."""
        where = _where(device)
        strategy = self._strategies.get((where, key))
        if strategy is None:
            entries = self._read().get(where, {})
            if key not in entries:
                return None
            try:
                strategy = KINDS[entries[key]["strategy"]](**entries[key]["options"])
            except (KeyError, TypeError, ValueError) as error:
                raise self._not_ours(f"has the entry {entries[key]!r}") from error
            self._strategies.put((where, key), strategy)
        return strategy

    def put(self, device: torch.device, key: str, strategy: Sweeping, seconds: float) -> None:
        """Remember a strategy; entries that others write into the file meanwhile stay there."""
        where = _where(device)
        self._strategies.put((where, key), strategy)
        if self._path is None:
            return
        everything = self._read()
        everything.setdefault(where, {})[key] = {
            "strategy": type(strategy).__name__,
            "options": vars(strategy),
            "seconds": seconds,
        }
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            fresh = self._path.with_name(f"{self._path.name}.{os.getpid()}")
            fresh.write_text(json.dumps(everything, indent=1), encoding="utf-8")
            fresh.replace(self._path)  # at once: no reader sees half of it
        except OSError as error:
            raise ValueError(
                f"Autotune: cache must be a file that can be written, got {self._path} "
                f"({error.strerror}). Name another."
            ) from error

    def _read(self) -> dict[str, dict[str, Any]]:
        if self._path is None:
            return {}
        try:
            everything: Any = json.loads(self._path.read_text("utf-8"))
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise self._not_ours(f"can't be read ({error.strerror})") from error
        except ValueError as error:
            raise self._not_ours(f"is no JSON ({error})") from error
        if not isinstance(everything, dict) or not all(
            isinstance(entries, dict) for entries in everything.values()
        ):
            raise self._not_ours("holds no winners by machine")
        return everything

    def _not_ours(self, told: str) -> ValueError:
        """The error for a file with other contents than :meth:`put` writes."""
        return ValueError(
            f"Autotune: cache must be a file that Autotune has written, got {self._path}, "
            f"which {told}. Delete it, or name another."
        )


@cache
def winners(path: Path | None) -> Winners:
    """The winners of a file; of this process alone without one."""
    return Winners(path)


def _where(device: torch.device) -> str:
    """What a time depends on beside the function: hardware and versions, in words."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{platform.machine()} {platform.processor()}, {torch.get_num_threads()} threads"
    return f"{hardware}, torch {torch.__version__}, Python {platform.python_version()}"
