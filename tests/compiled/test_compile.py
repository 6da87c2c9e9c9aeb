"""Compiled derivatives: backends, graphs of results, threads, what is kept and what is computed."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import jacfunc
from tests.conftest import DEVICE

X = torch.tensor([0.3, -0.5, 0.7])


def perceptron(width: int = 5) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2))


def test_inductor() -> None:
    model = perceptron()
    jac = jacfunc.compile(jacfunc.module_jacobian(model, per_sample=True, flat=True))
    xs = torch.randn(4, 3)
    jac(xs)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(0.9)
    blocks = torch.func.vmap(torch.func.jacrev(torch.func.functional_call, 1), (None, None, 0))(
        model, {name: p.detach() for name, p in model.named_parameters()}, xs
    )
    expected = torch.cat([block.flatten(2) for block in blocks.values()], 2)
    torch.testing.assert_close(jac(xs), expected)
    (compilation,) = jac.compilations
    assert compilation.compile_seconds > compilation.call_seconds > 0
    assert compilation.calls_to_repay > 1


def test_a_package_is_found_by_the_next(tmp_path: Path) -> None:
    for _ in range(2):
        jac = jacfunc.compile(jacfunc.jacrev(torch.sin), backend="aot", directory=tmp_path)
        torch.testing.assert_close(jac(X), torch.diag(X.cos()))
        torch.testing.assert_close(jac(2 * X), torch.diag((2 * X).cos()))
        assert len([*tmp_path.glob("*.pt2")]) == 1
    (compilation,) = jac.compilations
    assert compilation.compile_seconds < 5


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


def test_trees() -> None:
    def func(params: dict[str, Any], x: Tensor) -> Any:
        out = params["w"] @ x
        return Pair(out.sin(), {"sum": out.sum() * params["b"], "none": None}), ("aux", x)

    derive = jacfunc.jacrev(func, (0, 1), has_aux=True)
    jac = jacfunc.compile(derive, backend="replay")
    for seed in range(3):
        torch.manual_seed(seed)
        args = {"w": torch.randn(2, 3), "b": torch.tensor(2.0), "n": 3}, torch.randn(3)
        jacobian, aux = jac(*args)
        out = args[0]["w"] @ args[1]
        torch.testing.assert_close(jacobian.first[1], torch.diag(out.cos()) @ args[0]["w"])
        torch.testing.assert_close(jacobian.second["sum"][0]["b"], out.sum())
        assert jacobian.second["none"] is None
        assert jacobian.first[0]["n"] is None
        assert aux[0] == "aux"
        torch.testing.assert_close(aux[1], args[1])
    assert len(jac.compilations) == 1


def test_results_are_the_callers_own() -> None:
    weight = torch.ones(3, 3)
    jac = jacfunc.compile(jacfunc.jacrev(lambda x: weight @ x), backend="replay")
    jac(X)
    for _ in range(2):
        answer = jac(X)
        torch.testing.assert_close(answer, torch.ones(3, 3))
        answer.zero_()
    constant = jacfunc.compile(jacfunc.jacrev(lambda x: 2 * x), backend="replay")
    constant(X)
    for _ in range(2):
        answer = constant(X)
        torch.testing.assert_close(answer, 2 * torch.eye(3))
        answer.zero_()


def test_a_jacobian_inside_a_loss_trains() -> None:
    model = perceptron()
    derive = jacfunc.jacrev(model)
    jac = jacfunc.compile(derive, backend="replay")
    x = X.clone().requires_grad_()
    jac(x)
    inputs = (x, *model.parameters())
    for factor in (1.0, 0.5):
        with torch.no_grad():
            x.mul_(factor)
        got = torch.autograd.grad(jac(x).square().sum(), inputs, allow_unused=True)
        wanted = torch.autograd.grad(
            torch.func.jacrev(model)(x).square().sum(), inputs, allow_unused=True
        )
        for one, other in zip(got, wanted, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other)
    with pytest.raises(NotImplementedError, match="differentiated once at most"):
        torch.autograd.grad(jac(x).square().sum(), x, create_graph=True)
    assert len(jac.compilations) == 1


def test_many_threads() -> None:
    model = perceptron()
    jac = jacfunc.compile(
        jacfunc.module_jacobian(model, per_sample=True, flat=True), backend="replay"
    )
    eager = jacfunc.module_jacobian(model, per_sample=True, flat=True)
    points = [torch.randn(1 + n % 3, 3) for n in range(12)]
    expected = [eager(x) for x in points]
    with ThreadPoolExecutor(4) as pool:
        answers = pool.map(lambda n: (jac if n % 4 else eager)(points[n % 12]), range(96))
        for n, answer in enumerate(answers):
            torch.testing.assert_close(answer, expected[n % 12])
    assert len(jac.compilations) == 3


def test_little_is_kept() -> None:
    jac = jacfunc.compile(jacfunc.jacrev(torch.sin), backend="replay")
    for size in range(1, 20):
        jac(torch.ones(size))
    assert len(jac.compilations) == 16


def test_nothing_is_kept_of_what_is_gone() -> None:
    model = perceptron()
    jac = jacfunc.compile(jacfunc.module_jacobian(model, "inputs"), backend="replay")
    argument = X.clone()
    answer = jac(argument)
    gone = [weakref.ref(each) for each in (model, argument, answer, model[0].weight)]  # type: ignore[index]
    del argument, answer
    gc.collect()
    assert gone[1]() is None
    assert gone[2]() is None
    del model, jac
    gc.collect()
    assert [each() for each in gone] == [None] * 4


FACTORIES = {"aten::eye", "aten::zeros", "aten::ones", "aten::arange", "aten::full", "aten::randn"}
READS = {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal"}


@pytest.mark.parametrize("name", ["jacrev", "jacfwd", "hessian", "module", "ntk", "ggn"])
def test_neither_seeds_are_built_nor_numbers_read(name: str) -> None:
    model, x, y = perceptron().requires_grad_(False), torch.randn(4, 3), torch.randn(4, 2)
    model.requires_grad_(name in ("module", "ntk", "ggn"))
    v = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    loss = nn.MSELoss()
    call: Any = {
        "jacrev": jacfunc.jacrev(model),
        "jacfwd": jacfunc.jacfwd(model),
        "hessian": jacfunc.hessian(lambda x: model(x).square().sum()),
        "module": jacfunc.module_jacobian(model, per_sample=True),
        "ntk": lambda x: jacfunc.ntk(model, None, x),
        "ggn": lambda x: jacfunc.ggn(model, loss)(x, y) @ v,
    }[name]
    jac = jacfunc.compile(call, backend="replay")
    jac(x)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        jac(x)
    names = {event.name for event in seen.events()}
    assert not names & (FACTORIES | READS)
    assert "aten::mm" in names or "aten::addmm" in names


def test_either_direction() -> None:
    """Auto compiled takes the way of fewer operations."""
    weights = [torch.randn(4, 40), torch.randn(40, 40)]
    for chain in (weights, [w.T for w in weights[::-1]]):
        func = lambda x, chain=chain: torch.tanh(x @ chain[0]) @ chain[1]  # noqa: E731
        x = torch.randn(len(chain[0]))
        counts = []
        for derive in (jacfunc.jacobian(func), jacfunc.jacrev(func), jacfunc.jacfwd(func)):
            jac = jacfunc.compile(derive, backend="replay")
            torch.testing.assert_close(jac(x), torch.func.jacrev(func)(x))
            with profile(activities=[ProfilerActivity.CPU], with_flops=True) as seen:
                jac(x)
            counts.append(sum(event.flops for event in seen.events()))
        assert counts[0] == min(counts[1:])


@pytest.mark.parametrize("rounds", ["autocast", "autocast inside", "cast inside"])
@pytest.mark.parametrize("scale", [1.0, 2.0, 3.0])
def test_rounded_on_the_way(rounds: str, scale: float) -> None:
    """The trace may sweep in another direction, and rounds elsewhere: as much as its dtypes do."""
    first, last = (
        torch.linspace(-1, 1, n).mul(7 * n).cos().view(-1, m) for n, m in ((15, 3), (20, 5))
    )
    dtype = torch.bfloat16 if rounds == "cast inside" else torch.float32

    def func(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=rounds == "autocast inside"):
            return (last.to(dtype) @ (first.to(dtype) @ x.to(dtype)).tanh()).tanh().float()

    compiled, x = jacfunc.compile(jacfunc.jacobian(func), backend="replay"), scale * X
    with torch.autocast("cpu", torch.bfloat16, enabled=rounds == "autocast"):
        answer = compiled(x)
    hidden = (first @ x).tanh()
    out = (last @ hidden).tanh()
    expected = (1 - out**2).diag() @ last @ (1 - hidden**2).diag() @ first
    torch.testing.assert_close(answer, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


@pytest.mark.cuda
def test_cuda_graphs() -> None:
    model = perceptron().to(DEVICE)
    jac = jacfunc.compile(jacfunc.module_jacobian(model, "inputs"), backend="cudagraphs")
    for factor in (1.0, 2.0):
        x = factor * X.to(DEVICE)
        torch.testing.assert_close(jac(x), torch.func.jacrev(model)(x).detach())
        with torch.no_grad():
            model[0].weight.mul_(0.5)  # type: ignore[index]
        torch.testing.assert_close(jac(x), torch.func.jacrev(model)(x).detach())
        model[0].weight.data = torch.randn(5, 3, device=DEVICE)  # type: ignore[index]
        torch.testing.assert_close(jac(x), torch.func.jacrev(model)(x).detach())
    assert len(jac.compilations) == 1


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["inductor", "replay", "cudagraphs"])
def test_backends_on_cuda(backend: Any) -> None:
    model = perceptron().to(DEVICE)
    jac = jacfunc.compile(jacfunc.module_jacobian(model, per_sample=True), backend=backend)
    eager = jacfunc.module_jacobian(model, per_sample=True)
    for _ in range(2):
        xs = torch.randn(4, 3, device=DEVICE)
        torch.testing.assert_close(jac(xs), eager(xs))
