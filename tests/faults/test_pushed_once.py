"""A function that is pushed forward is watched at its first calls alone, unless there is reason."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian

import jacfunc
from jacfunc._faults import ForwardWatch

X = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)
W = torch.tensor([[1.0, -2.0, 0.5], [0.25, 3.0, -1.0]], dtype=torch.float64)
NET = nn.Sequential(nn.Linear(3, 2), nn.Tanh()).double()


class Watched:
    """How many watches of forward mode are entered inside."""

    count = 0

    def __enter__(self) -> Watched:
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _note(self, frame: Any, event: str, _: Any) -> None:
        is_entered = event == "call" and frame.f_code is ForwardWatch.__enter__.__code__
        self.count += is_entered and isinstance(frame.f_locals["self"], ForwardWatch)


def watches(derive: Callable[[Tensor], Tensor], x: Tensor = X) -> int:
    """How many watches of forward mode a call enters."""
    with Watched() as watched:
        derive(x)
    return watched.count


def without_graph(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.norm()
    return x * scale


def asking(x: Tensor) -> Tensor:
    return x.sin() if x.requires_grad else x.cos()


def catching(x: Tensor) -> Tensor:
    try:
        return torch.linalg.cholesky(torch.outer(x, x))
    except RuntimeError:
        return x.sin()


def reading(x: Tensor) -> Tensor:
    return x.sin() if x.sum().item() > 0 else x.cos()


def drawing(x: Tensor) -> Tensor:
    return x * torch.rand_like(x)


def of_determinant(x: Tensor) -> Tensor:
    return torch.linalg.det(torch.outer(x, x) + torch.eye(3, dtype=x.dtype))


PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "products": lambda x: torch.tanh(W @ x),
    "transposed": lambda x: x @ W.T,
    "shapes": lambda x: x.expand(2, x.shape[0]).sum(1),
    "writes": lambda x: x.mul_(2).sin(),
}
WATCHED: dict[str, Callable[[Tensor], Tensor]] = {
    "no_grad": without_graph,
    "asks for a graph": asking,
    "catches": catching,
    "reads numbers": reading,
    "draws": drawing,
    "determinant": of_determinant,
    "module": lambda x: NET(x),
    "linear": lambda x: nn.functional.linear(x, W),
}


@pytest.mark.parametrize("f", PLAIN.values(), ids=PLAIN)
@pytest.mark.parametrize("grad_mode", [True, False])
def test_later_pushes_are_not_watched(f: Callable[[Tensor], Tensor], grad_mode: bool) -> None:
    derive = jacfunc.jacfwd(f)
    with torch.set_grad_enabled(grad_mode):
        assert watches(derive) == 1
        assert watches(derive) == 0
        assert watches(jacfunc.jacfwd(f)) == 0
        later = derive(X)
    torch.testing.assert_close(later, jacobian(lambda x: f(x.clone()), X))


@pytest.mark.parametrize("f", WATCHED.values(), ids=WATCHED)
def test_some_are_watched_in_every_call(f: Callable[[Tensor], Tensor]) -> None:
    derive = jacfunc.jacfwd(f, randomness="same")
    for _ in range(3):
        assert watches(derive) == 1


def test_transforms_around_are_another_kind() -> None:
    derive: Any = jacfunc.jacfwd(torch.sin)
    derive(X)
    assert watches(derive) == 0
    assert watches(torch.vmap(derive), X[None]) == 1
    torch.testing.assert_close(torch.vmap(derive)(X[None])[0], torch.diag(X.cos()))
    outer = jacfunc.jacfwd(derive)
    outer(X)
    assert watches(outer) > 1
    torch.testing.assert_close(outer(X).sum((1, 2)), -X.sin())


def test_a_hook_that_comes_later_is_refused() -> None:
    net = nn.Linear(3, 2).double()
    derive = jacfunc.jacfwd(lambda x: net(x))
    for _ in range(3):
        derive(X)
    net.register_full_backward_hook(lambda *_: None)
    with pytest.raises(NotImplementedError, match="hooks"):
        derive(X)
