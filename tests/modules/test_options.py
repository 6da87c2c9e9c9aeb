"""Options that every door for modules has: numbers against loops, memory counted, words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import jacfunc
from jacfunc._memory.counting import PeakBytes

KiB = 2**10


class Network(nn.Module):
    """An embedding-free network with a layer at several positions, a norm and raw parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(8, 24), nn.Linear(24, 4)
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(16, 3)
        self.scale = nn.Parameter(torch.rand(24) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(torch.tanh(self.wide(x))) * self.scale
        return self.head(self.narrow(hidden).flatten(-2))


def problem(size: int = 40) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    module = Network().double()
    return module, torch.randn(size, 4, 8).double(), torch.randint(3, (size,))


def looped(module: nn.Module, x: Tensor, names: list[str] | None = None) -> Tensor:
    """The Jacobian ``[B, M, P]`` of chosen parameters, a row at a time."""
    params = [p for name, p in module.named_parameters() if names is None or name in names]
    out = module(x)
    rows = []
    for number in out.flatten():
        gradients = torch.autograd.grad(number, params, retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(rows).view(*out.shape, -1)


def gradients(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """What each sample adds to the gradient of the mean cross entropy, ``[B, P]``."""
    params = list(module.parameters())
    rows = []
    for sample, target in zip(x, y, strict=True):
        loss = F.cross_entropy(module(sample.unsqueeze(0)), target.unsqueeze(0)) / len(x)
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)]))
    return torch.stack(rows)


def cut(module: nn.Module, flat: Tensor) -> dict[str, Tensor]:
    sizes = [param.numel() for param in module.parameters()]
    named = zip(module.named_parameters(), flat.split(sizes), strict=True)
    return {name: part.view_as(param) for (name, param), part in named}


def gauss_newton(module: nn.Module, x: Tensor) -> Tensor:
    J, chances = looped(module, x), module(x).detach().softmax(-1)
    H = torch.diag_embed(chances) - chances.unsqueeze(2) * chances.unsqueeze(1)
    return torch.einsum("bmp,bmn,bnq->pq", J, H / len(x), J)


def kernel(module: nn.Module, x: Tensor, *others: Tensor) -> Tensor:
    rows = looped(module, x)
    return torch.einsum("amp,bnp->abmn", rows, looped(module, *others) if others else rows)


def blocks(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    matrix, slices = gauss_newton(module, x), jacfunc.param_slices(module)
    return {name: matrix[columns, columns] for name, columns in slices.items()}


Ask = Callable[..., Any]
"""The answer of a door for a module, inputs and targets, with options."""

DOORS: dict[str, tuple[Ask, Ask]] = {
    "kernel": (
        lambda m, x, y, **ways: jacfunc.ntk(m, None, x, **ways),
        lambda m, x, y: kernel(m, x),
    ),
    "kernel of two batches": (
        lambda m, x, y, **ways: jacfunc.ntk(m, None, x, x[:30] + 1, **ways),
        lambda m, x, y: kernel(m, x, x[:30] + 1),
    ),
    "traced kernel of loaders": (
        lambda m, x, y, **ways: jacfunc.ntk(m, None, list(x.split(25)), trace_axes=0, **ways),
        lambda m, x, y: kernel(m, x).diagonal(0, 2, 3).sum(-1),
    ),
    "diagonal": (
        lambda m, x, y, **ways: jacfunc.ggn(m, F.cross_entropy, **ways)(x, y).diagonal(),
        lambda m, x, y: cut(m, gauss_newton(m, x).diagonal()),
    ),
    "blocks": (
        lambda m, x, y, **ways: jacfunc.ggn(m, F.cross_entropy, **ways)(x, y).blocks(),
        lambda m, x, y: blocks(m, x),
    ),
    "matrix": (
        lambda m, x, y, **ways: jacfunc.ggn(m, F.cross_entropy, **ways)(x, y).matrix(),
        lambda m, x, y: gauss_newton(m, x),
    ),
    "norms": (
        lambda m, x, y, **ways: jacfunc.gradient_norms(m, F.cross_entropy, **ways)(x, y),
        lambda m, x, y: gradients(m, x, y).norm(dim=1),
    ),
}


def drawn(module: nn.Module, x: Tensor, y: Tensor, **ways: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    F_ = jacfunc.fisher(module, "categorical", draws=3, generator=generator, **ways)(x)
    return torch.cat([part.flatten() for part in F_.diagonal().values()])


def drawn_by_loop(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The same draws, and the squares of their gradients, one after the other."""
    chances, J = module(x).detach().softmax(-1), looped(module, x)
    generator = torch.Generator().manual_seed(0)
    classes = torch.multinomial(chances, 3, True, generator=generator)
    total = torch.zeros(J.shape[-1], dtype=J.dtype)
    for sample in range(len(x)):
        for target in classes[sample]:
            score = chances[sample] - F.one_hot(target, 3)
            total += (score @ J[sample]).square() / (3 * len(x))
    return total


def projection(module: nn.Module, x: Tensor, y: Tensor, **ways: Any) -> Tensor:
    return jacfunc.random_projection(module, 64, **ways)(x)


def with_one_matrix(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """``J R``, with the R that the projection of a network's own unit gradients shows."""
    return looped(module, x) @ signs(module)


def signs(module: nn.Module) -> Tensor:
    """The matrix R of this module, read from projections of single entries of the parameters."""

    class Entries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, param in module.named_parameters():
                part, _, leaf = name.rpartition(".")
                if part and not hasattr(self, part):
                    self.add_module(part, nn.Module())
                holder = self.get_submodule(part) if part else self
                holder.register_parameter(leaf, nn.Parameter(param.detach().clone()))

        def forward(self, units: Tensor) -> Tensor:
            flat = torch.cat([param.flatten() for param in self.parameters()])
            return units * flat

    entries = Entries()
    assert [n for n, _ in entries.named_parameters()] == [n for n, _ in module.named_parameters()]
    total = sum(param.numel() for param in module.parameters())
    units = torch.ones(1, total, dtype=torch.float64)
    return jacfunc.random_projection(entries, 64, independent=True)(units)[0]


def projected_gradient(module: nn.Module, x: Tensor, y: Tensor, **ways: Any) -> Tensor:
    return jacfunc.random_projection(module, 64, F.cross_entropy, **ways)(x, y)


DOORS["fisher"] = drawn, drawn_by_loop
DOORS["projections"] = projection, with_one_matrix
DOORS["projected gradients"] = projected_gradient, lambda m, x, y: gradients(m, x, y) @ signs(m)


@pytest.mark.parametrize("share", [2.0, 0.7, 0.4])
@pytest.mark.parametrize("name", DOORS)
def test_a_door_keeps_to_its_budget(name: str, share: float) -> None:
    ask, expected = DOORS[name]
    module, x, y = problem()
    ask(module, x, y, independent=True)  # what is learned takes memory, too
    with PeakBytes() as whole:
        answer = ask(module, x, y, independent=True)
    torch.testing.assert_close(answer, expected(module, x, y))
    del answer
    memory = int(share * whole.peak)
    ask(module, x, y, independent=True, memory=memory)
    with PeakBytes() as counter:
        answer = ask(module, x, y, independent=True, memory=memory)
    torch.testing.assert_close(answer, expected(module, x, y))
    assert memory / 8 < counter.peak <= memory or share > 1
