"""Backward passes that run a module again, and what was computed from its parameters before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import jacfunc
from tests.kinds.losses import half_square
from tests.kinds.modules import floats


def looped(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """One backward pass a row."""
    params, outputs = dict(module.named_parameters()), module(x)
    rows = [
        torch.autograd.grad(out, list(params.values()), retain_graph=True)
        for out in outputs.flatten()
    ]
    pairs = zip(params, zip(*rows, strict=True), strict=True)
    return {n: torch.stack(r).view(*outputs.shape, *r[0].shape) for n, r in pairs}


class Again(torch.autograd.Function):
    """Keeps no graph: the backward pass evaluates the function once more."""

    @staticmethod
    def forward(ctx: Any, func: Callable[[Tensor], Tensor], x: Tensor, *params: Tensor) -> Tensor:
        ctx.func = func
        ctx.save_for_backward(x, *params)
        return func(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, *params = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return None, *torch.autograd.grad(ctx.func(x), (x, *params), grad)


class AgainUnderVmap(Again):
    generate_vmap_rule = True

    @staticmethod
    def forward(func: Callable[[Tensor], Tensor], x: Tensor, *params: Tensor) -> Tensor:
        return func(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.func, *tensors = inputs
        ctx.save_for_backward(*tensors)


class Adjoint(torch.autograd.Function):
    """Steps of Euler, of which the backward pass solves for the adjoint state."""

    @staticmethod
    def forward(ctx: Any, func: Callable[[Tensor], Tensor], x: Tensor, *params: Tensor) -> Tensor:
        ctx.func, states = func, [x]
        for _ in range(3):
            states.append(states[-1] + 0.1 * func(states[-1]))
        ctx.save_for_backward(*states, *params)
        return states[-1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        states, params = ctx.saved_tensors[:3], ctx.saved_tensors[4:]
        totals = list(map(torch.zeros_like, params))
        for state in reversed(states):
            with torch.enable_grad():
                state = state.detach().requires_grad_()
                after = state + 0.1 * ctx.func(state)
                result = torch.autograd.grad(after, (state, *params), grad, allow_unused=True)
            grad, grads = result[0], result[1:]
            totals = [a if b is None else a + b for a, b in zip(totals, grads, strict=True)]
        return None, grad, *totals


class Implicit(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.inner, self.outer, self.function = nn.Linear(2, 2), nn.Linear(2, 2), function

    def forward(self, x: Tensor) -> Tensor:
        params = self.inner.parameters()
        hidden = self.function.apply(lambda h: torch.tanh(self.inner(h)), x, *params)
        return self.outer(hidden)


FUNCTIONS = pytest.mark.parametrize("function", [Again, AgainUnderVmap, Adjoint])
STRATEGIES = ("auto", "reverse", "looped", "structured")


def right_or_refused(ask: Callable[[], Any], expected: Any, may_refuse: bool) -> None:
    try:
        result = ask()
    except (NotImplementedError, RuntimeError):
        assert may_refuse
        return
    torch.testing.assert_close(result, expected)


@FUNCTIONS
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("per_sample", [False, True])
def test_backward_passes_run_what_was_evaluated(
    function: Any, strategy: str, per_sample: bool
) -> None:
    torch.manual_seed(0)
    module, x = Implicit(function).double(), floats(3, 2)
    whole = looped(module, x)
    expected = {n: torch.stack([looped(module, row[None])[n][0] for row in x]) for n in whole}
    jac = jacfunc.module_jacobian(module, per_sample=per_sample, strategy=strategy)
    for _ in range(2):
        vmapped = per_sample and strategy in ("reverse", "structured")
        right_or_refused(lambda: jac(x), expected if per_sample else whole, vmapped)


@FUNCTIONS
def test_streams_run_it_too(function: Any) -> None:
    """Block by block, with another evaluation of the module between."""
    torch.manual_seed(0)
    module, x = Implicit(function).double(), floats(3, 2)
    expected = looped(module, x)
    result = {}
    for name, block in jacfunc.stream_jacobian(module)(x):
        result[name] = block
        jacfunc.module_jacobian(module)(2 * x)
    torch.testing.assert_close(result, expected)


@FUNCTIONS
@pytest.mark.parametrize("door", ["ntk", "norms", "diagonal"])
def test_factors_are_right_or_refused(function: Any, door: str) -> None:
    torch.manual_seed(0)
    module, x, y = Implicit(function).double(), floats(3, 2), floats(3, 2)
    alone = [looped(module, row[None]) for row in x]
    blocks = [torch.stack([one[name][0].reshape(2, -1) for one in alone]) for name in alone[0]]
    jacobian = torch.cat(blocks, 2)
    gradients = torch.einsum("bm,bmp->bp", module(x).detach() - y, jacobian)
    asked: dict[str, tuple[Callable[[], Any], Tensor]] = {
        "ntk": (
            lambda: jacfunc.ntk(module, None, x),
            torch.einsum("amp,bnp->abmn", jacobian, jacobian),
        ),
        "norms": (lambda: jacfunc.gradient_norms(module, half_square)(x, y), gradients.norm(dim=1)),
        "diagonal": (
            lambda: torch.cat(
                [d.flatten() for d in jacfunc.ggn(module, half_square)(x, y).diagonal().values()]
            ),
            jacobian.square().sum((0, 1)),
        ),
    }
    right_or_refused(*asked[door], may_refuse=True)


# --- computed before ---


class Helper:
    def __init__(self) -> None:
        self.store: dict[str, Tensor] = {}


class Inverting(nn.Module):
    """Computes the inverse once and keeps it where it is told."""

    def __init__(self, store: dict[str, Tensor] | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(2 * torch.eye(2) + 0.1)
        self.other = nn.Parameter(torch.ones(2))
        self.helper = Helper()
        self.kept = (lambda: self.helper.store) if store is None else (lambda: store)

    def forward(self, x: Tensor) -> Tensor:
        store = self.kept()
        if "inverse" not in store:
            store["inverse"] = torch.linalg.inv(self.weight)
        return torch.tanh(x @ store["inverse"]) + self.other


class InAttribute(Inverting):
    inverse: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.inverse is None:
            self.inverse = torch.linalg.inv(self.weight)
        return torch.tanh(x @ self.inverse) + self.other


class Partly(InAttribute):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.weight


KEEPERS: dict[str, Callable[[], nn.Module]] = {
    "attribute": InAttribute,
    "helper": Inverting,
    "closure": lambda: Inverting({}),
    "partly": Partly,
}


def doors(module: nn.Module, x: Tensor) -> dict[str, Callable[[], Any]]:
    vector = {name: torch.ones_like(param) for name, param in module.named_parameters()}
    asked: dict[str, Callable[[], Any]] = {
        f"{strategy} {per_sample}": lambda s=strategy, p=per_sample: jacfunc.module_jacobian(
            module, strategy=s, per_sample=p
        )(x)
        for strategy in (*STRATEGIES, "forward")
        for per_sample in (False, True)
    }
    return asked | {
        "rows": lambda: list(jacfunc.stream_jacobian(module, "rows")(x)),
        "samples": lambda: list(jacfunc.stream_jacobian(module, per_sample=True)(x)),
        "ntk": lambda: jacfunc.ntk(module, None, x),
        "norms": lambda: jacfunc.gradient_norms(module, half_square)(x, x),
        "diagonal": lambda: jacfunc.ggn(module, half_square)(x, x).diagonal(),
        "product": lambda: jacfunc.ggn(module, half_square)(x, x) @ vector,
        "graph": lambda: jacfunc.module_jacobian(module, create_graph=True)(x),
    }


@pytest.mark.parametrize("kept", KEEPERS)
@pytest.mark.parametrize("door", doors(nn.Linear(2, 2), floats(3, 2)))
def test_what_was_kept_with_its_graph_is_refused(kept: str, door: str) -> None:
    module, x = KEEPERS[kept]().double(), floats(3, 2)
    module(x)
    with pytest.raises(ValueError, match=r"must compute all.*'weight'.*Clear it"):
        doors(module, x)[door]()


@pytest.mark.parametrize("kept", ["attribute", "helper"])
def test_what_is_computed_in_the_call_is_differentiated(kept: str) -> None:
    """And not kept: the first call, and the next."""
    module, x = KEEPERS[kept]().double(), floats(3, 2)
    expected = looped(KEEPERS[kept]().double(), x)
    for _ in range(2):
        torch.testing.assert_close(jacfunc.module_jacobian(module)(x), expected)


@pytest.mark.filterwarnings("ignore:module_jacobian. create_graph")
def test_constants_may_lead_to_parameters() -> None:
    """Graphs may lead to parameters that are not chosen, and may come in by inputs."""
    module, x = InAttribute().double(), floats(3, 2)
    expected = looped(module, x)["other"]
    torch.testing.assert_close(
        jacfunc.module_jacobian(module, select="other")(x)["other"], expected
    )
    jacfunc.module_jacobian(module, "inputs")(x)
    linear = nn.Linear(2, 2).double()
    for create_graph in (False, True):
        jac = jacfunc.module_jacobian(linear, create_graph=create_graph)
        torch.testing.assert_close(
            jac(linear(x))["weight"].detach(), jac(linear(x).detach())["weight"].detach()
        )


@pytest.mark.parametrize("strategy", [*STRATEGIES, "forward"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_graphs_of_results_are_no_reason(strategy: str, per_sample: bool) -> None:
    module, x = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double(), floats(3, 2)
    options: dict[str, Any] = {"strategy": strategy, "per_sample": per_sample}
    result = jacfunc.module_jacobian(module, create_graph=True, **options)(x)
    gradient = torch.autograd.grad(result["0.weight"].square().sum(), module[0].weight)[0]
    assert gradient.abs().sum() > 0
    moved = {name: 2 * param for name, param in module.named_parameters()}
    jacfunc.module_jacobian(module, select=moved, create_graph=True, **options)(x)
    jacfunc.module_jacobian(module, create_graph=True, **options)(F.relu(module(x)))
