"""Bad inputs of ``compile``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import jacfunc
from tests.kinds.bad_inputs import Bad

X = torch.ones(3)


def called(func: Callable[..., Any], *args: Any, **options: Any) -> Callable[[], Any]:
    """A call of what was compiled."""
    return lambda: jacfunc.compile(func, **{"backend": "replay", **options})(*args)


def counting(x: Tensor) -> Tensor:
    counting.calls += 1  # type: ignore[attr-defined]
    return x.sin()


counting.calls = 0  # type: ignore[attr-defined]
ROWS = [
    Bad("compile", "no function", called(X), TypeError, "func must be callable"),  # type: ignore[arg-type]
    Bad(
        "compile",
        "backend",
        called(torch.sin, X, backend="llvm"),
        ValueError,
        "backend must be one of 'inductor', 'replay', 'aot', 'cudagraphs', got 'llvm'",
    ),
    Bad(
        "compile",
        "aot without a directory",
        called(torch.sin, X, backend="aot"),
        ValueError,
        "directory must come with backend='aot'",
    ),
    Bad(
        "compile",
        "a directory for nothing",
        called(torch.sin, X, directory="here"),
        ValueError,
        "directory must come with backend='aot'",
    ),
    Bad(
        "compile",
        "directory",
        called(torch.sin, X, backend="aot", directory=3),
        TypeError,
        "directory must be a path, got int",
    ),
    Bad(
        "compile",
        "CUDA graphs on a CPU",
        called(torch.sin, X, backend="cudagraphs"),
        ValueError,
        "backend='cudagraphs' needs tensors on CUDA, got others",
    ),
    Bad(
        "compile",
        "a branch on numbers",
        called(lambda x: x if x.sum() > 0 else -x, X),
        NotImplementedError,
        "func must be one that can be traced, got an error.*torch.where",
    ),
    Bad(
        "compile",
        "random numbers",
        called(lambda x: x * torch.rand(3), X),
        ValueError,
        "func must draw no random numbers",
    ),
    Bad("compile", "counting", called(counting, X), ValueError, "func must change nothing"),
    Bad(
        "compile",
        "an object among arguments",
        called(lambda x, model: model(x), X, torch.nn.Tanh()),
        ValueError,
        "arguments must be trees of tensors and plain values, got Tanh",
    ),
    Bad(
        "compile",
        "an object for a result",
        called(lambda x: (x, torch.nn.Tanh()), X),
        ValueError,
        "what is compiled must return tensors and plain values, got Tanh",
    ),
    Bad(
        "compile",
        "something that may change unseen",
        called(lambda x, steps=iter(range(99)): x * next(steps), X),  # noqa: B008
        ValueError,
        "func must refer to tensors, modules, functions and plain values, got range_iterator",
    ),
    Bad(
        "compile",
        "a gradient at a point",
        lambda: jacfunc.compile(torch.mul, backend="replay").at(X)(X.clone().requires_grad_()),
        NotImplementedError,
        "a function at a point must be called outside of transforms",
    ),
    Bad(
        "compile",
        "an object at a point",
        lambda: jacfunc.compile(lambda x, model: model(x), backend="replay").at(X)(torch.nn.Tanh()),
        ValueError,
        "arguments must be trees of tensors and plain values, got Tanh",
    ),
]
