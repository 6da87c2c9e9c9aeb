"""Large products of matrices that nobody differentiates are oneDNN's, and as right as torch's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import jacfunc
from jacfunc._torch import fast_linear

ONEDNN = "mkldnn::_linear_pointwise"

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN"
)


class FunctionMode(TorchFunctionMode):
    """A mode that looks at functions of torch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class DispatchMode(TorchDispatchMode):
    """A mode that looks at operators."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def problem(dtype: torch.dtype = torch.float32, rows: int = 256) -> tuple[Tensor, Tensor]:
    """Rows ``[3, rows, 256]`` and a weight ``[128, 256]``."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, rows, 256, generator=generator, dtype=torch.float64)
    weight = torch.randn(128, 256, generator=generator, dtype=torch.float64)
    return x.to(dtype), weight.to(dtype)


def onednn_calls(call: Callable[[], object]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return sum(event.count for event in profile.key_averages() if event.key == ONEDNN)


def check(out: Tensor, x: Tensor, weight: Tensor) -> None:
    """The output against the product in float64."""
    expected = torch.einsum("...k,nk->...n", x.double(), weight.double())
    assert out.shape == expected.shape
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "a vector of many samples": lambda x: x.flatten(0, 1),
    "spread": lambda x: x[:, :1].expand(x.shape),
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every second": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}


@needs_onednn
@pytest.mark.parametrize("name", VIEWS)
def test_a_large_product_is_onednns(name: str) -> None:
    x, weight = problem()
    x = VIEWS[name](x)
    check(fast_linear(x, weight), x, weight)
    assert onednn_calls(lambda: fast_linear(x, weight)) == 1
    spread = weight.mT.contiguous().mT
    check(fast_linear(x, spread), x, spread)


@needs_onednn
@pytest.mark.parametrize("dim", [0, 1])
def test_below_a_vmap(dim: int) -> None:
    x, weight = problem()
    mapped = torch.vmap(lambda row: fast_linear(row, weight), in_dims=dim, out_dims=dim)
    check(mapped(x), x, weight)
    assert onednn_calls(lambda: mapped(x)) == 1


def test_vmaps_that_torch_serves_itself() -> None:
    x, weight = problem()
    check(torch.vmap(torch.vmap(lambda row: fast_linear(row, weight)))(x), x, weight)
    columns = x.flatten(0, 1).mT.contiguous()
    check(torch.vmap(lambda c: fast_linear(c, weight), in_dims=1)(columns), columns.mT, weight)
    both = torch.vmap(lambda w: fast_linear(x, w))(torch.stack([weight, 2 * weight]))
    check(both[1], x, 2 * weight)


OTHERS: dict[str, tuple[Callable[[], tuple[Tensor, Tensor]], AbstractContextManager[Any]]] = {
    "float64": (lambda: problem(torch.float64), nullcontext()),
    "small": (lambda: problem(rows=2), nullcontext()),
    "a function mode": (problem, FunctionMode()),
    "a dispatch mode": (problem, DispatchMode()),
    "oneDNN is off": (problem, torch.backends.mkldnn.flags(enabled=False)),
}


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # of the switch of oneDNN
@pytest.mark.parametrize("name", OTHERS)
def test_torch_takes_the_others(name: str) -> None:
    make, context = OTHERS[name]
    x, weight = make()
    with context:
        check(fast_linear(x, weight), x, weight)
        assert onednn_calls(lambda: fast_linear(x, weight)) == 0


def test_a_product_that_is_differentiated_is_torchs() -> None:
    x, weight = problem()
    weight.requires_grad_()
    out = fast_linear(x, weight)
    (grad,) = torch.autograd.grad(out.sum(), weight)
    torch.testing.assert_close(grad, x.sum((0, 1)).expand_as(weight), rtol=1e-4, atol=1e-3)
    pushed = torch.func.jvp(lambda x: fast_linear(x, weight.detach()), (x,), (2 * x,))[1]
    check(pushed, 2 * x, weight.detach())


@needs_onednn
@pytest.mark.parametrize("by", ["F.linear", "matmul"])
def test_laplacians_of_wide_layers(by: str) -> None:
    x, weight = problem()
    x, a = x.flatten(0, 1)[:16, :40], weight[:, :40] / 8
    b = torch.cat([weight, weight.flip(0)]).repeat(1, 2)[:, :128] / 16
    linear = torch.nn.functional.linear if by == "F.linear" else lambda x, w: x @ w.mT

    def func(x: Tensor) -> Tensor:
        return torch.sin(linear(torch.sin(linear(x, a)), b)).sum()

    laplacian = jacfunc.vmap(jacfunc.laplacian(func))
    # Δ sin(z) = cos(z) Δz - sin(z) |∇z|², through both layers, in float64
    x64, a64, b64 = x.double(), a.double(), b.double()
    z = x64 @ a64.mT
    inner = torch.einsum("nk,ki->nki", z.cos(), a64)
    outer = torch.einsum("ok,nki->noi", b64, inner)
    second = (-z.sin() * a64.square().sum(1)) @ b64.mT
    y = z.sin() @ b64.mT
    expected = (y.cos() * second - y.sin() * outer.square().sum(-1)).sum(-1)
    torch.testing.assert_close(laplacian(x).double(), expected, rtol=1e-4, atol=1e-3)
    assert onednn_calls(lambda: laplacian(x)) == 1
