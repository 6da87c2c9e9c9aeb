"""Work of jacfunc's own, written down while it runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from jacfunc._traces import Compiler, Executable, written_down

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


def test_what_is_reshaped_in_place_is_not_written_into() -> None:
    def work() -> tuple[Tensor, ...]:
        whole = (a * 2).unsqueeze_(1)
        bent = whole.sin()
        whole.squeeze_(1)
        return bent, whole.view(3, 4) @ b.t() + whole @ b.t()

    a, b = torch.randn(3, 4), torch.randn(5, 4)
    run = executable(work, a, b)
    x, y = torch.randn(3, 4), torch.randn(5, 4)
    bent, products = run((x, y))
    torch.testing.assert_close(bent, (2 * x).sin()[:, None])
    torch.testing.assert_close(products, 4 * x @ y.T)
    names = [getattr(node.target, "__name__", "") for node in run.graph.graph.nodes]
    assert not any(name.startswith(("squeeze_", "unsqueeze_.")) for name in names)
    assert sum(name.startswith("t.") for name in names) == 1
    assert sum(name.startswith(("view", "reshape")) for name in names) <= 1
