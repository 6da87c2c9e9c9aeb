"""Modules that look at numbers of a batch: what is contracted is what each sample gives alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import jacfunc
from tests.kinds.losses import half_square


class Branching(nn.Module):
    """Goes one way if all numbers of the batch are positive."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.layer(x)
        return torch.sin(h) if bool((x > 0).all()) else torch.cos(3 * h)


def matrix_of(module: nn.Module, x: Tensor) -> Tensor:
    """``Σ Jᵀ J`` from a loop over samples and outputs."""
    rows = []
    for b in range(len(x)):
        for out in module(x[b : b + 1])[0]:
            grads = torch.autograd.grad(out, list(module.parameters()), retain_graph=True)
            rows.append(torch.cat([grad.flatten() for grad in grads]))
    J = torch.stack(rows)
    return J.T @ J


@pytest.mark.parametrize("call", [1, 3, 5])
def test_products_of_a_batch_that_goes_another_way_than_its_samples(call: int) -> None:
    module, x = Branching(), torch.rand(4, 3, dtype=torch.float64) + 0.1
    targets = torch.zeros(4, 2, dtype=torch.float64)
    vector = {name: torch.randn_like(p) for name, p in module.named_parameters()}
    ggn = jacfunc.ggn(module, half_square, independent=True)
    for _ in range(call - 1):
        product = ggn(x, targets) @ vector
        flat = torch.cat([product[name].flatten() for name in vector])
        of_all = torch.cat([v.flatten() for v in vector.values()])
        torch.testing.assert_close(flat, matrix_of(module, x) @ of_all)
    x[1, 0] = -1.0
    expected = matrix_of(module, x)
    with pytest.raises(NotImplementedError, match="ggn: products evaluate the batch as a whole"):
        ggn(x, targets) @ vector
    torch.testing.assert_close(ggn(x, targets).matrix(), expected)
    one = ggn(x[1:2], targets[1:2]) @ vector
    flat = torch.cat([one[name].flatten() for name in vector])
    of_all = torch.cat([v.flatten() for v in vector.values()])
    torch.testing.assert_close(flat, matrix_of(module, x[1:2]) @ of_all)
