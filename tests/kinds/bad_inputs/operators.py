"""Bad inputs of linear operators, of what reduces them, and of estimators."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import jacfunc
from jacfunc.estimators import Hutchinson, HutchPlusPlus, Lanczos, StochasticLanczos, XDiag, XTrace
from jacfunc.operators import diagonal, frobenius_norm, logdet, spectral_norm, trace
from tests.kinds.bad_inputs import Bad

X, Y = torch.ones(3), torch.ones(2)


def halved(tree: dict[str, Tensor]) -> Tensor:
    return tree["a"][:2] * tree["b"]


SQUARE = jacfunc.linearize(torch.sin, X)[1]
TREE = jacfunc.linearize(halved, {"a": X, "b": Y})[1]
WIDE = jacfunc.linearize(lambda x: x[:2], X)[1]
EMPTY = jacfunc.linearize(torch.sin, torch.ones(0))[1]
NEGATIVE = jacfunc.linearize(lambda x: -x, X)[1]
SINGULAR = jacfunc.linearize(lambda x: 0 * x, X)[1]
TURNING = jacfunc.linearize(lambda x: x + x.roll(1), torch.ones(5))[1]

REDUCTIONS: dict[str, Callable[..., Any]] = {
    "trace": trace,
    "diagonal": diagonal,
    "frobenius_norm": frobenius_norm,
    "spectral_norm": spectral_norm,
    "logdet": logdet,
}
ANOTHER: dict[str, Any] = {
    "trace": XDiag(),
    "diagonal": XTrace(),
    "frobenius_norm": Lanczos(),
    "spectral_norm": Hutchinson(),
    "logdet": HutchPlusPlus(),
}
RIGHT: dict[str, Any] = {
    "trace": XTrace(),
    "diagonal": XDiag(),
    "frobenius_norm": HutchPlusPlus(),
    "spectral_norm": Lanczos(),
    "logdet": StochasticLanczos(),
}
ESTIMATORS = (HutchPlusPlus, Hutchinson, Lanczos, StochasticLanczos, XDiag, XTrace)


def written_into() -> Any:
    """A product after the function's own tensor has changed."""
    scale = torch.ones(3)
    _, J = jacfunc.linearize(lambda x: x * scale, X)
    scale.mul_(2)
    return J @ X


def _products() -> list[Bad]:
    like, dtype = "must have 3 numbers in its first dimension", "must match in dtype"
    shape, tree = "must match in shape", "must be a flat tensor of 5 numbers or have the structure"
    products: list[tuple[str, Callable[..., Any], Any, type[Exception], str]] = [
        ("a long vector", SQUARE.mv, torch.ones(4), ValueError, like),
        ("a long vector by @", SQUARE.__matmul__, torch.ones(4), ValueError, like),
        ("a long covector", SQUARE.rmv, torch.ones(4), ValueError, like),
        ("rows for columns", SQUARE.mm, torch.ones(2, 3), ValueError, like),
        ("a vector for a matrix", SQUARE.mm, X, ValueError, shape),
        ("a matrix for a vector", SQUARE.mv, torch.ones(3, 2), ValueError, shape),
        ("a vector in float64", SQUARE.mv, X.double(), TypeError, dtype),
        ("a matrix of integers", SQUARE.mm, torch.ones(3, 2).long(), TypeError, dtype),
        ("None for a vector", SQUARE.mv, None, ValueError, shape),
        ("a number for a vector", SQUARE.mv, 3.0, ValueError, shape),
        ("another tree", TREE.mv, {"a": X}, ValueError, tree),
        ("a list for a dict", TREE.mv, [X, Y], ValueError, tree),
        ("leaves of another shape", TREE.mv, {"a": Y, "b": Y}, ValueError, shape),
        ("leaves of another dtype", TREE.mv, {"a": X, "b": Y.double()}, TypeError, dtype),
        ("other counts", TREE.mm, {"a": X[None], "b": torch.ones(2, 2)}, ValueError, shape),
        ("a chunk of nothing", lambda n: SQUARE.matrix(chunk_size=n), 0, ValueError, "chunk_size"),
        ("another operator's space", WIDE.__matmul__, WIDE, ValueError, "two operators must agree"),
        ("a sum of two shapes", SQUARE.__add__, WIDE, ValueError, "two operators must agree"),
        ("a name that is not there", TREE.restrict, "c", ValueError, "must name leaves that are"),
    ]
    rows = [
        Bad("linearize", name, partial(call, bad), error, words)
        for name, call, bad, error, words in products
    ]
    for which, error, words in (
        ([3], ValueError, "rows must be numbers below 3, got 3 to 3"),
        ([-4, 0], ValueError, "rows must be numbers below 3, got -4 to 0"),
        ([0.5], TypeError, "rows must be patterns of names, a slice, or numbers"),
        ([True], TypeError, "rows must be patterns of names, a slice, or numbers"),
        (torch.tensor([True, False, True]), TypeError, "rows must be patterns of names"),
        (3.0, TypeError, "rows must be patterns of names, a slice, or numbers"),
        ([[0]], TypeError, "rows must be patterns of names, a slice, or numbers"),
    ):
        call = partial(SQUARE.restrict, which)
        rows.append(Bad("linearize", f"rows={which!r}", call, error, words))
    return [
        *rows,
        Bad("linearize", "no primals", lambda: jacfunc.linearize(torch.sin), ValueError, "there"),
        Bad("linearize", "a tensor that changed", written_into, ValueError, "must"),
        Bad("Sum", "no diagonal", lambda: Sum().diagonal(), ValueError, "the operator must be sq"),
    ]


class Sum(jacfunc.LinearOperator):
    """An operator of one's own, which is not square."""

    def __init__(self) -> None:
        space = jacfunc.operators.Space
        super().__init__("Sum", space.of(X), space.of(torch.ones(())))

    def pushforward_batch(self, tangents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (tangents[0].sum(1),)

    def pullback_batch(self, cotangents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (cotangents[0][:, None].expand(-1, 3),)


def _reductions() -> list[Bad]:
    rows = []
    for door, reduce in REDUCTIONS.items():
        must = "must have rows and columns" if "norm" in door else "must be square"
        rows += [
            Bad(door, "a matrix", partial(reduce, torch.eye(3)), TypeError, "operator must be a L"),
            Bad(door, "None", partial(reduce, None), TypeError, "operator must be a LinearOp"),
            Bad(door, "nothing", partial(reduce, EMPTY), ValueError, f"the operator {must}"),
            Bad(door, "a word", partial(reduce, SQUARE, "xtrace"), TypeError, "estimator must be"),
            Bad(
                door,
                "a class",
                partial(reduce, SQUARE, type(RIGHT[door])),
                TypeError,
                "estimator must be",
            ),
            Bad(
                door,
                "an estimator of another number",
                partial(reduce, SQUARE, ANOTHER[door]),
                TypeError,
                "estimator must be",
            ),
        ]
        if "norm" not in door:
            rows.append(Bad(door, "a wide one", partial(reduce, WIDE), ValueError, "the operator"))
    slq = StochasticLanczos()

    def mapped(reduce: Callable[..., Any], estimator: Any) -> Any:
        def number(x: Tensor) -> Tensor:
            number: Tensor = reduce(jacfunc.linearize(torch.exp, x)[1], estimator).value
            return number

        return torch.vmap(number)(torch.ones(2, 3))

    rows += [
        Bad(door, "vmap", partial(mapped, reduce, by), NotImplementedError, "read numbers")
        for door, reduce, by in (
            ("spectral_norm", spectral_norm, Lanczos()),
            ("logdet", logdet, slq),
        )
    ]
    rows += [
        Bad(
            "diagonal",
            "normal numbers",
            lambda: diagonal(SQUARE, Hutchinson(4, distribution="normal")),
            ValueError,
            "the vectors must be signs",
        ),
        Bad("logdet", "turning", lambda: logdet(TURNING, slq), ValueError, "must be symmetric"),
        Bad("logdet", "negative", lambda: logdet(NEGATIVE, slq), ValueError, "must be positive d"),
        Bad("logdet", "singular", lambda: logdet(SINGULAR, slq), ValueError, "must be positive d"),
    ]
    for damping in (-1.0, float("nan"), float("inf"), "1", None, True, torch.ones(())):
        call = partial(logdet, SQUARE, damping=damping)
        rows.append(Bad("logdet", f"damping={damping!r}", call, ValueError, "damping must be"))
    return rows


def _options() -> list[Bad]:
    rows = []
    counts = {"num_samples": 2, "num_products": 4, "num_steps": 1}
    for kind in ESTIMATORS:
        door, options = kind.__name__, kind.__dataclass_fields__
        for seed, error in ((-1, ValueError), (2**63, ValueError), (1.0, TypeError)):
            call = partial(kind, seed=seed)
            rows.append(Bad(door, f"seed={seed!r}", call, error, "seed must be"))
        for name in filter(options.__contains__, counts):
            for count, error in ((0, ValueError), (2.0, TypeError), (True, TypeError)):
                call = partial(kind, **{name: count})
                rows.append(Bad(door, f"{name}={count!r}", call, error, f"{name} must be"))
        if "chunk_size" in options:
            call = partial(kind, chunk_size=0)
            rows.append(Bad(door, "chunk_size=0", call, ValueError, "chunk_size must be"))
    for word in ("gaussian", 3, None):
        call = partial(Hutchinson, distribution=word)
        rows.append(Bad("Hutchinson", f"{word!r}", call, ValueError, "distribution must be"))
    for tolerance in (-1.0, 1.0, float("nan"), "1e-3", True):
        call = partial(Lanczos, tolerance=tolerance)
        rows.append(Bad("Lanczos", f"{tolerance!r}", call, ValueError, "tolerance must be"))
    return rows


ROWS = [*_products(), *_reductions(), *_options()]
