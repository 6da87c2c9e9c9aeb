"""Cells of the matrix in a process of their own: what torch keeps of one would reach others.

``python -m tests.compiled.fresh GROUP NUMBER`` prints, for each cell of a group from this number
on, a line: its door, its function, and ``right`` or the first words of the error. It ends behind a
cell that fails, unless its door is listed, as a trace that fails may break the next one.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import jacfunc
from tests.compiled.test_matrix import DOUBLE, FUNCTION_DOORS, FUNCTIONS, MODULE_DOORS, MODULES
from tests.compiled.test_matrix import drawn as drawn_of

Cell = tuple[str, str]

INDUCTOR: list[Cell] = [("hessian", "joints"), ("ggn product", "perceptron")]
"""Cells that are compiled by Inductor: each takes seconds."""

BY_METHODS = "inside torch.compile products must be taken by methods"
DOORS_LISTED = {
    "linearized": BY_METHODS,
    "linearized, transposed": BY_METHODS,
    "hessian operator": BY_METHODS,
    "gram": "outside of torch.compile",
    "hessian over forward": "outside of torch.compile",
    "graph": "it must be called outside of transforms",
    "plan": "An opaque object was created",
}
"""Doors that can't be called inside a function that torch compiles, with what is said then."""
CELLS_LISTED: dict[Cell, str] = {
    ("vmap jacfwd", "indexed"): "Dynamo failed to run FX node with fake tensors",
    ("vmap hessian", "normalized"): "Dynamo failed to run FX node with fake tensors",
    # nothing is watched inside torch.compile, and torch.func's own answer is as wrong
    ("vmap jacfwd", "solved"): "Tensor-likes are not close",
    ("jacrev of jacfwd", "normalized"): "Tensor-likes are not close",
    ("jacrev of jacfwd", "solved"): "Tensor-likes are not close",
}
"""Cells that torch's compiler can't trace, or where torch itself is wrong."""


def inside(every: bool) -> list[Cell]:
    """Cells under ``torch.compile``: doors with a function each; half of those that work."""
    names, few = [*FUNCTIONS], []
    for n, door in enumerate(FUNCTION_DOORS):
        if n % 2 == 0 or door in DOORS_LISTED or "methods" in door:
            few.append((door, names[(5 * n + 1) % len(names)]))
    all_of_them = [(door, name) for door in FUNCTION_DOORS for name in names]
    return all_of_them if every else few


GROUPS: dict[str, Callable[[], list[Cell]]] = {
    "inductor": lambda: INDUCTOR,
    "inside": lambda: inside(False),
    "every": lambda: inside(True),
}


def by_inductor(cell: Cell) -> None:
    """Compile by Inductor, and compare at other numbers."""
    door, name = cell
    if name in FUNCTIONS:
        (derive, oracle), func = FUNCTION_DOORS[door], FUNCTIONS[name]
        points = [drawn_of(4), 0.5 - drawn_of(4)]
    else:
        (derive, oracle), func = MODULE_DOORS[door], MODULES[name]().to(DOUBLE)
        points = [drawn_of(3, 12, seed=3), drawn_of(3, 12, seed=4)]
    compiled = jacfunc.compile(derive(func), backend="inductor")
    compare(compiled, lambda x: oracle(func, x), points)
    assert len(compiled.compilations) == 1


def by_torch(cell: Cell) -> None:
    """Call the door inside a function under ``torch.compile``."""
    derive, oracle = FUNCTION_DOORS[cell[0]]
    func = FUNCTIONS[cell[1]]
    compiled = torch.compile(lambda x: derive(func)(x), backend="eager", fullgraph=True)
    compare(compiled, lambda x: oracle(func, x), [drawn_of(4), 0.5 - drawn_of(4)])


def compare(ours: Callable[[Tensor], Any], want: Callable[[Tensor], Any], at: list[Tensor]) -> None:
    for x in at:
        torch.testing.assert_close(ours(x), want(x), rtol=1e-6, atol=1e-7)


def results(cells: list[Cell], check: Callable[[Cell], None]) -> Iterator[tuple[str, str, str]]:
    for cell in cells:
        torch.manual_seed(0)
        try:
            check(cell)
            word = "right"
        except Exception as error:  # whatever comes is told
            word = f"{type(error).__name__}: {error}"[:3000]
        torch.compiler.reset()
        yield *cell, word
        if word != "right" and cell[0] not in DOORS_LISTED:
            break


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    group, number = sys.argv[1:]
    check = by_inductor if group == "inductor" else by_torch
    for result in results(GROUPS[group]()[int(number) :], check):
        print(json.dumps(result), flush=True)
