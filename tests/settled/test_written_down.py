"""Work of jacfunc's own, written down while it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from jacfunc._errors import Nameless
from jacfunc._traces import Compiler, Executable
from jacfunc._traces.tape import written_down
from tests.house.calls import num_calls

MUCH = 2**20


def executable(work: Callable[[], tuple[Tensor, ...]], *sources: Tensor) -> Executable:
    graph = written_down(work, sources, MUCH)
    return Executable(graph, sources, 0, Compiler("replay"))


def test_it_computes_what_was_computed_of_other_numbers() -> None:
    a, b = torch.randn(3, 4), torch.randn(4)
    run = executable(lambda: ((a * 2).sin() @ b, a.T.reshape(-1)), a, b)
    x, y = torch.randn(3, 4), torch.randn(4)
    first, second = run((x, y))
    torch.testing.assert_close(first, (x * 2).sin() @ y)
    assert torch.equal(second, x.T.reshape(-1))


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "a shape": lambda x: x.unflatten(2, (2, 2)),
    "an order": lambda x: x.permute(2, 0, 1),
    "a shape in another order": lambda x: x.transpose(0, 1).unsqueeze(2).mT,
    "parts in another order": lambda x: x.unflatten(2, (2, 2)).transpose(1, 3),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0)])
def test_views_that_were_made_before_are_those_of_a_source(
    view: Callable[[Tensor], Tensor], order: tuple[int, ...]
) -> None:
    shape = [(2, 3, 4)[n] for n in order]
    back = [order.index(n) for n in range(3)]
    draw = lambda: torch.randn(shape).permute(back)  # noqa: E731
    source, other = draw(), draw()
    before = view(source)
    run = executable(lambda: (before * 2,), source)
    torch.testing.assert_close(run((other,))[0], view(other) * 2)


def test_of_a_source_with_gaps_dimensions_of_one_entry_come_and_go() -> None:
    draw = lambda: torch.randn(3, 5, 1, 4)[:, 0]  # noqa: E731
    source, other = draw(), draw()
    before = source.squeeze(1).unsqueeze(0), source.unsqueeze(-1)
    run = executable(lambda: (before[0] * 2, before[1] * 3), source)
    first, second = run((other,))
    torch.testing.assert_close(first, other.squeeze(1).unsqueeze(0) * 2)
    torch.testing.assert_close(second, other.unsqueeze(-1) * 3)


def test_views_with_gaps_are_refused() -> None:
    source = torch.randn(3, 4)
    before = source[:, ::2]
    with pytest.raises(Nameless, match="comes from elsewhere"):
        executable(lambda: (before * 2,), source)


def test_backward_passes_are_seen() -> None:
    x = torch.randn(3, requires_grad=True)
    y = x.sin()
    run = executable(lambda: torch.autograd.grad(y.sum() * 2, x), x, y)
    other = torch.randn(3)
    torch.testing.assert_close(run((other, other.sin()))[0], 2 * other.cos())


def test_each_run_writes_into_memory_of_its_own() -> None:
    a = torch.randn(2, 3)

    def work() -> tuple[Tensor, ...]:
        whole = torch.zeros(4, 3)
        whole[:2] = a
        whole.narrow(0, 2, 2).copy_(a * 2)
        whole.view(-1)[0].add_(1)
        return (whole,)

    run, x = executable(work, a), torch.ones(2, 3)
    first = run((x,))[0]
    kept = first.clone()
    second = run((2 * x,))[0]
    assert torch.equal(first, kept)
    expected = torch.cat([2 * x, 4 * x])
    expected[0, 0] += 1
    assert torch.equal(second, expected)


@pytest.mark.parametrize(
    ("work", "reason"),
    [
        (lambda a: a + torch.ones(2).numpy().sum().item() if a.sum() > 0 else a, "no tensor"),
        (lambda a: a.add_(1), "writes into what comes from outside"),
        (lambda a: a + OTHER, "comes from elsewhere"),
        (lambda a: a + torch.rand(2), "does not do the same each time"),
        (lambda a: a.repeat(MUCH), "makes more than is kept"),
    ],
    ids=["reads numbers", "writes", "another tensor", "draws", "makes much"],
)
def test_what_may_change_is_refused(work: Callable[[Tensor], Tensor], reason: str) -> None:
    a = torch.ones(2)
    with pytest.raises(ValueError, match=reason):
        written_down(lambda: (work(a),), (a,), MUCH)


OTHER = torch.ones(2)


def operators(run: Executable) -> list[str]:
    return [str(node.target) for node in run.graph.graph.nodes if node.op == "call_function"]


def test_shapes_and_copies_on_the_way_are_left_out() -> None:
    def work(a: Tensor) -> tuple[Tensor, ...]:
        whole = torch.stack([a.sin()]).unsqueeze(2).transpose(0, 2)[:, :, 0:9]
        return (torch.cat([whole.permute(2, 0, 1, 3)[:, 0]]).squeeze(1).select(0, 0).exp(),)

    a, other = torch.randn(1, 4), torch.randn(1, 4)
    run = executable(lambda: work(a), a)
    assert operators(run) == ["aten.sin.default", "aten.select.int", "aten.exp.default"]
    assert torch.equal(run((other,))[0], other[0].sin().exp())


def test_entries_in_another_order_are_not_left_out() -> None:
    a, other = torch.randn(4, 4), torch.randn(4, 4)
    work = lambda a: (a.t().sin().t()[1:].reshape(-1), a.expand(2, 4, 4)[:, 1], a[:, 0].exp())  # noqa: E731
    run = executable(lambda: work(a), a)
    for result, expected in zip(run((other,)), work(other), strict=True):
        assert torch.equal(result, expected)


def test_copies_that_are_returned_have_memory_of_their_own() -> None:
    a = torch.randn(3)

    def work() -> tuple[Tensor, ...]:
        wave = a.sin()
        return wave, torch.stack([wave]), torch.cat([wave])[:2]

    first, *others = executable(work, a)((a,))
    first.zero_()
    for other in others:
        assert torch.equal(other.flatten(), a.sin()[: other.numel()])


def test_a_copy_that_is_written_into_stays_one() -> None:
    a, other = torch.randn(3), torch.randn(3)

    def work(a: Tensor) -> tuple[Tensor, ...]:
        wave = a.sin()
        copy = torch.cat([wave])
        return copy.mul_(2) + wave, wave * 1

    run = executable(lambda: work(a), a)
    for result, expected in zip(run((other,)), work(other), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize(
    ("shape", "dims", "calls"),
    [
        ((1, 4, 1, 6), (0, 2, 3), 1),  # of the two last ones alone
        ((4, 6), (1,), 1),
        ((1, 4, 6), (-1,), 2),  # and the shape of what is left
        ((2, 12), (1,), 2),  # half of the samples
        ((8, 3), (1,), 2),
        ((4, 6), (), 1),
    ],
)
@pytest.mark.parametrize("keepdim", [False, True])
def test_reductions_are_those_of_what_has_the_shape(
    shape: tuple[int, ...], dims: tuple[int, ...], calls: int, keepdim: bool
) -> None:
    a, other = torch.randn(4, 2, 3), torch.randn(4, 2, 3)
    calls += keepdim and bool(dims) and calls < 2
    work = lambda a: torch.linalg.vector_norm(a.view(shape), dim=dims, keepdim=keepdim)  # noqa: E731
    if dims:
        run = executable(lambda: (work(a),), a)
        assert len(operators(run)) == calls
        torch.testing.assert_close(run((other,))[0], work(other))
    total = lambda a: a.view(shape).sum(dims or None, keepdim=keepdim)  # noqa: E731
    torch.testing.assert_close(executable(lambda: (total(a),), a)((other,))[0], total(other))


def test_tensors_without_entries_may_come_from_anywhere() -> None:
    nothing, a, other = torch.empty(0, 2), torch.randn(3, 2), torch.randn(3, 2)
    run = executable(lambda: (torch.cat([a.exp(), nothing]), nothing), a)
    joined, none = run((other,))
    assert torch.equal(joined, other.exp())
    assert none.shape == (0, 2)


@pytest.mark.parametrize("inner", [1, 2])
def test_a_column_times_a_row_is_no_product_of_matrices(inner: int) -> None:
    draw = lambda: (torch.randn(5, inner), torch.randn(3, inner))  # noqa: E731
    (a, b), (x, y) = draw(), draw()
    run = executable(lambda: (a.sin() @ b.cos().T,), a, b)
    run((x, y))

    def is_product(frame: Any, event: str, function: Any) -> bool:
        return event == "c_call" and getattr(function, "__name__", "") == "mm"

    assert num_calls(lambda: run((x, y)), is_product) == inner - 1
    (result,) = run((x, y))
    torch.testing.assert_close(result, x.sin() @ y.cos().T)
    assert result.is_contiguous()
