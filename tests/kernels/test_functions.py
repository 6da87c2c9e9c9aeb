"""Kernels of functions of parameters and a batch, against products of looped Jacobians."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import jacfunc
from tests.truth.params import CASES, affine, nested, numbers, of_layers, rows_of

EVERY_CASE = pytest.mark.parametrize("name", CASES)


def posed(name: str) -> tuple[Any, Any, Tensor, Tensor, Tensor]:
    """The function, its parameters, two batches, and their kernel ``[5, 4, 2, 2]``."""
    torch.manual_seed(0)
    case = CASES[name]
    params, x1, x2 = case.params(), numbers(5, 3), numbers(4, 3)
    rows = [rows_of(case, params, x) for x in (x1, x2)]
    return case.func, params, x1, x2, torch.einsum("aip,bjp->abij", *rows)


@EVERY_CASE
@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"memory": "1 MiB"}])
def test_a_kernel_of_a_function_of_batches(name: str, options: dict[str, Any]) -> None:
    func, params, x1, x2, expected = posed(name)
    found = jacfunc.ntk(func, params, x1, x2, batched=True, **options)
    torch.testing.assert_close(found, expected)
    traced = jacfunc.ntk(func, params, x1, x2, batched=True, trace_axes=-1, **options)
    torch.testing.assert_close(traced, expected.diagonal(dim1=2, dim2=3).sum(-1))
    again = jacfunc.ntk(func, params, x1, batched=True, **options)
    torch.testing.assert_close(again[:, :, 0, 1], again[:, :, 1, 0].T)


def test_a_loader_meets_the_parameters_of_the_call() -> None:
    """Whoever loads a batch, or shows progress, may change them meanwhile."""
    func, params, x1, x2, expected = posed("a dict")

    def loader() -> Iterator[Tensor]:
        for batch in x1.split(2):
            yield batch
            params["w"].add_(1)

    def progress(blocks: Sequence[Any]) -> Iterator[Any]:
        for block in blocks:
            yield block
            params["b"].add_(1)

    found = jacfunc.ntk(func, params, loader(), x2, batched=True, progress=progress)
    torch.testing.assert_close(found, expected)


def test_parameters_by_their_paths() -> None:
    params, x = nested(), numbers(4, 3)
    found = jacfunc.ntk(of_layers, params, x, select="layers.0.*", batched=True)
    rows = rows_of(CASES["nested"], params, x)[..., :16]
    torch.testing.assert_close(found, torch.einsum("aip,bjp->abij", rows, rows))


def test_what_vmap_refuses() -> None:
    """A batch is taken as it is: Python reads its numbers, and the first dimension is flattened."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).double()

    def func(params: dict[str, Tensor], x: Tensor) -> Tensor:
        if x.isnan().any():
            raise ValueError("not a number")
        return functional_call(network, params, (x,))

    params, x = dict(network.named_parameters()), numbers(5, 2, 2)
    expected = jacfunc.ntk(network, None, x)
    torch.testing.assert_close(jacfunc.ntk(func, params, x, batched=True), expected)


def test_a_function_of_one_sample_is_another_one() -> None:
    """Both are given by the same function, where it takes a sample as well as a batch."""
    params, x = {"w": numbers(3, 2), "b": numbers(2)}, numbers(4, 3)
    of_samples = jacfunc.ntk(affine, params, x)
    torch.testing.assert_close(jacfunc.ntk(affine, params, x, batched=True), of_samples)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"func": 3}, TypeError, "ntk: module must be an nn.Module or a function, got int"),
        ({"params": None}, TypeError, "ntk: params must hold at least one floating point"),
        ({"batched": "yes"}, TypeError, "ntk: batched must be True or False, got 'yes'"),
        ({"select": "v"}, ValueError, "ntk: select must match trainable parameters, got 'v'"),
        (
            {"func": lambda p, x: x @ p["w"] - (x @ p["w"]).mean(0)},
            ValueError,
            "ntk: per_sample needs samples that do not depend on each other",
        ),
    ],
)
def test_refusals(options: dict[str, Any], error: type[Exception], words: str) -> None:
    params = {"w": numbers(3, 2), "b": numbers(2)}
    usual: dict[str, Any] = {"func": affine, "params": params, "batched": True}
    with pytest.raises(error, match=f"^{words}"):
        jacfunc.ntk(**{**usual, **options}, x1=numbers(4, 3))
