"""What a call takes of a process of its own, as Linux counts it.

Pages of code are told apart, which the system reads from files and may drop.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

STATUS = Path("/proc/self/status")
ALONE = """
import json, sys
from {module} import {name}
print(json.dumps({name}(*json.loads(sys.argv[1]))))
"""


class Taken(NamedTuple):
    """Bytes of a process in a call beside those before it."""

    most: int
    code: int
    """Those of code among them, at the end."""
    refusal: str
    """The error, where the call raised one that was expected."""


def settle() -> None:
    """What any user's process has done before: it has one thread and has multiplied matrices."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    (torch.ones(3, 3) @ torch.ones(3, 3)).sum()


def taken_by(call: Callable[[], Any], *expected: type[Exception]) -> Taken:
    """What a call takes; its result is gone afterwards."""
    refusal = ""
    Path("/proc/self/clear_refs").write_text("5")  # the most bytes are counted anew
    before, code = _bytes_of("VmRSS"), _bytes_of("RssFile")
    try:
        result = call()
        del result
    except expected as error:
        refusal = str(error)
    return Taken(_bytes_of("VmHWM") - before, _bytes_of("RssFile") - code, refusal)


def _bytes_of(what: str) -> int:
    """A count of bytes that Linux keeps of this process."""
    (line,) = [x for x in STATUS.read_text().splitlines() if x.startswith(f"{what}:")]
    return 1024 * int(line.split()[1])


def alone(func: Callable[..., Any], *arguments: Any, limit: float) -> Any:
    """What a function returns in a new process, as JSON has it.

    Raises:
        subprocess.TimeoutExpired: if that takes more than so many seconds.
    """
    code = ALONE.format(module=func.__module__, name=func.__name__)
    command = [sys.executable, "-W", "ignore", "-c", code, json.dumps(arguments)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=limit)
    return json.loads(run.stdout.splitlines()[-1])


def case_alone(func: Callable[..., Any], named: Mapping[str, Any], limit: float) -> dict[str, Any]:
    """What a function tells of the case of these names, or that it took too long."""
    try:
        told = alone(func, *named.values(), limit=limit)
    except subprocess.TimeoutExpired:
        told = {"refusal": f"more than {limit:g} seconds"}
    return {**named, **told}
