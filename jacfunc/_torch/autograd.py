"""Plain autograd without the checks of its public functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, _engine_run_backward

from jacfunc._torch.levels import NOTHING
from jacfunc._types import Leaves


class _Recording:
    """``torch.enable_grad()`` where gradients are off, in two calls of Python's instead of ten."""

    def __enter__(self) -> None:
        torch._C._set_grad_enabled(True)

    def __exit__(self, *_: object) -> None:
        torch._C._set_grad_enabled(False)


_RECORDING = _Recording()


def recording() -> AbstractContextManager[Any]:
    """A context in which autograd records, whatever mode the caller is in."""
    if torch.is_inference_mode_enabled():
        return torch.inference_mode(False)
    return NOTHING if torch.is_grad_enabled() else _RECORDING


def run_backward(
    outputs: Leaves,
    inputs: Sequence[Tensor | GradientEdge],
    cotangents: Leaves,
    create_graph: bool,
    retain_graph: bool = True,
) -> tuple[Tensor | None, ...]:
    """The products of ``torch.autograd.grad`` with ``allow_unused``."""
    products: tuple[Tensor | None, ...] = _engine_run_backward(
        outputs,
        cotangents,
        retain_graph,
        create_graph,
        inputs,
        allow_unreachable=True,
        accumulate_grad=False,
    )
    return products


untracked: Callable[[], AbstractContextManager[Any]] = torch._C.DisableTorchFunction
"""Makes a context in which no watch outside sees operations, for bookkeeping of jacfunc's own.

A watch that looked at each step of it took a tenth of a small network's evaluation.
"""

tracked: Callable[[], AbstractContextManager[Any]] = torch._C._EnableTorchFunction
"""Makes a context inside an untracked one in which modes see operations again."""


def uncast(run: Callable[..., Any], takes_graphs: bool, *inputs: Tensor) -> Any:
    """What a trace returns without autocast, as casts are operators of it, and without a graph."""
    if torch._C._is_any_autocast_enabled() or (takes_graphs and torch.is_grad_enabled()):
        with torch.no_grad(), torch._C._DisableAutocast():
            return run(*inputs)
    return run(*inputs)
