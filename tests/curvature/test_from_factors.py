"""Products with a Gauss-Newton matrix from the factors of all samples, as compiled ones may be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import jacfunc
from jacfunc._products import from_factors


class Tied(nn.Module):
    """A table that is looked up and multiplied by, and a parameter that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.unused = nn.Embedding(5, 3), nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        words = (x[:, :4].abs() * 3).long().clamp(0, 4)
        return self.table(words).tanh().sum(1) @ self.table.weight.mT


class Attention(nn.Module):
    """One parameter, of which three parts are used."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        tokens = x.view(-1, 2, 6)
        return self.inner(tokens, tokens, tokens)[0].flatten(1)[:, :3]


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(12, 4)), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return ((x @ self.weight).tanh() * self.scale)[:, :3]


MODULES: dict[str, Callable[[], nn.Module]] = {
    "perceptron": lambda: nn.Sequential(nn.Linear(12, 5), nn.GELU(), nn.Linear(5, 3)),
    "groups": lambda: nn.Sequential(
        *(nn.Unflatten(1, (4, 3)), nn.Conv1d(4, 6, 2, groups=2), nn.SiLU(), nn.Flatten()),
        *(nn.LayerNorm(12), nn.Linear(12, 3)),
    ),
    "tied": Tied,
    "attention": Attention,
    "transposed": Transposed,
}
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross entropy": lambda out, y: F.cross_entropy(out, y),
    "squares": lambda out, y: (out - y[:, None]).square().sum(),
}


def expected(model: nn.Module, x: Tensor, curvature: Tensor, flat: Tensor) -> Tensor:
    """``Σ_b J_bᵀ H_b J_b v``, from rows of J that are taken one by one."""
    params, out = [*model.parameters()], model(x)
    rows = torch.stack([_row(params, entry) for entry in out.flatten()])
    matrix = torch.block_diag(*curvature)
    return rows.T @ (matrix @ (rows @ flat))


def _row(params: list[nn.Parameter], entry: Tensor) -> Tensor:
    kwargs: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
    grads = torch.autograd.grad(entry, params, **kwargs)
    pairs = zip(params, grads, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs])


def curvature_of(loss: str, out: Tensor) -> Tensor:
    if loss == "squares":
        return 2 * torch.eye(out.shape[1], dtype=out.dtype).expand(len(out), -1, -1)
    p = out.detach().softmax(1)
    return (torch.diag_embed(p) - p[:, :, None] * p[:, None]) / len(out)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", MODULES)
def test_products(name: str, loss: str) -> None:
    torch.manual_seed(0)
    model = MODULES[name]().double()
    x = torch.randn(4, 12, dtype=torch.float64)
    out = model(x)
    y = torch.arange(4) % out.shape[1]
    vector = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    matrix = jacfunc.ggn(model, LOSSES[loss])(x, y)
    with from_factors() as taken:
        product = matrix @ vector
    assert taken == [1]
    flat, found = (torch.cat([t.flatten() for t in d.values()]) for d in (vector, product))
    torch.testing.assert_close(found, expected(model, x, curvature_of(loss, out), flat))


class Centered(nn.Module):
    """Samples that are coupled."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        inner = self.first(x)
        return self.last(inner - inner.mean(0))


def test_samples_that_are_coupled_are_refused() -> None:
    model = Centered()
    matrix = jacfunc.ggn(model, F.cross_entropy)(torch.randn(5, 3), torch.arange(5) % 2)
    vector = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    with from_factors(), pytest.raises(ValueError, match="samples"):
        _ = matrix @ vector


def test_many_outputs_are_refused() -> None:
    """Their cotangents would take more than the products of the layers."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 9_000))
    matrix = jacfunc.ggn(model, F.mse_loss)(torch.randn(5, 2), torch.zeros(5, 9_000))
    vector = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    with from_factors(), pytest.raises(NotImplementedError, match="9000 outputs a sample would"):
        _ = matrix @ vector
