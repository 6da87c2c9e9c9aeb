"""Projections with one random matrix for each side of a parameter, against looped gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import jacfunc
from tests.curvature.test_curvature import CASES, leaves_of, of_shape, posed, sign_matrix, truth
from tests.curvature.test_curvature import Case as Problem
from tests.truth.factors import at_batch

R, C = 3, 5


class Packed(nn.Module):
    """Slices of one weight, in rows and in columns, and one that is transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.weight.chunk(2)
        hidden = torch.tanh(x @ first[:, 2:6].T) + torch.tanh(F.linear(x, second[:, :4]))
        return torch.tanh(hidden @ self.weight[3:, 1::2]) @ self.weight.T[2:6, :2]


class Experts(nn.Module):
    """One matrix for each of two experts, in a parameter of three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.unused = (
            nn.Parameter(torch.randn(2, 4, 3)),
            nn.Parameter(torch.ones(2, 2)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(torch.einsum("bi,eio->beo", x, self.weight)).sum(1)


def transposed() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(4, 6, 2, groups=2),
        nn.Tanh(),
        nn.Conv2d(6, 6, 2, groups=6),
        nn.Flatten(),
        nn.Linear(24, 2, bias=False),
    )


def classes(count: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(count, (5,))


EVERY_CASE = CASES | {
    "packed": Problem(Packed, of_shape(5, 4), F.cross_entropy, classes(2)),
    "experts": Problem(Experts, of_shape(5, 4), F.cross_entropy, classes(3)),
    "transposed": Problem(transposed, of_shape(5, 4, 2, 2), F.cross_entropy, classes(2)),
}


def matrix_of(name: str, param: Tensor) -> Tensor:
    """The random matrix of a parameter, written out: ``[numel, R C]``."""
    if param.dim() < 2:
        return sign_matrix(name, R * C).rows(param.numel())
    rows = sign_matrix(f"{name}:rows", R).rows(param.shape[0])
    return torch.kron(rows, sign_matrix(f"{name}:columns", C).rows(param[0].numel()))


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("name", EVERY_CASE)
def test_it_is_the_product_with_a_kronecker_product(name: str, chunk_size: int | None) -> None:
    case = EVERY_CASE[name]
    model, inputs, targets = case.make().double(), case.inputs(), case.targets()
    true = truth(model, case, inputs, targets)
    options: dict[str, Any] = {"per_module": (R, C), "chunk_size": chunk_size}
    project = jacfunc.random_projection(model, **options)
    features = [project(inputs)] if len(leaves_of(model(inputs))) == 1 else project(inputs).values()
    of_gradients = jacfunc.random_projection(model, loss=case.loss, **options)(inputs, targets)
    slices = jacfunc.param_slices(model)
    params = dict(model.named_parameters())
    assert list(of_gradients) == list(params)
    for key, param in params.items():
        matrix = matrix_of(key, param)
        every = torch.cat([x[key].reshape(len(inputs), -1, R * C) for x in features], 1)
        expected = true.jacobian[..., slices[key]] @ matrix
        torch.testing.assert_close(every, expected, rtol=1e-9, atol=1e-11)
        expected = true.gradients[:, slices[key]] @ matrix
        torch.testing.assert_close(of_gradients[key], expected, rtol=1e-9, atol=1e-11)
    for output, leaf in zip(features, leaves_of(model(inputs)), strict=True):
        assert {x.shape for x in output.values()} == {(*leaf.shape, R * C)}


class Largest(TorchDispatchMode):
    """The most memory behind a tensor that an operation returned, in bytes."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.nbytes = max(self.nbytes, leaf.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Linear(128, 96, bias=False), (4, 3, 128)),
        (lambda: nn.Conv1d(96, 96, 1, groups=2, bias=False), (4, 96, 3)),
        (lambda: nn.ConvTranspose1d(96, 96, 1, groups=2, bias=False), (4, 96, 3)),
        (lambda: nn.MultiheadAttention(64, 2, bias=False, batch_first=True), (4, 3, 64)),
    ],
)
def test_no_gradient_is_written_out(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    layer, x = make(), torch.randn(shape)
    attention = isinstance(layer, nn.MultiheadAttention)
    inputs = (x, x, x) if attention else (x,)

    def loss(outputs: Any, targets: Tensor) -> Tensor:
        return (outputs[0] if attention else outputs).square().sum()

    project = jacfunc.random_projection(layer, None, loss, per_module=(4, 4), independent=True)
    project(*inputs, x)
    with Largest() as largest:
        project(*inputs, x)
    assert largest.nbytes < len(x) * min(param.nbytes for param in layer.parameters())


@pytest.mark.parametrize("name", ["mlp", "convolutions", "attention", "shared", "positions"])
def test_layers_are_known_by_their_sides(name: str) -> None:
    model, _, inputs, _, _ = posed(name)
    point = at_batch(model, inputs)
    factors = point.between(0, point.size)
    units = tuple(torch.ones_like(leaf).unsqueeze(0) for leaf in factors.outputs)
    for key, parts in point.contracted(factors, units, dict).items():
        shape = point.params[key].shape
        assert len(shape) < 2 or all(part.sides(shape) is not None for part in parts), key


def test_products_are_kept_in_the_mean_over_seeds() -> None:
    """Of 1000 seeds, within five times the error of a mean."""
    model, x = nn.Linear(3, 2).double(), torch.randn(4, 3).double()
    jacobian = jacfunc.module_jacobian(model, per_sample=True, flat=True)(x)[:, 0]
    products = torch.zeros(1000, 4, 4, dtype=torch.float64)
    for seed in range(len(products)):
        named = jacfunc.random_projection(model, per_module=(2, 2), seed=seed, independent=True)(x)
        features = torch.cat([block[:, 0] for block in named.values()], 1)
        products[seed] = features @ features.T
    error = (products.mean(0) - jacobian @ jacobian.T).abs()
    assert (error < 5 * products.std(0) / len(products) ** 0.5).all()


def test_seeds_and_places() -> None:
    model, x = nn.Linear(4, 3), torch.randn(6, 4)
    project = jacfunc.random_projection(model, per_module=(2, 3), seed=1)
    features = project(x)
    alone = jacfunc.random_projection(model, per_module=(2, 3), seed=1, select="weight")(x)
    assert list(alone) == ["weight"]
    torch.testing.assert_close(alone["weight"], features["weight"])
    other = jacfunc.random_projection(model, per_module=(2, 3), seed=2)(x)
    assert not torch.allclose(other["weight"], features["weight"])
    out = {name: torch.zeros(6, 3, 6) for name in ("bias", "weight")}
    into = jacfunc.random_projection(model, per_module=(2, 3), seed=1, out=out, chunk_size=4)
    assert into(x) is out
    for name, block in features.items():
        torch.testing.assert_close(out[name], block)
    params = [model.weight.detach(), {"b": model.bias.detach()}]
    of_function: Any = jacfunc.random_projection(
        lambda p, x: x @ p[0].T + p[1]["b"], loss=F.mse_loss, per_module=(2, 3)
    )(params, x, torch.zeros(6, 3))
    assert of_function[0].shape == of_function[1]["b"].shape == (6, 6)
