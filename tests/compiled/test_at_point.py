"""A compiled function at its first arguments: what depends on them alone is computed once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import jacfunc
from jacfunc import Compiled

Params = dict[str, Tensor]
X = torch.tensor([0.3, -0.5, 0.7])


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    return x, torch.tensor([0, 1, 1, 0])


def vector(model: nn.Module, seed: int) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for name, p in model.named_parameters()
    }


def of_hessian(model: nn.Module, x: Tensor, y: Tensor, v: Params) -> Params:
    """The Hessian of the loss times a vector, by plain autograd."""
    params = dict(model.named_parameters())
    value = nn.functional.cross_entropy(model(x), y)
    first = torch.autograd.grad(value, list(params.values()), create_graph=True)
    products = torch.autograd.grad(first, list(params.values()), list(v.values()))
    return dict(zip(params, products, strict=True))


def of_gauss_newton(model: nn.Module, x: Tensor, y: Tensor, v: Params) -> Params:
    """The same of the Gauss-Newton matrix, from rows of J that are taken one by one."""
    params, out = dict(model.named_parameters()), model(x)
    flat = torch.cat([v[name].flatten() for name in params])
    rows = [
        torch.cat([r.flatten() for r in torch.autograd.grad(o, list(params.values()), None, True)])
        for o in out.flatten()
    ]
    matrix, p = torch.stack(rows), out.softmax(1).detach()
    hessian = torch.block_diag(*(torch.diag(q) - torch.outer(q, q) for q in p)) / len(x)
    product = matrix.T @ (hessian @ (matrix @ flat))
    parts = product.split([p.numel() for p in params.values()])
    return {n: part.view(p.shape) for (n, p), part in zip(params.items(), parts, strict=True)}


def compiled(model: nn.Module, name: str) -> Compiled[Any, Any]:
    def hvp(x: Tensor, y: Tensor, v: Params) -> Params:
        def loss(params: Params) -> Tensor:
            return nn.functional.cross_entropy(torch.func.functional_call(model, params, x), y)

        return jacfunc.hvp(loss, (dict(model.named_parameters()),), (v,))[1][0]

    def ggn(x: Tensor, y: Tensor, v: Params) -> Params:
        return jacfunc.ggn(model, nn.functional.cross_entropy)(x, y) @ v

    return jacfunc.compile({"hvp": hvp, "ggn": ggn}[name], backend="replay")


EXPECTED = {"hvp": of_hessian, "ggn": of_gauss_newton}


@pytest.mark.parametrize("name", EXPECTED)
def test_products(name: str) -> None:
    model = perceptron()
    product = compiled(model, name)
    for seed in range(3):
        at_batch = product.at(*batch(seed))
        for other in range(2):
            v = vector(model, other)
            expected = EXPECTED[name](model, *batch(seed), v)
            torch.testing.assert_close(at_batch(v), expected)
        with torch.no_grad():
            for param in model.parameters():
                param.mul_(0.8)
        torch.testing.assert_close(at_batch(v), expected)  # as it was


def test_inductor() -> None:
    at_point = jacfunc.compile(lambda x, v: x.exp().sum() * v).at(X)
    for v in (X, 2 * X):
        torch.testing.assert_close(at_point(v), X.exp().sum() * v)


@pytest.mark.parametrize("name", EXPECTED)
def test_nothing_of_the_point_is_computed_again(name: str) -> None:
    model = perceptron()
    at_batch, v = compiled(model, name).at(*batch(0)), vector(model, 0)
    at_batch(v)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        at_batch(v)
    names = {event.name for event in seen.events()}
    assert "aten::mm" in names
    assert not names & {"aten::tanh", "aten::_softmax", "aten::_log_softmax"}


class Gated(nn.Module):
    """Samples are coupled where the mean of a sum over them is large."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(40, 60), nn.Linear(60, 50), nn.Linear(50, 2)

    def forward(self, x: Tensor) -> Any:
        inner = self.inner(self.first(x).tanh()).tanh()
        return self.last(inner * (1 + torch.relu(x.mean() - 1) * inner.mean(0)))


def wide(model: nn.Module, scale: float) -> tuple[nn.Module, Tensor, Tensor]:
    x = torch.randn(16, 40, generator=torch.Generator().manual_seed(0)).double()
    return model.double(), x + scale, torch.arange(16) % 2


def test_gauss_newton_products_need_no_pass_through_layers() -> None:
    """A product takes two products of matrices a layer; to pass through layers takes four."""
    widths = ((40, 60), (60, 50), (50, 2))
    layers = [nn.Sequential(nn.Linear(*each), nn.Tanh()) for each in widths]
    model, x, y = wide(nn.Sequential(*layers), 0.0)
    at_batch, v = compiled(model, "ggn").at(x, y), vector(model, 1)
    torch.testing.assert_close(at_batch(v), of_gauss_newton(model, x, y, v))
    with FlopCounterMode(display=False) as counter:
        at_batch(v)
    assert counter.get_total_flops() == 2 * 2 * len(x) * sum(n * m for n, m in widths)
    v = {
        name: x.mT.contiguous().mT if x.dim() == 2 else x[:1].expand(x.shape)
        for name, x in v.items()
    }
    torch.testing.assert_close(at_batch(v), of_gauss_newton(model, x, y, v))


@pytest.mark.parametrize("independent", [None, True])
def test_samples_that_are_coupled_at_some_points(independent: Any) -> None:
    """Factors know nothing of that, whatever a user says; there products pass through layers."""
    model, *_ = wide(Gated(), 0.0)
    loss = nn.functional.cross_entropy
    ggn = jacfunc.ggn(model, loss, independent=independent)
    product, v = jacfunc.compile(lambda x, y, v: ggn(x, y) @ v, backend="replay"), vector(model, 1)
    flops = []
    for scale in (0.0, 3.0, 0.0):
        _, x, y = wide(model, scale)
        at_batch = product.at(x, y)
        torch.testing.assert_close(at_batch(v), of_gauss_newton(model, x, y, v))
        with FlopCounterMode(display=False) as counter:
            at_batch(v)
        flops.append(counter.get_total_flops())
    assert len(product.compilations) == 1
    assert (flops[0] < flops[1]) == (independent is True)
    assert flops[0] == flops[2]


def test_derivatives_of_activations_are_kept() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 2)).double()
    for name in EXPECTED:
        at_batch, v = compiled(model, name).at(*batch(0)), vector(model, 0)
        torch.testing.assert_close(at_batch(v), EXPECTED[name](model, *batch(0), v))
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            at_batch(v)
        assert not {"aten::gelu", "aten::gelu_backward"} & {each.name for each in seen.events()}


def test_points_share_what_is_compiled() -> None:
    push = jacfunc.compile(lambda x, v: jacfunc.jvp(torch.sin, (x,), (v,))[1], backend="replay")
    for number in range(3):
        x = torch.full((2,), float(number))
        torch.testing.assert_close(push.at(x)(torch.ones(2)), x.cos())
        assert len(push.compilations) == 1
    push.at(x.double())(torch.ones(2).double())  # another kind
    assert len(push.compilations) == 2


def test_its_point_stays() -> None:
    """Neither what is written into tensors nor what is put into containers matters later."""
    scale = torch.tensor(2.0)
    product = jacfunc.compile(lambda at, v: scale * at["x"].sin() * v, backend="replay")
    at = {"x": torch.ones(2)}
    at_point = product.at(at)
    at["x"].mul_(3.0)
    at["y"] = torch.ones(2)
    scale.mul_(5.0)
    v = torch.tensor([1.0, 2.0])
    expected = 2.0 * torch.ones(2).sin() * v
    for _ in range(2):
        result = at_point(v)
        torch.testing.assert_close(result, expected)
        result.zero_()


def test_results_are_the_callers_own() -> None:
    """Results that do not depend on what is left, too."""
    both = jacfunc.compile(lambda x, v: (x, x.sin(), x.t(), x @ v), backend="replay")
    x = torch.randn(3, 3)
    at_point = both.at(x)
    for _ in range(2):
        results = at_point(torch.eye(3))
        for result, expected in zip(results, (x, x.sin(), x.t(), x), strict=True):
            torch.testing.assert_close(result, expected)
            result.zero_()


def test_tensors_that_overlap() -> None:
    rows = torch.randn(3).expand(4, 3)
    columns = torch.randn(8, 3)[::2]
    product = jacfunc.compile(lambda a, b, v: (a * b).tanh() @ v, backend="replay")
    v = torch.randn(3)
    torch.testing.assert_close(product.at(rows, columns)(v), (rows * columns).tanh() @ v)


def test_parameters_alone() -> None:
    model = perceptron()
    at_now = jacfunc.compile(jacfunc.module_jacobian(model, "inputs"), backend="replay").at()
    x = batch(0)[0][0]
    expected = torch.autograd.functional.jacobian(model, x)
    torch.testing.assert_close(at_now(x), expected)
    with torch.no_grad():
        model[0].weight.zero_()  # type: ignore[index]
    torch.testing.assert_close(at_now(x), expected)


def test_results_are_detached() -> None:
    weight = torch.ones(2, requires_grad=True)
    at_point = jacfunc.compile(lambda x, v: weight * x.sin() * v, backend="replay").at(weight)
    result = at_point(torch.ones(2))
    torch.testing.assert_close(result, torch.ones(2).sin())
    assert not result.requires_grad


def test_another_kind_of_call_after_a_change() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).eval()
    at_now = jacfunc.compile(lambda x: model(x), backend="replay").at()
    x = torch.ones(2)
    expected = at_now(x)
    model.train()
    torch.testing.assert_close(at_now(x), expected)
    model[1] = nn.Identity()
    with pytest.raises(ValueError, match="when at\\(\\) was called, got others"):
        at_now(torch.ones(3, 2))


def test_modes_see_the_operators() -> None:
    at_point = jacfunc.compile(lambda x, v: x.exp() @ v, backend="replay").at(torch.eye(3))
    expected = at_point(torch.eye(3))
    with FlopCounterMode(display=False) as counter:
        torch.testing.assert_close(at_point(torch.eye(3)), expected)
    assert counter.get_total_flops() == 2 * 3**3


@pytest.mark.parametrize(
    "call",
    [
        lambda func: torch.func.vmap(func)(torch.eye(3)),
        lambda func: torch.func.jvp(func, (X,), (X,)),
        lambda func: torch.func.grad(lambda v: func(v).sum())(X),
        lambda func: func(X.clone().requires_grad_()),
    ],
)
def test_what_is_left_is_not_transformed(call: Any) -> None:
    at_point = jacfunc.compile(lambda x, v: x.exp() * v, backend="replay").at(X)
    for _ in range(2):
        with pytest.raises(NotImplementedError, match="must be called outside of transforms"):
            call(at_point)
        torch.testing.assert_close(at_point(X), X.exp() * X)
