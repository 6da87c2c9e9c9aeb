"""Answers from kept rows, once they are written down, and the point behind them."""

from __future__ import annotations

from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacfunc
from jacfunc._kernels.answers import Answers
from tests.house.calls import num_calls
from tests.module_operators.test_one_evaluation import MANY, looped, near, perceptron

double = torch.float64


def settled(model: nn.Module, x: Tensor, calls: int = MANY) -> Any:
    """A door through which so many calls went, each with all answers."""
    operator_of = jacfunc.module_operator(model, per_sample=True)
    for _ in range(calls):
        op = operator_of(x)
        op.gram(center=True), op.gram(), op.gram(dtype=torch.float32)
        op.rmv(torch.ones_like(op.outputs))
    return operator_of


def test_answers_are_written_down() -> None:
    """Then no code runs that chooses how products are taken."""
    model, x = perceptron(1).double(), torch.randn(7, 6, dtype=double)

    def is_choice(frame: FrameType, event: str, argument: Any) -> bool:
        name = frame.f_code.co_filename
        return event == "call" and name.endswith(("_kernels/gram.py", "_products/factored.py"))

    def answer(op: Any) -> None:
        op.gram(center=True)
        op.rmv(torch.ones(7, 1, dtype=double))

    first, later = settled(model, x, 0)(x), settled(model, x)(x)
    assert num_calls(lambda: answer(first), is_choice) > 0
    assert num_calls(lambda: answer(later), is_choice) == 0


def test_answers_may_be_written_into() -> None:
    model, x = perceptron(2).double(), torch.randn(7, 6, dtype=double)
    dense, operator_of = looped(model, x), settled(model, x)
    u = torch.randn(14, dtype=double)
    op = operator_of(x)
    for _ in range(2):
        pulled = op.rmv(u.view(7, 2))
        assert near(op.domain.flat(pulled), dense.T @ u)
        for block in pulled.values():
            block.zero_()
        gram = op.gram()
        assert near(gram, dense @ dense.T)
        gram.zero_()


def test_each_kind_of_answer_has_its_own_program() -> None:
    model, x = perceptron(1).double(), torch.randn(7, 6, dtype=double)
    dense, operator_of = looped(model, x), settled(model, x)
    centred = dense - dense.mean(0)
    op = operator_of(x)
    assert near(op.gram(center=True), centred @ centred.T)
    assert near(op.gram(), dense @ dense.T)
    single = op.gram(dtype=torch.float32)
    assert single.dtype == torch.float32
    assert near(single.double(), dense @ dense.T, 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert near(op.gram(), dense @ dense.T)
    columns = torch.func.vmap(lambda u: op.domain.flat(op.rmv(u)))(torch.eye(7).double()[..., None])
    assert near(columns, dense)


def test_programs_hold_for_their_sources_alone() -> None:
    answers, one, other = Answers(), torch.randn(3, 4), torch.randn(5, 4)
    for x in [one] * 8 + [other, one.double(), one.T, one.requires_grad_()]:
        (made,) = answers.made("norm", lambda x=x: (x.square().sum(1),), (x,))  # type: ignore[misc]
        assert torch.allclose(made, (x * x).sum(1))


@pytest.mark.parametrize("calls", [0, MANY])
def test_hooks_are_those_of_the_call(calls: int) -> None:
    model, x = perceptron(1).double(), torch.randn(7, 6, dtype=double)
    dense, u = looped(model, x), torch.randn(7, dtype=double)
    v = torch.randn(dense.shape[1], dtype=double)
    op = settled(model, x, calls)(x)
    handle = model[0].weight.register_hook(lambda grad: 3 * grad)  # type: ignore[index]
    assert near(op.T @ u, dense.T @ u)
    assert near(op.gram(), dense @ dense.T)
    assert near(op @ v, dense @ v)
    handle.remove()


class Noisy(nn.Module):
    """It draws from torch's generator, and leaves it as it was."""

    def __init__(self) -> None:
        super().__init__()
        self.net = perceptron(1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=()):
            out: Tensor = self.net(x * torch.rand(6, dtype=x.dtype))
        return out


@pytest.mark.parametrize("calls", [0, MANY])
def test_a_later_evaluation_draws_what_the_first_one_drew(calls: int) -> None:
    model, x = Noisy().double(), torch.randn(7, 6, dtype=double)
    operator_of = settled(model, x, calls)
    torch.manual_seed(3)
    dense = looped(model, x)
    op = operator_of(x)
    torch.manual_seed(4)
    v = torch.randn(dense.shape[1], dtype=double)
    assert near(op.T @ torch.ones(7, dtype=double), dense.sum(0))
    assert near(op @ v, dense @ v)


@pytest.mark.parametrize("outputs", [1, 3])
def test_blocks_of_long_rows(outputs: int) -> None:
    """So many samples and so long rows are multiplied block by block."""
    net = nn.Sequential(nn.Linear(160, 150), nn.Tanh(), nn.Linear(150, outputs)).double()
    x = torch.randn(130, 160, dtype=double)
    dense = looped(net, x)
    op = jacfunc.module_operator(net, per_sample=True)(x)
    assert near(op.gram(), dense @ dense.T)
    by_sample = dense.view(130, outputs, -1)
    centred = (by_sample - by_sample.mean(0)).view(dense.shape)
    assert near(op.gram(center=True), centred @ centred.T)
    kernel = jacfunc.ntk(net, None, x, x[:50], trace_axes=-1)
    assert near(kernel, torch.einsum("acp,bcp->ab", by_sample, by_sample[:50]))
