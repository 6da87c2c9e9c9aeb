"""Auto and autotune with layers to choose from; memory, and what a vmap hides."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import jacfunc
from jacfunc._log import trail
from jacfunc._memory.counting import PeakBytes
from tests.kernels.test_kernels import written_out


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read, self.head = nn.GRU(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, steps: Tensor) -> Tensor:
        return self.head(self.read(steps)[0][:, -1])


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(500, 200), nn.Tanh(), nn.Linear(200, 10))


@pytest.mark.parametrize("strategy", ["auto", "autotune"])
def test_layers_are_taken_where_the_result_is_put_together(strategy: str) -> None:
    model, x = wide(), torch.randn(8, 500)
    compute = jacfunc.module_jacobian(model, per_sample=True, flat=True, strategy=strategy)
    with trail() as steps:
        found = compute(x)
    assert "Structured" in steps[-1]
    torch.testing.assert_close(found, written_out(model, x))
    with trail() as steps:
        compute(x)
    assert "Structured" in steps[-1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_sample_in_low_precision_is_taken_by_layers(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = wide().to(dtype), torch.randn(1, 500).to(dtype)
    compute = jacfunc.module_jacobian(model, per_sample=True)
    with trail() as steps:
        for _ in range(4):
            found = compute(x)
    assert not any("one by one" in step for step in steps)
    assert any("Structured" in step for step in steps), steps
    expected = written_out(copy.deepcopy(model).double(), x.double())
    rows = torch.cat([block.flatten(2) for block in found.values()], -1).double()
    torch.testing.assert_close(rows, expected, rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_not_for_inputs_alone_nor_where_a_direction_is_named() -> None:
    model, x = wide(), torch.randn(8, 500)
    for wrt, strategy in (("inputs", "auto"), ("params", "reverse")):
        with trail() as steps:
            jacfunc.module_jacobian(model, wrt, per_sample=True, flat=True, strategy=strategy)(x)
        assert not any("Structured" in step for step in steps)


def test_inputs_beside_parameters() -> None:
    model, x = wide().double(), torch.randn(8, 500, dtype=torch.float64)
    both, alone = (
        jacfunc.module_jacobian(model, wrt, per_sample=True, strategy=strategy)(x)
        for wrt, strategy in ((("params", "inputs"), "structured"), ("inputs", "looped"))
    )
    torch.testing.assert_close(both[1], alone)
    rows = torch.cat([block.flatten(2) for block in both[0].values()], -1)
    torch.testing.assert_close(rows, written_out(model, x))


def test_recurrent_layers_are_not_taken_one_by_one() -> None:
    torch.manual_seed(0)
    model, x = Recurrent().double(), torch.randn(5, 7, 4, dtype=torch.float64)
    with trail() as steps:
        found = jacfunc.module_jacobian(model, per_sample=True, flat=True)(x)
    assert "Structured" in steps[-1]
    assert not any("samples go one by one" in step for step in steps)
    torch.testing.assert_close(found, written_out(model, x))


def test_a_budget_holds_for_layers_too() -> None:
    model, x = wide(), torch.randn(128, 500)
    compute = jacfunc.module_jacobian(model, per_sample=True, flat=True, strategy="structured")
    with PeakBytes() as unbounded:
        result = compute(x).nbytes
    room = (unbounded.peak - result) // 2
    bounded = jacfunc.module_jacobian(model, per_sample=True, flat=True, memory=result + room)
    with trail() as steps:
        bounded(x)
    assert any("Structured" in step and "within" in step for step in steps)
    with PeakBytes() as counter:
        found = bounded(x)
    assert counter.peak <= result + room
    torch.testing.assert_close(found, compute(x))


def test_what_goes_wrong_inside_a_rule_sends_auto_elsewhere() -> None:
    def forgotten(x: Tensor, weight: Tensor) -> dict[str, object]:
        raise KeyError("forgotten")

    @jacfunc.layers.visible
    def layer(x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight

    jacfunc.layers.rule(layer)(forgotten)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(300, 40))

        def forward(self, x: Tensor) -> Tensor:
            return layer(x, self.weight)

    model, x = Layer(), torch.randn(8, 300)
    with trail() as steps:
        found = jacfunc.module_jacobian(model, per_sample=True, flat=True)(x)
    assert any("not evaluated as a whole: 'forgotten'" in step for step in steps)
    torch.testing.assert_close(found, written_out(model, x))


class Clipped(nn.Module):
    """Sets a hook if there is a graph, which vmap hides."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: grad * 0.5)
        return self.last(torch.tanh(hidden))


@pytest.mark.parametrize("of_samples", [True, False])
def test_hooks_are_not_passed_by(of_samples: bool) -> None:
    model, x = Clipped().double(), torch.randn(4, 3, dtype=torch.float64)
    expected = written_out(model, x)
    if of_samples:
        found = jacfunc.module_jacobian(model, per_sample=True, flat=True)(x)
        torch.testing.assert_close(found, expected)
        found = jacfunc.module_jacobian(model, per_sample=True, flat=True, strategy="structured")(x)
        torch.testing.assert_close(found, expected)
    else:
        blocks = [block for _, block in jacfunc.stream_jacobian(model, per_sample=True)(x)]
        torch.testing.assert_close(torch.cat([b.flatten(2) for b in blocks], -1), expected)
