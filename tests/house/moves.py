"""How often a call moves from one file of jacfunc to another: ``python -m tests.house.moves``.

Counted at the third call of a small problem, when what is learned once is known: at the first, the
second and the fourth batches are compared.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import jacfunc

HOUSE = str(Path(jacfunc.__file__).parent)


def moves_of(call: Callable[[], Any]) -> tuple[int, int]:
    """How many files a call visits, and how often it enters a file from another one.

    Nothing is collected meanwhile, as then states of modules are forgotten, and made anew.
    """
    gc.disable()
    try:
        for _ in range(2):
            call()
        return _moves_of(call)
    finally:
        gc.enable()
        gc.collect()  # while a module dies Python 3.11 would lose count of its weak references


def _moves_of(call: Callable[[], Any]) -> tuple[int, int]:
    stack: list[str] = []
    visited: set[str] = set()
    moves = 0

    def profile(frame: FrameType, event: str, _: Any) -> None:
        nonlocal moves
        name = frame.f_code.co_filename
        if not name.startswith(HOUSE):
            return
        if event == "call":
            moves += not stack or stack[-1] != name
            stack.append(name)
            visited.add(name)
        elif event == "return" and stack:
            stack.pop()

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return len(visited), moves


class Layers(nn.Sequential):
    """Torch's own layers in a class of a user's, which are called in each call."""


def problems() -> dict[str, Callable[[], Any]]:
    """A small problem for each of the ways through the house."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x, y = torch.randn(5, 3), torch.randn(5, 2)
    jacrev = jacfunc.jacrev(torch.tanh)
    per_sample = jacfunc.module_jacobian(model, per_sample=True, strategy="reverse")
    by_layers = jacfunc.module_jacobian(model, per_sample=True, strategy="structured")
    by_inputs = jacfunc.module_jacobian(model, "inputs", per_sample=True, strategy="reverse")
    ggn = jacfunc.ggn(model, nn.functional.mse_loss)
    own = Layers(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    of_own = jacfunc.module_jacobian(own, per_sample=True, strategy="structured")
    by_own = jacfunc.module_jacobian(own, "inputs", per_sample=True, strategy="reverse")
    norms_of_own = jacfunc.gradient_norms(own, nn.functional.mse_loss)
    ggn_of_own = jacfunc.ggn(own, nn.functional.mse_loss)
    operator = jacfunc.module_operator(model, per_sample=True)
    norms = jacfunc.gradient_norms(model, nn.functional.mse_loss)
    vector = {name: torch.randn_like(param) for name, param in model.named_parameters()}
    return {
        "jacrev": lambda: jacrev(x[0]),
        "module_jacobian, per sample": lambda: per_sample(x),
        "module_jacobian, by inputs": lambda: by_inputs(x),
        "module_jacobian, by layers": lambda: by_layers(x),
        "ntk": lambda: jacfunc.ntk(model, None, x),
        "ggn, diagonal": lambda: ggn(x, y).diagonal(),
        "gradient_norms": lambda: norms(x, y),
        "ggn, product": lambda: ggn(x, y) @ vector,
        "a user's, by inputs": lambda: by_own(x),
        "a user's, by layers": lambda: of_own(x),
        "a user's, ntk": lambda: jacfunc.ntk(own, None, x),
        "a user's, gradient_norms": lambda: norms_of_own(x, y),
        "a user's, ggn product": lambda: ggn_of_own(x, y) @ vector,
        "lstsq": lambda: operator(x).lstsq(y, damping=0.1, center=True),
    }


if __name__ == "__main__":
    for name, call in problems().items():
        files, moves = moves_of(call)
        print(f"{name:28} {files:3} files {moves:4} moves")
