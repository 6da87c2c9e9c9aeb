"""Results that are written into tensors of the caller's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacfunc
from jacfunc._assembly import Grid, Sink
from jacfunc._factored import FactoredJacobian
from jacfunc._memory.counting import PeakBytes
from jacfunc._samples.writing import SampleWriter
from jacfunc._types import Leaves
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
        def write_rows(self, cotangents: Leaves, *args: Any) -> None:
            sweeps.append(len(cotangents[0]))
            super().write_rows(cotangents, *args)

    with factors_of(model, x) as jacobian:
        given = [own.name for own in fields(jacobian) if own.init]
        counted = Counted(**{name: getattr(jacobian, name) for name in given})
        grid = Grid.of(jacobian.sample_outputs, jacobian.params)
        known = SimpleNamespace(lessons=1)  # a later call: nothing is given back
        batch = SimpleNamespace(size=len(x), factors=lambda *_: (counted, None))
        batch.learned_as_a_whole = known
        one = SimpleNamespace(take_call=lambda *_: None, grid=lambda: grid)
        writer = SampleWriter(batch, Sink(), one, most_swept=bytes_at_once)
        blocks = writer.leaves(None, None)[: len(jacobian.params)]
    torch.testing.assert_close(torch.cat([block.flatten(2) for block in blocks], 2), expected)
    assert sweeps == {1: [1] * 5, 400: [2, 2, 1], 2**23: [5]}[bytes_at_once]


# --- where the user's tensors lie ---


def product(x: Tensor, y: Tensor) -> Tensor:
    return x * y


SLICES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "halves of the columns": lambda whole: (whole[:, :3], whole[:, 3:]),
    "columns by turns": lambda whole: (whole[:, ::2], whole[:, 1::2]),
    "halves of the memory": lambda whole: (
        whole.view(-1)[:9].view(3, 3),
        whole.view(-1)[9:18].view(3, 3),
    ),
    "turned": lambda whole: (whole[:, :3].t(), whole[:, 3:].t()),
}


@pytest.mark.parametrize("name", SLICES)
@pytest.mark.parametrize("strategy", ["auto", "reverse", "forward", "looped"])
def test_parts_of_one_tensor_are_apart(name: str, strategy: str) -> None:
    out = SLICES[name](torch.full((3, 6), torch.nan))
    x, y = torch.randn(3), torch.randn(3)
    jacfunc.jacobian(product, (0, 1), strategy=strategy, out=out)(x, y)
    torch.testing.assert_close(out, (y.diag(), x.diag()))


@pytest.mark.parametrize(
    "parts",
    [
        lambda whole: (whole[:, :3], whole[:, 2:5]),
        lambda whole: (whole[:, ::2], whole[:, :3]),
        lambda whole: (whole.view(-1)[:9].view(3, 3), whole.view(-1)[8:17].view(3, 3)),
        lambda whole: (whole[:, :3], whole[:, :3].t()),
    ],
    ids=["columns", "turns", "memory", "transposed"],
)
def test_parts_that_share_an_entry_are_refused(parts: Any) -> None:
    out = parts(torch.zeros(3, 6))
    with pytest.raises(ValueError, match="jacobian: out must be tensors that do not share memory"):
        jacfunc.jacobian(product, (0, 1), out=out)(torch.ones(3), torch.ones(3))


def test_the_memory_beside_an_argument_may_be_written_into() -> None:
    whole = torch.zeros(4, 3)
    x, out = whole[0], whole[1:]
    x.copy_(torch.randn(3))
    jacfunc.jacrev(torch.sin, out=out)(x)
    torch.testing.assert_close(out, x.cos().diag())


def test_wider_and_narrower_digits() -> None:
    x = torch.randn(3)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        out = torch.zeros(3, 3, dtype=dtype)
        jacfunc.jacrev(torch.sin, out=out)(x)
        torch.testing.assert_close(out, x.cos().diag().to(dtype))


def of_two(tree: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"u": tree["a"].sin() * tree["b"].sum(), "v": tree["b"].cos()}


def turned(tree: Any) -> Any:
    """The tree with its keys in the other order, and no numbers."""
    if isinstance(tree, Tensor):
        return torch.full_like(tree, torch.nan)
    return {name: turned(tree[name]) for name in reversed(tree)}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_keys_in_another_order(strategy: str) -> None:
    tree = {"a": torch.randn(2), "b": torch.randn(2)}
    expected = jacfunc.jacrev(of_two)(tree)
    out = turned(expected)
    found = jacfunc.jacobian(of_two, strategy=strategy, out=out)(tree)
    for i in ("u", "v"):
        for j in ("a", "b"):
            assert found[i][j] is out[i][j]
            torch.testing.assert_close(out[i][j], expected[i][j])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("sizes", [((3,), (2, 2)), ((2, 3), (3, 2))], ids=str)
def test_blocks_of_other_shapes_in_another_order_are_refused(strategy: str, sizes: Any) -> None:
    tree = {"a": torch.randn(sizes[0]), "b": torch.randn(sizes[1])}
    out = turned(jacfunc.jacrev(of_two)(tree))
    with pytest.raises(ValueError, match=r"^jacobian: out must h"):
        jacfunc.jacobian(of_two, strategy=strategy, out=out)(tree)
