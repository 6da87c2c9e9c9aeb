"""Cells of the matrix in fresh processes: by Inductor, and inside functions that torch compiles."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

from tests.compiled.fresh import CELLS_LISTED, DOORS_LISTED, GROUPS, INDUCTOR, Cell, inside
from tests.compiled.test_matrix import EVERY


def results(group: str) -> dict[Cell, str]:
    """What became of each cell of a group, in processes of their own."""
    told: dict[Cell, str] = {}
    while len(told) < len(GROUPS[group]()):
        command = [sys.executable, "-m", "tests.compiled.fresh", group, str(len(told))]
        root = Path(__file__).parents[2]
        run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr[-3000:]
        told |= {
            (door, name): word for door, name, word in map(json.loads, run.stdout.splitlines())
        }
    return told


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
    told = results("every" if EVERY else "inside")
    assert told.keys() == set(inside(EVERY))
    wrong = {}
    for (door, name), word in told.items():
        words = CELLS_LISTED.get((door, name)) or DOORS_LISTED.get(door)
        if (words is None and word != "right") or (words is not None and words not in word):
            wrong[door, name] = word
    assert not wrong
