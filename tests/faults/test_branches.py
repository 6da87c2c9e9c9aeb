"""Functions that read numbers: at other numbers they may do what they have not done before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import jacfunc
from jacfunc._faults import is_watching

LARGE, SMALL = torch.tensor([2.0, 3.0]).double(), torch.tensor([0.0, 0.1]).double()
NEAR_ZERO = -(torch.pi**2) / 3
"""The second derivative of sinc at 0, of which torch makes nan."""

READS: dict[str, Callable[[Tensor], object]] = {
    "truth": lambda x: x.abs().sum() < 1,
    "number": lambda x: x.abs().sum().item() < 1,
    "float": lambda x: float(x.detach().abs().sum()) < 1,
    "whole number": lambda x: int(x.detach().abs().sum()) < 1,
    "index": lambda x: (True, *[False] * 9)[x.detach().abs().sum().long()],
    "complex": lambda x: complex(x.detach().abs().sum()).real < 1,
    "words": lambda x: f"{x.detach().abs().sum():.1f}" < "1",
    "one of them": lambda x: 3.0 not in x,
    "equal": lambda x: torch.equal(x.round(), torch.zeros_like(x)),
    "close": lambda x: torch.zeros_like(x).allclose(x, atol=0.3),
    "zero": lambda x: (x.abs().sum() < 1).is_nonzero(),
    "places": lambda x: len((x.abs() > 1).nonzero()) == 0,
    "mask": lambda x: x[x > 1].numel() == 0,
    "masked": lambda x: torch.masked_select(x, x > 1).numel() == 0,
    "unique": lambda x: torch.unique(x.detach().round()).numel() == 1,
    "list": lambda x: max(x.tolist()) < 1,
    "array": lambda x: x.detach().numpy().sum() < 1,
}


@pytest.mark.parametrize("name", READS)
def test_what_is_called_at_other_numbers_is_looked_up_too(name: str) -> None:
    is_small = READS[name]

    def branching(x: Tensor) -> Tensor:
        return torch.special.airy_ai(x) if is_small(x) else x.sin()

    jacobian = jacfunc.jacrev(branching)
    for _ in range(2):
        torch.testing.assert_close(jacobian(LARGE), LARGE.cos().diag())
    with pytest.raises(NotImplementedError, match="no derivative of airy_ai"):
        jacobian(SMALL)

    def curved(x: Tensor) -> Tensor:
        return (torch.sinc(x) if is_small(x) else x.sin()).sum()

    hessian = jacfunc.hessian(curved)
    for _ in range(2):
        torch.testing.assert_close(hessian(LARGE), -LARGE.sin().diag())
    assert hessian(SMALL)[0, 0] == pytest.approx(NEAR_ZERO)


class Branching(nn.Module):
    """Of one of two functions, by the size of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2).double())

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale
        return torch.special.airy_ai(x) if bool(x.abs().max() < 1) else x.sin()


@pytest.mark.parametrize("wrt", ["params", "inputs"])
@pytest.mark.parametrize("per_sample", [True, False])
def test_modules(wrt: str, per_sample: bool) -> None:
    jacobian = jacfunc.module_jacobian(Branching(), wrt, per_sample=per_sample)
    for _ in range(2):
        jacobian(torch.stack([LARGE, LARGE]))
    with pytest.raises(NotImplementedError, match="no derivative of airy_ai"):
        jacobian(torch.stack([SMALL, SMALL]))


@pytest.mark.parametrize(("index", "reads"), [(slice(1, None), False), (LARGE > 2, True)])
def test_an_index_without_a_mask_reads_nothing(index: slice | Tensor, reads: bool) -> None:
    watched = []

    def taking(x: Tensor) -> Tensor:
        watched.append(is_watching())
        return x[index].sin()

    jacobian = jacfunc.jacrev(taking)
    for _ in range(2):
        jacobian(LARGE)
    assert watched == [True, reads]
