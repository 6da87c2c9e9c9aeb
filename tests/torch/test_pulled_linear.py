"""Large linear layers in evaluations that are pulled back: oneDNN multiplies their cotangents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import jacfunc
from jacfunc._torch.entering import _PulledLinear
from tests.torch.test_fast_linear import FunctionMode, needs_onednn, onednn_calls

WIDTH, SAMPLES, CLASSES = 128, 24, 6


class Network(nn.Module):
    """Two large layers and a small one, the first two of which may be run in other ways."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.last = nn.Linear(WIDTH, CLASSES)
        for param in self.parameters():
            param.data = torch.randn(param.shape, generator=generator) / 12
        self.run = run or (lambda layer, x: layer(x))

    def forward(self, x: Tensor) -> Any:
        x = self.run(self.first, x).tanh()
        return self.last(self.run(self.second, x).tanh().mean(1))


def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(SAMPLES, 8, WIDTH, generator=generator)


def looped(model: nn.Module, x: Tensor, wrt: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
    """Rows ``[B, C, *wrt]`` in float64, by one backward pass for each."""
    model = Network().double() if isinstance(model, Network) else model
    rows = []
    for one in x.double():
        point = one[None].requires_grad_()
        scores = model(point)[0]
        leaf = wrt(model, point)
        rows.append(
            torch.stack([torch.autograd.grad(s, leaf, retain_graph=True)[0] for s in scores])
        )
    return torch.stack(rows)


def near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def with_hook(layer: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = layer(x)
    if out.requires_grad:
        out.register_hook(lambda grad: 2 * grad)
    return out


def into(layer: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = layer(x)
    return out.mul_(2)


def in_a_checkpoint(layer: nn.Module, x: Tensor) -> Any:
    return checkpoint(layer, x, use_reentrant=False)


@needs_onednn
def test_rows_in_inputs() -> None:
    model, x = Network(), inputs()
    jac = jacfunc.module_jacobian(model, "inputs", per_sample=True)
    expected = looped(model, x, lambda _, point: point)[:, :, 0]
    for _ in range(4):
        near(jac(x), expected)
    assert onednn_calls(lambda: jac(x)) == 2


@needs_onednn
def test_rows_in_parameters_multiply_no_parameter_by_itself() -> None:
    model, x = Network(), inputs()
    jac = jacfunc.module_jacobian(model, per_sample=True, strategy="structured")
    expected = looped(model, x, lambda model, _: model.first.weight)
    for _ in range(4):
        near(jac(x)["first.weight"], expected)
    # what comes back goes through the second layer alone
    assert onednn_calls(lambda: jac(x)) == 1


@needs_onednn
@pytest.mark.parametrize("run", [with_hook, into])
def test_hooks_and_writes_count(run: Any) -> None:
    x = inputs()
    jac = jacfunc.module_jacobian(Network(run), "inputs", per_sample=True)
    plain = Network(run).double()
    expected = looped(nn.Sequential(plain), x, lambda _, point: point)[:, :, 0]
    for _ in range(4):
        near(jac(x), expected)
    assert onednn_calls(lambda: jac(x)) == 2


def test_checkpoints_run_again_what_ran() -> None:
    x = inputs()
    model = Network(in_a_checkpoint)
    jac = jacfunc.module_jacobian(model, "inputs", per_sample=True)
    expected = looped(model, x, lambda _, point: point)[:, :, 0]
    for _ in range(4):
        near(jac(x), expected)


def test_a_mode_outside_sees_torchs_operation() -> None:
    model, x = Network(), inputs()
    jac = jacfunc.module_jacobian(model, "inputs", per_sample=True)
    expected = looped(model, x, lambda _, point: point)[:, :, 0]
    with FunctionMode():
        for _ in range(3):
            near(jac(x), expected)
        assert onednn_calls(lambda: jac(x)) == 0


def test_the_result_can_be_differentiated() -> None:
    model, x = Network(), inputs()
    jac = jacfunc.module_jacobian(model, "inputs", per_sample=True, create_graph=True)
    twin = Network().double()
    point = x.double().requires_grad_()
    rows = torch.autograd.grad(twin(point)[:, 0].sum(), point, create_graph=True)[0]
    expected = torch.autograd.grad(rows.square().sum(), twin.second.weight)[0]
    for _ in range(2):
        row = jac(x)[:, 0]
        (found,) = torch.autograd.grad(row.square().sum(), model.second.weight)
        near(found, expected)


def pulled(*tensors: Tensor | None) -> Any:
    """The layer of tensors that are no leaves, as those of an evaluation."""
    return _PulledLinear.apply(*(None if x is None else x.view_as(x) for x in tensors))


@pytest.mark.parametrize("has_bias", [True, False])
def test_derivatives_of_all_three_in_float64(has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    x, weight, bias = (
        torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in ((2, 3, 4), (5, 4), (5,))
    )
    every = (x, weight, bias if has_bias else None)
    torch.autograd.gradcheck(pulled, every, check_batched_grad=True)
    torch.autograd.gradgradcheck(pulled, every, check_batched_grad=True)
    ours, torchs = pulled(*every), F.linear(*every)
    assert torch.equal(ours, torchs)
    seeds = torch.randn(7, *ours.shape, dtype=torch.float64, generator=generator)
    for leaf in filter(lambda leaf: leaf is not None, every):
        for of in (ours, torchs):
            (rows,) = torch.autograd.grad(of, leaf, seeds, is_grads_batched=True, retain_graph=True)
            single = torch.stack(
                [torch.autograd.grad(torchs, leaf, s, retain_graph=True)[0] for s in seeds]
            )
            torch.testing.assert_close(rows, single, rtol=1e-12, atol=1e-12)
