"""Uses of parameters that are known from earlier calls: what changes meanwhile is seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import jacfunc
from jacfunc import layers
from jacfunc.layers._forms import Outer

CALLS = 4


class Changing(nn.Module):
    """Does something else at each call, which nothing that torch keeps of the module tells."""

    def __init__(self, step: Callable[[Changing, Tensor, int], Tensor]) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(3, 5))
        self.second = nn.Parameter(torch.randn(3, 5))
        self.bias = nn.Parameter(torch.randn(3))
        self.step, self.number = step, [0]

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self, x, self.number[0]).tanh()


def in_turns(model: Changing, x: Tensor, number: int) -> Tensor:
    return F.linear(x, (model.first, model.second)[number % 2], model.bias)


def with_and_without_a_bias(model: Changing, x: Tensor, number: int) -> Tensor:
    return F.linear(x, model.first, model.bias if number % 2 else None)


def with_a_constant_bias(model: Changing, x: Tensor, number: int) -> Tensor:
    return F.linear(x, model.first, x.new_ones(3) if number % 2 else model.bias)


def by_name_and_by_place(model: Changing, x: Tensor, number: int) -> Tensor:
    if number % 2:
        return F.linear(x, bias=model.bias, weight=model.first)
    return F.linear(x, model.first, model.bias)


def twice(model: Changing, x: Tensor, number: int) -> Tensor:
    return F.linear(x, model.first + number % 2 * model.second, model.bias)


def rounded(model: Changing, x: Tensor, number: int) -> Tensor:
    scores = F.linear(x, model.first)
    return torch.div(scores, model.bias, rounding_mode="floor" if number % 2 else None)


def of_other_memory(model: Changing, x: Tensor, number: int) -> Tensor:
    seen = x.clone()
    out = F.linear(seen, model.first, model.bias)
    seen.data = seen.data * 3  # which changes no version
    return out


def per_sample(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """A loop of plain backward passes over samples and outputs."""
    params = dict(model.named_parameters())
    rows: dict[str, list[Any]] = {name: [] for name in params}
    for sample in x:
        outs = model(sample[None])[0]
        each = [
            torch.autograd.grad(
                out, list(params.values()), retain_graph=True, materialize_grads=True
            )
            for out in outs
        ]
        for name, row in zip(params, zip(*each, strict=True), strict=True):
            rows[name].append(torch.stack(row))
    return {name: torch.stack(row) for name, row in rows.items()}


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize(
    "step",
    [
        *(in_turns, with_and_without_a_bias, with_a_constant_bias, by_name_and_by_place, twice),
        rounded,
    ],
)
def test_other_uses_at_the_same_place(step: Any, size: int) -> None:
    torch.manual_seed(0)
    model, x = Changing(step).double(), torch.randn(size, 5, dtype=torch.float64)
    jac = jacfunc.module_jacobian(model, per_sample=True, strategy="structured")
    for number in (*range(CALLS), 3, 0, 0, 1):
        model.number[0] = number
        expected = per_sample(model, x)
        found = jac(x)
        assert expected.keys() == found.keys()
        for name, rows in expected.items():
            torch.testing.assert_close(found[name], rows, rtol=1e-10, atol=1e-10)


def test_inputs_as_they_were() -> None:
    torch.manual_seed(0)
    model, x = Changing(of_other_memory).double(), torch.randn(4, 5, dtype=torch.float64)
    jac = jacfunc.module_jacobian(model, per_sample=True, strategy="structured")
    # autograd itself takes the input as it is in the end
    plain = Changing(with_a_constant_bias).double()
    plain.load_state_dict(model.state_dict())
    expected = per_sample(plain, x)
    for _ in range(CALLS):
        found = jac(x)
        for name, rows in expected.items():
            torch.testing.assert_close(found[name], rows, rtol=1e-10, atol=1e-10)


def test_a_rule_is_asked_once_a_call() -> None:
    asked: list[int] = []

    @layers.visible
    def scaled(x: Tensor, weight: Tensor) -> Tensor:
        return x * weight

    @layers.rule(scaled)
    def of_scaled(x: Tensor, weight: Tensor) -> Any:
        asked.append(len(x))
        shape = weight.shape[1:]
        return {"weight": lambda seeds: layers.Rows(layers.summed(seeds * x, shape))}

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(5))

        def forward(self, x: Tensor) -> Tensor:
            return scaled(x, self.weight)

    model, options = Scaled(), {"per_sample": True, "independent": True}
    jac = jacfunc.module_jacobian(model, strategy="structured", **options)
    x = torch.randn(4, 5)
    jac(x)
    asked.clear()
    torch.testing.assert_close(jac(x)["weight"], torch.diag_embed(x))
    assert asked == [4]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("shape", [(3, 2, 5, 4, 6), (2, 3, 1, 4, 6), (40, 3, 4, 30, 70)])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_products_are_written_into_any_place(
    shape: tuple[int, ...], dtype: torch.dtype, is_transposed: bool
) -> None:
    torch.manual_seed(0)
    size, seeds, positions, outs, ins = shape
    back = torch.randn(seeds, size, 1, positions, outs).to(dtype)
    seen = torch.randn(size, 1, positions, ins).to(dtype)
    order = (ins, outs) if is_transposed else (outs, ins)
    expected = torch.einsum("kbgto,bgti->bkoi", back.double(), seen.double())
    expected = (expected.mT if is_transposed else expected).to(dtype)
    tolerance = 1e-2 if dtype == torch.float16 else 1e-12
    whole = torch.zeros(size, seeds, *order, dtype=dtype)
    rows = torch.zeros(size, seeds + 2, *order, dtype=dtype)[:, 1:-1]
    flat = torch.zeros(size, seeds, 7 + outs * ins, dtype=dtype)[:, :, 7:].unflatten(2, order)
    for cotangents in (back, back.mT.contiguous().mT):
        form = Outer(seen, cotangents, torch.Size(order), is_transposed)
        for place in (whole, rows, flat):
            place.zero_()
            form.write(place)
            torch.testing.assert_close(place, expected, rtol=tolerance, atol=tolerance)
