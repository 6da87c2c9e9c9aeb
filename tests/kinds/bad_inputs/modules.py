"""Bad inputs of the doors for modules: those that all doors share, and those of each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence

import jacfunc
from tests.kinds.bad_inputs import Bad

X, Y = torch.arange(15.0).sin().view(5, 3), torch.zeros(5, dtype=torch.long)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


class Returning(nn.Module):
    """A layer, and what is made of its output."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.make = nn.Linear(3, 2), make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.layer(x))


def ones(module: Any = None) -> dict[str, Tensor]:
    return {name: torch.ones_like(p) for name, p in (module or net()).named_parameters()}


# --- doors ---

Door = Callable[..., Any]


def per_sample(module: Any, *args: Any, **options: Any) -> Any:
    return jacfunc.module_jacobian(module, per_sample=True, **options)(*args)


def streamed(module: Any, *args: Any, **options: Any) -> Any:
    return list(jacfunc.stream_jacobian(module, per_sample=True, **options)(*args))


def kernel(module: Any, *args: Any, **options: Any) -> Any:
    return jacfunc.ntk(module, None, args, **options)


def diagonal(module: Any, *args: Any, **options: Any) -> Any:
    return jacfunc.ggn(module, F.cross_entropy, **options)(*args, Y).diagonal()


def drawn(module: Any, *args: Any, **options: Any) -> Any:
    return jacfunc.fisher(module, "categorical", **options)(*args).diagonal()


def norms(module: Any, *args: Any, **options: Any) -> Any:
    return jacfunc.gradient_norms(module, F.cross_entropy, **options)(*args, Y)


def projected(module: Any, *args: Any, **options: Any) -> Any:
    return jacfunc.random_projection(module, 4, **options)(*args)


def operated(module: Any, *args: Any, **options: Any) -> Any:
    return jacfunc.module_operator(module, per_sample=True, **options)(*args)


DOORS: dict[str, Door] = {
    "module_jacobian": per_sample,
    "stream_jacobian": streamed,
    "ntk": kernel,
    "ggn": diagonal,
    "fisher": drawn,
    "gradient_norms": norms,
    "random_projection": projected,
    "module_operator": operated,
}
Shared = tuple[Callable[[Door], Any], type[Exception], str]


def choosing(select: Any) -> Callable[[Door], Any]:
    return lambda door: door(net(), X, select=select)


def given(*args: Any, **options: Any) -> Callable[[Door], Any]:
    return lambda door: door(net(), *args, **options)


def made(make: Callable[[], nn.Module], *args: Any, **options: Any) -> Callable[[Door], Any]:
    return lambda door: door(make(), *args, **options)


def returning(make: Callable[[Tensor], Any]) -> Callable[[Door], Any]:
    return made(lambda: Returning(make), X)


SHARED: dict[str, Shared] = {
    "select: a name that is none": (choosing("0.wieght"), ValueError, "Nearest names: 0.weight"),
    "select: []": (choosing([]), ValueError, r"at least one parameter, got \[\]"),
    "select: {}": (choosing({}), ValueError, "at least one parameter, got an empty dict"),
    "select: 3": (choosing(3), TypeError, "select must be a name or a glob.* got int"),
    "select: [3]": (choosing([3]), TypeError, "select must be a name or a glob.* got int"),
    "select: bytes": (choosing(b"0.*"), TypeError, "select must be a name or a glob"),
    "select: a tensor": (choosing(X), TypeError, "got Tensor"),
    "select: parameters": (choosing([*net().parameters()]), TypeError, "got Parameter"),
    "select: a module": (choosing(nn.Linear(3, 4)), TypeError, "got Linear"),
    "select: nothing holds": (choosing(lambda *_: False), ValueError, "predicate that holds"),
    "select: of a name alone": (
        choosing(lambda name: name == "0.weight"),
        TypeError,
        "must take a name and a parameter",
    ),
    "select: no answer": (choosing(lambda _, p: p > 0), TypeError, "must say yes or no"),
    "select: a shape": (choosing({"0.bias": X}), ValueError, r"got shape \(5, 3\) for 0.bias"),
    "select: integers": (
        choosing({"0.bias": torch.ones(4).int()}),
        ValueError,
        r"got shape \(4,\) of torch.int32",
    ),
    "select: words": (choosing({"0.bias": "x"}), ValueError, "must give floating point tensors"),
    "select: another name": (choosing({"bias": X}), ValueError, "must name parameters"),
    "in_dims: too large": (given(X, in_dims=5), ValueError, "the batch in its dimension 5"),
    "in_dims: all shared": (given(X, in_dims=(None,)), ValueError, "got none"),
    "in_dims: too many": (given(X, in_dims=(0, 0)), ValueError, "one entry for each of the 1"),
    "in_dims: no input": (given(X, in_dims={"y": 0}), ValueError, "given by keyword, got 'y'"),
    "in_dims: words": (given(X, in_dims="0"), TypeError, "in_dims must be an int"),
    "independent: False": (given(X, independent=False), ValueError, "None, True or 'always'"),
    "independent: an array": (
        given(X, independent=np.ones(3)),
        ValueError,
        "None, True or 'always'",
    ),
    "independent: words": (given(X, independent="no"), ValueError, "None, True or 'always'"),
    "no input": (given(), ValueError, "must hold the batch, got no tensor"),
    "None": (given(None), ValueError, "must hold the batch, got no tensor"),
    "words": (given("x"), ValueError, "must hold the batch, got no tensor"),
    "an array": (given(np.ones((5, 3))), ValueError, "must hold the batch, got no tensor"),
    "a number": (given(torch.tensor(1.0)), ValueError, r"in its dimension 0, got shape \(\)"),
    "a lone sample": (given(X[0]), ValueError, r"give a lone sample a batch of one"),
    "two sizes": (
        made(lambda: nn.Bilinear(3, 3, 2), X, X[:4]),
        ValueError,
        r"the same batch, got \[4, 5\]",
    ),
    "a packed sequence": (
        made(lambda: nn.GRU(3, 2), pack_sequence([X, X[:2]])),
        ValueError,
        "got a PackedSequence. Pass padded tensors",
    ),
    "steps in front": (
        made(lambda: nn.GRU(3, 2), X[None]),
        ValueError,
        "got batch_first=False. Pass in_dims=1",
    ),
    "batch normalization": (
        made(lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), X),
        ValueError,
        r"batch normalization over the batch in 1. Call module.eval\(\)",
    ),
    "lazy": (made(lambda: nn.LazyLinear(2), X), ValueError, "must know its shapes"),
    "dropout": (
        made(lambda: nn.Sequential(nn.Linear(3, 2), nn.Dropout()), X),
        NotImplementedError,
        "Pass randomness='same' or 'different'",
    ),
    "complex parameters": (
        made(lambda: nn.Linear(3, 2, dtype=torch.complex64), X.to(torch.complex64)),
        NotImplementedError,
        "inputs must be real, got torch.complex64",
    ),
    "samples that see each other": (
        returning(lambda y: y - y.mean(0)),
        ValueError,
        "samples that do not depend on each other",
    ),
    "outputs without the batch": (
        returning(lambda y: y.sum(0)),
        ValueError,
        "without the batch of 5",
    ),
    "words returned": (returning(lambda _: "x"), TypeError, "must return tensors, got str"),
    "words beside": (
        returning(lambda y: {"logits": y, "name": "x"}),
        TypeError,
        r"must return tensors, got str at output\['name'\]",
    ),
    "an array returned": (
        returning(lambda y: y.detach().numpy()),
        TypeError,
        "must return tensors, got ndarray",
    ),
    "integers returned": (
        returning(lambda y: y.argmax(1)),
        TypeError,
        "at least one floating point tensor, got torch.int64",
    ),
    "complex returned": (
        returning(lambda y: y.to(torch.complex64)),
        NotImplementedError,
        "outputs must be real, got torch.complex64",
    ),
}


def _shared() -> list[Bad]:
    return [
        Bad(name, what, partial(call, door), error, words)
        for what, (call, error, words) in SHARED.items()
        for name, door in DOORS.items()
    ]


# --- each of them ---


def jacobian(*args: Any, **options: Any) -> Callable[[], Any]:
    return lambda: jacfunc.module_jacobian(net(), *args, **options)(X)


def by_inputs(inputs: Any) -> Callable[[], Any]:
    return jacobian("inputs", inputs=inputs)


def times(vector: Any) -> Callable[[], Any]:
    return lambda: jacfunc.ggn(net(), F.cross_entropy)(X, Y) @ vector


def curved_by(loss: Any) -> Callable[[], Any]:
    return lambda: jacfunc.ggn(net(), loss)(X, Y).diagonal()


def fisher(*args: Any, **options: Any) -> Callable[[], Any]:
    return lambda: jacfunc.fisher(net(), *args, **options)(X)


def projection(*args: Any, **options: Any) -> Callable[[], Any]:
    return lambda: jacfunc.random_projection(net(), *args, **options)(X, Y)


def tangents(**options: Any) -> Callable[[], Any]:
    return lambda: jacfunc.ntk(net(), None, X, **options)


NO_MODULE: dict[str, Any] = {"None": None, "words": "model", "the class": nn.Linear}
WITHOUT_MODULE: dict[str, Callable[[Any], Any]] = {
    "module_jacobian": jacfunc.module_jacobian,
    "stream_jacobian": jacfunc.stream_jacobian,
    "param_slices": jacfunc.param_slices,
    "ggn": lambda module: jacfunc.ggn(module, F.cross_entropy),
    "fisher": lambda module: jacfunc.fisher(module, "gaussian"),
    "gradient_norms": lambda module: jacfunc.gradient_norms(module, F.cross_entropy),
    "random_projection": lambda module: jacfunc.random_projection(module, 4),
    "ntk": lambda module: jacfunc.ntk(module, None, X),
}
LOSSES: dict[str, Any] = {"None": None, "words": "mse", "the class": nn.CrossEntropyLoss}
WITH_LOSS: dict[str, Callable[[Any], Any]] = {
    "ggn": lambda loss: jacfunc.ggn(net(), loss),
    "gradient_norms": lambda loss: jacfunc.gradient_norms(net(), loss),
    "random_projection": lambda loss: jacfunc.random_projection(net(), 4, loss or 3),
}
RETURNED: dict[str, tuple[Callable[..., Any], str]] = {
    "a number a sample": (lambda out, _: out.sum(1), r"got shape \(5,\)"),
    "a row": (lambda out, _: out.sum(0, keepdim=True).sum(1), r"got shape \(1,\)"),
    "a float": (lambda *_: 1.0, "got float"),
    "an integer": (lambda out, _: out.argmax(), r"got shape \(\)"),
    "None": (lambda *_: None, "got NoneType"),
}
WRT: dict[str, Any] = {
    "words": "parameters",
    "None": None,
    "a number": 3,
    "nothing": (),
    "twice": ("params", "params"),
    "a list in a list": [["params"]],
    "in no order": {"params", "inputs"},
}
INPUTS: dict[str, tuple[Any, type[Exception], str]] = {
    "5": (5, ValueError, "positions or names of this call's inputs, got 5. There are 0"),
    "a name": ("mask", ValueError, "positions or names of this call's inputs, got 'mask'"),
    "a path": ("input['a']", ValueError, "inputs must be paths to leaves"),
    "1.5": (1.5, TypeError, "a position, a name or a path.* got float"),
    "True": (True, TypeError, "a position, a name or a path.* got bool"),
    "a tensor": (X, TypeError, "a position, a name or a path.* got Tensor"),
    "[None]": ([None], TypeError, "a position, a name or a path.* got NoneType"),
    "[]": ([], ValueError, "at least one input"),
    "twice": ([0, 0], ValueError, "name each input once, got 0"),
    "by name and number": ([0, "input"], ValueError, "name each input once, got 'input'"),
    "from the end": ([0, -1], ValueError, "name each input once, got -1"),
}
AXES: dict[str, tuple[Any, type[Exception], str]] = {
    "5": (5, ValueError, "axes of one sample's output, got 5"),
    "words": ("a", TypeError, "the number of an axis"),
    "1.5": (1.5, TypeError, "the number of an axis"),
    "[1.0]": ([1.0], TypeError, "the number of an axis"),
    "None": (None, TypeError, "the number of an axis"),
    "True": (True, TypeError, "the number of an axis"),
    "twice": ((0, 0), ValueError, "must not share an axis"),
}
NO_VECTORS: dict[str, Any] = {
    "a list": [X],
    "None": None,
    "an array": np.ones(26),
    "a number": 2.0,
}
SEEDS: dict[str, Any] = {"1.5": 1.5, "None": None, "words": "a", "True": True}

ROWS: list[Bad] = [
    *_shared(),
    *(
        Bad(door, f"module: {name}", partial(call, module), TypeError, r"must be an nn\.Module")
        for door, call in WITHOUT_MODULE.items()
        for name, module in NO_MODULE.items()
    ),
    *(
        Bad(door, f"loss: {name}", partial(call, loss), TypeError, "loss must be a function")
        for door, call in WITH_LOSS.items()
        for name, loss in LOSSES.items()
    ),
    *(
        Bad("ggn", f"the loss returns {name}", curved_by(loss), ValueError, f"one number.* {words}")
        for name, (loss, words) in RETURNED.items()
    ),
    Bad(
        "ggn",
        "the loss couples samples",
        curved_by(lambda out, _: out.sum() ** 2),
        ValueError,
        "sum or mean over samples",
    ),
    Bad(
        "ggn",
        "the loss is concave",
        curved_by(lambda out, _: -out.square().sum()),
        ValueError,
        "convex in the outputs",
    ),
    Bad(
        "ggn",
        "no targets",
        lambda: jacfunc.ggn(net(), F.cross_entropy)(),
        TypeError,
        "must be the targets",
    ),
    *(
        Bad("module_jacobian", f"wrt: {name}", jacobian(wrt), ValueError, "wrt must be 'params'")
        for name, wrt in WRT.items()
    ),
    *(
        Bad("module_jacobian", f"inputs: {name}", by_inputs(inputs), error, words)
        for name, (inputs, error, words) in INPUTS.items()
    ),
    Bad(
        "module_jacobian",
        "integers by inputs",
        lambda: jacfunc.module_jacobian(nn.Embedding(5, 2), "inputs")(Y),
        TypeError,
        "at least one floating point tensor to differentiate, got torch.int64",
    ),
    Bad("module_jacobian", "in_dims of a whole", jacobian(in_dims=1), ValueError, "must come with"),
    Bad(
        "module_jacobian",
        "empty in_dims of a whole",
        jacobian(in_dims={}),
        ValueError,
        "in_dims must come with",
    ),
    Bad(
        "module_jacobian",
        "randomness of a whole",
        jacobian(randomness="x"),
        ValueError,
        "randomness must be",
    ),
    Bad(
        "stream_jacobian",
        "in_dims of a whole",
        lambda: jacfunc.stream_jacobian(net(), in_dims=1),
        ValueError,
        "in_dims must come with",
    ),
    Bad("module_jacobian", "strategy='x'", jacobian(strategy="x"), ValueError, "strategy must be"),
    Bad("module_jacobian", "strategy=3", jacobian(strategy=3), TypeError, "strategy must be"),
    Bad(
        "module_jacobian",
        "a class of strategies",
        jacobian(strategy=jacfunc.Reverse),
        TypeError,
        "strategy must be",
    ),
    Bad(
        "module_jacobian",
        "a strategy with a chunk_size",
        jacobian(strategy=jacfunc.Reverse(), chunk_size=2),
        ValueError,
        "chunk_size must come with a strategy's name",
    ),
    Bad("ggn", "times another name", times({"a": X}), ValueError, "name the chosen parameters"),
    *(
        Bad("ggn", f"times {name}", times(vector), TypeError, "vector must be a dict of tensors")
        for name, vector in NO_VECTORS.items()
    ),
    Bad("ggn", "times a number as name", times({3: X}), ValueError, "name the chosen parameters"),
    Bad("ggn", "times another size", times(torch.ones(27)), ValueError, "must have 26 numbers"),
    Bad("ggn", "times nothing", times({}), ValueError, "must name the chosen parameters"),
    Bad(
        "ggn",
        "times other shapes",
        times(dict.fromkeys(ones(), X)),
        ValueError,
        "must match in shape",
    ),
    Bad(
        "ggn",
        "times another dtype",
        times({name: x.double() for name, x in ones().items()}),
        TypeError,
        "must match in dtype",
    ),
    Bad("fisher", "draws=0", fisher("gaussian", draws=0), ValueError, "draws must be"),
    Bad("fisher", "draws=1.5", fisher("gaussian", draws=1.5), ValueError, "draws must be"),
    Bad("fisher", "generator=3", fisher("gaussian", generator=3), TypeError, "generator must be"),
    Bad("fisher", "likelihood='x'", fisher("x"), ValueError, "likelihood must be one of"),
    Bad("fisher", "likelihood=[]", fisher([]), ValueError, "likelihood must be one of"),
    Bad("fisher", "reduction='none'", fisher("gaussian", reduction="none"), ValueError, "reduc"),
    *(
        Bad("random_projection", f"seed: {name}", projection(4, seed=seed), TypeError, "seed must")
        for name, seed in SEEDS.items()
    ),
    *(
        Bad("random_projection", f"size: {size!r}", projection(size), ValueError, "size must be")
        for size in (0, -1, 2.5, "4", True, None)
    ),
    *(
        Bad(
            *("random_projection", f"per_module={sizes!r}", projection(per_module=sizes)),
            *(ValueError, "per_module must be two positive numbers"),
        )
        for sizes in (48, "48", (), (4,), (4, 4, 4), (0, 4), (4, -1), (2.0, 4), (True, 4))
    ),
    Bad(
        *("random_projection", "per_module, and a size", projection(4, per_module=(2, 2))),
        *(ValueError, "size must be None with per_module, got 4"),
    ),
    *(
        Bad("ntk", f"{axes}: {name}", tangents(**{axes: value}), error, words)
        for axes in ("trace_axes", "diagonal_axes")
        for name, (value, error, words) in AXES.items()
    ),
    Bad("ntk", "progress=3", tangents(progress=3), TypeError, "progress must be a function"),
    Bad("ntk", "progress=True", tangents(progress=True), TypeError, "progress must be a function"),
    Bad("ntk", "no batches", lambda: jacfunc.ntk(net(), None, []), ValueError, "x1 must hold"),
    Bad("ntk", "no others", lambda: jacfunc.ntk(net(), None, X, []), ValueError, "x2 must hold"),
    Bad(
        "ntk",
        "parameters twice",
        lambda: jacfunc.ntk(net(), "0.*", X, select="2.*"),
        ValueError,
        "must be selected once",
    ),
    Bad("ntk", "a batch for them", lambda: jacfunc.ntk(net(), X, X), TypeError, "got Tensor"),
    Bad(
        "stream_jacobian",
        "by='x'",
        lambda: jacfunc.stream_jacobian(net(), "x"),  # type: ignore[arg-type]
        ValueError,
        "by must be one of",
    ),
    Bad(
        "stream_jacobian",
        "by samples of a whole",
        lambda: jacfunc.stream_jacobian(net(), "samples"),
        ValueError,
        "needs per_sample=True",
    ),
    Bad("param_slices", "select=[]", lambda: jacfunc.param_slices(net(), []), ValueError, "at le"),
    Bad("param_slices", "select=3", lambda: jacfunc.param_slices(net(), 3), TypeError, "a glob"),
]
