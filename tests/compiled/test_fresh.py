"""Cells of the matrix in fresh processes: by Inductor, and inside functions that torch compiles."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

from tests.compiled.fresh import CELLS_LISTED, DOORS_LISTED, INDUCTOR, inside
from tests.compiled.test_matrix import EVERY


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


def test_what_torch_writes_into_the_environment_is_no_change() -> None:
    """Its tracer does so when it is used first."""
    code = """
        import os, torch, jacfunc
        os.environ["SCALE"] = "2"
        func = lambda x: float(os.environ["SCALE"]) * x
        jac = jacfunc.compile(jacfunc.jacrev(func), backend="replay")
        for scale in (2, 3):
            os.environ["SCALE"] = str(scale)
            torch.testing.assert_close(jac(torch.ones(2)), scale * torch.eye(2))
        assert len(jac.compilations) == 2
    """
    run = subprocess.run([sys.executable, "-c", dedent(code)], capture_output=True, check=False)
    assert run.returncode == 0, run.stderr


def test_inside_what_torch_compiles() -> None:
    every = ["every"] if EVERY else []
    told = results("inside", *every)
    assert told.keys() == set(inside(bool(every)))
    wrong = {}
    for (door, name), word in told.items():
        words = CELLS_LISTED.get((door, name)) or DOORS_LISTED.get(door)
        if (words is None and word != "right") or (words is not None and words not in word):
            wrong[door, name] = word
    assert not wrong
