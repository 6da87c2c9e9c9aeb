"""Value, Gramian and pullbacks of a settled kind of call, from one evaluation and one sweep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacfunc
from jacfunc.operators import ConjugateGradient

double = torch.float64
MANY = 40
"""More calls than it takes until sweeps are written down, and than the 32nd, which compares."""


class Counted(nn.Module):
    """A network that counts its evaluations."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        EVALUATED.append(len(x))
        out: Tensor = self.net(x)
        return out


EVALUATED: list[int] = []


class Convolutional(nn.Module):
    """Several positions, a parameter that is used twice, one that is not used, and a table."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4)
        self.head, self.idle = nn.Linear(4, 1), nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.tanh(self.norm(self.conv(x)))
        both: Tensor = self.head(seen.mean(-1)) + self.head(seen.amax(-1))
        return both


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(5, 3), nn.Linear(3, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.table(tokens)).sum(1))
        return out


def perceptron(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, outputs))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "one output": (lambda: perceptron(1), lambda: torch.randn(7, 6, dtype=double)),
    "two outputs": (lambda: perceptron(2), lambda: torch.randn(7, 6, dtype=double)),
    "convolutional": (Convolutional, lambda: torch.randn(5, 2, 8, dtype=double)),
    "table": (Table, lambda: torch.randint(0, 5, (6, 4))),
    "recurrent": (
        lambda: nn.Sequential(nn.LSTM(3, 4, batch_first=True), Last(), nn.Linear(4, 1)),
        lambda: torch.randn(5, 3, 3, dtype=double),
    ),
    "more rows than parameters": (
        lambda: nn.Linear(3, 1),
        lambda: torch.randn(9, 3, dtype=double),
    ),
}


class Last(nn.Module):
    def forward(self, states: tuple[Tensor, Any]) -> Tensor:
        return states[0][:, -1]


def looped(model: nn.Module, x: Tensor) -> Tensor:
    """J by a plain backward pass for each row."""
    params, rows = tuple(model.parameters()), []
    for number in model(x).flatten():
        grads = torch.autograd.grad(
            number, params, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    return torch.stack(rows)


def near(left: Tensor, right: Tensor, rtol: float = 1e-9) -> bool:
    return bool((left - right).norm() <= rtol * right.norm())


def step_of(matrix: Tensor, count: int, b: Tensor) -> Tensor:
    by_sample = matrix.view(count, -1, matrix.shape[1])
    centred = (by_sample - by_sample.mean(0)).view(matrix.shape)
    left = centred @ centred.T + 0.1 * torch.eye(len(matrix), dtype=double)
    return centred.T @ torch.linalg.solve(left, b)


@pytest.mark.parametrize("case", CASES)
def test_answers_stay_those_of_the_matrix(case: str) -> None:
    """From the first call over the settled ones to the written ones, at another point each."""
    make, draw = CASES[case]
    model = make().double()
    operator_of = jacfunc.module_operator(model, per_sample=True)
    for number in range(MANY):
        x = draw()
        with torch.no_grad():
            for param in model.parameters():
                param.add_(0.01 * torch.randn_like(param))
        op = operator_of(x)
        b, B = (torch.randn(op.codomain.size, *k, dtype=double) for k in ((), (3,)))
        dense, out = looped(model, x), model(x).detach()
        assert near(op.outputs, out)
        assert near(op.lstsq(b, damping=0.1, center=True), step_of(dense, len(x), b))
        assert near(op.lstsq(B, damping=0.1, center=True), step_of(dense, len(x), B))
        assert near(op.gram(), dense @ dense.T)
        if number % 3 == 0:
            v = torch.randn(dense.shape[1], dtype=double)
            assert near(op @ v, dense @ v)
        by_name = op.rmv(b.view(out.shape))
        assert list(by_name) == [name for name, _ in model.named_parameters()]
        assert near(op.domain.flat(by_name), dense.T @ b)
        assert near(op.matrix(), dense)
        assert near(op.matrix(chunk_size=4), dense)
        variances, by_sample = (
            torch.rand(dense.shape[1], dtype=double),
            dense.view(len(x), -1, dense.shape[1]),
        )
        expected = by_sample @ torch.diag(variances) @ by_sample.mT
        assert near(op.quad(variances, per_sample=True), expected)


@pytest.mark.parametrize("outputs", [1, 2])
def test_all_answers_take_one_evaluation(outputs: int) -> None:
    model, x = Counted(perceptron(outputs)), torch.randn(7, 6)
    operator_of = jacfunc.module_operator(model, per_sample=True)
    counts = []
    for _ in range(MANY):
        EVALUATED.clear()
        op = operator_of(x)
        op.lstsq(torch.ones(7, outputs), damping=0.1, center=True)
        op.T @ torch.ones(7 * outputs)
        op.matrix(chunk_size=4)
        op.quad(torch.ones(op.domain.size), per_sample=True)
        counts.append(len(EVALUATED))
    # all but those before which batches are compared, and the one that writes the sweep down
    assert counts.count(1) >= MANY - 7, counts


def test_many_outputs_are_evaluated_at_once_for_products() -> None:
    """Rows of all outputs take longer than a product: they are swept when they are asked for."""
    model, x = Counted(perceptron(20)), torch.randn(7, 6)
    operator_of = jacfunc.module_operator(model, per_sample=True)
    for _ in range(6):
        operator_of(x).gram()
    op = operator_of(x)
    EVALUATED.clear()
    op.T @ torch.ones(140)
    assert not EVALUATED


def test_a_function_of_parameters() -> None:
    def predict(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.tanh(x @ params["w"].T + params["b"]) @ params["a"]

    params = {name: torch.randn(*shape, dtype=double) for name, shape in SHAPES.items()}
    x, operator_of = (
        torch.randn(7, 3, dtype=double),
        jacfunc.module_operator(predict, per_sample=True),
    )
    rows = torch.func.vmap(torch.func.grad(lambda p, x: predict(p, x[None])[0]), (None, 0))
    every = rows(params, x)
    dense = torch.cat([every[name].flatten(1) for name in params], 1)
    u = torch.randn(7, dtype=double)
    for _ in range(MANY // 2):
        op = operator_of(params, x)
        assert near(op.gram(), dense @ dense.T)
        assert near(op.domain.flat(op.T @ u), dense.T @ u)


SHAPES = {"w": (4, 3), "b": (4,), "a": (4,)}


def settled(model: nn.Module, x: Tensor, calls: int = MANY, **options: Any) -> Callable[..., Any]:
    """A door through which so many calls went."""
    operator_of = jacfunc.module_operator(model, per_sample=True, **options)
    for _ in range(calls):
        operator_of(x).gram()
    return operator_of


def test_the_point_is_that_of_the_call() -> None:
    model, x = perceptron(1).double(), torch.randn(7, 6, dtype=double)
    dense = looped(model, x)
    op = settled(model, x)(x)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(2)
        x.zero_()
    op.outputs.zero_()
    u, v = torch.randn(7, dtype=double), torch.randn(dense.shape[1], dtype=double)
    assert near(op.T @ u, dense.T @ u)
    assert near(op.gram(), dense @ dense.T)
    assert near(op @ v, dense @ v)


@pytest.mark.parametrize("number", [7, MANY])
def test_rows_that_were_written_into_are_not_read(number: int) -> None:
    seen: list[Tensor] = []

    class Seen(nn.Module):
        """Somebody outside gets what its second layer multiplies by."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 1)

        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.tanh(self.first(x)))
            out: Tensor = self.second(seen[-1])
            return out

    model, x = Seen().double(), torch.randn(7, 6, dtype=double)
    dense, u = looped(model, x), torch.randn(7, dtype=double)
    operator_of = settled(model, x, number)
    op = operator_of(x)
    assert op.evaluated.samples.kept is not None
    with torch.no_grad():
        seen[-1].zero_()
    assert near(op.T @ u, dense.T @ u)
    assert near(op.gram(), dense @ dense.T)


@pytest.mark.parametrize("answer", ["gram", "pullback"])
def test_tensors_that_have_changed_are_refused(answer: str) -> None:
    model, x = perceptron(1), torch.randn(7, 6)
    op = settled(model, x, copy=False)(x)
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(ValueError, match=r"with copy=False .* must stay"):
        op.gram() if answer == "gram" else op.T @ torch.ones(7)


class Doubled(torch.autograd.Function):
    """Its backward pass is not that of its forward mode, and can't be differentiated."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.clone()


class Wrong(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = perceptron(1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Doubled.apply(self.net(x))
        return out


@pytest.mark.parametrize("is_first", [True, False])
def test_a_backward_pass_that_is_not_the_transpose_is_seen(is_first: bool) -> None:
    model, x = Wrong(), torch.randn(7, 6)
    op = settled(model, x)(x)
    u, v = torch.ones(7), torch.ones(op.domain.size)
    products = [lambda: op.T @ u, lambda: op @ v]
    first, second = products if is_first else products[::-1]
    first()
    with pytest.raises(NotImplementedError, match=r"not the transpose"):
        second()


@pytest.mark.parametrize("options", [{"chunk_size": 3}, {"memory": "100 MB"}])
def test_budgets_hold_as_before(options: Any) -> None:
    model, x = perceptron(1).double(), torch.randn(7, 6, dtype=double)
    operator_of, dense = settled(model, x, **options), looped(model, x)
    u = torch.randn(7, dtype=double)
    for _ in range(3):
        op = operator_of(x)
        assert near(op.gram(), dense @ dense.T)
        assert near(op.T @ u, dense.T @ u)
        step = op.lstsq(u, damping=0.1, center=True, solver=ConjugateGradient(rtol=1e-12))
        assert near(step, step_of(dense, 7, u))


@pytest.mark.parametrize("kind", ["bfloat16", "autocast"])
def test_low_precision(kind: str) -> None:
    model, x = perceptron(1), torch.randn(12, 6)
    b = torch.randn(12)
    exact = jacfunc.module_operator(model, per_sample=True)(x).lstsq(b, damping=0.1)
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    half = model.bfloat16() if kind == "bfloat16" else model
    operator_of = jacfunc.module_operator(half, per_sample=True)
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            op = operator_of(x.to(dtype))
        step = op.lstsq(b.to(op.dtype if kind == "bfloat16" else op.outputs.dtype), damping=0.1)
        assert step.dtype == dtype
        assert near(step.float(), exact, 0.1)
        assert (op.T @ b.to(op.codomain.dtype)).dtype == dtype


def test_no_graph_is_kept_beside_rows() -> None:
    model, x = perceptron(1), torch.randn(7, 6)
    operator_of = settled(model, x)
    for _ in range(2):
        kept = operator_of(x).evaluated.samples.kept
        assert kept is not None
        assert not any(tensor.requires_grad for tensor in kept)


def test_derivatives_by_b() -> None:
    model, x = perceptron(1).double(), torch.randn(7, 6, dtype=double)
    op = settled(model, x)(x)
    b = torch.randn(7, dtype=double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda b: op.lstsq(b, damping=0.1, center=True), b)
