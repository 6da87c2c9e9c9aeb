"""Results that are written into tensors of the caller's."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacfunc
from jacfunc._assembly import Grid, Sink
from jacfunc._factored import FactoredJacobian, Part
from jacfunc._memory.counting import PeakBytes
from jacfunc._samples.writing import SampleWriter
from tests.truth.factors import factors_of

STRATEGIES = ("auto", "reverse", "forward", "looped", "structured")


def f(x: Tensor) -> Tensor:
    return torch.tanh(x).outer(x[:2]).sin()


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "jacrev": jacfunc.jacrev,
    "jacfwd": jacfunc.jacfwd,
    "jacobian": jacfunc.jacobian,
    "hessian": jacfunc.hessian,
    "value_and_jacobian": lambda func, out: (
        lambda x: jacfunc.value_and_jacobian(func, out=out)(x)[1]
    ),
    "chunks": lambda func, out: jacfunc.jacobian(func, strategy="reverse", chunk_size=3, out=out),
    "columns": lambda func, out: jacfunc.jacobian(func, strategy="forward", chunk_size=2, out=out),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_writes_into_the_tensor(name: str) -> None:
    derive, x = TRANSFORMS[name], torch.randn(4, dtype=torch.float64)
    expected = derive(f, out=None)(x)
    buffer = torch.full_like(expected, torch.nan)
    found = derive(f, out=buffer)(x)
    assert found is buffer or found.data_ptr() == buffer.data_ptr()
    torch.testing.assert_close(buffer, expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_trees_of_blocks(strategy: str) -> None:
    def func(tree: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return tree["a"] * tree["b"].sum(), tree["b"].cos()

    tree = {"a": torch.randn(3), "b": torch.randn(2, 2)}
    expected = jacfunc.jacobian(func)(tree)
    out = jacfunc.jacobian(func)({"a": torch.zeros(3), "b": torch.zeros(2, 2)})
    found = jacfunc.jacobian(func, strategy=strategy, out=out)(tree)
    for i in range(2):
        for name in ("a", "b"):
            assert found[i][name] is out[i][name]
            torch.testing.assert_close(out[i][name], expected[i][name])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("flat", [False, True], ids=["tree", "flat"])
@pytest.mark.parametrize("per_sample", [False, True], ids=["whole", "per-sample"])
def test_modules(strategy: str, flat: bool, per_sample: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    options = {"flat": flat, "per_sample": per_sample}
    expected = jacfunc.module_jacobian(model, **options)(x := torch.randn(5, 3))
    out = jacfunc.module_jacobian(model, **options)(torch.zeros(5, 3))
    found = jacfunc.module_jacobian(model, out=out, strategy=strategy, **options)(x)
    pairs = [(found, out, expected)]
    if not flat:
        pairs = [(found[name], out[name], expected[name]) for name in expected]
    for mine, given, wanted in pairs:
        assert mine is given
        torch.testing.assert_close(given, wanted)


def test_a_reused_buffer_takes_no_memory_of_its_size() -> None:
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 10))
    x = torch.randn(32, 64)
    buffer = jacfunc.module_jacobian(model, per_sample=True, flat=True)(x)
    again = jacfunc.module_jacobian(
        model, per_sample=True, flat=True, out=buffer, strategy="structured"
    )
    again(x)
    with PeakBytes() as counter:
        again(x)
    assert counter.peak <= 0.05 * buffer.nbytes


@pytest.mark.parametrize(
    ("out", "options", "error", "words"),
    [
        ("here", {}, TypeError, "out must be a tree of tensors"),
        ({"0.weight": 0}, {}, TypeError, "out must be a tree of tensors"),
        ({}, {"flat": True}, TypeError, "out must be a matrix"),
        (torch.zeros(2, 3), {"flat": True}, ValueError, "out must have the shape of the matrix"),
        ([torch.zeros(2, 2, 3)], {}, ValueError, "out must hold a tensor for each of the 2"),
        (
            [torch.zeros(2, 2, 2, 3), torch.zeros(2, 4)],
            {},
            ValueError,
            "out must have the shapes of the blocks",
        ),
        (torch.zeros(4, 8, requires_grad=True), {"flat": True}, ValueError, "plain tensors"),
        (torch.zeros(4, 8), {"flat": True, "dtype": torch.float64}, ValueError, "come alone"),
        (torch.zeros(4, 8), {"flat": True, "create_graph": True}, ValueError, "without a graph"),
    ],
)
def test_what_can_not_be_written_into(
    out: Any, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
    with pytest.raises(error, match=f"module_jacobian: .*{words}"):
        jacfunc.module_jacobian(model, out=out, **options)(torch.ones(2, 3))


def test_inside_a_transform_it_is_refused() -> None:
    buffer = torch.zeros(3, 3)
    with pytest.raises(ValueError, match="jacrev: out must be plain tensors"):
        torch.func.vmap(jacfunc.jacrev(torch.sin, out=buffer))(torch.randn(2, 3))


@pytest.mark.parametrize("bytes_at_once", [1, 400, 2**23])
def test_layers_sweep_a_few_rows_at_a_time(bytes_at_once: int) -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)), torch.randn(6, 3)
    expected = jacfunc.module_jacobian(model, per_sample=True, flat=True, strategy="looped")(x)
    sweeps = []

    class Counted(FactoredJacobian):
        def parts_of_rows(self, start: int, stop: int, of: int) -> list[list[Part]]:
            sweeps.append(stop - start)
            return super().parts_of_rows(start, stop, of)

    with factors_of(model, x) as jacobian:
        counted = Counted(**vars(jacobian))
        grid = Grid.of(jacobian.sample_outputs, jacobian.params)
        batch = SimpleNamespace(size=len(x), factors=lambda *_: (counted, None))
        one = SimpleNamespace(take_call=lambda *_: None, grid=lambda: grid)
        writer = SampleWriter(batch, Sink(), one, most_swept=bytes_at_once)
        blocks = writer.leaves(None, None)[: len(jacobian.params)]
    torch.testing.assert_close(torch.cat([block.flatten(2) for block in blocks], 2), expected)
    assert sweeps == {1: [1] * 5, 400: [2, 2, 1], 2**23: [5]}[bytes_at_once]
