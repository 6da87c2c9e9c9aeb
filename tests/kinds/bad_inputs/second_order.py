"""Bad inputs of the doors for second derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import jacfunc
from tests.kinds.bad_inputs import Bad

X, Y, XS, LABELS = torch.ones(3), torch.ones(2), torch.ones(4, 3), torch.tensor([0, 1, 0, 1])
COMPLEX = torch.ones(2, dtype=torch.complex64)


def number(x: Tensor) -> Tensor:
    return x.sin().sum()


HESSIAN = jacfunc.hessian_operator(number, X)[1]


def product(func: Any = number, primals: Any = (X,), *tangents: Any) -> Callable[[], Any]:
    return lambda: jacfunc.hvp(func, primals, *(tangents or ((X,),)))


def operator(func: Any = number, *primals: Any, **options: Any) -> Callable[[], Any]:
    return lambda: jacfunc.hessian_operator(func, *(primals or (X,)), **options)


def times(vector: Any) -> Callable[[], Any]:
    return lambda: HESSIAN @ vector


def rows(which: Any, point: Any = XS) -> Callable[[], Any]:
    return lambda: jacfunc.hessian(number, rows=which)(point)


def of_module(*args: Any, loss: Any = F.cross_entropy, **options: Any) -> Callable[[], Any]:
    return lambda: jacfunc.module_hessian(nn.Linear(3, 2), loss, **options)(*args)


def made(module: Any) -> Callable[[], Any]:
    return lambda: jacfunc.module_hessian(module, F.mse_loss)


ROWS = [
    *(
        row
        for door, of in (("hvp", product), ("hessian_operator", operator))
        for row in (
            Bad(door, "a number for func", of(3), TypeError, "func must be callable"),
            Bad(door, "many numbers", of(torch.sin), ValueError, r"one number.* shapes \[\(3,\)\]"),
            Bad(door, "two numbers", of(lambda x: (x.sum(), x.sum())), ValueError, "one number"),
            Bad(door, "no tensor", of(lambda x: 3.0), TypeError, "func must return tensors"),
            Bad(door, "None", of(lambda x: None), TypeError, "func must return tensors"),
        )
    ),
    Bad("hvp", "a tensor for primals", product(number, X), TypeError, "primals must be a tuple"),
    Bad("hvp", "no primals", product(number, ()), ValueError, "there must be at least one"),
    Bad("hvp", "complex", product(number, (COMPLEX,)), NotImplementedError, "must be real"),
    Bad("hvp", "a tensor", product(number, (X,), X), TypeError, "tangents must be a tuple"),
    Bad("hvp", "short", product(number, (X,), (Y,)), ValueError, "tangents must match in shape"),
    Bad("hvp", "no tangents", product(number, (X,), None), ValueError, "tangents must have"),
    Bad(
        *("hvp", "of float64", product(number, (X,), (X.double(),)), TypeError),
        "tangents must match in dtype",
    ),
    Bad("hessian_operator", "no primals", lambda: jacfunc.hessian_operator(number), ValueError,
        "there must be at least one"),
    Bad("hessian_operator", "complex", operator(number, COMPLEX), NotImplementedError, "be real"),
    Bad("hessian_operator", "no pair", operator(has_aux=True), TypeError, "has_aux=True func must"),
    Bad("hessian_operator", "has_aux=1", operator(has_aux=1), TypeError, "has_aux must be True"),
    Bad("hessian_operator", "a short vector", times(Y), ValueError, "vector must have 3 numbers"),
    Bad("hessian_operator", "another dtype", times(X.double()), TypeError, "vector must match"),
    Bad("hessian_operator", "a number", times(3), ValueError, "vector must match in shape"),
    Bad("hessian_operator", "chunk_size=0", lambda: HESSIAN.blocks(chunk_size=0), ValueError,
        "chunk_size must be at least 1"),
    Bad("hessian_operator", "no such leaf", lambda: HESSIAN["a", "b"], ValueError,
        "must name leaves that are there"),
    Bad("hessian", "rows: a number", rows(0), TypeError, "rows must be a slice"),
    Bad("hessian", "rows: words", rows("0"), TypeError, "rows must be a slice"),
    Bad("hessian", "rows: too far", rows([4]), ValueError, "rows must lie among the 4"),
    Bad("hessian", "rows: fractions", rows([0.5]), ValueError, "rows must lie among the 4"),
    Bad("hessian", "rows: a short mask", rows(X > 0), ValueError, "rows must lie among the 4"),
    Bad("hessian", "rows: of a number", rows([0], X[0]), ValueError, "rows must be those of one"),
    Bad("module_hessian", "None for module", made(None), TypeError, "module must be an nn.Module"),
    Bad("module_hessian", "the class", made(nn.Linear), TypeError, "module must be an nn.Module"),
    Bad("module_hessian", "no targets", of_module(), TypeError, "must be the targets"),
    Bad("module_hessian", "words for loss", of_module(loss="mse"), TypeError, "loss must be"),
    Bad("module_hessian", "many losses", of_module(XS, LABELS, loss=lambda out, _: out), ValueError,
        r"the loss must be one floating number, got shape \(4, 2\)"),
    Bad("module_hessian", "a float", of_module(XS, LABELS, loss=lambda out, _: 1.0), ValueError,
        "the loss must be one floating number, got float"),
    Bad("module_hessian", "an integer", of_module(XS, LABELS, loss=lambda out, _: out.argmax()),
        ValueError, "the loss must be one floating number"),
    Bad("module_hessian", "select: no name", of_module(XS, LABELS, select="weigth"), ValueError,
        "Nearest names: weight"),
    Bad("module_hessian", "copy=1", of_module(XS, LABELS, copy=1), TypeError, "copy must be True"),
    Bad("module_hessian", "a function alone", lambda: jacfunc.module_hessian(
        lambda p, x: x @ p, F.mse_loss)(XS, LABELS), TypeError, "a function must be called with"),
]  # fmt: skip
