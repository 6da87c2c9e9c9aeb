"""Neural tangent kernels and Gramians against the product of Jacobians that are written out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import jacfunc
from jacfunc._kernels.blocks import KeptAxes, LeafRows, SampleRange
from jacfunc._kernels.gram import Gram
from jacfunc._memory.counting import PeakBytes
from tests.truth.factors import at_batch


class Mixed(nn.Module):
    """Raw parameters, a tied table, a layer called twice and one that no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.twice = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.raw = nn.Parameter(torch.randn(6, 3))
        self.angle = nn.Parameter(torch.randn(3))

    def forward(self, words: Tensor) -> Tensor:
        hidden = self.twice(torch.tanh(self.twice(self.table(words)))).mean(-2)
        scores = self.norm(hidden) @ self.raw + torch.sin(self.angle)
        return torch.cat([scores, F.linear(hidden, self.table.weight)], -1)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def convolutional() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1, stride=2, groups=2), nn.GroupNorm(2, 4), nn.Tanh()),
        *(nn.Conv2d(4, 3, 2), nn.Flatten(), nn.Linear(12, 4)),
    )


def attention() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(32, 3))


def numbers(*shape: int) -> Callable[[int], Tensor]:
    return lambda size: torch.randn(size, *shape)


def words(size: int) -> Tensor:
    return torch.randint(7, (size, 4))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "mlp": (mlp, numbers(5)),
    "convolutional": (convolutional, numbers(2, 6, 6)),
    "attention": (attention, numbers(4, 8)),
    "mixed": (Mixed, words),
}
EVERY = pytest.mark.parametrize("name", CASES)


def written_out(model: nn.Module, x: Tensor) -> Tensor:
    """``[B, M, P]``, one backward pass a row and a sample."""
    params = [p for p in model.parameters() if p.requires_grad]
    samples = []
    for sample in x:
        outputs = model(sample[None])[0].flatten()
        rows = [torch.autograd.grad(out, params, retain_graph=True) for out in outputs]
        samples.append(torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]))
    return torch.stack(samples)


def case(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    make, draw = CASES[name]
    model = make().to(dtype).eval()
    x1, x2 = draw(5), draw(3)
    return model, *(x.to(dtype) if x.is_floating_point() else x for x in (x1, x2))


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@EVERY
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["64", "32"]
)
def test_a_kernel_is_the_product_of_jacobians(
    name: str, dtype: torch.dtype, tolerance: float
) -> None:
    model, x1, x2 = case(name, dtype)
    first, second = written_out(model, x1), written_out(model, x2)
    both = jacfunc.ntk(model, None, x1, x2)
    assert_close(both, torch.einsum("acp,bdp->abcd", first, second), tolerance)
    own = jacfunc.ntk(model, None, x1)
    assert_close(own, torch.einsum("acp,bdp->abcd", first, first), tolerance)
    assert not own.requires_grad


@EVERY
def test_axes_are_traced_or_kept_once(name: str) -> None:
    model, x1, x2 = case(name)
    full = torch.einsum("acp,bdp->abcd", written_out(model, x1), written_out(model, x2))
    traced = jacfunc.ntk(model, None, x1, x2, trace_axes=-1)
    assert_close(traced, torch.einsum("abcc->ab", full))
    diagonal = jacfunc.ntk(model, None, x1, x2, diagonal_axes=(0,))
    assert_close(diagonal, torch.einsum("abcc->abc", full))


@EVERY
def test_pieces_of_any_size_give_the_same(name: str) -> None:
    model, x1, x2 = case(name)
    left, right = rows_of(model, x1), rows_of(model, x2)
    own, between = jacfunc.ntk(model, None, x1), jacfunc.ntk(model, None, x1, x2)
    for size in (1, 500, 3000):
        assert_close(gram_of(left, left, at_once=size), own)
        assert_close(gram_of(left, right, at_once=size), between)
    assert_close(gram_of(left, left, at_once=3000, blocked=1), own)
    assert_close(gram_of(left, left, blocked=1), own)


def rows_of(model: nn.Module, x: Tensor) -> LeafRows:
    """All rows of a module with one output leaf, as factors."""
    (rows,) = SampleRange(at_batch(model, x), 0, len(x)).rows(KeptAxes((), ()))
    return rows


@torch.no_grad()
def gram_of(left: LeafRows, right: LeafRows, **limits: int) -> Tensor:
    """The kernel of two sides, ``[B1, B2, M, M]``."""
    gram = Gram(left.like, (left.size, right.size), left.axes, left is right, **limits)
    gram.add(left.parts, right.parts, left.params)
    return gram.whole()[0].transpose(1, 2)


def test_axes_of_an_output_of_many_dimensions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Unflatten(1, (2, 3, 2))).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    rows = written_out(model, x).unflatten(1, (2, 3, 2))
    found = jacfunc.ntk(model, None, x, trace_axes=-1, diagonal_axes=0)
    assert_close(found, torch.einsum("adktp,bdltp->abdkl", rows, rows))


@EVERY
@pytest.mark.parametrize("second", [False, True], ids=["own", "between"])
def test_chunks_and_loaders_give_the_same(name: str, second: bool) -> None:
    model, x1, x2 = case(name)
    expected = jacfunc.ntk(model, None, x1, x2 if second else None)
    chunked = jacfunc.ntk(model, None, x1, x2 if second else None, chunk_size=2)
    assert_close(chunked, expected)
    seen = []

    def progress(blocks):
        for block in blocks:
            seen.append(block)
            yield block

    loader = torch.utils.data.DataLoader(x1, batch_size=2)
    loaded = jacfunc.ntk(model, None, loader, x2 if second else None, progress=progress)
    assert_close(loaded, expected)
    assert len(seen) == (3 if second else 6)


def test_a_function_of_one_sample() -> None:
    model, x1, x2 = case("mlp")
    params = dict(model.named_parameters())

    def func(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, params, (x,))

    expected = torch.einsum("acp,bdp->abcd", written_out(model, x1), written_out(model, x2))
    found = jacfunc.ntk(func, params, x1, x2)
    assert_close(found, expected)
    assert not found.requires_grad


def test_some_of_the_parameters() -> None:
    model, x1, _ = case("mlp")
    for name, param in model.named_parameters():
        param.requires_grad_(name.startswith("4."))
    rows = written_out(model, x1)
    for param in model.parameters():
        param.requires_grad_(True)
    assert_close(jacfunc.ntk(model, "4.*", x1), torch.einsum("acp,bdp->abcd", rows, rows))


def test_several_outputs_and_inputs() -> None:
    torch.manual_seed(0)
    bilinear = nn.Bilinear(3, 2, 4).double()

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = bilinear

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            out = self.inner(x, y)
            return {"sum": out.sum(-1), "all": out}

    x, y = torch.randn(3, 3, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    kernels = jacfunc.ntk(Pair(), None, (x, y))
    assert {name: tuple(k.shape) for name, k in kernels.items()} == {
        "sum": (3, 3),
        "all": (3, 3, 4, 4),
    }
    assert_close(kernels["sum"], kernels["all"].sum((2, 3)))
    one = torch.einsum("ai,bi,aj,bj->ab", x, x, y, y) + 1
    assert_close(kernels["all"][..., 0, 0], one)


def test_a_gramian_of_any_function() -> None:
    torch.manual_seed(0)
    model, x1, _ = case("mlp")
    params = dict(model.named_parameters())

    def losses(params: dict[str, Tensor]) -> Tensor:
        return functional_call(model, params, (x1,)).square().sum(-1)

    rows = []
    for loss in losses(params):
        grads = torch.autograd.grad(loss, list(params.values()), retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in grads]))
    matrix = torch.stack(rows)
    assert_close(jacfunc.gram(losses)(params), matrix @ matrix.T)
    A = torch.randn(3, 4, dtype=torch.float64)
    assert_close(jacfunc.gram(lambda s, x: A @ torch.sin(x), 1)(0, A[0]), _gram_of_sine(A))


def _gram_of_sine(A: Tensor) -> Tensor:
    rows = A * torch.cos(A[0])
    return rows @ rows.T


def test_a_kernel_takes_a_fraction_of_the_jacobian() -> None:
    torch.manual_seed(0)
    sizes = (32, 256, 256, 10)
    layers = [nn.Sequential(nn.Linear(m, n), nn.Tanh()) for m, n in pairwise(sizes)]
    model, x = nn.Sequential(*layers), torch.randn(64, 32)
    whole = 4 * 64 * 10 * sum(param.numel() for param in model.parameters())
    jacfunc.ntk(model, None, x)
    with PeakBytes() as counter:
        jacfunc.ntk(model, None, x)
    assert counter.peak <= 0.05 * whole


class Products(TorchDispatchMode):
    """Counts the products of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.__name__.split(".")[0] in {"mm", "bmm", "addmm", "baddbmm"}
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def products_of(rows: LeafRows) -> int:
    """How many products of matrices the kernel of some rows takes."""
    with Products() as products:
        rows.times(rows)
    return products.count


def test_weight_and_bias_share_the_product_of_cotangents() -> None:
    model, x1, _ = case("mlp")
    assert products_of(rows_of(model, x1)) == 2 * 3  # of inputs and of cotangents, in each layer


def test_small_parameters_share_one_product() -> None:
    torch.manual_seed(0)
    norms = [nn.LayerNorm(6) for _ in range(5)]
    model = nn.Sequential(*norms).double().requires_grad_(True)
    for norm in norms:
        nn.init.normal_(norm.weight)
    x = torch.randn(4, 6, dtype=torch.float64)
    assert products_of(rows_of(model, x)) == 1
    rows = written_out(model, x)
    assert_close(jacfunc.ntk(model, None, x), torch.einsum("acp,bdp->abcd", rows, rows))


def test_sequences_without_positions() -> None:
    class Summed(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).sum(1)

    assert jacfunc.ntk(Summed(4, 3), None, torch.ones(5, 0, 4)).equal(torch.zeros(5, 5, 3, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_products_are_rounded_at_the_end(dtype: torch.dtype) -> None:
    """The factors of this network are its input, and numbers that half precision holds exactly."""
    torch.manual_seed(0)
    model, x = nn.Linear(300, 1).to(dtype), torch.randn(5, 300).to(dtype)
    exact = x.double() @ x.double().mT + 1
    found = jacfunc.ntk(model, None, x)[:, :, 0, 0]
    assert found.dtype == dtype
    assert (found.double() - exact).abs().max() <= torch.finfo(dtype).eps / 2 * exact.abs().max()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, x: jacfunc.ntk(m, None, x, trace_axes=3), "ntk: trace_axes and diagonal_axes"),
        (
            lambda m, x: jacfunc.ntk(m, None, x, trace_axes=0, diagonal_axes=-1),
            "must not share an axis",
        ),
        (lambda m, x: jacfunc.ntk(m, "wieght", x), "ntk: select must match"),
        (lambda m, x: jacfunc.ntk(m, None, x, chunk_size=0), "ntk: chunk_size"),
    ],
)
def test_arguments_that_do_not_fit(call: Callable[..., object], words: str) -> None:
    model, x1, _ = case("mlp")
    with pytest.raises(ValueError, match=words):
        call(model, x1)


def test_samples_that_depend_on_each_other_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).train()
    with pytest.raises(ValueError, match="per_sample"):
        jacfunc.ntk(model, None, torch.randn(4, 3))


def test_inside_a_derivative_it_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="no transform keeps"):
        torch.func.grad(lambda x: jacfunc.gram(torch.sin)(x).sum())(torch.randn(3))


NETWORK = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def scores(params: dict[str, Tensor], x: Tensor) -> Tensor:
    return functional_call(NETWORK, params, (x,))


def ensemble(size: int) -> dict[str, Tensor]:
    """The parameters of so many networks, one beside the other."""
    return {name: torch.randn(size, *p.shape).double() for name, p in NETWORK.named_parameters()}


def member(params: dict[str, Tensor], number: int) -> nn.Module:
    """One of the networks of an ensemble."""
    network = copy.deepcopy(NETWORK)
    network.load_state_dict({name: param[number] for name, param in params.items()})
    return network


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("is_symmetric", [True, False])
def test_kernels_of_an_ensemble(is_symmetric: bool, chunk_size: int | None) -> None:
    params, x1 = ensemble(3), torch.randn(5, 3, dtype=torch.float64)
    x2 = None if is_symmetric else torch.randn(4, 3, dtype=torch.float64)

    def kernel(params: dict[str, Tensor]) -> Tensor:
        return jacfunc.ntk(scores, params, x1, x2, chunk_size=chunk_size)

    found = torch.func.vmap(kernel)(params)
    for number in range(3):
        one = member(params, number)
        left, right = written_out(one, x1), written_out(one, x1 if x2 is None else x2)
        wanted = torch.einsum("aip,bjp->abij", left, right)
        torch.testing.assert_close(found[number], wanted, rtol=0, atol=1e-10)


def test_gramians_of_an_ensemble() -> None:
    params, x = ensemble(3), torch.randn(3, dtype=torch.float64)
    found = torch.func.vmap(lambda p: jacfunc.gram(lambda p: scores(p, x))(p))(params)
    for number in range(3):
        rows = written_out(member(params, number), x[None])[0]
        torch.testing.assert_close(found[number], rows @ rows.mT, rtol=0, atol=1e-10)
