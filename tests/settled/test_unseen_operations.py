"""Operations that no mode sees, as TorchScript's: samples that they couple later are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacfunc
from jacfunc._linear_map import graph_number

B = 4
DOUBLE = torch.float64


@torch.jit.script
def centered(h: Tensor, is_late: bool) -> Tensor:
    return h - h.mean(0, keepdim=True) if is_late else h


@torch.jit.script
def flipped(h: Tensor, is_late: bool) -> Tensor:
    return h.flip(0) if is_late else h.flip(1)


@torch.jit.script
def softmax(h: Tensor, is_late: bool) -> Tensor:
    return h.softmax(0 if is_late else 1)


@torch.jit.script
def written(h: Tensor, is_late: bool) -> Tensor:
    own = h.clone()
    if is_late:
        own.sub_(h.mean(0, keepdim=True))
    return own


@torch.jit.script
def turned(h: Tensor, is_late: bool) -> Tensor:
    return h + float(is_late) * h.roll(1, 0)  # the graph is one and the same


@torch.jit.script
def fused(h: Tensor, is_late: bool) -> Tensor:
    return (2 * h + float(is_late) * h.sum(0, keepdim=True)).sigmoid() * h


class Late(nn.Module):
    """Couples its samples from some call on, by a flag that only TorchScript gets."""

    def __init__(self, hidden: Callable[[Tensor, bool], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 2)
        self.hidden, self.is_late = hidden, [False]
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.hidden(self.first(x).tanh(), self.is_late[0]))
        return out


def rows_of(module: nn.Module, x: Tensor, by: str) -> Tensor:
    """Rows ``[B, M, N]`` of each sample alone, one pullback after the other."""
    rows = []
    for sample in x:
        own = sample[None].clone().requires_grad_()
        primals = [own] if by == "inputs" else [*module.parameters()]
        grads = [torch.autograd.grad(y, primals, retain_graph=True) for y in module(own)[0]]
        rows.append(torch.stack([torch.cat([g.flatten() for g in each]) for each in grads]))
    return torch.stack(rows)


def flat(tensors: Any, lead: int) -> Tensor:
    return torch.cat([x.flatten(lead) for x in dict(tensors).values()], lead)


def half_squares(out: Tensor, target: Tensor) -> Tensor:
    return ((out - target) ** 2).sum() / 2


Door = Callable[[nn.Module], Callable[[Tensor], Tensor]]
ZEROS, ONES = torch.zeros(B, 2, dtype=DOUBLE), torch.ones(B, 2, dtype=DOUBLE)

DOORS: dict[str, tuple[Door, Callable[[Tensor, Tensor], Tensor]]] = {
    "ntk": (
        lambda module: lambda x: jacfunc.ntk(module, None, x),
        lambda rows, out: torch.einsum("apn,bqn->abpq", rows, rows),
    ),
    "gradient_norms": (
        lambda module: lambda x: jacfunc.gradient_norms(module, half_squares)(x, ZEROS),
        lambda rows, out: torch.einsum("bp,bpn->bn", out, rows).norm(dim=1),
    ),
    "stream_jacobian": (
        lambda module: (
            lambda x: flat(jacfunc.stream_jacobian(module, "params", per_sample=True)(x), 2)
        ),
        lambda rows, out: rows,
    ),
    "diagonal": (
        lambda module: lambda x: flat(jacfunc.ggn(module, half_squares)(x, ZEROS).diagonal(), 0),
        lambda rows, out: (rows**2).sum((0, 1)),
    ),
    "module_operator": (
        lambda module: (
            lambda x: flat(jacfunc.module_operator(module, per_sample=True)(x).T @ ONES, 0)
        ),
        lambda rows, out: rows.sum((0, 1)),
    ),
    "inputs": (
        lambda module: lambda x: jacfunc.module_jacobian(module, "inputs", per_sample=True)(x),
        lambda rows, out: rows,
    ),
}


@pytest.mark.parametrize("before", [5, 20])
@pytest.mark.parametrize("hidden", [centered, flipped, softmax, written, turned, fused])
@pytest.mark.parametrize("name", DOORS)
def test_samples_that_are_coupled_later_are_refused_at_once(
    name: str, hidden: Callable[[Tensor, bool], Tensor], before: int
) -> None:
    torch.manual_seed(0)
    module = Late(hidden)

    def set_to(is_late: bool) -> None:
        module.is_late[0] = is_late

    check_doors(name, module, set_to, before)


class Gated(nn.Module):
    """Couples its samples by a gate, in what is written into after it was made."""

    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.mix = nn.Linear(5, 4), nn.Linear(4, 2), mix
        self.register_buffer("gate", torch.zeros(()))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        mixed = self.mix(h)
        mixed.mul_(self.gate)
        out: Tensor = self.last(h + mixed)
        return out


@pytest.mark.parametrize("before", [5, 20])
@pytest.mark.parametrize("mix", [lambda h: h.roll(1, 0), lambda h: h.mean(0, keepdim=True)])
@pytest.mark.parametrize("name", DOORS)
def test_what_was_written_into_since_is_compared_as_it_was_made(
    name: str, mix: Callable[[Tensor], Tensor], before: int
) -> None:
    torch.manual_seed(0)
    module = Gated(mix)
    check_doors(name, module, lambda is_late: module.gate.fill_(float(is_late)), before)


@torch.jit.script
def filled_by_script(h: Tensor) -> Tensor:
    own = torch.empty_like(h)
    own.copy_(h.tanh())
    return own.relu_()


def filled(h: Tensor) -> Tensor:
    own = torch.empty_like(h)
    own[:, :2], own[:, 2:] = h[:, 2:], h[:, :2]
    return own.relu_()


@pytest.mark.parametrize("fill", [filled, filled_by_script])
def test_memory_that_is_filled_later_couples_nothing(fill: Callable[[Tensor], Tensor]) -> None:
    evaluations = list[int]()

    def counted(h: Tensor) -> Tensor:
        evaluations.append(len(h))
        return fill(h)

    module = Late(lambda h, is_late: counted(h))
    for number in range(24):
        evaluations.clear()
        jacfunc.ntk(module, None, torch.randn(B, 5, dtype=DOUBLE))
        if number > 20:  # what is settled is written down by then
            assert evaluations == [B]  # batches are not compared


def check_doors(
    name: str, module: nn.Module, set_to: Callable[[bool], object], before: int
) -> None:
    """Is each call right, or refused once samples are coupled?"""
    door, of_rows = DOORS[name]
    call, by = door(module), "inputs" if name == "inputs" else "params"
    for number in range(before + 3):
        set_to(number >= before)
        x = torch.randn(B, 5, dtype=DOUBLE)
        rows = rows_of(module, x, by)
        out = torch.cat([module(sample[None]) for sample in x]).detach()
        try:
            found = call(x)
        except ValueError as error:
            assert number >= before
            assert "samples that do not depend on each other" in str(error)  # noqa: PT017
            continue
        # what goes by one sample after the other is right, coupled or not
        right = of_rows(rows, out)
        torch.testing.assert_close(found.view_as(right), right, rtol=1e-9, atol=1e-9)


def test_graphs_are_numbered_by_what_they_do_and_not_by_numbers_in_tensors() -> None:
    x = torch.randn(3, 3, requires_grad=True)
    graphs: list[Callable[[Tensor], Tensor]] = [
        lambda h: h.mean(0),
        lambda h: h.mean(1),
        lambda h: h.softmax(-1),
        lambda h: h.softmax(-2),
        lambda h: h.sin().cos() + h,
        lambda h: h + h.sin().cos(),
        lambda h: h.sin() + h.cos(),
        lambda h: h.sin().cos(),
        lambda h: h.unbind()[0],
        lambda h: h.unbind()[1],
    ]
    numbers = [[graph_number((graph(x * n),), ()) for n in (2, 3)] for graph in graphs]
    assert all(one == other for one, other in numbers)
    assert len({one for one, _ in numbers}) == len(graphs)


@pytest.mark.parametrize(
    "layer",
    [
        nn.GroupNorm(2, 4),
        nn.LayerNorm(6),
        nn.BatchNorm1d(4).eval(),
        nn.Conv1d(4, 4, 3),
        nn.Flatten(),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_graphs_of_a_part_of_a_batch_have_the_number_of_all(layer: nn.Module) -> None:
    x = torch.randn(5, 4, 6)
    assert len({graph_number((layer(x[:n].requires_grad_()),), ()) for n in (2, 3, 5)}) == 1


def test_what_a_graph_has_saved_is_not_got_back() -> None:
    def refused(saved: Tensor) -> Tensor:
        raise AssertionError("a checkpoint would run again")

    x = torch.randn(3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(Tensor.detach, refused):
        out = (x.sin() * x).exp().where(x > 0, x.softmax(0))
    assert graph_number((out,), ()) == graph_number((out,), ())
