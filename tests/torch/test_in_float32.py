"""What a CPU computes slowly in half precision is pulled back in float32, and rounded once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import jacfunc

HALF = torch.float16
ROUNDED_ONCE = {"rtol": 1.001 * 2**-11, "atol": 2**-24}
"""A half of the last digit of float16, and of its smallest number."""


def _multiplies_halves() -> bool:
    is_there = torch.backends.mkldnn.is_available()
    return is_there and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


pytestmark = pytest.mark.skipif(_multiplies_halves(), reason="this CPU multiplies float16 itself")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(HALF)


W, KERNEL, SCALE = random(96, 64, seed=1), random(8, 4, 3, 3, seed=2), random(64, seed=3)
MAPS: dict[str, tuple[Callable[..., Tensor], Tensor]] = {
    "linear": (lambda x, w: F.linear(x, w), W),
    "matmul": (lambda x, w: x @ w.T, W),
    "conv": (lambda x, w: F.conv2d(x.unflatten(1, (4, 4, 4)), w, padding=1), KERNEL),
    "softmax": (lambda x, w: x.softmax(-1), W),
    "layer norm": (lambda x, w: F.layer_norm(x, (64,), w), SCALE),
}
ATEN = torch.ops.aten
OPERATIONS = (
    *(ATEN.mm.default, ATEN.bmm.default, ATEN.convolution_backward.default),
    *(ATEN._softmax_backward_data.default, ATEN.native_layer_norm_backward.default),
)
each_map = pytest.mark.parametrize("name", MAPS)


class Seen(TorchDispatchMode):
    """Keeps the dtypes in which operations that are slow in half precision are called."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in OPERATIONS:
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


def pulled(func: Callable[..., Tensor], x: Tensor) -> tuple[Tensor, list[torch.dtype]]:
    """A random cotangent pulled back, and the dtypes of what is slow."""
    value, op = jacfunc.linearize(func, x)
    with Seen() as seen:
        product = op.T @ random(*value.shape, seed=9)
    return product, seen.dtypes


@each_map
def test_slow_operations_run_in_float32(name: str) -> None:
    func, weight = MAPS[name]
    product, dtypes = pulled(lambda x: func(x, weight), random(128, 64))
    assert product.dtype == HALF
    assert dtypes == [torch.float32]


@pytest.mark.parametrize("name", ["linear", "matmul", "conv"])
def test_products_are_rounded_once(name: str) -> None:
    func, weight = MAPS[name]
    x = random(128, 64)
    product, _ = pulled(lambda x: func(x, weight), x)
    wide = x.double().requires_grad_()
    out = func(wide, weight.double())
    (expected,) = torch.autograd.grad(out, wide, random(*out.shape, seed=9).double())
    torch.testing.assert_close(product.double(), expected, **ROUNDED_ONCE)


@each_map
def test_rows_are_those_of_float64(name: str) -> None:
    func, weight = MAPS[name]
    x = random(70, 64)
    jac = jacfunc.jacrev(lambda x: func(x, weight).flatten(1).sum(0)[:5])
    expected = jacfunc.jacrev(lambda x: func(x, weight.double()).flatten(1).sum(0)[:5])(x.double())
    torch.testing.assert_close(jac(x).double(), expected, rtol=5e-3, atol=5e-3)


def test_parameters_per_sample_are_those_of_float64() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.SiLU(), nn.Conv2d(6, 8, 3)),
        *(
            nn.Tanh(),
            nn.Flatten(2),
            nn.LayerNorm(100),
            nn.Softmax(-1),
            nn.Flatten(),
            nn.Linear(800, 4),
        ),
    ).to(HALF)
    images = random(16, 1, 12, 12)
    blocks = jacfunc.module_jacobian(model, per_sample=True)(images)
    model.double()
    expected = jacfunc.module_jacobian(model, per_sample=True, strategy="looped")(images.double())
    for name, block in expected.items():
        assert blocks[name].dtype == HALF
        error = (blocks[name].double() - block).norm() / block.norm()
        assert error < 5e-3, name


@pytest.mark.parametrize("strategy", ["reverse", "looped", "structured"])
def test_every_strategy_goes_by_float32(strategy: str) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 2, 4, 16)).to(HALF)
    options = {"per_sample": True, "independent": True, "strategy": strategy}
    jac: Any = jacfunc.module_jacobian(model, "inputs", **options)
    images = random(3, 4, 32, 32)
    with Seen() as seen:
        rows = jac(images)
    assert set(seen.dtypes) == {torch.float32}
    expected = jacfunc.module_jacobian(model.double(), "inputs", per_sample=True)(images.double())
    assert (rows.double() - expected).norm() < 5e-3 * expected.norm()


@pytest.mark.parametrize("strategy", ["reverse", "looped", "structured"])
def test_gradients_in_the_weight_of_a_large_kernel_are_right(strategy: str) -> None:
    """In float32 torch's are wrong, as oneDNN computes them for one image."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 32, 3, padding=1), nn.Tanh(), nn.Conv2d(32, 2, 16)).to(HALF)
    images = random(3, 4, 16, 16)
    rows = jacfunc.module_jacobian(model, per_sample=True, strategy=strategy)(images)
    wide = model.double()
    for image, row in zip(images.double(), rows["2.weight"], strict=True):
        for number, out in enumerate(wide(image[None]).flatten()):
            (expected,) = torch.autograd.grad(out, wide[2].weight, retain_graph=True)
            error = (row[number, 0, 0].double() - expected).norm()
            assert error < 5e-3 * expected.norm()


def test_second_derivatives_are_as_before() -> None:
    x = random(70, 64) / 8
    func = lambda x: F.linear(x, W.to(x.dtype)).tanh().square().sum()  # noqa: E731
    _, product = jacfunc.hvp(func, (x,), (torch.ones_like(x),))
    _, expected = jacfunc.hvp(func, (x.double(),), (torch.ones_like(x).double(),))
    assert (product[0].double() - expected[0]).norm() < 5e-3 * expected[0].norm()


def test_few_numbers_are_left_as_they_are() -> None:
    _, dtypes = pulled(lambda x: F.linear(x, W), random(2, 64))
    assert dtypes == [HALF]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_other_dtypes_are_left_as_they_are(dtype: torch.dtype) -> None:
    x, weight = random(128, 64).to(dtype), W.to(dtype)
    _, op = jacfunc.linearize(lambda x: F.linear(x, weight), x)
    with Seen() as seen:
        op.T @ torch.ones(128, 96, dtype=dtype)
    assert seen.dtypes == [dtype]


def test_what_a_checkpoint_evaluates_again_stays_in_half_precision() -> None:
    """It is the user's function; its pullback alone may go another way."""

    def func(x: Tensor) -> Any:
        return checkpoint(lambda x: (x @ W.T).tanh() @ W, x, use_reentrant=False)

    _, dtypes = pulled(func, random(128, 64))
    # torch evaluates as far as the last tensor that is needed, which is no result of the second
    assert dtypes == [HALF, torch.float32, torch.float32]


def test_a_backward_pass_of_the_users_own_keeps_its_dtype() -> None:
    class Times(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x @ W.T

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            """Nothing is saved."""

        @staticmethod
        def backward(ctx: Any, seed: Tensor) -> Any:
            product = seed.mm(W)
            assert product.dtype == HALF
            return product

    product, dtypes = pulled(lambda x: F.linear(Times.apply(x), W.T), random(128, 64))
    assert product.dtype == HALF
    assert dtypes == [torch.float32] * 2


def test_compiled_rows_are_those_of_the_derivative() -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 5)).to(HALF)
    jac = jacfunc.module_jacobian(model, per_sample=True)
    x = random(64, 64)
    rows = jacfunc.compile(jac, backend="replay")(x)
    for name, block in jac(x).items():
        torch.testing.assert_close(rows[name], block)
