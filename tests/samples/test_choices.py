"""Samples of which one, or how many, say what is done with all: where nobody sees the choice."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from ctypes import c_double
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import jacfunc
from tests.modules.test_settled_layers import assert_same, loop, normal

CALLS = 8


def factor_by_text(h: Tensor) -> float:
    return 2.0 if "-" in str(h.detach()[0, 0]) else 1.0


def factor_by_memory(h: Tensor) -> float:
    return 2.0 if c_double.from_address(h.data_ptr()).value > 0 else 1.0


def factor_by_storage(h: Tensor) -> float:
    return 2.0 if h.detach().untyped_storage().tolist()[7] > 127 else 1.0


def factor_by_exchange(h: Tensor) -> float:
    return 2.0 if np.from_dlpack(h.detach())[0, 0] > 0 else 1.0


def factor_by_where(h: Tensor) -> Tensor:
    return torch.where(h[0, 0] > 0, 2.0, 1.0).to(h.dtype)


def factor_by_count(h: Tensor) -> int:
    return 1 + h[0][h[0] > 0].numel()


@torch.jit.script
def factor_by_script(h: Tensor) -> float:
    if bool(h[0, 0] > 0):
        return 2.0
    return 1.0


@torch.jit.script
def factor_by_script_count(h: Tensor) -> int:
    return 1 + torch.nonzero(h[0] > 0).size(0)


CHOICES: list[Callable[[Tensor], Any]] = [
    factor_by_text,
    factor_by_memory,
    factor_by_storage,
    factor_by_exchange,
    factor_by_where,
    factor_by_count,
    factor_by_script,
    factor_by_script_count,
]


class Choosing(nn.Module):
    """A network that is scaled by what the first sample of the batch says."""

    def __init__(self, factor: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.last, self.factor = nn.Linear(3, 4), nn.Linear(4, 2), factor
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        return self.last(h) * self.factor(h)  # type: ignore[no-any-return]


@pytest.mark.parametrize("factor", CHOICES, ids=lambda func: getattr(func, "__name__", "script"))
def test_no_sample_chooses_for_others(factor: Callable[[Tensor], Any]) -> None:
    torch.manual_seed(0)
    module = Choosing(factor)
    params = jacfunc.module_jacobian(module, per_sample=True, strategy="structured")
    inputs = jacfunc.module_jacobian(module, "inputs", per_sample=True)
    for _ in range(CALLS):
        x = normal(3)(5)
        own = loop(module, x)
        rows = torch.cat([block.flatten(2) for block in own.values()], 2)
        with suppress(ValueError):  # it may say that samples depend on each other
            assert_same(params(x), own)
        with suppress(ValueError):
            _close(inputs(x), torch.stack([_by_input(module, point) for point in x]))
        with suppress(ValueError):
            kernel = jacfunc.ntk(module, None, x, trace_axes=-1)
            _close(kernel, torch.einsum("bkp,ckp->bc", rows, rows))


def _by_input(module: nn.Module, point: Tensor) -> Tensor:
    own = point[None].clone().requires_grad_()
    out = module(own)[0]
    return torch.stack([torch.autograd.grad(y, own, retain_graph=True)[0][0] for y in out])


def _close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("independent", [None, True])
def test_who_says_that_samples_are_independent_pays_for_no_comparison(independent: Any) -> None:
    """Numbers that are moved by a constant tensor could be moved to other samples."""
    torch.manual_seed(0)
    module = Moving()
    options: Any = {"strategy": "structured", "independent": independent}
    jac = jacfunc.module_jacobian(module, per_sample=True, **options)
    jac(normal(3)(5)), jac(normal(3)(5))
    SIZES.clear()
    x = normal(3)(5)
    got, num_alone = jac(x), SIZES.count(1)
    assert (num_alone < 5) == (independent is True)
    assert_same(got, loop(module, x))


class Moving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        SIZES.append(len(x))
        return self.last(self.inner(x)[:, ORDER].tanh())  # type: ignore[no-any-return]


SIZES: list[int] = []
"""Of the batches that were evaluated."""
ORDER = torch.tensor([2, 0, 1, 3])


def test_a_tensor_that_is_printed_is_no_error() -> None:
    def func(x: Tensor) -> Tensor:
        assert "tensor" in str(x) or "Tensor" in str(x)
        return x.sin()

    x = torch.linspace(0.0, 1.0, 3, dtype=torch.float64)
    for derive in (jacfunc.jacrev, jacfunc.jacfwd, jacfunc.jacobian):
        torch.testing.assert_close(derive(func)(x), torch.diag(x.cos()))
    both = jacfunc.vmap(jacfunc.jacrev(func))(torch.stack([x, x + 1]))
    torch.testing.assert_close(both[0], torch.diag(x.cos()))


class Chosen(nn.Module):
    """A network of which an integer tensor chooses entries, be it a constant or data."""

    def __init__(self, choose: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.last, self.choose = nn.Linear(3, 4), nn.Linear(4, 2), choose
        self.register_buffer("order", torch.tensor([2, 0, 1, 3]))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        SIZES.append(len(x))
        return self.last(self.choose(self, self.inner(x)).tanh())  # type: ignore[no-any-return]


BY_CONSTANTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a buffer": lambda module, h: h[:, module.order],
    "part of a buffer": lambda module, h: h.index_select(1, module.order[1:].repeat(2)[:4]),
    "a range": lambda module, h: h[:, torch.arange(4).flip(0) + 0],
    "gather": lambda module, h: h.gather(1, module.order.expand(len(h), -1)),
    "a list": lambda module, h: h[:, [3, 2, 1, 0]],
    "a mask": lambda module, h: h[:, module.order >= 0],
}


@pytest.mark.parametrize("name", BY_CONSTANTS)
def test_entries_that_constants_choose_are_compared_no_more_often_than_others(name: str) -> None:
    torch.manual_seed(0)
    module = Chosen(BY_CONSTANTS[name])
    jac = jacfunc.module_jacobian(module, per_sample=True, strategy="structured")
    for _ in range(40):
        jac(normal(3)(5))
    SIZES.clear()
    x = normal(3)(5)
    got = jac(x)
    assert SIZES == [5]
    assert_same(got, loop(module, x))


def by_attribute(module: Any, h: Tensor) -> Tensor:
    module.order = (h.detach()[0] > 0).long() + torch.arange(4) // 2
    return h[:, module.order]


def by_write(module: Any, h: Tensor) -> Tensor:
    part = module.order[:2]
    module.order[:2] = h.detach()[0, :2] > 0
    return h[:, part.repeat(2)]


def by_bare_write(module: Any, h: Tensor) -> Tensor:
    module.order.data.copy_((h.detach()[0] > 0).long())
    return h[:, module.order]


def by_memory_of_numpy(module: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        numbers = (h.numpy()[0] > 0).astype(int).tolist()
    return h[:, torch.tensor(numbers)]


def by_count(module: Any, h: Tensor) -> Tensor:
    return h * (1 + h[0][h[0] > 0].numel())


def by_a_mask_in_a_list(module: Any, h: Tensor) -> Tensor:
    return h[:, torch.stack([h[0, k] > 0 for k in range(4)]).long()]


BY_DATA = by_attribute, by_write, by_bare_write, by_memory_of_numpy, by_count, by_a_mask_in_a_list


@pytest.mark.parametrize("choose", BY_DATA, ids=lambda func: func.__name__)
def test_a_sample_that_chooses_entries_of_others_is_met_at_once(choose: Any) -> None:
    """Long after all samples have chosen alike, the first one chooses as before, and no other."""
    torch.manual_seed(0)
    module = Chosen(choose)
    jac = jacfunc.module_jacobian(module, per_sample=True, strategy="structured")
    alike = normal(3)(1).expand(5, 3)
    with suppress(ValueError):
        for number in range(20):
            jac(alike * (1 + number / 100))
    other = torch.cat([alike[:1] * 1.05, normal(3)(4)])
    with suppress(ValueError):
        assert_same(jac(other), loop(module, other))
