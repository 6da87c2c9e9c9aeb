"""Functions that leave torch: what NumPy or Python numbers compute has no graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import jacfunc

X = torch.tensor([0.3, -0.5, 0.7])
WORDS = "func must compute its outputs by torch, got one that went through NumPy or a Python number"


def by_array(x: Tensor) -> Tensor:
    return torch.as_tensor(np.asarray(x.detach()) ** 2)


def by_list(x: Tensor) -> Tensor:
    return 2 * torch.tensor(x.tolist())


def by_item(x: Tensor) -> Tensor:
    return torch.tensor(x[0].item() ** 2)


def beside_a_graph(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.sin(), by_array(x)


LEAVING = [by_array, by_list, by_item, beside_a_graph]
STRATEGIES = ["auto", "reverse", "looped", "structured"]


@pytest.mark.parametrize("func", LEAVING)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_graph_that_is_lost_is_no_zero(func: Callable[..., Any], strategy: str) -> None:
    jac = jacfunc.jacobian(func, strategy=strategy)
    for _ in range(2):  # a function is watched until it is known
        with pytest.raises(ValueError, match=f"^jacobian: {WORDS}"):
            jac(X)


@pytest.mark.parametrize("func", [by_list, by_item])
def test_forward_mode(func: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=f"^jacfwd: {WORDS}"):
        jacfunc.jacfwd(func)(X)
    with pytest.raises(ValueError, match=f"^jvp: {WORDS}"):
        jacfunc.jvp(func, (X,), (X,))


def constant(x: Tensor) -> Tensor:
    return torch.full((3,), 2.0)


def stopped(x: Tensor) -> Tensor:
    return 2 * x.detach()


def stopped_and_told(x: Tensor) -> Tensor:
    float(x.detach().sum())
    with torch.no_grad():
        return constant(x)


def counted(x: Tensor) -> Tensor:
    return torch.full((3,), float((x > 0).sum().item()))


def at_a_step(x: Tensor) -> Tensor:
    """Each entry steps on one side of the point: 0 is not above 0."""
    return torch.full((3,), float(((x - X) > 0).sum().item()))


def at_a_tie(x: Tensor) -> Tensor:
    return torch.full((3,), float((x - X)[0].item() > (x - X)[1].item()))


@pytest.mark.parametrize(
    "func", [constant, stopped, stopped_and_told, counted, at_a_step, at_a_tie]
)
@pytest.mark.parametrize("strategy", [*STRATEGIES, "forward"])
def test_what_does_not_change_has_the_derivative_zero(
    func: Callable[..., Any], strategy: str
) -> None:
    value, jac = jacfunc.value_and_jacobian(func, strategy=strategy)(X)
    assert torch.equal(jac, torch.zeros(3, 3))
    assert torch.equal(value, func(X))


def test_what_is_only_looked_at_changes_nothing() -> None:
    seen = []

    def func(x: Tensor) -> Tensor:
        seen.append(x.sum().item())
        return x.sin()

    torch.testing.assert_close(jacfunc.jacrev(func)(X), X.cos().diag())
    assert len(seen) == 1


def test_beside_the_outputs_it_is_aux() -> None:
    jac, aux = jacfunc.jacrev(lambda x: (x.sin(), by_array(x)), has_aux=True)(X)
    torch.testing.assert_close(jac, X.cos().diag())
    torch.testing.assert_close(aux, X.square())


def test_random_numbers_are_drawn_as_if_nothing_had_been_looked_at() -> None:
    def func(x: Tensor) -> tuple[Tensor, Tensor]:
        noise = torch.rand(3)
        return x * noise, torch.tensor(float((x > 0).sum().item()))

    torch.manual_seed(0)
    jac, _ = jacfunc.jacrev(func)(X)
    after = torch.rand(1)
    torch.manual_seed(0)
    torch.testing.assert_close(jac, torch.rand(3).diag())
    assert torch.equal(after, torch.rand(1))


def test_parts_beside_the_tensors_are_those_of_the_point() -> None:
    def func(x: Tensor) -> tuple[Tensor, list[float]]:
        total = x.sum().item()
        return torch.full((2,), float(total > 0)), [total]

    (value, told), jac = jacfunc.value_and_jacobian(func, has_aux=True)(X)
    assert torch.equal(jac, torch.zeros(2, 3))
    assert torch.equal(value, torch.ones(2))
    assert told == [X.sum().item()]


class Rounded(nn.Module):
    """A layer whose output makes a detour."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(np.tanh(self.layer(x).detach().numpy()))


XS, TARGETS = torch.linspace(-1, 1, 12).view(4, 3), torch.ones(4, 2)
mse = nn.functional.mse_loss
DOORS: dict[str, Callable[[nn.Module], Any]] = {
    "module_jacobian": lambda m: jacfunc.module_jacobian(m)(XS),
    "stream_jacobian": lambda m: list(jacfunc.stream_jacobian(m)(XS)),
    "ntk": lambda m: jacfunc.ntk(m, None, XS),
    "gradient_norms": lambda m: jacfunc.gradient_norms(m, mse)(XS, TARGETS),
    "random_projection": lambda m: jacfunc.random_projection(m, 2)(XS),
    "ggn": lambda m: jacfunc.ggn(m, mse)(XS, TARGETS).diagonal(),
}


@pytest.mark.parametrize("door", DOORS)
def test_modules(door: str) -> None:
    with pytest.raises(ValueError, match=f"^{door}: {WORDS}"):
        DOORS[door](Rounded())


@pytest.mark.parametrize("strategy", [*STRATEGIES])
@pytest.mark.parametrize("wrt", ["params", "inputs"])
def test_modules_per_sample(strategy: str, wrt: str) -> None:
    with pytest.raises(ValueError, match=f"^module_jacobian: {WORDS}"):
        jacfunc.module_jacobian(Rounded(), wrt, per_sample=True, strategy=strategy)(XS)


def test_a_product_with_parameters_is_watched_too() -> None:
    """Torch hides what runs inside an autograd.Function from the watch."""
    module = Rounded()
    with pytest.raises(ValueError, match=f"^ggn: {WORDS}"):
        jacfunc.ggn(module, mse)(XS, TARGETS) @ dict(module.named_parameters())
