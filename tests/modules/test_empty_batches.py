"""An empty batch gives results without samples, in the shapes of those with samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F
from torch.utils._pytree import tree_map

import jacfunc


class Net(nn.Module):
    """A network that could not be called with an empty batch, as -1 could mean anything."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 4), nn.Linear(4, 2)
        self.shift = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x.view(len(x), -1)))
        return torch.logaddexp(self.head(hidden), self.shift)


class Tree(Net):
    def forward(self, x: Tensor) -> Any:
        out = super().forward(x)
        return {"logits": out, "sums": (out.sum(1),)}


X, Y = torch.randn(3, 2, 3), torch.tensor([0, 1, 1])


def shapes(tree: Any) -> Any:
    return tree_map(lambda x: tuple(x.shape) if isinstance(x, Tensor) else x, tree)


def without(size: int, tree: Any) -> Any:
    """Shapes of results for a batch of this size, with no samples instead."""
    return tree_map(lambda n: 0 if n == size else n, tree)


JACOBIANS: dict[str, Callable[..., Any]] = {
    **{
        strategy: lambda m, x, strategy=strategy: jacfunc.module_jacobian(
            m, ("params", "inputs"), per_sample=True, strategy=strategy
        )(x)
        for strategy in ("auto", "reverse", "forward", "looped", "structured")
    },
    "flat": lambda m, x: jacfunc.module_jacobian(m, per_sample=True, flat=True)(x),
    "dtype": lambda m, x: jacfunc.module_jacobian(m, per_sample=True, dtype=torch.float64)(x),
    "budget": lambda m, x: jacfunc.module_jacobian(m, per_sample=True, memory="1 MiB")(x),
    "whole": lambda m, x: tuple(
        jacfunc.module_jacobian(m, "inputs", per_sample=True, full_output=True)(x)
    ),
    "stream by params": lambda m, x: list(jacfunc.stream_jacobian(m, per_sample=True)(x)),
    "stream by rows": lambda m, x: list(
        jacfunc.stream_jacobian(m, "rows", per_sample=True, chunk_size=2)(x)
    ),
    "ntk": lambda m, x: jacfunc.ntk(m, None, X[:2], x),
    "projection": lambda m, x: jacfunc.random_projection(m, 5)(x),
}


@pytest.mark.parametrize("net", [Net, Tree])
@pytest.mark.parametrize("door", JACOBIANS)
def test_there_are_no_samples(door: str, net: type[nn.Module]) -> None:
    module = net()
    # as many samples as no other dimension has entries
    expected = without(7, shapes(JACOBIANS[door](module, torch.randn(7, 2, 3))))
    assert shapes(JACOBIANS[door](module, X[:0])) == expected


def test_it_is_as_torch_has_it() -> None:
    module = Net()

    def of_one(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, params, (x.unsqueeze(0),)).squeeze(0)

    params = dict(module.named_parameters())
    want = torch.vmap(jacrev(of_one), in_dims=(None, 0))(params, X)
    assert shapes(jacfunc.module_jacobian(module, per_sample=True)(X[:0])) == without(
        len(X), shapes(want)
    )


def test_kernels_of_empty_sides() -> None:
    module = Net()
    assert jacfunc.ntk(module, None, X[:0]).shape == (0, 0, 2, 2)
    assert jacfunc.ntk(module, None, X[:0], X, trace_axes=0).shape == (0, 3)
    parts = [X, X[:0]]
    torch.testing.assert_close(
        jacfunc.ntk(module, None, parts, parts[::-1]), jacfunc.ntk(module, None, X)
    )
    func = jacfunc.ntk(lambda w, x: torch.tanh(w @ x), torch.randn(2, 3), torch.randn(0, 3))
    assert func.shape == (0, 0, 2, 2)


@pytest.mark.parametrize("memory", [None, "1 MiB"])
def test_sums_over_no_samples_are_zero(memory: str | None) -> None:
    module = Net()
    params = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    count = sum(p.numel() for p in module.parameters())
    for G in (
        jacfunc.ggn(module, F.cross_entropy, memory=memory)(X[:0], Y[:0]),
        jacfunc.fisher(module, "categorical", memory=memory)(X[:0]),
        jacfunc.fisher(module, "gaussian", reduction="sum", memory=memory)(X[:0]),
    ):
        torch.testing.assert_close(G.diagonal(), params)
        torch.testing.assert_close(G @ dict(module.named_parameters()), params)
        torch.testing.assert_close(G.matrix(), torch.zeros(count, count))


def test_no_norms() -> None:
    for loss in (F.cross_entropy, lambda out, y: (out.sum(1) - y).square().sum()):
        assert jacfunc.gradient_norms(Net(), loss)(X[:0], Y[:0]).shape == (0,)
        assert jacfunc.random_projection(Net(), 4, loss)(X[:0], Y[:0]).shape == (0, 4)


def test_a_stream_of_no_samples_has_one_block() -> None:
    ((samples, blocks),) = jacfunc.stream_jacobian(Net(), "samples", per_sample=True)(X[:0])
    assert samples == slice(0, 0)
    assert shapes(blocks)["shift"] == (0, 2, 2)
