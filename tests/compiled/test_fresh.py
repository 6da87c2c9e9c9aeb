"""Cells of the matrix in fresh processes: by Inductor, and inside functions that torch compiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compiled.fresh import INDUCTOR, inside

LISTED: dict[tuple[str, str], str] = {}
"""What does not work under ``torch.compile``, with torch's own error."""


def results(*args: str) -> dict[tuple[str, str], str]:
    """What became of each cell in a process of its own."""
    command = [sys.executable, "-m", "tests.compiled.fresh", *args]
    root = Path(__file__).parents[2]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = map(json.loads, run.stdout.splitlines())
    return {(door, name): word for door, name, word in lines}


def test_by_inductor() -> None:
    assert results("inductor") == dict.fromkeys(INDUCTOR, "right")


@pytest.mark.parametrize("number", range(2))
def test_inside_what_torch_compiles(number: int) -> None:
    every = ["every"] if os.environ.get("JACFUNC_EVERY_KIND") == "1" else []
    told = results(str(number), *every)
    assert told.keys() == set(inside(number, bool(every)))
    wrong = {
        cell: word
        for cell, word in told.items()
        if (LISTED[cell] not in word if cell in LISTED else word != "right")
    }
    assert not wrong
