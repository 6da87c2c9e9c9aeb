"""Bad inputs of the doors for functions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import jacfunc
from jacfunc.testing import check_jacobian
from tests.kinds.bad_inputs import Bad

X, Y, XS = torch.ones(3), torch.ones(2), torch.ones(4, 3)
INTS, COMPLEX = torch.tensor([1, 2]), torch.ones(2, dtype=torch.complex64)

TRANSFORMS: dict[str, Callable[..., Any]] = {
    "jacrev": jacfunc.jacrev,
    "jacfwd": jacfunc.jacfwd,
    "jacobian": jacfunc.jacobian,
    "value_and_jacobian": jacfunc.value_and_jacobian,
    "hessian": jacfunc.hessian,
}
TRACES: dict[str, Callable[..., Any]] = {
    "laplacian": jacfunc.laplacian,
    "value_jacobian_laplacian": jacfunc.value_jacobian_laplacian,
    "hessian_diagonal": jacfunc.hessian_diagonal,
    "divergence": jacfunc.divergence,
}


def at(door: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """A call of what the door makes of a function and options, at arguments."""
    return lambda func, *options, **named: door(func, *options, **named)(*args)


def directly(door: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """A call of a door that takes function and arguments at once."""
    return lambda func, **named: door(func, *args, **named)


def pushed(func: Any, **named: Any) -> Any:
    return jacfunc.jvp(func, (X,), (X,), **named)


def by_numpy(x: Tensor) -> Tensor:
    return torch.from_numpy(np.sin(x.detach().numpy()))


def by_number(x: Tensor) -> Tensor:
    return torch.tensor(2 * x.sum().item())


CALLS: dict[str, Callable[..., Any]] = {
    **{name: at(door, X) for name, door in (TRANSFORMS | TRACES).items()},
    "jvp": pushed,
    "vjp": directly(jacfunc.vjp, X),
    "linearize": directly(jacfunc.linearize, X),
    "plan": directly(jacfunc.plan, X),
    "explain": directly(jacfunc.explain, X),
    "estimate": directly(jacfunc.estimate, X),
    "gram": at(jacfunc.gram, X),
    "check_jacobian": directly(check_jacobian, X.double()),
}
"""A call of each door with a function, at one vector."""

POINTS: dict[str, Callable[..., Any]] = {
    **{
        name: lambda func, x, door=door: door(func)(x)
        for name, door in (TRANSFORMS | TRACES).items()
    },
    "jvp": lambda func, x: jacfunc.jvp(func, (x,), (x,)),
    "vjp": jacfunc.vjp,
    "linearize": jacfunc.linearize,
    "plan": jacfunc.plan,
    "explain": jacfunc.explain,
    "estimate": jacfunc.estimate,
    "gram": lambda func, x: jacfunc.gram(func)(x),
    "check_jacobian": check_jacobian,
}
"""A call of each door with a function and a point."""

WITH_ARGNUMS = [*TRANSFORMS, *TRACES, "plan", "explain", "estimate"]
WITH_AUX = [name for name in CALLS if name not in ("gram", "check_jacobian")]
WITH_MEMORY = [*TRANSFORMS, "divergence", "plan", "explain"]
WITH_STRATEGY = ["jacobian", "value_and_jacobian", "hessian", "divergence", "plan", "explain"]


class NoBlocks:
    """A strategy that forgets to return."""

    def materialize(self, operator: Any) -> Any:
        return None


class WrongBlocks:
    """A strategy that returns a block of another shape."""

    def materialize(self, operator: Any) -> Any:
        return ((torch.zeros(2, 2),),)


class NoMethod:
    """An object whose ``materialize`` can't be called."""

    materialize = 3


def _everywhere() -> list[Bad]:
    """What every door for functions refuses."""
    rows = []
    for door, call in CALLS.items():
        point = POINTS[door]
        rows += [
            Bad(door, "a number for func", partial(call, 3), TypeError, "func must be callable"),
            Bad(door, "None for func", partial(call, None), TypeError, "func must be callable"),
            Bad(door, "a tensor for func", partial(call, X), TypeError, "func must be callable"),
            Bad(
                door,
                "a function that returns None",
                partial(call, lambda x: None),
                TypeError,
                "func must return tensors, got None",
            ),
            Bad(
                door,
                "a function that returns a number",
                partial(call, lambda x: 1.0),
                TypeError,
                "func must return tensors, got float",
            ),
            Bad(
                door,
                "a function that returns integers",
                partial(call, lambda x: x.argmax()),
                TypeError,
                "func must return at least one floating point tensor",
            ),
            Bad(
                door,
                "integers",
                partial(point, torch.sin, INTS),
                TypeError,
                "argument 0 must hold at least one floating point tensor",
            ),
            Bad(
                door,
                "complex numbers",
                partial(point, torch.sin, COMPLEX),
                NotImplementedError,
                "inputs must be real",
            ),
            Bad(
                door,
                "a sparse tensor",
                partial(point, lambda x: x.to_dense(), torch.eye(2).to_sparse()),
                NotImplementedError,
                "inputs must be dense",
            ),
        ]
        if door != "estimate":  # which has no numbers to leave torch with
            rows += [
                Bad(
                    door,
                    "a function by Python numbers",
                    partial(call, by_number),
                    ValueError,
                    "func must compute its outputs by torch",
                )
            ]
        if door not in ("estimate", "jacfwd", "jvp"):  # forward mode has no memory to read
            rows += [
                Bad(
                    door,
                    "a function by NumPy",
                    partial(call, by_numpy),
                    ValueError,
                    "func must compute its outputs by torch",
                )
            ]
    return rows


def _of_options() -> list[Bad]:
    """Options that several doors share."""
    rows = []
    for door in WITH_ARGNUMS:
        for argnums, error, words in (
            (True, TypeError, "argnums must be an int or a tuple of ints"),
            ((False,), TypeError, "argnums must be an int or a tuple of ints"),
            ("x", TypeError, "argnums must be an int or a tuple of ints"),
            ((), ValueError, "argnums must name at least one argument"),
            (3, ValueError, "argnums must be positions among the 1"),
            ((0, 0), ValueError, "argnums must be unique"),
        ):
            call = partial(CALLS[door], torch.sin, argnums=argnums)
            rows.append(Bad(door, f"argnums={argnums!r}", call, error, words))
    for door in WITH_AUX:
        for has_aux in ("x", 1, None):
            call = partial(CALLS[door], torch.sin, has_aux=has_aux)
            words = "has_aux must be True or False"
            rows.append(Bad(door, f"has_aux={has_aux!r}", call, TypeError, words))
        call = partial(CALLS[door], torch.sin, has_aux=True)
        words = r"with has_aux=True func must return \(output, aux\)"
        rows.append(Bad(door, "no aux", call, TypeError, words))
    for door in sorted({*WITH_MEMORY, *TRACES, "estimate"}):
        for size, error in ((0, ValueError), (-1, ValueError), ("2", TypeError), (True, TypeError)):
            call = partial(CALLS[door], torch.sin, chunk_size=size)
            rows.append(Bad(door, f"chunk_size={size!r}", call, error, "chunk_size must be"))
    for door in WITH_MEMORY:
        for memory, error in (("2 parsecs", ValueError), (0, ValueError), (1.5, TypeError)):
            call = partial(CALLS[door], torch.sin, memory=memory)
            rows.append(Bad(door, f"memory={memory!r}", call, error, "memory must be"))
        call = partial(CALLS[door], torch.sin, memory="1 B")
        rows.append(Bad(door, "too little memory", call, ValueError, "memory must hold"))
    for door in WITH_STRATEGY:
        for strategy, error, words in (
            ("backward", ValueError, "strategy must be one of"),
            (3, TypeError, "strategy must be a name or an object"),
            (jacfunc.Reverse, TypeError, "strategy must be a name or an object"),
            (NoMethod(), TypeError, "strategy must be a name or an object"),
            (NoBlocks(), ValueError, "materialize of NoBlocks must return"),
            (WrongBlocks(), ValueError, "materialize of WrongBlocks must return"),
        ):
            if door == "plan" and error is ValueError and not isinstance(strategy, str):
                continue  # it runs no strategy
            call = partial(CALLS[door], torch.sin, strategy=strategy)
            name = strategy if isinstance(strategy, str) else type(strategy).__name__
            rows.append(Bad(door, f"strategy: {name}", call, error, words))
    return rows


def _of_out() -> list[Bad]:
    """Tensors that no result can be written into."""
    rows = []
    vector = torch.arange(3.0)
    for door, transform in TRANSFORMS.items():
        shape = (3, 3, 3) if door == "hessian" else (3, 3)
        zeros = torch.zeros(shape)
        with torch.inference_mode():
            inference = torch.zeros(shape)
        for name, out, error, words in (
            ("integers", zeros.long(), TypeError, "out must be real and floating point"),
            ("booleans", zeros.bool(), TypeError, "out must be real and floating point"),
            ("complex", zeros.to(torch.complex64), TypeError, "out must be real"),
            ("an array", zeros.numpy(), TypeError, "out must be a tree of tensors"),
            ("without numbers", zeros.to("meta"), ValueError, "out must hold numbers"),
            ("expanded", zeros[:1].expand(shape), ValueError, "out must have a place for each"),
            (
                "overlapping",
                torch.zeros(60).as_strided(shape, (1,) * len(shape)),
                ValueError,
                "out must have a place for each entry",
            ),
            ("sparse", zeros.to_sparse(), ValueError, "out must be dense"),
            ("of inference mode", inference, ValueError, "out must be dense"),
            ("with a graph", zeros.clone().requires_grad_(), ValueError, "out must be plain"),
            ("of another shape", torch.zeros(4, 3), ValueError, "out must hold a tensor"),
            ("of turned shape", zeros.view(-1), ValueError, "out must have the shapes"),
            ("two tensors", (zeros, zeros.clone()), ValueError, "out must hold a tensor"),
        ):
            call = partial(at(transform, X), torch.sin, out=out)
            rows.append(Bad(door, f"out: {name}", call, error, words))
        pair = (zeros, zeros)
        call = partial(at(transform, X), lambda x: (x.sin(), x.cos()), out=pair)
        words = "out must be tensors that do not share memory"
        rows.append(Bad(door, "out: one tensor twice", call, ValueError, words))
        one = vector[:1]
        own = partial(at(transform, one), torch.sin, out=one.view((1,) * len(shape)))
        rows.append(
            Bad(door, "out: the argument", own, ValueError, "out must not be what the call")
        )
        model = nn.Linear(1, 1)
        bias = model.bias.detach().view((1,) * len(shape))
        own = partial(at(transform, one), model, out=bias)
        rows.append(Bad(door, "out: a parameter", own, ValueError, "out must not be what the call"))
    return rows


def _of_products() -> list[Bad]:
    """Bad inputs of jvp, vjp and vmap."""
    jvp, vjp, vmap = jacfunc.jvp, jacfunc.vjp, jacfunc.vmap

    def tangents(*seeds: Any) -> Callable[[], Any]:
        return lambda: jvp(torch.sin, (X,), *seeds)

    def cotangents(seeds: Any) -> Callable[[], Any]:
        return lambda: vjp(lambda x: {"a": x.sin()}, X)[1](seeds)

    rows = [
        Bad("jvp", "a tensor for primals", lambda: jvp(torch.sin, X, (X,)), TypeError, "primals"),
        Bad("jvp", "None for primals", lambda: jvp(torch.sin, None, (X,)), TypeError, "primals"),
        Bad("jvp", "no primals", lambda: jvp(lambda: X, (), ()), ValueError, "there must be"),
        Bad("jvp", "a tensor for tangents", tangents(X), TypeError, "tangents must be a tuple"),
        Bad("jvp", "None for tangents", tangents(None), ValueError, "tangents must have"),
        Bad("jvp", "too many tangents", tangents((X, X)), ValueError, "tangents must have"),
        Bad("jvp", "a tangent of None", tangents((None,)), ValueError, "tangents must match in sh"),
        Bad("jvp", "a short tangent", tangents((Y,)), ValueError, "tangents must match in shape"),
        Bad(
            "jvp", "integer tangents", tangents((X.long(),)), TypeError, "tangents must match in d"
        ),
        Bad("vjp", "no primals", lambda: vjp(lambda: X), ValueError, "there must be at least one"),
        Bad("vjp", "other keys", cotangents({"b": X}), ValueError, "cotangents must have the str"),
        Bad("vjp", "no tree", cotangents(X), ValueError, "cotangents must have the structure"),
        Bad("vjp", "a number", cotangents({"a": 1.0}), ValueError, "cotangents must match in sh"),
        Bad("vjp", "short", cotangents({"a": Y}), ValueError, "cotangents must match in shape"),
        Bad("vjp", "of float64", cotangents({"a": X.double()}), TypeError, "cotangents must match"),
        Bad("vmap", "a number for func", lambda: vmap(3)(XS), TypeError, "func must be callable"),
        Bad(
            "vmap", "None", lambda: vmap(lambda x: None)(XS), TypeError, "func must return tensors"
        ),
        Bad("vmap", "a number", lambda: vmap(lambda x: 1.0)(XS), TypeError, "func must return"),
        Bad("vmap", "no arguments", lambda: vmap(torch.sin)(), ValueError, "mapped tensors must"),
        Bad("vmap", "a lone number", lambda: vmap(torch.sin)(1.0), ValueError, "mapped tensors"),
        Bad(
            "vmap",
            "batches of two sizes",
            lambda: vmap(torch.add)(XS, torch.ones(5, 3)),
            ValueError,
            "mapped tensors must have the same size",
        ),
        Bad(
            "vmap",
            "no batch",
            lambda: vmap(torch.sin)(torch.tensor(1.0)),
            ValueError,
            "in_dims must",
        ),
    ]
    for in_dims, error in (
        ({}, TypeError),
        ("x", TypeError),
        (None, TypeError),
        (1.0, TypeError),
        (True, TypeError),
        (("a",), TypeError),
        ((1.5,), TypeError),
        ((True,), TypeError),
        ((), ValueError),
        ((0, 0), ValueError),
        (2, ValueError),
        (-3, ValueError),
        (({"a": 0},), ValueError),
    ):
        call = partial(at(vmap, XS), torch.sin, in_dims=in_dims)
        rows.append(Bad("vmap", f"in_dims={in_dims!r}", call, error, "in_dims must"))
    nothing = partial(at(vmap, XS), torch.sin, in_dims=(None,))
    rows.append(Bad("vmap", "in_dims=(None,)", nothing, ValueError, "mapped tensors must have"))
    for out_dims in ("x", None, 1.0, True, (0, 0), 2, {"a": 0}):
        call = partial(at(vmap, XS), torch.sin, out_dims=out_dims)
        rows.append(Bad("vmap", f"out_dims={out_dims!r}", call, ValueError, "out_dims must"))
    for randomness in ("x", None, 1, True, []):
        call = partial(at(vmap, XS), torch.sin, randomness=randomness)
        words = "randomness must be 'error', 'same' or 'different'"
        rows.append(Bad("vmap", f"randomness={randomness!r}", call, ValueError, words))
        call = partial(at(jacfunc.jacfwd, X), torch.sin, randomness=randomness)
        rows.append(Bad("jacfwd", f"randomness={randomness!r}", call, ValueError, words))
        call = partial(jacfunc.Forward, randomness=randomness)
        rows.append(Bad("Forward", f"randomness={randomness!r}", call, ValueError, words))
    for size in (0, "2", True):
        call = partial(at(vmap, XS), torch.sin, chunk_size=size)
        error = ValueError if size == 0 and size is not False else TypeError
        rows.append(Bad("vmap", f"chunk_size={size!r}", call, error, "chunk_size must be"))
    return rows


def _of_objects() -> list[Bad]:
    """Constructors of strategies and plans, the table of costs, and the check of Jacobians."""
    rows = []
    for kind in (jacfunc.Reverse, jacfunc.Forward, jacfunc.Structured):
        for size, error in ((0, ValueError), (1.5, TypeError), (True, TypeError), ([], TypeError)):
            call = partial(kind, size)
            rows.append(Bad(kind.__name__, f"chunk {size!r}", call, error, "chunk_size must be"))
    for over in ("both", None, [], 1):
        call = partial(jacfunc.Looped, over)
        rows.append(Bad("Looped", f"over={over!r}", call, ValueError, "over must be 'rows' or"))
    for cache in (3, True, [], b"x"):
        call = partial(jacfunc.Autotune, cache)
        rows.append(Bad("Autotune", f"cache={cache!r}", call, TypeError, "cache must be the path"))
    for memory, error in (("x", ValueError), (1.5, TypeError)):
        call = partial(jacfunc.Autotune, memory=memory)
        rows.append(Bad("Autotune", f"memory={memory!r}", call, error, "memory must be"))
    checked = partial(check_jacobian, torch.sin, X.double())
    costs = jacfunc.estimate(torch.sin, X)
    vmapped = partial(torch.vmap(lambda x: jacfunc.estimate(torch.sin, x)), XS)
    rows += [
        Bad("Plan", "a name", lambda: jacfunc.Plan("reverse", "x"), TypeError, "strategy must be"),
        Bad("Plan", "a number", lambda: jacfunc.Plan(3, "x"), TypeError, "strategy must be"),
        Bad(
            "Plan",
            "names to try next",
            lambda: jacfunc.Plan(jacfunc.Reverse(), "x", otherwise=("forward",)),
            TypeError,
            "strategy must be",
        ),
        Bad("estimate", "inside vmap", vmapped, ValueError, "it must be called outside"),
        Bad("estimate", "a row that is none", lambda: costs["x"], KeyError, "the table has the"),
        Bad(
            "check_jacobian", "float32", partial(check_jacobian, torch.sin, X), TypeError, "the po"
        ),
        Bad(
            "check_jacobian",
            "a name for strategies",
            partial(checked, strategies="reverse"),
            TypeError,
            "strategies must be",
        ),
        Bad(
            "check_jacobian",
            "a number for strategies",
            partial(checked, strategies=3),
            TypeError,
            "strategies must be",
        ),
        Bad(
            "check_jacobian",
            "no strategies",
            partial(checked, strategies=()),
            ValueError,
            "strategies must name at least one",
        ),
        Bad(
            "check_jacobian",
            "an unknown strategy",
            partial(checked, strategies=("x",)),
            ValueError,
            "strategy must be one of",
        ),
        Bad(
            "check_jacobian",
            "a strategy without blocks",
            partial(checked, strategies=(NoBlocks(),)),
            TypeError,
            "must return a tuple of rows of blocks",
        ),
        Bad("check_jacobian", "rtol='x'", partial(checked, rtol="x"), TypeError, "rtol must be"),
        Bad("check_jacobian", "rtol=-1", partial(checked, rtol=-1), ValueError, "rtol must be"),
        Bad(
            "check_jacobian",
            "atol=nan",
            partial(checked, atol=float("nan")),
            ValueError,
            "atol must be",
        ),
    ]
    return rows


def _of_graphs() -> list[Bad]:
    """Bad inputs of graph_jacobian."""

    def on_a_graph(**options: Any) -> Any:
        x = X.clone().requires_grad_()
        return jacfunc.graph_jacobian(x.sin(), x, **options)

    def into_its_input() -> Any:
        x = torch.ones(1).requires_grad_()
        return jacfunc.graph_jacobian(x.sin(), x, out=x.detach().view(1, 1))

    zeros = torch.zeros(3, 3)
    options: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
        "per_sample=1": ({"per_sample": 1}, TypeError, "per_sample must be True or False"),
        "flat='x'": ({"flat": "x"}, TypeError, "flat must be True or False"),
        "create_graph=None": ({"create_graph": None}, TypeError, "create_graph must be True or"),
        "retain_graph=0": ({"retain_graph": 0}, TypeError, "retain_graph must be True or False"),
        "chunk_size=0": ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1"),
        "memory='x'": ({"memory": "x"}, ValueError, "memory must be"),
        "dtype=int64": ({"dtype": torch.int64}, TypeError, "dtype must be real and floating"),
        "device='nowhere'": ({"device": "nowhere"}, ValueError, "device must be one that torch"),
        "out: integers": ({"out": zeros.long()}, TypeError, "out must be real and floating"),
        "out: meta": ({"out": zeros.to("meta")}, ValueError, "out must hold numbers"),
    }
    return [
        Bad("graph_jacobian", "out: its input", into_its_input, ValueError, "out must not be what"),
        *(
            Bad("graph_jacobian", name, partial(on_a_graph, **bad), error, words)
            for name, (bad, error, words) in options.items()
        ),
    ]


HUGE = 2**24
"""Entries of a vector whose Jacobian has 2⁵⁰ bytes, more than any machine."""


def _of_size() -> list[Bad]:
    """Results, and tensors of a function's own, that no machine can hold."""
    many, rows = torch.ones(1).expand(HUGE), []
    words = "the result and all else that it needs must fit into memory"
    for door in ("jacrev", "jacfwd", "jacobian", "value_and_jacobian"):
        call = partial(POINTS[door], lambda x: x * 2, many)
        rows.append(Bad(door, "a huge result", call, RuntimeError, f"{words}.* 1 PiB"))
    own = lambda x: x.sum() + torch.empty(2**48)  # noqa: E731
    doors = ("jacrev", "jacfwd", "jacobian", "hessian", "jvp", "vjp", "gram", "plan")
    calls = {**{door: CALLS[door] for door in doors}, "vmap": at(jacfunc.vmap, XS)}
    return rows + [
        Bad(door, "a huge tensor", partial(call, own), RuntimeError, words)
        for door, call in calls.items()
    ]


ROWS = [
    *_everywhere(),
    *_of_options(),
    *_of_out(),
    *_of_products(),
    *_of_objects(),
    *_of_graphs(),
    *_of_size(),
]
