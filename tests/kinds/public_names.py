"""Every public name with a call that is right, of which a test makes bad ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree

import jacfunc
from jacfunc.testing import check_jacobian

X, XS = torch.tensor([0.3, -0.5, 0.7]), torch.linspace(-1, 1, 12).view(4, 3)


class OwnError(Exception):
    """What the functions and modules here raise for arguments that mean nothing to them."""


def _floating(trees: Any) -> list[Tensor]:
    leaves = _pytree.tree_leaves(trees)
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point() and x.numel()]


def func(*args: Any, **kwargs: Any) -> Any:
    """A function of anything."""
    every = _floating((args, kwargs))
    if not every or any(x.is_meta or x.layout is not torch.strided for x in every):
        raise OwnError("there is nothing to compute with")
    return X.sin() + sum(x.double().square().sum().to(X.dtype) for x in every)


def number(*args: Any, **kwargs: Any) -> Any:
    """A number of anything."""
    return func(*args, **kwargs).sum()


def of_sample(x: Any) -> Tensor:
    if not isinstance(x, Tensor):
        raise OwnError("there is no tensor")
    return x.sin()


class Model(nn.Module):
    """A linear layer that raises an error of its own for what it can't take."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        for x in _floating((args, kwargs)):
            is_here = x.dtype == torch.float32 and not x.is_meta
            if is_here and x.dim() and x.shape[-1] == 3:
                return self.layer(x)
        raise OwnError("there is no tensor that it can take")


def squared(outputs: Any, targets: Any) -> Tensor:
    """A loss that raises an error of its own for outputs that are none."""
    if not isinstance(outputs, Tensor) or outputs.shape != targets.shape:
        raise OwnError("there is nothing to compare")
    return F.mse_loss(outputs, targets)


torch.manual_seed(0)
MODEL = Model()
GOALS = torch.ones(4, 2)


class Public(NamedTuple):
    """A public name.

    Args:
        door: the name.
        signed: the object whose signature tells the parameters.
        good: a value for each parameter that must have one; ``args`` are positional.
        call: calls it with these.
        free: parameters that must not change the result.
    """

    door: str
    signed: Callable[..., Any]
    good: dict[str, Any]
    call: Callable[..., Any]
    free: frozenset[str] = frozenset()


FREE = frozenset({"chunk_size", "memory", "strategy", "copy", "independent", "randomness"})


def on_a_graph(**options: Any) -> Any:
    """``graph_jacobian`` of a forward pass that is made for each call."""
    x = X.clone().requires_grad_()
    return jacfunc.graph_jacobian(**{"outputs": x.sin(), "inputs": x, **options})


def transform(door: Callable[..., Any]) -> Public:
    def call(x: Any, **options: Any) -> Any:
        return door(**options)(x)

    return Public(door.__name__, door, {"func": func, "x": X}, call, FREE)


def at_once(door: Callable[..., Any], x: Tensor = X) -> Public:
    def call(func: Any, x: Any, **options: Any) -> Any:
        return door(func, x, **options)

    return Public(door.__name__, door, {"func": func, "x": x}, call)


def of_module(door: Callable[..., Any], *inner: Any, **good: Any) -> Public:
    def call(module: Any, x: Any, **options: Any) -> Any:
        made = door(module, **options)(x, *inner)
        made = made.diagonal() if isinstance(made, jacfunc.GaussNewton) else made
        return list(made) if door is jacfunc.stream_jacobian else made

    return Public(door.__name__, door, {"module": MODEL, "x": XS, **good}, call, FREE)


def of_operator(method: str, **good: Any) -> Public:
    """A method of the operator that ``linearize`` makes of a wide matrix."""

    def call(**options: Any) -> Any:
        _, operator = jacfunc.linearize(lambda x: torch.stack([x.prod(), x.sum()]), X)
        return getattr(operator, method)(**options)

    return Public("linearize", getattr(jacfunc.LinearOperator, method), good, call)


OF_FUNCTIONS = [
    *map(
        transform,
        (
            jacfunc.jacrev,
            jacfunc.jacfwd,
            jacfunc.jacobian,
            jacfunc.value_and_jacobian,
            jacfunc.hessian,
            jacfunc.laplacian,
            jacfunc.value_jacobian_laplacian,
            jacfunc.hessian_diagonal,
            jacfunc.divergence,
            jacfunc.gram,
        ),
    ),
    *map(
        at_once, (jacfunc.vjp, jacfunc.linearize, jacfunc.plan, jacfunc.explain, jacfunc.estimate)
    ),
    at_once(check_jacobian, X.double()),
    Public(
        "jvp",
        jacfunc.jvp,
        {"func": func, "primals": (X,), "tangents": (torch.ones(3),)},
        jacfunc.jvp,
    ),
    Public(
        "hvp",
        jacfunc.hvp,
        {"func": number, "primals": (X,), "tangents": (torch.ones(3),)},
        jacfunc.hvp,
    ),
    Public(
        "hessian_operator",
        jacfunc.hessian_operator,
        {"func": number, "x": X},
        lambda func, x, **options: jacfunc.hessian_operator(func, x, **options)[0],
    ),
    Public(
        "vmap",
        jacfunc.vmap,
        {"func": of_sample, "x": XS},
        lambda x, **options: jacfunc.vmap(**options)(x),
        frozenset({"chunk_size", "randomness"}),
    ),
    Public(
        "graph_jacobian",
        jacfunc.graph_jacobian,
        {},
        on_a_graph,
        frozenset({"chunk_size", "memory", "strategy", "retain_graph"}),
    ),
    of_operator("solve", b=torch.ones(2), damping=0.1),
    of_operator("lstsq", b=torch.ones(2), damping=0.1),
    of_operator("quad", middle=torch.ones(3)),
    of_operator("gram"),
    of_operator("inverse", side="rows", damping=0.1),
    Public(
        "compile",
        jacfunc.compile,
        {"transformed": jacfunc.jacrev(func), "backend": "replay"},
        lambda **options: jacfunc.compile(**options).compilations,
    ),
    Public("empty_cache", jacfunc.empty_cache, {}, jacfunc.empty_cache),
    *(
        Public(kind.__name__, kind, {}, kind)
        for kind in (
            jacfunc.Reverse,
            jacfunc.Forward,
            jacfunc.Structured,
            jacfunc.Looped,
            jacfunc.Autotune,
        )
    ),
    Public("Plan", jacfunc.Plan, {"strategy": jacfunc.Reverse(), "reason": "why"}, jacfunc.Plan),
]
"""The doors for functions, and the objects that they take."""

OF_MODULES = [
    of_module(jacfunc.module_jacobian),
    of_module(jacfunc.stream_jacobian),
    of_module(jacfunc.ggn, GOALS, loss=squared),
    of_module(jacfunc.fisher, likelihood="gaussian"),
    of_module(jacfunc.gradient_norms, GOALS, loss=squared),
    of_module(jacfunc.random_projection, size=2),
    of_module(jacfunc.module_operator),
    *(Public(kind.__name__, kind, {"k": 2}, kind) for kind in (jacfunc.TopK, jacfunc.Sampled)),
    of_module(jacfunc.module_hessian, GOALS, loss=squared),
    Public("param_slices", jacfunc.param_slices, {"module": MODEL}, jacfunc.param_slices),
    Public("ntk", jacfunc.ntk, {"func": MODEL, "params": None, "x1": XS}, jacfunc.ntk, FREE),
]
"""The doors for modules."""

JUNK: dict[str, Any] = {
    "None": None,
    "True": True,
    "0": 0,
    "-1": -1,
    "7": 7,
    "1.5": 1.5,
    "nan": float("nan"),
    "complex": 1j,
    "word": "x",
    "no word": "",
    "bytes": b"x",
    "no list": [],
    "no tuple": (),
    "no dict": {},
    "list": [0],
    "tuple": (0, None),
    "names": ["x", 3],
    "dict": {"x": 0},
    "set": {1},
    "object": object(),
    "class": int,
    "tensor": torch.ones(3),
    "matrix": torch.ones(2, 3),
    "float64": torch.ones(4, 3, dtype=torch.float64),
    "integers": torch.ones(4, 3, dtype=torch.int64),
    "booleans": torch.ones(3, dtype=torch.bool),
    "complex tensor": torch.ones(4, 3, dtype=torch.complex64),
    "meta": torch.ones(4, 3, device="meta"),
    "sparse": torch.eye(3).to_sparse(),
    "no entries": torch.ones(0, 3),
    "lone number": torch.tensor(1.0),
    "array": np.ones(3),
    "tree": {"a": torch.ones(3), "b": (torch.ones(2), None)},
    "list of tensors": [torch.ones(3), torch.ones(3)],
    "module": nn.Linear(3, 2),
    "function": torch.sin,
    "function of nothing": lambda: None,
    "function that fails": lambda *args, **kwargs: [][0],
    "dtype": torch.int32,
    "device": torch.device("meta"),
    "strategy": jacfunc.Looped(),
    "generator": torch.Generator(),
}
"""Things that are passed where something else is meant; for some they are right."""
